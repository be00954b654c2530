"""A proved mask's formula as tensor operations.

One walk over the sympy expression serves three readers: the reference (index tensors), FlexAttention's mask
function (scalars in a graph), and block lists (intervals of indices). A reader supplies the values of b, h,
q, k and the look-ups, and the few operations formulas are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import sympy

from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionSpec, MaskSpec

INDEX_NAMES = ("b", "h", "q", "k")
_SYMBOLS = {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in INDEX_NAMES}


def symbol(name: str) -> Any:
    """The sympy symbol of an index."""
    return _SYMBOLS[name]


@lru_cache(maxsize=1024)
def parse(text: str) -> Any:
    """The sympy expression of a MaskSpec's `expr`."""
    names: dict[str, Any] = dict(_SYMBOLS)
    names |= {f"n{i}": sympy.Symbol(f"n{i}", integer=True) for i in range(16)}
    names |= {f"t{i}": sympy.Function(f"t{i}", integer=True) for i in range(16)}
    return sympy.true if text == "True" else sympy.sympify(text, locals=names, convert_xor=False)


def is_causal(mask: MaskSpec) -> bool:
    """The mask is `k <= q` and nothing else."""
    if mask.kind != "causal" or mask.tensors or mask.scalars:
        return False
    return at_most_zero(parse(mask.expr)) == {_SYMBOLS["k"] - _SYMBOLS["q"]}


def is_band(mask: MaskSpec) -> bool:
    """The mask is `k <= q` and `q - k < window`, and nothing else."""
    if mask.kind != "window" or mask.window is None or mask.window < 1 or mask.tensors or mask.scalars:
        return False
    q, k = _SYMBOLS["q"], _SYMBOLS["k"]
    return at_most_zero(parse(mask.expr)) == {k - q, q - k + 1 - mask.window}


def at_most_zero(expr: Any) -> set[Any]:
    """The expressions, whole numbers, that a conjunction bounds by zero; empty for anything else."""
    parts = expr.args if isinstance(expr, sympy.And) else (expr,)
    if not all(isinstance(part, sympy.Le | sympy.Ge | sympy.Lt | sympy.Gt) for part in parts):
        return set()
    strict = (sympy.Lt, sympy.Gt)
    return {sympy.expand(part.lts - part.gts + int(isinstance(part, strict))) for part in parts}


@lru_cache(maxsize=1024)
def inequalities(mask: MaskSpec) -> tuple[Any, ...] | None:
    """Forms in q, k and the scalars n0, … that a mask bounds by zero from above, with q and k taken once,
    added or subtracted; empty where it keeps everything, None for any other mask."""
    if mask.kind == "tensor":
        return None
    expr = parse(mask.expr)
    if expr == sympy.true:
        return ()
    forms = at_most_zero(expr)
    if not forms or any(form.atoms(sympy.core.function.AppliedUndef) for form in forms):
        return None
    for form in forms:
        if form.has(_SYMBOLS["b"]) or form.has(_SYMBOLS["h"]) or not form.is_polynomial():
            return None
        if not all(number.is_Integer for number in form.atoms(sympy.Rational)):
            return None
        if any(form.coeff(_SYMBOLS[name]) not in (-1, 0, 1) for name in "qk"):
            return None
        if any(sympy.diff(form, _SYMBOLS[name]).free_symbols for name in "qk"):
            return None
    return tuple(sorted(forms, key=str))


class Algebra(Protocol):
    """The operations a reader provides on its own values."""

    def integer(self, value: int) -> Any: ...
    def truth(self, value: bool) -> Any: ...
    def symbol(self, name: str) -> Any: ...
    def lookup(self, index: int, args: list[Any]) -> Any: ...
    def add(self, a: Any, b: Any) -> Any: ...
    def mul(self, a: Any, b: Any) -> Any: ...
    def floor_div(self, a: Any, divisor: int) -> Any: ...
    def mod(self, a: Any, divisor: int) -> Any: ...
    def minimum(self, a: Any, b: Any) -> Any: ...
    def maximum(self, a: Any, b: Any) -> Any: ...
    def le_zero(self, a: Any) -> Any: ...
    def eq_zero(self, a: Any) -> Any: ...
    def both(self, a: Any, b: Any) -> Any: ...
    def either(self, a: Any, b: Any) -> Any: ...
    def negate(self, a: Any) -> Any: ...


def render(expr: Any, algebra: Algebra) -> Any:
    """The value of a formula in an algebra."""
    return _Renderer(algebra).visit(expr)


def renderable(expr: Any) -> bool:
    """Whether `render` knows every part of a formula."""
    try:
        render(expr, _Nothing())
    except ValueError:
        return False
    return True


def unproved(spec: AttentionSpec) -> Rejection | None:
    """Why a site is left to PyTorch's own choice of a kernel."""
    if spec.mask.kind == "tensor" and spec.form == "sdpa":
        return Rejection("mask-unproved", "The mask is not proved; PyTorch's own dispatch keeps this call.")
    return None


def unreadable(spec: AttentionSpec) -> Rejection | None:
    """Why a kernel that reads a mask's formula can't have it."""
    if spec.mask.kind != "tensor" and not renderable(parse(spec.mask.expr)):
        return Rejection("mask-render", f"The mask's formula has no rendering: {spec.mask.expr}")
    return unproved(spec)


class _Nothing:
    """An algebra without values."""

    def __getattr__(self, operation: str) -> Callable[..., None]:
        return lambda *args: None


class _Renderer:
    def __init__(self, algebra: Algebra) -> None:
        self.a = algebra
        self.memo: dict[Any, Any] = {}

    def visit(self, expr: Any) -> Any:
        if expr not in self.memo:
            self.memo[expr] = self._visit(expr)
        return self.memo[expr]

    def _visit(self, expr: Any) -> Any:
        a = self.a
        if expr == sympy.true or expr == sympy.false:
            return a.truth(bool(expr))
        if isinstance(expr, sympy.Integer):
            return a.integer(int(expr))
        if isinstance(expr, sympy.Symbol):
            return a.symbol(expr.name)
        for kind, operation in (
            (sympy.Add, a.add), (sympy.Mul, a.mul), (sympy.And, a.both), (sympy.Or, a.either),
            (sympy.Min, a.minimum), (sympy.Max, a.maximum),
        ):  # fmt: skip
            if isinstance(expr, kind):
                return self._fold(operation, expr.args)
        if isinstance(expr, sympy.Not):
            return a.negate(self.visit(expr.args[0]))
        if isinstance(expr, sympy.Xor):
            return self._fold(
                lambda x, y: a.either(a.both(x, a.negate(y)), a.both(a.negate(x), y)), expr.args
            )
        if isinstance(expr, sympy.core.relational.Relational):
            return self._relation(expr)
        if isinstance(expr, sympy.floor):
            numerator, denominator = expr.args[0].as_numer_denom()
            if not denominator.is_Integer:
                raise ValueError(f"kp can't render {expr}")
            return a.floor_div(self.visit(sympy.expand(numerator)), int(denominator))
        if isinstance(expr, sympy.Mod) and expr.args[1].is_Integer and expr.args[1] > 0:
            return a.mod(self.visit(expr.args[0]), int(expr.args[1]))
        if isinstance(expr, sympy.Abs):
            inner = self.visit(expr.args[0])
            return a.maximum(inner, a.mul(a.integer(-1), inner))
        if isinstance(expr, sympy.Function) and expr.func.__name__.startswith("t"):
            return a.lookup(int(expr.func.__name__[1:]), [self.visit(arg) for arg in expr.args])
        raise ValueError(f"kp can't render {expr} ({type(expr).__name__})")

    def _fold(self, operation: Callable[[Any, Any], Any], args: Any) -> Any:
        out = self.visit(args[0])
        for arg in args[1:]:
            out = operation(out, self.visit(arg))
        return out

    def _relation(self, expr: Any) -> Any:
        a = self.a
        difference = sympy.expand(expr.lhs - expr.rhs)
        if isinstance(expr, sympy.Eq):
            return a.eq_zero(self.visit(difference))
        if isinstance(expr, sympy.Ne):
            return a.negate(a.eq_zero(self.visit(difference)))
        if isinstance(expr, sympy.Ge | sympy.Gt):
            difference = sympy.expand(-difference)
        if isinstance(expr, sympy.Lt | sympy.Gt):
            difference = difference + 1
        return a.le_zero(self.visit(difference))
