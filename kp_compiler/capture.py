"""Collecting reports: `capture_reports`, `explain` and `plan`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from kp_compiler import target as targets
from kp_compiler.config import Config, resolve
from kp_compiler.errors import KPConfigError
from kp_compiler.report import GraphRecord, Report
from kp_compiler.target import Target

_lock = threading.Lock()
_open: list[list[Report]] = []
_counter = itertools.count()


def is_open() -> bool:
    return bool(_open)


def publish(report: Report) -> None:
    """Hand one graph's report to every open capture (the backend may run on another thread). Where Dynamo
    starts over, as it does when a symbolic float turns out to be constant, the earlier attempt is dropped."""
    with _lock:
        for sink in _open:
            sink[:] = [earlier for earlier in sink if not _replaces(report.graphs[0], earlier.graphs[0])]
            sink.append(report)


def _replaces(new: GraphRecord, old: GraphRecord) -> bool:
    return bool(new.compile_id) and new.compile_id == old.compile_id and new.attempt > old.attempt


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
    for name in ("kp-compiler", "torch", "triton", "transformers", "flash-attn-4", "transformer-engine"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "torch": torch.__version__}


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `model(*args, **kwargs)` with kp, run it once, and say what happened.

    `options` as for `torch.compile(options=...)`. A model that is compiled already is compiled anew, with
    these options. Raises what compiling or running raises.
    """
    resolve(options)
    with capture_reports() as reports, as_written(model) as plain:
        torch.compile(plain, backend="kp", options=dict(options) if options else None)(*args, **kwargs)
    torch._dynamo.reset()
    return merged(reports)


@contextlib.contextmanager
def as_written(model: Any) -> Iterator[Any]:
    """The module or function under `torch.compile(model)` or `model.compile()`."""
    plain = _uncompiled(model)
    if not isinstance(plain, torch.nn.Module) or plain._compiled_call_impl is None:
        yield plain
        return
    compiled, plain._compiled_call_impl = plain._compiled_call_impl, None
    try:
        yield plain
    finally:
        plain._compiled_call_impl = compiled


def _uncompiled(model: Any) -> Any:
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model._orig_mod
    while hasattr(model, "_torchdynamo_orig_callable"):
        model = model._torchdynamo_orig_callable
    return model


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
    from kp_compiler import fakes  # with Dynamo and fake tensors: not at import time

    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise KPConfigError(f"dtype: got {dtype!r}, expected a torch.dtype such as torch.bfloat16")
    config = resolve(options)
    where = _planned_target(target, config)
    mode = fakes.new_mode()
    whole = Report(target=str(where), versions=versions())
    if dtype is not None:
        whole.assumptions.append(
            f"parameters and floating-point inputs are {str(dtype).removeprefix('torch.')}"
        )

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        whole.merge(_plan_graph(gm, config, where))
        if dtype is not None and any(_keeps_other_dtype(value, dtype) for value in example_inputs):
            whole.assume("tensors that the function finds in globals keep the dtype they have")
        return fakes.on_fakes(gm, mode)

    torch._dynamo.reset()
    fake_model, fake_args, fake_kwargs = fakes.to_fake((_uncompiled(model), args, kwargs), dtype, mode)
    try:
        torch.compile(fake_model, backend=backend)(*fake_args, **fake_kwargs)
    except Exception as error:
        if not _needs_values(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not whole.graphs:
            whole.graphs.append(GraphRecord(0, 0, where.device, "planned"))
        whole.graphs[-1].notes.append(f"the capture ended here, values would be needed: {first}")
    finally:
        torch._dynamo.reset()
    return whole


def _planned_target(name: str | None, config: Config) -> Target:
    if name is not None and not isinstance(name, str):
        raise KPConfigError(
            f"target: got {name!r}, expected 'auto', 'cpu' or 'cuda:smNN' such as 'cuda:sm90'"
        )
    where = targets.parse(name or ("auto" if targets.is_available() else "cuda:sm90"))
    return dataclasses.replace(where, reference=where.device == "cpu" and config.cpu_rewrites)


def _plan_graph(gm: GraphModule, config: Config, where: Target) -> Report:
    from kp_compiler.pipeline import Run, run

    record = GraphRecord(0, len(gm.graph.nodes), where.device, "planned")
    if config.disabled:
        record.mode = "disabled"
        record.notes.append("KP_DISABLE is set: kp would do nothing.")
        return Report(target=str(where), graphs=[record])
    report = run(Run(gm, config, where, plan_only=True))
    report.graphs.append(record)
    return report


def _keeps_other_dtype(value: Any, dtype: torch.dtype) -> bool:
    parameter = isinstance(value, torch.nn.Parameter) and value.is_floating_point()
    return parameter and value.dtype != dtype


def _needs_values(error: BaseException | None) -> bool:
    """The model read a value that a fake tensor has none of."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__cause__ or error.__context__
    return False
