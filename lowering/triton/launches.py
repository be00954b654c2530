"""Kernels that were launched before with arguments alike, launched again.

Triton looks at every argument of a launch, and what the arguments of these kernels are takes longer to work
out than a short kernel runs. Both depend on numbers, and on sizes, strides, dtypes and alignments of tensors
alone: where those are as they were, the compiled kernel gets what it got then, with the tensors of now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

KEPT = 4096  # launches


class Launch:
    """Of a compiled kernel with these arguments, in its order: numbers, tensors, and descriptors of such."""

    def __init__(self, kernel: CompiledKernel, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        self.run = kernel[(*grid, *(1,) * (3 - len(grid)))]
        self.arguments = list(arguments.values())
        self.places: list[tuple[int, str, TensorDescriptor | None]] = []
        for place, (name, value) in enumerate(arguments.items()):
            described = isinstance(value, TensorDescriptor)
            if described or isinstance(value, Tensor):
                self.places.append((place, name, _of(value, None) if described else None))
                self.arguments[place] = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """With other tensors, by name."""
        given = list(self.arguments)
        for place, name, described in self.places:
            x = tensors[name]
            given[place] = x if described is None else _of(described, x)
        self.run(*given)


class Launches:
    """By what decides about them."""

    def __init__(self) -> None:
        self.known: dict[Any, Launch] = {}

    def find(self, key: Any) -> Launch | None:
        return self.known.get(key)

    def keep(self, key: Any, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """What has just been launched. The interpreter compiles nothing."""
        if not isinstance(kernel, CompiledKernel):
            return
        if len(self.known) >= KEPT:
            self.known.clear()
        self.known[key] = Launch(kernel, grid, arguments)


def alike(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What a kernel and its launch can depend on, of tensors by name, beside their device. How many `blocks`
    lists have together may be another number each time, and nothing asks for it."""
    return tuple(
        (name, None if name == "blocks" else x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)
        for name, x in tensors.items()
    )


def _of(described: TensorDescriptor, base: Tensor | None) -> TensorDescriptor:
    """The same descriptor of another tensor, without looking at its sizes again."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(described.__dict__)
    found.base = base
    return found
