"""Which heads of q a backward pass goes through at a time, so that a GPU has enough to do."""

from __future__ import annotations

import itertools

from torch import Tensor

from kp_compiler.lowering.context.task import Task

STREAMS = 4  # that launches go beside each other on
KEYS, PROGRAMS = 128, 132  # keys of a program, and how many programs an H100 or H200 runs at a time
ROWS = 2**14  # queries of a group's heads, at least: 0.7 ms of a program with 128 numbers a head


def grouped(q: Tensor, k: Tensor, task: Task) -> list[slice]:
    """Heads of q that a backward pass goes through, beside each other. A program goes through all readers of
    its keys; one head of keys has few programs, 64 of 8k keys, so its readers are several groups."""
    heads, rows = q.shape[1:3]
    wanted = count(k.shape[0], heads, rows, k.shape[2])
    if k.shape[1] > 1 or wanted < 2 or task.spec.sparse is not None:
        return [slice(0, heads)]
    ends = [heads * i // wanted for i in range(wanted + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def count(batch: int, heads: int, rows: int, keys: int) -> int:
    """How many groups, of one head of keys: those whose programs would be done first if all were alike, of as
    many as fill a GPU four times, two for each stream; of more than one such number the largest, since
    programs of a causal mask are not. 32 readers, 32k tokens on two GPUs, forward and backward: 33.3 ms with
    five groups of 8k keys, 31.9 with four, 30.8 with eight; 16k tokens 11.4 ms with nine, 10.0 with eight,
    10.9 with sixteen (two H200, 2026-11-28)."""
    programs = max(1, batch * -(-keys // KEYS))
    most = max(1, min(2 * STREAMS, -(-4 * PROGRAMS // programs), heads, heads * rows // ROWS))

    def rounds(groups: int) -> int:
        return -(-programs * groups // PROGRAMS) * -(-heads // groups)

    return min(range(1, most + 1), key=lambda groups: (rounds(groups), -groups))
