"""Tiles, warps and stages of kp's attention kernels: what is fastest for each head size.

    python benchmarks/attention_tiles.py [--length 8192] [--heads 16 4] [--dims 64 128 256] [--kernels …]
        [--ship] [--out DIR]

Causal, bfloat16. Every kernel of the family is timed alone with every setting that fits the device; TFLOP/s
count the pairs that the mask keeps, and the products that the kernel makes of them (2 forward, 3 for dq, 4
for dk and dv, 5 for all three). `--ship` writes the fastest ones into the file that the kernels read,
`kp_compiler/lowering/triton/tiles.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from harness import RESULTS, time_interleaved, write

from kp_compiler.lowering.into import Into
from kp_compiler.lowering.triton import attention, hopper
from kp_compiler.lowering.triton.attention import Site, Tile
from kp_compiler.specs import AttentionSpec, MaskSpec

PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "hopper forward": 2, "hopper backward": 5}
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
    "hopper forward": [
        Tile(128, 128, 4, 2), Tile(128, 128, 4, 3), Tile(192, 128, 4, 2), Tile(192, 128, 4, 3),
        Tile(192, 64, 4, 4), Tile(128, 64, 4, 4),
    ],
    "hopper backward": [Tile(128, 64, 4, 2), Tile(128, 64, 4, 3), Tile(128, 128, 4, 2)],
}  # fmt: skip


def steps(
    length: int, heads: tuple[int, int], width: int, kernels: list[str]
) -> Iterator[tuple[str, Tile, Callable[[], Any]]]:
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
    lse = attention.forward(Site(spec, q, k, v, (), ()), None, Into(out))
    total = torch.empty_like(q, dtype=torch.float32)
    delta = attention.delta_of(grad, out, None, total)
    for kernel in kernels:
        for tile in CANDIDATES[kernel]:
            site = Site(spec, q, k, v, (), (), tiles={kernel: tile})
            arguments = (site, None, grad, lse, delta)
            yield (
                kernel,
                tile,
                {
                    "forward": lambda site=site: attention.forward(site, None, Into(out)),
                    "dq": lambda a=arguments: attention.query_gradient(*a, dq),
                    "dkdv": lambda a=arguments: attention.key_gradients(*a, dk, dv),
                    "hopper forward": lambda site=site: hopper.forward(site, None, Into(out)),
                    "hopper backward": lambda a=arguments: hopper.gradients(*a, total, dq, dk, dv),
                }[kernel],
            )


def measure(
    length: int, heads: tuple[int, int], width: int, kernels: list[str], repeats: int
) -> list[dict[str, Any]]:
    found: dict[str, tuple[str, Tile, Callable[[], Any]]] = {}
    for kernel, tile, step in steps(length, heads, width, kernels):
        try:
            step()
        except Exception as error:  # too large for shared memory, or for a kernel's head sizes
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
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--ship", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for width in options.dims:
        kernels = [k for k in options.kernels if width <= 128 or k != "hopper backward"]
        found = measure(options.length, tuple(options.heads), width, kernels, options.repeats)
        for row in found:
            print(row, flush=True)
        rows += found
    write("attention_tiles", rows, [], {}, options.out)
    if options.ship:
        ship(rows, options.length)


def ship(rows: list[dict[str, Any]], length: int) -> None:
    """Put the fastest tiles among `rows`, fastest first in each kernel, into the file; others stay."""
    place = Path(str(attention.tiles_file()))
    data = json.loads(place.read_text())
    for row in reversed(rows):
        data["tiles"].setdefault(row["kernel"], {})[str(row["D"])] = row["tile"]
    data["source"] = {
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "date": str(datetime.date.today()),
        "by": f"benchmarks/attention_tiles.py, causal, {length} tokens",
    }
    text = re.sub(
        r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", json.dumps(data, indent=1)
    )
    place.write_text(text + "\n")


if __name__ == "__main__":
    main()
