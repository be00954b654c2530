"""What the tests of FP8 share: sizes, modules, compiling and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kp_compiler
from kp_compiler.capture import merged
from tests.helpers import REFERENCE

RECIPES = ("tensorwise", "rowwise", "rowwise_gw_hp", "blockwise")
M, K, N = 40, 512, 1024


def fp8(recipe: str = "tensorwise", **settings: Any) -> dict[str, Any]:
    return {"fp8_linear": {"mode": "on", "recipe": recipe, **settings}}


def operands(*shape: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(*(shape or (2, M // 2)), K), torch.randn(N, K) / 16, torch.randn(N)


class Weight(nn.Module):
    """A function of x and a parameter [N,K] or [K,N], and a bias."""

    def __init__(self, function: Callable[..., Any], weight: torch.Tensor) -> None:
        super().__init__()
        self.function, self.weight, self.bias = function, nn.Parameter(weight), nn.Parameter(torch.randn(N))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


def compiled(function: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
    """The result under kp, and the report."""
    with kp_compiler.capture_reports() as reports:
        out = torch.compile(function, backend="kp", fullgraph=True, options={**REFERENCE, **options})(*inputs)
    return out, merged(reports)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N, bias=False), nn.Linear(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def targets(graph: Any, name: str) -> list[Any]:
    return [n for n in graph.nodes if n.op == "call_function" and name in str(n.target)]


def train(run: Any, x: torch.Tensor, scale: float = 1e-3) -> list[torch.Tensor]:
    module = getattr(run, "_orig_mod", run)
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = run(x)
    (out * scale).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]
