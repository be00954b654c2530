"""Rows with every key masked: zero, NaN or the mean of all values, as in the original, gradients too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import relative_error, run_both

NEG = torch.finfo(torch.float32).min
B, H, S, D, DEAD = 2, 4, 24, 16, 4


def inputs() -> tuple[torch.Tensor, ...]:
    """q, k, v and left padding of DEAD tokens in batch 0: under a causal mask those rows see nothing."""
    keep = torch.ones(B, S, dtype=torch.long)
    keep[0, :DEAD] = 0
    return (*(torch.randn(B, H, S, D) for _ in range(3)), keep)


def kept(keep: torch.Tensor) -> torch.Tensor:
    line = torch.arange(S)
    return (line[None, :] <= line[:, None]) & (keep != 0)[:, None, None, :]


def added(keep: torch.Tensor, fill: float) -> torch.Tensor:
    return torch.where(kept(keep), 0.0, fill)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * D**-0.5


def sdpa_bool(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept(keep))


def sdpa_infinite(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added(keep, -math.inf))


def sdpa_lowest(q, k, v, keep):
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's flash kernel has wrong gradients there
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added(keep, NEG))


def infinite_fill(q, k, v, keep):
    return F.softmax(scores(q, k).masked_fill(~kept(keep), -math.inf), dim=-1) @ v


def infinite_added(q, k, v, keep):
    return F.softmax(scores(q, k) + added(keep, -math.inf), dim=-1) @ v


def lowest_where(q, k, v, keep):
    return F.softmax(torch.where(kept(keep), scores(q, k), NEG), dim=-1) @ v


def lowest_fill(q, k, v, keep):
    return F.softmax(scores(q, k).masked_fill(~kept(keep), NEG), dim=-1) @ v


def lowest_added(q, k, v, keep):
    return F.softmax(scores(q, k) + added(keep, NEG), dim=-1) @ v


def large_fill(q, k, v, keep):
    return F.softmax(scores(q, k).masked_fill(~kept(keep), -1e9), dim=-1) @ v


def softcap_then_lowest_added(q, k, v, keep):
    capped = torch.tanh(scores(q, k) / 2.0) * 2.0
    return F.softmax(capped + added(keep, NEG), dim=-1) @ v


def softcap_then_lowest_fill(q, k, v, keep):
    capped = torch.tanh(scores(q, k) / 2.0) * 2.0
    return F.softmax(capped.masked_fill(~kept(keep), NEG), dim=-1) @ v


def grouped_lowest_added(q, k, v, keep):
    k, v = k[:, :2].repeat_interleave(2, dim=1), v[:, :2].repeat_interleave(2, dim=1)
    return F.softmax(scores(q, k) + added(keep, NEG), dim=-1) @ v


def sink_and_lowest_added(q, k, v, keep):
    sink = torch.linspace(-1.0, 1.0, H).reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    whole = torch.cat([scores(q, k) + added(keep, NEG), sink], dim=-1)
    return F.softmax(whole, dim=-1)[..., :-1] @ v


ZERO = [sdpa_bool, sdpa_infinite, sink_and_lowest_added]
NAN = [infinite_fill, infinite_added]
MEAN = [
    sdpa_lowest, lowest_where, lowest_fill, lowest_added, large_fill, softcap_then_lowest_added,
    softcap_then_lowest_fill, grouped_lowest_added,
]  # fmt: skip
# in training: NaN gradients, and gradients that go through the soft-cap
NOT_ON_KERNELS = {"infinite_fill", "infinite_added", "softcap_then_lowest_added"}


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("impl", ["reference", "flex", "triton"])
@pytest.mark.parametrize("function", [*ZERO, *NAN, *MEAN], ids=lambda f: f.__name__)
def test_dead_rows_keep_their_meaning(function: Callable[..., torch.Tensor], impl: str, train: bool) -> None:
    fullgraph = function is not sdpa_lowest
    outcome = run_both(
        function, inputs(), train=train, options={"attention": {"impl": impl}}, fullgraph=fullgraph
    )
    sites = outcome.report.sites
    if impl != "reference" and train and function.__name__ in NOT_ON_KERNELS:
        assert [site.reason.code for site in sites if site.reason is not None] == ["dead-rows"]
    else:
        assert [(site.status, site.impl) for site in sites] == [("rewritten", impl)], outcome.report.why("")
        assert "padding" in str(sites[0].spec)
    for got, want in zip(outcome.got, outcome.want, strict=True):
        assert torch.equal(torch.isnan(got), torch.isnan(want))
        assert relative_error(got, want) < 2e-5


def test_the_meanings_themselves() -> None:
    """What the tests above compare with is what they say it is."""
    q, k, v, keep = inputs()
    mean = v[0].mean(dim=1, keepdim=True).expand(H, DEAD, D)
    for function in ZERO:
        assert not function(q, k, v, keep)[0, :, :DEAD].any()
    for function in NAN:
        assert function(q, k, v, keep)[0, :, :DEAD].isnan().all()
    for function in (lowest_where, lowest_fill, lowest_added, large_fill):
        torch.testing.assert_close(function(q, k, v, keep)[0, :, :DEAD], mean)


def test_twin_without_dead_rows_needs_no_special_kernel() -> None:
    """Right padding leaves every row a key, but nothing in the graph says so: the meaning is kept."""
    q, k, v, keep = inputs()
    keep[0], keep[0, -DEAD:] = 1, 0
    outcome = run_both(lowest_added, (q, k, v, keep), train=True, options={"attention": {"impl": "flex"}})
    assert [site.impl for site in outcome.report.sites] == ["flex"]
    assert outcome.error < 2e-5
