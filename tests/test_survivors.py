"""Ranks agree on how an attempt ended, and on who is left; ranks are threads here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from kp_compiler import survivors
from kp_compiler.errors import KPExchangeError
from kp_compiler.survivors import Attempt


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivors, "POLL", 0.02)
    monkeypatch.setattr(survivors, "ANSWER", 0.5)


def together(
    size: int, run: Callable[[Attempt], Any], patience: float = 30.0, store: Any = None
) -> tuple[list[Any], list[int]]:
    """What each rank gets or raises, and the ranks that were told to abort."""
    store, aborted = store or dist.HashStore(), []

    def one(rank: int) -> Any:
        attempt = Attempt(store, "call", rank, range(size), patience, lambda: aborted.append(rank))
        try:
            with attempt:
                return run(attempt)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(one, range(size)))
    return found, sorted(aborted)


def test_all_finish() -> None:
    store = dist.HashStore()

    def run(attempt: Attempt) -> str:
        attempt.commit()
        return "finished"

    assert together(3, run, store=store) == (["finished"] * 3, [])
    Attempt(store, "call", 0, range(3), 1.0, lambda: None).forget()
    assert not store.check(["call/outcome"])


def lost(attempt: Attempt, function: Callable[[], None]) -> list[int]:
    try:
        function()
    except RuntimeError:
        attempt.fail()
        return attempt.survivors()
    return []


def test_one_is_gone() -> None:
    """The others find out by themselves, or are told."""

    def run(attempt: Attempt) -> Any:
        if attempt.rank == 1:
            attempt.over.set()  # nobody answers for it
            return None
        return lost(attempt, attempt.commit)

    found, aborted = together(3, run, patience=0.3)
    assert found == [[0, 2], None, [0, 2]] and aborted == [0, 2]


def test_one_outcome_for_all() -> None:
    """The last one to finish is told what the others know: that one had given up before."""

    def run(attempt: Attempt) -> Any:
        if attempt.rank == 1:
            attempt.failed.wait()
            time.sleep(0.1)
        return lost(attempt, attempt.commit)

    found, aborted = together(2, run, patience=0.3)
    assert found == [[0, 1], [0, 1]] and aborted == [0, 1]


def test_an_error_of_its_own() -> None:
    """Is told to the others at once, who go on without it."""

    def run(attempt: Attempt) -> Any:
        if attempt.rank == 0:
            raise ValueError("no memory")
        return lost(attempt, attempt.commit)

    start = time.monotonic()
    found, aborted = together(3, run)
    assert isinstance(found[0], ValueError) and found[1:] == [[1, 2], [1, 2]] and aborted == [1, 2]
    assert time.monotonic() - start < 10


def test_one_that_comes_late() -> None:
    store = dist.HashStore()
    store.set("call/survivors", "[0]")

    def run(attempt: Attempt) -> Any:
        attempt.fail()
        return attempt.survivors()

    (error,), _ = together(1, run, store=store)
    assert error == [0]
    late = Attempt(store, "call", 1, range(2), 1.0, lambda: None)
    with pytest.raises(KPExchangeError, match="rank 1 was not there in time"):
        late.survivors()


def test_the_store_is_gone() -> None:
    """What waits ends, and the main thread is told what the store says."""

    class Store:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    aborted = threading.Event()
    attempt: Any = Attempt(Store(), "call", 0, [0, 1], 30.0, aborted.set)  # type: ignore[arg-type]
    with attempt:
        assert aborted.wait(5) and attempt.failed.is_set()
