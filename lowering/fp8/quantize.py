"""Scales and casts, as operators: what a matrix is multiplied by, and the matrix in FP8.

    scale[i, j] = max_finite / max |x| over block (i, j), in float32            kp::fp8_scale
    q           = clamp(x * scale, ±max_finite) in FP8                          kp::fp8_quantize

A block is `(rows, columns)`, 0 for all of them: (0, 0) is one scale a matrix, made of `kp::fp8_amax`, (1, 0)
one a row, (1, 128) one for 128 elements of a row. They take a list of matrices that stand for their
concatenation along `dim`: weights that read the same activation, and the gradients of their results, become
one matrix without being copied together first. They are functional and opaque, so that a graph pass can move
and fuse them (`fuse`); run as they stand they compute the reference.

Non-finite inputs are never hidden: an infinity or a NaN makes everything that shares its scale NaN. A block
of zeros has scale 1. e4m3 is the variant without infinities (largest 448), e5m2 reaches 57344.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kp_compiler.lowering.ops import fragment

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = {"e4m3": E4M3, "e5m2": E5M2}
ALIGNMENT = 16  # elements: what a contracted dimension must be a multiple of

Block = tuple[int, int]

_SCALE = (
    "(Tensor[] parts, int dim, ScalarType dtype, int[] block, bool power_of_two, Tensor? after) -> Tensor"
)
_AMAX = "(Tensor[] parts, int dim) -> Tensor"
_QUANTIZE = (
    "(Tensor[] parts, int dim, Tensor scale, ScalarType dtype, int[] block, bool transpose, Tensor? after)"
    " -> Tensor"
)


@cache
def library() -> Any:
    """Registers the operators of this file, once."""
    return [
        fragment(name, schema, {"CompositeExplicitAutograd": function}, fake)
        for name, schema, function, fake in (
            ("fp8_scale", _SCALE, scale_of, _fake_scale),
            ("fp8_quantize", _QUANTIZE, quantized, _fake_quantized),
            ("fp8_amax", _AMAX, amax_of, _fake_amax),
        )
    ]


def is_cast(node: Node) -> bool:
    """One of these operators in a graph."""
    kp = torch.ops.kp
    return node.target in (kp.fp8_quantize.default, kp.fp8_scale.default, kp.fp8_amax.default)


def fp8_scale(
    parts: list[Tensor],
    dtype: torch.dtype,
    block: Block,
    *,
    power_of_two: bool,
    dim: int = 0,
    after: Tensor | None = None,
) -> Tensor:
    """parts, together [R, C], to scales [ceil(R / rows), ceil(C / columns)] in float32; blocks of 1 x 128
    have R rounded up to 16, as their cast has. `after` as below."""
    library()
    if block == (0, 0):
        return scale_from_amax(fp8_amax(parts, dim=dim).reshape(1, 1), dtype, power_of_two)
    return torch.ops.kp.fp8_scale.default(parts, dim, dtype, list(block), power_of_two, after)


def fp8_amax(parts: list[Tensor], *, dim: int = 0) -> Tensor:
    """The largest magnitude of all parts, [1] in float32. `dim` says how the parts lie, as in their cast."""
    library()
    return torch.ops.kp.fp8_amax.default(parts, dim)


def fp8_quantize(
    parts: list[Tensor],
    scale: Tensor,
    dtype: torch.dtype,
    block: Block,
    *,
    dim: int = 0,
    transpose: bool = False,
    after: Tensor | None = None,
) -> Tensor:
    """parts, together [R, C], to [R, C] in `dtype`; or transposed to [C, R'], R' the next multiple of 16 (of
    four blocks' rows) and the rest zeros: the layout of a product that contracts the rows. With blocks of
    1 x 128 the plain copy has R rounded up to 16 as well.

    `after` is a tensor that the cast has to wait for and does not read. A gradient's scale given so keeps the
    cast in the backward graph: nothing is saved for it but its input.
    """
    library()
    return torch.ops.kp.fp8_quantize.default(parts, dim, scale, dtype, list(block), transpose, after)


def scale_of(
    parts: list[Tensor],
    dim: int,
    dtype: torch.dtype,
    block: list[int],
    power_of_two: bool,
    after: Tensor | None = None,
) -> Tensor:
    """The reference of `kp::fp8_scale`."""
    x = _joined(parts, dim)
    amax = block_amax(_padded(x, scale_padding(block, x.shape[0]), 0), block)
    return scale_from_amax(amax, dtype, power_of_two)


def amax_of(parts: list[Tensor], dim: int) -> Tensor:
    """The reference of `kp::fp8_amax`."""
    found = [part.abs().amax(-1).amax() for part in parts]
    return (found[0] if len(found) == 1 else torch.stack(found).amax()).float().reshape(1)


def _fake_amax(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].new_empty((1,), dtype=torch.float32)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def padding(block: Sequence[int], rows: Any) -> Any:
    """Rows of zeros below a plain copy. Scales of 1 x 128 blocks must lie in columns of 16 bytes."""
    return -rows % ALIGNMENT if list(block) == [1, 128] else 0


def scale_padding(block: Sequence[int], rows: Any) -> Any:
    """Rows of zeros that scales are made for: those of the plain copy, or of the transposed one."""
    return -rows % alignment(block) if block[0] > 1 else padding(block, rows)


def alignment(block: Sequence[int]) -> int:
    """What the contracted rows of a transposed copy are padded to. cuBLASLt reads the scales of 128 x 128
    blocks in lines of 16 bytes, four blocks along the contracted dimension."""
    return ALIGNMENT if block[0] <= 1 else 4 * block[0]


def scale_from_amax(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """float32 scales: max_finite / amax, rounded down to a power of two if asked, 1 for zeros.

    An amax so small that the scale would overflow (below 2^-118 for e4m3) is taken for zero.
    """
    limit = torch.finfo(dtype).max
    amax = amax.float()
    scale = limit / torch.where(amax < limit * 2.0**-126, limit, amax)
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return scale


def block_amax(x: Tensor, block: Sequence[int]) -> Tensor:
    """The largest magnitude of each block."""
    rows, columns = x.shape
    height, width = block[0] or rows, block[1] or columns
    magnitude = x.abs()
    if block[0] == 1:
        blocks = _padded(magnitude, 0, -columns % width) if width != columns else magnitude
        return blocks.reshape(rows, -1, width).amax(-1)
    if block[1] == 1 and block[0] == 0:
        return magnitude.amax(0, keepdim=True)
    blocks = _padded(magnitude, -rows % height, -columns % width)
    return blocks.reshape(blocks.shape[0] // height, height, -1, width).amax((1, 3))


def _padded(x: Tensor, rows: Any, columns: Any) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns, 0, rows))


def quantized(
    parts: list[Tensor],
    dim: int,
    scale: Tensor,
    dtype: torch.dtype,
    block: list[int],
    transpose: bool,
    after: Tensor | None,
) -> Tensor:
    """The reference of `kp::fp8_quantize`."""
    x = _joined(parts, dim)
    x = x if transpose else _padded(x, padding(block, x.shape[0]), 0)
    q = clamped(x.float() * spread(scale, x, block), dtype)
    if not transpose:
        return q.to(dtype)
    return _padded(q.t(), 0, -x.shape[0] % alignment(block)).contiguous().to(dtype)


def clamped(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Within what `dtype` holds; an infinity becomes NaN, not the largest number."""
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit) + scaled * 0.0


def spread(scale: Tensor, x: Tensor, block: Sequence[int]) -> Tensor:
    """Scales repeated over their blocks, broadcastable to `x`."""
    for dim, size in enumerate(block):
        if size > 1:
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, x.shape[dim])
    return scale


def _sizes(parts: list[Tensor], dim: int) -> tuple[Any, Any]:
    total = sum(part.shape[dim] for part in parts)
    return (total, parts[0].shape[1]) if dim == 0 else (parts[0].shape[0], total)


def _fake_scale(
    parts: list[Tensor],
    dim: int,
    dtype: torch.dtype,
    block: list[int],
    power_of_two: bool,
    after: Tensor | None,
) -> Tensor:
    rows, columns = _sizes(parts, dim)
    sizes = [
        1 if size == 0 else (extent + size - 1) // size
        for size, extent in zip(block, (rows + scale_padding(block, rows), columns), strict=True)
    ]
    return parts[0].new_empty(sizes, dtype=torch.float32)


def _fake_quantized(
    parts: list[Tensor],
    dim: int,
    scale: Tensor,
    dtype: torch.dtype,
    block: list[int],
    transpose: bool,
    after: Tensor | None,
) -> Tensor:
    rows, columns = _sizes(parts, dim)
    unit = alignment(block)
    plain = [rows + padding(block, rows), columns]
    sizes = [columns, (rows + unit - 1) // unit * unit] if transpose else plain
    return parts[0].new_empty(sizes, dtype=dtype)


def sqnr(got: Tensor, want: Tensor) -> float:
    """Signal to quantisation noise in dB."""
    got, want = got.detach(), want.detach()
    noise = (got.double() - want.double()).norm()
    return math.inf if noise == 0 else float(20 * torch.log10(want.double().norm() / noise))
