"""FP8 products: what is recognised, what merges, how far results are off, and what is refused."""

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
from kp_compiler.lowering.fp8.quantize import E4M3, E5M2, fp8_quantize, fp8_scale, sqnr
from tests.helpers import REFERENCE, captured_graphs, run_both

RECIPES = ("tensorwise", "rowwise", "rowwise_gw_hp", "blockwise")
M, K, N = 40, 512, 1024


def fp8(recipe: str = "tensorwise", **settings: Any) -> dict[str, Any]:
    return {"fp8_linear": {"mode": "on", "recipe": recipe, **settings}}


def operands(*shape: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(*(shape or (2, M // 2)), K), torch.randn(N, K) / 16, torch.randn(N)


class Weight(nn.Module):
    """A function of x and a parameter [N,K] or [K,N], and a bias."""

    def __init__(self, function: Callable[..., Any], weight: torch.Tensor) -> None:
        super().__init__()
        self.function, self.weight, self.bias = function, nn.Parameter(weight), nn.Parameter(torch.randn(N))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


def compiled(function: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
    """The result under kp, and the report."""
    with kp_compiler.capture_reports() as reports:
        out = torch.compile(function, backend="kp", fullgraph=True, options={**REFERENCE, **options})(*inputs)
    return out, merged(reports)


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


# ------------------------------------------------------------------------------------------------- merging


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N, bias=False), nn.Linear(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def targets(graph: Any, name: str) -> list[Any]:
    return [n for n in graph.nodes if n.op == "call_function" and name in str(n.target)]


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


# -------------------------------------------------------------------------------------- casts and products


def joint_counts(model: nn.Module, x: torch.Tensor, recipe: str) -> tuple[int, int]:
    """Casts in the forward and in the backward graph that AOTAutograd makes."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    counts: list[int] = []

    def count(gm: Any, inputs: Any) -> Any:
        counts.append(len(targets(gm.graph, "fp8_quantize")))
        return gm.forward

    def backend(graph: Any, inputs: Any) -> Any:
        from kp_compiler.config import resolve
        from kp_compiler.pipeline import Run, run
        from kp_compiler.target import Target

        run(Run(graph, resolve({"cpu_rewrites": True, **fp8(recipe)}), Target("cpu", reference=True)))
        return aot_module_simplified(
            graph, inputs, fw_compiler=count, bw_compiler=count,
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x).sum().backward()
    return counts[0], counts[1]


def test_one_cast_for_each_matrix() -> None:
    """Forward: two activations and two groups of weights. Backward: each gradient and its transpose, each
    weight and each activation transposed."""
    x = torch.randn(M, K, requires_grad=True)
    assert joint_counts(Gated(), x, "tensorwise") == (4, 8)


@pytest.mark.parametrize("block", [(0, 0), (1, 0), (0, 1), (1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_cast(block: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    """Nothing overflows, every block uses its range, and the transposed copy is the same numbers."""
    x = torch.randn(200, 288) * torch.logspace(-3, 3, 288)
    scale = fp8_scale([x], dtype, block, power_of_two=power_of_two)
    q = fp8_quantize([x], scale, dtype, block)
    turned = fp8_quantize([x], scale[:200], dtype, block, transpose=True)
    assert turned.shape == (288, 512 if block[0] == 128 else 208)
    if block == (1, 128):  # rows of zeros, which the product's kernel wants
        assert q.shape == (208, 288) and not q[200:].float().any()
        q, scale = q[:200], scale[:200]
    assert torch.equal(turned[:, :200].float(), q.t().float())
    assert not turned[:, 200:].float().any()
    largest = q.float().abs().max()
    limit = torch.finfo(dtype).max
    assert limit / 2 < largest <= limit if power_of_two else largest == limit
    wide = scale
    for dim, size in enumerate(block):
        wide = wide.repeat_interleave(size, dim).narrow(dim, 0, x.shape[dim]) if size > 1 else wide
    coarse = dtype == E5M2
    if block != (0, 0) and block != (1, 0):
        assert sqnr(q.float() / wide, x) > (24 if coarse else 30)


def test_cast_of_parts_is_the_cast_of_their_concatenation() -> None:
    a, b = torch.randn(32, 48), torch.randn(16, 48)
    for dim, parts in ((0, [a, b]), (1, [a.t(), b.t()])):
        whole = torch.cat(parts, dim)
        for block in ((0, 0), (1, 0), (0, 1)):
            scale = fp8_scale(parts, E4M3, block, power_of_two=False, dim=dim)
            assert torch.equal(scale, fp8_scale([whole], E4M3, block, power_of_two=False))
            for turned in (False, True):
                got = fp8_quantize(parts, scale, E4M3, block, dim=dim, transpose=turned)
                want = fp8_quantize([whole], scale, E4M3, block, transpose=turned)
                assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("value", [0.0, 1e-42, float("inf"), float("nan")])
def test_special_values(value: float) -> None:
    """Zeros and denormals stay zero; an infinity or a NaN shows in all that shares its scale."""
    x = torch.zeros(16, 16)
    x[0, 0] = value
    scale = fp8_scale([x], E4M3, (0, 0), power_of_two=False)
    q = fp8_quantize([x], scale, E4M3, (0, 0)).float() / scale
    if value in (0.0, 1e-42):
        assert not q.any()
    else:
        assert q.isnan().all()


def test_scales_of_rows_keep_a_spike_to_its_row() -> None:
    """A spike of 1e5 times the rest costs one scale a tensor its precision, and one scale a row nothing."""
    x, w = torch.randn(64, K), torch.randn(N, K)
    x[3, 5] = 1e5
    want = x @ w.t()
    rest = [i for i in range(64) if i != 3]
    found = {}
    for recipe in ("tensorwise", "rowwise"):
        got, _ = compiled(Weight(lambda x, w, b: F.linear(x, w), w.clone()), (x,), **fp8(recipe))
        found[recipe] = sqnr(got[rest], want[rest])
    assert found["rowwise"] >= 27
    assert found["tensorwise"] < 20


REFUSED = {
    "dtypes": lambda a, b, s, t: (a.float(), b, s, t),
    "two e5m2": lambda a, b, s, t: (a.to(E5M2), b.float().to(E5M2), s, t),
    "contiguous along": lambda a, b, s, t: (a, b.t().contiguous().t(), s, t),
    "multiples of 16": lambda a, b, s, t: (a[:, :40], b[:, :40], s, t),
    "no multiple of 16": lambda a, b, s, t: (a, b[:24], s, t),
    "must be float32": lambda a, b, s, t: (a, b, s.double(), t),
    "go with no kernel": lambda a, b, s, t: (a, b, s.expand(a.shape[0], 1), t),
}


@pytest.mark.parametrize("said", REFUSED)
def test_the_emulation_refuses_what_an_h100_refuses(said: str) -> None:
    a, b, one = torch.randn(48, 64).to(E4M3), torch.randn(32, 64).to(E4M3), torch.ones(1, 1)
    assert mm.refusal(a, b, one, one, None, torch.bfloat16) is None
    text = mm.refusal(*REFUSED[said](a, b, one, one), None, torch.bfloat16)
    assert text is not None
    if said == "dtypes":
        assert "must be FP8" in text
    else:
        assert said in text


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


def saved_bytes(model: nn.Module, x: torch.Tensor, **settings: Any) -> float:
    """Bytes a row that a forward pass keeps for the backward pass, parameters aside, as AOTAutograd's min-cut
    partitioner decides."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    from kp_compiler import runtime
    from kp_compiler.config import resolve
    from kp_compiler.pipeline import Run, run
    from kp_compiler.target import Target

    total: list[int] = []

    def forward(gm: Any, inputs: Any) -> Any:
        kept = next(iter(gm.graph.find_nodes(op="output"))).args[0][1:]
        values = [n.meta["val"] for n in kept if n is not None and n.op != "placeholder"]
        total.append(sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor)))
        return gm.forward

    def backend(gm: Any, inputs: Any) -> Any:
        config = resolve({"cpu_rewrites": True, "attention": "off", **settings})
        run(Run(gm, config, Target("cpu", reference=True)))
        whole, inputs = runtime.extended(gm, inputs)
        compiled = aot_module_simplified(
            whole, inputs, fw_compiler=forward, bw_compiler=lambda gm, _: gm.forward,
            partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table(),
        )  # fmt: skip
        return runtime.provided(compiled, gm)

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    return total[0] / x.shape[0]


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(K), nn.RMSNorm(K)
        self.q, self.k, self.v, self.o = (nn.Linear(K, K, bias=False) for _ in range(4))
        self.mlp = Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).view(-1, 8, K // 8).transpose(0, 1)[None] for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a[0].transpose(0, 1).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_bytes_kept_for_the_backward_pass(recipe: str) -> None:
    """Nothing more than in bfloat16 (but for a norm's input here and there, as the partitioner likes), less
    where inputs are kept in FP8."""
    torch.manual_seed(0)
    model = nn.Sequential(LlamaLayer(), LlamaLayer()).bfloat16()
    x = torch.randn(512, K, dtype=torch.bfloat16, requires_grad=True)
    plain = saved_bytes(model, x)
    kept = {save: saved_bytes(model, x, **fp8(recipe, save=save)) / plain for save in ("input", "fp8")}
    assert kept["input"] <= 1.06
    assert kept["fp8"] <= 0.92


@pytest.mark.parametrize("recipe", [*RECIPES, "delayed"])
def test_gradients_from_inputs_kept_in_fp8(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K)
    grads = []
    for save in ("input", "fp8"):
        run = torch.compile(model, backend="kp", options={**REFERENCE, **fp8(recipe, save=save)})
        for _ in range(2):  # delayed scaling knows nothing at first
            found = train(run, x)
        grads.append(found)
    floor = 20 if recipe == "delayed" else 35  # whose scales move with every step
    assert all(sqnr(a, b) > floor for a, b in zip(*grads, strict=True))


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
    check(kp.fp8_mm.default, (a, b, one, one, None, torch.float32, False), test_utils=fakes)


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


def test_inference_and_frozen_weights() -> None:
    model, x = Gated(), torch.randn(M, K)
    with torch.no_grad():
        out, _ = compiled(model, (x,), **fp8())
    assert not out.requires_grad
    model.gate.weight.requires_grad_(False)
    out, _ = compiled(model, (x.requires_grad_(),), **fp8())
    out.sum().backward()
    assert model.gate.weight.grad is None
    assert model.up.weight.grad is not None and x.grad is not None


@pytest.mark.parametrize("lowering", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_of_inference_are_cast_once(
    recipe: str, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when a parameter is written to, replaced by `.data =`, or belongs to another module."""
    from kp_compiler.lowering.fp8 import cached

    casts = []
    original = cached.quantized
    monkeypatch.setattr(cached, "quantized", lambda *args: casts.append(1) or original(*args))
    torch.manual_seed(0)
    model, x = Gated().bfloat16(), torch.randn(M, K, dtype=torch.bfloat16)
    run = torch.compile(model, backend="kp", options={**REFERENCE, **fp8(recipe), "lowering": lowering})

    def check() -> int:
        casts.clear()
        for _ in range(2):
            assert sqnr(run(x), model(x)) > 20
        return len(casts)

    with torch.no_grad():
        run(x)
        assert check() == 0
        model.up.weight.mul_(-3)
        assert check() == 1  # gate and up are one product
        model.down.weight.data = torch.randn(K, N, dtype=torch.bfloat16)
        assert check() == 1
    out = run(x.requires_grad_())  # training compiles anew and casts in the graph
    out.sum().backward()
    assert check() == 0


def test_a_graph_that_writes_to_a_weight_does_not_cache_it() -> None:
    def function(x, w, b):
        w.mul_(2)
        return F.linear(x, w)

    x, w, _ = operands()
    module = Weight(function, w.clone())
    with torch.no_grad():
        run = torch.compile(module, backend="kp", options={**REFERENCE, **fp8()})
        for _ in range(3):
            w *= 2
            assert sqnr(run(x), F.linear(x, w)) > 27


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


# ------------------------------------------------------------------------------------------------- delayed


def train(run: Any, x: torch.Tensor, scale: float = 1e-3) -> list[torch.Tensor]:
    module = getattr(run, "_orig_mod", run)
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = run(x)
    (out * scale).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


def delayed(model: nn.Module, **settings: Any) -> Any:
    options = {**REFERENCE, **fp8("delayed", **{"amax_history": 4, **settings})}
    return torch.compile(model, backend="kp", fullgraph=True, options=options)


def worst(run: Any, model: nn.Module, x: torch.Tensor) -> float:
    return min(sqnr(a, b) for a, b in zip(train(run, x), train(model, x), strict=True))


def test_delayed_scales_follow_the_data() -> None:
    """The history holds what each step saw, oldest first; a jump by four saturates once and is counted."""
    torch.manual_seed(0)
    model = Gated()
    run = delayed(model)
    x = torch.randn(M, K)
    for _ in range(3):
        good = worst(run, model, x)
    assert good > 18
    state = kp_compiler.state_dict(run)
    assert set(state) == {
        f"{name}.weight.fp8_{what}"
        for name in ("gate", "down")
        for what in ("amax_history", "amax", "overflows")
    }
    assert state["gate.weight.fp8_amax"][0] == x.abs().max()
    assert state["gate.weight.fp8_amax"][1] == max(w.weight.abs().max() for w in (model.gate, model.up))
    assert not any(state[f"{name}.weight.fp8_overflows"].any() for name in ("gate", "down"))
    train(run, 8 * x)
    assert worst(run, model, 8 * x) > 18
    assert kp_compiler.state_dict(run)["gate.weight.fp8_overflows"].tolist()[:2] == [1, 0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_values_are_counted_and_forgotten(value: float) -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K)
    run = delayed(model)
    for _ in range(2):
        train(run, x)
    bad = x.clone()
    bad[3, 4] = value
    out, *_ = train(run, bad)
    assert not torch.isfinite(out[3]).any()
    assert worst(run, model, x) > 18
    assert kp_compiler.state_dict(run)["gate.weight.fp8_overflows"][0] == 1


def test_state_survives_recompilation_and_a_restart() -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K)
    run = delayed(model)
    for _ in range(3):
        train(run, x)
    before = kp_compiler.state_dict(run)
    train(run, torch.randn(M + 9, K))  # another length: another graph, the same state
    after = kp_compiler.state_dict(run)
    assert torch.equal(after["gate.weight.fp8_amax_history"][-1], before["gate.weight.fp8_amax"])
    other = Gated()
    other.load_state_dict(model.state_dict())
    again = delayed(other)
    kp_compiler.load_state_dict(again, after)  # before its first call
    assert all(torch.equal(a, b) for a, b in zip(train(run, x), train(again, x), strict=True))
    kp_compiler.load_state_dict(again, before)  # and after it
    kp_compiler.load_state_dict(run, before)
    assert all(torch.equal(a, b) for a, b in zip(train(run, x), train(again, x), strict=True))


def test_two_models_have_states_of_their_own() -> None:
    torch.manual_seed(0)
    first, second = Gated(), Gated()
    runs = [delayed(first), delayed(second)]
    for _ in range(2):
        for run, size in zip(runs, (1.0, 100.0), strict=True):
            train(run, size * torch.ones(M, K))
    seen = [float(kp_compiler.state_dict(run)["gate.weight.fp8_amax"][0]) for run in runs]
    assert seen == [1.0, 100.0]


def test_state_of_a_checkpointed_body() -> None:
    """Recomputing the forward pass does not count a step twice."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = Gated()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    run = delayed(Checkpointed())
    inputs = [torch.randn(M, K) for _ in range(3)]
    for x in inputs:
        train(run, x)
    state = kp_compiler.state_dict(run)
    history = state["inner.gate.weight.fp8_amax_history"][:, 0]
    assert history[-2:].tolist() == [float(x.abs().max()) for x in inputs[:2]]
    assert state["inner.gate.weight.fp8_amax"][0] == inputs[2].abs().max()


def test_load_state_dict_says_what_is_wrong() -> None:
    model = Gated()
    with pytest.raises(KeyError, match=r"nothing\.weight"):
        kp_compiler.load_state_dict(model, {"nothing.weight.fp8_amax": torch.zeros(3)})
    with pytest.raises(KeyError, match="incomplete"):
        kp_compiler.load_state_dict(model, {"gate.weight.fp8_amax": torch.zeros(3)})


def test_computed_weights_have_no_state() -> None:
    module = Weight(lambda x, w, b: F.linear(x, w * 2), torch.randn(N, K))
    x = torch.randn(M, K, requires_grad=True)
    _, report = compiled(module, (x,), **fp8("delayed"))
    assert [site.reason.code for site in report.sites] == ["no-parameter"]
