"""`kp::context_attention` as an operator: what it says of its results before it runs, and under Inductor. One
process is a group of its own here."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import kp_compiler as kp
from kp_compiler.lowering import reference, ring
from kp_compiler.lowering.context import divided
from kp_compiler.lowering.context.schedules import SCHEDULES
from kp_compiler.sharding import ranks_of
from kp_compiler.specs import CAUSAL, AttentionSpec
from tests.helpers import relative_error

SPEC = AttentionSpec(0.3, CAUSAL, dead_rows="zero")
ALONE = [name for name in SCHEDULES if name != "hybrid"]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield ranks_of(dist.group.WORLD)
    dist.destroy_process_group()


def qkv() -> list[Tensor]:
    """As projections give them, and as they are after rotary angles."""
    q, k = torch.randn(2, 12, 4, 8).transpose(1, 2), torch.randn(2, 2, 12, 8)
    return [x.requires_grad_() for x in (q, k, torch.randn(2, 12, 2, 8).transpose(1, 2))]


@pytest.mark.parametrize("schedule", ALONE)
def test_opcheck(ranks: Any, schedule: str) -> None:
    """Sizes and strides of results and gradients are those that are promised."""
    plan = ring.Plan.of(ranks, SPEC, schedule, "zigzag").to_json()
    torch.library.opcheck(ring.context_attention(), (*qkv(), [], [], plan))


def test_plans_differ(ranks: Any) -> None:
    """By whatever decides what a rank does, so that no cache takes one rank's graph for another's."""
    plan = ring.Plan.of(ranks, SPEC, "ring", "zigzag")
    others = {"rank": 1, "size": 2, "group": "another", "layout": "contiguous", "schedule": "ulysses",
              "site": "layers.1", "grid": ("a", "b")}  # fmt: skip
    assert {*others, "spec"} == {field.name for field in dataclasses.fields(plan)}
    assert (
        len({plan.to_json(), *(dataclasses.replace(plan, **{k: v}).to_json() for k, v in others.items())})
        == 8
    )


def test_batches_are_divided_as_the_graph_says(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divided, "_layouts", weakref.WeakKeyDictionary())
    plan, q = ring.Plan.of(ranks, SPEC, "ring", "zigzag", "layers.0").to_json(), torch.randn(1, 2, 12, 8)

    def run() -> Tensor:
        return ring.context_attention()(q, q, q, [], [], plan)[0]

    run()  # of somebody who divides by other means
    world: Any = dist.group.WORLD
    kp.shard_sequence({"x": torch.zeros(1, 12)}, world, layout="contiguous")
    with pytest.raises(kp.KPError, match=r"layers\.0: compiled for the layout 'zigzag' .* as 'contiguous'"):
        run()
    kp.shard_sequence({"x": torch.zeros(1, 12)}, world)
    run()
    divided._layouts.clear()
    kp.shard_sequence({"x": torch.zeros(1, 12)}, dist.new_group([0]))
    with pytest.raises(kp.KPError, match="among other groups, of 1 ranks: give both the same mesh"):
        run()


def test_parts_that_a_layout_does_not_have(ranks: Any) -> None:
    plan, q = ring.Plan.of(ranks, SPEC, "ring", "zigzag", "layers.0").to_json(), torch.randn(1, 2, 11, 8)
    with pytest.raises(kp.KPError, match=r"layers\.0: a rank's 11 tokens are not the 2 equal parts"):
        ring.context_attention()(q, q, q, [], [], plan)


def test_under_inductor(ranks: Any) -> None:
    plan = ring.Plan.of(ranks, SPEC, "ring", "zigzag").to_json()
    leaves, operator = qkv(), ring.context_attention()

    @torch.compile(fullgraph=True)
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operator(q * 2.0, k, v, [], [], plan)[0].transpose(1, 2).flatten(2) + 1.0

    found = attention(*leaves)
    weights = torch.randn_like(found)
    got = [found, *torch.autograd.grad(found, leaves, weights)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = reference.attention_over(exact[0] * 2.0, *exact[1:], [], [], SPEC).transpose(1, 2).flatten(2) + 1.0
    for mine, theirs in zip(got, [want, *torch.autograd.grad(want, exact, weights.double())], strict=True):
        assert relative_error(mine.detach(), theirs.detach()) < 1e-5
