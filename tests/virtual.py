"""Ranks in one process: as threads, which do what `context.exchange.Peers` does without a process group, or
one after the other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.attend import by_row
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.schedules import Groups
from kp_compiler.lowering.context.shard import Shard, engine, wide
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
    received: Any

    def wait(self) -> Any:
        return self.received


@dataclass
class VirtualPeers:
    world: World
    rank: int
    moved: list[int] = field(default_factory=list)  # elements that this rank sent

    @property
    def size(self) -> int:
        return self.world.size

    def shift(self, tensors: Sequence[Tensor], what: str, by: int = 1) -> Arrived:
        self.moved += [x.numel() for x in tensors]
        found = self.world.exchange(self.rank, [x.clone() for x in tensors])
        return Arrived(found[(self.rank - by) % self.size])

    def swap(self, sent: Sequence[list[Tensor]], what: str) -> Arrived:
        self.moved += [x.numel() for rank, each in enumerate(sent) if rank != self.rank for x in each]
        found = self.world.exchange(self.rank, [[x.clone() for x in each] for each in sent])
        return Arrived([each[self.rank] for each in found])

    def gather(self, sent: list[Tensor], what: str) -> Arrived:
        self.moved += [x.numel() for x in sent]
        found = self.world.exchange(self.rank, [x.clone() for x in sent])
        return Arrived([list(each) for each in zip(*found, strict=True)])

    def reduce(self, sent: list[list[list[Tensor]]], what: str) -> Arrived:
        given = [[torch.cat(parts, 1) for parts in of_ranks] for of_ranks in sent]
        self.moved += [sum(x.numel() for x in of_ranks) for of_ranks in given]
        found = self.world.exchange(self.rank, given)
        return Arrived([sum(each[i][self.rank] for each in found) for i in range(len(given))])


def run(size: int, function: Callable[[Groups], Any], row: int = 1) -> list[Any]:
    """What the function gives on each rank; of a grid with rows of some ranks."""
    world = World(size)
    rows, columns = [World(row) for _ in range(size // row)], [World(size // row) for _ in range(row)]

    def one(rank: int) -> Any:
        far, near = divmod(rank, row)
        groups: Any = Groups(
            VirtualPeers(world, rank),  # type: ignore[arg-type]
            VirtualPeers(rows[far], near),  # type: ignore[arg-type]
            VirtualPeers(columns[near], far),  # type: ignore[arg-type]
        )
        try:
            return function(groups)
        except BaseException:
            for each in (world, *rows, *columns):
                each.barrier.abort()  # no rank waits for one that failed
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
    """out, and in float32 or wider dq, dk, dv of the whole sequence, from each rank's part of q, k, v and
    grad, which `whole` holds: what the ring computes."""
    parts = [
        [x.index_select(2, layout.positions(rank, x.device)) for x in whole] for rank in range(layout.size)
    ]
    outs, dqs = [], []
    dks, dvs = ([torch.zeros_like(part[i], dtype=wide(part[i])) for part in parts] for i in (1, 2))
    for rank, (q, _, value, grad) in enumerate(parts):
        shard = Shard(spec, layout, rank, operands, scalars)
        outs.append(by_row(q, value.shape[3]).fill_(float("nan")))
        results = shard.results(outs[-1], itertools.chain(*shard.pieces))
        for (_, k, v, _), pieces in zip(parts, shard.pieces, strict=True):
            shard.attend(q, k, v, pieces, results)
        lse = results.finish()
        dq = torch.zeros_like(q, dtype=wide(q))
        delta = engine(q).delta_of(grad, outs[-1])
        for (_, k, v, _), pieces, dk, dv in zip(parts, shard.pieces, dks, dvs, strict=True):
            shard.add_gradients(grad, q, k, v, pieces, lse, delta, dq, dk, dv)
        dqs.append(dq * spec.scale)
    return [layout.joined(each, 2) for each in (outs, dqs, dks, dvs)]
