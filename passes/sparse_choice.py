"""What the settings of `sparse_attention`, and the files that they name, say for one site."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kp_compiler import calibration, gates
from kp_compiler.calibration import Measured
from kp_compiler.config import SparseAttentionConfig
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, SparseSpec

SPARSITY = 0.9  # where neither a share of blocks nor anything else is asked for


@dataclass(frozen=True)
class Choice:
    """How a site chooses its blocks, the gates that it reads, and what calibration found of it."""

    sparse: SparseSpec
    gates: tuple[Tensor, Tensor] | None = None
    measured: Measured | None = None


Fits = Callable[[SparseSpec], Rejection | None]


def choose(config: SparseAttentionConfig, name: str, shape: AttentionShape, fits: Fits) -> Choice | Rejection:
    """For the site of that name; `fits` says why it can't have a choice."""
    known = [] if config.calibration is None else list(calibration.load(config.calibration).get(name, []))
    if config.selector == "auto":
        return _best(config, name, known, fits)
    spec = _spec(config, name, config.selector, _sparsity(config))
    if (refused := fits(spec)) is not None:
        return refused
    measured = next((each for each in known if _is_of(each, spec)), None)
    if config.selector != "learned":
        return Choice(spec, measured=measured)
    assert config.gates is not None
    trained = gates.load(config.gates).get(name)
    if trained is None:
        return Rejection("untrained", f"{config.gates} has no gates for {name or 'this site'}.")
    wanted = (shape.heads, shape.head_dim)
    if tuple(trained[0].shape[:2]) != wanted or tuple(trained[1].shape[:2]) != (wanted[0], 3 * wanted[1]):
        return Rejection("gates", f"The gates for {name} are not those of {shape.describe()}.")
    return Choice(spec, trained, measured)


def seeded(sparse: SparseSpec, name: str) -> SparseSpec:
    """With a seed of this site's own."""
    return dataclasses.replace(sparse, seed=(sparse.seed + zlib.crc32(name.encode())) % 2**31)


def _best(config: SparseAttentionConfig, name: str, known: list[Measured], fits: Fits) -> Choice | Rejection:
    sparsity = SPARSITY if config.sparsity is None and config.error is None else config.sparsity
    refusals = [fits(_measured_spec(config, name, each)) for each in known]
    fitting = [each for each, refused in zip(known, refusals, strict=True) if refused is None]
    best = calibration.best(fitting, sparsity, config.error)
    if best is not None:
        return Choice(_measured_spec(config, name, best), measured=best)
    if not fitting and (refused := next(iter(refusals), None)) is not None:
        return refused
    there = sorted({each.sparsity for each in fitting})
    what = f"only at sparsity {there}, not {sparsity}" if there else "not at all"
    return Rejection("uncalibrated", f"{name or 'This site'} is measured {what} in {config.calibration}.")


def _measured_spec(config: SparseAttentionConfig, name: str, each: Measured) -> SparseSpec:
    """As it was measured, heads that were too far off dense."""
    spec = _spec(config, name, each.selector, each.sparsity, each.dense(config.error))
    return dataclasses.replace(
        spec, estimate=each.estimate, sink_blocks=each.sink_blocks, local_blocks=each.local_blocks,
        shared=each.shared,
    )  # fmt: skip


def _is_of(each: Measured, spec: SparseSpec) -> bool:
    """What was measured is what runs, but for heads that are dense."""
    same = ("selector", "estimate", "sink_blocks", "local_blocks", "shared")
    matches = all(getattr(each, what) == getattr(spec, what) for what in same)
    return matches and spec.mass is None and abs(each.sparsity + spec.density - 1) < 1e-6


def _sparsity(config: SparseAttentionConfig) -> float:
    if config.sparsity is None:
        return SPARSITY if config.mass is None else 0.0
    return config.sparsity


def _spec(
    config: SparseAttentionConfig, name: str, selector: str, sparsity: float, more: tuple[int, ...] = ()
) -> SparseSpec:
    dense = {head for part, heads in config.dense_heads.items() if part in name for head in heads}
    spec = SparseSpec(
        selector, 1.0 - sparsity, config.mass, config.error, config.sink_blocks, config.local_blocks,
        tuple(sorted({*dense, *more})), config.estimate, config.shared, config.seed,
    )  # fmt: skip
    return seeded(spec, name)
