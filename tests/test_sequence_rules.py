"""Operations that treat tokens one by one, as models spell them, and ones that look like them and do not. Of
the first kind, what some tokens give does not depend on the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kp_compiler.passes import sequence
from kp_compiler.report import Rejection
from tests.test_sequence import traced

TOKENS, DIM, EXPERTS, CHOICES = 24, 32, 4, 2
torch.manual_seed(0)
TABLE, ROUTER = torch.randn(EXPERTS, DIM), torch.randn(EXPERTS, DIM)
WEIGHTS = torch.randn(EXPERTS, DIM, DIM) * 0.2
PLACES, FIRST = torch.randn(TOKENS, DIM), torch.zeros(2, 1, 4, dtype=torch.long)
Function = Callable[[Tensor], Tensor]  # [B,n,D] to as much


class Net(nn.Module):
    """Attention behind a function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        for name, value in (("table", TABLE), ("router", ROUTER), ("weights", WEIGHTS)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x)
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def ids_of(x: Tensor) -> Tensor:
    """[B,n,choices] of experts."""
    return (x @ ROUTER.T).topk(CHOICES, -1).indices


def grouped(y: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(y, WEIGHTS, ends)


def experts(
    x: Tensor,
    *,
    key: Function = lambda ids: ids,
    counted: Callable[[Tensor, Tensor], Tensor] = lambda order, ids: order,
    bins: int = EXPERTS,
    descending: bool = False,
    sums: int = 1,
    rows: Function = lambda rows: rows,
    back: Function = lambda rows: rows,
    add: bool = False,
) -> Tensor:
    """Each token by the weights of the experts it chooses, as transformers' "grouped_mm" does it."""
    import transformers.integrations.moe  # noqa: F401 has the operator

    flat = x.flatten(0, 1)
    ids = ids_of(x).reshape(-1)
    order, numbers = key(ids).sort(descending=descending)
    y = flat[rows(numbers) // CHOICES]
    ends = torch.histc(counted(order, ids).float(), bins=bins, min=0, max=bins - 1).int()
    for _ in range(sums):
        ends = ends.cumsum(0, dtype=torch.int32)
    y = grouped(F.silu(grouped(y, ends)) + TABLE[order], ends)
    if add:
        return torch.zeros_like(flat).index_add_(0, numbers // CHOICES, y).view_as(x)
    turned = torch.empty_like(numbers)
    turned[back(numbers)] = torch.arange(len(numbers))
    return y[turned].view(len(flat), CHOICES, -1).sum(1).view_as(x)


def assembled(x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], DIM)
    y[..., : DIM // 2].copy_(x[..., DIM // 2 :])
    y[..., DIM // 2 :] = x[..., : DIM // 2]
    return y


def chosen(x: Tensor) -> Tensor:
    scores = (x @ TABLE.T).sigmoid()
    kept = torch.zeros_like(scores).scatter_(-1, scores.topk(2, -1)[1], 1)
    some = scores.masked_fill(kept == 0, 0.0)
    weights = some.gather(-1, ids_of(x))
    return x * (weights / weights.norm(1, -1, keepdim=True).clamp_min(0.1)).sum(-1, keepdim=True)


def rotated(x: Tensor) -> Tensor:
    angle = torch.outer(x[0, :, 0], torch.arange(1, DIM // 2 + 1).float())
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def interleaved(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


def each_by_all(x: Tensor) -> Tensor:
    """As many rows of a token as there are experts, all tokens for the first one first."""
    rows = torch.bmm(x.flatten(0, 1).repeat(EXPERTS, 1).view(EXPERTS, -1, DIM), WEIGHTS)
    return rows.sum(0).view_as(x)


def one_by_one(x: Tensor) -> Tensor:
    """The weights of each row's expert."""
    rows, ids = x.flatten(0, 1).repeat_interleave(CHOICES, 0), ids_of(x).reshape(-1)
    y = torch.bmm(WEIGHTS[ids], rows.unsqueeze(-1)).squeeze(-1)
    return y.view(-1, CHOICES, DIM).sum(1).view_as(x)


def turned_by_sort(x: Tensor, **how: bool) -> Tensor:
    numbers = ids_of(x).reshape(-1).argsort()
    y = x.flatten(0, 1).repeat_interleave(CHOICES, 0)[numbers]
    return (y * 2)[numbers.argsort(**how)].view(-1, CHOICES, DIM).mean(1).view_as(x)


TOKENWISE: dict[str, Function] = {
    "experts": experts,
    "experts, added up": lambda x: experts(x, add=True),
    "experts, of counts before sorting": lambda x: experts(x, counted=lambda order, ids: ids.int()),
    "experts, one by one": one_by_one,
    "experts, all of them": each_by_all,
    "sorted and back": turned_by_sort,
    "assembled": assembled,
    "router": chosen,
    "complex": rotated,
    "interleaved": interleaved,
    "ones": lambda x: x * torch.ones(x.shape[:2]).unsqueeze(-1),
    "looked up": lambda x: x + TABLE[ids_of(x)[..., 0]],
    "taken": lambda x: x + TABLE.index_select(0, ids_of(x)[0, :, 0]),
    "gathered": lambda x: x + TABLE[:, 0].expand(2, -1).gather(1, ids_of(x)[..., 0])[..., None],
    "one-hot": lambda x: x + F.one_hot(ids_of(x), EXPERTS).sum(-2).float() @ TABLE,
    "einsum": lambda x: x + torch.einsum("bnd,ed,ef->bnf", x, TABLE, TABLE),
    "einsum over heads": lambda x: torch.einsum("bnd,nbd->bnd", x, x.transpose(0, 1)),
    "norm": lambda x: x / x.norm(2, -1, keepdim=True),
    "largest": lambda x: x - x.max(-1, keepdim=True)[0] + x.argmax(-1)[..., None] + x.logsumexp(-1, True),
    "padded": lambda x: F.pad(x[..., 1:], (1, 0)) + F.pad(x, (0, 0, 0, 0)),
    "gate": lambda x: F.glu(torch.cat([x, x.narrow(-1, 0, DIM)], -1), -1),
    "repeated": lambda x: x.repeat(1, 1, 2)[..., :DIM] + x[..., torch.arange(DIM).flip(0)],
    "beside": lambda x: torch.stack([x, TABLE[0].expand_as(x)]).sum(0),
    "masked": lambda x: written_by(x, x > 0),
    "normalised": lambda x: F.normalize(x, dim=-1) + x.new_zeros(2, 1, DIM),
    "by a vector": lambda x: x * (x @ TABLE[0])[..., None],
    "by a vector's parts": lambda x: x * torch.take_along_dim(x, ids_of(x), dim=-1)[..., :1],
    "running": lambda x: x.cumsum(-1),
}
MIXED: dict[str, tuple[Function, str]] = {
    "experts by descending ids": (lambda x: experts(x, descending=True), "another order"),
    "experts by other ids": (
        lambda x: experts(x, key=lambda ids: ids % 2, counted=lambda order, ids: ids), "sorted by what",
    ),
    "experts by other counts": (lambda x: experts(x, counted=lambda order, _: order % 3), "sorted by what"),
    "experts of some counts": (lambda x: experts(x, counted=lambda o, _: o.clamp(0, 2)), "sorted by"),
    "experts in other rows": (lambda x: experts(x, rows=lambda rows: rows + 1), "numbers of a rank's rows"),
    "experts back to other rows": (lambda x: experts(x, back=lambda rows: rows // 2), "by their numbers"),
    "experts of other tokens": (lambda x: experts(x, rows=lambda rows: rows // 2), "by their numbers"),
    "numbers": (lambda x: x + ids_of(x).reshape(-1).argsort()[: x.shape[1], None], "by their numbers"),
    "order": (lambda x: x.sort(1)[0], "another order"),
    "sorted rows": (lambda x: sorted_by_first(x).view_as(x), "not a dimension"),
    "rows that are places": (lambda x: rows_and_places(x), "by their numbers"),
    "some batches by numbers": (lambda x: written_by(x, ids_of(x)[0, :, 0] % 2), "by their numbers"),
    "some tokens by a mask": (lambda x: written_by(x, torch.rand(2, TOKENS) < 0.5), "by a tensor"),
    "rows turned around in descending order": (
        lambda x: turned_by_sort(x, descending=True), "another order",
    ),
    "rows that were divided in place": (
        lambda x: experts(x, rows=lambda rows: rows.floor_divide_(2)), "numbers of a rank's rows",
    ),
    "counts as ends": (lambda x: experts(x, sums=0), "sorted by what"),
    "sums of ends": (lambda x: experts(x, sums=2), "only be a result"),
    "ids that may be negative": (lambda x: experts(x, key=lambda ids: ids - 1), "may be negative"),
    "ids of other fractions": (lambda x: of_fractions(x), "may be negative|sorted by what"),
    "written into a new one": (lambda x: into(x, torch.empty(2, DIM)), "not shared among ranks"),
    "a part of what is new": (lambda x: into_a_chunk(x), "not shared among ranks"),
    "matrix and vector": (lambda x: x * (x @ TABLE[0]).softmax(1)[..., None], "one over the sequence"),
    "scattered to the first": (lambda x: x.clone().scatter_(2, FIRST, 0.0), "by their numbers"),
    "added by token": (lambda x: F.linear(x[0], WEIGHTS[0], PLACES)[None] + 0 * x, "a value for each token"),
    "added to a product": (lambda x: torch.addmm(PLACES, x[0], WEIGHTS[0])[None] + 0 * x, "a value for each"),
    "every other place": (lambda x: x + torch.arange(0, 2 * x.shape[1], step=2)[:, None], "not from zero"),
    "places from one": (lambda x: x + torch.arange(1, end=x.shape[1] + 1)[:, None], "not from zero"),
    "sorted along an axis": (lambda x: x.sort(axis=1)[0], "another order"),
    "mean over no dimension": (lambda x: x - x.mean(dim=[], keepdim=True), "a sum over the tokens"),
    "all dimensions turned": (lambda x: (x.T.softmax(1)).T, "one over the sequence"),
    "turned in place": (lambda x: x.clone().transpose_(1, 2).cumsum(2).mT, "not known"),
    "tiled": (lambda x: x - x.tile(2)[..., :DIM].amax(1, keepdim=True), "one over the sequence"),
    "batches by a list": (lambda x: x[[1, 0]].cumsum(1), "not understood"),
    "as many as tokens": (lambda x: x / torch.ones(x.shape[:2]).sum(1)[:, None, None], "as many as a rank"),
    "counts": (lambda x: x * counts(ids_of(x)).sum(), "a sum over the tokens of one rank"),
    "ones that are written to": (lambda x: x * zeroed(torch.ones(x.shape[:2]))[..., None], "a value for"),
    "shifted into a new one": (lambda x: shifted(x, x.new_empty(x.shape)), "some tokens"),
    "read before": (lambda x: read_before(x), "not shared among ranks"),
    "norm over tokens": (lambda x: x / x.norm(2, 1, keepdim=True), "one over the sequence"),
    "taken by numbers": (lambda x: x + x.gather(1, ids_of(x))[..., :1], "by their numbers"),
    "looked up in tokens": (lambda x: x[0][ids_of(x)[0, :, 0]].expand_as(x), "its first argument"),
    "scattered": (lambda x: x.clone().scatter_(1, ids_of(x), 0.0), "by their numbers"),
    "einsum of tokens": (lambda x: torch.einsum("bnd,bmd,bme->bne", x, x, x), "different dimensions"),
    "einsum over tokens": (lambda x: x + torch.einsum("bnd->bd", x)[:, None], "sums over the sequence"),
    "matmul of tokens": (lambda x: x @ (x.mT @ x), "sums over the sequence"),
    "padded by a token": (lambda x: F.pad(x, (0, 0, 1, -1)), "adds tokens"),
    "taken": (lambda x: torch.take(x, ids_of(x))[..., :1].expand_as(x), "not known"),
    "rolled": (lambda x: x.roll(1, 1), "not known"),
    "stacked": (lambda x: torch.stack([x, x[:, :1].expand_as(x)]).sum(0), "some tokens"),
    "unbound": (lambda x: torch.stack(x.unbind(1)[::-1], 1), "some tokens"),
    "number": (lambda x: x * x.sum().item(), "a sum over|not known"),
}  # fmt: skip


def counts(ids: Tensor) -> Tensor:
    return torch.histc(ids.reshape(-1).float(), EXPERTS, 0, EXPERTS - 1)


def written_by(x: Tensor, index: Tensor) -> Tensor:
    x = x.clone()
    x[index] = 0.0
    return x


def sorted_by_first(x: Tensor) -> Tensor:
    return x.flatten(0, 1)[ids_of(x)[..., 0].reshape(-1).argsort()]


def rows_and_places(x: Tensor) -> Tensor:
    """The same numbers are rows of one batch and positions."""
    order, i = x[0, :, 0].argsort(), torch.arange(x.shape[1])
    back = torch.empty_like(order)
    back[order] = i
    return x[0][order][back] + i[:, None] + 0 * x


def of_fractions(x: Tensor) -> Tensor:
    """Whole numbers are sorted, and what they were cut off from is counted."""
    scores = (x @ ROUTER.T).topk(CHOICES, -1).values.abs().reshape(-1)
    order = scores.long().argsort()
    ends = torch.histc(scores, EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
    y = grouped(x.flatten(0, 1)[order // CHOICES], ends)
    return y[order.argsort()].view(-1, CHOICES, DIM).sum(1).view_as(x)


def into(x: Tensor, y: Tensor) -> Tensor:
    torch.sum(x, 1, out=y)
    return x - y[:, None]


def into_a_chunk(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    a, _ = y.chunk(2, -1)
    y.copy_(x)
    return x + a.mean(1, keepdim=True).repeat(1, 1, 2)


def zeroed(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def shifted(x: Tensor, y: Tensor) -> Tensor:
    y[:, 0] = 0
    y[:, 1:] = x[:, :-1]
    return y


def read_before(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    y[:, 0] = 1
    z = y.cumsum(1)
    y.copy_(x)
    return y + z


@pytest.mark.parametrize("name", TOKENWISE)
def test_tokens_one_by_one(name: str) -> None:
    function, x = TOKENWISE[name], torch.randn(2, TOKENS, DIM)
    _, found = traced(Net(function), x)
    assert isinstance(found, sequence.Sharing), found
    some = torch.randperm(TOKENS)[: TOKENS // 2]
    torch.testing.assert_close(function(x[:, some]), function(x)[:, some], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_tokens_with_others(name: str) -> None:
    function, why = MIXED[name]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        _, found = traced(Net(function), torch.randn(2, TOKENS, DIM))
    assert isinstance(found, Rejection) and found.code == "mixes-tokens"
    assert re.search(why, found.text), found.text


class Remembering(nn.Module):
    """Which writes what it sees to what outlives a call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("last", torch.zeros(2, DIM))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        if self.how == "last":
            self.last.copy_(x[:, -1])
        elif self.how == "mean":
            self.last.lerp_(x.mean(1), 0.1)
        elif self.how == "cache":
            cache[:, :3] = x[:, -3:]
        elif self.how == "counted":
            self.last.add_(1)
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


@pytest.mark.parametrize("how", ["last", "mean", "cache", "counted"])
def test_what_outlives_a_call(how: str) -> None:
    _, found = traced(Remembering(how), torch.randn(2, TOKENS, DIM), torch.zeros(2, 8, DIM))
    assert isinstance(found, sequence.Sharing) == (how == "counted"), found


LENGTHS: dict[str, tuple[Function, str]] = {
    "from the end": (lambda x: x + (torch.arange(x.shape[1]) - x.shape[1])[:, None], "length"),
    "fraction": (lambda x: x + (torch.arange(x.shape[1]) / x.shape[1])[:, None], "length"),
    "the last": (lambda x: x + (torch.arange(x.shape[1]) == x.shape[1] - 1)[:, None], "length"),
    "scaled": (lambda x: x * x.shape[1], "length"),
    "other numbers": (lambda x: x * 24 + ((torch.arange(x.shape[1]) + 2) % 8)[:, None], ""),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_as_numbers(name: str, dynamic: bool) -> None:
    """A rank's are not the sequence's. Where shapes are static only places can be told from other numbers."""
    function, why = LENGTHS[name]
    x = torch.randn(2, TOKENS, DIM)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    _, found = traced(Net(function), x)
    if not why or (name == "scaled" and not dynamic):
        assert isinstance(found, sequence.Sharing), found
    else:
        assert isinstance(found, Rejection) and why in found.text, found


PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "squares": (lambda x, y: F.mse_loss(x, y, reduction="sum"), True),
    "squares of other tokens": (lambda x, y: F.l1_loss(x[0, :, None], y[0, None], reduction="sum"), False),
    "squares of places": (lambda x, y: F.mse_loss(x[0], PLACES, reduction="sum"), False),
    "classes": (lambda x, y: F.cross_entropy(x.flatten(0, 1), ids_of(y)[..., 0].reshape(-1)), True),
    "classes of a batch": (lambda x, y: F.cross_entropy(x.mT, ids_of(y)[..., 0]), True),
    "classes of others": (lambda x, y: F.cross_entropy(x.flatten(0, 1), turned_ids(y)), False),
    "squared sum": (lambda x, y: x.mean(1) * x.mean(1), False),
    "square of a sum": (lambda x, y: (s := x.mean(1)) * s, False),
    "over a sum": (lambda x, y: 1 / x.sum(1), False),
    "more than a sum": (lambda x, y: x.sum(1) + 1, False),
    "clamped sum": (lambda x, y: x.sum(1).clamp(min=0), False),
    "mean of some": (lambda x, y: (x * y).sum() / y.sum().clamp(min=1), True),
}  # fmt: skip


def turned_ids(x: Tensor) -> Tensor:
    return ids_of(x)[..., 0].T.reshape(-1)


@pytest.mark.parametrize("name", PAIRS)
def test_sums_over_tokens(name: str) -> None:
    function, good = PAIRS[name]

    def both(x: Tensor, y: Tensor) -> Any:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), function(x, y)

    _, found = traced(both, torch.randn(2, TOKENS, DIM), torch.randn(2, TOKENS, DIM))
    assert isinstance(found, sequence.Sharing) == good, found


def test_rows_that_are_given_in_order() -> None:
    """A result in the order of a sort is no part of the whole one."""

    def function(x: Tensor) -> Any:
        y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
        return y, x[0, :, 0].sort()[0]

    _, found = traced(function, torch.randn(2, TOKENS, DIM))
    assert isinstance(found, Rejection) and "in the order of a sort" in found.text, found
