"""Lowering: from a proved spec to a kernel. Nothing here imports Triton or Transformer Engine until it is
executed."""
