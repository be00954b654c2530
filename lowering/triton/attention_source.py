"""Python source of the attention kernels for one spec: forward, gradients of q, of k and v, and of a bias.

    forward    s = scale q kᵀ, capped, with biases, masked     m, l: running maximum and sum of exp(s - m)
               out = Σ exp(s - m) v / l                        lse = m + log l
    backward   p = exp(s - lse),  dp = dout vᵀ,  ds = p (dp - delta),  delta = rowsum(dout out) - dlse
               dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dout,  dbias = ds, without its coefficient

Method: Dao, FlashAttention-2 (arXiv:2307.08691). A program owns a tile of `OUTER` indices and goes through
the other ones by `INNER`: queries outside for out, dq and dbias, keys outside for dk and dv, whose sums over
the query heads of a key head are taken in the same program. Nothing is added up by atomic operations, so
results are the same in every run. Exponentials are of base two. Head sizes are taken in pieces that are
powers of two (96 is 64 and 32), q and k of one size, v of another.

Written as text since a spec has no end of forms: its mask, biases, soft-cap, sinks and dropout are lines of
the loops, and a spec without them has none. Loads past the ends are masked unless sizes are multiples of
tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import indent
from typing import Protocol

import sympy

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.triton.attention_loops import (
    SIZES,
    Formula,
    bounds,
    inequalities,
    inside,
    sides,
    within,
)
from kp_compiler.specs import AttentionSpec

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
INFINITY = "float('inf')"
LOWEST = -(2.0**127)
TANH = "1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))"  # over x
ROUNDS = 7  # of Philox, as cuRAND's default has ten: seven pass every test of Salmon et al. 2011
PRECISE = ', input_precision="ieee"'  # of float32; half precision is exact in products anyway
WHOLE = 2  # a block without a mask, among those that dbias visits; 1 is one with a mask, 0 none
KERNELS = ("forward", "dq", "dkdv", "dbias")


class _Body(Protocol):
    """Lines of a loop's body for tiles that hold pairs to leave out, or none."""

    def __call__(self, *, masked: bool) -> list[str]: ...


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
    start: bool = False  # the forward pass goes on from an earlier (out, lse)
    exact: bool = False  # float32 all the way
    bias: int = 0  # which bias dbias is the gradient of
    summed: frozenset[str] = frozenset()  # of "q" and "k", those that this bias does not vary with


def pieces(size: int) -> list[tuple[int, int]]:
    """First column and width of the parts of a head, powers of two from 16 up; the last may be too wide."""
    found, first = [], 0
    rest = -(-size // 16) * 16
    while rest:
        width = 1 << (rest.bit_length() - 1)
        found.append((first, width))
        first, rest = first + width, rest - width
    return found


def source(kernel: str, spec: AttentionSpec, layout: Layout) -> str:
    """A module with `kp_attention_KERNEL`; its parameters are `parameters(kernel, spec, layout)`."""
    body = {"forward": _forward, "dq": _dq, "dkdv": _dkdv, "dbias": _dbias}[kernel](
        Writer(kernel, spec, layout)
    )
    return "\n".join(
        [
            "import triton",
            "import triton.language as tl",
            "",
            "@triton.jit",
            f"def kp_attention_{kernel}({', '.join(parameters(kernel, spec, layout))}):",
            f"    OUTER: tl.constexpr = {layout.tile[0]}",
            f"    INNER: tl.constexpr = {layout.tile[1]}",
            indent("\n".join(body), "    "),
            "",
        ]
    )


def parameters(kernel: str, spec: AttentionSpec, layout: Layout) -> tuple[str, ...]:
    """Names in order: tensors, then numbers (strides as NAME_DIMENSION)."""
    tensors = ["q", "k", "v"]
    tensors += ["out", "lse"] if kernel == "forward" else ["dout", "lse", "delta"]
    tensors += {"forward": [], "dq": ["dq"], "dkdv": ["dk", "dv"], "dbias": ["dbias"]}[kernel]
    if kernel == "forward" and layout.start:
        tensors += ["start_out", "start_lse"]
    strided = [t for t in tensors if t not in ("lse", "delta", "start_lse", "dbias")]
    numbers = [f"{t}_{dim}" for t in strided for dim in ("b", "h", "s")]
    for i, dims in enumerate(layout.lookups):
        tensors.append(f"t{i}")
        numbers += [f"t{i}_{dim}" for dim in range(dims)]
    for i in range(len(spec.biases)):
        tensors.append(f"bias{i}")
        numbers += [f"bias{i}_{dim}" for dim in range(4)]
    if spec.sink is not None and kernel == "forward":
        tensors.append("sink")
    if spec.dropout_p:
        tensors.append("seed")
    if layout.block is not None and kernel != "dbias":
        tensors += ["partial_count", "partial", "full_count", "full"]
        numbers += ["list_b", "list_h", "list_length"]
    if kernel == "dbias":
        numbers += ["batches", "heads", "own_heads", "dbias_b", "dbias_h", "dbias_q", "dbias_k"]
    if layout.block is not None and kernel == "dbias":
        tensors.append("visited")
        numbers += ["list_b", "list_h", "list_length"]
    return (*tensors, *numbers, "H", "GROUP", "S", "T", *(f"n{i}" for i in range(spec.mask.scalars)))


class Writer:
    """Pieces of text that several kernels have in common."""

    def __init__(self, kernel: str, spec: AttentionSpec, layout: Layout) -> None:
        self.kernel, self.spec, self.layout = kernel, spec, layout
        self.loop = "q" if kernel == "dkdv" else "k"
        self.outer = "k" if kernel == "dkdv" else "q"
        self.forms = inequalities(spec.mask)
        self.formula = Formula(self.loop, layout.booleans, layout.whole)
        self.keep = self._mask()
        self.head, self.value = pieces(layout.head_dim), pieces(layout.value_dim)
        plain = spec.softcap is None and not spec.biases and spec.scale > 0
        # what scores are multiplied by to be exponents of two, and whether before the maximum is taken
        self.exponent = spec.scale * LOG2E if plain else LOG2E
        self.plain = plain

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
        return [
            f"{to or name}{i} = "
            f"tl.load({self.place(name, part, start, count)}{self.masked(index, part, size)})"
            for i, part in enumerate(parts)
        ]

    def place(self, name: str, part: tuple[int, int], start: str, count: str) -> str:
        near = f"tl.arange(0, {count})[:, None] * {name}_s"
        return f"{name} + ({start}).to(tl.int64) * {name}_s + {near} + {column(part)}"

    def masked(self, index: str, part: tuple[int, int], size: int, *, load: bool = True) -> str:
        """Which elements of a tile of rows there are."""
        masks = [] if index in self.layout.whole else [f"({index}_row < {SIZES[index]})"]
        masks += [f"({column(part)} < {size})"] if sum(part) > size else []
        if not masks:
            return ""
        return f", mask={' & '.join(masks)}" + (", other=0.0" if load else "")

    def store(self, name: str, values: str, index: str, parts: list[tuple[int, int]], size: int) -> list[str]:
        return [
            f"tl.store({self.place(name, part, 'first', 'OUTER')}, "
            f"({values.format(i)}).to({name}.dtype.element_ty)"
            f"{self.masked(index, part, size, load=False)})"
            for i, part in enumerate(parts)
        ]

    def vector(self, name: str, index: str, start: str, count: str, other: str) -> str:
        """Load [count] numbers of a row of [B,H,S]."""
        at = f"{start} + tl.arange(0, {count})"
        masked = "" if index in self.layout.whole else f", mask={at} < {SIZES[index]}, other={other}"
        return f"tl.load({name} + (batch * H + head).to(tl.int64) * S + {at}{masked})"

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
            "first = tile * OUTER",
            f"last = tl.minimum(first + OUTER, {size}) - 1",
            *([] if keys else ["kv_head = head // GROUP"]),
        ]

    def begin(self, *, reverse: bool) -> list[str]:
        """A program's place and the indices that it owns."""
        index = self.outer
        rows = [f"{index}_row = (first + tl.arange(0, OUTER))[:, None]", f"{index}_at = {index}_row"]
        return self.position(reverse=reverse) + rows

    def advance(self, names: Iterable[str], head: str) -> list[str]:
        return [f"{n} += batch.to(tl.int64) * {n}_b + ({head}).to(tl.int64) * {n}_h" for n in names]

    # -------------------------------------------------------------------------------------------- loops

    def loops(self, body: _Body) -> list[str]:
        """The tiles of the inner index, by bounds or by lists."""
        lines = list(self.formula.outside)
        if self.layout.block is not None:
            return lines + self._listed(body)
        assert self.forms is not None
        lines += bounds(self.forms, self.loop)
        below, above = sides(self.forms, self.loop)
        spans = [("full_low", "full_high", False)]
        if below:
            spans.insert(0, ("low", "full_low", True))
        if above or self.loop not in self.layout.whole:
            spans.append(("full_high", "high", True))
        for start, end, masked in spans:
            lines.append(f"for step in tl.range({start}, {end}, num_stages={self.layout.stages}):")
            lines += _in(["start = step * INNER", *body(masked=masked)])
        return lines

    def _listed(self, body: _Body) -> list[str]:
        """Blocks of a list are as large as tiles, or a multiple."""
        assert self.layout.block is not None
        outer, inner = self.layout.block if self.loop == "k" else reversed(self.layout.block)
        lines = [f"line = batch * list_b + head * list_h + first // {outer}"]
        per = inner // self.layout.tile[1]
        for name, masked in (("partial", True), ("full", False)):
            lines.append(f"count = tl.load({name}_count + line) * {per}")
            lines.append(f"for step in tl.range(0, count, num_stages={self.layout.stages}):")
            block = f"tl.load({name} + line.to(tl.int64) * list_length + step // {per})"
            start = f"start = {block} * {inner} + step % {per} * INNER"
            lines += _in([start, *body(masked=masked or self.loop not in self.layout.whole)])
        return lines

    def indices(self) -> list[str]:
        """In a loop: a tile's indices along its second dimension and, for rows of matrices, its first."""
        return [
            f"{self.loop}_row = (start + tl.arange(0, INNER))[:, None]",
            f"{self.loop}_at = (start + tl.arange(0, INNER))[None, :]",
        ]

    # -------------------------------------------------------------------------------------------- scores

    def scores(self, left: str, right: str, *, masked: bool) -> list[str]:
        """s [OUTER,INNER] from the pieces of both matrices, the inner one's transposed; `masked` is −∞ where
        pairs are left out."""
        return _product("s", left, right, self.head) + self.changes(masked=masked)

    def changes(self, *, masked: bool) -> list[str]:
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
        if masked:
            conditions = [] if self.keep is None else [f"({self.keep})"]
            if self.kernel == "dbias" and self.layout.block is not None and conditions:
                conditions = [f"(({self.keep}) | (kind == {WHOLE}))"]
            if self.loop == "k" and "k" not in self.layout.whole:
                conditions.append(f"({within(frozenset('k'))})")
            if conditions:
                lines += self.formula.inside
                lines.append(f"s = tl.where({' & '.join(conditions)}, s, float('-inf'))")
        return lines

    def tile(self, name: str) -> str:
        """A tile of a tensor that broadcasts to [B,H,S,T]."""
        places = f"{name} + batch.to(tl.int64) * {name}_0 + head.to(tl.int64) * {name}_1"
        places += f" + q_at.to(tl.int64) * {name}_2 + k_at.to(tl.int64) * {name}_3"
        return f"tl.load({places}{inside(frozenset('qk') - self.layout.whole)})"

    def kept(self) -> list[str]:
        """Which probabilities dropout keeps: a random number for every pair, the same in all kernels."""
        if not self.spec.dropout_p:
            return []
        bound = min(int(self.spec.dropout_p * 2**32), 2**32 - 1)
        return [
            "zero = tl.zeros([OUTER, INNER], tl.uint32)",
            "sequence = (batch * H + head).to(tl.uint32)",
            "number, _, _, _ = tl.philox("
            "tl.load(seed), zero + q_at.to(tl.uint32), zero + k_at.to(tl.uint32), "
            "zero + sequence, zero, "
            f"{ROUNDS})",
            f"stays = number >= {bound}",
        ]

    def dropped(self, name: str) -> str:
        """Probabilities or their gradients after dropout."""
        if not self.spec.dropout_p:
            return name
        return f"tl.where(stays, {name}, 0.0)"

    def scaled(self, name: str) -> str:
        """A sum over what dropout kept, made as large as the sum over all."""
        if not self.spec.dropout_p:
            return name
        return f"{name} * {1 / (1 - self.spec.dropout_p) if self.spec.dropout_p < 1 else 0.0!r}"

    def recomputed(self, left: str, right: str, *, masked: bool) -> list[str]:
        """p from scores and log-sum-exp (of base two, +∞ for rows without a key)."""
        lse = "lse2[None, :]" if self.loop == "q" else "lse2[:, None]"
        return [
            *self.scores(left, right, masked=masked),
            f"p = tl.exp2(s * {self.exponent!r} - {lse})",
            *self.kept(),
        ]

    def finish(self, at: str, masked: str) -> list[str]:
        """From the running maximum `top` and sum `total`: lse2, of base two, and what the sum of values is
        multiplied by, `share`; `rest` is the share of what the pass started from. `at` is the place in
        [B,H,S], with the end of a load's arguments, `masked`."""
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
        lines += ["lse2 = top + tl.log2(total)", f"share = tl.where(total > 0.0, {kept} / total, 0.0)"]
        if not self.layout.start:
            return lines
        return [
            *lines,
            f"earlier = tl.load(start_lse + {at}{masked + ', other=0.0' if masked else ''}) * {LOG2E}",
            "both = tl.maximum(lse2, earlier)",
            "base = tl.where(both == float('-inf'), 0.0, both)",
            "now, then = tl.exp2(lse2 - base), tl.exp2(earlier - base)",
            "share *= tl.where(now + then > 0.0, now / (now + then), 0.0)",
            "rest = tl.where(now + then > 0.0, then / (now + then), 0.0)",
            "lse2 = base + tl.log2(now + then)",
        ]

    def score_gradients(self) -> list[str]:
        """ds from p and dp; for q and k, what it is before the soft-cap, without the scale."""
        delta = "delta_row[None, :]" if self.loop == "q" else "delta_row[:, None]"
        lines = [f"ds = p * ({self.scaled(self.dropped('dp'))} - {delta})"]
        if self.spec.softcap is not None and self.kernel != "dbias":
            lines.append("ds *= 1.0 - bent * bent")
        return lines


def _forward(w: Writer) -> list[str]:
    layout = w.layout
    mine = ["q", "out", *(["start_out"] if layout.start else [])]
    lines = w.begin(reverse=True) + w.advance(mine, "head") + w.advance("kv", "kv_head")
    lines += w.rows("q", "q", w.head, layout.head_dim, "first", "OUTER")
    lines += [
        "top = tl.full([OUTER], float('-inf'), tl.float32)",
        "total = tl.zeros([OUTER], tl.float32)",
        *(f"acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.value)),
    ]

    def body(*, masked: bool) -> list[str]:
        empty = masked or bool(w.spec.biases)  # rows that have seen no key yet stay at zero
        lines = w.indices() + w.rows("k", "k", w.head, layout.head_dim, "start", "INNER", to="key")
        lines += w.rows("v", "k", w.value, layout.value_dim, "start", "INNER", to="value")
        lines += w.scores("q", "key", masked=masked)
        lines.append(f"new_top = tl.maximum(top, tl.max(s, 1) * {w.exponent!r})")
        lines.append("base = " + ("tl.where(new_top == float('-inf'), 0.0, new_top)" if empty else "new_top"))
        lines += [
            f"p = tl.exp2(s * {w.exponent!r} - base[:, None])",
            "shrink = tl.exp2(top - base)",
            "total = total * shrink + tl.sum(p, 1)",
            *w.kept(),
            f"weights = ({w.dropped('p')}).to(value0.dtype)",
        ]
        lines += [
            f"acc{i} = tl.dot(weights, value{i}, acc{i} * shrink[:, None]{PRECISE})"
            for i in range(len(w.value))
        ]
        return [*lines, "top = new_top"]

    lines += w.loops(body)
    at = "(batch * H + head).to(tl.int64) * S + first + tl.arange(0, OUTER)"
    masked = "" if "q" in layout.whole else ", mask=first + tl.arange(0, OUTER) < S"
    lines += w.finish(at, masked)
    if layout.start:
        lines += w.rows("start_out", "q", w.value, layout.value_dim, "first", "OUTER", to="before")
    value = w.scaled("acc{0} * share[:, None]")
    if layout.start:
        value += " + tl.where(rest[:, None] > 0.0, before{0}.to(tl.float32) * rest[:, None], 0.0)"
    lines += w.store("out", value, "q", w.value, layout.value_dim)
    return [*lines, f"tl.store(lse + {at}, lse2 * {LN2}{masked})"]


def _dq(w: Writer) -> list[str]:
    layout = w.layout
    lines = w.begin(reverse=True) + w.advance(["q", "dout", "dq"], "head") + w.advance("kv", "kv_head")
    lines += _query_tiles(w, "first", "OUTER")
    lines += [f"acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.head)]

    def body(*, masked: bool) -> list[str]:
        lines = w.indices() + _key_tiles(w, "start", "INNER") + w.recomputed("query", "key", masked=masked)
        lines += _product("dp", "grad", "value", w.value) + w.score_gradients()
        lines.append("ds = ds.to(key0.dtype)")
        return lines + [f"acc{i} = tl.dot(ds, key{i}, acc{i}{PRECISE})" for i in range(len(w.head))]

    lines += w.loops(body)
    return lines + w.store("dq", f"acc{{0}} * {w.spec.scale!r}", "q", w.head, layout.head_dim)


def _dkdv(w: Writer) -> list[str]:
    layout = w.layout
    lines = w.begin(reverse=False) + w.advance(["k", "v", "dk", "dv"], "kv_head")
    lines += _key_tiles(w, "first", "OUTER")
    lines += [f"dk_acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.head)]
    lines += [f"dv_acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.value)]
    lines += [
        "q += batch.to(tl.int64) * q_b",
        "dout += batch.to(tl.int64) * dout_b",
        "all_q, all_dout = q, dout",
    ]

    def body(*, masked: bool) -> list[str]:
        lines = w.indices() + _query_tiles(w, "start", "INNER") + w.recomputed("key", "query", masked=masked)
        lines.append(f"weights = ({w.dropped('p')}).to(grad0.dtype)")
        lines += [f"dv_acc{i} = tl.dot(weights, grad{i}, dv_acc{i}{PRECISE})" for i in range(len(w.value))]
        lines += _product("dp", "value", "grad", w.value) + w.score_gradients()
        lines.append("ds = ds.to(query0.dtype)")
        return lines + [f"dk_acc{i} = tl.dot(ds, query{i}, dk_acc{i}{PRECISE})" for i in range(len(w.head))]

    lines.append("for member in range(0, GROUP):")
    lines += _in(
        [
            "head = kv_head * GROUP + member",
            "q = all_q + head.to(tl.int64) * q_h",
            "dout = all_dout + head.to(tl.int64) * dout_h",
            *w.loops(body),
        ]
    )
    lines += w.store("dk", f"dk_acc{{0}} * {w.spec.scale!r}", "k", w.head, layout.head_dim)
    return lines + w.store("dv", w.scaled("dv_acc{0}"), "k", w.value, layout.value_dim)


def _dbias(w: Writer) -> list[str]:
    """A program has a tile of pairs and goes through the batches and heads that share it."""
    lines = [
        "tiles, others = (S + OUTER - 1) // OUTER, (T + INNER - 1) // INNER",
        "first = tl.program_id(0) % tiles * OUTER",
        "last = tl.minimum(first + OUTER, S) - 1",
        "start = tl.program_id(0) // tiles % others * INNER",
        "own_batch = tl.program_id(0) // tiles // others // own_heads",
        "own_head = tl.program_id(0) // tiles // others % own_heads",
        "q_row = (first + tl.arange(0, OUTER))[:, None]",
        "q_at = q_row",
        *w.indices(),
        "acc = tl.zeros([OUTER, INNER], tl.float32)",
        "all_q, all_k, all_v, all_dout = q, k, v, dout",
        "members = batches * heads",
    ]
    if w.layout.block is None and w.forms:
        lines += [
            *bounds(w.forms, "k"),
            "members = tl.where((start // INNER >= low) & (start // INNER < high), members, 0)",
        ]
    lines.append("for member in range(0, members):")
    body = ["batch, head = own_batch + member // heads, own_head + member % heads", "kv_head = head // GROUP"]
    for name, head in (("q", "head"), ("dout", "head"), ("k", "kv_head"), ("v", "kv_head")):
        body.append(f"{name} = all_{name} + batch.to(tl.int64) * {name}_b + {head}.to(tl.int64) * {name}_h")
    body += _query_tiles(w, "first", "OUTER") + _key_tiles(w, "start", "INNER") + w.formula.outside
    if w.layout.block is not None:
        outer, inner = w.layout.block
        line = f"batch * list_b + head * list_h + first // {outer}"
        body.append(f"kind = tl.load(visited + ({line}).to(tl.int64) * list_length + start // {inner})")
    body += w.recomputed("query", "key", masked=True) + _product("dp", "grad", "value", w.value)
    body += w.score_gradients()
    lines += _in([*body, "acc += ds" if w.layout.block is None else "acc += tl.where(kind > 0, ds, 0.0)"])
    summed = sorted(w.layout.summed)
    axes = {"q": (0, "first // OUTER", "q_at"), "k": (1, "start // INNER", "k_at")}
    lines += [f"acc = tl.sum(acc, {axes[name][0]}, keep_dims=True)" for name in summed]
    places = [f"({axes[n][1] if n in summed else axes[n][2]}).to(tl.int64) * dbias_{n}" for n in "qk"]
    base = "own_batch.to(tl.int64) * dbias_b + own_head.to(tl.int64) * dbias_h"
    masks = [f"({n}_at < {SIZES[n]})" for n in "qk" if n not in summed and n not in w.layout.whole]
    masks = [f", mask={' & '.join(masks)}"] if masks else []
    zero = "tl.zeros_like(acc).to(tl.int64)"
    lines.append(f"tl.store(dbias + {base} + {' + '.join(places)} + {zero}, acc{''.join(masks)})")
    return lines


def _query_tiles(w: Writer, start: str, count: str) -> list[str]:
    """Queries and gradients of the output with their log-sum-exp and delta."""
    return [
        *w.rows("q", "q", w.head, w.layout.head_dim, start, count, to="query"),
        *w.rows("dout", "q", w.value, w.layout.value_dim, start, count, to="grad"),
        f"lse2 = {w.vector('lse', 'q', start, count, INFINITY)} * {LOG2E}",
        "lse2 = tl.where(lse2 == float('-inf'), float('inf'), lse2)",
        f"delta_row = {w.vector('delta', 'q', start, count, '0.0')}",
    ]


def _key_tiles(w: Writer, start: str, count: str) -> list[str]:
    return [
        *w.rows("k", "k", w.head, w.layout.head_dim, start, count, to="key"),
        *w.rows("v", "k", w.value, w.layout.value_dim, start, count, to="value"),
    ]


def _product(name: str, left: str, right: str, parts: list[tuple[int, int]]) -> list[str]:
    lines = [f"{name} = tl.dot({left}0, tl.trans({right}0){PRECISE})"]
    return lines + [
        f"{name} = tl.dot({left}{i}, tl.trans({right}{i}), {name}{PRECISE})" for i in range(1, len(parts))
    ]


def column(part: tuple[int, int]) -> str:
    first, width = part
    return f"(tl.arange(0, {width})[None, :] + {first})"


def _in(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]
