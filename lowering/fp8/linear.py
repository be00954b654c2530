"""A linear layer in FP8, or several that read the same activation, forward and backward.

`kp::fp8_linear` is composite: AOTAutograd traces through it, so that its casts and products are nodes of
the joint graph, where equal ones merge and `fuse` finds them. Only high-precision tensors are read by the
backward pass: it casts x and w again, transposed, next to the gradient. No FP8 copy lives from forward to
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kp_compiler.lowering.fp8.mm import fp8_mm
from kp_compiler.lowering.fp8.quantize import DTYPES, E4M3, Block, fp8_quantize, fp8_scale
from kp_compiler.lowering.fp8.recipes import TENSOR, Fp8Spec, Recipe
from kp_compiler.lowering.ops import fragment

_SCHEMA = "(Tensor x, Tensor[] weights, Tensor?[] biases, str spec) -> Tensor[]"


@cache
def library() -> Any:
    """Registers the operator of this file, once."""
    return fragment("fp8_linear", _SCHEMA, {"CompositeImplicitAutograd": _linear})


def fp8_linear() -> Any:
    """`kp::fp8_linear`: x [..., K], weights [N_i, K] ([K, N_i] where the spec says transposed), biases [N_i]
    or None; returns [..., N_i] each."""
    library()
    return torch.ops.kp.fp8_linear.default


@lru_cache(maxsize=1024)
def parse_spec(text: str) -> Fp8Spec:
    return Fp8Spec.from_json(text)


def _linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], spec: str) -> list[Tensor]:
    plan = parse_spec(spec)
    outs = _Fp8Linear.apply(plan, x.reshape(-1, x.shape[-1]), *weights)
    return finish(plan, x, outs if isinstance(outs, tuple) else (outs,), biases)


def finish(plan: Fp8Spec, x: Tensor, outs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Products [M, N_i] with their biases, in the leading dimensions of `x`."""
    dtype = getattr(torch, plan.dtype)
    return [
        (out if bias is None else out + bias.to(dtype)).reshape([*x.shape[:-1], out.shape[-1]])
        for out, bias in zip(outs, biases, strict=True)
    ]


class Scale(NamedTuple):
    """What a matrix is multiplied by before its cast, and what takes a product of it back, in float32."""

    cast: Tensor
    inverse: Tensor


def restored(cast: Tensor | None, inverse: Tensor | None) -> Scale | None:
    """A scale that was kept for the backward pass, or was not."""
    return None if cast is None or inverse is None else Scale(cast, inverse)


class _Fp8Linear(torch.autograd.Function):
    """y_i [M, N_i] = x [M, K] · w_iᵀ, the weights as they are stored."""

    @staticmethod
    def forward(ctx: Any, plan: Fp8Spec, x: Tensor, *weights: Tensor) -> Any:
        recipe, sizes = plan.scaling, [w.shape[plan.outputs_dim] for w in weights]
        scale_w, scale_x = weight_scale(plan, weights), activation_scale(plan, x)
        again = _tensor_scale(plan, weights, recipe.w, recipe.w_t, scale_w, plan.outputs_dim)
        scale_t = _tensor_scale(plan, [x], recipe.x, recipe.x_t, scale_x)
        quantized = activation_cast(plan, x, scale_x, after=scale_t)
        weight = weight_cast(plan, weights, scale_w, after=again)
        out = fprop(plan, quantized, weight, scale_x.inverse, as_rows(plan, scale_w.inverse), x.shape[0])
        ctx.plan, ctx.sizes, ctx.dtype = plan, sizes, x.dtype
        kept, scale_t = keep(plan, x, scale_t) if any(ctx.needs_input_grad[2:]) else (None, None)
        ctx.save_for_backward(kept, *(scale_t or (None, None)), *(again or (None, None)), *weights)
        return out if len(weights) == 1 else out.split(sizes, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan: Fp8Spec = ctx.plan
        x, *scales = ctx.saved_tensors
        scale_x, scale_w, weights = restored(*scales[:2]), restored(*scales[2:4]), scales[4:]
        scale_dy = _scale(plan, grads, plan.scaling.dy, DTYPES[plan.grad_dtype], dim=1)
        dx, dw = gradients(
            plan, grads, scale_dy, x, scale_x, weights, scale_w, dtype=ctx.dtype, sizes=ctx.sizes,
            need_dx=ctx.needs_input_grad[1], need_dw=ctx.needs_input_grad[2:], after=scale_dy.cast,
        )  # fmt: skip
        return (None, dx, *dw)


def fprop(
    plan: Fp8Spec, x: Tensor, weight: Tensor, inverse_x: Tensor, inverse_w: Tensor, rows: Any
) -> Tensor:
    """y [rows, N] of both operands in FP8, x [M,K] with what rows of padding its cast has, weight [N,K]."""
    blocks = plan.scaling.blocks
    out = fp8_mm(
        x, weight, inverse_x, inverse_w,
        dtype=getattr(torch, plan.dtype), fast_accum="fprop" in plan.fast_accum, blocks=blocks,
    )  # fmt: skip
    return out[:rows] if blocks else out


def keep(plan: Fp8Spec, x: Tensor, scale: Scale | None) -> tuple[Tensor, Scale | None]:
    """What wgrad will read of the activation, and its scale where that is known: x itself, which may have to
    be kept for other reasons or is cheap to compute again; or its transposed copy in FP8, half the bytes."""
    block = plan.scaling.x_t
    if plan.save != "fp8" or block is None:
        return x, scale
    scale = scale or _scale(plan, [x], block)
    return fp8_quantize([x], scale.cast, E4M3, block, transpose=True), scale


def gradients(
    plan: Fp8Spec,
    grads: Sequence[Tensor],
    scale_dy: Scale,
    x: Tensor,
    scale_x: Scale | None,
    weights: Sequence[Tensor],
    scale_w: Scale | None,
    *,
    dtype: torch.dtype,
    sizes: list[int],
    need_dx: bool,
    need_dw: Sequence[bool],
    after: Tensor,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx in `dtype`, and dw of each weight, where they are needed. `x` and its scale are what `keep`
    returned, `after` is a tensor of the backward pass that its casts wait for."""
    recipe = plan.scaling
    dx = None
    if need_dx:
        dx = _dgrad(plan, recipe, grads, scale_dy, weights, scale_w, after).to(dtype)
    if not any(need_dw):
        return dx, [None] * len(weights)
    dw = _wgrad(plan, recipe, grads, scale_dy, x, scale_x, after).to(weights[0].dtype)
    parts = dw.split(sizes, plan.outputs_dim) if len(weights) > 1 else (dw,)
    return dx, [part if need else None for part, need in zip(parts, need_dw, strict=True)]


def _scale(
    plan: Fp8Spec,
    parts: Sequence[Tensor],
    block: Block,
    dtype: torch.dtype = E4M3,
    *,
    dim: int = 0,
    after: Tensor | None = None,
) -> Scale:
    scale = fp8_scale(list(parts), dtype, block, power_of_two=plan.power_of_two, dim=dim, after=after)
    return Scale(scale, scale.reciprocal())


def _tensor_scale(
    plan: Fp8Spec, parts: Sequence[Tensor], block: Block, again: Block | None, scale: Scale, dim: int = 0
) -> Scale | None:
    """The scale of the backward pass, where that is one for the whole tensor; `scale` is that of the forward
    pass, which has read the tensor for it. Its casts have to wait for this one: it is then found there."""
    if again != TENSOR:
        return None
    return scale if block == TENSOR else _scale(plan, parts, TENSOR, dim=dim)


def _cast(scale: Scale | None) -> Tensor | None:
    return None if scale is None else scale.cast


def activation_scale(plan: Fp8Spec, x: Tensor) -> Scale:
    """The scale of x [M,K] for fprop."""
    return _scale(plan, [x], plan.scaling.x)


def activation_cast(plan: Fp8Spec, x: Tensor, scale: Scale, after: Scale | None = None) -> Tensor:
    """x [M,K] for fprop."""
    return fp8_quantize([x], scale.cast, E4M3, plan.scaling.x, after=_cast(after))


def weight_scale(plan: Fp8Spec, weights: Sequence[Tensor]) -> Scale:
    """The scale of weights for fprop, as they are stored."""
    return _weight_scale(plan, weights, plan.scaling.w)


def weight_cast(plan: Fp8Spec, weights: Sequence[Tensor], scale: Scale, after: Scale | None = None) -> Tensor:
    """Weights [N,K] for fprop."""
    return _weight(plan, weights, scale, plan.scaling.w, by_outputs=True, after=_cast(after))


# Weights are cast from where they lie, [N,K] or [K,N]; recipes speak of [N,K].


def _stored(plan: Fp8Spec, block: Block) -> Block:
    return (block[1], block[0]) if plan.transposed else block


def _weight_scale(
    plan: Fp8Spec, weights: Sequence[Tensor], block: Block, after: Tensor | None = None
) -> Scale:
    return _scale(plan, weights, _stored(plan, block), dim=plan.outputs_dim, after=after)


def as_rows(plan: Fp8Spec, scale: Tensor) -> Tensor:
    """Scales of stored weights as those of [N,K]."""
    return scale.t() if plan.transposed else scale


def _weight(
    plan: Fp8Spec,
    weights: Sequence[Tensor],
    scale: Scale,
    block: Block,
    *,
    by_outputs: bool,
    after: Tensor | None = None,
) -> Tensor:
    """[N,K] to contract the inputs, or [K,N] to contract the outputs."""
    return fp8_quantize(
        list(weights), scale.cast, E4M3, _stored(plan, block), dim=plan.outputs_dim,
        transpose=by_outputs == plan.transposed, after=after,
    )  # fmt: skip


def _dgrad(
    plan: Fp8Spec,
    recipe: Recipe,
    grads: Sequence[Tensor],
    scale_dy: Scale,
    weights: Sequence[Tensor],
    scale_w: Scale | None,
    after: Tensor,
) -> Tensor:
    """dx [M,K] = dy [M,N] · w [N,K]."""
    if scale_w is None:
        scale_w = _weight_scale(plan, weights, recipe.w_t, after)
    dx = fp8_mm(
        fp8_quantize(list(grads), scale_dy.cast, DTYPES[plan.grad_dtype], recipe.dy, dim=1),
        _weight(plan, weights, scale_w, recipe.w_t, by_outputs=False, after=after),
        scale_dy.inverse, as_rows(plan, scale_w.inverse).t(), dtype=grads[0].dtype,
        fast_accum="dgrad" in plan.fast_accum, blocks=recipe.blocks,
    )  # fmt: skip
    return dx[: grads[0].shape[0]] if recipe.blocks else dx


def _wgrad(
    plan: Fp8Spec,
    recipe: Recipe,
    grads: Sequence[Tensor],
    scale_dy: Scale,
    x: Tensor,
    scale_x: Scale | None,
    after: Tensor,
) -> Tensor:
    """dw [N,K] = dyᵀ [N,M] · x [M,K], or its transpose where weights are stored so."""
    if recipe.x_t is None or recipe.dy_t is None:
        dy, x = torch.cat(list(grads), dim=1), x.to(grads[0].dtype)
        return x.t() @ dy if plan.transposed else dy.t() @ x
    grad_dtype = DTYPES[plan.grad_dtype]
    if recipe.dy_t != recipe.dy:
        scale_dy = _scale(plan, grads, recipe.dy_t, grad_dtype, dim=1)
    if scale_x is None:
        scale_x = _scale(plan, [x], recipe.x_t, after=after)
    x_t = x
    if plan.save != "fp8":
        x_t = fp8_quantize([x], scale_x.cast, E4M3, recipe.x_t, transpose=True, after=after)
    dy_t = fp8_quantize(list(grads), scale_dy.cast, grad_dtype, recipe.dy_t, dim=1, transpose=True)
    operands = [(dy_t, scale_dy.inverse.t()), (x_t, scale_x.inverse.t())]
    swap = plan.transposed and recipe.x_t == recipe.dy_t  # else the kernel wants them in this order
    (a, inverse_a), (b, inverse_b) = reversed(operands) if swap else operands
    fast = "wgrad" in plan.fast_accum
    dw = fp8_mm(a, b, inverse_a, inverse_b, dtype=grads[0].dtype, fast_accum=fast, blocks=recipe.blocks)
    return dw.t() if plan.transposed and not swap else dw
