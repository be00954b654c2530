"""`kp::fp8_fused`: several casts in one operator, as a `Program` says; `fuse` writes it.

Inductor lowers it to Triton kernels on a CUDA device (`triton.fused_cast`); run as it stands, the operator
launches the same ones there, and interprets programs elsewhere.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.fp8.program import Program, Store
from kp_compiler.lowering.fp8.quantize import block_amax, clamped, padding, scale_of, spread
from kp_compiler.lowering.ops import fragment


@cache
def library() -> Any:
    """Registers the operator of this file, once."""
    schema = "(Tensor[] tensors, str program) -> Tensor[]"
    return fragment("fp8_fused", schema, {"CUDA": _run, "CPU": interpreted}, _fake)


def fp8_fused() -> Any:
    """tensors [M, K], [M], [K] or single numbers, as the program's leaves say; returns its buffers."""
    library()
    return torch.ops.kp.fp8_fused.default


@lru_cache(maxsize=1024)
def parse(text: str) -> Program:
    return Program.from_json(text)


def _run(tensors: list[Tensor], program: str) -> list[Tensor]:
    from kp_compiler.lowering.triton import fused_cast

    return fused_cast.run(tensors, parse(program))


def interpreted(tensors: list[Tensor], program: str) -> list[Tensor]:
    """The program in PyTorch, tile maxima included."""
    parsed = parse(program)
    outs = [out.zero_() for out in parsed.results(tensors)]
    for launch in parsed.launches:
        rows = tensors[launch.matrix].shape[0]
        values: dict[str, Any] = {"tl": _Language}
        for place, (index, kind) in enumerate(launch.leaves):
            x = tensors[index].float()
            values[f"x{place}"] = (
                x.reshape(-1, 1) if kind == "row" else x.reshape(()) if kind == "scalar" else x
            )
        for line in launch.code:
            name, _, expression = line.partition(" = ")
            values[name] = eval(expression, values)  # written by `fuse` from a fixed set of expressions
        for store in launch.stores:
            value = torch.broadcast_to(values[store.value], (rows, launch.columns))
            scale = _made(store, value, outs) if store.scales >= 0 else values[f"x{store.scale}"]
            _store(store, value, scale, outs, launch.tile)
    return outs


def _made(store: Store, value: Tensor, outs: list[Tensor]) -> Tensor:
    """Scales of blocks, written where they go and spread over the elements."""
    into = next(outs[b] for b in (store.plain, store.turned) if b >= 0)
    scale = scale_of([value], 0, into.dtype, list(store.block), store.power_of_two)
    row, column = store.row // store.block[0], store.column // (store.block[1] or value.shape[1])
    into = outs[store.scales][row : row + scale.shape[0], column : column + scale.shape[1]]
    made = scale[: into.shape[0]]
    into.copy_(made.reciprocal() if store.inverse else made)
    return spread(scale, value, store.block)


def _store(
    store: Store, value: Tensor, scale: Tensor, outs: list[Tensor], tile: tuple[int, int, int]
) -> None:
    value = torch.nn.functional.pad(value, (0, 0, 0, padding(store.block, value.shape[0])))
    rows, columns = value.shape
    down, along = slice(store.row, store.row + rows), slice(store.column, store.column + columns)
    if store.plain >= 0:
        into = outs[store.plain]
        into[down, along] = clamped(value * scale, into.dtype).to(into.dtype)
    if store.turned >= 0:
        into = outs[store.turned]
        into[along, down] = clamped(value * scale, into.dtype).to(into.dtype).t()
    if store.amax >= 0:
        outs[store.amax].copy_(block_amax(value, tile[:2]))


class _Language:
    """What programs use of Triton's language."""

    exp, sqrt, where, erf = torch.exp, torch.sqrt, torch.where, torch.erf


def _fake(tensors: list[Tensor], program: str) -> list[Tensor]:
    return parse(program).results(tensors)
