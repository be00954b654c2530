"""Replaying the operations between `q kᵀ` and a softmax: scale, soft-cap, additive terms, masks, sinks, and
what each dimension means; or why this is not attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import Op, canonical, permutation
from kp_compiler.passes.base import loses_gradient, same
from kp_compiler.passes.scores import Scores, Term
from kp_compiler.report import Rejection
from kp_compiler.writes import Writes, constant, written

TRANSPARENT = ("cast", "clone")
_MAX_SHIFT = 1e4  # a constant that is added to all scores; a softmax ignores it while it costs no precision


@dataclass(frozen=True)
class Step:
    node: Node
    op: Op
    through: Node  # the argument that carries the scores


class _Replay:
    """The state of a forward replay: `pending` is a tanh that waits for its factor."""

    def __init__(self, scores: Scores, writes: Writes) -> None:
        self.scores = scores
        self.writes = writes
        self.pending = False


def replay(scores: Scores, steps: list[Step], writes: Writes) -> Rejection | None:
    """Follow the scores through `steps`, or say why that is not attention."""
    state = _Replay(scores, writes)
    for step in steps:
        refused = _apply(state, step)
        if refused is not None:
            return refused
    if state.pending:
        scores.softcap = 1.0
    return None


def _apply(state: _Replay, step: Step) -> Rejection | None:
    scores, op = state.scores, step.op
    name = op.name
    if any(target is not step.through for target in written(step.node)):
        return Rejection("mutation", f"{name} writes the scores into one of its other arguments.")
    if name in TRANSPARENT:
        result = tensor_of(step.node)
        if result is not None and result.dtype.is_floating_point:
            return None
        return Rejection("unknown-op", "The scores are cast to integers.")
    if name == "dropout":
        return (
            Rejection("dropout-on-scores", "Dropout acts on the scores, before the softmax.")
            if op["p"]
            else None
        )
    if name in ("view", "permute", "transpose", "expand", "unsqueeze", "squeeze"):
        return _layout(scores, step)
    if scores.sink is not None and not (name == "sub" and _is_own_max(op)):
        return Rejection("after-sink", f"{name} acts on the scores after a sink was attached.")
    if name == "mul" and (factor := constant(_other(step))) is not None:
        return _scaled(state, factor, step)
    if name == "div" and (factor := constant(op["other"])) is not None:
        if not factor:
            return Rejection("scale", "The scores are divided by zero.")
        return _scaled(state, 1.0 / factor, step)
    if name == "maximum" and _is_lowest(_other(step), step):
        return None if not state.pending and not _grows(step) else _unknown(step)
    if name == "tanh":
        return _tanh(state)
    if state.pending:
        scores.softcap, state.pending = 1.0, False
    if name == "add" and op.get("alpha", 1) == 1:
        return _added(scores, step, _other(step), 1.0)
    if name == "sub" and op.get("alpha", 1) == 1:
        if _is_own_max(op):
            scores.shifted = True
            return None
        return _added(scores, step, op["other"], -1.0)
    if name == "masked_fill":
        return _masked(scores, step, op["mask"], op["value"], keep=False)
    if name == "where":
        through_input = op["input"] is step.through or value_of(op["input"]) is value_of(step.through)
        return _masked(
            scores, step, op["condition"], op["other"] if through_input else op["input"], keep=through_input
        )
    if name == "cat":
        return _sink(state, step)
    if name in ("mul", "div") and tensor_of(_other(step) if name == "mul" else op["other"]) is not None:
        return Rejection("tensor-scale", "The scores are scaled by a tensor; kernels take one number.")
    return _unknown(step)


def _unknown(step: Step) -> Rejection:
    name = step.op.name
    if name == "unnamed":
        name = getattr(step.node.target, "__name__", str(step.node.target))
    return Rejection(
        "unknown-op", f"{name} between the product and the softmax is not part of attention as kp knows it."
    )


def _is_lowest(value: Any, step: Step) -> bool:
    """The most negative number of the scores' type: a floor that only catches sums of two finite fills."""
    number, scores = constant(value), tensor_of(step.through)
    return number is not None and scores is not None and number <= torch.finfo(scores.dtype).min


def _other(step: Step) -> Any:
    """The argument of a commutative operation that is not the scores."""
    op = step.op
    return op["other"] if op["input"] is step.through else op["input"]


def _layout(scores: Scores, step: Step) -> Rejection | None:
    before, after = tensor_of(step.through), tensor_of(step.node)
    assert before is not None and after is not None
    name, op = step.op.name, step.op
    if before.dtype != after.dtype:
        return Rejection("layout", "The scores are read as another type.")
    if name in ("permute", "transpose"):
        order = permutation(op, before.dim())
        if order is None:
            return Rejection("layout", "The scores are permuted in a way kp can't follow.")
        scores.dims = tuple(scores.dims[index] for index in order)
        return None
    if name == "expand":
        equal = len(before.shape) == len(after.shape) and all(map(same, before.shape, after.shape))
        return None if equal else Rejection("layout", "The scores are expanded before the softmax.")
    if not scores.reshape(step.node, before.shape, after.shape):
        return Rejection("layout", "The scores are reshaped across queries or keys before the softmax.")
    return None


def _scaled(state: _Replay, factor: float, step: Step) -> Rejection | None:
    scores = state.scores
    if _grows(step):
        return Rejection("layout", "A scale broadcasts the scores to a larger shape.")
    if not factor and (scores.biases or scores.masks):
        return Rejection("scale", "Scores that carry a mask or a bias are multiplied by zero.")
    if state.pending:
        scores.softcap, state.pending = factor, False
        scores.scale *= factor
        return None if factor > 0 else Rejection("softcap", "The soft-cap is not positive.")
    if scores.softcap is not None:
        return Rejection("scale-after-softcap", "The scores are scaled after the soft-cap.")
    if scores.masks and (factor <= 0 or any(mask.fill != -math.inf for mask in scores.masks)):
        return Rejection("scale-after-mask", "The scores are scaled after a finite mask fill.")
    scores.scale *= factor
    scores.biases = [Term(b.node, b.frame, b.reader, b.coeff * factor) for b in scores.biases]
    return None


def _tanh(state: _Replay) -> Rejection | None:
    scores = state.scores
    if scores.softcap is not None or state.pending or scores.biases or scores.masks or scores.shifted:
        return Rejection("softcap", "tanh acts on scores that already carry a mask, a bias or another tanh.")
    state.pending = True
    return None


def _added(scores: Scores, step: Step, term: Any, coeff: float) -> Rejection | None:
    tensor = tensor_of(term)
    if tensor is None:
        number = constant(term)
        if number is None or abs(number) > _MAX_SHIFT:
            return Rejection("unknown-op", "A scalar that is large or not known is added to the scores.")
        scores.shifted = True
        return None
    if _grows(step):
        return Rejection("layout", "A term that is added broadcasts the scores to a larger shape.")
    if scores.masks and any(math.isfinite(mask.fill or 0.0) for mask in scores.masks):
        return Rejection("bias-after-mask", "A term is added after a finite mask fill.")
    scores.biases.append(Term(term, scores.dims, step.node, coeff))
    return None


def _masked(scores: Scores, step: Step, mask: Any, fill: Any, *, keep: bool) -> Rejection | None:
    tensor, number = tensor_of(mask), constant(fill)
    if _grows(step):
        return Rejection("layout", "A mask broadcasts the scores to a larger shape.")
    if tensor is None or tensor.dtype != torch.bool or tensor.dim() > len(scores.dims):
        return Rejection(
            "mask-shape", "The mask of the scores is not a boolean tensor that broadcasts to them."
        )
    if number is None:
        return Rejection("mask-fill", "Masked scores are replaced by something that is not a constant.")
    scores.masks.append(Term(mask, scores.dims, step.node, fill=number, keep=keep))
    return None


def _grows(step: Step) -> bool:
    """The operation makes the scores larger than they were."""
    before, after = tensor_of(step.through), tensor_of(step.node)
    assert before is not None and after is not None
    return before.dim() != after.dim() or not all(map(same, before.shape, after.shape))


def _sink(state: _Replay, step: Step) -> Rejection | None:
    """`cat([scores, sink], -1)`: one more logit a row, the same for every query."""
    scores = state.scores
    extra = step.op["tensors"][1]
    value, whole = tensor_of(extra), tensor_of(step.through)
    dim = step.op["dim"]
    if value is None or whole is None or scores.sink is not None:
        return Rejection("sink", "What is concatenated to the scores is not a single sink.")
    if not isinstance(dim, int) or dim % whole.dim() != whole.dim() - 1 or not same(value.shape[-1], 1):
        return Rejection("sink", "What is concatenated to the scores is not one logit per row.")
    base = extra
    while not state.writes.between(base, step.node) and not loses_gradient(base, step.node):
        op = canonical(base)
        if op is None or op.name not in ("expand", "cast", "clone") or op.inplace:
            break
        base = op["input"]
    if state.writes.between(base, step.node):
        return Rejection("mutation", "The sink is written to before it is attached.")
    tensor = tensor_of(base)
    if tensor is None or tensor.dim() != 4 or whole.dim() != 4 or scores.shifted:
        return Rejection("sink", "The sink is not one logit per head, or the scores were shifted before it.")
    if scores.dims[-2] != ("i",) or not all(same(tensor.shape[dim], 1) for dim in (0, 2)):
        return Rejection("sink", "The sink logit differs between queries or sequences.")
    scores.sink = base
    return None


def _is_own_max(op: Op) -> bool:
    """`x - x.max(-1, keepdim=True).values` (or amax): a shift that softmax ignores."""
    other = op["other"]
    if not isinstance(other, Node):
        return False
    found = canonical(other)
    if (
        found is not None
        and found.name in ("getitem", "getattr")
        and found.get("index", found.get("name")) in (0, "values")
    ):
        other = found["input"]
        found = canonical(other) if isinstance(other, Node) else None
    if found is None or found.name not in ("max", "amax") or found["input"] is not op["input"]:
        return False
    dim = (
        found["dim"][0] if isinstance(found["dim"], tuple | list) and len(found["dim"]) == 1 else found["dim"]
    )
    tensor = tensor_of(op["input"])
    return tensor is not None and dim in (-1, tensor.dim() - 1) and found["keepdim"] is True
