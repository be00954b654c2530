"""Values of mask formulas: sympy numbers, sympy conditions, and values by condition.

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

from kp_compiler.writes import rounded

_MAX_CASES = 12

Value = Any  # sympy.Expr | Boolean | Cases
Index = tuple[Any, ...]


# The integers that a dtype holds without rounding or wrapping. int64 is taken as unbounded.
EXACT = {
    torch.bfloat16: (-(2**8), 2**8),
    torch.float16: (-(2**11), 2**11),
    torch.float32: (-(2**24), 2**24),
    torch.float64: (-(2**53), 2**53),
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
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


def rounded_value(value: Any, dtype: torch.dtype) -> Value:
    """A number as a tensor of `dtype` holds it."""
    if not dtype.is_floating_point:
        low, high = EXACT.get(dtype, (-(2**63), 2**63 - 1))
        if value.is_Integer and low <= value <= high:
            return value
        raise Unprovable(f"{dtype} can't hold {float(value):g}")
    number = rounded(float(value), dtype)
    if number is None or not math.isfinite(number):
        raise Unprovable(f"{dtype} can't hold {float(value):g}")
    return constant_value(number)


def holds(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Every value of an integer or boolean tensor of dtype `source` keeps its value in `dtype`."""
    if source in (torch.bool, dtype) or dtype not in EXACT:
        return source == torch.bool or not dtype.is_floating_point
    if source not in EXACT or source.is_floating_point:
        return False
    return EXACT[dtype][0] <= EXACT[source][0] and EXACT[source][1] <= EXACT[dtype][1]


def size_index(size: Any, index: Any) -> Any:
    return sympy.Integer(0) if isinstance(size, int) and size == 1 else index


def is_condition(value: Value) -> bool:
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)  # a sympy Symbol is both


def as_condition(value: Value) -> Boolean:
    """A value read as true or false."""
    if is_condition(value):
        return value
    if isinstance(value, Cases):
        return select([(c, as_condition(v)) for c, v in value.items])
    return sympy.Ne(value, 0)


def as_number(value: Value) -> Value:
    """A condition read as 0 or 1."""
    if is_condition(value):
        if value in (sympy.true, sympy.false):
            return sympy.Integer(int(bool(value)))
        return Cases(((value, sympy.Integer(1)), (sympy.true, sympy.Integer(0))))
    return value


def select(items: list[tuple[Boolean, Boolean]]) -> Boolean:
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
        return select([(condition, a), (sympy.true, b)])
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
                return select(parts)
            flat: list[tuple[Boolean, Any]] = []
            for condition, item in parts:
                inner = item.items if isinstance(item, Cases) else ((sympy.true, as_number(item)),)
                flat += [(sympy.And(condition, c), v) for c, v in inner]
            return _tidy(flat)
    return function(*values)


RELATIONS = {
    "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip


def compare(name: str, x: Any, y: Any) -> Boolean:
    """A relation in normal form: everything on the left, integers made non-strict."""
    if x.is_infinite or y.is_infinite:
        return RELATIONS[name](x, y)
    difference = sympy.expand(x - y)
    if name in ("eq", "ne"):
        return RELATIONS[name](difference, 0)
    if name in ("ge", "gt"):
        difference = -difference
    if name in ("lt", "gt"):
        if difference.is_integer is not True:
            return sympy.Lt(difference, 0)
        difference = difference + 1
    return sympy.Le(sympy.expand(difference), 0)
