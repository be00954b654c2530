"""Transformer Engine's products against float64: its operators, then `torch.compile(backend="kp")`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kp_compiler
from kp_compiler import target
from kp_compiler.capture import merged
from kp_compiler.lowering import te
from kp_compiler.lowering.fp8.quantize import sqnr
from kp_compiler.lowering.fp8.recipes import Fp8Spec
from tests.te import RECIPES, exact, run, spec_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not target.has_te(), reason="needs transformer-engine with its extension for torch"),
]

K, SIZES = 1040, (512, 208, 208)  # neither fills blocks of 128
ROWS = (1, 17, 127, 4097)
OUT, GRAD = 27.5, {"e4m3": 27.5, "e5m2": 24.0}  # dB, of operands that are normally distributed


def operands(plan: Fp8Spec, rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Any, Any]:
    """x [rows,K], weights as they are stored, and gradients of the outputs."""
    x = torch.randn(rows, K, device="cuda", dtype=dtype)
    shapes = [(K, n) if plan.transposed else (n, K) for n in SIZES]
    weights = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    return x, weights, [torch.randn(rows, n, device="cuda", dtype=dtype) for n in SIZES]


def hold(plan: Fp8Spec, got: list[Tensor], want: list[Tensor], slack: float = 0.0) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        floor = (OUT if index < len(SIZES) else GRAD[plan.grad_dtype]) - slack
        assert sqnr(a, b) >= floor, f"{index} of {len(got)}: {sqnr(a, b):.1f} dB, {floor} are needed"


# ------------------------------------------------------------------------------------------------- operators


@RECIPES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_operator(recipe: str, grad_dtype: str, rows: int, transposed: bool) -> None:
    """Three merged weights, any number of rows. A single row is too few numbers for the last decibel."""
    plan = spec_of(recipe=recipe, grad_dtype=grad_dtype, transposed=transposed)
    inputs = operands(plan, rows)
    hold(plan, run(plan, *inputs), exact(plan, *inputs), slack=2.5 if rows == 1 else 0.5 if rows < 64 else 0)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize(("power", "fast"), [(True, ("fprop",)), (False, ()), (False, ("dgrad", "wgrad"))])
def test_operator_settings(recipe: str, power: bool, fast: tuple[str, ...]) -> None:
    plan = spec_of(recipe=recipe, grad_dtype="e4m3", power_of_two=power, fast_accum=fast)
    inputs = operands(plan, 512)
    hold(plan, run(plan, *inputs), exact(plan, *inputs), slack=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_operator_dtypes(dtype: torch.dtype) -> None:
    """Operands of float16, and of float32 as under autocast."""
    plan = spec_of(dtype="float16" if dtype == torch.float16 else "bfloat16")
    x, weights, grads = operands(plan, 512, dtype)
    got = run(plan, x, weights, [g.to(getattr(torch, plan.dtype)) for g in grads])
    assert [t.dtype for t in got] == [getattr(torch, plan.dtype)] * 3 + [dtype] * 4
    hold(plan, got, exact(plan, x, weights, grads))


def test_operator_reads_any_strides() -> None:
    plan = spec_of()
    wide = torch.randn(256, K + 1, device="cuda", dtype=torch.bfloat16)
    _, weights, _ = operands(plan, 256)
    turned = [w.t().contiguous().t() for w in weights]
    one = torch.ones((), device="cuda", dtype=torch.bfloat16)
    grads = [one.expand(256, n) for n in SIZES]
    got, want = run(plan, wide[:, 1:], turned, grads), exact(plan, wide[:, 1:], turned, grads)
    hold(plan, got, want)


def test_operator_without_rows() -> None:
    plan = spec_of()
    got = run(plan, *operands(plan, 0))
    assert [tuple(t.shape) for t in got[:3]] == [(0, n) for n in SIZES]
    assert not any(dw.any() for dw in got[4:])


def test_operator_shows_nan() -> None:
    plan = spec_of()
    x, weights, grads = operands(plan, 32)
    x[3, 5] = float("nan")
    assert run(plan, x, weights, grads)[0][3].isnan().all()


def test_operator_contract() -> None:
    """Schema, and fake tensors with the real strides."""
    te.library()
    plan = spec_of()
    x, weights, grads = operands(plan, 33)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(te.forward(), (x, weights, plan.to_json()), test_utils=checks)
    for arguments in ((x, weights), (None, weights), (x, [])):
        torch.library.opcheck(te.backward(), (grads, *arguments, plan.to_json()), test_utils=checks)


def test_package_is_imported_when_an_operator_runs() -> None:
    code = (
        "import sys; from kp_compiler.lowering import te; te.library();"
        "assert not [name for name in sys.modules if name.startswith('transformer_engine')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------------- compile


class Layer(nn.Module):
    """q, k and v of one activation, with biases and without, and an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(512, 512), nn.Linear(512, 128), nn.Linear(512, 128, bias=False)
        self.o = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * (self.k(x) + self.v(x)).repeat(1, 1, 4))


def options(**changes: Any) -> dict[str, Any]:
    return {"fp8_linear": {"mode": "require", "impl": "te", **changes}}


def step(function: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of x, and gradients of the parameters, for a fixed gradient of the output."""
    model.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    generator = torch.Generator(device="cuda").manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device="cuda", dtype=torch.float64)
    out.backward(grad.to(out.dtype))
    return [out.detach(), leaf.grad, *(p.grad for p in model.parameters())]


@RECIPES
def test_compile(recipe: str, grad_dtype: str) -> None:
    """With one scale a tensor as exact as kp's own kernels, within the noise of casts that differ."""
    model = Layer().cuda().bfloat16()
    x = torch.randn(3, 129, 512, device="cuda", dtype=torch.bfloat16)
    found = {}
    for impl in ("te", "scaled_mm") if recipe == "tensorwise" else ("te",):
        torch._dynamo.reset()
        with kp_compiler.capture_reports() as reports:
            settings = options(impl=impl, recipe=recipe, grad_dtype=grad_dtype)
            run = torch.compile(model, backend="kp", fullgraph=True, options=settings)
            found[impl] = step(run, model, x)
        assert [(s.status, s.impl) for s in merged(reports).sites] == [("rewritten", impl)] * 4
        assert merged(reports).sites[0].spec.endswith("3 merged")
    want = step(model.double(), model, x.double())
    ratios = [[sqnr(a, b) for a, b in zip(got, want, strict=True)] for got in found.values()]
    floor = 19.0 if grad_dtype == "e5m2" else 21.0  # two products deep
    assert min(ratios[0]) >= floor, ratios
    assert all(a >= b - 1.5 for a, b in zip(ratios[0], ratios[-1], strict=True)), ratios


def test_compile_any_number_of_rows_once() -> None:
    model = Layer().cuda().bfloat16()
    run = torch.compile(model, backend="kp", fullgraph=True, options=options(), dynamic=True)
    with kp_compiler.capture_reports() as reports:
        for rows in (17, 3, 127, 4097):
            x = torch.randn(2, rows, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            out = run(x)
            out.sum().backward()
            assert sqnr(out, model(x)) > 20
    assert len(reports) == 1


def test_compile_inference_and_autocast() -> None:
    model = Layer().cuda()
    x = torch.randn(2, 64, 512, device="cuda")
    run = torch.compile(model, backend="kp", fullgraph=True, options=options())
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        assert sqnr(run(x), model(x)) > 20
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = step(run, model, x)
    assert all(t.dtype == torch.float32 for t in got[1:])
    assert all(t.isfinite().all() for t in got)


def test_compile_beside_cuda_graphs() -> None:
    """`mode="reduce-overhead"` leaves these operators out of its graphs."""
    model = Layer().cuda().bfloat16()
    x = torch.randn(2, 64, 512, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(model, backend="kp", fullgraph=True, options={**options(), "mode": "reduce-overhead"})
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert sqnr(run(x).clone(), model(x)) > 20


def test_compile_verifies() -> None:
    model = Layer().cuda().bfloat16()
    x = torch.randn(2, 64, 512, device="cuda", dtype=torch.bfloat16)
    with kp_compiler.capture_reports() as reports:
        torch.compile(model, backend="kp", fullgraph=True, options={**options(), "verify": True})(x)
    assert all("ok: out" in str(site.verified) for site in merged(reports).sites)


def test_compile_refuses() -> None:
    """The twin that must not fire: the site keeps its call and its result."""
    model = nn.Linear(512, 520).cuda().bfloat16()
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    with kp_compiler.capture_reports() as reports, torch.no_grad():
        out = torch.compile(model, backend="kp", options=options(mode="on"))(x)
    assert [site.reason.code for site in merged(reports).sites] == ["alignment"]
    assert sqnr(out, model(x)) > 40
