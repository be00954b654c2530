"""Exchanges of GPUs that do not come to an end.

NCCL's are queued on the device: nobody waits for them in Python, and where a rank is gone PyTorch's watchdog
ends the process after the group's timeout with a message that names no site. Here an event behind every
queued wait is kept until it is over, and a thread logs the oldest one shortly before that happens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

log = logging.getLogger("kp_compiler")
PERIOD = 1.0  # seconds from one look to the next
MARGIN = 5.0  # seconds before the group's timeout at which it is told, a tenth of it at most


@dataclass(frozen=True)
class Flight:
    """An exchange that a stream waits for, as an error says it, of whom, and since when."""

    told: str
    event: torch.cuda.Event
    start: float
    group: dist.ProcessGroup

    @property
    def over(self) -> bool:
        return self.event.query()


class Watch:
    """See the module docstring."""

    def __init__(self) -> None:
        self.flights: deque[Flight] = deque()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def add(self, told: str, group: dist.ProcessGroup) -> None:
        """An exchange that the current stream waits for from now on. In a graph that is being captured
        nothing may be asked: what it holds is not watched."""
        if torch.cuda.is_current_stream_capturing():
            return
        event = torch.cuda.Event()
        event.record()
        self.oldest()
        self.flights.append(Flight(told, event, time.monotonic(), group))
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="kp exchanges", daemon=True)
            self.thread.start()

    def oldest(self) -> Flight | None:
        """The first that is not over; those before it are forgotten."""
        with self.lock:
            while self.flights:
                first = self.flights[0]
                if not first.over:
                    return first
                self.flights.popleft()
        return None

    def forget(self, group: dist.ProcessGroup) -> None:
        """What was to be waited for in a group that is given up."""
        with self.lock:
            self.flights = deque(flight for flight in self.flights if flight.group is not group)

    def late(self) -> Flight | None:
        """The oldest, if PyTorch is about to end the process for it. Younger ones are not asked about."""
        with self.lock:
            first = self.flights[0] if self.flights else None
        if first is None:
            return None
        try:
            timeout = _timeout(first.group)
        except RuntimeError:  # the group is gone, and nobody waits for it
            return None
        left = first.start + timeout - time.monotonic()
        return first if left <= min(MARGIN, timeout / 10) and not first.over else None

    def _run(self) -> None:
        told = None
        while True:
            time.sleep(PERIOD)
            late = self.late()
            if late is not None and late is not told:
                told = late
                log.error("kp: %s for %.0f s", late.told, time.monotonic() - late.start)


def _timeout(group: dist.ProcessGroup) -> float:
    """Seconds."""
    options = group._get_backend(torch.device("cuda")).options
    return float(options._timeout.total_seconds())


WATCH = Watch()
