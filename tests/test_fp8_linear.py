"""FP8 products in models: what is recognised, what merges, what is refused, what it goes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.lowering.fp8 import mm, quantize
from kp_compiler.lowering.fp8.quantize import E4M3, sqnr
from tests.fp8 import RECIPES, Gated, K, M, N, Weight, compiled, fp8, operands, targets, train
from tests.helpers import REFERENCE, captured_graphs, run_both

# --------------------------------------------------------------------------------------------- recognition

SPELLINGS: dict[str, tuple[Callable[..., Any], bool]] = {
    "linear": (lambda x, w, b: F.linear(x, w), False),
    "linear with bias": (lambda x, w, b: F.linear(x, w, b), False),
    "matmul, transposed": (lambda x, w, b: torch.matmul(x, w.t()), False),
    "@ w.T": (lambda x, w, b: x @ w.T, False),
    "@ w.mT + b": (lambda x, w, b: x @ w.mT + b, False),
    "@ w": (lambda x, w, b: x @ w, True),
    "w.transpose": (lambda x, w, b: x.matmul(w.transpose(0, 1)), False),
    "Conv1D": (lambda x, w, b: torch.addmm(b, x.view(-1, K), w).view(*x.shape[:-1], N), True),
    "einsum": (lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w), False),
    "einsum, weight first": (lambda x, w, b: torch.einsum("nk,bsk->bsn", w, x), False),
    "einsum, dots": (lambda x, w, b: torch.einsum("...k,kn->...n", x, w), True),
    "cast weight": (lambda x, w, b: F.linear(x, w.float().to(x.dtype)), False),
    "linear of a transposed weight": (lambda x, w, b: F.linear(x, w.t()), True),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, recipe: str) -> None:
    """Every spelling is rewritten, with the error of one FP8 product forward and backward."""
    function, transposed = SPELLINGS[name]
    torch.manual_seed(0)
    module = Weight(function, torch.randn(K, N) if transposed else torch.randn(N, K))
    x = torch.randn(2, 20, K, requires_grad=True)
    grad = torch.randn(2, 20, N)
    results = []
    for run in (module, None):
        if run is None:
            run, report = compiled_module(module, x, recipe)
        out = run(x)
        out.backward(grad)
        results.append([out.detach(), x.grad, module.weight.grad])
        x.grad = None
        module.zero_grad()
    assert [s.status for s in report.sites] == ["rewritten"], report.why("")
    want, got = results
    floor = 24.0 if recipe == "tensorwise" else 27.5
    for index, limit in enumerate((27.5, floor, floor)):
        assert sqnr(got[index], want[index]) >= limit


def compiled_module(module: nn.Module, x: torch.Tensor, recipe: str) -> tuple[Any, Any]:
    run = torch.compile(module, backend="kp", fullgraph=True, options={**REFERENCE, **fp8(recipe)})
    with kp_compiler.capture_reports() as reports:
        run(x)
    return run, merged(reports)


def test_off_by_default() -> None:
    outcome = run_both(F.linear, operands())
    assert outcome.report.sites == []
    assert outcome.error == 0.0


def scaled_addmm(x, w, b):
    return torch.addmm(b, x.view(-1, K), w.t(), beta=2)


def low_rank(x, w, b):
    return F.linear(x, w[:8])


def odd_outputs(x, w, b):
    return F.linear(x, w[:1000])


def double(x, w, b):
    return F.linear(x.double(), w.double())


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (scaled_addmm, "scaled-addition"),
        (low_rank, "low-rank"),
        (odd_outputs, "alignment"),
        (double, "dtype"),
    ],
)
def test_refused(function: Callable[..., Any], code: str) -> None:
    module, (x, w, _) = None, operands()
    module = Weight(function, w)
    out, report = compiled(module, (x,), **fp8())
    assert [site.reason.code for site in report.sites] == [code]
    assert torch.equal(out, module(x))


def test_products_of_activations_are_no_sites() -> None:
    outcome = run_both(lambda a, b: a @ b, (torch.randn(32, 32), torch.randn(32, 32)), options=fp8())
    assert outcome.report.sites == []


def test_weight_written_to_after_its_cast_is_read_as_cast() -> None:
    def function(x, w, b):
        half = w.to(torch.bfloat16)
        w.zero_()
        return F.linear(x.to(torch.bfloat16), half)

    x, w, _ = operands()
    with torch.no_grad():
        want = F.linear(x.bfloat16(), w.bfloat16())
        got, report = compiled(Weight(function, w.clone()), (x,), **fp8())
    assert len(report.rewritten("linear")) == 1
    assert sqnr(got, want) > 27


def test_skip_and_only() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    for settings in ({"skip": "1"}, {"only": "0"}):
        _, report = compiled(model, (torch.randn(4, K),), **fp8(**settings))
        assert [s.status for s in report.sites] == ["rewritten", "refused"]
        assert report.sites[1].reason.code == "skipped-by-option"


def test_auto_asks_the_cost_model() -> None:
    """Small sites gain nothing on an H100; large ones do, and the report says how much."""
    small, large = nn.Linear(256, 256), nn.Linear(4096, 14336)
    for model, rows, status in ((small, 64, "refused"), (large, 8192, "rewritten")):
        x = torch.empty(rows, model.in_features, device="meta", requires_grad=True)
        plan = kp_compiler.plan(
            model.to("meta"), x, target="cuda:sm90", dtype=torch.bfloat16, options={"fp8_linear": "auto"}
        )
        (site,) = plan.sites
        assert site.status == status, plan.why("")
        if status == "refused":
            assert site.reason.code == "no-gain"
        else:
            assert site.predicted["gain"] > 1.2


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "gains"),
    [(16, 4096, 14336, True), (16, 14336, 1024, False), (16, 1024, 1024, False), (4096, 4096, 4096, True)],
)
def test_auto_in_inference(rows: int, inputs: int, outputs: int, gains: bool) -> None:
    """Weights that are cast once halve what a small batch reads, where its few outputs' long sums do not take
    longer than that."""
    model = nn.Linear(inputs, outputs, device="meta")
    x = torch.empty(rows, inputs, device="meta")
    with torch.no_grad():
        plan = kp_compiler.plan(
            model, x, target="cuda:sm90", dtype=torch.bfloat16, options={"fp8_linear": "auto"}
        )
    (site,) = plan.sites
    assert site.status == ("rewritten" if gains else "refused"), plan.why("")


# ------------------------------------------------------------------------------------------------- merging


def test_products_of_one_activation_merge() -> None:
    (gm,) = captured_graphs(
        Gated(), torch.randn(M, K), options={"cpu_rewrites": True, **fp8(), "attention": "auto"}
    )
    calls = targets(gm.graph, "kp.fp8_linear")
    assert [len(call.args[1]) for call in calls] == [2, 1]
    (gm,) = captured_graphs(Gated(), torch.randn(M, K), options={"cpu_rewrites": True, **fp8(merge=False)})
    assert [len(call.args[1]) for call in targets(gm.graph, "kp.fp8_linear")] == [1, 1, 1]


@pytest.mark.parametrize("merge", [True, False])
def test_merged_gradients(merge: bool) -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, M, K, requires_grad=True)
    results = []
    options = {**REFERENCE, **fp8("rowwise", merge=merge)}
    for run in (model, torch.compile(model, backend="kp", fullgraph=True, options=options)):
        out = run(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
        x.grad = None
        model.zero_grad(set_to_none=True)
    assert all(sqnr(got, want) > 18 for want, got in zip(*results, strict=True))


def viewed_flat(q, k):
    return q.view(-1) * 2, k


def written(q, k):
    return q.mul_(2) + 1, k + 1


def returned(q, k):
    return q, k + 1


@pytest.mark.parametrize("use", [viewed_flat, written, returned])
def test_results_that_must_be_contiguous_do_not_merge(use: Callable[..., Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x: torch.Tensor) -> Any:
            return use(self.q(x), self.k(x))

    (gm,) = captured_graphs(Two(), torch.randn(M, K), options={"cpu_rewrites": True, **fp8()})
    assert [len(call.args[1]) for call in targets(gm.graph, "kp.fp8_linear")] == [1, 1]
    out, _ = compiled(Two(), (torch.randn(M, K),), **fp8())
    assert all(o.is_contiguous() for o in out)


# --------------------------------------------------------------------------------------------- composition


def test_dynamic_rows_compile_once() -> None:
    model = Gated().bfloat16()
    run = torch.compile(model, backend="kp", fullgraph=True, options={**REFERENCE, **fp8()}, dynamic=True)
    with kp_compiler.capture_reports() as reports:
        for rows in (2, 7, 33, 257):
            x = torch.randn(rows, K, dtype=torch.bfloat16, requires_grad=True)
            out = run(x)
            out.sum().backward()
            assert sqnr(out, model(x)) > 20
    assert len(reports) == 1


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_tied_weights(recipe: str) -> None:
    """One weight at two sites, once transposed: both are rewritten, and their gradients add up."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K) / 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight).relu() @ self.weight

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(M, K)
    run = torch.compile(model, backend="kp", fullgraph=True, options={**REFERENCE, **fp8(recipe)})
    with kp_compiler.capture_reports() as reports:
        for _ in range(3):
            got = train(run, x)
    assert len(merged(reports).rewritten("linear")) == 2
    assert all(sqnr(a, b) > 18 for a, b in zip(got, train(model, x), strict=True))
    if recipe == "delayed":
        names = {name.partition(".fp8_")[2] for name in kp_compiler.state_dict(run)}
        assert names == {
            f"{use}{what}" for use in ("", "1_") for what in ("amax_history", "amax", "overflows")
        }


def test_low_rank_updates_are_left_alone() -> None:
    """LoRA: the base product is taken, the two narrow factors are not."""

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(K, N), nn.Linear(K, 16, False), nn.Linear(16, N, False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(self.a(x)) * 2.0

    _, report = compiled(Lora(), (torch.randn(M, K),), **fp8())
    assert [s.status for s in report.sites] == ["refused", "refused", "rewritten"]
    assert {s.reason.code for s in report.refused()} == {"low-rank"}


def test_operators_are_well_formed() -> None:
    """Schema, fake results and dispatch, as torch checks them; of FP8 tensors it can only check the fakes."""
    quantize.library()
    mm.library()
    kp, check = torch.ops.kp, torch.library.opcheck
    x, one = torch.randn(24, 32), torch.ones(1, 1)
    every, fakes = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"), ("test_faketensor",)
    for block in ([0, 0], [1, 0], [0, 1]):
        check(kp.fp8_scale.default, ([x, x], 0, E4M3, block, True, None), test_utils=every)
        scale = kp.fp8_scale([x], 0, E4M3, block, False, None)
        for turned in (False, True):
            check(kp.fp8_quantize.default, ([x], 0, scale, E4M3, block, turned, one), test_utils=fakes)
    check(kp.fp8_amax.default, ([x, x], 0), test_utils=every)
    a, b = x.to(E4M3), torch.randn(16, 32).to(E4M3)
    check(kp.fp8_mm.default, (a, b, one, one, torch.float32, False), test_utils=fakes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast(recipe: str) -> None:
    model, x = Gated(), torch.randn(M, K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, report = compiled(model, (x,), **fp8(recipe))
        want = model(x)
    assert out.dtype == want.dtype == torch.bfloat16
    assert len(report.rewritten("linear")) == 3
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert sqnr(out, want) > 20


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K, requires_grad=True)
    grads = []
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        out, report = compiled(function, (x,), **fp8("rowwise"))
        assert len(report.rewritten("linear")) == 3
        out.square().sum().backward()
        grads.append(x.grad)
        x.grad = None
    assert torch.equal(*grads)


def test_recipes_by_module() -> None:
    """A site that one scale a tensor is too coarse for has another one; different recipes don't merge."""
    model, x = Gated(), torch.randn(M, K)
    recipes = {"up": "tensorwise", "gate": "rowwise", "up.nothing": "blockwise"}
    _, report = compiled(model, (x.requires_grad_(),), **fp8("delayed", recipes=recipes))
    found = {site.module.rpartition(".")[2]: site.spec.split(",")[0] for site in report.sites}
    assert found == {"gate": "rowwise", "up": "tensorwise", "down": "delayed"}
    assert not any("merged" in site.spec for site in report.sites)
    with pytest.raises(kp_compiler.KPConfigError, match=r"recipes\['up'\].*'rowwise'"):
        kp_compiler.options(**fp8("delayed", recipes={"up": "row"})).__enter__()
    with pytest.raises(kp_compiler.KPConfigError, match=r"recipes, a key: got 1"):
        kp_compiler.options(**fp8("delayed", recipes={1: "rowwise"})).__enter__()


def test_under_inductor() -> None:
    torch.manual_seed(0)
    model, x = Gated().bfloat16(), torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    want = model(x)
    out, _ = compiled(model, (x,), **{**fp8(), "lowering": "inductor"})
    out.sum().backward()
    assert sqnr(out, want) > 20
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_beside_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(K, K) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(*x.shape[:2], 4, K // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(out.transpose(1, 2).reshape(x.shape))

    model, x = Block(), torch.randn(2, 20, K)
    out, report = compiled(model, (x,), **fp8("rowwise"))
    assert len(report.rewritten("attention")) == 1
    assert len(report.rewritten("linear")) == 4
    assert report.rewritten("linear")[0].spec.endswith("3 merged")
    assert sqnr(out, model(x)) > 20


# ----------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("recipe", [*RECIPES, "delayed"])
def test_verify(recipe: str) -> None:
    _, report = compiled(Gated().bfloat16(), (torch.randn(M, K).bfloat16(),), **fp8(recipe), verify=True)
    assert all("ok: out 2" in str(site.verified) for site in report.rewritten("linear"))
    assert len(report.rewritten("linear")) == 3


def test_verify_refuses_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mm.emulated
    monkeypatch.setattr(mm.torch.ops.kp.fp8_mm, "default", lambda a, *rest: original(a.roll(1, 0), *rest))
    out, report = compiled(Gated(), (torch.randn(M, K),), **fp8(), verify=True, strict=False)
    assert {site.reason.code for site in report.sites} == {"verify-failed"}
    assert torch.isfinite(out).all()


@pytest.mark.inductor
@pytest.mark.parametrize(("recipe", "training", "moving"), [("tensorwise", False, 0), ("delayed", True, 1)])
def test_added_inputs_stay_where_they_are(recipe: str, training: bool, moving: int) -> None:
    """Weights in FP8 and what delayed scaling writes to are no inputs that a CUDA graph would copy."""
    found: list[tuple[int, list[int]]] = []

    def look(graph: Any) -> None:
        context = torch._guards.TracingContext.try_get()
        count = len(graph.find_nodes(op="placeholder"))
        found.append((count, list(context.fw_metadata.static_input_indices)))

    model, x = Gated(), torch.randn(M, K)
    options = {"cpu_rewrites": True, "inductor": {"post_grad_custom_pre_pass": look}, **fp8(recipe)}
    with torch.set_grad_enabled(training):
        torch.compile(model, backend="kp", options=options)(x)
    count, static = found[0]
    sites = 2  # gate and up are one
    assert count - len(static) == 1 + moving * sites  # x, and scales
