"""Processes of a test, forked from a server that has imported what all of them need: how they are begun, and
how each of them begins and ends."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

METHOD = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA does not live on in a fork
IMPORTS = ["tests.distributed.workers", "tests.test_context", "torch._dynamo"]
multiprocessing.set_forkserver_preload(IMPORTS)


def run(function: Callable[..., Any], size: int, *arguments: Any) -> None:
    """`function(rank, size, *arguments)` in each of them."""
    mp.start_processes(function, (size, *arguments), nprocs=size, start_method=METHOD)


def outlive(which: int, function: Callable[..., Any], size: int, *arguments: Any) -> int | None:
    """The same, of which one is lost: its exit code when the others have come to their end. None of them
    hangs or breaks off."""
    context = mp.get_context(METHOD)
    ranks = [context.Process(target=function, args=(rank, size, *arguments)) for rank in range(size)]
    for process in ranks:
        process.start()
    others = [process for rank, process in enumerate(ranks) if rank != which]
    for process in others:
        process.join(timeout=180)
    ends = [process.exitcode for process in others]  # None of one that hangs
    for process in ranks:
        process.kill()
        process.join()
    assert not any(code != 0 for code in ends), (ends, arguments)
    return ranks[which].exitcode if which < size else None


def start(rank: int, size: int, file: str, backend: str = "gloo") -> None:
    os.environ["KP_PASSES"] = ""
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=size)


def finish() -> None:
    """Together: gloo's threads abort a process whose peer leaves while it still listens. And at once: one of
    them may want the lock of the interpreter that waits for it, when a DDP module is freed (torch 2.13)."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
