"""What an operation does to the dimension that tokens lie along: a method for each, by its canonical name or,
where it has none, its function's. They raise `Mixed` where an operation looks at several tokens, or might.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import same
from kp_compiler.writes import storage_of, written


@dataclass(frozen=True, eq=False)
class Along:
    """Tokens lie along `dim`, whose size is `outer` · tokens · `inner`: batches merged with them stand
    outside, several rows of one token inside. `order`: the sort by whose result such rows lie, if they do not
    lie as the tokens do."""

    dim: int
    outer: Any = 1
    inner: Any = 1
    order: Node | None = None

    def __eq__(self, other: object) -> bool:
        """For every input that the graph is compiled for."""
        if not isinstance(other, Along) or (self.dim, self.order) != (other.dim, other.order):
            return False
        return same(self.outer, other.outer) and same(self.inner, other.inner)

    def __hash__(self) -> int:
        return hash((self.dim, self.order))


@dataclass
class Sharing:
    """`along` by node, for those that have the sequence; `positions` make a token's place out of nothing;
    `sums` are over this rank's tokens, and what is made of them."""

    tokens: Any  # of one rank
    along: dict[Node, Along] = field(default_factory=dict)
    positions: list[Node] = field(default_factory=list)
    sums: list[Node] = field(default_factory=list)


class Mixed(Exception):
    """An operation looks at several tokens, or might."""


POINTWISE = {
    "add", "sub", "mul", "div", "rsub", "floordiv", "mod", "le", "lt", "ge", "gt", "eq", "ne", "and",
    "or", "xor", "not", "neg", "abs", "tanh", "exp", "log", "floor", "sigmoid", "pow", "minimum",
    "maximum", "clamp", "clamp_min", "cast", "to", "type", "type_as", "where", "where_method",
    "masked_fill", "dropout", "clone", "detach", "sqrt", "full_like", "silu", "gelu", "relu", "relu6",
    "mish", "elu", "selu", "celu", "softplus", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu",
    "logsigmoid", "quick_gelu", "cos", "sin", "rsqrt", "reciprocal", "erf", "square", "nan_to_num",
    "addcmul", "addcdiv", "lerp", "logit", "log1p", "expm1", "log2", "exp2", "sign", "round", "trunc",
    "ceil", "isnan", "isinf", "isfinite", "atan2", "polar", "real", "imag", "conj", "expand_as",
    "empty_like", "fmod", "softsign", "threshold",
}  # fmt: skip
REDUCTIONS = {
    "sum", "mean", "softmax", "log_softmax", "logsumexp", "amax", "amin", "max", "min", "all", "any", "prod",
    "norm", "vector_norm", "linalg_vector_norm", "var", "std", "argmax", "argmin", "cumsum", "cumprod",
}  # fmt: skip
LOSSES = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "kl_div"}
_SHAPES = {"view", "expand", "unsqueeze", "squeeze", "transpose", "permute", "flatten", "unflatten"}
SIZES = {"size", "dim", "getattr"}  # names of what asks a tensor for numbers
_FRESH = {"empty", "full", "full_like", "empty_like"}


class Rules:
    """What `sequence.trace` knows of the nodes before one, and the rules."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens
        self.found = Sharing(tokens)
        self.uniform: set[Node] = set()  # not shared, and the same for every token
        self.visited: set[Node] = set()
        self.writes: set[int] = set()  # storages that are written to

    # ----------------------------------------------------------------------------------------- token by token

    def is_uniform(self, node: Node, op: Op | None) -> bool:
        """Of what is not shared: one number everywhere, such as a mask of ones, which is any part of the
        whole sequence's."""
        if op is None or tensor_of(node) is None or storage_of(node) in self.writes:
            return False
        if op.name == "full":
            return not isinstance(op["fill_value"], Node)
        inputs = [each for each in node.all_input_nodes if tensor_of(each) is not None]
        known = op.name in POINTWISE or op.name in _SHAPES
        return known and op.name != "dropout" and bool(inputs) and self.uniform.issuperset(inputs)

    def is_long(self, node: Node) -> bool:
        """The same number for every token."""
        value = tensor_of(node)
        return node in self.uniform and value is not None and any(same(n, self.tokens) for n in value.shape)

    def pointwise(self, node: Node) -> Along:
        out = tensor_of(node)
        if out is None:
            raise Mixed("what it makes is no tensor")
        found = set()
        for each in node.all_input_nodes:
            value, along = tensor_of(each), self.found.along.get(each)
            if value is not None and along is not None:
                found.add(replace(along, dim=out.dim() - value.dim() + along.dim))
        if len(found) != 1:
            raise Mixed("the sequence lies along different dimensions of what it takes")
        (along,) = found
        for each in node.all_input_nodes:
            if each not in self.found.along:
                self._fits(each, along.dim - out.dim())
        if any(each not in self.found.along for each in written(node)):
            raise Mixed("it writes tokens into what is not shared among ranks")
        return along

    def _fits(self, each: Node, dim: int) -> None:
        """What is not shared has nothing for single tokens, which lie along `dim`, counted from the last."""
        value = tensor_of(each)
        if value is None or value.dim() < -dim or same(value.shape[dim], 1) or each in self.uniform:
            return
        raise Mixed(f"{each.name} is not shared among ranks, and has a value for each token")

    def _one(self, node: Node, argument: Any) -> Along:
        """That of the only argument that may have it."""
        shared = [each for each in node.all_input_nodes if each in self.found.along]
        if shared != [argument]:
            raise Mixed("something else than its first argument has the sequence")
        return self.found.along[argument]

    def _linear(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        if along.dim == value.dim() - 1:
            raise Mixed("it sums over the sequence")
        self._fits(op["bias"], along.dim - value.dim())
        return along

    def _matmul(self, node: Node, op: Op) -> Along:
        """Tokens are rows of the first factor, or columns of the second, as rotary angles have them; or
        batches of both."""
        left, right = self.found.along.get(op["input"]), self.found.along.get(op["other"])
        first, second, out = (tensor_of(each) for each in (op["input"], op["other"], node))
        assert first is not None and second is not None and out is not None
        if any(self.is_long(each) for each in node.all_input_nodes):
            raise Mixed("it adds up as many as a rank has tokens")
        if left is not None and right is not None:
            moved = {replace(a, dim=a.dim - x.dim()) for a, x in ((left, first), (right, second))}
            if len(moved) != 1 or next(iter(moved)).dim >= -2:
                raise Mixed("it sums over the sequence, or takes tokens with others")
            return replace(left, dim=left.dim - first.dim() + out.dim())
        if left is None:
            along = self._one(node, op["other"])
            if second.dim() < 2 or along.dim != second.dim() - 1:
                raise Mixed("it sums over the sequence, or shares batches")
            return replace(along, dim=out.dim() - 1)
        if left.dim == first.dim() - 1:
            raise Mixed("it sums over the sequence")
        if second.dim() == 1:
            return left
        if left.dim < first.dim() - 2:
            self._fits(op["other"], left.dim - first.dim())
        return replace(left, dim=left.dim + out.dim() - first.dim())

    def _bmm(self, node: Node, op: Op) -> Along:
        return self._matmul(node, op)

    def _addmm(self, node: Node, op: Op) -> Along:
        along = self._one(node, op["mat1"])
        if along.dim == 1:
            raise Mixed("it sums over the sequence")
        self._fits(op["input"], along.dim - 2)
        return along

    def _einsum(self, node: Node, op: Op) -> Along:
        """Tokens have a letter of their own, which stays."""
        inputs, arrow, result = str(op["equation"]).replace(" ", "").partition("->")
        given = op["operands"]
        operands = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
        terms = inputs.split(",")
        if not arrow or "." in inputs or len(terms) != len(operands):
            raise Mixed("its equation is not understood")
        letters = {
            (term[along.dim], replace(along, dim=0))
            for term, each in zip(terms, operands, strict=True)
            if (along := self.found.along.get(each)) is not None
        }
        if len(letters) != 1:
            raise Mixed("the sequence lies along different dimensions of what it takes")
        ((letter, along),) = letters
        for term, each in zip(terms, operands, strict=True):
            if self.is_long(each):
                raise Mixed("it adds up as many as a rank has tokens")
            if each not in self.found.along and letter in term:
                self._fits(each, term.index(letter) - len(term))
            if term.count(letter) > 1:
                raise Mixed("its equation is not understood")
        if letter not in result:
            raise Mixed("it sums over the sequence")
        return replace(along, dim=result.index(letter))

    def _outer(self, node: Node, op: Op) -> Along:
        rows = op["input"] in self.found.along
        return replace(self._one(node, op["input" if rows else "other"]), dim=0 if rows else 1)

    def _embedding(self, node: Node, op: Op) -> Along:
        return self._one(node, op["input"])

    def _layer_norm(self, node: Node, op: Op | None) -> Along:
        given = first(node)
        along, value = self._one(node, given), tensor_of(given)
        assert value is not None
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        if along.dim >= value.dim() - len(sizes):  # type: ignore[arg-type]
            raise Mixed("it norms over the sequence")
        return along

    _rms_norm = _layer_norm

    def _one_hot(self, node: Node, op: Op | None) -> Along:
        classes = argument(node, 1, "num_classes", -1)
        if not isinstance(classes, int) or classes < 0:
            raise Mixed("how many classes there are depends on a rank's tokens")
        return self._one(node, first(node))

    # -------------------------------------------------------------------------------- along another dimension

    def reduced(self, node: Node, op: Op | None, name: str) -> Along | None:
        """Over some dimensions, or along one; sums over tokens are over those of one rank."""
        given = op["input"] if op is not None else first(node)
        along, value = self._one(node, given), tensor_of(given)
        if value is None:
            raise Mixed("it takes more than one tensor")
        place = 2 if name in ("norm", "vector_norm", "linalg_vector_norm") else 1  # behind the norm's order
        dims = op.get("dim") if op is not None else argument(node, place, "dim")
        if dims is None or isinstance(dims, bool) or (isinstance(dims, Iterable) and not [*dims]):
            dims = range(value.dim())
        dims = {d % value.dim() for d in (dims if isinstance(dims, Iterable) else (dims,))}
        if along.dim in dims:
            if name not in ("sum", "mean"):
                raise Mixed("it is one over the sequence, not a sum")
            self.found.sums.append(node)
            return None
        out = tensor_of(node)
        if out is None:  # values and indices
            out = value_of(node)[0]
        if out.dim() == value.dim():
            return along
        return replace(along, dim=along.dim - sum(d < along.dim for d in dims))

    def _elsewhere(self, node: Node, place: int, default: int | None = None) -> Along:
        """What it does along another dimension than the sequence's, which it keeps."""
        along, value = self._one(node, first(node)), tensor_of(first(node))
        dim = argument(node, place, "dim", default)
        if value is None or not isinstance(dim, int) or dim % value.dim() == along.dim:
            raise Mixed("it takes some tokens of the sequence, or several together")
        return along

    def _topk(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 2, -1)

    def _chunk(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 2, 0)

    _split = _chunk

    def _narrow(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 1)

    def _normalize(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 2, 1)

    def _glu(self, node: Node, op: Op | None) -> Along:
        return self._elsewhere(node, 1, -1)

    def _unbind(self, node: Node, op: Op | None) -> Along:
        along, value = self._elsewhere(node, 1, 0), tensor_of(first(node))
        assert value is not None
        dim = argument(node, 1, "dim", 0) % value.dim()
        return replace(along, dim=along.dim - (dim < along.dim))

    def _pad(self, node: Node, op: Op | None) -> Along:
        along, value = self._one(node, first(node)), tensor_of(first(node))
        assert value is not None
        added = argument(node, 1, "pad", ())
        place = 2 * (value.dim() - 1 - along.dim)  # pairs, from the last dimension on
        if any(not same(each, 0) for each in added[place : place + 2]):
            raise Mixed("it adds tokens or takes some away")
        return along

    def _gather(self, node: Node, op: Op | None) -> Along:
        """Of what all ranks have, by a number for each token; or of each token's own."""
        given, index = first(node), argument(node, 2, "index")
        dim = argument(node, 1, "dim")
        own, along, value = self.found.along.get(given), self.found.along.get(index), tensor_of(given)  # type: ignore[arg-type]
        assert value is not None
        if along is None or (own is None) == (along.dim != dim % value.dim()) or own not in (None, along):
            raise Mixed("it takes tokens by their numbers")
        return along

    def _take_along_dim(self, node: Node, op: Op | None) -> Along:
        given, index, dim = (argument(node, i, name) for i, name in enumerate(("input", "indices", "dim")))
        along, value = self.found.along.get(given), tensor_of(given)
        if along is None or value is None or self.found.along.get(index) != along:
            raise Mixed("it takes tokens by their numbers")
        if dim is None or dim % value.dim() == along.dim:
            raise Mixed("it takes tokens by their numbers")
        return along

    def _scatter(self, node: Node, op: Op | None) -> Along:
        """Into each token's own."""
        base, dim, index, source = (
            argument(node, i, n) for i, n in enumerate(("input", "dim", "index", "src"))
        )
        along, value = self.found.along.get(base), tensor_of(base)
        if along is None or value is None or dim % value.dim() == along.dim:
            raise Mixed("it writes to tokens by their numbers")
        for each in (index, source):
            if isinstance(each, Node) and self.found.along.get(each, along) != along:
                raise Mixed("the sequence lies along different dimensions of what it takes")
            given = tensor_of(each)
            if given is not None and each not in self.found.along:
                if each not in self.uniform or not same(given.shape[along.dim], value.shape[along.dim]):
                    raise Mixed("it writes to tokens by their numbers")
        return along

    _scatter_add = _scatter

    # ------------------------------------------------------------------------------------------------ layouts

    def _transpose(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        a, b = (d % value.dim() for d in (op["dim0"], op["dim1"]))
        return replace(along, dim={a: b, b: a}.get(along.dim, along.dim))

    def _permute(self, node: Node, op: Op) -> Along:
        along, dims = self._one(node, op["input"]), op["dims"]
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
        return replace(along, dim=[d % len(dims) for d in dims].index(along.dim))

    def _unsqueeze(self, node: Node, op: Op) -> Along:
        along, out = self._one(node, op["input"]), tensor_of(node)
        assert out is not None
        return replace(along, dim=along.dim + (op["dim"] % out.dim() <= along.dim))

    def _expand(self, node: Node, op: Op) -> Along:
        value, out = tensor_of(op["input"]), tensor_of(node)
        assert value is not None and out is not None
        if op["input"] not in self.found.along:
            return self._expanded_as(node, op)
        along = self.found.along[op["input"]]
        return replace(along, dim=along.dim + out.dim() - value.dim())

    def _expanded_as(self, node: Node, op: Op) -> Along:
        """What is not shared, to the sizes of something that is: the same for every token."""
        like, out = self._one(node, argument(node, 1, "other")), tensor_of(node)
        assert out is not None
        self._fits(op["input"], like.dim - out.dim())
        return like

    def _repeat(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        times = [value_of(each) for each in op["repeats"]]
        times = [1] * (value.dim() - len(times)) + times
        dim = along.dim + len(times) - value.dim()
        if same(times[dim], 1):
            return replace(along, dim=dim)
        if along.order is not None:
            raise Mixed("it repeats tokens")
        return replace(along, dim=dim, outer=times[dim] * along.outer)  # all of them, again and again

    def _empty(self, node: Node, op: Op) -> None:
        """Like a tensor that is shared; whose its elements are is seen when they are written."""

    def _full(self, node: Node, op: Op) -> None:
        """Of the dtype and the device of a tensor that is shared."""
        if self.is_uniform(node, op):
            self.uniform.add(node)

    def _repeat_interleave(self, node: Node, op: Op) -> Along:
        along, value = self._one(node, op["input"]), tensor_of(op["input"])
        assert value is not None
        if op["dim"] is not None and op["dim"] % value.dim() != along.dim:
            return along
        if op["dim"] is None or not isinstance(op["repeats"], int) or along.order is not None:
            raise Mixed("it repeats tokens")
        return replace(along, inner=along.inner * op["repeats"])

    def _cat(self, node: Node, op: Op) -> Along:
        found = {self.found.along.get(each) for each in op["tensors"]}
        along, out = next(iter(found)), tensor_of(node)
        if len(found) != 1 or along is None or out is None or op["dim"] % out.dim() == along.dim:
            raise Mixed("it puts tokens beside others")
        return along

    def _stack(self, node: Node, op: Op | None) -> Along:
        found = {self.found.along.get(each) for each in argument(node, 0, "tensors")}
        along, out = next(iter(found)), tensor_of(node)
        if len(found) != 1 or along is None or out is None:
            raise Mixed("it puts tokens beside others")
        return replace(along, dim=along.dim + (argument(node, 1, "dim", 0) % out.dim() <= along.dim))

    def _view_as_real(self, node: Node, op: Op | None) -> Along:
        return self._one(node, first(node))

    def _view_as_complex(self, node: Node, op: Op | None) -> Along:
        along, value = self._one(node, first(node)), tensor_of(first(node))
        if value is None or along.dim == value.dim() - 1:
            raise Mixed("it puts tokens beside others")
        return along

    def _getitem(self, node: Node, op: Op) -> Along:
        given, index = op["input"], op["index"]
        value = tensor_of(given)
        if value is None:  # of several tensors
            return self._one(node, given)
        if given not in self.found.along:
            return self._looked_up(node, index)
        return indexed(self._one(node, given), value.dim(), index)[0]

    def _looked_up(self, node: Node, index: Any) -> Along:
        """Rows of what all ranks have, by a number for each token."""
        by = index[0] if isinstance(index, tuple) else index
        if not isinstance(by, Node) or is_mask(by):
            raise Mixed("its index is not understood")
        if isinstance(index, tuple) and any(each not in (slice(None), Ellipsis) for each in index[1:]):
            raise Mixed("its index is not understood")
        return self._one(node, by)

    def _index_select(self, node: Node, op: Op | None) -> Along:
        given, dim, index = (argument(node, i, name) for i, name in enumerate(("input", "dim", "index")))
        value = tensor_of(given)
        assert value is not None
        if given in self.found.along:
            raise Mixed("it takes tokens by their numbers")
        return replace(self._one(node, index), dim=dim % value.dim())

    def _view(self, node: Node, op: Op) -> Along:
        """A dimension of the result has the tokens if it is made of nothing else than all of them, of what
        lies outside of them, and of what lies inside."""
        given = op["input"]
        along, value, out = self.found.along.get(given), tensor_of(given), tensor_of(node)
        assert value is not None and out is not None
        if along is None:
            raise Mixed("something else than its first argument has the sequence")
        outside = product([*value.shape[: along.dim], along.outer])
        inside = product([along.inner, *value.shape[along.dim + 1 :]])
        for dim, each in enumerate(out.shape):
            outer = divided(outside, product(out.shape[:dim]))
            inner = divided(inside, product(out.shape[dim + 1 :]))
            if outer is None or inner is None or not same(each, product([outer, self.tokens, inner])):
                continue
            if along.order is not None and not (same(outer, along.outer) and same(inner, along.inner)):
                break
            return replace(along, dim=dim, outer=outer, inner=inner)
        raise Mixed("the sequence is not a dimension of what it makes, or one with the batch outside")

    _squeeze = _flatten = _unflatten = _view

    # ------------------------------------------------------------------------------------------------- writes

    def _setitem(self, node: Node, op: Op | None) -> None:
        base, index, source = node.args
        assert isinstance(base, Node)
        if isinstance(index, Node) and is_mask(index):
            return self._masked(base, index, source)
        if any(each in self.found.along for each in nodes_of(index)):
            raise Mixed("it writes to tokens by their numbers")
        return self._write([(base, index)], source)

    def _masked(self, base: Node, mask: Node, source: Any) -> None:
        """One number wherever a mask of the tokens is true."""
        value, chosen = tensor_of(base), tensor_of(mask)
        along = self.found.along.get(base)
        same_place = along is not None and self.found.along.get(mask) == along
        if isinstance(source, Node) or value is None or chosen is None or not same_place:
            raise Mixed("it is indexed by a tensor")
        self._write([(base, slice(None))], source)

    def _copy(self, node: Node, op: Op | None) -> Along:
        base, source = first(node), argument(node, 1, "src")
        assert isinstance(base, Node)
        self._write([(base, Ellipsis)], source)
        return self.found.along[base]

    def _write(self, path: list[tuple[Node, Any]], source: Any) -> None:
        """Into a part of what each token has. A new tensor gets the sequence where it is written to."""
        base, value = path[0][0], tensor_of(path[0][0])
        assert value is not None
        own = self.found.along.get(base)
        if own is None:
            op = canonical(base)
            if op is not None and op.name == "getitem" and tensor_of(op["input"]) is not None:
                return self._write([(op["input"], op["index"]), *path], source)
            self._adopt(path, source)
            return None
        along, rank, views = own, value.dim(), {}
        for each, part in path:
            views[each] = along
            along, rank = indexed(along, rank, part)
        if isinstance(source, Node):
            theirs, given = self.found.along.get(source), tensor_of(source)
            assert given is not None
            if theirs is None:
                self._fits(source, along.dim - rank)
            elif replace(theirs, dim=theirs.dim - given.dim()) != replace(along, dim=along.dim - rank):
                raise Mixed("it writes tokens to others' places")
        self.found.along |= views
        return None

    def _adopt(self, path: list[tuple[Node, Any]], source: Any) -> None:
        base, value = path[0][0], tensor_of(path[0][0])
        if value is None or name_of(base) not in _FRESH or self._is_used(base):
            raise Mixed("it writes tokens into what is not shared among ranks")
        self.uniform.discard(base)
        for dim, size in enumerate(value.shape):
            if same(size, self.tokens):
                self.found.along[base] = Along(dim)
                try:
                    return self._write(path, source)
                except Mixed:
                    del self.found.along[base]
        raise Mixed("it writes tokens into what has no dimension of theirs")

    def _is_used(self, node: Node) -> bool:
        """By a node before this one, which took it for what is not shared."""
        for user in self.visited.intersection(node.users):
            op = canonical(user)
            if op is not None and op.name == "getitem":
                if self._is_used(user):
                    return True
            elif name_of(user) not in SIZES or tensor_of(user) is not None:
                return True
        return False


def indexed(along: Along, rank: int, index: Any) -> tuple[Along, int]:
    """Where the sequence lies in x[index], of a tensor of `rank` dimensions, and how many the result has."""
    index = index if isinstance(index, tuple) else (index,)
    named = [each for each in index if each is not None and each is not Ellipsis]
    rest = [slice(None)] * (rank - len(named))
    advanced = [each for each in named if not isinstance(each, slice)]
    where = index.index(Ellipsis) if Ellipsis in index else len(index)
    place, dim, found = 0, 0, None  # of the argument, of the result
    for each in (*index[:where], *rest, *index[where + 1 :]):
        if each is None:
            dim += 1
            continue
        if place == along.dim:
            if each not in (slice(None), slice(0, None), slice(0, None, None)):
                raise Mixed("it takes some tokens of the sequence")
            found = dim
        elif isinstance(each, Node) and tensor_of(each) is not None:
            if len(advanced) > 1 or is_mask(each):
                raise Mixed("it is indexed by a tensor")
            dim += tensor_of(each).dim()  # type: ignore[union-attr]
        elif isinstance(each, bool) or not isinstance(each, slice | int | Node):
            raise Mixed("its index is not understood")
        dim += isinstance(each, slice)
        place += 1
    if found is None:
        raise Mixed("its index is not understood")
    return replace(along, dim=found), dim


def is_mask(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype in (torch.bool, torch.uint8)


def nodes_of(index: Any) -> list[Node]:
    return [each for each in (index if isinstance(index, tuple) else (index,)) if isinstance(each, Node)]


def counts_from_zero(node: Node) -> bool:
    """Whether an arange is 0, 1, 2, …"""
    alone = len(node.args) == 1 and "end" not in node.kwargs
    names = ("end",) if alone else ("start", "end", "step")
    given = dict(zip(names, node.args, strict=False))
    given |= {name: node.kwargs[name] for name in ("start", "end", "step") if name in node.kwargs}
    return given.get("start", 0) in (0, None) and given.get("step", 1) == 1


def product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def divided(size: Any, by: Any) -> Any:
    """The quotient, if there is no rest for any input that the graph is compiled for."""
    if same(size, by):
        return 1
    return size // by if same(size % by, 0) else None


def name_of(node: Node) -> str:
    """Canonical, or that of a function or method without the mark of what writes in place."""
    op = canonical(node) if node.op in ("call_function", "call_method") else None
    if op is not None:
        return op.name
    name: str = getattr(node.target, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def first(node: Node) -> Any:
    return argument(node, 0, "input")


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """By position or by name: a number, where a node is one."""
    named = node.kwargs.get("axis", default) if name == "dim" else default
    given = node.args[place] if len(node.args) > place else node.kwargs.get(name, named)
    value = value_of(given)
    return value if isinstance(value, int | float | torch.SymInt | torch.SymFloat) else given
