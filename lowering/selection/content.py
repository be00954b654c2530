"""Blocks by what q and k hold.

    sampled         probabilities of four queries of a block over all keys: see `sampled`

In the others scores between parts of 16 queries and 16 keys stand for those of their pairs:

    pooled          the mean of the 256 scores of two parts: mean(q) · mean(k)
    antidiagonal    the mean of the 16 on its antidiagonal, which sees what a mean cancels, for 16 times the
                    arithmetic (Xu et al., XAttention, arXiv:2503.16428)

Softmax over the parts of all keys, then sums over the parts of blocks: estimates of the probabilities that
blocks hold. In float32: ties that half precision makes favour early blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kp_compiler.lowering.selection import sampled
from kp_compiler.lowering.selection.site import Site, spread

PART = 16


def scorer(site: Site) -> Callable[[slice], Tensor]:
    if site.sparse.estimate == "sampled":
        return sampled.scorer(site)
    flip = site.sparse.estimate == "antidiagonal"
    q, k = _parts(site.q, site.sparse.estimate), _parts(site.k, site.sparse.estimate, flip=flip)
    per = site.sparse.block // PART

    def score(rows: slice) -> Tensor:
        parts = slice(rows.start * per, torch.sym_min(rows.stop * per, q.shape[2]))
        scores = site.scores(q[:, :, parts], k, _kept(site, rows, parts, per))
        probs = torch.softmax(scores, -1).nan_to_num(0.0)
        return _by_block(probs, rows, per, site)

    return score


def _parts(x: Tensor, estimate: str, *, flip: bool = False) -> Tensor:
    """[B,H,N,D] as parts of PART rows: [B,H,parts,D] of means, or [B,H,parts,PART·D] of all rows over PART^½,
    in either order."""
    length = x.shape[2]
    x = F.pad(x.float(), (0, 0, 0, -length % PART)).unflatten(2, (-1, PART))
    if estimate == "antidiagonal":
        return (x.flip(3) if flip else x).flatten(3) * PART**-0.5
    there = torch.full((x.shape[2],), float(PART), device=x.device)
    there[-1] -= -length % PART
    return x.sum(3) / there[:, None]


def _kept(site: Site, rows: slice, parts: slice, per: int) -> Tensor:
    """Pairs of parts with anything that the mask keeps; by blocks where only they are known."""
    if site.forms is not None:
        return torch.logical_or(*site.mask(parts, PART))
    kept = spread(torch.logical_or(*site.mask(rows)), per)
    return kept[:, :, : parts.stop - parts.start, : -(-site.k.shape[2] // PART)]


def _by_block(probs: Tensor, rows: slice, per: int, site: Site) -> Tensor:
    """The mean over the parts of each block of queries, the sum over those of each block of keys."""
    count = rows.stop - rows.start
    more = (0, site.blocks * per - probs.shape[3], 0, count * per - probs.shape[2])
    sums = F.pad(probs, more).unflatten(3, (site.blocks, per)).unflatten(2, (count, per)).sum((3, 5))
    return sums / sums.sum(-1, keepdim=True).clamp_min(1e-30)
