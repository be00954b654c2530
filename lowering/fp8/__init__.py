"""FP8 products: casts, scales, matrix products, and the linear layer made of them."""

from __future__ import annotations


def register() -> None:
    """Define every operator that compiled code may call: a graph out of a cache was traced in another
    process."""
    from kp_compiler.lowering.fp8 import fused, mm, quantize

    for module in (quantize, mm, fused):
        module.library()
