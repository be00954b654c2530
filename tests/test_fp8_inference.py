"""Weights of inference in FP8: cast once for all graphs, and again when they change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kp_compiler.lowering.fp8.quantize import sqnr
from tests.fp8 import RECIPES, Gated, K, M, N, Weight, compiled, fp8, operands
from tests.helpers import REFERENCE


def test_inference_and_frozen_weights() -> None:
    model, x = Gated(), torch.randn(M, K)
    with torch.no_grad():
        out, _ = compiled(model, (x,), **fp8())
    assert not out.requires_grad
    model.gate.weight.requires_grad_(False)
    out, _ = compiled(model, (x.requires_grad_(),), **fp8())
    out.sum().backward()
    assert model.gate.weight.grad is None
    assert model.up.weight.grad is not None and x.grad is not None


@pytest.mark.parametrize("lowering", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_inference_are_cast_once(
    recipe: str, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when a parameter is written to, replaced by `.data =`, or belongs to another module."""
    from kp_compiler.lowering.fp8 import cached

    casts = []
    original = cached.quantized
    monkeypatch.setattr(cached, "quantized", lambda *args: casts.append(1) or original(*args))
    torch.manual_seed(0)
    model, x = Gated().bfloat16(), torch.randn(M, K, dtype=torch.bfloat16)
    run = torch.compile(model, backend="kp", options={**REFERENCE, **fp8(recipe), "lowering": lowering})

    def check() -> int:
        casts.clear()
        for _ in range(2):
            assert sqnr(run(x), model(x)) > 20
        return len(casts)

    with torch.no_grad():
        run(x)
        assert check() == 0
        model.up.weight.mul_(-3)
        assert check() == 1  # gate and up are one product
        model.down.weight.data = torch.randn(K, N, dtype=torch.bfloat16)
        assert check() == 1
    out = run(x.requires_grad_())  # training compiles anew and casts in the graph
    out.sum().backward()
    assert check() == 0


def test_graphs_share_the_weights_of_inference() -> None:
    from kp_compiler.lowering.fp8 import cached

    model, x = Gated(), torch.randn(M, K)
    before = set(cached._shared)
    run = torch.compile(model, backend="kp", dynamic=False, options={**REFERENCE, **fp8()})
    with torch.no_grad():
        for rows in (M, M // 2, M // 4):
            run(x[:rows])
    assert len(set(cached._shared) - before) == 2  # gate and up, down


def test_a_graph_that_writes_to_a_weight_does_not_cache_it() -> None:
    def function(x, w, b):
        w.mul_(2)
        return F.linear(x, w)

    x, w, _ = operands()
    module = Weight(function, w.clone())
    with torch.no_grad():
        run = torch.compile(module, backend="kp", options={**REFERENCE, **fp8()})
        for _ in range(3):
            w *= 2
            assert sqnr(run(x), F.linear(x, w)) > 27


@pytest.mark.parametrize("fused", [False, True])
def test_cached_weights_follow_the_optimizer(fused: bool) -> None:
    """Fused optimizers count no versions."""
    layer, x = nn.Linear(K, N, bias=False), torch.randn(16, K)
    run = torch.compile(layer, backend="kp", options={**REFERENCE, **fp8()})
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            assert sqnr(run(x), layer(x)) > 27
        layer(x).sum().backward()
        optimizer.step()


def test_cached_weights_of_another_shape() -> None:
    """A parameter may get other data, in another shape, between two graphs that share its copy."""
    torch.manual_seed(0)
    layer, x = nn.Linear(K, N, bias=False), torch.randn(48, K)
    modules = layer, nn.Sequential(layer), nn.Sequential(nn.Sequential(layer))
    runs = [torch.compile(each, backend="kp", options={**REFERENCE, **fp8()}) for each in modules]
    with torch.no_grad():
        for run, rows in zip(runs, (N, N // 2, 2 * N), strict=True):
            layer.weight.data = torch.randn(rows, K)
            assert sqnr(run(x), layer(x)) > 27
