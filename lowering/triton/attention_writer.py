"""What the texts of all attention kernels have in common: places of tiles, loops over them, scores and their
gradients, softmax.

    Writer(kernel, spec, layout)    its methods give lines; names in them are those of `attention_source`
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import sympy

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.block_lists import WHOLE
from kp_compiler.lowering.into import ROUND, padded
from kp_compiler.lowering.triton.attention_loops import (
    SIZES,
    Formula,
    bounds,
    inside,
    sides,
    within,
)
from kp_compiler.specs import AttentionSpec

LOG2E = math.log2(math.e)
MANY = 2.0**12  # keys
LN2 = math.log(2.0)
INFINITY = "float('inf')"
LOWEST = -(2.0**127)
TANH = "1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))"  # over x
ROUNDS = 7  # of Philox, as cuRAND's default has ten: seven pass every test of Salmon et al. 2011
PRECISE = ', input_precision="ieee"'  # of float32; half precision is exact in products anyway
LISTS = ["edge_count", "block_count", "list_at", "blocks", "list_b", "list_h"]  # `block_lists.Lists`


Masked = Literal["", "ends", "pairs"]  # what a tile may leave out: nothing, what is past the end, any pair


class _Body(Protocol):
    """Lines of a loop's body for tiles of one kind."""

    def __call__(self, *, masked: Masked) -> list[str]: ...


@dataclass(frozen=True)
class Layout:
    """What a kernel's text depends on besides the spec. Tensors of the mask come first in `booleans`."""

    head_dim: int
    value_dim: int
    tile: tuple[int, int]  # OUTER, INNER
    stages: int
    booleans: tuple[bool, ...]  # of each look-up or tensor of the mask
    lookups: tuple[int, ...]  # dimensions of each
    whole: frozenset[str]  # of "q" and "k", those whose size is a multiple of the tile's
    block: tuple[int, int] | None  # sizes of the blocks of lists, where there are lists
    described: frozenset[str] = frozenset()  # tensors that come as descriptors of the loop's tiles
    start: bool = False  # the forward pass goes on from an earlier (out, lse)
    exact: bool = False  # float32 all the way
    continues: bool = False  # what it goes on from has a tail (`into.Into`)
    unfinished: bool = False  # its results get one
    adds: bool = False  # gradients of q, k and v, in float32, are added to what is there; dq has no scale
    apart: bool = False  # dk and dv of each head, before they are added up over those that share keys
    bias: int = 0  # which bias dbias is the gradient of
    summed: frozenset[str] = frozenset()  # of "q" and "k", those that this bias does not vary with

    @property
    def tail(self) -> bool:
        """Whether the kernel reads or writes one."""
        return self.continues or self.unfinished


def pieces(size: int) -> list[tuple[int, int]]:
    """First column and width of the parts of a head, powers of two from 16 up; the last may be too wide."""
    found, first = [], 0
    rest = -(-size // 16) * 16
    while rest:
        width = 1 << (rest.bit_length() - 1)
        found.append((first, width))
        first, rest = first + width, rest - width
    return found


class Writer:
    """Pieces of text that several kernels have in common."""

    def __init__(self, kernel: str, spec: AttentionSpec, layout: Layout) -> None:
        self.kernel, self.spec, self.layout = kernel, spec, layout
        self.loop = "q" if kernel == "dkdv" else "k"
        self.outer = "k" if kernel == "dkdv" else "q"
        self.forms = mask_render.inequalities(spec.mask)
        self.formula = Formula(self.loop, layout.booleans, layout.whole)
        self.keep = self._mask()
        self.head, self.value = pieces(layout.head_dim), pieces(layout.value_dim)
        plain = spec.softcap is None and not spec.biases and spec.scale > 0
        # what scores are multiplied by to be exponents of two, and whether before the maximum is taken
        self.exponent = spec.scale * LOG2E if plain else LOG2E
        self.plain = plain
        self.drops = 0.0 < spec.dropout_p < 1.0  # some pairs: all are no sum

    def _mask(self) -> str | None:
        """The name of what tells pairs that take part, its lines in the formula."""
        mask = self.spec.mask
        if mask.kind == "tensor":
            places = [self.formula.symbol(name) for name in mask_render.INDEX_NAMES]
            value = self.formula.lookup(0, places)
            for index in range(1, len(mask.tensors)):
                value = self.formula.both(value, self.formula.lookup(index, places))
            return f"({value.text} != 0)"
        expr = mask_render.parse(mask.expr)
        return None if expr == sympy.true else mask_render.render(expr, self.formula).text

    # -------------------------------------------------------------------------------------------- tensors

    def rows(self, name: str, index: str, parts: list[tuple[int, int]], size: int, start: str, count: str,
             *, to: str | None = None) -> list[str]:  # fmt: skip
        """Load rows [count, piece] of a matrix, from row `start` on, as NAME0, NAME1, …"""
        if name in self.layout.described:
            head = "kv_head" if name in ("k", "v") else "head"
            tile = f"{name}.load([batch, {head}, {start}, 0])"
            return [f"{to or name}0 = tl.reshape({tile}, [{count}, {parts[0][1]}])"]
        return [
            f"{to or name}{i} = "
            f"tl.load({self.place(name, part, start, count)}{self.masked(index, part, size)})"
            for i, part in enumerate(parts)
        ]

    def place(self, name: str, part: tuple[int, int], start: str, count: str) -> str:
        near, at = f"tl.arange(0, {count})[:, None] * {name}_s", column(part)
        if name == "tail":
            at = f"({at} % 8 // 2 * {padded(self.layout.value_dim) // 4} + {at} // 8 * 2 + {at} % 2)"
        return f"{name} + ({start}).to(tl.int64) * {name}_s + {near} + {at}"

    def masked(self, index: str, part: tuple[int, int], size: int, *, load: bool = True) -> str:
        """Which elements of a tile of rows there are."""
        masks = [] if index in self.layout.whole else [f"({index}_row < {SIZES[index]})"]
        masks += [f"({column(part)} < {size})"] if sum(part) > size else []
        if not masks:
            return ""
        return f", mask={' & '.join(masks)}" + (", other=0.0" if load else "")

    def store(self, name: str, values: str, index: str, parts: list[tuple[int, int]], size: int) -> list[str]:
        lines = []
        for i, part in enumerate(parts):
            value = f"({values.format(i)}).to({name}.dtype.element_ty)"
            masked = self.masked(index, part, size, load=False)
            lines.append(f"place = {self.place(name, part, 'first', 'OUTER')}")
            if self.layout.adds:
                value += f" + tl.load(place{masked})"
            lines.append(f"tl.store(place, {value}{masked})")
        return lines

    def vector(self, name: str, index: str, start: str, count: str, other: str) -> str:
        """Load [count] numbers of a row of [B,H,S]."""
        at = f"{start} + tl.arange(0, {count})"
        masked = "" if index in self.layout.whole else f", mask={at} < {SIZES[index]}, other={other}"
        return f"tl.load({name} + (batch * H + head).to(tl.int64) * S + {at}{masked})"

    def before(self, upper: str, tail: str) -> str:
        """What the pass started from, as a sum of values that is still to be `scaled`; `many` is the `total`
        of `started`, for all columns."""
        value = f"{upper}.to(tl.float32)"
        if self.layout.continues:
            bits = f"({upper}.to(tl.int16, bitcast=True).to(tl.int32) << 16) | ({tail}.to(tl.int32) << 8)"
            value = f"({bits}).to(tl.float32, bitcast=True)"
        value += f" * {1 - self.spec.dropout_p!r}" if self.drops else ""
        return f"tl.where(many > 0.0, {value} * many, 0.0)"

    # -------------------------------------------------------------------------------------------- beginnings

    def position(self, *, reverse: bool) -> list[str]:
        """Which tile, batch and head a program has; the last tiles first, where causal masks leave most to
        do."""
        size, keys = SIZES[self.outer], self.kernel == "dkdv"
        heads, head = ("(H // GROUP)", "kv_head") if keys else ("H", "head")
        return [
            f"tiles = ({size} + OUTER - 1) // OUTER",
            "tile = tl.program_id(0) % tiles",
            f"batch = tl.program_id(0) // tiles // {heads}",
            f"{head} = tl.program_id(0) // tiles % {heads}",
            *(["tile = tiles - 1 - tile"] if reverse else []),
            *self.span(),
            *([] if keys else ["kv_head = head // GROUP"]),
        ]

    def span(self) -> list[str]:
        """The first and the last index of a tile."""
        return ["first = tile * OUTER", f"last = tl.minimum(first + OUTER, {SIZES[self.outer]}) - 1"]

    def begin(self, *, reverse: bool) -> list[str]:
        """A program's place and the indices that it owns."""
        index = self.outer
        rows = [f"{index}_row = (first + tl.arange(0, OUTER))[:, None]", f"{index}_at = {index}_row"]
        return self.position(reverse=reverse) + rows

    def advance(self, names: Iterable[str], head: str) -> list[str]:
        return [
            f"{n} += batch.to(tl.int64) * {n}_b + ({head}).to(tl.int64) * {n}_h"
            for n in names
            if n not in self.layout.described
        ]

    # -------------------------------------------------------------------------------------------- loops

    def loops(self, body: _Body) -> list[str]:
        """The tiles of the inner index, by bounds or by lists."""
        lines = list(self.formula.outside)
        if self.layout.block is not None:
            return lines + self._listed(body)
        assert self.forms is not None
        lines += bounds(self.forms, self.loop)
        below, above = sides(self.forms, self.loop)
        spans: list[tuple[str, str, Masked]] = [("full_low", "full_high", "")]
        if below:
            spans.insert(0, ("low", "full_low", "pairs"))
        if above or self.loop not in self.layout.whole:
            spans.append(("full_high", "high", "pairs"))
        for start, end, masked in spans:
            lines.append(f"for step in tl.range({start}, {end}, num_stages={self.layout.stages}):")
            lines += indented(["start = step * INNER", *body(masked=masked)])
        return lines

    def _listed(self, body: _Body) -> list[str]:
        lines = self.listed()
        spans: list[tuple[str, str, Masked]] = [("0", "edges", "pairs"), ("edges", "listed", "ends")]
        for start, end, masked in spans:
            lines.append(f"for step in tl.range({start}, {end}, num_stages={self.layout.stages}):")
            lines += indented([f"start = {self.listed_start('step')}", *body(masked=masked)])
        return lines

    def listed(self) -> list[str]:
        """How many tiles a line of lists has, `listed`, the first `edges` of them partly kept."""
        _, per = self.block()
        return [
            f"line = {self.line()}",
            f"edges = tl.load(edge_count + line) * {per}",
            f"listed = tl.load(block_count + line) * {per}",
            "line_blocks = blocks + tl.load(list_at + line)",
        ]

    def listed_start(self, step: str) -> str:
        """The first index of a line's tile. Blocks of a list are as large as tiles, or a multiple."""
        inner, per = self.block()
        return f"tl.load(line_blocks + {step} // {per}) * {inner} + {step} % {per} * INNER"

    def block(self) -> tuple[int, int]:
        """Indices of a block of lists along the loop, and tiles."""
        assert self.layout.block is not None
        inner = self.layout.block["qk".index(self.loop)]
        return inner, inner // self.layout.tile[1]

    def line(self) -> str:
        """Which line of the lists a program's tile is on."""
        assert self.layout.block is not None
        return f"batch * list_b + head * list_h + first // {self.layout.block['qk'.index(self.outer)]}"

    def indices(self) -> list[str]:
        """In a loop: a tile's indices along its second dimension and, for rows of matrices, its first."""
        return [
            f"{self.loop}_row = (start + tl.arange(0, INNER))[:, None]",
            f"{self.loop}_at = (start + tl.arange(0, INNER))[None, :]",
        ]

    # -------------------------------------------------------------------------------------------- scores

    def scores(self, left: str, right: str, *, masked: Masked) -> list[str]:
        """s [OUTER,INNER] from the pieces of both matrices, the inner one's transposed, −∞ for pairs that are
        left out."""
        return product("s", left, right, self.head) + self.changes(masked=masked)

    def changes(self, *, masked: Masked) -> list[str]:
        """From products of q and k to scores that `exponent` makes exponents of two."""
        spec = self.spec
        lines = []
        if not self.plain:
            lines.append(f"s *= {spec.scale!r}")
        if spec.softcap is not None:
            lines.append(f"bent = 1.0 - 2.0 / (tl.exp2(s * {2 * LOG2E / spec.softcap!r}) + 1.0)")
            if self.layout.exact:  # the difference loses the digits of small ones
                lines += [f"small = s * {1 / spec.softcap!r}", "square = small * small", f"series = {TANH}"]
                lines.append("bent = tl.where(tl.abs(small) < 0.25, small * series, bent)")
            lines.append(f"s = bent * {spec.softcap!r}")
        for index, bias in enumerate(spec.biases):
            term = f"{self.tile(f'bias{index}')}.to(tl.float32)"
            lines.append(f"term = {term}" + ("" if bias.coeff == 1.0 else f" * {bias.coeff!r}"))
            # finite fills stay finite as exponents of two: a row of them is the average of all values
            lines.append(f"s += tl.where((term < {LOWEST}) & (term != float('-inf')), {LOWEST}, term)")
        return lines + self.masks(masked)

    def masks(self, masked: Masked) -> list[str]:
        """Scores of pairs that are left out become −∞; no lines if the tile has none."""
        conditions = []
        if masked == "pairs" and self.keep is not None:
            whole = self.kernel == "dbias" and self.layout.block is not None
            conditions.append(f"({self.keep}{f' | (kind == {WHOLE})' if whole else ''})")
        if masked and self.loop == "k" and "k" not in self.layout.whole:
            conditions.append(f"({within(frozenset('k'))})")
        if not conditions:
            return []
        return [*self.formula.inside, f"s = tl.where({' & '.join(conditions)}, s, float('-inf'))"]

    def tile(self, name: str) -> str:
        """A tile of a tensor that broadcasts to [B,H,S,T]."""
        places = f"{name} + batch.to(tl.int64) * {name}_0 + head.to(tl.int64) * {name}_1"
        places += f" + q_at.to(tl.int64) * {name}_2 + k_at.to(tl.int64) * {name}_3"
        return f"tl.load({places}{inside(frozenset('qk') - self.layout.whole)})"

    def kept(self) -> list[str]:
        """Which probabilities dropout keeps: a random number for every pair, the same in all kernels."""
        if not self.drops:
            return []
        return [
            "zero = tl.zeros([OUTER, INNER], tl.uint32)",
            "sequence = (batch * H + head).to(tl.uint32)",
            "number, _, _, _ = tl.philox("
            "tl.load(seed), zero + q_at.to(tl.uint32), zero + k_at.to(tl.uint32), "
            "zero + sequence, zero, "
            f"{ROUNDS})",
            f"stays = number >= {int(self.spec.dropout_p * 2**32)}",
        ]

    def dropped(self, name: str) -> str:
        """Probabilities or their gradients after dropout."""
        if self.drops:
            return f"tl.where(stays, {name}, 0.0)"
        return f"tl.zeros_like({name})" if self.spec.dropout_p else name

    def scaled(self, name: str) -> str:
        """A sum over what dropout kept, made as large as the sum over all."""
        return f"{name} * {1 / (1 - self.spec.dropout_p)!r}" if self.drops else name

    def recomputed(self, left: str, right: str, *, masked: Masked) -> list[str]:
        """p from both matrices and the log-sum-exp."""
        return self.scores(left, right, masked=masked) + self.probabilities()

    def probabilities(self) -> list[str]:
        """p from scores and log-sum-exp (of base two, +∞ for rows without a key)."""
        lse = "lse2[None, :]" if self.loop == "q" else "lse2[:, None]"
        return [f"p = tl.exp2(s * {self.exponent!r} - {lse})", *self.kept()]

    def softmax(self, *, masked: bool | Masked) -> list[str]:
        """p from the scores of a tile, and what earlier sums shrink by; `top` moves on. Rows that have seen
        no key yet stay at zero."""
        some = "new_top"
        if masked or self.spec.biases:
            some = "tl.where(new_top == float('-inf'), 0.0, new_top)"
        return [
            f"new_top = tl.maximum(top, tl.max(s, 1) * {self.exponent!r})",
            f"base = {some}",
            f"p = tl.exp2(s * {self.exponent!r} - base[:, None])",
            "shrink = tl.exp2(top - base)",
            "top = new_top",
        ]

    def started(self, at: str, masked: str) -> list[str]:
        """The running maximum `top` and sum `total` of a pass that goes on from another one: as if there had
        been MANY keys of one score, with its out as their value. Were it one key, p of each of the others
        would be too small for half precision after many keys. `at` is the place in [B,H,S], with the end of
        a load's arguments, `masked`."""
        other = ", other=float('-inf')" if masked else ""
        return [
            f"earlier = tl.load(start_lse + {at}{masked}{other}) * {LOG2E}",
            f"top = earlier - {math.log2(MANY)}",
            # MANY, unless the score is so large that the difference is rounded
            "total = tl.where(top > float('-inf'), tl.exp2(earlier - top), 0.0)",
        ]

    def finish(self) -> list[str]:
        """From the running maximum `top` and sum `total`: lse2, of base two, and what the sum of values is
        multiplied by, `share`."""
        lines, kept = [], "1.0"
        if self.spec.sink is not None:
            kept = "shrink"
            lines += [
                f"extra = tl.load(sink + head).to(tl.float32) * {LOG2E}",
                "base = tl.maximum(top, extra)",
                "base = tl.where(base == float('-inf'), 0.0, base)",
                "shrink = tl.exp2(top - base)",
                "total = total * shrink + tl.exp2(extra - base)",
                "top = base",
            ]
        return [
            *lines,
            "lse2 = top + tl.log2(total)",
            f"share = tl.where(total > 0.0, {kept} / total, 0.0)",
        ]

    def score_gradients(self) -> list[str]:
        """ds from p and dp; for q and k, what it is before the soft-cap, without the scale."""
        delta = "delta_row[None, :]" if self.loop == "q" else "delta_row[:, None]"
        lines = [f"ds = p * ({self.scaled(self.dropped('dp'))} - {delta})"]
        if self.spec.softcap is not None and self.kernel != "dbias":
            lines.append("ds *= 1.0 - bent * bent")
        return lines


def product(name: str, left: str, right: str, parts: list[tuple[int, int]]) -> list[str]:
    lines = [f"{name} = tl.dot({left}0, tl.trans({right}0){PRECISE})"]
    return lines + [
        f"{name} = tl.dot({left}{i}, tl.trans({right}{i}), {name}{PRECISE})" for i in range(1, len(parts))
    ]


def rounded(value: str, name: str) -> list[str]:
    """Lines that make NAME of `value`: the bits of its float32, rounded to 24 of them."""
    return [
        f"exact = {value}",
        f"{name} = exact.to(tl.int32, bitcast=True)",
        f"{name} = tl.where(exact == exact, {name} + {ROUND}, {name})",
    ]


def halves(name: str, dtype: str) -> tuple[str, str]:
    """Of what is `rounded`, the upper half, of `dtype`, and the tail."""
    return f"({name} >> 16).to(tl.int16).to({dtype}, bitcast=True)", f"({name} >> 8).to(tl.uint8)"


def column(part: tuple[int, int]) -> str:
    first, width = part
    return f"(tl.arange(0, {width})[None, :] + {first})"


def indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]
