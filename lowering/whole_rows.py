"""Kernels of Inductor's that reduce rows and cast the result to FP8 hold whole rows in registers.

Inductor goes over rows of more than 1024 columns in a loop, and over a norm's twice: once for the sum and
once for the result, out of the L2 cache. In bfloat16 memory is the bound all the same; with half as much to
write and a largest magnitude to find it isn't. Up to `MOST_REDUCED` a row is read once instead, 16 or 32
numbers to a thread. 16384 x 4096 on one H100, 2026-11-26, in microseconds: RMSNorm alone 92, with a cast and
the largest magnitude 112 in loops and 74 in registers; LayerNorm 102, 138 and 78.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from kp_compiler.lowering.fp8.quantize import DTYPES

MOST_REDUCED = 8192


def keeping_rows(compile_inner: Callable[..., Any]) -> Callable[..., Any]:
    """`compile_inner`, a function as `compile_fx_inner`, with that choice made."""
    from torch._inductor.virtualized import V

    @wraps(compile_inner)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        with V.set_choices_handler(_choices(V.choices)):
            return compile_inner(*args, **kwargs)

    return compiled


def _choices(theirs: Any) -> Any:
    """The choices that are in force, but for one."""

    def persistent(features: Any, cooperative_reduction: bool) -> bool:
        default = bool(theirs.should_use_persistent_reduction(features, cooperative_reduction))
        return default or (not cooperative_reduction and _casts_rows(features))

    mine = copy.copy(theirs)
    mine.should_use_persistent_reduction = persistent
    return mine


def _casts_rows(features: Any) -> bool:
    """A reduction along rows, whose length is known and moderate, with FP8 among what it writes."""
    from torch._inductor import config
    from torch._inductor.runtime.hints import ReductionHint

    columns = features.reduction_numel
    return (
        config.triton.persistent_reductions
        and features.get_reduction_hint() == ReductionHint.INNER
        and columns.is_number
        and columns <= MOST_REDUCED
        and any(_is_fp8(out) for node in features.scheduler_nodes() for out in node.get_outputs())
    )


def _is_fp8(out: Any) -> bool:
    return out.node.get_dtype() in DTYPES.values()
