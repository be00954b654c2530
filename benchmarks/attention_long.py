"""Attention over a million tokens and over ten on one GPU: seconds, peak memory, and rows in float64.

    python benchmarks/attention_long.py [--train 1048576 32 8] [--forward 10485760 4 1] [--out DIR]

bfloat16, D128, causal, one sequence; LENGTH, query heads and key heads. kp's kernels alone: q, k, v and what
they write are all that lies in memory. 256 random rows of the output, and of dq where there is a backward
pass, are computed again in float64 from the same inputs; 64 rows of dk and dv from the rows' log-sum-exp and
delta. The kernels are compiled before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, bar, write
from torch import Tensor

from kp_compiler.lowering import attend
from kp_compiler.specs import AttentionSpec, MaskSpec

WIDTH, ROWS, KEY_ROWS, PART = 128, 256, 64, 2**16
SPEC = AttentionSpec(WIDTH**-0.5, MaskSpec("causal", "k <= q"))
PLAN = attend.Plan(SPEC).to_json()
LIMITS = {1048576: {"forward": (16.5, 22.0), "both": (67.0, 60.0)}, 10485760: {"forward": (215.0, 28.0)}}
ERROR = 1e-2  # relative, of bfloat16 results


def inputs(length: int, heads: int, kv_heads: int) -> list[Tensor]:
    """q, k and v [1,H,N,D], as projections give them."""
    return [
        torch.randn(1, length, n, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]


def run(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = attend.attend()(*leaves, [], [], [], None, None, None, PLAN)
    return out, lse


def timed(step: Any) -> tuple[Any, float, float]:
    """What a step gives, its seconds and the peak of all memory in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    found = step()
    end.record()
    torch.cuda.synchronize()
    return found, start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() / 2**30


def parts(size: int) -> Iterator[slice]:
    return (slice(first, min(first + PART, size)) for first in range(0, size, PART))


def exact_rows(q: Tensor, k: Tensor, v: Tensor, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """out [rows,D] and log-sum-exp [rows] of one head in float64, a few rows at a time."""
    found = [_exact_rows(q, k, v, head, few) for few in rows.split(32)]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    mine = q[0, head, rows].double() * SPEC.scale
    scores = torch.cat([mine @ k[0, head // group, part].double().T for part in parts(k.shape[2])], 1)
    keys = torch.arange(k.shape[2], device=q.device)
    scores.masked_fill_(keys > rows[:, None], float("-inf"))
    lse = torch.logsumexp(scores, 1)
    weights = torch.exp(scores - lse[:, None])
    out = sum(weights[:, part] @ v[0, head // group, part].double() for part in parts(k.shape[2]))
    return out, lse


def exact_dq(leaves: list[Tensor], grad: Tensor, head: int, rows: Tensor) -> Tensor:
    """Rows of dq of one head in float64."""
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    out, lse = exact_rows(q, k, v, head, rows)
    mine, given = q[0, head, rows].double(), grad[0, head, rows].double()
    delta = (out * given).sum(1)
    total = torch.zeros_like(mine)
    for part in parts(k.shape[2]):
        key, value = k[0, head // group, part].double(), v[0, head // group, part].double()
        p = torch.exp(mine @ key.T * SPEC.scale - lse[:, None])
        p.masked_fill_(torch.arange(part.start, part.stop, device=q.device) > rows[:, None], 0.0)
        total += p * (given @ value.T - delta[:, None]) @ key
    return total * SPEC.scale


def exact_dkdv(
    leaves: list[Tensor], grad: Tensor, out: Tensor, lse: Tensor, kv_head: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of dk and dv of one key head in float64, from the forward pass's results."""
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    key, value = k[0, kv_head, rows].double(), v[0, kv_head, rows].double()
    dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    for head in range(kv_head * group, (kv_head + 1) * group):
        for part in parts(q.shape[2]):
            query, given = q[0, head, part].double(), grad[0, head, part].double()
            delta = (given * out[0, head, part].double()).sum(1)
            p = torch.exp(key @ query.T * SPEC.scale - lse[0, head, part].double())
            p.masked_fill_(torch.arange(part.start, part.stop, device=q.device) < rows[:, None], 0.0)
            dv += p @ given
            dk += p * (value @ given.T - delta) @ query
    return dk * SPEC.scale, dv


def error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


def measure(length: int, heads: int, kv_heads: int, *, train: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    short = [x.requires_grad_(train) for x in inputs(8192, heads, kv_heads)]
    out, lse = run(short)
    if train:
        torch.autograd.grad(out, short, torch.randn_like(out))
    leaves = inputs(length, heads, kv_heads)
    if train:  # compiled once more, for strides of 64 bits; where that takes minutes it does not matter
        run(leaves)
    setting = {"length": length, "heads": heads, "kv_heads": kv_heads}
    work = 4.0 * WIDTH * heads * length * (length + 1) / 2
    rows = torch.randint(0, length, (ROWS,), device="cuda").sort().values
    head = heads - 1
    (out, lse), seconds, peak = timed(lambda: run(leaves))
    theirs, _ = exact_rows(*leaves, head, rows)
    rate, off = round(work / seconds / 1e12, 1), error(out[0, head, rows], theirs)
    found = [{**setting, "mode": "forward", "seconds": round(seconds, 3), "gib": round(peak, 2),
              "tflops": rate, "error": off}]  # fmt: skip
    if train:
        del out, lse
        found.append({**setting, "mode": "both", **_both(leaves, work, head, rows)})
    bars = []
    for row in found:
        limit = LIMITS.get(length, {}).get(row["mode"])
        for what, target in zip(("seconds", "gib"), limit or (), strict=False):
            value = row[what]
            bars.append(bar(f"{length} tokens, {row['mode']}: {what}", value, target, at_least=False))
        bars.append(bar(f"{length} tokens, {row['mode']}: error", row["error"], ERROR, at_least=False))
        print(row, flush=True)
    return found, bars


def _both(leaves: list[Tensor], work: float, head: int, rows: Tensor) -> dict[str, Any]:
    """Forward and backward as one, and the largest error of the gradients."""
    for x in leaves:
        x.requires_grad_()
    grad = torch.randn_like(leaves[0])

    def step() -> tuple[Tensor, ...]:
        out, lse = run(leaves)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)

    (out, lse, dq, dk, dv), seconds, peak = timed(step)
    plain = [x.detach() for x in leaves]
    few = rows[:: ROWS // KEY_ROWS]
    wanted = exact_dkdv(plain, grad, out, lse, 0, few)
    errors = [error(dq[0, head, rows], exact_dq(plain, grad, head, rows))]
    errors += [error(x[0, 0, few], theirs) for x, theirs in zip((dk, dv), wanted, strict=True)]
    return {"seconds": round(seconds, 3), "gib": round(peak, 2),
            "tflops": round(3.5 * work / seconds / 1e12, 1), "error": max(errors)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    three = {"type": int, "nargs": 3, "metavar": ("LENGTH", "HEADS", "KV_HEADS")}
    parser.add_argument("--train", default=(1048576, 32, 8), **three)
    parser.add_argument("--forward", default=(10485760, 4, 1), **three)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, bars = measure(*options.train, train=True)
    more, more_bars = measure(*options.forward, train=False)
    write("attention_long", rows + more, bars + more_bars, {}, options.out)


if __name__ == "__main__":
    main()
