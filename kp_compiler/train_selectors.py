"""`kp.train_selectors`: gates for the selector `learned`, distilled from a model's own attention.

    the model runs, all blocks computed ─▶ for some rows of blocks of each call: features of q and k, and the
    share of exact attention that each block of keys has
    outside of it: gates of each site, by Adam, on the divergence of their shares from those

Method: Gao et al., SeerAttention (arXiv:2410.13276).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kp_compiler import gates
from kp_compiler.calibrate import check_writable, observe
from kp_compiler.errors import KPConfigError
from kp_compiler.lowering import reference, tap
from kp_compiler.lowering.selection import learned

ROWS = 32  # of blocks, of each call, that a site keeps
SCORES = 2**26  # in memory at a time


@dataclass(frozen=True)
class _Sample:
    """Of one call: features of some rows of blocks and of all blocks of keys, flags of the blocks that the
    mask leaves, and each block's share of exact attention."""

    queries: Tensor  # [B,H,n,D]
    keys: Tensor  # [B,K,blocks,3·D]
    kept: Tensor  # [B or 1,H or 1,n,blocks]
    shares: Tensor  # [B,H,n,blocks]


@dataclass
class _Sampling:
    """The observer."""

    rows: int
    generator: torch.Generator
    sites: dict[str, list[_Sample]] = field(default_factory=dict)

    def __call__(self, seen: tap.Tapped) -> None:
        site = seen.site
        rows = (
            torch.randperm(site.rows, generator=self.generator)[: self.rows].sort().values.to(site.q.device)
        )
        size = site.sparse.block
        kept = torch.cat([torch.logical_or(*site.mask(slice(row, row + 1))) for row in rows.tolist()], 2)
        place = (rows[:, None] * size + torch.arange(size, device=rows.device)).clamp(max=site.q.shape[2] - 1)
        queries = learned.query_features(site.q.index_select(2, place.flatten()), size)
        keys = learned.key_features(site.k, size)
        sample = _Sample(queries, keys, kept, _shares(seen, place))
        self.sites.setdefault(seen.module, []).append(sample)


def _shares(seen: tap.Tapped, places: Tensor) -> Tensor:
    """The share [B,H,n,blocks] of the probabilities of queries `places` [n,size], which each block of keys
    has."""
    site = seen.site
    batch, heads, _, _ = site.q.shape
    keys, size = site.k.shape[2], site.sparse.block
    found = torch.zeros(batch, heads, len(places), site.blocks, device=site.q.device)
    step = max(1, SCORES // (batch * heads * size * keys))
    for first in range(0, len(places), step):
        some = places[first : first + step]
        pairs = site.q.new_empty(1, 1, 1, 1).expand(batch, heads, some.numel(), keys)
        keep = reference.mask(site.spec.mask, seen.operands, site.scalars, pairs, some.flatten())
        keep = torch.ones_like(pairs[:1, :1], dtype=torch.bool) if keep is None else keep
        scores = site.scores(site.q.index_select(2, some.flatten()).float(), site.k.float(), keep)
        probs = torch.softmax(scores, -1).nan_to_num(0.0)
        probs = F.pad(probs, (0, site.blocks * size - keys)).unflatten(3, (-1, size)).sum(4)
        found[:, :, first : first + step] = probs.unflatten(2, (-1, size)).mean(3)
    return found / found.sum(-1, keepdim=True).clamp_min(1e-30)


def train_selectors(
    model: Any,
    data: Iterable[Any],
    path: str | Path,
    *,
    rank: int = 32,
    steps: int = 400,
    learning_rate: float = 3e-3,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train a gate for each head of each attention site of `model`, and write them to `path`, a safetensors
    file that `sparse_attention={"selector": "learned", "gates": path}` reads.

    `data`, `options`: as `kp.calibrate` takes them. The model runs once over the data, without gradients; its
    weights stay as they are. `rank`: inner size of a gate. Returns, by module path, the divergence (in nats)
    between what the gates say and exact attention at the end, on the rows they were trained on. Raises
    KPError where no site was seen.
    """
    for name, value in (("rank", rank), ("steps", steps)):
        if value < 1:
            raise KPConfigError(f"{name}: got {value}, expected 1 or more")
    check_writable(path)
    gates.check_installed()
    sampling = _Sampling(ROWS, torch.Generator().manual_seed(seed))
    observe(model, data, sampling, options)
    found, losses = {}, {}
    for module, samples in sampling.sites.items():
        found[module], losses[module] = _train(samples, rank, steps, learning_rate, sampling.generator)
    gates.save(found, path)
    return losses


def _train(
    samples: list[_Sample], rank: int, steps: int, rate: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], float]:
    first = samples[0]
    heads, width = first.queries.shape[1], first.queries.shape[3]
    pair = tuple(
        nn.Parameter(
            (torch.randn(heads, size, rank, generator=generator) * size**-0.5).to(first.queries.device)
        )
        for size in (width, 3 * width)
    )
    optimizer = torch.optim.Adam(pair, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    last: list[float] = []
    with torch.enable_grad():
        for step in range(steps):
            loss = _divergence(pair, samples[step % len(samples)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            last = [*last, float(loss.detach())][-len(samples) :]
    return (pair[0].detach(), pair[1].detach()), sum(last) / len(last)


def _divergence(pair: tuple[Tensor, ...], sample: _Sample) -> Tensor:
    """Kullback and Leibler's, from exact shares to the gates', mean over heads and rows."""
    keys = learned.projected_keys(pair[1], sample.keys)
    scores = learned.logits(pair[0], sample.queries, keys).masked_fill(~sample.kept, -1e30)
    said = torch.log_softmax(scores, -1)
    return F.kl_div(said, sample.shares, reduction="none").sum(-1).mean()
