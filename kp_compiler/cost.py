"""A roofline in sympy: FLOPs, bytes and seconds of attention and of products with a weight, as formulas of
the (possibly symbolic) shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from kp_compiler.errors import KPConfigError
from kp_compiler.metadata import hint
from kp_compiler.specs import AttentionShape, AttentionSpec, LinearShape, SparseSpec
from kp_compiler.target import Target

# Measured on one H100 80GB HBM3, torch 2.11, bf16, causal, 8k tokens, D128: benchmarks/attention_models.py
# and shared figures of 2026-11-22. Forward FLOP/s by implementation; "masked" is SDPA with a dense boolean
# mask, "eager" is bound by memory instead.
RATES = {
    "fa4": 580e12,
    "cudnn": 560e12,
    "flash": 318e12,
    "flex": 389e12,
    "triton": 600e12,
    "efficient": 170e12,
    "masked": 310e12,
}
# Bytes/s: a copy on the H100; what fits benchmarks/fp8_sweep.py best on both, 2026-11-27. Other devices are
# taken for an H100, whose arithmetic and memory are in much the same proportion.
BANDWIDTH = {"H100": 3.0e12, "H200": 3.9e12}
KERNEL = 4e-6  # seconds that the smallest kernel takes, in a CUDA graph; 2026-11-27
GATE = 32  # inner size of a gate of `learned`, where it is not known
EAGER_PASSES = (
    5  # times the score matrix crosses memory when attention is written out and compiled by Inductor
)

SB, SH, SK, SQ, ST, SD, SE = sympy.symbols("B H K S T D E", positive=True, integer=True)


def bandwidth(target: Target) -> float:
    """Bytes/s."""
    return next((rate for name, rate in BANDWIDTH.items() if name in target.name), BANDWIDTH["H100"])


def sized(symbols: Mapping[str, sympy.Symbol], sizes: Mapping[str, float]) -> dict[sympy.Symbol, float]:
    """Sizes by name as what formulas take. Raises KPConfigError for a name that is none of theirs."""
    unknown = sorted(set(sizes) - set(symbols))
    if unknown:
        raise KPConfigError(f"at: got {unknown[0]!r}, expected some of {', '.join(symbols)}")
    return {symbols[name]: size for name, size in sizes.items()}


@dataclass(frozen=True)
class Cost:
    """Formulas over B, H, K, S, T, D, E, or over M, K, N."""

    flops: sympy.Expr
    bytes: sympy.Expr
    kernels: int = 1
    steps: sympy.Expr = sympy.S.Zero  # elements of an FP8 product's sum, which no kernel of cuBLASLt splits

    def seconds(self, rate: float, sizes: dict[Any, Any], target: Target) -> float | None:
        """Whichever takes longest, arithmetic at `rate`, bytes at the device's bandwidth or steps one after
        the other, and a floor for every kernel; None if sizes are symbolic."""
        flops, moved, steps = (expr.subs(sizes) for expr in (self.flops, self.bytes, self.steps))
        if flops.free_symbols or moved.free_symbols or steps.free_symbols:
            return None
        longest = max(float(flops) / rate, float(moved) / bandwidth(target), float(steps) * FP8_STEP)
        return longest + self.kernels * KERNEL

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.kernels + other.kernels)


def attention(spec: AttentionSpec, width: int = 2) -> Cost:
    """The floor of one forward: each input read once, the output written once, only unmasked pairs
    computed, of these only the chosen share where blocks are chosen, which is counted in."""
    share = sympy.S.One if spec.sparse is None else _share(spec.sparse)
    whole = Cost(
        2 * SB * SH * area(spec) * share * (SD + SE),
        width * SB * (SH * SQ * (SD + SE) + SK * ST * (SD + SE)),
    )
    return whole if spec.sparse is None else whole + selection(spec, width)


def _share(sparse: SparseSpec) -> sympy.Expr:
    """Of the blocks under a mask: those of the budget, and all of the heads that are dense."""
    density = sympy.Rational(sparse.density).limit_denominator(10**6)
    return density + (1 - density) * len(sparse.dense) / SH


def selection(spec: AttentionSpec, width: int = 2) -> Cost:
    """Choosing blocks: scores of four queries of a block with pairs of keys, or between parts of 16, twice
    (`content`), or of 64 queries with all keys, twice
    (`vertical_slash`), or products of features of blocks (`learned`), and a float32 score of each block,
    written and read."""
    sparse = spec.sparse
    assert sparse is not None
    scores = Cost(sympy.S.Zero, 8 * SB * SH * area(spec) / sparse.block**2, 2)
    if sparse.selector == "content":
        each = {"sampled": sparse.block, "pooled": 256, "antidiagonal": 16}[sparse.estimate]
        return scores + Cost(4 * SB * SH * area(spec) * SD / each, width * SB * (SH * SQ + SK * ST) * SD, 2)
    if sparse.selector == "vertical_slash":
        return scores + Cost(4 * SB * SH * 64 * ST * SD, 2 * width * SB * SK * ST * SD, 2)
    if sparse.selector == "learned":
        inner = 2 * SB * SH * area(spec) * GATE / sparse.block**2
        projected = 2 * SB * SH * (SQ + 3 * ST) * SD * GATE / sparse.block
        return scores + Cost(inner + projected, width * SB * (SH * SQ + 3 * SK * ST) * SD, 6)
    return scores


def area(spec: AttentionSpec) -> sympy.Expr:
    """Unmasked pairs of one head. Document and padding masks depend on data: counted as if they masked
    nothing."""
    if spec.mask.window is not None and "causal" in spec.mask.parts:
        return SQ * sympy.Min(ST, spec.mask.window)
    if "causal" in spec.mask.parts:
        return SQ * ST / 2
    return SQ * ST


@cache
def _dense(form: str, width: int) -> Cost:
    """What the site costs unrewritten: SDPA with a dense mask computes everything and reads the mask; eager
    attention also moves the score matrix several times."""
    flops = 2 * SB * SH * SQ * ST * (SD + SE)
    passes = 1 if form == "sdpa" else EAGER_PASSES * width * SH
    operands = width * SB * (SH * SQ * (SD + SE) + SK * ST * (SD + SE))
    return Cost(flops, operands + SB * SQ * ST * passes, 1 if form == "sdpa" else 3)


def _kernel_before(spec: AttentionSpec) -> str:
    """What PyTorch runs where kp changes nothing. (Written out, attention is bound by bytes, not by this.)"""
    if spec.biases:
        return "efficient"
    return "cudnn" if spec.form == "sdpa" and spec.mask.kind == "full" else "masked"


def predict(spec: AttentionSpec, shape: AttentionShape, impl: str, target: Target) -> dict[str, Any] | None:
    """Forward milliseconds before and after, or None where the target, the sizes or the share of blocks that
    is computed are not known."""
    if target.device != "cuda" or impl not in RATES:
        return None
    if spec.sparse is not None and (spec.sparse.mass is not None or spec.sparse.error is not None):
        return None  # how much is computed depends on what q and k hold
    sizes = dict(
        zip(
            (SB, SH, SK, SQ, ST, SD, SE),
            (
                shape.batch,
                shape.heads,
                shape.kv_heads,
                shape.queries,
                shape.keys,
                shape.head_dim,
                shape.value_dim,
            ),
            strict=True,
        )
    )
    sizes = {name: size if isinstance(size, int) else name for name, size in sizes.items()}
    width = shape.dtype.itemsize
    after = attention(spec, width).seconds(RATES[impl], sizes, target)
    before = _dense(spec.form, width).seconds(RATES[_kernel_before(spec)], sizes, target)
    if after is None or before is None:
        return None
    return {
        "forward_ms": round(after * 1e3, 4),
        "before_ms": round(before * 1e3, 4),
        "gain": round(before / after, 2),
    }


# --------------------------------------------------------------------------------------------------------
# products with a weight

# FLOP/s of one product in bfloat16 and in FP8. Measured on one H100 80GB HBM3, torch 2.11, random data, 8192
# rows, 2026-11-26; printed again by benchmarks/fp8_gemm.py.
PRODUCT = 750e12
FP8_PRODUCT = {
    "tensorwise": 1380e12,
    "delayed": 1380e12,
    "rowwise": 1330e12,
    "rowwise_gw_hp": 1330e12,
    "blockwise": 1150e12,
}
# Seconds that an FP8 product takes for each element of its sum where there are few rows: 16 to 64 rows, 4096
# and 14336 inputs, H200, 2026-11-27. (In bfloat16 cuBLAS gives parts of a sum to several multiprocessors.)
FP8_STEP = 2.1e-9
# Bytes that casting moves for each element of (x, w, dy) in a training step, at full bandwidth. Fitted to the
# times of whole layers, so small tensors' slower passes are in them; same devices and date: tensorwise by
# benchmarks/fp8_sweep.py, the others in proportion by benchmarks/fp8_linear.py.
CAST_BYTES = {
    "tensorwise": (12.5, 7.5, 13.5),
    "delayed": (11.0, 6.5, 11.5),
    "rowwise": (16.0, 9.5, 17.0),
    "rowwise_gw_hp": (10.0, 6.0, 11.0),
    "blockwise": (8.5, 5.0, 9.0),
}
FORWARD_CAST_BYTES = (3.5, 3.5, 0.0)  # without a backward pass
CAST_KERNELS = 5  # that the smallest layer waits for in a training step

SM, SI, SN = sympy.symbols("M K N", positive=True, integer=True)
_X, _W, _Y = SM * SI, SN * SI, SM * SN
_PRODUCTS = {"y": (_X, _W, _Y), "dx": (_Y, _W, _X), "dw": (_Y, _X, _W)}  # two operands and the result


def product(name: str, *, fp8: bool = False) -> Cost:
    """y = x wᵀ, dx = dy w, or dw = dyᵀ x; results have two bytes."""
    first, second, result = _PRODUCTS[name]
    return Cost(
        2 * SM * SI * SN,
        (1 if fp8 else 2) * (first + second) + 2 * result,
        steps=SM * SI * SN / result if fp8 else sympy.S.Zero,
    )


def casts(recipe: str, *, backward: bool, cached: bool) -> Cost:
    """What quantising the operands moves; weights that are cached are cast already."""
    x, w, dy = CAST_BYTES[recipe] if backward else FORWARD_CAST_BYTES
    kernels = CAST_KERNELS if backward else 2 - cached
    return Cost(sympy.S.Zero, x * _X + (0 if cached else w) * _W + dy * _Y, kernels)


def predict_linear(
    shape: LinearShape, recipe: str, target: Target, *, cached: bool = False
) -> dict[str, Any] | None:
    """Milliseconds of the site now and in FP8 with every cast, forward and backward as far as gradients are
    needed; None off a GPU. Symbolic row counts are taken as this compilation saw them."""
    if target.device != "cuda":
        return None
    names = ["y", *["dx"] * shape.grad_x, *["dw"] * shape.grad_w]
    sizes = dict(zip((SM, SI, SN), (hint(shape.rows), shape.inputs, shape.outputs), strict=True))
    plain = {"dw"} if recipe == "rowwise_gw_hp" else set()
    before = [product(name).seconds(PRODUCT, sizes, target) for name in names]
    after = [
        now if name in plain else product(name, fp8=True).seconds(FP8_PRODUCT[recipe], sizes, target)
        for name, now in zip(names, before, strict=True)
    ]
    after.append(casts(recipe, backward=len(names) > 1, cached=cached).seconds(1.0, sizes, target))
    now, then = _sum(before), _sum(after)
    if now is None or then is None:
        return None
    return {
        "fp8_ms": round(then * 1e3, 4),
        "before_ms": round(now * 1e3, 4),
        "gain": round(now / then, 4),
    }


def _sum(seconds: list[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
