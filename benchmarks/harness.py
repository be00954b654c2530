"""Timing, memory and result files shared by the benchmarks (DESIGN of a result file: see CONTRIBUTING.md)."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kp_compiler.capture import versions

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]
# A step that is bound by the host moves by a tenth from call to call, a span of them does not.
SPAN_MS = 30.0
# Under load a GPU at its power limit lowers its clocks, for bfloat16 more than for FP8. A linear layer 16384
# to 4096 on one H100, 2026-11-26: bfloat16 8.02 ms in short spans with pauses, 8.64 without; FP8 5.00, 5.03.
# Long spans without pauses are what a loop over batches sees.
SUSTAINED: dict[str, float] = {"pause": 0.0, "span_ms": 200.0}


def synchronise() -> None:
    torch.cuda.synchronize()


def time_interleaved(
    steps: dict[str, Step], repeats: int, pause: float = 0.05, span_ms: float = SPAN_MS
) -> dict[str, float]:
    """Median milliseconds of each step. Every round visits each once, in a new order, `pause` seconds apart
    (an arm that follows a power-hungry one would otherwise run at its lower clocks), and times a span of
    calls queued behind an untimed one: the host runs ahead, as it does in a loop over batches, so a step
    costs what the longer of host and GPU needs, not the sum of both."""
    calls = {name: max(2, math.ceil(span_ms / _span(step, 1))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    with _no_collection():
        for _ in range(repeats):
            shuffle(order)
            for name in order:
                time.sleep(pause)
                times[name].append(_span(steps[name], calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def recorded(step: Step) -> Step:
    """The step as a CUDA graph, which the host launches at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _span(step: Step, calls: int) -> float:
    """Milliseconds a call, of `calls` calls behind an untimed one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronise()
    step()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    synchronise()
    return start.elapsed_time(end) / calls


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector stands still, as in `timeit`."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_gib(step: Step) -> float:
    """Peak memory of one call above what was allocated before it, in GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronise()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def warm(name: str, step: Step, calls: int = 3) -> bool:
    """Run a step until it is compiled; False where it does not fit into memory."""
    try:
        for _ in range(calls):
            step()
        synchronise()
        return True
    except torch.OutOfMemoryError:
        print(f"  {name}: out of memory", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
        return False


def bar(name: str, value: float | None, target: float, *, at_least: bool = True) -> dict[str, Any]:
    """One bar of an issue. Missing values are not met."""
    ok = value is not None and (value >= target if at_least else value <= target)
    return {
        "name": name,
        "value": None if value is None else round(value, 4),
        "target": target,
        "better": "higher" if at_least else "lower",
        "ok": ok,
    }


def write(
    name: str,
    rows: list[dict[str, Any]],
    bars: list[dict[str, Any]],
    peers: dict[str, str],
    out: Path | None = None,
    stamp: dict[str, Any] | None = None,
) -> Path:
    """Write the result file and print its bars. `stamp` says where and when rows of earlier runs were
    measured."""
    data = {"benchmark": name, **(stamp or here()), "peers": peers, "rows": rows, "bars": bars}
    path = (out or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    for each in bars:
        print(f"{'ok  ' if each['ok'] else 'MISS'} {each['name']}: {each['value']} (target {each['target']})")
    return path


def installed(*packages: str) -> dict[str, str]:
    """Versions of those packages that are there, for a result file's peers."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def here() -> dict[str, Any]:
    """Date, commit, device and versions of this run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("KP_COMMIT") or _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": versions().get("triton"),
    }


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
