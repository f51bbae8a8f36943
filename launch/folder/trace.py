"""What did every worker do in a step, on one clock?

Workers note spans (`distca.trace`), `distca.launch.run.recorder` collects them. What is made of them:

    chrome_trace    a file for Perfetto (ui.perfetto.dev) or chrome://tracing: a process per worker, a track per thread,
                    wire time and an arrow for every message, each server's share of the work, predicted and measured
    moments         a worker's time as one row of pieces: what a picture shows
    seconds_of      the same in numbers: each moment counts once, so kinds add up to the time in which anything was done
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from distca.trace import KINDS, Kind, Span

FIRST_COUNTED: tuple[Kind, ...] = ("kernels", "send", "wait", "optimizer", "model", "ray", "plan", "wire")
"""Of what a worker's threads do at the same time, the first counts. Waiting comes before the model: a thread that waits
is one of those that take turns in the model's forward, so the others stand still. Threads that help come last."""
assert set(FIRST_COUNTED) == set(KINDS)


@dataclass(frozen=True, slots=True)
class Recording:
    """What one worker noted, by the driver's clock."""

    worker: str
    spans: list[Span]
    clock_error_s: float = 0.0
    """How far the clocks may be apart at most."""
    rank: int | None = None
    """Of a trainer."""
    server: int | None = None
    """Its number in the pool, where it serves."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One step of all workers, the driver last."""

    step: int
    start: float
    end: float
    recordings: list[Recording]
    predicted: np.ndarray | None = None  # (servers,) cost as planned; None where nothing was
    measured: np.ndarray | None = None  # (servers,) seconds in kernels

    def rows(self) -> dict[str, list[tuple[Kind, float, float]]]:
        """Each worker's moments without the driver's, as seconds since the step began and up to its end."""
        return {
            r.worker: [
                (kind, max(a, self.start) - self.start, min(b, self.end) - self.start)
                for kind, a, b in moments(r.spans)
                if b > self.start and a < self.end
            ]
            for r in self.recordings[:-1]
        }


def clock_shift(pings: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """What to add to another clock's times, and how wrong that is at most, from (asked, their time, answered)."""
    asked, theirs, answered = min(pings, key=lambda ping: ping[2] - ping[0])
    return (asked + answered) / 2 - theirs, (answered - asked) / 2


def moments(spans: Iterable[Span]) -> list[tuple[Kind, float, float]]:
    """A worker's spans as (kind, start, end), one after the other: the innermost span of each thread, and of several
    threads the first in `FIRST_COUNTED`. Moments in which nothing was noted are left out."""
    spans = sorted(spans, key=lambda s: (s.thread, s.start, -s.end))
    edges = np.unique([t for s in spans for t in (s.start, s.end)])
    nothing = len(FIRST_COUNTED)
    doing = np.full(max(0, len(edges) - 1), nothing)
    for _, of_thread in groupby(spans, key=lambda s: s.thread):
        mine = np.full_like(doing, nothing)
        for span in of_thread:  # outer ones first
            first, last = np.searchsorted(edges, (span.start, span.end))
            mine[first:last] = FIRST_COUNTED.index(span.kind)
        doing = np.minimum(doing, mine)
    borders = np.flatnonzero(np.diff(doing, prepend=-1, append=-1))  # pieces of one kind each
    return [
        (FIRST_COUNTED[doing[a]], float(edges[a]), float(edges[b]))
        for a, b in pairwise(borders.tolist())
        if doing[a] < nothing
    ]


def seconds_of(spans: Iterable[Span], start: float, end: float) -> dict[Kind, float]:
    """Seconds of each kind between two times."""
    found: dict[Kind, float] = {}
    for kind, a, b in moments(spans):
        if (inside := min(b, end) - max(a, start)) > 0:
            found[kind] = found.get(kind, 0.0) + inside
    return found


def summary(steps: Sequence[StepTrace]) -> tuple[list[str], list[list[str]]]:
    """A table of seconds per kind and worker, over all steps: its heading and its rows."""
    seconds: dict[str, dict[Kind, float]] = {}
    for step in steps:
        for r in step.recordings:
            total = seconds.setdefault(r.worker, {})
            for kind, s in seconds_of(r.spans, step.start, step.end).items():
                total[kind] = total.get(kind, 0.0) + s
    whole = sum(step.end - step.start for step in steps)
    shown = [kind for kind in KINDS if any(kind in of_worker for of_worker in seconds.values())]
    rows = [
        [worker, *(f"{of_worker.get(kind, 0.0):.3f}" for kind in shown), f"{whole - sum(of_worker.values()):.3f}"]
        for worker, of_worker in seconds.items()
    ]
    return ["", *shown, "none of these"], rows


def chrome_trace(steps: Sequence[StepTrace]) -> dict[str, Any]:
    """The steps in the Trace Event Format. Times are microseconds since the first step began."""
    zero = steps[0].start
    at = lambda seconds: round(1e6 * (seconds - zero), 3)  # noqa: E731
    workers = [
        replace(r, spans=[span for step in steps for span in step.recordings[n].spans])
        for n, r in enumerate(steps[0].recordings)
    ]
    events: list[dict[str, Any]] = []
    for pid, worker in enumerate(workers):
        threads = {name: tid for tid, name in enumerate(_threads_of(worker.spans))}
        name = worker.worker + (f" (clock ±{1e3 * worker.clock_error_s:.2f} ms)" if worker.clock_error_s else "")
        events.append(dict(ph="M", pid=pid, name="process_name", args=dict(name=name)))
        events.append(dict(ph="M", pid=pid, name="process_sort_index", args=dict(sort_index=pid)))
        for thread, tid in threads.items():
            events.append(dict(ph="M", pid=pid, tid=tid, name="thread_name", args=dict(name=thread)))
            events.append(dict(ph="M", pid=pid, tid=tid, name="thread_sort_index", args=dict(sort_index=tid)))
        for s in sorted(worker.spans, key=lambda s: (s.start, -s.end)):
            ts, tid = at(s.start), threads[s.thread]
            span = dict(ph="X", pid=pid, tid=tid, name=s.name, cat=s.kind, ts=ts, dur=round(at(s.end) - ts, 3))
            events.append(span | (dict(args=s.facts) if s.facts else {}))
    for number, message in enumerate(messages_of(workers)):
        events += _wire_events(number, message, workers, at)
    for step in steps:
        driver = dict(pid=len(workers) - 1, tid=0, name=f"step {step.step}", cat="ray", s="g")
        events.append(driver | dict(ph="i", ts=at(step.start)))
        if step.predicted is not None:
            events += _shares(step, workers, at(step.start))
    heading, rows = summary(steps)
    return dict(
        displayTimeUnit="ms",
        otherData=dict(
            steps=[step.step for step in steps],
            step_s=[round(step.end - step.start, 6) for step in steps],
            seconds={row[0]: dict(zip(heading[1:], map(float, row[1:]), strict=True)) for row in rows},
        ),
        traceEvents=events,
    )


def _threads_of(spans: Iterable[Span]) -> list[str]:
    """The main thread first, others by name."""
    return sorted({s.thread for s in spans}, key=lambda name: (name != "MainThread", name))


@dataclass(frozen=True, slots=True)
class Message:
    """Rows that crossed a link: the span that sent them, and the one that took them in,
    with their recordings' numbers."""

    sender: int
    sent: Span
    receiver: int
    taken: Span
    arrival: float
    """When they were there for certain; before, as far as nobody looked."""


ANSWER = "answer to "


def messages_of(workers: Sequence[Recording]) -> list[Message]:
    """Requests, from a trainer's `send` (fact `server`) to that server's `wire` of the same name (fact `rank`), or its
    `kernels` where there is none; answers, from its `send` (fact `rank`) to the trainer's `wait`."""
    of_rank = {r.rank: n for n, r in enumerate(workers) if r.rank is not None}
    of_server = {r.server: n for n, r in enumerate(workers) if r.server is not None}
    takes: dict[tuple, list[tuple[float, Span]]] = {}
    for n, worker in enumerate(workers):
        for s in worker.spans:
            if s.kind == "wire":
                takes.setdefault((n, "request", s.name, s.facts.get("rank")), []).append((s.end, s))
            elif s.kind == "kernels":
                takes.setdefault((n, "request", s.name, None), []).append((s.start, s))
            elif s.kind == "wait":
                takes.setdefault((n, "answer", s.name, s.facts.get("server")), []).append((s.end, s))
    found = []
    for n, worker in enumerate(workers):
        for s in worker.spans:
            if s.kind != "send":
                continue
            if "server" in s.facts:
                receiver = of_server.get(s.facts["server"])
                noted, computed = ((receiver, "request", s.name, who) for who in (worker.rank, None))
                key = noted if noted in takes else computed
            else:
                receiver = of_rank.get(s.facts.get("rank"))
                key = receiver, "answer", s.name.removeprefix(ANSWER), worker.server
            later = [take for take in takes.get(key, ()) if take[0] >= s.start]
            if receiver is not None and later:
                arrival, taken = min(later, key=lambda take: take[0])
                found.append(Message(n, s, receiver, taken, arrival))
    return found


def _wire_events(number: int, message: Message, workers: Sequence[Recording], at) -> list[dict[str, Any]]:
    """A bar of the time on the wire beside the sender's threads, and an arrow from span to span."""
    sender, receiver = workers[message.sender], workers[message.receiver]
    bar = dict(pid=message.sender, tid=0, cat="wire", name=f"to {receiver.worker}", id=number)
    arrow = dict(cat="wire", name="message", id=number)
    from_tid = _threads_of(sender.spans).index(message.sent.thread)
    to_tid = _threads_of(receiver.spans).index(message.taken.thread)
    inside = max(at(message.taken.start), round(at(message.arrival) - 0.001, 3))  # of the span that it ends at
    return [
        bar | dict(ph="b", ts=at(message.sent.start), args=dict(message=message.sent.name)),
        bar | dict(ph="e", ts=at(message.arrival)),
        arrow | dict(ph="s", pid=message.sender, tid=from_tid, ts=at(message.sent.start)),
        arrow | dict(ph="f", bp="e", pid=message.receiver, tid=to_tid, ts=inside),
    ]


def _shares(step: StepTrace, workers: Sequence[Recording], ts: float) -> list[dict[str, Any]]:
    """A counter per server: its percentage of the step's attention, as planned and by its clock."""
    of_load = lambda load: (100 * load / max(float(load.sum()), 1e-12)).round(2).tolist()  # noqa: E731
    predicted, measured = of_load(step.predicted), of_load(step.measured)
    counter = dict(ph="C", name="% of the step's attention", ts=ts)
    return [
        counter | dict(pid=pid, args=dict(predicted=predicted[r.server], measured=measured[r.server]))
        for pid, r in enumerate(workers)
        if r.server is not None
    ]
