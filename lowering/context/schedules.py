"""The ways in which ranks that share a sequence see each other's keys. All compute the same.

    ring         keys and values go round as far as the mask sees: memory of two ranks' parts
    allgather    all of them are gathered and put in order: each query sees its keys at once
    ulysses      heads are shared instead of tokens: q, k, v and out are exchanged, each rank attends over the
                 whole sequence with some heads

Some heads after the other (`chunks`): what travels for one chunk does so while another one is computed, and
only one chunk's numbers are in float32. In the backward pass gradients of keys and values go the same ways
back, in float32.

Methods: Liu et al., Ring Attention (arXiv:2310.01889); Brandon et al., Striped Attention (arXiv:2311.09431),
of which zigzag is the form for parts; Jacobs et al., DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kp_compiler.lowering.attend import by_row
from kp_compiler.lowering.context.exchange import Peers, Pending
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.shard import Shard, wide

Forward = Callable[[Shard, Peers, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Backward = Callable[
    [Shard, Peers, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]
CHUNKS = 4  # at most
ROWS = 2**17  # queries of all heads of a chunk, at least: a thousand tiles for a kernel
_KEYS, _GRADIENTS = "keys and values", "gradients of keys and values"


def chunks(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Heads of q, and of k, that go together."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    count = max(1, min(CHUNKS, kv_heads, q.shape[:3].numel() // ROWS))
    ends = [kv_heads * i // count for i in range(count + 1)]
    return [(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(ends)]


def ring(shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B,H,n,D], k [B,K,n,D], v [B,K,n,E] of this rank to out [B,H,n,E] and lse [B,H,n] in float32."""
    out, lses = by_row(q, v.shape[3]), []
    for mine, _, steps in _rounds(shard, peers, q, k, v):
        results = shard.results(out[:, mine], itertools.chain(*shard.pieces), mine)
        for source, key, value in steps:
            shard.attend(q[:, mine], key, value, shard.pieces[source], results)
        lses.append(results.finish())
    return out, torch.cat(lses, 1)


Step = tuple[int, Tensor, Tensor]  # a rank, its keys and values


def _rounds(
    shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[slice, slice, Iterator[Step]]]:
    """Of each chunk, heads of q and of k, and the keys and values of the ranks that some rank sees. The next
    are on their way while these are used, those of the next chunk, too: this rank's own come first in the
    first chunk, which has nothing else yet, and last in others, beside what is on its way back."""
    every = chunks(q, k)
    coming: Pending[list[Tensor]] | None = None

    def begin(chunk: int) -> Pending[list[Tensor]] | None:
        if shard.reach == 0 or chunk == len(every):
            return None
        heads = every[chunk][1]
        return peers.shift(_by_token(k[:, heads], v[:, heads]), f"{_KEYS} of step 1")

    def steps(chunk: int) -> Iterator[Step]:
        nonlocal coming
        own = (peers.rank, *(x[:, every[chunk][1]] for x in (k, v)))
        if chunk == 0:
            coming = begin(0)
            yield own
        for step in range(1, shard.reach + 1):
            assert coming is not None
            pair, last = coming.wait(), step == shard.reach
            coming = None  # what was sent is not needed any more
            coming = begin(chunk + 1) if last else peers.shift(pair, f"{_KEYS} of step {step + 1}")
            yield (peers.rank - step) % peers.size, *_by_head(pair)
        if chunk > 0:
            yield own

    for chunk, (mine, theirs) in enumerate(every):
        yield mine, theirs, steps(chunk)


def _by_token(*several: Tensor) -> list[Tensor]:
    """[B,heads,n,D] as [B,n,heads,D], contiguous: the form in which they travel."""
    return [x.transpose(1, 2).contiguous() for x in several]


def _by_head(several: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in several]


def ring_backward(
    shard: Shard, peers: Peers, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values go round again. What other ranks add to their gradients follows a step behind, and from
    the last of them goes where they began, where this rank's own waits for it."""
    sums = _Sums(shard, q, k, v)
    for mine, theirs, steps in _rounds(shard, peers, q, k, v):
        of_queries = [x[:, mine] for x in (grad, q)]
        rows = [x[:, mine] for x in (lse, delta)]
        dq, own = sums.of(q[:, mine]), [sums.of(x[:, theirs]) for x in (k, v)]
        coming: Pending[list[Tensor]] | None = None
        for source, *pair in steps:
            found = own if source == peers.rank else [sums.of(x) for x in pair]
            shard.add_gradients(*of_queries, *pair, shard.pieces[source], *rows, dq, *found)
            if source == peers.rank:
                continue
            if coming is not None:
                for x, others in zip(found, _by_head(coming.wait()), strict=True):
                    x += others
            home = (source - peers.rank) % peers.size
            by = home if home == peers.size - shard.reach else 1  # from the last rank that sees them
            coming = peers.shift(_by_token(*found), f"{_GRADIENTS} for rank {source}", by)
        sums.of_queries(mine, dq)
        sums.of_keys(theirs, own, coming)
    return sums.finish()


def allgather(shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lses = by_row(q, v.shape[3]), []
    for mine, _, keys, values in _gathered(shard, peers, q, k, v):
        results = shard.results(out[:, mine], shard.pieces_of_all, mine)
        shard.attend(q[:, mine], keys, values, shard.pieces_of_all, results)
        lses.append(results.finish())
    return out, torch.cat(lses, 1)


def _gathered(
    shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The sequence's keys and values, some heads at a time; the next ones come while these are used."""
    every = chunks(q, k)

    def gather(heads: slice) -> Pending[list[list[Tensor]]]:
        return peers.gather(_by_token(k[:, heads], v[:, heads]), _KEYS)

    pending = gather(every[0][1])
    for i, (mine, theirs) in enumerate(every):
        keys, values = _by_head([shard.layout.joined(parts, 1) for parts in pending.wait()])
        if i + 1 < len(every):
            pending = gather(every[i + 1][1])
        yield mine, theirs, keys, values


def allgather_backward(
    shard: Shard, peers: Peers, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums = _Sums(shard, q, k, v)
    for mine, theirs, keys, values in _gathered(shard, peers, q, k, v):
        dq, found = sums.of(q[:, mine]), [sums.of(x) for x in (keys, values)]
        of_queries, rows = ([x[:, mine] for x in some] for some in ((grad, q), (lse, delta)))
        shard.add_gradients(*of_queries, keys, values, shard.pieces_of_all, *rows, dq, *found)
        sums.of_queries(mine, dq)
        parts = [shard.layout.divided(x.transpose(1, 2), 1) for x in found]
        sums.of_keys(theirs, None, peers.reduce(parts, _GRADIENTS))
    return sums.finish()


class _Sums:
    """Gradients that are added up in float32, some heads at a time, and their results in the tensors'
    dtypes. What comes from other ranks is waited for when the next heads have been computed."""

    def __init__(self, shard: Shard, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.scale = shard.spec.scale
        self.dq, *self.of_pair = (by_row(x, x.shape[3]) for x in (q, k, v))
        self.waiting: tuple[slice, list[Tensor] | None, Pending[list[Tensor]] | None] | None = None

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """Zeros of its sizes, that lie in memory by tokens."""
        batch, heads, rows, width = x.shape
        return x.new_zeros((batch, rows, heads, width), dtype=wide(x)).transpose(1, 2)

    def of_queries(self, heads: slice, total: Tensor) -> None:
        torch.mul(total, self.scale, out=self.dq[:, heads])

    def of_keys(self, heads: slice, own: list[Tensor] | None, coming: Pending[list[Tensor]] | None) -> None:
        """Of heads of keys: this rank's own, and what the others have found."""
        self._settle()
        self.waiting = (heads, own, coming)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        self._settle()
        return self.dq, *self.of_pair

    def _settle(self) -> None:
        if self.waiting is None:
            return
        heads, own, coming = self.waiting
        self.waiting = None
        found = [_by_head(coming.wait())] if coming is not None else []
        found += [own] if own is not None else []
        for out, *several in zip(self.of_pair, *found, strict=True):
            if len(several) == 1:
                out[:, heads].copy_(several[0])
            else:
                torch.add(*several, out=out[:, heads])


def ulysses(shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = _Heads(shard, peers, q.shape[1], k.shape[1])
    whole = heads.shard(shard)
    queries, keys, values = heads.gathered_queries(q), heads.gathered_keys(k), heads.gathered_keys(v)
    out = by_row(queries, v.shape[3])
    results = whole.results(out, whole.pieces[0])
    whole.attend(queries, keys, values, whole.pieces[0], results)
    lse = heads.returned(results.finish().unsqueeze(-1)).squeeze(-1)
    found = by_row(q, v.shape[3])
    found.copy_(heads.returned(out))
    return found, lse


def ulysses_backward(
    shard: Shard, peers: Peers, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Heads(shard, peers, q.shape[1], k.shape[1])
    whole = heads.shard(shard)
    queries, given = heads.gathered_queries(q), heads.gathered_queries(grad)
    keys, values = heads.gathered_keys(k), heads.gathered_keys(v)
    lse, delta = (heads.gathered_queries(x.unsqueeze(-1)).squeeze(-1) for x in (lse, delta))
    dq, dk, dv = (_Sums.of(x) for x in (queries, keys, values))
    whole.add_gradients(given, queries, keys, values, whole.pieces[0], lse, delta, dq, dk, dv)
    found = [by_row(x, x.shape[3]) for x in (q, k, v)]
    sums = (
        heads.returned(dq.mul_(shard.spec.scale).to(q.dtype)),
        heads.returned_keys(dk, k),
        heads.returned_keys(dv, v),
    )
    for out, total in zip(found, sums, strict=True):
        out.copy_(total)
    return found[0], found[1], found[2]


class _Heads:
    """Which heads each rank attends with: as many query heads, and the key heads that they read. Ranks share
    key heads where there are fewer than ranks; where a rank's query heads don't divide evenly among its key
    heads, it has one for each query head."""

    def __init__(self, shard: Shard, peers: Peers, heads: int, key_heads: int) -> None:
        self.peers, self.layout = peers, shard.layout
        each, group = heads // peers.size, heads // key_heads
        self.queries = [list(range(r * each, (r + 1) * each)) for r in range(peers.size)]
        read = [[head // group for head in own] for own in self.queries]
        even = group % each == 0 or each % group == 0
        self.keys = [list(dict.fromkeys(own)) for own in read] if even else read

    def shard(self, shard: Shard) -> Shard:
        """The whole sequence on one rank, with some of the heads."""
        whole = Layout("contiguous", 1, self.layout.tokens)
        operands = list(shard.operands)
        if shard.spec.sink is not None:
            sink = operands[shard.spec.sink].reshape(-1)
            mine = self.queries[self.peers.rank]
            operands[shard.spec.sink] = sink[mine[0] : mine[-1] + 1] if sink.numel() > 1 else sink
        return replace(shard, layout=whole, rank=0, operands=operands)

    def gathered_queries(self, x: Tensor) -> Tensor:
        """[B,H,n,…] of this rank's tokens to [B,H/P,N,…] of the sequence."""
        return self._gathered(x, self.queries)

    def gathered_keys(self, x: Tensor) -> Tensor:
        return self._gathered(x, self.keys)

    def _gathered(self, x: Tensor, heads: list[list[int]]) -> Tensor:
        sent = [x.index_select(1, torch.tensor(each, device=x.device)) for each in heads]
        found = self.peers.swap(sent, [sent[self.peers.rank]] * self.peers.size, "heads")
        return self.layout.joined(found, 2)

    def returned(self, x: Tensor) -> Tensor:
        """The way back of `gathered_queries`."""
        found = self._parts(x, [x.shape[1]] * self.peers.size)
        return torch.cat(found, 1)

    def returned_keys(self, x: Tensor, like: Tensor) -> Tensor:
        """The way back of `gathered_keys`: sums over the ranks that had a head."""
        found = self._parts(x, [len(each) for each in self.keys])
        total = torch.zeros_like(like, dtype=x.dtype)
        for heads, part in zip(self.keys, found, strict=True):
            total.index_add_(1, torch.tensor(heads, device=x.device), part)
        return total

    def _parts(self, x: Tensor, heads: list[int]) -> list[Tensor]:
        """[B,heads here,N,…] to each rank's tokens, by the rank whose heads they are."""
        ranks = x.index_select(2, self.layout.order(x.device)).chunk(self.peers.size, 2)
        like = ranks[self.peers.rank]
        empty = [like.new_empty((len(like), n, *like.shape[2:])) for n in heads]
        return self.peers.swap(ranks, empty, "tokens")


SCHEDULES: dict[str, tuple[Forward, Backward]] = {
    "ring": (ring, ring_backward),
    "allgather": (allgather, allgather_backward),
    "ulysses": (ulysses, ulysses_backward),
}
