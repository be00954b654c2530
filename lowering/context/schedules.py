"""The ways in which ranks that share a sequence see each other's keys. All compute the same.

ring         keys and values go round as far as the mask sees: memory of two ranks' parts (where two ranks
             have few, a forward pass gathers them, which takes less)
allgather    all of them are gathered and put in order: each query sees its keys at once
ulysses      heads are shared instead of tokens: q, k, v and out are exchanged, each rank attends over the
             whole sequence with some heads
hybrid       of a grid of ranks, rows share heads as in ulysses, and keys go round among rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def _among_all(run: Any, *more: Any) -> Any:
    """Of all ranks."""
    return lambda shard, groups, *tensors: run(shard, groups.every, *more, *tensors)


def _in_rows(run: Any) -> Any:
    """Of those of a row and of a column."""
    return lambda shard, groups, *tensors: run(shard, groups.near, groups.far, *tensors)


SCHEDULES: dict[str, tuple[Forward, Backward]] = {
    "ring": (_among_all(gather.forward_of_ring), _among_all(ring.backward)),
    "allgather": (_among_all(gather.forward), _among_all(gather.backward)),
    "ulysses": (_among_all(heads.forward, None), _among_all(heads.backward, None)),
    "hybrid": (_in_rows(heads.forward), _in_rows(heads.backward)),
}
