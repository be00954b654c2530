"""The pass that chooses blocks: where it fires, what it refuses, what its settings do to outputs and
gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kp_compiler as kp
from kp_compiler.capture import merged
from kp_compiler.config import SparseAttentionConfig, resolve
from kp_compiler.errors import KPConfigError, KPRequirementError
from kp_compiler.lowering import reference
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.selection import lists, measure
from kp_compiler.lowering.selection.site import Site
from kp_compiler.passes import sparse_choice
from kp_compiler.specs import AttentionShape, AttentionSpec, MaskSpec, SparseSpec
from tests.helpers import relative_error

LENGTH = 700
CAUSAL = MaskSpec("causal", "k <= q", parts=("causal",))
EAGER = {"cpu_rewrites": True, "strict": True, "lowering": "aot_eager"}
UNTRACED = {"lowering": "eager"}  # where what AOTAutograd makes of the operators is not what is asked


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def qkv(length: int = LENGTH, heads: tuple[int, int] = (4, 2)) -> list[Tensor]:
    return [torch.randn(1, h, length, 16, requires_grad=True) for h in (heads[0], heads[1], heads[1])]


def settings(**more: Any) -> dict[str, Any]:
    return {**EAGER, "sparse_attention": {"mode": "on", "min_tokens": 0, "sparsity": 0.5, **more}}


def run(function: Any, inputs: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], kp.Report]:
    """Output and gradients, and what was done."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch._dynamo.reset()
    with kp.capture_reports() as reports:
        out = torch.compile(function, backend="kp", fullgraph=True, options=options)(*leaves)
        out.backward(torch.ones_like(out))
    return [out.detach(), *(x.grad for x in leaves)], merged(reports)


def wanted(inputs: list[Tensor], sparse: SparseSpec | None, mask: MaskSpec = CAUSAL) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    spec = AttentionSpec(0.25, mask, dead_rows="zero", sparse=sparse)
    out = reference.attention(*leaves, [], [], spec.to_json())
    out.backward(torch.ones_like(out))
    return [out.detach(), *(x.grad for x in leaves)]


def code_of(function: Any, inputs: list[Tensor], **more: Any) -> str:
    """Why the pass left a site dense."""
    torch._dynamo.reset()
    report = kp.explain(function, *inputs, options=settings(**more))
    assert report.sites[0].status == "rewritten" and "of blocks" not in str(report.sites[0].spec)
    return report.sites[0].notes[-1].code


# --------------------------------------------------------------------------------------------- where it fires


@pytest.mark.parametrize("selector", ["content", "vertical_slash", "structured", "random"])
def test_fires(selector: str) -> None:
    inputs = qkv()
    mine, report = run(causal, inputs, settings(selector=selector, mode="require"))
    assert str(report.sites[0].spec) == f"causal, {selector}, 50% of blocks"
    want = wanted(inputs, SparseSpec(selector, 0.5))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(mine, want, strict=True))
    dense = wanted(inputs, None)
    assert relative_error(mine[0], dense[0]) > 0.05


def test_off_by_default_and_exact_without_it() -> None:
    inputs = qkv()
    mine, report = run(causal, inputs, EAGER)
    assert str(report.sites[0].spec) == "causal"
    skipped = {each.name: each.skipped for each in report.passes}["sparse_attention"]
    assert skipped is not None and skipped.code == "flag-off"
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted(inputs, None), strict=True))


def test_nothing_left_out_is_dense_bit_for_bit() -> None:
    inputs = qkv()
    for more in ({"sparsity": 0.0}, {"error": 0.0}, {"mass": 1.0, "sparsity": None, "error": 0.0}):
        mine, report = run(causal, inputs, settings(**more) | UNTRACED)
        assert "content" in str(report.sites[0].spec)
        assert torch.equal(mine[0], wanted(inputs, None)[0])


def test_the_same_twice() -> None:
    inputs = qkv()
    for selector in ("content", "random"):
        options = settings(selector=selector) | UNTRACED
        one, other = (run(causal, inputs, options)[0] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    same = (index // 300) == (index[:, None] // 300)
    return F.scaled_dot_product_attention(q, k, v, same & (index <= index[:, None]), enable_gqa=True)


def test_window_and_documents_stay_exact_inside() -> None:
    inputs = qkv()
    mine, report = run(documents, inputs, settings())
    assert "content, 50% of blocks" in str(report.sites[0].spec)
    probe = qkv()
    probe[2] = torch.zeros_like(probe[2])
    probe[2][:, :, :300] = 1.0  # the first document's values
    out = run(documents, [x.detach().requires_grad_() for x in probe], settings() | UNTRACED)[0][0]
    assert torch.allclose(out[:, :, :300], torch.ones(())) and not out[:, :, 300:].any()
    future = run(
        causal, [x.detach().requires_grad_() for x in probe], settings(selector="random") | UNTRACED
    )[0][0]
    assert torch.allclose(future[:, :, :300], torch.ones(()))
    assert all(x is not None for x in mine)


def test_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(causal, backend="kp", fullgraph=True, options=settings())
    with kp.capture_reports() as reports:
        for length in (700, 500):
            inputs = qkv(length)
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 2)
            assert relative_error(compiled(*inputs), wanted(inputs, SparseSpec("content", 0.5))[0]) < 1e-6
    assert len(merged(reports).sites) == 1


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.second(self.first(q, k, v), k, v)


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v)


def test_layers_and_heads_by_name() -> None:
    inputs = qkv()
    _, report = run(Layers(), inputs, settings(skip="second") | UNTRACED)
    assert ["of blocks" in str(site.spec) for site in report.sites] == [True, False]
    assert report.sites[1].notes[-1].code == "skipped-by-option"
    _, report = run(Layers(), inputs, settings(dense_heads={"first": [1], "layers": [7]}) | UNTRACED)
    assert ["1 head dense" in str(site.spec) for site in report.sites] == [True, False]
    out = run(causal, inputs, settings(dense_heads={"": [1, 3]}))[0][0]
    dense, sparse = wanted(inputs, None)[0], wanted(inputs, SparseSpec("content", 0.5))[0]
    assert relative_error(out[:, [1, 3]], dense[:, [1, 3]]) < 1e-6
    assert relative_error(out[:, [0, 2]], sparse[:, [0, 2]]) < 1e-6


# ------------------------------------------------------------------------------------------- what it refuses


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    bias = (index - index[:, None]).to(q.dtype) * 0.1
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(index > index[:, None], -torch.inf))


def masked_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    scores = (q @ k.mT).masked_fill(index >= index[:, None], torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = torch.arange(k.shape[2]) < 600
    return F.scaled_dot_product_attention(q, k, v, kept[None, None, None, :])


def test_refusals() -> None:
    inputs, equal = qkv(), qkv(heads=(2, 2))
    assert code_of(causal, inputs, min_tokens=1024) == "short"
    assert code_of(causal, inputs, dense_heads={"": [4]}) == "heads"
    assert code_of(biased, equal) == "bias"
    assert code_of(documents, inputs, selector="vertical_slash") == "last-queries"
    assert code_of(masked_rows, equal) == "dead-rows"
    mask = torch.rand(LENGTH, LENGTH) > 0.3

    def given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    report = kp.explain(given, *equal, options=settings())
    assert "mask-unproved" in {note.code for note in report.sites[0].notes}


def test_biases_don_t_matter_to_places() -> None:
    report = kp.explain(biased, *qkv(heads=(2, 2)), options=settings(selector="structured"))
    assert "structured, 50% of blocks" in str(report.sites[0].spec)


def test_auto_asks_for_a_gain() -> None:
    """Predicted for the target: little attention is not worth choosing."""
    options = {"sparse_attention": {"mode": "auto", "min_tokens": 0}}
    for length, chosen in ((256, False), (32768, True)):
        inputs = [torch.empty(1, h, length, 128, device="meta") for h in (32, 8, 8)]
        report = kp.plan(causal, *inputs, target="cuda:sm90", dtype=torch.bfloat16, options=options)
        assert ("content" in str(report.sites[0].spec)) == chosen
        codes = [note.code for note in report.sites[0].notes]
        assert codes == ([] if chosen else ["no-gain"])
        assert (report.sites[0].predicted["gain"] > 5) == chosen


def test_required_and_refused() -> None:
    """By the pass itself, and where the pass that chooses kernels leaves its sites as they were."""
    elsewhere = {**settings(mode="require"), "attention": {"skip": ""}}
    for options, why in ((settings(mode="require", min_tokens=4096), "fewer than"), (elsewhere, "leaves")):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=why) as raised:
            torch.compile(causal, backend="kp", options=options)(*qkv())
        assert isinstance(raised.value.inner_exception, KPRequirementError)


def test_asked_for_is_not_weighed_again() -> None:
    """`on` where dense attention would not gain either: PyTorch's own call is no better."""
    inputs = [torch.empty(1, h, 512, 128, device="meta") for h in (32, 8, 8)]
    options = {"sparse_attention": {"mode": "on", "min_tokens": 0}}
    report = kp.plan(causal, *inputs, target="cuda:sm90", dtype=torch.bfloat16, options=options)
    assert "content, 10% of blocks" in str(report.sites[0].spec)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sparsity": 1.0}, "sparse_attention.sparsity: got 1, expected a share"),
        ({"mass": 0.0}, "mass: got 0, expected"),
        ({"error": -1.0}, "error: got -1, expected"),
        ({"local_blocks": 0}, "local_blocks: got 0, expected"),
        ({"mass": 0.9, "selector": "structured"}, "'structured' estimates no probabilities"),
        ({"selector": "contents"}, "did you mean 'content'"),
        ({"dense_heads": {"a": ["x"]}}, "expected a whole number or a list of them"),
        ({"sparcity": 0.5}, "did you mean 'sparsity'"),
    ],
)
def test_bad_settings(given: dict[str, Any], text: str) -> None:
    with pytest.raises(KPConfigError, match=text):
        resolve({"sparse_attention": given}, env={})


def test_needs_the_pass_that_chooses_kernels() -> None:
    with pytest.raises(KPConfigError, match="sparse_attention: required, but attention"):
        resolve({"sparse_attention": "require", "attention": "off"}, env={})


def test_what_settings_ask_for() -> None:
    def asked(**more: Any) -> SparseSpec:
        shape = AttentionShape(1, 4, 2, 700, 700, 16, 16, torch.float32, "cpu", False)
        config = SparseAttentionConfig(mode="on", **more)
        choice = sparse_choice.choose(config, "layers.3.attention", shape, lambda sparse: None)
        assert isinstance(choice, sparse_choice.Choice)
        return dataclasses.replace(choice.sparse, seed=0)

    assert asked() == SparseSpec("content", pytest.approx(0.1))
    assert (asked(mass=0.95).density, asked(mass=0.95).mass) == (1.0, 0.95)
    assert asked(mass=0.95, sparsity=0.75).density == 0.25
    assert asked(dense_heads={"layers.3": (2, 0), "attention": (1,), "layers.2": (3,)}).dense == (0, 1, 2)


# ---------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("sink", [False, True])
def test_measured_against_float64(sink: bool) -> None:
    q, k, v = (x.detach() for x in qkv(500))
    operands = [torch.randn(4)] if sink else []
    spec = AttentionSpec(0.25, CAUSAL, sink=0 if sink else None)
    sparse = SparseSpec("random", 0.4, block=32)
    site = Site(spec, sparse, q, k, (), ())
    chosen = torch.rand(1, 4, 64, site.blocks) > 0.3
    places = measure.rows(site)
    chosen[:, :, torch.arange(64), places // 32] = True
    found = measure.cost(site, v, chosen, operands)
    wide = [x.double().repeat_interleave(4 // x.shape[1], 1) for x in (q, k, v)]
    scores = (wide[0] @ wide[1].mT * 0.25)[:, :, places]
    weight = scores.masked_fill(torch.arange(500) > places[:, None], -torch.inf).exp()
    extra = operands[0].double().exp().view(1, 4, 1, 1) if sink else 0.0
    kept = weight * chosen.repeat_interleave(32, 3)[..., :500]
    exact, out = (w @ wide[2] / (w.sum(-1, keepdim=True) + extra) for w in (weight, kept))
    mass = (kept.sum(-1) / weight.sum(-1)).mean(-1)
    error = (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
    assert torch.allclose(found.mass.double(), mass, atol=1e-5)
    assert torch.allclose(found.error.double(), error, atol=1e-5)
    assert (found.bound > found.error).all()
    pieces = measure.cost(site, v, chosen, operands, scores=1)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, pieces, strict=True))


def test_heads_that_are_off_are_dense() -> None:
    """A bound between the errors of two heads: one follows its choice, one computes all."""
    q, k, v = (x.detach() for x in qkv(700, (2, 2)))
    q[:, 0] *= 0.01  # even probabilities: any choice is far off
    k[:, 1, 0] *= 30.0
    q[:, 1] = k[:, 1, :1] * 4  # nearly all on the first key, which is always computed
    sparse = SparseSpec("content", 0.3, error=0.1)
    out = wanted([q, k, v], sparse)[0]
    dense, chosen = wanted([q, k, v], None)[0], wanted([q, k, v], dataclasses.replace(sparse, error=None))[0]
    assert torch.equal(out[:, 0], dense[:, 0]) and not torch.equal(chosen[:, 0], dense[:, 0])
    assert torch.equal(out[:, 1], chosen[:, 1])
    mine, report = run(causal, [x.requires_grad_() for x in (q, k, v)], settings(sparsity=0.7, error=0.1))
    assert relative_error(mine[0], out) < 1e-6
    assert "error below 0.1" in str(report.sites[0].spec)


def test_efficiency() -> None:
    found = kp.attention_efficiency(sparsity=0.9)
    numbers = found.at(B=1, H=32, K=8, S=32768, T=32768, D=128, E=128)
    assert float(numbers.dense_flops) == 4 * 32 * 128 * 32768**2 / 2
    assert float(numbers.flops) == pytest.approx(0.1 * float(numbers.dense_flops))
    assert 9 < float(numbers.saving) < 10 and float(numbers.intensity) > 800
    assert float(numbers.bytes) == 2 * 32768 * 128 * 2 * (32 + 8)
    whole = kp.attention_efficiency(mask="full", dtype=torch.float32)
    assert whole.saving == 1 and whole.at(S=10).bytes.free_symbols
    for wrong in ({"mask": "casual"}, {"sparsity": 1.0}, {"selector": "best"}, {"window": 4, "mask": "full"}):
        with pytest.raises(KPConfigError):
            kp.attention_efficiency(**wrong)
    with pytest.raises(ValueError, match="expected some of"):
        found.at(N=3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_verified(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Kernels are held against the blocks that were chosen, and found out where they compute others."""
    inputs = qkv(300, (2, 1))
    few = settings(sparsity=0.7, sink_blocks=0, local_blocks=1)
    options = {**few, "verify": True, "strict": False, "attention": {"impl": impl}}
    _, report = run(causal, inputs, options)
    assert report.sites[0].status == "rewritten"
    assert report.sites[0].verified.startswith("ok: out ") and "grad v" in report.sites[0].verified
    assert "from all blocks" in report.sites[0].verified
    found = report.sites[0].predicted["measured"]  # of the call itself, after it
    assert found["density"] == 0.5 and found["dense_heads"] == [] and 0 < found["kept_mass"] < 1
    assert 0 < found["error"] <= found["worst_head_error"]
    assert "measured" in report.why("")
    state = torch.get_rng_state()
    run(causal, inputs, options)
    assert torch.equal(torch.get_rng_state(), state)  # the check's random inputs are its own
    if impl == "triton":
        right = lists.by_key

        def wrong(*args: Any) -> Lists:
            found = right(*args)
            return dataclasses.replace(found, edges=found.edges * 0, count=found.count * 0)

        monkeypatch.setattr(lists, "by_key", wrong)
        _, report = run(causal, inputs, options)
        assert report.sites[0].status == "refused" and report.sites[0].reason.code == "verify-failed"
