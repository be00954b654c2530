"""Exchanges of GPUs that don't come to an end are told before PyTorch ends the process."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch

from kp_compiler.lowering.context import watch
from kp_compiler.lowering.context.watch import Flight, Watch


class Event:
    def __init__(self, *, over: bool = False) -> None:
        self.over, self.asked = over, 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.asked += 1
        return self.over


@pytest.fixture(autouse=True)
def timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group is its own timeout here."""
    monkeypatch.setattr(watch, "_timeout", lambda group: group)


def flight(told: str, event: Event, *, age: float = 0.0, timeout: float = 600.0) -> Flight:
    return Flight(told, event, time.monotonic() - age, timeout)  # type: ignore[arg-type]


def test_the_oldest_that_is_not_over() -> None:
    mine, works = Watch(), [Event(over=True), Event(), Event(over=True)]
    mine.flights.extend(flight(f"{i}", work) for i, work in enumerate(works))
    assert mine.oldest().told == "1"  # type: ignore[union-attr]
    works[1].over = True
    assert mine.oldest() is None and not mine.flights


def test_what_is_given_up_is_forgotten() -> None:
    mine, group = Watch(), object()
    mine.flights.extend(Flight(name, Event(), 0.0, of) for name, of in (("a", group), ("b", None)))  # type: ignore[arg-type]
    mine.forget(group)  # type: ignore[arg-type]
    assert [each.told for each in mine.flights] == ["b"]


def test_what_is_late() -> None:
    """Nothing is asked of the device as long as there is time."""
    mine, work = Watch(), Event()
    mine.flights.append(flight("a", work, age=590.0))
    assert mine.late() is None and work.asked == 0
    mine.flights[0] = flight("a", work, age=596.0)
    assert mine.late() is mine.flights[0]
    mine.flights[0] = flight("a", work, age=9.5, timeout=10.0)
    assert mine.late() is mine.flights[0]
    work.over = True
    assert mine.late() is None


def test_it_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    mine, work = Watch(), Event()
    monkeypatch.setattr(torch.cuda, "Event", lambda: work)
    group: Any = 0.5
    with caplog.at_level(logging.ERROR, logger="kp_compiler"):
        mine.add("layers.0: rank 0 of 2 waited for keys of step 1 from rank 1", group)
        time.sleep(1.0)
        work.over = True
        mine.oldest()  # its thread goes on, and asks for no timeout any more
    assert [record.getMessage() for record in caplog.records] == [
        "kp: layers.0: rank 0 of 2 waited for keys of step 1 from rank 1 for 0 s"
    ]


def test_graphs_that_are_captured_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    mine = Watch()
    mine.add("a", None)  # type: ignore[arg-type]
    assert not mine.flights and mine.thread is None
