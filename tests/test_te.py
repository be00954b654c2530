"""Transformer Engine's products without it: decisions, the operators' contract, and its calls, with a
stand-in for the package that computes what is asked of it and accepts no more than the package does."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kp_compiler
from kp_compiler import config, doctor
from kp_compiler import target as targets
from kp_compiler.lowering import te
from kp_compiler.lowering.fp8.quantize import E4M3, E5M2, quantized, scale_of, spread, sqnr
from kp_compiler.lowering.fp8.recipes import Fp8Spec
from kp_compiler.report import Report
from kp_compiler.target import Target
from tests.fp8 import Gated, K, N, compiled

HERE = targets.parse("cuda:sm90")
HOPPER = dataclasses.replace(HERE, has_te=True)
M = 40


def settings(**changes: Any) -> config.Fp8LinearConfig:
    return config.Fp8LinearConfig(impl="te", **changes)


def options(**changes: Any) -> dict[str, Any]:
    return {"fp8_linear": {"mode": "on", "impl": "te", **changes}}


def spec_of(**changes: Any) -> Fp8Spec:
    plan = Fp8Spec("tensorwise", "e5m2", False, ("fprop",), False, "bfloat16")
    return dataclasses.replace(plan, **changes)


# -------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("changes", "target", "code"),
    [
        ({}, HERE, "no-te"),
        ({}, Target("cpu", reference=True), "no-te"),
        ({}, HOPPER, None),
        ({"recipe": "blockwise"}, HOPPER, None),
        ({"recipe": "rowwise"}, HOPPER, "te-recipe"),
        ({"recipe": "rowwise_gw_hp"}, HOPPER, "te-recipe"),
        ({"recipe": "delayed"}, HOPPER, "te-recipe"),
        ({"save": "fp8"}, HOPPER, "te-save"),
        ({"fast_accum": ()}, HOPPER, None),
        ({"power_of_two_scales": True, "grad_dtype": "e4m3"}, HOPPER, None),
        ({}, dataclasses.replace(HOPPER, sm=89), None),
        ({"recipe": "blockwise"}, dataclasses.replace(HOPPER, sm=89), "device"),
        ({"recipe": "blockwise"}, dataclasses.replace(HOPPER, sm=100), "device"),
    ],
)
def test_check(changes: dict[str, Any], target: Target, code: str | None) -> None:
    refused = te.check(settings(**changes), target)
    assert (refused and refused.code) == code
    assert refused is None or (refused.text.endswith(".") and "Transformer Engine" in refused.text)
    assert refused is None or refused.hint or code == "device"


def plan(model: nn.Module, monkeypatch: pytest.MonkeyPatch, target: Target, **changes: Any) -> Report:
    monkeypatch.setattr(targets, "parse", lambda name: target)
    x = torch.empty(4, 17, K, device="meta", requires_grad=True)
    return kp_compiler.plan(
        model.to("meta"), x, target="cuda:sm90", dtype=torch.bfloat16, options=options(**changes)
    )


def test_plan_takes_every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    report = plan(Gated(), monkeypatch, HOPPER)
    assert [(site.status, site.impl) for site in report.sites] == [("rewritten", "te")] * 3
    assert report.sites[0].spec.endswith("2 merged")


@pytest.mark.parametrize(
    ("target", "changes", "code"),
    [(HERE, {}, "no-te"), (HOPPER, {"recipe": "delayed"}, "te-recipe"), (HOPPER, {"save": "fp8"}, "te-save")],
)
def test_plan_does_not_fall_back(
    target: Target, changes: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = plan(Gated(), monkeypatch, target, **changes)
    assert [(site.status, site.reason.code) for site in report.sites] == [("refused", code)] * 3


def test_required_but_absent_is_an_error() -> None:
    with pytest.raises(Exception, match=r"Transformer Engine.*no-te") as caught:
        compiled(Gated(), (torch.randn(M, K),), **options(mode="require"))
    assert isinstance(caught.value.inner_exception, kp_compiler.KPRequirementError)


def test_auto_is_not_te(monkeypatch: pytest.MonkeyPatch) -> None:
    for impl in ("auto", "scaled_mm"):
        report = plan(Gated(), monkeypatch, HOPPER, impl=impl)
        assert {site.impl for site in report.sites} == {"scaled_mm"}


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of 16 under every recipe: the blocks at the edges may be smaller."""
    for outputs, recipe, status in (
        (1040, "blockwise", "rewritten"),
        (1040, "tensorwise", "rewritten"),
        (1048, "blockwise", "refused"),
    ):
        (site,) = plan(nn.Linear(K, outputs), monkeypatch, HOPPER, recipe=recipe).sites
        assert site.status == status
        assert status == "rewritten" or site.reason.code == "alignment"


def test_cpu_graphs_are_refused_and_left_alone() -> None:
    """There is no reference of this implementation: with `cpu_rewrites` the site is refused all the same."""
    model, x = Gated(), torch.randn(M, K)
    out, report = compiled(model, (x,), **options())
    assert {site.reason.code for site in report.sites} == {"no-te"}
    assert torch.equal(out, model(x))


def test_unknown_impl_names_the_nearest() -> None:
    with pytest.raises(kp_compiler.KPConfigError, match=r"fp8_linear.impl: got 'tee'.*did you mean 'te'"):
        config.resolve(options(impl="tee"))


def test_doctor_says_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dict(doctor.machine())
    assert rows["Transformer Engine"].startswith("not installed" if not targets.has_te() else "")
    monkeypatch.setattr(targets, "has_te", lambda: True)
    assert not dict(doctor.machine())["Transformer Engine"].startswith("not installed")
    states = {row[0]: row[-1] for row in doctor.passes(HERE, config.resolve(options()))}
    assert "[no-te]" in states["fp8_linear"]


@pytest.mark.parametrize(
    ("version", "extension", "found"),
    [
        ("2.12.0", True, True),
        ("2.11.0+abc", True, True),
        ("2.9.0", True, False),
        ("1.13", True, False),
        ("2.12.0", False, False),
    ],
)
def test_probe(
    version: str, extension: bool, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe reads the version and looks for the extension; the package here can't be imported."""
    package = tmp_path / "transformer_engine"
    (package / "wheel_lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError")
    if extension:
        (package / "wheel_lib" / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    (tmp_path / "transformer_engine-0.dist-info").mkdir()
    (tmp_path / "transformer_engine-0.dist-info" / "METADATA").write_text(
        f"Name: transformer_engine\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert targets.has_te.__wrapped__() is found


# --------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("transposed", [False, True])
def test_fakes(transposed: bool) -> None:
    text = spec_of(transposed=transposed).to_json()
    te.library()
    with FakeTensorMode():
        x = torch.empty(2, 17, K, device="cuda")
        weights = [torch.empty((K, n) if transposed else (n, K), device="cuda") for n in (64, 32)]
        outs = te.fp8_linear_te()(x, weights, [None, torch.empty(32, device="cuda")], text)
        assert [o.shape for o in outs] == [(2, 17, 64), (2, 17, 32)]
        rows = x.view(34, K)
        y = te.forward()(rows, weights, text)
        assert (y.shape, y.dtype, y.device.type) == ((34, 96), torch.bfloat16, "cuda")
        grads = list(y.split([64, 32], dim=1))
        dx, dw = te.backward()(grads, rows, weights, text)
        assert dx.shape == rows.shape
        assert dw.shape == ((K, 96) if transposed else (96, K))
        assert [g.shape for g in te.backward()(grads, None, weights, text)] == [dx.shape]
        assert [g.shape for g in te.backward()(grads, rows, [], text)] == [dw.shape]


def test_traces_under_fakes_with_any_number_of_rows() -> None:
    """A joint graph holds one operator for the forward pass and one for the backward pass."""
    from torch.fx.experimental.proxy_tensor import make_fx

    text = spec_of().to_json()

    def step(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Any:
        outs = te.fp8_linear_te()(x, [a, b], [None, bias], text)
        return torch.autograd.grad(sum(o.sum() for o in outs), [x, a, b, bias])

    shapes = [(3, 17, K), (64, K), (32, K), (32,)]
    inputs = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    graph = make_fx(step, tracing_mode="symbolic")(*inputs).graph
    names = [str(n.target) for n in graph.nodes if "kp." in str(n.target)]
    assert names == ["kp.te_linear.default", "kp.te_linear_backward.default"]


def test_operators_stay_out_of_cuda_graphs() -> None:
    te.library()
    assert torch.Tag.cudagraph_unsafe in te.forward().tags
    assert torch.Tag.cudagraph_unsafe in te.backward().tags


def test_nothing_imports_the_package(tmp_path: Path) -> None:
    code = (
        "import sys, kp_compiler; from kp_compiler import target; from kp_compiler.lowering import te\n"
        "te.library(); target.has_te()\n"
        "print([name for name in sys.modules if name.startswith('transformer_engine')])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# What is called with which arguments, as read in Transformer Engine 2.11 to 2.19.
SIGNATURES = {
    "general_gemm": (
        "cpp_extensions/gemm.py",
        ("A", "B", "out_dtype", "layout", "use_split_accumulator", "grad"),
    ),
    "Float8CurrentScalingQuantizer": (
        "tensor/float8_tensor.py",
        ("fp8_dtype", "device", "rowwise", "columnwise", "force_pow_2_scales"),
    ),
    "Float8BlockQuantizer": (
        "tensor/float8_blockwise_tensor.py",
        ("fp8_dtype", "rowwise", "columnwise", "force_pow_2_scales", "block_scaling_dim"),
    ),
}


def definition(path: Path, name: str) -> ast.arguments:
    """The parameters of a function, or of a class's `__init__`."""
    tree = ast.parse(path.read_text())
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
    if isinstance(node, ast.ClassDef):
        node = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return node.args


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """The calls in te.py pass what was recorded, and the package that is installed takes it."""
    file, recorded = SIGNATURES[name]
    calls = [
        node
        for node in ast.walk(ast.parse(Path(te.__file__).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]
    assert len(calls) == 1
    positional = recorded[: len(calls[0].args)]
    assert sorted((*positional, *(k.arg for k in calls[0].keywords))) == sorted(recorded)
    found = importlib.util.find_spec("transformer_engine")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Transformer Engine is not installed: only the record was checked")
    args = definition(Path(found.submodule_search_locations[0], "pytorch", file), name)
    names = [a.arg for a in args.args if a.arg != "self"]
    assert tuple(names[: len(positional)]) == positional
    assert set(recorded) <= {*names, *(a.arg for a in args.kwonlyargs)}
    needed = {a.arg for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is None}
    needed |= set(names[: len(names) - len(args.defaults)])
    assert needed <= set(recorded)


# ------------------------------------------------------------------------------------------ with the stand-in


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


def run(plan: Fp8Spec, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    outs = te.fp8_linear_te()(leaves[0], leaves[1:], [None] * len(weights), plan.to_json())
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, grads)]


def exact(plan: Fp8Spec, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights)]
    outs = [leaves[0] @ (w if plan.transposed else w.t()) for w in leaves[1:]]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, [g.double() for g in grads])]


RECIPES = [("tensorwise", "e5m2"), ("tensorwise", "e4m3"), ("blockwise", "e4m3"), ("blockwise", "e5m2")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("recipe", "grad_dtype"), RECIPES)
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
