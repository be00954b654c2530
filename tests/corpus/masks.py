"""Masks as user code builds them, each with the conjuncts that it should be proved to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
