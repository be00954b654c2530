"""Processes of a test, forked from a server that has imported what all of them need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

METHOD = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA does not live on in a fork
IMPORTS = ["tests.distributed.workers", "tests.test_context", "torch._dynamo"]
multiprocessing.set_forkserver_preload(IMPORTS)


def run(function: Callable[..., Any], size: int, *arguments: Any) -> None:
    """`function(rank, size, *arguments)` in each of them."""
    mp.start_processes(function, (size, *arguments), nprocs=size, start_method=METHOD)
