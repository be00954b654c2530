"""Calls that ranks make together, in which one is lost."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import kp_compiler as kp
from tests.distributed import lost, processes
from tests.helpers import relative_error


def calls(tmp_path: Path, size: int, device: str, on_fault: str, how: str) -> tuple[int, list[Any]]:
    """The rank that is lost, and what each of the others saved."""
    seed = random.randrange(1000)
    given = (str(tmp_path / "store"), device, on_fault, how, seed, str(tmp_path / "found"))
    processes.outlive(seed % size, lost.inference, size, *given)
    ranks = [rank for rank in range(size) if rank != seed % size]
    return seed, [torch.load(tmp_path / f"found.{rank}") for rank in ranks]


@pytest.mark.parametrize(("size", "how"), [(4, "killed"), (3, "stopped"), (2, "killed")])
def test_the_others_finish_the_call(size: int, how: str, tmp_path: Path) -> None:
    """On fewer ranks, and make the next one."""
    seed, found = calls(tmp_path, size, "cpu", "shrink", how)
    with torch.no_grad():
        want = lost.Net()(lost.batch())
    for each in found:
        assert each["members"] == [rank for rank in range(size) if rank != seed % size], seed
        assert "26 tokens are not" in each["refused"]
        assert each["seconds"] < lost.PATIENCE + 60, seed
        for result in ("before", "result", "after"):
            assert relative_error(each[result], want) < 1e-5, (seed, result)
        assert torch.equal(each["result"], found[0]["result"])


def test_a_slow_one_is_waited_for(tmp_path: Path) -> None:
    """All make the call again, in a group that is made anew."""
    seed = random.randrange(1000)
    given = (str(tmp_path / "store"), "cpu", "shrink", "slow", seed, str(tmp_path / "found"))
    processes.outlive(2, lost.inference, 2, *given)  # which none is
    with torch.no_grad():
        want = lost.Net()(lost.batch())
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}")
        assert found["members"] == [0, 1] and found["seconds"] < lost.PATIENCE + 60, seed
        assert all(relative_error(found[name], want) < 1e-5 for name in ("result", "after")), seed


def test_what_is_refused_is_nobodys_loss(tmp_path: Path) -> None:
    """All ranks are told the same, and are still there."""
    processes.run(lost.refused, 2, str(tmp_path / "store"), str(tmp_path / "found"))
    for rank in range(2):
        (mixes, packed), members = torch.load(tmp_path / f"found.{rank}")
        assert "the sequence can't be shared" in mixes and "KPExchangeError" not in mixes, mixes
        assert "23 tokens are not" in packed, packed
        assert members == [0, 1]


def test_the_others_are_told(tmp_path: Path) -> None:
    seed, found = calls(tmp_path, 3, "cpu", "raise", "killed")
    for each in found:
        assert "members" not in each and re.search(r"rank \d.* waited for ", each["told"]), (seed, each)
        assert each["seconds"] < lost.PATIENCE + 60, seed


def test_what_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        world: Any = dist.group.WORLD
        with pytest.raises(kp.KPConfigError, match="on_fault: got 'stop', expected one of 'raise', 'shrink'"):
            kp.shared_inference(lost.Net(), world, on_fault="stop")  # type: ignore[arg-type]
        with pytest.raises(kp.KPConfigError, match="patience: got 0, expected seconds"):
            kp.shared_inference(lost.Net(), world, patience=0)
        with pytest.raises(kp.KPConfigError, match=r"options\.context_parallel: got .*, expected some of"):
            kp.shared_inference(lost.Net(), world, options={"context_parallel": {"mesh": world}})
        alone = kp.shared_inference(lost.Net(), world, options={"lowering": "aot_eager"})
        with torch.no_grad():
            assert torch.equal(alone(input_ids=lost.batch()), lost.Net()(lost.batch()))
        wrapped = nn.Sequential(lost.Net())
        wrapped.forward = lambda input_ids: {"last": wrapped[0](input_ids)}  # type: ignore[method-assign]
        given: dict[str, Any] = {"options": {"lowering": "eager"}}
        with pytest.raises(kp.KPError, match="result: dict has no logits"):
            kp.shared_inference(wrapped, world, **given)(input_ids=lost.batch())
        run = kp.shared_inference(wrapped, world, result=lambda out: out["last"], **given)
        assert run(input_ids=lost.batch()).shape == (2, 26, 48)
    finally:
        dist.destroy_process_group()
