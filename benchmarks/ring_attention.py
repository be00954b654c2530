"""Attention over sequences that GPUs share: time of every schedule, against one GPU and against PyTorch's.

    torchrun --nproc-per-node 2 benchmarks/ring_attention.py [--settings 32768:32:8 …] [--repeats 5]
        [--long 1048576:32:8] [--providers …] [--out DIR] [--keep]

bfloat16, D128, causal, one sequence of LENGTH:HEADS:KV_HEADS. `one GPU` is the fastest of cuDNN's and kp's
kernels on the first GPU, while the others wait; `kp on each GPU` is the slowest of all that do the same at
once, which is slower where one of them is. kp's schedules run as their operator, on tensors that are
divided already; `torch` is torch.distributed.tensor.experimental.context_parallel over cuDNN's kernels, by
both of its rotations, which divides tensors itself, before it is timed; `by hand` exchanges heads with
all-to-all and calls cuDNN. A time is the slowest rank's, a median over rounds in which each step comes once,
in a new order.

efficiency: t₁ / (P · t_P).   memory: the peak of one rank above its own q, k, v, out and log-sum-exp.
errors: 512 rows of the first head in float64, of schedules and of one kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_long import exact_rows
from harness import RESULTS, bar, here, write
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from kp_compiler import context_cost
from kp_compiler.lowering import attend, ring
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.specs import CAUSAL, AttentionShape, AttentionSpec
from kp_compiler.target import detect

WIDTH, ROWS = 128, 512
SPEC = AttentionSpec(WIDTH**-0.5, CAUSAL)
SETTINGS = (
    "32768:32:8", "65536:32:8", "262144:32:8", "32768:16:16", "65536:16:16", "16384:32:8", "131072:32:8",
    "16384:16:16", "131072:16:16", "32768:32:1", "131072:32:1",
)  # fmt: skip
SCHEDULES = ("ring", "allgather", "ulysses")
PROVIDERS = (*SCHEDULES, "torch allgather", "torch alltoall", "by hand")
EACH = "kp on each GPU"
SPAN = 0.2  # seconds of calls that are timed as one
# efficiency at least: forward, forward and backward, by heads and length
BARS = {
    ("32:8", 32768): (0.90, 0.92), ("32:8", 65536): (0.95, 0.96), ("32:8", 262144): (1.02, 1.01),
    ("16:16", 32768): (0.88, None), ("16:16", 65536): (0.93, None),
}  # fmt: skip
Step = Callable[[], Any]


def whole(length: int, heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and the gradient of out [1,H,N,D] as projections give them, the same on every rank."""
    how: Any = {"device": "cuda", "dtype": torch.bfloat16}
    how["generator"] = torch.Generator("cuda").manual_seed(length)
    many = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(1, length, n, WIDTH, **how).transpose(1, 2) for n in many]


def both(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Step:
    mine = [x.detach().requires_grad_() for x in leaves]
    return lambda: torch.autograd.grad(call(*mine), mine, grad)


def forward(call: Callable[..., Tensor], leaves: list[Tensor]) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    return step


def kp_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend.attend()(q, k, v, [], [], [], None, None, None, attend.Plan(SPEC).to_json())[0]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def shared(schedule: str) -> Callable[..., Tensor]:
    group = dist.group.WORLD
    assert group is not None
    plan = ring.Plan(SPEC, schedule, "zigzag", group.group_name, dist.get_rank(), dist.get_world_size())
    text = plan.to_json()
    return lambda q, k, v: ring.context_attention()(q, k, v, [], [], text)[0]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens to heads, attention, and back, tokens in contiguous parts."""
    found = cudnn(*(_Swap.apply(x, True) for x in (q, k, v)))
    return _Swap.apply(found, False)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: bool) -> Tensor:
        ctx.heads = heads
        return _swapped(x, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swapped(grad, not ctx.heads), None


def _swapped(x: Tensor, heads: bool) -> Tensor:
    """[1,H,n,D] of some tokens to [1,H/P,N,D] of some heads, or back."""
    size = dist.get_world_size()
    parts = x.unflatten(1 if heads else 2, (size, -1)).movedim(1 if heads else 2, 0).contiguous()
    found = torch.empty_like(parts)
    dist.all_to_all_single(found, parts)
    return found.movedim(0, 2 if heads else 1).flatten(2 if heads else 1, 3 if heads else 2)


@contextlib.contextmanager
def torch_shared(rotation: str, tensors: list[Tensor]) -> Iterator[Callable[..., Tensor]]:
    """Within, `tensors` [1,H,N,D] are this rank's parts."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotation)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    with context_parallel(mesh, buffers=tensors, buffer_seq_dims=[2] * len(tensors)):
        yield cudnn


def steps_of(name: str, tensors: list[Tensor], layouts: dict[str, Tensor]) -> dict[str, Step]:
    """Both modes of one of kp's schedules or of the exchange by hand, on this rank's part."""
    places = layouts["contiguous" if name == "by hand" else "zigzag"]
    q, k, v, grad = (x.index_select(2, places).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    call = by_hand if name == "by hand" else shared(name)
    return {"forward": forward(call, [q, k, v]), "both": both(call, [q, k, v], grad)}


def timed(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Seconds a call, of the slowest rank; every rank makes the same calls in the same order."""
    calls = {}
    for name, step in steps.items():
        step()
        once = _span(step, 1)
        calls[name] = max(1, math.ceil(SPAN / once))
        if dist.get_rank() == 0:
            print(f"  {name}: once {1e3 * once:.2f} ms", flush=True)
    found: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            found[name].append(_span(steps[name], calls[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _span(step: Step, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    seconds = torch.tensor([start.elapsed_time(end) / 1e3 / calls], device="cuda")
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def peak(step: Step) -> float:
    """Bytes that a call takes at most, above what was there before it; of the rank with the most."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    found = torch.tensor([float(torch.cuda.max_memory_allocated() - before)], device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def alone(tensors: list[Tensor]) -> dict[str, Step]:
    """cuDNN's and kp's kernels on the first GPU, while the others make the same calls on tensors of a few
    tokens; and kp's on every GPU at once."""
    mine = tensors if dist.get_rank() == 0 else [x[:, :, :256] for x in tensors]
    steps: dict[str, Step] = {}
    for name, call, (q, k, v, grad) in (
        ("cudnn", cudnn, mine),
        ("kp", kp_alone, mine),
        (EACH, kp_alone, tensors),
    ):
        steps |= {f"{name}/forward": forward(call, [q, k, v]), f"{name}/both": both(call, [q, k, v], grad)}
    return steps


def error(got: Tensor, tensors: list[Tensor], places: Tensor) -> float:
    """Of rows of the first head, the same for all that are compared, against float64. `places` [n] of the
    rows that this rank has."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(tensors[0].shape[2], generator=generator)[:ROWS].to(places.device)
    (rows,) = torch.isin(places, chosen).nonzero(as_tuple=True)
    want, _ = exact_rows(*tensors[:3], 0, places[rows])
    off = got[0, 0, rows].double() - want
    sums = torch.stack([off.square().sum(), want.square().sum()])
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def measure(length: int, heads: int, kv_heads: int, options: Any) -> list[dict[str, Any]]:
    size, rank = dist.get_world_size(), dist.get_rank()
    tensors = whole(length, heads, kv_heads)
    layouts = {kind: Layout(kind, size, length).positions(rank, "cuda") for kind in ("zigzag", "contiguous")}  # type: ignore[arg-type]
    memory: dict[str, float] = {}
    steps = alone(tensors)
    for name in options.providers:
        if name == "by hand" and kv_heads % size:
            continue  # heads that ranks can't have a part each of
        if not name.startswith("torch"):
            for mode, step in steps_of(name, tensors, layouts).items():
                steps[f"{name}/{mode}"] = step
                step()
                memory[f"{name}/{mode}"] = peak(step)
    found: dict[tuple[str, str], float]
    found = {tuple(key.split("/")): s for key, s in timed(steps, options.repeats).items()}  # type: ignore[misc]
    errors = {"kp": error(kp_alone(*tensors[:3]), tensors, torch.arange(length, device="cuda"))}
    for name in (name for name in options.providers if name in SCHEDULES):  # in the same order on all ranks
        errors[name] = error(steps[f"{name}/forward"](), tensors, layouts["zigzag"])
    steps.clear()
    for name in options.providers:
        if name.startswith("torch"):
            with torch_shared(name.split()[1], copies := [x.contiguous() for x in tensors]) as call:
                theirs = {f"{name}/forward": forward(call, copies[:3])}
                theirs[f"{name}/both"] = both(call, copies[:3], copies[3])
                for key, step in theirs.items():
                    step()
                    memory[key] = peak(step)
                found |= {tuple(k.split("/")): s for k, s in timed(theirs, options.repeats).items()}  # type: ignore[misc]
    return rows_of(length, heads, kv_heads, found, memory, errors)


def rows_of(
    length: int, heads: int, kv_heads: int, found: dict[tuple[str, str], float], memory: dict[str, float],
    errors: dict[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    size = dist.get_world_size()
    mine = length // size
    sizes = (1, heads, kv_heads, mine, mine, WIDTH, WIDTH)
    shape = AttentionShape(*sizes, torch.bfloat16, "cuda", training=True)
    predicted = context_cost.predict(SPEC, shape, "zigzag", size, detect("cuda"))
    rows = []
    for (name, mode), seconds in found.items():
        ranks = 1 if name in ("cudnn", "kp", EACH) else size
        first = min(found[one, mode] for one in ("cudnn", "kp"))
        work = 4.0 * WIDTH * heads * length * (length + 1) / 2 * (1.0 if mode == "forward" else 3.5)
        row = {
            "length": length, "heads": f"{heads}:{kv_heads}", "provider": name, "ranks": ranks, "mode": mode,
            "ms": round(seconds * 1e3, 3), "tflops_per_gpu": round(work / seconds / ranks / 1e12, 1),
            "efficiency": round(first / ranks / seconds, 4),
        }  # fmt: skip
        if f"{name}/{mode}" in memory:
            row["peak_mib"] = round(memory[f"{name}/{mode}"] / 2**20, 1)
        if name in predicted:
            each = predicted[name]
            row["predicted_ms"] = round(1e3 * (each.forward if mode == "forward" else each.seconds), 3)
        if mode == "forward" and name in errors:
            row["error"] = errors[name]
        rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
    return rows


def long_forward(length: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """One forward pass by the ring, each rank's tensors made in place; the second call is timed."""
    size = dist.get_world_size()
    q, k, v, _ = whole(length // size, heads, kv_heads)
    step = forward(shared("ring"), [q, k, v])
    step()
    torch.cuda.empty_cache()
    row = {"length": length, "heads": f"{heads}:{kv_heads}", "provider": "ring", "ranks": size,
           "mode": "forward, once", "peak_mib": round(peak(step) / 2**20, 1)}  # fmt: skip
    row["ms"] = round(1e3 * _span(step, 1), 1)
    if dist.get_rank() == 0:
        print(row, flush=True)
    return row


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {(r["heads"], r["length"], r["provider"], r["mode"]): r for r in rows}
    bars = []
    points = dict.fromkeys([*BARS, *(key[:2] for key in by)])
    for heads, length in points:
        targets = BARS.get((heads, length), (None, None))
        for mode, target in zip(("forward", "both"), targets, strict=True):
            mine = [r for s in SCHEDULES if (r := by.get((heads, length, s, mode)))]
            if not mine:
                continue
            best = max(mine, key=lambda r: r["efficiency"])
            what = f"{heads} heads, {length} tokens, {mode}"
            if target is not None:
                bars.append(bar(f"{what}: efficiency ({best['provider']})", best["efficiency"], target))
            peers = [r["ms"] for p in PROVIDERS[3:] if (r := by.get((heads, length, p, mode)))]
            if peers:
                bars.append(bar(f"{what}: against the best peer", min(peers) / best["ms"], 1.0))
    for (heads, length, _, mode), row in by.items():
        if row["provider"] == "ring" and mode == "forward":
            h, kv = map(int, heads.split(":"))
            mine = length // row["ranks"]
            keys, out = 2 * 2 * kv * mine * WIDTH, h * mine * (2 * WIDTH + 4)
            own = 2 * h * mine * WIDTH + keys + out
            limit = 1.10 * (own + 2 * keys)
            used = row["peak_mib"] * 2**20 + 2 * h * mine * WIDTH + keys
            what = f"{heads} heads, {length} tokens: ring's memory, in parts of its limit"
            bars.append(bar(what, used / limit, 1.0, at_least=False))
    one = {key[:2]: r["error"] for key, r in by.items() if key[2] == "kp" and "error" in r}
    ratios = [r["error"] / one[key[:2]] for key, r in by.items() if key[2] in SCHEDULES and "error" in r]
    if ratios:
        what = "error against float64, in parts of one kernel's"
        bars.append(bar(what, max(ratios), 1.10, at_least=False))
    once = [r["ms"] / 1e3 for r in rows if r["mode"] == "forward, once" and r["length"] == 1048576]
    bars += [bar("1048576 tokens, 32:8 heads, forward: seconds", s, 8.6, at_least=False) for s in once]
    return bars


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    """What there is so far: a run that is cut off loses nothing."""
    if dist.get_rank() == 0:
        write("ring_attention", rows, bars_of(rows), {}, out)


def earlier(out: Path) -> list[dict[str, Any]]:
    """Rows that are there; SystemExit where they are of another commit, device or version."""
    data, now = json.loads((out / "ring_attention.json").read_text()), here()
    others = [f"{name} {data[name]}" for name in now if name != "date" and data[name] != now[name]]
    if others:
        raise SystemExit(f"--keep: {out / 'ring_attention.json'} is of {', '.join(others)}")
    rows: list[dict[str, Any]] = data["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="*", default=SETTINGS, metavar="LENGTH:HEADS:KV_HEADS")
    parser.add_argument("--providers", nargs="*", default=PROVIDERS)
    parser.add_argument("--long", nargs="*", default=["1048576:32:8"], metavar="LENGTH:HEADS:KV_HEADS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="add to the rows of this commit that OUT has")
    options = parser.parse_args()
    rows = earlier(options.out) if options.keep else []
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_node_local_rank())
    for setting in options.settings:
        rows += measure(*map(int, setting.split(":")), options)  # type: ignore[call-arg]
        torch.cuda.empty_cache()
        _write(rows, options.out)
    for setting in options.long:
        rows.append(long_forward(*map(int, setting.split(":"))))  # type: ignore[call-arg]
        _write(rows, options.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
