"""Sharing heads instead of tokens: ranks that are near exchange what they have of some heads for what others
have of theirs, attend with these over all of their tokens, and exchange the results.

    q [B,H,n,D] ─▶ [B,H/U,U·n,D] ─▶ attention over a ring of R groups of U ranks ─▶ out [B,H,n,E]

With R = 1 this is Ulysses; else ranks are a grid, whose rows share heads and whose columns are rings. Some
heads after the other: those of the next chunk come, and the results of the last one go, while a chunk is
computed.

Methods: Jacobs et al., DeepSpeed-Ulysses (arXiv:2309.14509); Fang and Zhao, Unified Sequence Parallelism
(arXiv:2405.07719).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kp_compiler.lowering.attend import by_row
from kp_compiler.lowering.context import gather, ring
from kp_compiler.lowering.context.exchange import Peers, Pending
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.shard import Shard, wide

Target = tuple[Tensor, Tensor]  # what a rank has computed [B,h,U·n,·], and where it goes, [B,heads,n,·]


@dataclass(frozen=True)
class Chunk:
    """Heads of q and of k that each rank attends with, and where they are among all of this rank's."""

    queries: list[list[int]]
    keys: list[list[int]]
    place: slice


class Heads:
    """Who attends with which heads: each rank with as many of q, and the key heads that they read. Ranks
    share key heads where there are fewer than ranks; where a rank's query heads don't divide evenly among
    its key heads, it has one for each query head."""

    def __init__(self, peers: Peers, layout: Layout, q: Tensor, k: Tensor) -> None:
        self.peers, self.layout = peers, layout
        heads, key_heads = q.shape[1], k.shape[1]
        each, group = heads // peers.size, heads // key_heads
        self.queries = [list(range(r * each, (r + 1) * each)) for r in range(peers.size)]
        read = [[head // group for head in own] for own in self.queries]
        even = group % each == 0 or each % group == 0
        self.keys = [list(dict.fromkeys(own)) for own in read] if even else read
        count = ring.chunk_count(len(self.keys[0]), q.shape[0] * each * layout.tokens)
        self.chunks = list(self._chunks(count))
        self.waiting: tuple[Chunk, Sequence[Tensor], int, Pending[list[list[Tensor]]]] | None = None

    def _chunks(self, count: int) -> Iterator[Chunk]:
        here, group = len(self.keys[0]), len(self.queries[0]) // len(self.keys[0])
        for a, b in itertools.pairwise(here * i // count for i in range(count + 1)):
            place = slice(a * group, b * group)
            yield Chunk([own[place] for own in self.queries], [own[a:b] for own in self.keys], place)

    def rounds(self, of_queries: list[Tensor], of_keys: list[Tensor]) -> Iterator[tuple[Chunk, list[Tensor]]]:
        """Of each chunk, what all ranks have of these tensors for its heads, [B,h,U·n,·]."""

        def begin(chunk: Chunk) -> Pending[list[list[Tensor]]]:
            sent = [
                [_laid(x, queries) for x in of_queries] + [_laid(x, keys) for x in of_keys]
                for queries, keys in zip(chunk.queries, chunk.keys, strict=True)
            ]
            return self.peers.swap(sent, "heads")

        coming = begin(self.chunks[0])
        for i, chunk in enumerate(self.chunks):
            by_rank = coming.wait()
            if i + 1 < len(self.chunks):
                coming = begin(self.chunks[i + 1])
            yield chunk, [self.layout.joined(x, 1).transpose(1, 2) for x in zip(*by_rank, strict=True)]

    def back(self, chunk: Chunk, of_queries: list[Target], of_keys: Sequence[Target] = ()) -> None:
        """Results of a chunk to the ranks whose tokens they are of: put where they belong, those of key heads
        added to what is there."""
        self.settle()
        values, targets = zip(*of_queries, *of_keys, strict=True)
        divided = [self.layout.divided(x.transpose(1, 2), 1) for x in values]
        sent = [[torch.cat(parts, 1) for parts in for_rank] for for_rank in zip(*divided, strict=True)]
        self.waiting = (chunk, targets, len(of_queries), self.peers.swap(sent, "results of heads"))

    def settle(self) -> None:
        """Put what is on its way where it belongs."""
        if self.waiting is None:
            return
        chunk, targets, count, coming = self.waiting
        self.waiting = None
        for of_rank, queries, keys in zip(coming.wait(), chunk.queries, chunk.keys, strict=True):
            for i, (x, to) in enumerate(zip(of_rank, targets, strict=True)):
                if i < count:
                    to[:, queries[0] : queries[-1] + 1].copy_(x.transpose(1, 2))
                else:
                    for place, head in enumerate(keys):  # by indices on the device the host would wait for it
                        to[:, head] += x[:, :, place]


def _laid(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads, [B,n,h,·]."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1].transpose(1, 2).contiguous()
    return torch.stack([x[:, head] for head in heads], 2)


class Grid:
    """Of the ranks of a shard, rows of `near.size` that share heads; `far` are those that have the same place
    in other rows. Layouts of all ranks are, by rows, layouts of rows."""

    def __init__(self, shard: Shard, near: Peers, far: Peers | None, q: Tensor, k: Tensor) -> None:
        layout = shard.layout
        self.near, self.far = near, far
        self.heads = Heads(near, replace(layout, size=near.size, tokens=q.shape[2] * near.size), q, k)
        rows = layout.size // near.size
        self.rows = Layout("contiguous" if rows == 1 else layout.kind, rows, layout.tokens)
        self.shard = shard

    def of(self, chunk: Chunk) -> Shard:
        """The sequence among rows, with a chunk of this rank's heads."""
        spec, operands = self.shard.spec, list(self.shard.operands)
        if spec.sink is not None and operands[spec.sink].numel() > 1:
            mine = chunk.queries[self.near.rank]
            operands[spec.sink] = operands[spec.sink].reshape(-1)[mine[0] : mine[-1] + 1]
        row = self.shard.rank // self.near.size
        return replace(self.shard, layout=self.rows, rank=row, operands=operands)


def forward(
    shard: Shard, near: Peers, far: Peers | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    grid = Grid(shard, near, far, q, k)
    out, lse = by_row(q, v.shape[3]), q.new_empty((*q.shape[:3], 1), dtype=wide(q))
    for chunk, (queries, keys, values) in grid.heads.rounds([q], [k, v]):
        found, rows = gather.forward_of_ring(grid.of(chunk), far, queries, keys, values)
        grid.heads.back(chunk, [(found, out), (rows.unsqueeze(-1), lse)])
    grid.heads.settle()
    return out, lse.squeeze(-1)


def backward(
    shard: Shard, near: Peers, far: Peers | None, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grid = Grid(shard, near, far, q, k)
    dq, sums = by_row(q, q.shape[3]), [ring.zeros(x) for x in (k, v)]
    given = [grad, q, lse.unsqueeze(-1), delta.unsqueeze(-1)]
    for chunk, (grads, queries, sums_of, deltas, keys, values) in grid.heads.rounds(given, [k, v]):
        of_rows = sums_of.squeeze(-1), deltas.squeeze(-1)
        found = ring.backward(grid.of(chunk), far, grads, queries, keys, values, *of_rows, rounded=False)
        grid.heads.back(chunk, [(found[0], dq)], list(zip(found[1:], sums, strict=True)))
    grid.heads.settle()
    dk, dv = (by_row(x, x.shape[3]).copy_(total) for x, total in zip((k, v), sums, strict=True))
    return dq, dk, dv
