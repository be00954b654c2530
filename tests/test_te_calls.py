"""What Transformer Engine is asked for: with a stand-in for the package that computes it, and accepts no more
than the package does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kp_compiler import config
from kp_compiler.lowering import te
from kp_compiler.lowering.fp8.quantize import E4M3, E5M2, quantized, scale_of, spread, sqnr
from tests.fp8 import Gated, K, N
from tests.te import HOPPER, RECIPES, exact, options, run, spec_of


class Quantizer:
    """Casts by rows, by columns or both, with one scale (`block` None) or in blocks."""

    def __init__(self, dtype: torch.dtype, rowwise: bool, columnwise: bool, power: bool, block: Any) -> None:
        self.dtype, self.rowwise, self.columnwise, self.power, self.block = (
            dtype, rowwise, columnwise, power, block,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> SimpleNamespace:
        assert self.internal
        assert x.is_contiguous()
        assert x.shape[0] % 16 == x.shape[1] % 16 == 0
        assert self.rowwise or self.columnwise
        return SimpleNamespace(
            shape=x.shape,
            dtype=self.dtype,
            square=self.block == (128, 128),
            by_rows=self._cast(x, self.block or (0, 0)) if self.rowwise else None,
            by_columns=self._cast(x, tuple(reversed(self.block or (0, 0)))) if self.columnwise else None,
        )

    def _cast(self, x: Tensor, block: tuple[int, int]) -> Tensor:
        scale = scale_of([x], 0, self.dtype, list(block), self.power)
        q = quantized([x], 0, scale, self.dtype, list(block), False, None)[: x.shape[0]]
        return q.double() / spread(scale, x, block)


def current(
    fp8_dtype: torch.dtype, device: Any, *, rowwise: bool, columnwise: bool, force_pow_2_scales: bool
) -> Quantizer:
    assert rowwise, "Quantizing in only the columnwise direction not supported"
    return Quantizer(fp8_dtype, rowwise, columnwise, force_pow_2_scales, None)


def blocks(
    fp8_dtype: torch.dtype,
    *,
    rowwise: bool,
    columnwise: bool,
    force_pow_2_scales: bool,
    block_scaling_dim: int,
) -> Quantizer:
    block = (1, 128) if block_scaling_dim == 1 else (128, 128)
    assert rowwise or block_scaling_dim == 1, "Input and output must have the same shape."
    return Quantizer(fp8_dtype, rowwise, columnwise, force_pow_2_scales, block)


class Package(SimpleNamespace):
    e4m3, e5m2 = E4M3, E5M2
    Float8CurrentScalingQuantizer, Float8BlockQuantizer = staticmethod(current), staticmethod(blocks)

    def general_gemm(
        self, a: Any, b: Any, *, out_dtype: Any, layout: str, use_split_accumulator: bool, grad: bool
    ) -> tuple[Tensor, None, None, None]:
        self.split.append(use_split_accumulator)
        assert not (a.square and b.square), "2D by 2D block scaling GEMM is not supported"
        assert not a.dtype == b.dtype == E5M2
        left = b.by_rows if layout[1] == "N" else b.by_columns.t()
        right = a.by_rows.t() if layout[0] == "T" else a.by_columns
        assert left.shape[1] % 16 == 0 and right.shape[1] % 8 == 0
        return (left @ right).to(out_dtype), None, None, None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """The operators on the CPU, with the stand-in."""
    te.library()
    stand_in = Package(split=[])
    monkeypatch.setattr(te, "_package", lambda: stand_in)
    kernels = torch.library.Library("kp", "IMPL")
    kernels.impl("te_linear", te._forward, "CPU")
    kernels.impl("te_linear_backward", te._backward, "CPU")
    yield stand_in
    kernels._destroy()


@pytest.mark.parametrize("transposed", [False, True])
@RECIPES
@pytest.mark.parametrize("rows", [1, 17, 32])
def test_calls(recipe: str, grad_dtype: str, rows: int, transposed: bool, package: Package) -> None:
    """Outputs and every gradient of two weights that read one activation, of sizes that fill no block."""
    plan = spec_of(recipe=recipe, grad_dtype=grad_dtype, transposed=transposed)
    sizes = (208, 48)
    weights = [torch.randn((272, n) if transposed else (n, 272)).bfloat16() for n in sizes]
    x = torch.randn(1, rows, 272).bfloat16()
    grads = [torch.randn(1, rows, n).bfloat16() for n in sizes]
    got, want = run(plan, x, weights, grads), exact(plan, x, weights, grads)
    floor = 24.0 if grad_dtype == "e5m2" else 27.5
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, torch.bfloat16)
        limit = 27.5 if index < 2 else floor
        assert sqnr(a, b) > limit - (2.5 if rows == 1 else 0.5)  # of few numbers


@pytest.mark.parametrize(
    ("recipe", "fast", "split"),
    [
        ("tensorwise", ("fprop",), [False, True, True]),
        ("tensorwise", (), [True, True, True]),
        ("tensorwise", ("dgrad", "wgrad"), [True, False, False]),
        ("blockwise", ("fprop",), [True, True, True]),
    ],
)
def test_accumulation(recipe: str, fast: Any, split: list[bool], package: Package) -> None:
    plan = spec_of(recipe=recipe, grad_dtype="e4m3", fast_accum=fast)
    run(plan, torch.randn(16, 128), [torch.randn(128, 128)], [torch.randn(16, 128).bfloat16()])
    assert package.split == split


def test_power_of_two_scales(package: Package) -> None:
    """A scale of a power of two changes nothing about numbers that FP8 has."""
    x, w = torch.full((16, 128), 1.25), torch.eye(128)
    plan = spec_of(power_of_two=True, dtype="float32")
    assert torch.equal(te.forward()(x, [w], plan.to_json()), x)


def test_only_needed_gradients(package: Package) -> None:
    x, w = torch.randn(16, 128, requires_grad=True), torch.randn(128, 128)
    (out,) = te.fp8_linear_te()(x, [w], [None], spec_of().to_json())
    assert out.grad_fn is not None
    out.sum().backward()
    assert len(package.split) == 2
    w.requires_grad_()
    (out,) = te.fp8_linear_te()(x.detach(), [w], [None], spec_of().to_json())
    out.sum().backward()
    assert len(package.split) == 4
    assert w.grad.dtype == torch.float32


def test_no_rows_and_odd_views(package: Package) -> None:
    """Nothing in, nothing out; slices at odd addresses and gradients of stride 0 are copied."""
    (out,) = te.fp8_linear_te()(torch.randn(0, 128), [torch.randn(64, 128)], [None], spec_of().to_json())
    assert out.shape == (0, 64)
    wide, w = torch.randn(16, 129).bfloat16(), torch.randn(128, 128).bfloat16()
    grad = torch.ones((), dtype=torch.bfloat16).expand(16, 128)
    got, want = (f(spec_of(), wide[:, 1:], [w.t()], [grad]) for f in (run, exact))
    assert all(sqnr(a, b) > 23 for a, b in zip(got, want, strict=True))


class Attention(nn.Module):
    """q, k and v of one activation, and an output projection, as far as linear layers go."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, n) for n in (K, 128, 128, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * (self.k(x) + self.v(x)).repeat(1, 1, K // 128).tanh())


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_rewritten_model(recipe: str, package: Package) -> None:
    """The graph, outputs and gradients of a model with merged weights and biases, rewritten for a GPU and run
    through AOTAutograd."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    from kp_compiler.pipeline import Run
    from kp_compiler.pipeline import run as rewrite

    reports = []

    def backend(gm: Any, inputs: Any) -> Any:
        reports.append(rewrite(Run(gm, config.resolve({**options(recipe=recipe), "strict": True}), HOPPER)))
        calls = [n for n in gm.graph.nodes if n.target is te.fp8_linear_te()]
        assert [len(call.args[1]) for call in calls] == [3, 1]
        compile_ = aot_autograd(
            fw_compiler=lambda gm, _: gm.forward, partition_fn=min_cut_rematerialization_partition
        )
        return compile_(gm, inputs)

    model, x = Attention().bfloat16(), torch.randn(2, 17, K).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().div_(16)
    found = []
    for function in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.square().mean().backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    assert [(s.status, s.impl) for s in reports[0].sites] == [("rewritten", "te")] * 4
    assert len(package.split) == 6
    assert all(sqnr(a, b) > 16 for b, a in zip(*found, strict=True))  # four casts deep


def test_pass_uses_no_cached_weights(package: Package) -> None:
    """In inference weights are cast in every call: the graph has no further inputs."""
    from kp_compiler.pipeline import Run
    from kp_compiler.pipeline import run as rewrite

    def backend(gm: Any, inputs: Any) -> Any:
        before = len(gm.graph.find_nodes(op="placeholder"))
        rewrite(Run(gm, config.resolve({**options(), "strict": True}), HOPPER))
        assert len(gm.graph.find_nodes(op="placeholder")) == before
        return gm.forward

    model, x = Gated().bfloat16(), torch.randn(17, K).bfloat16()
    with torch.no_grad():
        got, want = torch.compile(model, backend=backend)(x), model(x)
    assert sqnr(got, want) > 20


def test_verify_runs_this_implementation(package: Package) -> None:
    from kp_compiler.pipeline import Run
    from kp_compiler.pipeline import run as rewrite

    reports = []

    def backend(gm: Any, inputs: Any) -> Any:
        settings = config.resolve({**options(), "strict": True, "verify": True})
        reports.append(rewrite(Run(gm, settings, HOPPER)))
        return gm.forward

    torch.compile(nn.Linear(K, N).bfloat16(), backend=backend)(torch.randn(4, K).bfloat16())
    assert str(reports[0].sites[0].verified).startswith("ok: out")
    assert len(package.split) >= 3
