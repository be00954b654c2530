"""Cold compile time of whole models: Inductor and kp, each in a fresh process with empty caches.

    python benchmarks/compile_time.py [--rounds 3] [--seconds 600] [--out DIR]

A process builds the model, runs one uncompiled step (so that libraries are loaded), then times the first
compiled call (training: forward and backward) with caches in an empty folder. Arms alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS = [
    ("llama", "sdpa", False),
    ("llama", "sdpa", True),
    ("llama", "eager", True),
    ("mistral", "sdpa", False),
]


def child(model_name: str, implementation: str, train: bool, backend: str) -> None:
    """Print the seconds of one cold compile, and those kp's passes took."""
    import models
    import torch

    build = {"llama": models.llama, "mistral": models.mistral}[model_name]
    model = build().train(train)
    model.set_attn_implementation(implementation)
    ids = torch.randint(0, 32000, (1, 2048), device="cuda")
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if train:
        inputs["labels"] = ids

    def step(run: Any) -> None:
        with torch.set_grad_enabled(train):
            out = run(**inputs)
            if train:
                out.loss.backward()
        torch.cuda.synchronize()

    step(model)
    compiled = torch.compile(model, backend=backend)
    import kp_compiler.backend  # noqa: F401  (what an entry point loads on first use, timed in neither arm)

    start = time.perf_counter()
    step(compiled)
    print(json.dumps({"seconds": time.perf_counter() - start}))


def measure(setting: tuple[str, str, bool], backend: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, __file__, "--child", json.dumps([*setting, backend])]
        out = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    if out.returncode:
        raise SystemExit(out.stderr[-2000:])
    return float(json.loads(out.stdout.strip().splitlines()[-1])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no measurement after this long")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
        return
    from harness import RESULTS

    times: dict[str, dict[str, list[float]]] = {}
    stop = time.monotonic() + options.seconds
    for _ in range(options.rounds):
        for setting in SETTINGS:
            if time.monotonic() > stop:
                return
            name = f"{setting[0]} {setting[1]} {'train' if setting[2] else 'forward'}"
            of = times.setdefault(name, {"inductor": [], "kp": []})
            for backend, seconds in of.items():
                seconds.append(measure(setting, backend))
            print(
                name, {backend: [round(s, 1) for s in seconds] for backend, seconds in of.items()}, flush=True
            )
            report(times, options.out or RESULTS)


def report(times: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Write what has been measured so far: medians of the rounds."""
    from harness import bar, write

    import kp_compiler

    rows, bars = [], []
    for name, of in times.items():
        median = {backend: statistics.median(values) for backend, values in of.items()}
        rows += [
            {"setting": name, "arm": k, "seconds": round(v, 2), "all": [round(t, 2) for t in of[k]]}
            for k, v in median.items()
        ]
        ratio = median["kp"] / median["inductor"]
        bars.append(bar(f"{name}: cold compile time against Inductor", ratio, 1.15, at_least=False))
    write("compile_time", rows, bars, {"kp": kp_compiler.__version__}, out)


if __name__ == "__main__":
    main()
