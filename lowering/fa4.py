"""FlashAttention-4's CuTe kernels (package flash-attn-4, extra `[fa4]`), wrapped as an operator with autograd."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target


def check(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    if not target.has_fa4:
        return Rejection("library", "FlashAttention-4 is not installed (extra [fa4]).")
    return Rejection("library", "FlashAttention-4 is not lowered to yet.")


def emit(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    raise AssertionError("fa4.check refuses every site")
