"""Chosen blocks as lists for the kernels, a few rows of blocks at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.selection import SELECTORS, Scorer
from kp_compiler.lowering.selection.choose import capacity, chosen, forced
from kp_compiler.lowering.selection.sampled import SAMPLES
from kp_compiler.lowering.selection.site import Site

CHUNK = 2**18  # scores of blocks in memory at a time; `content` has 64 of parts for each
KERNEL_CHUNK = 2**26  # the same where kernels work: 256 MiB


def flags(site: Site, rows: slice) -> tuple[Tensor, Tensor]:
    """Flags [B,H,rows,blocks] of the chosen blocks that need the mask and of those that don't."""
    return _flags(site, SELECTORS[site.sparse.selector](site), rows)


def _flags(site: Site, scorer: Scorer, rows: slice) -> tuple[Tensor, Tensor]:
    partial, whole = site.mask(rows)
    scores = scorer(rows)
    if site.choices < scores.shape[1]:
        scores = scores.unflatten(1, (site.choices, -1)).mean(2)
    kept = (partial | whole).expand(scores.shape)
    found = chosen(site.sparse, scores, kept, forced(site, rows, kept))
    return found & partial, found & whole


def by_query(site: Site) -> Lists:
    """Lines are blocks of queries, of as many heads as choose for themselves. On a GPU by kernels, as far as
    they go."""
    if site.q.is_cuda:
        from kp_compiler.lowering.triton import selection as kernels

        if site.sparse.selector == "content" and kernels.takes_content(site):
            room = 1 + SAMPLES if site.sparse.estimate == "sampled" else 1  # numbers for each score
            return kernels.choose(site, kernels.content(site), KERNEL_CHUNK // room)
        if kernels.takes(site):
            return kernels.choose(site, SELECTORS[site.sparse.selector](site), CHUNK)
    return _by_query(site, SELECTORS[site.sparse.selector](site))


def _by_query(site: Site, scorer: Scorer) -> Lists:
    batch, heads = site.q.shape[0], site.choices
    most = capacity(site.sparse, site.blocks)
    edges, count = (
        torch.empty(batch, heads, site.rows, dtype=torch.int32, device=site.q.device) for _ in "ec"
    )
    blocks = torch.empty(batch, heads, site.rows, most, dtype=torch.int32, device=site.q.device)
    step = max(1, CHUNK // max(1, batch * heads * site.blocks))
    for first in range(0, site.rows, step):
        rows = slice(first, min(first + step, site.rows))
        partial, whole = _flags(site, scorer, rows)
        edges[:, :, rows], count[:, :, rows] = partial.sum(-1), (partial | whole).sum(-1)
        blocks[:, :, rows] = _placed(partial, whole, most)
    return Lists.even(edges, count, blocks)


def _placed(partial: Tensor, whole: Tensor, most: int) -> Tensor:
    """Indices of flagged blocks, partial ones first, [.., rows, most]; what is past the count is zero."""
    place = torch.where(partial | whole, _places(partial, whole), most)
    index = torch.arange(partial.shape[-1], dtype=torch.int32, device=partial.device).expand(place.shape)
    found = torch.zeros(*place.shape[:-1], most + 1, dtype=torch.int32, device=place.device)
    return found.scatter_(-1, place, index)[..., :most]


def _places(partial: Tensor, whole: Tensor) -> Tensor:
    """Where a flagged block stands in its line, partial ones first."""
    edges = partial.sum(-1, keepdim=True)
    return torch.where(partial, partial.cumsum(-1) - 1, edges + whole.cumsum(-1) - 1)


def by_key(lists: Lists, blocks: int) -> Lists:
    """The same with blocks of keys as lines, one head at a time. Lines lie one after the other: as many
    blocks in all, whatever a line has. On a GPU by kernels."""
    if lists.at.is_cuda:
        from kp_compiler.lowering.triton import turn_lists

        return turn_lists.turn(lists, blocks)
    batch, heads, rows = lists.count.shape
    edges, count = (
        torch.empty(batch, heads, blocks, dtype=torch.int32, device=lists.at.device) for _ in "ec"
    )
    at = torch.empty(batch, heads, blocks, dtype=torch.int64, device=lists.at.device)
    most = lists.blocks.numel() // max(1, batch * heads)
    found = torch.zeros(batch, heads, most + 1, dtype=torch.int32, device=lists.at.device)
    for b in range(batch):
        for h in range(heads):
            edge, number, first = (x[b : b + 1, h : h + 1] for x in (lists.edges, lists.count, lists.at))
            one = Lists(edge, number, first, lists.blocks)
            kinds = one.visited(blocks)[0, 0].mT  # blocks of keys, then of queries
            partial, whole = kinds == 1, kinds > 1
            edges[b, h], count[b, h] = partial.sum(-1), (kinds > 0).sum(-1)
            line = count[b, h].cumsum(0) - count[b, h]
            at[b, h] = line + (b * heads + h) * (most + 1)
            place = torch.where(kinds > 0, line[:, None] + _places(partial, whole), most)
            index = torch.arange(rows, dtype=torch.int32, device=place.device).expand(place.shape)
            found[b, h].scatter_(0, place.flatten(), index.flatten())
    return Lists(edges, count, at, found.flatten())
