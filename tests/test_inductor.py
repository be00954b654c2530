"""Lowering to Inductor: its own attention patterns stay away, users' passes run, nothing global changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import kp_compiler
from kp_compiler.capture import merged
from tests.helpers import relative_error
from tests.test_zoo import run_model
from tests.zoo import models as zoo

pytestmark = pytest.mark.inductor
OPTIONS = {"cpu_rewrites": True, "strict": True}


def softmax_over_heads(q, k, v):
    """Inductor's pattern 13 takes this for attention on torch 2.13; it normalises over another dimension."""
    return F.softmax(q @ k.transpose(-2, -1) * 0.25, dim=1) @ v


def keys_permuted(q, k, v):
    """[B, S, H, D] with B = 1 and S = H: Inductor mistakes which dimension `permute(0, 2, 3, 1)` moves."""
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    return F.softmax(torch.matmul(q, k).div(4.0), dim=-1).matmul(v)


def probabilities_kept(q, k, v):
    probs = F.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1)
    return probs @ v, probs


@pytest.mark.parametrize(
    ("function", "shape", "code"),
    [
        (softmax_over_heads, (2, 4, 8, 16), "softmax-dim"),
        (keys_permuted, (1, 4, 4, 16), None),
        (probabilities_kept, (2, 4, 8, 16), "probabilities-used"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_inductors_patterns_do_not_fuse(function: Any, shape: tuple[int, ...], code: str | None) -> None:
    inputs = [torch.randn(shape) for _ in range(3)]
    counters.clear()
    with kp_compiler.capture_reports() as reports, torch.no_grad():
        got = torch.compile(function, backend="kp", options=OPTIONS, fullgraph=True)(*inputs)
    want = function(*inputs)
    got, want = (x[0] if isinstance(x, tuple) else x for x in (got, want))
    torch.testing.assert_close(got, want)
    assert counters["inductor"]["fuse_attention"] == 0
    (site,) = merged(reports).sites
    assert (site.reason.code if site.reason else None) == code


def test_global_config_is_untouched() -> None:
    before = copy.deepcopy(inductor_config.get_config_copy())
    with torch.no_grad():
        torch.compile(softmax_over_heads, backend="kp", options=OPTIONS)(
            *(torch.randn(2, 4, 8, 16) for _ in range(3))
        )
    assert inductor_config.get_config_copy() == before
    assert inductor_config.joint_custom_pre_pass is None


@pytest.mark.zoo
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llama_forward_and_backward(implementation: str) -> None:
    model, inputs = zoo.llama_of_one_layer(implementation).train(), zoo.tokens()
    want, want_grads = run_model(model, model, inputs, True)
    counters.clear()
    with kp_compiler.capture_reports() as reports:
        got, got_grads = run_model(model, torch.compile(model, backend="kp", options=OPTIONS), inputs, True)
    assert len(merged(reports).rewritten()) == 1
    assert counters["inductor"]["fuse_attention"] == 0
    assert relative_error(got, want) < 1e-5
    for name, grad in want_grads.items():
        assert relative_error(got_grads[name], grad) < 1e-3, name


def test_mode_is_passed_on() -> None:
    inputs = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    with torch.no_grad():
        got = torch.compile(probabilities_kept, backend="kp", mode="reduce-overhead")(*inputs)
        torch.testing.assert_close(got, probabilities_kept(*inputs))
        torch._dynamo.reset()
        options = {**OPTIONS, "mode": "max-autotune-no-cudagraphs", "inductor": {"max_autotune": False}}
        got = torch.compile(softmax_over_heads, backend="kp", options=options)(*inputs)
        torch.testing.assert_close(got, softmax_over_heads(*inputs))


class Counting(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A user's pass: counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> None:
        return None  # never cached


@pytest.mark.parametrize("key", ["joint_custom_pre_pass", "joint_custom_post_pass"])
def test_users_own_pass_still_runs(key: str) -> None:
    mine = Counting()
    options = {**OPTIONS, "inductor": {key: mine}}
    inputs = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    with torch.no_grad():
        got = torch.compile(softmax_over_heads, backend="kp", options=options)(*inputs)
    torch.testing.assert_close(got, softmax_over_heads(*inputs))
    assert mine.graphs == 1


def test_no_barrier_is_left() -> None:
    """The no-op that keeps patterns away is taken out again before code is generated."""
    graphs: list[str] = []

    class Look(Counting):
        def __call__(self, graph: torch.fx.Graph) -> None:
            graphs.append(str(graph))

    options = {**OPTIONS, "inductor": {"post_grad_custom_post_pass": Look()}}
    with torch.no_grad():
        inputs = [torch.randn(2, 4, 8, 16) for _ in range(3)]
        torch.compile(softmax_over_heads, backend="kp", options=options)(*inputs)
    assert graphs
    assert not any("clamp_min" in text for text in graphs)
