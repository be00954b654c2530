"""What the settings of `sparse_attention`, and the files that they name, say for one site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kp_compiler import calibration, gates
from kp_compiler.calibration import Measured
from kp_compiler.config import SparseAttentionConfig
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, SparseSpec

SPARSITY = 0.9  # where neither a share of blocks nor one of the probabilities is asked for


@dataclass(frozen=True)
class Choice:
    """How a site chooses its blocks, the gates that it reads, and what calibration found of it."""

    sparse: SparseSpec
    gates: tuple[Tensor, Tensor] | None = None
    measured: Measured | None = None


def choose(config: SparseAttentionConfig, module: str, shape: AttentionShape) -> Choice | Rejection:
    known = [] if config.calibration is None else calibration.load(config.calibration).get(module, [])
    if config.selector == "auto":
        return _best(config, module, list(known))
    spec = _spec(config, module, config.selector, _sparsity(config))
    found = [m for m in known if m.selector == config.selector and abs(m.sparsity + spec.density - 1) < 1e-6]
    measured = found[0] if found and config.mass is None else None
    if config.selector != "learned":
        return Choice(spec, measured=measured)
    assert config.gates is not None
    trained = gates.load(config.gates).get(module)
    if trained is None:
        return Rejection("untrained", f"{config.gates} has no gates for {module or 'this site'}.")
    wanted = (shape.heads, shape.head_dim)
    if tuple(trained[0].shape[:2]) != wanted or tuple(trained[1].shape[:2]) != (wanted[0], 3 * wanted[1]):
        return Rejection("gates", f"The gates for {module} are not those of {shape.describe()}.")
    return Choice(spec, trained, measured)


def _best(config: SparseAttentionConfig, module: str, known: list[Measured]) -> Choice | Rejection:
    best = calibration.best(known, config.sparsity, config.error)
    if best is None:
        there = sorted({m.sparsity for m in known})
        what = f"only at sparsity {there}, not {config.sparsity}" if there else "not at all"
        return Rejection(
            "uncalibrated", f"{module or 'This site'} is measured {what} in {config.calibration}."
        )
    spec = _spec(config, module, best.selector, best.sparsity, best.dense(config.error))
    return Choice(spec, measured=best)


def _sparsity(config: SparseAttentionConfig) -> float:
    if config.sparsity is None:
        return SPARSITY if config.mass is None else 0.0
    return config.sparsity


def _spec(
    config: SparseAttentionConfig, module: str, selector: str, sparsity: float, more: tuple[int, ...] = ()
) -> SparseSpec:
    dense = {head for part, heads in config.dense_heads.items() if part in module for head in heads}
    return SparseSpec(
        selector, 1.0 - sparsity, config.mass, config.error, config.sink_blocks, config.local_blocks,
        tuple(sorted({*dense, *more})), config.estimate, config.shared, config.seed,
    )  # fmt: skip
