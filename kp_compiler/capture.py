"""Collecting reports: `capture_reports`, `explain` and `plan`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from kp_compiler import target as targets
from kp_compiler.config import resolve
from kp_compiler.report import GraphRecord, Report

_lock = threading.Lock()
_open: list[list[Report]] = []
_counter = itertools.count()


def is_open() -> bool:
    return bool(_open)


def publish(report: Report) -> None:
    """Hand one graph's report to every open capture (the backend may run on another thread)."""
    with _lock:
        for sink in _open:
            sink.append(report)


def next_graph_index() -> int:
    return next(_counter)


@contextlib.contextmanager
def capture_reports() -> Iterator[list[Report]]:
    """Collects one Report per graph that kp compiles in the block, on any thread.

    Dynamo is reset first: past its recompile limit it would not call the backend any more.
    """
    torch._dynamo.reset()
    sink: list[Report] = []
    with _lock:
        _open.append(sink)
    try:
        yield sink
    finally:
        with _lock:
            _open[:] = [other for other in _open if other is not sink]


def merged(reports: list[Report]) -> Report:
    """All reports of a capture as one."""
    whole = Report(versions=versions())
    for report in reports:
        whole.merge(report)
    return whole


def versions() -> dict[str, str]:
    """kp's and its main libraries' versions."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("kp-compiler", "torch", "triton", "transformers", "flash-attn-4"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "torch": torch.__version__}


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `model(*args, **kwargs)` with kp, run it once, and say what happened.

    `options` as for `torch.compile(options=...)`. Raises what compiling or running raises.
    """
    resolve(options)
    with capture_reports() as reports:
        torch.compile(model, backend="kp", options=dict(options) if options else None)(*args, **kwargs)
    torch._dynamo.reset()
    return merged(reports)


def plan(
    model: Any,
    *args: Any,
    target: str | None = None,
    dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What kp would do for `model(*args, **kwargs)` on `target`, on any machine: nothing is computed or
    changed.

    `target` is "auto", "cpu" or a name such as "cuda:sm90" (the default where this machine has no GPU).
    `dtype` is assumed for the model's floating-point parameters and inputs. The model is captured on fake
    tensors; code that needs values (`.item()`, data-dependent branches) ends the capture there, and the
    report says so.
    """
    where = targets.parse(target or ("auto" if targets.is_available() else "cuda:sm90"))
    config = resolve(options)
    whole = Report(target=str(where), versions=versions())
    if dtype is not None:
        whole.assumptions.append(
            f"parameters and floating-point inputs are {str(dtype).removeprefix('torch.')}"
        )

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        from kp_compiler.pipeline import Run, run

        nodes = len(gm.graph.nodes)
        report = run(Run(gm, config, where, plan_only=True))
        report.graphs.append(GraphRecord(0, nodes, where.device, "planned"))
        whole.merge(report)
        return gm.forward

    torch._dynamo.reset()
    fake_model, fake_args, fake_kwargs = to_fake((model, args, kwargs), dtype)
    try:
        torch.compile(fake_model, backend=backend)(*fake_args, **fake_kwargs)
    except Exception as error:
        if not whole.graphs:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        whole.graphs[-1].notes.append(f"the capture ended here, values would be needed: {first}")
    finally:
        torch._dynamo.reset()
    return whole


def to_fake(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy with every tensor fake and on the CPU; no data is copied.

    Not on the meta device: Dynamo keeps a `torch.tensor(0.0, device=x.device)` there as a real meta tensor
    and then refuses to mix it with fake ones (transformers builds its masks and caches with such constants).
    """
    memo: dict[int, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for tensor in _tensors(value):
        with mode:
            fake = torch.empty_strided(
                tensor.size(),
                tensor.stride(),
                dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
            )
        if isinstance(tensor, torch.nn.Parameter):
            fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        elif tensor.requires_grad:
            fake.requires_grad_()
        memo[id(tensor)] = fake
    return copy.deepcopy(value, memo)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        for module in value.modules():
            yield from (t for t in module.__dict__.values() if isinstance(t, torch.Tensor))
            yield from (t for t in module._parameters.values() if t is not None)
            yield from (t for t in module._buffers.values() if t is not None)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
