"""What selectors read: q, k, and the mask block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.specs import AttentionSpec, SparseSpec

Lines = tuple[tuple[tuple[int, int], int], ...]


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
    gates: Sequence[Tensor] = ()  # [H,D,r] and [H,3·D,r], of `learned`

    @property
    def rows(self) -> int:
        return -(-self.q.shape[2] // self.sparse.block)

    @property
    def blocks(self) -> int:
        return -(-self.k.shape[2] // self.sparse.block)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def choices(self) -> int:
        """How many heads choose for themselves."""
        return self.k.shape[1] if self.sparse.shared else self.q.shape[1]

    def mask(
        self, rows: slice, size: int | None = None, columns: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """Flags [b,h,rows,blocks] of blocks that the mask keeps partly and wholly. With another `size` of
        blocks, rows and columns of those; only forms tell them."""
        if self.forms is None:
            assert self.flags is not None and size is None and columns is None
            return self.flags[0][:, :, rows], self.flags[1][:, :, rows]
        size = size or self.sparse.block
        columns = columns or slice(0, -(-self.k.shape[2] // size))
        queries = _ends(rows.start, rows.stop, size, self.q.shape[2], self.q.device)
        return self.between(queries, _ends(columns.start, columns.stop, size, self.k.shape[2], self.q.device))

    def between(self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Flags [1,1,rows,columns] of what forms keep partly and wholly, where rows and columns are queries
        and keys from a first to a last one."""
        maybe = torch.ones(1, 1, queries[0].numel(), keys[0].numel(), dtype=torch.bool, device=self.q.device)
        surely = maybe.clone()
        for slopes, rest in self.lines:
            least, most = _range(slopes, rest, queries, keys)
            maybe, surely = maybe & (least <= 0), surely & (most <= 0)
        return maybe & ~surely, surely

    @cached_property
    def lines(self) -> Lines:
        """Of each form, the slopes along q and k, and the rest of it."""
        return lines_of(self.forms or (), tuple(self.scalars))

    @property
    def offset(self) -> int:
        """The key that stands where query 0 does. The last query stands at the last key; but where the mask
        ends before, at the last key that it sees, and where it begins later, at the first."""
        along = self.k.shape[2] - self.q.shape[2]
        last = [-rest for slopes, rest in self.lines if slopes == (-1, 1)]
        first = [rest for slopes, rest in self.lines if slopes == (1, -1)]
        if last:
            along = min(*last, max(along, 0))
        return max(along, *first) if first else along

    def home(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The blocks [rows] of keys where the first and the last query of a row of blocks stand."""
        size = self.sparse.block
        first, last = _ends(rows.start, rows.stop, size, self.q.shape[2], self.q.device)
        return (first + self.offset) // size, (last + self.offset) // size

    def distance(self, rows: slice) -> Tensor:
        """How many blocks [rows,blocks] of keys the last query of a row of blocks is away from a block."""
        return self.home(rows)[1][:, None] - torch.arange(self.blocks, device=self.q.device)

    def scores(self, q: Tensor, k: Tensor, kept: Tensor) -> Tensor:
        """Those [B,H,n,m] of some q [B,H,n,D] and k [B,K,m,D] in float32; −∞ where nothing is kept."""
        grouped = q.unflatten(1, (k.shape[1], self.group))
        scores = torch.einsum("bkgid,bkjd->bkgij", grouped, k).flatten(1, 2) * self.spec.scale
        if self.spec.softcap is not None:
            scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
        return scores.masked_fill(~kept, float("-inf"))


@lru_cache(maxsize=1024)
def lines_of(forms: tuple[Any, ...], scalars: tuple[int, ...]) -> Lines:
    """Of each form, the slopes along q and k, and the rest of it."""
    names = [mask_render.symbol(name) for name in "qk"]
    numbers = {sympy.Symbol(f"n{i}", integer=True): n for i, n in enumerate(scalars)}
    found = []
    for form in map(sympy.sympify, forms):
        rest = int(form.subs({**numbers, **dict.fromkeys(names, 0)}))
        found.append(((int(form.coeff(names[0])), int(form.coeff(names[1]))), rest))
    return tuple(found)


def spread(flags: Tensor, size: int) -> Tensor:
    """Flags [b,h,rows,blocks] of blocks as those of the `size` rows and columns that each has."""
    return flags.repeat_interleave(size, 2).repeat_interleave(size, 3)


def _range(
    slopes: tuple[int, int], rest: int, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of a form in each block."""
    ends = []
    for slope, (first, last) in zip(slopes, (queries, keys), strict=True):
        pair = (slope * first, slope * last)
        ends.append((torch.minimum(*pair), torch.maximum(*pair)))
    return tuple(q[:, None] + k + rest for q, k in zip(*ends, strict=True))  # type: ignore[return-value]


def _ends(start: int, stop: int, size: int, length: int, device: Any) -> tuple[Tensor, Tensor]:
    """First and last index of blocks."""
    first = torch.arange(start, stop, device=device) * size
    return first, (first + size - 1).clamp(max=length - 1)
