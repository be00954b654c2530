"""Where a forward pass writes its results, and what it goes on from.

Results in half precision that more keys are still to be taken into keep 24 bits of float32: the upper half
lies in the memory of `out`, the next eight bits in `tail`. So they are rounded by 2⁻¹⁶ each time, and take
one byte beside their result, where float32 would take four (heads of no power of two, or under 64, take as
much as the next that is).

The numbers of a tail's row have an order of their own (`places`): of every eight columns the first two in
the first quarter of the row, and so on. So what a thread has of a row of products of the tensor cores lies
side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUND = 0x80  # half of the last bit that is kept


@dataclass(frozen=True)
class Into:
    """`out` [B,H,S,E], of any strides. `start`: what attention over other keys gave, out and lse [B,H,S] in
    float32, taken into the result; its out may lie where the results go. `tail`, from `tail_of`: of what
    `start` gave, and of results that are not the `last`; None where these are as they are."""

    out: Tensor
    start: tuple[Tensor, Tensor] | None = None
    tail: Tensor | None = None
    last: bool = True

    @property
    def continues(self) -> bool:
        """Whether what it goes on from has a tail."""
        return self.tail is not None and self.start is not None

    @property
    def unfinished(self) -> bool:
        """Whether the results get one."""
        return self.tail is not None and not self.last

    def tensors(self) -> dict[str, Tensor]:
        """By the names that kernels have for them."""
        found = {"out": self.out}
        if self.start is not None:
            found |= {"start_out": self.start[0], "start_lse": self.start[1]}
        if self.tail is not None and (self.continues or self.unfinished):
            found["tail"] = self.tail
        return found

    def earlier(self) -> tuple[Tensor, Tensor] | None:
        """What it goes on from, out in float32 if it has a tail."""
        if self.start is None or self.tail is None:
            return self.start
        return joined(self.start[0], self.tail), self.start[1]

    def put(self, value: Tensor) -> None:
        if self.unfinished:
            assert self.tail is not None
            divide(value, self.out, self.tail)
        else:
            self.out.copy_(value)


def tail_of(out: Tensor) -> Tensor:
    """An empty one for results [B,H,S,E]: [B,H,S,E or more] uint8."""
    batch, heads, rows, width = out.shape
    return out.new_empty((batch, rows, heads, padded(width)), dtype=torch.uint8).transpose(1, 2)


def padded(width: int) -> int:
    """Columns of a Hopper kernel's tile for heads of this size, where what lies outside of a
    tensor is read as zeros, and numbers of a tail's row."""
    return max(64, 1 << (width - 1).bit_length())


def places(upper: Tensor, tail: Tensor) -> Tensor:
    """Of each column of `upper`, where it is in a row of `tail`."""
    column = torch.arange(upper.shape[-1], device=upper.device)
    return column % 8 // 2 * (tail.shape[-1] // 4) + column // 8 * 2 + column % 2


def joined(upper: Tensor, tail: Tensor) -> Tensor:
    """float32 of upper halves, in the memory of half precision, and the bits after them."""
    bits = (upper.view(torch.int16).int() << 16) | (tail[..., places(upper, tail)].int() << 8)
    return bits.view(torch.float32)


def divide(value: Tensor, upper: Tensor, tail: Tensor) -> None:
    """`value`, rounded to 24 bits of float32, to both. The NaNs that arithmetic makes stay NaN."""
    bits = value.float().view(torch.int32)
    bits = torch.where(value.isnan(), bits, bits + ROUND)
    upper.view(torch.int16).copy_(bits >> 16)
    tail[..., places(upper, tail)] = ((bits >> 8) & 0xFF).to(torch.uint8)
