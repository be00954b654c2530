"""Keys and values go round: each rank attends to one rank's at a time, while the next ones are on their way.

Results in half precision that are not finished have a tail (`lowering.into`). In the backward pass gradients
of keys and values go the same way, in float32, some heads after the other (`chunks`): what travels for one
chunk does so while another one is computed, and only one chunk's gradients of queries are in float32.

Methods: Liu et al., Ring Attention (arXiv:2310.01889); Brandon et al., Striped Attention (arXiv:2311.09431),
of which zigzag is the form for parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kp_compiler.lowering.attend import by_row
from kp_compiler.lowering.context.exchange import Peers, Pending
from kp_compiler.lowering.context.shard import Pieces, Shard, wide

CHUNKS = 4  # at most
# Queries of all heads of a chunk, at least: a thousand tiles for a kernel. Twice as many in the backward
# pass, where a program goes through all heads that read the same keys: 32 heads for 8 of keys, 32k tokens on
# two GPUs, forward and backward 33.0 ms in four chunks, 29.8 in two (two H200, 2026-11-27)
ROWS = 2**17
KEYS, GRADIENTS = "keys and values", "gradients of keys and values"


def chunk_count(kv_heads: int, rows: int) -> int:
    """How many chunks a rank's heads of keys make: `rows` are the queries of all of their readers."""
    return max(1, min(CHUNKS, kv_heads, rows // ROWS))


def chunks(q: Tensor, k: Tensor, count: int) -> list[tuple[slice, slice]]:
    """Heads of q, and of k, that go together."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    ends = [kv_heads * i // count for i in range(count + 1)]
    return [(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(ends)]


def backward_chunks(kv_heads: int, rows: int) -> int:
    """How many chunks go round in a backward pass, as gradients of queries are in float32. Two would take
    nearly as much memory as one. A forward pass has one: of 16 heads, 32k tokens take 3.9 ms, in two chunks
    6.1, in four 4.3 (two H200, 2026-11-28). `rows`: queries of all heads."""
    count = chunk_count(kv_heads, rows // 2)
    return count if count > 2 else 1


def few_keys(heads: int, kv_heads: int) -> bool:
    """Whether all keys and values of two ranks in order, beside one's that have come, take less memory than
    these and a tail."""
    return 8 * kv_heads < heads


def forward(shard: Shard, peers: Peers | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B,H,n,D], k [B,K,n,D], v [B,K,n,E] of this rank to out [B,H,n,E] and lse [B,H,n] in float32."""
    out = by_row(q, v.shape[3])
    results = shard.results(out, itertools.chain(*shard.pieces))
    for _, _, steps in _rounds(shard, peers, k, v, chunks(q, k, 1)):
        for _, pieces, key, value in steps:
            shard.attend(q, key, value, pieces, results)
    return out, results.finish()


Step = tuple[int, Pieces, Tensor, Tensor]  # a rank, what of its keys is seen, its keys and values


def _rounds(
    shard: Shard, peers: Peers | None, k: Tensor, v: Tensor, every: list[tuple[slice, slice]], *,
    backward: bool = False,
) -> Iterator[tuple[slice, slice, Iterator[Step]]]:  # fmt: skip
    """Of each chunk, heads of q and of k, and the keys and values of the ranks that some rank sees. The next
    are on their way while these are used, those of the next chunk, too: this rank's own come first in the
    first chunk, which has nothing else yet, and last in others, beside what is on its way back, as do in a
    backward pass all but the first of their pieces: 32k tokens of 16 heads waited 1.0 of 16.2 ms for their
    gradients (two H200, 2026-11-28)."""
    coming: Pending[list[Tensor]] | None = None

    def begin(chunk: int) -> Pending[list[Tensor]] | None:
        if peers is None or shard.reach == 0 or chunk == len(every):
            return None
        heads = every[chunk][1]
        return peers.shift(by_token(k[:, heads], v[:, heads]), f"{KEYS} of step 1")

    def steps(chunk: int) -> Iterator[Step]:
        nonlocal coming
        own = [x[:, every[chunk][1]] for x in (k, v)]
        pieces = list(shard.pieces[shard.rank])
        if chunk == 0:
            coming = begin(0)
            first = pieces[:1] if backward else pieces
            pieces = pieces[len(first) :]
            yield shard.rank, first, own[0], own[1]
        for step in range(1, shard.reach + 1):
            assert peers is not None and coming is not None
            pair = coming.wait()
            coming = None  # what was sent is not needed any more
            if step < shard.reach:
                coming = peers.shift(pair, f"{KEYS} of step {step + 1}")
            else:
                coming = begin(chunk + 1)
            source, (key, value) = (shard.rank - step) % shard.layout.size, by_head(pair)
            yield source, shard.pieces[source], key, value
        if pieces:
            yield shard.rank, pieces, own[0], own[1]

    for chunk, (mine, theirs) in enumerate(every):
        yield mine, theirs, steps(chunk)


def by_token(*several: Tensor) -> list[Tensor]:
    """[B,heads,n,D] as [B,n,heads,D], contiguous: the form in which they travel."""
    return [x.transpose(1, 2).contiguous() for x in several]


def by_head(several: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in several]


def backward(
    shard: Shard,
    peers: Peers | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    rounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values go round again. What other ranks add to their gradients follows a step behind, and from
    the last of them goes where they began, where this rank's own waits for it. dk and dv stay in float32
    unless they are `rounded`."""
    sums = Sums(shard, q, k, v, rounded=rounded)
    count = backward_chunks(k.shape[1], q.shape[:3].numel())
    for mine, theirs, steps in _rounds(shard, peers, k, v, chunks(q, k, count), backward=True):
        dq, own = zeros(q[:, mine]), [zeros(x[:, theirs]) for x in (k, v)]
        coming: Pending[list[Tensor]] | None = None
        for source, pieces, key, value in steps:
            dk, dv = found = own if source == shard.rank else [zeros(x) for x in (key, value)]
            shard.add_gradients(
                grad[:, mine], q[:, mine], key, value, pieces, lse[:, mine], delta[:, mine], dq, dk, dv
            )  # fmt: skip
            if source == shard.rank:
                continue
            if coming is not None:
                for x, others in zip(found, by_head(coming.wait()), strict=True):
                    x += others
            assert peers is not None
            home = (source - shard.rank) % peers.size
            by = home if home == peers.size - shard.reach else 1  # from the last rank that sees them
            coming = peers.shift(by_token(*found), f"{GRADIENTS} for rank {source}", by)
        sums.of_queries(mine, dq)
        sums.of_keys(theirs, own, coming)
    return sums.finish()


def zeros(x: Tensor) -> Tensor:
    """Of its sizes in float32 or wider, in memory by tokens."""
    batch, heads, rows, width = x.shape
    return x.new_zeros((batch, rows, heads, width), dtype=wide(x)).transpose(1, 2)


class Sums:
    """Gradients that are added up in float32, some heads at a time, and their results in the tensors'
    dtypes. What comes from other ranks is waited for when the next heads have been computed."""

    def __init__(self, shard: Shard, q: Tensor, k: Tensor, v: Tensor, *, rounded: bool = True) -> None:
        self.scale = shard.spec.scale
        self.dq = by_row(q, q.shape[3])
        self.of_pair = [by_row(x, x.shape[3]) if rounded else zeros(x) for x in (k, v)]
        self.waiting: tuple[slice, list[Tensor] | None, Pending[list[Tensor]] | None] | None = None

    def of_queries(self, heads: slice, total: Tensor) -> None:
        torch.mul(total, self.scale, out=self.dq[:, heads])

    def of_keys(self, heads: slice, own: list[Tensor] | None, coming: Pending[list[Tensor]] | None) -> None:
        """Of heads of keys: this rank's own, and what the others have found."""
        self._settle()
        self.waiting = (heads, own, coming)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        self._settle()
        return self.dq, self.of_pair[0], self.of_pair[1]

    def _settle(self) -> None:
        if self.waiting is None:
            return
        heads, own, coming = self.waiting
        self.waiting = None
        found = [by_head(coming.wait())] if coming is not None else []
        found += [own] if own is not None else []
        for out, *several in zip(self.of_pair, *found, strict=True):
            if len(several) == 1:
                out[:, heads].copy_(several[0])
            else:
                torch.add(*several, out=out[:, heads])
