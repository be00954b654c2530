"""The thirty ways real models write attention, each reduced to its core.

Every form is a function of tensors and returns what its model returns. Sizes differ pairwise (B 2, H 4, S 24,
D 16) so that no dimension can be mistaken for another. `expect` is the recognised mask (`str(MaskSpec)`),
with what stands beside it, or, for the one form kp does not take, the code of the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

B, H, KV, S, D = 2, 4, 2, 24, 16
NEG = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Form:
    """One spelling. `inputs(dtype)` makes fresh random tensors; floating-point ones get gradients in training
    tests."""

    name: str
    number: int
    function: Callable[..., torch.Tensor]
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    expect: str
    refused: str | None = None


FORMS: list[Form] = []


def form(
    number: int, expect: str, inputs: Callable[[torch.dtype], tuple[Any, ...]], refused: str | None = None
) -> Any:
    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        FORMS.append(Form(function.__name__, number, function, inputs, expect, refused))
        return function

    return register


def qkv(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D, dtype=dtype) for _ in range(3))


def qkv_gqa(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(B, H, S, D, dtype=dtype),
        torch.randn(B, KV, S, D, dtype=dtype),
        torch.randn(B, KV, S, D, dtype=dtype),
    )


def bshd(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, S, H, D, dtype=dtype) for _ in range(3))


def folded(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B * H, S, D, dtype=dtype) for _ in range(3))


def hidden(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, S, H * D, dtype=dtype) / 4 for _ in range(3))


def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def hf_mask(s: int, device: Any = None) -> torch.Tensor:
    """Causal, as transformers builds it."""
    q = torch.arange(s, device=device)[None, None, :, None]
    k = torch.arange(s, device=device)[None, None, None, :]
    return (q.new_ones((), dtype=torch.bool) & (k <= q)).expand(B, -1, s, s)


def additive(q: torch.Tensor, s: int) -> torch.Tensor:
    """The causal mask as a term to add, as transformers' eager attention has it."""
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    return torch.where(hf_mask(s, q.device), zero, torch.finfo(q.dtype).min)


# ------------------------------------------------------------------------------------------------- calls of
# SDPA


@form(1, "causal", qkv)
def sdpa_is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@form(2, "causal", qkv_gqa)
def sdpa_mask_built_in_graph(q, k, v):
    k, v = repeat_kv(k, H // KV), repeat_kv(v, H // KV)
    return (
        F.scaled_dot_product_attention(q, k, v, attn_mask=hf_mask(q.shape[2], q.device))
        .transpose(1, 2)
        .contiguous()
    )


@form(
    2, "causal+document", lambda dtype: (*qkv(dtype), torch.arange(S).remainder(10).expand(B, S).contiguous())
)
def sdpa_packed_documents(q, k, v, position_ids):
    s = q.shape[2]
    lead = torch.arange(B, device=q.device)[:, None, None, None]
    rows = torch.arange(s, device=q.device)[None, None, :, None]
    columns = torch.arange(s, device=q.device)[None, None, None, :]
    segments = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    mask = (segments[lead, rows] == segments[lead, columns]) & (
        position_ids[lead, columns] <= position_ids[lead, rows]
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@form(3, "causal", qkv_gqa)
def sdpa_enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# ----------------------------------------------------------------------------------------------- Hugging Face
# eager


@form(4, "causal", qkv_gqa)
def hf_eager_llama(q, k, v):
    k, v = repeat_kv(k, H // KV), repeat_kv(v, H // KV)
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    weights = F.softmax(weights + additive(q, q.shape[2]), dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@form(5, "full", qkv)
def hf_eager_vit(q, k, v):
    weights = torch.matmul(q, k.transpose(-1, -2)) * D**-0.5
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@form(6, "causal", qkv)
def hf_eager_gpt2(q, k, v):
    weights = torch.matmul(q, k.transpose(-1, -2)) * D**-0.5
    mask = additive(q, q.shape[2])
    weights = F.softmax(weights + mask, dim=-1).type(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


@form(7, "full", hidden)
def whisper_prescaled_query(x, y, z):
    q, k, v = ((t * (D**-0.5) if t is x else t).view(B, S, H, D).transpose(1, 2) for t in (x, y, z))
    weights = F.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1)
    return torch.matmul(weights, v).transpose(1, 2).reshape(B, S, -1)


@form(7, "full, 1 bias", lambda dtype: (*qkv(dtype), torch.randn(1, H, S, S, dtype=dtype)))
def timm_prescaled_with_bias(q, k, v, bias):
    q = q * D**-0.5
    attn = (q @ k.transpose(-2, -1) + bias).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(B, S, H * D)


@form(8, "causal", qkv)
def nanogpt_manual(q, k, v):
    s = q.size(-2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(torch.tril(torch.ones(s, s, device=q.device)).view(1, 1, s, s) == 0, float("-inf"))
    y = F.dropout(F.softmax(att, dim=-1), 0.0) @ v
    return y.transpose(1, 2).contiguous().view(B, s, H * D)


@form(8, "tensor", lambda dtype: (*qkv(dtype), torch.tril(torch.ones(1, 1, 64, 64))))
def nanogpt_manual_with_buffer(q, k, v, buffer):
    s = q.size(-2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(buffer[:, :, :s, :s] == 0, float("-inf"))
    return F.softmax(att, dim=-1) @ v


@form(9, "causal", qkv)
def gptj_float32_scores(q, k, v):
    weights = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
    weights = weights / torch.sqrt(torch.tensor(16, dtype=torch.float32))
    weights = weights + torch.where(hf_mask(q.shape[2], q.device), 0.0, NEG)
    weights = F.softmax(weights, dim=-1).to(v.dtype)
    return torch.matmul(weights, v)


@form(9, "causal", bshd)
def meta_llama_reference(xq, xk, xv):
    xq, xk, xv = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)
    scores = torch.matmul(xq, xk.transpose(2, 3)) / math.sqrt(D)
    mask = torch.triu(torch.full((S, S), float("-inf"), device=xq.device), diagonal=1)
    scores = F.softmax((scores + mask).float(), dim=-1).type_as(xq)
    return torch.matmul(scores, xv).transpose(1, 2).contiguous().view(B, S, -1)


@form(10, "causal, 1 bias", lambda dtype: (*qkv(dtype), torch.randn(32, H, dtype=dtype)))
def t5_relative_bias(q, k, v, table):
    rows = torch.arange(S, device=q.device)
    buckets = (rows[None, :] - rows[:, None]).clamp(-15, 16) + 15
    bias = F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)
    bias = bias + additive(q, S)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(weights, v)


# ------------------------------------------------------------------------------------------------------------
# ALiBi


@form(11, "causal, 1 bias", lambda dtype: (*folded(dtype), torch.rand(B * H, 1, S, dtype=dtype)))
def bloom_baddbmm(q, k, v, alibi):
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=D**-0.5).view(B, H, S, -1)
    scores = scores + additive(q, S)
    probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    probs = F.dropout(probs, 0.0).view(B * H, S, -1)
    context = torch.bmm(probs, v).view(B, H, S, D)
    return context.permute(0, 2, 1, 3).reshape(B, S, H * D)


@form(12, "causal, 1 bias", lambda dtype: (*qkv(dtype), torch.rand(H, 1, S, dtype=dtype)))
def mpt_alibi(q, k, v, position_bias):
    scores = torch.matmul(q, k.transpose(-1, -2)) * D**-0.5
    scores = scores + position_bias
    scores = scores.masked_fill(~hf_mask(S, q.device), torch.finfo(q.dtype).min)
    weights = F.softmax(scores.float(), dim=-1).to(v.dtype)
    return torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(B, S, -1)


@form(
    13,
    "causal, 1 bias",
    lambda dtype: (
        torch.randn(B, H, S, D, dtype=dtype),
        torch.randn(B, 1, S, D, dtype=dtype),
        torch.randn(B, 1, S, D, dtype=dtype),
        torch.rand(B * H, 1, S, dtype=dtype),
    ),
)
def falcon_multi_query_alibi(q, k, v, alibi):
    mask = additive(q, S)
    scores = q @ k.transpose(-1, -2)
    scores = scores.view(B, H, S, S) + alibi.view(B, H, 1, -1)
    scores *= 1.0 / math.sqrt(D)
    probs = F.softmax(scores + mask, dim=-1, dtype=q.dtype)
    return (probs @ v).view(B, H, S, D).permute(0, 2, 1, 3).reshape(B, S, H * D)


# --------------------------------------------------------------------------------------------- changes of the
# scores


@form(14, "causal, softcap 30", qkv_gqa)
def gemma2_softcap(q, k, v):
    k, v = repeat_kv(k, H // KV), repeat_kv(v, H // KV)
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    weights = torch.tanh(weights / 30.0) * 30.0
    weights = weights + additive(q, S)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@form(15, "causal, sink", lambda dtype: (*qkv(dtype), torch.randn(H, dtype=dtype)))
def gpt_oss_sinks(q, k, v, sinks):
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    weights = weights + additive(q, S)
    sinks = sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    combined = torch.cat([weights, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(probs[..., :-1], v).transpose(1, 2).contiguous()


@form(16, "causal+window(8)", qkv)
def mistral_window(q, k, v):
    rows = torch.arange(S, device=q.device)[None, None, :, None]
    columns = torch.arange(S, device=q.device)[None, None, None, :]
    mask = (columns > rows - 8) & (columns <= rows)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(B, -1, S, S))


@form(17, "causal", lambda dtype: (*bshd(dtype), torch.rand(D, dtype=dtype), torch.rand(D, dtype=dtype)))
def qwen3_normed_heads(x, y, v, wq, wk):
    def norm(t, w):
        return w * (t.float() * torch.rsqrt(t.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(t.dtype)

    q, k, v = norm(x, wq).transpose(1, 2), norm(y, wk).transpose(1, 2), v.transpose(1, 2)
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    weights = weights + additive(q, S)
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


@form(
    18,
    "causal",
    lambda dtype: (
        torch.randn(B, H, S, D + 8, dtype=dtype),
        torch.randn(B, H, S, D, dtype=dtype),
        torch.randn(B, 1, S, 8, dtype=dtype),
        torch.randn(B, H, S, 32, dtype=dtype),
    ),
)
def deepseek_mla(q, k_nope, k_rope, v):
    k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], -1)), dim=-1)
    weights = torch.matmul(q, k.transpose(2, 3)) * (D + 8) ** -0.5
    weights = weights + additive(q, S)
    return torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


@form(19, "causal", qkv)
def llama4_query_temperature(q, k, v):
    positions = torch.arange(S, device=q.device)
    temperature = torch.log1p(torch.floor((positions.float() + 1.0) / 8)) * 0.1 + 1.0
    q = (q * temperature.view(1, 1, S, 1)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hf_mask(S, q.device))


# -------------------------------------------------------------------------------------------- folded heads
# and einsum


@form(20, "causal", hidden)
def fairseq_bmm(x, y, z):
    q, k, v = (
        (t * D**-0.5 if t is x else t).view(B, S, H, D).transpose(1, 2).reshape(B * H, S, D)
        for t in (x, y, z)
    )
    weights = torch.bmm(q, k.transpose(1, 2))
    mask = additive(x, S)
    weights = (weights.view(B, H, S, S) + mask).view(B * H, S, S)
    weights = F.softmax(weights, dim=-1)
    out = torch.bmm(F.dropout(weights, p=0.1, training=False), v)
    return out.view(B, H, S, D).transpose(1, 2).reshape(B, S, H * D)


@form(21, "full", folded)
def diffusers_baddbmm(q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=D**-0.5)
    return torch.bmm(scores.softmax(dim=-1).to(q.dtype), v)


@form(22, "full", qkv)
def einsum_four_dims(q, k, v):
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * D**-0.5
    return torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)


@form(22, "full", folded)
def einsum_three_dims(q, k, v):
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * D**-0.5
    return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)


@form(22, "causal", bshd)
def einsum_sequence_first(q, k, v):
    scores = torch.einsum("bshd,bthd->bhst", q, k * D**-0.5)
    scores = scores + torch.triu(torch.full((S, S), -torch.inf, device=q.device), 1).to(scores.dtype)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def _xlnet_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v = (torch.randn(S, B, H, D, dtype=dtype) for _ in range(3))
    return (
        q,
        k,
        v,
        torch.randn(2 * S, B, H, D, dtype=dtype),
        torch.randn(H, D, dtype=dtype),
        torch.randn(H, D, dtype=dtype),
    )


@form(23, "full, 1 bias", _xlnet_inputs)
def xlnet_two_terms(q, k, v, r, r_w_bias, r_r_bias):
    ac = torch.einsum("ibnd,jbnd->bnij", q + r_w_bias, k)
    bd = torch.einsum("ibnd,jbnd->bnij", q + r_r_bias, r)
    x = bd.reshape(B, H, 2 * S, S)[:, :, 1:, :].reshape(B, H, S, 2 * S - 1)
    bd = torch.index_select(x, 3, torch.arange(S, device=q.device))
    prob = F.softmax((ac + bd) * D**-0.5, dim=3)
    return torch.einsum("bnij,jbnd->ibnd", prob, v)


def _windows(dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v = (torch.randn(B * 3, H, S, D, dtype=dtype) for _ in range(3))
    return q, k, v, torch.randn(50, H, dtype=dtype), torch.randn(3, S, S, dtype=dtype)


@form(24, "full, 2 biases", _windows)
def swin_windows(q, k, v, table, shift):
    index = (torch.arange(S, device=q.device)[:, None] - torch.arange(S, device=q.device)[None, :]) + S
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    bias = table[index.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous()
    scores = scores + bias.unsqueeze(0)
    scores = scores.view(B, 3, H, S, S) + shift.unsqueeze(1).unsqueeze(0)
    probs = F.softmax(scores.view(-1, H, S, S), dim=-1)
    return torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous().view(B * 3, S, -1)


def _grid(dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v = (torch.randn(B * H, S, D, dtype=dtype) for _ in range(3))
    return q, k, v, torch.randn(4, 4, D, dtype=dtype), torch.randn(6, 6, D, dtype=dtype)


@form(25, "full, 1 bias", _grid)
def sam_decomposed_positions(q, k, v, rel_h, rel_w):
    scores = (q * D**-0.5) @ k.transpose(-2, -1)
    grid = q.reshape(B * H, 4, 6, D)
    by_row = torch.einsum("bhwc,hkc->bhwk", grid, rel_h)
    by_column = torch.einsum("bhwc,wkc->bhwk", grid, rel_w)
    bias = (by_row[:, :, :, :, None] + by_column[:, :, :, None, :]).reshape_as(scores)
    return F.softmax(scores + bias, dtype=torch.float32, dim=-1).to(q.dtype) @ v


def _deberta(dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        *folded(dtype),
        torch.randn(B * H, 2 * S, D, dtype=dtype),
        torch.ones(B, 1, S, S, dtype=torch.bool),
    )


@form(26, "tensor, 1 bias", _deberta)
def deberta_disentangled(q, k, v, positions, mask):
    scale = math.sqrt(D * 3)
    scores = torch.bmm(q, k.transpose(-1, -2) / scale)
    rows = torch.arange(S, device=q.device)
    index = (rows[:, None] - rows[None, :] + S).clamp(0, 2 * S - 1).expand(B * H, S, S)
    c2p = torch.gather(torch.bmm(q, positions.transpose(-1, -2)), dim=-1, index=index) / scale
    p2c = (
        torch.gather(torch.bmm(k, positions.transpose(-1, -2)), dim=-1, index=index).transpose(-1, -2) / scale
    )
    scores = (scores + (c2p + p2c)).view(-1, H, S, S)
    scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
    probs = F.softmax(scores, dim=-1)
    out = torch.bmm(probs.view(-1, S, S), v)
    return out.view(-1, H, S, D).permute(0, 2, 1, 3).contiguous()


def _mha(dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        *hidden(dtype),
        torch.randn(3 * H * D, H * D, dtype=dtype) / 8,
        torch.randn(H * D, H * D, dtype=dtype) / 8,
    )


@form(27, "full", _mha)
def multi_head_attention_module(x, y, z, w_in, w_out):
    out, _ = F.multi_head_attention_forward(
        x.transpose(0, 1), y.transpose(0, 1), z.transpose(0, 1), H * D, H, w_in, None, None, None, False, 0.0,
        w_out, None, need_weights=False,
    )  # fmt: skip
    return out


def _flex_causal(b, h, q, k):
    return q >= k


@form(28, "flex", qkv, refused="already-fused")
def flex_attention(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention as flex

    return flex(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))


@form(
    29,
    "",
    lambda dtype: tuple(torch.randn(B * H, 4, S, D, dtype=dtype) for _ in range(3)),
    refused="unknown-op",
)
def longformer_banded(q, k, v):
    scores = torch.einsum("bcxd,bcyd->bcxy", q, k)
    padded = F.pad(scores, (0, 0, 0, 1)).view(B * H, 4, S, S + 1)[..., :-1]
    probs = F.softmax(padded, dim=-1)
    unfolded = F.pad(probs, (0, S)).as_strided((B * H, 4, S, S), (4 * S * 2 * S, S * 2 * S, 2 * S, 1))
    return torch.einsum("bcwd,bcdh->bcwh", unfolded, v)


@form(30, "causal", qkv)
def codegen_float32_query_key(q, k, v):
    q, k = q.to(torch.float32), k.to(torch.float32)
    weights = torch.matmul(q, k.transpose(-1, -2)) / 4.0
    weights = weights + torch.where(hf_mask(S, q.device), 0.0, NEG)
    weights = F.softmax(weights, dim=-1).to(v.dtype)
    return torch.matmul(F.dropout(weights, 0.0), v)
