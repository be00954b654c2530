"""`plan` and `explain` on what users really pass: compiled models, closures, models that read values. What
reports say of sites that stay as they are."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kp_compiler
from kp_compiler import target as targets
from kp_compiler.capture import merged
from kp_compiler.config import resolve
from kp_compiler.errors import KPConfigError, KPError, KPRequirementError
from tests.helpers import REFERENCE

SHAPE = (1, 2, 8, 16)


class Model(torch.nn.Module):
    """Attention between two projections, which counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(16, 48)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls.add_(1)
        q, k, v = self.proj(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def planned(model: Any, *args: Any, **settings: Any) -> list[tuple[str | None, str]]:
    report = kp_compiler.plan(model, *args, target="cuda:sm90", dtype=torch.bfloat16, **settings)
    return [(site.impl, site.shape.rsplit(" ", 1)[-1]) for site in report.sites]


@pytest.mark.parametrize("backend", ["kp", "inductor", "eager"])
def test_plan_and_explain_of_a_compiled_model(backend: str) -> None:
    """What is under `torch.compile` counts, not the backend it was compiled with."""
    x, model = torch.randn(SHAPE), Model()
    assert planned(torch.compile(model, backend=backend), x) == [("cudnn", "bfloat16")]
    report = kp_compiler.explain(torch.compile(model, backend=backend), x, options=REFERENCE)
    assert [site.impl for site in report.sites] == ["reference"]
    model.compile(backend=backend)
    before = model._compiled_call_impl
    report = kp_compiler.explain(model, x, options={**REFERENCE, "attention": "off"})
    assert [site.status for site in report.sites] == ["refused"]
    assert model._compiled_call_impl is before


def test_plan_reaches_into_callables_and_changes_nothing() -> None:
    x, model, seen = torch.randn(SHAPE), Model(), torch.ones(3)

    def closure(y):
        seen.add_(1)
        return model(y)

    for function in (closure, lambda y: model(y), functools.partial(model), model.forward):
        assert planned(function, x) == [("cudnn", "bfloat16")]
    assert model.calls.item() == 0
    assert seen.tolist() == [1.0, 1.0, 1.0]


def test_plan_says_which_errors_are_the_models() -> None:
    def broken(x):
        attend(x)
        torch._dynamo.graph_break()
        raise KeyError("the model's own")

    with pytest.raises(KeyError, match="the model's own"):
        kp_compiler.plan(broken, torch.randn(SHAPE))

    def branches(x):
        return attend(x) if x.sum().item() > 0 else x

    (graph,) = kp_compiler.plan(branches, torch.randn(SHAPE)).graphs
    assert "values would be needed" in graph.notes[0]


def test_plan_refuses_what_it_can_not_copy_or_read() -> None:
    model = Model()
    model.lock = threading.Lock()
    with pytest.raises(KPError, match="can't be copied"):
        kp_compiler.plan(model, torch.randn(SHAPE))
    for wrong in ({"target": 90}, {"dtype": "bfloat16"}):
        with pytest.raises(KPConfigError, match=next(iter(wrong))):
            kp_compiler.plan(attend, torch.randn(SHAPE), **wrong)


def test_plan_for_a_cpu_and_plan_when_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(SHAPE)
    report = kp_compiler.plan(attend, x, target="cpu", options={"cpu_rewrites": True})
    assert [site.impl for site in report.sites] == ["reference"]
    assert "no graph" in report.diff("attention")
    monkeypatch.setenv("KP_DISABLE", "1")
    report = kp_compiler.plan(attend, x)
    assert not report.sites
    assert [graph.mode for graph in report.graphs] == ["disabled"]


def test_reset_before_anything_was_compiled() -> None:
    """Dynamo resets backends while it iterates over them: kp's must not import Inductor there."""
    import subprocess
    import sys

    script = """
import torch, torch.nn.functional as F
f = lambda q: F.scaled_dot_product_attention(q, q, q)
torch.compile(f, backend="eager")(torch.randn(1, 1, 4, 8))
compiled = torch.compile(f, backend="kp")
torch._dynamo.reset()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_later_attempt_of_dynamo_replaces_an_earlier_one() -> None:
    """Symbolic floats make Dynamo start over: a site stands in the report once."""
    encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    with kp_compiler.capture_reports() as reports:
        options = {**REFERENCE, "lowering": "eager"}
        torch.compile(encoder, backend="kp", dynamic=True, options=options)(torch.randn(3, 12, 32))
    assert [site.spec for site in merged(reports).sites] == ["full, dropout 0.1"]


# ----------------------------------------------------------------------------------------------- requirements


def failure(function: Any, options: dict[str, Any]) -> Exception:
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(function, backend="kp", options=options)(torch.randn(SHAPE))
    return caught.value.inner_exception


def test_required_on_a_graph_that_is_left_alone() -> None:
    error = failure(attend, {"attention": "require"})
    assert isinstance(error, KPRequirementError)
    assert "[cpu]" in str(error)
    required = {"attention": "require", "lowering": "eager"}
    torch.compile(torch.sin, backend="kp", options=required)(torch.randn(3))
    for options in (required, {"attention": "require", **REFERENCE}):
        torch._dynamo.reset()  # a classifier is no place where attention could have been rewritten
        torch.compile(lambda x: F.softmax(x, dim=-1), backend="kp", options=options)(torch.randn(3, 4))


def test_required_without_what_it_builds_on() -> None:
    for name in ("attention", "prove_masks"):
        with pytest.raises(KPConfigError, match="raise_attention"):
            resolve({name: "require", "raise_attention": "off"})
    with pytest.raises(KPConfigError, match="KP_PASSES"):
        resolve({"attention": {"expect": 2}}, env={"KP_PASSES": "-raise_attention"})


def test_a_pass_that_failed_stands_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from kp_compiler.passes import expand_mha

    def raising(node: Any) -> None:
        raise ZeroDivisionError("a bug in a pass")

    monkeypatch.setattr(expand_mha, "refusal", raising)
    layer, x = torch.nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32)
    with kp_compiler.capture_reports() as reports:
        options = {**REFERENCE, "strict": False}
        got = torch.compile(lambda y: layer(y, y, y, need_weights=False)[0], backend="kp", options=options)(x)
    torch.testing.assert_close(got, layer(x, x, x, need_weights=False)[0])
    assert "raise_attention failed and was undone: ZeroDivisionError" in merged(reports).table()


# -------------------------------------------------------------------------------- composites, policies, tools


@pytest.mark.parametrize(
    ("settings", "call", "code"),
    [
        ({}, {}, "probabilities-used"),
        ({"add_zero_attn": True}, {"need_weights": False}, "unknown-op"),
        ({"add_bias_kv": True}, {"need_weights": False}, "unknown-op"),
    ],
)
def test_multihead_attention_that_stays(settings: Any, call: Any, code: str) -> None:
    layer, x = torch.nn.MultiheadAttention(32, 4, batch_first=True, **settings), torch.randn(2, 5, 32)
    with kp_compiler.capture_reports() as reports:
        got = torch.compile(layer, backend="kp", options=REFERENCE)(x, x, x, **call)
    torch.testing.assert_close(got, layer(x, x, x, **call))
    assert [site.reason.code for site in merged(reports).sites] == [code]


def test_checkpoint_policy_is_asked_for_the_operator() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default

    def policy(ctx, op, *args, **kwargs):
        return [args[0]] and None  # wants arguments: can't be asked

    def notes(saved: Any) -> list[str]:
        contexts = functools.partial(create_selective_checkpoint_contexts, saved)
        body = functools.partial(checkpoint, attend, use_reentrant=False, context_fn=contexts)
        x = torch.randn(SHAPE, requires_grad=True)
        (site,) = kp_compiler.plan(lambda y: body(y), x, target="cuda:sm90", dtype=torch.bfloat16).sites
        assert site.impl == "cudnn"
        return [note.text for note in site.notes]

    assert notes([cudnn]) == []
    assert notes([torch.ops.aten.mm.default]) == []
    assert "saves SDPA, but not cudnn" in notes([flash])[0]
    assert "may not know cudnn" in notes(policy)[0]


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/g++", "/bin/echo"])
def test_compilers_that_do_not_work(compiler: str) -> None:
    from torch._inductor import config

    targets.cpp_compiler.cache_clear()
    with config.patch({"cpp.cxx": (None, compiler)}):
        assert targets.cpp_compiler() is None
        with pytest.warns(UserWarning, match=r"C\+\+"), kp_compiler.capture_reports() as reports:
            torch.compile(attend, backend="kp")(torch.randn(SHAPE))
    targets.cpp_compiler.cache_clear()
    (graph,) = merged(reports).graphs
    assert graph.lowering == "eager"
    assert any("C++" in note for note in graph.notes)


@pytest.mark.parametrize("folder", ["", "{file}"])
def test_report_dir_that_can_not_be_written(folder: str, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    error = failure(attend, {"report_dir": folder.format(file=tmp_path / "file")})
    assert isinstance(error, KPConfigError)
    assert "report_dir" in str(error)


def test_mode_of_torch_compile_is_stronger_than_a_scope() -> None:
    with kp_compiler.options(mode="max-autotune"):
        assert resolve({}, mode="reduce-overhead", env={}).mode == "reduce-overhead"
        assert resolve({}, env={}).mode == "max-autotune"


@pytest.mark.parametrize(
    "options",
    [
        {"attention": {"expect": -1}}, {"prove_masks": {"fill_threshold": 1e8}}, {"inductor": {3: 1}},
        {"prove_masks": {"fill_threshold": float("nan")}}, {"attention": {"mode": ["on"]}},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(KPConfigError):
        resolve(options)
