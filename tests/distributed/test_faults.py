"""A rank that dies or stands still: every survivor is told who waited for what, in time."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.distributed import workers

SIZE = 3


@pytest.mark.parametrize(("schedule", "how"), workers.FAULTS)
def test_survivors_are_told(schedule: str, how: str, tmp_path: Path) -> None:
    seed = random.randrange(1000)
    out = tmp_path / "told"
    context = mp.get_context("spawn")
    processes = [
        context.Process(
            target=workers.fault,
            args=(rank, SIZE, str(tmp_path / "store"), schedule, how, seed, str(out)),
        )
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    survivors, faulty = processes[:-1], processes[-1]
    for process in survivors:
        process.join(timeout=120)
    hung = [process.is_alive() for process in survivors]
    for process in processes:
        process.kill()
        process.join()
    assert not any(hung), seed
    assert faulty.exitcode == -signal.SIGKILL, seed
    for rank in range(SIZE - 1):
        seconds, told = (tmp_path / f"told.{rank}").read_text().split("\n", 1)
        assert float(seconds) < 2 * workers.FAULT_SECONDS + 5
        assert re.match(rf"\d: rank {rank} of {SIZE} waited for .+, which failed: .+", told), (
            seed,
            told,
        )
