"""The passes, in the order they run. A pass's name is its flag."""

from __future__ import annotations

from kp_compiler.passes.attention import Attention
from kp_compiler.passes.base import Pass
from kp_compiler.passes.context_parallel import ContextParallel
from kp_compiler.passes.fp8_linear import Fp8Linear
from kp_compiler.passes.prove_masks import ProveMasks
from kp_compiler.passes.raise_attention import RaiseAttention
from kp_compiler.passes.raise_linear import RaiseLinear
from kp_compiler.passes.ring_attention import RingAttention
from kp_compiler.passes.sparse_attention import SparseAttention

ALL_PASSES: tuple[Pass, ...] = (
    RaiseAttention(),
    ProveMasks(),
    SparseAttention(),
    RingAttention(),
    ContextParallel(),
    Attention(),
    RaiseLinear(),
    Fp8Linear(),
)
