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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._sympy.functions import CeilDiv

from kp_compiler.lowering.fp8.fused import fp8_fused, parse
from kp_compiler.lowering.fp8.program import Buffer, Launch, Program
from kp_compiler.lowering.triton.cast_source import NAMES, Inside, buffers_of, source
from kp_compiler.lowering.triton.text import compiled


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


_NAME = "kp_fused_cast"


@lru_cache(maxsize=1024)
def _tuned(text: str, warps: int) -> Any:
    """A kernel with its launch settings, as Inductor takes them."""
    return triton.autotune(configs=[triton.Config({}, num_warps=warps)], key=[])(compiled(_NAME, text))


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
        compiled(_NAME, one.source)[one.grid](**pointers, **one.numbers, num_warps=one.warps)
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
    buffers = tuple(b for store in launch.stores for b in buffers_of(store))
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
    whole = all(_is_known(n) and n == rows for n in ends) and _is_known(rows) and rows % height == 0
    text = source(
        launch, tuple(NAMES[getattr(torch, program.buffers[b].dtype)] for b in buffers), pointers,
        known | {"BLOCK_M": height, "BLOCK_K": width, "TILES": _tiles(columns, width)},
        tuple(unknown), Inside(whole, columns % width == 0),
    )  # fmt: skip
    grid = (_tiles(columns, width) * _tiles(ends[aligned], height),)
    return Kernel(text, pointers, buffers, unknown, grid, warps)


def _is_known(number: Any) -> bool:
    return bool(isinstance(number, int) or number.is_number)


def _tiles(size: Any, tile: int) -> Any:
    count = CeilDiv(size, tile)
    return int(count) if _is_known(count) else count


def _end(buffer: Buffer, size: Sequence[Any], rows: Any) -> Any:
    """The row, counted from the launch's first, where a result ends: padding is written, parts below are
    not."""
    if buffer.rows >= 0 or buffer.align == 1:
        return rows
    return size[1] if buffer.layout == "turned" else size[0] * buffer.tile[0]
