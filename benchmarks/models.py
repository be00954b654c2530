"""The Hugging Face models the benchmarks run: random weights, one copy of them, several spellings of
attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
import transformers

transformers.logging.set_verbosity_error()

HAND = "kp_hand_written"


def _causal(
    module: Any,
    q: Any,
    k: Any,
    v: Any,
    attention_mask: Any,
    scaling: Any = None,
    dropout: float = 0.0,
    **_: Any,
) -> Any:
    """What a user writes by hand for a causal model: a plain causal call, no mask, K and V not repeated."""
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _bidirectional(
    module: Any,
    q: Any,
    k: Any,
    v: Any,
    attention_mask: Any,
    scaling: Any = None,
    dropout: float = 0.0,
    **_: Any,
) -> Any:
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def register_hand_written() -> None:
    """Register the hand-written attention functions with transformers."""
    for name, function in ((HAND, _causal), (f"{HAND}_full", _bidirectional)):
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, _no_mask)


# The hidden size of the MLP, 2.75 times the width as in TinyLlama. Not free to choose: the figures the bars
# were taken from (one H100, 2026-11-22) have this size, since the hand-written model's peak there grows by
# 41 KiB a token, 2 bytes of (3 * 5632 + 2 * 2048) elements. The `wide` suite has a wider one.
FFN = 5632


def llama(layers: int = 4, heads: int = 32, kv_heads: int = 8, ffn: int = FFN) -> Any:
    """Llama with d 2048."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=32000, max_position_embeddings=131072,
    )  # fmt: skip
    return build(transformers.LlamaForCausalLM, config)


def mistral(window: int = 1024) -> Any:
    config = transformers.MistralConfig(
        hidden_size=2048, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=131072, sliding_window=window,
    )  # fmt: skip
    return build(transformers.MistralForCausalLM, config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=2048, n_layer=4, n_head=32, n_positions=16384, vocab_size=32000,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return build(transformers.GPT2LMHeadModel, config)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=16384, vocab_size=32000, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return build(transformers.BertForMaskedLM, config)


def build(cls: Any, config: Any, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    """A randomly initialised model, on the GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return cls(config)
    finally:
        torch.set_default_dtype(before)


def variant(model: Any, implementation: str) -> Any:
    """The same weights with another attention implementation."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation(implementation)
    return twin
