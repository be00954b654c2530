"""When things go wrong: a failing pass is undone, a kernel by name is never replaced, reports read well."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.errors import KPConfigError
from kp_compiler.passes import ALL_PASSES
from kp_compiler.report import Report
from tests.helpers import REFERENCE, captured_graphs, run_both

S = 24
LENIENT = {"strict": False}


def attend(q, k, v):
    line = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=line[None, :] <= line[:, None])


def returns_probabilities(q, k, v):
    probs = F.softmax(q @ k.transpose(-2, -1), dim=-1)
    return probs @ v, probs


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 4, S, 16, dtype=dtype) for _ in range(3))


def raising(*_: Any) -> Any:
    raise ZeroDivisionError("a bug in a pass")


def site_of(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A function with a site for a pass, its inputs, and the options that switch the pass on."""
    if name in ("raise_linear", "fp8_linear"):
        return F.linear, (torch.randn(4, 32), torch.randn(48, 32)), {"fp8_linear": "on"}
    if name == "sparse_attention":
        return attend, qkv(), {name: {"mode": "on", "min_tokens": 0}}
    return attend, qkv(), {}


PASSES = [
    (index, each.name, step)
    for index, each in enumerate(ALL_PASSES)
    for step in ("inspect", "rewrite")
    if each.tier != "distributed"  # can't be undone: tests/test_share.py
]


@pytest.mark.parametrize(("index", "name", "step"), PASSES, ids=[f"{n}-{s}" for _, n, s in PASSES])
def test_failing_pass_is_undone(index: int, name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is right, training included, the record has the error, and nothing half-done is left."""
    monkeypatch.setattr(ALL_PASSES[index], step, raising, raising=True)
    function, inputs, options = site_of(name)
    outcome = run_both(function, inputs, train=True, options={**LENIENT, **options})
    assert outcome.error < 1e-5
    errors = {record.name: record.error for record in outcome.report.passes if record.error}
    assert set(errors) == {name}
    assert "ZeroDivisionError" in str(errors[name])
    assert "a bug in a pass" in str(errors[name])
    statuses = {site.status for site in outcome.report.sites}
    assert statuses <= ({"rewritten"} if name in ("prove_masks", "sparse_attention") else {"refused"})
    (graph,) = captured_graphs(function, *inputs, options={**LENIENT, **options})
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("kp.attention" in target or "kp.linear" in target for target in targets)


@pytest.mark.parametrize("index", sorted({i for i, _, _ in PASSES}), ids=lambda i: ALL_PASSES[i].name)
def test_strict_raises(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALL_PASSES[index], "inspect", raising)
    function, inputs, options = site_of(ALL_PASSES[index].name)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(function, backend="kp", options={**REFERENCE, **options})(*inputs)
    assert isinstance(caught.value.inner_exception, ZeroDivisionError)


def test_failing_kernel_emission_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails at the second site, when the first is already rewritten."""
    from kp_compiler.passes.attention import Attention

    calls = []
    original = Attention.rewrite

    def second_fails(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("half-done")
        return original(self, *args)

    monkeypatch.setattr(Attention, "rewrite", second_fails)
    outcome = run_both(lambda q, k, v: attend(attend(q, k, v), k, v), qkv(), train=True, options=LENIENT)
    assert outcome.error < 1e-5
    assert not outcome.report.rewritten()


@pytest.mark.parametrize(
    ("kernel", "code"),
    [
        ("cudnn", "device"),
        ("flash", "device"),
        ("efficient", "device"),
        ("fa4", "library"),
    ],
)
def test_kernel_by_name_is_not_replaced(kernel: str, code: str) -> None:
    outcome = run_both(attend, qkv(), options={"attention": {"impl": kernel}})
    (site,) = outcome.report.sites
    assert (site.status, site.reason.code) == ("refused", code)
    assert outcome.error < 1e-6


@pytest.mark.parametrize("name", ["raise_attention", "prove_masks", "attention"])
def test_skip_and_only_are_read_by_every_pass(name: str) -> None:
    """A setting that every pass takes does something for every pass."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, q, k, v):
            return self.second(self.first(q, k, v), k, v)

    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    for setting in ({"skip": ["second"]}, {"only": "first"}):
        report = kp_compiler.explain(Model(), *qkv(), options={**REFERENCE, name: setting})
        changed = {site.module: (site.status, site.spec) for site in report.sites}
        assert changed["first"] == ("rewritten", "causal")
        assert changed["second"] != ("rewritten", "causal")


def test_verify_option() -> None:
    """`verify=True` checks each rewritten site before it is used, and says so in the record."""
    outcome = run_both(attend, qkv(), options={"verify": True})
    (site,) = outcome.report.rewritten()
    assert site.verified


# ---------------------------------------------------------------------------------------------------- reports


def test_report_of_both_kinds_of_sites() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, q, k, v):
            return self.block(q, k, v), returns_probabilities(q, k, v)[1]

    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    report = kp_compiler.explain(Model(), *qkv(), options=REFERENCE)
    assert [site.status for site in report.sites].count("rewritten") == 1
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    assert {site["status"] for site in data["sites"]} == {site.status for site in report.sites}
    assert "block" in report.why("block")
    assert "causal" in report.why("block")
    assert "known" in report.why("no.such.module")
    assert "causal" in report.table()
    assert "attention 1/" in report.summary(0)
    assert "reference_attention" in report.diff("attention")
    assert "kp.attention" in report.diff("raise_attention")
    with pytest.raises(ValueError, match="'raise_attention'"):
        report.diff("fp9_linear")


def test_backend_not_called() -> None:
    with kp_compiler.capture_reports() as reports:
        torch.compile(lambda x: x, backend="kp")
    assert "not called" in merged(reports).table()
    assert "not called" in Report().table()


def test_capture_reports_sees_past_the_recompile_limit() -> None:
    """Twelve compiles of one code object before the capture do not make it empty."""
    with torch.no_grad():
        for length in range(8, 20):
            torch.compile(attend, backend="kp", options=REFERENCE, dynamic=False)(
                *(torch.randn(1, 2, length, 16) for _ in range(3))
            )
        with kp_compiler.capture_reports() as reports:
            torch.compile(attend, backend="kp", options=REFERENCE)(*qkv())
    assert len(reports) == 1


def test_explain_runs_and_reports() -> None:
    report = kp_compiler.explain(attend, *qkv(), options=REFERENCE)
    assert [site.spec for site in report.rewritten()] == ["causal"]
    assert report.versions["torch"] == torch.__version__
    with pytest.raises(KPConfigError):
        kp_compiler.explain(attend, *qkv(), options={"attentoin": "on"})


def test_report_dir(tmp_path: Any) -> None:
    kp_compiler.explain(attend, *qkv(), options={**REFERENCE, "report_dir": str(tmp_path / "reports")})
    (path,) = (tmp_path / "reports").iterdir()
    assert json.loads(path.read_text())["sites"][0]["status"] == "rewritten"


# ------------------------------------------------------------------------------------------------------- plan


@pytest.mark.zoo
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "kernel", "spec"),
    [
        ("llama", "cudnn", "causal"),
        ("mistral", "triton", "causal+window(8)"),
        ("llama_packed", "triton", "causal+document"),
    ],
)
def test_plan_for_a_gpu_that_is_not_there(name: str, kernel: str, spec: str, implementation: str) -> None:
    from tests.zoo.models import FAMILIES

    family = next(f for f in FAMILIES if f.name == name)
    model, inputs = family.make(implementation).eval(), family.inputs()
    before = {key: (id(p), p.device, p.dtype, p.detach().clone()) for key, p in model.named_parameters()}
    with torch.no_grad():
        report = kp_compiler.plan(model, target="cuda:sm90", dtype=torch.bfloat16, **inputs)
    assert [(site.impl, site.spec) for site in report.sites] == [(kernel, spec)] * family.sites
    assert all(site.predicted for site in report.sites)
    assert "sm90" in report.target
    assert "assumed" in report.target
    assert any("bfloat16" in text for text in report.assumptions)
    for key, p in model.named_parameters():
        address, device, dtype, value = before[key]
        assert (id(p), p.device, p.dtype) == (address, device, dtype)
        assert torch.equal(p, value)


def test_plan_without_a_dtype_says_why_not() -> None:
    """float32 keeps the half-precision kernels away; the reason names the dtype."""
    report = kp_compiler.plan(attend, *qkv(), target="cuda:sm90", options={"attention": {"impl": "cudnn"}})
    (site,) = report.sites
    assert (site.status, site.reason.code) == ("refused", "dtype")
    with pytest.raises(KPConfigError, match="cuda:smNN"):
        kp_compiler.plan(attend, *qkv(), target="h100")


def test_plan_stops_where_values_are_needed() -> None:
    def function(q, k, v):
        out = attend(q, k, v)
        if out.sum().item() > 0:
            return attend(out, k, v)
        return out

    report = kp_compiler.plan(function, *qkv(torch.bfloat16), target="cuda:sm90")
    assert next(site.impl for site in report.sites) == "cudnn"
    assert any(graph.notes for graph in report.graphs)


def test_plan_decides_only() -> None:
    """What `plan` compiled is not what runs afterwards."""
    q, k, v = qkv()
    kp_compiler.plan(attend, q, k, v, target="cuda:sm90", dtype=torch.bfloat16)
    outcome = run_both(attend, (q, k, v))
    assert [site.impl for site in outcome.report.sites] == ["reference"]
    assert outcome.error < 1e-6
