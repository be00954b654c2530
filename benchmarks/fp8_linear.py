"""A linear layer forward and backward with all its casts: compiled bfloat16, kp in every recipe, Transformer
Engine.

    python benchmarks/fp8_linear.py [--rows 15872] [--repeats 9] [--out DIR]

The shapes are those of Transformer Engine's own page on this ("gemm_profiling"): 4096 to 12288, 4096 to 4096,
4096 to 16384 and 16384 to 4096; the times of one arm are added up. Weights are cast in every step. Each arm
runs for a fifth of a second at a time, hot, as in training.

Transformer Engine, on a machine with a second cuDNN, takes the wrong one unless LD_LIBRARY_PATH begins with
that of torch, …/site-packages/nvidia/cudnn/lib.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, SUSTAINED, bar, installed, time_interleaved, warm, write
from torch import nn

RECIPES = ("tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise")
SHAPES = [(4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)]
TARGETS = {"tensorwise": 1.62, "delayed": 1.72, "blockwise": 1.42}


def arms(layer: nn.Linear) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    yield "bf16", torch.compile(layer)
    for recipe in RECIPES:
        options = {"strict": True, "fp8_linear": {"mode": "require", "recipe": recipe}}
        yield recipe, torch.compile(layer, backend="kp", options=options)
    try:
        yield from _transformer_engine(layer)
    except ImportError as error:
        print(f"Transformer Engine is left out: {error}")


def _transformer_engine(layer: nn.Linear) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    twin = te.Linear(layer.in_features, layer.out_features, bias=False, params_dtype=torch.bfloat16)
    made = {
        "tensorwise": recipe.Float8CurrentScaling(),
        "delayed": recipe.DelayedScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }
    for name, each in made.items():

        def call(x: torch.Tensor, each: Any = each) -> torch.Tensor:
            twin.weight.grad = None
            with te.fp8_autocast(enabled=True, fp8_recipe=each):
                return twin(x)

        yield f"te {name}", call


def measure(inputs: int, outputs: int, rows: int, repeats: int) -> dict[str, float]:
    torch._dynamo.reset()
    layer = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)

    def step(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        run(x).backward(grad)
        x.grad = layer.weight.grad = None

    steps = {name: (lambda run=run: step(run)) for name, run in arms(layer)}
    return time_interleaved({name: s for name, s in steps.items() if warm(name, s)}, repeats, **SUSTAINED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=15872)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, total = [], {}
    for inputs, outputs in SHAPES:
        for name, ms in measure(inputs, outputs, options.rows, options.repeats).items():
            rows.append({"M": options.rows, "K": inputs, "N": outputs, "arm": name, "ms": round(ms, 3)})
            total[name] = total.get(name, 0.0) + ms
            print(rows[-1], flush=True)
    rows += [{"arm": name, "M": options.rows, "K": "all", "N": "all", "ms": ms} for name, ms in total.items()]
    bars = [
        bar(f"{name}: speed-up over bf16, all shapes", _ratio(total, "bf16", name), target)
        for name, target in TARGETS.items()
    ]
    bars += [
        bar(f"{name}: speed against Transformer Engine's", _ratio(total, f"te {name}", name), 1.0)
        for name in TARGETS
    ]
    write("fp8_linear", rows, bars, installed("transformer_engine"), options.out)


def _ratio(total: dict[str, float], peer: str, name: str) -> float | None:
    return total[peer] / total[name] if peer in total and name in total else None


if __name__ == "__main__":
    main()
