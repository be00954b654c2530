"""The blocks of a row that are computed: the best that fit a budget, or that hold a share of the mass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site
from kp_compiler.specs import SparseSpec

UNIT = 2**20  # densities are counted in parts of this, exact also where sizes are symbolic


def density(sparse: SparseSpec) -> int:
    """In parts of UNIT, and not below: two of ten blocks are a fifth of them."""
    return math.ceil(sparse.density * UNIT - 1e-6)


def budget(sparse: SparseSpec, blocks: Any) -> Any:
    """How many of `blocks`, a number or numbers, a row may compute by its density, rounded down."""
    return blocks * density(sparse) // UNIT


def capacity(sparse: SparseSpec, blocks: int) -> int:
    """The most that any row computes."""
    least = sparse.sink_blocks + sparse.local_blocks + 1
    return torch.sym_min(blocks, torch.sym_max(budget(sparse, blocks), least))


def forced(site: Site, rows: slice, kept: Tensor) -> Tensor:
    """Of the flags `kept` [b,h,rows,blocks] of a mask, those that are always computed: the first ones of each
    row, and the ones where its queries stand, which leave no query without a key that had its own, with
    those right before."""
    first, last = site.home(rows)
    block = torch.arange(kept.shape[-1], device=kept.device)
    near = (block > first[:, None] - site.sparse.local_blocks) & (block <= last[:, None])
    return kept & ((kept.int().cumsum(-1) <= site.sparse.sink_blocks) | near)


def chosen(sparse: SparseSpec, scores: Tensor, kept: Tensor, must: Tensor) -> Tensor:
    """Flags [B,H,rows,blocks] of the blocks to compute, one at least where the mask keeps any, from scores
    of that shape, flags of the mask, and those of the blocks that are computed whatever they score.

    Of the same worth, earlier ones come first. A score that is not a number is worth nothing.
    """
    allowed = kept.sum(-1, keepdim=True)
    least = must.sum(-1, keepdim=True)
    most = torch.maximum(budget(sparse, allowed), least.clamp(min=1))
    scores = scores.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    worth = scores.masked_fill(~kept, float("-inf")).masked_fill(must, float("inf"))
    order = torch.argsort(worth, dim=-1, descending=True, stable=True)
    if sparse.mass is not None:
        shares = scores.masked_fill(~kept, 0.0).gather(-1, order).cumsum(-1, dtype=torch.float64)
        enough = (shares < sparse.mass * shares[..., -1:]).sum(-1, keepdim=True) + 1
        most = torch.minimum(torch.maximum(enough, least), most)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return kept & (rank < most)
