"""Transformer Engine's FP8 products (package transformer-engine, extra `[te]`) as operators with autograd.

    kp.linear(x, w) ─▶ kp.fp8_linear_te(x, [w])[0] ─▶ kp.te_linear, and kp.te_linear_backward

`tensorwise` is its recipe Float8CurrentScaling, one scale a tensor in all three products; `blockwise` its
Float8BlockScaling, 1 x 128 for activations and gradients, 128 x 128 for weights. As with kp's own kernels
only high-precision tensors are read by the backward pass, which casts x and w again. Unlike those it casts
outside of Inductor's sight, in one kernel or several for each operand, and keeps no FP8 copy of weights for
inference. NaN stays NaN, but an infinity in an operand becomes the largest FP8 number.

What is said here of the package was read in version 2.12; what is used of it has the same signatures from
2.11 to 2.19. It is imported when an operator first runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kp_compiler.config import Fp8LinearConfig
from kp_compiler.lowering.fp8.linear import finish, parse_spec
from kp_compiler.lowering.fp8.quantize import ALIGNMENT
from kp_compiler.lowering.fp8.recipes import Fp8Spec
from kp_compiler.lowering.ops import fragment
from kp_compiler.report import Rejection
from kp_compiler.target import Target

_NAME = "Transformer Engine"

_SCHEMA = "(Tensor x, Tensor[] weights, Tensor?[] biases, str spec) -> Tensor[]"
_FORWARD_SCHEMA = "(Tensor x, Tensor[] weights, str spec) -> Tensor"
_BACKWARD_SCHEMA = "(Tensor[] grads, Tensor? x, Tensor[] weights, str spec) -> Tensor[]"
# The package keeps cuBLASLt's workspace from its first product on: not in memory of a CUDA graph.
_TAGS = (torch.Tag.cudagraph_unsafe,)

# --------------------------------------------------------------------------------------------------- choosing


def check(config: Fp8LinearConfig, target: Target) -> Rejection | None:
    """Why these settings can't be served on this target, or None. Sizes and dtypes are as for other FP8
    products, multiples of 16 for every recipe."""
    return absent(target) or _recipe(config) or _device(config, target)


def absent(target: Target) -> Rejection | None:
    if target.has_te:
        return None
    return Rejection(
        "no-te",
        f"{_NAME} with its extension for torch, 2.11 or newer, is not installed.",
        "pip install --no-build-isolation 'kp-compiler[te]'; impl='scaled_mm' needs no package.",
    )


def _recipe(config: Fp8LinearConfig) -> Rejection | None:
    if config.recipe == "delayed":
        return Rejection(
            "te-recipe",
            f"{_NAME} keeps the state of delayed scaling in its own modules, not with parameters.",
            "impl='scaled_mm' has this recipe.",
        )
    if config.recipe not in ("tensorwise", "blockwise"):
        return Rejection(
            "te-recipe",
            f"{_NAME} has no recipe with one scale a row.",
            "It has 'tensorwise' and 'blockwise'; impl='scaled_mm' has this recipe.",
        )
    if config.save == "fp8":
        return Rejection(
            "te-save", f"With {_NAME} inputs are kept as they are, not in FP8.", "impl='scaled_mm' does it."
        )
    return None


def _device(config: Fp8LinearConfig, target: Target) -> Rejection | None:
    """Blocks need Hopper's tensor cores; from compute capability 10.0 on the package computes with MXFP8
    instead, whose scales are others."""
    if config.recipe == "blockwise" and not 90 <= target.sm < 100:
        return Rejection(
            "device",
            f"{_NAME}'s block scaling is used on compute capability 9.x, this is {target.sm / 10}.",
        )
    return None


# -------------------------------------------------------------------------------------------------- operators


@cache
def library() -> Any:
    """Registers the operators of this file, once."""
    return [
        fragment("te_linear", _FORWARD_SCHEMA, {"CUDA": _forward}, _forward_fake, tags=_TAGS),
        fragment("te_linear_backward", _BACKWARD_SCHEMA, {"CUDA": _backward}, _backward_fake, tags=_TAGS),
        fragment("fp8_linear_te", _SCHEMA, {"CompositeImplicitAutograd": _linear}),
    ]


def fp8_linear_te() -> Any:
    """`kp::fp8_linear_te`: x [..., K], weights [N_i, K] ([K, N_i] where the spec says transposed), biases
    [N_i] or None; returns [..., N_i] each, in the spec's dtype. Composite: AOTAutograd sees the two below."""
    library()
    return torch.ops.kp.fp8_linear_te.default


def forward() -> Any:
    """`kp::te_linear`: x [M,K] and weights as above, bfloat16, float16 or float32; returns y [M,N] = x · wᵀ,
    N = Σ N_i, in the spec's dtype, contiguous. Any M and strides; K and N_i are multiples of 16."""
    library()
    return torch.ops.kp.te_linear.default


def backward() -> Any:
    """`kp::te_linear_backward`: grads [M,N_i] of y's parts, x and weights as above, in the spec's dtype:

        dx [M,K] = dy · w        if there are weights (else [])
        dw [N,K] = dyᵀ · x       if x is given (else None); [K,N] where the spec says transposed

    Returns those of the two that are asked for, in this order, contiguous."""
    library()
    return torch.ops.kp.te_linear_backward.default


def _linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], spec: str) -> list[Tensor]:
    outs = _TeLinear.apply(spec, x.reshape(-1, x.shape[-1]), *weights)
    return finish(parse_spec(spec), x, outs if isinstance(outs, tuple) else (outs,), biases)


class _TeLinear(torch.autograd.Function):
    """y_i [M, N_i] = x [M, K] · w_iᵀ, the weights as they are stored."""

    @staticmethod
    def forward(ctx: Any, spec: str, x: Tensor, *weights: Tensor) -> Any:
        dim = parse_spec(spec).outputs_dim
        ctx.spec, ctx.sizes = spec, [w.shape[dim] for w in weights]
        ctx.save_for_backward(x, *weights)
        y = forward()(x, weights, spec)
        return y if len(weights) == 1 else y.split(ctx.sizes, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        found = backward()(grads, x if any(need_dw) else None, weights if need_dx else [], ctx.spec)
        dx = found[0].to(x.dtype) if need_dx else None
        if not any(need_dw):
            return None, dx, *[None] * len(weights)
        parts = found[-1].split(ctx.sizes, dim=parse_spec(ctx.spec).outputs_dim)
        dw = [p.to(w.dtype) if need else None for p, w, need in zip(parts, weights, need_dw, strict=True)]
        return None, dx, *dw


def _forward_fake(x: Tensor, weights: list[Tensor], spec: str) -> Tensor:
    plan = parse_spec(spec)
    outputs = sum(w.shape[plan.outputs_dim] for w in weights)
    return x.new_empty((x.shape[0], outputs), dtype=getattr(torch, plan.dtype))


def _backward_fake(grads: list[Tensor], x: Tensor | None, weights: list[Tensor], spec: str) -> list[Tensor]:
    plan = parse_spec(spec)
    dtype, outputs, found = getattr(torch, plan.dtype), sum(dy.shape[1] for dy in grads), []
    if weights:
        inputs = weights[0].shape[1 - plan.outputs_dim]
        found.append(grads[0].new_empty((grads[0].shape[0], inputs), dtype=dtype))
    if x is not None:
        shape = (x.shape[1], outputs) if plan.transposed else (outputs, x.shape[1])
        found.append(grads[0].new_empty(shape, dtype=dtype))
    return found


# ---------------------------------------------------------------------------------------------------- kernels

# cuBLASLt reads matrices by columns: with layout "TN" the package computes B · Aᵀ, with "NN" B · A and with
# "NT" Bᵀ · A. It reads A's cast by rows for "T" and B's for "N", else the casts by columns, which are
# transposed.


def _forward(x: Tensor, weights: list[Tensor], spec: str) -> Tensor:
    plan, rows = parse_spec(spec), x.shape[0]
    with torch.no_grad(), torch.cuda.device_of(x):
        w = _weight(plan, weights, by_outputs=True)
        x = _cast(plan, _rows([x]), "e4m3", rowwise=True)
        return _product(plan, "fprop", "NN" if plan.transposed else "TN", w, x)[:rows]


def _backward(grads: list[Tensor], x: Tensor | None, weights: list[Tensor], spec: str) -> list[Tensor]:
    plan, rows, found = parse_spec(spec), grads[0].shape[0], []
    if not weights and x is None:
        return []
    with torch.no_grad(), torch.cuda.device_of(grads[0]):
        dy = _cast(plan, _rows(grads), plan.grad_dtype, rowwise=bool(weights), columnwise=x is not None)
        if weights:
            w = _weight(plan, weights, by_outputs=False)
            found.append(_product(plan, "dgrad", "TN" if plan.transposed else "NN", w, dy)[:rows])
        if x is not None:
            x = _cast(plan, _rows([x]), "e4m3", columnwise=True)
            a, b = (dy, x) if plan.transposed else (x, dy)
            found.append(_product(plan, "wgrad", "NT", a, b))
    return found


def _product(plan: Fp8Spec, product: str, layout: str, a: Any, b: Any) -> Tensor:
    """Products of blocks always promote partial sums."""
    out, *_ = _package().general_gemm(
        a, b, out_dtype=getattr(torch, plan.dtype), layout=layout,
        use_split_accumulator=product not in plan.fast_accum or _in_blocks(plan),
        grad=product != "fprop",
    )  # fmt: skip
    return out


def _in_blocks(plan: Fp8Spec) -> bool:
    return plan.recipe == "blockwise"


def _weight(plan: Fp8Spec, weights: Sequence[Tensor], *, by_outputs: bool) -> Any:
    """Weights, together, cast so that a product contracts their inputs (`by_outputs`) or their outputs."""
    turned = by_outputs == plan.transposed
    joined = _readable(_joined(weights, plan.outputs_dim))
    return _cast(plan, joined, "e4m3", rowwise=not turned, columnwise=turned, square=True)


def _cast(
    plan: Fp8Spec,
    x: Tensor,
    dtype: str,
    *,
    rowwise: bool = False,
    columnwise: bool = False,
    square: bool = False,
) -> Any:
    """x [R,C] as the package's FP8 tensor, by rows, by columns or both. `square`: blocks of 128 x 128, not of
    1 x 128 along what is contracted. Only the latter can be cast by columns alone."""
    package = _package()
    fp8_dtype = package.e4m3 if dtype == "e4m3" else package.e5m2
    if _in_blocks(plan):
        quantizer = package.Float8BlockQuantizer(
            fp8_dtype, rowwise=rowwise or square, columnwise=columnwise,
            force_pow_2_scales=plan.power_of_two, block_scaling_dim=2 if square else 1,
        )  # fmt: skip
    else:
        quantizer = package.Float8CurrentScalingQuantizer(
            fp8_dtype, x.device, rowwise=True, columnwise=columnwise, force_pow_2_scales=plan.power_of_two
        )
    quantizer.internal = True  # a plain object instead of a subclass of Tensor
    return quantizer(x)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """parts [M,C_i], together, with rows of zeros up to a multiple of 16, and 16 at least: wgrad contracts
    rows. Zeros change no scale."""
    x = _joined(parts, 1)
    missing = max(ALIGNMENT, -(-x.shape[0] // ALIGNMENT) * ALIGNMENT) - x.shape[0]
    return _readable(torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x)


def _readable(x: Tensor) -> Tensor:
    """`x` itself, or a copy where it is not contiguous or not aligned to 16 bytes."""
    fits = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@cache
def _package() -> Any:
    """What is used of the package."""
    import transformer_engine.pytorch  # noqa: F401  (loads the extension, which is no module on its own)
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    return SimpleNamespace(
        general_gemm=general_gemm,
        Float8BlockQuantizer=Float8BlockQuantizer,
        Float8CurrentScalingQuantizer=Float8CurrentScalingQuantizer,
        e4m3=extension.DType.kFloat8E4M3,
        e5m2=extension.DType.kFloat8E5M2,
    )
