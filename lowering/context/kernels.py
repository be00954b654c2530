"""What `context.partial` computes, by kp's kernels: in float32, what other keys gave taken in by them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.attend import Plan, attend, attend_backward
from kp_compiler.lowering.block_mask import BLOCK, lists_now
from kp_compiler.lowering.context.partial import Start
from kp_compiler.lowering.context.task import Task
from kp_compiler.specs import MaskSpec


def _given(q: Tensor, k: Tensor, task: Task) -> tuple[list[Tensor], list[int], list[Tensor], str]:
    """operands, scalars, lists and plan of `kp::attend`."""
    spec = replace(task.spec, mask=task.mask or MaskSpec(), sink=None, dead_rows="zero")
    operands, scalars = list(task.operands), list(task.scalars)
    if mask_render.inequalities(spec.mask) is not None:
        return operands, scalars, [], Plan(spec, wide=True).to_json()
    lists = lists_now(q, k, operands, scalars, spec)
    return operands, scalars, lists, Plan(spec, (BLOCK, BLOCK), wide=True).to_json()


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task, start: Start | None) -> Start:
    operands, scalars, lists, plan = _given(q, k, task)
    before = (None, None) if start is None else start
    out, lse = attend()(q, k, v, operands, scalars, lists, *before, None, plan)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, task: Task, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    operands, scalars, lists, plan = _given(q, k, task)
    wanted = [True, True, *[False] * len(operands)]
    dq, dk, dv, _ = attend_backward()(
        grad, -delta, q, k, v, operands, scalars, lists, None, None, lse, wanted, plan
    )
    return dq, dk, dv
