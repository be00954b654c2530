"""Launches of the Hopper kernels: what `triton.attention` does, where a site is one that they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kp_compiler.lowering.triton.attention import Lists, Site, Tile, forward_arguments
from kp_compiler.lowering.triton.hopper_source import ROWS, hopper_parameters, hopper_source
from kp_compiler.lowering.triton.text import compiled

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_HEAD_DIMS = (64, 128)


def takes(site: Site) -> bool:
    """Whether the forward kernel computes this site: half precision, head sizes that its tiles have, tensors
    that the tensor memory accelerator reads (strides and addresses in multiples of 16 bytes), no dropout."""
    q, v = site.q, site.v
    if q.dtype not in _DTYPES or q.shape[3] != v.shape[3] or q.shape[3] not in _HEAD_DIMS:
        return False
    if site.block is not None and (site.block[0] < 2 * ROWS or site.block[1] % 64):
        return False
    if site.spec.dropout_p or 0 in (q.numel(), v.numel()):
        return False
    return all(_described(x) for x in (q, site.k, v))


def _described(x: Tensor) -> bool:
    """A descriptor can describe it."""
    unit = 16 // x.element_size()
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    return dense and all(stride > 0 and stride % unit == 0 for stride in x.stride()[:-1])


def tile_for(head_dim: int) -> Tile:
    """64 queries a warpgroup, two of them; registers and shared memory for these (sm90, triton 3.6), not by
    time yet."""
    return Tile(2 * ROWS, 128, 4, 3 if head_dim <= 64 else 2)


def forward(
    site: Site, lists: Lists | None, out: Tensor, start: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As `triton.attention.forward`, for a site that it `takes`."""
    batch, heads, queries, width = site.q.shape
    tile = site.tiles.get("hopper") or tile_for(width)
    if site.block is not None and site.block[1] < tile.inner:
        tile = Tile(tile.outer, site.block[1], tile.warps, tile.stages)
    layout = site.layout("forward", tile, start=start is not None)
    found = site.arguments() | forward_arguments(site, out, start)
    if lists is not None:
        found |= lists.arguments()
    found |= {
        name: _descriptor(found[name], rows)
        for name, rows in (("q", ROWS), ("k", tile.inner), ("v", tile.inner))
    }
    kernel = compiled("kp_attention_hopper", hopper_source(site.spec, layout))
    grid = (-(-queries // tile.outer) * batch * heads,)
    with torch.cuda.device_of(site.q):
        kernel[grid](
            **{name: found[name] for name in hopper_parameters(site.spec, layout)}, num_warps=tile.warps
        )
    return found["lse"]


def _descriptor(x: Tensor, rows: int) -> Any:
    """Of tiles [1,1,rows,D]; what lies outside is read as zeros."""
    block = [1, 1, rows, x.shape[3]]
    return TensorDescriptor.from_tensor(
        x, block, gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    )
