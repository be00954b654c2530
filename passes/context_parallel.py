"""Share the sequence of a graph among ranks: each runs it on its part of the tokens, attention sees them all.

    kp.attention(q, k, v, [segments], document) ─▶ kp.context_attention(q, k, v, [whole segments], plan)
    arange(n)                                   ─▶ this rank's places in the sequence

Not an option yet. Fires where every operation of the graph treats tokens one by one (`sequence.trace`), every
mask is proved and reads nothing but vectors of its own query and key, and a site asks for nothing else than
schedules can keep. What can't be kept is an error, not a refusal: the graph as it is would compute attention
within parts.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from kp_compiler.errors import KPError
from kp_compiler.lowering import ops, ring
from kp_compiler.lowering.context import pairs
from kp_compiler.lowering.context.layout import Kind
from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import canonical
from kp_compiler.passes import sequence
from kp_compiler.passes.base import Emitter, same
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionSpec
from kp_compiler.writes import erase_orphans

Schedule = Literal["ring", "allgather", "ulysses"]


@dataclass(frozen=True)
class Sharing:
    """Who shares, and how. `group` is a process group's name."""

    group: str
    rank: int
    size: int
    layout: Kind = "zigzag"
    schedule: Schedule = "ring"

    def plan(self, spec: AttentionSpec) -> str:
        return ring.Plan(spec, self.schedule, self.layout, self.group, self.rank, self.size).to_json()


def share(graph: Graph, how: Sharing) -> None:
    """Rewrite a graph whose sites are recognised. Raises KPError where its results would not be those of the
    whole sequence."""
    found = sequence.trace(graph)
    if isinstance(found, Rejection):
        raise KPError(f"the sequence can't be shared: {found}")
    sites = ops.attentions(graph)
    for site in sites:
        if (refused := refusal(site, how)) is not None:
            raise KPError(f"the sequence can't be shared: {refused}")
    whole = _Whole(how, found.tokens)
    for site in sites:
        _attend(site, how, whole)
    for node in found.positions:
        _place(node, how)


def refusal(site: Node, how: Sharing) -> Rejection | None:
    """Why a site's attention over the whole sequence is not what schedules compute."""
    spec, q = ops.spec_of(site), tensor_of(site.args[0])
    assert q is not None
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
    if how.schedule == "ulysses" and q.shape[1] % how.size:
        return Rejection("heads", f"{q.shape[1]} heads can't be divided among {how.size} ranks.")
    return None


def _attend(site: Node, how: Sharing, whole: _Whole) -> None:
    spec, root = ops.spec_of(site), site.meta["kp_root"]
    emit = Emitter(site, site)
    given: Any = site.args[3]
    operands = [whole.of(node, emit) if i in spec.mask.tensors else node for i, node in enumerate(given)]
    both = emit.call(ring.context_attention(), *site.args[:3], operands, [], how.plan(spec))
    site.replace_all_uses_with(emit.call(operator.getitem, both, 0), propagate_meta=False)
    arguments = site.all_input_nodes
    site.graph.erase_node(site)
    erase_orphans(root.graph, [root, *arguments])


def _place(node: Node, how: Sharing) -> None:
    """Who uses local indices gets places in the sequence."""
    users = list(node.users)
    emit = Emitter(node.next, node)
    tokens = emit.size(node, 0)
    if how.layout == "contiguous":
        placed = emit.call(torch.add, node, emit.product([tokens, how.rank]))
    else:  # the first half is the rank's part from the front, the second the one from the back
        half = tokens // 2 if isinstance(tokens, int) else emit.call(operator.floordiv, tokens, 2)
        front = emit.call(torch.add, node, emit.product([half, how.rank]))
        back = emit.call(torch.add, node, emit.product([half, 2 * how.size - 2 - how.rank]))
        placed = emit.call(torch.where, emit.call(torch.lt, node, half), front, back)
    for user in users:
        user.replace_input_with(node, placed)


class _Whole:
    """Vectors of masks, of the whole sequence: made as a rank's are, of whole inputs and all indices."""

    def __init__(self, how: Sharing, tokens: Any) -> None:
        self.how, self.tokens = how, tokens
        self.made: dict[Node, Any] = {}

    def of(self, node: Node, emit: Emitter) -> Node:
        """Raises KPError where that is not one element for each token."""
        found = self._made(node, emit)
        mine, theirs = tensor_of(node), tensor_of(found)
        assert mine is not None and theirs is not None
        if not same(theirs.shape[-1], self.how.size * mine.shape[-1]) or not same(
            mine.shape[-1], self.tokens
        ):
            raise KPError(
                f"the sequence can't be shared: the mask reads {node.name}, which can't be made whole"
            )
        return found

    def _made(self, node: Any, emit: Emitter) -> Any:
        if not isinstance(node, Node) or node.op == "get_attr":
            return node
        if node not in self.made:
            self.made[node] = self._make(node, emit)
        return self.made[node]

    def _make(self, node: Node, emit: Emitter) -> Any:
        if node.op == "placeholder":
            along = sequence.given(node, self.tokens)
            if along is None:
                return node
            plan = self.how.plan(AttentionSpec(1.0))
            return emit.call(ring.gather_sequence(), node, along.dim, plan)
        op, value = canonical(node), tensor_of(node)
        if op is not None and op.name == "arange" and value is not None and same(value.shape[0], self.tokens):
            count = emit.product([emit.size(node, 0), self.how.size])
            return emit.call(torch.arange, count, dtype=value.dtype, device=value.device)
        function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        args, kwargs = torch.fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda each: self._argument(each, op, emit)
        )
        return emit.call(function, *args, **kwargs)

    def _argument(self, each: Any, op: Any, emit: Emitter) -> Any:
        """A size that is the tokens' is the whole sequence's."""
        sized = op is not None and op.name in ("expand", "view", "full", "repeat")
        if sized and isinstance(each, int) and not isinstance(each, bool) and each == self.tokens:
            return each * self.how.size
        return self._made(each, emit)
