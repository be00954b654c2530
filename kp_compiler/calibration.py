"""The file that `kp.calibrate` writes: what each selector cost each head of each site of a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from kp_compiler.errors import KPConfigError

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """One selector at one sparsity, at one site: the share of blocks that was computed, and for each head the
    share of the probabilities that they held and the relative error of the output, over all batches."""

    selector: str
    estimate: Literal["sampled", "pooled", "antidiagonal"]
    sparsity: float
    density: float
    mass: tuple[float, ...]
    error: tuple[float, ...]
    tokens: int  # keys of the longest call
    sink_blocks: int = 1
    local_blocks: int = 2
    shared: bool = False

    def summary(self) -> dict[str, float]:
        """For a report."""
        return {
            "density": round(self.density, 4),
            "kept_mass": round(sum(self.mass) / len(self.mass), 4),
            "error": round(sum(self.error) / len(self.error), 4),
            "worst_head_error": round(max(self.error), 4),
        }

    def saved(self, error: float | None) -> float:
        """The share of blocks left out, where heads that are further off than `error` compute everything."""
        return (1.0 - self.density) * (1.0 - len(self.dense(error)) / len(self.error))

    def dense(self, error: float | None) -> tuple[int, ...]:
        """Heads that are further off."""
        if error is None:
            return ()
        return tuple(head for head, each in enumerate(self.error) if not each <= error)


Calibration = Mapping[str, Sequence[Measured]]  # by module path


def save(found: Calibration, path: str | Path) -> None:
    data = {module: [dataclasses.asdict(each) for each in several] for module, several in found.items()}
    Path(path).write_text(json.dumps({"schema": SCHEMA, "sites": data}, indent=1) + "\n")


def load(path: str) -> Calibration:
    """Raises KPConfigError where the file is none of `kp.calibrate`'s."""
    try:
        return _load(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise KPConfigError(f"sparse_attention.calibration: {path} can't be read: {error}") from None


@lru_cache(maxsize=16)
def _load(path: str, changed: int) -> Calibration:
    setting = "sparse_attention.calibration"
    try:
        data = json.loads(Path(path).read_text())
        schema, sites = data["schema"], data["sites"].items()
        found = {module: [_measured(each) for each in several] for module, several in sites}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise KPConfigError(f"{setting}: {path} is no file that kp.calibrate wrote") from None
    if schema != SCHEMA:
        raise KPConfigError(f"{setting}: {path} has schema {schema}, expected {SCHEMA}")
    return found


def _measured(data: dict[str, Any]) -> Measured:
    return Measured(**{**data, "mass": tuple(data["mass"]), "error": tuple(data["error"])})


def best(candidates: Sequence[Measured], sparsity: float | None, error: float | None) -> Measured | None:
    """The one to choose a site's blocks by: at a sparsity that was asked for, the smallest mean error; else,
    under a bound on the error, the most blocks left out."""
    if sparsity is not None:
        fitting = [each for each in candidates if abs(each.sparsity - sparsity) < 1e-6]
        return min(fitting, key=lambda each: sum(each.error), default=None)
    return max(candidates, key=lambda each: (each.saved(error), -sum(each.error)), default=None)
