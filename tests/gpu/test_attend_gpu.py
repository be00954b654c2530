"""kp's own attention kernels on the device: against float64, past 32-bit offsets, recorded, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.lowering import attend as lowering
from kp_compiler.lowering.attend import Plan, attend
from kp_compiler.specs import AttentionSpec, MaskSpec
from tests.helpers import relative_error
from tests.test_flex import MASKS, SCORES

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
from tests import attend_cases as interpreted  # noqa: E402

CASES = list(interpreted.covering())
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.mark.parametrize(("mask", "change", "heads", "shape", "dims", "dtype"), CASES)
def test_against_float64(
    mask: str, change: str, heads: Any, shape: Any, dims: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels for any GPU. Half precision for most; memory is full of NaN before."""
    monkeypatch.setattr(lowering, "_hopper", lambda site: None)
    dtype = torch.bfloat16 if dtype == torch.float32 and dims != (16, 16) else dtype
    with torch.device("cuda"):
        one = interpreted.case(mask, change, heads, (shape[0] * 5 + 3, shape[1] * 5), dims, dtype)
        weights, lse_weights = torch.randn(*one.q.shape[:3], dims[1]), torch.randn(one.q.shape[:3])
        got, want = interpreted.run(one, weights, lse_weights), interpreted.exact(one, weights, lse_weights)
        again = interpreted.run(one, weights, lse_weights)
    for index, (mine, theirs, twin) in enumerate(zip(got, want, again, strict=True)):
        # a bias that is the same for all keys has a gradient by the log-sum-exp alone: the rest, Σ ds, is
        # zero but for the rounding of out; a sink's is a sum over all rows, of either sign
        cancels = index > 4 and (theirs.dim() == 1 or (theirs.dim() == 4 and theirs.shape[3] == 1))
        cancels &= dtype == torch.bfloat16
        bound = BOUNDS[dtype] * (2 if cancels else 1)
        assert mine.isfinite().all()
        assert relative_error(mine, theirs) < bound or (mine - theirs).abs().max() < 1e-4
        assert torch.equal(mine, twin)  # nothing is added up in an order that varies


def attention(spec: AttentionSpec) -> Any:
    plan = Plan(spec).to_json()
    return lambda q, k, v: attend()(q, k, v, [], [], [], None, None, None, plan)[0]


def test_offsets_past_32_bits() -> None:
    """N·H·D above 2³¹: the last rows of the last head, a window of 64, forward and backward."""
    length, heads, width = 2**17 + 100, 64, 256
    spec = AttentionSpec(width**-0.5, MaskSpec("window", "(k <= q) & (q - k <= 63)", window=64))
    q = torch.randn(1, length, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (
        torch.randn(1, length, 1, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "kv"
    )
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(spec)(*leaves)
    out[:, -1, -100:].float().square().sum().backward()
    tail = slice(length - 400, length)
    few = [x.detach()[:, -1:, tail].double().requires_grad_() for x in leaves]
    rows = torch.arange(400, device="cuda")
    keep = (rows <= rows[:, None]) & (rows[:, None] - rows <= 63)
    scores = (few[0] @ few[1].transpose(-1, -2) * spec.scale).masked_fill(~keep, float("-inf"))
    want = scores.softmax(-1) @ few[2]
    want[:, :, -100:].square().sum().backward()
    assert relative_error(out[:, -1:, -100:], want[:, :, -100:]) < 1e-2
    for mine, theirs in zip(leaves, few, strict=True):
        assert relative_error(mine.grad[:, -1:, -100:], theirs.grad[:, :, -100:]) < 2e-2


def test_cuda_graph() -> None:
    """Recorded once, right for other numbers in the same memory."""
    q, k, v = (torch.randn(1, 4, 500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    run = attention(AttentionSpec(0.125, MaskSpec("causal", "k <= q")))
    run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(q, k, v)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, run(q, k, v))


def test_dropout_rate() -> None:
    """As many pairs as asked for, and the average over seeds is attention without dropout."""
    q, k = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.eye(256, device="cuda", dtype=torch.bfloat16).expand(1, 2, 256, 256)
    plan = Plan(AttentionSpec(0.125, MaskSpec(), dropout_p=0.25)).to_json()
    seeds = [torch.tensor([number], device="cuda") for number in range(40)]
    outs = torch.stack([attend()(q, k, v, [], [], [], None, None, seed, plan)[0] for seed in seeds])
    assert abs((outs != 0).float().mean() - 0.75) < 0.005
    whole = (q.double() @ k.double().transpose(-1, -2) * 0.125).softmax(-1)
    assert relative_error(outs.double().mean(0), whole) < 0.12


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("function", [*MASKS, *SCORES], ids=lambda f: f.__name__)
def test_compiled(function: Any, train: bool) -> None:
    """Recognised, proved, lowered onto the kernels and through Inductor."""
    length = 389
    with torch.device("cuda"):
        leaves = [torch.randn(2, 4, length, 32, dtype=torch.bfloat16, requires_grad=train) for _ in range(3)]
        position_ids = torch.stack([torch.arange(length).remainder(61), torch.arange(length).remainder(140)])
        label = torch.randint(0, 3, (2, length)).index_fill(1, torch.tensor([0]), 1)
        options = {"strict": True, "attention": {"impl": "triton"}}
        with kp_compiler.capture_reports() as reports:
            compiled = torch.compile(function, backend="kp", fullgraph=True, options=options)
            out = compiled(*leaves, position_ids, label)
        assert [(s.status, s.impl) for s in merged(reports).sites] == [("rewritten", "triton")]
        wide = [x.detach().double().requires_grad_(train) for x in leaves]
        want = function(*wide, position_ids, label)
        pairs = [(out, want)]
        if train:
            grad = torch.randn_like(want)
            out.backward(grad.to(out.dtype))
            want.backward(grad)
            pairs += [(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)]
    for mine, theirs in pairs:
        assert relative_error(mine, theirs) < 1.5e-2
