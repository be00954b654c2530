"""Which heads of q a backward pass goes through at a time, so that a GPU has enough to do."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from kp_compiler.lowering.context.task import Task

KEYS, PROGRAMS = 128, 132  # keys of a program, and how many programs an H100 or H200 runs at a time
ROWS = 2**14  # queries of a group's heads, at least: 0.7 ms of a program with 128 numbers a head


class Readers(NamedTuple):
    """Some heads of q that read some of k, the `number`-th group that does."""

    queries: slice
    keys: slice
    number: int


def grouped(q: Tensor, k: Tensor, task: Task) -> list[Readers]:
    """What a backward pass computes beside each other. A program goes through all readers of its keys; where
    programs are too few, as for one head of 16k keys, which has 128, each head of keys has several groups of
    readers. What adds to the same sums has the same turn."""
    (batch, heads, rows, _), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    programs = batch * kv_heads * -(-k.shape[2] // KEYS)
    wanted = min(-(-2 * PROGRAMS // max(1, programs)), group, group * rows // ROWS)
    if wanted < 2 or task.spec.sparse is not None:
        return [Readers(slice(0, heads), slice(0, kv_heads), 0)]
    ends = [group * i // wanted for i in range(wanted + 1)]
    return [
        Readers(slice(head * group + a, head * group + b), slice(head, head + 1), number)
        for head in range(kv_heads)
        for number, (a, b) in enumerate(itertools.pairwise(ends))
    ]
