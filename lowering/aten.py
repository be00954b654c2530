"""PyTorch's own attention kernels, called by name so that the choice is ours.

Called by name they skip the checks of F.scaled_dot_product_attention: head size, dtype, alignment and masks
are checked here. All have autograd formulas.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.dead_rows import after_additive_mask
from kp_compiler.lowering.dense_mask import emit_mask
from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target

OPERATORS = {
    "cudnn": torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    "flash": torch.ops.aten._scaled_dot_product_flash_attention.default,
    "efficient": torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
_HALF = (torch.float16, torch.bfloat16)


def common(spec: AttentionSpec, shape: AttentionShape, target: Target, name: str) -> Rejection | None:
    """What the dense kernels need: half precision, CUDA, scores that are plain products."""
    if target.device != "cuda":
        return Rejection("device", f"{name} needs a CUDA device.")
    if target.sm < 80:
        return Rejection("device", f"{name} needs compute capability 8.0 or newer, this is {target.sm / 10}.")
    if shape.dtype not in _HALF:
        return Rejection("dtype", f"{name} takes float16 and bfloat16, this site is {shape.dtype}.")
    if spec.softcap is not None or spec.sink is not None:
        return Rejection("score-mod", f"{name} has no soft-cap and no sinks.")
    if spec.biases:
        return Rejection("bias", f"{name} is not used with an additive bias.")
    if not isinstance(shape.head_dim, int) or shape.head_dim % 8 or shape.value_dim % 8:
        return Rejection(
            "head-dim", f"{name} needs head sizes that are multiples of 8, this site has {shape.head_dim}."
        )
    if shape.head_dim != shape.value_dim:
        return Rejection(
            "head-dim", f"{name} needs equal head sizes of k and v, here {shape.head_dim}, {shape.value_dim}."
        )
    return None


def square(shape: AttentionShape) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(shape.queries == shape.keys)


def at_least_two(size: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size >= 2)


def _dense_mask(spec: AttentionSpec, shape: AttentionShape, name: str) -> Rejection | None:
    if spec.mask.kind == "full":
        return None
    if not mask_render.is_causal(spec.mask):
        return Rejection("mask-kind", f"{name} knows full and causal masks, this one is {spec.mask}.")
    if not square(shape):
        return Rejection(
            "causal-alignment", f"{name} aligns causal masks to equal lengths of queries and keys only."
        )
    return None


def check_cudnn(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    refused = common(spec, shape, target, "cuDNN") or _dense_mask(spec, shape, "cuDNN")
    if refused is not None:
        return refused
    if target.cudnn < 90000:
        return Rejection("library", f"cuDNN 9 or newer is needed, found {target.cudnn}.")
    if spec.dropout_p:
        return Rejection("dropout", "cuDNN's dropout is not used; FlashAttention has one.")
    if shape.head_dim > 128:
        return Rejection("head-dim", f"cuDNN is used up to head size 128, this site has {shape.head_dim}.")
    if not at_least_two(shape.queries) or not at_least_two(shape.keys):
        return Rejection("decode", "A single query or key gains nothing from cuDNN.")
    return None


def emit_cudnn(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    q, k, v = node.args[:3]
    out = emit.call(
        OPERATORS["cudnn"],
        q, k, v, None, shape.training, 0.0, mask_render.is_causal(spec.mask), False, scale=spec.scale,
    )  # fmt: skip
    return emit.call(operator.getitem, out, 0)


def check_flash(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    refused = common(spec, shape, target, "FlashAttention-2")
    if refused is not None:
        return refused
    if not target.has_flash:
        return Rejection("library", "This build of PyTorch has no FlashAttention-2.")
    if shape.head_dim > 256:
        return Rejection(
            "head-dim", f"FlashAttention-2 goes up to head size 256, this site has {shape.head_dim}."
        )
    if mask_render.is_band(spec.mask):
        return (
            None
            if square(shape)
            else Rejection("causal-alignment", "FlashAttention-2 aligns windows bottom-right.")
        )
    return _dense_mask(spec, shape, "FlashAttention-2")


def emit_flash(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    if mask_render.is_band(spec.mask):
        return _emit_flash_window(emit, node, spec)
    q, k, v = node.args[:3]
    out = emit.call(
        OPERATORS["flash"],
        q, k, v, spec.dropout_p, mask_render.is_causal(spec.mask), False, scale=spec.scale,
    )  # fmt: skip
    return emit.call(operator.getitem, out, 0)


def _emit_flash_window(emit: Any, node: Node, spec: AttentionSpec) -> Node:
    """The kernel under the dispatcher's op: [B,S,H,D], a window to the left of a causal mask."""
    q, k, v = (emit.call(torch.transpose, x, 1, 2) for x in node.args[:3])
    assert spec.mask.window is not None
    out = emit.call(
        torch.ops.aten._flash_attention_forward.default,
        q, k, v, None, None, emit.size(q, 1), emit.size(k, 1), spec.dropout_p, True, False,
        scale=spec.scale, window_size_left=spec.mask.window - 1, window_size_right=0,
    )  # fmt: skip
    return emit.call(torch.transpose, emit.call(operator.getitem, out, 0), 1, 2)


def check_efficient(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    """Memory-efficient attention takes an additive bias with a gradient, float32 and different head sizes."""
    if target.device != "cuda":
        return Rejection("device", "Memory-efficient attention needs a CUDA device.")
    if spec.softcap is not None or spec.sink is not None:
        return Rejection("score-mod", "Memory-efficient attention has no soft-cap and no sinks.")
    if shape.dtype not in (*_HALF, torch.float32):
        return Rejection(
            "dtype", f"Memory-efficient attention takes half and float32, this site is {shape.dtype}."
        )
    if not all(isinstance(d, int) and d % 8 == 0 for d in (shape.head_dim, shape.value_dim)):
        return Rejection("head-dim", "Memory-efficient attention needs head sizes that are multiples of 8.")
    if (refused := mask_render.unproved(spec)) is not None:
        return refused
    if spec.dead_rows == "nan" or (spec.dead_rows == "zero" and spec.biases):
        return Rejection(
            "dead-rows", f"Fully masked rows are {spec.dead_rows} here, which this kernel does not keep."
        )
    if spec.dead_rows == "mean" and shape.dtype == torch.float16:
        return Rejection("dead-rows", "No float16 fill is large enough to level fully masked rows.")
    if spec.dead_rows == "mean" and spec.fill == "add" and shape.bias_grad:
        return Rejection("dead-rows", "A bias would lose its gradient from fully masked rows.")
    return None


def emit_efficient(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    """Biases and any mask but the plain causal one are summed into one tensor; K and V heads are repeated. A
    causal mask goes into a bias that needs a gradient as well: the kernel skips the blocks above the diagonal
    and never writes the bias's gradient there (NaN or stale memory; one H100, torch 2.11, T5 at 1024 tokens,
    2026-11-26), and `where` drops it."""
    q, k, v = (node.args[index] for index in range(3))
    if not _equal(shape.heads, shape.kv_heads):
        k, v = (emit.call(torch.repeat_interleave, x, _ratio(emit, q, x), dim=1) for x in (k, v))
    causal = mask_render.is_causal(spec.mask) and square(shape)
    bias = _merged_bias(emit, node, spec, shape, causal)
    if bias is not None:
        k, v, bias = _aligned(emit, k, v, bias, shape.training)
    out = emit.call(
        OPERATORS["efficient"],
        q, k, v, bias, shape.training, spec.dropout_p, causal, scale=spec.scale,
    )  # fmt: skip
    result = emit.call(operator.getitem, out, 0)
    if spec.dead_rows == "none" or spec.mask.kind == "full":
        return result
    return after_additive_mask(emit, node, spec, shape, result, emit_mask(emit, node, spec))


def _equal(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def _ratio(emit: Any, q: Any, k: Any) -> Any:
    heads, kv_heads = emit.size(q, 1), emit.size(k, 1)
    if isinstance(heads, int) and isinstance(kv_heads, int):
        return heads // kv_heads
    return emit.call(operator.floordiv, heads, kv_heads)


def _merged_bias(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape, causal: bool) -> Any:
    operands: Any = node.args[3]
    total: Any = None
    for bias in spec.biases:
        term = emit.cast(operands[bias.operand], shape.dtype)
        term = term if bias.coeff == 1.0 else emit.call(torch.mul, term, bias.coeff)
        total = term if total is None else emit.call(torch.add, total, term)
    if spec.mask.kind != "full" and (not causal or shape.bias_grad):
        keep = emit_mask(emit, node, spec)
        lowest = torch.finfo(shape.dtype).min / 2  # which the kernel's factor of log2(e) leaves finite
        if total is None:
            zero = emit.call(torch.zeros, [], dtype=shape.dtype, device=value_of(node.args[0]).device)
            total = emit.call(torch.where, keep, zero, lowest)
        else:
            total = emit.call(torch.where, keep, total, lowest)
    if total is None:
        return None
    q, k = node.args[0], node.args[1]
    sizes = [emit.size(q, 0), emit.size(q, 1), emit.size(q, 2), emit.size(k, 2)]
    return emit.call(torch.ops.aten.expand.default, total, sizes)


def _aligned(emit: Any, k: Any, v: Any, bias: Any, training: bool) -> tuple[Any, Any, Any]:
    """k, v and a bias whose rows start at multiples of 16 bytes, as the kernel wants. A slice of longer rows
    does in inference; Inductor drops its stride before the backward kernel, which then faults (300 keys; one
    H100, torch 2.11, 2026-11-26), so with gradients there are keys more, to which nothing attends."""
    keys = emit.size(k, 2)
    if isinstance(keys, int) and keys % 8 == 0:
        return k, v, _dense_rows(emit, bias)
    rest = keys % 8 if isinstance(keys, int) else emit.call(operator.mod, keys, 8)
    more = 8 - rest if isinstance(rest, int) else emit.call(operator.sub, 8, rest)  # never a symbolic 0
    if training:
        k, v = (emit.call(torch.nn.functional.pad, x, (0, 0, 0, more)) for x in (k, v))
        return k, v, emit.call(torch.nn.functional.pad, bias, (0, more), value=float("-inf"))
    padded = emit.call(torch.nn.functional.pad, bias, (0, more))
    return k, v, emit.call(torch.ops.aten.slice.Tensor, padded, 3, 0, keys)


def _dense_rows(emit: Any, bias: Any) -> Any:
    tensor = tensor_of(bias)
    dense = tensor is not None and tensor.stride(-1) == 1
    return bias if dense else emit.call(torch.ops.aten.contiguous.default, bias)
