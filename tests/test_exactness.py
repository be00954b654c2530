"""Spellings that only look exact: whether kp rewrites or refuses them, the result is the original's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import run_both

B, H, S, T, D = 2, 3, 5, 7, 4
CASES: list[Any] = []


def r(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(len(CASES)))


def case(*inputs: torch.Tensor, train: bool = False) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        CASES.append(pytest.param(function, inputs, train, id=function.__name__))
        return function

    return register


def A(scores, v):
    return F.softmax(scores, -1) @ v


Sm = F.softmax
q, k, v = r(B, H, S, D), r(B, H, T, D), r(B, H, T, D)
qs, ks, vs = r(B, H, S, D), r(B, H, S, D), r(B, H, S, D)


@case(q, k, v)
def scalar_before_tanh(q, k, v):
    return A(torch.tanh((q @ k.mT + 3.0) / 2) * 2, v)


@case(q, k, v, r(1, H, 1, 1))
def scalar_before_sink(q, k, v, s):
    x = q @ k.mT + 3.0
    return Sm(torch.cat([x, s.expand(B, H, S, 1)], -1), -1)[..., :-1] @ v


@case(q, k, v, r(1, H, 1, 1))
def max_before_sink(q, k, v, s):
    x = q @ k.mT
    x = x - x.amax(-1, keepdim=True)
    return Sm(torch.cat([x, s.expand(B, H, S, 1)], -1), -1)[..., :-1] @ v


@case(q, k, v)
def max_before_tanh(q, k, v):
    x = q @ k.mT
    x = x - x.amax(-1, keepdim=True)
    return A(torch.tanh(x), v)


@case(q, k, v, r(B, H, 1, 1))
def batch_sink(q, k, v, s):
    return Sm(torch.cat([q @ k.mT, s.expand(B, H, S, 1)], -1), -1)[..., :-1] @ v


@case(q * 5, k, v)
def div_trunc(q, k, v):
    return A(torch.div(q @ k.mT, 2, rounding_mode="trunc"), v)


@case(q * 5, k, v)
def cast_int(q, k, v):
    return A((q @ k.mT).long().float(), v)


@case(q, k, v)
def const_mutated(q, k, v):
    c = torch.ones(())
    c.mul_(3)
    return A((q @ k.mT) * c, v)


@case(q, k, v)
def const_mutated_fill(q, k, v):
    c = torch.full((), 2.0)
    c.fill_(0.1)
    return A((q @ k.mT) * c, v)


@case(q, k, v)
def const_trunc(q, k, v):
    c = torch.tensor(2.7).int()
    return A((q @ k.mT) * c, v)


@case(qs, ks, vs)
def arange_start_endkw(q, k, v):
    i = torch.arange(0, S)
    j2 = torch.arange(1, end=S + 1)
    return F.scaled_dot_product_attention(q, k, v, j2[None] <= i[:, None] + 2)


@case(qs, ks, vs)
def arange_stepkw(q, k, v):
    i = torch.arange(0, S)
    j = torch.arange(0, 2 * S, step=2)
    return F.scaled_dot_product_attention(q, k, v, j[None] <= i[:, None])


@case(q, k, v)
def float_mask(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    return F.scaled_dot_product_attention(q, k, v, (i - j).abs() * 0.5 <= 1.5)


@case(q, k, v)
def float_mask2(q, k, v):
    i = torch.arange(S)[:, None].float()
    j = torch.arange(T)[None].float()
    return F.scaled_dot_product_attention(q, k, v, (i - j) < 0.5)


@case(q, k, v)
def xor2(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    return F.scaled_dot_product_attention(q, k, v, (j <= i) ^ (j > 2))


@case(q, k, v)
def xor3(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    return F.scaled_dot_product_attention(q, k, v, (j <= i) ^ (j > 2) ^ (i > 3))


@case(q, k, v)
def eqbool(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    return F.scaled_dot_product_attention(q, k, v, (j <= i) == (j > 2))


@case(q, k, v)
def boolplus(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    m = ((j <= i) + (j < 3)).int() == 1
    return F.scaled_dot_product_attention(q, k, v, m)


@case(q, k, v)
def allfalse(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, torch.zeros(S, T, dtype=torch.bool))


@case(q, k, v)
def allfalse_soft(q, k, v):
    return A((q @ k.mT).masked_fill(torch.ones(S, T, dtype=torch.bool), -math.inf), v)


@case(q, k, v)
def two_fills(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    x = (q @ k.mT).masked_fill(j > i, -1e9)
    x = x.masked_fill(j < 3, -1e30)
    return A(x, v)


@case(q, k, v, torch.rand(S, T) > 0.5)
def two_fills_tensor(q, k, v, m):
    x = (q @ k.mT).masked_fill(m, -1e9)
    x = x.masked_fill(~m, -1e30)
    return A(x, v)


@case(q.bfloat16(), k.bfloat16(), v.bfloat16())
def bf16_fp32min(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    m = torch.where((j <= i) & (j > 0), 0.0, torch.finfo(torch.float32).min).to(q.dtype)
    return A(q @ k.mT + m, v)


@case(q.half(), k.half(), v.half())
def fp16_fp32min(q, k, v):
    i = torch.arange(S)[:, None]
    j = torch.arange(T)[None]
    m = torch.where((j <= i) & (j > 0), 0.0, torch.finfo(torch.float32).min).to(q.dtype)
    return A(q @ k.mT + m, v)


@case(q, k, v, train=True)
def nograd_probs(q, k, v):
    with torch.no_grad():
        p = Sm(q @ k.mT, -1)
    return p @ v


@case(q, k, v, train=True)
def nograd_scores(q, k, v):
    with torch.no_grad():
        s = q @ k.mT
    return Sm(s, -1) @ v


@case(q, k, v)
def clone_mul_(q, k, v):
    x = q.clone()
    x.mul_(3.0)
    return A(x @ k.mT, v)


@case(q, k, v)
def clone_setitem(q, k, v):
    x = q.clone()
    x[..., :2] = -x[..., 2:]
    return A(x @ k.mT, v)


@case(q, k, v)
def clone_sdpa(q, k, v):
    x = k.clone()
    x[..., :2] = 0
    return F.scaled_dot_product_attention(q, x, v)


@case(q, k, v)
def contiguous_v(q, k, v):
    x = v.transpose(1, 2).contiguous()
    x[:, 0] = 0
    return A(q @ k.mT, x.transpose(1, 2))


@case(r(B, 4, S, D), r(B, 2, T, D), r(B, 2, T, D))
def repint_set(q, k, v):
    k = k.repeat_interleave(2, 1)
    k[:, 1] = 0
    v = v.repeat_interleave(2, 1)
    return A(q @ k.mT, v)


@case(q.half(), k.half(), v.half())
def upcast_mut(q, k, v):
    a = q.float()
    a[..., 0] = 0
    b = k.float()
    return Sm(a @ b.mT, -1).to(v.dtype) @ v


@case(q, k, v)
def cache_key(q, k, v):
    m = torch.ones(S, T, dtype=torch.bool).tril()
    a = F.scaled_dot_product_attention(q, k, v, m)
    m.logical_not_()
    b = F.scaled_dot_product_attention(q, k, v, m)
    return a, b


@case(q, k, v)
def cache_key_add(q, k, v):
    m = torch.zeros(S, T).masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1), -math.inf)
    a = A(q @ k.mT + m, v)
    m.zero_()
    b = A(q @ k.mT + m, v)
    return a, b


@case(r(1, H, S, D), r(1, H, T, D), r(1, H, T, D), torch.rand(B, 1, 1, T) > 0.3)
def mask_bigger_batch(q, k, v, m):
    return A((q @ k.mT).masked_fill(m, -1e30), v)


@case(r(1, H, S, D), r(1, H, T, D), r(1, H, T, D), torch.rand(B, T) > 0.3)
def mask_bigger_batch2(q, k, v, m):
    return A((q @ k.mT).masked_fill(m[:, None, None, :], -1e30), v)


@case(r(B, 1, S, D), r(B, 1, T, D), r(B, 1, T, D), r(1, H, S, T))
def bias_bigger_heads(q, k, v, m):
    return A((q @ k.mT) + m, v)


@case(r(B, 1, S, D), r(B, 1, T, D), r(B, H, T, D))
def v_more_heads(q, k, v):
    return A((q @ k.mT), v)


@case(r(1, H, S, D), r(1, H, T, D), r(B, H, T, D))
def v_more_batch(q, k, v):
    return A((q @ k.mT), v)


@case(r(1, H, S, D), r(B, H, T, D), r(B, H, T, D))
def q_batch1(q, k, v):
    return A((q @ k.mT), v)


@pytest.mark.parametrize(("function", "inputs", "train"), CASES)
def test_result_is_the_original(function: Any, inputs: tuple[Any, ...], train: bool) -> None:
    outcome = run_both(function, inputs, train=train)
    assert [a.shape for a in outcome.got] == [b.shape for b in outcome.want]
    assert outcome.error < (1e-4 if inputs[0].dtype == torch.float32 else 1e-2), outcome.report.why("")
