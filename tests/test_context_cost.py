"""What schedules are predicted to take: time against what must be computed and moved, memory by formula."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import kp_compiler as kp
from kp_compiler import context_cost, validate_context
from kp_compiler.cost import RATES
from kp_compiler.lowering.context import ring as rings
from kp_compiler.specs import CAUSAL, AttentionShape, AttentionSpec
from kp_compiler.target import Target

SPEC, H100 = AttentionSpec(128**-0.5, CAUSAL), Target("cuda", 90, name="NVIDIA H100 80GB HBM3")


def shape(tokens: int, size: int, heads: int = 32, kv_heads: int = 8, *, training: bool = True) -> Any:
    mine = tokens // size
    return AttentionShape(1, heads, kv_heads, mine, mine, 128, 128, torch.bfloat16, "cuda", training)


def predict(tokens: int, size: int, layout: Any = "zigzag", **more: Any) -> dict[str, Any]:
    return context_cost.predict(SPEC, shape(tokens, size, **more), layout, size, H100)


def test_no_schedule_is_faster_than_its_arithmetic() -> None:
    for size in (2, 8, 64):
        floor = 4 * 128 * 32 * 131072**2 / 2 / size / RATES["triton"]
        for each in predict(131072, size).values():
            assert floor <= each.forward < 3 * floor
            assert 3 * floor <= each.backward < 9 * floor


def test_what_is_fastest() -> None:
    """A ring hides what it moves behind long sequences, not behind short ones; under a causal mask contiguous
    parts leave ranks idle, except where heads are shared."""
    long = predict(1048576, 8)
    assert min(long, key=lambda name: long[name].seconds) == "ring"
    slow = context_cost.predict(SPEC, shape(8192, 8), "zigzag", 8, H100, link=1e9)
    assert slow["ring"].forward > 3 * predict(8192, 8)["ring"].forward
    parts = predict(131072, 8, "contiguous")
    assert parts["ring"].forward > 1.8 * long["ring"].forward / 64
    assert min(parts, key=lambda name: parts[name].seconds) == "ulysses"


def test_heads_that_can_t_be_divided_have_no_prediction() -> None:
    assert set(predict(8192, 8, heads=12, kv_heads=4)) == {"ring", "allgather"}


def test_memory() -> None:
    """Of a ring's exchanges keys and values of two ranks, and a tail; of all that are gathered
    every rank's, three times; of a half of the heads, or a quarter."""
    sizes = {"B": 1, "H": 32, "K": 8, "N": 131072, "D": 128, "E": 128}
    for ranks, key_heads, chunks in ((8, 8, 4), (16, 8, 2), (32, 8, 1), (8, 32, 4)):
        mine = 131072 // ranks
        sizes["K"] = key_heads
        keys, tail = 2 * key_heads * mine * 256, 32 * mine * 128
        ring, gathered = (kp.estimate_memory(name).at(**sizes, P=ranks) for name in ("ring", "allgather"))
        assert ring.forward == 2 * keys + tail
        assert gathered.forward == 3 * ranks * keys // chunks
        assert ring.own == mine * (2 * 256 * (32 + key_heads) + 4 * 32)
        assert ring.peak > ring.own + ring.forward
        found = predict(131072, ranks, kv_heads=key_heads, training=False)
        assert (found["ring"].memory, found["allgather"].memory) == tuple(
            float(each.forward) for each in (ring, gathered)
        )
    assert kp.estimate_memory("ring").at(P=4).own.free_symbols


def test_chunks_are_counted_alike() -> None:
    """Of a ring, by the formulas and where they are made, which cover all heads."""
    several = [*itertools.product((8, 32), (1, 2, 4, 8)), (28, 1), (48, 3), (16, 1), (12, 3)]
    for (heads, kv_heads), rows in itertools.product(several, (2**11, 2**13, 5 * 2**12, 2**14, 2**17)):
        q, k = (torch.empty(1, n, rows, 128, device="meta") for n in (heads, kv_heads))
        of = replace(context_cost.SYMBOLS, batch=1, heads=heads, kv_heads=kv_heads, queries=rows)
        count = rings.backward_chunks(kv_heads, heads * rows)
        assert count == of.backward_chunks()
        symbols = context_cost.SYMBOLS
        given = {symbols.batch: 1, symbols.heads: heads, symbols.kv_heads: kv_heads, symbols.queries: rows}
        assert count == symbols.backward_chunks().subs(given)
        every = rings.chunks(q, k, count)
        group = heads // kv_heads
        assert [h for mine, _ in every for h in range(heads)[mine]] == list(range(heads))
        for mine, theirs in every:
            assert {h // group for h in range(heads)[mine]} == set(range(kv_heads)[theirs])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kp.estimate_memory("rings"), "schedule: got 'rings'"),
        (lambda: kp.estimate_memory().at(Q=3), "at: got 'Q'"),
        (lambda: kp.estimate_memory("ulysses").at(H=12, P=8), "H: 12 heads can't be divided among P=8 ranks"),
        (lambda: kp.estimate_memory("hybrid").at(H=12, U=8), "can't be divided among U=8"),
        (lambda: kp.validate_context_parallel(None), "torch.distributed is not initialised"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(kp.KPConfigError, match=message):
        call()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "documents"])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100, 1024, 4096])
def test_what_schedules_are_tried_on_is_small(layout: Any, size: int) -> None:
    """As each rank compares it with one process."""
    found = validate_context._small(layout, size)
    assert found.tokens % size == 0 and found.tokens <= max(16384, 16 * size)
    assert found.tokens // size == 256 or size > 64
