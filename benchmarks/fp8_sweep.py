"""Never slower: what `auto` chooses for a linear layer, against the faster of bfloat16 and FP8, over 216
shapes.

    python benchmarks/fp8_sweep.py [--recipe tensorwise] [--repeats 5] [--out DIR]

Rows, inputs and outputs from 512 to 16384, forward and backward, every combination. The decision is the cost
model's for the shape alone, taken before anything is timed; each pair of sizes is compiled once, for any
number of rows. Both arms are replayed from CUDA graphs: in a model the host runs ahead of a layer, alone it
would be timed instead.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, bar, recorded, time_interleaved, write
from torch import nn

from kp_compiler import cost
from kp_compiler.specs import LinearShape
from kp_compiler.target import detect

SIZES = (512, 1024, 2048, 4096, 8192, 16384)
REGRET = 1.02  # what the chosen path may take, in parts of the faster one's time


def chosen(rows: int, inputs: int, outputs: int, recipe: str) -> tuple[str, float]:
    """The path `auto` takes, and the gain it predicts."""
    shape = LinearShape(rows, inputs, outputs, torch.bfloat16, True, True)
    predicted = cost.predict_linear(shape, recipe, detect("cuda"))
    assert predicted is not None
    return ("fp8" if predicted["gain"] >= 1 else "bf16"), predicted["gain"]


def measure(inputs: int, outputs: int, recipe: str, repeats: int) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    layer = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    options = {"strict": True, "fp8_linear": {"mode": "require", "recipe": recipe}}
    runs = {"bf16": torch.compile(layer), "fp8": torch.compile(layer, backend="kp", options=options)}
    found = []
    for rows in SIZES:
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)

        def step(run: Any, x: torch.Tensor = x, grad: torch.Tensor = grad) -> None:
            run(x).backward(grad)
            x.grad = layer.weight.grad = None

        steps = {name: recorded(lambda run=run: step(run)) for name, run in runs.items()}
        times = time_interleaved(steps, repeats, pause=0.0, span_ms=15.0)
        path, gain = chosen(rows, inputs, outputs, recipe)
        found.append(
            {
                "M": rows, "K": inputs, "N": outputs, "bf16_ms": round(times["bf16"], 4),
                "fp8_ms": round(times["fp8"], 4), "chosen": path, "predicted": gain,
                "regret": round(times[path] / min(times.values()), 4),
            }
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tensorwise")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for inputs, outputs in itertools.product(SIZES, SIZES):
        rows += measure(inputs, outputs, options.recipe, options.repeats)
    good = sum(row["regret"] <= REGRET for row in rows) / len(rows)
    bars = [
        bar(f"{options.recipe}: share of {len(rows)} shapes within 2 % of the faster path", good, 0.98),
    ]
    write("fp8_sweep", rows, bars, {}, options.out)


if __name__ == "__main__":
    main()
