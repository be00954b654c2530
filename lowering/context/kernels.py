"""What `context.partial` computes, by kp's kernels."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render, select
from kp_compiler.lowering.attend import Plan, add_gradients, write
from kp_compiler.lowering.block_mask import BLOCK, lists_now
from kp_compiler.lowering.context.partial import Turn
from kp_compiler.lowering.context.readers import STREAMS, grouped
from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.into import Into
from kp_compiler.lowering.triton import attention

Given = tuple[list[Tensor], list[int], list[Tensor], Plan]


def _given(
    q: Tensor, k: Tensor, v: Tensor, task: Task, sink: Tensor | None = None, *, training: bool
) -> Given:
    """operands, scalars, lists and plan of `kp::attend`. Lists of a mask are those of all heads."""
    spec, operands, scalars = task.alone, list(task.operands), list(task.scalars)
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


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task, sink: Tensor | None, into: Into) -> Tensor:
    return write(into, q, k, v, *_given(q, k, v, task, sink, training=False))


@contextlib.contextmanager
def beside(q: Tensor, count: int) -> Iterator[Turn]:
    """So many launches on up to STREAMS streams in turn: a kernel takes the multiprocessors for which those
    before it have no more work."""
    if count < 2 or not q.is_cuda:
        yield lambda call: call()
        return
    main = torch.cuda.current_stream(q.device)
    others = _others(q.device, main.cuda_stream)[: count - 1]
    for other in others:
        other.wait_stream(main)
    turns = itertools.cycle((nullcontext(), *map(torch.cuda.stream, others)))

    def turn(call: Callable[[], Tensor | None]) -> Any:
        with next(turns):
            found = call()
        if found is not None:
            found.record_stream(main)
        return found

    try:
        yield turn
    finally:
        for other in others:
            main.wait_stream(other)


@cache
def _others(device: torch.device, main: int) -> list[torch.cuda.Stream]:
    """Of one stream, so that nobody else waits for them."""
    return [torch.cuda.Stream(device) for _ in range(STREAMS - 1)]


def delta_of(grad: Tensor, out: Tensor) -> Tensor:
    return attention.delta_of(attention.readable(grad), out, None)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, task: Task, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    given, groups = _given(q, k, v, task, training=True), grouped(q, k, task)
    if len(groups) == 1:
        add_gradients((dq, dk, dv), grad, q, k, v, *given, lse, delta)
        return
    sums = [(dk, dv)]
    for _ in range(min(STREAMS, len(groups)) - 1):
        sums.append((torch.zeros_like(dk), torch.zeros_like(dv)))
    with beside(q, len(groups)) as turn:
        for number, heads in enumerate(groups):
            to, rows = (dq[:, heads], *sums[number % STREAMS]), (lse[:, heads], delta[:, heads])
            some = (to, grad[:, heads], q[:, heads], k, v, *given, *rows)
            turn(partial(add_gradients, *some))
    for more in sums[1:]:
        dk += more[0]
        dv += more[1]
