"""What does an attention server do with the rows it is sent?

It keeps no parameter and no state that outlives a micro-batch: a request brings everything its answer needs, a backward
request q, k and v again. One thread per link waits for messages; when the rows of all trainers of a call are there, one
thread computes.

    link to trainer 0   plan | q k v ---+                            +--> out lse
    link to trainer 1   plan | q k v ---+--> pack, attend the tasks --+--> out lse

The server makes the same plan from the same integers as its trainers, and refuses a trainer whose digest differs.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from dataclasses import dataclass, replace

import torch

from distca.kernels.attention import attend, attend_backward
from distca.kernels.merge import statistics_dtype
from distca.masks import MaskRule
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
    unpack,
)
from distca.plan import PlanInputs, combined_digest
from distca.planner import plan_directions
from distca.routes import ServerRoute, TrainerRows, routes_of

# Shape suffixes: S rows of queries on the server, C rows of keys on the server, H query heads, G key/value heads, D
# head size.

logger = logging.getLogger(__name__)


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
    """Answers attention calls over its links, for dedicated workers and in-place servers alike."""

    def __init__(self, number: int, backend: str, device: torch.device):
        self._number, self._backend, self._device = number, backend, device
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()  # of the state below; nothing slow happens under it
        self._planning = threading.Lock()
        # micro-batch -> mask window -> route forward and backward
        self._routes: dict[int, dict[int, tuple[ServerRoute, ServerRoute]]] = {}
        self._announced: dict[int, int] = {}  # rank -> the micro-batch it is in
        self._waiting: dict[tuple[int, int, int], dict[int, tuple[Header, torch.Tensor]]] = {}
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._report = ServerReport()
        threading.Thread(target=self._compute_forever, name=f"attention-server-{number}", daemon=True).start()

    def serve(self, rank: int, link: Link) -> None:
        """Answer `rank` over `link`, on a thread of its own, until the link ends."""
        self._links[rank] = link
        threading.Thread(
            target=self._listen, args=(rank, link), name=f"link-{rank}-{self._number}", daemon=True
        ).start()

    def take_report(self) -> ServerReport:
        """What happened since the last call of this method."""
        with self._lock:
            report, self._report = self._report, ServerReport()
            for link in self._links.values():
                report = replace(
                    report,
                    bytes_received=report.bytes_received + link.bytes_received,
                    bytes_sent=report.bytes_sent + link.bytes_sent,
                )
                link.bytes_received = link.bytes_sent = 0
            return report

    def _listen(self, rank: int, link: Link) -> None:
        try:
            while True:
                header, payload = link.wait_message()
                try:
                    self._take(rank, header, payload)
                except Exception as error:  # whatever it is, trainers must hear of it rather than wait
                    self._fail(header, error)
        except Damaged as error:
            self._fail(Header(FAILURE), error)
        except LinkError as error:
            logger.info("server %d: trainer %d has left: %s", self._number, rank, error)

    def _take(self, rank: int, header: Header, payload: torch.Tensor) -> None:
        """File a message; when it is the last one of its call, hand the call to the computing thread."""
        if header.kind == PLAN:
            return self._take_plan(rank, header, payload)
        assert header.kind in (FORWARD, BACKWARD), f"a server cannot answer a message of kind {header.kind}"
        key = (header.step, header.call, header.kind)
        with self._lock:
            routes = self._routes.get(header.step, {}).get(header.window)
            assert routes, (
                f"trainer {rank} calls micro-batch {header.step}, window {header.window}: nobody announced it"
            )
            route, parts = routes[header.kind == BACKWARD], self._waiting.setdefault(key, {})
            parts[rank] = (header, payload)
            if len(parts) < len(route.links):
                return
            del self._waiting[key]
        self._ready.put((route, parts))

    def _take_plan(self, rank: int, header: Header, payload: torch.Tensor) -> None:
        inputs = PlanInputs.from_words(payload.cpu().view(torch.int64).numpy())
        with self._lock:
            self._announced[rank] = header.step
        with self._planning:  # the first to announce has it planned, the others find the plan
            routes = self._routes.get(header.step)
            if routes is None:
                routes = {rule.window: self._routes_of(inputs, rule) for rule in inputs.rules}
                with self._lock:
                    self._routes[header.step] = routes
        digest = combined_digest([route.digest for both in routes.values() for route in both])
        self._forget_plans(inputs.num_ranks)
        assert digest == header.digest, (
            f"trainer {rank} and server {self._number} made different plans for micro-batch {header.step} "
            f"({header.digest:016x} and {digest:016x}): they see different documents or run different versions"
        )

    def _routes_of(self, inputs: PlanInputs, rule: MaskRule) -> tuple[ServerRoute, ServerRoute]:
        forward, backward = plan_directions(inputs, rule)
        route = routes_of(forward).of_server(self._number)
        return route, route if backward is forward else routes_of(backward).of_server(self._number)

    def _forget_plans(self, num_ranks: int) -> None:
        """Drop the micro-batches that every trainer has left: between optimizer steps one may be many ahead of
        another."""
        with self._lock:
            if len(self._announced) < num_ranks:
                return
            oldest = min(self._announced.values()) // 2 * 2  # the two micro-batches of a pass run at once
            self._routes = {step: routes for step, routes in self._routes.items() if step >= oldest}
            self._waiting = {key: parts for key, parts in self._waiting.items() if key[0] >= oldest}

    def _compute_forever(self) -> None:
        while True:
            route, parts = self._ready.get()
            try:
                self._compute(route, parts)
            except Exception as error:
                self._fail(next(iter(parts.values()))[0], error)

    def _compute(self, route: ServerRoute, parts: dict[int, tuple[Header, torch.Tensor]]) -> None:
        header = next(iter(parts.values()))[0]
        for rank, (other, _) in parts.items():
            same = other.asks_the_same(header) and other.digest == route.digest
            assert same, f"trainer {rank} follows another plan or calls another layer: {other}, not {header}"
        rows = self._assemble(route, header, parts)
        start = time.perf_counter()
        options = dict(scale=header.scale, softcap=header.softcap, backend=self._backend)
        results = (attend if header.kind == FORWARD else attend_backward)(*rows, route.tasks, **options)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        busy_s = time.perf_counter() - start
        pairs = int(route.tasks.area().sum())
        with self._lock:
            r = self._report
            self._report = replace(r, busy_s=r.busy_s + busy_s, calls=r.calls + 1, pairs=r.pairs + pairs)
        for at in route.links:
            self._links[at.rank].send(replace(header, kind=REPLY), self._results_for(at, header.kind, results))

    def _assemble(
        self, route: ServerRoute, header: Header, parts: dict[int, tuple[Header, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Every trainer's rows in their places: q, k, v, and for backward lse, delta, d_out. Padding is 0: kernels may
        read it."""
        row_shapes = request_shapes(header, route.num_q_rows, route.num_kv_rows)
        rows = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in row_shapes]
        for at in route.links:
            received = unpack(parts[at.rank][1], request_shapes(header, len(at.q_rows), len(at.kv_rows)))
            for name, whole, part in zip(REQUEST_ROWS, rows, received, strict=False):
                whole[self._index(at, name in ("k", "v"))] = part
        return rows

    def _results_for(self, at: TrainerRows, kind: int, results: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        is_kv = (False, False) if kind == FORWARD else (False, True, True)  # out, lse; dq, dk, dv
        return [rows[self._index(at, kv)] for rows, kv in zip(results, is_kv, strict=True)]

    def _index(self, at: TrainerRows, kv: bool) -> torch.Tensor:
        return torch.from_numpy(at.kv_rows if kv else at.q_rows).to(self._device)

    def _fail(self, header: Header, error: Exception) -> None:
        """Tell every trainer what went wrong, those that wait for the same rows too; the run stops with this text."""
        logger.error("server %d cannot answer:\n%s", self._number, traceback.format_exc())
        text = f"attention server {self._number}: {type(error).__name__}: {error}"
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        for link in list(self._links.values()):
            try:
                link.send(replace(header, kind=FAILURE), [data])
            except LinkError:
                pass  # that trainer is gone too, there is nobody left to tell


REQUEST_ROWS = ("q", "k", "v", "lse", "delta", "d_out")  # the order on the wire; forward requests end after v


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
