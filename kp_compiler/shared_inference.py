"""Inference with a sequence that ranks share, which goes on when ranks are lost.

    run = kp.shared_inference(model, mesh["cp"], on_fault="shrink")
    logits = run(input_ids=ids)          the whole batch on every rank, the whole logits on every rank

Every rank has the whole batch: where one dies or stands still, the others make a group of those that are
left, divide the batch anew and compute the call again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from itertools import count
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kp_compiler.errors import KPConfigError, KPError, KPExchangeError
from kp_compiler.lowering.context.exchange import group_named
from kp_compiler.lowering.context.layout import Fixed, Layout
from kp_compiler.lowering.context.watch import WATCH
from kp_compiler.sharding import ranks_of, shard_sequence, unshard_sequence
from kp_compiler.survivors import Attempt

OnFault = Literal["raise", "shrink"]
WATCHDOG = 60.0  # seconds after a call's patience at which NCCL's own watchdog may end the process


class SharedInference:
    """A model whose calls several ranks make together. From `shared_inference`."""

    def __init__(
        self, model: torch.nn.Module, mesh: Any, on_fault: OnFault, patience: float, compiling: float,
        options: Mapping[str, Any], result: Callable[[Any], Tensor], causal: bool,
    ) -> None:  # fmt: skip
        self.model, self.on_fault, self.causal = model, on_fault, causal
        self.patience, self.compiling = patience, max(patience, compiling)
        self.options, self.result = dict(options), result
        self.sharing = dict(self.options.pop("context_parallel", {}))
        self.layout: Fixed = self.sharing.setdefault("layout", "zigzag")
        ranks = ranks_of(mesh)
        self.rank, self.on_gpu = dist.get_rank(), ranks.device == "cuda"
        store = dist.distributed_c10d._get_default_store()
        self.store = store.clone()  # one that no rendezvous blocks
        self.name = f"kp/shared_inference/{ranks.group}/{next(_numbers.setdefault(ranks.group, count()))}"
        self.generation = self.calls = 0
        self.seen: set[Any] = set()  # sizes that are compiled for this group
        self.last: Attempt | None = None
        self.group: Any = None
        self.told: str | None = None  # what was waited for on a device when a rank was lost
        self._join(dist.get_process_group_ranks(group_named(ranks.group)))

    @torch.no_grad()
    def __call__(self, **batch: Any) -> Tensor:
        """The result [B,N,…] of the whole batch, tensors of which are [B,N,…] and on every rank the same.

        Every rank has the result, or every one that is left raises KPExchangeError: at once where a rank is
        gone and its absence is seen, within `patience` where one stands still. With on_fault="shrink" the
        ones that are left compute the call again, and the later ones, by themselves; where all of them are
        there after all, once."""
        again = False
        while len(self.members) > 1:
            try:
                return self._together(batch)
            except _Lost as lost:
                all_there = lost.survivors == self.members
                if all_there and again:
                    raise KPExchangeError(f"{lost}; all ranks are there, and it failed twice") from lost
                again = all_there
                self._leave()
                self._join(lost.survivors)
        return self.result(self.compiled(**batch))

    def _together(self, batch: dict[str, Any]) -> Tensor:
        self.calls += 1
        sizes = tuple((name, x.shape, x.dtype) for name, x in batch.items() if isinstance(x, Tensor))
        patience = self.patience if sizes in self.seen else self.compiling
        dist.distributed_c10d._set_pg_timeout(self._timeout(patience), self.group)
        key = f"{self.name}/{self.generation}/{self.calls}"
        with Attempt(self.store, key, self.rank, self.members, patience, self._abort) as attempt:
            try:
                found = self._shared(batch)
                attempt.commit()
            except RuntimeError as error:
                if _own(error) or (not isinstance(error, KPExchangeError) and not attempt.failed.is_set()):
                    raise
                told = self.told or str(error)
                survivors = self._failed(attempt, told)
                if self.on_fault == "raise":
                    raise KPExchangeError(told) from error
                raise _Lost(told, survivors) from error
        self.seen.add(sizes)
        if self.last is not None and self.rank == self.members[0]:
            self.last.forget()  # all have gone on from it
        self.last = attempt
        return found

    def _failed(self, attempt: Attempt, told: str) -> list[int]:
        """Tell the others; who is left, where that is asked for."""
        try:
            attempt.fail()
            return attempt.survivors() if self.on_fault == "shrink" else []
        except KPExchangeError:
            raise
        except RuntimeError as error:
            raise KPExchangeError(f"{told}; and the store that ranks met at is gone: {error}") from error

    def _shared(self, batch: dict[str, Any]) -> Tensor:
        lengths = [x.shape[1] for x in batch.values() if isinstance(x, Tensor) and x.dim() > 1]
        if not lengths:
            raise KPError("shared_inference: no tensor of the batch is [B,N,…]")
        mine = shard_sequence(self._masked(batch, lengths[0]), self.group, layout=self.layout)
        if "position_ids" not in batch and not _takes(self.model, "position_ids"):
            del mine["position_ids"]
        part = self.result(self.compiled(**mine))
        found = unshard_sequence(part, self.group, layout=self.layout, length=lengths[0])
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        return found

    def _masked(self, batch: dict[str, Any], length: int) -> dict[str, Any]:
        """With a mask of what a sequence is lengthened by, where a query could see it. Raises KPError where
        the model takes none."""
        parts = Layout(self.layout, len(self.members), 0).parts
        if self.causal or "attention_mask" in batch or length % parts == 0:
            return batch
        positions = batch.get("position_ids")
        packed = positions is not None and bool((positions.diff(dim=-1) != 1).any())
        if packed or not _takes(self.model, "attention_mask"):  # models see documents where there is no mask
            raise KPError(
                f"shared_inference: {length} tokens are not {parts} equal parts, and what is added would be "
                "seen: give a multiple, or say causal=True where no query sees a later token"
            )
        first = next(x for x in batch.values() if isinstance(x, Tensor) and x.dim() > 1)
        mask = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
        return {**batch, "attention_mask": mask}

    def _join(self, members: list[int]) -> None:
        """Share with these."""
        self.members, self.generation, self.calls = members, self.generation + 1, 0
        self.seen, self.last = set(), None
        options, self.group = self.options, None
        if len(members) > 1:
            self.group = self._new_group()
            options = {**options, "context_parallel": {**self.sharing, "mesh": self.group}}
        # without fullgraph, a model that is compiled too often runs as it is, and attention sees a part
        self.compiled = torch.compile(self.model, backend="kp", fullgraph=len(members) > 1, options=options)

    def _new_group(self) -> Any:
        """Of the members alone, under a name that they agree on: `new_group` numbers groups by what each rank
        has made, and gives a group that is made again the name, and the addresses, of the one before."""
        c10d = dist.distributed_c10d
        members = self.members
        group, _ = c10d._new_process_group_helper(
            len(members), members.index(self.rank), members, dist.Backend("nccl" if self.on_gpu else "gloo"),
            c10d._get_default_store(), f"{self.name}/{self.generation}",
            timeout=self._timeout(self.compiling),
        )  # fmt: skip
        c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(members)}
        return group

    def _timeout(self, patience: float) -> timedelta:
        """Of exchanges in a call that may take `patience`. gloo's raise after it; NCCL's end the process,
        which is not what is wanted: an `Attempt` ends the call before."""
        return timedelta(seconds=patience + WATCHDOG if self.on_gpu else patience)

    def _leave(self) -> None:
        WATCH.forget(self.group)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(self.group)
        self.sharing.pop("schedule", None)  # what divided the heads among all may not among fewer

    def _abort(self) -> None:
        """What waits on a device for a rank that is gone ends, with numbers that mean nothing."""
        if self.on_gpu:
            late = WATCH.oldest()
            self.told = None if late is None else late.told
            self.group.abort()


_numbers: dict[str, Iterator[int]] = {}  # of what was made of a group, in the same order on every rank


class _Lost(Exception):
    def __init__(self, told: str, survivors: list[int]) -> None:
        super().__init__(told)
        self.survivors = survivors


def _own(error: BaseException | None) -> bool:
    """Whether kp refuses what this rank asks for, which has nothing to do with other ranks."""
    while error is not None:
        if isinstance(error, KPError):
            return not isinstance(error, KPExchangeError)
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


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
    causal: bool = False,
) -> SharedInference:
    """Calls of a model with whole batches, whose sequences the ranks of `mesh` share.

    `mesh`: a DeviceMesh of one dimension or a process group; every one of its ranks calls this, and the
    function that it returns, in the same order with the same batches. `on_fault`: what happens when a rank is
    lost, "raise" or "shrink" to those that are left. `patience`: seconds that a call may take, `compiling`:
    that the first one of its sizes may. `options`: kp's; of "context_parallel" everything but the mesh.
    `result`: the tensor [B,n,…] that is wanted of the model's output, `logits` if nothing is said. `causal`:
    no query sees a later token, so that what lengthens a sequence needs no mask; else one is added. Raises
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
    if dist.is_initialized() and dist.distributed_c10d._get_default_group().bound_device_id is not None:
        raise KPConfigError(
            "init_process_group(device_id=…) lets no group be made of fewer ranks: leave it out"
        )
    given = dict(options or {})
    sharing = given.get("context_parallel", {})
    if not isinstance(sharing, Mapping) or "mesh" in sharing:
        known = "schedule, layout and memory"
        raise KPConfigError(f"options.context_parallel: got {sharing!r}, expected some of {known}")
    if (layout := sharing.get("layout", "zigzag")) not in get_args(Fixed):
        raise KPConfigError(
            f"options.context_parallel.layout: got {layout!r}, expected 'zigzag' or 'contiguous'"
        )
    return SharedInference(model, mesh, on_fault, patience, compiling, given, result, causal)
