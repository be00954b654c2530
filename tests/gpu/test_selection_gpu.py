"""Choosing blocks on the device: kernels against the same in PyTorch, and attention over what they chose."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kp_compiler.lowering.attend import Plan, attend
from kp_compiler.lowering.selection import SELECTORS, lists
from tests import test_selection as selection
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu


def on_device(dtype: torch.dtype, *args: Any, **settings: Any) -> Any:
    here = selection.site(*args, block=128, **settings)
    gates = tuple(x.cuda() for x in here.gates)
    return dataclasses.replace(here, q=here.q.cuda().to(dtype), k=here.k.cuda().to(dtype), gates=gates)


@pytest.mark.parametrize("length", [2048, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", selection.MASKS)
@pytest.mark.parametrize("estimate", ["sampled", "pooled"])
def test_content(estimate: str, mask: str, dtype: torch.dtype, length: int) -> None:
    from kp_compiler.lowering.triton import selection as kernels

    here = on_device(dtype, "content", mask, length, length, estimate=estimate)
    rows = slice(0, here.rows)
    mine, want = kernels.content(here)(rows), SELECTORS["content"](here)(rows)
    kept = torch.logical_or(*here.mask(rows))  # others are not written
    assert relative_error(mine.where(kept, 0.0), want) < 1e-2  # means are rounded to the dtype


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("estimate", ["sampled", "pooled"])
def test_content_of_wide_heads(estimate: str, width: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Also laid out as projections give them, one sequence of which is longer."""
    from kp_compiler.lowering.triton import selection as kernels

    here = on_device(dtype, "content", "causal", 1500, 1500, estimate=estimate)
    q, k = (torch.randn(2, 1700, h, width, device="cuda", dtype=dtype).transpose(1, 2) for h in (4, 2))
    spec = dataclasses.replace(here.spec, scale=width**-0.5, softcap=softcap)
    here = dataclasses.replace(here, q=q[:, :, :1500], k=k[:, :, :1500], spec=spec)
    rows = slice(0, here.rows)
    mine, want = kernels.content(here)(rows), SELECTORS["content"](here)(rows)
    kept = torch.logical_or(*here.mask(rows))
    assert relative_error(mine.where(kept, 0.0), want) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("flagged", [False, True])
def test_shared_choice(selector: str, flagged: bool) -> None:
    """Under a mask of numbers and under the same as flags, which kernels of `content` don't take."""
    here = on_device(torch.bfloat16, selector, "causal", 4000, 4000, density=0.2, shared=True)
    if flagged:
        here = dataclasses.replace(here, forms=None, flags=here.mask(slice(0, here.rows)))
    found = lists.by_query(here)
    assert found.count.shape == (2, 2, here.rows)
    want = lists._by_query(here, SELECTORS[selector](here))
    off = (found.visited(here.blocks) != want.visited(here.blocks)).sum()
    assert off <= (here.rows * 2 if selector == "content" and not flagged else 0)  # rounded means


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("mask", selection.MASKS)
def test_choice(mask: str, selector: str) -> None:
    from kp_compiler.lowering.triton import selection as kernels

    settings: list[dict[str, Any]] = [{}, {"density": 0.1}]
    settings += [{"mass": 0.8}] if selector in selection.ESTIMATING else []
    for more in settings:
        here = on_device(torch.bfloat16, selector, mask, 5000, 5000, **more)
        scorer = SELECTORS[selector](here)
        mine, want = kernels.choose(here, scorer, 10_000), lists._by_query(here, scorer)
        off = (mine.visited(here.blocks) != want.visited(here.blocks)).sum()
        assert off <= (here.rows * 8 // 50 if "mass" in more else 0)  # sums in another order


@pytest.mark.parametrize("selector", SELECTORS)
def test_attention_over_the_chosen(selector: str) -> None:
    here = on_device(torch.bfloat16, selector, "causal", 3000, 3000, density=0.3)
    found = lists.by_query(here)
    turned = lists.by_key(found, here.blocks)
    assert torch.equal(found.visited(here.blocks), turned.visited(here.rows).mT)
    v = torch.randn_like(here.k)
    leaves = [x.clone().requires_grad_() for x in (here.q, here.k, v)]
    given = [*found.tensors(), *turned.tensors()]
    out = attend()(*leaves, [], [], given, None, None, None, Plan(here.spec, (128, 128)).to_json())[0]
    spread = (found.visited(here.blocks) > 0).repeat_interleave(128, 2).repeat_interleave(128, 3)
    keep = spread[..., :3000, :3000] & selection.pairs(here).cuda()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    k, value = (x.repeat_interleave(2, 1) for x in wide[1:])
    want = (wide[0] @ k.mT * here.spec.scale).masked_fill(~keep, float("-inf")).softmax(-1) @ value
    grad = torch.randn_like(want)
    out.backward(grad.to(out.dtype))
    want.backward(grad)
    assert relative_error(out, want) < 1e-2
    assert all(relative_error(a.grad, b.grad) < 1.5e-2 for a, b in zip(leaves, wide, strict=True))
