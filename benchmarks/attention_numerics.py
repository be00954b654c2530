"""Errors of whole models against float64: the bf16 model as it is, and the same model compiled with kp.

    python benchmarks/attention_numerics.py [--seeds 8] [--length 1024] [--out DIR]

Root mean square over fresh random weights and inputs (one draw is noise): outputs of inference, outputs and
parameter gradients of training, two sequences each. The reference is the sdpa model in float64, for both
implementations: the eager one computes its softmax in float32, where the fill of a float64 mask is an
infinity. Padding takes no part: its labels are -100 and its logits are not compared, since the two
implementations mean different things there.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import torch
import transformers
from harness import RESULTS, bar, write

import kp_compiler


def settings(length: int) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """name -> (class, config, extra inputs)"""
    common: dict[str, Any] = {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": length,
    }  # fmt: skip
    line = torch.arange(length, device="cuda")
    positions = torch.stack([line.remainder(length // 3), line.remainder(length // 5)])
    left, right = (torch.ones(2, length, dtype=torch.long, device="cuda") for _ in range(2))
    left[0, : length // 8] = 0
    right[1, -length // 5 :] = 0
    llama = transformers.LlamaForCausalLM
    return {
        "llama": (llama, transformers.LlamaConfig(**common), {}),
        "llama packed": (llama, transformers.LlamaConfig(**common), {"position_ids": positions}),
        "llama left-padded": (llama, transformers.LlamaConfig(**common), {"attention_mask": left}),
        "mistral window": (
            transformers.MistralForCausalLM,
            transformers.MistralConfig(**common, sliding_window=100),
            {},
        ),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**common), {}),
        "bert right-padded": (
            transformers.BertForMaskedLM,
            transformers.BertConfig(
                hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=1024,
                vocab_size=512, max_position_embeddings=length, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            {"attention_mask": right},
        ),
        "gpt2": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(
                n_embd=512, n_layer=2, n_head=8, n_positions=length, vocab_size=512,
                attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            ),
            {},
        ),
        "t5": (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(
                d_model=512, d_kv=64, d_ff=1024, num_layers=2, num_heads=8, vocab_size=512, dropout_rate=0.0,
                decoder_start_token_id=0,
            ),
            {},
        ),
    }  # fmt: skip


WHAT = ("inference outputs", "training outputs", "gradients")


def evaluate(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Logits where there are labels, without and with gradients, and all parameter gradients, flat and in
    float64."""
    kept = inputs["labels"] >= 0
    with torch.no_grad():
        logits = model(**inputs).logits[kept].double()
    out = model(**inputs)
    out.loss.backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    return logits, out.logits.detach()[kept].double(), torch.cat(grads)


def errors(name: str, implementation: str, length: int, seeds: int) -> Iterator[dict[str, tuple[float, ...]]]:
    """Relative errors of WHAT, plain bf16 and kp, for each seed. One compile serves all of
    them."""
    cls, config, extra = settings(length)[name]
    torch._dynamo.reset()
    model = models.build(cls, config)
    model.set_attn_implementation(implementation)
    compiled = torch.compile(model, backend="kp", options={"strict": True})
    for seed in range(seeds):
        torch.manual_seed(seed)
        model.load_state_dict(models.build(cls, config).state_dict())
        ids = torch.randint(0, 512, (2, length), device="cuda")
        labels = ids.masked_fill(extra["attention_mask"] == 0, -100) if "attention_mask" in extra else ids
        inputs = {"input_ids": ids, "labels": labels, **extra}
        if cls is not transformers.BertForMaskedLM:
            inputs["use_cache"] = False
        reference = copy.deepcopy(model).double()
        reference.set_attn_implementation("sdpa")
        exact = evaluate(reference, inputs)
        found = {}
        for arm, run in (("plain", model), ("kp", compiled)):
            got = evaluate(run, inputs)
            found[arm] = tuple(float((g - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True))
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="*", default=None)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256
    rows, bars = [], []
    for name in options.models or settings(options.length):
        for implementation in ("sdpa", "eager"):
            sums = {"plain": [0.0] * len(WHAT), "kp": [0.0] * len(WHAT)}
            for found in errors(name, implementation, options.length, options.seeds):
                for arm, pair in found.items():
                    sums[arm] = [total + value**2 for total, value in zip(sums[arm], pair, strict=True)]
            rms = {arm: [(total / options.seeds) ** 0.5 for total in pair] for arm, pair in sums.items()}
            for index, what in enumerate(WHAT):
                plain, mine = rms["plain"][index], rms["kp"][index]
                rows.append(
                    {
                        "model": name,
                        "implementation": implementation,
                        "what": what,
                        "rms_plain": plain,
                        "rms_kp": mine,
                        "seeds": options.seeds,
                    }
                )
                bars.append(
                    bar(
                        f"{name} {implementation} {what}: RMS error against plain bf16",
                        mine / plain,
                        1.1,
                        at_least=False,
                    )
                )
            print(name, implementation, {k: [f"{x:.2e}" for x in v] for k, v in rms.items()}, flush=True)
    write(
        "attention_numerics",
        rows,
        bars,
        {"transformers": transformers.__version__, "kp": kp_compiler.__version__},
        options.out,
    )


if __name__ == "__main__":
    main()
