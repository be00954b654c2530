"""Rates of one product in bfloat16 and in FP8, by kind of scales.

    python benchmarks/fp8_gemm.py [--repeats 15] [--out DIR]

Normally distributed operands, already in FP8; bfloat16 results. The last shape is a weight gradient, both
operands contracted along 16384 tokens; blockwise as kp's recipe has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, bar, time_interleaved, warm, write

from kp_compiler.lowering.fp8.quantize import E4M3, E5M2, Block, fp8_quantize, fp8_scale

SHAPES = [
    (8192, 8192, 8192),
    (8192, 4096, 6144),
    (8192, 4096, 4096),
    (8192, 4096, 28672),
    (8192, 14336, 4096),
    (16384, 4096, 14336),
    (2048, 4096, 4096),
]
WGRAD = (4096, 16384, 14336)


def operand(x: torch.Tensor, block: Block, dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    scale = fp8_scale([x], dtype, block, power_of_two=False)
    return fp8_quantize([x], scale, dtype, block), scale


def arms(m: int, k: int, n: int) -> dict[str, Callable[[], Any]]:
    """Products [m,k] · [n,k]ᵀ."""
    a, b = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    found: dict[str, Callable[[], Any]] = {"bf16": lambda: a @ b.t()}

    def add(name: str, blocks: tuple[Block, Block], *, fast: bool, left: torch.dtype = E4M3) -> None:
        (qa, sa), (qb, sb) = operand(a, blocks[0], left), operand(b, blocks[1])
        by_blocks = max(blocks[0]) > 1
        ra, rb = sa.reciprocal(), sb.reciprocal()
        if by_blocks:
            ra = ra.t().contiguous().t()
        found[name] = lambda: torch._scaled_mm(
            qa, qb.t(), ra, rb.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    add("tensorwise, fast", ((0, 0), (0, 0)), fast=True)
    add("tensorwise", ((0, 0), (0, 0)), fast=False)
    add("tensorwise, e5m2", ((0, 0), (0, 0)), fast=False, left=E5M2)
    add("rowwise, fast", ((1, 0), (1, 0)), fast=True)
    add("rowwise", ((1, 0), (1, 0)), fast=False)
    add("blockwise", ((1, 128), (128, 128)), fast=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for m, k, n in [*SHAPES, WGRAD]:
        steps = {name: step for name, step in arms(m, k, n).items() if warm(name, step)}
        for name, ms in time_interleaved(steps, options.repeats, pause=0.01).items():
            rows.append({"M": m, "K": k, "N": n, "arm": name, "tflops": round(2 * m * k * n / ms / 1e9, 1)})
            print(rows[-1], flush=True)
    write("fp8_gemm", rows, bars_of(rows), {}, options.out)


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def rate(shape: tuple[int, int, int], *names: str) -> float:
        return max(r["tflops"] for r in rows if (r["M"], r["K"], r["N"]) == shape and r["arm"] in names)

    cube = (8192, 8192, 8192)
    best = rate(cube, "tensorwise, fast", "rowwise, fast")
    return [
        bar("8192 x 8192 x 8192: TFLOP/s", best, 1300),
        bar("8192 x 8192 x 8192: speed-up over bf16", best / rate(cube, "bf16"), 1.65),
        bar("blockwise weight gradient, 16384 tokens, 4096 x 14336: TFLOP/s", rate(WGRAD, "blockwise"), 900),
    ]


if __name__ == "__main__":
    main()
