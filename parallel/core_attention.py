"""What does a model call in place of its own core attention?

`CoreAttention`, one per micro-batch on each trainer: it sends the rows of a call to the servers that the plan names and
brings the results home. Towards autograd it is two operators, so that other work fits between sending and waiting:

    forward   begin: send q k v  ......  end: wait for out lse, merge what several servers computed of one row
    backward  end: send q k v lse delta d_out  ......  begin: wait for dq dk dv, add what several return of one row

Sending rows out and adding them up at home are each other's adjoint, so backward follows the same routes with arrows
reversed.
"""

from __future__ import annotations

import itertools
import time
import weakref
from dataclasses import dataclass, field, replace

import torch

from distca.kernels.delta import delta_of
from distca.kernels.merge import merge, statistics_dtype
from distca.masks import MaskRule
from distca.parallel.link import (
    BACKWARD,
    DTYPE_CODES,
    DTYPES,
    FAILURE,
    FORWARD,
    PLAN,
    REPLY,
    Header,
    Link,
    LinkError,
    unpack,
)
from distca.parallel.server import reply_shapes
from distca.plan import PlanInputs
from distca.routes import TrainerRoute

# Shape suffixes: T rows on this rank, H query heads, G key/value heads, D head size.


@dataclass(slots=True)
class CallStatistics:
    """What a trainer's attention calls took since the start of the step."""

    calls: int = 0
    send_s: float = 0.0
    """Packing and posting rows."""
    wait_s: float = 0.0
    """Waiting for servers, with nothing else to do."""
    hidden_s: float = 0.0
    """From sending to waiting: other work that hid the servers'."""
    bytes_sent: int = 0
    bytes_received: int = 0


class Exchange:
    """A trainer's links to all servers, and the statistics of what crosses them."""

    def __init__(self, rank: int, links: dict[int, Link]):
        self.rank, self.links = rank, links
        self.statistics = CallStatistics()

    def take_statistics(self) -> CallStatistics:
        """What happened since the last call of this method."""
        taken, self.statistics = self.statistics, CallStatistics()
        for link in self.links.values():
            taken.bytes_sent += link.bytes_sent
            taken.bytes_received += link.bytes_received
            link.bytes_sent = link.bytes_received = 0
        return taken

    def announce(self, step: int, inputs: PlanInputs, digest: int) -> None:
        """Tell every server what the micro-batch's plans are made from, and what they must come to."""
        words = torch.from_numpy(inputs.to_words())
        for link in self.links.values():
            link.send(Header(PLAN, step, digest=digest), [words])

    def dispatch(self, route: TrainerRoute, header: Header, rows: list[torch.Tensor], is_kv: tuple[bool, ...]) -> None:
        """Home rows out to the servers that read them. Its adjoint is `collect`."""
        start = time.perf_counter()
        for at in route.links:
            index = [_index(at.kv_rows if kv else at.q_rows, row) for row, kv in zip(rows, is_kv, strict=True)]
            self.links[at.server].send(header, [row.index_select(0, i) for row, i in zip(rows, index, strict=True)])
        self.statistics.send_s += time.perf_counter() - start
        self.statistics.calls += 1

    def wait_replies(self, route: TrainerRoute, header: Header):
        """Yield (server's rows, tensors) in the plan's order of servers, whatever order they arrive in."""
        for at in route.links:
            start = time.perf_counter()
            reply, payload = self._wait_message(at.server)
            self.statistics.wait_s += time.perf_counter() - start
            if reply.kind == FAILURE:
                raise LinkError(payload.cpu().numpy().tobytes().rstrip(b"\0").decode())
            if (reply.kind, reply.step, reply.call) != (REPLY, header.step, header.call):
                raise LinkError(
                    f"rank {self.rank} waits for call {header.call} of micro-batch {header.step}, server {at.server} "
                    f"answers {reply}"
                )
            yield at, unpack(payload, reply_shapes(header, len(at.q_rows), len(at.kv_rows)))

    def _wait_message(self, server: int):
        try:
            return self.links[server].wait_message()
        except LinkError as error:
            raise LinkError(
                f"rank {self.rank} has lost attention server {server}, or a trainer whose rows it waits for: {error}"
            ) from None


def collect(home: torch.Tensor, rows, part: torch.Tensor) -> torch.Tensor:
    """Add a server's rows to the home rows they came from, in place; the adjoint of selecting them."""
    return home.index_add_(0, _index(rows, home), part.to(home.dtype))


@dataclass(eq=False)
class CoreAttention:
    """Core attention of one micro-batch on one rank. Models receive it as the keyword `distca`."""

    exchange: Exchange
    step: int
    """Micro-batch number."""
    routes: dict[MaskRule, tuple[TrainerRoute, TrainerRoute]]
    """Forward and backward."""
    _site: int = field(default_factory=itertools.count().__next__, init=False)
    _calls: itertools.count = field(default_factory=itertools.count, init=False)
    _pending: dict[int, Header] = field(default_factory=dict, init=False)

    def __post_init__(self):
        _sites[self._site] = self

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor:
        """softmax(q k^T) v under `rule`, exact over documents that span ranks: (T, H, D)."""
        call = next(self._calls)
        token = begin(q_THD, k_TGD, v_TGD, self._site, call, rule.window, scale, softcap)
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
        self.exchange.dispatch(route, header, [q, k, v], (False, True, True))

    def wait_forward(self, q: torch.Tensor, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        header = self._pending[call]
        route, statistics = self.routes[MaskRule(header.window)][0], statistics_dtype(q.dtype)
        out = torch.zeros(q.shape, dtype=q.dtype if route.rows_are_whole else statistics, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=statistics, device=q.device)
        for at, (part, part_lse) in self.exchange.wait_replies(route, header):
            rows = _index(at.q_rows, q)
            if route.rows_are_whole:
                out[rows], lse[rows] = part, part_lse
            else:
                out[rows], lse[rows] = merge(out[rows], lse[rows], part.to(statistics), part_lse)
        return out.to(q.dtype), lse

    def send_backward(self, q, k, v, out, lse, d_out, call: int) -> None:
        route = self.routes[MaskRule(self._pending[call].window)][1]
        header = self._pending[call] = replace(self._pending[call], kind=BACKWARD, digest=route.digest)
        rows = [q, k, v, lse, delta_of(out, d_out), d_out]
        self.exchange.dispatch(route, header, rows, (False, True, True, False, False, False))

    def wait_backward(self, q_shape: torch.Size, k_shape: torch.Size, device: torch.device, call: int):
        header = self._pending.pop(call)
        dtype = DTYPES[header.dtype]
        dq, dk, dv = (torch.zeros(s, dtype=statistics_dtype(dtype), device=device) for s in (q_shape, k_shape, k_shape))
        route = self.routes[MaskRule(header.window)][1]
        for at, (part_dq, part_dk, part_dv) in self.exchange.wait_replies(route, header):
            collect(dq, at.q_rows, part_dq)
            collect(dk, at.kv_rows, part_dk)
            collect(dv, at.kv_rows, part_dv)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# An operator's arguments are tensors and numbers, so a CoreAttention is named by its number; it lives as long as its
# micro-batch.
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
    q_THD, k_TGD, _v, ctx.site, ctx.call, *_ = inputs
    ctx.q_shape, ctx.k_shape, ctx.device = q_THD.shape, k_TGD.shape, q_THD.device


def _begin_backward(ctx, _d_token):
    gradients = _sites[ctx.site].wait_backward(ctx.q_shape, ctx.k_shape, ctx.device, ctx.call)
    return (*gradients, None, None, None, None, None)


def _end_context(ctx, inputs, output):
    _token, q_THD, k_TGD, v_TGD, ctx.site, ctx.call = inputs
    ctx.save_for_backward(q_THD, k_TGD, v_TGD, *output)


def _end_backward(ctx, d_out_THD, _d_lse):
    q_THD, k_TGD, v_TGD, out_THD, lse_TH = ctx.saved_tensors
    _sites[ctx.site].send_backward(q_THD, k_TGD, v_TGD, out_THD, lse_TH, d_out_THD.contiguous(), ctx.call)
    return d_out_THD.new_zeros(1), None, None, None, None, None


begin.register_autograd(_begin_backward, setup_context=_begin_context)
end.register_autograd(_end_backward, setup_context=_end_context)


def _index(rows, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rows).to(like.device)
