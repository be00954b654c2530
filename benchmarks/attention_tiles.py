"""Tiles, warps and stages of kp's portable attention kernels: what is fastest for each head size.

    python benchmarks/attention_tiles.py [--length 8192] [--heads 16 4] [--dims 64 128 256] [--out DIR]

Causal, bfloat16. Every kernel of the family is timed alone with every setting that fits the device; TFLOP/s
count the pairs that the mask keeps, and the products that the kernel makes of them (2 forward, 3 for dq, 4
for dk and dv). The fastest ones belong into `kp_compiler.lowering.triton.attention.tile_for`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, time_interleaved, write

from kp_compiler.lowering.triton import attention
from kp_compiler.lowering.triton.attention import Site, Tile
from kp_compiler.specs import AttentionSpec, MaskSpec

PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}
CANDIDATES = {
    "forward": [
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 4), Tile(128, 64, 4, 2), Tile(128, 64, 4, 3), Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2),
        Tile(128, 32, 8, 4), Tile(128, 32, 4, 3), Tile(128, 256, 8, 2), Tile(256, 64, 8, 2),
    ],
    "dq": [
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3),
        Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 64, 8, 1),
    ],
    "dkdv": [
        Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1),
        Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2),
        Tile(64, 128, 8, 1), Tile(64, 32, 8, 1), Tile(128, 32, 4, 2),
    ],
}  # fmt: skip


def steps(length: int, heads: tuple[int, int], width: int) -> Iterator[tuple[str, Tile, Callable[[], Any]]]:
    """Each kernel with each of its settings, as something to call."""
    q, grad = (
        torch.randn(1, length, heads[0], width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(2)
    )
    k, v = (
        torch.randn(1, length, heads[1], width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(2)
    )
    spec = AttentionSpec(width**-0.5, MaskSpec("causal", "k <= q"))
    out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse = attention.forward(Site(spec, q, k, v, (), ()), None, out)
    delta = attention.delta_of(grad, out, None)
    for kernel, tiles in CANDIDATES.items():
        for tile in tiles:
            site = Site(spec, q, k, v, (), (), tiles={kernel: tile})
            arguments = (site, None, grad, lse, delta)
            yield (
                kernel,
                tile,
                {
                    "forward": lambda site=site: attention.forward(site, None, out),
                    "dq": lambda a=arguments: attention.query_gradient(*a, dq),
                    "dkdv": lambda a=arguments: attention.key_gradients(*a, dk, dv),
                }[kernel],
            )


def measure(length: int, heads: tuple[int, int], width: int, repeats: int) -> list[dict[str, Any]]:
    found: dict[str, tuple[str, Tile, Callable[[], Any]]] = {}
    for kernel, tile, step in steps(length, heads, width):
        try:
            step()
        except Exception as error:  # too large for the device's shared memory
            print(f"D{width} {kernel} {tile}: {type(error).__name__}", flush=True)
            continue
        found[f"{kernel} {tile}"] = (kernel, tile, step)
    times = time_interleaved({name: step for name, (_, _, step) in found.items()}, repeats, 0.0, 10.0)
    rows = []
    for name, (kernel, tile, _) in found.items():
        work = PRODUCTS[kernel] * width * heads[0] * length * (length + 1)
        rows.append(
            {"kernel": kernel, "D": width, "tile": list(vars(tile).values()), "ms": round(times[name], 4),
             "tflops": round(work / times[name] / 1e9, 1)}
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["kernel"], row["ms"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 4))
    parser.add_argument("--dims", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for width in options.dims:
        found = measure(options.length, tuple(options.heads), width, options.repeats)
        for row in found:
            print(row, flush=True)
        rows += found
    write("attention_tiles", rows, [], {}, options.out)


if __name__ == "__main__":
    main()
