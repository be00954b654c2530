"""What ranks send each other. `torch.distributed` is the transport; nothing here knows what tensors mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Pending:
    """Tensors that are under way."""

    works: Sequence[dist.Work]
    received: list[Tensor]
    sent: Sequence[Tensor]  # kept until they are there

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class Peers:
    """The ranks of a group, in its order."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def shift(self, tensors: Sequence[Tensor]) -> Pending:
        """Tensors to the next rank, as many of the same sizes from the one before."""
        sent = [x.contiguous() for x in tensors]
        return self._swap([((self.rank + 1) % self.size, sent)], [((self.rank - 1) % self.size, sent)])

    def swap(self, sent: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """sent[r] to rank r; from it a tensor of the size of like[r]."""
        mine, others = self.rank, [rank for rank in range(self.size) if rank != self.rank]
        pending = self._swap(
            [(rank, [sent[rank].contiguous()]) for rank in others], [(rank, [like[rank]]) for rank in others]
        )
        found = pending.wait()
        found.insert(mine, sent[mine])
        return found

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's."""
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self.group)
        return found

    def total(self, x: Tensor, to: int) -> dist.Work:
        """The sum of every rank's x, in place at rank `to`."""
        work = dist.reduce(x, self._global(to), group=self.group, async_op=True)
        assert work is not None
        return work

    def _swap(
        self, sends: Sequence[tuple[int, list[Tensor]]], receives: Sequence[tuple[int, Sequence[Tensor]]]
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
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, received, [x for _, several in sends for x in several])

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)
