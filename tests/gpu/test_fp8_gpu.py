"""FP8 on the device: fused casts against the reference operators, products against bfloat16."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.lowering.fp8 import quantize
from kp_compiler.lowering.fp8.quantize import E4M3, E5M2, sqnr

pytestmark = pytest.mark.gpu
RECIPES = ("tensorwise", "rowwise", "rowwise_gw_hp", "blockwise")


def fp8_scale(parts: Any, dtype: Any, block: Any, *, dim: int = 0) -> torch.Tensor:
    if block == (0, 0):
        amax = torch.ops.kp.fp8_amax.default(parts, dim)
        return quantize.scale_from_amax(amax.reshape(1, 1), dtype, False)
    return torch.ops.kp.fp8_scale.default(parts, dim, dtype, list(block), False, None)


def fp8_quantize(
    parts: Any,
    scale: Any,
    dtype: Any,
    block: Any,
    *,
    dim: int = 0,
    transpose: bool = False,
    after: Any = None,
) -> torch.Tensor:
    return torch.ops.kp.fp8_quantize.default(parts, dim, scale, dtype, list(block), transpose, after)


@pytest.fixture(autouse=True)
def operators() -> None:
    """Registered before Dynamo sees their names."""
    quantize.library()


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _poison() -> None:
    blocks = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
    del blocks


def _compiled(function: Any) -> Any:
    """Through kp's post-grad pass, where casts are fused. kp has nothing to rewrite before AOTAutograd."""
    return torch.compile(function, backend="kp", fullgraph=True, options={"fp8_linear": "on"}, dynamic=False)


PRODUCERS = {
    "itself": lambda a, b: a,
    "swiglu": lambda a, b: F.silu(a) * b,
    "gelu": lambda a, b: F.gelu(a),
    "tanh gelu": lambda a, b: F.gelu(a, approximate="tanh"),
    "residual": lambda a, b: a + b,
    "norm": lambda a, b: F.rms_norm(a, (a.shape[-1],), b[0]),
    "half of a wider one": lambda a, b: torch.cat([a, b], 1)[:, : a.shape[1]],
}


@pytest.mark.parametrize("block", [(0, 0), (1, 0), (0, 1), (1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize(("rows", "columns"), [(256, 512), (77, 208), (1, 64), (1000, 144)])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_fused_cast(producer: str, rows: int, columns: int, block: tuple[int, int]) -> None:
    """Both layouts are one set of numbers, within rounding of the reference; padding is zeros."""
    function = PRODUCERS[producer]
    a, b = _rand(rows, columns), _rand(rows, columns)

    def both(a: torch.Tensor, b: torch.Tensor) -> Any:
        x = function(a, b)
        scale = fp8_scale([x], E4M3, block)
        casts = [fp8_quantize([x], scale, E4M3, block, transpose=t) for t in (False, True)]
        return scale, *(cast.to(torch.float32) for cast in casts)

    _poison()
    scale, plain, turned = _compiled(both)(a, b)
    assert not plain[rows:].any()
    whole, scale, plain = scale, scale[:rows] if block == (1, 128) else scale, plain[:rows]
    exact = function(a.double(), b.double())
    assert torch.equal(turned[:, :rows], plain.t())
    assert not turned[:, rows:].any()
    assert sqnr(plain / quantize.spread(scale, exact, block), exact) > 30
    if producer == "itself":
        assert torch.equal(plain, fp8_quantize([a], whole, E4M3, block).float()[:rows])


@pytest.mark.parametrize("producer", ["itself", "swiglu"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 64), (77, 208), (300, 4096), (9, 14336), (16, 16384), (5, 20000)]
)
def test_cast_of_rows(producer: str, rows: int, columns: int) -> None:
    """Scale, cast and largest magnitude of rows; up to 16384 columns by one kernel."""
    function = PRODUCERS[producer]

    def cast(a: torch.Tensor, b: torch.Tensor) -> Any:
        x = function(a, b)
        scale = fp8_scale([x], E4M3, (1, 0))
        q = fp8_quantize([x], scale, E4M3, (1, 0))
        return scale, q.to(torch.float32), torch.ops.kp.fp8_amax.default([x], 0)

    a, b = _rand(rows, columns), _rand(rows, columns)
    _poison()
    scale, q, amax = _compiled(cast)(a, b)
    exact = function(a.double(), b.double())
    assert scale.shape == (rows, 1) and bool((q.abs().amax(1) == 448).all())
    assert sqnr(q / scale, exact) > 30
    assert abs(amax.item() / exact.abs().max().item() - 1) < 1e-2


def test_more_rows_than_a_grid_is_high() -> None:
    x = _rand(70_000, 16_384)

    def cast(x: torch.Tensor) -> Any:
        scale = fp8_scale([x], E4M3, (1, 0))
        return scale, fp8_quantize([x], scale, E4M3, (1, 0))

    scale, q = _compiled(cast)(x)
    assert sqnr(q[-16:].float() / scale[-16:], x[-16:]) > 30


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fused_cast_of_parts(dtype: torch.dtype) -> None:
    """Gradients of gate and up projection, and the product they come from, in one operator."""

    def backward(g: torch.Tensor, u: torch.Tensor, dh: torch.Tensor) -> Any:
        s = torch.sigmoid(g.float())
        h, silu = (g * s * u), g * s
        grads = [dh * u * (s + silu * (1 - s)), dh * silu]
        grads = [x.to(torch.bfloat16) for x in grads]
        scale = fp8_scale(grads, dtype, (0, 0), dim=1)
        one = torch.ones(1, 1, device="cuda")
        casts = [fp8_quantize(grads, scale, dtype, (0, 0), dim=1, transpose=t) for t in (False, True)]
        casts.append(fp8_quantize([h.to(torch.bfloat16)], one, E4M3, (0, 0), transpose=True))
        return scale, *(cast.to(torch.float32) for cast in casts)

    inputs = tuple(_rand(300, 192) for _ in range(3))
    _poison()
    scale, *got = _compiled(backward)(*inputs)
    g, u, dh = (x.double() for x in inputs)
    s = torch.sigmoid(g)
    grads = torch.cat([dh * u * (s + g * s * (1 - s)), dh * g * s], 1)
    floor = 25 if dtype == E5M2 else 31
    assert sqnr(got[0] / scale, grads) > floor
    assert torch.equal(got[1][:, :300], got[0].t())
    assert sqnr(got[2][:, :300], (g * s * u).t()) > 31
    assert not got[1][:, 300:].any() and not got[2][:, 300:].any()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_special_values(value: float) -> None:
    def both(x: torch.Tensor) -> Any:
        scale = fp8_scale([x], E4M3, (0, 0))
        casts = [fp8_quantize([x], scale, E4M3, (0, 0), transpose=t) for t in (False, True)]
        return [cast.to(torch.float32) / scale for cast in casts]

    x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    x[3, 4] = value
    for q in _compiled(both)(x):
        assert q.isnan().all() if value else not q.any()


class Block(nn.Module):
    """Attention and a gated MLP of Llama's shape, with or without biases."""

    def __init__(self, dim: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.q, self.k, self.v = (
            nn.Linear(dim, dim, bias),
            nn.Linear(dim, dim // 4, bias),
            nn.Linear(dim, dim // 4, bias),
        )
        self.o, self.gate, self.up = (
            nn.Linear(dim, dim, bias),
            nn.Linear(dim, hidden, bias),
            nn.Linear(dim, hidden, bias),
        )
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (f(h).view(*x.shape[:2], -1, 64).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [512, 333])
@pytest.mark.parametrize("recipe", RECIPES)
def test_block(recipe: str, rows: int, bias: bool) -> None:
    """Forward and every gradient, against the same block in float32; ragged row counts included."""
    torch.manual_seed(0)
    dim = 2048 if recipe == "blockwise" else 512
    block = Block(dim, 2 * dim, bias=bias).cuda().bfloat16()
    x = _rand(2, rows, dim)
    grads = []
    options = {"strict": True, "fp8_linear": {"mode": "on", "recipe": recipe, "expect": 7}}
    reference = Block(dim, 2 * dim, bias=bias).cuda()
    reference.load_state_dict(block.state_dict())
    with kp_compiler.capture_reports() as reports:
        for run, leaf in (
            (reference, x.float()),
            (torch.compile(block, backend="kp", fullgraph=True, options=options), x),
        ):
            leaf = leaf.clone().requires_grad_()
            _poison()
            out = run(leaf)
            out.square().mean().backward()
            named = [
                p.grad for n, p in run.named_parameters() if not n.endswith("k.bias")
            ]  # which no output depends on
            grads.append([out.detach(), leaf.grad, *named])
    assert len(merged(reports).rewritten("linear")) == 7
    assert all(sqnr(got, want) > 14 for want, got in zip(*grads, strict=True))
    assert sqnr(grads[1][0], grads[0][0]) > 26


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_products_kept_in_fp8(recipe: str) -> None:
    """`save="fp8"` changes gradients by no more than FP8 does anyway, and keeps fewer bytes."""
    torch.manual_seed(0)
    dim = 2048 if recipe == "blockwise" else 512
    block, x = Block(dim, 2 * dim, bias=False).cuda().bfloat16(), _rand(2, 512, dim)
    kept, grads = {}, {}
    for save in ("bfloat16", "input", "fp8"):
        settings: dict[str, Any] = {"mode": "require", "recipe": recipe, "save": save}
        options = {"strict": True, **({} if save == "bfloat16" else {"fp8_linear": settings})}
        run = torch.compile(block, backend="kp", options=options)
        for _ in range(2):
            block.zero_grad()
            gc.collect()  # what goes while the block runs is not what it keeps
            before = torch.cuda.memory_allocated()
            out = run(x)
            kept[save] = torch.cuda.memory_allocated() - before
            out.square().mean().backward()
        grads[save] = [p.grad for p in block.parameters()]
    assert kept["fp8"] < 0.8 * kept["bfloat16"], kept
    assert kept["fp8"] < 0.9 * kept["input"], kept
    assert all(sqnr(got, want) > 18 for want, got in zip(grads["input"], grads["fp8"], strict=True))


def test_inference_reads_new_weights() -> None:
    layer, x = nn.Linear(1024, 2048).cuda().bfloat16(), _rand(64, 1024)
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        run = torch.compile(layer, backend="kp", options={"fp8_linear": "on", "mode": mode})
        with torch.no_grad():
            for _ in range(3):
                for _ in range(3):
                    assert sqnr(run(x), layer(x)) > 27
                layer.weight.mul_(-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_delayed_scaling(mode: str) -> None:
    """From the second step on as exact as one scale a tensor; every kernel sees the largest magnitudes, also
    in CUDA graphs."""
    torch.manual_seed(0)
    block = Block(512, 1024, bias=False).cuda().bfloat16()
    options = {"strict": True, "mode": mode, "fp8_linear": {"mode": "on", "recipe": "delayed", "expect": 7}}
    compiled = torch.compile(block, backend="kp", fullgraph=True, options=options)
    reference = Block(512, 1024, bias=False).cuda()
    reference.load_state_dict(block.state_dict())
    for step in range(4):
        grads, x = [], _rand(2, 333, 512)
        for run, leaf in ((reference, x.float()), (compiled, x)):
            leaf = leaf.clone().requires_grad_()
            _poison()
            run.zero_grad()
            out = run(leaf)
            out.square().mean().backward()
            grads.append([t.detach().clone() for t in (out, leaf.grad, *(p.grad for p in run.parameters()))])
        assert step == 0 or all(sqnr(got, want) > 14 for want, got in zip(*grads, strict=True))
    state = kp_compiler.state_dict(compiled)
    assert len(state) == 3 * 4
    h = reference.norm(x.float())
    assert abs(state["q.weight.fp8_amax"][0] / h.abs().max() - 1) < 1e-2
    assert (
        abs(
            state["q.weight.fp8_amax"][1] / max(w.weight.abs().max() for w in (block.q, block.k, block.v)) - 1
        )
        < 1e-6
    )
    assert all(not value.any() for name, value in state.items() if name.endswith("overflows"))


@pytest.mark.parametrize("steps", [1, 7, 1024])
def test_delayed_scales_are_those_of_the_reference(steps: int) -> None:
    """Against the reference, over magnitudes that are missing, infinite and not a number."""
    from kp_compiler.lowering.fp8.state import UNSEEN, updated
    from kp_compiler.lowering.triton.delayed_scales import update

    seen = torch.full((3, 3, 4), UNSEEN, device="cuda")
    state = [seen, torch.zeros(steps, 3, 3, device="cuda"), torch.zeros(3, 3, device="cuda")]
    state.append(torch.zeros(3, 3, dtype=torch.int64, device="cuda"))
    limits = torch.tensor([448.0, 448.0, 57344.0], device="cuda")
    guess = torch.tensor([64.0, 1.0, 1.0], device="cuda")
    twin = [tensor.clone() for tensor in state]
    for step in range(9):
        new = torch.rand(3, 3, device="cuda") * 10.0 ** torch.randint(-3, 5, (3, 3), device="cuda")
        new[step % 3, 0] = [1.0, float("nan"), float("inf")][step // 3]
        there = torch.rand(3, 3, device="cuda") < 0.6
        outs = []
        for function, mine in ((updated, state), (update, twin)):
            lines, history, scale, overflows = mine
            lines[..., 0] = torch.where(there, new, lines[..., 0])
            entry = step % steps
            outs.append(function(lines, history, entry, scale, overflows, limits, guess, 2.0))
        torch.testing.assert_close(*outs)
        for one, other in zip(state, twin, strict=True):
            torch.testing.assert_close(one[..., 0], other[..., 0])
    assert state[3].any()


def test_overlapping_passes() -> None:
    torch.manual_seed(0)
    model = Block(256, 512, bias=False).to("cuda", torch.bfloat16)
    options = {"strict": True, "fp8_linear": {"mode": "require", "recipe": "delayed"}}
    run = torch.compile(model, backend="kp", fullgraph=True, options=options)
    x = _rand(2, 256, 256)
    for _ in range(3):
        outs = [run(size * x) for size in (1.0, 2.0)]
        for out in outs:
            out.square().mean().backward()
    state = kp_compiler.state_dict(run)
    assert float(state["gate.weight.fp8_amax"][0]) > 1.5 * float(x.abs().max())
    assert not state["gate.weight.fp8_overflows"].any()
    want = model(x)
    assert sqnr(run(x), want) > 20
