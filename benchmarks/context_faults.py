"""Training with shared sequences whose ranks are killed, restarted by torchrun from its last checkpoint.

    python benchmarks/context_faults.py [--runs 20] [--seed 0] [--only 3 …] [--keep DIR] [--out DIR]

A small decoder is trained for 24 steps with context_parallel, once undisturbed by two processes. In each run
one rank, chosen at random, kills itself with SIGKILL, once: before a step, within one, or while a checkpoint
is saved. Where the number of processes stays, torchrun restarts all of them; where it changes, a second
torchrun goes on from the same folder. Weights are whole on every rank, or divided by FSDP2, from run to run,
and schedules change.

What torchrun needs for restarts: a rendezvous that can be repeated (c10d, which `--standalone` is),
`--max-restarts`, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: by default restarted processes find the addresses
of the dead ones in the store that torchrun keeps for them (https://github.com/pytorch/pytorch/issues/135712).

A checkpoint is a folder `step-N` of torch.distributed.checkpoint's, whose `.metadata` is written under
another name and renamed when all ranks' files are there: a folder without it is passed over.

hung: torchrun took more than LIMIT seconds.   survivors: what stopped the ranks that were not killed;
errors outside kp come from exchanges of FSDP2, of checkpoints and of the program, torchrun stops who is late.
worst: the largest relative difference of a loss from the undisturbed training's at its step, repeated steps
among them.   float32 over gloo on a CPU, autocast to bfloat16 over NCCL on GPUs, as many as there are.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import kp_compiler as kp
from kp_compiler.sharding import IGNORED, shifted_labels

STEPS, EVERY = 24, 4  # a checkpoint after every EVERY steps
TOKENS, VOCABULARY, LAYERS = 48, 61, 2
HEADS, KV_HEADS, WIDTH = 12, 4, 8
PATIENCE = datetime.timedelta(seconds=30)  # of exchanges
LIMIT = 240.0  # seconds of one torchrun
# processes before and after the kill
SIZES = ((2, 2), (2, 4), (3, 3), (3, 2), (4, 2))
SCHEDULES = ("ring", "allgather", "ulysses")
KILLS = ("before a step", "within a step", "within a save")
GPU = torch.cuda.is_available()
BOUND = 1e-2 if GPU else 1e-5


# ---------------------------------------------------------------------------------------------------------
# the training program


class Layer(nn.Module):
    """Attention with rotary positions, and a gated product. [B,N,D] → [B,N,D]"""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        dim = HEADS * WIDTH
        self.qkv = nn.Linear(dim, (HEADS + 2 * KV_HEADS) * WIDTH, bias=False)
        self.out, self.up, self.down = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        rates = 100.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.rates
        q, k = (turned(y, angles) for y in (q, k))
        found = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def decoder() -> nn.Sequential:
    """The same on every rank. Tokens [B,N] → logits [B,N,VOCABULARY]"""
    torch.manual_seed(0)
    layers = (Layer() for _ in range(LAYERS))
    dim = HEADS * WIDTH
    return nn.Sequential(nn.Embedding(VOCABULARY, dim), *layers, nn.RMSNorm(dim), nn.Linear(dim, VOCABULARY))


def batch(step: int) -> Tensor:
    """Two sequences that count in steps of their own; the same for any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    first, by = (torch.randint(1, 9, (2, 1), generator=generator) for _ in range(2))
    return (first + by * torch.arange(TOKENS)) % VOCABULARY


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=3e-3)


def alone(steps: int) -> list[float]:
    """Losses of one process in plain PyTorch, in float32 on a CPU."""
    net = decoder()
    optimizer, losses = adam(net), []
    for step in range(steps):
        ids = batch(step)
        loss = F.cross_entropy(net(ids).flatten(0, 1), shifted_labels(ids).flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class Plan:
    """What a torchrun is asked for."""

    steps: int = STEPS
    schedule: str = "ring"
    sharded: bool = False  # weights, by FSDP2
    kill: tuple[int, str, int, float] | None = (
        None  # rank, how, step, when: a share of what the last one took
    )


def train(folder: Path, plan: Plan) -> None:
    """One process: from the last checkpoint in `folder` to the end. Rank 0 writes losses.

    As many processes as there are share every sequence. Restarted ones are not killed again.
    """
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if GPU else "gloo", timeout=PATIENCE)
    net = decoder().to(device)
    run = shared(net, plan)
    optimizer = adam(net)
    fault = Fault(folder, plan, rank)
    for step in range(resume(folder, net, optimizer), plan.steps):
        with fault.may_come(step, KILLS[:2]):
            loss = step_of(run, net, optimizer, step, plan.sharded)
        if rank == 0:
            note(folder / "losses", {"by": os.getpid(), "at": time.time(), "step": step, "loss": loss})
        if (step + 1) % EVERY == 0:
            with fault.may_come(step, KILLS[2:]):
                save(folder / f"step-{step + 1}", net, optimizer)
    dist.barrier()
    dist.destroy_process_group()


def shared(net: nn.Sequential, plan: Plan) -> nn.Module:
    """Compiled, as a whole or, where FSDP2 divides weights, layer by layer."""
    mesh = init_device_mesh("cuda" if GPU else "cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    options = {
        "context_parallel": {"mesh": mesh, "schedule": plan.schedule},
        "lowering": "inductor" if GPU else "aot_eager",
    }
    if not plan.sharded:
        compiled: Any = torch.compile(net, backend="kp", fullgraph=True, options=options)
        return compiled
    for layer in net:
        if isinstance(layer, Layer):
            layer.compile(backend="kp", fullgraph=True, options=options)
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def step_of(
    run: nn.Module, net: nn.Module, optimizer: torch.optim.Optimizer, step: int, sharded: bool
) -> float:
    """The mean loss over the whole sequences. Gradients of weights are summed over ranks."""
    group, device = dist.group.WORLD, next(net.parameters()).device
    ids = batch(step).to(device)
    mine = kp.shard_sequence({"ids": ids, "labels": ids}, group, padding={"ids": 0})
    with torch.autocast(device.type, torch.bfloat16, enabled=GPU):
        logits = run(mine["ids"])
    labels = mine["labels"].flatten()
    total = F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum", ignore_index=IGNORED)
    loss = kp.sequence_mean(total, (labels != IGNORED).sum(), group)
    optimizer.zero_grad()
    if sharded:  # FSDP2 takes the mean over ranks
        (loss * dist.get_world_size()).backward()
    else:
        loss.backward()
        for weight in net.parameters():
            dist.all_reduce(weight.grad)
    optimizer.step()
    return loss.item()


def save(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model, moments = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": moments}, checkpoint_id=folder)


def resume(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with: behind the last checkpoint that is complete, or 0."""
    if not (step := last_saved(folder)):
        return 0
    model, moments = get_state_dict(net, optimizer)
    state = {"model": model, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / f"step-{step}")
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step


def last_saved(folder: Path) -> int:
    """The number of steps in the last complete checkpoint; 0 if there is none."""
    return max((int(each.parent.name[5:]) for each in folder.glob("step-*/.metadata")), default=0)


class Fault:
    """Kills its process by SIGKILL, at the time and on the rank of a plan."""

    def __init__(self, folder: Path, plan: Plan, rank: int) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        self.folder, self.kill = folder, plan.kill if first and plan.kill and plan.kill[0] == rank else None
        self.took: dict[str, float] = {}

    @contextlib.contextmanager
    def may_come(self, step: int, ways: tuple[str, ...]) -> Iterator[None]:
        """Within, or before, what takes about as long as the last time."""
        if self.kill and self.kill[1] in ways and self.kill[2] == step:
            when = self.kill[3] * self.took.get(ways[0], 0.0)
            threading.Timer(when, self._die).start() if when else self._die()
        begin = time.monotonic()
        yield
        self.took[ways[0]] = time.monotonic() - begin

    def _die(self) -> None:
        note(self.folder / "killed", {"at": time.time(), "saved": last_saved(self.folder)})
        os.kill(os.getpid(), signal.SIGKILL)


def note(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------------------
# the driver


def torchrun(folder: Path, size: int, restarts: int, plan: Plan, logs: str = "first") -> bool:
    """Whether it came to an end within LIMIT seconds; otherwise it is stopped."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["--max-restarts", str(restarts)]
    command += ["--monitor-interval", "1"]  # seconds in which survivors can say what they waited for
    command += ["--redirects", "3", "--log-dir", str(folder / logs)]
    command += [__file__, "--train", str(folder), "--plan", json.dumps(asdict(plan))]
    with (folder / "torchrun").open("a") as log:
        fresh = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=fresh)
        try:
            process.wait(LIMIT)
            return True
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun stops its processes, which are in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()
            return False


def killed(folder: Path, before: int, after: int, plan: Plan, want: list[float]) -> dict[str, Any]:
    """A row: training by `before` processes of which one is killed, resumed by `after`."""
    assert plan.kill is not None
    begin = time.monotonic()
    ended = torchrun(folder, before, 3 if before == after else 0, plan)
    if before != after:
        ended = torchrun(folder, after, 0, replace(plan, kill=None), "second") and ended
    seconds = time.monotonic() - begin
    died = lines(folder / "killed")
    losses = lines(folder / "losses")
    resumed = [line for line in losses if died and line["by"] != losses[0]["by"]] or losses[:1]
    rank, how, step, _ = plan.kill
    return {
        "before": before, "after": after, "schedule": plan.schedule,
        "weights": "divided" if plan.sharded else "whole",
        "killed rank": rank, "how": how, "step": step, "kills": len(died),
        "restarts": len(list(folder.glob("first/*/attempt_*"))) - 1,
        "last checkpoint": died[0]["saved"] if died else None,
        "resumed from": resumed[0]["step"] if resumed else None,
        "seconds": round(seconds, 1),
        "seconds from kill to loss": round(resumed[0]["at"] - died[0]["at"], 1) if resumed and died else None,
        "hung": not ended, "survivors": survivors(folder, rank),
        "steps": len({line["step"] for line in losses}),
        "worst": worst(losses, want),
    }  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def worst(losses: list[dict[str, Any]], want: list[float]) -> float | None:
    """None where steps are missing."""
    if {line["step"] for line in losses} != set(range(len(want))):
        return None
    return max(abs(line["loss"] - want[line["step"]]) / want[line["step"]] for line in losses)


def survivors(folder: Path, victim: int) -> str:
    """What ranks of the first attempt other than `victim` say of their end, counted."""
    found = Counter(
        end_of(path.read_text(errors="replace"))
        for path in folder.glob("first/*/attempt_0/*/stderr.log")
        if int(path.parent.name) != victim
    )
    return ", ".join(f"{count} {what}" for what, count in sorted(found.items()))


def end_of(text: str) -> str:
    """Of a process: its KPExchangeError, the error of an exchange that is not kp's, or torchrun."""
    if "KPExchangeError: " in text:
        return "KPExchangeError"
    if "Traceback" not in text:
        return "stopped by torchrun"
    inside = re.search(r"kp_compiler/|lowering/context/", text.rpartition("Traceback")[2])
    return f"another error {'inside' if inside else 'outside'} kp"


def planned(run: int, seed: int) -> tuple[int, int, Plan]:
    """Sizes and plan of a run. All combinations of sizes, kinds of kills and weights come in 30."""
    chance = random.Random(1000 * seed + run)
    sizes = [pair for pair in SIZES if not GPU or max(pair) <= torch.cuda.device_count()]
    before, after = sizes[run % len(sizes)]
    how = KILLS[run % len(KILLS)]
    saves = range(2 * EVERY - 1, STEPS - 1, EVERY)
    step = chance.choice(saves) if how == KILLS[2] else chance.randrange(1, STEPS - 2)
    when = 0.0 if how == KILLS[0] else chance.uniform(0.05, 0.95)
    kill = (chance.randrange(before), how, step, when)
    return before, after, Plan(STEPS, chance.choice(SCHEDULES), run % 2 == 1, kill)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of runs, without a result file")
    parser.add_argument("--keep", type=Path, help="a new folder for checkpoints and logs, which stays")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, Plan(**args.plan))
        return
    with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        rows, apart = measure(Path(folder), args.only or range(args.runs), args.seed)
    if not args.only:
        write_results(rows, apart, args.out)


def measure(base: Path, runs: Iterable[int], seed: int) -> tuple[list[dict[str, Any]], float | None]:
    """Rows of runs, and how far losses of the undisturbed training are from plain PyTorch's."""
    (base / "undisturbed").mkdir(parents=True)
    torchrun(base / "undisturbed", 2, 0, Plan())
    losses = lines(base / "undisturbed" / "losses")
    want = [line["loss"] for line in losses]
    apart = worst(losses, alone(STEPS))
    print(f"undisturbed: {len(want)} steps, apart from plain PyTorch by {apart}", flush=True)
    rows = []
    for run in runs:
        (base / str(run)).mkdir()
        rows.append({"run": run, **killed(base / str(run), *planned(run, seed), want)})
        print(rows[-1], flush=True)
    return rows, apart


def write_results(rows: list[dict[str, Any]], apart: float | None, out: Path | None) -> None:
    from harness import bar, write

    ended = sum(not row["hung"] for row in rows)
    values = [math.inf if row["worst"] is None else row["worst"] for row in rows]
    parts = f"in parts of {BOUND:g}"
    bars = [
        bar("runs without a hang", ended, len(rows)),
        bar("runs that were killed once and trained to the end",
            sum(row["kills"] == 1 and row["steps"] == STEPS for row in rows), len(rows)),
        bar(f"losses of killed runs from the undisturbed one's, relative, {parts}", max(values) / BOUND, 1.0,
            at_least=False),
        bar(f"losses of the undisturbed run from plain PyTorch's, relative, {parts}",
            None if apart is None else apart / BOUND, 1.0, at_least=False),
    ]  # fmt: skip
    write("context_faults", rows, bars, {}, out)


if __name__ == "__main__":
    main()
