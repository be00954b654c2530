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
Messages = Sequence[tuple[int, Tensor]]  # to ranks, or from them


@dataclass(frozen=True)
class Pending(Generic[Received]):
    """Tensors that are under way."""

    peers: Peers
    what: str
    works: Sequence[dist.Work]
    received: Received
    sent: Sequence[Tensor]  # kept until they are there

    def wait(self) -> Received:
        if not self.works:
            return self.received
        on_gpu = self.sent[0].is_cuda
        with self.peers.waiting(self.what):
            for work in self.works:
                work.wait() if on_gpu else work.wait(self.peers.patience)
            if on_gpu:
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
        on, back = ((self.rank + way) % self.size for way in (by, -by))
        return self._swap(f"{what} from rank {back}", [(on, sent)], [(back, sent)])

    def swap(self, sent: Sequence[list[Tensor]], what: str) -> Pending[list[list[Tensor]]]:
        """The contiguous tensors sent[r] to rank r; by rank, as many from it, of the sizes of sent[own]."""
        own, others = self.rank, [rank for rank in range(self.size) if rank != self.rank]
        pending = self._swap(
            f"{what} from all ranks",
            [(rank, sent[rank]) for rank in others],
            [(rank, sent[own]) for rank in others],
        )
        count = len(sent[own])
        found = [pending.received[i : i + count] for i in range(0, len(pending.received), count)]
        found.insert(own, sent[own])
        return Pending(self, pending.what, pending.works, found, pending.sent)

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

    def _swap(
        self,
        what: str,
        sends: Sequence[tuple[int, list[Tensor]]],
        receives: Sequence[tuple[int, Sequence[Tensor]]],
    ) -> Pending[list[Tensor]]:
        """Tensors to ranks, and from ranks as many of the sizes of those given."""
        sent = [(to, x) for to, several in sends for x in several]
        buffers = [(source, _like(x)) for source, several in receives for x in several]
        with self.waiting(what):
            if not sent:  # who sends something gets something
                works: Sequence[dist.Work] = []
            elif sent[0][1].is_cuda:
                works = [self._together(sent, buffers)]
            else:
                works = self._one_by_one(sent, buffers)
        return Pending(self, what, works, [x for _, x in buffers], [x for _, x in sent])

    def _together(self, sent: Messages, buffers: Messages) -> dist.Work:
        """As `batch_isend_irecv`, without a look at each message. One call for all tensors: its kernel starts
        before the attention that it goes beside, where a second one's would wait until that one ends (an
        all-to-all for each of k and v: 32k tokens of 16 heads 4.26 ms for 3.99, two H200, 2026-11-28)."""
        device = sent[0][1].device
        self.group._start_coalescing(device)
        for to, x in sent:
            self.group.send([x], to, 0)
        for source, x in buffers:
            self.group.recv([x], source, 0)
        work: dist.Work = self.group._end_coalescing(device)
        return work

    def _one_by_one(self, sent: Messages, buffers: Messages) -> list[dist.Work]:
        operations = [dist.P2POp(dist.isend, x, group=self.group, group_peer=to) for to, x in sent]
        operations += [
            dist.P2POp(dist.irecv, x, group=self.group, group_peer=source) for source, x in buffers
        ]
        works: list[dist.Work] = dist.batch_isend_irecv(operations)
        return works


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
