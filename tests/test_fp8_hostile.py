"""FP8 in graphs that a rewrite could get wrong without saying so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.lowering.fp8.quantize import sqnr
from tests.fp8 import K, N, compiled, fp8

INDUCTOR = {"cpu_rewrites": True, "strict": True}


class Around(nn.Module):
    """A layer [K to N] without bias, and what is done with its result."""

    def __init__(self, after: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(K, N, bias=False), after

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(x), factor)


def gradients(run: Any, module: nn.Module, x: torch.Tensor, factor: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = run(x, factor)
    out.square().sum().backward()
    return [out.detach(), x.grad, module.layer.weight.grad]


FACTORS = {
    "per sample and column": (2, 1, N),
    "per sample": (2, 1, 1),
    "per row": (2, 24, 1),
    "per position": (24, N),
    "per column": (N,),
}


@pytest.mark.inductor
@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_a_gradient_are_broadcast(name: str) -> None:
    """The cast of the layer's gradient repeats the product with the factor, or leaves it alone."""
    torch.manual_seed(0)
    module = Around(lambda y, factor: y * factor)
    x, factor = torch.randn(2, 24, K), torch.randn(FACTORS[name])
    run = torch.compile(module, backend="kp", options={**INDUCTOR, **fp8()})
    want = gradients(module, module, x, factor)
    assert all(sqnr(a, b) > 20 for a, b in zip(gradients(run, module, x, factor), want, strict=True))


@pytest.mark.inductor
@pytest.mark.parametrize("save", ["auto", "fp8"])
@pytest.mark.parametrize("pool", [lambda y, f: y.mean(1), lambda y, f: y.amax(1), lambda y, f: F.silu(y) * f])
def test_pooled_results(pool: Callable[..., torch.Tensor], save: str) -> None:
    """A maximum is looked for among the values it was found in, also where others are kept in FP8."""
    torch.manual_seed(0)
    module, x = Around(pool), torch.randn(2, 24, K)
    run = torch.compile(module, backend="kp", options={**INDUCTOR, **fp8(save=save)})
    want = gradients(module, module, x, torch.ones(1))
    got = gradients(run, module, x, torch.ones(1))
    assert sqnr(got[0], want[0]) > 20
    assert all(0.9 < a.norm() / b.norm() < 1.1 for a, b in zip(got, want, strict=True))


@pytest.mark.inductor
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_row_counts_share_one_compilation(recipe: str) -> None:
    """Also those that are sizes of the weight; a single row is a case of its own to torch."""
    module = Around(lambda y, f: y)
    run = torch.compile(module, backend="kp", dynamic=True, options={**INDUCTOR, **fp8(recipe)})
    with kp_compiler.capture_reports() as reports:
        for rows in (33, 7, K, N, 257):
            x = torch.randn(rows, K, requires_grad=True)
            run(x, x).sum().backward()
    assert len(reports) == 1


def test_a_branch_without_gradients_is_no_sibling() -> None:
    """Layers that read the same activation, one of them under no_grad, whose weights are frozen."""
    first, second = (nn.Linear(K, N, bias=False).requires_grad_(False) for _ in range(2))

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            a = first(x)
        return a, second(x)

    x = torch.randn(16, K, requires_grad=True)
    (a, b), _ = compiled(function, (x,), **fp8())
    assert not a.requires_grad and b.requires_grad
    b.sum().backward()
    assert x.grad is not None
    assert sqnr(x.grad, torch.ones(16, N) @ second.weight) > 20


def test_a_strided_view_keeps_its_layer_unmerged() -> None:
    first, second = (nn.Linear(K, N, bias=False) for _ in range(2))

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.as_strided(second(x), (16, 8), (N, 1)) + 0, first(x)

    x = torch.randn(16, K)
    with torch.no_grad():
        got, _ = compiled(function, (x,), **fp8())
        assert all(sqnr(a, b) > 27 for a, b in zip(got, function(x), strict=True))


def test_a_frozen_layer_keeps_no_activation() -> None:
    """What it read may be written to before the backward pass."""
    layer = nn.Linear(K, N, bias=False).requires_grad_(False)

    def function(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        y = layer(h)
        h.add_(1)
        return y.sum() + h.sum()

    x = torch.randn(16, K, requires_grad=True)
    out, report = compiled(function, (x,), **fp8())
    out.backward()
    assert len(report.rewritten("linear")) == 1 and x.grad is not None


def test_an_empty_batch_is_left_alone() -> None:
    layer = nn.Linear(K, N)
    out, report = compiled(lambda x: layer(x), (torch.randn(0, K),), **fp8())
    assert out.shape == (0, N)
    assert [site.reason.code for site in report.sites] == ["empty"]


@pytest.mark.inductor
def test_results_that_share_memory_go_on_sharing_it() -> None:
    """With FP8 and without, what the caller gets is not copied."""
    layer = nn.Linear(K, N, bias=False)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = layer(x)
        return y[:, :8], y[:, 4:16]

    for options in ({}, fp8()):
        torch._dynamo.reset()
        with torch.no_grad(), kp_compiler.capture_reports() as reports:
            a, b = torch.compile(function, backend="kp", options={**INDUCTOR, **options})(torch.randn(16, K))
        a[0, 5] = 7.0
        assert b[0, 1] == 7.0
        assert len(merged(reports).rewritten("linear")) == bool(options)


@pytest.fixture
def no_caches() -> Iterator[None]:
    """Inductor's would answer, and passes not be called."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


@pytest.mark.inductor
@pytest.mark.usefixtures("no_caches")
def test_a_pass_that_fails_after_autograd_is_undone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half-way through, with the graph already changed: the casts that it had are computed all the same."""

    def broken(graph: Any) -> None:
        cast = next(iter(graph.find_nodes(op="call_function", target=torch.ops.kp.fp8_quantize.default)))
        cast.replace_all_uses_with(cast.args[0][0])
        raise RuntimeError("half-way")

    monkeypatch.setattr("kp_compiler.lowering.fp8.fuse.fuse_casts", broken)
    torch.manual_seed(0)
    module = Around(lambda y, factor: y * factor)
    x, factor = torch.randn(2, 24, K), torch.randn(N)
    run = torch.compile(module, backend="kp", options={"cpu_rewrites": True, **fp8()})
    want = gradients(module, module, x, factor)
    assert all(sqnr(a, b) > 20 for a, b in zip(gradients(run, module, x, factor), want, strict=True))
    assert "half-way" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="half-way"):
        torch.compile(module, backend="kp", options={**INDUCTOR, **fp8()})(x, factor)


@pytest.mark.inductor
@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("name", ["store_products", "recompute_casts"])
def test_passes_after_one_that_was_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What correctness depends on still happens, in the graph that is compiled."""

    def broken(graph: Any) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(f"kp_compiler.lowering.fp8.keep.{name}", broken)
    torch.manual_seed(0)
    module = Around(lambda y, factor: F.gelu(y) * factor)
    run = torch.compile(module, backend="kp", options={"cpu_rewrites": True, **fp8("delayed", save="fp8")})
    x, factor = torch.randn(2, 24, K), torch.randn(N)
    for out in [run(x, factor), run(2 * x, factor)]:  # both forward passes come first
        out.sum().backward()


class Scaled(nn.Module):
    """What a layer reads is made of a buffer that is written afterwards."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(K, K), nn.Parameter(torch.rand(K) + 0.5)
        self.register_buffer("seen", buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x * self.seen) + x * self.gain
        self.seen.lerp_(torch.arange(K).to(x) / 8, 0.9)
        return out


@pytest.mark.inductor
@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("shape", [(K,), (1, K), (48, K)])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_written_buffer_is_not_computed_from_again(recipe: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = Scaled(torch.rand(shape) + 0.5).bfloat16(), torch.randn(48, K, dtype=torch.bfloat16)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    grads = []
    run = torch.compile(module, backend="kp", options={**INDUCTOR, **fp8(recipe)})
    for call in (module, run, run):  # delayed scaling knows nothing at first
        module.zero_grad()
        module.load_state_dict(state)
        call(x).square().sum().backward()
        grads.append(module.layer.weight.grad.clone())
    assert sqnr(grads[2], grads[0]) > 18


@pytest.mark.inductor
def test_a_rounding_to_fp8_of_the_model_itself_stays() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(K, N, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer((x * 16.0).to(torch.float8_e5m2).to(x.dtype) / 16.0)

    torch.manual_seed(0)
    module, x = Rounded(), torch.randn(48, K)
    with torch.no_grad():
        out = torch.compile(module, backend="kp", options={**INDUCTOR, **fp8()})(x)
        assert sqnr(out, module(x)) > 27
