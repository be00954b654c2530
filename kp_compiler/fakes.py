"""Copies of models and arguments on fake tensors: `plan` needs no memory for them and computes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from kp_compiler.errors import KPError


def new_mode() -> FakeTensorMode:
    """Tensors that a function finds in globals may stay real: the graph gets fake copies of them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(value: Any, dtype: torch.dtype | None, mode: FakeTensorMode) -> Any:
    """A copy with every tensor fake and on the CPU, floating-point ones of `dtype`; no data is copied.

    Goes into modules, containers, partial functions, bound methods and what functions close over. Not on the
    meta device: Dynamo keeps a `torch.tensor(0.0, device=x.device)` there as a real meta tensor and then
    refuses to mix it with fake ones (transformers builds its masks and caches with such constants).
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(value, set()):
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
    try:
        return _copy(value, memo)
    except Exception as error:
        raise KPError(
            f"the model can't be copied, as planning needs: {type(error).__name__}: {error}"
        ) from error


def on_fakes(gm: GraphModule, mode: FakeTensorMode) -> Callable[..., Any]:
    """Runs a captured graph on fake copies of what it is given: computes nothing, writes to nothing."""

    def run(*args: Any) -> Any:
        with mode:
            return gm(*(_faked(arg, mode) for arg in args))

    return run


def _faked(value: Any, mode: FakeTensorMode) -> Any:
    real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if real else value


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for part in _parts(value):
        yield from _tensors(part, seen)


def _parts(value: Any) -> Iterator[Any]:
    """What may hold tensors in a value."""
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            yield from (t for t in module.__dict__.values() if isinstance(t, torch.Tensor))
            yield from (*module._parameters.values(), *module._buffers.values())
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        yield from (_content(cell) for cell in value.__closure__ or ())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, which takes functions as they are, and what they close over as well."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_copy(item, memo) for item in value)
    if not isinstance(value, FunctionType) or not value.__closure__:
        return copy.deepcopy(value, memo)
    if id(value) not in memo:
        cells = tuple(CellType() for _ in value.__closure__)
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        memo[id(value)] = made
        for cell, old in zip(cells, value.__closure__, strict=True):
            cell.cell_contents = _copy(_content(old), memo)
    return memo[id(value)]
