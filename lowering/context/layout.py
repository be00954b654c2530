"""Which tokens of a sequence each rank has.

    contiguous   rank r has the r-th of P parts: for masks that look at neighbours
    zigzag       the r-th and the last but r-th of 2·P parts: under a causal mask all ranks have as many pairs

A rank's tokens lie in the order of its parts. Sizes may be symbolic; ranks are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["contiguous", "zigzag"]


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
        places = (rank,) if self.kind == "contiguous" else (rank, self.parts - 1 - rank)
        return tuple(place * self.part for place in places)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Places [tokens / size] in the sequence of what a rank has."""
        return torch.cat(
            [torch.arange(start, start + self.part, device=device) for start in self.starts(rank)]
        )

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


def of_local(kind: Kind, size: int, local: Any) -> Layout:
    """From the tokens that one rank has."""
    return Layout(kind, size, local * size)
