"""Attention over a sequence that processes share, over gloo, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import processes, workers


@pytest.mark.parametrize(("size", "compiled"), [(2, True), (3, False), (4, False), (8, False)])
def test_schedules(size: int, compiled: bool, tmp_path: Path) -> None:
    """Outputs and gradients, through the operator and under `torch.compile`; batches, divided and put
    together."""
    out = tmp_path / "errors.pt"
    processes.run(workers.context, size, str(tmp_path / "store"), compiled, str(out))
    errors = torch.load(out)
    assert errors.pop("sharding") < 1e-6
    assert errors.pop("validated") < 2e-6 and errors.pop("validated, documents") < 2e-6
    assert len(errors) == len(workers.context_cases(size))
    assert max(errors.values()) < 2e-6, errors


def test_together(tmp_path: Path) -> None:
    """With what shares batches and weights on another dimension of the mesh, and with FP8."""
    out = tmp_path / "errors.pt"
    processes.run(workers.composed, 4, str(tmp_path / "store"), str(out))
    errors = torch.load(out)
    assert set(errors) == set(workers.COMPOSED)
    assert 1e-3 < errors.pop("fp8_linear") < 0.1
    assert max(errors.values()) < 1e-5, errors


def test_models(tmp_path: Path) -> None:
    """Logits and gradients of transformers' models, whose positions and masks are made in the graph."""
    out = tmp_path / "errors.pt"
    processes.run(workers.shared_model, 2, str(tmp_path / "store"), str(out))
    errors = torch.load(out)
    assert len(errors) == len(workers.MODEL_CASES) + len(workers.INDEX_LAYOUTS) + 1
    assert max(errors.values()) < 1e-5, errors
