"""What does an attention server do with the rows it is sent?

It keeps no parameter and no state that outlives a micro-batch: a request brings everything its answer needs, a backward
request q, k and v again. One thread per link waits for messages; a call is computed when the rows of all its trainers
are there.

    link to trainer 0   q k v ---+                             +--> out lse
    link to trainer 1   q k v ---+--> pack, attend the tasks --+--> out lse

A *dedicated* server has threads of its own for plans, computing and sending, so that all go on at the same time as
receiving. One *in place* has none: the trainer that it lives with computes its calls (`serve_call`) while it waits for
its own, in the order in which all trainers make them.

Plans are made ahead of the rows, from the same integers as the trainers', and a trainer whose digest differs is
refused.

On CUDA a server computes on the device's default stream, wherever it lives; rows that arrive are complete when they are
filed, and answers are sent beside later kernels, once their own are done (`streams.py`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from distca.kernels.attention import attend, attend_backward
from distca.kernels.merge import statistics_dtype
from distca.kernels.rows import Part, scatter
from distca.masks import Bands
from distca.parallel.link import (
    BACKWARD,
    DTYPES,
    FAILURE,
    FORWARD,
    PLAN,
    REPLY,
    Damaged,
    Header,
    Link,
    LinkError,
    Rows,
    unpack,
)
from distca.parallel.rows import on_device
from distca.parallel.streams import keep, mark, running_on, side_stream, to_host
from distca.plan import PlanInputs, combined_digest
from distca.planner import plan_directions
from distca.routes import ServerRoute, ServerRows, TrainerRows, routes_of
from distca.trace import Trace

# Shape suffixes: S rows of queries on the server, C rows of keys on the server, H query heads, G key/value heads, D
# head size.

logger = logging.getLogger(__name__)

Routes = dict[int, tuple[ServerRoute, ServerRoute]]
"""A micro-batch's, by mask window: forward and backward."""
Key = tuple[int, int, int]
"""Micro-batch, call, kind."""


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server did since it was last asked."""

    busy_s: float = 0.0
    """Seconds spent in kernels."""
    calls: int = 0
    pairs: int = 0
    """(query, key) pairs attended, forward and backward calls counted alike."""
    bytes_received: int = 0
    bytes_sent: int = 0


class AttentionServer:
    """Answers attention calls over its links; `rank` is the trainer that it lives with, None for a dedicated one."""

    def __init__(
        self,
        number: int,
        backend: str,
        device: torch.device,
        rank: int | None = None,
        meet: Callable[[set[int]], None] | None = None,
        deadline_s: float | None = None,
        trace: Trace | None = None,
    ):
        """`meet(ranks)` is called before a plan is followed that names trainers for the first time: it opens links and
        calls `serve`. In place, rows of other trainers are awaited for `deadline_s`."""
        self.number, self.rank = number, rank
        self._backend, self._device, self._meet, self._deadline_s = backend, device, meet, deadline_s
        self._trace = trace or Trace()
        self._links: dict[int, Link] = {}
        self._changed = threading.Condition()  # guards the state below; nothing slow happens under it
        self._routes: dict[int, Routes] = {}  # by micro-batch
        self._oldest = 0  # micro-batches before have been left by all trainers
        self._waiting: dict[Key, dict[int, tuple[Header, torch.Tensor]]] = {}
        self._lost: dict[int, LinkError] = {}
        self._report, self._events = ServerReport(), []
        self._planning, self._sending = side_stream(device), side_stream(device)
        self._plans: queue.SimpleQueue = queue.SimpleQueue()
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        if rank is None:
            for work, tasks in dict(plan=self._plans, compute=self._ready, send=self._answers).items():
                name = f"{work}, server {number}"
                threading.Thread(target=_work_forever, args=(tasks, self._fail), name=name, daemon=True).start()

    def serve(self, rank: int, link: Link) -> None:
        """Answer `rank` over `link`, on a thread of its own, until the link ends."""
        self._links[rank] = link
        name = f"receive from {rank}, server {self.number}"
        threading.Thread(target=self._listen, args=(rank, link), name=name, daemon=True).start()

    def adopt(self, step: int, routes: Routes, oldest: int) -> None:
        """Follow these routes in micro-batch `step`; those before `oldest` are over for all trainers."""
        routes = {window: tuple(on_device(r, self._device) for r in both) for window, both in routes.items()}
        named = {at.rank for both in routes.values() for route in both for at in route.links}
        if strangers := named - self._links.keys() - {self.rank}:
            self._meet(strangers)
        with self._changed:
            self._routes[step], self._oldest = routes, max(self._oldest, oldest)
            self._routes = {n: routes for n, routes in self._routes.items() if n >= self._oldest}
            self._waiting = {key: parts for key, parts in self._waiting.items() if key[0] >= self._oldest}
            for key in [key for key in self._waiting if key[0] == step]:
                self._start_if_ready(key)
            self._changed.notify_all()

    def take_report(self) -> ServerReport:
        """What happened since the last call of this method."""
        with self._changed:
            report, self._report = self._report, ServerReport()
            events, self._events = self._events, []
        for start, end in events:
            end.synchronize()
            report = replace(report, busy_s=report.busy_s + start.elapsed_time(end) / 1e3)
        for link in self._links.values():
            report = replace(
                report,
                bytes_received=report.bytes_received + link.bytes_received,
                bytes_sent=report.bytes_sent + link.bytes_sent,
            )
            link.bytes_received = link.bytes_sent = 0
        return report

    def attend(self, header: Header, rows: Sequence[torch.Tensor], tasks: Bands) -> tuple[torch.Tensor, ...]:
        """The tasks of a call, on rows that are here: out, lse or dq, dk, dv."""
        pairs = int(tasks.area().sum())
        with self._busy(pairs), self._trace.span("kernels", header.name(), server=self.number, pairs=pairs):
            options = dict(scale=header.scale, softcap=header.softcap, backend=self._backend)
            return (attend if header.kind == FORWARD else attend_backward)(*rows, tasks, **options)

    def route_of(self, header: Header) -> ServerRoute:
        """What a call needs here: whether anything, and of whom."""
        return self._routes[header.step][header.window][header.kind == BACKWARD]

    def is_ready(self, header: Header) -> bool:
        """Whether the rows of all other trainers are here."""
        others = sum(at.rank != self.rank for at in self.route_of(header).links)
        return len(self._waiting.get(header.key(), ())) == others

    def serve_call(self, header: Header, own: list[torch.Tensor] | None) -> list[Rows]:
        """Compute a call whose rows `wait_rows` has seen and answer the other trainers; the answer to one's `own` rows,
        if any."""
        route, result = self.route_of(header), []
        with self._changed:
            parts = self._waiting.pop(header.key(), {})
        try:
            for at, answer in self._answer(route, header, parts, own):
                if at.rank == self.rank:
                    result = answer
                else:
                    self._reply(at, header, answer)
        except Exception as error:
            self._fail(header, error)
            raise
        return result

    def wait_rows(self, header: Header) -> None:
        """Wait until the rows that a call needs from other trainers are here."""
        route, key = self.route_of(header), header.key()
        missing = lambda: {at.rank for at in route.links} - {self.rank, *self._waiting.get(key, ())}  # noqa: E731
        with self._changed, self._trace.span("wait", f"rows for {header.name()}", server=self.number):
            self._changed.wait_for(lambda: not missing() or missing() & self._lost.keys(), self._deadline_s)
            for rank in sorted(missing()):
                cause = f": {self._lost[rank]}" if rank in self._lost else f" within {self._deadline_s:g} s"
                raise LinkError(f"rank {self.rank} has no rows of trainer {rank} for {header.name()}{cause}")

    def _listen(self, rank: int, link: Link) -> None:
        try:
            while True:
                header, payload = link.wait_message()
                try:
                    with self._trace.span("wire", header.name(), rank=rank):  # where its way ended
                        self._take(rank, header, payload)
                except Exception as error:  # whatever it is, trainers must hear of it rather than wait
                    self._fail(header, error)
        except Damaged as error:
            self._fail(Header(FAILURE), error)
        except LinkError as error:
            logger.info("server %d: trainer %d has left: %s", self.number, rank, error)
            with self._changed:
                self._lost[rank] = error
                self._changed.notify_all()

    def _take(self, rank: int, header: Header, payload: torch.Tensor) -> None:
        """File a message; with the last one of its call, the call may be computed."""
        if header.kind == PLAN:
            self._plans.put((header, lambda: self._plan(rank, header, payload)))
            return
        assert header.kind in (FORWARD, BACKWARD), f"a server cannot answer a message of kind {header.kind}"
        with self._changed:
            assert header.step >= self._oldest, (
                f"trainer {rank} calls micro-batch {header.step}, which all trainers had left by {self._oldest}"
            )
            self._waiting.setdefault(header.key(), {})[rank] = (header, payload)
            self._start_if_ready(header.key())
            self._changed.notify_all()

    def _start_if_ready(self, key: Key) -> None:
        """A dedicated server's computing thread gets the call, if its plan and rows are here."""
        routes, parts = self._routes.get(key[0]), self._waiting[key]
        if self.rank is not None or routes is None:
            return
        header = next(iter(parts.values()))[0]
        assert header.window in routes, f"{header.name()} asks for window {header.window}, which nobody has announced"
        if self.is_ready(header):
            del self._waiting[key]
            self._ready.put((header, lambda: self._compute(self.route_of(header), header, parts)))

    def _plan(self, rank: int, header: Header, payload: torch.Tensor) -> None:
        with self._trace.span("plan", f"micro-batch {header.step}"):
            with running_on(self._planning):  # not behind kernels: the payload is complete
                inputs = PlanInputs.from_words(to_host(payload).view(torch.int64).numpy())
            routes = {}
            for rule in inputs.rules:
                forward, backward = plan_directions(inputs, rule)
                route = routes_of(forward).of_server(self.number)
                other = route if backward is forward else routes_of(backward).of_server(self.number)
                routes[rule.window] = (route, other)
        digest = combined_digest([route.digest for both in routes.values() for route in both])
        assert digest == header.digest, (
            f"trainer {rank} and server {self.number} made different plans for micro-batch {header.step} "
            f"({header.digest:016x} and {digest:016x}): they see different documents or run different versions"
        )
        self.adopt(header.step, routes, header.call)

    def _compute(self, route: ServerRoute, header: Header, parts: dict[int, tuple[Header, torch.Tensor]]) -> None:
        answers = list(self._answer(route, header, parts, None))
        computed = mark(self._device)
        for at, answer in answers:
            self._answers.put((header, lambda at=at, answer=answer: self._send(at, header, answer, computed)))

    def _send(self, at: TrainerRows, header: Header, answer: list[Rows], computed: torch.cuda.Event | None) -> None:
        """On the sending thread: not behind the kernels of later calls, which the default stream may have by now."""
        with running_on(self._sending, computed):
            self._reply(at, header, answer)
            keep(self._sending, [x.of for x in answer])

    def _reply(self, at: TrainerRows, header: Header, answer: list[Rows]) -> None:
        with self._trace.span("send", f"answer to {header.name()}", rank=at.rank):
            self._links[at.rank].send(replace(header, kind=REPLY), answer)

    def _answer(
        self,
        route: ServerRoute,
        header: Header,
        parts: dict[int, tuple[Header, torch.Tensor]],
        own: list[torch.Tensor] | None,
    ) -> Iterator[tuple[TrainerRows, list[Rows]]]:
        """Compute a call; each trainer's rows of the results."""
        for rank, (other, _) in parts.items():
            assert other.digest == route.digest, (
                f"trainer {rank} and server {self.number} made different plans for micro-batch {header.step} "
                f"({other.digest:016x} and {route.digest:016x}): they see different documents or run different versions"
            )
            assert other.asks_the_same(header), f"trainer {rank} calls another layer: {other}, not {header}"
        results = self.attend(header, self._assemble(route, header, parts, own), route.tasks)
        for at in route.links:
            yield at, rows_for(at, RESULTS[header.kind], results)

    def _assemble(
        self,
        route: ServerRoute,
        header: Header,
        parts: dict[int, tuple[Header, torch.Tensor]],
        own: list[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Every trainer's rows in their places: q, k, v, and for backward lse, delta, d_out. Padding is 0: kernels may
        read it."""
        shapes = request_shapes(header, route.num_q_rows, route.num_kv_rows)
        held = [sum(len(getattr(at, name)) for at in route.links) for name in ("q_rows", "kv_rows")]
        is_full = held == [route.num_q_rows, route.num_kv_rows]
        make = torch.empty if is_full else torch.zeros
        whole = [make(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
        for at in route.links:
            if at.rank == self.rank:
                received = own
            else:
                received = unpack(parts[at.rank][1], request_shapes(header, len(at.q_rows), len(at.kv_rows)))
            places = rows_for(at, REQUESTS[header.kind], whole)
            scatter([Part(*place, part) for place, part in zip(places, received, strict=True)])
        return whole

    @contextmanager
    def _busy(self, pairs: int) -> Iterator[None]:
        """Note the time that kernels take; on CUDA by events, which are read when somebody asks for the report."""
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            busy_s = 0.0
        else:
            start = time.perf_counter()
            yield
            busy_s, events = time.perf_counter() - start, None
        with self._changed:
            r = self._report
            self._report = replace(r, busy_s=r.busy_s + busy_s, calls=r.calls + 1, pairs=r.pairs + pairs)
            if events:
                self._events.append(events)

    def _fail(self, header: Header, error: Exception) -> None:
        """Tell every trainer what went wrong, those that wait for the same rows too; the run stops with this text."""
        logger.error("server %d cannot answer:\n%s", self.number, "".join(traceback.format_exception(error)))
        text = f"attention server {self.number}: {type(error).__name__}: {error}"
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        for link in list(self._links.values()):
            try:
                link.send(replace(header, kind=FAILURE), [data])
            except LinkError:
                pass  # that trainer is gone too, there is nobody left to tell


def _work_forever(tasks: queue.SimpleQueue, fail: Callable[[Header, Exception], None]) -> None:
    """A thread of a dedicated server: does what is put into its queue, in order."""
    while True:
        header, task = tasks.get()
        try:
            task()
        except Exception as error:
            fail(header, error)


# what a request and its answer hold, in their order on the wire
REQUESTS = {FORWARD: ("q", "k", "v"), BACKWARD: ("q", "k", "v", "lse", "delta", "d_out")}
RESULTS = {FORWARD: ("out", "lse"), BACKWARD: ("dq", "dk", "dv")}
OF_KEYS = {"k", "v", "dk", "dv"}


def rows_for(at: ServerRows | TrainerRows, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[Rows]:
    """Those rows of each tensor that go to the other side, or come from it. At home its adjoint is `collect`."""
    named = zip(names, tensors, strict=True)
    return [Rows(x, at.kv_rows if name in OF_KEYS else at.q_rows) for name, x in named]


def request_shapes(header: Header, num_q: int, num_kv: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a request's rows, in their order on the wire."""
    dtype = DTYPES[header.dtype]
    q_SHD = ((num_q, header.query_heads, header.head_dim), dtype)
    k_CGD = ((num_kv, header.kv_heads, header.head_dim), dtype)
    lse_SH = ((num_q, header.query_heads), statistics_dtype(dtype))
    return [q_SHD, k_CGD, k_CGD] if header.kind == FORWARD else [q_SHD, k_CGD, k_CGD, lse_SH, lse_SH, q_SHD]


def reply_shapes(header: Header, num_q: int, num_kv: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the answer to a request: out, lse or dq, dk, dv."""
    q_SHD, k_CGD, *_ = request_shapes(header, num_q, num_kv)
    lse_SH = ((num_q, header.query_heads), statistics_dtype(DTYPES[header.dtype]))
    return [q_SHD, lse_SH] if header.kind == FORWARD else [q_SHD, k_CGD, k_CGD]
