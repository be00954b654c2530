"""Bringing q, k, v, masks and biases into one layout: [B, H, S, D] and broadcastable to [B, H, S, T].

Everything here emits views: permutes and reshapes that only split or merge batch dimensions. K and V are
taken from before a repetition of their heads where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.metadata import stride_order, tensor_of
from kp_compiler.normalize import canonical, permutation
from kp_compiler.passes.base import Emitter, loses_gradient, same
from kp_compiler.passes.contraction import Dims, Operand
from kp_compiler.passes.scores import Scores
from kp_compiler.writes import Writes, constant, storage_of

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Frame:
    """Which labels make up the batch and which the heads."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.batch, *self.heads)


def frame_of(dims: Dims, keys: Dims) -> Frame:
    """The last batch label is the heads; labels that K broadcasts over (query groups) join them."""
    labels = [label for group in dims for label in group if label not in ("i", "j", "d", "e")]
    present = {label for group in keys for label in group}
    if len(labels) < 2:
        return Frame(tuple(labels), ())
    count = 1
    while labels[-count] not in present and len(labels) - count > 1:
        count += 1
    return Frame(tuple(labels[:-count]), tuple(labels[-count:]))


def place(
    emit: Emitter, node: Node, dims: Dims, frame: Frame, tail: tuple[str, str], scores: Scores, *, term: bool
) -> Node:
    """`node`, labelled `dims`, as [B, H, *tail].

    A missing label becomes size 1. A `term` (mask or bias) has its partly present groups expanded; an operand
    (k or v) keeps fewer heads instead, which is grouped-query attention.
    """
    dims = scores.split(dims)
    wanted = [(label,) for label in (*frame.labels, *tail)]
    if len(frame.batch) == 1 and len(frame.heads) == 1 and _aligns(dims, wanted, term):
        return node
    if any(len(labels) > 1 for labels in dims):
        sizes = [
            size
            for index, labels in enumerate(dims)
            for size in _atom_sizes(emit, node, index, labels, scores)
        ]
        node = emit.reshape(node, sizes)
        dims = tuple((label,) for labels in dims for label in (labels or ("",)))
    order = [index for label in wanted for index, labels in enumerate(dims) if labels == label]
    spare = [index for index, labels in enumerate(dims) if index not in order]
    node = emit.permute(node, [*spare, *order])
    present = [dims[index][0] for index in order]
    return _group(emit, node, len(spare), present, frame, tail, scores, term)


def _aligns(dims: Dims, wanted: list[tuple[str]], term: bool) -> bool:
    if not term:
        return len(dims) == len(wanted) and all(d in (w, ()) for d, w in zip(dims, wanted, strict=True))
    return all(d in (w, ()) for d, w in zip(dims, wanted[len(wanted) - len(dims) :], strict=True))


def _atom_sizes(emit: Emitter, node: Node, index: int, labels: tuple[str, ...], scores: Scores) -> list[Any]:
    if len(labels) <= 1:
        return [emit.size(node, index)]
    return [emit.size(*scores.sizes[label]) for label in labels]


def _group(
    emit: Emitter,
    node: Node,
    num_spare: int,
    present: list[str],
    frame: Frame,
    tail: tuple[str, str],
    scores: Scores,
    term: bool,
) -> Node:
    """Merge the batch labels and the head labels into one dimension each."""
    sizes = {label: emit.size(node, num_spare + index) for index, label in enumerate(present)}
    groups: list[list[str]] = []
    for labels in (frame.batch, frame.heads):
        have = [label for label in labels if label in present]
        groups.append(list(labels) if term and have and len(have) < len(labels) else have)
    full = [label for group in groups for label in group]
    if term and any(label not in present for label in full):
        node = emit.reshape(node, [sizes.get(label, 1) for label in full] + [sizes.get(t, 1) for t in tail])
        grown = [emit.size(*scores.sizes[label]) for label in full]
        node = emit.call(torch.ops.aten.expand.default, node, [*grown, -1, -1])
        sizes |= dict(zip(full, grown, strict=True))
    shape: list[Any] = []
    for group in groups:
        shape.append(emit.product([sizes[label] for label in group]))
    return emit.reshape(node, [*shape, *(sizes.get(t, 1) for t in tail)])


def restore(emit: Emitter, node: Node, dims: Dims, frame: Frame, scores: Scores) -> Node:
    """`node` [B, H, S, E] in the layout of the replaced result, whose dimensions are labelled `dims`."""
    dims = scores.split(dims)
    if (
        dims == tuple((label,) for label in (*frame.labels, "i", "e"))
        and len(frame.batch) == len(frame.heads) == 1
    ):
        return node
    present = [label for label in frame.labels if any(label in labels for labels in dims)]
    sizes = {"i": emit.size(node, 2), "e": emit.size(node, 3)}
    for group, position in ((frame.batch, 0), (frame.heads, 1)):
        whole = emit.size(node, position) if len(group) == 1 else None
        sizes |= {label: whole or emit.size(*scores.sizes[label]) for label in group if label in present}
    here = [*present, "i", "e"]
    node = emit.reshape(node, [sizes[label] for label in here])
    flat = [label for labels in dims for label in labels]
    node = emit.permute(node, [here.index(label) for label in flat])
    return emit.reshape(node, [emit.product([sizes[label] for label in labels]) for labels in dims])


def with_strides_of(emit: Emitter, node: Node, root: Node) -> Node:
    """`node`, copied into the memory layout of `root` where something downstream asks for it: `view` fails
    on another layout and `as_strided` reads it wrongly."""
    value = tensor_of(root)
    if value is None or not _layout_matters(root):
        return node
    order = stride_order(value)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    copied = emit.call(
        torch.ops.aten.clone.default, emit.permute(node, order), memory_format=torch.contiguous_format
    )
    return emit.permute(copied, inverse)


def _layout_matters(root: Node) -> bool:
    """A view of `root` is reshaped without leave to copy, or read by its strides."""
    queue, seen = [root], set()
    while queue:
        for user in queue.pop().users:
            target = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
            if target in ("view", "view.default", "as_strided", "as_strided.default", "stride", "data_ptr"):
                return True
            if user not in seen and storage_of(user) is not None and storage_of(user) == storage_of(root):
                seen.add(user)
                queue.append(user)
    return False


# ---------------------------------------------------------------------------------------------------------
# peeling


@dataclass(frozen=True)
class Peeled:
    """An operand without the copies, upcasts and head repetitions above it. `scale` was multiplied in on the
    way; `reader` is the node that read the operand before."""

    operand: Operand
    reader: Node
    scale: float = 1.0


def peel(operand: Operand, reader: Node, head: str | None, writes: Writes, *, scales: bool = True) -> Peeled:
    """Strip transposes, copies, repetition of heads (dimension `head`) and upcasts to float32 of a half
    tensor, with factors in between where `scales`."""
    best = Peeled(operand, reader)
    node, dims, scale, upcast = operand.node, operand.dims, 1.0, False
    while (op := canonical(node)) is not None:
        tensor, above = tensor_of(node), node
        if tensor is None or op.inplace or writes.between(node, reader) or loses_gradient(node, reader):
            break
        if op.name in ("transpose", "permute"):
            order = permutation(op, tensor.dim())
            if order is None:
                break
            dims = tuple(labels for _, labels in sorted(zip(order, dims, strict=True)))
            node = op["input"]
        elif op.name == "clone" or (op.name == "cast" and _keeps_dtype(op)):
            node = op["input"]
        elif op.name == "cast" and _is_upcast(op):
            node, upcast = op["input"], True
            best = Peeled(Operand(node, dims), above, scale)
            continue
        elif (
            scales
            and op.name in ("mul", "div")
            and tensor.dtype == torch.float32
            and (c := constant(op["other"]))
        ):
            scale *= c if op.name == "mul" else 1.0 / c
            node = op["input"]
            continue
        elif (found := _repeated(node, dims, head, reader)) is not None:
            node, above = found
        else:
            break
        if scale == best.scale or upcast:
            best = Peeled(Operand(node, dims), above, scale)
    return best


def peel_keys_values(
    keys: Operand,
    key_reader: Node,
    values: Operand,
    value_reader: Node,
    head: str | None,
    scores: Scores,
    writes: Writes,
) -> tuple[Peeled, Peeled]:
    """Both sides without their repetition of heads, or both with it where only one could be stripped."""
    for wanted in (head, None):
        k = peel(keys, key_reader, wanted, writes)
        v = peel(values, value_reader, wanted, writes, scales=False)
        if wanted is None or same(num_heads(k.operand, wanted, scores), num_heads(v.operand, wanted, scores)):
            break
    return k, v


def num_heads(operand: Operand, label: str, scores: Scores) -> Any:
    """The size of `label` in an operand, 1 where it broadcasts."""
    dims = scores.split(operand.dims)
    node, dim = operand.node, dims.index((label,)) if (label,) in dims else None
    if dim is None:
        if not any(label in labels for labels in dims):
            return 1
        node, dim = scores.sizes[label]  # merged with the batch
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor.shape[dim]


def _keeps_dtype(op: Any) -> bool:
    tensor = tensor_of(op["input"])
    return tensor is not None and op["dtype"] in (None, tensor.dtype)


def _is_upcast(op: Any) -> bool:
    tensor = tensor_of(op["input"])
    return tensor is not None and tensor.dtype in _HALF and op["dtype"] == torch.float32


def _repeated(node: Node, dims: Dims, head: str | None, site: Node) -> tuple[Node, Node] | None:
    """The tensor whose heads `node` repeats, each in a row (`expand` + `reshape`, or `repeat_interleave`),
    and the node that reads it; `site` reads them all."""
    if head is None or (head,) not in dims:
        return None
    index, op = dims.index((head,)), canonical(node)
    if op is None:
        return None
    if op.name == "repeat_interleave":
        tensor = tensor_of(op["input"])
        if tensor is not None and isinstance(op["repeats"], int) and isinstance(op["dim"], int):
            return (op["input"], node) if op["dim"] % tensor.dim() == index else None
        return None
    if op.name != "view":
        return None
    wide, reader = op["input"], node
    grown = canonical(wide)
    while grown is not None and grown.name == "clone":
        wide, reader = grown["input"], wide
        grown = canonical(wide)
    if grown is None or grown.name != "expand":
        return None
    added = canonical(grown["input"])
    if added is None or not (added.name == "unsqueeze" or (added.name == "getitem" and _only_adds(added))):
        return None
    base = added["input"]
    if any(loses_gradient(each, site) for each in (node, wide, grown["input"])):
        return None
    return (base, reader) if _is_head_repeat(base, grown["input"], wide, node, index) else None


def _only_adds(op: Any) -> bool:
    """An index that adds dimensions and selects nothing."""
    items = op["index"] if isinstance(op["index"], tuple) else (op["index"],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)


def _is_head_repeat(base: Any, thin: Any, wide: Any, out: Any, index: int) -> bool:
    """Shapes [.., K, ..] -> [.., K, 1, ..] -> [.., K, n, ..] -> [.., K*n, ..] around dimension `index`."""
    shapes = []
    for node in (base, thin, wide, out):
        tensor = tensor_of(node)
        if tensor is None:
            return False
        shapes.append(list(tensor.shape))
    a, b, c, d = shapes
    if len(b) != len(a) + 1 or len(c) != len(b) or len(d) != len(a):
        return False
    inserted = [*a[: index + 1], 1, *a[index + 1 :]]
    widened = [*b[: index + 1], c[index + 1], *b[index + 2 :]]
    merged = [*c[:index], c[index] * c[index + 1], *c[index + 2 :]]
    pairs = [*zip(b, inserted, strict=True), *zip(c, widened, strict=True), *zip(d, merged, strict=True)]
    return all(same(x, y) for x, y in pairs)
