"""A sequence that many ranks share, all on one GPU: errors against float64, beside those of one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kp_compiler.lowering import reference
from kp_compiler.lowering.attend import Plan, attend
from kp_compiler.lowering.block_mask import BLOCK, lists_now
from kp_compiler.lowering.context import readers
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.specs import AttentionSpec
from tests.helpers import relative_error
from tests.test_context import MASKS
from tests.virtual import one_after_the_other

pytestmark = pytest.mark.gpu
LENGTH = 4096
PER_RANK = 1.1  # times the error of one kernel


def errors(
    name: str, kind: Any, size: int, heads: tuple[int, int], width: int
) -> dict[str, tuple[float, float]]:
    """Of out and gradients: of the ranks', and of one kernel's."""
    mask, scalars = MASKS[name]
    spec, layout = AttentionSpec(width**-0.5, mask, dead_rows="zero"), Layout(kind, size, LENGTH)
    documents = (torch.rand(1, LENGTH, device="cuda") < 0.005).cumsum(-1)
    whole = [
        torch.randn(1, n, LENGTH, width, device="cuda", dtype=torch.bfloat16)
        for n in (heads[0], *heads[1:] * 2)
    ]
    grad = torch.randn_like(whole[0])
    leaves = [x.double().requires_grad_() for x in whole]
    want = reference.attention_over(*leaves, [documents], scalars, spec)
    exact = [want, *torch.autograd.grad(want, leaves, grad.double())]
    mine = one_after_the_other(layout, spec, [documents], scalars, [*whole, grad])
    alone = alone_on(spec, [documents], scalars, whole, grad)
    names = ("out", "dq", "dk", "dv")
    return {
        what: (relative_error(a.bfloat16(), c.detach()), relative_error(b, c.detach()))
        for what, a, b, c in zip(names, mine, alone, exact, strict=True)
    }


def alone_on(
    spec: AttentionSpec, operands: list[Tensor], scalars: list[int], whole: list[Tensor], grad: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in whole]
    lists: list[Tensor] = []
    block = None
    if spec.mask.tensors or spec.mask.kind in ("prefix", "chunked"):
        lists, block = lists_now(*whole[:2], operands, scalars, spec), (BLOCK, BLOCK)
    plan = Plan(spec, block).to_json()
    out = attend()(*leaves, operands, scalars, lists, None, None, None, plan)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("name", ["causal", "window", "documents", "prefix"])
@pytest.mark.parametrize(("kind", "size"), [("zigzag", 4), ("contiguous", 8), ("zigzag", 16)])
def test_errors(name: str, kind: str, size: int) -> None:
    for what, (mine, theirs) in errors(name, kind, size, (4, 2), 64).items():
        assert mine <= PER_RANK * theirs, (what, mine, theirs)


@pytest.mark.parametrize("heads", [(8, 1), (11, 1)])
def test_readers_beside_each_other(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]) -> None:
    """Of one key head, in the backward pass; a race would be seen in one of several runs."""
    monkeypatch.setattr(readers, "ROWS", 2**9)
    for _ in range(5):
        for what, (mine, theirs) in errors("causal", "zigzag", 2, heads, 64).items():
            assert mine <= PER_RANK * theirs, (what, mine, theirs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("width", [128, 256])
def test_many_ranks(width: int, heads: tuple[int, int]) -> None:
    """Sixty-four, each with two parts of 32 tokens."""
    for what, (mine, theirs) in errors("causal", "zigzag", 64, heads, width).items():
        assert mine <= PER_RANK * theirs, (what, mine, theirs)
