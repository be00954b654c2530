"""FP8 under DDP and FSDP2: two processes, over gloo or with a GPU each, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kp_compiler.lowering.fp8.quantize import sqnr
from tests.distributed import fp8_workers, processes

SIZE = 2


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(wrapper: str, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "grads.pt"
    processes.run(getattr(fp8_workers, wrapper), SIZE, str(tmp_path / "store"), recipe, str(out))
    got, want = torch.load(out), fp8_workers.reference(SIZE, recipe)
    assert len(got) == len(want)
    for mine, exact in zip(got, want, strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm()


def test_training_in_two_processes(tmp_path: Path) -> None:
    check_training("cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < SIZE, reason="needs two GPUs")
def test_training_on_two_gpus(tmp_path: Path) -> None:
    """Two steps, against the same ones in bfloat16 on one GPU."""
    check_training("cuda", tmp_path)


def check_training(device: str, folder: Path) -> None:
    out = folder / "moved.pt"
    processes.run(fp8_workers.train_everything, SIZE, str(folder / "store"), device, str(out))
    want = fp8_workers.trained_alone(SIZE, device)
    for got in torch.load(out).values():
        assert all(sqnr(mine, exact) > 18 for mine, exact in zip(got, want, strict=True))
