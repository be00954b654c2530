"""What one part of the queries has to know of one part of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from kp_compiler.lowering import reference
from kp_compiler.specs import AttentionSpec, MaskSpec


@dataclass(frozen=True)
class Task:
    """The mask of the pair, None where all is kept, and what it reads; of `spec`, scale, soft-cap and how
    blocks are chosen, by schedules that see all keys at once."""

    spec: AttentionSpec
    mask: MaskSpec | None = None
    operands: Sequence[Tensor] = ()
    scalars: Sequence[int] = ()
    known: dict[Any, Any] = field(default_factory=dict, compare=False)  # what engines have made of it

    @cached_property
    def alone(self) -> AttentionSpec:
        """Of the pair, as one site's; without a sink, which the first keys of a query take in."""
        return replace(self.spec, mask=self.mask or MaskSpec(), sink=None, dead_rows="zero")

    def keep(self, q: Tensor, k: Tensor) -> Tensor | None:
        """As a tensor that broadcasts to [B,H,n,m]."""
        kept = None
        if self.mask is not None:
            like = q.new_empty(1, 1, 1, 1).expand(*q.shape[:3], k.shape[2])
            kept = reference.mask(self.mask, self.operands, self.scalars, like)
        if self.spec.sparse is None:
            return kept
        spec = replace(self.spec, mask=self.mask or MaskSpec())
        chosen = reference.chosen_pairs(q, k, k, list(self.operands), list(self.scalars), spec)
        return chosen if kept is None else chosen & kept
