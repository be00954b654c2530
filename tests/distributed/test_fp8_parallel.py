"""FP8 under DDP and FSDP2: two processes over gloo against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.distributed import workers

SIZE = 2


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(wrapper: str, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "grads.pt"
    mp.spawn(
        getattr(workers, wrapper), (SIZE, str(tmp_path / "store"), recipe, str(out)), nprocs=SIZE, join=True
    )
    got, want = torch.load(out), workers.reference(SIZE, recipe)
    assert len(got) == len(want)
    for mine, exact in zip(got, want, strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm()
