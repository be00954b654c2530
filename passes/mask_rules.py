"""Rules of the mask evaluator: what an operation's result is at an index, given its operands at indices.

A rule returns a value, or None where the operation is beyond it (the evaluator then makes a look-up), and
raises Unprovable where a look-up would not do either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import Op, canonical, permutation
from kp_compiler.passes.mask_values import (
    RELATIONS,
    Cases,
    Index,
    Segments,
    Unprovable,
    Value,
    as_condition,
    as_number,
    choose,
    compare,
    constant_value,
    holds,
    is_condition,
    lift,
    size_index,
    sympify_size,
)

if TYPE_CHECKING:
    from kp_compiler.passes.mask_eval import MaskEvaluator

Rule = Callable[["MaskEvaluator", Node, Op, Index], Value]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _arithmetic(function: Callable[[Any, Any], Any]) -> Rule:
    def apply(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
        result = tensor_of(node)
        if result is not None and result.dtype == torch.bool:
            return None  # sums and products of booleans are not those of numbers
        if op.get("alpha", 1) != 1 or op.get("rounding_mode") is not None:
            return None
        a, b = _promoted(ev, node, op, index)
        return lift(lambda x, y: _finite(sympy.expand(function(x, y))), a, b)

    return apply


def _promoted(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> tuple[Value, Value]:
    """Both operands as numbers of the type that the operation computes in."""
    dtype = torch.result_type(_typed(op["input"]), _typed(op["other"]))
    a, b = (
        ev.held(as_number(ev.broadcast(op[key], index, node)), dtype) for key in ("input", "other")
    )  # fmt: skip
    return a, b


def _typed(value: Any) -> Any:
    """A tensor, or a number of the type that promotion sees."""
    tensor = tensor_of(value)
    if tensor is not None:
        return tensor
    found = value_of(value)
    return 1.0 if isinstance(found, float | torch.SymFloat) else found if isinstance(found, bool) else 1


def _finite(value: Any) -> Any:
    if value.free_symbols and value.atoms(sympy.Float):
        raise Unprovable("the mask's arithmetic rounds")
    if value is sympy.nan or value is sympy.zoo:
        raise Unprovable("the mask's arithmetic is not defined everywhere (0 · inf)")
    return value


RULES |= {
    "add": _arithmetic(lambda x, y: x + y),
    "sub": _arithmetic(lambda x, y: x - y),
    "mul": _arithmetic(lambda x, y: x * y),
    "floordiv": _arithmetic(lambda x, y: sympy.floor(x / y)),
    "mod": _arithmetic(sympy.Mod),
    "minimum": _arithmetic(sympy.Min),
    "maximum": _arithmetic(sympy.Max),
}


def _relation(name: str) -> Rule:
    def apply(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
        tensor = tensor_of(op["input"])
        try:
            a, b = (ev.broadcast(op[key], index, node) for key in ("input", "other"))
        except Unprovable:
            if tensor is not None and tensor.dtype.is_floating_point:
                return ev.leaf(node, index)  # a comparison of unknown floats is a boolean like any other
            raise
        if is_condition(a) and is_condition(b) and name in ("eq", "ne"):
            different = sympy.Xor(a, b)
            return different if name == "ne" else sympy.Not(different)
        a, b = _promoted(ev, node, op, index)
        return lift(lambda x, y: compare(name, x, y), a, b)

    return apply


RULES |= {name: _relation(name) for name in RELATIONS}


@_rule("and", "or", "xor")
def _logic(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    tensor = tensor_of(node)
    if tensor is None or tensor.dtype != torch.bool:
        return None
    a, b = (as_condition(ev.broadcast(op[key], index, node)) for key in ("input", "other"))
    return {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}[op.name](a, b)


@_rule("not")
def _not(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    tensor = tensor_of(node)
    if tensor is None or tensor.dtype != torch.bool:
        return None
    return sympy.Not(as_condition(ev.at(op["input"], index, node)))


@_rule("neg", "abs", "floor")
def _unary(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    function = {"neg": lambda x: -x, "abs": sympy.Abs, "floor": sympy.floor}[op.name]
    return lift(function, as_number(ev.at(op["input"], index, node)))


@_rule("clamp")
def _clamp(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    value = as_number(ev.at(op["input"], index, node))
    for key, function in (("min", sympy.Max), ("max", sympy.Min)):
        if op[key] is not None:
            value = lift(function, value, as_number(ev.broadcast(op[key], index, node)))
    return value


@_rule("cast", "clone", "detach")
def _cast(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    source, dtype = tensor_of(op["input"]), op.get("dtype")
    if source is None:
        return None
    try:
        value = ev.at(op["input"], index, node)
    except Unprovable:
        if dtype == torch.bool:
            return ev.leaf(node, index)
        raise
    if dtype == torch.bool:
        return as_condition(value)
    if dtype is not None and not dtype.is_floating_point and source.dtype.is_floating_point:
        return None
    if dtype is not None and not holds(dtype, source.dtype) and _looks_up(value):
        return None  # some of its values would change: the result is looked up instead
    return value if dtype is None or dtype == source.dtype else as_number(value)


def _looks_up(value: Value) -> bool:
    items = [item for _, item in value.items] if isinstance(value, Cases) else [value]
    return any(not is_condition(item) and item.atoms(AppliedUndef) for item in items)


@_rule("full", "full_like")
def _full(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    tensor = tensor_of(node)
    value = ev.at(op["fill_value"], (), node)
    return as_condition(value) if tensor is not None and tensor.dtype == torch.bool else value


@_rule("tensor", "new_tensor")
def _tensor(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    tensor = tensor_of(node)
    if tensor is None or not isinstance(op["data"], bool | int | float):
        return None
    value = constant_value(op["data"])
    return as_condition(value) if tensor.dtype == torch.bool else as_number(value)


@_rule("arange")
def _arange(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    start, end, step = (ev.at(op[name], (), node) for name in ("start", "end", "step"))
    if tensor_of(node) is None or any(getattr(v, "is_Float", False) for v in (start, end, step)):
        return None
    return start + step * index[0]


@_rule("expand")
def _expand(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    return ev.broadcast(op["input"], index, node)


@_rule("unsqueeze", "squeeze", "view")
def _ones(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    """Reshapes that only add or drop dimensions of size 1."""
    source, result = tensor_of(op["input"]), tensor_of(node)
    if source is None or result is None:
        return None
    kept = [(size, i) for size, i in zip(result.shape, index, strict=True) if not _is_one(size)]
    wanted = [size for size in source.shape if not _is_one(size)]
    if len(kept) != len(wanted) or any(
        not _equal(a, size) for (a, _), size in zip(kept, wanted, strict=True)
    ):
        return None
    rest = iter(kept)
    inner = tuple(sympy.Integer(0) if _is_one(size) else next(rest)[1] for size in source.shape)
    return ev.at(op["input"], inner, node)


@_rule("permute", "transpose")
def _permute(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    order = permutation(op, len(index))
    if order is None:
        return None
    inner: list[Any] = [None] * len(index)
    for position, source in enumerate(order):
        inner[source] = index[position]
    return ev.at(op["input"], tuple(inner), node)


@_rule("flip")
def _flip(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    tensor = tensor_of(node)
    assert tensor is not None
    inner = list(index)
    for dim in op["dims"]:
        inner[dim] = sympify_size(tensor.shape[dim]) - 1 - inner[dim]
    return ev.at(op["input"], tuple(inner), node)


@_rule("repeat")
def _repeat(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    """Only repetitions of dimensions of size 1."""
    source = tensor_of(op["input"])
    repeats = op["repeats"]
    if source is None or len(repeats) < source.dim():
        return None
    own = repeats[len(repeats) - source.dim() :]
    if any(r != 1 and not _is_one(size) for r, size in zip(own, source.shape, strict=True)):
        return None
    return ev.broadcast(op["input"], index, node)


@_rule("where")
def _where(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    condition = as_condition(ev.broadcast(op["condition"], index, node))
    return choose(condition, *(ev.broadcast(op[key], index, node) for key in ("input", "other")))


@_rule("masked_fill")
def _masked_fill(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    condition = as_condition(ev.broadcast(op["mask"], index, node))
    filled = ev.broadcast(op["value"], index, node)
    tensor = tensor_of(node)
    if tensor is not None and tensor.dtype == torch.bool:
        filled = as_condition(filled)
    return choose(condition, filled, ev.broadcast(op["input"], index, node))


@_rule("tril", "triu")
def _triangle(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    if len(index) < 2:
        return None
    diagonal = ev.at(op["diagonal"], (), node)
    row, column = index[-2], index[-1]
    inside = (
        compare("le", column - row, diagonal) if op.name == "tril" else compare("ge", column - row, diagonal)
    )
    value = ev.at(op["input"], index, node)
    return sympy.And(inside, value) if is_condition(value) else choose(inside, value, sympy.Integer(0))


@_rule("outer")
def _outer(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    a, b = (as_number(ev.at(op[key], (i,), node)) for key, i in zip(("input", "other"), index, strict=True))
    return lift(lambda x, y: sympy.expand(x * y), a, b)


@_rule("narrow")
def _narrow(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    inner = list(index)
    source = tensor_of(op["input"])
    if source is None or not isinstance(op["dim"], int):
        return None
    inner[op["dim"]] = inner[op["dim"]] + _start(ev, node, op["start"], source.shape[op["dim"]])
    return ev.at(op["input"], tuple(inner), node)


@_rule("diff")
def _diff(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    """`x[n] - x[n-1]`, the first element against `prepend`."""
    source, before = tensor_of(op["input"]), tensor_of(op["prepend"])
    if source is None or op["n"] != 1 or op["append"] is not None or not isinstance(op["dim"], int):
        return None
    if source.dtype == torch.bool:
        return None  # which differ rather than subtract
    dim = op["dim"] % len(index)
    n = index[dim]

    def value(position: Any) -> Value:
        return as_number(ev.at(op["input"], (*index[:dim], position, *index[dim + 1 :]), node))

    def minus(x: Any, y: Any) -> Any:
        return sympy.expand(x - y)

    if before is None:
        return lift(minus, value(n + 1), value(n))
    if not _is_one(before.shape[dim]):
        return None
    first = as_number(ev.broadcast(op["prepend"], (*index[:dim], sympy.Integer(0), *index[dim + 1 :]), node))
    return choose(
        sympy.Eq(n, 0), lift(minus, value(sympy.Integer(0)), first), lift(minus, value(n), value(n - 1))
    )


@_rule("cumsum")
def _cumsum(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    """Constant summands fold; a sum of conditions is a non-decreasing look-up, and may number segments."""
    source = tensor_of(op["input"])
    if source is None or not isinstance(op["dim"], int):
        return None
    dim = op["dim"] % len(index)
    value = as_number(ev.at(op["input"], index, node))
    if isinstance(value, sympy.Expr) and value.is_number:
        return sympy.expand(value * (index[dim] + 1))
    result = tensor_of(node)
    counts = result is not None and result.dtype in _COUNTERS
    monotone = source.dtype == torch.bool and dim == len(index) - 1 and counts
    segments = _segments(ev, op["input"], node, dim) if monotone else None
    return ev.leaf(node, index, monotone=monotone, segments=segments)


_COUNTERS = (torch.int32, torch.int64)  # that a sum of booleans does not wrap


def _segments(ev: MaskEvaluator, changes: Any, reader: Node, dim: int) -> Segments | None:
    """Whether `changes`, which `reader` sums up, is `diff(position, prepend=…) != 1` along `dim`, still as it
    was computed."""
    op = canonical(changes) if isinstance(changes, Node) else None
    if op is None or op.name != "ne" or op["other"] != 1 or not isinstance(op["input"], Node):
        return None
    source, steps = op["input"], canonical(op["input"])
    if steps is None or steps.name != "diff" or steps["n"] != 1 or steps["append"] is not None:
        return None
    position, before = tensor_of(steps["input"]), tensor_of(steps["prepend"])
    if position is None or before is None or position.dtype not in _COUNTERS:
        return None
    if steps["dim"] % position.dim() != dim or not _is_one(before.shape[dim]):
        return None
    if ev.current(changes, reader) is not changes or ev.current(source, changes) is not source:
        return None

    def at(lead: Any, n: Any) -> Value:
        return ev.at(steps["input"], (*lead[:dim], n, *lead[dim + 1 :]), source)

    return Segments(at)


@_rule("getitem")
def _getitem(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    source = tensor_of(op["input"])
    if source is None or isinstance(op["index"], list):  # a list picks elements, as a tensor does
        return None
    items = list(op["index"]) if isinstance(op["index"], tuple) else [op["index"]]
    if any(isinstance(item, list) for item in items):
        return None
    inner = _index(ev, node, source, items, list(index))
    return None if inner is None else ev.at(op["input"], tuple(inner), node)


def _index(
    ev: MaskEvaluator, node: Node, source: torch.Tensor, items: list[Any], index: list[Any]
) -> list[Any] | None:
    """The index into `source` that `source[items]` reads at `index`."""
    tensors = [item for item in items if tensor_of(item) is not None and isinstance(item, Node)]
    if any(_dtype(item) == torch.bool for item in tensors) or any(isinstance(item, bool) for item in items):
        return None
    used = sum(item is not None and item is not Ellipsis for item in items)
    missing = source.dim() - used
    if Ellipsis in [item for item in items if not isinstance(item, Node)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items = [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]
    else:
        items = [*items, *[slice(None)] * missing]
    rank = max((tensor_of(t).dim() for t in tensors), default=0)  # type: ignore[union-attr]
    kept = [item for item in items if not _is_number(item)]  # a number selects before tensors do
    positions = [i for i, item in enumerate(kept) if any(item is t for t in tensors)]
    adjacent = bool(positions) and positions == list(range(positions[0], positions[-1] + 1))
    if positions and not adjacent:
        shared, index = index[:rank], index[rank:]
    inner: list[Any] = []
    dims = iter(range(source.dim()))
    taken = False
    for item in items:
        if item is None:
            index.pop(0)
            continue
        size = source.shape[next(dims)]
        if isinstance(item, slice):
            inner.append(_sliced(ev, node, item, size, index.pop(0)))
        elif tensor_of(item) is not None:
            if adjacent and not taken:
                shared, index, taken = index[:rank], index[rank:], True
            inner.append(_gathered(ev, node, item, size, tuple(shared)))
        else:
            inner.append(_wrapped(ev, node, item, size))
    return inner


def _is_number(item: Any) -> bool:
    value = value_of(item)
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _dtype(node: Any) -> Any:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def _sliced(ev: MaskEvaluator, node: Node, item: slice, size: Any, index: Any) -> Any:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise Unprovable("a slice with a step kp can't follow")
    if item.start is None:
        return size_index(size, step * index)
    return _start(ev, node, item.start, size) + step * index


def _start(ev: MaskEvaluator, node: Node, given: Any, size: Any) -> Any:
    """Where a slice begins, counted from the front."""
    start = ev.at(given, (), node)
    if start.is_negative:
        start = start + sympify_size(size)
    if start.is_nonnegative is not True:
        raise Unprovable("a slice with a start of unknown sign")
    return start


def _wrapped(ev: MaskEvaluator, node: Node, item: Any, size: Any) -> Any:
    value = ev.at(item, (), node)
    return value + sympify_size(size) if value.is_negative else value


def _gathered(ev: MaskEvaluator, node: Node, item: Node, size: Any, index: Index) -> Any:
    """Advanced indexing is only a substitution where no index is negative: those wrap. One beyond the end is
    an error of the program itself; between different symbols (the batch of a mask, and of the tokens) it need
    not be excluded."""
    value = ev.broadcast(item, index, node)
    if isinstance(value, Cases) or is_condition(value):
        raise Unprovable("a mask is indexed by a value with cases")
    value = sympy.expand(value)
    if _is_one(size) and value == 0:
        return value
    found = ev.bounds(value, of_part=True)
    if found is None or found[0].is_nonnegative is not True:
        raise Unprovable("a mask is indexed by values that may be negative")
    if (sympify_size(size) - 1 - found[1]).is_negative:
        raise Unprovable("a mask is indexed beyond its end")
    return value


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _equal(a: Any, b: Any) -> bool:
    return sympy.expand(sympify_size(a) - sympify_size(b)) == 0
