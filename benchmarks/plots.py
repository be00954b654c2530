"""Pictures of result files, beside them: where people would rather look than read.

    python benchmarks/plots.py [NAME …] [--results DIR]

Apart from the benchmarks, since a machine with a GPU need not have matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from harness import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]


def grouped(axes: Any, points: list[tuple[str, str, float | None]]) -> None:
    """Bars of (group, series, value), series side by side."""
    groups, series = (list(dict.fromkeys(point[i] for point in points)) for i in (0, 1))
    width = 0.8 / len(series)
    for place, name in enumerate(series):
        found = [
            (groups.index(g) + (place - len(series) / 2 + 0.5) * width, y) for g, s, y in points if s == name
        ]
        axes.bar([x for x, y in found if y], [y for _, y in found if y], width=width, label=name)
    axes.set_xticks(range(len(groups)), groups, fontsize=7, rotation=30)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def bars(points: list[tuple[str, str, float | None]], label: str, level: float | None = None) -> Any:
    """One chart of `grouped`, with a line at what is normal."""
    count = len({group for group, _, _ in points})
    figure, axes = plt.subplots(figsize=(max(8, 1.1 * count), 4.5))
    grouped(axes, points)
    axes.set_ylabel(label)
    if level is not None:
        axes.axhline(level, color="black", linewidth=0.8)
    return figure


def attention_models(rows: Rows) -> Any:
    """Milliseconds by setting and arm."""
    figure = bars([(f"{r['setting']}\n{r['mode']}", r["arm"], r["ms"]) for r in rows], "ms (log)")
    figure.axes[0].set_yscale("log")
    return figure


def attention_kernels(rows: Rows) -> Any:
    """TFLOP/s over length, a chart for each mask and head size; forward whole lines, backward dashed."""
    rows = [r for r in rows if "mask" in r and not r["mask"].startswith("blocks")]
    masks, widths = (sorted({r[name] for r in rows}) for name in ("mask", "width"))
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    size = (4 * len(masks), 3.2 * len(widths))
    figure, axes = plt.subplots(len(widths), len(masks), figsize=size, squeeze=False, sharex=True)
    for (line, width), (column, mask) in itertools.product(enumerate(widths), enumerate(masks)):
        chart = axes[line][column]
        for provider, mode in itertools.product(providers, ("forward", "backward")):
            here = (width, mask, provider, mode)
            found = [r for r in rows if (r["width"], r["mask"], r["provider"], r["mode"]) == here]
            found.sort(key=lambda r: r["length"])
            color, style = f"C{providers.index(provider)}", "-" if mode == "forward" else "--"
            label = provider if mode == "forward" else None
            points = [r["length"] for r in found], [r["tflops"] for r in found]
            chart.plot(*points, style, color=color, marker=".", label=label)
        chart.set_title(f"{mask}, D{width}", fontsize=9)
        chart.set_xscale("log", base=2)
        chart.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    axes[0][0].set_ylabel("TFLOP/s")
    return figure


def fp8_gemm(rows: Rows) -> Any:
    """Rates by shape and kind of scales."""
    return bars([(_shape(r), r["arm"], r["tflops"]) for r in rows], "TFLOP/s")


def fp8_linear(rows: Rows) -> Any:
    """Speed-ups over bfloat16 by shape and arm."""
    base = {_shape(r): r["ms"] for r in rows if r["arm"] == "bf16"}
    points = [(_shape(r), r["arm"], base[_shape(r)] / r["ms"]) for r in rows if r["arm"] != "bf16"]
    return bars(points, "speed-up over bf16, forward and backward", 1.0)


def fp8_model(rows: Rows) -> Any:
    """Speed-ups over Inductor in bfloat16 by arm, of training and of inference."""
    base = {r["mode"]: r["ms"] for r in rows if r["arm"] == "inductor"}
    points = [(r["arm"], r["mode"], base[r["mode"]] / r["ms"]) for r in rows if r["arm"] != "inductor"]
    return bars(points, "speed-up over Inductor, bf16", 1.0)


def fp8_casts(rows: Rows) -> Any:
    """Time of an operation with its cast, in parts of the operation's own in bfloat16."""
    timed = [r for r in rows if "ratio" in r and r["arm"] != "bf16"]
    points = [(f"{r['op']}\n{r['M']} x {r['K']}", r["arm"], r["ratio"]) for r in timed]
    return bars(points, "time against the operation alone, bf16", 1.0)


def fp8_sweep(rows: Rows) -> Any:
    """What each path gains and what the choice costs, by the size of the product."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for path, (mode, marker) in itertools.product(("bf16", "fp8"), (("train", "o"), ("inference", "x"))):
        chosen = [r for r in rows if (r["chosen"], r["mode"]) == (path, mode)]
        flops = [2 * r["M"] * r["K"] * r["N"] for r in chosen]
        settings = {"s": 14, "marker": marker, "color": "tab:blue" if path == "bf16" else "tab:orange"}
        label = f"{mode}, chosen: {path}"
        left.scatter(flops, [r["bf16_ms"] / r["fp8_ms"] for r in chosen], label=label, **settings)
        right.scatter(flops, [r["regret"] for r in chosen], **settings)
    left.set_ylabel("speed-up of FP8")
    left.axhline(1.0, color="black", linewidth=0.8)
    left.legend(fontsize=8)
    right.set_ylabel("time of the chosen path / of the faster one")
    right.axhline(1.02, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs of one product")
    return figure


def fp8_accuracy(rows: Rows) -> Any:
    """SQNR of every layer's output and gradients by recipe."""
    rows = [r for r in rows if "y_db" in r]
    recipes = list(dict.fromkeys(r["recipe"] for r in rows))
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for place, what in enumerate(("y", "dx", "dw")):
        x = [recipes.index(r["recipe"]) + (place - 1) * 0.2 for r in rows]
        axes.scatter(x, [r[f"{what}_db"] for r in rows], s=12, alpha=0.6, label=what)
    for floor in (27.5, 24.0):
        axes.axhline(floor, color="black", linewidth=0.8, linestyle="dashed")
    axes.set_xticks(range(len(recipes)), recipes)
    axes.set_ylabel("SQNR against float64, dB")
    axes.legend(fontsize=8)
    return figure


def _shape(row: dict[str, Any]) -> str:
    return "all" if row["K"] == "all" else f"{row['M']} x {row['K']} x {row['N']}"


def sparse_accuracy(rows: Rows) -> Any:
    """Accuracy and perplexity over density by selector, without training for it and after."""
    rows = [r for r in rows if "accuracy" in r]
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    figure, axes = plt.subplots(2, len(stages), figsize=(4.5 * len(stages), 7), squeeze=False, sharey="row")
    for column, stage in enumerate(stages):
        here = [r for r in rows if r["stage"] == stage]
        dense = next((r for r in here if r["selector"] == "dense"), None)
        for line, what in enumerate(("accuracy", "perplexity")):
            chart = axes[line][column]
            for name in dict.fromkeys(r["selector"] for r in here if r is not dense):
                found = [r for r in here if r["selector"] == name] + [dense] * (dense is not None)
                found.sort(key=lambda r: r["density"])
                chart.plot([r["density"] for r in found], [r[what] for r in found], marker=".", label=name)
            if dense is not None:
                chart.axhline(dense[what], color="black", linewidth=0.8, linestyle="dashed")
            chart.set_xscale("log")
            chart.set_xlabel("density")
        axes[0][column].set_title(stage, fontsize=9)
    axes[0][0].set_ylabel("tasks solved, %")
    axes[1][0].set_ylabel("perplexity of a byte")
    axes[0][0].legend(fontsize=8)
    return figure


def ring_attention(rows: Rows) -> Any:
    """Efficiency of every provider by setting, forward and both passes."""
    rows = [r for r in rows if r["ranks"] > 1 and "efficiency" in r]
    settings = list(dict.fromkeys((r["heads"], r["length"]) for r in rows))
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axes, mode in zip(panels, ("forward", "both"), strict=True):
        here = {(r["provider"], r["heads"], r["length"]): r["efficiency"] for r in rows if r["mode"] == mode}
        for name in dict.fromkeys(provider for provider, _, _ in here):
            points = [(i, here[name, *each]) for i, each in enumerate(settings) if (name, *each) in here]
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="dotted", label=name)
        axes.set_xticks(range(len(settings)), [f"{heads} heads\n{n // 1024}k" for heads, n in settings])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_title("forward" if mode == "forward" else "forward and backward", fontsize=9)
    panels[0].set_ylabel("fastest GPU alone / (GPUs x time)")
    panels[0].legend(fontsize=8)
    return figure


def context_scaling(rows: Rows) -> Any:
    """Predicted efficiency of the chosen schedule over GPUs, a line for each length, a marker for each
    schedule."""
    rows = sorted((r for r in rows if r.get("chosen")), key=lambda r: r["gpus"])
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for place, length in enumerate(sorted({r["length"] for r in rows})):
        here = [(r["gpus"], r["efficiency"]) for r in rows if r["length"] == length]
        axes.plot(*zip(*here, strict=True), color=f"C{place}", label=f"{length // 1024}k tokens")
    for name, marker in (("ring", "o"), ("allgather", "s"), ("ulysses", "^")):
        found = [(r["gpus"], r["efficiency"]) for r in rows if r["schedule"] == name]
        if found:
            axes.scatter(*zip(*found, strict=True), color="black", marker=marker, s=24, zorder=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes := sorted({r["gpus"] for r in rows}), [str(size) for size in sizes])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("predicted: GPU alone / (GPUs x time)")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


PLOTS: dict[str, Callable[[Rows], Any]] = {
    plot.__name__: plot
    for plot in (
        attention_models,
        attention_kernels,
        fp8_gemm,
        fp8_linear,
        fp8_model,
        fp8_casts,
        fp8_sweep,
        fp8_accuracy,
        sparse_accuracy,
        ring_attention,
        context_scaling,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(PLOTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.names or PLOTS:
        source = options.results / f"{name}.json"
        if not options.names and not source.exists():
            continue
        figure = PLOTS[name](json.loads(source.read_text(encoding="utf-8"))["rows"])
        figure.tight_layout()
        figure.savefig(source.with_suffix(".png"), dpi=130)
        print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
