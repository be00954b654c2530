"""What a fused cast does, as data: expressions over an [M, K] tile, and where their FP8 results go.

A program travels in the string argument of `kp::fp8_fused`; `triton.fused_cast` turns it into kernels.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

# How a tensor is read at (m, k): all of it, one number a row, one a column, one number.
Kind = Literal["full", "row", "column", "scalar"]


@dataclass(frozen=True)
class Store:
    """`value * leaf[scale]` in FP8, as it is into buffer `plain`, transposed into buffer `turned` (-1: not),
    starting at (`row`, `column`) of the untransposed matrix."""

    value: str
    scale: int
    plain: int
    turned: int
    row: int = 0
    column: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel: `leaves` are (index of the operator's tensor, kind), read as x0, x1, …; `code` are
    assignments of float32 expressions to v0, v1, …."""

    leaves: tuple[tuple[int, Kind], ...]
    code: tuple[str, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Buffer:
    """A result: [rows, columns], or transposed [columns, rows rounded up to 16]. `rows` of -1 are the M of
    the launches."""

    dtype: str
    rows: int
    columns: int
    transposed: bool

    def shape(self, rows: Any) -> list[Any]:
        """Its sizes, for launches over `rows` rows."""
        total = rows if self.rows < 0 else self.rows
        return [self.columns, (total + 15) // 16 * 16] if self.transposed else [total, self.columns]


@dataclass(frozen=True)
class Program:
    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]
    fingerprint: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Program:
        data: dict[str, Any] = json.loads(text)
        launches = tuple(
            Launch(
                tuple((index, kind) for index, kind in one["leaves"]),
                tuple(one["code"]),
                tuple(Store(**store) for store in one["stores"]),
            )
            for one in data["launches"]
        )
        return cls(launches, tuple(Buffer(**b) for b in data["buffers"]), data["fingerprint"])
