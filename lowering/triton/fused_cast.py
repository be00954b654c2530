"""Pointwise expression, scale, cast and transposed cast in one pass over a matrix.

    v = f(x0, x1, …)                                 any expression of a `Program`, in float32
    q = clamp(v * scale, ±max_finite) in FP8
    plain[m, k] = turned[k, m] = q

Reads every input once and writes one byte for each copy: 2 + 1 + 1 bytes an element for a plain bfloat16 cast
into both layouts. The transposed copy is turned inside a tile, so that both stores are coalesced. A kernel is
written for each launch of a program, with the sizes that are known as constants; in compiled graphs Inductor
launches it as it launches its own.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._sympy.functions import CeilDiv

from kp_compiler.lowering.fp8.fused import fp8_fused, parse
from kp_compiler.lowering.fp8.program import Buffer, Launch, Program, Store

_TRITON = {
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
    torch.float32: "tl.float32",
}


@cache
def register() -> None:
    """Tell Inductor, once, that `kp::fp8_fused` is these kernels on a CUDA device."""
    from torch._inductor.lowering import register_lowering

    register_lowering(fp8_fused(), type_promotion_kind=None)(_lowered)


def _lowered(tensors: list[Any], program: str) -> Any:
    """Inductor's nodes for a program: its buffers, unwritten, and a kernel for each launch."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor import ir
    from torch._inductor.lowering import empty_strided, fallback_handler
    from torch._inductor.virtualized import V

    device, parsed = tensors[0].get_device(), parse(program)
    if device.type != "cuda":
        return fallback_handler(fp8_fused(), add_to_fallback_set=False)(tensors, program)
    sizes = [[_expr(size) for size in out.shape] for out in V.graph.current_node.meta["val"]]
    outs = [
        empty_strided(size, None, dtype=getattr(torch, buffer.dtype), device=device)
        for size, buffer in zip(sizes, parsed.buffers, strict=True)
    ]
    for launch in parsed.launches:
        leaves = [_readable(tensors[index], kind) for index, kind in launch.leaves]
        strides = [
            x.get_stride()[0] for x, (_, kind) in zip(leaves, launch.leaves, strict=True) if kind == "full"
        ]
        one = kernel_for(launch, parsed, strides, sizes, tensors[launch.matrix].get_size()[0])
        pointers = [*leaves, *(outs[b] for b in one.buffers)]
        ir.UserDefinedTritonKernel(
            kernel_idx=kernel_side_table.add_kernel(_tuned(one.source, one.warps)),
            grid=[(*one.grid, 1, 1)],
            tma_descriptor_metadata={},
            kernel_args=dict(zip(one.pointers, pointers, strict=True)) | one.numbers,
        )
    return outs


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _readable(x: Any, kind: str) -> Any:
    """A tensor in memory, its last dimension contiguous."""
    from torch._inductor.ir import ExternKernel, TensorBox

    if kind != "scalar":
        x = ExternKernel.require_stride_order(x, list(reversed(range(len(x.get_size())))))
    x = ExternKernel.realize_input(x)
    return x if isinstance(x, TensorBox) else TensorBox(x)


@lru_cache(maxsize=1024)
def _tuned(text: str, warps: int) -> Any:
    """A kernel with its launch settings, as Inductor takes them."""
    return triton.autotune(configs=[triton.Config({}, num_warps=warps)], key=[])(_compiled(text))


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    """The kernel of a source, which is known to `inspect` without lying in a file."""
    name = f"<kp_fused_cast {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(text, name, "exec"), namespace)
    return namespace["kp_fused_cast"]


def run(tensors: list[Tensor], program: Program) -> list[Tensor]:
    """All launches of a program on tensors at hand; returns its buffers."""
    outs = program.results(tensors)
    sizes = [list(out.shape) for out in outs]
    for launch in program.launches:
        leaves = [
            tensors[i].contiguous() if kind == "full" and tensors[i].stride(1) != 1 else tensors[i]
            for i, kind in launch.leaves
        ]
        strides = [x.stride(0) for x, (_, kind) in zip(leaves, launch.leaves, strict=True) if kind == "full"]
        one = kernel_for(launch, program, strides, sizes, tensors[launch.matrix].shape[0])
        pointers = dict(zip(one.pointers, [*leaves, *(outs[b] for b in one.buffers)], strict=True))
        _compiled(one.source)[one.grid](**pointers, **one.numbers, num_warps=one.warps)
    return outs


# ---------------------------------------------------------------------------------------------------------
# writing kernels


@dataclass(frozen=True)
class Kernel:
    """A launch ready to go: Python source of `kp_fused_cast`, names of its pointers (the leaves, then the
    results, which are `buffers` of the program), numbers that are not constants of the source, grid and
    warps."""

    source: str
    pointers: tuple[str, ...]
    buffers: tuple[int, ...]
    numbers: dict[str, Any]
    grid: tuple[Any]
    warps: int


def kernel_for(
    launch: Launch, program: Program, strides: Sequence[Any], sizes: Sequence[Sequence[Any]], rows: Any
) -> Kernel:
    """`strides` are those of the rows of full leaves, `sizes` those of the program's buffers; `rows` how many
    the launch reads. Numbers are ints or, where unknown at compile time, expressions of Inductor's."""
    height, width, warps = launch.tile
    buffers = tuple(b for store in launch.stores for b in _buffers(store))
    columns = launch.columns
    numbers: dict[str, Any] = {"M": rows, "K": columns}
    full = [i for i, (_, kind) in enumerate(launch.leaves) if kind == "full"]
    numbers |= {f"s{i}": stride for i, stride in zip(full, strides, strict=True)}
    numbers |= {f"t{i}": sizes[b][1] for i, b in enumerate(buffers)}
    ends = [_end(program.buffers[b], sizes[b], rows) for b in buffers]
    numbers |= {f"r{i}": end for i, end in enumerate(ends)}
    known = {name: int(n) for name, n in numbers.items() if _is_known(n)}
    unknown = {name: n for name, n in numbers.items() if name not in known}
    aligned = max(range(len(buffers)), key=lambda i: program.buffers[buffers[i]].align)
    pointers = (*(f"p{i}" for i in range(len(launch.leaves))), *(f"o{i}" for i in range(len(buffers))))
    even = columns % width == 0 and all(_is_known(n) and n == rows for n in ends)
    even = even and "M" in known and known["M"] % height == 0
    text = source(
        launch, tuple(_TRITON[getattr(torch, program.buffers[b].dtype)] for b in buffers), pointers,
        known | {"BLOCK_M": height, "BLOCK_K": width, "TILES": _tiles(columns, width), "EVEN": even},
        tuple(unknown),
    )  # fmt: skip
    grid = (_tiles(columns, width) * _tiles(ends[aligned], height),)
    return Kernel(text, pointers, buffers, unknown, grid, warps)


def _is_known(number: Any) -> bool:
    return bool(isinstance(number, int) or number.is_number)


def _tiles(size: Any, tile: int) -> Any:
    count = CeilDiv(size, tile)
    return int(count) if _is_known(count) else count


def _buffers(store: Store) -> list[int]:
    return [b for b in (store.scales, store.plain, store.turned, store.amax) if b >= 0]


def _end(buffer: Buffer, size: Sequence[Any], rows: Any) -> Any:
    """The row, counted from the launch's first, where a result ends: padding is written, parts below are
    not."""
    if buffer.rows >= 0 or buffer.align == 1:
        return rows
    return size[1] if buffer.layout == "turned" else size[0] * buffer.tile[0]


def source(
    launch: Launch,
    dtypes: tuple[str, ...],
    pointers: tuple[str, ...],
    constants: dict[str, Any],
    numbers: tuple[str, ...],
) -> str:
    """The kernel as Python."""
    lines = [
        "import triton",
        "import triton.language as tl",
        "",
        "@triton.jit",
        f"def kp_fused_cast({', '.join((*pointers, *numbers))}):",
        *(f"    {name}: tl.constexpr = {value}" for name, value in constants.items()),
        "    row_of_tiles = tl.program_id(0) // TILES",
        "    column_of_tiles = tl.program_id(0) % TILES",
        "    m = row_of_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)",
        "    k = column_of_tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]",
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
            f"    place = row_of_tiles * t{number} + column_of_tiles",
            f"    tl.store(o{number} + place, top, mask=row_of_tiles * BLOCK_M < M)",
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
    row_of_blocks = f"row_of_tiles + {store.row // 128}"
    column_of_blocks = f"column_of_tiles + {store.column // 128}"
    if store.block[0] == 1:
        largest, mask, column = "tl.max(top, axis=1)[:, None]", f"m < r{number}", column_of_blocks
    elif store.block[1] == 1:
        largest, row = "tl.max(top, axis=0)[None, :]", row_of_blocks
        mask = f"(k < K) & (row_of_tiles * BLOCK_M < r{number})"
    else:
        largest, row, column = "tl.max(top)", row_of_blocks, column_of_blocks
        mask = f"row_of_tiles * BLOCK_M < r{number}"
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
