"""Weights of inference: quantised once, and again when a parameter changes.

`CachedWeights` holds the FP8 copy and the inverse of its scale beside the parameters, and looks at each
parameter's version counter and address on every call, and at how many steps optimizers made. A changed weight
is cast again into the same memory, so a captured CUDA graph reads the new one. Writes that count no versions
are not seen: through `.data`, and by a training step that is replayed from a CUDA graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.fp8.linear import (
    activation_cast,
    activation_scale,
    as_rows,
    finish,
    fprop,
    parse_spec,
    weight_cast,
    weight_scale,
)
from kp_compiler.lowering.ops import fragment

_SCHEMA = "(Tensor x, Tensor weight, Tensor inverse, int[] sizes, Tensor?[] biases, str spec) -> Tensor[]"


@cache
def library() -> Any:
    """Registers the operator of this file, once."""
    return fragment("fp8_linear_cached", _SCHEMA, {"CompositeImplicitAutograd": _linear})


def fp8_linear_cached() -> Any:
    """`kp::fp8_linear_cached`: x [..., K], weight [N,K] in FP8 and the inverse of its scale as
    `CachedWeights` made them, the sizes N_i that N is the sum of; returns [..., N_i] each. Inference only."""
    library()
    return torch.ops.kp.fp8_linear_cached.default


def _linear(
    x: Tensor, weight: Tensor, inverse: Tensor, sizes: list[int], biases: list[Tensor | None], spec: str
) -> list[Tensor]:
    plan = parse_spec(spec)
    rows = x.reshape(-1, x.shape[-1])
    scale = activation_scale(plan, rows)
    out = fprop(plan, activation_cast(plan, rows, scale), weight, scale.inverse, inverse, rows.shape[0])
    outs = out.split(sizes, dim=1) if len(sizes) > 1 else (out,)
    return finish(plan, x, outs, biases)


_steps = [0]  # of any optimizer: fused ones change parameters without counting versions


@cache
def _count_steps() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(*_: Any) -> None:
        _steps[0] += 1

    register_optimizer_step_post_hook(count)


class CachedWeights:
    """The provider of (FP8 weight [N,K], inverse scale) for the weights at some argument positions."""

    def __init__(self, positions: tuple[int, ...], spec: str) -> None:
        _count_steps()
        self.positions, self.spec = positions, spec
        self.kept: dict[tuple[int, ...], _Kept] = {}  # by identity: a graph may serve several layers

    def tensors(self, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
        weights = [args[position] for position in self.positions]
        key = tuple(map(id, weights))
        kept = self.kept.get(key)
        if kept is None or not kept.belongs_to(weights):
            self.kept = {k: v for k, v in self.kept.items() if v.alive()}
            kept = self.kept[key] = _kept(weights, self.spec)
        return kept.current(weights, self.spec)


class _Kept:
    """Copies of some weights, for all graphs that read them so."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.owners = [weakref.ref(w) for w in weights]
        self.state: tuple[Any, ...] | None = None
        self.copies: tuple[Tensor, Tensor] | None = None

    def alive(self) -> bool:
        return all(owner() is not None for owner in self.owners)

    def belongs_to(self, weights: list[Tensor]) -> bool:
        return all(owner() is weight for owner, weight in zip(self.owners, weights, strict=True))

    def current(self, weights: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
        unknown = any(w.is_inference() for w in weights)  # these count no versions
        state = (_steps[0], [(w.data_ptr(), 0 if unknown else w._version) for w in weights])
        if self.copies is None or unknown or state != self.state:
            with torch.no_grad():
                fresh = quantized([w.detach() for w in weights], spec)
            if self.copies is None or not all(map(_alike, self.copies, fresh)):
                self.copies = fresh
            else:
                for old, new in zip(self.copies, fresh, strict=True):
                    old.copy_(new)
            self.state = state
        assert self.copies is not None
        return self.copies


def _alike(old: Tensor, new: Tensor) -> bool:
    return (old.device, old.shape, old.dtype) == (new.device, new.shape, new.dtype)


_shared: weakref.WeakValueDictionary[Any, _Kept] = weakref.WeakValueDictionary()


def _kept(weights: list[Tensor], spec: str) -> _Kept:
    """What another graph has already, or a new one."""
    key = (*map(id, weights), spec)
    kept = _shared.get(key)
    if kept is None or not kept.belongs_to(weights):
        kept = _shared[key] = _Kept(weights)
    return kept


def quantized(weights: Sequence[Any], spec: str) -> tuple[Tensor, Tensor]:
    """(weights [N,K] in FP8, the inverse of their scale) for fprop."""
    plan = parse_spec(spec)
    scale = weight_scale(plan, weights)
    return weight_cast(plan, weights, scale), as_rows(plan, scale.inverse).contiguous()
