"""What a site reads: values written to or scaled on the way, heads of keys and values however arranged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import run_both

B, H, S, D = 2, 4, 24, 16


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def causal(length: int) -> torch.Tensor:
    line = torch.arange(length)
    return line[None, :] <= line[:, None]


WRITES: list[Callable[..., torch.Tensor]] = []


def writes(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    WRITES.append(function)
    return function


@writes
def mask_added_in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores += torch.where(causal(S), 0.0, torch.finfo(q.dtype).min)
    return F.softmax(scores, dim=-1) @ v


@writes
def mask_filled_in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores.mul_(0.25).masked_fill_(~causal(S), float("-inf"))
    return F.softmax(scores, dim=-1) @ v


@writes
def mask_refined_in_place(q, k, v):
    mask = causal(S)
    mask &= torch.arange(S)[None, :] > torch.arange(S)[:, None] - 5
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("function", WRITES, ids=lambda f: f.__name__)
def test_writes_that_only_build_the_site(function: Callable[..., torch.Tensor]) -> None:
    outcome = run_both(function, qkv(), train=True)
    (site,) = outcome.report.sites
    assert site.status == "rewritten", outcome.report.why("")
    assert str(site.spec).startswith("causal")
    assert outcome.error < 1e-5


def test_value_scaled_on_the_way_to_another_dtype() -> None:
    """What is multiplied into the values is part of the result."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v.float() * 2.0)

    q, k, v = qkv()
    outcome = run_both(function, (q, k, v.half()), train=True)
    assert outcome.error < 1e-3, outcome.report.why("")


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 4), (4, 2), (2, 1), (1, 4)])
def test_keys_and_values_repeated_differently(key_heads: int, value_heads: int) -> None:
    """One operand with repeated heads and one without, or repeated by another factor."""

    def function(q, k, v):
        k, v = k.repeat_interleave(H // key_heads, 1), v.repeat_interleave(H // value_heads, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = qkv()
    outcome = run_both(function, (q, k[:, :key_heads], v[:, :value_heads]), train=True)
    assert outcome.error < 1e-5, outcome.report.why("")


def test_heads_tiled_instead_of_repeated() -> None:
    """`repeat` lays heads out in another order than grouped-query attention has them."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True)

    q, k, v = qkv()
    outcome = run_both(function, (q, k[:, :2], v[:, :2]), train=True)
    assert outcome.error < 1e-5
    assert outcome.report.sites[0].shape.startswith(f"B{B} H{H} ")


def test_one_query_head_for_many_key_heads() -> None:
    def function(q, k, v):
        return F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v

    q, k, v = qkv()
    outcome = run_both(function, (q[:, :1], k, v), train=True)
    assert outcome.error < 1e-5, outcome.report.why("")


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_floor_below_two_finite_fills(train: bool) -> None:
    """XGLM: a mask of finfo.min is added, and the sum is kept from becoming an infinity."""
    lowest = torch.finfo(torch.float32).min

    def attend(q, k, v):
        scores = q @ k.mT + torch.where(causal(S), 0.0, lowest)
        return F.softmax(torch.max(scores, torch.tensor(lowest)), dim=-1) @ v

    outcome = run_both(attend, qkv(), train=train)
    assert [site.spec for site in outcome.report.sites] == ["causal"]
    assert outcome.error < 1e-5


def test_floor_that_changes_scores_is_refused() -> None:
    def attend(q, k, v):
        return F.softmax(torch.max(q @ k.mT, torch.tensor(-1.0)), dim=-1) @ v

    outcome = run_both(attend, qkv())
    assert [site.reason.code for site in outcome.report.sites] == ["unknown-op"]
    assert outcome.error < 1e-5
