"""Recipes: which elements share a scale in each of a linear layer's three products.

    fprop  y  [M,N] = x · wᵀ        contracts K: x by rows [M,K], w by rows [N,K]
    dgrad  dx [M,K] = dy · w        contracts N: dy by rows [M,N], w transposed [K,N]
    wgrad  dw [N,K] = dyᵀ · x       contracts M: dy transposed [N,M], x transposed [K,M]

Blocks are those of the matrix as it lies in memory before a transpose.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from kp_compiler.config import Fp8LinearConfig
from kp_compiler.lowering.fp8.quantize import Block

TENSOR: Block = (0, 0)
ROW: Block = (1, 0)
COLUMN: Block = (0, 1)
BLOCK = 128


@dataclass(frozen=True)
class Recipe:
    """Blocks of the operands. `x_t`, `dy_t` are those of wgrad, None where it runs in high precision; `w_t`
    is the weight of dgrad."""

    x: Block
    w: Block
    dy: Block
    w_t: Block
    x_t: Block | None
    dy_t: Block | None
    grad_dtype: str = "e4m3"

    @property
    def blocks(self) -> bool:
        """Several scales stand along the contracted dimension."""
        return max(self.x) > 1


RECIPES = {
    # one scale a tensor, from the tensor itself (torchao's and Transformer Engine's "current scaling"), one a
    # row in fprop. That costs nothing (8192^3 on one H100, 2026-11-26: 1462 and 1387 TFLOP/s), the maximum of
    # a row is known where it is made, and a spike spoils its own row only. Gradients in e5m2 hold a spike of
    # 1e5 times the rest as they are.
    "tensorwise": Recipe(ROW, ROW, TENSOR, TENSOR, TENSOR, TENSOR, "e5m2"),
    # one scale a tensor, from earlier steps (`delayed`)
    "delayed": Recipe(TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, "e5m2"),
    # one scale for each row of an operand, along the contracted dimension
    "rowwise": Recipe(ROW, ROW, ROW, COLUMN, COLUMN, COLUMN),
    # the same, with the weight's gradient left in high precision (torchao's rowwise_with_gw_hp)
    "rowwise_gw_hp": Recipe(ROW, ROW, ROW, TENSOR, None, None),
    # one scale for 128 elements along the contracted dimension, of weights for 128 x 128 (DeepSeek-V3). The
    # activation of wgrad has 128 x 128 as well: cuBLASLt's kernel for that pair is a third faster than the
    # one for two operands of 1 x 128 (8192 x 4096 x 14336 on one H100, 2026-11-26: 1167 and 835 TFLOP/s).
    "blockwise": Recipe((1, BLOCK), (BLOCK, BLOCK), (1, BLOCK), (BLOCK, BLOCK), (BLOCK, BLOCK), (BLOCK, 1)),
}


@dataclass(frozen=True)
class Fp8Spec:
    """What one operator needs to know, as its spec string."""

    recipe: str
    grad_dtype: str
    power_of_two: bool
    fast_accum: tuple[str, ...]
    transposed: bool  # weights are stored [K, N]
    dtype: str  # of the outputs
    save: str = "input"  # what is kept of the activation for wgrad: "input" or, transposed, "fp8"
    fingerprint: str = ""

    @property
    def scaling(self) -> Recipe:
        """The recipe's blocks. Row scales give bfloat16 only: without them float16 has one scale a tensor."""
        recipe = RECIPES[self.recipe]
        if self.dtype == "float16" and TENSOR == recipe.x_t != recipe.x:
            return dataclasses.replace(recipe, x=TENSOR, w=TENSOR)
        return recipe

    @property
    def outputs_dim(self) -> int:
        """The dimension of a stored weight that counts its outputs."""
        return 1 if self.transposed else 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Fp8Spec:
        data: dict[str, Any] = json.loads(text)
        data["fast_accum"] = tuple(data["fast_accum"])
        return cls(**data)

    def __str__(self) -> str:
        return ", ".join(
            [self.recipe, f"e4m3/{self.grad_dtype}", *(["2^n scales"] if self.power_of_two else [])]
        )


def spec_for(
    config: Fp8LinearConfig, *, transposed: bool, dtype: str, fingerprint: str, training: bool, save: str
) -> Fp8Spec:
    """The spec of a site. Where no gradient is wanted nothing is delayed: scales come from the data."""
    recipe = config.recipe if training or config.recipe != "delayed" else "tensorwise"
    grad_dtype = RECIPES[recipe].grad_dtype if config.grad_dtype == "auto" else config.grad_dtype
    return Fp8Spec(
        recipe,
        grad_dtype,
        config.power_of_two_scales,
        config.fast_accum,
        transposed,
        dtype,
        save,
        fingerprint,
    )
