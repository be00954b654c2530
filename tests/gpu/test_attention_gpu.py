"""Every lowered kernel on the device: the forms, outputs and gradients against float64, ragged sizes,
poisoned memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import kp_compiler
from kp_compiler.capture import merged
from tests.corpus.forms import FORMS, Form
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu


def _cuda(inputs, dtype=torch.bfloat16):
    return tuple(
        x.to("cuda", dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x.cuda()
        if isinstance(x, torch.Tensor)
        else x
        for x in inputs
    )


def _leaves(inputs, train):
    return [
        x.detach().clone().requires_grad_(train and x.is_floating_point())
        if isinstance(x, torch.Tensor)
        else x
        for x in inputs
    ]


def _run(function, inputs, train):
    leaves = _leaves(inputs, train)
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    results = [out.detach()]
    if train:
        weights = (
            torch.linspace(0.5, 1.5, out.numel(), device="cuda", dtype=torch.float32)
            .view(out.shape)
            .to(out.dtype)
        )
        (out * weights).sum().backward()
        results += [x.grad for x in leaves if isinstance(x, torch.Tensor) and x.grad is not None]
    return results


def _run_plain(function, inputs, train):
    """The original in eager mode, without cuDNN: PyTorch keeps cuDNN's backward plans regardless of the
    gradient's layout (lowering/graph_passes.py, GradLayout), so an eager run of another layout would spoil
    ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return _run(function, inputs, train)


def _poison() -> None:
    """Fill the caching allocator's free blocks with NaN, so that unwritten output shows."""
    blocks = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
    del blocks


def _double(function, inputs, train):
    wide = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    return _run(function, wide, train)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", FORMS, ids=[f"{f.number}-{f.name}" for f in FORMS])
def test_form(form: Form, train: bool) -> None:
    """The rewritten form is at most 1.5 times (plus rounding) as far from float64 as the original in bf16."""
    if form.refused is not None:
        pytest.skip("not rewritten")
    with torch.device("cuda"):
        inputs = _cuda(form.inputs(torch.float32))
        want = _double(form.function, inputs, train)
        plain = _run_plain(form.function, inputs, train)
        _poison()
        with kp_compiler.capture_reports() as reports:
            got = _run(
                torch.compile(form.function, backend="kp", fullgraph=True, options={"strict": True}),
                inputs,
                train,
            )
    report = merged(reports)
    for mine, theirs, exact in zip(got, plain, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, exact) <= 1.5 * relative_error(theirs, exact) + 2e-3, report.why("")


CASES = [
    ("cudnn", "causal", 1, 4, 4, 256, 64),
    ("cudnn", "causal", 2, 8, 2, 1000, 128),
    ("cudnn", "full", 2, 4, 4, 77, 64),
    ("flash", "causal", 2, 8, 2, 1000, 128),
    ("flash", "full", 1, 4, 4, 333, 64),
    ("flash", "window", 1, 4, 2, 1500, 64),
    ("triton", "causal", 2, 8, 2, 1000, 128),
    ("triton", "window", 1, 4, 4, 1500, 96),
    ("triton", "document", 2, 8, 2, 1024, 64),
    ("triton", "padding", 2, 4, 4, 700, 256),
    ("flex", "causal", 2, 8, 2, 1000, 128),
    ("flex", "window", 1, 4, 4, 1500, 64),
    ("flex", "document", 2, 8, 2, 1024, 64),
    ("flex", "padding", 2, 4, 4, 700, 64),
    ("efficient", "causal", 2, 8, 2, 1000, 64),
    ("efficient", "window", 1, 4, 4, 513, 64),
]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("impl", "kind", "batch", "heads", "kv_heads", "length", "width"), CASES)
def test_kernel(impl, kind, batch, heads, kv_heads, length, width, train) -> None:
    """One kernel asked for by name, ragged lengths and grouped heads. In inference Inductor lays a batch's
    block lists out on its own."""
    q = torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(batch, kv_heads, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    keep = torch.ones(batch, length, dtype=torch.bool, device="cuda")
    keep[0, :37] = False
    segments = (torch.arange(length, device="cuda") // 150).expand(batch, length).contiguous()

    def attend(q, k, v):
        rows, columns = (
            torch.arange(length, device=q.device)[:, None],
            torch.arange(length, device=q.device)[None, :],
        )
        mask = columns <= rows
        if kind == "full":
            mask = None
        elif kind == "window":
            mask = mask & (columns > rows - 100)
        elif kind == "document":
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        elif kind == "padding":
            mask = mask & keep[:, None, None, :]
        groups = heads // kv_heads
        return F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=mask
        )

    want = _double(attend, (q, k, v), train)
    plain = _run_plain(attend, (q, k, v), train)
    _poison()
    options = {"strict": True, "attention": {"impl": impl, "expect": 1}}
    with kp_compiler.capture_reports() as reports:
        got = _run(torch.compile(attend, backend="kp", fullgraph=True, options=options), (q, k, v), train)
    assert merged(reports).rewritten()[0].impl == impl
    for mine, theirs, exact in zip(got, plain, want, strict=True):
        assert relative_error(mine, exact) <= 1.3 * relative_error(theirs, exact) + 1e-3


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("meaning", ["zero", "where", "add"])
@pytest.mark.parametrize("impl", ["flex", "triton", "efficient"])
def test_dead_rows_keep_their_meaning(impl: str, meaning: str, train: bool) -> None:
    """A left-padded row is zero through SDPA, and the mean of all values through a finite fill, with its
    gradient: to q and k only where the fill was added."""
    keep = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    keep[0, :40] = False
    lowest = torch.finfo(torch.bfloat16).min

    def attend(q, k, v):
        line = torch.arange(300, device=q.device)
        mask = ((line[None, :] <= line[:, None]) & keep[:, None, None, :]).expand(2, 1, 300, 300)
        if meaning == "zero":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.125
        if meaning == "where":
            scores = scores.masked_fill(~mask, lowest)
        else:
            scores = scores + torch.where(mask, torch.zeros((), dtype=q.dtype, device=q.device), lowest)
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)

    inputs = tuple(torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want, plain = _double(attend, inputs, train), _run_plain(attend, inputs, train)
    options = {"strict": True, "attention": {"expect": 1, "impl": impl}}
    got = _run(torch.compile(attend, backend="kp", fullgraph=True, options=options), inputs, train)
    for mine, theirs, exact in zip(got, plain, want, strict=True):
        assert relative_error(mine, exact) <= 1.3 * relative_error(theirs, exact) + 1e-3
    mean = inputs[2].double().mean(2, keepdim=True)[0].expand(-1, 40, -1) * (meaning != "zero")
    assert (got[0][0, :, :40].double() - mean).norm() <= 1e-2 * mean.norm()


def test_dropout_beside_padding() -> None:
    """What BERT and GPT-2 train with by default: unbiased, and a row without keys is zero."""
    keep = torch.ones(2, 200, dtype=torch.bool, device="cuda")
    keep[0, 150:] = False
    keep[1] = False
    q, k, v = (torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], dropout_p=0.2)

    options = {"strict": True, "attention": {"expect": 1}}
    compiled = torch.compile(attend, backend="kp", fullgraph=True, options=options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = torch.stack([compiled(*leaves) for _ in range(64)])
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), keep[:, None, None, :])
    assert relative_error(outs.double().mean(0)[0], exact[0]) < 0.25
    assert torch.equal(outs[:, 1], torch.zeros_like(outs[:, 1]))
    outs.sum().backward()
    assert all(torch.isfinite(x.grad).all() and not x.grad[1].any() for x in leaves)


def test_dropout_has_a_kernel() -> None:
    """Dropout in training goes to FlashAttention: unbiased, reproducible from the seed, gone in eval."""
    q, k, v = (
        torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )

    def attend(q, k, v):
        probs = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.125, dim=-1)
        return torch.matmul(F.dropout(probs, 0.3, training=True), v)

    with kp_compiler.capture_reports() as reports:
        compiled = torch.compile(attend, backend="kp", fullgraph=True)
        torch.manual_seed(5)
        first = compiled(q, k, v)
        torch.manual_seed(5)
        again = compiled(q, k, v)
    assert merged(reports).rewritten()[0].impl == "flash"
    assert torch.equal(first, again)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    mean = torch.stack([compiled(q, k, v).double() for _ in range(64)]).mean(0)
    assert relative_error(mean, exact) < 0.25
    first.sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in (q, k, v))


def test_autocast_and_dynamic_lengths() -> None:
    """float32 inputs under autocast, three lengths, one compile."""

    def attend(x):
        q, k, v = x.unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with kp_compiler.capture_reports() as reports, torch.autocast("cuda", dtype=torch.bfloat16):
        options = {"attention": {"impl": "cudnn"}}
        compiled = torch.compile(attend, backend="kp", fullgraph=True, options=options)
        for length in (300, 512, 777):
            x = torch.randn(3, 2, 4, length, 64, device="cuda")
            torch._dynamo.mark_dynamic(x, 3)
            got, want = compiled(x), attend(x)
            assert got.dtype == want.dtype == torch.bfloat16
            assert relative_error(got, want) < 1e-2
    assert len(reports) == 1
    assert merged(reports).rewritten()[0].impl == "cudnn"


def test_no_quadratic_memory() -> None:
    """A packed Llama-like mask at 16k tokens leaves no tensor of size N²."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    length = 16384
    inputs = {
        "input_ids": torch.randint(0, 256, (1, length), device="cuda"),
        "position_ids": torch.arange(length, device="cuda").remainder(3000).unsqueeze(0),
        "use_cache": False,
        "logits_to_keep": 1,
    }
    compiled = torch.compile(copy.deepcopy(model), backend="kp")
    with torch.no_grad():
        compiled(**inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(**inputs)
    assert (
        torch.cuda.max_memory_allocated() - before < length * length
    )  # a boolean N² alone would be this many bytes


@pytest.mark.parametrize("first", [False, True], ids=["heads-first-gradient", "sequence-first-gradient"])
def test_gradient_layouts_do_not_disturb_each_other(first: bool) -> None:
    """Two graphs of equal sizes whose gradients arrive in different layouts, in either order."""

    def heads_first(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def sequence_first(q, k, v):
        return heads_first(q, k, v).transpose(1, 2).contiguous()

    inputs = tuple(torch.randn(2, 4, 40, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    functions = [sequence_first, heads_first] if first else [heads_first, sequence_first]
    for function in functions:
        got = _run(torch.compile(function, backend="kp", fullgraph=True), inputs, True)
        for mine, exact in zip(got, _double(function, inputs, True), strict=True):
            assert relative_error(mine, exact) < 1e-2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("length", [300, 1024])
def test_gradient_of_a_causal_bias(length: int, dynamic: bool) -> None:
    """A learned bias under a causal mask, several blocks long: the kernel leaves blocks above the diagonal
    unwritten, in the bias's gradient as well, and wants rows of 16 bytes."""

    def attend(q, k, v, table):
        line = torch.arange(q.shape[2], device=q.device)
        bias = F.embedding((line[None, :] - line[:, None]).clamp(-15, 15) + 15, table).permute(2, 0, 1)
        scores = q @ k.transpose(2, 3) * 0.125 + bias
        scores = scores.masked_fill(line[None, :] > line[:, None], float("-inf"))
        return F.softmax(scores, dim=-1) @ v

    inputs = tuple(torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs += (torch.randn(31, 4, device="cuda", dtype=torch.bfloat16),)
    want, plain = _double(attend, inputs, True), _run_plain(attend, inputs, True)
    _poison()
    options = {"strict": True, "attention": {"expect": 1, "impl": "efficient"}}
    with kp_compiler.capture_reports() as reports:
        compiled = torch.compile(attend, backend="kp", fullgraph=True, options=options)
        if dynamic:  # a first length, after which the second compiles for any
            _run(compiled, tuple(x[:, :, :-9] for x in inputs[:3]) + inputs[3:], True)
        got = _run(compiled, inputs, True)
    assert merged(reports).rewritten()[0].spec == "causal, 1 bias"
    for mine, theirs, exact in zip(got, plain, want, strict=True):
        assert relative_error(mine, exact) <= 1.3 * relative_error(theirs, exact) + 1e-3


@pytest.mark.parametrize("impl", ["flex", "triton", "efficient"])
@pytest.mark.parametrize("given", [False, True], ids=["proved", "handed-in"])
def test_rows_of_finite_fills(impl: str, given: bool) -> None:
    """A row of nothing but finfo.min is the mean of all values, whether the mask is proved or was handed in.
    A NaN there would spread to every row in the next layer."""
    keep = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    keep[0, :40] = False
    lowest = torch.finfo(torch.bfloat16).min

    def mask_of(keep):
        line = torch.arange(300, device="cuda")
        allowed = ((line[None, :] <= line[:, None]) & keep[:, None, None, :]).expand(2, 1, 300, 300)
        return torch.where(allowed, 0.0, lowest).to(torch.bfloat16)

    dense = mask_of(keep)

    def attend(q, k, v):
        mask = dense if given else mask_of(keep)
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.125 + mask
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)

    inputs = tuple(torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad(), kp_compiler.capture_reports() as reports:
        options = {"strict": True, "attention": {"impl": impl}}
        got = torch.compile(attend, backend="kp", fullgraph=True, options=options)(*inputs)
        plain, want = attend(*inputs), attend(*(x.double() for x in inputs))
    report = merged(reports)
    if given and impl == "efficient":
        assert report.sites[0].reason.code == "mask-is-input"
    else:
        assert report.rewritten()[0].impl == impl, report.why("")
    mean = inputs[2].double().mean(2, keepdim=True)[0]
    assert relative_error(got[0, :, :40], mean.expand(-1, 40, -1)) < 1e-2
    alive = [got[1], plain[1], want[1]]
    assert relative_error(alive[0], alive[2]) <= 1.3 * relative_error(alive[1], alive[2]) + 1e-3
