"""How does the driver learn what every worker did in a step?

It has them note spans in the steps that somebody wants to see, and only in those, and collects these after each.

Workers on the driver's machine read its clock. Others are asked for theirs a few times, and the quickest answer says
how far it is off (NTP, RFC 5905): by half that answer's way at most.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distca.launch.cluster.workers import Worker, gather
from distca.launch.folder.trace import Recording, StepTrace, chrome_trace, clock_shift
from distca.trace import Trace, read_clock

logger = logging.getLogger(__name__)

FOLDER = "traces"
PINGS = 5


class Recorder:
    """Asks the workers to note what they do in the steps that somebody wants to see, and keeps the run's trace."""

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int] | None,
        trainers: list[Worker],
        servers: list[Worker],
        names: Mapping[str, str] | None = None,
    ):
        """`steps`: first and last of the run's trace. `servers` in the pool's order; trainers may be among them.
        `names`: what people know workers by."""
        self._names = names or {}
        self._folder, self._traced = folder / FOLDER, steps or (0, -1)
        self._workers = trainers + [server for server in servers if server not in trainers]
        self._ranks = {str(worker): rank for rank, worker in enumerate(trainers)}
        self._numbers = {str(worker): number for number, worker in enumerate(servers)}
        self._clocks: list[tuple[float, float]] | None = None  # what to add to a worker's times, and the error
        self._kept: list[StepTrace] = []
        self._start = 0.0
        self.trace = Trace()
        """The driver's own."""

    def start(self, step: int, wanted: bool) -> None:
        """Before a step: have it recorded if it is `wanted`, or in the run's trace."""
        wanted = wanted or self._is_traced(step)
        if wanted and self._clocks is None:
            self._clocks = self._compare_clocks()
        if wanted and not self.trace.is_on:
            self._switch(True)
        self._start = time.perf_counter()

    def finish(self, step: int, predicted: np.ndarray | None, measured: Sequence[float]) -> StepTrace | None:
        """After a step: what was recorded of it. The run's trace is written after its last step."""
        if not self.trace.is_on:
            return None
        end = time.perf_counter()
        recordings = self._switch(self._is_traced(step + 1))
        busy_s = None if predicted is None else np.array(measured)
        found = StepTrace(step, self._start, end, recordings, predicted, busy_s)
        if self._is_traced(step):
            self._kept.append(found)
        if step == self._traced[1]:
            self.close()
        return found

    def close(self) -> None:
        """Write what there is of the run's trace, as far as it has not been written."""
        if not self._kept:
            return
        first, last = self._kept[0].step, self._kept[-1].step
        path = self._folder / f"steps-{first}-{last}.json.gz"
        self._folder.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(chrome_trace(self._kept), file, allow_nan=False)
        self._kept.clear()
        logger.info("trace of steps %d to %d, for ui.perfetto.dev or chrome://tracing: %s", first, last, path)

    def _is_traced(self, step: int) -> bool:
        return self._traced[0] <= step <= self._traced[1]

    def _switch(self, is_on: bool) -> list[Recording]:
        """Noting on or off everywhere; what was noted since the last time."""
        own, found = self.trace.record(is_on), self._ask(self._workers, "record", is_on)
        recordings = []
        for worker, spans, (shift, error_s) in zip(self._workers, found, self._clocks, strict=True):
            moved = [replace(s, start=s.start + shift, end=s.end + shift) for s in spans] if shift else spans
            where = self._ranks.get(str(worker)), self._numbers.get(str(worker))
            recordings.append(Recording(self._names.get(str(worker), str(worker)), moved, error_s, *where))
        return [*recordings, Recording("driver", own)]

    def _compare_clocks(self) -> list[tuple[float, float]]:
        machine, _ = read_clock()
        theirs = [name for name, _ in self._ask(self._workers, "read_clock")]
        return [
            (0.0, 0.0) if name == machine else clock_shift([self._ping(worker) for _ in range(PINGS)])
            for worker, name in zip(self._workers, theirs, strict=True)
        ]

    def _ping(self, worker: Worker) -> tuple[float, float, float]:
        asked = time.perf_counter()
        ((_, theirs),) = self._ask([worker], "read_clock")
        return asked, theirs, time.perf_counter()

    def _ask(self, workers: list[Worker], method: str, *arguments: Any) -> list:
        return gather([worker.call(method, *arguments) for worker in workers], None, "recording a trace")
