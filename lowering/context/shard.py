"""What a rank has of an attention site, and what it makes of keys that it is given."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.context import pairs, partial
from kp_compiler.lowering.context.layout import Layout, Ordered
from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.into import Into, tail_of
from kp_compiler.lowering.selection.site import Lines, lines_of
from kp_compiler.specs import AttentionSpec


@dataclass(frozen=True)
class Piece:
    """Some parts of a rank's queries, which lie side by side, with some of the keys that it was given."""

    parts: tuple[int, ...]
    keys: slice
    task: Task


Pieces = Sequence[Piece]


@dataclass
class Results:
    """What a rank's queries make of the keys that they see, piece by piece, in `out` [B,H,n,E]; of parts that
    have not seen their last keys yet with a tail, where out is in half precision."""

    out: Tensor
    part: int  # tokens of one
    left: list[int]  # pieces that each part is still to see
    sink: Tensor | None = None  # [H]
    lses: dict[int, Tensor] = field(default_factory=dict)  # [B,H,part] of each part
    tail: Tensor | None = None

    def alike(self, parts: Iterable[int]) -> Iterator[tuple[int, ...]]:
        """Neighbours that have, or have not, seen anything yet, and that this is, or is not, the last of."""
        for _, some in itertools.groupby(parts, lambda i: (i in self.lses, self.left[i] == 1)):
            yield tuple(some)

    def into(self, parts: tuple[int, ...]) -> Into:
        """What is known of them, and where it goes that they see some keys more."""
        rows, last, start = _span(parts, self.part), self.left[parts[0]] == 1, None
        out = self.out[:, :, rows]
        if parts[0] in self.lses:
            known = [self.lses[i] for i in parts]
            start = out, known[0] if len(known) == 1 else torch.cat(known, 2)
        if self.tail is None and not last and out.dtype != wide(out):
            self.tail = tail_of(self.out)
        return Into(out, start, None if self.tail is None else self.tail[:, :, rows], last)

    def take(self, parts: tuple[int, ...], lse: Tensor) -> None:
        for i, each in zip(parts, lse.split(self.part, 2), strict=True):
            self.left[i] -= 1
            self.lses[i] = each

    def finish(self) -> Tensor:
        """lse [B,H,n], when all pieces are there."""
        assert not any(self.left)
        for i in range(len(self.left)):
            if i not in self.lses:
                out = self.out[:, :, _span((i,), self.part)].zero_()
                self.lses[i] = out.new_full(out.shape[:3], float("-inf"), dtype=wide(out))
                if self.sink is not None:
                    self.lses[i][:] = self.sink[:, None]
        return torch.cat([self.lses[i] for i in range(len(self.left))], 2)


def wide(x: Tensor) -> torch.dtype:
    """Of numbers that others are added to."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Shard:
    """`operands` are of the whole sequence, as are the mask's `scalars`."""

    spec: AttentionSpec
    layout: Layout
    rank: int
    operands: Sequence[Tensor]
    scalars: Sequence[int]

    @cached_property
    def pieces(self) -> list[Pieces]:
        """Of this rank's queries and the keys of each rank, as few as hold everything that the mask keeps."""
        if not self.spec.mask.tensors and not self._ordered:
            return _pieces(self.spec, self.layout, self.rank, tuple(self.scalars))
        return [list(self._with(source)) for source in range(self.layout.size)]

    @cached_property
    def reach(self) -> int:
        """How far back the farthest rank is whose keys some rank sees; the last is followed by the first."""
        if self._ordered:
            return self.layout.size - 1
        return _reach(self._lines, self._bounded, self.layout)

    @cached_property
    def pieces_of_all(self) -> Pieces:
        """Of this rank's queries and the keys of the whole sequence, in its order: one for each part."""
        if self._ordered:
            return [Piece((0,), slice(0, self.layout.tokens), self._placed())]
        given = [self.operands[index] for index in self.spec.mask.tensors]
        return self._in_order(self.layout.starts(self.rank), self.layout.parts, given)

    def results(self, out: Tensor, pieces: Iterable[Piece], heads: slice = slice(None)) -> Results:
        """Nothing yet, of some heads that will see these pieces."""
        seen = [i for piece in pieces for i in piece.parts]
        left = [seen.count(i) for i in range(self.layout.each)]
        sink = None if self.spec.sink is None else self.operands[self.spec.sink].reshape(-1)
        if sink is not None and sink.numel() > 1:
            sink = sink[heads]
        return Results(out, self.layout.part, left, None if sink is None else sink.expand(out.shape[1]))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, results: Results, *, apart: bool = False
    ) -> None:
        """Take keys that were given into the results. Pieces of different parts may be computed `apart`."""
        launches = ((piece, parts) for piece in pieces for parts in results.alike(piece.parts))
        with engine(q).beside(q, len(pieces) if apart else 1) as turn:
            for piece, parts in launches:
                into = results.into(parts)
                sink = results.sink if into.start is None else None
                given = q[:, :, _span(parts, self.layout.part)], k[:, :, piece.keys], v[:, :, piece.keys]
                assert not apart or (into.start is None and into.last)  # nothing is shared
                call = functools.partial(engine(q).forward, *given, piece.task, sink, into)
                results.take(parts, turn(call))

    def add_gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, lse: Tensor, delta: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """Add to dq, without the scale, and to dk and dv of keys that were given; in lse's dtype."""
        for piece in pieces:
            mine, theirs = _span(piece.parts, self.layout.part), piece.keys
            of_queries, rows = ([x[:, :, mine] for x in some] for some in ((grad, q), (lse, delta)))
            of_keys, sums = ([x[:, :, theirs] for x in some] for some in ((k, v), (dk, dv)))
            engine(q).backward(*of_queries, *of_keys, piece.task, *rows, dq[:, :, mine], *sums)

    def _with(self, source: int) -> Iterator[Piece]:
        n, each = self.layout.part, self.layout.each
        if source == self.rank and pairs.by_order(self.spec.mask):
            yield from self._in_order([i * n for i in range(each)], each, self._own)
            return
        if self._ordered:
            yield Piece((0,), slice(0, n), self._placed(source))
            return
        cells = self._relations(source)
        for queries, keys in _rectangles(each):
            inside = [(i, j) for i in queries for j in keys]
            if all(cells.get(cell) == "all" for cell in inside):
                yield Piece(queries, _span(keys, n), Task(self.spec))
                cells = {cell: relation for cell, relation in cells.items() if cell not in inside}
        given = [self.operands[index] for index in self.spec.mask.tensors]
        for (i, j), relation in cells.items():
            if relation == "some":
                starts = self.layout.starts(self.rank)[i], self.layout.starts(source)[j]
                yield Piece((i,), _span((j,), n), self._task(*starts, n, given))

    def _in_order(self, starts: Sequence[int], count: int, given: list[Tensor]) -> Pieces:
        """Of queries whose parts begin at `starts`, and `count` parts of keys; both lie in the order that
        `given`, the mask's operands, have."""
        n = self.layout.part
        found: list[Piece] = []
        for i, start in enumerate(starts):
            seen = [j for j in range(count) if self._relation(start, n, j * n, n) != "none"]
            if not seen:
                continue
            keys = _span((seen[0], seen[-1]), n)
            size = keys.stop - keys.start
            if self._relation(start, n, keys.start, size) == "some":
                found.append(Piece((i,), keys, self._task(start, keys.start, size, given)))
            elif found and found[-1].task.mask is None and found[-1].keys == keys:
                found[-1] = Piece((*found[-1].parts, i), keys, found[-1].task)
            else:
                found.append(Piece((i,), keys, Task(self.spec)))
        return found

    def _relations(self, source: int) -> dict[tuple[int, int], pairs.Relation]:
        """By part of the queries and part of the keys."""
        n = self.layout.part
        starts = enumerate(self.layout.starts(self.rank)), enumerate(self.layout.starts(source))
        return {(i, j): self._relation(q, n, k, n) for (i, q), (j, k) in itertools.product(*starts)}

    def _relation(self, q_start: int, queries: int, k_start: int, keys: int) -> pairs.Relation:
        return pairs.relation(self._lines, self._bounded, q_start, queries, k_start, keys)

    @cached_property
    def _lines(self) -> Lines:
        return lines_of(pairs.bounds(self.spec.mask), tuple(self.scalars))

    @cached_property
    def _bounded(self) -> bool:
        return mask_render.inequalities(self.spec.mask) is not None

    @cached_property
    def _own(self) -> list[Tensor]:
        """The mask's operands for the rank's own tokens, in their order."""
        return [self.layout.taken(self.rank, self.operands[index]) for index in self.spec.mask.tensors]

    @property
    def _ordered(self) -> bool:
        return isinstance(self.layout, Ordered)

    def _placed(self, source: int | None = None) -> Task:
        """Of this rank's queries and the keys of another one, or of all in the order of the sequence."""
        if self.spec.mask.kind == "full":
            return Task(self.spec)
        mask = pairs.placed(self.spec.mask, ("q",) if source is None else ("q", "k"))

        def of(index: int, along: pairs.Along) -> Tensor:
            rank = self.rank if along == "q" else source
            if index == len(self.spec.mask.tensors):
                assert rank is not None  # else keys are in order
                return self._places[rank]
            if rank == self.rank:
                return self._own[index]
            whole = self.operands[self.spec.mask.tensors[index]]
            return whole if rank is None else self.layout.taken(rank, whole)

        return Task(self.spec, mask.mask, [of(*each) for each in mask.slices], self.scalars)

    @cached_property
    def _places(self) -> tuple[Tensor, ...]:
        """Of every rank, where its tokens lie."""
        assert isinstance(self.layout, Ordered)
        return self.layout.places.int().split(self.layout.part)

    def _task(self, q_start: int, k_start: int, keys: int, given: list[Tensor]) -> Task:
        mask = pairs.local(self.spec.mask)
        assert mask is not None
        if q_start == k_start == 0 and keys == self.layout.part:
            given = [x.narrow(-1, 0, keys) for x in given]
            return Task(self.spec, pairs.numbered(self.spec.mask), given, self.scalars)
        slices = mask.operands(given, q_start, self.layout.part, k_start, keys)
        return Task(self.spec, mask.mask, slices, [*self.scalars, q_start, k_start])


def _span(parts: Sequence[int], size: int) -> slice:
    return slice(parts[0] * size, (parts[-1] + 1) * size)


@lru_cache(maxsize=1024)
def _pieces(spec: AttentionSpec, layout: Layout, rank: int, scalars: tuple[int, ...]) -> list[Pieces]:
    shard = Shard(spec, layout, rank, (), scalars)
    return [list(shard._with(source)) for source in range(layout.size)]


@lru_cache(maxsize=1024)
def _reach(lines: Lines, bounded: bool, layout: Layout) -> int:
    n, found = layout.part, 0
    for rank in range(layout.size):
        for back in range(layout.size - 1, found, -1):
            starts = layout.starts(rank), layout.starts((rank - back) % layout.size)
            if any(
                pairs.relation(lines, bounded, q, n, k, n) != "none" for q, k in itertools.product(*starts)
            ):
                found = back
                break
    return found


@cache
def _rectangles(parts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Neighbouring parts of queries with neighbouring parts of keys, the largest first."""
    runs = [tuple(range(a, b)) for a in range(parts) for b in range(a + 1, parts + 1)]
    return sorted(itertools.product(runs, runs), key=lambda each: -len(each[0]) * len(each[1]))


def engine(q: Tensor) -> Any:
    """What computes a piece: kp's kernels, or PyTorch."""
    if not q.is_cuda:
        return partial
    from kp_compiler.lowering.context import kernels

    return kernels
