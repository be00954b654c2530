"""What attention costs, as formulas: `kp.attention_efficiency`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import sympy
import torch

from kp_compiler import cost
from kp_compiler.config import Selector
from kp_compiler.errors import KPConfigError
from kp_compiler.specs import AttentionSpec, MaskSpec, SparseSpec

_SYMBOLS = {str(symbol): symbol for symbol in (cost.SB, cost.SH, cost.SK, cost.SQ, cost.ST, cost.SD, cost.SE)}


@dataclass(frozen=True)
class Efficiency:
    """One forward pass: formulas over B, H (query heads), K (key heads), S, T (queries, keys), D, E (head
    sizes of keys and values), or numbers once `at` put sizes in. FLOPs count multiplications and additions;
    bytes are the fewest that cross memory, each input read once and each output written once."""

    flops: Any  # of the pairs that are computed
    bytes: Any
    selection_flops: Any  # of choosing blocks; 0 where all are computed
    selection_bytes: Any
    dense_flops: Any  # of all pairs that the mask keeps

    @property
    def intensity(self) -> Any:
        """FLOPs for each byte, choosing included."""
        return (self.flops + self.selection_flops) / (self.bytes + self.selection_bytes)

    @property
    def saving(self) -> Any:
        """How many times fewer FLOPs than computing all pairs, choosing included."""
        return self.dense_flops / (self.flops + self.selection_flops)

    @property
    def backward_flops(self) -> Any:
        """Of the backward pass, which recomputes the scores and makes two products of each one forward."""
        return self.flops * sympy.Rational(5, 2)

    def at(self, **sizes: float) -> Efficiency:
        """With some of B, H, K, S, T, D, E as numbers."""
        values = cost.sized(_SYMBOLS, sizes)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Efficiency(**{name: sympy.sympify(value).subs(values) for name, value in fields.items()})


def attention_efficiency(
    *,
    mask: str = "causal",
    window: int | None = None,
    sparsity: float = 0.0,
    selector: str = "content",
    dtype: torch.dtype = torch.bfloat16,
) -> Efficiency:
    """FLOPs and bytes of attention under a `mask` ("full" or "causal", which `window` keys narrow), of which
    a share of `sparsity` is left out by `selector`.

        kp.attention_efficiency(sparsity=0.9).at(B=1, H=32, K=8, S=32768, T=32768, D=128, E=128).saving
    """
    if mask not in ("full", "causal"):
        raise KPConfigError(f"mask: got {mask!r}, expected one of 'full', 'causal'")
    if window is not None and (mask != "causal" or window < 1):
        raise KPConfigError(f"window: got {window} for a {mask} mask, expected 1 or more, for a causal one")
    if not 0 <= sparsity < 1:
        raise KPConfigError(
            f"sparsity: got {sparsity}, expected a share of blocks, 0 or more and less than 1"
        )
    known = [name for name in get_args(Selector) if name != "auto"]
    if selector not in known:
        raise KPConfigError(f"selector: got {selector!r}, expected one of {', '.join(map(repr, known))}")
    parts = ("causal",) if mask == "causal" else ()
    dense = AttentionSpec(1.0, MaskSpec(mask, parts=parts, window=window))  # type: ignore[arg-type]
    chosen = SparseSpec(selector, 1.0 - sparsity) if sparsity else None
    spec = dataclasses.replace(dense, sparse=chosen)
    zero = cost.Cost(sympy.S.Zero, sympy.S.Zero, 0)
    choosing = zero if chosen is None else cost.selection(spec, dtype.itemsize)
    all_of_it = cost.attention(spec, dtype.itemsize)
    return Efficiency(
        all_of_it.flops - choosing.flops,
        all_of_it.bytes - choosing.bytes,
        choosing.flops,
        choosing.bytes,
        cost.attention(dense, dtype.itemsize).flops,
    )
