"""Ranks in one process: as threads, which do what `context.exchange.Peers` does without a process group, or
one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.shard import Shard, Sum
from kp_compiler.specs import AttentionSpec


class World:
    """What `size` ranks have sent each other; every exchange is one of all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.sent: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Everyone's value."""
        self.sent[rank] = value
        self.barrier.wait()
        found = list(self.sent)
        self.barrier.wait()
        return found


@dataclass
class Arrived:
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.received


@dataclass
class VirtualPeers:
    world: World
    rank: int
    moved: list[int] = field(default_factory=list)  # elements that this rank sent

    @property
    def size(self) -> int:
        return self.world.size

    def shift(self, tensors: Sequence[Tensor], what: str) -> Arrived:
        self.moved += [x.numel() for x in tensors]
        found = self.world.exchange(self.rank, [x.clone() for x in tensors])
        return Arrived(found[(self.rank - 1) % self.size])

    def swap(self, sent: Sequence[Tensor], like: Sequence[Tensor], what: str) -> list[Tensor]:
        self.moved += [x.numel() for rank, x in enumerate(sent) if rank != self.rank]
        found = [each[self.rank] for each in self.world.exchange(self.rank, [x.clone() for x in sent])]
        assert all(x.shape == y.shape for x, y in zip(found, like, strict=True))
        return found

    def gather(self, x: Tensor, what: str) -> list[Tensor]:
        self.moved.append(x.numel())
        return self.world.exchange(self.rank, x.clone())

    def total(self, x: Tensor, to: int, what: str) -> Arrived:
        self.moved.append(x.numel())
        found = self.world.exchange(self.rank, x)
        if self.rank == to:
            total = sum(each.clone() for each in found)
        self.world.barrier.wait()
        if self.rank == to:
            x.copy_(total)
        return Arrived([x])


def run(size: int, function: Callable[[VirtualPeers], Any]) -> list[Any]:
    """What the function gives on each rank."""
    world = World(size)

    def one(rank: int) -> Any:
        try:
            return function(VirtualPeers(world, rank))
        except BaseException:
            world.barrier.abort()  # no rank waits for one that failed
            raise

    with ThreadPoolExecutor(size) as pool:
        results = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for each in results if (error := each.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [each.result() for each in results]


def one_after_the_other(
    layout: Layout, spec: AttentionSpec, operands: list[Tensor], scalars: list[int], whole: list[Tensor]
) -> list[Tensor]:
    """out, dq, dk, dv of the whole sequence in float32 or wider, from each rank's part of q, k, v and grad,
    which `whole` holds: what any schedule computes that exchanges keys."""
    parts = [
        [x.index_select(2, layout.positions(rank, x.device)) for x in whole] for rank in range(layout.size)
    ]
    outs, dqs = [], []
    dks, dvs = ([torch.zeros_like(part[i], dtype=torch.float32) for part in parts] for i in (1, 2))
    for rank, (q, _, value, grad) in enumerate(parts):
        shard = Shard(spec, layout, rank, operands, scalars)
        results = shard.results(q, value.shape[3])
        for source, (_, k, v, _) in enumerate(parts):
            shard.attend(q, k, v, source, results)
        out, lse = results.finish()
        outs.append(out)
        dq = Sum(q, out.dtype)
        delta = (grad * out).sum(-1)
        for source, (_, k, v, _) in enumerate(parts):
            found = shard.gradients(grad, q, k, v, source, lse, delta, dq)
            dks[source], dvs[source] = dks[source] + found[0], dvs[source] + found[1]
        dqs.append(dq.finish())
    back = layout.inverse(whole[0].device)
    return [torch.cat(each, 2).index_select(2, back) for each in (outs, dqs, dks, dvs)]
