"""The walk from a softmax back to `q kᵀ`: what happened to the scores on the way, or why this is not
attention.

`trace_scores` first finds the chain of nodes between the product and the softmax, then replays it forwards,
keeping track of scale, soft-cap, additive terms, masks, sinks and of what each dimension means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.normalize import Op, canonical, tensor_of, value_of, written
from kp_compiler.passes.base import Context, same
from kp_compiler.passes.contraction import Dims, Product, scores_product
from kp_compiler.report import Rejection

_TRANSPARENT = {"cast", "clone", "detach_keep"}
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Term:
    """An additive term, or a mask (`fill` given): `node` broadcasts against a tensor labelled `frame`."""

    node: Node
    frame: Dims
    reader: Node  # what reads it in the original graph
    coeff: float = 1.0
    fill: float | None = None
    keep: bool = True  # the mask's true elements are the ones that take part


@dataclass
class Scores:
    """The scores a softmax sees."""

    product: Product
    dims: Dims
    scale: float = 1.0
    softcap: float | None = None
    biases: list[Term] = field(default_factory=list)
    masks: list[Term] = field(default_factory=list)
    sink: Node | None = None
    shifted: bool = False  # by a constant or the rows' maximum, which softmax alone ignores
    chain: list[Node] = field(default_factory=list)
    refined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: dict[str, tuple[Node, int]] = field(default_factory=dict)

    def split(self, dims: Dims) -> Dims:
        """`dims` in terms of the labels that reshapes split them into."""
        return tuple(tuple(part for label in labels for part in self.parts(label)) for labels in dims)

    def parts(self, label: str) -> tuple[str, ...]:
        if label not in self.refined:
            return (label,)
        return tuple(part for child in self.refined[label] for part in self.parts(child))

    def note_sizes(self, node: Node) -> None:
        """Remember where the size of each label can be read."""
        for index, labels in enumerate(self.dims):
            if len(labels) == 1:
                self.sizes.setdefault(labels[0], (node, index))

    def reshape(self, node: Node, before: Any, after: Any) -> bool:
        """Follow a reshape of the batch dimensions from shape `before` to `after`."""
        if (
            len(before) < 2
            or len(after) < 2
            or not all(same(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))
        ):
            return False
        dims = _regroup(self, list(self.dims[:-2]), list(before[:-2]), list(after[:-2]))
        if dims is None:
            return False
        self.dims = (*dims, *self.split(self.dims[-2:]))
        self.note_sizes(node)
        return True


@dataclass(frozen=True)
class _Step:
    node: Node
    op: Op
    through: Node  # the argument that carries the scores


def trace_scores(softmax: Node, op: Op, ctx: Context) -> Scores | Rejection:
    """What the input of `softmax` is made of."""
    value, dim = tensor_of(op["input"]), op.get("dim")
    if value is None or not isinstance(dim, int):
        return Rejection("no-metadata", "The softmax's input has no known shape or dimension.")
    found = _find(op["input"], softmax, ctx, 0)
    if isinstance(found, Rejection):
        return found
    if dim % value.dim() != value.dim() - 1:
        return Rejection(
            "softmax-dim", f"Softmax runs over dimension {dim}, not over the keys (the last one)."
        )
    product, steps = found
    scores = Scores(product, product.dims, scale=product.alpha)
    core = steps[0].through if steps else op["input"]
    scores.chain = [core, *(step.node for step in steps)]
    scores.note_sizes(core)
    if product.addend is not None and product.beta != 0:
        scores.biases.append(Term(product.addend, product.dims, core, product.beta))
    refused = _replay(scores, steps) or _independent(scores, ctx)
    if refused is None and not any(labels == ("i",) for labels in scores.dims):
        refused = Rejection(
            "layout", "The query dimension of the scores was reshaped away before the softmax."
        )
    if refused is None and scores.dims[-1] != ("j",):
        refused = Rejection("softmax-dim", "Softmax runs over a dimension that is not the keys.")
    return refused or scores


def _find(node: Any, reader: Node, ctx: Context, depth: int) -> tuple[Product, list[_Step]] | Rejection:
    """The product under `node` and the steps from it up to `node`."""
    nothing = Rejection("no-qk-product", "No product of queries and keys leads to this softmax.")
    if not isinstance(node, Node) or depth > _MAX_DEPTH:
        return nothing
    current = ctx.writes.current(node, reader)
    if current is None:
        return Rejection(
            "mutation", f"{node.name} is written to before it is read.", "Use the out-of-place form."
        )
    node = current
    op = canonical(node) or _unnamed(node)
    if op is None:
        return nothing
    product = scores_product(node, op)
    if product is not None and not _is_weight_product(product):
        return product, []
    refusal = nothing
    for argument in _carriers(op):
        found = _find(argument, node, ctx, depth + 1)
        if isinstance(found, Rejection):
            refusal = found if refusal is nothing else refusal
            continue
        found[1].append(_Step(node, op, ctx.writes.current(argument, node) or argument))
        return found
    return refusal


def _unnamed(node: Node) -> Op | None:
    """An operation kp has no name for: the walk goes on behind it only to say what stands in the way."""
    first = node.args[0] if node.args else None
    return (
        Op("unnamed", {"input": first})
        if tensor_of(node) is not None and tensor_of(first) is not None
        else None
    )


def _is_weight_product(product: Product) -> bool:
    """A projection by a parameter, as routers and classifiers have: rows times a 2-D placeholder."""
    weight = product.rhs.node
    while (op := canonical(weight)) is not None and op.name in ("transpose", "cast", "permute"):
        weight = op["input"]
    tensor = tensor_of(weight)
    return (
        weight.op in ("placeholder", "get_attr")
        and tensor is not None
        and tensor.dim() == 2
        and len(product.dims) > 2
    )


def _carriers(op: Op) -> list[Any]:
    """The arguments of an operation through which scores may come."""
    if op.name in _TRANSPARENT or op.name in (
        "view",
        "permute",
        "transpose",
        "dropout",
        "tanh",
        "masked_fill",
        "expand",
    ):
        return [op["input"]]
    if op.name in ("unsqueeze", "squeeze", "clamp", "exp", "log", "sigmoid", "neg", "abs", "pow", "unnamed"):
        return [op["input"]]
    if op.name in ("add", "mul"):
        return [op["input"], op["other"]]
    if op.name in ("sub", "div"):
        return [op["input"]]
    if op.name == "where":
        return [op["input"], op["other"]]
    if op.name == "cat" and isinstance(op["tensors"], tuple | list) and len(op["tensors"]) == 2:
        return [op["tensors"][0]]
    return []


def _independent(scores: Scores, ctx: Context) -> Rejection | None:
    """Masks and biases must not be computed from the scores themselves (top-k attention and the like)."""
    chain, first = set(scores.chain), ctx.writes.position.get(scores.chain[0], 0)
    queue = [term.node for term in (*scores.biases, *scores.masks)]
    seen: set[Node] = set()
    while queue:
        node = queue.pop()
        if node in chain:
            return Rejection(
                "score-dependent", "A mask or bias is computed from the scores, which a kernel does not keep."
            )
        if node in seen or ctx.writes.position.get(node, -1) < first:
            continue
        seen.add(node)
        queue.extend(_value_inputs(node))
    return None


def _value_inputs(node: Node) -> list[Node]:
    """The arguments whose elements a node reads: `x.reshape_as(y)` and the like only ask `y` for its
    shape."""
    if node.op == "call_method" and str(node.target) in ("view_as", "reshape_as", "expand_as", "type_as"):
        return node.all_input_nodes[:1]
    op = canonical(node)
    return [] if op is not None and op.name in ("full", "full_like", "size") else node.all_input_nodes


# ----------------------------------------------------------------------------------------------------------
# replay


class _Replay:
    """The state of a forward replay: `pending` is a tanh that waits for its factor."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.pending = False


def _replay(scores: Scores, steps: list[_Step]) -> Rejection | None:
    state = _Replay(scores)
    for step in steps:
        refused = _apply(state, step)
        if refused is not None:
            return refused
    if state.pending:
        scores.softcap = 1.0
    return None


def _apply(state: _Replay, step: _Step) -> Rejection | None:
    scores, op = state.scores, step.op
    name = op.name
    if name in _TRANSPARENT:
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
        return _scaled(state, factor)
    if name == "div" and (factor := constant(op["other"])) is not None:
        return (
            _scaled(state, 1.0 / factor) if factor else Rejection("scale", "The scores are divided by zero.")
        )
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
        return _sink(scores, step)
    if name in ("mul", "div") and tensor_of(_other(step) if name == "mul" else op["other"]) is not None:
        return Rejection("tensor-scale", "The scores are scaled by a tensor; kernels take one number.")
    if name == "unnamed":
        name = getattr(step.node.target, "__name__", str(step.node.target))
    return Rejection(
        "unknown-op", f"{name} between the product and the softmax is not part of attention as kp knows it."
    )


def _other(step: _Step) -> Any:
    """The argument of a commutative operation that is not the scores."""
    op = step.op
    return op["other"] if op["input"] is step.through else op["input"]


def _layout(scores: Scores, step: _Step) -> Rejection | None:
    before, after = tensor_of(step.through), tensor_of(step.node)
    assert before is not None and after is not None
    name, op = step.op.name, step.op
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


def _scaled(state: _Replay, factor: float) -> Rejection | None:
    scores = state.scores
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


def _added(scores: Scores, step: _Step, term: Any, coeff: float) -> Rejection | None:
    tensor = tensor_of(term)
    if tensor is None:
        number = constant(term)
        if number is None or not math.isfinite(number):
            return Rejection("unknown-op", "A scalar is added to the scores.")
        scores.shifted = True
        return None
    if _grows(step):
        return Rejection("layout", "A term that is added broadcasts the scores to a larger shape.")
    if scores.masks and any(math.isfinite(mask.fill or 0.0) for mask in scores.masks):
        return Rejection("bias-after-mask", "A term is added after a finite mask fill.")
    scores.biases.append(Term(term, scores.dims, step.node, coeff))
    return None


def _masked(scores: Scores, step: _Step, mask: Any, fill: Any, *, keep: bool) -> Rejection | None:
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


def _grows(step: _Step) -> bool:
    """The operation makes the scores larger than they were."""
    before, after = tensor_of(step.through), tensor_of(step.node)
    assert before is not None and after is not None
    return before.dim() != after.dim() or not all(map(same, before.shape, after.shape))


def _sink(scores: Scores, step: _Step) -> Rejection | None:
    """`cat([scores, sink], -1)`: one more logit a row, the same for every query."""
    extra = step.op["tensors"][1]
    value, whole = tensor_of(extra), tensor_of(step.through)
    dim = step.op["dim"]
    if value is None or whole is None or scores.sink is not None:
        return Rejection("sink", "What is concatenated to the scores is not a single sink.")
    if not isinstance(dim, int) or dim % whole.dim() != whole.dim() - 1 or not same(value.shape[-1], 1):
        return Rejection("sink", "What is concatenated to the scores is not one logit per row.")
    base = extra
    while (op := canonical(base)) is not None and op.name in ("expand", "cast", "clone"):
        base = op["input"]
    tensor = tensor_of(base)
    if tensor is None or tensor.dim() != 4 or whole.dim() != 4 or scores.shifted:
        return Rejection("sink", "The sink is not one logit per head, or the scores were shifted before it.")
    if not all(same(tensor.shape[dim], 1) for dim in (0, 2)):
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


# ---------------------------------------------------------------------------------------------------------
# helpers


def permutation(op: Op, rank: int) -> list[int] | None:
    """The order of dimensions that a permute or transpose makes."""
    if op.name == "transpose":
        order = list(range(rank))
        a, b = op["dim0"], op["dim1"]
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        order[a], order[b] = order[b], order[a]
        return order
    dims = op["dims"]
    return [d % rank for d in dims] if len(dims) == rank and all(isinstance(d, int) for d in dims) else None


def constant(value: Any) -> float | None:
    """A Python number, or a 0-dimensional tensor that the graph makes from one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    tensor = tensor_of(value)
    if tensor is None or tensor.numel() != 1 or not isinstance(value, Node):
        return None
    op = canonical(value)
    if op is None or op.inplace or any(value in written(user) for user in value.users):
        return None
    if op.name == "cast" and op["dtype"] is not None and not op["dtype"].is_floating_point:
        return None
    if op.name in ("cast", "clone", "view", "expand", "unsqueeze"):
        return constant(op["input"])
    if op.name in ("full", "full_like"):
        return constant(op["fill_value"])
    if op.name in ("tensor", "new_tensor"):
        return constant(op["data"])
    if op.name == "sqrt" and (number := constant(op["input"])) is not None and number >= 0:
        return math.sqrt(number)
    return None


def _regroup(scores: Scores, dims: list[Any], before: list[Any], after: list[Any]) -> list[Any] | None:
    """Labels of the batch dimensions `after` a reshape, splitting labels where one dimension becomes
    several."""
    out: list[Any] = []
    while before and after:
        if same(before[0], after[0]):
            out.append(dims.pop(0))
            before.pop(0), after.pop(0)
            continue
        merged = _prefix(before, after[0])
        if merged is not None:
            out.append(tuple(label for labels in dims[:merged] for label in labels))
            del dims[:merged], before[:merged]
            after.pop(0)
            continue
        parted = _prefix(after, before[0])
        if parted is None:
            return None
        labels = dims.pop(0)
        if len(labels) == 1:
            names = tuple(f"{labels[0]}.{index}" for index in range(parted))
            scores.refined[labels[0]] = names
        elif len(labels) == parted and _label_sizes_match(scores, labels, after[:parted]):
            names = labels
        else:
            return None
        out += [(name,) for name in names]
        before.pop(0)
        del after[:parted]
    return None if dims or any(not same(size, 1) for size in after) else out + [()] * len(after)


def _prefix(sizes: list[Any], product: Any) -> int | None:
    total: Any = 1
    for count, size in enumerate(sizes, 1):
        total = total * size
        if count > 1 and same(total, product):
            return count
    return None


def _label_sizes_match(scores: Scores, labels: tuple[str, ...], sizes: list[Any]) -> bool:
    for label, size in zip(labels, sizes, strict=True):
        known = scores.sizes.get(label)
        tensor = tensor_of(known[0]) if known else None
        if known is None or tensor is None or not same(tensor.shape[known[1]], size):
            return False
    return True
