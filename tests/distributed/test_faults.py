"""A rank that dies or stands still: every survivor is told who waited for what, in time, and training goes on
from its last checkpoint."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import context_faults
from tests.distributed import lost, processes

SIZE = 3


@pytest.mark.parametrize(("schedule", "how"), lost.FAULTS)
def test_survivors_are_told(schedule: str, how: str, tmp_path: Path) -> None:
    seed = random.randrange(1000)
    out = tmp_path / "told"
    given = (str(tmp_path / "store"), schedule, how, seed, str(out))
    assert processes.outlive(SIZE - 1, lost.fault, SIZE, *given) == -signal.SIGKILL, seed
    for rank in range(SIZE - 1):
        seconds, told = (tmp_path / f"told.{rank}").read_text().split("\n", 1)
        assert float(seconds) < 2 * lost.PATIENCE + 5
        assert re.match(rf"\d: rank {rank} of {SIZE} waited for .+, which failed: .+", told), (
            seed,
            told,
        )


@pytest.mark.skipif(context_faults.GPU and torch.cuda.device_count() < SIZE, reason="a GPU for each rank")
def test_training_is_resumed_by_more_ranks(tmp_path: Path) -> None:
    """Two ranks with divided weights, of which one is killed; three go on."""
    (tmp_path / "step-5").mkdir()  # a checkpoint that was not finished
    rank = random.randrange(2)
    plan = context_faults.Plan(steps=6, sharded=True, kill=(rank, "before a step", 5, 0.0))
    row = context_faults.killed(tmp_path, 2, SIZE, plan, context_faults.alone(plan.steps))
    assert not row["hung"] and row["kills"] == 1, row
    assert row["resumed from"] == row["last checkpoint"] == 4, row
    assert row["steps"] == plan.steps and row["worst"] <= context_faults.BOUND, row
    assert "inside kp" not in row["survivors"], row
