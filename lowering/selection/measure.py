"""What leaving blocks out costs a head, on a sample of its queries, beside exact attention.

    mass     share of the probabilities that the chosen blocks hold
    error    ‖out − exact‖ / ‖exact‖ over the sampled rows
    bound    the same two standard errors up: what `error=` holds a head to

A sample sees what is common. A head that is wrong for one query of ten thousand, and right for all others,
has a small error in this norm whether it is measured on a sample or on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kp_compiler.lowering import reference
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.selection import lists
from kp_compiler.lowering.selection.site import Site

SAMPLES = 64
SCORES = 2**26  # in memory at a time


class Cost(NamedTuple):
    """Each [B,H] in float32."""

    mass: Tensor
    error: Tensor
    bound: Tensor


def rows(site: Site, samples: int = SAMPLES) -> Tensor:
    """Some queries, the same ones each time, evenly spread over places and over places within blocks: the
    multiples of the golden section."""
    count = min(samples, site.q.shape[2])
    part = (torch.arange(1, count + 1, dtype=torch.float64, device=site.q.device) * 0.6180339887498949) % 1.0
    return (part * site.q.shape[2]).long()


def sampled(site: Site, lists: Lists, samples: int = SAMPLES) -> Tensor:
    """Flags [B,heads,samples,blocks] of the blocks of sampled queries, from lists by blocks of queries."""
    line = rows(site, samples) // site.sparse.block
    edges, count, at = (x[:, :, line] for x in (lists.edges, lists.count, lists.at))
    here = Lists(edges, count, at, lists.blocks)
    return here.visited(site.blocks) > 0


def cost(
    site: Site, v: Tensor, chosen: Tensor, operands: Sequence[Tensor], scores: int | None = SCORES
) -> Cost:
    """v [B,K,T,E], `chosen` [B,H or choices,n,blocks] the blocks of n sampled queries; `scores` at a time, or
    all at once."""
    places, keys = rows(site, chosen.shape[2]), site.k.shape[2]
    chosen = chosen.repeat_interleave(site.q.shape[1] // chosen.shape[1], 1)
    batch, heads = site.q.shape[:2]
    pairs = site.q.new_empty(1, 1, 1, 1).expand(batch, heads, len(places), keys)
    keep = reference.mask(site.spec.mask, operands, site.scalars, pairs, places)
    keep = torch.ones_like(pairs[:1, :1], dtype=torch.bool) if keep is None else keep
    step = site.k.shape[1]
    if scores is not None:
        step = max(1, scores // (batch * site.group * len(places) * keys))
    parts = []
    for first in range(0, site.k.shape[1], step):
        of_keys = slice(first, min(first + step, site.k.shape[1]))
        mine = slice(of_keys.start * site.group, of_keys.stop * site.group)
        held = keep if keep.shape[1] == 1 else keep[:, mine]
        parts.append(_cost(site, v, places, of_keys, mine, chosen[:, mine], held, operands))
    return Cost(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))


def _cost(
    site: Site, v: Tensor, places: Tensor, of_keys: slice, mine: slice, chosen: Tensor, keep: Tensor,
    operands: Sequence[Tensor],
) -> Cost:  # fmt: skip
    scores = site.scores(site.q[:, mine][:, :, places].float(), site.k[:, of_keys].float(), keep)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weight = torch.exp(scores - top)
    of_sink = torch.zeros_like(top)
    if site.spec.sink is not None:
        of_sink = torch.exp(operands[site.spec.sink].float().reshape(1, -1, 1, 1)[:, mine] - top)
    spread = chosen.repeat_interleave(site.sparse.block, 3)[..., : site.k.shape[2]]
    value = v[:, of_keys].float().repeat_interleave(site.group, 1)
    exact = (weight @ value) / _above(weight.sum(-1, keepdim=True) + of_sink)
    total, weight = weight.sum(-1), weight * spread
    out = (weight @ value) / _above(weight.sum(-1, keepdim=True) + of_sink)
    mass = (weight.sum(-1) / _above(total)).sum(-1) / _above((total > 0).sum(-1))
    return Cost(mass, *_relative((out - exact).square().sum(-1), exact.square().sum(-1)))


def _relative(off: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The root of the quotient of two sums over samples [B,H,n], and of a numerator two standard errors
    up."""
    spread = off.std(-1, correction=0) * off.shape[-1] ** 0.5
    below = _above(whole.sum(-1))
    return (off.sum(-1) / below).sqrt(), ((off.sum(-1) + 2 * spread) / below).sqrt()


def _above(x: Tensor) -> Tensor:
    """Not zero, to divide by."""
    return x.clamp_min(1e-30)


def allowed(site: Site) -> float:
    """Blocks that the mask leaves a head, over the batch. Waits for the device."""
    step = max(1, SCORES // site.blocks)
    total = 0.0
    for first in range(0, site.rows, step):
        kept = torch.logical_or(*site.mask(slice(first, min(first + step, site.rows))))
        total += float(kept.sum((2, 3)).double().mean(1).sum()) * site.q.shape[0] / kept.shape[0]
    return total


def found(site: Site, v: Tensor, operands: Sequence[Tensor]) -> dict[str, Any]:
    """For a report: of the blocks under the mask the share that is computed, the heads that compute all, and
    what the others lose. Waits for the device."""
    chosen = lists.by_query(site)
    sample = sampled(site, chosen)
    dense = dense_heads(site, v, lambda: sample, operands).expand(site.q.shape[:2]).cpu()
    mass, error, _ = (x.cpu() for x in cost(site, v, sample, operands))
    counts = chosen.count.sum(2).repeat_interleave(site.q.shape[1] // chosen.count.shape[1], 1).cpu()
    whole = allowed(site) / site.q.shape[0]
    return {
        "density": round(float(counts.masked_fill(dense, whole).double().mean()) / whole, 4),
        "dense_heads": dense.any(0).nonzero().flatten().tolist(),
        "kept_mass": round(float(mass.masked_fill(dense, 1.0).mean()), 4),
        "error": round(float(error.masked_fill(dense, 0.0).mean()), 4),
        "worst_head_error": round(float(error.masked_fill(dense, 0.0).max()), 4),
    }


def dense_heads(
    site: Site,
    v: Tensor,
    chosen: Callable[[], Tensor],
    operands: Sequence[Tensor],
    scores: int | None = SCORES,
) -> Tensor:
    """Flags [B or 1,H] of the heads that compute all blocks. `chosen` gives what `cost` takes."""
    sparse, heads = site.sparse, torch.arange(site.q.shape[1], device=site.q.device)
    named = sum((heads == head for head in sparse.dense), heads < 0)[None]
    if sparse.error is None:
        return named
    return named | ~(cost(site, v, chosen(), operands, scores).bound <= sparse.error)
