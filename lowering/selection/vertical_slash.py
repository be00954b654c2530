"""Blocks by what the last queries attend to: columns that all of them read, and diagonals at fixed distances.

Method: Jiang et al., MInference (arXiv:2407.02490): the probabilities of the last 64 queries, summed by key
and by distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site, spread

QUERIES = 64
SPAN = 2**26  # scores in memory at a time


def scorer(site: Site) -> Callable[[slice], Tensor]:
    probs = _last_rows(site)
    vertical, slash = probs.sum(2), _by_distance(site, probs)

    def score(rows: slice) -> Tensor:
        away = (site.distance(rows) + site.blocks - 1).clamp(0, 2 * site.blocks - 2)
        found = vertical[:, :, None] + slash[:, :, away]
        found = torch.where(torch.logical_or(*site.mask(rows)), found, 0.0)
        return found / found.sum(-1, keepdim=True).clamp_min(1e-30)

    return score


def _by_distance(site: Site, probs: Tensor) -> Tensor:
    """Sums [B,H,2·blocks−1] of probabilities [B,H,n,blocks] of the last n queries over what lies as many
    blocks before where a query stands; first those furthest behind it."""
    blocks, end = site.blocks, site.q.shape[2]
    place = torch.arange(end - probs.shape[2], end, device=probs.device) + site.offset
    away = torch.arange(1 - blocks, blocks, device=probs.device)
    column = (place // site.sparse.block)[:, None] - away
    there = (column >= 0) & (column < blocks)
    index = column.clamp(0, blocks - 1).expand(*probs.shape[:2], -1, -1)
    return torch.where(there, probs.gather(3, index), 0.0).sum(2)


def _last_rows(site: Site) -> Tensor:
    """Probabilities [B,H,n,blocks] of the last n queries, under the mask as far as blocks tell it."""
    first, size = max(0, site.q.shape[2] - QUERIES), site.sparse.block
    q = site.q[:, :, first:].float()
    total = torch.full((*q.shape[:3], 1), float("-inf"), device=q.device)
    for _, scores in _scores(site, q, first):
        total = torch.logaddexp(total, scores.logsumexp(-1, keepdim=True))
    total = total.nan_to_num(neginf=0.0)  # a row without a key
    found = torch.zeros(*q.shape[:3], site.blocks, device=q.device)
    for blocks, scores in _scores(site, q, first):
        probs = torch.exp(scores - total)
        probs = torch.nn.functional.pad(probs, (0, -probs.shape[3] % size))
        found[..., blocks] = probs.unflatten(3, (-1, size)).sum(4)
    return found


def _scores(site: Site, q: Tensor, first: int) -> Iterator[tuple[slice, Tensor]]:
    """Scores [B,H,n,m] of queries from `first` on, a span of blocks of keys after the other."""
    size, keys = site.sparse.block, site.k.shape[2]
    step = max(1, SPAN // (q.shape[0] * q.shape[1] * q.shape[2] * size))
    for start in range(0, site.blocks, step):
        span = slice(start * size, min((start + step) * size, keys))
        kept = _kept(site, first, span)
        yield slice(start, min(start + step, site.blocks)), site.scores(q, site.k[:, :, span].float(), kept)


def _kept(site: Site, first: int, span: slice) -> Tensor:
    end, size = site.q.shape[2], site.sparse.block
    if site.forms is not None:
        return torch.logical_or(*site.mask(slice(first, end), 1, span))
    kept = torch.logical_or(*site.mask(slice(first // size, site.rows)))
    kept = spread(kept[..., span.start // size : -(-span.stop // size)], size)
    return kept[:, :, first % size :, : span.stop - span.start][:, :, : end - first]
