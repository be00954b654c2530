"""Rewriting a graph for a sequence that ranks share: what becomes of sites and positions, and what is an
error. What it computes: tests/distributed/test_context_parallel.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from kp_compiler.config import Config, ContextParallelConfig, Ranks
from kp_compiler.errors import KPError
from kp_compiler.lowering import ring
from kp_compiler.metadata import bodies
from kp_compiler.passes.base import Context
from kp_compiler.passes.context_parallel import ContextParallel
from kp_compiler.target import Target
from tests.test_sequence import DIM, TOKENS, Block, traced

RANKS = Ranks("some group", rank=1, size=4, device="cuda")


def share(gm: GraphModule, schedule: Any = "ring", layout: Any = "zigzag", ranks: Ranks = RANKS) -> set[str]:
    """What the pass makes of a graph whose sites are recognised; the schedules that it chose."""
    settings = ContextParallelConfig(mode="on", mesh=ranks, schedule=schedule, layout=layout)
    each, program, chosen = ContextParallel(), {}, set()
    for unit, calls in bodies(gm):
        ctx = Context(unit, Config(context_parallel=settings), Target("cuda", 90), calls, program=program)
        assert each.applies(ctx) is None
        for site in list(each.sites(unit.graph)):
            match = each.inspect(site, ctx)
            chosen.add(match.impl)
            each.rewrite(unit.graph, match, ctx)
        unit.graph.lint()
    return chosen


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
    assert share(gm, "allgather", layout) == {"allgather"}
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
        share(gm)


def test_heads_that_can_t_be_divided() -> None:
    gm, _ = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(6))
    with pytest.raises(KPError, match="6 heads can't be divided among 4 ranks"):
        share(gm, "ulysses")
    assert share(gm, "auto") <= {"ring", "allgather"}
