"""Masks whose integer arithmetic is not that of numbers: proved right, kept as they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import run_both

B, H, S, D = 2, 3, 11, 4
N = 300  # more than eight bits hold
Mask = Callable[..., torch.Tensor]
CASES: list[Any] = []


def mask(*inputs: torch.Tensor, length: int = S) -> Callable[[Mask], Mask]:
    """A mask of [length, length] (or with batch dimensions) from the indices i, j and `inputs`."""

    def register(function: Mask) -> Mask:
        CASES.append(pytest.param(function, inputs, length, id=function.__name__))
        return function

    return register


labels = torch.tensor([[1, 257, 1, 258, 2, 2, 257, 1, 1, 2, 258], [0, 256, 0, 1, 1, 0, 256, 256, 1, 1, 0]])
positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3]])


def same(x):
    return (x[:, :, None] == x[:, None, :])[:, None]


def packed(changes, i, j):
    return same(changes.cumsum(-1)) & (j <= i)


# ------------------------------------------------------------------------------------ narrow and mixed types


@mask(labels)
def labels_wrap_in_uint8(i, j, x):
    return same(x.to(torch.uint8))


@mask(labels)
def padding_wraps_in_uint8(i, j, x):
    return (x.to(torch.uint8) != 0)[:, None, None, :] | (j == 0)


@mask(labels)
def labels_round_in_bfloat16(i, j, x):
    return same(x.to(torch.bfloat16))


@mask(labels + 2**24)
def labels_round_in_float32(i, j, x):
    return same(x.float())


@mask(labels + 2**32 * labels)
def labels_wrap_in_int32(i, j, x):
    return same(x.int())


@mask()
def negative_constant_in_uint8(i, j):
    return torch.where(j > i, -1, 1).to(torch.uint8) > 0


@mask()
def constant_rounds_in_half(i, j):
    return (j - i).float() + 2049 <= torch.full((), 2049.0, dtype=torch.half)


@mask(length=N)
def comparison_promotes_to_bfloat16(i, j):
    return (j <= torch.full((), 256.0, dtype=torch.bfloat16)) | (j == i)


@mask(length=N)
def difference_promotes_to_bfloat16(i, j):
    return (j - torch.full((1, 1), 200.0, dtype=torch.bfloat16) <= i) | (j == i)


@mask()
def float_coefficient_rounds(i, j):
    return ((j * 1.6) <= 14.4) | (j == i)


@mask()
def int32_overflows(i, j):
    return ((j.to(torch.int32) * 2**30) >= 0) | (j == i)


@mask()
def fill_is_truncated(i, j):
    return torch.ones(S, S, dtype=torch.long).masked_fill(j > i, 0.5) > 0


@mask()
def tensor_of_bool(i, j):
    return (torch.tensor(3, dtype=torch.bool) == torch.tensor(True)) & (j <= i)


@mask()
def bits_read_as_another_type(i, j):
    return (torch.where(j > i, -1, 1).to(torch.int8).view(torch.uint8) > 100) | (j == i)


@mask(labels > 1)
def booleans_differ(i, j, x):
    return (torch.diff(x, dim=-1, prepend=x[:, :1]).cumsum(-1) >= 1)[:, None, None, :] | (j == i)


# ------------------------------------------------------------------------------------------------- indexing


@mask()
def narrow_from_the_end(i, j):
    return (torch.arange(2 * S).narrow(0, -S, S)[None, :] >= S + 3) | (j <= i)


@mask(torch.rand(S, S) > 0.5)
def list_picks_rows(i, j, m):
    return m[[*range(1, S), 0]] | (j == i)


@mask(torch.rand(S, S, S) > 0.5)
def number_between_tensors(i, j, m):
    index = torch.arange(S)
    return m[index, 0, index][:, None] | (j == i)


@mask()
def transposed_line(i, j):
    return j <= torch.arange(S).t()[:, None]


# ------------------------------------------------------------------------------------------------- segments


@mask(positions)
def packed_documents(i, j, p):
    return packed(torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1, i, j) & (
        p[:, None, None, :] <= p[:, None, :, None]
    )


@mask(positions)
def changes_along_the_batch(i, j, p):
    return packed(torch.diff(p, prepend=p[:1] - 1, dim=0) != 1, i, j) & (
        p[:, None, None, :] <= p[:, None, :, None]
    )


@mask(torch.cat([positions, positions[:, -1:] + 1], 1))
def changes_without_the_first(i, j, p):
    p, changes = p[:, :-1], torch.diff(p, dim=-1) != 1
    return packed(changes, i, j) & (p[:, None, None, :] <= p[:, None, :, None])


@mask(positions)
def changes_rewritten_in_place(i, j, p):
    steps = torch.diff(p, prepend=p[:, :1] - 1, dim=-1)
    steps.abs_()
    return packed(steps != 1, i, j) & (p[:, None, None, :] <= p[:, None, :, None])


@mask(positions)
def changes_negated_in_place(i, j, p):
    changes = torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1
    changes.logical_not_()
    return packed(changes, i, j) & (p[:, None, None, :] <= p[:, None, :, None])


@mask(torch.zeros(1, N, dtype=torch.long), length=N)
def count_wraps_in_uint8(i, j, p):
    changes = torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1
    return same(changes.cumsum(-1, dtype=torch.uint8)) & (j <= i)


@pytest.mark.parametrize(("function", "inputs", "length"), CASES)
def test_mask(function: Mask, inputs: tuple[torch.Tensor, ...], length: int) -> None:
    torch.manual_seed(0)

    def attend(q, k, v, *given):
        line = torch.arange(length)
        keep = function(line[:, None], line[None, :], *given)
        return F.softmax((q @ k.mT).masked_fill(~keep, float("-inf")), dim=-1) @ v

    batch = B if all(x.shape[0] in (B, S) for x in inputs) else 1
    operands = tuple(torch.randn(batch, H, length, D) for _ in range(3))
    outcome = run_both(attend, (*operands, *inputs))
    assert outcome.error < 2e-5, outcome.report.why("")


def test_batch_of_the_mask_and_of_the_tokens_are_different_symbols() -> None:
    """A 2-D padding mask is indexed by the tokens' batch; a second batch size must not lose its proof."""

    def attend(q, k, v, keep):
        batch = torch.arange(q.shape[0])[:, None, None, None]
        line = torch.arange(S)
        allowed = keep[batch, line[None, None, None, :]] & (line[None, :] <= line[:, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, -2:] = False
    inputs = (*(torch.randn(B, H, S, D) for _ in range(3)), keep)
    for tensor in inputs:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    outcome = run_both(attend, inputs)
    assert [site.spec for site in outcome.report.rewritten()] == ["causal+padding"]
    assert outcome.error < 2e-5
