"""A rank's part of an attention site, and what it makes of keys that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.context import pairs, partial
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.partial import Start
from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.selection.site import Lines, lines_of
from kp_compiler.specs import AttentionSpec


@dataclass(frozen=True)
class Pair:
    """A part of the queries and one of the keys: their indices among the parts of their ranks, and where they
    begin in the sequence."""

    query: int
    key: int
    q_start: int
    k_start: int
    whole: bool  # nothing to mask


@dataclass(frozen=True)
class Shard:
    """`operands` are of the whole sequence, as are the mask's `scalars`."""

    spec: AttentionSpec
    layout: Layout
    rank: int
    operands: Sequence[Tensor]
    scalars: Sequence[int]

    def pairs(self, source: int) -> Iterator[Pair]:
        """Those of this rank's queries with the keys of another that keep anything."""
        n = self.layout.part
        for i, q_start in enumerate(self.layout.starts(self.rank)):
            for j, k_start in enumerate(self.layout.starts(source)):
                found = pairs.relation(self._lines, self._bounded, q_start, n, k_start, n)
                if found != "none":
                    yield Pair(i, j, q_start, k_start, found == "all")

    @cached_property
    def _lines(self) -> Lines:
        return lines_of(pairs.bounds(self.spec.mask), tuple(self.scalars))

    @cached_property
    def _bounded(self) -> bool:
        return mask_render.inequalities(self.spec.mask) is not None

    def task(self, pair: Pair) -> Task:
        if pair.whole:
            return Task(self.spec)
        mask, n = pairs.local(self.spec.mask), self.layout.part
        assert mask is not None
        given = [self.operands[index] for index in self.spec.mask.tensors]
        slices = mask.operands(given, pair.q_start, n, pair.k_start, n)
        return Task(self.spec, mask.mask, slices, [*self.scalars, pair.q_start, pair.k_start])

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B,H,tokens,…] by parts."""
        return x.chunk(self.layout.each, 2)

    def start(self, q: Tensor, width: int) -> list[Start]:
        """Results over no keys at all, by part: a sink is all that rows may have."""
        found = []
        wide = torch.promote_types(q.dtype, torch.float32)
        for part in self.split(q):
            out = part.new_zeros((*part.shape[:3], width), dtype=wide)
            lse = torch.full(part.shape[:3], float("-inf"), dtype=wide, device=q.device)
            if self.spec.sink is not None:
                lse = self.operands[self.spec.sink].to(wide).reshape(1, -1, 1).expand(part.shape[:3])
            found.append((out, lse))
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor, source: int, results: list[Start]) -> None:
        """Take the keys of a rank into the results, by part."""
        queries, keys, values = self.split(q), self.split(k), self.split(v)
        for pair in self.pairs(source):
            results[pair.query] = _engine(q).forward(
                queries[pair.query], keys[pair.key], values[pair.key], self.task(pair), results[pair.query]
            )

    def gradients(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        source: int,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of a rank's keys and values, from this rank's queries, whose own is added to dq; in dq's dtype."""
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
        parts = [self.split(x) for x in (grad, q, lse, delta, dq, k, v, dk, dv)]
        for pair in self.pairs(source):
            out, mine, own_lse, own_delta, own_dq = (x[pair.query] for x in parts[:5])
            theirs, value, of_k, of_v = (x[pair.key] for x in parts[5:])
            found = _engine(q).backward(out, mine, theirs, value, self.task(pair), own_lse, own_delta)
            for total, part in zip((own_dq, of_k, of_v), found, strict=True):
                total += part
        return dk, dv


def _engine(q: Tensor) -> Any:
    """What computes a pair: kp's kernels, or PyTorch."""
    if not q.is_cuda:
        return partial
    from kp_compiler.lowering.context import kernels

    return kernels
