"""FlashAttention-4's CuTe kernels (package flash-attn-4, extra `[fa4]`) as two operators with autograd.

    kp.attention(q, k, v, [], causal) ─▶ kp.fa4_forward(qᵀ, kᵀ, vᵀ, scale, causal, left, right, key)[0]ᵀ

with ᵀ = transpose(1, 2), since the kernels read [B, S, H, D]. Method: Shah et al., FlashAttention-3
(arXiv:2407.08608), as its authors rewrote it in CuTe. What is said here of the package was read in version
4.0.0b14, module `flash_attn.cute.interface`, which is imported when an operator first runs.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kp_compiler.lowering import aten, mask_render
from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec, MaskSpec
from kp_compiler.target import Target

_NAME = "FlashAttention-4"
# Sizes that its authors test forward and backward on Hopper. It accepts every multiple of 8 up to 256, but dQ
# is wrong where padding to 16 and to 32 differ, as for 80 (Dao-AILab/flash-attention#2896), and the backward
# of grouped heads of size 136 to 192 does not compile (#2888).
_HEAD_DIMS = (64, 96, 128)
_NO_WINDOW = -1

_FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window_left, int window_right, str key)"
    " -> (Tensor out, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool causal,"
    " int window_left, int window_right, str key) -> (Tensor dq, Tensor dk, Tensor dv)"
)

# ------------------------------------------------------------------------------------------------------ table


def check(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    if not target.has_fa4:
        return Rejection("library", f"{_NAME} is not installed (extra [fa4]).")
    scores = _scores(spec) or aten.common(spec, shape, target, _NAME)
    return scores or _sizes(shape, target) or _mask(spec, shape)


def emit(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    """q [B,H,S,D], k and v [B,K,T,D] to out [B,H,S,D], a view of the kernel's [B,S,H,D]."""
    q, k, v = (emit.call(torch.transpose, x, 1, 2) for x in node.args[:3])
    causal = mask_render.is_causal(spec.mask)
    left, right = (_NO_WINDOW, _NO_WINDOW) if causal or spec.mask.kind == "full" else _window(spec.mask)
    both = emit.call(forward(), q, k, v, spec.scale, causal, left, right, fingerprint())
    return emit.call(torch.transpose, emit.call(operator.getitem, both, 0), 1, 2)


def _scores(spec: AttentionSpec) -> Rejection | None:
    if spec.softcap is not None:
        return Rejection("score-mod", f"{_NAME} is not used with a soft-cap.")
    if spec.sink is not None:
        return Rejection("score-mod", f"{_NAME} has no gradient for sinks.")
    if spec.dropout_p:
        return Rejection("dropout", f"{_NAME} has no dropout.")
    return None


def _sizes(shape: AttentionShape, target: Target) -> Rejection | None:
    """What the kernels of this compute capability do in both directions."""
    if not 90 <= target.sm < 120:
        # On 12.x the backward is the Ampere kernel, which is not told about windows (`is_local`).
        return Rejection(
            "device", f"{_NAME} is used on compute capability 9.x to 11.x, not {target.sm / 10}."
        )
    if shape.head_dim not in _HEAD_DIMS:
        sizes = ", ".join(map(str, _HEAD_DIMS))
        return Rejection("head-dim", f"{_NAME} is used with head sizes {sizes}, here it is {shape.head_dim}.")
    if not aten.at_least_two(shape.queries) or not aten.at_least_two(shape.keys):
        return Rejection("decode", f"{_NAME} does not split the keys of a single query.")
    return None


def _mask(spec: AttentionSpec, shape: AttentionShape) -> Rejection | None:
    """Full, causal, and causal with a sliding window, which the kernel aligns to the last query and key. Each
    keeps at least the query's own key, so what `dead_rows` says of fully masked rows does not matter here."""
    if spec.mask.kind == "full":
        return None
    if not mask_render.is_causal(spec.mask) and not mask_render.is_band(spec.mask):
        return Rejection(
            "mask-kind", f"{_NAME} knows full, causal and sliding window masks, not {spec.mask}."
        )
    if not aten.square(shape):
        return Rejection(
            "causal-alignment", f"{_NAME} aligns masks to the last query and key, not the first."
        )
    return None


def _window(mask: MaskSpec) -> tuple[int, int]:
    """Keys to the left and to the right of the query's own."""
    assert mask_render.is_band(mask)
    assert mask.window is not None
    return mask.window - 1, 0


# -------------------------------------------------------------------------------------------------- operators


def forward() -> Any:
    """`kp::fa4_forward`: q [B,S,H,D], k and v [B,T,K,D], half precision, H a multiple of K; any strides.

        s = scale · q kᵀ,  out = softmax(s + mask) v,  lse = log Σ_j exp(s + mask)

    out [B,S,H,D] in q's dtype, lse [B,H,S] float32, both contiguous; only out has a gradient. With d = T - S,
    query i sees key j if `j <= i + d` (`causal`), `j >= i + d - window_left`, `j <= i + d + window_right`,
    the last two where not -1. `key` is for compile caches, see `lowering.fingerprint`. Reads q once, k and v
    once for every tile of 128 or 192 queries; writes out and lse."""
    _operators()
    return torch.ops.kp.fa4_forward.default


def backward() -> Any:
    """`kp::fa4_backward`: grad and out [B,S,H,D], lse [B,H,S]; the rest as `forward`. Recomputes p from lse:

        dv = pᵀ grad,  ds = p ∘ (grad vᵀ - rowsum(grad ∘ out)),  dq = scale · ds k,  dk = scale · dsᵀ q

    dq [B,S,H,D], dk and dv [B,T,K,D] in q's dtype, contiguous. dq (and dk, dv where H > K) are summed in
    float32 by atomic additions, in an order that varies unless `torch.use_deterministic_algorithms` is on."""
    _operators()
    return torch.ops.kp.fa4_backward.default


@cache
def _operators() -> tuple[Any, Any]:
    """Define both operators, once."""
    make = torch.library.custom_op
    run = make("kp::fa4_forward", _forward, mutates_args=(), device_types="cuda", schema=_FORWARD_SCHEMA)
    run.register_fake(_forward_fake)
    run.register_autograd(_gradients, setup_context=_save)
    back = make("kp::fa4_backward", _backward, mutates_args=(), device_types="cuda", schema=_BACKWARD_SCHEMA)
    back.register_fake(_backward_fake)
    return run, back


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window_left: int, window_right: int, key: str
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return _kernels()._flash_attn_fwd(
            *map(_readable, (q, k, v)),
            softmax_scale=scale,
            causal=causal,
            window_size_left=_side(window_left),
            window_size_right=_side(window_right),
            pack_gqa=_packs(q, k),
            return_lse=True,
        )


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[-1]))
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, causal: bool, window_left: int, window_right: int, key: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    with torch.cuda.device_of(q):
        _kernels()._flash_attn_bwd(
            *map(_readable, (q, k, v, out, grad)),
            lse.contiguous(),
            softmax_scale=scale,
            causal=causal,
            window_size_left=_side(window_left),
            window_size_right=_side(window_right),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=dq,
            dk=dk,
            dv=dv,
        )
    return dq, dk, dv


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.settings = settings


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.settings)
    if grad is None:
        return None, None, None, *nothing
    return *backward()(grad, *ctx.saved_tensors, *ctx.settings), *nothing


# ---------------------------------------------------------------------------------------------------- package


@cache
def _kernels() -> Any:
    """The package's forward and backward without their autograd function."""
    from flash_attn.cute import interface

    return interface


def _side(window: int) -> int | None:
    return None if window == _NO_WINDOW else window


def _packs(q: Tensor, k: Tensor) -> bool:
    """Whether the query heads of one key head share tiles (of 128 or 192 rows). Where they do not fill tiles,
    the kernel would load q without TMA, which did not compile elsewhere (Dao-AILab/flash-attention#2438)."""
    ratio = q.shape[2] // k.shape[2]
    return ratio > 1 and 64 % ratio == 0


def _readable(x: Tensor) -> Tensor:
    """`x` [B,S,H,D] itself, or a contiguous copy where rows are not dense or not aligned to 16 bytes.
    Repeated dimensions (stride 0) are copied as well: the forward's compile key does not tell them apart."""
    step = 16 // x.element_size()
    dense = x.stride(-1) == 1 and all(stride and stride % step == 0 for stride in x.stride()[:-1])
    return x if dense and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
