"""`kp.calibrate`: what leaving blocks out costs the heads of a model, on its own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kp_compiler import calibration
from kp_compiler.calibration import Measured
from kp_compiler.capture import as_written, capture_reports, merged
from kp_compiler.config import resolve
from kp_compiler.errors import KPConfigError, KPError
from kp_compiler.lowering import tap
from kp_compiler.lowering.selection import SELECTORS, lists, measure
from kp_compiler.lowering.selection.site import Site
from kp_compiler.passes import sparse_choice
from kp_compiler.specs import SparseSpec

UNTRAINED = tuple(name for name in SELECTORS if name != "learned")


@dataclass
class _Sums:
    """Of one candidate at one site: [H] each, summed over sequences."""

    mass: Tensor
    error: Tensor
    computed: float = 0.0  # blocks
    allowed: float = 0.0
    sequences: int = 0
    tokens: int = 0


@dataclass
class _Measuring:
    """The observer: measures every candidate at every call of a site."""

    candidates: list[SparseSpec]
    sites: dict[str, list[_Sums | None]] = field(default_factory=dict)

    def __call__(self, seen: tap.Tapped) -> None:
        sums = self.sites.setdefault(seen.module, [None] * len(self.candidates))
        allowed = measure.allowed(seen.site)
        for place, sparse in enumerate(self.candidates):
            own = sparse_choice.seeded(sparse, seen.module)
            sums[place] = _added(sums[place], dataclasses.replace(seen.site, sparse=own), seen, allowed)


def _added(sums: _Sums | None, site: Site, seen: tap.Tapped, allowed: float) -> _Sums:
    found = lists.by_query(site)
    cost = measure.cost(site, seen.v, measure.sampled(site, found), seen.operands)
    zeros = torch.zeros(site.q.shape[1])
    sums = sums or _Sums(zeros, zeros)
    if sums.mass.shape != zeros.shape:
        raise KPError(f"two sites with different heads are called {seen.module or 'the same'}")
    sums.mass = sums.mass + cost.mass.sum(0).cpu()
    sums.error = sums.error + cost.error.square().sum(0).cpu()
    sums.computed += float(found.count.double().mean(1).sum())
    sums.allowed += allowed
    sums.sequences += site.q.shape[0]
    sums.tokens = max(sums.tokens, site.k.shape[2])
    return sums


def calibrate(
    model: Any,
    batches: Iterable[Any],
    path: str | Path,
    *,
    selectors: Sequence[str] = UNTRAINED,
    sparsity: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    options: Mapping[str, Any] | None = None,
) -> dict[str, list[Measured]]:
    """Measure kept mass and error of each selector at each sparsity, for each head of each attention site of
    `model`, and write them to `path`, a JSON file that `sparse_attention={"calibration": path}` reads.

    `batches`: what the model is called with, one after the other: a tuple of arguments, a dict of keyword
    arguments, or one argument. The model runs without gradients and computes all blocks. `options` as for
    `torch.compile`; those of sparse_attention say where (`min_tokens`, `skip`, `only`) and how blocks are
    forced. Costs of 64 queries of each sequence are measured (`selection.measure`). Raises KPError where no
    site could be measured.
    """
    for name in selectors:
        if name not in UNTRAINED:
            raise KPConfigError(
                f"selectors: got {name!r}, expected some of {', '.join(map(repr, UNTRAINED))}"
            )
    for share in sparsity:
        if not 0 <= share < 1:
            raise KPConfigError(f"sparsity: got {share}, expected shares of blocks, 0 or more, less than 1")
    check_writable(path)
    settings = resolve(options).sparse_attention
    candidates = [
        SparseSpec(name, 1.0 - share, None, None, settings.sink_blocks, settings.local_blocks, (),
                   settings.estimate, settings.shared, settings.seed)
        for name in selectors for share in sparsity
    ]  # fmt: skip
    measuring = _Measuring(candidates)
    observe(model, batches, measuring, options)
    found = {
        module: [_measured(sparse, each) for sparse, each in zip(candidates, sums, strict=True)]
        for module, sums in measuring.sites.items()
    }
    calibration.save(found, path)
    return found


def _measured(sparse: SparseSpec, sums: _Sums | None) -> Measured:
    assert sums is not None
    mass, error = sums.mass / sums.sequences, (sums.error / sums.sequences).sqrt()
    return Measured(
        sparse.selector, sparse.estimate, round(1.0 - sparse.density, 6), sums.computed / sums.allowed,
        tuple(mass.tolist()), tuple(error.tolist()), sums.tokens, sparse.sink_blocks, sparse.local_blocks,
        sparse.shared,
    )  # fmt: skip


def check_writable(path: str | Path) -> None:
    """Before anything is measured for it."""
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise KPConfigError(f"path: {path} can't be written, expected a file in a folder that exists")


def observe(
    model: Any,
    batches: Iterable[Any],
    observer: Callable[[tap.Tapped], None],
    options: Mapping[str, Any] | None,
) -> None:
    """Run `model` on `batches` without gradients; `observer` sees every call of an attention site."""
    calls, seen = 0, 0

    def counted(tapped: tap.Tapped) -> None:
        nonlocal seen
        seen += 1
        observer(tapped)

    given = dict(options or {})
    sparse = given.get("sparse_attention", {})
    asked = {"mode": "on", "selector": "random", "calibration": None, "gates": None, "expect": None}
    asked |= {"mass": None, "error": None}
    with tap.observing(counted), capture_reports() as reports, as_written(model) as plain:
        given["sparse_attention"] = {**(sparse if isinstance(sparse, Mapping) else {}), **asked}
        compiled = torch.compile(plain, backend="kp", options=given)
        with torch.no_grad():
            for batch in batches:
                calls += 1
                _call(compiled, batch)
    torch._dynamo.reset()
    if not seen:
        sites = merged(reports).sites
        reasons = {str(x) for s in sites for x in (*s.notes, s.reason) if x is not None}
        why = "; ".join(sorted(reasons)) or "no site was found"
        raise KPError(f"no attention was measured: {why if calls else 'no batch was given'}")


def _call(function: Callable[..., Any], batch: Any) -> None:
    if isinstance(batch, Mapping):
        function(**batch)
    elif isinstance(batch, tuple | list):
        function(*batch)
    else:
        function(batch)
