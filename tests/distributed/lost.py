"""What each process runs of tests in which one is lost. Importable by name, so that processes can be
spawned."""

from __future__ import annotations

import datetime
import os
import random
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import kp_compiler
from kp_compiler.errors import KPError, KPExchangeError
from kp_compiler.lowering.context.exchange import Peers
from tests.distributed.processes import finish, start
from tests.distributed.workers import attention_net

PATIENCE = 6.0  # seconds


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layers = nn.Embedding(32, 48), attention_net(2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embedding(input_ids))


def batch() -> torch.Tensor:
    return torch.randint(0, 32, (2, 26), generator=torch.Generator().manual_seed(3))


def dies(left: int, how: str) -> None:
    """This process, before one of its exchanges."""
    waiting = Peers.waiting

    def faulty(self: Peers, what: str) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            Peers.waiting = waiting  # type: ignore[method-assign]
            if how == "slow":
                time.sleep(PATIENCE + 4)
            else:
                os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return waiting(self, what)

    Peers.waiting = faulty  # type: ignore[method-assign]


def inference(
    rank: int, size: int, file: str, device: str, on_fault: str, how: str, seed: int, out: str
) -> None:
    """Calls of a shared model, in one of which a rank is lost. Saves what the others get and how long it
    took."""
    os.environ["KP_PASSES"] = ""
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    options: dict[str, Any] = {"lowering": "aot_eager", "context_parallel": {"schedule": "ring"}}
    given: Any = {"on_fault": on_fault, "patience": PATIENCE, "options": options}
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)  # ranks may have made other groups
    other = kp_compiler.shared_inference(Net().to(device), dist.group.WORLD, **given)
    run = kp_compiler.shared_inference(Net().to(device), dist.group.WORLD, causal=True, **given)
    ids = batch().to(device)
    found: dict[str, Any] = {"before": run(input_ids=ids).cpu()}
    try:
        other(input_ids=ids)  # of which none may see what is added
    except KPError as error:
        found["refused"] = str(error)
    if rank == seed % size:
        dies(random.Random(seed).randrange(6), how)
    start = time.monotonic()
    try:
        while run.generation == 1 and time.monotonic() - start < 60:
            found["result"] = run(input_ids=ids).cpu()
        found["after"] = run(input_ids=ids).cpu()
        found["members"] = run.members
    except KPExchangeError as error:
        found["told"] = str(error)
    found["seconds"] = time.monotonic() - start
    torch.save(found, f"{out}.{rank}")
    os._exit(0)  # gloo's threads would wait for the others


class Shifting(nn.Module):
    """Which looks at the token before, and takes everything."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)
        return y[:, 0] + nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def refused(rank: int, size: int, file: str, out: str) -> None:
    """Calls that kp refuses, which one rank comes to later than the other. Saves what each is told."""
    start(rank, size, file)
    run = kp_compiler.shared_inference(
        Shifting(), dist.group.WORLD, on_fault="shrink", patience=PATIENCE, options={"lowering": "aot_eager"}
    )
    told = []
    for length, packed in ((24, False), (23, True)):
        time.sleep(0.5 * rank)
        positions = torch.arange(length)[None] % (10 if packed else length)
        try:
            run(x=torch.randn(1, length, 8), position_ids=positions)
            told.append("")
        except RuntimeError as error:
            told.append(str(error))
    torch.save((told, run.members), f"{out}.{rank}")
    finish()


FAULTS = [("ring", "killed"), ("allgather", "stopped")]


def fault(rank: int, size: int, file: str, schedule: str, how: str, seed: int, out: str) -> None:
    """Training until the last rank dies, or stops, before one of its exchanges, chosen at random. Every other
    one saves what it was told and how long that took."""
    os.environ["KP_PASSES"] = ""
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=patience
    )
    options = {
        "context_parallel": {"mesh": dist.group.WORLD, "schedule": schedule},
        "lowering": "aot_eager",
    }
    net = attention_net(2)
    compiled: Any = torch.compile(net, backend="kp", fullgraph=True, options=options)
    x = torch.randn(1, 32, 48)
    compiled(x).square().mean().backward()  # all are compiled
    dist.barrier()
    if rank == size - 1:
        dies(random.Random(seed).randrange(6), how)
    start_time = time.monotonic()
    told = ""
    try:
        for _ in range(3):
            compiled(x).square().mean().backward()
    except KPExchangeError as error:
        told = str(error)
    with open(f"{out}.{rank}", "w") as file_:
        file_.write(f"{time.monotonic() - start_time:.1f}\n{told}")
    os._exit(0)  # gloo's threads would wait for the others
