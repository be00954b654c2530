"""One attention site at a time: every kernel of the lowering table that takes it, forward and forward +
backward.

    python benchmarks/attention_kernels.py [--length 32768] [--out DIR]

These figures order `kp_compiler.lowering.table`. Masks are written as user code and proved by kp; kernels are
asked for by name. TFLOP/s count unmasked pairs only (4·D per pair forward, 2.5 times that backward).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_models import packed_positions
from harness import RESULTS, time_interleaved, warm, write

import kp_compiler

KERNELS = ("cudnn", "flash", "flex", "efficient", "fa4")


def attend(kind: str, length: int, segments: torch.Tensor, keep: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Attention with a mask of one kind, as a user writes it."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(length, device=q.device)[:, None]
        columns = torch.arange(length, device=q.device)[None, :]
        mask = columns <= rows
        if kind == "window":
            mask = mask & (columns > rows - 1024)
        elif kind == "document":
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        elif kind == "padding":
            mask = mask & keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return run


def pairs(kind: str, length: int, segments: torch.Tensor, keep: torch.Tensor) -> float:
    """Unmasked pairs of one head and sequence."""
    if kind == "window":
        return 1024 * length - 1024 * 1023 / 2
    if kind == "document":
        sizes = torch.bincount(segments[0]).double()
        return float((sizes * (sizes + 1) / 2).sum())
    if kind == "padding":
        return float(torch.cumsum(keep[0].double(), 0).sum())
    return length * (length + 1) / 2


def steps_of(function: Any, q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    def forward() -> None:
        with torch.no_grad():
            function(q, k, v)

    def both() -> None:
        function(q, k, v).backward(torch.ones_like(q))
        q.grad = k.grad = v.grad = None

    return {"forward": forward, "forward+backward": both}


def measure(
    kind: str, length: int, heads: int, kv_heads: int, width: int, repeats: int
) -> list[dict[str, Any]]:
    q = torch.randn(1, heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, kv_heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    segments = (packed_positions(length) == 0).cumsum(-1)
    keep = torch.ones(1, length, dtype=torch.bool, device="cuda")
    keep[:, : length // 8] = False
    work = 4.0 * width * heads * pairs(kind, length, segments, keep)
    steps: dict[tuple[str, str], Any] = {}
    for kernel in KERNELS:
        torch._dynamo.reset()
        with kp_compiler.capture_reports() as reports:
            options = {"attention": {"impl": kernel}}
            compiled = torch.compile(attend(kind, length, segments, keep), backend="kp", options=options)
            found = steps_of(compiled, q, k, v)
            with torch.no_grad():
                try:
                    compiled(q, k, v)
                except torch.OutOfMemoryError:
                    continue
        if not any(r.rewritten() for r in reports):
            continue
        for mode, step in found.items():
            if warm(kernel, step, 3):
                steps[mode, kernel] = step
    times = time_interleaved({f"{m}/{n}": s for (m, n), s in steps.items()}, repeats)
    rows = []
    for mode, kernel in steps:
        ms = times[f"{mode}/{kernel}"]
        tflops = work * (1.0 if mode == "forward" else 3.5) / ms / 1e9
        name = f"{kind} {length} {heads}:{kv_heads} D{width}"
        rows.append(
            {"setting": name, "mode": mode, "kernel": kernel, "ms": round(ms, 4), "tflops": round(tflops, 1)}
        )
        print(f"{name:32s} {mode:18s} {kernel:10s} {ms:8.3f} ms {tflops:7.1f} TFLOP/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--kinds", nargs="*", default=["causal", "window", "document", "padding"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256
    rows = []
    for kind in options.kinds:
        rows += measure(kind, options.length, 16, 4, 128, options.repeats)
    write("attention_kernels", rows, [], {"kp": kp_compiler.__version__}, options.out)


if __name__ == "__main__":
    main()
