"""Two decoder layers of Llama-8B's shape: Inductor in bfloat16, kp in every FP8 recipe, and the peers that
can be imported.

    python benchmarks/fp8_model.py [--tokens 8192] [--repeats 9] [--arms inductor delayed …] [--out DIR]

Forward and backward, and forward without gradients; milliseconds, peak memory, seconds of the first call
(forward and backward, compiled with empty caches; libraries are loaded before), kernels of kp that cast,
memory kept for the backward pass. Arms are interleaved, a fifth of a second each (`harness.SUSTAINED`).
Transformer Engine runs its own TransformerLayer, since it can't take the model as it is; torchao converts a
copy of the model.

Transformer Engine, on a machine with a second cuDNN, takes the wrong one unless LD_LIBRARY_PATH begins with
that of torch, …/site-packages/nvidia/cudnn/lib.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, SUSTAINED, bar, installed, peak_gib, synchronise, time_interleaved, warm, write
from torch import nn

RECIPES = ("tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise")
DIM, HEADS, KV_HEADS, HIDDEN = 4096, 32, 8, 14336
WIDTH = DIM // HEADS
KERNEL = "kp_fused_cast"  # what kp's casts are called in a profile


class Layer(nn.Module):
    """RMSNorm, causal attention with rotary positions, RMSNorm, SwiGLU, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.q, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(DIM, KV_HEADS * WIDTH, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).view(*x.shape[:2], -1, WIDTH).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * cos + _rotated(t) * sin for t in (q, k))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(x.shape))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def build() -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Layers(2).to(torch.bfloat16)
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    return model


def arms(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """name -> what makes the compiled model. A peer that can't be imported raises ImportError."""

    def kp(recipe: str | None, **settings: Any) -> Any:
        options: dict[str, Any] = {"strict": True}
        if recipe is not None:
            options["fp8_linear"] = {"mode": "require", "recipe": recipe, **settings}
        return torch.compile(model, backend="kp", options=options)

    def torchao(recipe: str) -> Any:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        twin = copy.deepcopy(model)
        convert_to_float8_training(twin, config=Float8LinearConfig.from_recipe_name(TORCHAO[recipe]))
        return torch.compile(twin)

    found: dict[str, Callable[[], Any]] = {"inductor": lambda: torch.compile(model), "kp": lambda: kp(None)}
    found.update({recipe: lambda recipe=recipe: kp(recipe) for recipe in RECIPES})
    found[SAVING] = lambda: kp("tensorwise", save="fp8")
    found.update({f"torchao {name}": lambda name=name: torchao(name) for name in RECIPES if name in TORCHAO})
    found.update({f"te {name}": lambda name=name: transformer_engine(name) for name in TE})
    return found


SAVING = "tensorwise, save=fp8"
TORCHAO = {"tensorwise": "tensorwise", "rowwise": "rowwise", "rowwise_gw_hp": "rowwise_with_gw_hp"}
TE = ("tensorwise", "delayed", "blockwise")


class TransformerEngine(nn.Module):
    """Two of Transformer Engine's own layers in one of its recipes, called as the others are."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes

        self.te = te
        self.recipe = {
            "tensorwise": recipes.Float8CurrentScaling,
            "delayed": recipes.DelayedScaling,
            "blockwise": recipes.Float8BlockScaling,
        }[recipe]()
        self.layers = nn.ModuleList(
            te.TransformerLayer(
                DIM, HIDDEN, HEADS, num_gqa_groups=KV_HEADS, normalization="RMSNorm", activation="swiglu",
                bias=False, hidden_dropout=0.0, attention_dropout=0.0, self_attn_mask_type="causal",
                attn_input_format="bshd", params_dtype=torch.bfloat16, fuse_qkv_params=True,
            )
            for _ in range(2)
        )  # fmt: skip
        self.rotary = te.RotaryPositionEmbedding(WIDTH)(8192).cuda()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        with self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe):
            for layer in self.layers:
                x = layer(x, rotary_pos_emb=self.rotary[: x.shape[1]])
        return x


def transformer_engine(recipe: str) -> Any:
    with torch.device("cuda"):
        return TransformerEngine(recipe)


def step(run: Any, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, *, train: bool) -> None:
    if not train:
        with torch.no_grad():
            run(*inputs)
        return
    run(*inputs).backward(grad)
    inputs[0].grad = None
    for p in run.parameters():
        p.grad = None


def first_call(run: Any, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> float:
    """Seconds of a first step with nothing to be found in the caches of Inductor and Triton."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        start = time.perf_counter()
        step(run, inputs, grad, train=True)
        synchronise()
        return time.perf_counter() - start


def load_libraries() -> None:
    """Compile a small layer with both backends: what is imported and started once is no arm's."""
    layer = nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16)
    for settings in ({}, {"backend": "kp", "options": {"fp8_linear": "on"}}):
        torch.compile(layer, **settings)(torch.randn_like(layer.weight)).sum().backward()
    synchronise()


def casts(run: Callable[[], Any]) -> int:
    """Kernels of a call that kp's fused casts are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        synchronise()
    return sum(event.count for event in seen.key_averages() if event.key.startswith(KERNEL))


def saved_bytes(run: Any, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside its result."""
    before = torch.cuda.memory_allocated()
    out = run(*inputs)
    synchronise()
    return torch.cuda.memory_allocated() - before - out.numel() * out.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arms", nargs="*", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256  # every arm compiles the same code; past the limit it is eager
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model = build()
    x = torch.randn(1, options.tokens, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.randn(options.tokens, WIDTH, device="cuda")
    inputs = (x, angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16))
    grad = torch.randn_like(x) * 1e-3
    made = arms(model)
    runs: dict[str, Any] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    load_libraries()
    for name in options.arms or made:
        try:
            run = made[name]()
            seconds = first_call(run, inputs, grad)
        except Exception as error:
            if name.split()[0] not in ("te", "torchao"):
                raise
            print(f"{name}: left out, {error}")
            continue
        for mode, train in (("train", True), ("forward", False)):
            if warm(name, lambda run=run, train=train: step(run, inputs, grad, train=train)):
                rows[name, mode] = {"arm": name, "mode": mode, "first_call_s": round(seconds, 1)}
        runs[name] = run
    for mode, train in (("train", True), ("forward", False)):
        steps = {
            name: lambda run=run, train=train: step(run, inputs, grad, train=train)
            for name, run in runs.items()
        }
        for name, ms in time_interleaved(steps, options.repeats, **SUSTAINED).items():
            rows[name, mode] |= {"ms": round(ms, 3), "peak_gib": round(peak_gib(steps[name]), 3)}
            if train:
                rows[name, mode] |= {
                    "cast_kernels": casts(steps[name]),
                    "saved_mib": round(saved_bytes(runs[name], inputs) / 2**20, 1),
                }
            print(rows[name, mode], flush=True)
    packages = {"torchao": "torchao", "te": "transformer_engine"}
    peers = installed(*(p for mark, p in packages.items() if any(n.startswith(f"{mark} ") for n in runs)))
    write("fp8_model", list(rows.values()), bars_of(rows), peers, options.out)


def bars_of(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    def ratio(name: str, mode: str, peer: str = "inductor", what: str = "ms") -> float | None:
        mine, theirs = rows.get((name, mode), {}).get(what), rows.get((peer, mode), {}).get(what)
        return None if not mine or not theirs else theirs / mine

    bars = [
        bar(f"{name}: training speed-up over Inductor", ratio(name, "train"), target)
        for name, target in (("delayed", 1.40), ("tensorwise", 1.34), ("blockwise", 1.22))
    ]
    best = max((r for name in RECIPES if (r := ratio(name, "forward"))), default=None)
    bars.append(bar("best recipe: inference speed-up over Inductor", best, 1.5))
    for peer, names in (("te", TE), ("torchao", TORCHAO)):
        for name in names:
            if (f"{peer} {name}", "train") in rows:
                bars.append(
                    bar(f"{name}: speed against {peer}'s", ratio(name, "train", f"{peer} {name}"), 1.0)
                )
    for name in (*RECIPES, SAVING):
        if (name, "train") in rows and ("kp", "train") in rows:
            saved, most = ratio("kp", "train", name, "saved_mib"), 0.7 if name == SAVING else 1.0
            bars.append(bar(f"{name}: saved bytes against bfloat16", saved, most, at_least=False))
            seconds = ratio("inductor", "train", name, "first_call_s")
            bars.append(bar(f"{name}: first call against Inductor", seconds, 1.5, at_least=False))
    return bars


if __name__ == "__main__":
    main()
