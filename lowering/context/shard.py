"""A rank's part of an attention site, and what it makes of keys that it is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
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
class Piece:
    """Some of a rank's queries with some keys that it was given, as places among those of either rank."""

    queries: slice
    keys: slice
    task: Task


@dataclass
class Sum:
    """A tensor that is the sum of others along the tokens, and made when there is something to add."""

    like: Tensor
    dtype: torch.dtype
    value: Tensor | None = None

    def add(self, span: slice, x: Tensor) -> None:
        if self.value is None and x.shape == self.like.shape:
            self.value = x
        else:
            self.value = self.finish()
            self.value[:, :, span] += x

    def finish(self) -> Tensor:
        return torch.zeros_like(self.like, dtype=self.dtype) if self.value is None else self.value


@dataclass
class Results:
    """What a rank's queries make of the keys that they saw: out [B,H,n,E] and lse [B,H,n] in float32."""

    like: Tensor  # q
    width: int
    lse_of_none: Tensor | None  # [H,1]: a sink is all that a row without a key has
    found: Start | None = None

    def before(self, span: slice) -> Start | None:
        """What is known of some queries; None if they have seen nothing."""
        if self.found is None and self.lse_of_none is None:
            return None
        out, lse = self.finish()
        return out[:, :, span], lse[:, :, span]

    def take(self, span: slice, out: Tensor, lse: Tensor) -> None:
        if out.shape[2] == self.like.shape[2]:
            self.found = (out, lse)
        else:
            self.found = self.finish()
            self.found[0][:, :, span], self.found[1][:, :, span] = out, lse

    def finish(self) -> Start:
        if self.found is None:
            sizes, wide = self.like.shape[:3], torch.promote_types(self.like.dtype, torch.float32)
            lse = torch.full(sizes, float("-inf"), dtype=wide, device=self.like.device)
            if self.lse_of_none is not None:
                lse[:] = self.lse_of_none
            self.found = (self.like.new_zeros((*sizes, self.width), dtype=wide), lse)
        return self.found


@dataclass(frozen=True)
class Shard:
    """`operands` are of the whole sequence, as are the mask's `scalars`."""

    spec: AttentionSpec
    layout: Layout
    rank: int
    operands: Sequence[Tensor]
    scalars: Sequence[int]

    def pieces(self, source: int) -> Iterator[Piece]:
        """Of this rank's queries and the keys of another, as few as hold everything that the mask keeps."""
        if source == self.rank and pairs.by_order(self.spec.mask):
            everything = slice(0, self.layout.part * self.layout.each)
            yield Piece(everything, everything, self._own_task)
            return
        cells = self._relations(source)
        for queries, keys in _rectangles(self.layout.each):
            inside = [(i, j) for i in queries for j in keys]
            if all(cells.get(cell) == "all" for cell in inside):
                yield Piece(self._span(queries), self._span(keys), Task(self.spec))
                cells = {cell: each for cell, each in cells.items() if cell not in inside}
        for (i, j), relation in cells.items():
            if relation == "some":
                yield Piece(self._span((i,)), self._span((j,)), self._task(i, j, source))

    def _span(self, parts: Sequence[int]) -> slice:
        return slice(parts[0] * self.layout.part, (parts[-1] + 1) * self.layout.part)

    def _relations(self, source: int) -> dict[tuple[int, int], pairs.Relation]:
        """By part of the queries and part of the keys."""
        n = self.layout.part
        starts = enumerate(self.layout.starts(self.rank)), enumerate(self.layout.starts(source))
        return {
            (i, j): pairs.relation(self._lines, self._bounded, q_start, n, k_start, n)
            for (i, q_start), (j, k_start) in itertools.product(*starts)
        }

    @cached_property
    def _lines(self) -> Lines:
        return lines_of(pairs.bounds(self.spec.mask), tuple(self.scalars))

    @cached_property
    def _bounded(self) -> bool:
        return mask_render.inequalities(self.spec.mask) is not None

    @cached_property
    def _own_task(self) -> Task:
        """Of all tokens of the rank with each other, where their order is all that the mask asks for."""
        n, starts = self.layout.part, self.layout.starts(self.rank)
        given = [self.operands[index] for index in self.spec.mask.tensors]
        read = [torch.cat([x.narrow(-1, start, n) for start in starts], -1) for x in given]
        return Task(self.spec, pairs.numbered(self.spec.mask), read, self.scalars)

    def _task(self, i: int, j: int, source: int) -> Task:
        mask, n = pairs.local(self.spec.mask), self.layout.part
        assert mask is not None
        q_start, k_start = self.layout.starts(self.rank)[i], self.layout.starts(source)[j]
        given = [self.operands[index] for index in self.spec.mask.tensors]
        slices = mask.operands(given, q_start, n, k_start, n)
        return Task(self.spec, mask.mask, slices, [*self.scalars, q_start, k_start])

    def results(self, q: Tensor, width: int) -> Results:
        sink = None if self.spec.sink is None else self.operands[self.spec.sink].reshape(-1, 1)
        return Results(q, width, sink)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, source: int, results: Results) -> None:
        """Take the keys of a rank into the results."""
        for piece in self.pieces(source):
            mine, theirs = piece.queries, piece.keys
            found = _engine(q).forward(
                q[:, :, mine], k[:, :, theirs], v[:, :, theirs], piece.task, results.before(mine)
            )
            results.take(mine, *found)

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, source: int, lse: Tensor, delta: Tensor, dq: Sum
    ) -> tuple[Tensor, Tensor]:
        """Of a rank's keys and values, from this rank's queries, whose own is added to dq; in lse's dtype."""
        dk, dv = Sum(k, lse.dtype), Sum(v, lse.dtype)
        for piece in self.pieces(source):
            mine, theirs = piece.queries, piece.keys
            of_queries = (x[:, :, mine] for x in (grad, q))
            of_keys = (x[:, :, theirs] for x in (k, v))
            rows = (x[:, :, mine] for x in (lse, delta))
            found = _engine(q).backward(*of_queries, *of_keys, piece.task, *rows)
            for total, span, x in zip((dq, dk, dv), (mine, theirs, theirs), found, strict=True):
                total.add(span, x)
        return dk.finish(), dv.finish()


@cache
def _rectangles(parts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Neighbouring parts of queries with neighbouring parts of keys, the largest first."""
    runs = [tuple(range(a, b)) for a in range(parts) for b in range(a + 1, parts + 1)]
    return sorted(itertools.product(runs, runs), key=lambda each: -len(each[0]) * len(each[1]))


def _engine(q: Tensor) -> Any:
    """What computes a pair: kp's kernels, or PyTorch."""
    if not q.is_cuda:
        return partial
    from kp_compiler.lowering.context import kernels

    return kernels
