"""Which ranks are still there, agreed on by those that are.

    with Attempt(store, key, rank, members, patience, abort) as attempt:
        …                       something that all members do together
        attempt.commit()        returns on every member, or raises on every one that is left
    attempt.survivors()         after a failure: the same list on each of them

A rank says that it is there from a thread of its own, which also ends what its other threads wait for. Where
one rank has failed, or takes longer than `patience`, all members are told through the store.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import Store

from kp_compiler.errors import KPExchangeError

POLL = 0.1  # seconds between looks at the store
ANSWER = 3.0  # seconds in which a rank that is there says so
DONE = 0.001  # seconds between looks whether the others have finished


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

    def __exit__(self, *exc: Any) -> None:
        self.over.set()
        self.thread.join()

    def fail(self) -> None:
        """Tell everyone, and wait until this rank has said that it is there."""
        self.store.set(f"{self.key}/failed", "")
        self.failed.wait()

    def commit(self) -> None:
        """Wait for the others. Raises KPExchangeError where one of them has failed."""
        self.store.add(f"{self.key}/done", 1)
        while self.store.add(f"{self.key}/done", 0) < len(self.members):
            if self.failed.is_set():
                raise KPExchangeError(f"rank {self.rank} waited for others to finish, of which one failed")
            time.sleep(DONE)

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

    def _watch(self) -> None:
        failed = [f"{self.key}/failed"]
        while not self.over.wait(POLL):
            if not self.store.check(failed):
                if time.monotonic() < self.deadline:
                    continue
                self.store.set(failed[0], "")
            self.store.set(f"{self.key}/there/{self.rank}", "")
            self.failed.set()
            self.abort()
            return
