"""Launches with arguments alike go to what was compiled before, with the tensors of now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_error

pytest.importorskip("triton.experimental.gluon")
from kp_compiler.lowering.into import Into, tail_of
from kp_compiler.specs import AttentionSpec, MaskSpec
from kp_compiler.target import Target
from tests import gluon_emulation as emulation

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what the device makes of it: tests/gpu")
HALF = torch.float16


class Compiled:
    """In place of what Triton compiles: the emulated kernel, by the places of its arguments."""

    def __init__(self, kernel: Any, names: list[str], warps: int) -> None:
        self.kernel, self.names, self.warps = kernel, names, warps

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3

        def run(*given: Any) -> None:
            self.kernel[grid](**dict(zip(self.names, given, strict=True)), num_warps=self.warps)

        return run


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels whose arguments Triton has looked at, in order."""
    from kp_compiler.lowering.triton import attention, hopper, launches

    found: list[str] = []

    class Kernel:
        def __init__(self, name: str, text: str) -> None:
            self.name, self.kernel = name, emulation.Kernel(name, text)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(num_warps: int, **given: Any) -> Compiled:
                found.append(self.name)
                self.kernel[grid](**given, num_warps=num_warps)
                return Compiled(self.kernel, list(given), num_warps)

            return run

    monkeypatch.setattr(attention, "compiled", Kernel)
    monkeypatch.setattr(launches, "CompiledKernel", Compiled)
    monkeypatch.setattr(hopper, "_launches", launches.Launches())
    monkeypatch.setattr(hopper, "detect", lambda device: Target("cuda", 90, multiprocessors=3))
    return found


def attended(q: Tensor, k: Tensor, v: Tensor, offset: int = 0) -> float:
    """The largest error of out and gradients."""
    from kp_compiler.lowering.triton import attention, hopper

    site = attention.Site(
        AttentionSpec(0.125, MaskSpec("causal", "k <= q + n0", scalars=1)), q, k, v, (), (offset,)
    )
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * 0.125
    keep = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + offset
    want = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ leaves[2]
    grad = torch.randn(want.shape).to(HALF)
    out, *mine = (torch.full(x.shape, float("nan"), dtype=HALF) for x in (q, q, k, v))
    lse = hopper.forward(site, None, Into(out))
    total = torch.empty(q.shape, dtype=torch.float32)
    delta = attention.delta_of(grad, out, None, total)
    hopper.gradients(site, None, grad, lse, delta, total, *mine)
    exact = [want, *torch.autograd.grad(want, leaves, grad.double())]
    return max(relative_error(a, b.detach()) for a, b in zip((out, *mine), exact, strict=True))


def tensors(*sizes: int) -> list[Tensor]:
    return [torch.randn(1, 2, *sizes).to(HALF) for _ in range(3)]


def test_launched_again(bound: list[str]) -> None:
    for _ in range(3):
        assert attended(*tensors(130, 64)) < 4e-3
    assert bound == ["kp_attention_hopper", "kp_attention_hopper_backward"]


@pytest.mark.parametrize("change", ["sizes", "strides", "offset", "address"])
def test_what_is_not_alike(bound: list[str], change: str) -> None:
    """Is looked at again, and right."""
    q, k, v = tensors(130, 64)
    offset = 0
    assert attended(q, k, v) < 4e-3
    before = bound.count("kp_attention_hopper")
    if change == "sizes":
        q, k, v = tensors(150, 64)
    elif change == "strides":
        q = torch.randn(1, 130, 2, 64).to(HALF).transpose(1, 2)
    elif change == "offset":
        offset = 16
    else:
        q = torch.randn(1 + q.numel() // 64 + 7, 64).to(HALF)[8:].flatten()[: q.numel()].view(q.shape)
    assert attended(q, k, v, offset) < 4e-3
    assert bound.count("kp_attention_hopper") == before + (change != "address")  # one of 16 bytes again


def test_as_many_as_are_kept(monkeypatch: pytest.MonkeyPatch, bound: list[str]) -> None:
    from kp_compiler.lowering.triton import hopper, launches

    monkeypatch.setattr(launches, "KEPT", 3)
    for rows in (128, 130, 140):
        assert attended(*tensors(rows, 64)) < 4e-3
    assert len(hopper._launches.known) <= 3


def added_up(offset: int) -> float:
    """The largest error of out and gradients, of two halves of the keys after the other."""
    from kp_compiler.lowering import attend
    from kp_compiler.lowering.triton import attention

    q, k, v = tensors(130, 64)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    keep = torch.arange(130) <= torch.arange(130)[:, None] + offset
    scores = (leaves[0] @ leaves[1].mT * 0.125).masked_fill(~keep, float("-inf"))
    want = scores.softmax(-1) @ leaves[2]
    grad = torch.randn(want.shape).to(HALF)
    mask = MaskSpec("causal", "k <= q + n0", scalars=1)
    plan = attend.Plan(AttentionSpec(0.125, mask, dead_rows="zero"))
    halves = [(k[:, :, :64], v[:, :, :64], [offset]), (k[:, :, 64:], v[:, :, 64:], [offset - 64])]
    out, tail, start = torch.empty_like(q), tail_of(q), None
    for last, (keys, values, scalars) in zip((False, True), halves, strict=True):
        lse = attend.write(Into(out, start, tail, last), q, keys, values, [], scalars, [], plan)
        start = out, lse
    delta = attention.delta_of(grad, out, None)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for (keys, values, scalars), some in zip(halves, (slice(0, 64), slice(64, 130)), strict=True):
        to = (dq, dk[:, :, some], dv[:, :, some])
        attend.add_gradients(to, grad, q, keys, values, [], scalars, [], plan, lse, delta)
    exact = [want, *torch.autograd.grad(want, leaves, grad.double())]
    return max(relative_error(a, b.detach()) for a, b in zip((out, dq * 0.125, dk, dv), exact, strict=True))


def test_unfinished_and_last(monkeypatch: pytest.MonkeyPatch, bound: list[str]) -> None:
    """Alike in everything else."""
    from kp_compiler.lowering import attend
    from kp_compiler.lowering.triton import hopper

    for name in ("_known", "_hopper"):
        monkeypatch.setattr(attend, name, lambda *given: hopper)
    monkeypatch.setattr(hopper, "gains", lambda site: True)
    q, k, v = tensors(192, 64)
    plan = attend.Plan(AttentionSpec(0.125))
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    for _ in range(2):
        out, start = torch.empty_like(q), None
        tail = tail_of(out)
        for begin in (0, 64, 128):
            some = [x[:, :, begin : begin + 64].contiguous() for x in (k, v)]
            into = Into(out, start, tail, last=begin == 128)
            start = out, attend.write(into, q, *some, [], [], [], plan)
        assert relative_error(out, want) < 4e-3
    assert len(bound) == 3


def test_calls_alike(monkeypatch: pytest.MonkeyPatch, bound: list[str]) -> None:
    """Are launched again before anything is looked at; under other numbers they are looked at."""
    from kp_compiler.lowering import attend
    from kp_compiler.lowering.triton import hopper

    for name in ("_known", "_hopper", "_hopper_backward"):
        monkeypatch.setattr(attend, name, lambda *given: hopper)
    monkeypatch.setattr(hopper, "gains", lambda site: True)
    looked, site = [], attend._site
    monkeypatch.setattr(attend, "_site", lambda *given: looked.append(1) or site(*given))
    for offset, count in ((0, 4), (0, 4), (5, 8), (5, 8), (0, 8)):
        assert added_up(offset) < 4e-3
        assert len(looked) == len(bound) == count
