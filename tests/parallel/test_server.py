"""A server answers trainers that are not in step, forgets what they have left, and says aloud what it cannot answer."""

import gc
import queue
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from dense import dense_attention
from in_process import Sites, attend_distributed, attention_of_ranks, make_exchanges
from local_link import LocalLink
from torch.utils.checkpoint import checkpoint

from distca.masks import MaskRule
from distca.parallel.link import FAILURE, FORWARD, Damaged, Header, LinkError
from distca.parallel.server import AttentionServer
from distca.plan import PlanInputs, make_pool

AT_HOME = PlanInputs(np.array([40, 40]), (MaskRule(),), 2, make_pool(2, 0, True), 20_000, 16)  # nothing moves


def rows(seed=0, tokens=40):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 2, 8, generator=g, dtype=torch.float64) for _ in range(4)]


def announce(exchange, step, oldest=0):
    return attention_of_ranks([exchange], AT_HOME, step, oldest)[0]


def attend(site):
    """One rank's forward and backward of a micro-batch in which no rank needs another."""
    q, k, v, d_out = rows(site.step)
    out, *_ = attend_distributed(Sites([site], torch.arange(40)), q, k, v, d_out)
    torch.testing.assert_close(out, dense_attention(q, k, v, [40]))


def test_trainers_may_be_many_micro_batches_apart():
    """With ZeRO 0 and 1 nothing joins trainers within an optimizer step. The server once kept the plans of four
    micro-batches: the trainer that was five behind found its plan gone, and the run ended with KeyError."""
    exchanges, servers = make_exchanges(2, AT_HOME.pool)
    behind = announce(exchanges[1], 0)
    for step in range(12):
        attend(announce(exchanges[0], step))
    attend(behind)
    for step in range(1, 12):
        attend(announce(exchanges[1], step, oldest=step))
    assert set(servers[1]._routes) == {11} and not servers[1]._waiting, "plans that everybody has left are dropped"


def test_what_nobody_has_announced_is_refused():
    inputs = PlanInputs(np.array([40]), (MaskRule(),), 1, make_pool(1, 1, False), 20_000, 16)
    (exchange,), _ = make_exchanges(1, inputs.pool)
    attention_of_ranks([exchange], inputs, step=7, oldest=5)
    for header, word in (
        (Header(FORWARD, step=7, window=9), b"window 9, which nobody has announced"),
        (Header(FORWARD, step=4), b"all trainers had left"),
    ):
        exchange.links[0].send(header, [])
        header, payload = exchange.links[0].wait_message()
        assert header.kind == FAILURE and word in payload.numpy().tobytes()


def test_rows_may_come_before_their_plan():
    """Only one trainer announces a micro-batch to a server; another may be faster."""
    pool = make_pool(2, 1, False)
    inputs = PlanInputs(np.array([50, 30]), (MaskRule(),), 2, pool, 0, 16)
    q, k, v, d_out = rows(tokens=80)
    exchanges, servers = make_exchanges(2, pool)
    announcer, exchanges[0].announce = exchanges[0].announce, lambda *x: held.append(x)
    held = []
    sites = attention_of_ranks(exchanges, inputs)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(attend_distributed, sites, q, k, v, d_out)
        while len(servers[0]._waiting.get((0, 0, FORWARD), ())) < 2:
            time.sleep(0.01)
        announcer(*held[0])
        out, *_ = answer.result()
    torch.testing.assert_close(out, dense_attention(q, k, v, [50, 30]))


def test_a_trainer_that_serves_does_not_wait_for_one_that_has_left():
    """Until its deadline, of minutes, when the other's death is known at once."""
    pool = make_pool(2, 0, True)
    inputs = PlanInputs(np.array([80]), (MaskRule(),), 2, pool, 0, 16)
    exchanges, servers = make_exchanges(2, pool)
    sites = attention_of_ranks(exchanges, inputs)
    assert any(at.rank == 1 for at in servers[0]._routes[0][0][0].links), "server 0 needs rows of trainer 1"
    servers[0]._listen(1, LeavingLink(queue.SimpleQueue(), queue.SimpleQueue()))
    q, k, v, _ = rows(tokens=80)
    here = sites.tokens[:40]
    with pytest.raises(LinkError, match="rank 0 has no rows of trainer 1 .*: it has left"):
        sites[0](q[here], k[here], v[here], MaskRule(), 1.0)


def test_a_trainer_that_serves_gives_one_that_hangs_up_at_its_deadline():
    pool = make_pool(2, 0, True)
    inputs = PlanInputs(np.array([80]), (MaskRule(),), 2, pool, 0, 16)
    exchanges, servers = make_exchanges(2, pool)
    sites = attention_of_ranks(exchanges, inputs)
    servers[0]._deadline_s = 0.2
    q, k, v, _ = rows(tokens=80)
    here = sites.tokens[:40]
    with pytest.raises(LinkError, match=r"rank 0 has no rows of trainer 1 for forward call 0 .* within 0\.2 s"):
        sites[0](q[here], k[here], v[here], MaskRule(), 1.0)


class LeavingLink(LocalLink):
    def wait_message(self):
        raise LinkError("it has left")


class DamagedLink(LocalLink):
    def wait_message(self):
        super().wait_message()
        raise Damaged("link 0-0: a forward message arrived damaged (checksum)")


def test_a_damaged_message_is_told_to_every_trainer_at_once():
    """They would otherwise wait for its rows until their deadline, and then blame a server that has hung."""
    server = AttentionServer(0, "reference", torch.device("cpu"))
    there, back = queue.SimpleQueue(), queue.SimpleQueue()
    sender, (other, far_end) = LocalLink(back, there, 5.0), LocalLink.pair(5.0)
    server.serve(0, DamagedLink(there, back))
    server.serve(1, far_end)
    sender.send(Header(FORWARD))
    for link in (sender, other):
        header, payload = link.wait_message()
        assert header.kind == FAILURE and b"arrived damaged" in payload.numpy().tobytes()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_plain_activation_checkpointing_repeats_calls_and_stays_exact(use_reentrant):
    """Without the policy that keeps attention's results, a layer's call is made again, under a new number."""
    inputs = PlanInputs(np.array([33, 7]), (MaskRule(),), 1, make_pool(1, 2, False), 0, 16)
    exchanges, servers = make_exchanges(1, inputs.pool)
    (site,) = attention_of_ranks(exchanges, inputs)
    q, k, v, d_out = rows()

    def gradients(attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(attention(*leaves), *leaves[1:])
        out.backward(d_out)
        return [out.detach(), *(x.grad for x in leaves)]

    layer = lambda q, k, v: site(q, k, v, MaskRule(), 8**-0.5)  # noqa: E731
    ours = gradients(lambda *x: checkpoint(layer, *x, use_reentrant=use_reentrant))
    for a, b in zip(ours, gradients(lambda *x: dense_attention(*x, [33, 7])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert [s.take_report().calls for s in servers] == [6, 6], "two layers: forward, forward again, backward"


def test_a_graph_that_outlives_its_micro_batch_never_takes_the_next_ones_routes():
    """Sites were once named by their address, which the next object may get: gradients of other documents' rows."""
    inputs = PlanInputs(np.array([40]), (MaskRule(),), 1, make_pool(1, 1, False), 0, 16)
    exchanges, _ = make_exchanges(1, inputs.pool)
    q, k, v, d_out = rows()
    q.requires_grad_()
    (site,) = attention_of_ranks(exchanges, inputs, 0)
    first = site._site
    out = site(q, k, v, MaskRule(), 1.0)
    del site
    gc.collect()
    for step in range(1, 20):
        (site,) = attention_of_ranks(exchanges, inputs, step)
        assert site._site > first
    with pytest.raises(KeyError):
        out.backward(d_out)
