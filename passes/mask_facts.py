"""From a mask's formula to facts about it: conjuncts in normal form, the segment lemma, a name, dead rows.

A proved mask keeps its formula. The name only says which kernels have the formula built in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from kp_compiler.passes.mask_eval import B, H, K, Leaf, MaskEvaluator, Q
from kp_compiler.passes.mask_values import Unprovable, compare
from kp_compiler.specs import MaskKind

_NAMES = {sympy.Le: "le", sympy.Lt: "lt", sympy.Ge: "ge", sympy.Gt: "gt"}


@dataclass(frozen=True)
class MaskFacts:
    """A proved mask: `expr` over b, h, q, k, look-ups t_…(…) and size symbols."""

    expr: Boolean
    kind: MaskKind
    parts: tuple[str, ...]
    window: int | None
    no_dead_row: bool


def establish(condition: Boolean, ev: MaskEvaluator) -> MaskFacts:
    """Simplify a keep-condition and name it. Raises Unprovable for look-ups of size queries × keys."""
    conjuncts = list(_conjuncts(_normal(condition, ev)))
    conjuncts = _apply_segments(conjuncts, ev)
    conjuncts = list(_conjuncts(_normal(sympy.And(*conjuncts), ev)))
    conjuncts = _tightest(conjuncts)
    expr = sympy.And(*conjuncts)
    for call in expr.atoms(sympy.Function):
        if call.func.__name__ in ev.leaves and {Q, K} <= call.free_symbols:
            raise Unprovable(
                f"{ev.leaves[call.func.__name__].node.name} holds one value for every query and key"
            )
    parts = [_part(c, ev) for c in conjuncts]
    names = tuple(dict.fromkeys(name for name, _ in parts))
    window = next((size for name, size in parts if name == "window"), None)
    return MaskFacts(expr, _kind(names), names, window, _no_dead_row(expr, ev))


def _conjuncts(condition: Boolean) -> tuple[Boolean, ...]:
    if isinstance(condition, sympy.And):
        return tuple(sorted(condition.args, key=sympy.default_sort_key))
    return () if condition == sympy.true else (condition,)


def _normal(condition: Boolean, ev: MaskEvaluator) -> Boolean:
    """Relations as `expr <= 0` (`expr = 0`, `expr ≠ 0`), decided where the index ranges decide them."""
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not | sympy.Xor):
        return condition.func(*(_normal(arg, ev) for arg in condition.args))
    if not isinstance(condition, Relational) or condition.lhs.is_infinite or condition.rhs.is_infinite:
        return condition
    for cls, name in _NAMES.items():
        if isinstance(condition, cls):
            return _decide(compare(name, condition.lhs, condition.rhs), ev)
    return condition


def _decide(condition: Boolean, ev: MaskEvaluator) -> Boolean:
    if not isinstance(condition, sympy.Le):
        return condition
    found = ev.bounds(condition.lhs - condition.rhs)
    if found is None:
        return condition
    if found[1].is_nonpositive is True:
        return sympy.true
    return sympy.false if found[0].is_positive is True else condition


def _apply_segments(conjuncts: list[Boolean], ev: MaskEvaluator) -> list[Boolean]:
    """Inside one segment of consecutive positions, `pos[q] - pos[k]` is `q - k`.

    If seg = cumsum(diff(pos) != 1) and seg[q] == seg[k], every step between q and k is 1. So in a conjunction
    with that equality the difference of positions may be replaced by the difference of indices.
    """
    for equality in conjuncts:
        pair = _segment_pair(equality, ev)
        if pair is None:
            continue
        leaf, at_q, at_k = pair
        assert leaf.segments is not None
        pos_q, pos_k = leaf.segments.position(at_q.args, Q), leaf.segments.position(at_k.args, K)
        if not (isinstance(pos_q, sympy.Function) and isinstance(pos_k, sympy.Function)):
            continue
        conjuncts = [c if c is equality else _substitute(c, pos_q, pos_k) for c in conjuncts]
    return conjuncts


def _segment_pair(condition: Boolean, ev: MaskEvaluator) -> tuple[Leaf, Any, Any] | None:
    """`t(…, q) - t(…, k) = 0` with a look-up that numbers segments."""
    if not isinstance(condition, sympy.Eq):
        return None
    calls = list((condition.lhs - condition.rhs).atoms(sympy.Function))
    if len(calls) != 2 or calls[0].func != calls[1].func or calls[0].func.__name__ not in ev.leaves:
        return None
    leaf = ev.leaves[calls[0].func.__name__]
    by_index = {call.args[-1]: call for call in calls}
    if leaf.segments is None or set(by_index) != {Q, K} or calls[0].args[:-1] != calls[1].args[:-1]:
        return None
    if sympy.expand(condition.lhs - condition.rhs) not in (calls[0] - calls[1], calls[1] - calls[0]):
        return None
    return leaf, by_index[Q], by_index[K]


def _substitute(condition: Boolean, pos_q: Any, pos_k: Any) -> Boolean:
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not | sympy.Xor):
        return condition.func(*(_substitute(arg, pos_q, pos_k) for arg in condition.args))
    if not isinstance(condition, sympy.Le | sympy.Eq | sympy.Ne):
        return condition
    expr = sympy.expand(condition.lhs - condition.rhs)
    coeff = expr.coeff(pos_q)
    if coeff == 0 or expr.coeff(pos_k) != -coeff or not coeff.is_number:
        return condition
    return condition.func(sympy.expand(expr - coeff * (pos_q - pos_k) + coeff * (Q - K)), 0)


def _tightest(conjuncts: list[Boolean]) -> list[Boolean]:
    """Of several bounds on the same expression keep the tightest."""
    best: dict[Any, Any] = {}
    rest = []
    for condition in conjuncts:
        if isinstance(condition, sympy.Le):
            constant, variable = sympy.expand(condition.lhs - condition.rhs).as_coeff_Add()
            best[variable] = max(best.get(variable, constant), constant)
        else:
            rest.append(condition)
    return [sympy.Le(variable + constant, 0) for variable, constant in best.items()] + rest


# -----------------------------------------------------------------------------------------------------------
# naming


def _part(condition: Boolean, ev: MaskEvaluator) -> tuple[str, int | None]:
    """The name of one conjunct, and a window's size."""
    symbols = condition.free_symbols & {B, H, Q, K}
    calls = [c for c in condition.atoms(sympy.Function) if c.func.__name__ in ev.leaves]
    if isinstance(condition, sympy.Or):
        return ("prefix" if any(_is_causal(arg) for arg in condition.args) else "pointwise"), None
    if isinstance(condition, sympy.Le):
        expr = sympy.expand(condition.lhs - condition.rhs)
        coeffs = (expr.coeff(Q), expr.coeff(K))
        constant = sympy.expand(expr - coeffs[0] * Q - coeffs[1] * K)
        one_query = ev.ranges[Q] == 1 and not constant.has(Q, K, H)
        if (coeffs == (-1, 1) and not constant.has(Q, K, H)) or (one_query and coeffs == (0, 1)):
            return "causal", None
        if one_query and coeffs == (0, -1):
            return "window", None
        if coeffs == (1, -1) and constant.is_Integer:
            return "window", int(1 - constant)
        return "pointwise", None
    if isinstance(condition, sympy.Eq) and len(calls) == 2 and {Q, K} <= symbols:
        return "document", None
    if isinstance(condition, sympy.Eq) and {Q, K} <= symbols and condition.atoms(sympy.floor):
        return "chunked", None
    if calls and K in symbols and Q not in symbols:
        return "padding", None
    return "pointwise", None


def _is_causal(condition: Boolean) -> bool:
    if not isinstance(condition, sympy.Le):
        return False
    expr = sympy.expand(condition.lhs - condition.rhs)
    return expr.coeff(Q) == -1 and expr.coeff(K) == 1


def _kind(names: tuple[str, ...]) -> MaskKind:
    """The most special conjunct names the mask; `parts` has them all."""
    if not names:
        return "full"
    order: tuple[MaskKind, ...] = (
        "pointwise",
        "prefix",
        "document",
        "chunked",
        "padding",
        "window",
        "causal",
    )
    return next((kind for kind in order if kind in names), "pointwise")


def _no_dead_row(expr: Boolean, ev: MaskEvaluator) -> bool:
    """Every query keeps at least one key: its own index, or the first key."""
    if expr == sympy.true:
        return True
    queries, keys = ev.ranges[Q], ev.ranges[K]
    tries = [sympy.Integer(0)]
    if (keys - queries).is_nonnegative is True:
        tries.append(Q)
    return any(_normal(expr.subs(K, key), ev) == sympy.true for key in tries)


def operands_of(expr: Boolean, ev: MaskEvaluator) -> list[tuple[str, Node, bool]]:
    """The look-ups an expression makes: (name, node, never decreasing)."""
    names = sorted({c.func.__name__ for c in expr.atoms(sympy.Function)} & set(ev.leaves))
    return [(name, ev.leaves[name].node, ev.leaves[name].monotone) for name in names]
