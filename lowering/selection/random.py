"""Blocks at random, the same for the same seed: what any other selector has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # multipliers of xxHash32


def scorer(site: Site) -> Callable[[slice], Tensor]:
    batch, heads = site.q.shape[:2]

    def score(rows: slice) -> Tensor:
        value = torch.full((1, 1, 1, 1), site.sparse.seed & 0xFFFFFFFF, device=site.q.device)
        ends = ((0, batch), (0, heads), (rows.start, rows.stop), (0, site.blocks))
        for dim, ((first, last), odd) in enumerate(zip(ends, _ODD, strict=True)):
            shape = [-1 if dim == other else 1 for other in range(4)]
            index = torch.arange(first, last, device=site.q.device).view(shape)
            value = _mixed(value + (index + 1) * odd)
        return value.float() / 2**32

    return score


def _mixed(x: Tensor) -> Tensor:
    """A permutation of 32 bits without a pattern (the finalizer of MurmurHash3)."""
    x = x & 0xFFFFFFFF
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * odd) & 0xFFFFFFFF
    return x ^ (x >> 16)
