"""Proofs of masks: the formula equals the mask on random inputs, and what can't be proved says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kp_compiler.lowering import reference
from kp_compiler.lowering.ops import parse_spec
from tests.corpus.masks import BUILDERS, B, Builder, D, H, lines
from tests.helpers import recorded_calls, run_both


def attend(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def function(q, k, v, *extra):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(q.shape[2], k.shape[2], *extra))

    return function


def qkv(s: int, t: int, width: int = D) -> tuple[torch.Tensor, ...]:
    return torch.randn(B, H, s, width), torch.randn(B, H, t, width), torch.randn(B, H, t, width)


SIZES = [(24, 24), (13, 13), (17, 30)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", BUILDERS, ids=[b.name for b in BUILDERS])
def test_formula_is_the_mask(case: Builder, sizes: tuple[int, int]) -> None:
    """The proved formula, evaluated on index tensors, is the mask that the user's code computes."""
    s, t = sizes
    if ("packed" in case.name or "segments" in case.name) and s != t:
        pytest.skip("documents are packed in self-attention")
    extra = case.extra(s, t)
    inputs = (*qkv(s, t), *extra)
    ((q, k, _, operands, scalars, text),) = recorded_calls(
        attend(case.build), inputs, "kp.reference_attention"
    )
    spec = parse_spec(text)
    assert spec.mask.kind != "tensor"
    assert not spec.biases
    got = reference.mask(spec.mask, operands, scalars, q @ k.transpose(-2, -1))
    got = torch.ones((), dtype=torch.bool) if got is None else got
    want = case.build(s, t, *extra)
    want = want if want.dtype == torch.bool else want > -1e8
    assert torch.equal(got.expand(B, H, s, t), want.expand(B, H, s, t)), spec.mask.expr
    assert all(operand.numel() <= B * (max(s, t) + 9) for operand in operands)
    if s == t:
        assert set(spec.mask.parts) == set(case.parts), spec.mask


@pytest.mark.parametrize("case", BUILDERS, ids=[b.name for b in BUILDERS])
def test_proved_attention_is_the_original(case: Builder) -> None:
    outcome = run_both(attend(case.build), (*qkv(24, 24), *case.extra(24, 24)))
    assert [site.status for site in outcome.report.sites] == ["rewritten"], outcome.report.why("")
    assert outcome.error < 2e-6


# -------------------------------------------------------------------------------- low-precision index tensors


def narrow(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def build(s, t):
        rows, columns = torch.arange(s).to(dtype)[:, None], torch.arange(t).to(dtype)[None, :]
        return columns <= rows

    return build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_positions_that_round_or_wrap_are_not_indices(dtype: torch.dtype) -> None:
    """bfloat16 rounds from 257 on and int8 wraps at 128: `k <= q` of such numbers is not causal."""
    outcome = run_both(attend(narrow(dtype)), qkv(300, 300))
    assert outcome.error < 2e-6, outcome.report.why("")


def test_unsigned_differences_wrap() -> None:
    def build(s, t):
        position = torch.arange(t, dtype=torch.uint8)
        return (position[None, :] - position[:, None]) <= 0

    outcome = run_both(attend(build), qkv(24, 24))
    assert outcome.error < 2e-6, outcome.report.why("")


# ----------------------------------------------------------------------------------------- what is not proved


def notes_of(function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[str]:
    outcome = run_both(function, inputs)
    assert outcome.error < 2e-6
    (site,) = outcome.report.sites
    return [note.code for note in site.notes]


def test_mask_given_as_input() -> None:
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    assert notes_of(function, (*qkv(24, 24), mask)) == ["mask-is-input"]
    assert notes_of(function, (*qkv(24, 24), torch.zeros(24, 24).masked_fill(~mask, -math.inf))) == [
        "mask-is-input"
    ]


def test_mask_indexed_by_unknown_values() -> None:
    """A row of a causal mask for each query, chosen by values kp knows nothing about."""

    def function(q, k, v, order):
        rows, columns = lines(24, 24)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(columns <= rows)[order])

    assert notes_of(function, (*qkv(24, 24), torch.randperm(24))) == ["mask-unproved"]


def test_mask_written_to_after_it_was_built() -> None:
    def function(q, k, v):
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
        mask[:, 0] = False
        mask[3] = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert notes_of(function, qkv(24, 24)) == ["mask-unproved"]


def test_mask_written_to_between_two_readers() -> None:
    """The second call sees another mask than the first, although both read the same tensor."""

    def function(q, k, v):
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[..., :5] = True
        return first + 2.0 * F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = run_both(function, qkv(24, 24))
    assert outcome.error < 2e-6, outcome.report.why("")


def test_padding_written_to_between_two_masks() -> None:
    def function(q, k, v, keep):
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=(keep != 0)[:, None, None, :])
        keep[:, 3:] = 0
        return first + F.scaled_dot_product_attention(q, k, v, attn_mask=(keep != 0)[:, None, None, :])

    inputs = (*qkv(24, 24), torch.ones(B, 24, dtype=torch.long))
    want = function(*inputs[:3], inputs[3].clone())
    got = run_both(function, inputs).got[0]
    torch.testing.assert_close(got, want)


def test_tensor_of_scores_size_is_a_bias() -> None:
    """A learned additive term is no mask; its site is rewritten with the term kept."""

    def function(q, k, v, table):
        rows, columns = lines(24, 24)
        bias = F.embedding((columns - rows).clamp(-8, 7) + 8, table).permute(2, 0, 1)
        return F.softmax(q @ k.transpose(-2, -1) + bias, dim=-1) @ v

    outcome = run_both(function, (*qkv(24, 24), torch.randn(16, H)), train=True)
    (site,) = outcome.report.sites
    assert site.spec == "full, 1 bias"
    assert [note.code for note in site.notes] == ["bias"]
    assert outcome.error < 2e-5


def test_weak_added_fill_with_dead_rows_stays_a_bias() -> None:
    """−1e9 added to a fully masked row leaves a rounded trace of the scores: no mask has that meaning."""

    def function(q, k, v, keep):
        mask = torch.where((keep != 0)[:, None, None, :], 0.0, -1e9)
        return F.softmax(q @ k.transpose(-2, -1) + mask, dim=-1) @ v

    keep = torch.ones(B, 24, dtype=torch.long)
    keep[0] = 0
    assert notes_of(function, (*qkv(24, 24), keep)) == ["weak-fill"]


def test_threshold_is_a_setting() -> None:
    def function(q, k, v):
        rows, columns = lines(24, 24)
        return F.softmax(q @ k.transpose(-2, -1) + torch.where(columns <= rows, 0.0, -1e6), dim=-1) @ v

    specs = []
    for threshold in (-1e8, -1e5):
        torch._dynamo.reset()
        options = {"prove_masks": {"fill_threshold": threshold}}
        specs.append(run_both(function, qkv(24, 24), options=options).report.sites[0].spec)
    assert specs == ["full, 1 bias", "causal"]
