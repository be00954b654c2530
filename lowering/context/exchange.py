"""What ranks send each other. `torch.distributed` is the transport; nothing here knows what tensors mean.

An exchange that fails, since a rank is gone or does not answer within the process group's timeout, is an
error that names the site, this rank and what it waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kp_compiler.errors import KPExchangeError


def group_named(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


@dataclass(frozen=True)
class Pending:
    """Tensors that are under way."""

    peers: Peers
    what: str
    works: Sequence[dist.Work]
    received: list[Tensor]
    sent: Sequence[Tensor]  # kept until they are there

    def wait(self) -> list[Tensor]:
        with self.peers.waiting(self.what):
            for work in self.works:
                work.wait()
        return self.received


@dataclass(frozen=True)
class Peers:
    """The ranks of a group, in its order. `site`: for whom they exchange, as errors say it."""

    group: dist.ProcessGroup
    site: str = ""

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Raises KPExchangeError for what the transport raises."""
        try:
            yield
        except RuntimeError as error:
            where = self.site or "a shared sequence"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise KPExchangeError(
                f"{where}: rank {self.rank} of {self.size} waited for {what}, which failed: {reason}"
            ) from error

    def shift(self, tensors: Sequence[Tensor], what: str) -> Pending:
        """Tensors to the next rank, as many of the same sizes from the one before."""
        sent = [x.contiguous() for x in tensors]
        before = (self.rank - 1) % self.size
        return self._swap(
            f"{what} from rank {before}", [((self.rank + 1) % self.size, sent)], [(before, sent)]
        )

    def swap(self, sent: Sequence[Tensor], like: Sequence[Tensor], what: str) -> list[Tensor]:
        """sent[r] to rank r; from it a tensor of the size of like[r]."""
        mine, others = self.rank, [rank for rank in range(self.size) if rank != self.rank]
        pending = self._swap(
            f"{what} from all ranks",
            [(rank, [sent[rank].contiguous()]) for rank in others],
            [(rank, [like[rank]]) for rank in others],
        )
        found = pending.wait()
        found.insert(mine, sent[mine])
        return found

    def gather(self, x: Tensor, what: str) -> list[Tensor]:
        """Every rank's."""
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self.waiting(f"{what} from all ranks"):
            dist.all_gather(found, x.contiguous(), group=self.group)
        return found

    def total(self, x: Tensor, to: int, what: str) -> Pending:
        """The sum of every rank's x, in place at rank `to`."""
        what = f"{what} to rank {to}"
        with self.waiting(what):
            work = dist.reduce(x, self._global(to), group=self.group, async_op=True)
        assert work is not None
        return Pending(self, what, [work], [x], [x])

    def _swap(
        self,
        what: str,
        sends: Sequence[tuple[int, list[Tensor]]],
        receives: Sequence[tuple[int, Sequence[Tensor]]],
    ) -> Pending:
        operations = [
            dist.P2POp(dist.isend, x, self._global(to), self.group) for to, several in sends for x in several
        ]
        received = []
        for source, several in receives:
            for like in several:
                buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
                received.append(buffer)
                operations.append(dist.P2POp(dist.irecv, buffer, self._global(source), self.group))
        with self.waiting(what):
            works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(self, what, works, received, [x for _, several in sends for x in several])

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)
