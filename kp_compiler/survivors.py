"""Which ranks are still there, agreed on by those that are.

    with Attempt(store, key, rank, members, patience, abort) as attempt:
        …                       something that all members do together
        attempt.commit()        returns on every member, or raises on every one that is left
    attempt.survivors()         after a failure: the same list on each of them

An attempt has one outcome, "done" or "failed", which the store keeps: whoever is first says which. All have
finished, or one of them could not, or took longer than `patience`. A rank says that it is there from a thread
of its own, which also ends what its other threads wait for. One that leaves with an error of its own, another
than KPExchangeError, is not there.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import Store

from kp_compiler.errors import KPExchangeError

POLL = 0.1  # seconds between looks at the store
ANSWER = 3.0  # seconds in which a rank that is there says so
FIRST, LONGEST = 0.001, 0.02  # seconds between looks whether the others have finished


class Attempt:
    """See the module docstring. `members` are global ranks, `abort` makes what waits for the others fail."""

    def __init__(
        self, store: Store, key: str, rank: int, members: Sequence[int], patience: float,
        abort: Callable[[], None],
    ) -> None:  # fmt: skip
        self.store, self.key, self.rank, self.members = store, key, rank, members
        self.abort, self.patience, self.deadline = abort, patience, time.monotonic() + patience
        self.failed = threading.Event()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="kp survivors", daemon=True)

    def __enter__(self) -> Attempt:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self.over.set()
        self.thread.join()
        if kind is not None and not self.failed.is_set():
            with contextlib.suppress(RuntimeError):
                self._settle("failed")

    def fail(self) -> None:
        """Tell everyone, and wait until this rank has said that it is there."""
        self._settle("failed")
        self.failed.wait(ANSWER)

    def commit(self) -> None:
        """Wait for the others. Raises KPExchangeError where one of them has failed."""
        if self.store.add(f"{self.key}/done", 1) == len(self.members):
            self._settle("done")
        pause = FIRST
        while (outcome := self._outcome()) is None:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST)
        if outcome == "failed":
            place = f"rank {self.members.index(self.rank)} of {len(self.members)}"
            raise KPExchangeError(
                f"{self.key}: {place} waited for the others to finish, one of which failed or was late"
            )

    def forget(self) -> None:
        """Its keys, once a later attempt of the same members is done."""
        for name in ("done", "outcome"):
            self.store.delete_key(f"{self.key}/{name}")

    def survivors(self) -> list[int]:
        """Members that are there, when all of them have come here. Raises KPExchangeError on one that was too
        late to say so, and where one does not come: what it waited for has to end first, which may take its
        patience."""
        deadline = time.monotonic() + ANSWER
        missing = list(self.members)
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self.store.check([f"{self.key}/there/{rank}"])]
            time.sleep(POLL)
        found = json.dumps([rank for rank in self.members if rank not in missing])
        found = self.store.compare_set(f"{self.key}/survivors", "", found)  # of the first that has waited
        survivors: list[int] = json.loads(found)
        if self.rank not in survivors:
            raise KPExchangeError(f"rank {self.rank} was not there in time: ranks {survivors} went on")
        deadline = time.monotonic() + self.patience + ANSWER
        self.store.add(f"{self.key}/here", 1)
        while self.store.add(f"{self.key}/here", 0) < len(survivors):
            if time.monotonic() > deadline:
                raise KPExchangeError(f"rank {self.rank} waited for ranks {survivors} to go on together")
            time.sleep(POLL)
        return survivors

    def _settle(self, outcome: str) -> str:
        """The outcome, which is this one if there was none."""
        return _text(self.store.compare_set(f"{self.key}/outcome", "", outcome))

    def _outcome(self) -> str | None:
        key = f"{self.key}/outcome"
        return _text(self.store.get(key)) if self.store.check([key]) else None

    def _watch(self) -> None:
        try:
            while not self.over.wait(POLL):
                outcome = self._outcome()
                if outcome is None and time.monotonic() >= self.deadline:
                    outcome = self._settle("failed")
                if outcome == "failed":
                    self.store.set(f"{self.key}/there/{self.rank}", "")
                    break
                if outcome == "done":
                    return
            else:
                return
        except RuntimeError:  # the store is gone, which the main thread will be told, too
            pass
        self.failed.set()
        self.abort()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
