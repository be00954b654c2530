"""Blocks by what the last queries attend to: columns that all of them read, and diagonals at fixed distances.

Method: Jiang et al., MInference (arXiv:2407.02490): the probabilities of the last 64 queries, summed by key
and by distance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site

QUERIES = 64


def scorer(site: Site) -> Callable[[slice], Tensor]:
    size, blocks = site.sparse.block, site.blocks
    queries, keys = site.q.shape[2], site.k.shape[2]
    probs = _last_rows(site)
    key = torch.arange(keys, device=site.q.device)
    column = key // size
    vertical = torch.zeros(*probs.shape[:2], blocks, device=probs.device)
    vertical.index_add_(2, column, probs.sum(2))
    # distances in blocks, of a query's place among the keys
    place = torch.arange(queries - probs.shape[2], queries, device=key.device) + keys - queries
    distance = (place[:, None] // size - column).clamp(0, blocks - 1).flatten()
    slash = torch.zeros_like(vertical).index_add_(2, distance, probs.flatten(2))

    def score(rows: slice) -> Tensor:
        row = torch.arange(rows.start, rows.stop, device=key.device)
        place = (((row + 1) * size).clamp(max=queries) - 1 + keys - queries) // size
        away = place[:, None] - torch.arange(blocks, device=key.device)
        partial, whole = site.mask(rows)
        found = vertical[:, :, None] + torch.where(away >= 0, slash[:, :, away.clamp(min=0)], 0.0)
        found = torch.where(partial | whole, found, 0.0)
        return found / found.sum(-1, keepdim=True).clamp_min(1e-30)

    return score


def _last_rows(site: Site) -> Tensor:
    """Probabilities [B,H,QUERIES,T] of the last queries, under the mask as far as blocks tell it."""
    first = max(0, site.q.shape[2] - QUERIES)
    q = site.q[:, :, first:].float().unflatten(1, (site.k.shape[1], site.group))
    scores = torch.einsum("bkgid,bkjd->bkgij", q, site.k.float()).flatten(1, 2) * site.spec.scale
    if site.spec.softcap is not None:
        scores = site.spec.softcap * torch.tanh(scores / site.spec.softcap)
    if site.forms is not None:
        partial, whole = site.mask(slice(first, site.q.shape[2]), 1)
        kept = partial | whole
    else:
        size = site.sparse.block
        rows = slice(first // size, site.rows)
        flags = torch.logical_or(*site.mask(rows)).repeat_interleave(size, 2).repeat_interleave(size, 3)
        skipped = first - rows.start * size
        kept = flags[:, :, skipped : skipped + q.shape[3], : site.k.shape[2]]
    return torch.softmax(scores.masked_fill(~kept, float("-inf")), -1).nan_to_num(0.0)
