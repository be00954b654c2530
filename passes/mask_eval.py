"""Symbolic evaluation of the subgraph that builds a mask: the value at an index, as a formula of that index.

`MaskEvaluator.at(node, index)` returns a sympy expression, a sympy condition, or `Cases` (values by
condition) for the element of `node` at `index`. What it has no rule for becomes a look-up t(index) into that
node, so every formula is exact; only what the formula is made of decides whether a mask counts as proved.
sympy expands and compares; nothing is ever handed to `simplify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from kp_compiler.normalize import Op, canonical, tensor_of, value_of
from kp_compiler.passes.base import Context
from kp_compiler.passes.scores import permutation

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
_MAX_CASES = 12
_MAX_NODES = 4000


# The integers that a dtype holds without rounding or wrapping. int32 and int64 are taken as unbounded.
_EXACT = {
    torch.bfloat16: (-(2**8), 2**8),
    torch.float16: (-(2**11), 2**11),
    torch.float32: (-(2**24), 2**24),
    torch.float64: (-(2**53), 2**53),
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
}


class Unprovable(Exception):
    """Evaluation met something it must not guess at."""


@dataclass(frozen=True)
class Cases:
    """A value by condition, first match wins; the last condition is true."""

    items: tuple[tuple[Boolean, Any], ...]


@dataclass
class Segments:
    """A look-up that numbers runs of consecutive positions: `cumsum(diff(position) != 1)`."""

    position: Callable[[Any, Any], Any]  # (leading index, n) -> the position's formula


@dataclass
class Leaf:
    """A tensor that a formula looks up."""

    node: Node
    reader: Node  # what read it when the mask was built
    monotone: bool = False
    segments: Segments | None = None


Value = Any  # sympy.Expr | Boolean | Cases
Index = tuple[Any, ...]


class MaskEvaluator:
    """Formulas over one graph. `ranges` bounds the index symbols by sizes."""

    def __init__(self, ctx: Context, ranges: dict[sympy.Symbol, Any]) -> None:
        self.ctx = ctx
        self.ranges = {symbol: sympify_size(size) for symbol, size in ranges.items()}
        self.leaves: dict[str, Leaf] = {}
        self.budget = _MAX_NODES

    # ------------------------------------------------------------------------------------------------ entry
    # points

    def at(self, node: Any, index: Index, reader: Node | None = None) -> Value:
        """The element of `node` (or a constant) at `index`, as `reader` sees it."""
        if not isinstance(node, Node):
            return constant_value(node)
        self.budget -= 1
        if self.budget < 0:
            raise Unprovable("the mask's formula grows too large")
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return sympify_size(value)
        if isinstance(value, int | float | bool):
            return constant_value(value)
        outer = self._outside(node)
        if outer is not None:
            return outer.at(self._argument(node), index)
        current = node if reader is None else self._writes.current(node, reader)
        if current is None:
            raise Unprovable(f"{node.name} is written to before the mask is built from it")
        tensor = tensor_of(current)
        if tensor is None:
            raise Unprovable(f"{node.name} is not a tensor")
        op = canonical(current)
        rule = _RULES.get(op.name) if op is not None else None
        found = None if op is None or rule is None else rule(self, current, op, index)
        value = self.leaf(current, index, reader) if found is None else found
        self._check_exact(value, tensor.dtype)
        return value

    def _check_exact(self, value: Value, dtype: torch.dtype) -> None:
        """Formulas are about exact integers: narrow dtypes round or wrap outside a range."""
        limits = _EXACT.get(dtype)
        if limits is None:
            return
        largest = torch.finfo(dtype).max if dtype.is_floating_point else limits[1]
        for item in [v for _, v in value.items] if isinstance(value, Cases) else [value]:
            if not is_condition(item) and item.is_number and item.is_finite and abs(item) > largest:
                raise Unprovable(f"{dtype} can't hold {float(item):g}")
            if is_condition(item) or item.is_number or isinstance(item, sympy.Function):
                continue
            found = self.bounds(item)
            low, high = found if found is not None else (sympy.nan, sympy.nan)
            if (low - limits[0]).is_nonnegative is not True or (limits[1] - high).is_nonnegative is not True:
                raise Unprovable(f"{dtype} does not hold every value of {item} exactly")

    def broadcast(self, node: Any, index: Index, reader: Node) -> Value:
        """Like `at`, for an operand that broadcasts against a result of index `index`."""
        tensor = tensor_of(node)
        if tensor is None:
            return self.at(node, (), reader)
        own = index[len(index) - tensor.dim() :] if tensor.dim() else ()
        return self.at(node, tuple(_at(size, i) for size, i in zip(tensor.shape, own, strict=True)), reader)

    def leaf(
        self,
        node: Node,
        index: Index,
        reader: Node | None = None,
        *,
        monotone: bool = False,
        segments: Segments | None = None,
    ) -> Value:
        """A look-up into `node`. Booleans are stored as 0 and 1."""
        tensor = tensor_of(node)
        assert tensor is not None
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            raise Unprovable(f"{node.name} holds floating-point numbers kp knows nothing about")
        name = f"t_{node.name}"
        self.leaves.setdefault(name, Leaf(node, reader or node, monotone, segments))
        index = tuple(_at(size, i) for size, i in zip(tensor.shape, index, strict=True))
        looked_up = sympy.Function(name, integer=True)(*index)
        return sympy.Ne(looked_up, 0) if tensor.dtype == torch.bool else looked_up

    # -----------------------------------------------------------------------------------------------
    # checkpoint bodies

    @property
    def _writes(self) -> Any:
        return self.ctx.writes

    def _outside(self, node: Node) -> _Outer | None:
        """For a placeholder of a checkpoint body: an evaluator of the graph around it."""
        if node.op != "placeholder" or not self.ctx.calls or node.graph is not self.ctx.gm.graph:
            return None
        arguments = {self._argument(node, call) for call in self.ctx.calls}
        if len(arguments) != 1:
            raise Unprovable(f"{node.name} differs between the calls of a shared checkpoint body")
        return _Outer(self)

    def _argument(self, node: Node, call: Node | None = None) -> Any:
        position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
        return (call or self.ctx.calls[0]).args[1 + position]

    def overwritten(self, leaf: Leaf) -> bool:
        """A looked-up tensor is written to after the mask was built from it."""
        outside = leaf.node.graph is not self.ctx.gm.graph
        writes = self.ctx.outer_writes if outside else self.ctx.writes
        assert writes is not None
        changed = bool(writes.between(leaf.node, leaf.node.graph.output_node(), since=leaf.reader))
        if changed and outside:
            raise Unprovable(f"{leaf.node.name} is written to after the mask was built from it")
        return changed

    # -------------------------------------------------------------------------------------------------------
    # bounds

    def bounds(self, expr: sympy.Expr) -> tuple[Any, Any] | None:
        """Smallest and largest value of an integer formula that is affine in the index symbols."""
        expr = sympy.expand(expr)
        low = high = expr
        for symbol, size in self.ranges.items():
            if symbol not in expr.free_symbols:
                continue
            coeff = expr.coeff(symbol, 1)
            if expr.diff(symbol) != coeff or coeff.free_symbols:
                return None
            top = size - 1
            low = low.subs(symbol, 0 if coeff >= 0 else top)
            high = high.subs(symbol, top if coeff >= 0 else 0)
        return None if low.atoms(sympy.Function) else (sympy.expand(low), sympy.expand(high))

    def inside(self, expr: Any, size: Any) -> bool:
        """0 <= expr < size for certain."""
        found = self.bounds(sympy.sympify(expr))
        if found is None:
            return False
        return found[0].is_nonnegative is True and (sympify_size(size) - 1 - found[1]).is_nonnegative is True


class _Outer:
    """Evaluates in the graph around a checkpoint body, leaves included."""

    def __init__(self, inner: MaskEvaluator) -> None:
        self.inner = inner

    def at(self, node: Any, index: Index) -> Value:
        ctx = self.inner.ctx
        call = ctx.calls[0]
        outer = Context(ctx.gm, ctx.config, ctx.target)
        assert ctx.outer_writes is not None
        outer.writes = ctx.outer_writes
        evaluator = MaskEvaluator.__new__(MaskEvaluator)
        evaluator.__dict__.update(self.inner.__dict__, ctx=outer)
        return evaluator.at(node, index, call)


# -----------------------------------------------------------------------------------------------------------
# values


def sympify_size(size: Any) -> sympy.Expr:
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.sympify(size)


def constant_value(value: Any) -> Value:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        if math.isnan(value):
            raise Unprovable("a constant is NaN")
        return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)
    if isinstance(value, torch.SymInt):
        return sympify_size(value)
    raise Unprovable(f"a constant of type {type(value).__name__}")


def _at(size: Any, index: Any) -> Any:
    return sympy.Integer(0) if isinstance(size, int) and size == 1 else index


def is_condition(value: Value) -> bool:
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)  # a sympy Symbol is both


def as_condition(value: Value) -> Boolean:
    """A value read as true or false."""
    if is_condition(value):
        return value
    if isinstance(value, Cases):
        return _select([(c, as_condition(v)) for c, v in value.items])
    return sympy.Ne(value, 0)


def as_number(value: Value) -> Value:
    """A condition read as 0 or 1."""
    if is_condition(value):
        if value in (sympy.true, sympy.false):
            return sympy.Integer(int(bool(value)))
        return Cases(((value, sympy.Integer(1)), (sympy.true, sympy.Integer(0))))
    return value


def _select(items: list[tuple[Boolean, Boolean]]) -> Boolean:
    out: Boolean = sympy.false
    for condition, value in reversed(items):
        if condition == sympy.true:
            out = value
        else:
            out = sympy.Or(sympy.And(condition, value), sympy.And(sympy.Not(condition), out))
    return out


def choose(condition: Boolean, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`."""
    if condition == sympy.true:
        return a
    if condition == sympy.false:
        return b
    if is_condition(a) and is_condition(b):
        return _select([(condition, a), (sympy.true, b)])
    a, b = as_number(a), as_number(b)
    left = a.items if isinstance(a, Cases) else ((sympy.true, a),)
    right = b.items if isinstance(b, Cases) else ((sympy.true, b),)
    return _tidy([(sympy.And(condition, c), v) for c, v in left] + list(right))


def _tidy(items: list[tuple[Boolean, Any]]) -> Value:
    kept: list[tuple[Boolean, Any]] = []
    for condition, value in items:
        if condition == sympy.false:
            continue
        if kept and kept[-1][1] == value and condition == sympy.true:
            kept.pop()
        kept.append((condition, value))
        if condition == sympy.true:
            break
    if len(kept) > _MAX_CASES:
        raise Unprovable("the mask's formula has too many cases")
    return kept[0][1] if kept[0][0] == sympy.true else Cases(tuple(kept))


def lift(function: Callable[..., Value], *values: Value) -> Value:
    """Apply a function of plain values to values that may be Cases."""
    for position, value in enumerate(values):
        if isinstance(value, Cases):
            parts = []
            for condition, item in value.items:
                parts.append((condition, lift(function, *values[:position], item, *values[position + 1 :])))
            if all(is_condition(v) for _, v in parts):
                return _select(parts)
            flat: list[tuple[Boolean, Any]] = []
            for condition, item in parts:
                inner = item.items if isinstance(item, Cases) else ((sympy.true, as_number(item)),)
                flat += [(sympy.And(condition, c), v) for c, v in inner]
            return _tidy(flat)
    return function(*values)


# ------------------------------------------------------------------------------------------------------------
# rules

Rule = Callable[[MaskEvaluator, Node, Op, Index], Value]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _arithmetic(function: Callable[[Any, Any], Any]) -> Rule:
    def apply(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
        result = tensor_of(node)
        if result is not None and result.dtype == torch.bool:
            return None  # sums and products of booleans are not those of numbers
        a, b = (as_number(ev.broadcast(op[key], index, node)) for key in ("input", "other"))
        if op.get("alpha", 1) != 1 or op.get("rounding_mode") is not None:
            return None
        return lift(lambda x, y: _finite(sympy.expand(function(x, y))), a, b)

    return apply


def _finite(value: Any) -> Any:
    if value is sympy.nan or value is sympy.zoo:
        raise Unprovable("the mask's arithmetic is not defined everywhere (0 · inf)")
    return value


_RULES |= {
    "add": _arithmetic(lambda x, y: x + y),
    "sub": _arithmetic(lambda x, y: x - y),
    "mul": _arithmetic(lambda x, y: x * y),
    "floordiv": _arithmetic(lambda x, y: sympy.floor(x / y)),
    "mod": _arithmetic(sympy.Mod),
    "minimum": _arithmetic(sympy.Min),
    "maximum": _arithmetic(sympy.Max),
}
_RELATIONS = {
    "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip


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
        return lift(lambda x, y: compare(name, x, y), as_number(a), as_number(b))

    return apply


def compare(name: str, x: Any, y: Any) -> Boolean:
    """A relation in normal form: everything on the left, integers made non-strict."""
    if x.is_infinite or y.is_infinite:
        return _RELATIONS[name](x, y)
    difference = sympy.expand(x - y)
    if name in ("eq", "ne"):
        return _RELATIONS[name](difference, 0)
    if name in ("ge", "gt"):
        difference = -difference
    if name in ("lt", "gt"):
        if difference.is_integer is not True:
            return sympy.Lt(difference, 0)
        difference = difference + 1
    return sympy.Le(sympy.expand(difference), 0)


_RULES |= {name: _relation(name) for name in _RELATIONS}


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
    return value if dtype is None or dtype == source.dtype else as_number(value)


@_rule("full", "full_like")
def _full(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    tensor = tensor_of(node)
    value = ev.at(op["fill_value"], (), node)
    return as_condition(value) if tensor is not None and tensor.dtype == torch.bool else value


@_rule("tensor", "new_tensor")
def _tensor(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    return constant_value(op["data"]) if isinstance(op["data"], bool | int | float) else None


@_rule("arange")
def _arange(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    given = [*op["range"]]
    if len(given) == 1 and "end" not in op.args:
        given = [0, *given]
    named = [op.args[key] for key in ("start", "end", "step")[len(given) :] if key in op.args]
    values = [
        ev.at(a, (), node)
        for a in ([0, *named] if not given and "start" not in op.args else [*given, *named])
    ]
    tensor = tensor_of(node)
    if tensor is None or any(getattr(v, "is_Float", False) for v in values):
        return None
    start = values[0] if len(values) > 1 else sympy.Integer(0)
    step = values[2] if len(values) > 2 else sympy.Integer(1)
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
    inner[op["dim"]] = inner[op["dim"]] + ev.at(op["start"], (), node)
    return ev.at(op["input"], tuple(inner), node)


@_rule("diff")
def _diff(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    """`x[n] - x[n-1]`, the first element against `prepend`."""
    source, before = tensor_of(op["input"]), tensor_of(op["prepend"])
    if source is None or op["n"] != 1 or op["append"] is not None or not isinstance(op["dim"], int):
        return None
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
    monotone = source.dtype == torch.bool and dim == len(index) - 1
    return ev.leaf(
        node, index, monotone=monotone, segments=_segments(ev, op["input"], dim) if monotone else None
    )


def _segments(ev: MaskEvaluator, node: Any, dim: int) -> Segments | None:
    """Whether `node` is `diff(position, prepend=…) != 1` along `dim`."""
    op = canonical(node) if isinstance(node, Node) else None
    if op is None or op.name != "ne" or op["other"] != 1 or not isinstance(op["input"], Node):
        return None
    steps = canonical(op["input"])
    if steps is None or steps.name != "diff" or steps["n"] != 1 or steps["append"] is not None:
        return None
    source = op["input"]

    def position(lead: Any, n: Any) -> Value:
        index = (*lead[:dim], n, *lead[dim + 1 :])
        return ev.at(steps["input"], index, source)

    return Segments(position)


@_rule("getitem")
def _getitem(ev: MaskEvaluator, node: Node, op: Op, index: Index) -> Value:
    source = tensor_of(op["input"])
    if source is None:
        return None
    items = list(op["index"]) if isinstance(op["index"], tuple | list) else [op["index"]]
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
    positions = [i for i, item in enumerate(items) if any(item is t for t in tensors)]
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


def _dtype(node: Any) -> Any:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def _sliced(ev: MaskEvaluator, node: Node, item: slice, size: Any, index: Any) -> Any:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise Unprovable("a slice with a step kp can't follow")
    if item.start is None:
        return _at(size, step * index)
    start = ev.at(item.start, (), node)
    if start.is_negative:
        start = start + sympify_size(size)
    if start.is_nonnegative is not True:
        raise Unprovable("a slice with a start of unknown sign")
    return start + step * index


def _wrapped(ev: MaskEvaluator, node: Node, item: Any, size: Any) -> Any:
    value = ev.at(item, (), node)
    return value + sympify_size(size) if value.is_negative else value


def _gathered(ev: MaskEvaluator, node: Node, item: Node, size: Any, index: Index) -> Any:
    """Advanced indexing is a substitution only where the index stays inside (negative ones wrap)."""
    value = ev.broadcast(item, index, node)
    if isinstance(value, Cases) or is_condition(value):
        raise Unprovable("a mask is indexed by a value with cases")
    value = sympy.expand(value)
    if _is_one(size) and value == 0:
        return value
    if not ev.inside(value, size):
        raise Unprovable("a mask is indexed by values that are not known to lie inside it")
    return value


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _equal(a: Any, b: Any) -> bool:
    return sympy.expand(sympify_size(a) - sympify_size(b)) == 0
