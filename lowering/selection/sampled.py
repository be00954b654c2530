"""Blocks by what some of their queries read: probabilities of SAMPLES queries of each block, as they are,
over keys in pairs.

    p_i = softmax_j(SHARPER · scale · q_i · (k_2j + k_2j+1) / 2)    i: a block's first and last query, and
                                                                    two between them
    share of a block = the mean over its samples of what p_i holds there

A mean over queries loses what each of them looks for: of a head that reads one key for each query, means
of 16 queries and 16 keys leave a 256th, and rank blocks no better than chance. A sampled query loses nothing,
and a line of text that reaches into a block has its first or last query, or a third of it. The mean of two
keys halves the peak of one, which SHARPER makes up for; where shares themselves count (`mass`) they are as
they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kp_compiler.lowering.selection.site import Site

SAMPLES = 4  # queries of a block
PAIR = 2
SHARPER = 2.0


def sharper(site: Site) -> float:
    return SHARPER if site.sparse.mass is None else 1.0


def places(rows: slice, site: Site) -> Tensor:
    """Queries [rows · SAMPLES] that stand for rows of blocks; the last one for those that are not there."""
    row = torch.arange(rows.start, rows.stop, device=site.q.device)[:, None] * site.sparse.block
    steps = torch.arange(SAMPLES, device=site.q.device) * (site.sparse.block - 1) // (SAMPLES - 1)
    return (row + steps).flatten().clamp(max=site.q.shape[2] - 1)


def pairs(x: Tensor) -> Tensor:
    """[B,H,N,D] to means of two rows, [B,H,pairs,D] in float32; the last row may be alone."""
    padded = F.pad(x.float(), (0, 0, 0, -x.shape[2] % PAIR)).unflatten(2, (-1, PAIR)).sum(3)
    there = torch.full((padded.shape[2],), float(PAIR), device=x.device)
    there[-1] -= -x.shape[2] % PAIR
    return padded / there[:, None]


def scorer(site: Site) -> Callable[[slice], Tensor]:
    k = pairs(site.k)
    per = site.sparse.block // PAIR

    def score(rows: slice) -> Tensor:
        at = places(rows, site)
        kept = _kept(site, rows, at, per)
        scores = site.scores(site.q[:, :, at].float(), k, kept) * sharper(site)
        probs = torch.softmax(scores, -1).nan_to_num(0.0)
        probs = F.pad(probs, (0, site.blocks * per - probs.shape[3]))
        sums = probs.unflatten(3, (site.blocks, per)).unflatten(2, (-1, SAMPLES)).sum((3, 5))
        return sums / sums.sum(-1, keepdim=True).clamp_min(1e-30)

    return score


def _kept(site: Site, rows: slice, at: Tensor, per: int) -> Tensor:
    """Sampled queries and pairs of keys with anything that the mask keeps; by blocks where only they are
    known."""
    count = -(-site.k.shape[2] // PAIR)
    if site.forms is None:
        kept = torch.logical_or(*site.mask(rows)).repeat_interleave(SAMPLES, 2)
        return kept.repeat_interleave(per, 3)[..., :count]
    first = torch.arange(count, device=at.device) * PAIR
    last = (first + PAIR - 1).clamp(max=site.k.shape[2] - 1)
    return torch.logical_or(*site.between((at, at), (first, last)))
