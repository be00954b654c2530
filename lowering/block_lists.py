"""Which blocks of pairs an attention kernel visits: lists of blocks by lines, in memory as long as they are.

A line is a block of queries, or, in the lists of the kernels for dk and dv, a block of keys. Lines may be of
any length, share blocks in memory and lie in any order: a head of its own list, heads with one list for all
and heads that visit everything look the same to a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WHOLE = 2


@dataclass(frozen=True)
class Lists:
    """Line l of batch b and head h visits blocks[at[b,h,l] …], count[b,h,l] of them, and applies the mask in
    the first edges[b,h,l] only. int32, `at` int64; b and h are those of q, or 1, for all."""

    edges: Tensor
    count: Tensor
    at: Tensor
    blocks: Tensor  # [anything]

    @staticmethod
    def of(partial: Tensor, whole: Tensor) -> Lists:
        """From flags [b,h,lines,blocks] of the blocks that need the mask and of those that don't."""
        edges, count = (x.sum(-1, dtype=torch.int32) for x in (partial, partial | whole))
        kinds = partial.to(torch.int8) * 2 + whole.to(torch.int8)
        blocks = torch.argsort(kinds, dim=-1, descending=True, stable=True).int()
        return Lists.even(edges, count, blocks)

    @staticmethod
    def even(edges: Tensor, count: Tensor, blocks: Tensor) -> Lists:
        """Lines of one length in memory: blocks [b,h,lines,length]."""
        at = torch.arange(edges.numel(), device=edges.device).view(edges.shape) * blocks.shape[-1]
        return Lists(edges, count, at, blocks.flatten())

    def tensors(self) -> list[Tensor]:
        return [self.edges, self.count, self.at, self.blocks]

    def visited(self, others: int) -> Tensor:
        """What is made of each block, [b,h,lines,others]: nothing, its mask applied (1), or all of it
        (WHOLE)."""
        places = torch.arange(others, device=self.at.device)
        edges, count, at = (x.unsqueeze(-1) for x in (self.edges, self.count, self.at))
        place = torch.where(places < count, at + places, 0)
        block = torch.where(places < count, self.blocks[place].long(), others)
        made = torch.where(places < edges, 1, WHOLE).to(torch.int8)
        kinds = torch.zeros(*self.at.shape, others + 1, dtype=torch.int8, device=self.at.device)
        return kinds.scatter_(3, block, made)[..., :others].contiguous()

    def arguments(self) -> dict[str, Any]:
        """Of a kernel, by parameter name."""
        batches, heads, lines = self.count.shape
        return {
            "edge_count": self.edges.contiguous(),
            "block_count": self.count.contiguous(),
            "list_at": self.at.contiguous(),
            "blocks": self.blocks.contiguous(),
            "list_b": heads * lines if batches > 1 else 0,
            "list_h": lines if heads > 1 else 0,
        }
