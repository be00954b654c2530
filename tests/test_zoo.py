"""Real model classes: every attention site is rewritten, outputs and gradients are the uncompiled model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.report import Report
from tests.helpers import REFERENCE, captured_graphs, relative_error
from tests.zoo.models import FAMILIES, LAYERS, LENGTH, Family, logits

pytestmark = pytest.mark.zoo
CASES = [(family, implementation) for family in FAMILIES for implementation in family.implementations]
IDS = [f"{family.name}-{implementation}" for family, implementation in CASES]
BY_NAME = {family.name: family for family in FAMILIES}


def run_model(
    model: torch.nn.Module, call: Any, inputs: dict[str, Any], train: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and, in training, all parameters' gradients of a loss that weighs every element differently."""
    with torch.set_grad_enabled(train):
        out = logits(call(**inputs))
    if not train:
        return out, {}
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape).cos()
    (out.sin() * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), grads


def compile_and_compare(
    model: torch.nn.Module, inputs: dict[str, Any], train: bool, options: dict[str, Any] | None = None
) -> Report:
    model.train(train)
    want, want_grads = run_model(model, model, inputs, train)
    with kp_compiler.capture_reports() as reports:
        compiled = torch.compile(model, backend="kp", options={**REFERENCE, **(options or {})})
        got, got_grads = run_model(model, compiled, inputs, train)
    assert got.dtype == want.dtype
    assert relative_error(got, want) < 1e-5
    assert got_grads.keys() == want_grads.keys()
    floor = 1e-2 * max((float(grad.norm()) for grad in want_grads.values()), default=0.0)
    for name, grad in want_grads.items():  # a bias of keys has no gradient but rounding
        scale = max(float(grad.norm()), floor)
        assert float((got_grads[name] - grad).norm()) / scale < 1e-4, name
    return merged(reports)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("family", "implementation"), CASES, ids=IDS)
def test_every_site(family: Family, implementation: str, train: bool) -> None:
    if train and not family.training:
        pytest.skip("this version's training forward breaks the graph")
    torch.manual_seed(0)
    options = {} if train else {"lowering": "eager"}  # in training AOTAutograd traces the same graph
    report = compile_and_compare(family.make(implementation), family.inputs(), train, options)
    assert tuple(site.reason.code for site in report.refused() if site.reason) == family.refused, report.why(
        ""
    )
    assert len(report.rewritten()) == family.sites, report.table()
    assert {site.spec for site in report.rewritten()} == family.specs[implementation]
    assert all(site.module and site.impl == "reference" for site in report.rewritten())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["llama", "llama_left_padded", "llama_packed", "mistral", "qwen2", "gpt2", "bert_padded"]
)
def test_nothing_quadratic_is_left(name: str, implementation: str) -> None:
    """No mask and no scores: no node of the rewritten graphs has two dimensions of the sequence's length."""
    family = BY_NAME[name]
    model = family.make(implementation).eval()
    with torch.no_grad():
        graphs = captured_graphs(lambda: model(**family.inputs()))
    calls = [n for gm in graphs for n in gm.graph.nodes if "kp.reference_attention" in str(n.target)]
    assert len(calls) == family.sites
    for gm in graphs:
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            square = (
                isinstance(value, torch.Tensor)
                and sum(size >= LENGTH for size in value.shape if size < 64) >= 2
            )
            assert not square, f"{node.format_node()} {tuple(value.shape)}"
            assert "softmax" not in str(node.target)
            assert "scaled_dot_product_attention" not in str(node.target)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_heads_of_keys_are_not_repeated(name: str, implementation: str) -> None:
    """Two key heads reach the kernel as two: the expand of `repeat_kv` is gone."""
    family = BY_NAME[name]
    model = family.make(implementation).eval()
    with torch.no_grad():
        graphs = captured_graphs(lambda: model(**family.inputs()))
    nodes = [n for gm in graphs for n in gm.graph.nodes]
    calls = [n for n in nodes if "kp.reference_attention" in str(n.target)]
    assert [n.args[1].meta["example_value"].shape[1] for n in calls] == [2] * family.sites
    assert [n.args[2].meta["example_value"].shape[1] for n in calls] == [2] * family.sites
    five = [n for n in nodes if isinstance(v := n.meta.get("example_value"), torch.Tensor) and v.dim() == 5]
    assert not five, "repeat_kv goes through five dimensions"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_flex_serves_what_the_dense_kernels_do_not(implementation: str) -> None:
    for name in ("mistral", "llama_packed", "llama_left_padded"):
        torch._dynamo.reset()
        family = BY_NAME[name]
        report = compile_and_compare(
            family.make(implementation),
            family.inputs(),
            True,
            {"attention": {"impl": "flex", "expect": family.sites}},
        )
        assert {site.impl for site in report.rewritten()} == {"flex"}


def test_twin_that_returns_its_probabilities() -> None:
    """`output_attentions=True` needs the probabilities: every site is refused for that reason."""
    family = BY_NAME["llama"]
    inputs = {**family.inputs(), "output_attentions": True}
    report = compile_and_compare(family.make("eager"), inputs, False)
    assert not report.rewritten()
    assert [site.reason.code for site in report.refused() if site.reason] == ["probabilities-used"] * LAYERS


def test_twin_with_a_short_window() -> None:
    """A window longer than the sequence drops nothing: the mask is causal, and says so."""
    model = BY_NAME["mistral"].make("sdpa")
    inputs = BY_NAME["mistral"].inputs()
    inputs["input_ids"] = inputs["input_ids"][:, :7]
    report = compile_and_compare(model, inputs, False)
    assert {site.spec for site in report.rewritten()} == {"causal"}


FP8_FAMILIES = [name for name in BY_NAME if not name.endswith(("padded", "packed"))]


@pytest.mark.parametrize("name", FP8_FAMILIES)
def test_every_linear_layer_in_fp8(name: str) -> None:
    """Each is found, and what it computes is the model's, to the precision of FP8 in a model whose weights
    are wide. (Routers of a mixture are narrow, and left alone.)"""
    family = BY_NAME[name]
    model, inputs = family.make(family.implementations[-1]), family.inputs()
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    options = {**REFERENCE, "fp8_linear": {"mode": "on", "recipe": "rowwise"}}
    model.train(family.training)
    want, _ = run_model(model, model, inputs, family.training)
    with kp_compiler.capture_reports() as reports:
        compiled = torch.compile(model, backend="kp", options=options)
        got, grads = run_model(model, compiled, inputs, family.training)
    sites = [site for site in merged(reports).sites if site.kind == "linear"]
    assert len([site for site in sites if site.status == "rewritten"]) == len(layers)
    assert {site.reason.code for site in sites if site.reason} <= {"low-rank"}
    assert relative_error(got, want) < 0.3
    assert all(torch.isfinite(grad).all() for grad in grads.values())
