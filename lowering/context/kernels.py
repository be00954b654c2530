"""What `context.partial` computes, by kp's kernels."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kp_compiler.lowering import mask_render, select
from kp_compiler.lowering.attend import Plan, add_gradients, write
from kp_compiler.lowering.block_mask import BLOCK, lists_now
from kp_compiler.lowering.context.partial import Start
from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.triton import attention
from kp_compiler.specs import MaskSpec

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


def delta_of(grad: Tensor, out: Tensor) -> Tensor:
    return attention.delta_of(attention.readable(grad), out, None)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, task: Task, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    add_gradients((dq, dk, dv), grad, q, k, v, *_given(q, k, v, task, training=True), lse, delta)
