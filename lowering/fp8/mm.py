"""One product in FP8: `a @ b.t()`, both operands contracted along their last dimension, as Hopper's tensor
cores want them.

On a CUDA device this is `aten._scaled_mm` (cuBLASLt); elsewhere an emulation that first refuses what an H100
would refuse, so that a test on a CPU can't pass with operands the real kernel does not take.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.fp8.quantize import ALIGNMENT, DTYPES, E5M2, spread
from kp_compiler.lowering.fp8.recipes import BLOCK
from kp_compiler.lowering.ops import fragment

_SCHEMA = "(Tensor a, Tensor b, Tensor inverse_a, Tensor inverse_b, ScalarType dtype, bool blocks) -> Tensor"


@cache
def library() -> Any:
    """Registers the operator of this file, once."""
    return fragment("fp8_mm", _SCHEMA, {"CompositeExplicitAutograd": emulated}, _fake)


def fp8_mm(
    a: Tensor,
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    dtype: torch.dtype,
    fast_accum: bool,
    blocks: bool = False,
) -> Tensor:
    """a [M,K], b [N,K] in FP8, the inverses of the scales that `quantize` made; returns [M,N] in `dtype`.

    `blocks`: one scale for 1 x 128 elements of `a` and for 128 x 128 of `b`. `fast_accum` leaves partial
    sums in the tensor core's own accumulator (about 14 bits of mantissa).
    """
    if not blocks and _is_single(inverse_a) != _is_single(inverse_b):
        inverse_a = inverse_a.expand(a.shape[0], 1).contiguous()
        inverse_b = inverse_b.expand(b.shape[0], 1).contiguous()
    if a.device.type != "cuda":
        library()
        return torch.ops.kp.fp8_mm.default(a, b, inverse_a, inverse_b, dtype, blocks)
    if blocks:  # cuBLASLt reads the scales of 1 x 128 blocks block by block
        inverse_a, inverse_b = inverse_a.t().contiguous().t(), inverse_b.contiguous()
    return torch.ops.aten._scaled_mm.default(
        a, b.t(), inverse_a, inverse_b.t(), out_dtype=dtype, use_fast_accum=fast_accum and not blocks,
    )  # fmt: skip


def _is_single(scale: Tensor) -> bool:
    """One scale for all rows; asked without guarding how many rows there are."""
    return isinstance(scale.shape[0], int) and scale.shape[0] == 1


def refusal(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: Any, blocks: bool = False
) -> str | None:
    """What an H100 says to these operands, or None where it takes them."""
    if a.dtype not in DTYPES.values() or b.dtype not in DTYPES.values():
        return f"operands must be FP8, these are {a.dtype} and {b.dtype}"
    if a.dtype == b.dtype == E5M2:
        return "two e5m2 operands have no kernel"
    if a.stride(-1) != 1 or b.stride(-1) != 1:
        return "both operands must be contiguous along the contracted dimension"
    if a.shape[1] != b.shape[1] or a.shape[1] % ALIGNMENT:
        return f"contracted sizes {a.shape[1]} and {b.shape[1]} must be equal multiples of {ALIGNMENT}"
    if b.shape[0] % ALIGNMENT:
        return f"{b.shape[0]} outputs are no multiple of {ALIGNMENT}"
    if inverse_a.dtype != torch.float32 or inverse_b.dtype != torch.float32:
        return "scales must be float32"
    shapes = (tuple(inverse_a.shape), tuple(inverse_b.shape))
    if blocks:
        if a.shape[1] % (4 * BLOCK) or b.shape[0] % BLOCK or E5M2 in (a.dtype, b.dtype):
            return f"scales of blocks need e4m3, {BLOCK} outputs and four blocks of inputs, or multiples"
        if a.shape[0] % 4:
            return f"scales of {a.shape[0]} rows do not fill lines of 16 bytes"
        if shapes != _blocks(a, b):
            return f"scales of shapes {shapes[0]} and {shapes[1]} are not those of blocks"
    elif shapes not in (((1, 1), (1, 1)), ((a.shape[0], 1), (b.shape[0], 1))):
        return f"scales of shapes {shapes[0]} and {shapes[1]} go with no kernel"
    if shapes[0] != (1, 1) and dtype != torch.bfloat16:
        return f"one scale a row gives bfloat16, not {dtype}"
    return None


def _blocks(a: Tensor, b: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of scales of 1 x 128 blocks of `a` and 128 x 128 blocks of `b`."""
    inner = -(-a.shape[1] // BLOCK)
    return (a.shape[0], inner), (-(-b.shape[0] // BLOCK), inner)


def emulated(
    a: Tensor,
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    dtype: torch.dtype,
    blocks: bool,
) -> Tensor:
    """The same product in float32."""
    on_gpu = torch.bfloat16 if dtype == torch.float32 and inverse_a.numel() > 1 else dtype
    said = refusal(a, b, inverse_a, inverse_b, on_gpu, blocks)
    if said is not None:
        raise RuntimeError(f"kp::fp8_mm: {said}")
    if blocks:
        inverse_a, inverse_b = spread(inverse_a, a, (1, BLOCK)), spread(inverse_b, b, (BLOCK, BLOCK))
    return ((a.float() * inverse_a) @ (b.float() * inverse_b).t()).to(dtype)


def _fake(
    a: Tensor,
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    dtype: torch.dtype,
    blocks: bool,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
