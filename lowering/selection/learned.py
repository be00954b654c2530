"""Blocks by a small trained gate for each head: what a block of queries looks for, what one of keys has.

    share = softmax(Wq·mean(q) · Wk·[mean(k), max(k), min(k)] / r^½)     over blocks of keys under the mask

Method: Gao et al., SeerAttention (arXiv:2410.13276), here after rotary positions, as that is where a graph
has q and k. `kp.train_selectors` trains the gates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site


def scorer(site: Site) -> Callable[[slice], Tensor]:
    keys = projected_keys(site.gates[1], key_features(site.k, site.sparse.block))

    def score(rows: slice) -> Tensor:
        size = site.sparse.block
        q = query_features(site.q[:, :, rows.start * size : rows.stop * size], size)
        found = logits(site.gates[0], q, keys)
        kept = torch.logical_or(*site.mask(rows))
        return torch.softmax(found.masked_fill(~kept, float("-inf")), -1).nan_to_num(0.0)

    return score


def query_features(q: Tensor, size: int) -> Tensor:
    """[B,H,S,D] to means [B,H,rows,D] of blocks in float32; the last query stands for those it lacks."""
    return _blocks(q, size).mean(3, dtype=torch.float32)


def key_features(k: Tensor, size: int) -> Tensor:
    """[B,K,T,D] to means, largest and smallest [B,K,blocks,3·D] of blocks in float32."""
    blocks = _blocks(k, size)
    return torch.cat(
        [blocks.mean(3, dtype=torch.float32), blocks.amax(3).float(), blocks.amin(3).float()], -1
    )


def _blocks(x: Tensor, size: int) -> Tensor:
    """[B,H,N,D] to [B,H,blocks,size,D], the last row repeated."""
    count = (x.shape[2] + size - 1) // size
    place = torch.arange(count * size, device=x.device).clamp(max=x.shape[2] - 1)
    return x.index_select(2, place).unflatten(2, (-1, size))


def projected_keys(weight: Tensor, features: Tensor) -> Tensor:
    """[H,3·D,r] and [B,K,blocks,3·D] to [B,H,blocks,r]."""
    grouped = weight.unflatten(0, (features.shape[1], -1))
    return torch.einsum("kgfr,bknf->bkgnr", grouped, features).flatten(1, 2)


def logits(weight: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """[H,D,r], [B,H,rows,D] and projected keys [B,H,blocks,r] to [B,H,rows,blocks]."""
    found = torch.einsum("hfr,bhnf->bhnr", weight, queries)
    return found @ keys.mT * weight.shape[2] ** -0.5
