"""Which tokens of a sequence each rank has.

    contiguous   rank r has the r-th of P parts: for masks that look at neighbours
    zigzag       the r-th and the last but r-th of 2·P parts: under a causal mask all ranks have as many pairs
    documents    what the order of a batch says (`order`): as many pairs within documents for all ranks

A rank's tokens lie in the order of its parts, those of "documents" in that of the sequence. Sizes may be
symbolic; ranks are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Fixed = Literal["contiguous", "zigzag"]  # the same for all batches
Kind = Literal["contiguous", "zigzag", "documents"]


@dataclass(frozen=True)
class Layout:
    """`tokens` in all, a multiple of `parts`, on `size` ranks."""

    kind: Kind
    size: int
    tokens: Any

    @property
    def parts(self) -> int:
        return self.size * self.each

    @property
    def each(self) -> int:
        """Parts of a rank."""
        return 2 if self.kind == "zigzag" else 1

    @property
    def part(self) -> Any:
        """Tokens of a part."""
        return self.tokens // self.parts

    def starts(self, rank: int) -> tuple[Any, ...]:
        """Where the parts of a rank begin in the sequence, in the order that the rank has them."""
        assert self.kind != "documents", "a rank's tokens are no parts of the sequence"
        places = (rank,) if self.kind == "contiguous" else (rank, self.parts - 1 - rank)
        return tuple(place * self.part for place in places)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Places [tokens / size] in the sequence of what a rank has."""
        return torch.cat(
            [torch.arange(start, start + self.part, device=device) for start in self.starts(rank)]
        )

    def taken(self, rank: int, x: Tensor) -> Tensor:
        """Of a vector of the sequence, along the last dimension, what a rank has."""
        return torch.cat([x.narrow(-1, start, self.part) for start in self.starts(rank)], -1)

    def joined(self, of_ranks: Sequence[Tensor], dim: int) -> Tensor:
        """The sequence along `dim`, from what every rank has of it."""
        parts: dict[Any, Tensor] = {}
        for rank, x in enumerate(of_ranks):
            for i, start in enumerate(self.starts(rank)):
                parts[start] = x.narrow(dim, i * self.part, self.part)
        return torch.cat([parts[start] for start in sorted(parts)], dim)

    def divided(self, x: Tensor, dim: int) -> list[list[Tensor]]:
        """What every rank has of a sequence along `dim`, as its parts."""
        return [[x.narrow(dim, start, self.part) for start in self.starts(rank)] for rank in range(self.size)]


@dataclass(frozen=True)
class Ordered(Layout):
    """As `places` [tokens] say: rank after rank, where in the sequence its tokens lie."""

    places: Tensor = field(compare=False)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        return self.places.narrow(0, rank * self.part, self.part).to(device)

    def taken(self, rank: int, x: Tensor) -> Tensor:
        return x.index_select(-1, self.positions(rank, x.device))

    def joined(self, of_ranks: Sequence[Tensor], dim: int) -> Tensor:
        given = torch.cat(list(of_ranks), dim)
        return torch.empty_like(given).index_copy_(dim, self.places.to(given.device), given)

    def divided(self, x: Tensor, dim: int) -> list[list[Tensor]]:
        return [[part] for part in x.index_select(dim, self.places.to(x.device)).split(self.part, dim)]


def of_local(kind: Kind, size: int, local: Any, places: Tensor | None = None) -> Layout:
    """From the tokens that one rank has, and, of documents, where everyone's lie."""
    if places is None:
        return Layout(kind, size, local * size)
    return Ordered(kind, size, local * size, places)
