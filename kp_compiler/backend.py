"""`torch.compile(model, backend="kp")`: gate, run the passes, lower. No pass logic."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from kp_compiler import capture, target
from kp_compiler.config import Config, resolve
from kp_compiler.metadata import tensor_of
from kp_compiler.pipeline import Run, run
from kp_compiler.report import GraphRecord, Report
from kp_compiler.target import Target

log = logging.getLogger("kp_compiler")


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
    active = not config.disabled and (where.device == "cuda" or where.reference)
    if active:
        report = run(Run(gm, config, where, keep_graphs=capture.is_open() or config.report_dir is not None))
    else:
        report = Report(target=str(where))
    report.graphs.append(_graph_record(gm, config, where, active, 1e3 * (time.perf_counter() - start)))
    _publish(report, config)
    return _lower(gm, example_inputs, config, where, guarded=active)


def _target(gm: GraphModule, config: Config) -> Target:
    """The accelerator among the graph's tensors, else the CPU."""
    devices = {t.device for n in gm.graph.nodes if (t := tensor_of(n)) is not None}
    cuda = next((d for d in devices if d.type == "cuda"), None)
    return target.detect(cuda or "cpu", reference=config.cpu_rewrites and cuda is None)


def _lower(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, where: Target, *, guarded: bool
) -> Callable[..., Any]:
    from kp_compiler.lowering import inductor  # brings Inductor and Triton along: not at import time

    if where.device == "cpu" and config.lowering == "inductor" and target.cpp_compiler() is None:
        warnings.warn(
            "kp: no C++ compiler was found, so Inductor can't compile for the CPU; the model runs eagerly.",
            stacklevel=3,
        )
        return gm.forward
    return inductor.lower(gm, example_inputs, config, guarded=guarded)


def _reset() -> None:
    """What `torch._dynamo.reset()` calls."""
    from kp_compiler.lowering import inductor

    inductor.reset()


def _graph_record(gm: GraphModule, config: Config, where: Target, active: bool, took: float) -> GraphRecord:
    mode = "disabled" if config.disabled else "rewritten" if active else "cpu"
    record = GraphRecord(0, len(gm.graph.nodes), where.device, mode, took, config.lowering)
    if mode == "cpu":
        record.notes.append(
            "cpu: no accelerator among the tensors, so nothing was rewritten; options={'cpu_rewrites': True} "
            "rewrites onto the reference kernels."
        )
    elif mode == "disabled":
        record.notes.append("KP_DISABLE is set: kp did nothing.")
    return record


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
        os.makedirs(config.report_dir, exist_ok=True)
        path = os.path.join(config.report_dir, f"graph_{os.getpid()}_{index}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(json.loads(report.to_json()), file, indent=1)


kp.reset = _reset  # type: ignore[attr-defined]
