"""Which dimension of each tensor is the sequence that ranks share, and whether tokens are treated one by one.

    found = trace(gm)        Sharing: the sequence's dimension by node, what positions are made of, what sums
                             over tokens; or a Rejection that names the first operation that mixes them

Every rank runs the same graph on its part of the tokens. That is the whole graph's result where each
operation is one of the tokens by themselves, or an attention site, or makes positions, which have to be the
sequence's. Sums over a rank's tokens, as losses are, may only be results. Anything else is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler.lowering import ops
from kp_compiler.metadata import CHECKPOINT_OPS, bodies, tensor_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import same
from kp_compiler.passes.sequence_rules import ADDS_UP, LOSSES, REDUCTIONS
from kp_compiler.passes.sequence_sorts import GROUPED, Sorts
from kp_compiler.passes.sequence_state import (
    POINTWISE,
    SIZES,
    Along,
    Mixed,
    Sharing,
    argument,
    counts_from_zero,
    first,
    name_of,
)
from kp_compiler.report import Rejection
from kp_compiler.writes import Writes, storage_of, written

# Rules that take arguments by their canonical names; of the first, none may be in place
LAYOUTS = {
    "transpose", "permute", "view", "squeeze", "unsqueeze", "expand", "repeat", "repeat_interleave",
}  # fmt: skip
CANONICAL = {"linear", "matmul", "bmm", "addmm", "einsum", "outer", "embedding", "cat", "getitem"}
# What sums become on their way out: sums of them, and parts of a rank's own count or of another number
_OF_SUMS = {
    "add", "sub", "mul", "div", "neg", "sum", "mean", "cast", "to", "type", "clone", "detach", "clamp_min",
    "clamp", "view", "unsqueeze", "squeeze", "getitem", "stack", "cat", "where", "float",
}  # fmt: skip


def trace(gm: GraphModule) -> Sharing | Rejection:
    """Of a graph and the checkpoint bodies under it. The tokens of a rank are as many as queries of its
    attention sites."""
    sites = [site for each, _ in bodies(gm) for site in ops.attentions(each.graph)]
    if not sites:
        return Rejection("no-site", "The graph has no attention site: what its sequence is can't be told.")
    q = tensor_of(sites[0].args[0])
    assert q is not None
    tracer = _Tracer(gm.graph, q.shape[2])
    try:
        tracer.visit_all(gm.graph)
    except Mixed as mixed:
        node = tracer.at
        assert node is not None
        return Rejection("mixes-tokens", f"{node.name} ({name_of(node)}): {mixed}.")
    return tracer.found


def _live(graph: Graph) -> set[Node]:
    """Nodes that results depend on, where sites stand for what they were recognised in. Of a site these are
    queries, keys and values: vectors of its mask are the whole sequence's, made apart."""
    roots = {node.meta["kp_root"]: node.meta["kp_out"] for node in graph.nodes if "kp_root" in node.meta}
    found: set[Node] = set()
    all_writes = Writes(graph)
    writes, queue = all_writes.by_storage, [graph.output_node()]
    for written_to, writers in writes.items():
        queue += writers if written_to in all_writes.external else []  # which callers read
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        queue += [roots.get(each, each) for each in _read(node)]
        storage = storage_of(node)
        queue += writes.pop(storage, []) if storage is not None else []  # which have no users
    return found


def _read(node: Node) -> list[Any]:
    """What a live node reads; of the arguments of a checkpoint body, what is live in there."""
    if ops.is_attention(node):
        return list(node.args[:3])
    if str(node.target) not in CHECKPOINT_OPS:
        return node.all_input_nodes
    body = _body_of(node)
    live = _live(body)
    arguments = zip(body.find_nodes(op="placeholder"), node.args[1:], strict=True)
    return [outer for inner, outer in arguments if inner in live and isinstance(outer, Node)]


def _body_of(call: Node) -> Graph:
    module, body = call.graph.owning_module, call.args[0]
    assert module is not None and isinstance(body, Node)
    return module.get_submodule(str(body.target)).graph  # type: ignore[return-value]


def given(node: Node, tokens: Any) -> Along | None:
    """Of an input that is no weight: [B,tokens,…], [tokens], or [B,H,tokens,D] as attention takes it."""
    value = tensor_of(node)
    if value is None or isinstance(value, torch.nn.Parameter) or "_buffers_" in node.name:
        return None
    places = {0: (), 1: (0,), 4: (1, 2)}.get(value.dim(), (1,))
    return next((Along(dim) for dim in places if same(value.shape[dim], tokens)), None)


class _Tracer(Sorts):
    def __init__(self, top: Graph, tokens: Any) -> None:
        super().__init__(tokens)
        self.top = top
        self.at: Node | None = None  # what is looked at
        self.results: dict[Node, Any] = {}  # of the body that a node calls

    def visit_all(self, graph: Graph) -> None:
        live = _live(graph)
        self.writes |= set(Writes(graph).by_storage)
        for node in graph.nodes:
            if node in live:
                self.at = node
                self._take(node, self._along(node))
                self._look_at_writes(node)
                self.visited.add(node)

    def _look_at_writes(self, node: Node) -> None:
        """What tokens, or sums over them, are written into has to have the sequence, too."""
        targets = written(node) if str(node.target) not in CHECKPOINT_OPS else []
        if not targets or not any(
            each in self.found.along or each in self.found.sums for each in node.all_input_nodes
        ):
            return
        if node.kwargs.get("out") is not None or not self.found.along.keys() >= set(targets):
            raise Mixed("it writes tokens into what is not shared among ranks")

    def _take(self, node: Node, along: Along | None) -> None:
        if along is not None:
            self.found.along[node] = along

    def _body(self, node: Node) -> None:
        """What a checkpoint body makes of its arguments."""
        body = _body_of(node)
        for inner, outer in zip(body.find_nodes(op="placeholder"), node.args[1:], strict=True):
            along = self.found.along.get(outer)  # type: ignore[arg-type]
            if (
                self.found.along.get(inner, along) != along
                or outer in self.found.sums
                or outer in self.numbers
            ):
                raise Mixed("the body of a checkpoint is called with a sequence and with something else")
            self._take(inner, along)
            if outer in self.uniform:
                self.uniform.add(inner)
        self.visit_all(body)
        self.at, self.results[node] = node, body.output_node().args[0]

    def _result(self, node: Node) -> Along | None:
        """One of a body's results."""
        inner = self.results[node.args[0]][node.args[1]]  # type: ignore[index]
        if inner in self.found.sums:
            self.found.sums.append(node)
        return self.found.along.get(inner)

    def _along(self, node: Node) -> Along | None:
        if node.op == "placeholder":
            inner = node.graph is not self.top
            along = self.found.along.get(node) if inner else given(node, self.tokens)
            value = tensor_of(node)
            if along is not None and value is not None and value.dtype in (torch.int32, torch.int64):
                self.places.add(node)
            return along
        if node.op in ("output", "get_attr"):
            if any(self._is_sorted(each) for each in node.all_input_nodes):
                raise Mixed("what the graph gives lies in the order of a sort")
            return None
        if str(node.target) in CHECKPOINT_OPS:
            self._body(node)
            return None
        if node.target is operator.getitem and node.args[0] in self.results:
            return self._result(node)
        if (half := self.one_of_two(node)) is not None:
            return half
        op, name = canonical(node), name_of(node)
        if op is not None and name == "arange":
            return self._positions(node, op)
        if name in SIZES and tensor_of(node) is None:
            return None
        if any(each in self.numbers for each in node.all_input_nodes):
            return self.numbered(node, name)
        if self._summed(node, op, name):
            return self.grouped(node) if name in GROUPED else None
        if ops.is_attention(node):
            return self._site(node)
        if name in ADDS_UP and any(self.is_long(each) for each in node.all_input_nodes):
            raise Mixed("it adds up as many as a rank has tokens")
        if not any(each in self.found.along for each in node.all_input_nodes):
            if self.is_uniform(node, op):
                self.uniform.add(node)
            return None
        if name in POINTWISE:
            return self.pointwise(node)
        if name in LOSSES:
            self._loss(node, op, name)
            return None
        if name in REDUCTIONS:
            return self.reduced(node, op, name)
        if name in GROUPED:
            return self.grouped(node)
        rule: Callable[[Node, Op | None], Along | None] | None = getattr(self, f"rule_{name}", None)
        if rule is None or (name in LAYOUTS and written(node)):
            raise Mixed("it is not known to treat tokens one by one")
        if op is None and name in (*LAYOUTS, *CANONICAL):
            raise Mixed("its arguments are not understood")
        return rule(node, op)

    def _summed(self, node: Node, op: Op | None, name: str) -> bool:
        """Whether a node makes something of sums over a rank's tokens. Raises Mixed where that is not one of
        them, too."""
        sums = [each for each in node.all_input_nodes if each in self.found.sums]
        if not sums:
            return False
        if len(sums) == 1 and self.counted(node, op, name, sums[0]):
            return True
        if any(each in self.found.along for each in node.all_input_nodes):
            raise Mixed("it takes a sum over the tokens of one rank")
        if name not in _OF_SUMS or written(node) or not self._is_linear(node, name):
            raise Mixed("a sum over the tokens of one rank may only be a result")
        self.found.sums.append(node)
        return True

    def _is_linear(self, node: Node, name: str) -> bool:
        """Whether sums over all tokens come of what a node makes of each rank's: no products of sums, nothing
        added to them, and what is clamped, as counts are, only divides."""
        sums = self.found.sums
        read: list[Node] = []
        torch.fx.map_arg((node.args, node.kwargs), read.append)
        times = sum(each in sums for each in read)
        if name == "mul":
            return times == 1
        if name == "div":
            return first(node) in sums
        if name in ("add", "sub"):
            others = [x for x in (first(node), argument(node, 1, "other")) if x not in sums]
            return all(isinstance(x, int | float) and x == 0 for x in others)
        if name == "clamp":
            return all(name_of(user) == "div" and argument(user, 1, "other") is node for user in node.users)
        value = tensor_of(node)
        return value is None or value.dtype is not torch.bool

    def _is_sorted(self, node: Node) -> bool:
        along = self.found.along.get(node)
        return node in self.numbers or (along is not None and along.order is not None)

    # --------------------------------------------------------------------------------------------- beginnings

    def _positions(self, node: Node, op: Op) -> Along | None:
        value = tensor_of(node)
        assert value is not None
        if not same(value.shape[0], self.tokens):
            return None
        if self.only_numbers_rows(node):
            return None
        if counts_from_zero(op):
            self.found.positions.append(node)
            self.places.add(node)
            return Along(0)
        raise Mixed("it counts tokens, and not from zero in steps of one")

    def _site(self, node: Node) -> Along:
        for each in node.args[:3]:
            if self.found.along.get(each) != Along(2):  # type: ignore[call-overload]
                raise Mixed("queries, keys or values do not have the sequence along their third dimension")
        return Along(2)

    def _loss(self, node: Node, op: Op | None, name: str) -> None:
        given = op["input"] if op is not None else argument(node, 0, "input")
        along, value = self.found.along.get(given), tensor_of(given)
        if along is None or value is None:
            raise Mixed("what it scores does not have the sequence")
        target = argument(node, 1, "target")
        if name in ("cross_entropy", "nll_loss"):
            self._scored(along, value, target)
        else:
            self.aligned([given, target])
        if any(each in self.found.along for each in set(node.all_input_nodes) - {given, target}):
            raise Mixed("it weighs tokens")
        self.found.sums.append(node)

    def _scored(self, along: Along, value: torch.Tensor, target: Any) -> None:
        """Of classes, which are the second dimension or the only one; each token has its own target."""
        classes, theirs, scored = min(value.dim() - 1, 1), self.found.along.get(target), tensor_of(target)
        if along.dim == classes:
            raise Mixed("it is one over the sequence, not a sum")
        if theirs is None or scored is None:
            raise Mixed("its targets do not have the sequence")
        apart = scored.dim() < value.dim() and along.dim > classes
        if theirs != replace(along, dim=along.dim - apart):
            raise Mixed("its targets are those of other tokens")
