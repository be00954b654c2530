"""A tile of shared memory added to global memory by the tensor memory accelerator; Gluon has loads and stores
by it, and no name for this one yet (triton 3.6, 3.7)."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin


@builtin
def tma_add(descriptor: Any, coordinates: Any, tile: Any, _semantic: Any = None) -> None:
    """Start descriptor[coordinates …] += tile, which is wholly read when `tma.store_wait(0)` returns. What
    lies outside of the tensor is left; additions come in any order."""
    places = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, places, tile.handle)
