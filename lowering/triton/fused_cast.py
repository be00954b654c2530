"""Pointwise expression, scale, cast and transposed cast in one pass over a matrix.

    v = f(x0, x1, …)                                 any expression of a `Program`, in float32
    q = clamp(v * scale, ±max_finite) in FP8
    plain[m, k] = turned[k, m] = q

Reads every input once and writes one byte for each copy: 2 + 1 + 1 bytes an element for a plain bfloat16 cast
into both layouts. The transposed copy is turned inside a tile, so that both stores are coalesced. A kernel is
written for each launch of a program and compiled by Triton when it first runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from kp_compiler.lowering.fp8.program import Buffer, Launch, Program, Store

_TRITON = {
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
    torch.float32: "tl.float32",
}


def run(tensors: list[Tensor], program: Program) -> list[Tensor]:
    """All launches of a program on CUDA tensors; returns its buffers."""
    outs = program.results(tensors)
    for launch in program.launches:
        _launch(launch, program, tensors, outs)
    return outs


def _buffers(store: Store) -> list[int]:
    return [b for b in (store.scales, store.plain, store.turned, store.amax) if b >= 0]


def _launch(launch: Launch, program: Program, tensors: list[Tensor], outs: list[Tensor]) -> None:
    rows, columns = tensors[launch.matrix].shape
    leaves = [tensors[index] for index, _ in launch.leaves]
    full = [x for x, (_, kind) in zip(leaves, launch.leaves, strict=True) if kind == "full"]
    if any(x.stride(1) != 1 for x in full):
        leaves = [x.contiguous() if x.dim() == 2 else x for x in leaves]
        full = [x for x, (_, kind) in zip(leaves, launch.leaves, strict=True) if kind == "full"]
    height, width, warps = launch.tile
    buffers = [b for store in launch.stores for b in _buffers(store)]
    targets, ends = [outs[b] for b in buffers], [_end(program.buffers[b], outs[b], rows) for b in buffers]
    even = rows % height == 0 and columns % width == 0 and max(ends) == rows
    kernel = _kernel(launch, tuple(_TRITON[out.dtype] for out in targets))
    kernel[(triton.cdiv(columns, width), triton.cdiv(max(ends), height))](
        *leaves, *targets, *(x.stride(0) for x in full), *(out.stride(0) for out in targets), *ends,
        rows, columns, BLOCK_M=height, BLOCK_K=width, EVEN=even, num_warps=warps,
    )  # fmt: skip


def _end(buffer: Buffer, out: Tensor, rows: int) -> int:
    """The row, counted from the launch's first, where a result ends: padding is written, parts below are
    not."""
    if buffer.rows >= 0 or buffer.align == 1:
        return rows
    return out.shape[1] if buffer.layout == "turned" else out.shape[0] * buffer.tile[0]


@lru_cache(maxsize=1024)
def _kernel(launch: Launch, dtypes: tuple[str, ...]) -> Any:
    return PyCodeCache.load(source(launch, dtypes)).kernel


def source(launch: Launch, dtypes: tuple[str, ...]) -> str:
    """The kernel as Python: pointers of leaves and results, strides, where results end, sizes."""
    full = [i for i, (_, kind) in enumerate(launch.leaves) if kind == "full"]
    results = range(len(dtypes))
    arguments = [f"p{i}" for i in range(len(launch.leaves))] + [f"o{i}" for i in results]
    arguments += [f"s{i}" for i in full] + [f"t{i}" for i in results] + [f"r{i}" for i in results]
    lines = [
        "import triton",
        "import triton.language as tl",
        "",
        "@triton.jit",
        f"def kernel({', '.join(arguments)}, M, K,",
        "           BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):",
        "    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)",
        "    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]",
        "    inside = tl.full([BLOCK_M, BLOCK_K], True, tl.int1) if EVEN else (m < M) & (k < K)",
    ]
    lines += [f"    x{i} = {_load(i, kind)}" for i, (_, kind) in enumerate(launch.leaves)]
    lines += [f"    {line}" for line in launch.code]
    number = 0
    for store in launch.stores:
        lines += _stores(store, number, dtypes)
        number += len(_buffers(store))
    return "\n".join(lines) + "\n"


def _stores(store: Store, number: int, dtypes: tuple[str, ...]) -> list[str]:
    """Scale, cast and write one value; its results are numbered from `number`."""
    lines, scale = [], f"x{store.scale}"
    if store.scales >= 0:
        lines, scale, number = _scales(store, number, dtypes[number + 1]), "scale", number + 1
    lines += _scaled(store.value, scale, dtypes[number])
    if store.plain >= 0:
        lines += [
            f"    place = (m + {store.row}) * t{number} + k + {store.column}",
            f"    tl.store(o{number} + place, q, mask=None if EVEN else (k < K) & (m < r{number}))",
        ]
        number += 1
    if store.turned >= 0:
        lines += [
            f"    line = (tl.trans(k) + {store.column}).to(tl.int64)",
            f"    place = line * t{number} + tl.trans(m) + {store.row}",
            f"    edge = tl.trans((k < K) & (m < r{number}))",
            f"    tl.store(o{number} + place, tl.trans(q), mask=None if EVEN else edge)",
        ]
        number += 1
    if store.amax >= 0:
        lines += [
            f"    top = tl.max(tl.where(inside, tl.abs({store.value}), 0.0))",
            f"    bad = tl.max(tl.where(inside & ({store.value} != {store.value}), 1, 0))",
            "    top = tl.where(bad > 0, float('nan'), top)",
            f"    place = tl.program_id(1) * t{number} + tl.program_id(0)",
            f"    tl.store(o{number} + place, top, mask=tl.program_id(1) * BLOCK_M < M)",
        ]
    return lines


def _load(index: int, kind: str) -> str:
    if kind == "full":
        return f"tl.load(p{index} + m * s{index} + k, mask=inside, other=0.0).to(tl.float32)"
    if kind == "row":
        return f"tl.load(p{index} + m, mask=m < M, other=0.0).to(tl.float32)"
    if kind == "column":
        return f"tl.load(p{index} + k, mask=k < K, other=0.0).to(tl.float32)"
    return f"tl.load(p{index}).to(tl.float32)"


def _scales(store: Store, number: int, dtype: str) -> list[str]:
    """Scales of the blocks of a tile, and where they go: 1 x 128, 128 x 1 or 128 x 128."""
    limit = 448.0 if "e4" in dtype else 57344.0
    row, column = f"m + {store.row}", f"k + {store.column}"
    row_of_blocks = f"tl.program_id(1) + {store.row // 128}"
    column_of_blocks = f"tl.program_id(0) + {store.column // 128}"
    if store.block[0] == 1:
        largest, mask, column = "tl.max(top, axis=1)[:, None]", f"m < r{number}", column_of_blocks
    elif store.block[1] == 1:
        largest, row = "tl.max(top, axis=0)[None, :]", row_of_blocks
        mask = f"(k < K) & (tl.program_id(1) * BLOCK_M < r{number})"
    else:
        largest, row, column = "tl.max(top)", row_of_blocks, column_of_blocks
        mask = f"tl.program_id(1) * BLOCK_M < r{number}"
    rounded = ["    scale = tl.exp2(tl.floor(tl.log2(scale)))"] if store.power_of_two else []
    return [
        f"    top = tl.where(inside, tl.abs({store.value}), 0.0)",
        f"    top = {largest}",
        f"    scale = {limit} / tl.where(top < {limit * 2.0**-126}, {limit}, top)",
        *rounded,
        f"    tl.store(o{number} + ({row}) * t{number} + {column}, scale, mask={mask})",
    ]


def _scaled(value: str, scale: str, dtype: str) -> list[str]:
    """Clamped by comparisons, which leave NaN alone (a clamp beside a transposed FP8 store was miscompiled:
    triton-lang/triton#11111). Infinities become NaN, rows past the last one zeros."""
    limit = 448.0 if "e4" in dtype else 57344.0
    return [
        f"    scaled = {value} * {scale}",
        f"    q = tl.where(scaled > {limit}, {limit}, scaled)",
        f"    q = tl.where(q < {-limit}, {-limit}, q)",
        "    q = tl.where(tl.abs(scaled) == float('inf'), float('nan'), q)",
        f"    q = tl.where(inside, q, 0.0).to({dtype})",
    ]
