"""Beside the rest of PyTorch: checkpointing, autocast, graph breaks, DDP, lengths, caches, writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.report import Report
from tests.helpers import REFERENCE, captured_graphs, relative_error, run_both
from tests.test_zoo import compile_and_compare
from tests.zoo import models as zoo

B, H, S, D = 2, 4, 24, 16


def qkv(length: int = S) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, length, D) for _ in range(3))


def causal(length: int) -> torch.Tensor:
    line = torch.arange(length)
    return line[None, :] <= line[:, None]


def by_hand(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1) * D**-0.5).masked_fill(~mask, float("-inf"))
    return F.softmax(scores, dim=-1) @ v


def codes(report: Report) -> list[str]:
    return [site.reason.code for site in report.refused() if site.reason is not None]


def note_codes(report: Report) -> list[str]:
    return [note.code for site in report.sites for note in site.notes]


# ---------------------------------------------------------------------------------------------- checkpointing


def checkpointed(q, k, v):
    return checkpoint(by_hand, q, k, v, causal(q.shape[2]), use_reentrant=False)


def test_checkpoint_body_is_rewritten() -> None:
    """The attention inside the body is replaced, and the body no longer takes the mask."""
    outcome = run_both(checkpointed, qkv(), train=True)
    assert [(s.status, s.spec) for s in outcome.report.sites] == [("rewritten", "causal")]
    assert outcome.error < 1e-5
    torch._dynamo.reset()
    (graph,) = captured_graphs(checkpointed, *(x.requires_grad_() for x in qkv()))
    (call,) = [n for n in graph.graph.nodes if "checkpoint" in str(n.target)]
    assert len(call.args) == 4, "body, q, k and v"
    assert not [
        n for n in graph.graph.nodes if tuple(getattr(n.meta.get("example_value"), "shape", ())) == (S, S)
    ]


@pytest.mark.parametrize("verify", [False, True])
def test_checkpoint_around_a_call_that_compiles(verify: bool) -> None:
    """It counts the tensors that its body saves, and finds as many when it computes again."""
    leaves, mask = [x.requires_grad_() for x in qkv()], causal(S)
    want = torch.autograd.grad(by_hand(*leaves, mask).square().sum(), leaves)
    compiled = torch.compile(by_hand, backend="kp", options={**REFERENCE, "verify": verify})
    out = checkpoint(compiled, *leaves, mask, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), leaves)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.zoo
@pytest.mark.parametrize("inputs", [zoo.tokens, zoo.packed], ids=["causal", "packed"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kernel", ["reference", "flex"])
def test_gradient_checkpointing_of_llama(implementation: str, inputs: Any, kernel: str) -> None:
    model = zoo.llama(implementation)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report = compile_and_compare(model, inputs(), True, {"attention": {"impl": kernel}})
    spec = "causal+document" if inputs is zoo.packed else "causal"
    assert [(s.status, s.impl, s.spec) for s in report.sites] == [("rewritten", kernel, spec)] * zoo.LAYERS


def test_shared_checkpoint_body_with_different_masks() -> None:
    """One function checkpointed twice, each with its own mask: each keeps its own."""

    def function(q, k, v):
        first = checkpoint(by_hand, q, k, v, causal(S), use_reentrant=False)
        second = checkpoint(by_hand, q, k, v, causal(S).flip(0, 1), use_reentrant=False)
        return first + 2.0 * second

    outcome = run_both(function, qkv(), train=True)
    assert outcome.error < 1e-5
    assert len(outcome.report.rewritten()) == 2, outcome.report.why("")


def _save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    wanted = "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_save_attention)


def test_selective_policy_is_noted() -> None:
    """A policy that names the operator kp replaces may not see it any more: the report says so."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def function(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False, context_fn=_contexts)

    outcome = run_both(function, qkv(), train=True)
    assert outcome.error < 1e-5
    report = outcome.report
    told = [*note_codes(report), *codes(report), *(note for graph in report.graphs for note in graph.notes)]
    assert any("checkpoint" in text for text in told), report.table()


def test_checkpoint_operand_written_to_before_the_call() -> None:
    """The mask that the body sees is the one after the write."""

    def function(q, k, v):
        mask = causal(S)
        mask[:, :3] = True
        return checkpoint(by_hand, q, k, v, mask, use_reentrant=False)

    outcome = run_both(function, qkv(), train=True)
    assert outcome.error < 1e-5
    assert note_codes(outcome.report) == ["mask-unproved"]


# --------------------------------------------------------------------------------------- autocast and no_grad


@pytest.mark.parametrize("inside", [False, True], ids=["ambient", "inside"])
@pytest.mark.parametrize("function", ["sdpa", "by_hand"])
def test_autocast(function: str, inside: bool) -> None:
    """float32 inputs under autocast: the result has the original's dtype, and its values to bf16 rounding."""

    def attend(q, k, v):
        if function == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(S))
        return by_hand(q, k, v, causal(S))

    def wrapped(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(q, k, v)

    inputs = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        outcome = run_both(wrapped if inside else attend, inputs, train=True)
    for got, want in zip(outcome.got, outcome.want, strict=True):
        assert got.dtype == want.dtype
    assert outcome.error < 3e-2
    assert [site.status for site in outcome.report.sites] == ["rewritten"], outcome.report.why("")


@pytest.mark.zoo
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_autocast_of_llama(implementation: str) -> None:
    model, inputs = zoo.llama(implementation).eval(), zoo.tokens()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(**inputs).logits
        with kp_compiler.capture_reports() as reports:
            got = torch.compile(model, backend="kp", options=REFERENCE)(**inputs).logits
    assert got.dtype == want.dtype
    assert relative_error(got, want) < 3e-2
    assert len(merged(reports).rewritten()) == zoo.LAYERS


def test_no_grad_then_grad() -> None:
    """One compiled function, called without and with gradients."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(S))

    compiled = torch.compile(function, backend="kp", options=REFERENCE)
    inputs = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    with kp_compiler.capture_reports():
        compiled(*leaves).sin().sum().backward()
    others = [x.clone().requires_grad_() for x in inputs]
    function(*others).sin().sum().backward()
    for a, b in zip(leaves, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ------------------------------------------------------------------------------------ masks from other graphs


def test_graph_break_between_mask_and_attention() -> None:
    def function(q, k, v):
        mask = causal(S)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = run_both(function, qkv(), fullgraph=False)
    assert len(outcome.report.graphs) == 2
    assert note_codes(outcome.report) == ["mask-is-input"]
    assert outcome.error < 1e-6


def test_require_is_met_by_one_of_two_graphs() -> None:
    """`require` asks that a pass fires somewhere; the graph before the break holds no attention."""

    def function(q, k, v):
        q = q.cos()
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    outcome = run_both(function, qkv(), options={"attention": "require"}, fullgraph=False)
    assert len(outcome.report.rewritten()) == 1


class Layer(torch.nn.Module):
    def __init__(self, ffn: int) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(H * D, 3 * H * D)
        self.ffn = torch.nn.Sequential(
            torch.nn.Linear(H * D, ffn), torch.nn.Tanh(), torch.nn.Linear(ffn, H * D)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(*x.shape[:2], H, D).transpose(1, 2) for t in self.projection(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.ffn(x + out.transpose(1, 2).reshape(x.shape))


class Stack(torch.nn.Module):
    def __init__(self, layers: int, ffn: int = 8) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(ffn) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = causal(x.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_layers_compiled_one_by_one() -> None:
    model, x = Stack(2), torch.randn(B, S, H * D)
    want = model(x)
    with kp_compiler.capture_reports() as reports:
        for layer in model.layers:
            layer.compile(backend="kp", options=REFERENCE)
        got = model(x)
    torch.testing.assert_close(got, want)
    report = merged(reports)
    notes = [note for site in report.sites for note in site.notes]
    assert {note.code for note in notes} == {"mask-is-input"}
    assert all(note.hint for note in notes)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_buckets(process_group: Any) -> None:
    """Dynamo cuts the model at bucket boundaries: only the first graph holds the mask's code."""
    model = Stack(3, ffn=2600)  # a little over a megabyte each, the smallest bucket that Dynamo takes
    x = torch.randn(B, S, H * D)
    model(x).sin().sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1, broadcast_buffers=False)
    with kp_compiler.capture_reports() as reports:
        torch.compile(wrapped, backend="kp", options=REFERENCE)(x).sin().sum().backward()
    for a, b in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(a.grad, b)
    report = merged(reports)
    assert len(report.graphs) > 1
    assert "mask-is-input" in note_codes(report)
    assert all(note.hint for site in report.sites for note in site.notes if note.code == "mask-is-input")
    assert {site.spec for site in report.rewritten()} == {"causal", "tensor"}


# ----------------------------------------------------------------------------------------- lengths and caches


@pytest.mark.zoo
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_lengths_share_one_graph(kind: str) -> None:
    model = zoo.llama("sdpa").eval()
    with kp_compiler.capture_reports() as reports, torch.no_grad():
        compiled = torch.compile(model, backend="kp", options=REFERENCE, fullgraph=True)
        for length in (24, 37, 70):
            inputs: dict[str, Any] = {"input_ids": zoo.ids(length)}
            if kind == "padded":
                inputs["attention_mask"] = (torch.arange(length) > 4).long().expand(2, length).contiguous()
            elif kind == "packed":
                inputs["position_ids"] = torch.arange(length).remainder(11).expand(2, length).contiguous()
            for tensor in inputs.values():
                torch._dynamo.mark_dynamic(tensor, 1)
            got = compiled(**inputs, use_cache=False).logits
            assert relative_error(got, model(**inputs, use_cache=False).logits) < 1e-5
    assert len(reports) == 1
    specs = {"plain": "causal", "padded": "causal+padding", "packed": "causal+document"}
    assert {site.spec for site in merged(reports).rewritten()} == {specs[kind]}


@pytest.mark.zoo
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_static_cache_decode(implementation: str) -> None:
    """Prefill and three steps with a cache of fixed length: the offset is a tensor that is advanced."""
    from transformers import StaticCache

    model, ids = zoo.llama(implementation).eval(), zoo.ids(16)
    outs = []
    with kp_compiler.capture_reports() as reports, torch.no_grad():
        compiled = torch.compile(model, backend="kp", options=REFERENCE)
        for call in (model, compiled):
            cache = StaticCache(config=model.config, max_cache_len=40)
            steps = [call(ids, past_key_values=cache, use_cache=True).logits]
            for step in range(3):
                steps.append(call(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
            outs.append(steps)
    for want, got in zip(*outs, strict=True):
        assert relative_error(got, want) < 1e-5
    assert merged(reports).sites


# --------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("spelling", ["sdpa", "by_hand"])
def test_dropout(spelling: str, train: bool) -> None:
    """The reference kernel has dropout; FlexAttention has none and refuses."""

    def function(q, k, v):
        p = 0.3 if train else 0.0
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        probs = F.softmax(q @ k.transpose(-2, -1) * D**-0.5, dim=-1)
        return F.dropout(probs, p=0.3, training=train) @ v

    q, k, v = qkv()
    exact = F.scaled_dot_product_attention(q, k, v)
    for kernel in ("reference", "flex"):
        torch._dynamo.reset()
        outcome = run_both(function, (q, k, v), train=train, options={"attention": {"impl": kernel}})
        if train and kernel == "flex":
            assert codes(outcome.report) == ["dropout"]
        else:
            assert [site.impl for site in outcome.report.sites] == [kernel]
            assert outcome.report.sites[0].spec == ("full, dropout 0.3" if train else "full")
        if not train:
            assert outcome.error < 1e-6
    if train:
        compiled = torch.compile(function, backend="kp", options=REFERENCE)
        mean = torch.stack([compiled(q, k, v) for _ in range(80)]).mean(0)
        assert relative_error(mean, exact) < 0.2
