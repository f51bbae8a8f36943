"""Trainers and attention servers in one process, joined by local links: the real exchange without processes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from local_link import LocalLink

from distca.arrays import ranges
from distca.masks import MaskRule
from distca.parallel.core_attention import CoreAttention, Exchange
from distca.parallel.rows import on_device
from distca.parallel.server import AttentionServer
from distca.plan import PlanInputs, combined_digest
from distca.planner import plan_directions
from distca.routes import routes_of

CAUSAL, CPU = MaskRule(), torch.device("cpu")


def make_exchanges(num_ranks, pool, backend="reference", device=CPU):
    """One exchange per rank, with a link to every server of the pool but the one that lives with it;
    and the servers."""
    make = lambda number, home: AttentionServer(number, backend, device, home, deadline_s=60.0)  # noqa: E731
    servers = [make(number, home) for number, home in enumerate(pool.home)]
    exchanges = []
    for rank in range(num_ranks):
        links, own = {}, next((s for s in servers if s.rank == rank), None)
        for server in servers:
            if server is not own:
                links[server.number], far_end = LocalLink.pair(60.0, device)
                server.serve(rank, far_end)
        exchanges.append(Exchange(rank, links, own))
    return exchanges, servers


class Sites(list):
    """Every rank's CoreAttention, and which token (documents laid end to end) each of their rows is."""

    def __init__(self, sites, tokens):
        super().__init__(sites)
        self.tokens = tokens


def attention_of_ranks(exchanges, inputs: PlanInputs, step=0, oldest=0, device=CPU):
    """Announce a micro-batch to all servers and give every rank's CoreAttention."""
    plans = {rule: plan_directions(inputs, rule) for rule in inputs.rules}
    routes = {rule: tuple(routes_of(plan) for plan in both) for rule, both in plans.items()}
    s = plans[inputs.rules[0]][0].segments
    first = np.cumsum(inputs.lengths) - inputs.lengths
    tokens = torch.from_numpy(ranges(first[s.document] + s.start, s.end - s.start))
    digest = combined_digest([r.digest for both in routes.values() for r in both])
    for server in exchanges[0].links:
        if inputs.pool.home[server] is None:
            exchanges[0].announce(server, step, inputs, digest, oldest)
    sites = []
    for exchange in exchanges:
        if exchange.own:
            mine = {rule.window: tuple(r.of_server(exchange.own.number) for r in both) for rule, both in routes.items()}
            exchange.own.adopt(step, mine, oldest)
        mine = {
            rule: tuple(on_device(r.of_trainer(exchange.rank), device) for r in both) for rule, both in routes.items()
        }
        sites.append(CoreAttention(exchange, step, mine))
    return Sites(sites, tokens)


def attend_distributed(sites, q_THD, k_TGD, v_TGD, d_out_THD, rule=CAUSAL, softcap=0.0):
    """Every rank attends its share of the rows, forward and backward: (out, dq, dk, dv), whole."""
    num_ranks, tokens = len(sites), sites.tokens.to(q_THD.device)

    def one_rank(rank):
        q, k, v, d_out = (x[tokens].chunk(num_ranks)[rank] for x in (q_THD, k_TGD, v_TGD, d_out_THD))
        rows = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = sites[rank](*rows, rule, q.shape[-1] ** -0.5, softcap)
        out.backward(d_out)
        return [out.detach(), *(x.grad for x in rows)]

    with ThreadPoolExecutor(num_ranks) as threads:
        parts = list(threads.map(one_rank, range(num_ranks)))
    wholes = [torch.cat(part) for part in zip(*parts, strict=True)]
    return [torch.empty_like(x).index_copy_(0, tokens, x) for x in wholes]
