"""What a mask over a whole sequence is between a part of its queries and a part of its keys.

    relation(lines, …)   nothing kept, all kept, or some: from the mask's inequalities alone
    local(mask)          the mask in indices of the two parts, which begin at two more of its scalars;
                         per-token vectors come as slices
    placed(mask, …)      the mask of tokens in any order, whose places in the sequence are one more vector

A mask `k <= q` of the sequence is `k + n1 <= q + n0` of a pair of parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import sympy
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.selection.site import Lines
from kp_compiler.specs import MaskSpec

Relation = Literal["none", "some", "all"]
Along = Literal["q", "k"]
_BOTH: tuple[Along, ...] = ("q", "k")


@dataclass(frozen=True)
class Local:
    """A mask of a pair of parts. Its tensor m is a slice of the sequence's tensor `slices[m][0]`, along
    queries or along keys; of `local`, the last two scalars are where queries and keys begin."""

    mask: MaskSpec
    slices: tuple[tuple[int, Along], ...]

    def operands(
        self, whole: list[Tensor], q_start: int, queries: int, k_start: int, keys: int
    ) -> list[Tensor]:
        spans = {"q": (q_start, queries), "k": (k_start, keys)}
        return [whole[index].narrow(-1, *spans[along]) for index, along in self.slices]


@lru_cache(maxsize=1024)
def local(mask: MaskSpec) -> Local | None:
    """None where the mask reads a tensor at anything but a pair's own query or key."""
    slices = _slices(mask)
    if slices is None:
        return None
    if mask.expr == _WHOLE:
        return Local(mask, ())
    begin = (sympy.Symbol(f"n{mask.scalars + i}", integer=True) for i in range(2))
    moved = {name: mask_render.symbol(name) + n for name, n in zip(_BOTH, begin, strict=True)}
    return _moved(mask, slices, moved, scalars=mask.scalars + 2)


@lru_cache(maxsize=1024)
def placed(mask: MaskSpec, along: tuple[Along, ...] = _BOTH) -> Local:
    """Queries, or queries and keys, as they lie somewhere; what is not `along` lies in the order of the
    sequence. Their places are a slice of one more tensor, 0, 1, … of the sequence. `mask` is one that `local`
    can do."""
    slices, free = dict(_slices(mask) or {}), mask_render.parse(mask.expr)
    free = free.xreplace({call: sympy.Dummy() for call in slices}).free_symbols
    moved: dict[Along, Any] = {}
    for name in along:
        if mask_render.symbol(name) in free:
            moved[name] = sympy.Function("place", integer=True)(mask_render.symbol(name))
            slices[moved[name]] = (len(mask.tensors), name)
    return _moved(mask, slices, moved, scalars=mask.scalars)


_Slices = dict[Any, tuple[int, Along]]  # by what a mask reads: the tensor, and along what
_WHOLE = MaskSpec().expr


def _slices(mask: MaskSpec) -> _Slices | None:
    if mask.kind == "tensor":
        return None
    found: _Slices = {}
    expr = mask_render.parse(mask.expr)
    for call in sorted(expr.atoms(sympy.core.function.AppliedUndef), key=str):
        *batch, index = call.args
        name: Along | None = next((n for n in ("q", "k") if index == mask_render.symbol(n)), None)  # type: ignore[misc]
        if name is None or any(arg != mask_render.symbol("b") and not arg.is_Integer for arg in batch):
            return None
        found[call] = (int(call.func.__name__[1:]), name)
    return found


def _moved(mask: MaskSpec, slices: _Slices, moved: dict[Along, Any], scalars: int) -> Local:
    """With its tensors numbered as `slices`, and other indices where they are read by themselves."""
    calls = {call: sympy.Dummy(integer=True) for call in slices}
    back = {calls[call]: sympy.Function(f"t{i}", integer=True)(*call.args) for i, call in enumerate(slices)}
    expr = mask_render.parse(mask.expr).xreplace(calls)
    others = {mask_render.symbol(name): value.xreplace(calls) for name, value in moved.items()}
    expr = expr.xreplace(others).xreplace(back)
    found = replace(
        mask, kind="pointwise", expr=str(expr), tensors=tuple(range(len(slices))), scalars=scalars,
        monotone=(), window=None,
    )  # fmt: skip
    return Local(found, tuple(slices.values()))


@lru_cache(maxsize=1024)
def by_order(mask: MaskSpec) -> bool:
    """Whether of two tokens the mask asks for nothing but which comes first, and for vectors: then it is the
    same among any tokens that lie in order."""
    if mask.scalars or local(mask) is None:
        return False
    expr = mask_render.parse(mask.expr)
    expr = expr.xreplace({call: sympy.Dummy() for call in expr.atoms(sympy.core.function.AppliedUndef)})
    q, k = (mask_render.symbol(name) for name in "qk")
    parts = expr.args if isinstance(expr, sympy.And) else (expr,)
    return all(not part.free_symbols & {q, k} or _is_causal(part, k - q) for part in parts)


def _is_causal(part: Any, ahead: Any) -> bool:
    return isinstance(part, sympy.Le | sympy.Ge) and sympy.expand(part.lts - part.gts - ahead) == 0


@lru_cache(maxsize=1024)
def numbered(mask: MaskSpec) -> MaskSpec:
    """The same mask, whose tensors are numbered from 0 on: those it reads, and no others."""
    return replace(mask, tensors=tuple(range(len(mask.tensors))))


@lru_cache(maxsize=1024)
def bounds(mask: MaskSpec) -> tuple[Any, ...]:
    """The inequalities among what a mask demands, as `mask_render.inequalities` has them."""
    expr = mask_render.parse(mask.expr)
    parts = expr.args if isinstance(expr, sympy.And) else (expr,)
    found = (mask_render.inequalities(replace(mask, expr=str(part), kind="pointwise")) for part in parts)
    return tuple(form for forms in found if forms for form in forms)


def relation(lines: Lines, whole: bool, q_start: int, queries: int, k_start: int, keys: int) -> Relation:
    """`lines` of the sequence's inequalities; `whole`: they are all that the mask demands."""
    answer: Relation = "all" if whole else "some"
    for (q_slope, k_slope), rest in lines:
        ends = [q_slope * q + k_slope * k + rest
                for q in (q_start, q_start + queries - 1) for k in (k_start, k_start + keys - 1)]  # fmt: skip
        if min(ends) > 0:
            return "none"
        if max(ends) > 0:
            answer = "some"
    return answer
