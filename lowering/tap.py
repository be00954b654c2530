"""Looking at what attention sites get while a model runs: `kp.calibrate` and `kp.train_selectors`.

    q = kp.tap(q, k, v, operands, scalars, flags, module, observer, spec)      q, unchanged

An observer is a function of this process, and lives as long as the block that named it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.ops import fragment, parse_spec
from kp_compiler.lowering.select import site_of
from kp_compiler.lowering.selection.site import Site
from kp_compiler.specs import AttentionSpec

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] scalars, Tensor[] flags, str module,"
    " str observer, str spec) -> Tensor"
)
_observers: dict[str, Callable[[Tapped], None]] = {}
_numbers = itertools.count()


@dataclass(frozen=True)
class Tapped:
    """One call of a site: module path, q, k and mask, v [B,K,T,E] and what the spec reads."""

    module: str
    site: Site
    v: Tensor
    operands: list[Tensor]


@contextlib.contextmanager
def observing(function: Callable[[Tapped], None]) -> Iterator[str]:
    """A name for `function`, which the setting `observer` of sparse_attention takes."""
    name = f"observer {next(_numbers)}"
    _observers[name] = function
    try:
        yield name
    finally:
        del _observers[name]


def emit_tap(emit: Any, node: Node, spec: AttentionSpec, module: str, observer: str) -> Node:
    """q of a `kp.attention` node, seen by an observer."""
    from kp_compiler.lowering.block_mask import block_flags

    assert spec.sparse is not None
    bounded = mask_render.inequalities(spec.mask) is not None
    flags = [] if bounded else list(block_flags(emit, node, spec, spec.sparse.block))
    return emit.call(_operator(), *node.args[:5], flags, module, observer, spec.to_json())


@cache
def _library() -> Any:
    return fragment("tap", _SCHEMA, {"CompositeExplicitAutograd": _tap}, lambda q, *rest: torch.empty_like(q))


def _operator() -> Any:
    _library()
    return torch.ops.kp.tap.default


def _tap(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], flags: list[Tensor],
    module: str, observer: str, spec: str,
) -> Tensor:  # fmt: skip
    if observer in _observers:
        site = site_of(parse_spec(spec), q, k, flags, scalars)
        _observers[observer](Tapped(module, site, v, operands))
    return q.clone()
