"""Attention from its definition, in plain PyTorch: the meaning of an AttentionSpec, the oracle of every test,
and the kernel on a CPU. O(S·T) memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.specs import AttentionSpec, MaskSpec


def attention(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], spec: str
) -> Tensor:
    """q [B,H,S,D], k [B,K,T,D], v [B,K,T,E] to [B,H,S,E] in q's dtype. Half inputs are computed in
    float32."""
    from kp_compiler.lowering.ops import parse_spec

    parsed = parse_spec(spec)
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    chosen = None if parsed.sparse is None else chosen_pairs(q, k, v, operands, scalars, parsed)
    return attention_over(q, k, v, operands, scalars, parsed, chosen).to(dtype)


def attention_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    scalars: Sequence[Any],
    spec: AttentionSpec,
    chosen: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """In the inputs' dtype, over the pairs `chosen` [B,H,S,T] if not all; `rows` [S]: the queries that those
    of q are, if not the first ones."""
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-2, -1)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    for bias in spec.biases:
        term = operands[bias.operand].to(scores.dtype)
        if rows is not None and term.dim() > 1 and term.shape[-2] > 1:
            term = term.index_select(-2, rows)
        scores = scores + bias.coeff * term
    keep = mask(spec.mask, operands, scalars, scores, rows)
    if chosen is not None:
        keep = chosen if keep is None else keep & chosen
    sink = None if spec.sink is None else operands[spec.sink].to(scores.dtype).reshape(1, -1, 1, 1)
    probs = _softmax(scores, keep, sink, spec)
    if spec.dropout_p:
        probs = torch.nn.functional.dropout(probs, spec.dropout_p, training=True)
    return probs @ v


def chosen_pairs(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], spec: AttentionSpec
) -> Tensor:
    """The pairs [B,H,S,T] of the blocks that the spec's selector chooses."""
    from kp_compiler.lowering.select import site_of
    from kp_compiler.lowering.selection import lists, measure
    from kp_compiler.lowering.selection.site import spread

    assert spec.sparse is not None
    q, k, size = q.detach(), k.detach(), spec.sparse.block
    queries, keys = q.shape[2], k.shape[2]
    flags: list[Tensor] = []
    if mask_render.inequalities(spec.mask) is None:
        pairs = q.new_empty(1, 1, 1, 1).expand(q.shape[0], q.shape[1], queries, keys)
        keep = mask(spec.mask, operands, scalars, pairs)
        assert keep is not None
        keep = keep[(None,) * (4 - keep.dim())].expand(-1, -1, queries, keys)
        ends = (0, -keys % size, 0, -queries % size)
        some, every = (
            torch.nn.functional.pad(keep, ends, value=value).unflatten(3, (-1, size)).unflatten(2, (-1, size))
            for value in (False, True)
        )
        held, whole = some.any(5).any(3).any(1, keepdim=True), every.all(5).all(3).all(1, keepdim=True)
        flags = [held & ~whole, whole]
    site = site_of(spec, q, k, flags, scalars, [operands[i] for i in spec.sparse.gates])
    chosen = torch.logical_or(*lists.flags(site, slice(0, site.rows)))
    line = measure.rows(site) // size
    heads = measure.dense_heads(site, v.detach(), lambda: chosen[:, :, line], operands, None)
    chosen = chosen.repeat_interleave(q.shape[1] // site.choices, 1)
    return (spread(chosen, size) | heads[:, :, None, None])[:, :, :queries, :keys]


def _softmax(scores: Tensor, keep: Tensor | None, sink: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Rows with nothing kept are what `dead_rows` says."""
    dead = None
    if spec.dead_rows == "zero" and spec.biases:  # of infinities
        dead = torch.isneginf(scores if keep is None else scores.masked_fill(~keep, -math.inf))
        dead = dead.all(dim=-1, keepdim=True)
        scores = scores.masked_fill(dead, 0.0)
        keep = None if keep is None else keep | dead
    if keep is not None and spec.dead_rows == "mean":
        lowest = torch.finfo(scores.dtype).min
        scores = (
            torch.where(keep, scores, lowest)
            if spec.fill == "where"
            else scores + torch.where(keep, 0.0, lowest)
        )
    elif keep is not None:
        if spec.dead_rows in ("zero", "none"):
            empty = ~keep.any(dim=-1, keepdim=True)
            dead = empty if dead is None else dead | empty
            keep = keep | empty
        if spec.dead_rows == "nan" and spec.fill == "add":  # adding lets the NaN reach q and k as well
            scores = scores + torch.where(keep, 0.0, float("-inf"))
        else:
            scores = torch.where(keep, scores, float("-inf"))
    if sink is None:
        probs = torch.softmax(scores, dim=-1)
    else:
        extended = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)
        probs = torch.softmax(extended, dim=-1)[..., :-1]
    return probs if dead is None else probs.masked_fill(dead, 0.0)


def mask(
    spec: MaskSpec,
    operands: Sequence[Tensor],
    scalars: Sequence[Any],
    scores: Tensor,
    rows: Tensor | None = None,
) -> Tensor | None:
    """The mask as a boolean tensor that broadcasts to scores [B,H,S,T], or None where everything is kept.
    `rows` [S]: the queries that these are, if not the first ones."""
    if spec.kind == "tensor":
        out = operands[spec.tensors[0]]
        for index in spec.tensors[1:]:
            out = out & operands[index]
        return out
    expr = mask_render.parse(spec.expr)
    if expr == True:  # noqa: E712  (a sympy atom)
        return None
    return mask_render.render(expr, Indices(spec, operands, scalars, scores, rows))


class Indices:
    """The algebra of index tensors, broadcast over [B, H, S, T]."""

    def __init__(
        self,
        spec: MaskSpec,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        scores: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        self.tensors = [operands[index] for index in spec.tensors]
        self.scalars = scalars
        self.device = scores.device
        self.index = {}
        for dim, name in enumerate(mask_render.INDEX_NAMES):
            shape = [1, 1, 1, 1]
            shape[dim] = -1
            self.index[name] = torch.arange(scores.shape[dim], device=scores.device).view(shape)
        if rows is not None:
            self.index["q"] = rows.view(1, 1, -1, 1)

    def integer(self, value: int) -> Any:
        return value

    def truth(self, value: bool) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=torch.bool, device=self.device)

    def symbol(self, name: str) -> Any:
        return self.index[name] if name in self.index else self.scalars[int(name[1:])]

    def lookup(self, index: int, args: list[Any]) -> Tensor:
        tensor = self.tensors[index]
        for dim in reversed(range(len(args))):
            if not isinstance(args[dim], Tensor):
                tensor = tensor.select(dim, args[dim])
        places = tuple(a for a in args if isinstance(a, Tensor))
        return (tensor[places] if places else tensor).to(torch.int64)

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def mul(self, a: Any, b: Any) -> Any:
        return a * b

    def floor_div(self, a: Any, divisor: int) -> Any:
        return torch.div(a, divisor, rounding_mode="floor") if isinstance(a, Tensor) else a // divisor

    def mod(self, a: Any, divisor: int) -> Any:
        return a % divisor

    def minimum(self, a: Any, b: Any) -> Any:
        return _extremum(torch.minimum, torch.clamp_max, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return _extremum(torch.maximum, torch.clamp_min, a, b)

    def le_zero(self, a: Any) -> Any:
        return a <= 0

    def eq_zero(self, a: Any) -> Any:
        return a == 0

    def both(self, a: Any, b: Any) -> Any:
        return a & b

    def either(self, a: Any, b: Any) -> Any:
        return a | b

    def negate(self, a: Any) -> Any:
        return ~a


def _extremum(pair: Any, with_number: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return pair(a, b)
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return (torch.sym_min if pair is torch.minimum else torch.sym_max)(a, b)
    return with_number(a, b) if isinstance(a, Tensor) else with_number(b, a)
