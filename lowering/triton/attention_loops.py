"""What the text of an attention kernel says of its mask: a tile's formula, and which tiles a loop visits.

    q_at [OUTER,1], k_at [1,INNER]   the indices of a tile (or the other way round, where keys are outside)
    keep = k_at <= q_at              `render` in an algebra whose values are lines of Triton

A conjunction of linear inequalities bounds the loop: from `low` to `high` where a tile can hold a pair, and
from `full_low` to `full_high` within it where it holds nothing else, so that no mask is computed there. Every
other mask comes as lists of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy

from kp_compiler.lowering import mask_render

SIZES = {"q": "S", "k": "T"}


@dataclass(frozen=True)
class Value:
    """An expression of the kernel's text, and which indices it varies with."""

    text: str
    on: frozenset[str] = frozenset()
    number: int | None = None  # where it is a constant
    line: tuple[int, Value] | None = None  # a factor of the loop's index, and what is added and does not vary


@dataclass
class Formula:
    """The algebra of a kernel's text. Lines that vary with the index of the loop go `inside` it, the rest
    before it. `booleans` says which look-ups read booleans, `whole` which sizes are multiples of the tile's:
    look-ups along others are masked."""

    loop: str
    booleans: tuple[bool, ...] = ()
    whole: frozenset[str] = frozenset()
    outside: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    def integer(self, value: int) -> Value:
        return Value(f"({value})" if abs(value) < 2**30 else f"tl.cast({value}, tl.int64)", number=value)

    def truth(self, value: bool) -> Value:
        return Value(f"({int(value)} != 0)")

    def symbol(self, name: str) -> Value:
        if name in SIZES:
            line = (1, self.integer(0)) if name == self.loop else None
            return Value(f"{name}_at", frozenset({name}), line=line)
        return Value({"b": "batch", "h": "head"}.get(name) or f"tl.cast({name}, tl.int64)")

    def lookup(self, index: int, args: list[Value]) -> Value:
        on = frozenset[str]().union(*(arg.on for arg in args))
        places = "".join(f" + tl.cast({arg.text}, tl.int64) * t{index}_{dim}" for dim, arg in enumerate(args))
        load = f"tl.load(t{index}{places}{inside(on - self.whole)})"
        return self._line(load + (".to(tl.int32)" if self.booleans[index] else ""), on)

    def add(self, a: Value, b: Value) -> Value:
        if a.number is not None and b.number is not None:
            return self.integer(a.number + b.number)
        if 0 in (a.number, b.number):
            return b if a.number == 0 else a
        (slope, rest), (other_slope, other_rest) = self._line_of(a), self._line_of(b)
        if rest is None or other_rest is None or not slope + other_slope:
            return self._pair("{} + {}", a, b)
        line = (slope + other_slope, self.add(rest, other_rest))
        return Value(f"({a.text} + {b.text})", a.on | b.on, line=line)

    def mul(self, a: Value, b: Value) -> Value:
        if a.number is not None and b.number is not None:
            return self.integer(a.number * b.number)
        slope, rest = self._line_of(b)
        if a.number is None or rest is None or not slope * a.number:
            return self._pair("{} * {}", a, b)
        line = (slope * a.number, self.mul(a, rest))
        return Value(f"({a.text} * {b.text})", b.on, line=line)

    def _line_of(self, a: Value) -> tuple[int, Value | None]:
        return a.line or (0, None if self.loop in a.on else a)

    def floor_div(self, a: Value, divisor: int) -> Value:
        """Triton's division of integers goes towards zero."""
        down = f"({a.text} - ({divisor - 1}) * ({a.text} < 0)) // {divisor}"
        return self._line(down, a.on)

    def mod(self, a: Value, divisor: int) -> Value:
        rest = self._line(f"{a.text} % {divisor}", a.on)
        return self._line(f"{rest.text} + {divisor} * ({rest.text} < 0)", a.on)

    def minimum(self, a: Value, b: Value) -> Value:
        return self._pair("tl.minimum({}, {})", a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        return self._pair("tl.maximum({}, {})", a, b)

    def le_zero(self, a: Value) -> Value:
        """One comparison with a limit that the loop does not move, where that can be."""
        if a.line is None or abs(a.line[0]) != 1:
            return self._line(f"{a.text} <= 0", a.on)
        slope, rest = a.line
        limit = self.mul(self.integer(-slope), rest)
        if limit.number is None or abs(limit.number) >= 2**30:
            near = f"tl.minimum(tl.maximum({limit.text}, -1), {SIZES[self.loop]})"
            limit = self._line(f"tl.cast({near}, tl.int32)", limit.on)
        sign = "<=" if slope == 1 else ">="
        return self._line(f"{self.loop}_at {sign} {limit.text}", a.on)

    def eq_zero(self, a: Value) -> Value:
        return self._line(f"{a.text} == 0", a.on)

    def both(self, a: Value, b: Value) -> Value:
        return self._pair("{} & {}", a, b)

    def either(self, a: Value, b: Value) -> Value:
        return self._pair("{} | {}", a, b)

    def negate(self, a: Value) -> Value:
        return self._line(f"({a.text}) == 0", a.on)

    def _pair(self, form: str, a: Value, b: Value) -> Value:
        return self._line(form.format(a.text, b.text), a.on | b.on)

    def _line(self, text: str, on: frozenset[str]) -> Value:
        name = f"f{len(self.outside) + len(self.inside)}"
        (self.inside if self.loop in on else self.outside).append(f"{name} = {text}")
        return Value(name, on)


def inside(names: frozenset[str]) -> str:
    """The mask of a load that varies with these indices, as its last arguments."""
    return f", mask={within(names)}, other=0" if names else ""


def within(names: frozenset[str]) -> str:
    return " & ".join(f"({name}_at < {SIZES[name]})" for name in sorted(names))


# ---------------------------------------------------------------------------------------------------- bounds


def sides(forms: tuple[Any, ...], loop: str) -> tuple[bool, bool]:
    """Whether tiles at the low and at the high end of the loop can be partly kept. One that the outer index
    alone decides on makes all of them so: they are taken to be at the high end."""
    slopes = {form.coeff(mask_render.symbol(loop)) for form in forms}
    return -1 in slopes, bool(slopes & {0, 1})


def bounds(forms: tuple[Any, ...], loop: str) -> list[str]:
    """Lines that set low, full_low, full_high and high, in tiles of INNER, for the fixed indices from `first`
    to `last`. In 64 bits, as scalars may be large."""
    outer = "k" if loop == "q" else "q"
    inner_symbol, outer_symbol = mask_render.symbol(loop), mask_render.symbol(outer)
    least, surely_least = ["0"], ["0"]
    most, surely_most = [f"{SIZES[loop]} - 1"], [f"{SIZES[loop]} - 1"]
    sure = []
    free = set().union(*(form.free_symbols for form in forms))
    scalars = sorted(free - {inner_symbol, outer_symbol}, key=str)
    for form in forms:
        slope = form.coeff(inner_symbol)
        rest = form - slope * inner_symbol
        limit = -rest if slope == 1 else rest
        limit = limit.subs({n: sympy.Symbol(f"{n}_") for n in scalars})
        ends = [str(limit.subs(outer_symbol, sympy.Symbol(name))) for name in ("first_", "last_")]
        smaller, larger = (f"tl.{name}({', '.join(ends)})" for name in ("minimum", "maximum"))
        if not form.has(outer_symbol):
            smaller = larger = f"tl.cast({ends[0]}, tl.int64)"
        if slope == 1:
            most.append(larger)
            surely_most.append(smaller)
        elif slope == -1:
            least.append(smaller)
            surely_least.append(larger)
        else:
            sure.append(f"({larger} <= 0)")
    lines = [
        *(f"{name}_ = tl.cast({name}, tl.int64)" for name in ("first", "last", *map(str, scalars))),
        f"low = {_extreme('maximum', least)} // INNER",
        f"high = tl.maximum({_extreme('minimum', most)} + INNER, 0) // INNER",
        f"full_low = ({_extreme('maximum', surely_least)} + INNER - 1) // INNER",
        f"full_high = tl.maximum({_extreme('minimum', surely_most)} + 1, 0) // INNER",
        "high = tl.maximum(high, low)",
        "full_low = tl.minimum(tl.maximum(full_low, low), high)",
        "full_high = tl.minimum(tl.maximum(full_high, full_low), high)",
    ]
    if sure:
        lines.append(f"full_high = tl.where({' & '.join(sure)}, full_high, full_low)")
    names = ("low", "high", "full_low", "full_high")
    # a count of tiles has 32 bits; one below zero or above them all is not a count of any
    return [*lines, *(f"{n} = tl.cast(tl.minimum({n}, {SIZES[loop]}), tl.int32)" for n in names)]


def _extreme(name: str, parts: list[str]) -> str:
    out = parts[0]
    for part in parts[1:]:
        out = f"tl.{name}({out}, {part})"
    return out
