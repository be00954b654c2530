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

from kp_compiler.lowering.fp8.program import Launch, Program, Store

_TRITON = {
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
    torch.float32: "tl.float32",
}


def run(tensors: list[Tensor], program: Program) -> list[Tensor]:
    """All launches of a program on CUDA tensors; returns its buffers."""
    first = tensors[_first_full(program.launches[0])]
    outs = [first.new_empty(b.shape(first.shape[0]), dtype=getattr(torch, b.dtype)) for b in program.buffers]
    for launch in program.launches:
        _launch(launch, program, tensors, outs)
    return outs


def _buffers(store: Store) -> list[int]:
    return [b for b in (store.scales, store.plain, store.turned, store.amax) if b >= 0]


def _first_full(launch: Launch) -> int:
    return next(index for index, kind in launch.leaves if kind == "full")


def _launch(launch: Launch, program: Program, tensors: list[Tensor], outs: list[Tensor]) -> None:
    rows, columns = tensors[_first_full(launch)].shape
    leaves = [tensors[index] for index, _ in launch.leaves]
    full = [x for x, (_, kind) in zip(leaves, launch.leaves, strict=True) if kind == "full"]
    if any(x.stride(1) != 1 for x in full):
        leaves = [x.contiguous() if x.dim() == 2 else x for x in leaves]
        full = [x for x, (_, kind) in zip(leaves, launch.leaves, strict=True) if kind == "full"]
    height, width, warps = launch.tile
    targets = [outs[b] for store in launch.stores for b in _buffers(store)]
    dtypes = tuple(_TRITON[out.dtype] for out in targets)
    kernel = _kernel(launch, dtypes)
    even = rows % height == 0 and columns % width == 0
    grid = (triton.cdiv(columns, width), triton.cdiv(rows, height))
    kernel[grid](
        *leaves, *targets, *(x.stride(0) for x in full), *(out.stride(0) for out in targets),
        *(out.shape[0] for out in targets), rows, columns,
        BLOCK_M=height, BLOCK_K=width, EVEN=even, num_warps=warps,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _kernel(launch: Launch, dtypes: tuple[str, ...]) -> Any:
    return PyCodeCache.load(source(launch, dtypes)).kernel


def source(launch: Launch, dtypes: tuple[str, ...]) -> str:
    """The kernel as Python: pointers of leaves and results, strides, sizes."""
    full = [i for i, (_, kind) in enumerate(launch.leaves) if kind == "full"]
    arguments = [f"p{i}" for i in range(len(launch.leaves))] + [f"o{i}" for i in range(len(dtypes))]
    arguments += [f"s{i}" for i in full] + [f"t{i}" for i in range(len(dtypes))]
    arguments += [f"r{i}" for i in range(len(dtypes))] + ["M", "K"]
    lines = [
        "import triton",
        "import triton.language as tl",
        "",
        "@triton.jit",
        f"def kernel({', '.join(arguments)}, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,",
        "           EVEN: tl.constexpr):",
        "    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)",
        "    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]",
        "    inside = tl.full([BLOCK_M, BLOCK_K], True, tl.int1) if EVEN else (m < M) & (k < K)",
    ]
    lines += [f"    x{i} = {_load(i, kind)}" for i, (_, kind) in enumerate(launch.leaves)]
    lines += [f"    {line}" for line in launch.code]
    number = 0
    for store in launch.stores:
        scale = f"x{store.scale}"
        if store.scales >= 0:
            lines += _scales(store, number, dtypes[number + 1])
            scale, number = "scale", number + 1
        lines += _scaled(store.value, scale, dtypes[number])
        if store.plain >= 0:
            lines.append(
                f"    tl.store(o{number} + (m + {store.row}) * t{number} + k + {store.column}, q,"
                f" mask=(k < K) & (m + {store.row} < {_end(store, number)}))"
            )
            number += 1
        if store.turned >= 0:
            lines += [
                f"    edge = (k < K) & (m + {store.row} < t{number})",
                f"    line = (tl.trans(k) + {store.column}).to(tl.int64)",
                f"    place = line * t{number} + tl.trans(m) + {store.row}",
                f"    tl.store(o{number} + place, tl.trans(q), mask=None if EVEN else tl.trans(edge))",
            ]
            number += 1
        if store.amax >= 0:
            lines += [
                f"    top = tl.max(tl.where(inside, tl.abs({store.value}), 0.0))",
                f"    bad = tl.max(tl.where(inside & ({store.value} != {store.value}), 1, 0))",
                "    top = tl.where(bad > 0, float('nan'), top)",
                f"    tl.store(o{number} + tl.program_id(1) * t{number} + tl.program_id(0), top)",
            ]
            number += 1
    return "\n".join(lines) + "\n"


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
    lines = [f"    top = tl.where(inside, tl.abs({store.value}), 0.0)"]
    rows, columns = f"(m + {store.row})", f"(k + {store.column})"
    if store.block[0] == 1:
        lines.append("    top = tl.max(top, axis=1)[:, None]")
        place, mask = (
            f"{rows} * t{number} + tl.program_id(0) + {store.column // 128}",
            f"m + {store.row} < {_end(store, number)}",
        )
    elif store.block[1] == 1:
        lines.append("    top = tl.max(top, axis=0)[None, :]")
        place, mask = f"(tl.program_id(1) + {store.row // 128}) * t{number} + {columns}", "k < K"
    else:
        lines.append("    top = tl.max(top)")
        place = (
            f"(tl.program_id(1) + {store.row // 128}) * t{number} + tl.program_id(0) + {store.column // 128}"
        )
        mask = "None"
    lines.append(f"    scale = {limit} / tl.where(top < {limit * 2.0**-126}, {limit}, top)")
    if store.power_of_two:
        lines.append("    scale = tl.exp2(tl.floor(tl.log2(scale)))")
    return [*lines, f"    tl.store(o{number} + {place}, scale, mask={mask})"]


def _end(store: Store, number: int) -> str:
    """The first row that a launch must not write: where a part's rows end, or a padded result does."""
    return f"r{number}" if store.block == (1, 128) else f"M + {store.row}"


def _scaled(value: str, scale: str, dtype: str) -> list[str]:
    """Clamped by comparisons, which leave NaN alone (a clamp beside a transposed FP8 store was miscompiled:
    triton-lang/triton#11111). Rows past the last one become zeros."""
    limit = 448.0 if "e4" in dtype else 57344.0
    return [
        f"    q = {value} * {scale}",
        f"    q = tl.where(q > {limit}, {limit}, q)",
        f"    q = tl.where(q < {-limit}, {-limit}, q)",
        f"    q = tl.where(inside, q, 0.0).to({dtype})",
    ]
