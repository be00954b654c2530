"""Compile a function with kp on the reference kernels and hold it against the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import kp_compiler
from kp_compiler.capture import merged
from kp_compiler.report import Report

REFERENCE = {"cpu_rewrites": True, "lowering": "aot_eager", "strict": True}


@dataclass
class Outcome:
    """What compiled and original gave, and the report."""

    report: Report
    got: list[torch.Tensor]
    want: list[torch.Tensor]

    @property
    def error(self) -> float:
        """Largest relative error of outputs and gradients."""
        return max((relative_error(a, b) for a, b in zip(self.got, self.want, strict=True)), default=0.0)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    if torch.equal(torch.isnan(got), torch.isnan(want)):
        got, want = torch.nan_to_num(got), torch.nan_to_num(want)
    return float((got.double() - want.double()).norm() / (want.double().norm() + 1e-30))


def run_both(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    *,
    train: bool = False,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = True,
) -> Outcome:
    """The function compiled with kp (reference kernels) and as it is: outputs, then gradients of floating
    inputs."""
    want = evaluate(function, inputs, train)
    with kp_compiler.capture_reports() as reports:
        compiled = torch.compile(
            function,
            backend="kp",
            options={**REFERENCE, **(options or {})},
            dynamic=dynamic,
            fullgraph=fullgraph,
        )
        got = evaluate(compiled, inputs, train)
    return Outcome(merged(reports), got, want)


def evaluate(function: Callable[..., Any], inputs: tuple[Any, ...], train: bool) -> list[torch.Tensor]:
    fresh = [_leaf(x, train) for x in inputs]
    with torch.set_grad_enabled(train):
        out = function(*fresh)
    outs = list(out) if isinstance(out, tuple | list) else [out]
    result = [o.detach().clone() for o in outs]
    if train:
        weights = torch.linspace(0.5, 1.5, outs[0].numel(), dtype=outs[0].dtype, device=outs[0].device)
        (outs[0] * weights.view(outs[0].shape)).sum().backward()
        result += [x.grad for x in fresh if isinstance(x, torch.Tensor) and x.grad is not None]
    return result


def _leaf(value: Any, train: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    for dim in getattr(value, "_dynamo_weak_dynamic_indices", ()):
        torch._dynamo.maybe_mark_dynamic(copy, dim)
    return copy.requires_grad_() if train and copy.is_floating_point() else copy


def captured_graphs(
    function: Callable[..., Any], *inputs: Any, options: dict[str, Any] | None = None
) -> list[Any]:
    """The graphs as kp hands them on, after rewriting (nothing is lowered)."""
    from kp_compiler.config import resolve
    from kp_compiler.pipeline import Run, run
    from kp_compiler.target import Target

    graphs = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        run(Run(gm, resolve(options or {}), Target("cpu", reference=True)))
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return graphs


class Recorder(torch.fx.Interpreter):
    """Runs a rewritten graph and keeps the arguments of every call of an operator whose name contains
    `name`."""

    def __init__(self, gm: torch.fx.GraphModule, name: str, calls: list[tuple[Any, ...]]) -> None:
        super().__init__(gm)
        self.name, self.calls = name, calls

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.name in str(target):
            self.calls.append(args)
        return super().call_function(target, args, kwargs)


def recorded_calls(
    function: Callable[..., Any], inputs: tuple[Any, ...], name: str, options: dict[str, Any] | None = None
) -> list[tuple[Any, ...]]:
    """Concrete arguments of the lowered operators `name` when the rewritten function runs on `inputs`."""
    from kp_compiler.config import resolve
    from kp_compiler.pipeline import Run, run
    from kp_compiler.target import Target

    calls: list[tuple[Any, ...]] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        run(Run(gm, resolve({"strict": True, **(options or {})}), Target("cpu", reference=True)))
        return Recorder(gm, name, calls).run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return calls
