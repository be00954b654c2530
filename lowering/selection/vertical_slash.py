"""Blocks by what the last queries attend to: columns that all of them read, and diagonals at fixed distances.

Method: Jiang et al., MInference (arXiv:2407.02490): the probabilities of the last 64 queries, summed by key
and by distance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site, spread

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
        away = site.distance(rows)
        found = vertical[:, :, None] + torch.where(away >= 0, slash[:, :, away.clamp(min=0)], 0.0)
        found = torch.where(torch.logical_or(*site.mask(rows)), found, 0.0)
        return found / found.sum(-1, keepdim=True).clamp_min(1e-30)

    return score


def _last_rows(site: Site) -> Tensor:
    """Probabilities [B,H,QUERIES,T] of the last queries, under the mask as far as blocks tell it."""
    first = max(0, site.q.shape[2] - QUERIES)
    if site.forms is not None:
        kept = torch.logical_or(*site.mask(slice(first, site.q.shape[2]), 1))
    else:
        size = site.sparse.block
        rows = slice(first // size, site.rows)
        kept = spread(torch.logical_or(*site.mask(rows)), size)
        kept = kept[:, :, first - rows.start * size :][:, :, : site.q.shape[2] - first, : site.k.shape[2]]
    return site.probabilities(site.q[:, :, first:].float(), site.k.float(), kept)
