"""`torch.compile(model, backend="kp")`: gate, run the passes, lower. No pass logic."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from kp_compiler import capture, target
from kp_compiler.config import Config, resolve
from kp_compiler.errors import KPConfigError
from kp_compiler.metadata import tensor_of
from kp_compiler.pipeline import Run, check_left_alone, run
from kp_compiler.report import GraphRecord, Rejection, Report
from kp_compiler.target import Target

log = logging.getLogger("kp_compiler")

CPU = Rejection(
    "cpu",
    "No accelerator is among the tensors, so nothing was rewritten.",
    "options={'cpu_rewrites': True} rewrites onto the reference kernels.",
)
_NO_COMPILER = "no C++ compiler works here, so Inductor can't compile for the CPU; the graph runs eagerly."


def kp(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. `options` are kp's (see `kp_compiler.config`), `mode` is Inductor's."""
    config = resolve(options, mode=mode)
    start = time.perf_counter()
    where = _target(gm, config)
    active = where.device == "cuda" or where.reference or config.shares_sequences()
    active = active and not config.disabled
    if active:
        keep = capture.is_open() or config.report_dir is not None
        with _unseen():
            report = run(Run(gm, config, where, keep_graphs=keep))
    else:
        if not config.disabled:
            check_left_alone(gm, config, CPU)
        report = Report(target=str(where))
    report.graphs.append(_graph_record(gm, config, where, active, 1e3 * (time.perf_counter() - start)))
    _publish(report, config)
    return _lower(gm, example_inputs, config, where, guarded=active)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """What passes run on fakes and examples saves tensors, which is nothing to the hooks of a call that
    compiles: a checkpoint around it counts what is saved, and would find less when it computes again."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(saved: torch.Tensor) -> torch.Tensor:
    return saved


def _target(gm: GraphModule, config: Config) -> Target:
    """The accelerator among the graph's tensors, else the CPU."""
    devices = {t.device for n in gm.graph.nodes if (t := tensor_of(n)) is not None}
    cuda = next((d for d in devices if d.type == "cuda"), None)
    return target.detect(cuda or "cpu", reference=config.cpu_rewrites and cuda is None)


def _lower(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, where: Target, *, guarded: bool
) -> Callable[..., Any]:
    from kp_compiler.lowering import inductor  # brings Inductor and Triton along: not at import time

    if _lacks_compiler(config, where):
        warnings.warn(f"kp: {_NO_COMPILER}", stacklevel=3)
        return gm.forward
    return inductor.lower(gm, example_inputs, config, guarded=guarded)


def _lacks_compiler(config: Config, where: Target) -> bool:
    return where.device == "cpu" and config.lowering == "inductor" and target.cpp_compiler() is None


def _reset() -> None:
    """What `torch._dynamo.reset()` calls, in the middle of iterating over backends: it must import nothing,
    since Inductor registers backends of its own."""
    inductor = sys.modules.get("kp_compiler.lowering.inductor")
    if inductor is not None:
        inductor.reset()


def _graph_record(gm: GraphModule, config: Config, where: Target, active: bool, took: float) -> GraphRecord:
    mode = "disabled" if config.disabled else "rewritten" if active else "cpu"
    eagerly = _lacks_compiler(config, where)
    lowering = "eager" if eagerly else config.lowering
    record = GraphRecord(0, len(gm.graph.nodes), where.device, mode, took, lowering, *_compilation())
    if mode == "cpu":
        record.notes.append(f"cpu: {CPU.text} {CPU.hint}")
    elif mode == "disabled":
        record.notes.append("KP_DISABLE is set: kp did nothing.")
    if eagerly:
        record.notes.append(_NO_COMPILER)
    return record


def _compilation() -> tuple[str, int]:
    """Dynamo's name for what it is compiling, and how often it has started over."""
    context = torch._guards.CompileContext.try_get()
    return (str(context.compile_id), context.attempt) if context is not None else ("", 0)


def _publish(report: Report, config: Config) -> None:
    """The INFO line, the open captures, the report folder and TORCH_TRACE."""
    index = capture.next_graph_index()
    line = report.summary(0).replace("graph 0", f"graph {index}", 1)
    log.info(line)
    for site in report.sites:
        log.debug("%s", site.line())
    capture.publish(report)
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "kp_report", "encoding": "json"},
        payload_fn=report.to_json,
    )
    if config.report_dir is not None:
        _write(report, config.report_dir, f"graph_{os.getpid()}_{index}.json")


def _write(report: Report, folder: str, name: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(report.to_json())
    except OSError as error:
        raise KPConfigError(f"report_dir: can't write into {folder!r}: {error.strerror or error}") from None


kp.reset = _reset  # type: ignore[attr-defined]
