"""Delayed scaling: casts use scales from the largest magnitudes of earlier steps, so no pass over the data
comes before the cast (the method of NVIDIA's Transformer Engine, "DelayedScaling").

Each operator has three numbers to follow, the largest magnitude of x, of its weights and of dy. The compiled
graph reads their scales and writes what it saw into one-element tensors, both graph inputs; `state` keeps a
history of them and makes new scales before each training step, outside the graph. A value that saturates is
clamped; the next step knows of it. Infinities and NaN pass through the cast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from kp_compiler.lowering.fp8 import linear
from kp_compiler.lowering.fp8.linear import Scale, finish, parse_spec, weight_cast
from kp_compiler.lowering.fp8.quantize import E4M3, fp8_amax, fp8_quantize
from kp_compiler.lowering.fp8.recipes import TENSOR, Fp8Spec
from kp_compiler.lowering.fp8.state import ROLES
from kp_compiler.lowering.ops import fragment

_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor scales, Tensor(a!)[] seen, str spec) -> Tensor[]"
)


@cache
def library() -> Any:
    """Registers the operator of this file, once."""
    return fragment("fp8_linear_delayed", _SCHEMA, {"CompositeImplicitAutograd": _linear})


def fp8_linear_delayed() -> Any:
    """`kp::fp8_linear`, with `scales` [6,4] given, the first numbers of the rows those of x, w and dy and
    their inverses, and the largest magnitudes taken into `seen` [1] each; those of dy, and of w where dgrad
    casts it anyway, in the backward pass."""
    library()
    return torch.ops.kp.fp8_linear_delayed.default


def _linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    scales: Tensor,
    seen: list[Tensor],
    spec: str,
) -> list[Tensor]:
    plan = parse_spec(spec)
    outs = _Delayed.apply(plan, x.reshape(-1, x.shape[-1]), scales, *seen, *weights)
    return finish(plan, x, outs if isinstance(outs, tuple) else (outs,), biases)


def _parts(scales: Tensor) -> list[Scale]:
    """The scales of x, w and dy, [1,1] each."""
    found = [scales[row : row + 1, :1] for row in range(2 * len(ROLES))]
    return [Scale(*pair) for pair in zip(found[: len(ROLES)], found[len(ROLES) :], strict=True)]


def _see(seen: Tensor, amax: Tensor) -> None:
    """A step may have several passes, and the forward pass of one precede the backward pass of another."""
    torch.maximum(seen, amax, out=seen)


def let_passes_overlap(graph: Graph) -> None:
    """In a joint graph: AOTAutograd saves the tensors that its backward part takes magnitudes into, and would
    refuse the second of two backward passes because the first one wrote them. Both are meant to."""
    aten, amax = torch.ops.aten, torch.ops.kp.fp8_amax.default
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        seen, larger = node.args[:2]
        if larger.target is aten.maximum.default and larger.args[0] is seen and larger.args[1].target is amax:
            seen.meta["saved_tensor_with_no_vc_check"] = True


class _Delayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Fp8Spec, x: Tensor, scales: Tensor, *rest: Tensor) -> Any:
        (seen_x, seen_w, seen_dy), weights = rest[:3], rest[3:]
        scale_x, scale_w, _ = _parts(scales)
        quantized = fp8_quantize([x], scale_x.cast, E4M3, TENSOR)
        weight = weight_cast(plan, weights, scale_w)
        out = linear.fprop(plan, quantized, weight, scale_x.inverse, scale_w.inverse, x.shape[0])
        _see(seen_x, fp8_amax([x]))
        late = ctx.needs_input_grad[1]  # dgrad's cast of the weights finds their maximum on the way
        if not late:
            _see(seen_w, fp8_amax(list(weights), dim=plan.outputs_dim))
        ctx.plan, ctx.sizes, ctx.dtype = plan, [w.shape[plan.outputs_dim] for w in weights], x.dtype
        ctx.seen_dy, ctx.seen_w = seen_dy, seen_w if late else None
        kept = linear.keep(plan, x, scale_x)[0] if any(ctx.needs_input_grad[6:]) else None
        ctx.save_for_backward(kept, scales, *weights)
        return out if len(weights) == 1 else out.split(ctx.sizes, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan: Fp8Spec = ctx.plan
        x, scales, *weights = ctx.saved_tensors
        scale_x, scale_w, scale_dy = _parts(scales)
        amax = fp8_amax(list(grads), dim=1)
        _see(ctx.seen_dy, amax)
        if ctx.seen_w is not None:
            _see(ctx.seen_w, fp8_amax(weights, dim=plan.outputs_dim))
        dx, dw = linear.gradients(
            plan, grads, scale_dy, x, scale_x, weights, scale_w, dtype=ctx.dtype, sizes=ctx.sizes,
            need_dx=ctx.needs_input_grad[1], need_dw=ctx.needs_input_grad[6:], after=amax,
        )  # fmt: skip
        return (None, dx, *[None] * 4, *dw)
