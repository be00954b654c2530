"""Errors of FP8 in a trained model: every linear layer on its own, and what training in FP8 ends at.

    python benchmarks/fp8_accuracy.py [--steps 1500] [--tiny] [--out DIR]

A decoder learns bytes of the installed packages' source code: in bfloat16 under Inductor, and from the same
weights on the same batches in kp's FP8 (bfloat16 weights, float32 copies in the optimizer). Then each linear
layer of the first one gets an input and a gradient that it has in that model, and runs compiled in every
recipe: SQNR of y, dx and dw in dB against float64. Delayed scaling sees the layer's batch twice before. A
second run in bfloat16, from weights that are a hundredth off, shows how far the end of training moves anyway.
Beside each SQNR stands the one that the format's mantissa allows: operands rounded to as many bits, of any
range, and multiplied in float64. Where a sum over tokens cancels it is lower, whoever casts.

`--tiny` is a small model; without a GPU everything runs on kp's emulation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, bar, write
from torch import Tensor, nn

from kp_compiler.errors import KPRequirementError
from kp_compiler.lowering.fp8.quantize import sqnr

ARMS: dict[str, dict[str, Any]] = {
    **{name: {"recipe": name} for name in ("tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise")},
    "tensorwise, e4m3 gradients": {"recipe": "tensorwise", "grad_dtype": "e4m3"},
}
TRAINED = ("bf16", "bf16, weights moved", "tensorwise", "delayed", "tensorwise, e4m3 gradients")
MOVED = 0.01  # of each weight, at random: what training ends at differs without any FP8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED: dict[str, Any] = {"cpu_rewrites": True, "lowering": "aot_eager"} if DEVICE == "cpu" else {}
OUTS = ("y", "dx", "dw")
LAST = 50  # steps whose losses are averaged
BYTES = 2**26  # of source code


@dataclass(frozen=True)
class Size:
    """Meant to train for 1500 steps in half a minute on an H100. Hidden sizes are multiples of 512 for the
    sake of blockwise scales."""

    layers: int = 4
    dim: int = 512
    heads: int = 8
    hidden: int = 1536
    context: int = 512
    batch: int = 64


TINY = Size(layers=1, hidden=512, context=32, batch=2)


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.RMSNorm(size.dim), nn.RMSNorm(size.dim)
        self.q, self.k, self.v, self.o = (nn.Linear(size.dim, size.dim, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.dim, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Bytes [B, S+1] to the mean loss of S predictions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, size.dim), nn.Embedding(size.context, size.dim)
        self.layers = nn.Sequential(*(Layer(size) for _ in range(size.layers)))
        self.norm, self.head = nn.RMSNorm(size.dim), nn.Linear(size.dim, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text[:, :-1]) + self.places.weight
        logits = self.head(self.norm(self.layers(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def build(size: Size, moved: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(size).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + moved * torch.randn_like(p))
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def source_code() -> Tensor:
    """Python files beside torch, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        text += path.read_bytes()
        if len(text) >= BYTES:
            break
    return torch.frombuffer(text, dtype=torch.uint8).to(DEVICE)


def batches(text: Tensor, size: Size) -> Iterator[Tensor]:
    """Random places of the text, the same ones for every arm."""
    generator, window = torch.Generator().manual_seed(1), torch.arange(size.context + 1, device=DEVICE)
    while True:
        starts = torch.randint(len(text) - size.context - 1, (size.batch, 1), generator=generator)
        yield text[starts.to(DEVICE) + window].long()


def train(model: nn.Module, run: Any, text: Tensor, size: Size, steps: int) -> Tensor:
    """Losses of all steps."""
    weights = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    losses = torch.zeros(steps, device=DEVICE)
    for step, batch in zip(range(steps), batches(text, size), strict=False):
        loss = run(batch)
        loss.backward()
        losses[step] = loss.detach()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        rate.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
    return losses


def kp_options(arm: str, **settings: Any) -> dict[str, Any]:
    return {**EMULATED, "strict": True, "fp8_linear": {"mode": "require", **ARMS[arm], **settings}}


def trained(text: Tensor, size: Size, steps: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The bfloat16 model after training, and what every arm ended at."""
    rows, models = [], {}
    for arm in TRAINED:
        torch._dynamo.reset()
        model = models[arm] = build(size, MOVED if "moved" in arm else 0.0)
        settings: dict[str, Any] = {"backend": "inductor" if DEVICE == "cuda" else "eager"}
        if arm in ARMS:
            settings = {"backend": "kp", "options": kp_options(arm, expect=len(linears(model)))}
        start = time.perf_counter()
        losses = train(model, torch.compile(model, fullgraph=True, **settings), text, size, steps)
        final = losses[-LAST:].double().mean().item()
        seconds = round(time.perf_counter() - start, 1)
        rows.append({"arm": arm, "steps": steps, "seconds": seconds, "final_loss": round(final, 6)})
        print(rows[-1], flush=True)
    return models["bf16"], rows


def rounded(x: Tensor, bits: int) -> Tensor:
    """Float64 numbers to the nearest of `bits` significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


def captured(model: nn.Module, batch: Tensor) -> dict[str, tuple[nn.Linear, Tensor, Tensor]]:
    """Each linear layer with its input [M, K] and its output's gradient [M, N] on one batch."""
    inputs: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[name] = args[0].detach().flatten(0, 1)
            out.register_hook(lambda grad: grads.update({name: grad.flatten(0, 1)}))

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in linears(model).items()]
    model(batch).backward()
    for handle in handles:
        handle.remove()
    return {name: (layer, inputs[name], grads[name]) for name, layer in linears(model).items()}


def measure(found: dict[str, tuple[nn.Linear, Tensor, Tensor]], arm: str) -> Iterator[dict[str, Any]]:
    """One row a layer. Layers of one shape share compiled code, and no state: that belongs to weights."""
    torch._dynamo.reset()
    options = kp_options(arm)
    run = torch.compile(lambda layer, x: layer(x), backend="kp", dynamic=False, options=options)
    for name, (layer, x, grad) in found.items():
        row = {"layer": name, "M": len(x), "K": x.shape[1], "N": grad.shape[1], "recipe": arm}
        x = x.clone().requires_grad_()
        try:
            for _ in range(3 if arm == "delayed" else 1):
                x.grad = layer.weight.grad = None
                y = run(layer, x)
                y.backward(grad)
            got = {"y": y, "dx": x.grad, "dw": layer.weight.grad}
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, KPRequirementError):
                raise
            yield row | {"note": str(error.inner_exception).splitlines()[1].strip()}
            continue
        yield row | quality(arm, x.detach().double(), layer.weight.detach().double(), grad.double(), got)


def quality(arm: str, x: Tensor, w: Tensor, grad: Tensor, got: dict[str, Tensor]) -> dict[str, float]:
    """SQNR of each product in dB, and the one that its operands' mantissas allow."""
    coarse = ARMS[arm].get("grad_dtype") != "e4m3" and ARMS[arm]["recipe"] in ("tensorwise", "delayed")
    in_8_bits = rounded(x, 4), rounded(w, 4), rounded(grad, 3 if coarse else 4)
    exact, allowed = ({"y": x @ w.t(), "dx": g @ w, "dw": g.t() @ x} for x, w, g in ((x, w, grad), in_8_bits))
    if ARMS[arm]["recipe"] == "rowwise_gw_hp":
        del allowed["dw"]
    found = {f"{name}_db": round(sqnr(got[name], value), 2) for name, value in exact.items()}
    return found | {
        f"{name}_format_db": round(sqnr(value, exact[name]), 2) for name, value in allowed.items()
    }


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bars = []
    for recipe in ARMS:
        mine = [row for row in rows if row.get("recipe") == recipe and "y_db" in row]
        least = min((row["y_db"] for row in mine), default=None)
        bars.append(bar(f"{recipe}: y of {len(mine)} layers, least SQNR in dB", least, 27.5))
        least = min((row[what] for row in mine for what in ("dx_db", "dw_db")), default=None)
        bars.append(bar(f"{recipe}: gradients of {len(mine)} layers, least SQNR in dB", least, 24.0))
        lost = [
            row[f"{k}_format_db"] - row[f"{k}_db"] for row in mine for k in OUTS if f"{k}_format_db" in row
        ]
        name = f"{recipe}: most that SQNR is below what the format allows, in dB"
        bars.append(bar(name, max(lost, default=None), 0.5, at_least=False))
    final = {row["arm"]: row["final_loss"] for row in rows if "arm" in row}
    for arm in TRAINED[1:]:
        off = abs(final[arm] / final["bf16"] - 1)
        bars.append(bar(f"{arm}: final loss off that of bf16, relatively", off, 0.01, at_least=False))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    size = TINY if options.tiny else Size()
    text = source_code()
    model, rows = trained(text, size, options.steps)
    found = captured(model, next(batches(text, size))[: max(2, size.batch // 4)])
    for arm in ARMS:
        for row in measure(found, arm):
            rows.append(row)
            print(row, flush=True)
    write("fp8_accuracy", rows, bars_of(rows), {}, options.out)


if __name__ == "__main__":
    main()
