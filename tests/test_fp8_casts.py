"""Scales, casts and products in FP8: how often, how exact, and what the emulation refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kp_compiler.lowering.fp8 import mm
from kp_compiler.lowering.fp8.quantize import E4M3, E5M2, fp8_quantize, fp8_scale, sqnr
from tests.fp8 import Gated, K, M, N, Weight, compiled, fp8, targets


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
    weight and each activation transposed; that of the graph's own input is made in the forward pass."""
    x = torch.randn(M, K, requires_grad=True)
    assert joint_counts(nn.Sequential(nn.LayerNorm(K), Gated()), x, "tensorwise") == (4, 8)
    assert joint_counts(Gated(), x, "tensorwise") == (5, 7)


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


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_gw_hp", "blockwise"])
def test_a_spike_spoils_its_own_row(recipe: str) -> None:
    """One value 1e5 times the rest, in the activation and then in the gradient: other rows of the output and
    of the activation's gradient keep their precision, and so does the weight's gradient as a whole."""
    torch.manual_seed(0)
    x, dy, weight = torch.randn(64, K), torch.randn(64, N), torch.randn(N, K) / 16
    rest = [i for i in range(64) if i != 3]
    for spiked in (x, dy):
        spiked[3, 5] = 1e5
        layer = Weight(lambda x, w, b: F.linear(x, w), weight.clone())
        leaf = x.clone().requires_grad_()
        out, _ = compiled(layer, (leaf,), **fp8(recipe))
        out.backward(dy)
        assert layer.weight.grad is not None and leaf.grad is not None
        assert sqnr(out[rest], x[rest] @ weight.t()) >= 27
        assert sqnr(leaf.grad[rest], dy[rest] @ weight) >= 24
        assert sqnr(layer.weight.grad, dy.t() @ x) >= 24
        spiked[3, 5] = 1.0


def test_float16_has_one_scale_a_tensor() -> None:
    """cuBLASLt's products with row scales give bfloat16 only."""
    x = torch.randn(32, K, dtype=torch.float16, requires_grad=True)
    layer = Weight(lambda x, w, b: F.linear(x, w), torch.randn(N, K) / 16).half()
    out, _ = compiled(layer, (x,), **fp8("tensorwise"))
    out.sum().backward()
    assert sqnr(out, F.linear(x, layer.weight)) >= 27


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
    assert mm.refusal(a, b, one, one, torch.bfloat16) is None
    text = mm.refusal(*REFUSED[said](a, b, one, one), torch.bfloat16)
    assert text is not None
    if said == "dtypes":
        assert "must be FP8" in text
    else:
        assert said in text
