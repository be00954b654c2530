"""Which rank has which tokens of one batch, and under which of these orders a call is made.

The sequence is cut into chunks of one length, each with some work; every rank gets as many chunks, those with
the most work first, to the rank with the least so far (longest processing time first: Graham, SIAM J. Appl.
Math. 17, 1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kp_compiler.errors import KPError
from kp_compiler.lowering.context.layout import Ordered


@dataclass(frozen=True)
class SequenceOrder:
    """An order of a batch's tokens, from `kp.document_order`. A graph that was compiled for the layout
    "documents" runs under one:

    with order:
        loss = compiled(**kp.shard_sequence(batch, mesh, layout=order)).loss
    """

    layout: Ordered
    group: str  # of the ranks
    chunks: int  # of each
    imbalance: float  # pairs of tokens of the rank with the most, in parts of the mean
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Tensor:
        """Places [N], rank after rank."""
        if device not in self._copies:
            self._copies[device] = self.layout.places.to(device)
        return self._copies[device]

    def __enter__(self) -> SequenceOrder:
        _active.setdefault(self.group, []).append(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _active[self.group].pop()


_active: dict[str, list[SequenceOrder]] = {}  # by group, the last one is the one


def active(group: str, tokens: int) -> SequenceOrder:
    """The order that a graph runs under. Raises KPError where there is none, or one of other tokens, and
    while gradients are computed, when another one may be there."""
    if torch._C._current_graph_task_id() != -1:
        raise KPError(
            "a graph of the layout 'documents' is run again for its gradients: checkpoint layers inside of "
            "what is compiled"
        )
    orders = _active.get(group)
    if not orders:
        raise KPError(
            "the layout 'documents' needs an order: with kp.document_order(position_ids, mesh) as order: …"
        )
    found = orders[-1]
    if found.layout.tokens != tokens:
        raise KPError(f"the order is one of {found.layout.tokens} tokens, ranks have {tokens} together")
    return found


def balanced(work: Sequence[float], size: int) -> list[list[int]]:
    """Of each rank, its chunks in order."""
    found: list[list[int]] = [[] for _ in range(size)]
    ranks = [(0.0, rank) for rank in range(size)]
    for chunk in sorted(range(len(work)), key=lambda each: -work[each]):
        done, rank = heapq.heappop(ranks)
        found[rank].append(chunk)
        if len(found[rank]) < len(work) // size:
            heapq.heappush(ranks, (done + work[chunk], rank))
    return [sorted(chunks) for chunks in found]
