"""What the demos share: transformers or one clear sentence, models with random weights, errors, tables."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kp_compiler.errors import KPError
from kp_compiler.target import has_package


def transformers() -> Any:
    """The transformers package, quiet."""
    if not has_package("transformers"):
        raise KPError("this demo needs transformers, which is not installed: pip install 'kp-compiler[demo]'")
    import transformers as package

    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def build(
    cls: Any, config: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A model with random weights, in evaluation mode; nothing is downloaded."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return cls(config).eval()
    finally:
        torch.set_default_dtype(before)


def reference_of(model: Any, dtype: torch.dtype) -> Any:
    """A copy in a wider dtype that calls F.scaled_dot_product_attention."""
    twin = copy.deepcopy(model).to(dtype)
    twin.set_attn_implementation("sdpa")
    return twin


def relative_error(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> float:
    """RMS of the difference over RMS of the reference, over all the tensors together, summed in float64."""
    difference = norm = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach().double(), b.detach().double()
        difference += float((a - b).square().sum())
        norm += float(b.square().sum())
    return (difference / norm) ** 0.5 if norm else difference**0.5


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns separated by bars, the first row being the header."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-+-".join("-" * w for w in widths), *lines[1:]])


def medians(steps: dict[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Milliseconds on an accelerator, one call of each in turn so that clocks and heat hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, step in steps.items():
            torch.accelerator.synchronize()
            start = time.perf_counter()
            step()
            torch.accelerator.synchronize()
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
