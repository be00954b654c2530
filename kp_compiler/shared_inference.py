"""Inference with a sequence that ranks share, which goes on when ranks are lost.

    run = kp.shared_inference(model, mesh["cp"], on_fault="shrink")
    logits = run(input_ids=ids)          the whole batch on every rank, the whole logits on every rank

Every rank has the whole batch: where one dies or stands still, the others make a group of those that are
left, divide the batch anew and compute the call again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kp_compiler.errors import KPConfigError, KPError, KPExchangeError
from kp_compiler.lowering.context.exchange import group_named
from kp_compiler.lowering.context.layout import Fixed
from kp_compiler.lowering.context.watch import WATCH
from kp_compiler.sharding import ranks_of, shard_sequence, unshard_sequence
from kp_compiler.survivors import Attempt

OnFault = Literal["raise", "shrink"]


class SharedInference:
    """A model whose calls several ranks make together. From `shared_inference`."""

    def __init__(
        self, model: torch.nn.Module, mesh: Any, on_fault: OnFault, patience: float, compiling: float,
        options: Mapping[str, Any], result: Callable[[Any], Tensor],
    ) -> None:  # fmt: skip
        self.model, self.on_fault = model, on_fault
        self.patience, self.compiling = patience, max(patience, compiling)
        self.options, self.result = dict(options), result
        sharing = dict(self.options.pop("context_parallel", {}))
        self.layout: Fixed = sharing.setdefault("layout", "zigzag")
        self.sharing = sharing
        group = group_named(ranks_of(mesh).group)
        self.rank, self.backend = dist.get_rank(), str(dist.get_backend(group))
        store = dist.distributed_c10d._get_default_store()
        self.store = store.clone()  # one that no rendezvous blocks
        self.name = f"kp/shared_inference/{group.group_name}"
        self.calls = 0
        self.warm = False  # a call of this group has been made
        self.told: str | None = None  # what was waited for on a device when a rank was lost
        self._join(dist.get_process_group_ranks(group))

    @torch.no_grad()
    def __call__(self, **batch: Any) -> Tensor:
        """The result [B,N,…] of the whole batch, tensors of which are [B,N,…] and on every rank the same.

        Every rank has the result, or every one that is left raises KPExchangeError: at once where a rank is
        gone and its absence is seen, within `patience` where one stands still. With on_fault="shrink" the
        ones that are left compute the call again, and the later ones, by themselves."""
        while len(self.members) > 1:
            self.calls += 1
            try:
                return self._together(batch)
            except _Lost as lost:
                self._leave()
                self._join(lost.survivors)
        return self.result(self.compiled(**batch))

    def _together(self, batch: dict[str, Any]) -> Tensor:
        key = f"{self.name}/{self.calls}"
        patience = self.patience if self.warm else self.compiling
        with Attempt(self.store, key, self.rank, self.members, patience, self._abort) as attempt:
            try:
                found = self._shared(batch)
                attempt.commit()
            except RuntimeError as error:
                if not isinstance(error, KPExchangeError) and not attempt.failed.is_set():
                    raise
                attempt.fail()
                if self.on_fault == "raise":
                    raise KPExchangeError(self.told or str(error)) from error
                raise _Lost(attempt.survivors()) from error
        if not self.warm:
            self.warm = True
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.patience), self.group)
        return found

    def _shared(self, batch: dict[str, Any]) -> Tensor:
        lengths = [x.shape[1] for x in batch.values() if isinstance(x, Tensor) and x.dim() > 1]
        mine = shard_sequence(batch, self.group, layout=self.layout)
        if "position_ids" not in batch and not _takes(self.model, "position_ids"):
            del mine["position_ids"]
        part = self.result(self.compiled(**mine))
        found = unshard_sequence(part, self.group, layout=self.layout, length=lengths[0])
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        return found

    def _join(self, members: list[int]) -> None:
        """Share with these."""
        self.members, self.warm, options = members, False, self.options
        self.group: Any = None
        if len(members) > 1:
            self.group = dist.new_group(
                members, timedelta(seconds=self.compiling), self.backend, use_local_synchronization=True
            )
            options = {**options, "context_parallel": {**self.sharing, "mesh": self.group}}
        self.compiled = torch.compile(self.model, backend="kp", options=options)

    def _leave(self) -> None:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(self.group)
        self.sharing.pop("schedule", None)  # what divided the heads among all may not among fewer

    def _abort(self) -> None:
        """What waits on a device for a rank that is gone ends, with numbers that mean nothing."""
        if self.backend == "nccl":
            late = WATCH.oldest()
            self.told = None if late is None else late.told
            self.group.abort()


class _Lost(Exception):
    def __init__(self, survivors: list[int]) -> None:
        super().__init__(survivors)
        self.survivors = survivors


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise KPError(f"result: {type(output).__name__} has no logits: result= says what of it is wanted")
    return found


def _takes(model: torch.nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters


def shared_inference(
    model: torch.nn.Module,
    mesh: Any,
    *,
    on_fault: OnFault = "raise",
    patience: float = 30.0,
    compiling: float = 600.0,
    options: Mapping[str, Any] | None = None,
    result: Callable[[Any], Tensor] = _logits,
) -> SharedInference:
    """Calls of a model with whole batches, whose sequences the ranks of `mesh` share.

    `mesh`: a DeviceMesh of one dimension or a process group; every one of its ranks calls this, and the
    function that it returns, in the same order with the same batches. `on_fault`: what happens when a rank is
    lost, "raise" or "shrink" to those that are left. `patience`: seconds that a call may take, `compiling`:
    that the first one of a group may. `options`: kp's; of "context_parallel" everything but the mesh.
    `result`: the tensor [B,n,…] that is wanted of the model's output, `logits` if nothing is said. Raises
    KPConfigError for anything else.

    Processes have to outlive each other: torchrun ends all of them when one is gone. The store that they met
    at has to live on, too; it is the process of rank 0 that has it where torchrun or a file does not.
    """
    if on_fault not in get_args(OnFault):
        raise KPConfigError(f"on_fault: got {on_fault!r}, expected one of 'raise', 'shrink'")
    for name, seconds in (("patience", patience), ("compiling", compiling)):
        if not seconds > 0:
            raise KPConfigError(f"{name}: got {seconds}, expected seconds")
    if getattr(mesh, "ndim", 1) != 1:
        raise KPConfigError("mesh: a grid of ranks can't shrink; expected one dimension: mesh['cp'], say")
    given = dict(options or {})
    sharing = given.get("context_parallel", {})
    if not isinstance(sharing, Mapping) or "mesh" in sharing or sharing.get("layout") == "documents":
        known = "schedule, layout ('zigzag', 'contiguous') and memory"
        raise KPConfigError(f"options.context_parallel: got {sharing!r}, expected some of {known}")
    return SharedInference(model, mesh, on_fault, patience, compiling, given, result)
