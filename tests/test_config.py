"""Options: precedence, every wrong name or value with the nearest valid one, requirements, fingerprints."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import kp_compiler
from kp_compiler import config as configs
from kp_compiler.config import PASS_CONFIGS, Config, resolve
from kp_compiler.errors import KPConfigError, KPError, KPRequirementError
from kp_compiler.passes import ALL_PASSES
from tests.helpers import REFERENCE, run_both


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def returns_probabilities(q, k, v):
    probs = F.softmax(q @ k.transpose(-2, -1), dim=-1)
    return probs @ v, probs


def qkv() -> list[torch.Tensor]:
    return [torch.randn(2, 4, 24, 16) for _ in range(3)]


# ------------------------------------------------------------------------------------------------- precedence


def test_defaults_are_valid_and_exact_passes_are_auto() -> None:
    config = resolve({}, env={})
    assert config == Config()
    modes = {each.name: config.passes()[each.name].mode for each in ALL_PASSES}
    assert modes == {each.name: "auto" if each.tier == "exact" else "off" for each in ALL_PASSES}
    assert not (config.strict or config.verify or config.cpu_rewrites or config.disabled)


def test_precedence() -> None:
    """options over kp.options (inner over outer) over KP_PASSES over defaults, setting by setting."""
    env = {"KP_PASSES": "-attention, +prove_masks"}
    assert resolve({}, env=env).attention.mode == "off"
    assert resolve({}, env=env).prove_masks.mode == "on"
    with kp_compiler.options(attention={"mode": "on", "impl": "flex"}, strict=True):
        with kp_compiler.options(attention={"skip": "head"}, strict=False):
            config = resolve({"attention": {"impl": "flash"}}, env=env)
            assert config.attention == configs.AttentionConfig(mode="on", impl="flash", skip=("head",))
            assert config.strict is False
            assert config.sources["attention.mode"] == "kp.options"
            assert config.sources["attention.impl"] == "options"
            assert config.sources["prove_masks.mode"] == "KP_PASSES"
        assert resolve({}, env=env).strict is True
    assert resolve({}, env=env).strict is False


def test_scope_is_read_when_the_backend_runs() -> None:
    compiled = torch.compile(attend, backend="kp", options=REFERENCE)
    with kp_compiler.capture_reports() as reports, kp_compiler.options(attention="off"):
        compiled(*qkv())
    assert not reports[0].rewritten()


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (True, "on"),
        (False, "off"),
        ("require", "require"),
        ({"mode": "on"}, "on"),
        ({}, "auto"),
        ({"expect": 2}, "require"),
    ],
    ids=str,
)
def test_spellings_of_a_flag(given: Any, mode: str) -> None:
    assert resolve({"attention": given}, env={}).attention.mode == mode


def test_strings_serve_for_lists() -> None:
    config = resolve({"attention": {"skip": "a", "only": ["b", "c"]}}, env={})
    assert (config.attention.skip, config.attention.only) == (("a",), ("b", "c"))
    assert resolve({"prove_masks": {"fill_threshold": -5}}, env={}).prove_masks.fill_threshold == -5.0


# ----------------------------------------------------------------------------------------------------- errors

WRONG = [
    ({"attentoin": "on"}, "attention"),
    ({"attention": "requir"}, "require"),
    ({"attention": {"imlp": "flex"}}, "impl"),
    ({"attention": {"impl": "cudn"}}, "cudnn"),
    ({"attention": {"mode": "onn"}}, "on"),
    ({"lowering": "inductr"}, "inductor"),
    ({"mode": "reduce-overhad"}, "reduce-overhead"),
    ({"inductor": {"max_autotun": True}}, "max_autotune"),
    ({"cpu_rewrite": True}, "cpu_rewrites"),
]


@pytest.mark.parametrize(("settings", "nearest"), WRONG, ids=lambda value: str(value)[:40])
def test_errors_name_the_nearest(settings: dict[str, Any], nearest: str) -> None:
    with pytest.raises(KPConfigError, match=f"did you mean '{nearest}'"):
        resolve(settings, env={})


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": 3}, {"attention": None}, {"attention": {"skip": 3}}, {"attention": {"expect": "two"}},
        {"attention": {"expect": True}}, {"strict": "yes"}, {"strict": 1}, {"inductor": "max"},
        {"report_dir": 3}, {"prove_masks": {"fill_threshold": "low"}}, {"lowering": True}, {3: "on"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_one_sentence(settings: dict[Any, Any]) -> None:
    with pytest.raises(KPConfigError) as caught:
        resolve(settings, env={})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KPError)


def test_wrong_options_object_and_environment() -> None:
    with pytest.raises(KPConfigError, match="expected a dict"):
        resolve(["attention"], env={})  # type: ignore[arg-type]
    for text, nearest in (("+attentin", "attention"), ("attention", r"\+name")):
        with pytest.raises(KPConfigError, match=nearest):
            resolve({}, env={"KP_PASSES": text})


def test_scope_with_a_wrong_option_fails_at_once() -> None:
    with pytest.raises(KPConfigError, match="did you mean 'attention'"), kp_compiler.options(attentoin="on"):
        pytest.fail("the block must not be entered")
    assert resolve({}, env={}) == Config()


def test_errors_reach_the_user_through_dynamo() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(attend, backend="kp", options={"attentoin": "on"})(*qkv())
    assert isinstance(caught.value.inner_exception, KPConfigError)
    assert "did you mean 'attention'" in str(caught.value)


# ----------------------------------------------------------------------------------------------- requirements


@pytest.mark.parametrize("setting", ["require", {"mode": "require"}, {"expect": 1}])
def test_require_raises_with_the_reasons(setting: Any) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(returns_probabilities, backend="kp", options={**REFERENCE, "attention": setting})(
            *qkv()
        )
    assert isinstance(caught.value.inner_exception, KPRequirementError)
    assert "probabilities-used" in str(caught.value)


def test_expect_counts() -> None:
    outcome = run_both(attend, tuple(qkv()), options={"attention": {"expect": 1}})
    assert len(outcome.report.rewritten()) == 1
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="fired at 1 sites of this graph, 2 required"):
        torch.compile(attend, backend="kp", options={**REFERENCE, "attention": {"expect": 2}})(*qkv())


def test_require_is_not_swallowed_by_leniency() -> None:
    """`strict=False` undoes passes that fail; a requirement that is not met is no such failure."""
    options = {**REFERENCE, "strict": False, "prove_masks": "require"}
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(attend, backend="kp", options=options)(*qkv())
    assert isinstance(caught.value.inner_exception, KPRequirementError)


# ---------------------------------------------------------------------------------- disabling, mode, the rest


def test_kp_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, disabled in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("KP_DISABLE", value)
        assert resolve({}).disabled is disabled
    monkeypatch.setenv("KP_DISABLE", "1")
    outcome = run_both(attend, tuple(qkv()))
    assert not outcome.report.sites
    assert [graph.mode for graph in outcome.report.graphs] == ["disabled"]
    assert outcome.error < 1e-6


@pytest.mark.parametrize("flag", ["attention", "raise_attention", "prove_masks"])
def test_pass_that_is_off(flag: str) -> None:
    outcome = run_both(attend, tuple(qkv()), options={flag: "off"})
    skipped = {record.name: record.skipped.code for record in outcome.report.passes if record.skipped}
    off = dict.fromkeys(("ring_attention", "context_parallel", "sparse_attention", "fp8_linear"), "flag-off")
    off["raise_linear"] = "not-needed"
    assert skipped == {flag: "flag-off", **off}
    assert len(outcome.report.rewritten()) == (flag == "prove_masks")
    assert outcome.error < 1e-6


def test_settings_of_a_pass_that_is_off_by_default_ask_for_it() -> None:
    assert resolve({}, env={}).fp8_linear.mode == "off"
    assert resolve({"fp8_linear": {}}, env={}).fp8_linear.mode == "off"
    assert resolve({"fp8_linear": {"recipe": "rowwise"}}, env={}).fp8_linear.mode == "auto"
    assert resolve({"fp8_linear": {"expect": 2}}, env={}).fp8_linear.mode == "require"
    settings = {"fp8_linear": {"recipe": "rowwise"}}
    assert resolve(settings, env={"KP_PASSES": "-fp8_linear"}).fp8_linear.mode == "off"
    assert resolve({"attention": {"skip": "x"}}, env={}).attention.mode == "auto"


def test_mode_comes_from_either_side_but_not_both_ways() -> None:
    assert resolve({}, mode="reduce-overhead", env={}).mode == "reduce-overhead"
    assert resolve({"mode": "max-autotune"}, env={}).mode == "max-autotune"
    with pytest.raises(KPConfigError, match="mode"):
        resolve({"mode": "max-autotune"}, mode="reduce-overhead", env={})


# ----------------------------------------------------------------------------------------------- fingerprints


def other_value(hint: Any, value: Any) -> Any:
    """A valid value that differs from `value`."""
    if typing.get_origin(hint) is typing.Literal:
        return next(item for item in typing.get_args(hint) if item != value)
    samples = {
        bool: not value,
        float: -123.0,
        tuple[str, ...]: ("x",),
        int | None: 3,
        str | None: "reduce-overhead",
    }
    return samples.get(hint, {"max_autotune": True})


FIELDS = [
    (name, field.name, typing.get_type_hints(cls)[field.name])
    for name, cls in PASS_CONFIGS.items()
    for field in dataclasses.fields(cls)
] + [
    (field.name, None, typing.get_type_hints(Config)[field.name])
    for field in dataclasses.fields(Config)
    if field.name not in (*PASS_CONFIGS, "sources", "report_dir")
]


@pytest.mark.parametrize(
    ("name", "setting", "hint"), FIELDS, ids=[f"{a}.{b}" if b else a for a, b, _ in FIELDS]
)
def test_fingerprint_follows_every_setting(name: str, setting: str | None, hint: Any) -> None:
    base = Config()
    if setting is None:
        changed = dataclasses.replace(base, **{name: other_value(hint, getattr(base, name))})
    else:
        inner = getattr(base, name)
        value = other_value(hint, getattr(inner, setting))
        changed = dataclasses.replace(base, **{name: dataclasses.replace(inner, **{setting: value})})
    assert changed.fingerprint() != base.fingerprint()
    assert dataclasses.replace(changed).fingerprint() == changed.fingerprint()


def test_fingerprint_ignores_where_reports_go_and_where_values_came_from() -> None:
    base = Config()
    assert dataclasses.replace(base, report_dir="x").fingerprint() == base.fingerprint()
    assert resolve({"strict": False}, env={}).fingerprint() == base.fingerprint()
