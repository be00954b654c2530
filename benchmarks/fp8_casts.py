"""What casts to FP8 cost: beside the operations they are fused into, and how many kernels a layer has for
them.

    python benchmarks/fp8_casts.py [--repeats 15] [--out DIR]

Norms and activations with the cast that a forward pass needs (the matrix as it lies; the delayed recipe is
given its scale and writes the largest magnitude), and the backward pass of SwiGLU with all copies that the
products around it need, each against the operation alone, compiled by Inductor in bfloat16. GB/s count every
input and every result once. A CUDA graph goes round inputs of 512 MiB together, so that none is in the
cache and the host is no part of it.

Then the casts of a layer of Llama-8B's shape in a profile: kernels of kp's own that cast activations and
gradients (what Inductor fuses needs none), and weights, in each pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fp8_model
import torch
import torch.nn.functional as F
from harness import RESULTS, bar, recorded, synchronise, time_interleaved, write
from torch import Tensor

from kp_compiler.lowering.fp8 import quantize
from kp_compiler.lowering.fp8.quantize import DTYPES, E4M3, scale_from_amax
from kp_compiler.lowering.fp8.recipes import RECIPES

CASTS = ("delayed", "tensorwise", "rowwise")
ROWS, COLUMNS = (8192, 16384), (4096, 14336)
IN_TURN = 2**29  # bytes
TOKENS = 3072  # in the profiled layer: of all sizes the one with a factor of three, which a grid keeps
# Matrices that a layer's pass casts: inputs of qkv, o, gate and up, down; behind those, the gradients of the
# outputs of all seven.
DISTINCT = {"forward": 4, "backward": 11}

FORWARD: dict[str, tuple[int, Callable[..., Tensor]]] = {  # matrices read, and the operation
    "RMSNorm": (1, lambda a, w: F.rms_norm(a, (a.shape[-1],), w)),
    "LayerNorm": (1, lambda a, w: F.layer_norm(a, (a.shape[-1],), w, w)),
    "SwiGLU": (2, lambda a, b, w: F.silu(a) * b),
    "GELU": (1, lambda a, w: F.gelu(a)),
}


def scale_of(parts: list[Tensor], dtype: torch.dtype, block: tuple[int, int], dim: int = 0) -> Tensor:
    if block == (0, 0):
        return scale_from_amax(torch.ops.kp.fp8_amax.default(parts, dim).reshape(1, 1), dtype, False)
    return torch.ops.kp.fp8_scale.default(parts, dim, dtype, list(block), False, None)


def cast(
    parts: list[Tensor], scale: Tensor, dtype: torch.dtype, block: Any, dim: int = 0, turned: bool = False
) -> Tensor:
    return torch.ops.kp.fp8_quantize.default(parts, dim, scale, dtype, list(block), turned, None)


def amax_of(parts: list[Tensor], dim: int = 0) -> Tensor:
    return torch.ops.kp.fp8_amax.default(parts, dim)


def with_cast(operation: Callable[..., Tensor], recipe: str) -> Callable[..., Any]:
    """The operation, and its result in FP8 instead of bfloat16."""
    block = RECIPES[recipe].x

    def function(given: Tensor, *inputs: Tensor) -> Any:
        x = operation(*inputs)
        if recipe == "delayed":
            return cast([x], given, E4M3, block), amax_of([x])
        scale = scale_of([x], E4M3, block)
        return cast([x], scale, E4M3, block), scale

    return function


def swiglu_backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients, and the product again: wgrad of the layer behind it reads that."""
    g, u, d = gate.float(), up.float(), dh.float()
    s = torch.sigmoid(g)
    parts = d * u * (s + g * s * (1 - s)), d * g * s, g * s * u
    return tuple(part.to(gate.dtype) for part in parts)  # type: ignore[return-value]


def backward_with_casts(recipe: str) -> Callable[..., Any]:
    """`swiglu_backward` with the gradients in FP8 both ways and the product transposed."""
    blocks = RECIPES[recipe]
    dtype = DTYPES[blocks.grad_dtype]

    def function(given: Tensor, gate: Tensor, up: Tensor, dh: Tensor) -> Any:
        *grads, h = swiglu_backward(gate, up, dh)
        found = []
        if recipe == "delayed":
            found.append(amax_of(grads, 1))
            scales = [given] * 3
        else:
            scales = [scale_of(grads, dtype, blocks.dy, 1)] * 2
            if blocks.dy_t != blocks.dy:
                scales[1] = scale_of(grads, dtype, blocks.dy_t, 1)
            scales.append(given if blocks.x_t == (0, 0) else scale_of([h], E4M3, blocks.x_t))
        return (
            cast(grads, scales[0], dtype, blocks.dy, 1),
            cast(grads, scales[1], dtype, blocks.dy_t, 1, turned=True),
            cast([h], scales[2], E4M3, blocks.x_t, turned=True),
            *found,
        )

    return function


def measure(op: str, rows: int, columns: int, repeats: int) -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    matrices, operation = FORWARD.get(op, (3, swiglu_backward))
    extra = [torch.rand(columns, device="cuda", dtype=torch.bfloat16)] if op in FORWARD else []
    ring = [
        [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(matrices)] + extra
        for _ in range(-(-IN_TURN // (matrices * rows * columns * 2)))
    ]
    given = torch.ones(1, 1, device="cuda")
    runs: dict[str, Callable[..., Any]] = {"bf16": torch.compile(operation, dynamic=False)}
    for recipe in CASTS:
        function = with_cast(operation, recipe) if op in FORWARD else backward_with_casts(recipe)
        options = {"strict": True, "fp8_linear": "on"}
        compiled = torch.compile(function, backend="kp", fullgraph=True, dynamic=False, options=options)
        runs[recipe] = lambda *inputs, compiled=compiled: compiled(given, *inputs)
    rounds = {name: recorded(lambda run=run: [run(*inputs) for inputs in ring]) for name, run in runs.items()}
    found = time_interleaved(rounds, repeats, pause=0.01)
    times = {name: ms / len(ring) for name, ms in found.items()}
    for name, ms in times.items():
        out = runs[name](*ring[0])
        moved = sum(t.nbytes for t in (*ring[0], *(out if isinstance(out, tuple) else (out,))))
        yield {
            "op": op, "M": rows, "K": columns, "arm": name, "ms": round(ms, 4),
            "gb_per_s": round(moved / ms / 1e6), "ratio": round(ms / times["bf16"], 4),
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# kernels of a layer


def kernels(call: Callable[[], Any]) -> dict[str, int]:
    """Kernels of a call: kp's casts of matrices of TOKENS rows, of others (weights), and all the rest."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            synchronise()
        seen.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    found = {"activation_casts": 0, "weight_casts": 0, "other_kernels": 0}
    for event in events:
        if event.get("cat") != "kernel":
            continue
        if not event["name"].startswith(fp8_model.KERNEL):
            found["other_kernels"] += 1
        elif any(size % 3 == 0 for size in event["args"]["grid"]):
            found["activation_casts"] += 1
        else:
            found["weight_casts"] += 1
    return found


def count(recipe: str | None) -> Iterator[dict[str, Any]]:
    """A row for the forward pass and one for the backward pass."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = fp8_model.Layers(1).to(torch.bfloat16)
        x = torch.randn(1, TOKENS, fp8_model.DIM, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.randn(TOKENS, fp8_model.WIDTH, dtype=torch.bfloat16)
    options: dict[str, Any] = {"strict": True}
    if recipe is not None:
        options["fp8_linear"] = {"mode": "require", "recipe": recipe}
    run = torch.compile(model, backend="kp", fullgraph=True, options=options)
    inputs, grad, outs = (x, angles.cos(), angles.sin()), torch.randn_like(x), []
    for _ in range(2):
        fp8_model.step(run, inputs, grad, train=True)
    passes = {"forward": lambda: outs.append(run(*inputs)), "backward": lambda: outs[0].backward(grad)}
    for name, call in passes.items():
        found = kernels(call)
        yield {"op": f"layer, {name}", "arm": recipe or "bf16", **found, "distinct": DISTINCT[name]}


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bars = []
    for op in ("RMSNorm", "SwiGLU"):
        worst = max(row["ratio"] for row in rows if row["op"] == op and row["arm"] == "delayed")
        bars.append(bar(f"{op} and cast, delayed: time against {op} alone", worst, 1.05, at_least=False))
    for row in rows:
        if "distinct" in row and row["arm"] != "bf16":
            name = f"{row['op']}, {row['arm']}: kernels of casts, of {row['distinct']} distinct matrices"
            bars.append(bar(name, row["activation_casts"], row["distinct"], at_least=False))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    quantize.library()  # before Dynamo sees its names
    rows: list[dict[str, Any]] = []

    def collect(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append(row)
            print(row, flush=True)

    for op, m, k in itertools.product((*FORWARD, "SwiGLU backward"), ROWS, COLUMNS):
        collect(measure(op, m, k, options.repeats))
    for recipe in (None, *fp8_model.RECIPES):
        collect(count(recipe))
    write("fp8_casts", rows, bars_of(rows), {}, options.out)


if __name__ == "__main__":
    main()
