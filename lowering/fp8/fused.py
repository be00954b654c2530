"""`kp::fp8_fused`: several casts in one operator, as a `Program` says. CUDA only; `fuse` writes it."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.fp8.program import Program


@cache
def _library() -> Any:
    library = torch.library.Library("kp", "FRAGMENT")
    library.define("fp8_fused(Tensor[] tensors, str program) -> Tensor[]")
    library.impl("fp8_fused", _run, "CUDA")
    torch.library.register_fake("kp::fp8_fused", _fake, lib=library)
    return library


def fp8_fused() -> Any:
    """tensors [M, K], [M], [K] or single numbers, as the program's leaves say; returns its buffers."""
    _library()
    return torch.ops.kp.fp8_fused.default


@lru_cache(maxsize=1024)
def parse(text: str) -> Program:
    return Program.from_json(text)


def _run(tensors: list[Tensor], program: str) -> list[Tensor]:
    from kp_compiler.lowering.triton import fused_cast

    return fused_cast.run(tensors, parse(program))


def _fake(tensors: list[Tensor], program: str) -> list[Tensor]:
    parsed = parse(program)
    first = tensors[next(index for index, kind in parsed.launches[0].leaves if kind == "full")]
    return [first.new_empty(b.shape(first.shape[0]), dtype=getattr(torch, b.dtype)) for b in parsed.buffers]
