"""What was each thread doing, and when?

A `Trace` is handed to whoever does the work and notes *spans*, but only in the steps that are asked for; in all others
a span costs one comparison. `distca.launch.folder.trace` writes and draws what was noted.

    with trace.span("wait", "server 2"):
        ...
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["model", "send", "wire", "wait", "kernels", "plan", "optimizer", "ray"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Span:
    """Something that one thread did from `start` to `end`: seconds of this process's `time.perf_counter`."""

    kind: Kind
    name: str
    thread: str
    start: float
    end: float
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else is worth knowing: layer, bytes, predicted seconds."""


def read_clock() -> tuple[str, float]:
    """Which clock spans are timed by, and what it says: all processes of a machine share one, as long as it is up."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname(), time.perf_counter()


class Trace:
    """Spans of one process. Threads may note theirs at the same time."""

    def __init__(self):
        self.is_on = False
        self._spans: list[Span] = []

    def span(self, kind: Kind, name: str, **facts: Any):
        """A context; what happens in it becomes a span of this thread."""
        return self._noted(kind, name, facts) if self.is_on else nullcontext()

    def take(self) -> list[Span]:
        """All spans since the last call of this method."""
        taken, self._spans = self._spans, []
        return taken

    def record(self, is_on: bool) -> list[Span]:
        """Note spans from here on, or none; returns those since the last call."""
        self.is_on = is_on
        return self.take()

    @contextmanager
    def _noted(self, kind: Kind, name: str, facts: dict[str, Any]) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            thread = threading.current_thread().name
            self._spans.append(Span(kind, name, thread, start, time.perf_counter(), facts))  # atomic
