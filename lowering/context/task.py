"""What one part of the queries has to know of one part of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kp_compiler.lowering import reference
from kp_compiler.specs import AttentionSpec, MaskSpec


@dataclass(frozen=True)
class Task:
    """The mask of the pair, None where all is kept, and what it reads; of `spec`, scale and soft-cap."""

    spec: AttentionSpec
    mask: MaskSpec | None = None
    operands: Sequence[Tensor] = ()
    scalars: Sequence[int] = ()

    def keep(self, q: Tensor, k: Tensor) -> Tensor | None:
        """As a tensor that broadcasts to [B,H,n,m]."""
        if self.mask is None:
            return None
        like = q.new_empty(1, 1, 1, 1).expand(*q.shape[:3], k.shape[2])
        return reference.mask(self.mask, self.operands, self.scalars, like)
