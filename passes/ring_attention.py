"""`context_parallel` with the ring schedule, by a flag of its own."""

from __future__ import annotations

from kp_compiler.config import RingAttentionConfig
from kp_compiler.passes.base import Context
from kp_compiler.passes.context_parallel import ContextParallel


class RingAttention(ContextParallel):
    """See `passes.context_parallel`. Memory of two ranks' keys and values, whatever the number of ranks."""

    name = "ring_attention"

    def settings(self, ctx: Context) -> RingAttentionConfig:
        return ctx.config.ring_attention
