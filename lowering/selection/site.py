"""What selectors read: q, k, and the mask block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.specs import AttentionSpec, SparseSpec


@dataclass(frozen=True)
class Site:
    """q [B,H,S,D] and k [B,K,T,D]. The mask is its `forms`, at most zero where a pair is kept, linear in q, k
    and the numbers n0, n1, …, or, for any other mask, flags [B or 1, H or 1, rows, blocks] of the blocks that
    need it and of those that don't."""

    spec: AttentionSpec
    sparse: SparseSpec
    q: Tensor
    k: Tensor
    scalars: Sequence[int] = ()
    forms: tuple[Any, ...] | None = ()
    flags: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int:
        return -(-self.q.shape[2] // self.sparse.block)

    @property
    def blocks(self) -> int:
        return -(-self.k.shape[2] // self.sparse.block)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def mask(self, rows: slice, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Flags [b,h,rows,blocks] of blocks that the mask keeps partly and wholly. With another `size` of
        blocks, rows of those; only forms tell them."""
        if self.forms is None:
            assert self.flags is not None and size is None
            return self.flags[0][:, :, rows], self.flags[1][:, :, rows]
        size = size or self.sparse.block
        queries = _ends(rows.start, rows.stop, size, self.q.shape[2], self.q.device)
        keys = _ends(0, -(-self.k.shape[2] // size), size, self.k.shape[2], self.q.device)
        maybe = torch.ones(1, 1, queries[0].numel(), keys[0].numel(), dtype=torch.bool, device=self.q.device)
        surely = maybe.clone()
        for index in range(len(self.forms)):
            least, most = self._range(index, queries, keys)
            maybe, surely = maybe & (least <= 0), surely & (most <= 0)
        return maybe & ~surely, surely

    def linear(self, index: int) -> tuple[tuple[int, int], int]:
        """A form's slopes along q and k, and the rest of it."""
        form = sympy.sympify(self.forms[index])  # type: ignore[index]
        names = [mask_render.symbol(name) for name in "qk"]
        numbers = {sympy.Symbol(f"n{i}", integer=True): n for i, n in enumerate(self.scalars)}
        rest = int(form.subs({**numbers, **dict.fromkeys(names, 0)}))
        return (int(form.coeff(names[0])), int(form.coeff(names[1]))), rest

    def _range(
        self, index: int, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of a form in each block."""
        slopes, rest = self.linear(index)
        ends = []
        for slope, (first, last) in zip(slopes, (queries, keys), strict=True):
            pair = (slope * first, slope * last)
            ends.append((torch.minimum(*pair), torch.maximum(*pair)))
        return tuple(q[:, None] + k + rest for q, k in zip(*ends, strict=True))  # type: ignore[return-value]


def _ends(start: int, stop: int, size: int, length: int, device: Any) -> tuple[Tensor, Tensor]:
    """First and last index of blocks."""
    first = torch.arange(start, stop, device=device) * size
    return first, (first + size - 1).clamp(max=length - 1)
