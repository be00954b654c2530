"""The Hopper kernels' texts in an emulation of Gluon: right numbers, and nothing waits for ever."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.helpers import relative_error

pytest.importorskip("triton.experimental.gluon")
from kp_compiler.lowering.into import Into
from kp_compiler.lowering.triton.hopper_backward_source import of_ds
from kp_compiler.specs import AttentionSpec, MaskSpec
from kp_compiler.target import Target
from tests import attend_cases as interpreted
from tests import gluon_emulation as emulation
from tests.covering import pairwise
from tests.gpu import test_hopper_gpu as device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the device in tests/gpu")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    from kp_compiler.lowering.triton import attention, hopper

    monkeypatch.setattr(attention, "compiled", emulation.Kernel)
    monkeypatch.setattr(hopper, "detect", lambda device: Target("cuda", 90, multiprocessors=3))


CHANGES = [(change,) for change in interpreted.SCORE_CHANGES]
ROWS = pairwise(CHANGES, device.DIMS, device.HEADS, device.SHAPES, device.DTYPES)
CASES = list(zip(itertools.cycle(interpreted.MASK_SPECS), *zip(*ROWS, strict=True), strict=False))


@pytest.mark.parametrize(("mask", "change", "dims", "heads", "shape", "dtype"), CASES)
def test_against_float64(mask: str, change: str, dims: Any, heads: Any, shape: Any, dtype: Any) -> None:
    from kp_compiler.lowering.triton import attention, hopper

    shape = {512: (256, 256), 1500: (330, 128)}.get(shape[0]) or tuple(min(length, 330) for length in shape)
    one = interpreted.case(mask, change, heads, shape, dims, dtype)
    site, by_query, by_key = device.site_of(one)
    grad = torch.randn(*one.q.shape[:3], dims[1]).to(one.q.dtype)
    lse_grad = torch.randn(grad.shape[:3])
    assert hopper.takes(site)
    want = interpreted.exact(one, grad, lse_grad)
    bound = 2e-3 if dtype == torch.float16 else 1e-2
    out = torch.full(grad.shape, float("nan"), dtype=dtype)
    lse = hopper.forward(site, by_query, Into(out))
    assert relative_error(out, want[0]) < bound
    assert relative_error(torch.where(lse == float("-inf"), 0.0, lse), want[1]) < 1e-4
    if not hopper.takes_backward(site, grad):
        return
    grads = [torch.full_like(x, float("nan")) for x in (one.q, one.k, one.v)]
    total = torch.full_like(grads[0], float("nan"), dtype=torch.float32)
    delta = attention.delta_of(grad, out, lse_grad, total)
    hopper.gradients(site, by_key, grad, lse, delta, total, *grads)
    for mine, theirs in zip(grads, want[2:5], strict=True):
        assert relative_error(mine, theirs) < 2 * bound or (mine - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("block", "shape", "start"), device.LISTED_CASES)
def test_lists_of_each_head(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], shape: tuple[int, int], start: bool, apart: bool
) -> None:
    from kp_compiler.lowering.triton import hopper

    monkeypatch.setattr(hopper, "_long_columns", lambda site, lists: apart)
    shape = tuple(min(size, 300) if size != 512 else 384 for size in shape)
    assert max(device.lists_of_each_head(block, shape, start=start)) < 4e-3


def test_going_on_from_other_keys() -> None:
    from kp_compiler.lowering.triton import attention, hopper

    one = interpreted.case("full", "plain", (4, 2), (150, 300), (96, 96), torch.float16)
    earlier, out = (torch.full(one.q.shape, float("nan"), dtype=torch.float16) for _ in range(2))
    parts = (slice(0, 128), slice(128, 300))
    first, second = (
        attention.Site(one.spec, one.q, one.k[:, :, part], one.v[:, :, part], (), ()) for part in parts
    )
    start = hopper.forward(first, None, Into(earlier))
    lse = hopper.forward(second, None, Into(out, (earlier, start)))
    want = interpreted.exact(one, torch.zeros(out.shape), torch.zeros(lse.shape))
    assert relative_error(out, want[0]) < 2e-3
    assert relative_error(lse, want[1]) < 1e-4


@pytest.mark.parametrize("dims", device.TAIL_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_with_a_tail(dims: tuple[int, int], dtype: torch.dtype) -> None:
    mine, one, lses = device.with_a_tail((150, 300), dims, dtype)
    assert mine <= 1.1 * one and lses < 1e-4


def test_tails_of_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on from the other one's."""
    from kp_compiler.lowering.triton import attention
    from kp_compiler.lowering.triton.text import compiled

    def either(name: str, text: str) -> Any:
        return emulation.Kernel(name, text) if "hopper" in name else compiled(name, text)

    monkeypatch.setattr(attention, "compiled", either)
    mine, one, lses = device.with_a_tail((150, 300), (96, 80), torch.float16, portable=True)
    assert mine <= 1.1 * one and lses < 1e-4


MISSING = {
    "forward": [
        "mbarrier.wait(k_full.index(stage), ((n + i) // STAGES) & 1)",
        "mbarrier.wait(v_free.index(stage), turned)",
        "mbarrier.arrive(v_free.index(before), count=1)",
        "mbarrier.arrive(q_free.index((lap - 1) % QUEUE), count=1, pred=lap > 0)",
    ],
    "backward": [
        "mbarrier.wait(kv_full.index(0), 0)",
        "mbarrier.wait(q_free.index(stage), turned)",
        "mbarrier.wait(dout_full.index(stage), turned)",
        f"mbarrier.wait({of_ds('ds_full', 'n')})",
        f"mbarrier.wait({of_ds('ds_free', 'n + LATE', '^ 1')})",
        "mbarrier.wait(dq_full.index(0), n & 1)",
        "mbarrier.wait(dq_free.index(0), (n & 1) ^ 1)",
        "mbarrier.arrive(dq_free.index(0), count=1)",
        "mbarrier.arrive(q_free.index(stage), count=1)",
    ],
}
LEFT_OUT = [(name, line) for name, lines in MISSING.items() for line in lines]


@pytest.mark.parametrize(("kernel", "line"), LEFT_OUT)
def test_emulation_sees_what_is_missing(monkeypatch: pytest.MonkeyPatch, kernel: str, line: str) -> None:
    """A wait that is left out gives wrong numbers or too many arrivals, a left out arrival no end. (Waits for
    what another one has made sure of nearly always are not seen: of the forward kernel for the next item and
    its queries, of the backward kernel for a buffer of dout to be free.)"""
    from kp_compiler.lowering.triton import attention, hopper

    monkeypatch.setattr(hopper, "detect", lambda device: Target("cuda", 90, multiprocessors=1))
    monkeypatch.setattr(emulation, "PATIENCE", 0.5)
    monkeypatch.setattr(emulation, "LATE", 0.9)
    q, k, v, grad = (torch.randn(1, 2, 700, 64, dtype=torch.float16) for _ in range(4))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*leaves)
    grads = torch.autograd.grad(want, leaves, grad.double())
    out, *mine = (torch.zeros_like(q) for _ in range(4))
    site = attention.Site(AttentionSpec(0.125, MaskSpec()), q, k, v, (), ())
    lse = hopper.forward(site, None, Into(out))
    total = torch.empty_like(q, dtype=torch.float32)

    def broken(name: str, text: str) -> emulation.Kernel:
        if line not in text:
            raise ValueError(line)
        return emulation.Kernel(name, text.replace(line, "pass"))

    monkeypatch.setattr(attention, "compiled", broken)
    for _ in range(20):
        try:
            if kernel == "forward":
                hopper.forward(site, None, Into(out))
            else:
                delta = attention.delta_of(grad, out, None, total)
                hopper.gradients(site, None, grad, lse, delta, total, *mine)
        except (TimeoutError, AssertionError):
            return
        found = [out] if kernel == "forward" else mine
        exact = [want.detach()] if kernel == "forward" else grads
        if not all(relative_error(a, b) < 4e-3 for a, b in zip(found, exact, strict=True)):
            return
    pytest.fail("the emulation missed it")


def test_compiles_for_the_device() -> None:
    """Into machine code of sm90, with next to nothing in local memory."""
    run = [sys.executable, "-m", "tests.compile_hopper"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [line.rsplit(" ", 1) for line in result.stdout.splitlines()]
    names = [f"forward {name}" for name in ("64", "128", *(f"{n}, unfinished" for n in (64, 128, 256)))]
    names += ["backward 128", "backward 128, apart"]
    assert [name for name, _ in found] == names
    assert all(int(count) <= 16 for _, count in found), found
