"""Rows whose keys are all masked, settled after a kernel that has another meaning for them."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec


def unkept(spec: AttentionSpec, shape: AttentionShape) -> Rejection | None:
    """Why a kernel that gives zeros and a log-sum-exp of −∞ can't have these rows settled after it."""
    if spec.softcap is not None and spec.dead_rows == "mean" and spec.fill == "add" and shape.training:
        return Rejection(
            "dead-rows", "Gradients of fully masked rows go through the soft-cap, which is not kept."
        )
    if spec.dead_rows == "mean" and spec.fill == "add" and shape.bias_grad:
        return Rejection("dead-rows", "A bias would lose its gradient from fully masked rows.")
    if spec.dead_rows == "mean" and spec.dropout_p:
        return Rejection("dead-rows", "Dropout of fully masked rows is not kept.")
    if spec.dead_rows == "nan" and shape.training and spec.mask.kind != "full":
        return Rejection("dead-rows", "Fully masked rows are NaN with NaN gradients, which are not kept.")
    return None


def after_zeros(
    emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape, out: Node, column: Node
) -> Node:
    """`out` of a kernel that gives zeros for dead rows, and −∞ in the log-sum-exp `column` [B,H,S,1]."""
    dead = emit.call(torch.eq, column, -math.inf)
    if spec.dead_rows == "nan":
        return emit.call(torch.masked_fill, out, dead, math.nan)
    return emit.call(torch.where, dead, mean_rows(emit, node, spec, shape), out)


def mean_rows(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    """The mean of all values, [B,H,1 or S,E]: what a softmax over equal fills gives.

    Where the fill was added, the scores still have a gradient there. With p = 1/T the output is, to first
    order, mean(v) + q · C with C = scale/T · Σ_j k_j (v_j − mean(v)); the value of q · C is taken out again,
    its gradient to q and k stays.
    """
    q, k, v = (node.args[index] for index in range(3))
    if not statically_known_true(shape.heads == shape.kv_heads):
        ratio = emit.call(operator.floordiv, emit.size(q, 1), emit.size(k, 1))
        k, v = (emit.call(torch.repeat_interleave, x, ratio, dim=1) for x in (k, v))
    mean = emit.call(torch.mean, v, dim=2, keepdim=True)
    if spec.fill != "add" or not shape.training:
        return mean
    fixed = emit.call(torch.Tensor.detach, emit.call(torch.sub, v, mean))
    keys = emit.call(torch.transpose, k, 2, 3)
    share = emit.call(torch.mul, emit.call(torch.matmul, keys, fixed), spec.scale)
    share = emit.call(torch.div, share, emit.size(k, 2))
    return emit.call(torch.add, mean, _only_gradient(emit, emit.call(torch.matmul, q, share)))


def after_additive_mask(
    emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape, out: Node, keep: Node
) -> Node:
    """`out` of a kernel that was given the mask `keep` as finite numbers, [B,H,S,E].

    Such a kernel averages the values of a dead row (with dropout, if there is any); its backward pass does
    not, since the row's log-sum-exp loses log T beside the fill. So dead rows become zeros, or keep their
    value and take their gradient from the mean.
    """
    alive = emit.call(torch.any, keep, dim=-1, keepdim=True)
    if spec.dead_rows == "zero":
        return emit.call(torch.where, alive, out, 0.0)
    if not shape.training:
        return out
    gradient = _only_gradient(emit, mean_rows(emit, node, spec, shape))
    return emit.call(
        torch.where, alive, out, emit.call(torch.add, emit.call(torch.Tensor.detach, out), gradient)
    )


def _only_gradient(emit: Any, value: Node) -> Node:
    return emit.call(torch.sub, value, emit.call(torch.Tensor.detach, value))
