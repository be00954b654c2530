"""The ways in which ranks that share a sequence see each other's keys. All compute the same.

    ring         keys and values go round, one rank's at a time: memory of two ranks' parts
    allgather    all of them are gathered first: one exchange, memory of the whole sequence's keys
    ulysses      heads are shared instead of tokens: q, k, v and out are exchanged, each rank attends over the
                 whole sequence with some heads

In the backward pass gradients of keys and values go the same ways back, in float32.

Methods: Liu et al., Ring Attention (arXiv:2310.01889); Brandon et al., Striped Attention (arXiv:2311.09431),
of which zigzag is the form for parts; Jacobs et al., DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kp_compiler.lowering.context.exchange import Peers, Pending
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.partial import Start
from kp_compiler.lowering.context.shard import Shard, Sum

Forward = Callable[[Shard, Peers, Tensor, Tensor, Tensor], Start]
Backward = Callable[
    [Shard, Peers, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]


def ring(shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor) -> Start:
    """q [B,H,n,D], k [B,K,n,D], v [B,K,n,E] of this rank to out [B,H,n,E] and lse [B,H,n] in float32."""
    results = shard.results(q, v.shape[3])
    for step in range(peers.size):
        pending = peers.shift([k, v], _keys(step)) if step + 1 < peers.size else None
        shard.attend(q, k, v, (peers.rank - step) % peers.size, results)
        k, v = pending.wait() if pending is not None else (k, v)
    return results.finish()


def ring_backward(
    shard: Shard, peers: Peers, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values go round again; their gradients follow a step behind and end where they began."""
    dq = Sum(q, lse.dtype)
    coming = None
    for step in range(peers.size):
        pending = peers.shift([k, v], _keys(step)) if step + 1 < peers.size else None
        dk, dv = shard.gradients(grad, q, k, v, (peers.rank - step) % peers.size, lse, delta, dq)
        if coming is not None:
            dk, dv = (mine + theirs for mine, theirs in zip((dk, dv), coming.wait(), strict=True))
        coming = peers.shift([dk, dv], f"gradients of keys and values of step {step}")
        k, v = pending.wait() if pending is not None else (k, v)
    assert coming is not None
    dk, dv = coming.wait()
    return dq.finish(), dk, dv


def allgather(shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor) -> Start:
    results = shard.results(q, v.shape[3])
    keys, values = peers.gather(k, "keys"), peers.gather(v, "values")
    for source, (key, value) in enumerate(zip(keys, values, strict=True)):
        shard.attend(q, key, value, source, results)
    return results.finish()


def allgather_backward(
    shard: Shard, peers: Peers, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each rank's keys at a time, so that two ranks' gradients are in memory, not all."""
    dq = Sum(q, lse.dtype)
    keys, values = peers.gather(k, "keys"), peers.gather(v, "values")
    works: list[list[Pending]] = []
    own: tuple[Tensor, Tensor] | None = None
    for source in range(peers.size):
        found = shard.gradients(grad, q, keys[source], values[source], source, lse, delta, dq)
        if len(works) == 2:
            _finish(works.pop(0))
        works.append([peers.total(x, source, "gradients of keys and values") for x in found])
        own = found if source == peers.rank else own
    for pending in works:
        _finish(pending)
    assert own is not None
    return dq.finish(), *own


def _finish(works: list[Pending]) -> None:
    for work in works:
        work.wait()


def _keys(step: int) -> str:
    return f"keys and values of step {step + 1}"


def ulysses(shard: Shard, peers: Peers, q: Tensor, k: Tensor, v: Tensor) -> Start:
    heads = _Heads(shard, peers, q.shape[1], k.shape[1])
    whole = heads.shard(shard)
    queries, keys, values = heads.gathered_queries(q), heads.gathered_keys(k), heads.gathered_keys(v)
    results = whole.results(queries, v.shape[3])
    whole.attend(queries, keys, values, 0, results)
    out, lse = results.finish()
    return heads.returned(out), heads.returned(lse.unsqueeze(-1)).squeeze(-1)


def ulysses_backward(
    shard: Shard, peers: Peers, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Heads(shard, peers, q.shape[1], k.shape[1])
    whole = heads.shard(shard)
    queries, given = heads.gathered_queries(q), heads.gathered_queries(grad)
    keys, values = heads.gathered_keys(k), heads.gathered_keys(v)
    lse, delta = (heads.gathered_queries(x.unsqueeze(-1)).squeeze(-1) for x in (lse, delta))
    dq = Sum(queries, lse.dtype)
    dk, dv = whole.gradients(given, queries, keys, values, 0, lse, delta, dq)
    return heads.returned(dq.finish()), heads.returned_keys(dk, k), heads.returned_keys(dv, v)


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
