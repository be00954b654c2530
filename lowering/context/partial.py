"""Attention of some queries over some of their keys, and its gradients, in plain PyTorch: what a schedule is
made of, and what it means.

    lse = forward(q, k, v, task, sink, into)                     what other keys gave is taken in
    backward(grad, q, k, v, task, lse, delta, dq, dk, dv)        adds

Gradients that are still to be added to are in float32 or wider. lse is that of all keys in `backward`, where
p = exp(s − lse), and delta = rowsum(grad ∘ out) of the whole result: partial gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.into import Into
from kp_compiler.specs import AttentionSpec

Partial = tuple[Tensor, Tensor]  # out and lse
Turn = Callable[[Callable[[], Tensor | None]], Any]  # makes a call


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task, sink: Tensor | None, into: Into) -> Tensor:
    """q [B,H,n,D], k [B,K,m,D], v [B,K,m,E]; writes [B,H,n,E] and returns lse [B,H,n]. `sink` [H]: a score of
    every query without a value."""
    scores = _masked(_scores(q, k, task.spec), task.keep(q, k))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - _finite(lse).unsqueeze(-1))
    found = (_grouped(weights, k.shape[1]) @ _wide(v).unsqueeze(2)).flatten(1, 2), lse
    if sink is not None:
        found = merged(found, (torch.zeros_like(found[0]), sink.to(lse.dtype)[:, None].expand_as(lse)))
    if (earlier := into.earlier()) is not None:
        found = merged(found, earlier)
    into.put(found[0])
    return found[1]


def beside(q: Tensor, count: int) -> AbstractContextManager[Turn]:
    """So many results, each computed by a turn of what this gives, may be computed beside each other."""
    return nullcontext(lambda call: call())


def merged(one: Partial, other: Partial) -> Partial:
    """Of two sets of keys, both."""
    lse = torch.logaddexp(one[1], other[1])
    shares = (torch.exp(x - _finite(lse)).unsqueeze(-1) for x in (one[1], other[1]))
    return sum(share * out for share, out in zip(shares, (one[0], other[0]), strict=True)), lse  # type: ignore[return-value]


def delta_of(grad: Tensor, out: Tensor) -> Tensor:
    return (_wide(grad) * out).sum(-1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, task: Task, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Add to dq, without the scale, to dk and to dv."""
    heads = k.shape[1]
    spec = task.spec
    scores = _scores(q, k, spec)
    p = torch.exp(_masked(scores, task.keep(q, k)) - _finite(lse).unsqueeze(-1))
    grad = _grouped(_wide(grad), heads)
    p, delta = _grouped(p, heads), _grouped(delta.unsqueeze(-1), heads)
    dv += (p.mT @ grad).sum(2)
    ds = p * (grad @ _wide(v).unsqueeze(2).mT - delta)
    if spec.softcap is not None:
        ds = ds * (1.0 - (_grouped(scores, heads) / spec.softcap).square())
    dq += (ds @ _wide(k).unsqueeze(2)).flatten(1, 2)
    dk += (ds.mT @ _grouped(_wide(q), heads)).sum(2) * spec.scale


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    scores = (_grouped(_wide(q), k.shape[1]) @ _wide(k).unsqueeze(2).mT).flatten(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores


def _masked(scores: Tensor, keep: Tensor | None) -> Tensor:
    return scores if keep is None else scores.masked_fill(~keep, float("-inf"))


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B,H,…] by the key head that each head reads."""
    return x.unflatten(1, (heads, -1))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _finite(lse: Tensor) -> Tensor:
    """Zero for rows without a key, whose weights are then zeros."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
