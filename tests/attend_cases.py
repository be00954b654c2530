"""Attention sites for tests of kp's kernels: every mask with every score change, and results in float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kp_compiler.lowering import reference
from kp_compiler.lowering.attend import Plan, attend
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.specs import AttentionSpec, BiasSpec, MaskSpec
from tests.covering import pairwise

BLOCK = (128, 128)
SHAPES = [(70, 70), (33, 150), (1, 50), (64, 128), (140, 40)]
HEADS = [(1, 1), (4, 2), (2, 1)]
DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (40, 24), (16, 16), (32, 32)]


@dataclass
class Case:
    """A spec with its operands and scalars, and lists of its blocks where its loops are not bounded."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    operands: list[Tensor]
    scalars: list[int]

    def keep(self) -> Tensor:
        """The mask as [B,H,S,T]."""
        full = torch.ones(*self.q.shape[:3], self.k.shape[2], dtype=torch.bool)
        found = reference.mask(self.spec.mask, self.operands, self.scalars, full)
        return full if found is None else full & found

    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(o for o in self.operands if o.is_floating_point())]


def lists(keep: Tensor, block: tuple[int, int]) -> list[Tensor]:
    """Which blocks hold pairs of a mask, by blocks of queries and of keys."""
    rows, columns = (-(-size // unit) for size, unit in zip(keep.shape[2:], block, strict=True))
    more = (0, columns * block[1] - keep.shape[3], 0, rows * block[0] - keep.shape[2])

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, more).unflatten(3, (columns, block[1])).unflatten(2, (rows, block[0])).sum((3, 5))

    held, there = blocks(keep.int()), blocks(torch.ones_like(keep, dtype=torch.int32))
    flags = (held > 0) & (held < there), held == there
    by_key = (x.transpose(-1, -2) for x in flags)
    return [*Lists.of(*flags).tensors(), *Lists.of(*by_key).tensors()]


BOUNDED = {
    "full": MaskSpec(),
    "causal": MaskSpec("causal", "k <= q"),
    "offset": MaskSpec("causal", "k <= q + n0", scalars=1),
    "window": MaskSpec("window", "(k <= q) & (q - k <= 19)", window=20),
    "both sides": MaskSpec("window", "(k <= q + 11) & (q - k <= 30)"),
    "first keys": MaskSpec("pointwise", "k <= n0", scalars=1),
    "late rows": MaskSpec("pointwise", "(k <= q) & (q >= 40)"),
    "nothing": MaskSpec("causal", "k <= q - n0 * 100", scalars=1),
}
LISTED = {
    "prefix": MaskSpec("prefix", "(k <= q) | (k < 37)"),
    "document": MaskSpec("document", "(k <= q) & Eq(t0(b, k), t1(b, q))", tensors=(0, 1)),
    "padding": MaskSpec("padding", "Ne(t0(b, k), 0)", tensors=(0,)),
    "all padding": MaskSpec("padding", "Ne(t0(b, k), 0) & (k <= q)", tensors=(0,)),
    "chunked": MaskSpec("chunked", "Eq(floor(q/50), floor(k/50)) & (k <= q)"),
    "strided": MaskSpec("pointwise", "Eq(Mod(q - k, 7), 0)"),
    "tensor": MaskSpec("tensor", "", tensors=(0, 1)),
}
MASK_SPECS = {**BOUNDED, **LISTED}


def mask_operands(name: str, batch: int, heads: int, queries: int, keys: int) -> list[Tensor]:
    if name == "document":
        return [torch.arange(keys).div(23, rounding_mode="floor").repeat(batch, 1),
                torch.arange(queries).div(29, rounding_mode="floor").repeat(batch, 1)]  # fmt: skip
    if name == "padding":
        return [torch.arange(keys).repeat(batch, 1) >= torch.tensor([[3], [17]])[:batch]]
    if name == "all padding":  # of one sequence, or of every one
        return [torch.arange(keys).repeat(batch, 1) >= torch.tensor([[5], [keys]])[-batch:]]
    if name == "tensor":
        return [torch.rand(batch, 1, queries, keys) > 0.3, torch.rand(heads, 1, keys) > 0.2]
    return []


SCORE_CHANGES: dict[str, Any] = {
    "plain": {},
    "negative scale": {"scale": -0.3},
    "soft-cap": {"softcap": 1.5},
    "bias": {"biases": lambda b, h, s, t: [(torch.randn(1, h, s, t), 1.0)]},
    "two biases": {
        "biases": lambda b, h, s, t: [(torch.randn(h, 1, t), -0.5), (torch.randn(b, 1, s, 1), 2.0)]
    },
    "capped bias": {"softcap": 2.0, "biases": lambda b, h, s, t: [(torch.randn(b, h, s, t), 1.0)]},
    "sink": {"sink": True},
    "sink and cap": {"sink": True, "softcap": 3.0},
}  # fmt: skip


def case(mask: str, change: str, heads: tuple[int, int], shape: tuple[int, int], dims: tuple[int, int],
         dtype: torch.dtype) -> Case:  # fmt: skip
    batch, (queries, keys) = 1 if heads == (4, 2) else 2, shape
    q, k, v = (
        torch.randn(batch, length, number, width, dtype=dtype).transpose(1, 2)
        for length, number, width in zip((queries, keys, keys), (heads[0], heads[1], heads[1]),
                                         (dims[0], *dims), strict=True)
    )  # fmt: skip
    settings = dict(SCORE_CHANGES[change])
    operands = mask_operands(mask, batch, heads[0], queries, keys)
    biases = []
    for value, coeff in settings.pop("biases", lambda *_: [])(batch, heads[0], queries, keys):
        biases.append(BiasSpec(len(operands), coeff))
        operands.append(value.to(dtype))
    sink = None
    if settings.pop("sink", False):
        sink = len(operands)
        operands.append(torch.randn(heads[0], dtype=dtype))
    spec = AttentionSpec(settings.pop("scale", dims[0] ** -0.5), MASK_SPECS[mask], tuple(biases), sink=sink,
                         dead_rows="zero", **settings)  # fmt: skip
    return Case(spec, q, k, v, operands, [27] * spec.mask.scalars)


def covering() -> Iterator[tuple[Any, ...]]:
    """Every mask with every score change; heads, lengths, head sizes and dtypes beside them, pair by pair."""
    dtypes = [torch.float32, torch.float16]
    yield from pairwise(list(itertools.product(MASK_SPECS, SCORE_CHANGES)), HEADS, SHAPES, DIMS, dtypes)


def run(one: Case, weights: Tensor, lse_weights: Tensor, block: tuple[int, int] = BLOCK) -> list[Tensor]:
    """out, lse and gradients of q, k, v and floating operands, memory filled with NaN before."""
    leaves = [x.detach().clone().requires_grad_() for x in one.inputs()]
    rest = iter(leaves[3:])
    operands = [next(rest) if o.is_floating_point() else o for o in one.operands]
    listed = lists(one.keep(), block) if one.spec.mask in LISTED.values() else []
    plan = Plan(one.spec, block if listed else None).to_json()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        out, lse = attend()(*leaves[:3], operands, one.scalars, listed, None, None, None, plan)
        alive = torch.where(lse == float("-inf"), 0.0, lse)
        ((out.float() * weights).sum() + (alive * lse_weights).sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    return [out.detach(), alive.detach(), *(x.grad for x in leaves)]


def exact(one: Case, weights: Tensor, lse_weights: Tensor) -> list[Tensor]:
    """The same in float64."""
    leaves = [x.detach().double().requires_grad_() for x in one.inputs()]
    rest = iter(leaves[3:])
    operands = [next(rest) if o.is_floating_point() else o for o in one.operands]
    out = reference.attention_over(*leaves[:3], operands, one.scalars, one.spec)
    lse = log_sum_exp(dataclasses.replace(one, q=leaves[0], k=leaves[1], operands=operands))
    ((out * weights).sum() + (lse * lse_weights).sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def log_sum_exp(one: Case) -> Tensor:
    """By its definition; zero for rows without a key."""
    k = one.k.repeat_interleave(one.q.shape[1] // one.k.shape[1], dim=1)
    scores = one.q @ k.transpose(-1, -2) * one.spec.scale
    if one.spec.softcap is not None:
        scores = one.spec.softcap * torch.tanh(scores / one.spec.softcap)
    for bias in one.spec.biases:
        scores = scores + bias.coeff * one.operands[bias.operand]
    keep = one.keep()
    scores = scores.masked_fill(~keep, float("-inf"))
    if one.spec.sink is not None:
        sink = one.operands[one.spec.sink].reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.logsumexp(torch.cat([scores, sink], dim=-1), dim=-1)
    dead = ~keep.any(-1)
    return torch.logsumexp(scores.masked_fill(dead.unsqueeze(-1), 0.0), dim=-1).masked_fill(dead, 0.0)
