"""Looking at what attention sites get while a model runs: `kp.calibrate` and `kp.train_selectors`.

    q = kp.tap(q, k, v, operands, scalars, flags, module, observer, spec)      q, unchanged

An observer is a function of this process, and lives as long as the block that named it.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kp_compiler.lowering.fingerprint import stamped
from kp_compiler.lowering.ops import fragment, parse_spec
from kp_compiler.lowering.select import emit_flags, site_of
from kp_compiler.lowering.selection import measure
from kp_compiler.lowering.selection.site import Site
from kp_compiler.specs import AttentionSpec

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] scalars, Tensor[] flags, str module,"
    " str observer, str spec) -> Tensor"
)
_observers: dict[str, Callable[[Tapped], None]] = {}
_numbers = itertools.count()
_current: contextvars.ContextVar[str | None] = contextvars.ContextVar("kp_observer", default=None)


@dataclass(frozen=True)
class Tapped:
    """One call of a site: module path, q, k and mask, v [B,K,T,E] and what the spec reads."""

    module: str
    site: Site
    v: Tensor
    operands: list[Tensor]


@contextlib.contextmanager
def observing(function: Callable[[Tapped], None]) -> Iterator[None]:
    """Graphs that are compiled on this thread show `function` what each attention site gets, as long as the
    block lasts."""
    name = f"observer {next(_numbers)}"
    _observers[name] = function
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)
        del _observers[name]


def watch(emit: Any, node: Node, spec: AttentionSpec, module: str, report: dict[str, Any]) -> Node:
    """q of a `kp.attention` node; the first call of it puts what its blocks hold and lose into `report`."""
    name = f"observer {next(_numbers)}"

    def first(seen: Tapped) -> None:
        del _observers[name]
        report["measured"] = measure.found(seen.site, seen.v, seen.operands)

    _observers[name] = first
    return emit_tap(emit, node, spec, module, name)


def current() -> str | None:
    """The observer that graphs compiled now are for."""
    return _current.get()


def emit_tap(emit: Any, node: Node, spec: AttentionSpec, module: str, observer: str) -> Node:
    """q of a `kp.attention` node, seen by an observer."""
    flags = emit_flags(emit, node, spec)
    return emit.call(_operator(), *node.args[:5], flags, module, observer, stamped(spec))


@cache
def _library() -> Any:
    made = fragment(
        "tap", _SCHEMA, {"CompositeExplicitAutograd": _tap}, lambda q, *rest: torch.empty_like(q),
        tags=(torch.Tag.cudagraph_unsafe,),
    )  # fmt: skip
    torch.library.register_autograd("kp::tap", _gradients, setup_context=_save, lib=made)
    return made


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.counts = len(inputs[3]), len(inputs[4]), len(inputs[5])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """That of q: its own."""
    operands, scalars, flags = ctx.counts
    return grad, None, None, [None] * operands, None if scalars else [], [None] * flags, None, None, None


def _operator() -> Any:
    _library()
    return torch.ops.kp.tap.default


def _tap(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], flags: list[Tensor],
    module: str, observer: str, spec: str,
) -> Tensor:  # fmt: skip
    if observer in _observers:
        parsed = parse_spec(spec)
        gates = [operands[i] for i in parsed.sparse.gates] if parsed.sparse is not None else []
        site = site_of(parsed, q, k, flags, scalars, gates)
        _observers[observer](Tapped(module, site, v, operands))
    return q.clone()
