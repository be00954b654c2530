"""Never slower: what `auto` chooses for a linear layer, against the faster of bfloat16 and FP8: 216 shapes
forward and backward, 54 in inference.

    python benchmarks/fp8_sweep.py [--recipe tensorwise] [--sizes 768 1536 …] [--repeats 5] [--out DIR]

Every combination of rows, inputs and outputs. The decision is the cost model's for the shape alone, taken
before anything is timed; each pair of sizes is compiled once, for any number of rows. The model is fitted to
powers of two (`kp_compiler/cost.py`), the sizes here are others, and a few of those. Both arms are replayed
from CUDA graphs: in a model the host runs ahead of a layer, alone it would be timed instead. In inference a
graph holds as many layers as have more weights than the second-level cache, or one would be timed that had
its weights there, as no layer of a model has.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, bar, recorded, time_interleaved, write
from torch import nn

from kp_compiler import cost
from kp_compiler.specs import LinearShape
from kp_compiler.target import detect

SIZES = (768, 1536, 2560, 4096, 8192, 14336)
INFERENCE_SIZES = (1024, 4096, 14336)
INFERENCE_ROWS = (16, 64, 256, 1024, 4096, 16384)
ROTATED = 128 * 2**20  # bytes of weights that inference goes through
REGRET = 1.02  # what the chosen path may take, in parts of the faster one's time


def chosen(rows: int, inputs: int, outputs: int, recipe: str, *, train: bool) -> tuple[str, float]:
    """The path `auto` takes, and the gain it predicts."""
    shape = LinearShape(rows, inputs, outputs, torch.bfloat16, train, train)
    predicted = cost.predict_linear(shape, recipe, detect("cuda"), cached=not train)
    assert predicted is not None
    return ("fp8" if predicted["gain"] >= 1 else "bf16"), predicted["gain"]


def step_of(runs: list[Any], layers: list[nn.Linear], rows: int, *, train: bool) -> Callable[[], Any]:
    """One training step of a single layer, or a forward pass of each of several."""
    inputs, outputs = layers[0].in_features, layers[0].out_features
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=train)
    grad = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)

    def training() -> None:
        runs[0](x).backward(grad)
        x.grad = layers[0].weight.grad = None

    def inference() -> None:
        with torch.no_grad():
            for run in runs:
                run(x)

    return training if train else inference


def measure(
    inputs: int, outputs: int, sizes: tuple[int, ...], recipe: str, repeats: int, *, train: bool
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    count = 1 if train else -(-ROTATED // (2 * inputs * outputs))
    layers = [
        nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(count)
    ]
    options = {"strict": True, "fp8_linear": {"mode": "require", "recipe": recipe}}
    runs = {
        "bf16": [torch.compile(layer) for layer in layers],
        "fp8": [torch.compile(layer, backend="kp", options=options) for layer in layers],
    }
    found = []
    for rows in sizes:
        steps = {name: recorded(step_of(run, layers, rows, train=train)) for name, run in runs.items()}
        times = {n: t / count for n, t in time_interleaved(steps, repeats, 0.0, span_ms=15.0).items()}
        path, gain = chosen(rows, inputs, outputs, recipe, train=train)
        found.append(
            {
                "mode": "train" if train else "inference", "M": rows, "K": inputs, "N": outputs,
                "bf16_ms": round(times["bf16"], 4), "fp8_ms": round(times["fp8"], 4), "chosen": path,
                "predicted": gain, "regret": round(times[path] / min(times.values()), 4),
            }
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tensorwise")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes, recipe, repeats = tuple(options.sizes), options.recipe, options.repeats
    rows: list[dict[str, Any]] = []
    for inputs, outputs in itertools.product(INFERENCE_SIZES, INFERENCE_SIZES):
        rows += measure(inputs, outputs, INFERENCE_ROWS, recipe, repeats, train=False)
    for inputs, outputs in itertools.product(sizes, sizes):
        rows += measure(inputs, outputs, sizes, recipe, repeats, train=True)
    bars = []
    for mode in ("train", "inference"):
        mine = [row for row in rows if row["mode"] == mode]
        share = sum(row["regret"] <= REGRET for row in mine) / len(mine)
        name = f"{recipe}, {mode}: share of {len(mine)} shapes within 2 % of the faster path"
        bars.append(bar(name, share, 0.98))
    write("fp8_sweep", rows, bars, {}, options.out)


if __name__ == "__main__":
    main()
