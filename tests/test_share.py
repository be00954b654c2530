"""Rewriting a graph for a sequence that ranks share: what becomes of sites and positions, and what is an
error. What it computes: tests/distributed/test_context_parallel.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kp_compiler.errors import KPError
from kp_compiler.lowering import ring
from kp_compiler.passes.context_parallel import Sharing, share
from tests.test_sequence import DIM, TOKENS, Block, traced

HOW = Sharing("some group", rank=1, size=4)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    bias = (index - index[:, None]).to(q.dtype) * 0.1
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(index > index[:, None], -torch.inf))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.rand(q.shape[2], q.shape[2]) > 0.5)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)


def qkv(heads: int = 4) -> list[Tensor]:
    return [torch.randn(2, heads, TOKENS, 8) for _ in range(3)]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_sites_and_positions(layout: Any) -> None:
    gm, _ = traced(Block(), torch.randn(2, TOKENS, DIM))
    share(gm.graph, Sharing("some group", 1, 4, layout, "allgather"))
    gm.graph.lint()
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(ring.context_attention()) == 1
    assert not any("kp.attention" in str(target) for target in targets)
    (index,) = gm.graph.find_nodes(op="call_function", target=torch.arange)
    users = {user.target for user in index.users}
    assert users == ({torch.add, torch.lt} if layout == "zigzag" else {torch.add})


@pytest.mark.parametrize(
    ("function", "arguments", "code"),
    [
        (biased, qkv(), "mixes-tokens|bias"), (masked, qkv(), "mask-unproved"), (dropped, qkv(), "dropout"),
        (Block("shift"), [torch.randn(2, TOKENS, DIM)], "mixes-tokens"),
        (torch.sin, [torch.randn(3)], "no-site"),
    ],
)  # fmt: skip
def test_what_is_an_error(function: Any, arguments: list[Tensor], code: str) -> None:
    gm, _ = traced(function, *arguments)
    with pytest.raises(KPError, match=f"the sequence can't be shared.*({code})"):
        share(gm.graph, HOW)


def test_heads_that_can_t_be_divided() -> None:
    gm, _ = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(6))
    with pytest.raises(KPError, match="6 heads can't be divided among 4 ranks"):
        share(gm.graph, Sharing("some group", 1, 4, "zigzag", "ulysses"))
