"""What `kp::attend` refuses: a ValueError for everything that its kernels would read wrongly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.specs import AttentionSpec

LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_matrices(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"kp::attend: q, k and v need one dtype, half or float32, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(f"kp::attend: q [B,H,S,D], k [B,K,T,D], v [B,K,T,E] do not fit: {shapes}")
    if not (0 < q.shape[3] <= LARGEST_HEAD and 0 < v.shape[3] <= LARGEST_HEAD):
        raise ValueError(
            f"kp::attend: heads of 1 to {LARGEST_HEAD} are needed, got {q.shape[3]} and {v.shape[3]}"
        )


def check_operands(
    spec: AttentionSpec, operands: list[Tensor], scalars: list[Any], seed: Tensor | None
) -> None:
    if max(spec.operands(), default=-1) >= len(operands):
        raise ValueError(f"kp::attend: the spec reads operands {spec.operands()}, {len(operands)} were given")
    if spec.mask.scalars > len(scalars):
        raise ValueError(f"kp::attend: the mask reads {spec.mask.scalars} numbers, {len(scalars)} were given")
    if spec.dropout_p and seed is None:
        raise ValueError("kp::attend: a spec with dropout needs a seed")


def check_lists(
    spec: AttentionSpec, block: tuple[int, int] | None, q: Tensor, k: Tensor, blocks: list[Tensor]
) -> None:
    if block is None:
        if blocks:
            raise ValueError(f"kp::attend: {len(blocks)} tensors of lists, but the plan has no blocks")
        if mask_render.inequalities(spec.mask) is None:
            raise ValueError(f"kp::attend: the mask {spec.mask} does not bound loops: it needs lists")
        return
    if any(size < 16 or size & (size - 1) for size in block):
        raise ValueError(f"kp::attend: blocks of lists are powers of two, 16 at least, got {block}")
    if len(blocks) not in (4, 8):
        raise ValueError(f"kp::attend: lists are 4 tensors, 8 to train, got {len(blocks)}")
    for first, size, unit in ((0, q.shape[2], block[0]), (4, k.shape[2], block[1])):
        for dtype, x in zip((torch.int32, torch.int32, torch.int64), blocks[first : first + 3], strict=False):
            fits = x.dim() == 3 and all(n in (1, m) for n, m in zip(x.shape[:2], q.shape[:2], strict=True))
            if x.dtype != dtype or not fits or x.shape[2] != -(-size // unit):
                raise ValueError(
                    f"kp::attend: lists by blocks of {unit} of {size} need {dtype} of [B or 1, H or 1, "
                    f"{-(-size // unit)}], got {x.dtype} of {list(x.shape)}"
                )
    if any(x.dtype != torch.int32 or x.dim() != 1 for x in blocks[3::4]):
        raise ValueError("kp::attend: the blocks of lists are one row of int32")


def check_start(q: Tensor, v: Tensor, start_out: Tensor | None, start_lse: Tensor | None) -> None:
    if (start_out is None) != (start_lse is None):
        raise ValueError("kp::attend: start_out and start_lse come together")
    if start_out is None or start_lse is None:
        return
    wanted = [*q.shape[:3], v.shape[3]]
    if list(start_out.shape) != wanted or start_lse.shape != q.shape[:3] or start_lse.dtype != torch.float32:
        raise ValueError(
            f"kp::attend: start_out {wanted} and start_lse {wanted[:3]} in float32 are needed, got "
            f"{list(start_out.shape)} and {list(start_lse.shape)} in {start_lse.dtype}"
        )
