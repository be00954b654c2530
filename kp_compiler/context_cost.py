"""What attention over a shared sequence costs by each schedule: seconds and bytes of memory, of sizes that
are numbers, or symbols where formulas are asked for.

    ring         P times a rank's queries with one rank's keys, beside the exchange of the next keys
    allgather    all keys of a chunk of heads are there before its first product, beside that of another one
    ulysses      queries, keys, values and results of a chunk of heads are exchanged, beside the arithmetic of
                 another one
    hybrid       the same among the ranks of a row, with a ring among rows for the arithmetic

A pass is as slow as its slowest rank: under a causal mask the one with the most pairs. Gradients of keys and
values travel in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy

from kp_compiler import cost
from kp_compiler.config import sharing
from kp_compiler.cost import KERNEL, RATES, SB, SD, SE, SH, SK, SQ, ST
from kp_compiler.lowering.context import pairs, readers
from kp_compiler.lowering.context.layout import Kind
from kp_compiler.lowering.context.readers import PROGRAMS, STREAMS
from kp_compiler.lowering.context.ring import CHUNKS, ROWS, few_keys
from kp_compiler.lowering.context.schedules import SCHEDULES
from kp_compiler.lowering.into import padded
from kp_compiler.metadata import hint
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target

COPIED = 2.4e12  # bytes/s that a GPU reads and writes, together
# Bytes/s from one rank to another, both ways at once: two H100 over NVLink, 2026-11-22
LINK = 229e9
links: dict[str, float] = {}  # of a group, as `validate_context_parallel` has measured it: one for all ranks
# FLOP/s and bytes/s that a CPU is taken to have, so that "auto" has an answer there, too
CPU_RATE, CPU_LINK = 0.2e12, 2e9
LATENCY = 20e-6  # seconds of one exchange
# Times the forward pass. There are 2.5 times the products, at a lower rate: 2.98 to 3.07 times as long on one
# H200 (benchmarks/ring_attention.py, 2026-11-27), 3.3 on an H100 at 32k (benchmarks/attention_kernels.py)
BACKWARD = 3


@dataclass(frozen=True)
class Sizes:
    """Of what one rank has of a site, and of the ranks."""

    batch: Any
    heads: Any
    kv_heads: Any
    queries: Any
    head_dim: Any
    value_dim: Any
    ranks: Any
    row: Any  # ranks of a row, where they are a grid
    width: Any  # bytes of an element
    rate: Any  # FLOP/s of a kernel
    link: Any  # bytes/s from a rank to another one
    programs: Any  # that run at a time

    @property
    def keys(self) -> Any:
        """Elements of k and v."""
        return self.batch * self.kv_heads * self.queries * (self.head_dim + self.value_dim)

    @property
    def matrices(self) -> Any:
        """Elements of q and out."""
        return self.batch * self.heads * self.queries * (self.head_dim + self.value_dim)

    def float32(self, dim: Any) -> Any:
        """Bytes of one number in float32 for each of `dim` of every query of every head."""
        return 4 * self.batch * self.heads * self.queries * dim

    def chunks(self, times: int) -> Any:
        """As `ring.chunk_count`, of once the rows forward, of half as many backward."""
        rows = sympy.floor(self.batch * self.heads * self.queries / (times * ROWS))
        return sympy.Max(1, sympy.Min(CHUNKS, self.kv_heads, rows))

    def backward_chunks(self) -> Any:
        """As `ring.backward_chunks`."""
        count = self.chunks(2)
        return sympy.Piecewise((count, count > 2), (1, True))

    @property
    def tail(self) -> Any:
        """Bytes of what results have beside them until they have seen all keys."""
        width = padded(self.value_dim) if isinstance(self.value_dim, int) else self.value_dim
        return sympy.Piecewise((self.batch * self.heads * self.queries * width, self.width < 4), (0, True))


SYMBOLS = Sizes(SB, SH, SK, SQ, SD, SE, *sympy.symbols("P U width rate link programs", positive=True))


@dataclass(frozen=True)
class Formula:
    """Seconds of a forward and of a backward pass, and the bytes that each takes on a rank beside its own
    tensors."""

    forward: Any
    backward: Any
    memory: Any
    backward_memory: Any


@dataclass(frozen=True)
class Predicted:
    """Seconds, and the bytes of one rank's exchanges: the most of both passes in training."""

    forward: float
    backward: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def describe(self) -> dict[str, float]:
        return {
            "forward_ms": round(self.forward * 1e3, 4),
            "backward_ms": round(self.backward * 1e3, 4),
            "memory_mib": round(self.memory / 2**20, 2),
        }


def formula(schedule: str, spec: AttentionSpec, layout: Kind, of: Sizes = SYMBOLS) -> Formula:
    """Of one site. Steps of a ring in which a rank has nothing to do are counted as those that have."""
    return _FORMULAS[schedule](spec, layout, of)


def _ring(spec: AttentionSpec, layout: Kind, of: Sizes) -> Formula:
    step = _arithmetic(spec, layout, of) / of.ranks
    parts = sympy.Piecewise((1, sympy.Eq(of.ranks, 1)), (2, True)) if layout == "zigzag" else 1
    groups, steps = _groups(of, spec, of.queries / parts, of.queries / parts), of.ranks - 1
    back = BACKWARD * step / _busy(of, of.queries / parts, groups)
    one, gradients = of.width * of.keys / of.link + LATENCY, 4 * of.keys / of.link
    count = of.backward_chunks()
    moved = 2 * of.width * of.keys  # what comes, and what goes on
    few = sympy.And(sympy.Eq(of.ranks, 2), few_keys(of.heads, of.kv_heads))  # gathered then, forward
    gathered = _allgather(spec, layout, of)
    again = moved + of.width * of.keys * sympy.Min(1, count - 1)  # a chunk's own as it goes
    last = gradients + LATENCY
    several = layout == "zigzag" and "causal" in spec.mask.parts and pairs.by_order(spec.mask)
    if several:  # it goes beside all but the first of its own pieces
        last = sympy.Max(0, last - sympy.Rational(3, 4) * back)
    forward = step + steps * sympy.Max(step, one) + 2 * of.ranks * KERNEL
    return Formula(
        sympy.Piecewise((gathered.forward, few), (forward, True)),
        back + steps * sympy.Max(back, one + gradients) + last / count + 2 * of.ranks * count * KERNEL,
        sympy.Piecewise((gathered.memory, few), (0, sympy.Eq(of.ranks, 1)), (moved + of.tail, True)),
        # of this chunk, and of the one before
        (again + of.float32(of.head_dim) + (5 + _beside(groups)) * 4 * of.keys) / count,
    )


def _busy(of: Sizes, keys: Any, groups: Any) -> Any:
    """The part of a GPU that has something to do in a backward pass over so many keys at a time, by groups of
    their readers, as long as that is one round of programs or two: 8k keys of one head are 64 programs, and
    took twice as long as arithmetic (two H200, 2026-11-28)."""
    rounds = of.batch * of.kv_heads * keys / readers.KEYS / of.programs * groups
    return sympy.Piecewise((rounds / sympy.ceiling(rounds), rounds < 2), (1, True))


def _groups(of: Sizes, spec: AttentionSpec, queries: Any, keys: Any) -> Any:
    """As `readers.grouped`; of symbols, the most groups there may be."""
    if spec.sparse is not None or of.programs == 1:
        return 1
    sizes = [sympy.ceiling(size) for size in (of.batch, of.heads, queries, keys)]
    if not any(size.free_symbols for size in sizes):
        most: Any = readers.count(*map(int, sizes))
    else:
        wanted = sympy.ceiling(4 * of.programs / (of.batch * sympy.ceiling(keys / readers.KEYS)))
        rows = sympy.floor(of.heads * queries / readers.ROWS)
        most = sympy.Max(1, sympy.Min(2 * STREAMS, wanted, of.heads, rows))
    return sympy.Piecewise((most, sympy.Eq(of.kv_heads, 1)), (1, True))


def _beside(groups: Any) -> Any:
    """Sums of gradients of keys and values that groups of readers have beside the results."""
    return sympy.Min(STREAMS, groups) - 1


def _allgather(spec: AttentionSpec, layout: Kind, of: Sizes) -> Formula:
    even = _arithmetic(spec, layout, of)
    seen = sympy.Rational(1, 2) + 1 / (4 * of.ranks) if "causal" in spec.mask.parts else 1
    keys = seen * of.ranks * of.queries
    groups = _groups(of, spec, of.queries / 2, keys)
    back = BACKWARD * even / _busy(of, keys, groups)
    others, every = of.ranks - 1, of.ranks * of.keys
    gathered, joined = others * (of.width * of.keys / of.link + LATENCY), 2 * of.width * every / COPIED
    returned = others * 4 * of.keys / of.link + 2 * 4 * every / COPIED
    count, fewer = of.chunks(1), of.chunks(2)
    beside, again = gathered * (1 - 1 / count), (gathered + returned) * (1 - 1 / fewer)
    return Formula(
        gathered / count + sympy.Max(even, beside) + joined + 2 * count * KERNEL,
        (gathered + returned) / fewer + sympy.Max(back, again) + joined + 2 * fewer * KERNEL,
        3 * of.width * every / count,  # as they came, in order, and the next
        (3 * of.width * every + of.float32(of.head_dim) + (3 + _beside(groups)) * 4 * every) / fewer,
    )


def _ulysses(spec: AttentionSpec, layout: Kind, of: Sizes) -> Formula:
    return _hybrid(spec, layout, replace(of, row=of.ranks))


def _hybrid(spec: AttentionSpec, layout: Kind, of: Sizes) -> Formula:
    # copies of a key head, where there are fewer than ranks
    shared = sympy.Max(1, _part(of.row, of.kv_heads))
    row = replace(
        of, heads=_part(of.heads, of.row), kv_heads=_part(shared * of.kv_heads, of.row),
        queries=of.queries * of.row, ranks=_part(of.ranks, of.row),
    )  # fmt: skip
    count = row.chunks(1)  # of which each goes round by itself
    few = replace(row, heads=_part(row.heads, count), kv_heads=_part(row.kv_heads, count))
    one = _ring(spec, layout, few)
    forward, backward = count * one.forward, count * one.backward
    given = of.width * (of.matrices + shared * of.keys)  # q, k, v and out
    away = (of.row - 1) / of.row / of.link  # of what there is, seconds for each byte
    moved = away * given + 2 * LATENCY
    returned = moved + away * (of.width * of.float32(of.head_dim) / 4 + 4 * shared * of.keys)
    rest = 1 - 1 / count
    return Formula(
        moved / count + sympy.Max(forward, moved * rest),
        returned / count + sympy.Max(backward, returned * rest),
        2 * given / count + one.memory,
        2 * (given + 2 * shared * of.keys) / count + one.backward_memory,
    )


def _part(x: Any, of: Any) -> Any:
    """x / of, an int where it is one."""
    found = sympy.Rational(1) * x / of
    return int(found) if found.is_Integer else found


_FORMULAS: dict[str, Callable[[AttentionSpec, Kind, Sizes], Formula]] = {
    "ring": _ring, "allgather": _allgather, "ulysses": _ulysses, "hybrid": _hybrid
}  # fmt: skip


def _arithmetic(spec: AttentionSpec, layout: Kind, of: Sizes) -> Any:
    """Seconds of a forward pass of the rank with the most pairs."""
    tokens = of.queries * of.ranks
    kept = cost.area(spec).subs({SQ: tokens, ST: tokens}, simultaneous=True) / of.ranks
    causal = "causal" in spec.mask.parts and spec.mask.window is None
    most = 2 - 1 / of.ranks if causal and layout == "contiguous" else 1
    return 2 * of.batch * of.heads * (of.head_dim + of.value_dim) * kept * most / of.rate


def predict(
    spec: AttentionSpec, shape: AttentionShape, layout: Kind, size: int, target: Target,
    link: float | None = None, row: int = 1,
) -> dict[str, Predicted]:  # fmt: skip
    """By schedule, for what one rank has of a site; symbolic sizes as this compilation saw them. `link`:
    bytes/s between ranks, if they were measured. `row`: ranks that share heads, where all are a grid."""
    sizes = _sizes(shape, size, target, link, row)
    found = {}
    for schedule in SCHEDULES:
        among = sharing(schedule, size, row, layout)
        if not among or sizes.heads % among:
            continue
        each = formula(schedule, spec, layout, sizes)
        memory = max(each.memory, each.backward_memory) if shape.training else each.memory
        found[schedule] = Predicted(*map(float, (each.forward, each.backward, memory)))
    return found


def alone(spec: AttentionSpec, shape: AttentionShape, size: int, target: Target) -> float:
    """Seconds of the forward pass of the whole sequence, of which `shape` is a rank's part, on one rank."""
    sizes = _sizes(shape, 1, target, None, 1)
    return float(_ring(spec, "zigzag", replace(sizes, queries=sizes.queries * size)).forward)


def _sizes(shape: AttentionShape, ranks: int, target: Target, link: float | None, row: int) -> Sizes:
    on_gpu = target.device == "cuda"
    return Sizes(
        hint(shape.batch), hint(shape.heads), hint(shape.kv_heads), hint(shape.queries), hint(shape.head_dim),
        hint(shape.value_dim), ranks, row, shape.dtype.itemsize, RATES["triton"] if on_gpu else CPU_RATE,
        link or (LINK if on_gpu else CPU_LINK), PROGRAMS if on_gpu else 1,
    )  # fmt: skip
