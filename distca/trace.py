"""What was each thread doing, and when?

A `Trace` is handed to whoever does the work and notes *spans*, but only in the steps that are asked for; in all others
a span costs one comparison. `distca.launch.trace` writes and draws what was noted.

    with trace.span("wait", "server 2"):
        ...
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["model", "send", "wire", "wait", "kernels", "plan", "optimizer", "ray"]


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

    @contextmanager
    def _noted(self, kind: Kind, name: str, facts: dict[str, Any]) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            thread = threading.current_thread().name
            self._spans.append(Span(kind, name, thread, start, time.perf_counter(), facts))  # atomic
