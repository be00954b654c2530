"""The ways in which ranks that share a sequence see each other's keys. All compute the same.

ring         keys and values go round as far as the mask sees: memory of two ranks' parts
allgather    all of them are gathered and put in order: each query sees its keys at once
ulysses      heads are shared instead of tokens: q, k, v and out are exchanged, each rank attends over the
             whole sequence with some heads
hybrid       of a grid of ranks, rows share heads as in ulysses, and keys go round among rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kp_compiler.lowering.context import gather, heads, ring
from kp_compiler.lowering.context.exchange import Peers
from kp_compiler.lowering.context.shard import Shard


@dataclass(frozen=True)
class Groups:
    """All ranks that share a sequence; where they are a grid, those of this one's row and of its column."""

    every: Peers
    near: Peers | None = None
    far: Peers | None = None


Forward = Callable[[Shard, Groups, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Backward = Callable[
    [Shard, Groups, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]


def _ring(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return ring.forward(shard, groups.every, *tensors)


def _ring_backward(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ring.backward(shard, groups.every, *tensors)


def _allgather(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return gather.forward(shard, groups.every, *tensors)


def _allgather_backward(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gather.backward(shard, groups.every, *tensors)


def _ulysses(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return heads.forward(shard, groups.every, None, *tensors)


def _ulysses_backward(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads.backward(shard, groups.every, None, *tensors)


def _hybrid(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    assert groups.near is not None
    return heads.forward(shard, groups.near, groups.far, *tensors)


def _hybrid_backward(shard: Shard, groups: Groups, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert groups.near is not None
    return heads.backward(shard, groups.near, groups.far, *tensors)


SCHEDULES: dict[str, tuple[Forward, Backward]] = {
    "ring": (_ring, _ring_backward),
    "allgather": (_allgather, _allgather_backward),
    "ulysses": (_ulysses, _ulysses_backward),
    "hybrid": (_hybrid, _hybrid_backward),
}
