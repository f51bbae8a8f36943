"""What does a model call in place of its own core attention?

`CoreAttention`, one per micro-batch on each trainer: it sends the rows of a call to the servers that the plan names,
attends what is at home on the model's own tensors, and brings the results of the others home. Towards autograd it is
two operators, so that other work fits between sending and waiting:

    forward   begin: send q k v  ......  end: attend, wait for out lse, merge what several computed of one row
    backward  end: send q k v lse delta d_out  ......  begin: attend, wait for dq dk dv, add what several return

Sending rows out and adding them up at home are each other's adjoint, so backward follows the same routes with arrows
reversed. A trainer that serves computes in this order, on one thread, which is the same on all trainers:

    tasks at home  |  its share of the call, for others  |  what is there of calls begun since  |  wait, merge

with the first two the other way round where all rows for its share are there already: the others are ahead, and wait.
No trainer leaves a call before it has done its share, so nobody waits for one that waits elsewhere.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from distca.kernels.delta import delta_of
from distca.kernels.merge import merge, statistics_dtype
from distca.kernels.rows import Part, scatter
from distca.masks import MaskRule
from distca.parallel.link import (
    BACKWARD,
    DTYPE_CODES,
    FAILURE,
    FORWARD,
    PLAN,
    REPLY,
    Header,
    Link,
    LinkError,
    Rows,
    unpack,
)
from distca.parallel.server import REQUESTS, AttentionServer, reply_shapes, rows_for
from distca.parallel.strands import hand_over
from distca.plan import PlanInputs
from distca.routes import ServerRows, TrainerRoute
from distca.trace import Trace

# Shape suffixes: T rows on this rank, H query heads, G key/value heads, D head size.


@dataclass(slots=True)
class CallStatistics:
    """What a trainer's attention calls took since the start of the step."""

    calls: int = 0
    send_s: float = 0.0
    """Packing and posting rows."""
    wait_s: float = 0.0
    """Waiting for servers, and for rows of others: exposed."""
    hidden_s: float = 0.0
    """Between sending rows and waiting for their results: spent on other work."""
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(slots=True)
class BegunCall:
    """A call whose rows are on their way and whose results nobody has asked for yet."""

    header: Header
    route: TrainerRoute
    rows: list[torch.Tensor]  # see REQUESTS
    sent_at: float
    at_home: tuple[torch.Tensor, ...] | None = None  # results of the tasks at home
    served: bool = False
    own: list[Rows] = field(default_factory=list)  # results of what the trainer's own server did with its rows


class Exchange:
    """A trainer's links to servers, the server that lives with it, if any, and the statistics of what crosses them."""

    def __init__(
        self,
        rank: int,
        links: dict[int, Link],
        own: AttentionServer | None = None,
        trace: Trace | None = None,
    ):
        self.rank, self.links, self.own = rank, links, own
        self.statistics, self._trace = CallStatistics(), trace or Trace()
        self._begun: dict[tuple[int, int, int], BegunCall] = {}
        self._early: dict[tuple[int, int, int], torch.Tensor] = {}  # (server, step, call) -> payload of a reply

    def take_statistics(self) -> CallStatistics:
        """What happened since the last call of this method."""
        taken, self.statistics = self.statistics, CallStatistics()
        for link in self.links.values():
            taken.bytes_sent += link.bytes_sent
            taken.bytes_received += link.bytes_received
            link.bytes_sent = link.bytes_received = 0
        return taken

    def announce(self, server: int, step: int, inputs: PlanInputs, digest: int, oldest: int) -> None:
        """Tell a dedicated server what a micro-batch's plans are made from, and what they must come to; all trainers
        have left the micro-batches before `oldest`."""
        self.links[server].send(Header(PLAN, step, oldest, digest), [torch.from_numpy(inputs.to_words())])

    def begin(self, route: TrainerRoute, header: Header, rows: list[torch.Tensor]) -> None:
        """Home rows out to the servers that read them, and the call on the list."""
        start = time.perf_counter()
        for at in route.links:
            if not self._is_own(at):
                with self._trace.span("send", header.name(), server=at.server):
                    self.links[at.server].send(header, rows_for(at, REQUESTS[header.kind], rows))
        sent_at = time.perf_counter()
        self.statistics.send_s += sent_at - start
        self.statistics.calls += 1
        self._begun[header.key()] = BegunCall(header, route, rows, sent_at)

    def finish(self, header: Header) -> tuple[BegunCall, Iterator[tuple[ServerRows, list[torch.Tensor]]]]:
        """Attend what is at home and what others need, then wait: the call, and each server's rows of its results, in
        the plan's order of servers, whatever order they arrive in."""
        call = self._begun.pop(header.key())
        if self.own and self.own.is_ready(header):  # the others are ahead, and wait
            self._serve(call)
        self._attend_home(call)
        self._serve(call)
        for other in self._begun.values():
            self._attend_home(other)
            if self.own and self.own.is_ready(other.header):
                self._serve(other)
        if any(not self._is_own(at) for at in call.route.links):
            self.statistics.hidden_s += time.perf_counter() - call.sent_at
        return call, self._wait_results(call)

    def _is_own(self, at: ServerRows) -> bool:
        return self.own is not None and at.server == self.own.number

    def _attend_home(self, call: BegunCall) -> None:
        if call.at_home is None and len(call.route.home):
            call.at_home = self.own.attend(call.header, call.rows, call.route.home)

    def _serve(self, call: BegunCall) -> None:
        """Do one's share of a call: tasks of this server that need rows of others."""
        if call.served or self.own is None or not self.own.route_of(call.header).links:
            return
        start = time.perf_counter()
        self.own.wait_rows(call.header)
        self.statistics.wait_s += time.perf_counter() - start
        at = next((at for at in call.route.links if self._is_own(at)), None)
        own = [x.gathered() for x in rows_for(at, REQUESTS[call.header.kind], call.rows)] if at else None
        call.own, call.served = self.own.serve_call(call.header, own), True

    def _wait_results(self, call: BegunCall) -> Iterator[tuple[ServerRows, list[torch.Tensor]]]:
        header = call.header
        for at in call.route.links:
            if self._is_own(at):
                yield at, [x.gathered() for x in call.own]
                continue
            start = time.perf_counter()
            with self._trace.span("wait", header.name(), server=at.server):
                payload = self._wait_reply(at.server, header)
            self.statistics.wait_s += time.perf_counter() - start
            yield at, unpack(payload, reply_shapes(header, len(at.q_rows), len(at.kv_rows)))

    def _wait_reply(self, server: int, header: Header) -> torch.Tensor:
        """The server's answer to a call; those to other calls, which need fewer trainers' rows, may come before it."""
        while (server, header.step, header.call) not in self._early:
            reply, payload = self._wait_message(server)
            if reply.kind == FAILURE:
                raise LinkError(payload.cpu().numpy().tobytes().rstrip(b"\0").decode())
            if reply.kind != REPLY:
                raise LinkError(
                    f"rank {self.rank} waits for call {header.call} of micro-batch {header.step}, server {server} "
                    f"sends {reply}"
                )
            self._early[server, reply.step, reply.call] = payload
        return self._early.pop((server, header.step, header.call))

    def _wait_message(self, server: int):
        try:
            return self.links[server].wait_message()
        except LinkError as error:
            raise LinkError(
                f"rank {self.rank} has lost attention server {server}, or a trainer whose rows it waits for: {error}"
            ) from None


def collect(home: torch.Tensor, rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Add a server's rows to the home rows they came from, in place; the adjoint of selecting them."""
    return home.index_add_(0, rows, part.to(home.dtype))


@dataclass(eq=False)
class CoreAttention:
    """Core attention of one micro-batch on one rank. Models receive it as the keyword `distca`."""

    exchange: Exchange
    step: int
    """Micro-batch number."""
    routes: dict[MaskRule, tuple[TrainerRoute, TrainerRoute]]
    """Forward and backward, with tensors for row numbers (`on_device`)."""
    _site: int = field(default_factory=itertools.count().__next__, init=False)
    _calls: itertools.count = field(default_factory=itertools.count, init=False)
    _pending: dict[int, Header] = field(default_factory=dict, init=False)

    def __post_init__(self):
        _sites[self._site] = self

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor:
        """softmax(q k^T) v under `rule`, exact over documents that span ranks: (T, H, D)."""
        call = next(self._calls)
        token = begin(q_THD, k_TGD, v_TGD, self._site, call, rule.window, scale, softcap)
        hand_over()
        out_THD, _lse = end(token, q_THD.detach(), k_TGD.detach(), v_TGD.detach(), self._site, call)
        return out_THD

    def send_forward(self, q, k, v, call: int, window: int, scale: float, softcap: float) -> None:
        route = self.routes[MaskRule(window)][0]
        header = Header(
            FORWARD,
            self.step,
            call,
            route.digest,
            window,
            q.shape[1],
            k.shape[1],
            q.shape[2],
            DTYPE_CODES[q.dtype],
            scale,
            softcap,
        )
        self._pending[call] = header
        self.exchange.begin(route, header, [q, k, v])

    def wait_forward(self, q: torch.Tensor, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        begun, results = self.exchange.finish(self._pending[call])
        stats, shared = statistics_dtype(q.dtype), begun.route.shared
        out, lse = begun.at_home or (
            torch.zeros_like(q),
            torch.full(q.shape[:2], -torch.inf, dtype=stats, device=q.device),
        )
        some_out, some_lse = out.index_select(0, shared).to(stats), lse.index_select(0, shared)
        for at, (part, part_lse) in results:
            if len(at.shared):
                both = some_out[at.into], some_lse[at.into], part[at.shared].to(stats), part_lse[at.shared]
                some_out[at.into], some_lse[at.into] = merge(*both)
                rows, part, part_lse = at.q_rows[at.alone], part[at.alone], part_lse[at.alone]
            else:
                rows = at.q_rows
            scatter([Part(out, rows, part), Part(lse, rows, part_lse)])
        if len(shared):
            out.index_copy_(0, shared, some_out.to(q.dtype))
            lse.index_copy_(0, shared, some_lse)
        return out, lse

    def send_backward(self, q, k, v, out, lse, d_out, call: int) -> None:
        route = self.routes[MaskRule(self._pending[call].window)][1]
        header = self._pending[call] = replace(self._pending[call], kind=BACKWARD, digest=route.digest)
        self.exchange.begin(route, header, [q, k, v, lse, delta_of(out, d_out), d_out])

    def wait_backward(self, call: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        begun, results = self.exchange.finish(self._pending.pop(call))
        q, k, v, *_ = begun.rows
        if not begun.route.links:
            return begun.at_home
        dtype, stats = q.dtype, statistics_dtype(q.dtype)
        if begun.at_home:
            dq, dk, dv = (x.to(stats) for x in begun.at_home)
        else:
            dq, dk, dv = (torch.zeros_like(x, dtype=stats) for x in (q, k, v))
        for at, (part_dq, part_dk, part_dv) in results:
            collect(dq, at.q_rows, part_dq)
            collect(dk, at.kv_rows, part_dk)
            collect(dv, at.kv_rows, part_dv)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# An operator's arguments are tensors and numbers, so a CoreAttention is named by its number;
# it lives as long as its micro-batch.
_sites: weakref.WeakValueDictionary[int, CoreAttention] = weakref.WeakValueDictionary()


@torch.library.custom_op("distca::begin", mutates_args=())
def begin(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    site: int,
    call: int,
    window: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Send a call's rows; returns a token (1,) that stands for the answer on its way."""
    _sites[site].send_forward(q_THD, k_TGD, v_TGD, call, window, scale, softcap)
    return q_THD.new_zeros(1)


@torch.library.custom_op("distca::end", mutates_args=())
def end(
    token: torch.Tensor, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, site: int, call: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wait for a call's answer: out (T, H, D) and lse (T, H). Gradients of q, k, v leave through `begin`."""
    return _sites[site].wait_forward(q_THD, call)


def _begin_context(ctx, inputs, output):
    _q, _k, _v, ctx.site, ctx.call, *_ = inputs


def _begin_backward(ctx, _d_token):
    return (*_sites[ctx.site].wait_backward(ctx.call), None, None, None, None, None)


def _end_context(ctx, inputs, output):
    _token, q_THD, k_TGD, v_TGD, ctx.site, ctx.call = inputs
    ctx.save_for_backward(q_THD, k_TGD, v_TGD, *output)


def _end_backward(ctx, d_out_THD, _d_lse):
    q_THD, k_TGD, v_TGD, out_THD, lse_TH = ctx.saved_tensors
    _sites[ctx.site].send_backward(q_THD, k_TGD, v_TGD, out_THD, lse_TH, d_out_THD.contiguous(), ctx.call)
    return d_out_THD.new_zeros(1), None, None, None, None, None


begin.register_autograd(_begin_backward, setup_context=_begin_context)
end.register_autograd(_end_backward, setup_context=_end_context)
