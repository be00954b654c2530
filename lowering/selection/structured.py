"""Blocks by their place alone: half of a budget on the nearest, half on columns evenly spread.

Method: Child et al., Sparse Transformers (arXiv:1904.10509), where the stride follows from the budget:
columns come in the order of van der Corput's sequence, of which any beginning is evenly spread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kp_compiler.lowering.selection.site import Site


def scorer(site: Site) -> Callable[[slice], Tensor]:
    blocks = site.blocks
    column = torch.arange(blocks, device=site.q.device)
    turned = torch.zeros_like(column)
    bits = max(1, (blocks - 1).bit_length())
    for bit in range(bits):
        turned |= ((column >> bit) & 1) << (bits - 1 - bit)
    spread = torch.argsort(torch.argsort(turned))

    def score(rows: slice) -> Tensor:
        rank = torch.minimum(2 * site.distance(rows).abs(), 2 * spread + 1)
        return (-rank.float()).expand(*site.q.shape[:2], -1, -1)

    return score
