"""Block lists from a mask's formula, as graph nodes: interval arithmetic over blocks.

For every pair of a query block and a key block the formula is evaluated on intervals of indices. A block
where it can nowhere hold is skipped, one where it surely holds everywhere needs no mask, the rest is masked
element by element. Intervals are conservative: a block is never skipped or left unmasked wrongly, whatever
the tensors hold. The work is O((S/128) · (T/128)) on the device, once per distinct mask.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kp_compiler.lowering import mask_render
from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.specs import AttentionSpec

BLOCK = 128


@dataclass(frozen=True)
class BlockLists:
    """What FlexAttention's block mask holds, all int32: counts [Bm,1,nQ] and indices [Bm,1,nQ,nK] of the
    partly masked and of the full key blocks of each query block, and the same by key block (q_…)."""

    kv_num: Node
    kv_indices: Node
    full_kv_num: Node
    full_kv_indices: Node
    q_num: Node
    q_indices: Node
    full_q_num: Node
    full_q_indices: Node


def block_lists(emit: Any, node: Node, spec: AttentionSpec) -> BlockLists:
    """The block lists of a site's mask, once per distinct mask and graph."""

    def make() -> BlockLists:
        partial, whole = block_flags(emit, node, spec)
        return BlockLists(
            *_ordered(emit, partial),
            *_ordered(emit, whole),
            *_ordered(emit, partial, flip=True),
            *_ordered(emit, whole, flip=True),
        )

    return _once(emit, node, spec, "flex", make)


def visit_lists(emit: Any, node: Node, spec: AttentionSpec, block: int = BLOCK) -> list[Node]:
    """The same as `block_lists.Lists` has it, by blocks of queries and by blocks of keys."""

    def make() -> list[Node]:
        flags = block_flags(emit, node, spec, block)
        flipped = (emit.call(torch.transpose, each, -2, -1) for each in flags)
        return [*_visits(emit, *flags), *_visits(emit, *flipped)]

    return _once(emit, node, spec, ("visits", block), make)


def _once(emit: Any, node: Node, spec: AttentionSpec, what: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives for a site's mask, made once for all sites of a graph that have the same."""
    memo = emit.graph.__dict__.setdefault("kp_block_masks", {})
    q, k = tensor_of(node.args[0]), tensor_of(node.args[1])
    assert q is not None and k is not None
    sizes = (str(q.shape[0]), str(q.shape[2]), str(k.shape[2]))
    key = (what, spec.mask.expr, _tensors(node, spec), tuple(node.args[4]), *sizes)  # type: ignore[arg-type]
    if key not in memo:
        memo[key] = make()
    return memo[key]


def _tensors(node: Node, spec: AttentionSpec) -> tuple[Node, ...]:
    operands: Any = node.args[3]
    return tuple(operands[index] for index in spec.mask.tensors) if spec.mask.kind != "tensor" else ()


def block_flags(emit: Any, node: Node, spec: AttentionSpec, block: int = BLOCK) -> tuple[Node, Node]:
    """Flags [Bm,1,nQ,nK] of the partly masked and of the full blocks of a site."""
    return _once(emit, node, spec, block, lambda: _block_flags(emit, node, spec, block))


class Now:
    """In place of an emitter: operations on tensors that are there."""

    def __init__(self) -> None:
        self.graph = SimpleNamespace()

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def size(self, x: Tensor, dim: int) -> int:
        return x.shape[dim]

    def product(self, sizes: Iterable[int]) -> int:
        return math.prod(sizes)


def lists_now(
    q: Tensor, k: Tensor, operands: Sequence[Tensor], scalars: Sequence[int], spec: AttentionSpec
) -> list[Tensor]:
    """`visit_lists` of tensors that are there: by blocks of queries, and by blocks of keys."""
    node: Any = SimpleNamespace(args=(q, k, None, list(operands), list(scalars)))
    return visit_lists(Now(), node, spec)


def _block_flags(emit: Any, node: Node, spec: AttentionSpec, block: int) -> tuple[Node, Node]:
    q, k = node.args[0], node.args[1]
    grid = _Grid(emit, value_of(q).device, emit.size(q, 2), emit.size(k, 2), block)
    if spec.mask.kind == "tensor":
        maybe, surely = True, False
    else:
        algebra = _Intervals(emit, grid, list(_tensors(node, spec)), list(node.args[4]))  # type: ignore[arg-type]
        maybe, surely = mask_render.render(mask_render.parse(spec.mask.expr), algebra)
    maybe, surely = grid.full(maybe), grid.full(surely)
    partial = emit.call(torch.logical_and, maybe, emit.call(torch.logical_not, surely))
    return partial, surely


def _visits(emit: Any, partial: Node, whole: Node) -> list[Node]:
    """`block_lists.Lists.of` as nodes."""
    call, to = emit.call, torch.ops.aten.to.dtype
    both = call(torch.logical_or, partial, whole)
    edges, count = (call(torch.sum, flags, dim=-1, dtype=torch.int32) for flags in (partial, both))
    kinds = call(torch.add, call(to, both, torch.int32), call(to, partial, torch.int32))
    order = call(torch.argsort, kinds, dim=-1, descending=True, stable=True)
    blocks = call(torch.ops.aten.reshape.default, call(to, order, torch.int32), [-1])
    sizes = [emit.size(partial, dim) for dim in range(4)]
    line = call(torch.arange, emit.product(sizes[:3]), device=value_of(partial).device)
    at = call(torch.ops.aten.reshape.default, call(torch.mul, line, sizes[3]), sizes[:3])
    return [edges, count, at, blocks]


def _ordered(emit: Any, flags: Node, *, flip: bool = False) -> tuple[Node, Node]:
    """Counts and indices of the true elements of each row, true ones first and in order."""
    if flip:
        flags = emit.call(torch.transpose, flags, -2, -1)
    numbers = emit.call(torch.ops.aten.to.dtype, flags, torch.int32)
    count = emit.call(torch.sum, numbers, dim=-1, dtype=torch.int32)
    order = emit.call(torch.argsort, numbers, dim=-1, descending=True, stable=True)
    indices = emit.call(torch.ops.aten.to.dtype, order, torch.int32)
    return _laid_out(emit, count), _laid_out(emit, indices)


def _laid_out(emit: Any, lists: Node) -> Node:
    """Contiguous in every stride. The kernel takes the stride of the heads, of which there is one, as that of
    the batch; Inductor is free to give a dimension of size 1 any stride, and under inference it did: every
    batch but the first then read the lists of no one (torch 2.11, 2026-11-26)."""
    tensor = tensor_of(lists)
    assert tensor is not None
    lists = emit.call(torch.ops.aten.contiguous.default, lists)
    if isinstance(tensor.shape[0], int) and tensor.shape[0] == 1:
        return lists
    sizes = [emit.size(lists, dim) for dim in range(tensor.dim())]
    strides: list[Any] = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, emit.product([strides[0], size]))
    return emit.call(torch.ops.aten.as_strided.default, lists, sizes, strides)


class _Grid:
    """The block grid: first and last index of each block, shaped [1,1,nQ,1] and [1,1,1,nK]."""

    def __init__(self, emit: Any, device: Any, queries: Any, keys: Any, block: int) -> None:
        self.emit = emit
        self.block = block
        self.device = device
        self.sizes = {"q": queries, "k": keys}
        self.count = {name: self._blocks(size) for name, size in self.sizes.items()}
        self.spans = {name: self._span(name) for name in self.sizes}

    def _blocks(self, size: Any) -> Any:
        if isinstance(size, int):
            return -(-size // self.block)
        return self.emit.call(
            operator.floordiv, self.emit.call(operator.add, size, self.block - 1), self.block
        )

    def _span(self, name: str) -> tuple[Node, Node]:
        call = self.emit.call
        line = call(torch.mul, call(torch.arange, self.count[name], device=self.device), self.block)
        shape = [1, 1, -1, 1] if name == "q" else [1, 1, 1, -1]
        first = call(torch.ops.aten.reshape.default, line, shape)
        size = self.sizes[name]
        top = size - 1 if isinstance(size, int) else call(operator.sub, size, 1)
        return first, call(torch.clamp, call(torch.add, first, self.block - 1), max=top)

    def lines(self, name: str) -> tuple[Node, Node]:
        """First and last index of each block of a dimension, flat."""
        first, last = self.spans[name]
        # type: ignore[return-value]
        return tuple(self.emit.call(torch.ops.aten.reshape.default, x, [-1]) for x in (first, last))

    def full(self, value: Any) -> Node:
        """A boolean or a flag per block as a tensor [Bm,1,nQ,nK]."""
        call = self.emit.call
        shape = [1, 1, self.count["q"], self.count["k"]]
        if tensor_of(value) is None:
            return call(torch.full, shape, bool(value), dtype=torch.bool, device=self.device)
        return call(torch.ops.aten.expand.default, value, [-1, -1, *shape[2:]])


class _Intervals:
    """Numbers are (low, high), None if unknown; conditions are (possible somewhere, certain everywhere)."""

    def __init__(self, emit: Any, grid: _Grid, tensors: list[Node], scalars: list[Any]) -> None:
        self.emit = emit
        self.grid = grid
        self.tensors = tensors
        self.scalars = scalars

    def integer(self, value: int) -> Any:
        return (value, value)

    def truth(self, value: bool) -> Any:
        return (value, value)

    def symbol(self, name: str) -> Any:
        if name in self.grid.spans:
            return _Span(*self.grid.spans[name], name)
        if name in mask_render.INDEX_NAMES:
            return _Span(None, None, name)
        scalar = self.scalars[int(name[1:])]
        return (scalar, scalar)

    def lookup(self, index: int, args: list[Any]) -> Any:
        """Smallest and largest element that a block reads: tensors indexed by symbols and constants only."""
        tensor = self.tensors[index]
        names: list[str] = []
        for dim in reversed(range(len(args))):
            arg = args[dim]
            if isinstance(arg, _Span) and arg.name != "h":
                names.insert(0, arg.name)
            elif isinstance(arg, tuple) and isinstance(arg[0], int) and arg[0] == arg[1]:
                tensor = self.emit.call(torch.select, tensor, dim, arg[0])
            else:
                return None
        if names not in (["b"], ["q"], ["k"], ["b", "q"], ["b", "k"], []):
            return None
        return self._reduced(tensor, names)

    def _reduced(self, tensor: Node, names: list[str]) -> Any:
        call = self.emit.call
        if tensor_of(tensor).dtype == torch.bool:  # type: ignore[union-attr]
            tensor = call(torch.ops.aten.to.dtype, tensor, torch.int32)
        lead = [-1] if "b" in names else [1]
        if not names or names == ["b"]:
            flat = call(torch.ops.aten.reshape.default, tensor, [*lead, 1, 1, 1])
            return (flat, flat)
        name = names[-1]
        blocks = self._by_block(tensor, name)
        shape = [*lead, 1, -1, 1] if name == "q" else [*lead, 1, 1, -1]
        if lead == [-1]:
            size = self.emit.size(tensor, 0)
            shape = [size, *shape[1:]]
        return tuple(
            call(torch.ops.aten.reshape.default, call(reduce, blocks, dim=-1), shape)
            for reduce in (torch.amin, torch.amax)
        )

    def _by_block(self, tensor: Node, name: str) -> Node:
        """[…, N] as […, blocks, block]; the last block repeats the last element."""
        call, grid = self.emit.call, self.grid
        size = grid.sizes[name]
        count = grid.count[name]
        total = count * grid.block if isinstance(count, int) else call(operator.mul, count, grid.block)
        width = tensor_of(tensor).shape[-1]  # type: ignore[union-attr]  # may be longer than the mask
        if not (isinstance(total, int) and isinstance(width, int) and total == width == size):
            top = size - 1 if isinstance(size, int) else call(operator.sub, size, 1)
            places = call(torch.clamp, call(torch.arange, total, device=grid.device), max=top)
            tensor = call(torch.index_select, tensor, -1, places)
        lead = [self.emit.size(tensor, 0)] if tensor_of(tensor).dim() == 2 else []  # type: ignore[union-attr]
        return call(torch.ops.aten.reshape.default, tensor, [*lead, count, grid.block])

    def add(self, a: Any, b: Any) -> Any:
        a, b = _pair(a), _pair(b)
        return None if a is None or b is None else (self._add(a[0], b[0]), self._add(a[1], b[1]))

    def mul(self, a: Any, b: Any) -> Any:
        a, b = _pair(a), _pair(b)
        for constant, other in ((a, b), (b, a)):
            if (
                constant is not None
                and other is not None
                and isinstance(constant[0], int)
                and constant[0] == constant[1]
            ):
                ends = [self._mul(end, constant[0]) for end in other]
                return tuple(ends if constant[0] >= 0 else reversed(ends))
        return None

    def floor_div(self, a: Any, divisor: int) -> Any:
        a = _pair(a)
        return (
            None
            if a is None
            else tuple(
                x // divisor if isinstance(x, int) else self._call(torch.floor_divide, x, divisor) for x in a
            )
        )

    def mod(self, a: Any, divisor: int) -> Any:
        return (0, divisor - 1)

    def minimum(self, a: Any, b: Any) -> Any:
        return self._extremum(min, torch.minimum, torch.clamp_max, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return self._extremum(max, torch.maximum, torch.clamp_min, a, b)

    def le_zero(self, a: Any) -> Any:
        a = _pair(a)
        return (True, False) if a is None else (self._compare(torch.le, a[0]), self._compare(torch.le, a[1]))

    def eq_zero(self, a: Any) -> Any:
        a = _pair(a)
        if a is None:
            return (True, False)
        below, above = self._compare(torch.le, a[0]), self._compare(torch.ge, a[1])
        zeros = [self._compare(torch.eq, end) for end in a]
        return (self._and(below, above), self._and(*zeros))

    def both(self, a: Any, b: Any) -> Any:
        return (self._and(a[0], b[0]), self._and(a[1], b[1]))

    def either(self, a: Any, b: Any) -> Any:
        return (self._or(a[0], b[0]), self._or(a[1], b[1]))

    def negate(self, a: Any) -> Any:
        return (self._not(a[1]), self._not(a[0]))

    # -------------------------------------------------------------------------------------------------------
    # helpers

    def _call(self, target: Any, *args: Any) -> Any:
        return self.emit.call(target, *args)

    def _add(self, x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return x + y
        if tensor_of(x) is None and tensor_of(y) is None:
            return self._call(operator.add, x, y)
        return self._call(torch.add, x, y) if tensor_of(x) is not None else self._call(torch.add, y, x)

    def _mul(self, x: Any, factor: int) -> Any:
        if isinstance(x, int):
            return x * factor
        return self._call(torch.mul if tensor_of(x) is not None else operator.mul, x, factor)

    def _compare(self, relation: Any, x: Any) -> Any:
        if isinstance(x, int):
            return {torch.le: x <= 0, torch.ge: x >= 0, torch.eq: x == 0}[relation]
        if tensor_of(x) is None:  # a size known only at run time
            x = self.emit.call(torch.full, [1, 1, 1, 1], x, device=self.grid.device)
        return self._call(relation, x, 0)

    def _extremum(self, numbers: Any, pair: Any, with_number: Any, a: Any, b: Any) -> Any:
        a, b = _pair(a), _pair(b)
        if a is None or b is None:
            return None
        ends = []
        for x, y in zip(a, b, strict=True):
            if isinstance(x, int) and isinstance(y, int):
                ends.append(numbers(x, y))
            elif tensor_of(x) is not None and tensor_of(y) is not None:
                ends.append(self._call(pair, x, y))
            elif tensor_of(x) is None and tensor_of(y) is None:
                ends.append(self._call(torch.sym_min if pair is torch.minimum else torch.sym_max, x, y))
            else:
                ends.append(self._call(with_number, *((x, y) if tensor_of(x) is not None else (y, x))))
        return tuple(ends)

    def _and(self, x: Any, y: Any) -> Any:
        if isinstance(x, bool) or isinstance(y, bool):
            flag, other = (x, y) if isinstance(x, bool) else (y, x)
            return other if flag else False
        return self._call(torch.logical_and, x, y)

    def _or(self, x: Any, y: Any) -> Any:
        if isinstance(x, bool) or isinstance(y, bool):
            flag, other = (x, y) if isinstance(x, bool) else (y, x)
            return True if flag else other
        return self._call(torch.logical_or, x, y)

    def _not(self, x: Any) -> Any:
        return not x if isinstance(x, bool) else self._call(torch.logical_not, x)


@dataclass(frozen=True)
class _Span:
    """An index symbol: the interval of each block, and which dimension it runs over."""

    low: Any
    high: Any
    name: str


def _pair(value: Any) -> Any:
    if isinstance(value, _Span):
        return None if value.low is None else (value.low, value.high)
    return value
