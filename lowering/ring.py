"""Attention over a sequence that ranks share, as an operator with autograd.

    kp.attention(q, k, v, operands, scalars, spec) ─▶ kp.context_attention(…, plan)[0]

q, k, v are this rank's tokens, `operands` and `scalars` the whole sequence's. What travels, and when, is
`context.schedules`; every rank of the group has to call the operator, in the same order.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.config import Ranks
from kp_compiler.errors import KPError
from kp_compiler.lowering.attend import by_row
from kp_compiler.lowering.context import divided, order
from kp_compiler.lowering.context.exchange import Peers, group_named
from kp_compiler.lowering.context.layout import Kind, of_local
from kp_compiler.lowering.context.schedules import SCHEDULES, Groups
from kp_compiler.lowering.context.shard import Shard, engine, wide
from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.ops import fragment
from kp_compiler.specs import AttentionSpec

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] scalars"
_PLACES = "(Tensor x, int dim, str plan) -> Tensor"
_FORWARD = f"({_INPUTS}, str plan) -> (Tensor out, Tensor lse)"
_GATHER = "(Tensor x, int dim, Tensor? places, str plan) -> Tensor"
_BACKWARD = (
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, bool wants_sink, str plan)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)"
)


@dataclass(frozen=True)
class Plan:
    """What is known when a graph is compiled. Rank and size stand in it for the sake of caches."""

    spec: AttentionSpec
    schedule: str
    layout: Kind
    group: str  # its name
    rank: int
    size: int
    site: str = ""  # whose attention it is, for errors
    grid: tuple[str, str] | None = None  # where ranks are one: the groups of this one's column and of its row

    @staticmethod
    def of(ranks: Ranks, spec: AttentionSpec, schedule: str, layout: Kind, site: str = "") -> Plan:
        grid = ranks.grid if schedule == "hybrid" else None
        return Plan(spec, schedule, layout, ranks.group, ranks.rank, ranks.size, site, grid)

    def to_json(self) -> str:
        data = {**asdict(self), "spec": self.spec.to_json(), "fingerprint": fingerprint()}
        return json.dumps(data, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Plan:
        data = json.loads(text)
        del data["fingerprint"]
        grid = tuple(data["grid"]) if data["grid"] else None
        return Plan(**{**data, "spec": AttentionSpec.from_json(data["spec"]), "grid": grid})

    def peers(self) -> Peers:
        """Raises ValueError where the group is not the one that the graph was compiled for."""
        group = group_named(self.group)
        here = (group.rank(), group.size())
        if here != (self.rank, self.size):
            raise ValueError(
                f"kp::context_attention: compiled for rank {self.rank} of {self.size}, this is {here[0]} of "
                f"{here[1]}"
            )
        return Peers(group, self.site)

    def groups(self) -> Groups:
        """Of the schedule. Raises as `peers`."""
        if self.grid is None:
            return Groups(self.peers())
        far, near = (Peers(group_named(name), self.site) for name in self.grid)
        return Groups(self.peers(), near, far)

    def shard(self, q: Tensor, operands: list[Tensor], scalars: list[int]) -> Shard:
        places = None
        if self.layout == "documents":
            *operands, places = operands
        layout = of_local(self.layout, self.size, q.shape[2], places)
        if q.shape[2] % layout.each:
            raise KPError(
                f"{self.site or 'a shared sequence'}: a rank's {q.shape[2]} tokens are not the {layout.each} "
                f"equal parts that the layout {self.layout!r} has: shard_sequence adds what is missing"
            )
        return Shard(self.spec, layout, self.rank, operands, scalars)


def context_attention() -> Any:
    """`kp::context_attention`: q [B,H,n,D], k [B,K,n,D], v [B,K,n,E] of this rank, operands and scalars of
    the whole sequence as the plan's spec numbers them, in the layout "documents" followed by
    `sequence_places`; out [B,H,n,E] in q's dtype, laid out as [B,n,H,E], and lse [B,H,n] in float32."""
    _operators()
    return torch.ops.kp.context_attention.default


def gather_sequence() -> Any:
    """`kp::gather_sequence`: every rank's part of x along a dimension, in the order of the sequence, on every
    rank; for what has no gradient. `places`: those of the layout "documents"."""
    _operators()
    return torch.ops.kp.gather_sequence.default


def sequence_places() -> Any:
    """`kp::sequence_places`: of the order that this call is made under, rank after rank, where its tokens lie
    in the sequence, [N]; x has this rank's tokens along a dimension. Raises KPError under no order, and under
    one of another length."""
    _operators()
    return torch.ops.kp.sequence_places.default


@cache
def _operators() -> tuple[Any, ...]:
    """Define the operators, once."""
    key = "CompositeExplicitAutograd"
    run = fragment("context_attention", _FORWARD, {key: _forward}, _forward_fake)
    back = fragment("context_attention_backward", _BACKWARD, {key: _backward}, _backward_fake)
    torch.library.register_autograd("kp::context_attention", _gradients, setup_context=_save, lib=run)
    gather = fragment("gather_sequence", _GATHER, {key: _gather}, _gather_fake)
    tags = (torch.Tag.cudagraph_unsafe,)  # a replay would see the order of the call that was recorded
    places = fragment("sequence_places", _PLACES, {key: _places}, _places_fake, tags=tags)
    return run, back, gather, places


def _places(x: Tensor, dim: int, plan: str) -> Tensor:
    parsed = Plan.parse(plan)
    return order.active(parsed.group, x.shape[dim] * parsed.size).on(x.device).clone()


def _places_fake(x: Tensor, dim: int, plan: str) -> Tensor:
    return x.new_empty(x.shape[dim] * Plan.parse(plan).size, dtype=torch.int64)


def _gather(x: Tensor, dim: int, places: Tensor | None, plan: str) -> Tensor:
    parsed = Plan.parse(plan)
    (found,) = parsed.peers().gather([x.contiguous()], "vectors of masks").wait()
    return of_local(parsed.layout, parsed.size, x.shape[dim], places).joined(found, dim)


def _gather_fake(x: Tensor, dim: int, places: Tensor | None, plan: str) -> Tensor:
    sizes = list(x.shape)
    sizes[dim] = sizes[dim] * Plan.parse(plan).size
    return x.new_empty(sizes)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[int], plan: str
) -> tuple[Tensor, Tensor]:
    parsed = Plan.parse(plan)
    forward, _ = SCHEDULES[parsed.schedule]
    groups = parsed.groups()
    divided.check(groups.every.group, parsed.layout, parsed.site)
    return forward(parsed.shard(q, operands, scalars), groups, q, k, v)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return by_row(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q))


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[int], out: Tensor,
    lse: Tensor, wants_sink: bool, plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parsed = Plan.parse(plan)
    _, backward = SCHEDULES[parsed.schedule]
    delta = engine(q).delta_of(grad, out)
    shard = parsed.shard(q, operands, scalars)
    dq, dk, dv = backward(shard, parsed.groups(), grad, q, k, v, lse, delta)
    dsink = q.new_empty(0)
    if wants_sink and parsed.spec.sink is not None:
        sink = operands[parsed.spec.sink]
        share = torch.where(torch.isinf(lse), 0.0, torch.exp(sink.to(lse.dtype).reshape(1, -1, 1) - lse))
        dsink = -(share * delta).sum((0, 2)).sum_to_size(sink.numel()).view_as(sink).to(sink.dtype)
    return dq, dk, dv, dsink


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, wants_sink, plan = rest
    sink = Plan.parse(plan).spec.sink
    dsink = (
        operands[sink].new_empty(operands[sink].shape) if wants_sink and sink is not None else q.new_empty(0)
    )
    dq, dk, dv = (by_row(x, x.shape[3]) for x in (q, k, v))
    return dq, dk, dv, dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, operands, scalars, plan = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, *operands)
    ctx.scalars, ctx.plan = scalars, plan


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, *operands = ctx.saved_tensors
    sink = Plan.parse(ctx.plan).spec.sink
    wants_sink = sink is not None and bool(ctx.needs_input_grad[3][sink])
    if grad is None:  # the other ranks wait for this one all the same
        grad = torch.zeros_like(out)
    dq, dk, dv, dsink = torch.ops.kp.context_attention_backward(
        grad, q, k, v, operands, ctx.scalars, out, lse, wants_sink, ctx.plan
    )
    of_operands = [dsink if wants_sink and i == sink else None for i in range(len(operands))]
    return dq, dk, dv, of_operands, None if ctx.scalars else [], None
