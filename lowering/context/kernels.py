"""What `context.partial` computes, by kp's kernels."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render, select
from kp_compiler.lowering.attend import Plan, add_gradients, write
from kp_compiler.lowering.block_mask import BLOCK, lists_now
from kp_compiler.lowering.context.partial import Start
from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.triton import attention
from kp_compiler.specs import MaskSpec

STREAMS = 4
KEYS, PROGRAMS = (
    128,
    132,
)  # keys of a program of the backward pass, and how many an H100 or H200 runs at a time
ROWS = 2**14  # queries of all its heads that a program is worth a launch for
Given = tuple[list[Tensor], list[int], list[Tensor], Plan]


def _given(
    q: Tensor, k: Tensor, v: Tensor, task: Task, sink: Tensor | None = None, *, training: bool
) -> Given:
    """operands, scalars, lists and plan of `kp::attend`. Lists of a mask are those of all heads."""
    spec = replace(task.spec, mask=task.mask or MaskSpec(), sink=None, dead_rows="zero")
    operands, scalars = list(task.operands), list(task.scalars)
    lists, block, sparse = [], None, spec.sparse
    if sparse is not None:  # a choice is the same each time, and takes less memory than to keep it
        lists = select.lists_now(q, k, v, operands, scalars, spec, training=training)
        spec, block = replace(spec, sparse=None), (sparse.block, sparse.block)
    elif mask_render.inequalities(spec.mask) is None:
        known = task.known.get((q.shape[2], k.shape[2]))
        lists, block = known or lists_now(q, k, operands, scalars, spec), (BLOCK, BLOCK)
        if operands:  # else the task is kept from call to call, and lists would be, too
            task.known[q.shape[2], k.shape[2]] = lists
    if sink is not None:
        spec, operands = replace(spec, sink=len(operands)), [*operands, sink]
    return operands, scalars, lists, Plan(spec, block)


def forward(
    q: Tensor, k: Tensor, v: Tensor, task: Task, start: Start | None, sink: Tensor | None, out: Tensor
) -> Tensor:
    return write(out, q, k, v, *_given(q, k, v, task, sink, training=False), start)


@contextlib.contextmanager
def beside(q: Tensor, count: int) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """So many launches on up to STREAMS streams in turn: a kernel takes the multiprocessors for which those
    before it have no more work. What others read of their results is to be made outside of turns."""
    if count < 2 or not q.is_cuda:
        yield nullcontext
        return
    main, others = torch.cuda.current_stream(q.device), _others(q.device)[: count - 1]
    for other in others:
        other.wait_stream(main)
    turns = itertools.cycle((nullcontext(), *map(torch.cuda.stream, others)))
    try:
        yield lambda: next(turns)
    finally:
        for other in others:
            main.wait_stream(other)


@cache
def _others(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(STREAMS - 1)]


def delta_of(grad: Tensor, out: Tensor) -> Tensor:
    return attention.delta_of(attention.readable(grad), out, None)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, task: Task, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    given, readers = _given(q, k, v, task, training=True), _readers(q, k, task)
    sums = [(dk, dv)]
    for _ in range(min(STREAMS, len(readers)) - 1):
        sums.append((torch.zeros_like(dk), torch.zeros_like(dv)))
    with beside(q, len(readers)) as turn:
        for i, some in enumerate(readers):
            to = (dq[:, some], *sums[i % len(sums)])
            rows = lse[:, some], delta[:, some]
            with turn():
                add_gradients(to, grad[:, some], q[:, some], k, v, *given, *rows)
    for more in sums[1:]:
        dk += more[0]
        dv += more[1]


def _readers(q: Tensor, k: Tensor, task: Task) -> list[slice]:
    """Heads of q that read the one head of k at a time, beside each other: a program of a backward pass goes
    through all of them, and one head of 16k keys has 128 programs."""
    heads, rows = q.shape[1:3]
    programs = k.shape[0] * -(-k.shape[2] // KEYS)
    if k.shape[1] > 1 or task.spec.sparse is not None:
        return [slice(None)]
    wanted = min(-(-2 * PROGRAMS // programs), heads, heads * rows // ROWS)
    size = max(1, heads // max(1, wanted))
    return [slice(i, i + size) for i in range(0, heads, size)]
