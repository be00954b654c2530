"""Which dimension of each tensor is the sequence that ranks share, and whether tokens are treated one by one.

    found = trace(gm)        Sharing: the sequence's dimension by node, what positions are made of, what sums
                             over tokens; or a Rejection that names the first operation that mixes them

Every rank runs the same graph on its part of the tokens. That is the whole graph's result where each
operation is one of the tokens by themselves, or an attention site, or makes positions, which have to be the
sequence's. Sums over a rank's tokens, as losses are, may only be results. Anything else is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler.lowering import ops
from kp_compiler.metadata import CHECKPOINT_OPS, bodies, tensor_of, value_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import same
from kp_compiler.report import Rejection
from kp_compiler.writes import Writes, storage_of, written


@dataclass(frozen=True)
class Along:
    """Tokens lie along `dim`, whose size is `outer` times theirs: batches merged with them stand outside."""

    dim: int
    outer: Any = 1


@dataclass
class Sharing:
    """`along` by node, for those that have the sequence; `positions` make a token's place out of nothing;
    `sums` are over this rank's tokens, and what is made of them."""

    tokens: Any  # of one rank
    along: dict[Node, Along] = field(default_factory=dict)
    positions: list[Node] = field(default_factory=list)
    sums: list[Node] = field(default_factory=list)


class _Mixed(Exception):
    """An operation looks at several tokens, or might."""


_POINTWISE = {
    "add", "sub", "mul", "div", "rsub", "floordiv", "mod", "le", "lt", "ge", "gt", "eq", "ne", "and", "or",
    "xor", "not", "neg", "abs", "tanh", "exp", "log", "floor", "sigmoid", "pow", "minimum", "maximum",
    "clamp",
    "clamp_min", "cast", "to", "type", "type_as", "where", "where_method", "masked_fill", "dropout", "clone",
    "detach", "sqrt", "full_like",
}  # fmt: skip
_POINTWISE_FUNCTIONS = {
    "silu", "gelu", "relu", "mish", "elu", "selu", "softplus", "hardswish", "leaky_relu", "quick_gelu", "cos",
    "sin", "rsqrt", "reciprocal", "erf", "square", "nan_to_num", "addcmul", "logit",
}  # fmt: skip
_REDUCTIONS = {"sum", "mean", "softmax", "log_softmax", "amax", "max", "min", "all", "norm", "var", "std"}
_LOSSES = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "kl_div"}
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
    except _Mixed as mixed:
        node = tracer.at
        assert node is not None
        return Rejection("mixes-tokens", f"{node.name} ({_spelt(node)}): {mixed}.")
    return tracer.found


def _live(graph: Graph) -> set[Node]:
    """Nodes that results depend on, where sites stand for what they were recognised in. Of a site these are
    queries, keys and values: vectors of its mask are the whole sequence's, made apart."""
    roots = {node.meta["kp_root"]: node.meta["kp_out"] for node in graph.nodes if "kp_root" in node.meta}
    found: set[Node] = set()
    queue, writes = [graph.output_node()], Writes(graph).by_storage
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


def _spelt(node: Node) -> str:
    op = canonical(node)
    return op.name if op is not None else getattr(node.target, "__name__", str(node.target))


def given(node: Node, tokens: Any) -> Along | None:
    """Of an input that is no weight: [B,tokens,…], [tokens], or [B,H,tokens,D] as attention takes it."""
    value = tensor_of(node)
    if value is None or isinstance(value, torch.nn.Parameter) or "_buffers_" in node.name:
        return None
    places = {0: (), 1: (0,), 4: (1, 2)}.get(value.dim(), (1,))
    return next((Along(dim) for dim in places if same(value.shape[dim], tokens)), None)


class _Tracer:
    def __init__(self, top: Graph, tokens: Any) -> None:
        self.top, self.tokens = top, tokens
        self.found = Sharing(tokens)
        self.at: Node | None = None  # what is looked at
        self.results: dict[Node, Any] = {}  # of the body that a node calls

    def visit_all(self, graph: Graph) -> None:
        live = _live(graph)
        for node in graph.nodes:
            if node in live:
                self.at = node
                self._take(node, self._along(node))

    def _take(self, node: Node, along: Along | None) -> None:
        if along is not None:
            self.found.along[node] = along

    def _body(self, node: Node) -> None:
        """What a checkpoint body makes of its arguments."""
        body = _body_of(node)
        for inner, outer in zip(body.find_nodes(op="placeholder"), node.args[1:], strict=True):
            along = self.found.along.get(outer)  # type: ignore[arg-type]
            if self.found.along.get(inner, along) != along or outer in self.found.sums:
                raise _Mixed("the body of a checkpoint is called with a sequence and with something else")
            self._take(inner, along)
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
            return self.found.along.get(node) if inner else given(node, self.tokens)
        if node.op in ("output", "get_attr"):
            return None
        if str(node.target) in CHECKPOINT_OPS:
            self._body(node)
            return None
        if node.target is operator.getitem and node.args[0] in self.results:
            return self._result(node)
        op = canonical(node)
        shared = [each for each in node.all_input_nodes if each in self.found.along]
        if op is not None and op.name == "arange":
            return self._positions(node, op)
        name = op.name if op is not None else _spelt(node)
        sums = [each for each in node.all_input_nodes if each in self.found.sums]
        if sums:
            if shared:
                raise _Mixed("it takes a sum over the tokens of one rank")
            if name not in _OF_SUMS or written(node) or (name == "mul" and len(sums) > 1):
                raise _Mixed("a sum over the tokens of one rank may only be a result")
            self.found.sums.append(node)
        if ops.is_attention(node):
            return self._site(node)
        if not shared:
            return None
        if name in _POINTWISE or name in _POINTWISE_FUNCTIONS:
            return self._pointwise(node)
        if name in _LOSSES:
            self._loss(node, op, name)
            return None
        rule: Callable[[Node, Op | None], Along | None] | None = getattr(self, f"_{name}", None)
        if name in _REDUCTIONS:
            return self._reduced(node, op)
        if rule is None:
            raise _Mixed("it is not known to treat tokens one by one")
        return rule(node, op)

    # --------------------------------------------------------------------------------------------- beginnings

    def _positions(self, node: Node, op: Op) -> Along | None:
        value = tensor_of(node)
        assert value is not None
        if not same(value.shape[0], self.tokens):
            return None
        given = [each for each in op["range"] if each is not None]
        if len(given) == 1 or (len(given) == 2 and given[0] == 0):
            self.found.positions.append(node)
            return Along(0)
        raise _Mixed("it counts tokens, and not from zero in steps of one")

    def _site(self, node: Node) -> Along:
        for each in node.args[:3]:
            if self.found.along.get(each) != Along(2):  # type: ignore[call-overload]
                raise _Mixed("queries, keys or values do not have the sequence along their third dimension")
        return Along(2)

    # ----------------------------------------------------------------------------------------- token by token

    def _pointwise(self, node: Node) -> Along:
        out = tensor_of(node)
        assert out is not None
        found: set[tuple[Any, ...]] = set()
        for each in node.all_input_nodes:
            value, along = tensor_of(each), self.found.along.get(each)
            if value is None or along is None:
                continue
            found.add((out.dim() - value.dim() + along.dim, str(along.outer)))
        if len(found) != 1:
            raise _Mixed("the sequence lies along different dimensions of what it takes")
        ((dim, _),) = found
        for each in node.all_input_nodes:
            value = tensor_of(each)
            if value is None or each in self.found.along:
                continue
            own = dim - (out.dim() - value.dim())
            if own >= 0 and not same(value.shape[own], 1):
                raise _Mixed(f"{each.name} is not shared among ranks, and has a value for each token")
        first = next(self.found.along[each] for each in node.all_input_nodes if each in self.found.along)
        return Along(dim, first.outer)

    def _one(self, node: Node, argument: Any) -> Along:
        """That of the only argument that may have it."""
        shared = [each for each in node.all_input_nodes if each in self.found.along]
        if shared != [argument]:
            raise _Mixed("something else than its first argument has the sequence")
        return self.found.along[argument]

    def _linear(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        if along.dim == value.dim() - 1:
            raise _Mixed("it sums over the sequence")
        return along

    def _matmul(self, node: Node, op: Op) -> Along:
        """Tokens are rows of the first factor, or columns of the second, as rotary angles have them."""
        other = op["other"]
        if op["input"] not in self.found.along:
            along, value, out = self._one(node, other), tensor_of(other), tensor_of(node)
            assert value is not None and out is not None
            if value.dim() < 2 or along.dim != value.dim() - 1:
                raise _Mixed("it sums over the sequence, or shares batches")
            return Along(out.dim() - 1, along.outer)
        along, value, out = self._one(node, op["input"]), tensor_of(op["input"]), tensor_of(node)
        assert value is not None and out is not None
        if along.dim == value.dim() - 1:
            raise _Mixed("it sums over the sequence")
        return Along(along.dim + out.dim() - value.dim(), along.outer)

    def _addmm(self, node: Node, op: Op) -> Along:
        along = self._one(node, op["mat1"])
        if along.dim == 1:
            raise _Mixed("it sums over the sequence")
        return along

    def _embedding(self, node: Node, op: Op) -> Along:
        return self._one(node, op["input"])

    def _layer_norm(self, node: Node, op: Op | None) -> Along:
        given = node.args[0]
        along, value = self._one(node, given), tensor_of(given)
        assert value is not None
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        if along.dim >= value.dim() - len(sizes):  # type: ignore[arg-type]
            raise _Mixed("it norms over the sequence")
        return along

    _rms_norm = _layer_norm

    def _reduced(self, node: Node, op: Op | None) -> Along | None:
        given = op["input"] if op is not None else node.args[0]
        along, value, out = self._one(node, given), tensor_of(given), tensor_of(node)
        if value is None or out is None:
            raise _Mixed("it gives more than one tensor")
        dims = op.get("dim") if op is not None else _argument(node, 1, "dim")
        name = _spelt(node)
        if dims is None or dims == ():
            dims = range(value.dim())
        dims = {d % value.dim() for d in (dims if isinstance(dims, Iterable) else (dims,))}
        if along.dim in dims:
            if name not in ("sum", "mean"):
                raise _Mixed("it is one over the sequence, not a sum")
            self.found.sums.append(node)
            return None
        if out.dim() == value.dim():
            return along
        return Along(along.dim - sum(d < along.dim for d in dims), along.outer)

    def _loss(self, node: Node, op: Op | None, name: str) -> None:
        given = op["input"] if op is not None else _argument(node, 0, "input")
        along, value = self.found.along.get(given), tensor_of(given)
        if along is None or value is None:
            raise _Mixed("what it scores does not have the sequence")
        if name in ("cross_entropy", "nll_loss") and along.dim == min(value.dim() - 1, 1):  # of its classes
            raise _Mixed("it is one over the sequence, not a sum")
        self.found.sums.append(node)

    # ------------------------------------------------------------------------------------------------ layouts

    def _transpose(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        a, b = (d % value.dim() for d in (op["dim0"], op["dim1"]))
        return Along({a: b, b: a}.get(along.dim, along.dim), along.outer)

    def _permute(self, node: Node, op: Op) -> Along:
        along, dims = self._one(node, op["input"]), op["dims"]
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
        return Along([d % len(dims) for d in dims].index(along.dim), along.outer)

    def _unsqueeze(self, node: Node, op: Op) -> Along:
        along, out = self._one(node, op["input"]), tensor_of(node)
        assert out is not None
        return Along(along.dim + (op["dim"] % out.dim() <= along.dim), along.outer)

    def _expand(self, node: Node, op: Op) -> Along:
        along, value, out = self._one(node, op["input"]), tensor_of(op["input"]), tensor_of(node)
        assert value is not None and out is not None
        return Along(along.dim + out.dim() - value.dim(), along.outer)

    def _repeat_interleave(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        if op["dim"] is None or op["dim"] % value.dim() == along.dim:
            raise _Mixed("it repeats tokens")
        return along

    def _cat(self, node: Node, op: Op) -> Along:
        found = {self.found.along.get(each) for each in op["tensors"]}
        along, out = next(iter(found)), tensor_of(node)
        if len(found) != 1 or along is None or out is None or op["dim"] % out.dim() == along.dim:
            raise _Mixed("it puts tokens beside others")
        return along

    def _chunk(self, node: Node, op: Op | None) -> Along:
        along, value = self._one(node, node.args[0]), tensor_of(node.args[0])
        dim = _argument(node, 2, "dim", 0)
        if value is None or dim % value.dim() == along.dim:
            raise _Mixed("it divides the sequence")
        return along

    _split = _chunk

    def _getitem(self, node: Node, op: Op) -> Along:
        given, index = op["input"], op["index"]
        along = self._one(node, given)
        value = tensor_of(given)
        if value is None:  # of several tensors
            return along
        index = index if isinstance(index, tuple) else (index,)
        named = sum(each is not None and each is not Ellipsis for each in index)
        place, dim = 0, 0  # of the argument, of the result
        for each in (*index, *[slice(None)] * (value.dim() - named if Ellipsis not in index else 0)):
            if each is None:
                dim += 1
                continue
            for part in [slice(None)] * (value.dim() - named) if each is Ellipsis else [each]:
                if place == along.dim:
                    if part not in (slice(None), slice(0, None), slice(0, None, None)):
                        raise _Mixed("it takes some tokens of the sequence")
                    return Along(dim, along.outer)
                if not isinstance(part, slice | int):
                    raise _Mixed("it is indexed by a tensor")
                dim += isinstance(part, slice)
                place += 1
        raise _Mixed("its index is not understood")

    def _view(self, node: Node, op: Op) -> Along:
        """A dimension of the result is that of the tokens where what lies outside of both has one size."""
        given = op["input"]
        along, value, out = self._one(node, given), tensor_of(given), tensor_of(node)
        assert value is not None and out is not None
        before = _product(value.shape[: along.dim])
        outside, size = _product([before, along.outer]), self.tokens
        seen: Any = 1
        for dim, each in enumerate(out.shape):
            if same(seen, outside) and same(each, size):
                return Along(dim)
            if same(_product([seen, each]), _product([outside, size])) and not same(each, 1):
                return Along(dim, outside // seen if isinstance(seen, int) else outside)
            seen = _product([seen, each])
        raise _Mixed("the sequence is not a dimension of what it makes, or one with the batch outside")

    _squeeze = _flatten = _unflatten = _view


def _product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else value_of(node.kwargs.get(name, default))
