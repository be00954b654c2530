"""Which kernel serves an attention site: an ordered table, each entry saying yes or why not.

An implementation has a `check(spec, shape, target)` and an `emit(emit, node, spec, shape)` that writes nodes
in place of `kp.attention`. The first entry that says yes wins; the order is by measured speed on the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from kp_compiler.config import AttentionConfig
from kp_compiler.lowering import aten, attend, fa4, flex, mask_render, select
from kp_compiler.metadata import tensor_of
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target

Check = Callable[[AttentionSpec, AttentionShape, Target], Rejection | None]
Emit = Callable[[Any, Node, AttentionSpec, AttentionShape], Node]


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention."""

    name: str
    check: Check
    emit: Emit


def _check_reference(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    if target.reference:
        return None
    return Rejection("reference-only-cpu", "The reference kernel is for CPU graphs under cpu_rewrites.")


def _emit_reference(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    from kp_compiler.lowering.fingerprint import stamped
    from kp_compiler.lowering.ops import reference_attention

    return emit.call(reference_attention(), *node.args[:5], stamped(spec))


FA4 = Implementation("fa4", fa4.check, fa4.emit)
CUDNN = Implementation("cudnn", aten.check_cudnn, aten.emit_cudnn)
FLASH = Implementation("flash", aten.check_flash, aten.emit_flash)
FLEX = Implementation("flex", flex.check, flex.emit)
EFFICIENT = Implementation("efficient", aten.check_efficient, aten.emit_efficient)
TRITON = Implementation("triton", attend.check, attend.emit)
REFERENCE = Implementation("reference", _check_reference, _emit_reference)

ATTENTION = (REFERENCE, CUDNN, FLASH, FLEX, EFFICIENT, FA4, TRITON)
ATEN_OPERATORS = aten.OPERATORS  # of the implementations that are one
BY_NAME = {implementation.name: implementation for implementation in ATTENTION}


def order(
    target: Target, spec: AttentionSpec, shape: AttentionShape | None = None
) -> tuple[Implementation, ...]:
    """Fastest first, for sizes like those measured where no shape is given. On sm90 (one H100, torch 2.11,
    D128, 16 heads, forward / backward TFLOP/s, 2026-11-27, benchmarks/attention_kernels.py): causal, 8k
    tokens: kp 671 / 518, FA4 644 / 601, cuDNN 608 / 517, FlexAttention 359 / 380, FlashAttention-2 309 / 280;
    32k: 707 / 531, 648 / 636, 661 / 531, 406 / 405, 330 / 329; 2k: 552 / 349, 518 / 441, 511 / 393. Without a
    mask, 8k: FA4 716 / 637, cuDNN 676 / 559, kp 633 / 589. Window 1024, 32k: kp 524 / 360, FlexAttention 302
    / 267, with the mask as a tensor 4 / 4. Where the memory-efficient kernel would read a mask of N² elements
    (10 TFLOP/s for packed documents of 32k tokens), kp's kernels for any GPU come before it."""
    if target.reference:
        return (REFERENCE,)
    if spec.sparse is not None:
        return (TRITON,)
    if target.sm < 90:
        return (FLASH, CUDNN, FLEX, EFFICIENT, TRITON)
    band = mask_render.is_band(spec.mask)
    if attend.on_hopper(spec, shape, target):
        if band:
            return (TRITON, FA4, FLASH, FLEX, EFFICIENT)
        rest = (FLASH, FLEX, EFFICIENT)
        return (TRITON, FA4, CUDNN, *rest) if _long_causal(spec, shape) else (FA4, CUDNN, TRITON, *rest)
    plain = spec.mask.kind in ("full", "causal") and not spec.biases
    last = (EFFICIENT, TRITON) if plain else (TRITON, EFFICIENT)
    if not band:
        return (FA4, CUDNN, FLASH, FLEX, *last)
    # FlexAttention took 5 of the 18.5 s that a two-layer Mistral needed to compile (same machine, 2026-11-26;
    # benchmarks/compile_time.py), and its block lists cost eight small kernels a mask
    training = shape is not None and shape.training
    return (FA4, FLEX, FLASH, *last) if training else (FA4, FLASH, FLEX, *last)


def _long_causal(spec: AttentionSpec, shape: AttentionShape | None) -> bool:
    """Causal inference over so many tokens that a kernel takes longer than Python needs to start kp's (0.3
    ms)."""
    if shape is None or shape.training or spec.mask.kind != "causal" or spec.biases:
        return False
    return isinstance(shape.queries, int) and shape.queries >= 8192


def choose(
    spec: AttentionSpec, shape: AttentionShape, target: Target, config: AttentionConfig
) -> Implementation | Rejection:
    """The implementation for a site. A kernel asked for by name is taken or refused, never replaced."""
    if spec.sparse is not None and (refused := select.refused(spec, shape)) is not None:
        return refused
    if config.impl != "auto":
        wanted = BY_NAME[config.impl]
        if spec.sparse is not None and wanted not in (TRITON, REFERENCE):
            return Rejection("sparse", f"{config.impl} computes all pairs of the mask.", "impl='auto'")
        refused = wanted.check(spec, shape, target)
        return wanted if refused is None else refused
    reasons = []
    for implementation in order(target, spec, shape):
        refused = implementation.check(spec, shape, target)
        if refused is None:
            return implementation
        reasons.append((implementation.name, refused))
    code = "no-kernel" if len({r.code for _, r in reasons}) > 1 else reasons[0][1].code
    return Rejection(code, "No kernel serves this site: " + "; ".join(f"{n}: {r.text}" for n, r in reasons))


def shape_of(node: Node, spec: AttentionSpec, target: Target) -> AttentionShape:
    """Sizes and dtype of a `kp.attention` node."""
    q, k, v = (tensor_of(arg) for arg in node.args[:3])
    assert q is not None and k is not None and v is not None
    operands = [tensor_of(arg) for arg in node.args[3]]  # type: ignore[union-attr]
    biases = [operands[bias.operand] for bias in spec.biases]
    bias_grad = any(b is not None and b.requires_grad for b in biases)
    return AttentionShape(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
        q.dtype, target.device, any(t.requires_grad for t in (q, k, v)) or bias_grad, bias_grad,
    )  # fmt: skip
