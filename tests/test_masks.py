"""Proofs of masks: the formula equals the mask on random inputs, and what can't be proved says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kp_compiler.lowering import reference
from kp_compiler.lowering.ops import parse_spec
from tests.helpers import recorded_calls, run_both

NEG = torch.finfo(torch.float32).min
B, H, D = 2, 4, 16


@dataclass(frozen=True)
class Builder:
    """`build(s, t, *extra)` makes a mask as user code would; `parts` names its proved conjuncts."""

    name: str
    build: Callable[..., torch.Tensor]
    parts: tuple[str, ...]
    extra: Callable[[int, int], tuple[Any, ...]]


BUILDERS: list[Builder] = []


def nothing(s: int, t: int) -> tuple[Any, ...]:
    return ()


def builder(*parts: str, extra: Callable[[int, int], tuple[Any, ...]] = nothing) -> Any:
    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        BUILDERS.append(Builder(function.__name__, function, parts, extra))
        return function

    return register


def lines(s: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(s)[:, None], torch.arange(t)[None, :]


def positions(s: int, t: int) -> tuple[torch.Tensor]:
    """Position ids of packed documents, of different lengths in each row."""
    return (torch.stack([torch.arange(t).remainder(7), torch.arange(t).remainder(max(t // 2, 1))]),)


def padding(s: int, t: int) -> tuple[torch.Tensor]:
    keep = torch.ones(B, t, dtype=torch.long)
    keep[0, : t // 3] = 0
    keep[1, t - t // 4 :] = 0
    return (keep,)


def bool_padding(s: int, t: int) -> tuple[torch.Tensor]:
    return (padding(s, t)[0].bool(),)


def float_padding(s: int, t: int) -> tuple[torch.Tensor]:
    return (padding(s, t)[0].float() * 0.7,)


@builder("causal")
def causal(s, t):
    rows, columns = lines(s, t)
    return columns <= rows


@builder("causal")
def causal_with_offset(s, t):
    rows, columns = lines(s, t)
    return columns <= rows + (t - s)


@builder("causal")
def strictly_causal_leaves_a_dead_row(s, t):
    rows, columns = lines(s, t)
    return columns < rows


@builder("causal", "window")
def window(s, t):
    rows, columns = lines(s, t)
    return (columns <= rows) & (rows - columns < 5)


@builder("window")
def window_in_one_direction(s, t):
    rows, columns = lines(s, t)
    return columns > rows - 5


@builder("pointwise")
def window_by_absolute_distance(s, t):
    rows, columns = lines(s, t)
    return (rows - columns).abs() <= 3


@builder("causal", "chunked")
def chunked(s, t):
    rows, columns = lines(s, t)
    return (rows // 6 == columns // 6) & (columns <= rows)


@builder("chunked")
def chunked_by_rounding_mode(s, t):
    rows, columns = lines(s, t)
    return torch.div(rows, 4, rounding_mode="floor") == torch.div(columns, 4, rounding_mode="floor")


@builder("pointwise")
def strided_by_remainder(s, t):
    rows, columns = lines(s, t)
    return ((rows - columns) % 3 == 0) | (rows == columns)


@builder("prefix")
def prefix_lm(s, t):
    rows, columns = lines(s, t)
    return (columns <= rows) | (columns < 4)


@builder("prefix", extra=lambda s, t: (torch.tensor([3, 6]),))
def prefix_of_each_batch(s, t, prefix):
    rows, columns = lines(s, t)
    return ((columns <= rows) | (columns < prefix[:, None, None]))[:, None]


@builder("causal")
def tril_of_ones(s, t):
    return torch.ones(s, t, dtype=torch.bool).tril()


@builder("causal")
def tril_with_diagonal(s, t):
    return torch.tril(torch.ones(s, t), diagonal=t - s) != 0


@builder("causal")
def not_triu(s, t):
    return ~torch.triu(torch.ones(s, t, dtype=torch.bool), diagonal=1)


@builder("causal")
def triu_of_infinity(s, t):
    return torch.triu(torch.full((s, t), float("-inf")), diagonal=1)


@builder("causal")
def zeros_masked_fill(s, t):
    rows, columns = lines(s, t)
    return torch.zeros(s, t).masked_fill(columns > rows, float("-inf"))


@builder("causal")
def zeros_masked_fill_in_place(s, t):
    rows, columns = lines(s, t)
    return torch.zeros(s, t).masked_fill_(columns > rows, NEG)


@builder("causal")
def where_with_a_large_fill(s, t):
    rows, columns = lines(s, t)
    return torch.where(columns <= rows, 0.0, -1e9)


@builder("causal")
def inverted_times_lowest(s, t):
    keep = torch.ones(s, t).tril()
    return (1.0 - keep) * NEG


@builder("causal")
def outer_subtraction(s, t):
    return (torch.arange(t)[None, :] - torch.arange(s)[:, None]) <= 0


@builder("causal")
def positions_reversed(s, t):
    rows, columns = torch.arange(s).flip(0), torch.arange(t).flip(0)
    return (t - 1 - columns[None, :]) <= (s - 1 - rows[:, None])


@builder("causal", "document", extra=positions)
def packed_over_positions(s, t, position_ids):
    """As transformers 5.23 has it: causal over positions, inside one segment."""
    segments = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = segments[:, :, None] == segments[:, None, :]
    return ((position_ids[:, None, :] <= position_ids[:, :, None]) & same)[:, None]


@builder("causal", "document", extra=positions)
def packed_over_indices(s, t, position_ids):
    rows, columns = lines(s, t)
    segments = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return ((columns <= rows) & (segments[:, :, None] == segments[:, None, :]))[:, None]


@builder("causal", "document", "window", extra=positions)
def packed_with_window_over_positions(s, t, position_ids):
    segments = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    q, k = position_ids[:, :, None], position_ids[:, None, :]
    return ((k <= q) & (k > q - 3) & (segments[:, :, None] == segments[:, None, :]))[:, None]


@builder("padding", extra=padding)
def padding_of_integers(s, t, keep):
    return (keep != 0)[:, None, None, :]


@builder("padding", extra=padding)
def padding_cast_to_bool(s, t, keep):
    return keep.to(torch.bool)[:, None, None, :].expand(B, 1, s, t)


@builder("padding", extra=bool_padding)
def padding_of_booleans(s, t, keep):
    return keep[:, None, None, :]


@builder("padding", extra=float_padding)
def padding_of_floats(s, t, keep):
    return keep[:, None, None, :] > 0


@builder("padding", extra=padding)
def padding_as_additive_lowest(s, t, keep):
    return (1.0 - (keep[:, None, None, :] != 0).to(torch.float32)) * NEG


@builder("causal", "padding", extra=padding)
def causal_and_padding(s, t, keep):
    rows, columns = lines(s, t)
    return (columns <= rows) & (keep != 0)[:, None, None, :]


@builder("causal", "padding", "window", extra=bool_padding)
def sliding_and_padding(s, t, keep):
    rows, columns = lines(s, t)
    return torch.where((columns <= rows) & (columns > rows - 5) & keep[:, None, None, :], 0.0, NEG)


@builder("causal", "padding", extra=lambda s, t: padding(s, t + 9))
def causal_and_slice_of_a_longer_padding(s, t, keep):
    rows, columns = lines(s, t)
    return (columns <= rows).logical_and((keep[:, :t] != 0)[:, None, None, :])


@builder("padding", extra=lambda s, t: padding(s, t + 9))
def padding_from_an_offset(s, t, keep):
    return (keep[:, 9 : 9 + t] != 0)[:, None, None, :]


@builder("pointwise")
def exclusive_or(s, t):
    rows, columns = lines(s, t)
    return (columns <= rows) ^ ((columns < 4) & (rows > 6))


@builder("causal", "pointwise")
def window_of_each_head(s, t):
    rows, columns = lines(s, t)
    head = torch.arange(H)[:, None, None]
    return (columns <= rows) & (rows - columns <= 2 * head + 1)


@builder("padding", extra=padding)
def padding_of_the_other_batch(s, t, keep):
    batch = 1 - torch.arange(B)[:, None, None, None]
    return (keep[batch, torch.arange(t)[None, None, None, :]] != 0).expand(B, 1, s, t)


@builder(
    "document", "pointwise", extra=lambda s, t: (*positions(s, t), torch.arange(t).expand(B, t).contiguous())
)
def positions_in_the_segments_of_others(s, t, position_ids, others):
    """The segments say nothing about these positions: they must not become indices."""
    segments = (torch.diff(others, prepend=others[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = segments[:, :, None] == segments[:, None, :]
    return ((position_ids[:, None, :] <= position_ids[:, :, None]) & same)[:, None]


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
