"""Run a product in FP8 beside float64, with the site's own weights' sizes and random operands, before it is
used.

What it checks is the device, its kernels and the recipe. How far a model's own activations are from normally
distributed is not known before they are there: recipes with one scale a tensor lose what outliers cost them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kp_compiler.lowering import te
from kp_compiler.lowering.fp8.linear import fp8_linear
from kp_compiler.lowering.fp8.quantize import sqnr
from kp_compiler.metadata import tensor_of
from kp_compiler.passes.base import Context, Match
from kp_compiler.report import Rejection
from kp_compiler.verify import Verdict

ROWS = 512  # of the activation, whatever the site has: more tell nothing new, fewer are noise
# Signal to noise of a product of two normally distributed operands: 28.5 dB where both are e4m3, 24.6 where
# one is e5m2 (measured on a CPU, torch 2.13, M1024 K4096 N2048), less what one draw moves.
FLOORS = {"e4m3": 27.5, "e5m2": 24.0}


def verify_linear(match: Match, ctx: Context) -> Verdict:
    """Output and gradients of the whole group that `match` belongs to; asked for each member, run once."""
    key = ("verified", match.data.members)
    if key not in ctx.cache:
        ctx.cache[key] = _verify(match.data, te.fp8_linear_te() if match.impl == "te" else fp8_linear())
    return ctx.cache[key]


def _verify(group: Any, operator: Any) -> Verdict:
    x, weights = tensor_of(group.members[0].args[0]), [tensor_of(m.args[1]) for m in group.members]
    assert x is not None and all(w is not None for w in weights)
    spec = group.spec if group.spec.recipe != "delayed" else _current(group.spec)
    dtype, device = getattr(torch, spec.dtype), x.device
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        shapes = [torch.Size((ROWS, group.shape.inputs)), *(w.shape for w in weights if w is not None)]
        operands = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        outputs = [shape[spec.outputs_dim] for shape in shapes[1:]]
        grads = [torch.randn(ROWS, size, device=device, dtype=dtype) for size in outputs]
        got, want = _run(spec, operands, grads, operator), _run(spec, operands, grads, None)
    names = ["out"] * len(weights) + ["dx"] + ["dw"] * len(weights)
    found = [(name, sqnr(a, b)) for name, a, b in zip(names, got, want, strict=True)]
    text = ", ".join(f"{name} {value:.1f} dB" for name, value in found)
    for name, value in found:
        floor = FLOORS["e4m3"] if name == "out" else FLOORS[spec.grad_dtype]
        if not value >= floor:
            sentence = f"The replacement's {name} has {value:.1f} dB, {floor} are needed."
            return Verdict(f"failed: {text}", Rejection("verify-failed", sentence))
    return Verdict(f"ok: {text}")


def _current(spec: Any) -> Any:
    """Delayed scaling has no history here: the scales of the data itself."""
    return dataclasses.replace(spec, recipe="tensorwise")


def _run(
    spec: Any, operands: list[torch.Tensor], grads: list[torch.Tensor], operator: Any
) -> list[torch.Tensor]:
    """Outputs, then the gradients of x and of each weight; where there is no operator, in float64."""
    exact = operator is None
    with torch.enable_grad():
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in operands]
        x, weights = leaves[0], leaves[1:]
        if exact:
            outs = [x @ (w if spec.transposed else w.t()) for w in weights]
        else:
            outs = operator(x, weights, [None] * len(weights), spec.to_json())
        return [*outs, *torch.autograd.grad(outs, leaves, [g.to(outs[0].dtype) for g in grads])]
