"""What ranks send each other. `torch.distributed` is the transport; nothing here knows what tensors mean.

An exchange that fails, since a rank is gone or does not answer within the process group's timeout, is an
error that names the site, this rank and what it waited for; one of GPUs, that nobody waits for, is told by
`watch`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kp_compiler.errors import KPExchangeError
from kp_compiler.lowering.context.watch import WATCH


def group_named(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


# Their names before torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Received = TypeVar("Received")
NEAR = 8  # ranks


@dataclass(frozen=True)
class Pending(Generic[Received]):
    """Tensors that are under way."""

    peers: Peers
    what: str
    works: Sequence[dist.Work]
    received: Received
    sent: Sequence[Tensor]  # kept until they are there

    def wait(self) -> Received:
        with self.peers.waiting(self.what):
            if not self.works or not self.sent[0].is_cuda:
                for work in self.works:
                    work.wait(self.peers.patience)
                return self.received
            for work in self.works:
                work.wait()
            WATCH.add(self.peers.waits(self.what), self.peers.group)
        return self.received


@dataclass(frozen=True)
class Peers:
    """The ranks of a group, in its order. `site`: for whom they exchange, as errors say it."""

    group: dist.ProcessGroup
    site: str = ""

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def patience(self) -> timedelta:
        """The timeout that the group has now on CPUs, where gloo else takes the one that it was made with."""
        found: timedelta = self.group._get_backend(torch.device("cpu")).options._timeout
        return found

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Raises KPExchangeError for what the transport raises."""
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise KPExchangeError(f"{self.waits(what)}, which failed: {reason}") from error

    def waits(self, what: str) -> str:
        return f"{self.site or 'a shared sequence'}: rank {self.rank} of {self.size} waited for {what}"

    def shift(self, sent: list[Tensor], what: str, by: int = 1) -> Pending[list[Tensor]]:
        """Contiguous tensors `by` ranks on, as many of the same sizes from as far back."""
        size = self.size
        on, back = ((self.rank + way) % size for way in (by, -by))
        to, like = ([sent if rank == peer else [] for rank in range(size)] for peer in (on, back))
        coming = self._exchange(f"{what} from rank {back}", to, like)
        return Pending(self, coming.what, coming.works, coming.received[back], sent)

    def swap(self, sent: Sequence[list[Tensor]], what: str) -> Pending[list[list[Tensor]]]:
        """The contiguous tensors sent[r] to rank r; by rank, as many from it, of the sizes of sent[own]."""
        own = self.rank
        to, like = ([[] if rank == own else x[rank] for rank in range(self.size)]
                    for x in (sent, [sent[own]] * self.size))  # fmt: skip
        coming = self._exchange(f"{what} from all ranks", to, like)
        coming.received[own] = sent[own]
        return coming

    def gather(self, sent: list[Tensor], what: str) -> Pending[list[list[Tensor]]]:
        """Of contiguous tensors, every rank's. As many ranks as one machine has send them to each other: two
        tensors of 8 MiB come in 97 µs, by NCCL's own gathering in 130 to 460 beside a kernel (two H200,
        2026-11-27)."""
        if self.size <= NEAR:
            swapped = self.swap([sent] * self.size, what)
            by_tensor = [list(x) for x in zip(*swapped.received, strict=True)]
            return Pending(self, swapped.what, swapped.works, by_tensor, sent)
        found = [x.new_empty((self.size * len(x), *x.shape[1:])) for x in sent]
        what, works = f"{what} from all ranks", []
        with self.waiting(what):
            for all_of_them, x in zip(found, sent, strict=True):
                works.append(_all_gather(all_of_them, x, group=self.group, async_op=True))
        return Pending(self, what, works, [list(x.chunk(self.size)) for x in found], sent)

    def reduce(self, sent: list[list[list[Tensor]]], what: str) -> Pending[list[Tensor]]:
        """Sums over ranks of what each has for this one. `sent`: tensors, of them what is for each rank, as
        parts that lie along dimension 1."""
        what, works, found, kept = f"{what} from all ranks", [], [], []
        for of_ranks in sent:
            given = torch.cat([torch.cat(parts, 1) for parts in of_ranks])
            total = torch.empty_like(given[: len(given) // self.size])
            with self.waiting(what):
                works.append(_reduce_scatter(total, given, group=self.group, async_op=True))
            found.append(total)
            kept.append(given)
        return Pending(self, what, works, found, kept)

    def _exchange(
        self, what: str, sent: Sequence[list[Tensor]], like: Sequence[list[Tensor]]
    ) -> Pending[list[list[Tensor]]]:
        """sent[r] to rank r, and from it tensors of the sizes of like[r]."""
        received = [
            [torch.empty_like(x, memory_format=torch.contiguous_format) for x in each] for each in like
        ]
        flat = [x for each in sent for x in each]
        with self.waiting(what):
            works = (self._all_to_all if flat and flat[0].is_cuda else self._one_by_one)(sent, received)
        return Pending(self, what, works, received, flat)

    def _all_to_all(self, sent: Sequence[list[Tensor]], received: Sequence[list[Tensor]]) -> list[dist.Work]:
        """The first tensors of all ranks, then the second ones, …: a kernel each, and less for the host to do
        than for single messages."""
        nothing = [next(each for each in sent if each)[0].new_empty(0)]
        rounds = range(max(len(each) for each in sent))
        return [
            dist.all_to_all(
                *([(each or nothing * len(rounds))[i] for each in of] for of in (received, sent)),
                group=self.group,
                async_op=True,
            )
            for i in rounds
        ]

    def _one_by_one(self, sent: Sequence[list[Tensor]], received: Sequence[list[Tensor]]) -> list[dist.Work]:
        """What gloo can do."""
        operations = [
            dist.P2POp(way, x, dist.get_global_rank(self.group, rank), self.group)
            for way, of in ((dist.isend, sent), (dist.irecv, received))
            for rank, each in enumerate(of)
            for x in each
        ]
        works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
        return works
