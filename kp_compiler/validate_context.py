"""Whether ranks can share sequences, and what it will take: `kp.validate_context_parallel`,
`kp.estimate_memory`, and `kp doctor --distributed`.

    torchrun --nproc-per-node 4 -m kp_compiler.cli doctor --distributed
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import sympy
import torch
import torch.distributed as dist
from torch import Tensor

from kp_compiler import context_cost, cost
from kp_compiler import target as targets
from kp_compiler.config import Ranks
from kp_compiler.context_cost import SYMBOLS, Predicted
from kp_compiler.documents import CHUNKS, balanced_layout
from kp_compiler.errors import KPConfigError
from kp_compiler.lowering import reference, ring
from kp_compiler.lowering.context.exchange import Peers, group_named
from kp_compiler.lowering.context.layout import Kind, Layout, Ordered
from kp_compiler.lowering.context.schedules import SCHEDULES
from kp_compiler.sharding import ranks_of
from kp_compiler.specs import CAUSAL, AttentionShape, AttentionSpec

LINK_BYTES = 2**26  # of a message that tells the speed of a link
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
TOKENS, MOST = 256, 16384  # of each rank, and of all, where schedules are compared with one process

_N = sympy.Symbol("N", positive=True, integer=True)
_SYMBOLS = {
    "B": cost.SB, "H": cost.SH, "K": cost.SK, "N": _N, "D": cost.SD, "E": cost.SE, "P": SYMBOLS.ranks,
    "U": SYMBOLS.row,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank and one attention site: formulas over B, H (query heads), K (key heads), N (tokens of
    the whole sequence), D, E (head sizes of keys and values), P (ranks) and U (ranks of a row, of "hybrid"),
    or numbers once `at` put sizes in."""

    own: Any  # q, k, v, out and log-sum-exp
    forward: Any  # beside them, of exchanges
    backward: Any  # of exchanges, and of sums of gradients in float32
    among: str = ""  # the size of which heads have to be a multiple

    @property
    def peak(self) -> Any:
        """Of the pass that takes more, with the rank's own tensors."""
        return self.own + sympy.Max(self.forward, self.backward)

    def at(self, **sizes: float) -> Memory:
        """With some of B, H, K, N, D, E, P, U as numbers. Raises KPConfigError for heads that the schedule's
        ranks can't divide."""
        values = cost.sized(_SYMBOLS, sizes)
        if (among := sizes.get(self.among)) and sizes.get("H", among) % among:
            raise KPConfigError(f"H: {sizes['H']} heads can't be divided among {self.among}={among} ranks")
        own, forward, backward = (x.subs(values) for x in (self.own, self.forward, self.backward))
        return Memory(own, forward, backward, self.among)


def estimate_memory(schedule: str = "ring", *, dtype: torch.dtype = torch.bfloat16) -> Memory:
    """What attention over a shared sequence takes by a schedule, of tensors in `dtype`.

    kp.estimate_memory("ring").at(B=1, H=32, K=8, N=1048576, D=128, E=128, P=64).peak / 2**30
    """
    if schedule not in SCHEDULES:
        raise KPConfigError(f"schedule: got {schedule!r}, expected one of {', '.join(map(repr, SCHEDULES))}")
    sizes = replace(SYMBOLS, queries=_N / SYMBOLS.ranks, width=dtype.itemsize)
    found = context_cost.formula(schedule, AttentionSpec(1.0, CAUSAL), "zigzag", sizes)
    own = sizes.width * (sizes.matrices + sizes.keys) + sizes.float32(1)
    return Memory(own, found.memory, found.backward_memory, {"ulysses": "P", "hybrid": "U"}.get(schedule, ""))


@dataclass(frozen=True)
class ContextCheck:
    """What a mesh can do. Every rank has the same."""

    ranks: int
    backend: str
    link: float  # bytes/s from a rank to the next one, all at once; the slowest
    errors: dict[str, float]  # by schedule, of a small causal site against one process, relatively
    predicted: dict[str, Predicted]  # by schedule, of the site asked about
    alone: float  # seconds of its forward pass on one rank, predicted
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.problems

    def efficiency(self, schedule: str) -> float:
        """Predicted share of the ranks' time that is arithmetic of attention, forward."""
        return self.alone / (self.ranks * self.predicted[schedule].forward)

    def rows(self) -> list[tuple[str, ...]]:
        heading = ("schedule", "error", "forward ms", "backward ms", "efficiency", "MiB of buffers")
        rows: list[tuple[str, ...]] = [heading]
        for name, each in self.predicted.items():
            milliseconds = (f"{1e3 * seconds:.3g}" for seconds in (each.forward, each.backward))
            error = f"{self.errors[name]:.1e}" if name in self.errors else "-"
            more = (f"{self.efficiency(name):.0%}", f"{each.memory / 2**20:.0f}")
            rows.append((name, error, *milliseconds, *more))
        return rows


def validate_context_parallel(
    mesh: Any,
    *,
    tokens: int = 131072,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    layout: Kind = "zigzag",
) -> ContextCheck:
    """Try every schedule on a small site of these heads, measure the link, and predict what a causal site of
    `tokens` in all would take; "documents" is tried in an order of one document. What schedule="auto" of the
    mesh predicts from then on takes the link that was measured. Every rank of `mesh` has to call it. Problems
    are listed, not raised; raises KPConfigError for a mesh or sizes that make no sense."""
    ranks = ranks_of(mesh)
    for name, value in (
        ("tokens", tokens),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("head_dim", head_dim),
        ("batch", batch),
    ):
        if value < 1:
            raise KPConfigError(f"{name}: got {value}, expected at least one")
    if heads % kv_heads:
        raise KPConfigError(f"heads: got {heads} for {kv_heads} of keys, expected a multiple")
    if dtype not in BOUNDS:
        raise KPConfigError(f"dtype: got {dtype}, expected one of {', '.join(map(str, BOUNDS))}")
    if layout not in get_args(Kind):
        raise KPConfigError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, get_args(Kind)))}")
    device = torch.device(ranks.device)
    peers = Peers(group_named(ranks.group), "validate_context_parallel")
    small = _small(layout, ranks.size)
    parts = CHUNKS * ranks.size if isinstance(small, Ordered) else small.parts
    problems = []
    spec = AttentionSpec(head_dim**-0.5, CAUSAL)
    mine, want = _site(spec, small, ranks.rank, (heads, kv_heads, head_dim), dtype, device)
    if tokens % parts:
        problems.append(f"{tokens} tokens are not {parts} equal parts: shard_sequence will add some")
    errors = {}
    for name in SCHEDULES:
        sharing = ranks.sharing(name, layout)
        if not sharing:
            continue
        if heads % sharing:
            problems.append(f"{name}: {heads} heads can't be divided among {sharing} ranks")
            continue
        off = _error(name, spec, ranks, small, mine, want)
        errors[name] = _most(off, peers, device)
        if not errors[name] < BOUNDS[dtype]:
            problems.append(f"{name}: off by {errors[name]:.1e} from one process")
    link = context_cost.links[ranks.group] = _link(peers, device)
    each = -(-tokens // ranks.size)
    shape = AttentionShape(
        batch, heads, kv_heads, each, each, head_dim, head_dim, dtype, device.type, training=True
    )
    target = targets.detect(device)
    predicted = context_cost.predict(spec, shape, layout, ranks.size, target, link, row=ranks.row)
    alone = context_cost.alone(spec, shape, ranks.size, target)
    backend = str(dist.get_backend(peers.group))
    return ContextCheck(ranks.size, backend, link, errors, predicted, alone, tuple(problems))


def _small(layout: Kind, size: int) -> Layout:
    tokens = size * max(CHUNKS, min(TOKENS, MOST // size) // CHUNKS * CHUNKS)
    if layout == "documents":
        return balanced_layout(torch.arange(tokens), size)[0]
    return Layout(layout, size, tokens)


def _site(
    spec: AttentionSpec, whole: Layout, rank: int, sizes: tuple[int, int, int], dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """A rank's q, k and v of a small site of H, K and D, and their result, from everyone's in float64."""
    heads, kv_heads, width = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, whole.tokens, width) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    places = whole.positions(rank, device)
    mine = [x.index_select(2, places) for x in (q, k, v)]
    by_head = zip(mine[0].chunk(kv_heads, 1), k.split(1, 1), v.split(1, 1), strict=True)
    want = []
    for queries, key, value in by_head:
        exact = queries.double(), key.double(), value.double()
        want.append(reference.attention_over(*exact, [], [], spec, rows=places))
    return mine, torch.cat(want, 1)


def _error(
    schedule: str, spec: AttentionSpec, ranks: Ranks, whole: Layout, mine: list[Tensor], want: Tensor
) -> float:
    """Of this rank's result."""
    order = [whole.places.to(want.device)] if isinstance(whole, Ordered) else []
    plan = ring.Plan.of(ranks, spec, schedule, whole.kind, "validate_context_parallel")
    got, _ = ring.context_attention()(*mine, order, [], plan.to_json())
    return float((got.double() - want).norm() / want.norm())


def _link(peers: Peers, device: torch.device) -> float:
    """Bytes/s while every rank sends to the next one; of the slowest rank, the best of some tries."""
    if peers.size == 1:
        return float("inf")
    x = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(4):
        dist.barrier(peers.group)
        start = time.perf_counter()
        (received,) = peers.shift([x], "a message").wait()
        _ = int(received[-1])  # it is there
        best = min(best, time.perf_counter() - start)
    return LINK_BYTES / _most(best, peers, device)


def _most(value: float, peers: Peers, device: torch.device) -> float:
    """The largest of all ranks' values."""
    x: Tensor = torch.tensor([value], dtype=torch.float32, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=peers.group)
    return float(x)
