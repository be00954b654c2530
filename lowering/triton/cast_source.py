"""Python source of the kernel for one launch of a `Program`.

    for each tile:  x0, x1, … = loads          v0, v1, … = the program's expressions, in float32
                    q = v * scale in FP8       the maxima of v, or the scales made of them

Where something is stored transposed, a tile is taken as its even and its odd rows, each a tensor of its own
(names end in _0 and _1). Two bytes of a column are then in one thread, and are turned as one number of 16
bits: the casts are computed once for both layouts, and the tile is turned by instructions made for that.
Instructions an element (H100, triton 3.6, 2026-11-26), bfloat16 to both layouts and the maximum: 9.7, with
a tile in one piece 12.0; what a memory-bound kernel may have is 29 at the clocks of a GPU at its power limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kp_compiler.lowering.fp8.program import Launch, Store

NAMES = {
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
    torch.float32: "tl.float32",
}
_LIMITS = {name: torch.finfo(dtype).max for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Inside:
    """Whether every tile lies within the matrix, along its rows and along its columns."""

    rows: bool
    columns: bool

    def mask(self, end: str = "M", row: str = "m", column: str | None = "k") -> str | None:
        """The condition of lying above row `end` and, where `column` is asked for, within the columns."""
        parts = [] if self.rows else [f"({row} < {end})"]
        parts += [] if self.columns or column is None else [f"({column} < K)"]
        return " & ".join(parts) or None

    def only(self, value: str, row: str) -> str:
        """The value, and zero outside."""
        mask = self.mask(row=row)
        return value if mask is None else f"tl.where({mask}, {value}, 0)"


def buffers_of(store: Store) -> list[int]:
    """The buffers a store writes, in the order of the kernel's pointers o0, o1, …"""
    return [b for b in (store.scales, store.plain, store.turned, store.amax) if b >= 0]


def source(
    launch: Launch,
    dtypes: tuple[str, ...],
    pointers: tuple[str, ...],
    constants: dict[str, Any],
    numbers: tuple[str, ...],
    inside: Inside,
) -> str:
    """A module with `kp_fused_cast`, a function of `pointers` and `numbers`. `dtypes` are those of the
    results; `constants` and `numbers` together are M, K, tile sizes, strides of leaves (s0, …) and results
    (t0, …), and the rows where results end (r0, …)."""
    turns = any(store.turned >= 0 for store in launch.stores)
    writer = _Writer(dtypes, inside, ("_0", "_1") if turns else ("",))
    writer.values(launch)
    for store in launch.stores:
        writer.store(store)
    return "\n".join(
        [
            "import triton",
            "import triton.language as tl",
            "",
            "@triton.jit",
            f"def kp_fused_cast({', '.join((*pointers, *numbers))}):",
            *(f"    {name}: tl.constexpr = {value}" for name, value in constants.items()),
            *(f"    {line}" for line in writer.lines),
            "",
        ]
    )


def _load(index: int, kind: str, inside: Inside, half: str) -> str:
    place, mask = {
        "full": (f" + m{half} * s{index} + k", inside.mask(row=f"m{half}")),
        "row": (f" + m{half}", inside.mask(row=f"m{half}", column=None)),
        "column": (" + k", None if inside.columns else "k < K"),
        "scalar": ("", None),
    }[kind]
    masked = "" if mask is None else f", mask={mask}, other=0.0"
    return f"tl.load(p{index}{place}{masked}).to(tl.float32)"


class _Writer:
    """Lines of a kernel. Results are numbered in the order they are written."""

    def __init__(self, dtypes: tuple[str, ...], inside: Inside, halves: tuple[str, ...]) -> None:
        self.dtypes, self.inside, self.halves = dtypes, inside, halves
        self.number = 0  # of the next result
        count = len(halves)
        self.lines = [
            "row_of_tiles = tl.program_id(0) // TILES",
            "column_of_tiles = tl.program_id(0) % TILES",
            "k = column_of_tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]",
            f"rows = tl.arange(0, BLOCK_M // {count})[:, None].to(tl.int64)",
            *(f"m{h} = row_of_tiles * BLOCK_M + {count} * rows + {i}" for i, h in enumerate(halves)),
        ]

    def values(self, launch: Launch) -> None:
        for half in self.halves:
            for index, (_, kind) in enumerate(launch.leaves):
                self.lines.append(f"x{index}{half} = {_load(index, kind, self.inside, half)}")
            self.lines += [_of_half(line, half) for line in launch.code]

    def store(self, store: Store) -> None:
        """Scale, cast and write one value."""
        if store.amax >= 0 or store.scales >= 0:
            self.magnitudes(store)
        if store.scales >= 0:
            self.scales(store)
        self.casts(store)
        if store.plain >= 0:
            self.plain(store)
        if store.turned >= 0:
            self.turned(store)
        if store.amax >= 0:
            self.maximum()

    def magnitudes(self, store: Store) -> None:
        """As integers, among which a NaN is the largest and an infinity the next."""
        for half in self.halves:
            bits = f"{store.value}{half}.to(tl.int32, bitcast=True) & 0x7FFFFFFF"
            self.lines.append(f"bits{half} = {self.inside.only(bits, f'm{half}')}")

    def both(self, name: str) -> str:
        """The larger of what both halves have."""
        if len(self.halves) == 1:
            return name
        return f"tl.maximum({name}_0, {name}_1)"

    def scales(self, store: Store) -> None:
        """Scales of the blocks of a tile, and where they go: whole rows, 1 x 128, 128 x 1 or 128 x 128."""
        if store.block[0] == 1:
            column = f"column_of_tiles + {store.column // 128}" if store.block[1] else "column_of_tiles"
            for half in self.halves:
                mask = self.inside.mask(f"r{self.number}", f"m{half}", column=None)
                place = f"(m{half} + {store.row})", column, mask
                self.scale(store, half, f"tl.max(bits{half}, axis=1)[:, None]", *place)
        else:
            row, end = f"(row_of_tiles + {store.row // 128})", f"r{self.number}"
            mask = self.inside.mask(end, "row_of_tiles * BLOCK_M", "k" if store.block[1] == 1 else None)
            if store.block[1] == 1:
                largest = f"tl.max({self.both('bits')}, axis=0)[None, :]"
                self.scale(store, "", largest, row, f"k + {store.column}", mask)
            else:
                column = f"column_of_tiles + {store.column // 128}"
                self.scale(store, "", f"tl.max({self.both('bits')})", row, column, mask)
            self.lines += [f"scale{half} = scale" for half in self.halves if half]
        self.number += 1

    def scale(self, store: Store, half: str, largest: str, row: str, column: str, mask: str | None) -> None:
        limit, number = _LIMITS[self.dtypes[self.number + 1]], self.number
        self.lines += [
            f"top = ({largest}).to(tl.float32, bitcast=True)",
            f"scale{half} = {limit} / tl.where(top < {limit * 2.0**-126}, {limit}, top)",
        ]
        if store.power_of_two:
            self.lines.append(f"scale{half} = tl.exp2(tl.floor(tl.log2(scale{half})))")
        kept = f"1.0 / scale{half}" if store.inverse else f"scale{half}"
        self.lines.append(f"tl.store(o{number} + {row} * t{number} + {column}, {kept}, mask={mask})")

    def casts(self, store: Store) -> None:
        """The conversion takes what is too large to the largest number (PTX has no other one to FP8), an
        infinity as well: a product with zero makes it NaN before. Triton's interpreter has to be told."""
        dtype = self.dtypes[self.number]
        limit = _LIMITS[dtype]
        scale = "scale{}" if store.scales >= 0 else f"x{store.scale}{{}}"
        for half in self.halves:
            q = f"tl.fma(scaled{half}, 0.0, scaled{half})"
            if triton.knobs.runtime.interpret:
                q = f"tl.clamp({q}, -{limit}, {limit}, propagate_nan=tl.PropagateNan.ALL)"
            self.lines += [
                f"scaled{half} = {store.value}{half} * {scale.format(half)}",
                f"q{half} = ({self.inside.only(q, f'm{half}')}).to({dtype})",
            ]

    def plain(self, store: Store) -> None:
        n = self.number
        for half in self.halves:
            place = f"(m{half} + {store.row}) * t{n} + k + {store.column}"
            mask = self.inside.mask(f"r{n}", f"m{half}")
            self.lines.append(f"tl.store(o{n} + {place}, q{half}, mask={mask})")
        self.number += 1

    def turned(self, store: Store) -> None:
        """Two rows at once. The lines of a transposed result are as long as a multiple of 16."""
        assert store.row % 2 == 0, store.row
        n = self.number
        mask = self.inside.mask(f"r{n}", "tl.trans(m_0)", "tl.trans(k)")
        self.lines += [
            "pair = q_0.to(tl.uint8, bitcast=True).to(tl.uint16)",
            "pair |= q_1.to(tl.uint8, bitcast=True).to(tl.uint16) << 8",
            f"line = (tl.trans(k) + {store.column}).to(tl.int64) * (t{n} // 2)",
            f"place = line + tl.trans(row_of_tiles * (BLOCK_M // 2) + rows) + {store.row // 2}",
            f"tl.store(o{n}.to(tl.pointer_type(tl.uint16)) + place, tl.trans(pair), mask={mask})",
        ]
        self.number += 1

    def maximum(self) -> None:
        n, mask = self.number, self.inside.mask(row="row_of_tiles * BLOCK_M", column=None)
        self.lines += [
            f"top = tl.max({self.both('bits')}).to(tl.float32, bitcast=True)",
            f"place = row_of_tiles * t{n} + column_of_tiles",
            f"tl.store(o{n} + place, top, mask={mask})",
        ]
        self.number += 1


def _of_half(line: str, half: str) -> str:
    """A line of a program, with the names of one half."""
    return re.sub(r"\b([vx]\d+)\b", rf"\1{half}", line)
