"""Tiny real `transformers` models: what each is fed, its number of attention sites, the masks they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()

LENGTH, LAYERS, VOCAB, WINDOW = 37, 2, 96, 8  # an odd length that no other size equals


@dataclass(frozen=True)
class Family:
    """`make(implementation)` builds the model, `inputs()` its keyword arguments. `sites` is the number of
    attention sites, `specs` what they are recognised as, by implementation where they differ."""

    name: str
    make: Callable[[str], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: int
    specs: dict[str, set[str]]
    implementations: tuple[str, ...] = ("eager", "sdpa")
    refused: tuple[str, ...] = ()  # codes of the sites that are no attention: routers
    training: bool = True  # whether its training forward is captured as one graph


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length))


def tokens() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def left_padded() -> dict[str, Any]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9] = 0
    return {**tokens(), "attention_mask": mask}


def packed() -> dict[str, Any]:
    positions = torch.stack([torch.arange(LENGTH).remainder(11), torch.arange(LENGTH).remainder(20)])
    return {**tokens(), "position_ids": positions}


def right_padded() -> dict[str, Any]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -7:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 24, 24)}


def encoder_and_decoder() -> dict[str, Any]:
    return {"input_ids": ids(29), "decoder_input_ids": ids(), "use_cache": False}


def build(
    model: str, config: str, *, pooler: bool = True, **settings: Any
) -> Callable[[str], torch.nn.Module]:
    """A model of random weights. `initializer_range` is wide, so that a wrong mask or scale shows."""

    def make(implementation: str) -> torch.nn.Module:
        torch.manual_seed(3)
        made = getattr(transformers, config)(attn_implementation=implementation, **settings)
        return getattr(transformers, model)(made, **({} if pooler else {"add_pooling_layer": False}))

    return make


# One layer where more would be as it; llama has two that share what masks are made of
_DECODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "initializer_range": 0.2, "use_cache": False,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_SINGLE = {**_DECODER, "num_hidden_layers": 1}
_ENCODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def both(*specs: str) -> dict[str, set[str]]:
    return {"eager": set(specs), "sdpa": set(specs)}


llama = build("LlamaForCausalLM", "LlamaConfig", **_DECODER)
llama_of_one_layer = build("LlamaForCausalLM", "LlamaConfig", **_SINGLE)
mistral = build("MistralForCausalLM", "MistralConfig", **_SINGLE, sliding_window=WINDOW)
qwen2 = build("Qwen2ForCausalLM", "Qwen2Config", **_SINGLE)
gemma2 = build(
    "Gemma2ForCausalLM", "Gemma2Config", **_DECODER, head_dim=16, sliding_window=WINDOW,
    query_pre_attn_scalar=16, attn_logit_softcapping=20.0,
)  # fmt: skip
gpt_oss = build(
    "GptOssForCausalLM", "GptOssConfig", **_DECODER, head_dim=16, sliding_window=WINDOW, num_local_experts=2,
    num_experts_per_tok=1,
)  # fmt: skip
mixtral = build("MixtralForCausalLM", "MixtralConfig", **_SINGLE, num_local_experts=4, num_experts_per_tok=2)
deepseek = build(
    "DeepseekV3ForCausalLM", "DeepseekV3Config", **{**_DECODER, "num_key_value_heads": 4}, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_group=2,
    topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
)  # fmt: skip
cohere = build("CohereForCausalLM", "CohereConfig", **_SINGLE)
llama4 = build(
    "Llama4ForCausalLM", "Llama4TextConfig", **_DECODER, head_dim=16, attention_chunk_size=16,
    num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=96, interleave_moe_layer_step=1,
    layer_types=["chunked_attention", "full_attention"],
)  # fmt: skip
gpt2 = build(
    "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=1, n_head=4, vocab_size=VOCAB,
    initializer_range=0.2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
)  # fmt: skip
bert = build("BertModel", "BertConfig", pooler=False, **_ENCODER, vocab_size=VOCAB)
vit = build("ViTModel", "ViTConfig", pooler=False, **_ENCODER, image_size=24, patch_size=8)
bloom = build(
    "BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=1, n_head=4, vocab_size=VOCAB,
    use_cache=False, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
)  # fmt: skip
t5 = build(
    "T5ForConditionalGeneration", "T5Config", d_model=64, d_kv=16, d_ff=96, num_layers=LAYERS, num_heads=4,
    vocab_size=VOCAB, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
)  # fmt: skip

_RECENT = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20)  # older experts break the graph
CAUSAL_WINDOW = f"causal+window({WINDOW})"
FAMILIES = [
    Family("llama", llama, tokens, LAYERS, both("causal")),
    Family("llama_left_padded", llama, left_padded, LAYERS, both("causal+padding")),
    Family("llama_packed", llama, packed, LAYERS, both("causal+document")),
    Family("mistral", mistral, tokens, 1, both(CAUSAL_WINDOW)),
    Family("qwen2", qwen2, tokens, 1, both("causal")),
    Family("gpt2", gpt2, tokens, 1, both("causal")),
    Family("bert", bert, lambda: {"input_ids": ids()}, 1, both("full")),
    Family("bert_padded", bert, right_padded, 1, both("padding")),
    Family("vit", vit, images, 1, both("full")),
    Family("t5", t5, encoder_and_decoder, 3 * LAYERS, both("full, 1 bias", "causal, 1 bias", "full")),
    Family(
        "gemma2", gemma2, tokens, LAYERS, both("causal, softcap 20", f"{CAUSAL_WINDOW}, softcap 20"),
        ("eager",),
    ),
    Family(
        "gpt_oss", gpt_oss, tokens, LAYERS, both("causal, sink", f"{CAUSAL_WINDOW}, sink"), ("eager",),
        ("no-qk-product",) * LAYERS, training=_RECENT,
    ),
    Family("bloom", bloom, tokens, 1, both("causal, 1 bias"), ("eager",)),
]  # fmt: skip


def logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
