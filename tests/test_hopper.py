"""The Hopper kernels' texts in an emulation of Gluon: right numbers, and nothing waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.helpers import relative_error

pytest.importorskip("triton.experimental.gluon")
from kp_compiler.specs import AttentionSpec, MaskSpec
from kp_compiler.target import Target
from tests import gluon_emulation as emulation
from tests import test_attend as interpreted
from tests.gpu import test_hopper_gpu as device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the device in tests/gpu")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    from kp_compiler.lowering.triton import attention, hopper

    monkeypatch.setattr(attention, "compiled", emulation.Kernel)
    monkeypatch.setattr(hopper, "detect", lambda device: Target("cuda", 90, multiprocessors=3))


CASES = [case for index, case in enumerate(device.cases(device.DIMS)) if index % 3 == 0]


@pytest.mark.parametrize(("mask", "change", "dims", "heads", "shape", "dtype"), CASES)
def test_against_float64(mask: str, change: str, dims: Any, heads: Any, shape: Any, dtype: Any) -> None:
    from kp_compiler.lowering.triton import attention, hopper

    shape = tuple(min(length, 330) for length in shape)
    one = interpreted.case(mask, change, heads, shape, dims, torch.float16)
    site, by_query, by_key = device.site_of(one)
    out, grad = (torch.full((*one.q.shape[:3], dims[1]), float("nan"), dtype=one.q.dtype) for _ in range(2))
    grad.copy_(torch.randn(grad.shape))
    lse_grad = torch.randn(grad.shape[:3])
    assert hopper.takes(site)
    lse = hopper.forward(site, by_query, out)
    want = interpreted.exact(one, grad, lse_grad)
    assert relative_error(out, want[0]) < 2e-3
    assert relative_error(torch.where(lse == float("-inf"), 0.0, lse), want[1]) < 1e-4
    if not hopper.takes_backward(site, grad):
        return
    grads = [torch.full_like(x, float("nan")) for x in (one.q, one.k, one.v)]
    delta = attention.delta_of(grad, out, lse_grad)
    hopper.gradients(site, by_key, grad, lse, delta, *grads)
    for mine, theirs in zip(grads, want[2:5], strict=True):
        assert relative_error(mine, theirs) < 4e-3 or (mine - theirs).abs().max() < 1e-4


def test_going_on_from_other_keys() -> None:
    from kp_compiler.lowering.triton import attention, hopper

    one = interpreted.case("full", "plain", (4, 2), (150, 300), (96, 96), torch.float16)
    earlier, out = (torch.full(one.q.shape, float("nan"), dtype=torch.float16) for _ in range(2))
    parts = (slice(0, 128), slice(128, 300))
    first, second = (
        attention.Site(one.spec, one.q, one.k[:, :, part], one.v[:, :, part], (), ()) for part in parts
    )
    start = hopper.forward(first, None, earlier)
    lse = hopper.forward(second, None, out, (earlier, start))
    want = interpreted.exact(one, torch.zeros(out.shape), torch.zeros(lse.shape))
    assert relative_error(out, want[0]) < 2e-3
    assert relative_error(lse, want[1]) < 1e-4


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("mbarrier.wait(k_full.index(stage), ((n + i) // STAGES) & 1)", "pass"),
        ("mbarrier.wait(v_free.index(stage), turned)", "pass"),
        ("mbarrier.wait(q_full.index((lap + 1) % QUEUE), ((lap + 1) // QUEUE) & 1)", "pass"),
        ("mbarrier.arrive(v_free.index(before), count=1)", "pass"),
        ("mbarrier.arrive(q_free.index((lap - 1) % QUEUE), count=1, pred=lap > 0)", "pass"),
    ],
)
def test_emulation_sees_what_is_missing(monkeypatch: pytest.MonkeyPatch, line: str, instead: str) -> None:
    """A wait that is left out gives wrong numbers or too many arrivals, a left out arrival no end."""
    from kp_compiler.lowering.triton import attention, hopper

    def broken(name: str, text: str) -> emulation.Kernel:
        if line not in text:
            raise ValueError(line)
        return emulation.Kernel(name, text.replace(line, instead))

    monkeypatch.setattr(attention, "compiled", broken)
    monkeypatch.setattr(hopper, "detect", lambda device: Target("cuda", 90, multiprocessors=1))
    monkeypatch.setattr(emulation, "PATIENCE", 0.5)
    q, k, v = (torch.randn(1, 2, 700, 64, dtype=torch.float16) for _ in range(3))
    out = torch.zeros_like(q)
    site = attention.Site(AttentionSpec(0.125, MaskSpec()), q, k, v, (), ())
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for _ in range(10):
        try:
            hopper.forward(site, None, out)
        except (TimeoutError, AssertionError):
            return
        if not relative_error(out, want) < 2e-3:
            return
    pytest.fail("the emulation missed it")


def test_compiles_for_the_device() -> None:
    """Into machine code of sm90, with next to nothing in local memory."""
    run = [sys.executable, "-m", "tests.compile_hopper"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [line.rsplit(" ", 1) for line in result.stdout.splitlines()]
    assert [name for name, _ in found] == ["forward 64", "forward 128", "backward 128"]
    assert all(int(count) <= 16 for _, count in found), found
