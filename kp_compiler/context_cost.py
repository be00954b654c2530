"""What attention over a shared sequence costs by each schedule: seconds and bytes of memory, as formulas of
the (possibly symbolic) sizes, and the numbers of one site.

    ring         P times a rank's queries with one rank's keys, beside the exchange of the next keys
    allgather    all keys of a chunk of heads are there before its first product, beside that of another one
    ulysses      queries, keys, values and results of a chunk of heads are exchanged, beside the arithmetic of
                 another one
    hybrid       the same among the ranks of a row, with a ring among rows for the arithmetic

A pass is as slow as its slowest rank: under a causal mask the one with the most pairs. Gradients of keys and
values travel in float32. SC and SG count chunks of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from kp_compiler import cost
from kp_compiler.config import sharing
from kp_compiler.cost import KERNEL, RATES, SB, SD, SE, SH, SK, SQ
from kp_compiler.lowering.context.layout import Kind
from kp_compiler.lowering.context.ring import CHUNKS, ROWS
from kp_compiler.lowering.context.schedules import SCHEDULES
from kp_compiler.metadata import hint
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target

SP, SR, SL, SW = sympy.symbols("P rate link width", positive=True)  # ranks, FLOP/s, bytes/s, bytes an element
SU = sympy.Symbol("U", positive=True)  # ranks of a row
# As `ring.count_of`, forward and backward, and as many as a ring has then
SC, SG = (sympy.Max(1, sympy.Min(CHUNKS, SK, sympy.floor(SB * SH * SQ / (ROWS * times)))) for times in (1, 2))
_RING = tuple(sympy.Piecewise((count, count > 2), (1, True)) for count in (SC, SG))
COPIED = 2.4e12  # bytes/s that a GPU reads and writes, together
# Bytes/s from one rank to another, both ways at once: two H100 over NVLink, 2026-11-22
LINK = 229e9
# FLOP/s and bytes/s that a CPU is taken to have, so that "auto" has an answer there, too
CPU_RATE, CPU_LINK = 0.2e12, 2e9
LATENCY = 20e-6  # seconds of one exchange
# Times the forward pass. There are 2.5 times the products, at a lower rate: 2.98 to 3.07 times as long on one
# H200 (benchmarks/ring_attention.py, 2026-11-27), 3.3 on an H100 at 32k (benchmarks/attention_kernels.py)
BACKWARD = sympy.Integer(3)


@dataclass(frozen=True)
class Formula:
    """Seconds of a forward and of a backward pass, and the bytes that each takes on a rank beside its own
    tensors, over B, H, K, S (a rank's tokens), D, E, P, rate, link and width."""

    forward: sympy.Expr
    backward: sympy.Expr
    memory: sympy.Expr
    backward_memory: sympy.Expr

    def at(self, values: dict[Any, Any]) -> Formula:
        every = (self.forward, self.backward, self.memory, self.backward_memory)
        return Formula(*(x.subs(values, simultaneous=True) for x in every))


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


@cache
def formula(schedule: str, spec: AttentionSpec, layout: Kind) -> Formula:
    """Of one site. Steps of a ring in which a rank has nothing to do are counted as those that have."""
    work = cost.area(spec).subs({SQ: SQ * SP, cost.ST: SQ * SP}) * 2 * SB * SH * (SD + SE) / SP / SR
    even = work * _slowest(spec, layout)
    keys, queries = SB * SK * SQ * (SD + SE), SB * SH * SQ * (SD + SE)  # elements of a rank's: k, v; q, out
    in_float32 = 4 * SB * SH * SQ * SE, 4 * SB * SH * SQ * SD, 4 * keys  # out, dq, and dk with dv
    wide = in_float32[2] / SL  # gradients on the way
    one = SW * keys / SL + LATENCY
    if schedule == "ring":
        count, fewer = _RING
        last = wide + LATENCY
        step, back = even / SP, BACKWARD * even / SP
        # what comes, what goes on, and a chunk's own as it goes
        moved, again = (SW * keys * (2 + sympy.Min(1, each - 1)) for each in _RING)
        return Formula(
            step + (SP - 1) * sympy.Max(step, one) + 2 * SP * count * KERNEL,
            back + (SP - 1) * sympy.Max(back, one + wide) + last / fewer + 2 * SP * fewer * KERNEL,
            (moved + in_float32[0]) / count,
            (again + in_float32[1] + 5 * in_float32[2]) / fewer,  # of this chunk, and of the one before
        )
    if schedule == "allgather":
        gathered, joined = (SP - 1) * one, 2 * SW * SP * keys / COPIED
        rest, again = (gathered * (1 - 1 / count) for count in (SC, SG))  # beside arithmetic
        returned = (SP - 1) * wide + 2 * SP * in_float32[2] / COPIED
        return Formula(
            gathered / SC + sympy.Max(even, rest) + joined + 2 * SC * KERNEL,
            (gathered + returned) / SG
            + sympy.Max(BACKWARD * even, again + returned * (1 - 1 / SG))
            + joined
            + 2 * SG * KERNEL,
            3 * SW * SP * keys / SC,  # as they came, in order, and the next
            (3 * SW * SP * keys + in_float32[1] + 3 * SP * in_float32[2]) / SG,
        )
    if schedule == "ulysses":
        return formula("hybrid", spec, layout).at({SU: SP})
    assert schedule == "hybrid"
    shared = sympy.Max(1, SU / SK)  # copies of a key head, where there are fewer than ranks
    row = {SH: SH / SU, SK: shared * SK / SU, SQ: SQ * SU, SP: SP / SU}
    beside = formula("ring", spec, layout).at(row)
    count = SC.subs(row, simultaneous=True)
    given = SW * (queries + shared * keys)  # q, k, v and out
    moved = (SU - 1) / SU * given / SL + 2 * LATENCY
    returned = moved + (SU - 1) / SU * (SW * SB * SH * SQ * SD + 4 * shared * keys) / SL
    rest = 1 - 1 / count
    return Formula(
        moved / count + sympy.Max(beside.forward, moved * rest),
        returned / count + sympy.Max(beside.backward, returned * rest),
        2 * given / count + beside.memory,
        2 * (given + 2 * shared * keys) / count + beside.backward_memory,
    )


def _slowest(spec: AttentionSpec, layout: Kind) -> sympy.Expr:
    """Pairs of the rank with the most, in parts of the mean."""
    causal = "causal" in spec.mask.parts and spec.mask.window is None
    return 2 - 1 / SP if causal and layout == "contiguous" else sympy.Integer(1)


def predict(
    spec: AttentionSpec, shape: AttentionShape, layout: Kind, size: int, target: Target,
    link: float | None = None, row: int = 1,
) -> dict[str, Predicted]:  # fmt: skip
    """By schedule, for what one rank has of a site; symbolic sizes as this compilation saw them. `link`:
    bytes/s between ranks, if they were measured. `row`: ranks that share heads, where all are a grid."""
    values = {**_values(shape, size, target, link), SU: row}
    found = {}
    for schedule in SCHEDULES:
        among = sharing(schedule, size, row, layout)
        if not among or hint(shape.heads) % among:
            continue
        each = formula(schedule, spec, layout)
        memory = sympy.Max(each.memory, each.backward_memory) if shape.training else each.memory
        numbers = (float(expr.subs(values)) for expr in (each.forward, each.backward, memory))
        found[schedule] = Predicted(*numbers)
    return found


def alone(spec: AttentionSpec, shape: AttentionShape, size: int, target: Target) -> float:
    """Seconds of the forward pass of the whole sequence, of which `shape` is a rank's part, on one rank."""
    work = formula("ring", spec, "zigzag").forward.subs({SP: 1, SQ: SQ * size})
    return float(work.subs(_values(shape, 1, target, None)))


def _values(shape: AttentionShape, size: int, target: Target, link: float | None) -> dict[Any, Any]:
    on_gpu = target.device == "cuda"
    values: dict[Any, Any] = {SB: shape.batch, SH: shape.heads, SK: shape.kv_heads, SQ: shape.queries}
    values |= {SD: shape.head_dim, SE: shape.value_dim, SP: size, SW: shape.dtype.itemsize}
    values = {symbol: hint(value) for symbol, value in values.items()}
    rates = {SR: RATES["triton"] if on_gpu else CPU_RATE, SL: LINK if on_gpu else CPU_LINK}
    return {**values, **rates, **({} if link is None else {SL: link})}
