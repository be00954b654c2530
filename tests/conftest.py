"""Shared fixtures and helpers: compile on the reference kernels, compare with eager and float64."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch and NumPy: tests side by side need no more threads,
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which on few cores wait for one another

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are first imported

import kp_compiler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Dynamo stops calling a backend after a number of compiles of one function: start every test anew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _one_gpu_of_several(request: pytest.FixtureRequest) -> None:
    """Tests side by side share the memory of all GPUs there are."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.set_device(int(worker.removeprefix("gw")) % torch.cuda.device_count())


@pytest.fixture
def kp():
    return kp_compiler
