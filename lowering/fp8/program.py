"""What a fused cast does, as data: expressions over an [M, K] tile, and where their FP8 results go.

A program travels in the string argument of `kp::fp8_fused`; `triton.fused_cast` turns it into kernels.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# How a tensor is read at (m, k): all of it, one number a row, one a column, one number.
Kind = Literal["full", "row", "column", "scalar"]
Layout = Literal["plain", "turned", "tiles"]


@dataclass(frozen=True)
class Store:
    """`value * leaf[scale]` in FP8, as it is into buffer `plain`, transposed into buffer `turned`, starting
    at (`row`, `column`) of the untransposed matrix; and the largest magnitude of `value` in each tile into
    buffer `amax`. With a `block` the kernel makes the scales itself, one for `block` elements of a tile, and
    writes them, or their inverses, into buffer `scales`. -1: not."""

    value: str
    scale: int
    plain: int
    turned: int
    row: int = 0
    column: int = 0
    amax: int = -1
    block: tuple[int, int] = (0, 0)
    scales: int = -1
    inverse: bool = False
    power_of_two: bool = False


@dataclass(frozen=True)
class Launch:
    """One kernel: `leaves` are (index of the operator's tensor, kind), read as x0, x1, …; `code` are
    assignments of float32 expressions to v0, v1, …; `tile` is rows, columns, warps; `columns` the K of all
    it reads."""

    leaves: tuple[tuple[int, Kind], ...]
    code: tuple[str, ...]
    stores: tuple[Store, ...]
    tile: tuple[int, int, int]
    columns: int

    @property
    def matrix(self) -> int:
        """The index of a tensor that has the launch's rows and columns."""
        return next(index for index, kind in self.leaves if kind == "full")


@dataclass(frozen=True)
class Buffer:
    """A result: [rows, columns], or transposed [columns, rows], or one number for each tile of `tile`; the
    rows rounded up to `align`. `rows` of -1 are the M of the launches."""

    dtype: str
    rows: int
    columns: int
    layout: Layout
    tile: tuple[int, int] = (1, 1)
    align: int = 1

    def shape(self, rows: Any) -> list[Any]:
        """Its sizes, for launches over `rows` rows."""
        total = rows if self.rows < 0 else self.rows
        total = (total + self.align - 1) // self.align * self.align
        if self.layout == "turned":
            return [self.columns, total]
        height, width = self.tile
        return [(total + height - 1) // height, (self.columns + width - 1) // width]


@dataclass(frozen=True)
class Program:
    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]
    fingerprint: str = ""

    def results(self, tensors: list[Tensor]) -> list[Tensor]:
        """Its buffers, not yet written."""
        first = tensors[self.launches[0].matrix]
        return [first.new_empty(b.shape(first.shape[0]), dtype=getattr(torch, b.dtype)) for b in self.buffers]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Program:
        data: dict[str, Any] = json.loads(text)
        launches = tuple(
            Launch(
                tuple((index, kind) for index, kind in one["leaves"]),
                tuple(one["code"]),
                tuple(Store(**{**store, "block": tuple(store["block"])}) for store in one["stores"]),
                tuple(one["tile"]),
                one["columns"],
            )
            for one in data["launches"]
        )
        buffers = tuple(Buffer(**{**b, "tile": tuple(b["tile"])}) for b in data["buffers"])
        return cls(launches, buffers, data["fingerprint"])


# Rows, columns and warps of a tile: for one transposed copy or scales made in the tile, for both layouts, for
# several matrices. One H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-26, bfloat16 to both layouts and the
# maximum: 8192 x 14336 2807 GB/s, 15872 x 16384 2835 (tiles of 128 x 128: 2792 and 2740; a plain copy: 2953);
# dSwiGLU to five copies 2774 GB/s.
_TILE = (128, 128, 8)
_TILE_OF_BOTH = (64, 128, 4)
_TILE_OF_MANY = (64, 128, 8)
MOST_COLUMNS = 16384  # of a tile of whole rows, which a block of threads holds in registers


def tile_for(
    leaves: tuple[tuple[int, Kind], ...], stores: tuple[Store, ...], columns: int
) -> tuple[int, int, int]:
    """Scales are made within a tile, which then has to be 128 by 128, or whole rows."""
    made = [store.block for store in stores if store.scales >= 0]
    if (1, 0) in made:
        width = 1 << (columns - 1).bit_length()
        return max(1, 8192 // width), width, 16 if width > 8192 else 8
    if made:
        return _TILE
    if sum(kind == "full" for _, kind in leaves) > 1:
        return _TILE_OF_MANY
    both = any(store.plain >= 0 and store.turned >= 0 for store in stores)
    return _TILE_OF_BOTH if both else _TILE
