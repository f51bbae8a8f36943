"""What is a run doing now? Told from its folder alone, on any host that sees it.

While a run lasts, its folder holds `workers.json`: who takes part, and where. A driver that ends takes it away; one
that was killed leaves it, and then only the time of the last step tells that nobody works any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distca.config import load_settings
from distca.errors import DataError
from distca.launch.folder.publish import steps_published
from distca.metrics import StepRecord

RUN_FILE, CHECKPOINTS, STEPS, EVENTS, WORKERS = "run.yaml", "checkpoints", "metrics.jsonl", "events.txt", "workers.json"
QUIET_STEPS, QUIET_S = 10, 60.0  # so many steps' time without one, and no less than this, is no sign of life
LAST_STEPS = 20  # whose median says how fast it is
LAST_EVENTS = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of a run's processes is."""

    name: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Status:
    """A run, as its folder shows it."""

    folder: Path
    name: str
    num_steps: int
    records: Sequence[StepRecord]
    quiet_s: float
    """Since the last step."""
    checkpoints: Sequence[int]
    """Steps, newest first."""
    places: Sequence[Place]
    """Nobody, where the run is over."""
    events: Sequence[str]

    @property
    def step(self) -> int:
        return self.records[-1].step if self.records else 0

    @property
    def step_s(self) -> float:
        """Median of the last steps."""
        last = sorted(record.step_s for record in self.records[-LAST_STEPS:])
        return last[len(last) // 2] if last else 0.0

    @property
    def state(self) -> str:
        at = f"step {self.step} of {self.num_steps}, {_ago(self.quiet_s)}" if self.step else "before its first step"
        if not self.places:
            return f"done: {at}" if self.step >= self.num_steps else f"stopped: {at}"
        if self.quiet_s > max(QUIET_S, QUIET_STEPS * self.step_s):
            return f"no sign of life: {at}; its driver may have been killed"
        return f"running: {at}"


def status(folder: Path) -> Status:
    """Of the run in this folder. Raises DataError where there is none."""
    if not (folder / RUN_FILE).is_file():
        raise DataError(f"{folder} is not a run's folder: it has no {RUN_FILE}")
    settings, steps = load_settings(folder / RUN_FILE, []), folder / STEPS
    since = (steps if steps.exists() else folder / RUN_FILE).stat().st_mtime
    return Status(
        folder,
        settings.name,
        settings.train.steps,
        list(_records(steps)),
        max(0.0, time.time() - since),
        steps_published(folder / CHECKPOINTS),
        _places(folder / WORKERS),
        _lines(folder / EVENTS)[-LAST_EVENTS:],
    )


def was_begun(folder: Path) -> bool:
    """Whether a run in this folder has saved something to go on from."""
    return bool(steps_published(folder / CHECKPOINTS))


def newest_run(runs: Path) -> Path:
    """The folder in `runs` whose last step is the newest."""
    found = [run.parent for run in runs.glob(f"*/{RUN_FILE}")]
    if not found:
        raise DataError(f"no run's folder in {runs.absolute()}: name one")
    return max(found, key=lambda run: (run / STEPS if (run / STEPS).exists() else run).stat().st_mtime)


@contextlib.contextmanager
def taking_part(folder: Path, workers: Mapping[str, tuple[str, int]]) -> Iterator[None]:
    """The folder tells who works for the run, by name with host and process number, and that this driver does."""
    everybody = {"driver": (socket.gethostname(), os.getpid()), **workers}
    draft = folder / f".{WORKERS}"
    draft.write_text(json.dumps([dict(name=n, host=h, pid=p) for n, (h, p) in everybody.items()]), encoding="utf-8")
    draft.replace(folder / WORKERS)
    try:
        yield
    finally:
        (folder / WORKERS).unlink(missing_ok=True)


def lines_of(status: Status) -> list[tuple[str, str]]:
    """For people: a word and what it is about."""
    lines = [("run", str(status.folder)), ("state", status.state)]
    if status.records:
        first, last = status.records[0], status.records[-1]
        lines.append(("last step", last.line()))
        if first.loss is not None and last.loss is not None:
            lines.append(("loss", f"{last.loss:.4f}, from {first.loss:.4f} in step {first.step}"))
        left_s = (status.num_steps - status.step) * status.step_s
        lines.append(("speed", f"{last.tokens / max(status.step_s, 1e-9):,.0f} tokens/s, {status.step_s:.2f} s a step"))
        if status.places and left_s:
            lines.append(("left", f"about {duration(left_s)}"))
    saved = ", ".join(map(str, status.checkpoints)) or "none yet"
    lines.append(("checkpoints", f"of step {saved}" if status.checkpoints else saved))
    lines += [("worker", f"{place.name:10} {place.host}, process {place.pid}") for place in status.places]
    return lines + [("event", event) for event in status.events]


def _records(path: Path) -> Iterator[StepRecord]:
    for line in _lines(path):
        with contextlib.suppress(ValueError, TypeError):  # the last one may be half written
            fields: dict[str, Any] = json.loads(line)
            yield StepRecord(**fields)


def _places(path: Path) -> list[Place]:
    try:
        return [Place(**place) for place in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # the run ended meanwhile
        return []


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """Two of its largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole, parts = round(seconds), []
    for name, size in units:
        if whole >= size or (size == 1 and not parts):
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2])
