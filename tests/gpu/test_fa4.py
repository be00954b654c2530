"""FlashAttention-4 against float64: its operators, then `torch.compile(backend="kp")`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kp_compiler
from kp_compiler import target
from kp_compiler.capture import merged
from kp_compiler.lowering import fa4, reference
from kp_compiler.report import SiteRecord
from kp_compiler.specs import AttentionSpec, MaskSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not target.has_fa4(), reason="needs flash-attn-4 (flash_attn.cute)"),
]

FA4 = {"attention": {"impl": "fa4"}}
WINDOW = 100
FULL = MaskSpec()
CAUSAL = MaskSpec("causal", "k - q <= 0", parts=("causal",))
BAND = MaskSpec(
    "window", f"(k - q <= 0) & (-k + q - {WINDOW - 1} <= 0)", window=WINDOW, parts=("causal", "window")
)
SETTINGS = {FULL: (False, -1, -1), CAUSAL: (True, -1, -1), BAND: (False, WINDOW - 1, 0)}
MASKS = pytest.mark.parametrize("mask", list(SETTINGS), ids=["full", "causal", "window"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def operands(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """q and the output's gradient [B,H,S,D], k and v [B,K,T,D]."""
    shapes = [(heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries)]
    return [torch.randn(batch, *shape, head_dim, device="cuda", dtype=dtype) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: MaskSpec) -> list[Tensor]:
    """Output and gradients in float64, [B,H,S,D]."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    spec = AttentionSpec(scale=q.shape[-1] ** -0.5, mask=mask)
    out = reference.attention(*leaves, [], [], spec.to_json())
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def through_operator(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: MaskSpec) -> list[Tensor]:
    """Output and gradients of `kp::fa4_forward`, [B,H,S,D]."""
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    out, lse = fa4.forward()(*leaves, q.shape[-1] ** -0.5, *SETTINGS[mask], "test")
    assert out.is_contiguous()
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *grads)]


def hold(got: list[Tensor], want: list[Tensor]) -> None:
    """Overall the error stays within one `eps` of the dtype (rounding the exact result gives about a fifth of
    that; the kernel also rounds p and ds), and no element is off by more than 4 `eps` of the largest one."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        eps = torch.finfo(a.dtype).eps
        error = a.double() - b
        assert error.norm() <= eps * b.norm(), f"{name}: {float(error.norm() / b.norm()):.2e}"
        assert error.abs().max() <= 4 * eps * b.abs().max(), f"{name}: {float(error.abs().max()):.2e}"


# -------------------------------------------------------------------------------------------------- operators


@MASKS
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("length", [257, 1000])
def test_operator(mask: MaskSpec, dtype: torch.dtype, head_dim: int, length: int) -> None:
    inputs = operands(2, 4, 4, length, length, head_dim, dtype)
    hold(through_operator(*inputs, mask), exact(*inputs, mask))


@MASKS
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (7, 1), (12, 4)])
def test_operator_grouped_heads(mask: MaskSpec, heads: int, kv_heads: int) -> None:
    inputs = operands(1, heads, kv_heads, 1000, 1000, 128, torch.bfloat16)
    hold(through_operator(*inputs, mask), exact(*inputs, mask))


@pytest.mark.parametrize(("queries", "keys"), [(257, 1000), (1000, 257), (2, 2)])
def test_operator_cross_attention(queries: int, keys: int) -> None:
    inputs = operands(2, 4, 4, queries, keys, 64, torch.bfloat16)
    hold(through_operator(*inputs, FULL), exact(*inputs, FULL))


def test_operator_reads_any_strides() -> None:
    """Slices at odd offsets, repeated heads, and a gradient that is one number."""
    q, k, v, _ = operands(2, 4, 4, 256, 256, 64, torch.bfloat16)
    wide = torch.randn(2, 4, 256, 65, device="cuda", dtype=torch.bfloat16)
    grad = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(2, 4, 256, 64)
    inputs = [wide[..., 1:], k[:, :1].expand_as(k), v.transpose(2, 3).contiguous().transpose(2, 3), grad]
    hold(through_operator(*inputs, CAUSAL), exact(*inputs, CAUSAL))
    inputs = [q, k, v, grad]  # the same sizes again, from other kernels if they differ by strides
    hold(through_operator(*inputs, CAUSAL), exact(*inputs, CAUSAL))


@MASKS
def test_deterministic_backward(mask: MaskSpec) -> None:
    inputs = operands(1, 8, 2, 1000, 1000, 128, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = through_operator(*inputs, mask), through_operator(*inputs, mask)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hold(first, exact(*inputs, mask))


def test_operator_contract() -> None:
    """Schema, fake tensors with the real strides, autograd registration, and the graph AOTAutograd makes."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in operands(2, 8, 2, 96, 96, 64, torch.bfloat16)[:3])
    arguments = (q, k, v, 0.125, True, -1, -1, "test")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(fa4.forward(), arguments, test_utils=checks)
    with torch.no_grad():
        out, lse = fa4.forward()(*arguments)
        held = [x.detach() for x in (q, k, v)]
        arguments = (torch.randn_like(out), *held, out, lse, *arguments[3:])
        torch.library.opcheck(fa4.backward(), arguments, test_utils=checks[:2])


# ---------------------------------------------------------------------------------------------------- compile


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None, :]
    keep = (column <= row) & (row - column < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def compiled(function: Any, inputs: list[Tensor]) -> tuple[list[Tensor], SiteRecord]:
    """Output and gradients of the compiled function, and the record of its one site."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    with kp_compiler.capture_reports() as reports:
        out = torch.compile(function, fullgraph=True, backend="kp", options=FA4)(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs[3])
    (site,) = merged(reports).sites
    return [out.detach(), *grads], site


@DTYPES
@pytest.mark.parametrize(
    ("function", "mask"), [(full, FULL), (causal, CAUSAL), (banded, BAND)], ids=["full", "causal", "window"]
)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_compile(function: Any, mask: MaskSpec, dtype: torch.dtype, kv_heads: int) -> None:
    inputs = operands(2, 8, kv_heads, 1000, 1000, 64, dtype)
    got, site = compiled(function, inputs)
    assert (site.status, site.impl) == ("rewritten", "fa4")
    hold(got, exact(*inputs, mask))


def test_compile_dynamic_length() -> None:
    """One compilation for every length, where queries and keys have the same one."""
    function = torch.compile(lambda x: causal(*x.unbind(0)), fullgraph=True, backend="kp", options=FA4)
    with kp_compiler.capture_reports() as reports:
        for length in (257, 384, 1000):
            inputs = operands(2, 4, 4, length, length, 64, torch.bfloat16)
            leaf = torch.stack(inputs[:3]).requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 3)
            out = function(leaf)
            (grad,) = torch.autograd.grad(out, leaf, inputs[3])
            hold([out.detach(), *grad.unbind(0)], exact(*inputs, CAUSAL))
    assert len(reports) == 1
    assert [(site.status, site.impl) for site in merged(reports).sites] == [("rewritten", "fa4")]


@pytest.mark.parametrize(
    ("function", "queries", "keys", "head_dim", "dtype", "code"),
    [
        (causal, 96, 128, 64, torch.bfloat16, "causal-alignment"),
        (banded, 256, 384, 64, torch.bfloat16, "causal-alignment"),
        (causal, 128, 128, 80, torch.bfloat16, "head-dim"),
        (causal, 128, 128, 64, torch.float32, "dtype"),
        (full, 1, 128, 64, torch.bfloat16, "decode"),
    ],
)
def test_refusals(
    function: Any, queries: int, keys: int, head_dim: int, dtype: torch.dtype, code: str
) -> None:
    """The twins that must not fire: the site keeps its original call and still gives the right result."""
    inputs = operands(2, 4, 4, queries, keys, head_dim, dtype)
    got, site = compiled(function, inputs)
    assert site.status == "refused"
    assert site.reason is not None
    assert site.reason.code == code
    want = function(*(x.double() for x in inputs[:3]))
    assert (got[0].double() - want).norm() <= 10 * torch.finfo(dtype).eps * want.norm()


def test_package_is_imported_when_an_operator_runs() -> None:
    code = (
        "import sys; from kp_compiler.lowering import fa4; fa4.forward(); assert 'cutlass' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
