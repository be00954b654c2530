"""What is known of a graph's nodes while it is told which dimension of each the tokens lie along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import same
from kp_compiler.writes import storage_of


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
    "ceil", "isnan", "isinf", "isfinite", "atan2", "polar", "real", "imag", "conj", "empty_like",
    "fmod", "softsign", "threshold",
}  # fmt: skip
_SHAPES = {"view", "expand", "unsqueeze", "squeeze", "transpose", "permute"}
SHORT = 16  # tokens of a rank, in which other numbers may well be as many
SIZES = {"size", "dim", "getattr"}  # names of what asks a tensor for numbers


class State:
    """Of the nodes before one."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens
        self.found = Sharing(tokens)
        self.uniform: set[Node] = set()  # not shared, and the same for every token
        self.places: set[Node] = set()  # integers of tokens, and what is computed with them one by one
        self.visited: set[Node] = set()
        self.writes: set[int] = set()  # storages that are written to

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

    def look_at_numbers(self, node: Node) -> None:
        """Raises Mixed where something is computed with how many tokens there are: that is the number of a
        rank's. Where shapes are static it is a number like others, and is taken for it beside places."""
        for each in node.all_input_nodes:
            if _symbols(value_of(each)) & _symbols(self.tokens):
                raise Mixed("it computes with the length of a sequence, of which a rank has a part")
        if not self.places.isdisjoint(node.all_input_nodes):
            self.places.add(node)
            numbers = (x for x in (*node.args, *node.kwargs.values()) if type(x) in (int, float))
            if isinstance(self.tokens, int) and any(self._may_be_length(x) for x in numbers):
                raise Mixed(
                    f"it seems to compute with the length of a sequence, of which a rank has {self.tokens}; "
                    "under dynamic=True lengths can be told from other numbers"
                )

    def _may_be_length(self, number: float) -> bool:
        return self.tokens > SHORT and number in (self.tokens, self.tokens - 1)

    def aligned(self, several: Iterable[Node]) -> Along:
        """Where the sequence lies in all of some nodes that broadcast together, counted from the last
        dimension."""
        found = {along for each in several if (along := self._from_last(each)) is not None}
        if len(found) != 1:
            raise Mixed("the sequence lies along different dimensions of what it takes")
        (along,) = found
        for each in several:
            if each not in self.found.along:
                self._fits(each, along.dim)
        return along

    def _from_last(self, node: Node) -> Along | None:
        value, along = tensor_of(node), self.found.along.get(node)
        return None if value is None or along is None else replace(along, dim=along.dim - value.dim())

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


def is_mask(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype in (torch.bool, torch.uint8)


def counts_from_zero(op: Op) -> bool:
    """Whether an arange is 0, 1, 2, …"""
    return op["start"] == 0 and op["step"] == 1


def _symbols(value: Any) -> set[Any]:
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt | torch.SymFloat) else set()


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
