"""Dividing a batch's sequences among ranks, and putting them together again.

    mine = shard_sequence(batch, mesh)       this rank's part of tokens, shifted labels, positions, masks
    out  = unshard_sequence(model(**mine).logits, mesh, length=…)

Labels are shifted before they are divided: a token's label is the next one's, which may be on another rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kp_compiler.config import Ranks
from kp_compiler.errors import KPConfigError, KPError
from kp_compiler.lowering.context import divided
from kp_compiler.lowering.context.exchange import Peers, group_named
from kp_compiler.lowering.context.layout import Fixed, Layout, of_local
from kp_compiler.lowering.context.order import SequenceOrder

IGNORED = -100  # a label that no loss counts
# What stands at positions that a sequence is lengthened by
PADDING = {"input_ids": 0, "labels": IGNORED, "shift_labels": IGNORED, "attention_mask": 0}


def shard_sequence(
    batch: Mapping[str, Any],
    mesh: Any,
    *,
    layout: Fixed | SequenceOrder = "zigzag",
    dim: int = 1,
    multiple: int = 1,
    padding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """This rank's part of every tensor of `batch` that has the sequence along `dim`; other values stay.

    `mesh`: a DeviceMesh of one dimension or two, or a process group. `layout`: the compiled graph's; for
    "documents" the batch's `document_order`. Tensors [B,N,…] become [B,n,…] with n = N / P, after they were
    lengthened to a multiple of what the layout needs (P, or 2·P for "zigzag", times `multiple`) by `padding`
    (by name; known for `input_ids`, `labels` and `attention_mask`). `labels` [B,N] become the labels of the
    next tokens and come as `labels` and as `shift_labels`, which losses of transformers take as they are.
    `position_ids`, 0 … N-1, are added where there are none. A model whose queries see later tokens needs an
    `attention_mask` where the sequence is lengthened. Raises KPError where lengths differ, and where a
    sequence has to be lengthened by what is not known.
    """
    ranks = ranks_of(mesh)
    if not isinstance(batch, Mapping):
        raise KPError(f"shard_sequence: got a {type(batch).__name__}, expected tensors by name")
    if multiple < 1:
        raise KPError(f"multiple: got {multiple}, expected at least 1")
    given = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > dim}
    lengths = {name: x.shape[dim] for name, x in given.items()}
    if len(set(lengths.values())) != 1:
        raise KPError(f"shard_sequence: tensors have no one length along dimension {dim}: {lengths}")
    length = next(iter(lengths.values()))
    whole = _layout(layout, ranks, length, multiple)
    divided.note(group_named(ranks.group), whole.kind)
    if "labels" in given:
        given["labels"] = given["shift_labels"] = shifted_labels(given["labels"], dim)
    places = whole.positions(ranks.rank)
    found = dict(batch)
    for name, x in given.items():
        found[name] = _longer(name, x, dim, whole.tokens, padding or {}).index_select(
            dim, places.to(x.device)
        )
    if "position_ids" not in given:
        first = next(iter(given.values()))
        found["position_ids"] = places.to(first.device).expand(*first.shape[:dim], -1).contiguous()
    return found


def shifted_labels(labels: Tensor, dim: int = 1) -> Tensor:
    """The next token's label [B,N] at each token; nothing is counted at the last."""
    rest = labels.narrow(dim, 1, labels.shape[dim] - 1)
    return torch.cat([rest, torch.full_like(labels.narrow(dim, 0, 1), IGNORED)], dim)


def unshard_sequence(
    x: Tensor, mesh: Any, *, layout: Fixed | SequenceOrder = "zigzag", dim: int = 1, length: int | None = None
) -> Tensor:
    """The whole sequence [B,N,…] from every rank's part [B,n,…], on every rank, without gradients; its first
    `length` tokens, if given. Raises KPError for parts that `shard_sequence` does not make."""
    ranks = ranks_of(mesh)
    _known(layout)
    whole = layout.layout if isinstance(layout, SequenceOrder) else of_local(layout, ranks.size, x.shape[dim])
    if whole.parts * whole.part != ranks.size * x.shape[dim]:
        raise KPError(
            f"unshard_sequence: {x.shape[dim]} tokens of a rank are no part of the layout {layout!r}"
        )
    if length is not None and not 0 <= length <= ranks.size * x.shape[dim]:
        raise KPError(f"unshard_sequence: length: got {length}, of {ranks.size * x.shape[dim]} tokens")
    peers = Peers(group_named(ranks.group), "unshard_sequence")
    (parts,) = peers.gather([x.detach().contiguous()], "parts").wait()
    found = whole.joined(parts, dim)
    return found if length is None else found.narrow(dim, 0, length)


def _layout(layout: Fixed | SequenceOrder, ranks: Ranks, length: int, multiple: int) -> Layout:
    """Of a sequence of this length, lengthened to what the layout needs."""
    if isinstance(layout, SequenceOrder):
        if multiple != 1:
            raise KPError(f"multiple: got {multiple}, but a document_order has its length already")
        tokens = layout.layout.tokens
        if layout.group != ranks.group or not 0 <= tokens - length < layout.layout.size * layout.chunks:
            raise KPError(f"layout: the order of {tokens} tokens is not one of {length} on this mesh")
        return layout.layout
    _known(layout)
    parts = Layout(layout, ranks.size, 0).parts * multiple
    return Layout(layout, ranks.size, -(-length // parts) * parts)


def _known(layout: Any) -> None:
    if not isinstance(layout, SequenceOrder) and layout not in get_args(Fixed):
        raise KPError(f"layout: got {layout!r}, expected 'contiguous', 'zigzag' or a document_order")


def sequence_mean(total: Tensor, count: Tensor | int, mesh: Any) -> Tensor:
    """The mean over all ranks' tokens, from the sum over this rank's, a scalar, and their number.

    Every rank gets the same value. Its gradient on a rank is that of this rank's tokens: gradients of
    parameters are to be added up over the ranks. (What divides by their number, as DistributedDataParallel
    does, wants the mean times P.)
    """
    counts = torch.as_tensor(count, dtype=torch.float32, device=total.device).clone()
    sums = total.detach().float().clone()
    group = group_named(ranks_of(mesh).group)
    with Peers(group, "sequence_mean").waiting("sums of all ranks"):
        for x in (counts, sums):
            dist.all_reduce(x, group=group)
    mine = total / counts
    return mine + (sums / counts - mine.detach())


def lengthened_positions(x: Tensor, dim: int, tokens: int) -> Tensor:
    """Going on as they end."""
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    steps = torch.arange(1, tokens - x.shape[dim] + 1, device=x.device, dtype=x.dtype)
    return torch.cat([x, last + steps.view([-1 if i == dim else 1 for i in range(x.dim())])], dim)


def _longer(name: str, x: Tensor, dim: int, tokens: int, padding: Mapping[str, float]) -> Tensor:
    more = tokens - x.shape[dim]
    if not more:
        return x
    sizes = [*x.shape[:dim], more, *x.shape[dim + 1 :]]
    if name == "position_ids" and name not in padding:
        return lengthened_positions(x, dim, tokens)
    known = {**PADDING, **padding}
    if name not in known:
        raise KPError(
            f"shard_sequence: {name} has {x.shape[dim]} tokens, {tokens} are needed: padding={{{name!r}: …}} "
            "says what to add"
        )
    return torch.cat([x, x.new_full(sizes, known[name])], dim)


@lru_cache(maxsize=64)
def _flat(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of a mesh in one dimension, row after row. Makes a process group: every rank calls it, also
    those of a larger mesh that this one is a part of."""
    return mesh._flatten()


def _grid(mesh: DeviceMesh, name: str) -> Ranks:
    if mesh.mesh_dim_names is None:
        raise KPConfigError(f"{name}: a mesh of two dimensions needs names for them, mesh_dim_names=")
    order = mesh.mesh.flatten()
    if not torch.equal(order, order.sort().values):  # which a process group of all of them has
        raise KPConfigError(f"{name}: its ranks are not in ascending order, row after row")
    far, near = mesh.get_group(0), mesh.get_group(1)
    grid = (far.group_name, near.group_name)
    return replace(ranks_of(_flat(mesh), name), grid=grid, row=dist.get_world_size(near))


def ranks_of(mesh: Any, name: str = "mesh") -> Ranks:
    """A DeviceMesh of one dimension or two, or a process group, as plain data. Raises KPConfigError for
    anything else, and where this process is not in it."""
    expected = "expected a DeviceMesh of one dimension or two, or a process group"
    if not dist.is_available() or not dist.is_initialized():
        raise KPConfigError(f"{name}: torch.distributed is not initialised (init_process_group, torchrun)")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim > 2:
            raise KPConfigError(f"{name}: got {mesh.ndim} dimensions, {expected}: mesh['cp'], say")
        if mesh.ndim == 2:
            return _grid(mesh, name)
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise KPConfigError(f"{name}: got {mesh!r}, {expected}")
    if dist.get_rank(mesh) < 0:
        raise KPConfigError(f"{name}: this process is not in the group")
    device = "cuda" if "nccl" in str(dist.get_backend(mesh)) else "cpu"
    return Ranks(mesh.group_name, dist.get_rank(mesh), dist.get_world_size(mesh), device)
