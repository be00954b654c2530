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
    ends = torch.histc(counted(order, ids).float(), bins=bins, min=0, max=bins - 1).cumsum(
        0, dtype=torch.int32
    )
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


def turned_by_sort(x: Tensor) -> Tensor:
    numbers = ids_of(x).reshape(-1).argsort()
    y = x.flatten(0, 1).repeat_interleave(CHOICES, 0)[numbers]
    return (y * 2)[numbers.argsort()].view(-1, CHOICES, DIM).mean(1).view_as(x)


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
    "running": lambda x: x.cumsum(-1),
}
MIXED: dict[str, tuple[Function, str]] = {
    "experts by descending ids": (lambda x: experts(x, descending=True), "another order"),
    "experts by other ids": (
        lambda x: experts(x, key=lambda ids: ids % 2, counted=lambda order, ids: ids), "sorted by what",
    ),
    "experts by other counts": (lambda x: experts(x, counted=lambda order, _: order // 2), "sorted by what"),
    "experts of some counts": (lambda x: experts(x, counted=lambda o, _: o.clamp(max=2)), "sorted by"),
    "experts in other rows": (lambda x: experts(x, rows=lambda rows: rows + 1), "numbers of a rank's rows"),
    "experts back to other rows": (lambda x: experts(x, back=lambda rows: rows // 2), "by their numbers"),
    "experts of other tokens": (lambda x: experts(x, rows=lambda rows: rows // 2), "by their numbers"),
    "numbers": (lambda x: x + ids_of(x).reshape(-1).argsort()[: x.shape[1], None], "by their numbers"),
    "order": (lambda x: x.sort(1)[0], "another order"),
    "sorted rows": (lambda x: sorted_by_first(x).view_as(x), "not a dimension"),
    "rows that are places": (lambda x: rows_and_places(x), "by their numbers"),
    "some batches by numbers": (lambda x: written_by(x, ids_of(x)[0, :, 0] % 2), "by their numbers"),
    "some tokens by a mask": (lambda x: written_by(x, torch.rand(2, TOKENS) < 0.5), "by a tensor"),
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


def test_rows_that_are_given_in_order() -> None:
    """A result in the order of a sort is no part of the whole one."""

    def function(x: Tensor) -> Any:
        y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
        return y, x[0, :, 0].sort()[0]

    _, found = traced(function, torch.randn(2, TOKENS, DIM))
    assert isinstance(found, Rejection) and "in the order of a sort" in found.text, found
