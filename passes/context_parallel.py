"""Share the sequence of a graph among ranks: each runs it on its part of the tokens, attention sees them all.

    kp.attention(q, k, v, [segments], document) ─▶ kp.context_attention(q, k, v, [whole segments], plan)
    arange(n)                                   ─▶ this rank's places in the sequence

Fires where every operation of the graph treats tokens one by one (`sequence.trace`), every mask is proved and
reads nothing but vectors of its own query and key, and a site asks for nothing else than schedules can keep.
What can't be kept is an error, not a refusal: the graph as it is would compute attention within parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler import context_cost
from kp_compiler.config import Ranks, RingAttentionConfig
from kp_compiler.errors import KPError
from kp_compiler.lowering import ops, ring
from kp_compiler.lowering.context import pairs
from kp_compiler.lowering.context.layout import Kind
from kp_compiler.metadata import bodies, tensor_of, value_of
from kp_compiler.normalize import canonical
from kp_compiler.passes import sequence
from kp_compiler.passes.attention import shape_of
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Match,
    Tier,
    inspected,
    module_of,
    same,
    settle,
    source_of,
)
from kp_compiler.passes.base import Kind as SiteKind
from kp_compiler.passes.raise_attention import RaiseAttention
from kp_compiler.passes.sequence_state import counts_from_zero
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionSpec

_PLACED = "kp_placed"  # of places in the sequence: the local indices that they were made of
CHOOSING = "ulysses"  # whose ranks see all keys of their heads, as those who choose blocks have to


@dataclass(frozen=True)
class Sharing:
    """Who shares, and how the tokens lie."""

    ranks: Ranks
    layout: Kind = "zigzag"

    def plan(self, spec: AttentionSpec, schedule: str = "ring", site: str = "") -> str:
        return ring.Plan.of(self.ranks, spec, schedule, self.layout, site).to_json()


class ContextParallel:
    """See the module docstring."""

    name = "context_parallel"
    tier: Tier = "distributed"
    kind: SiteKind = "attention"
    final = True
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        if not ctx.calls:  # the graph itself comes before its checkpoint bodies
            ctx.program[_Program] = _Program(ctx.gm, _sharing(self.settings(ctx), ctx))
        program: _Program = ctx.program[_Program]
        if program.how.ranks.size == 1:
            return Rejection("one-rank", f"{self.name}.mesh has one rank, which has the whole sequence.")
        program.check(ctx)
        return None

    def sites(self, graph: Graph) -> Iterator[Node]:
        yield from ops.attentions(graph)

    def inspect(self, site: Node, ctx: Context) -> Match:
        program, config = ctx.program[_Program], self.settings(ctx)
        spec, shape = ops.spec_of(site), shape_of(site, ctx)
        if (refused := refusal(site)) is not None:
            raise _error(refused)
        ranks = program.how.ranks
        how, link = program.how, context_cost.links.get(ranks.group)
        costs = context_cost.predict(spec, shape, how.layout, ranks.size, ctx.target, link, ranks.row)
        schedule, why = _schedule(config, site, program.how, costs)
        return Match(
            site,
            schedule,
            impl=schedule,
            spec=str(spec),
            shape=shape.describe(),
            predicted={name: each.describe() for name, each in costs.items()} if ctx.target.sm else None,
            notes=(why,) if why is not None else (),
        )

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        program: _Program = ctx.program[_Program]
        program.place_positions()
        return program.attend(match.site, match.data, ctx)

    def settings(self, ctx: Context) -> RingAttentionConfig:
        return ctx.config.context_parallel


class _Program:
    """A graph and its checkpoint bodies, whose sequence is shared."""

    def __init__(self, gm: GraphModule, how: Sharing) -> None:
        self.how, self.gm = how, gm
        self.found: Any = None
        self.whole: dict[Graph, _Whole] = {}
        self.placed = False
        self.places: Node | None = None

    def check(self, ctx: Context) -> None:
        """Raises KPError where the graph's results would not be those of the whole sequence."""
        if self.found is None:
            self.found = sequence.trace(self.gm)
        if isinstance(self.found, Rejection):
            why = self.found
            if why.code == "no-site" and (seen := self._not_recognised(ctx)):
                why = replace(why, text=f"{why.text} Not recognised: {'; '.join(seen)}")
            raise _error(why)

    def _not_recognised(self, ctx: Context) -> list[str]:
        """What may be attention, and why it is no site."""
        found = inspected(RaiseAttention(), self.gm, ctx.config, ctx.target)
        refused = ((site, why) for site, why in found if isinstance(why, Rejection))
        return list(dict.fromkeys(f"{module_of(site) or source_of(site)}: {why}" for site, why in refused))

    def place_positions(self) -> None:
        if not self.placed:
            self.placed = True
            calls = {body.graph: calls for body, calls in bodies(self.gm)}
            for node in self.found.positions:
                _place(node, self.how, self._places_in(node, calls[node.graph]))

    def attend(self, site: Node, schedule: str, ctx: Context) -> Node:
        spec = ops.spec_of(site)
        emit = Emitter(site, site)
        given: Any = site.args[3]
        whole = self._whole(ctx)
        operands = [whole.of(node, site) if i in spec.mask.tensors else node for i, node in enumerate(given)]
        if self.how.layout == "documents":
            operands.append(self._places_in(site, ctx.calls))
        plan = self.how.plan(spec, schedule, module_of(site) or source_of(site))
        both = emit.call(ring.context_attention(), *site.args[:3], operands, [], plan)
        out = emit.call(operator.getitem, both, 0)
        settle(site, out)
        return out

    def _whole(self, ctx: Context) -> _Whole:
        around = self.whole.setdefault(self.gm.graph, _Whole(self.how, self.found.tokens, self._places))
        if not ctx.calls:
            return around
        return self.whole.setdefault(
            ctx.gm.graph, _Whole(self.how, self.found.tokens, self._places, around, ctx.calls)
        )

    def _places(self) -> Node | None:
        """In the graph itself, of the layout "documents", where everyone's tokens lie."""
        if self.how.layout != "documents" or self.places is not None:
            return self.places
        site = next(site for body, _ in bodies(self.gm) for site in ops.attentions(body.graph))
        device = value_of(site.args[0]).device
        inputs = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        inputs.sort(key=lambda node: getattr(value_of(node), "device", None) != device)  # its own first
        first = next(node for node in self.gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
        for node in inputs:
            along = sequence.given(node, self.found.tokens)
            if along is not None:
                plan = self.how.plan(AttentionSpec(1.0))
                self.places = Emitter(first, node).call(ring.sequence_places(), node, along.dim, plan)
                return self.places
        raise _error(Rejection("no-input", "No input of the graph has its tokens, whose order is asked for."))

    def _places_in(self, node: Node, calls: tuple[Node, ...]) -> Node | None:
        """The same where `node` is, which may be in a checkpoint's body."""
        return ops.import_node(self._places(), node, calls)  # type: ignore[no-any-return]


def _error(why: Rejection) -> KPError:
    return KPError(f"the sequence can't be shared: {why}")


def refusal(site: Node) -> Rejection | None:
    """Why a site's attention over the whole sequence is not what schedules compute."""
    spec = ops.spec_of(site)
    if spec.mask.kind == "tensor":
        return Rejection("mask-unproved", "A mask that is not proved is one of a part of the sequence.")
    if pairs.local(spec.mask) is None:
        return Rejection("mask", f"The mask {spec.mask} reads more than its own query and key.")
    if spec.mask.scalars:
        return Rejection("mask", f"The mask {spec.mask} depends on a size, which is that of a part here.")
    if spec.biases:
        return Rejection("bias", "A bias is made for a part of the sequence.")
    if spec.dropout_p:
        return Rejection("dropout", "Schedules have no dropout.")
    if spec.dead_rows in ("mean", "nan"):
        return Rejection("dead-rows", "Rows without a key are zeros in every schedule.")
    return None


def _schedule(
    config: RingAttentionConfig, site: Node, how: Sharing, costs: dict[str, context_cost.Predicted]
) -> tuple[str, Rejection | None]:
    """The schedule of a site, and what there is to say of it."""
    asked = getattr(config, "schedule", "ring")
    if ops.spec_of(site).sparse is not None and asked == "auto":
        asked = CHOOSING
    if asked != "auto":
        sharing = how.ranks.sharing(asked, how.layout)
        if not sharing:
            other = "a layout that is not 'documents', and " if how.layout == "documents" else ""
            text = f"hybrid needs {other}a mesh of two dimensions, of which rows share heads."
            raise _error(Rejection("mesh", text))
        if asked not in costs:
            heads = tensor_of(site.args[0]).shape[1]  # type: ignore[union-attr]
            raise _error(Rejection("heads", f"{heads} heads can't be divided among {sharing} ranks."))
        return asked, None
    limit = getattr(config, "memory", None)
    fitting = {name: each for name, each in costs.items() if limit is None or each.memory <= limit * 2**30}
    if not fitting:
        least = min(costs, key=lambda name: costs[name].memory)
        needed = costs[least].memory / 2**30
        return least, Rejection(
            "memory", f"{least} takes {needed:.3g} GiB, more than memory={limit:g} allows."
        )
    return min(fitting, key=lambda name: fitting[name].seconds), None


def _sharing(config: RingAttentionConfig, ctx: Context) -> Sharing:
    ranks = config.mesh
    assert ranks is not None
    if ranks.device != ctx.target.device and not ctx.target.assumed:
        raise _error(
            Rejection(
                "mesh", f"The mesh is one of {ranks.device} devices, the model is on {ctx.target.device}."
            )
        )
    return Sharing(ranks, config.layout)


def _place(node: Node, how: Sharing, places: Node | None) -> None:
    """Who uses local indices gets places in the sequence."""
    users = list(node.users)
    emit = Emitter(node.next, node)
    tokens = emit.size(node, 0)
    if how.layout == "documents":
        mine = emit.call(torch.narrow, places, 0, emit.product([tokens, how.ranks.rank]), tokens)
        value = tensor_of(node)
        assert value is not None
        placed = emit.call(torch.Tensor.to, mine, value.device, value.dtype)
    elif how.layout == "contiguous":
        placed = emit.call(torch.add, node, emit.product([tokens, how.ranks.rank]))
    else:  # the first half is the rank's part from the front, the second the one from the back
        half = tokens // 2 if isinstance(tokens, int) else emit.call(operator.floordiv, tokens, 2)
        front = emit.call(torch.add, node, emit.product([half, how.ranks.rank]))
        back = emit.call(torch.add, node, emit.product([half, 2 * how.ranks.size - 2 - how.ranks.rank]))
        placed = emit.call(torch.where, emit.call(torch.lt, node, half), front, back)
    placed.meta[_PLACED] = node
    for user in users:
        user.replace_input_with(node, placed)


class _Whole:
    """Vectors of masks, of the whole sequence: made as a rank's are, of whole inputs and all indices. Inputs
    of a checkpoint's body are made whole around it and handed to it."""

    def __init__(
        self, how: Sharing, tokens: Any, places: Callable[[], Node | None], around: _Whole | None = None,
        calls: tuple[Node, ...] = (),
    ) -> None:  # fmt: skip
        self.how, self.tokens, self.places, self.around, self.calls = how, tokens, places, around, calls
        self.made: dict[Node, Any] = {}

    def of(self, node: Node, reader: Node) -> Node:
        """`node` for the whole sequence, before `reader`. Raises KPError where that is not one element for
        each token."""
        found = self._made(node, Emitter(reader, reader))
        mine, theirs = tensor_of(node), tensor_of(found)
        assert mine is not None and theirs is not None
        if not same(theirs.shape[-1], self.how.ranks.size * mine.shape[-1]) or not same(
            mine.shape[-1], self.tokens
        ):
            raise _error(Rejection("mask", f"The mask reads {node.name}, which can't be made whole."))
        return found

    def _made(self, node: Any, emit: Emitter) -> Any:
        if not isinstance(node, Node) or node.op == "get_attr":
            return node
        node = node.meta.get(_PLACED, node)
        if node not in self.made:
            self.made[node] = self._make(node, emit)
        return self.made[node]

    def _make(self, node: Node, emit: Emitter) -> Any:
        if node.op == "placeholder":
            return self._gathered(node, emit) if self.around is None else self._handed(node, emit)
        op, value = canonical(node), tensor_of(node)
        if op is not None and op.name == "arange" and value is not None and same(value.shape[0], self.tokens):
            if not counts_from_zero(op):
                raise _error(
                    Rejection("mask", f"{node.name} counts tokens, and not from zero in steps of one.")
                )
            count = emit.product([emit.size(node, 0), self.how.ranks.size])
            return emit.call(torch.arange, count, dtype=value.dtype, device=value.device)
        function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        args, kwargs = torch.fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda each: self._argument(each, op, emit)
        )
        return emit.call(function, *args, **kwargs)

    def _gathered(self, node: Node, emit: Emitter) -> Node:
        along = sequence.given(node, self.tokens)
        if along is None:
            return node
        plan = self.how.plan(AttentionSpec(1.0))
        return emit.call(ring.gather_sequence(), node, along.dim, self.places(), plan)

    def _handed(self, node: Node, emit: Emitter) -> Node:
        assert self.around is not None
        outer = node.meta.get("kp_outer")
        if outer is None:
            place = node.graph.find_nodes(op="placeholder").index(node)
            given = {call.args[1 + place] for call in self.calls}
            if len(given) > 1:
                raise _error(Rejection("shared-body", f"Calls of a checkpoint's body differ in {node.name}."))
            (outer,) = given
        whole = self.around._made(outer, Emitter(self.calls[0], self.calls[0]))
        return node if whole is outer else ops.import_node(whole, emit.anchor, self.calls)

    def _argument(self, each: Any, op: Any, emit: Emitter) -> Any:
        """A size that is the tokens' is the whole sequence's."""
        sized = op is not None and op.name in ("expand", "view", "full", "repeat")
        if sized and isinstance(each, int) and not isinstance(each, bool) and each == self.tokens:
            return each * self.how.ranks.size
        return self._made(each, emit)
