"""What looks like attention and is not, or is attention that no kernel computes: each with the code of the
reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.corpus.forms import D, H, S, bshd, hidden, qkv


@dataclass(frozen=True)
class LookAlike:
    """`codes` are the reasons of its sites, in order; empty where there is no candidate at all."""

    name: str
    function: Callable[..., Any]
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    codes: tuple[str, ...]


LOOK_ALIKES: list[LookAlike] = []


def twin(*codes: str, inputs: Callable[[torch.dtype], tuple[Any, ...]] = qkv) -> Any:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LOOK_ALIKES.append(LookAlike(function.__name__, function, inputs, codes))
        return function

    return register


def scores_of(q, k):
    return torch.matmul(q, k.transpose(-2, -1)) * D**-0.5


@twin("softmax-dim")
def softmax_over_queries(q, k, v):
    return torch.matmul(F.softmax(scores_of(q, k), dim=-2), v)


@twin("softmax-dim")
def softmax_over_heads(q, k, v):
    return torch.matmul(F.softmax(scores_of(q, k), dim=1), v)


@twin("probabilities-used")
def probabilities_returned(q, k, v):
    probs = F.softmax(scores_of(q, k), dim=-1)
    return torch.matmul(probs, v), probs


@twin("probabilities-used")
def probabilities_reused(q, k, v):
    probs = F.softmax(scores_of(q, k), dim=-1)
    return torch.matmul(probs, v) + probs.mean()


@twin("probabilities-used")
def probabilities_used_twice(q, k, v):
    probs = F.softmax(scores_of(q, k), dim=-1)
    return torch.matmul(probs, v) + torch.matmul(probs, k)


@twin("mask-after-softmax")
def mask_after_softmax(q, k, v):
    probs = F.softmax(scores_of(q, k), dim=-1)
    return torch.matmul(probs * torch.ones(S, S).tril(), v)


@twin("mask-after-softmax")
def fill_after_softmax(q, k, v):
    probs = F.softmax(scores_of(q, k), dim=-1)
    return torch.matmul(probs.masked_fill(torch.ones(S, S).tril() == 0, 0.0), v)


@twin("renormalised")
def renormalised(q, k, v):
    probs = F.softmax(scores_of(q, k), dim=-1)
    probs = probs / (probs.sum(dim=-1, keepdim=True) + 1e-6)
    return torch.matmul(probs, v)


@twin()
def softmax_plus_one(q, k, v):
    e = torch.exp(scores_of(q, k))
    return torch.matmul(e / (1.0 + e.sum(dim=-1, keepdim=True)), v)


@twin()
def sigmoid_attention(q, k, v):
    return torch.matmul(torch.sigmoid(scores_of(q, k)), v)


@twin("no-qk-product", "no-qk-product")
def linear_attention(q, k, v):
    return torch.matmul(F.softmax(q, dim=-1), torch.matmul(F.softmax(k, dim=-2).transpose(-2, -1), v))


@twin("no-value-product")
def softmax_without_values(q, k, v):
    return F.softmax(scores_of(q, k), dim=-1).sum(-1) + v.sum(-1)


@twin("tensor-scale", inputs=lambda dtype: (*qkv(dtype), torch.rand(H, 1, 1, dtype=dtype)))
def swin_v2_cosine(q, k, v, logit_scale):
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (attn * logit_scale.exp()).softmax(dim=-1) @ v


@twin("no-qk-product", inputs=lambda dtype: (*hidden(dtype)[:1], torch.randn(8, H * D, dtype=dtype)))
def moe_router_linear(x, weight):
    return F.softmax(F.linear(x, weight), dim=-1).topk(2).values


@twin("no-qk-product", inputs=lambda dtype: (*hidden(dtype)[:1], torch.randn(H * D, 8, dtype=dtype)))
def moe_router_matmul(x, weight):
    return F.softmax(x @ weight, dim=-1).topk(2).values


@twin(
    "no-qk-product",
    inputs=lambda dtype: (
        *hidden(dtype)[:1],
        torch.randn(H * D, 8, dtype=dtype),
        torch.randn(8, 5, dtype=dtype),
    ),
)
def moe_soft_mixture(x, weight, experts):
    return F.softmax(x @ weight, dim=-1) @ experts


@twin("dropout-on-scores")
def dropout_on_scores(q, k, v):
    return torch.matmul(F.softmax(F.dropout(scores_of(q, k), 0.5), dim=-1), v)


@twin("mask-fill")
def weak_fill(q, k, v):
    scores = scores_of(q, k).masked_fill(torch.ones(S, S).triu(1).bool(), -100.0)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@twin("score-dependent")
def top_k_attention(q, k, v):
    scores = scores_of(q, k)
    least = scores.topk(4, dim=-1).values[..., -1:]
    return torch.matmul(F.softmax(scores.masked_fill(scores < least, float("-inf")), dim=-1), v)


@twin("no-qk-product", inputs=lambda dtype: (*qkv(dtype), torch.randn(H, H, dtype=dtype)))
def talking_heads(q, k, v, mix):
    scores = torch.einsum("bhij,hg->bgij", scores_of(q, k), mix)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@twin("mutation")
def query_overwritten(q, k, v):
    scores = scores_of(q, k)
    q.mul_(2.0)
    probs = F.softmax(scores, dim=-1)
    return torch.matmul(probs, v) + q


@twin("mutation")
def key_slice_assigned_before_values(q, k, v):
    scores = scores_of(q, k)
    k[:, :, :3] = 0.0
    return torch.matmul(F.softmax(scores, dim=-1), v) + k


@twin("unknown-op")
def temperature_by_clamp(q, k, v):
    return torch.matmul(F.softmax(scores_of(q, k).clamp(-5, 5), dim=-1), v)


@twin("scale-after-softcap")
def scaled_after_cap(q, k, v):
    scores = torch.tanh(scores_of(q, k) / 30.0) * 30.0
    return torch.matmul(F.softmax(scores * 0.5, dim=-1), v)


@twin("mixed-fill")
def two_kinds_of_fill(q, k, v):
    scores = scores_of(q, k)
    scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
    scores = scores.masked_fill(torch.ones(S, S).tril(-9).bool(), torch.finfo(scores.dtype).min)
    return torch.matmul(F.softmax(scores, dim=-1), v)


@twin("probabilities-used", inputs=bshd)
def weights_averaged_over_heads(q, k, v):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    probs = F.softmax(scores_of(q, k), dim=-1)
    return torch.matmul(probs, v), probs.mean(dim=1)
