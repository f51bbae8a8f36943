"""A trace shows what was noted, on one clock, and any viewer can read it."""

import gzip
import json
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from team import Team, make_settings

from distca.launch.folder.trace import (
    FIRST_COUNTED,
    Recording,
    StepTrace,
    chrome_trace,
    clock_shift,
    messages_of,
    moments,
    seconds_of,
    summary,
)
from distca.launch.run.recorder import Recorder
from distca.order import Cursor
from distca.trace import KINDS, Span, Trace, read_clock


@st.composite
def spans_of_a_thread(draw, thread, start=0, end=64, depth=3):
    """Spans that nest, as a thread notes them, between whole numbers."""
    found, at = [], start
    while depth and at < end and draw(st.booleans()):
        a = draw(st.integers(at, end))
        b = draw(st.integers(a, end))
        found += draw(spans_of_a_thread(thread, a, b, depth - 1))
        found.append(Span(draw(st.sampled_from(KINDS)), "x", thread, float(a), float(b)))
        at = b + 1
    return found


spans_of_a_worker = st.tuples(*(spans_of_a_thread(name) for name in ("MainThread", "compute", "plan"))).map(
    lambda threads: [span for spans in threads for span in spans]
)


def doing(spans, time):
    """What counts at a moment: each thread's innermost span, then the first in the order of counting."""
    innermost = {}
    for span in sorted(spans, key=lambda s: s.start - s.end):
        if span.start <= time < span.end:
            innermost[span.thread] = span.kind
    return min(innermost.values(), key=FIRST_COUNTED.index, default=None)


@settings(max_examples=60, deadline=None)
@given(spans_of_a_worker)
def test_each_moment_of_a_worker_counts_once(spans):
    found = moments(spans)
    assert all(a < b for _, a, b in found) and all(x[2] <= y[1] for x, y in pairwise(found))
    shown = {n: kind for kind, a, b in found for n in range(int(a), int(b))}
    assert [shown.get(n) for n in range(64)] == [doing(spans, n + 0.5) for n in range(64)]
    seconds = seconds_of(spans, 10.0, 50.0)
    assert seconds == {kind: n for kind in KINDS if (n := sum(doing(spans, t + 0.5) == kind for t in range(10, 50)))}


@given(st.floats(-1e6, 1e6), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_two_clocks_are_no_further_apart_than_said(ahead, ways):
    """However long a question and its answer are on their ways."""
    asked_at = [10.0 * n for n in range(len(ways))]
    pings = [(t, t + there + ahead, t + there + back) for t, (there, back) in zip(asked_at, ways, strict=True)]
    shift, error_s = clock_shift(pings)
    assert abs(shift + ahead) <= error_s + 1e-6 and error_s <= min(map(sum, ways)) / 2 + 1e-6


def recordings(*spans_of_workers):
    """Two trainers, two dedicated servers, and the driver."""
    names = (("trainer 0", 0, None), ("trainer 1", 1, None), ("server 0", None, 0), ("server 1", None, 1))
    found = [Recording(name, spans, 0.0, *where) for (name, *where), spans in zip(names, spans_of_workers, strict=True)]
    return [*found, Recording("driver", [Span("ray", "step", "MainThread", 0.0, 64.0)])]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[spans_of_a_worker] * 4), min_size=1, max_size=2))
def test_any_spans_become_a_valid_trace(steps):
    """Known kinds, no negative durations, spans of a track inside each other or apart, in the order of their starts."""
    load, busy_s = np.array([3, 1]), np.array([0.5, 0.5])
    made = [
        StepTrace(20 + n, 64.0 * n, 64.0 * (n + 1), recordings(*shifted(workers, 64.0 * n)), load, busy_s)
        for n, workers in enumerate(steps)
    ]
    trace = json.loads(json.dumps(chrome_trace(made), allow_nan=False))
    check_trace(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["trainer 0", "trainer 1", "server 0", "server 1", "driver"]
    spans = [s for step in steps for worker in step for s in worker]
    assert sum(e["ph"] == "X" for e in trace["traceEvents"]) == len(spans) + len(steps)
    shares = [e["args"] for e in trace["traceEvents"] if e["ph"] == "C"]
    assert shares == [dict(predicted=75, measured=50), dict(predicted=25, measured=50)] * len(steps)
    assert trace["otherData"]["steps"] == [step.step for step in made]


def shifted(workers, by):
    return [[Span(s.kind, s.name, s.thread, s.start + by, s.end + by) for s in spans] for spans in workers]


def check_trace(trace):
    events = trace["traceEvents"]
    tracks = {}
    for e in events:
        assert e["ph"] == "M" or e["ph"] == "C" or e["cat"] in KINDS, e
        if e["ph"] == "X":
            assert e["dur"] >= 0
            tracks.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in tracks.values():
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        open_until = []
        for start, end in spans:
            while open_until and open_until[-1] <= start + 0.002:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 0.002, "spans of one thread overlap"
            open_until.append(end)
    begun = {e["id"]: e["ts"] for e in events if e["ph"] == "b"}
    assert all(e["ts"] >= begun.pop(e["id"]) for e in events if e["ph"] == "e") and not begun
    arrows = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    assert all(e["ts"] >= arrows.pop(e["id"]) - 0.002 for e in events if e["ph"] == "f") and not arrows
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert set(tracks) <= threads


def span(kind, name, start, end, thread="MainThread", **facts):
    return Span(kind, name, thread, start, end, facts)


PLACES = [(0, None), (1, None), (None, 0)]
OPTIMIZER = "reduce gradients, update weights"
CALL = "forward call 3 of micro-batch 7"
ANSWER = f"answer to {CALL}"


def workers_of_a_call(*arrivals):
    """Trainer 1's rows go to server 0, which takes them from 2 to 3 and answers; trainer 0 sends another call's."""
    serving = [span("kernels", CALL, 2.0, 3.0, "compute"), span("send", ANSWER, 3.0, 3.1, "send", rank=1)]
    return recordings(
        [span("send", "forward call 4 of micro-batch 7", 0.0, 0.5, server=0)],
        [span("send", CALL, 1.0, 1.2, server=0), span("wait", CALL, 1.2, 5.0, server=0)],
        [*arrivals, *serving],
        [span("kernels", CALL, 1.0, 9.0)],
    )


def test_a_message_goes_from_its_sending_to_where_it_was_taken_in():
    request, answer = messages_of(workers_of_a_call())
    assert (request.sender, request.receiver, request.sent.start, request.arrival) == (1, 2, 1.0, 2.0)
    assert (answer.sender, answer.receiver, answer.sent.start, answer.arrival) == (2, 1, 3.0, 5.0)
    noted = [span("wire", CALL, end - 0.1, end, f"receive from {n}", rank=n) for n, end in ((1, 1.6), (0, 1.2))]
    request, _ = messages_of(workers_of_a_call(*noted))
    assert request.arrival == 1.6
    trace = chrome_trace([StepTrace(1, 0.0, 10.0, workers_of_a_call(*noted))])
    check_trace(trace)
    bars = [(e["pid"], e["name"], e["ts"]) for e in trace["traceEvents"] if e["ph"] == "b"]
    assert bars == [(1, "to server 0", 1e6), (2, "to trainer 1", 3e6)]


def test_an_answer_to_oneself_is_no_message_of_another():
    """In place every trainer is a server too: its own `send` says to which server, its server's to which rank."""
    asking = [span("send", CALL, 0.0, 0.1, server=1), span("wait", CALL, 0.2, 0.9, server=1)]
    answering = [span("kernels", CALL, 0.3, 0.5, server=1), span("send", ANSWER, 0.5, 0.6, rank=0)]
    both = [Recording(f"trainer {n}", spans, 0.0, n, n) for n, spans in enumerate((asking, answering))]
    assert [(m.sender, m.receiver, m.arrival) for m in messages_of(both)] == [(0, 1, 0.3), (1, 0, 0.9)]


def test_a_summary_says_where_the_seconds_of_each_worker_went():
    heading, rows = summary([StepTrace(1, 0.0, 10.0, workers_of_a_call())])
    assert heading == ["", "send", "wait", "kernels", "ray", "none of these"]
    seconds = {row[0]: dict(zip(heading[1:], map(float, row[1:]), strict=True)) for row in rows}
    assert seconds["trainer 1"] == {"send": 0.2, "wait": 3.8, "kernels": 0, "ray": 0, "none of these": 6.0}
    assert seconds["server 0"]["kernels"] == 1.0 and seconds["driver"]["ray"] == 10.0


class FarWorker:
    """A worker whose machine's clock is ahead."""

    def __init__(self, name, ahead=0.0):
        self.name, self.ahead, self.trace = name, ahead, Trace()

    def __str__(self):
        return self.name

    def record(self, is_on):
        moved = [(s, s.start + self.ahead, s.end + self.ahead) for s in self.trace.record(is_on)]
        return [Span(s.kind, s.name, s.thread, start, end, s.facts) for s, start, end in moved]

    def read_clock(self):
        machine, now = read_clock()
        return (f"not {machine}", now + self.ahead) if self.ahead else (machine, now)


class LocalRecorder(Recorder):
    """Asks workers that are objects here."""

    def _ask(self, workers, method, *arguments):
        return [getattr(worker, method)(*arguments) for worker in workers]


def run_steps(recorder, workers, steps, wanted=()):
    found = {}
    for step in steps:
        recorder.start(step, step in wanted)
        for worker in workers:
            with worker.trace.span("model", f"step {step}"):
                pass
        found[step] = recorder.finish(step, np.array([2, 1]), (0.2, 0.1))
    return found


def test_steps_are_recorded_where_somebody_looks_and_the_runs_trace_is_written(tmp_path):
    trainers = [FarWorker("trainer 0"), FarWorker("trainer 1", ahead=1000.0)]
    names = {"trainer 0": "trainer 0 on …1", "trainer 1": "trainer 1 on …2"}
    recorder = LocalRecorder(tmp_path, (4, 6), trainers, trainers, names)
    found = run_steps(recorder, trainers, range(1, 9), wanted=[2])
    assert [step for step, recorded in found.items() if recorded] == [2, 4, 5, 6]
    for step in (2, 4, 5, 6):
        first, second, driver = found[step].recordings
        assert [s.name for r in (first, second) for s in r.spans] == [f"step {step}"] * 2
        assert first.clock_error_s == 0 < second.clock_error_s < 0.1
        slack = second.clock_error_s
        assert found[step].start - slack <= second.spans[0].start <= second.spans[0].end <= found[step].end + slack
    assert not any(worker.trace.is_on for worker in trainers)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "steps-4-6.json.gz"
    trace = json.loads(gzip.open(path).read())
    check_trace(trace)
    assert sorted({e["name"] for e in trace["traceEvents"] if e["ph"] == "X"}) == ["step 4", "step 5", "step 6"]
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert [name.partition(" ±")[0] for name in names] == ["trainer 0 on …1", "trainer 1 on …2 (clock", "driver"]


def test_a_run_that_ends_early_leaves_what_there_is_of_its_trace(tmp_path):
    workers = [FarWorker("trainer 0")]
    recorder = LocalRecorder(tmp_path, (2, 9), workers, workers)
    run_steps(recorder, workers, range(1, 4))
    recorder.close()
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["steps-2-3.json.gz"]


def test_a_run_without_traced_steps_asks_nobody(tmp_path):
    recorder = LocalRecorder(tmp_path, None, [object()], [])
    assert [recorder.start(1, False), recorder.finish(1, None, ())] == [None, None]
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_threads_note_their_own_spans_and_nothing_while_it_is_off():
    trace = Trace()

    def work():
        with trace.span("kernels", "x", pairs=3), trace.span("send", "y"):
            pass

    work()
    assert trace.record(True) == []
    threads = [threading.Thread(target=work, name=f"compute {n}") for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = trace.record(False)
    assert {s.thread for s in spans} == {f"compute {n}" for n in range(3)} and len(spans) == 6
    assert {s.kind: s.facts for s in spans} == {"kernels": {"pairs": 3}, "send": {}}
    work()
    assert trace.take() == []


@pytest.mark.slow
def test_a_steps_trace_shows_what_trainers_and_servers_did(tmp_path):
    parallel = dict(trainers=2, servers=1, trainers_serve=False)
    train = dict(tokens_per_step=400, accumulation=2)
    with Team(make_settings(tmp_path, [150, 30, 20, 200], train=train, parallel=parallel)) as team:
        everybody = [*team.trainers, *team.servers]
        clocks = {clock for clock, _ in team.ask(everybody, "read_clock")}
        team.ask(team.trainers, "seek", 1, Cursor())
        team.ask(team.trainers, "step")
        team.ask(everybody, "record", True)
        _, start = read_clock()
        reports = team.ask(team.trainers, "step")
        _, end = read_clock()
        noted = team.ask(everybody, "record", False)
        team.ask(team.trainers, "step")
        assert team.ask(everybody, "record", False) == [[], [], []]
    assert clocks == {read_clock()[0]}, "processes of one machine share a clock"
    made = [Recording(f"worker {n}", spans, 0.0, *PLACES[n]) for n, spans in enumerate(noted)]
    assert reports[0].load_packed.sum() == reports[0].plan.load.sum() == reports[1].plan.load.sum() > 0
    step = StepTrace(2, start, end, [*made, Recording("driver", [])], reports[0].plan.load, np.array([0.1]))
    check_trace(json.loads(json.dumps(chrome_trace([step]))))
    for spans in noted[:2]:
        in_order = [(s.kind, s.name) for s in sorted(spans, key=lambda s: s.start) if s.kind in ("model", "optimizer")]
        assert in_order == [("model", "forward"), ("model", "backward"), ("optimizer", OPTIMIZER)] * 2
        assert all(start <= s.start <= s.end for s in spans) and all(s.end <= end for s in spans if s.kind != "plan")
        assert {s.thread for s in spans if s.kind == "plan"} == {"plan-ahead_0"}
