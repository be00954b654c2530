"""Sequences on up to 1024 GPUs as they are predicted, beside what predictions are worth on two.

    python benchmarks/context_scaling.py [--between 50] [--measured FILE] [--out DIR]

Needs no GPU. Rows with `measured_ms` are those of kp's schedules in ring_attention.json, with what
`context_cost` says of them now. Rows with `gpus` are predictions for one forward and backward pass of causal
attention, 32 heads for 8 of keys, D128: eight GPUs a node, which exchange at `context_cost.LINK`; with more
than one node every exchange is taken to be as slow as those between nodes (`--between`, GB/s a GPU).

Rows with `lengths` count pairs of a query and an earlier key of its document, of the rank with the most in
parts of the mean, by layout: 128k tokens, lengths drawn DRAWS times from each distribution.

efficiency: t₁ / (P · t_P), both predicted.   memory: of a rank's exchanges, beside its own tensors.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, bar, write

from kp_compiler import context_cost
from kp_compiler import target as targets
from kp_compiler.documents import balanced_layout
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.schedules import SCHEDULES
from kp_compiler.specs import CAUSAL, AttentionShape, AttentionSpec

WIDTH, NODE = 128, 8  # head size; GPUs that share a fast link
SPEC = AttentionSpec(WIDTH**-0.5, CAUSAL)
H100 = targets.parse("cuda:sm90")
LENGTHS = (2**17, 2**20, 10 * 2**20)
SIZES = tuple(2**i for i in range(3, 11))
HEADS = "32:8"
CLOSE = 1.03  # times the fastest schedule's time: as good as the fastest


def predicted(
    length: int, heads: str, size: int, link: float | None = None
) -> dict[str, context_cost.Predicted]:
    return context_cost.predict(SPEC, part(length, heads, size), "zigzag", size, H100, link)


def part(length: int, heads: str, size: int) -> AttentionShape:
    """What one of `size` ranks has."""
    queries, keys = map(int, heads.split(":"))
    mine = length // size
    return AttentionShape(1, queries, keys, mine, mine, WIDTH, WIDTH, torch.bfloat16, "cuda", training=True)


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted against measured, of every time of a schedule."""
    found = []
    for row in rows:
        if row["provider"] not in SCHEDULES:
            continue
        each = predicted(row["length"], row["heads"], row["ranks"])[row["provider"]]
        ms = 1e3 * (each.seconds if row["mode"] == "both" else each.forward)
        found.append(
            {"length": row["length"], "heads": row["heads"], "ranks": row["ranks"], "mode": row["mode"],
             "schedule": row["provider"], "measured_ms": row["ms"], "predicted_ms": round(ms, 3),
             "ratio": round(ms / row["ms"], 3)}
        )  # fmt: skip
    return found


def choices(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """In how many cells (settings and modes with several schedules) the one that is predicted to be fastest
    is as good as the fastest."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["heads"], row["ranks"], row["mode"]), []).append(row)
    several = [cell for cell in cells.values() if len(cell) > 1]
    taken = [min(cell, key=lambda row: row["predicted_ms"])["measured_ms"] for cell in several]
    fastest = [min(row["measured_ms"] for row in cell) for cell in several]
    good = sum(a <= CLOSE * b for a, b in zip(taken, fastest, strict=True))
    return {"cells": len(several), "good_choices": good}


def scaled(length: int, size: int, between: float) -> list[dict[str, Any]]:
    """Every schedule on `size` GPUs."""
    link = context_cost.LINK if size <= NODE else between
    costs = predicted(length, HEADS, size, link)
    best = min(costs, key=lambda name: costs[name].seconds)
    one = context_cost.alone(SPEC, part(length, HEADS, size), size, H100) * (1 + float(context_cost.BACKWARD))
    return [
        {"length": length, "heads": HEADS, "gpus": size, "link_gb_s": link / 1e9, "schedule": name,
         "predicted_ms": round(1e3 * each.seconds, 3), "efficiency": round(one / size / each.seconds, 4),
         "memory_mib": round(each.memory / 2**20, 1), "chosen": name == best}
        for name, each in costs.items()
    ]  # fmt: skip


LENGTHS_OF_DOCUMENTS: dict[str, Callable[[random.Random], float]] = {
    "log-normal, median 1.3k": lambda r: r.lognormvariate(7.2, 1.0),
    "log-normal, median 4.9k": lambda r: r.lognormvariate(8.5, 1.3),
    "uniform to 32k": lambda r: r.uniform(1, 32768),
    "Pareto": lambda r: 500 * r.paretovariate(1.0),
}
DRAWS = 20


def imbalances(size: int) -> list[dict[str, Any]]:
    """Of packed documents on `size` ranks: the mean over draws, by layout."""
    draw, tokens, rows = random.Random(0), LENGTHS[0], []
    for name, length in LENGTHS_OF_DOCUMENTS.items():
        found: dict[str, list[float]] = {"contiguous": [], "zigzag": [], "documents": []}
        for _ in range(DRAWS):
            positions = packed(tokens, partial(length, draw))
            found["documents"].append(balanced_layout(positions, size)[1])
            for kind in ("contiguous", "zigzag"):
                layout = Layout(kind, size, tokens)  # type: ignore[arg-type]
                shares = [float((positions[layout.positions(rank)] + 1).sum()) for rank in range(size)]
                found[kind].append(max(shares) * size / sum(shares))
        means = {kind: round(statistics.mean(values), 3) for kind, values in found.items()}
        rows.append({"lengths": name, "ranks": size, **{f"{kind}_layout": x for kind, x in means.items()}})
    return rows


def packed(tokens: int, length: Callable[[], float]) -> torch.Tensor:
    """position_ids of documents one after the other."""
    parts, left = [], tokens
    while left:
        parts.append(torch.arange(min(left, max(1, int(length())))))
        left -= len(parts[-1])
    return torch.cat(parts)


def bars_of(choice: dict[str, Any], packed_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    share = choice["good_choices"] / choice["cells"] if choice["cells"] else None
    return [
        bar("schedules predicted to be fastest that are, or within 3 % of it: share", share, 0.9),
        bar("settings and modes of several schedules", choice["cells"], 20),
        bar(
            "packed documents: work of the busiest of 2 to 64 ranks over the mean",
            max(row["documents_layout"] for row in packed_rows),
            1.05,
            at_least=False,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--between", type=float, default=50.0, help="GB/s of a GPU between nodes")
    parser.add_argument("--measured", type=Path, default=RESULTS / "ring_attention.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    source = json.loads(options.measured.read_text(encoding="utf-8"))
    rows = compared(source["rows"])
    choice = {"device": source["device"], "commit": source["commit"], **choices(rows)}
    rows.append(choice)
    for length in LENGTHS:
        for size in SIZES:
            rows += scaled(length, size, options.between * 1e9)
    of_documents = [row for size in (2, 8, 64) for row in imbalances(size)]
    rows += of_documents
    for row in rows:
        print(row)
    write("context_scaling", rows, bars_of(choice, of_documents), {}, options.out)


if __name__ == "__main__":
    main()
