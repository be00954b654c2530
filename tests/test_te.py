"""Transformer Engine's products without it: decisions and the operators' contract."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kp_compiler
from kp_compiler import config, doctor
from kp_compiler import target as targets
from kp_compiler.lowering import te
from kp_compiler.report import Report
from kp_compiler.target import Target
from tests.fp8 import Gated, K, compiled
from tests.te import HERE, HOPPER, M, options, settings, spec_of

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
