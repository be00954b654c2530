"""Sparse attention as users get it: what choosing costs, the whole operation, and a model.

    python benchmarks/sparse_attention.py [--lengths 32768 131072] [--tokens 65536] [--repeats 5] [--out DIR]

`content` at 90 % sparsity, bfloat16, random data: speed does not depend on what is chosen, only on how much.
An operation has 32 query and 8 key heads, D128, under a causal mask; it is `scaled_dot_product_attention`
compiled with kp, forward alone, and forward and backward. "choosing" is `kp::select_blocks` alone, beside
kp's dense forward. The model is a Llama of transformers (4 layers, hidden size 2048, 16 query and 4 key
heads) at `--tokens` tokens, forward: with sparse attention, with kp as it is, and the sdpa spelling under
Inductor, whose mask is a tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import torch.nn.functional as F
import transformers
from attention_models import causal_inputs, forward_step
from harness import RESULTS, bar, peak_gib, recorded, time_interleaved, warm, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kp_compiler
from kp_compiler.lowering.select import select_blocks
from kp_compiler.specs import AttentionSpec, MaskSpec, SparseSpec

HEADS, KV_HEADS, WIDTH = 32, 8, 128
OPTIONS = {"sparse_attention": {"mode": "require", "selector": "content", "sparsity": 0.9}}
CHOOSING = {32768: 4.0, 131072: 2.0}  # percent of the dense forward
WHOLE = {32768: 6.0, 131072: 7.0}  # times cuDNN
ARMS = ("kp, sparse", "kp", "inductor-sdpa")


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return causal(q, k, v)


def compiled(sparse: bool) -> Callable[..., Tensor]:
    return torch.compile(
        causal, backend="kp", options=OPTIONS if sparse else {"attention": {"impl": "triton"}}
    )


def tensors(length: int) -> list[Tensor]:
    def one(heads: int) -> Tensor:
        x = torch.randn(1, length, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    return [one(HEADS), one(KV_HEADS), one(KV_HEADS)]


def operation(length: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds, all as CUDA graphs."""
    leaves = tensors(length)
    grad = torch.randn_like(leaves[0])
    spec = AttentionSpec(
        WIDTH**-0.5, MaskSpec("causal", "k <= q"), sparse=SparseSpec("content", 0.1)
    ).to_json()
    steps: dict[str, Callable[[], Any]] = {}
    for name, function in (("cudnn", cudnn), ("kp", compiled(False)), ("kp, sparse", compiled(True))):

        def forward(function: Any = function) -> None:
            with torch.no_grad():
                function(*leaves)

        def both(function: Any = function) -> None:
            torch.autograd.grad(function(*leaves), leaves, grad)

        for mode, step in (("forward", forward), ("forward and backward", both)):
            if warm(name, step):
                steps[f"{name}/{mode}"] = recorded(step)

    def choosing() -> None:
        select_blocks()(leaves[0].detach(), leaves[1].detach(), [], [], [], spec)

    warm("choosing", choosing)
    steps["choosing/forward"] = recorded(choosing)
    times = time_interleaved(steps, repeats, 0.02)
    rows = []
    for key, ms in times.items():
        name, mode = key.split("/")
        rows.append({"setting": f"operation {length}", "mode": mode, "arm": name, "ms": round(ms, 4)})
        print(rows[-1], flush=True)
    return rows


def model(tokens: int, repeats: int) -> list[dict[str, Any]]:
    llama = models.llama(4, 16, 4).eval()
    inputs = causal_inputs(tokens, False)
    steps, memory = {}, {}
    for name in ARMS:
        options = OPTIONS if name == "kp, sparse" else None
        backend = "inductor" if name.startswith("inductor") else "kp"
        arm = torch.compile(models.variant(llama, "sdpa"), backend=backend, options=options)
        step = forward_step(arm, inputs)
        if warm(name, step, 2):
            steps[name], memory[name] = step, peak_gib(step)
    times = time_interleaved(steps, repeats)
    rows = []
    for name in ARMS:
        ms, gib = times.get(name), memory.get(name)
        row = {"setting": f"llama {tokens}", "mode": "forward", "arm": name}
        rows.append({**row, "ms": ms and round(ms, 3), "peak_gib": gib and round(gib, 3)})
        print(rows[-1], flush=True)
    return rows


def bars_of(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    found = {(r["setting"], r["mode"], r["arm"]): r["ms"] for r in rows}

    def ratio(setting: str, mode: str, a: str, b: str) -> float | None:
        x, y = (found.get((setting, mode, arm)) for arm in (a, b))
        return x / y if x and y else None

    bars = []
    for length, most in CHOOSING.items():
        share = ratio(f"operation {length}", "forward", "choosing", "kp")
        if share is not None:
            name = f"choosing, {length} tokens, percent of the dense forward"
            bars.append(bar(name, 100 * share, most, at_least=False))
        value = ratio(f"operation {length}", "forward", "cudnn", "kp, sparse")
        if value is not None:
            bars.append(bar(f"whole operation, {length} tokens, forward over cuDNN", value, WHOLE[length]))
    value = ratio("operation 32768", "forward and backward", "cudnn", "kp, sparse")
    bars.append(bar("whole operation, 32768 tokens, forward and backward over cuDNN", value, 5.0))
    value = ratio(f"llama {tokens}", "forward", "kp", "kp, sparse")
    bars.append(bar(f"Llama, {tokens} tokens, forward over kp without sparse attention", value, 2.3))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=list(CHOOSING))
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for length in options.lengths for row in operation(length, options.repeats)]
    rows += model(options.tokens, options.repeats)
    peers = {"transformers": transformers.__version__, "kp": kp_compiler.__version__}
    write("sparse_attention", rows, bars_of(rows, options.tokens), peers, options.out)


if __name__ == "__main__":
    main()
