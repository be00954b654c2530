"""What the tests of `impl="te"` share: settings, and calls of its operators."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kp_compiler import config
from kp_compiler import target as targets
from kp_compiler.lowering import te
from kp_compiler.lowering.fp8.recipes import Fp8Spec

HERE = targets.parse("cuda:sm90")
HOPPER = dataclasses.replace(HERE, has_te=True)
M = 40
RECIPES = pytest.mark.parametrize(
    ("recipe", "grad_dtype"),
    [("tensorwise", "e5m2"), ("tensorwise", "e4m3"), ("blockwise", "e4m3"), ("blockwise", "e5m2")],
)


def settings(**changes: Any) -> config.Fp8LinearConfig:
    return config.Fp8LinearConfig(impl="te", **changes)


def options(**changes: Any) -> dict[str, Any]:
    return {"fp8_linear": {"mode": "on", "impl": "te", **changes}}


def spec_of(**changes: Any) -> Fp8Spec:
    plan = Fp8Spec("tensorwise", "e5m2", False, ("fprop",), False, "bfloat16")
    return dataclasses.replace(plan, **changes)


def run(plan: Fp8Spec, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of x and the weights."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    outs = te.fp8_linear_te()(leaves[0], leaves[1:], [None] * len(weights), plan.to_json())
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, grads)]


def exact(plan: Fp8Spec, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The same in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights)]
    outs = [leaves[0] @ (w if plan.transposed else w.t()) for w in leaves[1:]]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, [g.double() for g in grads])]
