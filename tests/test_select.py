"""Selection as operators: in the reference, through the compiler, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.config import AttentionConfig
from kp_compiler.lowering import ops, reference, table
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.select import select_blocks, turn_blocks
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec, MaskSpec, SparseSpec
from kp_compiler.target import Target
from tests.attend_cases import LISTED, mask_operands
from tests.helpers import relative_error

CAUSAL = MaskSpec("causal", "k <= q")


def sparse_spec(
    mask: MaskSpec = CAUSAL, selector: str = "content", density: float = 0.4, **more: Any
) -> AttentionSpec:
    return AttentionSpec(0.25, mask, dead_rows="zero", sparse=SparseSpec(selector, density, block=32, **more))


def inputs(length: int = 300, keys: int = 300, batch: int = 2, heads: int = 4) -> list[Tensor]:
    return [
        torch.randn(batch, h, n, 16) for h, n in ((heads, length), (heads // 2, keys), (heads // 2, keys))
    ]


def test_spec_comes_back() -> None:
    spec = sparse_spec(mass=0.9)
    assert AttentionSpec.from_json(spec.to_json()) == spec
    assert str(spec) == "causal, content, 90% of mass"
    assert str(sparse_spec(density=0.1)) == "causal, content, 10% of blocks"


@pytest.mark.parametrize("mask", ["causal", "document", "padding", "tensor"])
def test_full_density_is_dense(mask: str) -> None:
    """Bit by bit, whatever the selector."""
    q, k, v = inputs()
    operands = mask_operands(mask, 2, 4, 300, 300)
    for selector in ("content", "vertical_slash", "structured", "random"):
        spec = sparse_spec(LISTED.get(mask, CAUSAL), selector, 1.0)
        dense = dataclasses.replace(spec, sparse=None)
        mine, theirs = (reference.attention(q, k, v, operands, [], s.to_json()) for s in (spec, dense))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("selector", ["content", "random"])
def test_operators(selector: str) -> None:
    q, k, _ = inputs(200, 330)
    spec = sparse_spec(MaskSpec("causal", "k <= q + n0", scalars=1), selector)
    arguments = (q, k, [], [], [130], spec.to_json())
    torch.library.opcheck(select_blocks(), arguments)
    found = select_blocks()(*arguments)
    torch.library.opcheck(turn_blocks(), (*found, 330, 32))
    turned = turn_blocks()(*found, 330, 32)
    assert torch.equal(Lists(*found).visited(11), Lists(*turned).visited(7).mT)


def test_what_does_not_fit_is_refused() -> None:
    q, k, _ = inputs()
    with pytest.raises(ValueError, match="chooses no blocks"):
        select_blocks()(q, k, [], [], [], dataclasses.replace(sparse_spec(), sparse=None).to_json())
    with pytest.raises(ValueError, match="flags"):
        select_blocks()(q, k, [], [], [], sparse_spec(LISTED["prefix"]).to_json())


def test_table_has_no_dense_kernel_for_it() -> None:
    shape = AttentionShape(1, 32, 8, 8192, 8192, 128, 128, torch.bfloat16, "cuda", True)
    target = Target("cuda", 90, name="H100", has_triton=True)
    spec = sparse_spec()
    assert [each.name for each in table.order(target, spec, shape)] == ["triton"]
    refused = table.choose(spec, shape, target, AttentionConfig(impl="cudnn"))
    assert isinstance(refused, Rejection) and refused.code == "sparse"
    unproved = dataclasses.replace(spec, mask=LISTED["tensor"])
    refused = table.choose(unproved, shape, target, AttentionConfig())
    assert isinstance(refused, Rejection) and refused.code == "mask-unproved"


def test_masks_of_fewer_dimensions() -> None:
    q, k, v = inputs(100, 100)
    keep = torch.ones(100, 100, dtype=torch.bool).tril()
    spec = sparse_spec(MaskSpec("tensor", "", tensors=(0,)), "structured")
    mine = reference.attention(q, k, v, [keep], [], spec.to_json())
    assert torch.equal(
        mine, reference.attention(q, k, v, [], [], sparse_spec(CAUSAL, "structured").to_json())
    )


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    mask = (index <= index[:, None]) & (index // 70 == index[:, None] // 70)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@pytest.mark.parametrize("function", [causal, documents])
def test_through_the_compiler(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """kp's kernels choose the blocks that the reference does, small ones here; gradients are those of these
    blocks. One graph for all lengths."""
    spec_of = ops.spec_of
    sparse = SparseSpec("content", 0.5, block=32)
    monkeypatch.setattr(ops, "spec_of", lambda node: dataclasses.replace(spec_of(node), sparse=sparse))
    options = {"cpu_rewrites": True, "strict": True, "lowering": "aot_eager", "attention": {"impl": "triton"}}
    torch._dynamo.reset()
    with kp_compiler.capture_reports() as reports:
        compiled = torch.compile(function, backend="kp", fullgraph=True, options=options)
        for length in (170, 100):
            leaves = [x.requires_grad_() for x in inputs(length, length, 1, 2)]
            for x in leaves:
                torch._dynamo.mark_dynamic(x, 2)
            wide = [x.detach().clone().requires_grad_() for x in leaves]
            out = compiled(*leaves)
            spec = AttentionSpec(0.25, CAUSAL, dead_rows="zero", sparse=sparse)
            if function is documents:
                mask = MaskSpec("document", "(k <= q) & Eq(floor(q/70), floor(k/70))")
                spec = dataclasses.replace(spec, mask=mask)
            want = reference.attention(*wide, [], [], spec.to_json())
            weights = torch.randn_like(out)
            (out * weights).sum().backward()
            (want * weights).sum().backward()
            assert relative_error(out, want) < 4e-6
            assert all(relative_error(a.grad, b.grad) < 4e-6 for a, b in zip(leaves, wide, strict=True))
    sites = merged(reports).sites
    assert [(s.status, s.impl) for s in sites] == [("rewritten", "triton")]
    assert "content, 50% of blocks" in str(sites[0].spec)
