"""An order of packed documents' tokens in which ranks that share them have as much to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kp_compiler.errors import KPError
from kp_compiler.lowering.context.layout import Ordered
from kp_compiler.lowering.context.order import SequenceOrder, balanced
from kp_compiler.sharding import lengthened_positions, ranks_of

CHUNKS = 16  # of a rank: the busiest of 2 to 64 has 0.3 % more than the mean (benchmarks/context_scaling.py)


def document_order(
    position_ids: Tensor, mesh: Any, *, window: int | None = None, chunks: int = CHUNKS
) -> SequenceOrder:
    """Which rank gets which of `chunks` times P equal chunks of a packed batch, so that every one has as many
    pairs of a query and an earlier key of its document.

    `position_ids` [B,N] or [N]: of the whole batch, beginning anew at every document, as packing collators
    make them. `window`: how many keys a query sees at most. N is lengthened to a multiple of chunks·P;
    kernels do best with one of 128·chunks·P, whose chunks are whole tiles. Every rank computes the same from
    the same batch. Raises KPError for other shapes.
    """
    ranks = ranks_of(mesh)
    layout, imbalance = balanced_layout(position_ids, ranks.size, window, chunks)
    return SequenceOrder(layout, ranks.group, chunks, imbalance)


def balanced_layout(
    position_ids: Tensor, size: int, window: int | None = None, chunks: int = CHUNKS
) -> tuple[Ordered, float]:
    """Of `size` ranks, and pairs of tokens of the one with the most, in parts of the mean."""
    if position_ids.dim() not in (1, 2) or position_ids.is_floating_point() or not position_ids.numel():
        kind = f"{position_ids.dtype} {list(position_ids.shape)}"
        raise KPError(f"position_ids: got {kind}, expected integers [B,N] or [N]")
    if chunks < 1:
        raise KPError(f"chunks: got {chunks}, expected at least one")
    count = chunks * size
    given = position_ids.detach().cpu().reshape(-1, position_ids.shape[-1])
    tokens = -(-given.shape[1] // count) * count
    pairs = lengthened_positions(given, 1, tokens).long() + 1
    pairs = pairs if window is None else pairs.clamp(max=window)
    work = pairs.view(len(given), count, -1).sum((0, 2)).tolist()
    found = balanced(work, size)
    starts = torch.tensor(found).view(-1, 1) * (tokens // count)
    places = (starts + torch.arange(tokens // count)).flatten()
    most = max(sum(work[chunk] for chunk in mine) for mine in found)
    return Ordered("documents", size, tokens, places), most * size / sum(work)
