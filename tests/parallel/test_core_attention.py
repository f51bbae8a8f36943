"""Disaggregated core attention equals dense attention: outputs and every gradient, for any pool, cut and mask."""

import numpy as np
import pytest
import torch
from dense import dense_attention, relative_error
from in_process import attend_distributed, attention_of_ranks, make_exchanges

from distca.cost import PairCost, TableCost
from distca.kernels.attention import attend
from distca.masks import MaskRule
from distca.parallel.core_attention import collect
from distca.parallel.link import FAILURE, LinkError
from distca.plan import PlanInputs, make_pool
from distca.planner import plan_directions, plan_step
from distca.routes import routes_of

POOLS = {
    "in place": lambda ranks: make_pool(ranks, 0, True),
    "dedicated 1": lambda ranks: make_pool(ranks, 1, False),
    "dedicated 3": lambda ranks: make_pool(ranks, 3, False),
    "mixed 2": lambda ranks: make_pool(ranks, 2, True, 50),
}
LENGTHS = {"one document spans all ranks": [600], "odd": [1, 7, 127, 129, 333, 3], "ones": [1, 1, 1, 1, 1, 1]}


def random_rows(tokens, heads, kv_heads, head_dim, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (tokens, heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, heads, head_dim),
    ]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def dense_gradients(q, k, v, d_out, lengths, window=0, softcap=0.0):
    rows = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*rows, lengths, window, softcap)
    out.backward(d_out)
    return [out.detach(), *(x.grad for x in rows)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_distributed_attention_equals_dense_attention(ranks, pool, lengths):
    q, k, v, d_out = random_rows(sum(lengths), 4, 2, 16)
    pool = POOLS[pool](ranks)
    inputs = PlanInputs(np.array(lengths), (MaskRule(),), ranks, pool, 20_000, 16)
    exchanges, servers = make_exchanges(ranks, pool)
    got = attend_distributed(attention_of_ranks(exchanges, inputs), q, k, v, d_out)
    for a, b in zip(got, dense_gradients(q, k, v, d_out, lengths), strict=True):
        assert relative_error(a, b) < 1e-13
    assert sum(s.take_report().calls for s in servers) >= 2


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="would show that calls stay exact when they, their rows and their answers share a GPU by streams",
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pool", POOLS)
def test_calls_on_a_gpu_equal_dense_attention(pool, backend):
    """Large enough for kernels to be unfinished when the host goes on; several times, so that memory is used again."""
    lengths, ranks, device = [3000, 1, 700, 999], 2, torch.device("cuda")
    rows, pool = random_rows(sum(lengths), 8, 2, 64), POOLS[pool](ranks)
    inputs = PlanInputs(np.array(lengths), (MaskRule(),), ranks, pool, 20_000, 128)
    exchanges, servers = make_exchanges(ranks, pool, backend, device)
    there, wanted = [x.to(device, torch.float32) for x in rows], dense_gradients(*rows, lengths)
    for step in range(5):
        got = attend_distributed(attention_of_ranks(exchanges, inputs, step, step, device), *there)
        for a, b in zip(got, wanted, strict=True):
            assert relative_error(a.cpu(), b) < 1e-4
    reports = [s.take_report() for s in servers]
    assert sum(r.calls for r in reports) >= 10 and all(r.busy_s > 0 for r in reports if r.calls)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (7, 7), (7, 1)])
@pytest.mark.parametrize("window", [0, 1, 50])
def test_grouped_heads_and_windows(window, heads, kv_heads, backend):
    lengths = [333, 1, 200, 66]
    q, k, v, d_out = random_rows(600, heads, kv_heads, 8)
    pool = make_pool(2, 2, True)
    inputs = PlanInputs(np.array(lengths), (MaskRule(), MaskRule(window)), 2, pool, 0, 16)
    exchanges, _ = make_exchanges(2, pool, backend)
    got = attend_distributed(attention_of_ranks(exchanges, inputs), q, k, v, d_out, MaskRule(window))
    for a, b in zip(got, dense_gradients(q, k, v, d_out, lengths, window), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("pool", ["in place", "mixed 2"])
def test_backward_may_have_a_plan_of_its_own(pool):
    """Other tiles and other servers than forward, and the same gradients."""
    lengths, pool = [700, 1, 199], POOLS[pool](3)
    q, k, v, d_out = random_rows(900, 4, 2, 16)
    costs = (PairCost(), TableCost((16, 900), (16, 900), ((100, 110), (120, 90_000))))
    inputs = PlanInputs(np.array(lengths), (MaskRule(), MaskRule(50)), 3, pool, 0, 16, costs=costs)
    forward, backward = plan_directions(inputs, MaskRule())
    assert forward.digest() != backward.digest()
    sites = attention_of_ranks(make_exchanges(3, pool)[0], inputs)
    for a, b in zip(attend_distributed(sites, q, k, v, d_out), dense_gradients(q, k, v, d_out, lengths), strict=True):
        assert relative_error(a, b) < 1e-13


def test_softcap_is_computed_by_the_reference_and_refused_by_torch():
    lengths, pool = [100, 20], make_pool(2, 1, False)
    q, k, v, d_out = random_rows(120, 4, 2, 8)
    inputs = PlanInputs(np.array(lengths), (MaskRule(),), 2, pool, 0, 16)
    exchanges, _ = make_exchanges(2, pool, "reference")
    got = attend_distributed(attention_of_ranks(exchanges, inputs), q, k, v, d_out, softcap=3.0)
    for a, b in zip(got, dense_gradients(q, k, v, d_out, lengths, softcap=3.0), strict=True):
        assert relative_error(a, b) < 1e-12
    exchanges, _ = make_exchanges(2, pool, "torch")
    with pytest.raises(LinkError, match="softcap|soft-cap"):
        attend_distributed(attention_of_ranks(exchanges, inputs), q, k, v, d_out, softcap=3.0)


def test_the_same_plan_gives_the_same_bits():
    lengths, pool = [400, 200], make_pool(3, 2, True)
    q, k, v, d_out = random_rows(600, 4, 2, 16, torch.float32)
    inputs = PlanInputs(np.array(lengths), (MaskRule(),), 3, pool, 0, 16)
    runs = [
        attend_distributed(attention_of_ranks(make_exchanges(3, pool, "torch")[0], inputs), q, k, v, d_out)
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("pool", ["dedicated 1", "in place"])
def test_a_server_refuses_a_trainer_with_another_plan(pool):
    pool = POOLS[pool](2)
    q, k, v, d_out = random_rows(64, 2, 2, 8)
    ours, other = (PlanInputs(np.array(x), (MaskRule(),), 2, pool, 0, 16) for x in ([64], [63, 1]))
    exchanges, _ = make_exchanges(2, pool)
    sites = attention_of_ranks(exchanges, ours)
    sites[1] = attention_of_ranks(make_exchanges(2, pool)[0], other)[1]
    sites[1].exchange = exchanges[1]
    with pytest.raises((LinkError, AssertionError), match="different plans"):
        attend_distributed(sites, q, k, v, d_out)


def test_a_server_refuses_a_plan_that_comes_out_otherwise():
    """The trainer that announces it runs another version, or sees other documents."""
    (exchange,), _ = make_exchanges(1, make_pool(1, 1, False))
    exchange.announce(0, 7, PlanInputs(np.array([64]), (MaskRule(),), 1, make_pool(1, 1, False), 0, 16), 12345, 0)
    header, payload = exchange.links[0].wait_message()
    assert header.kind == FAILURE and b"different plans for micro-batch 7" in payload.numpy().tobytes()


@pytest.mark.parametrize("heads", [(4, 2), (7, 1)])
def test_at_home_nothing_moves(heads):
    """A plan without moves sends no message, and gives the bits of one call over the model's own tensors."""
    lengths, pool = [100, 28, 64, 64], make_pool(2, 0, True)
    q, k, v, d_out = random_rows(256, *heads, 16)
    exchanges, servers = make_exchanges(2, pool, "torch")
    sites = attention_of_ranks(exchanges, PlanInputs(np.array(lengths), (MaskRule(),), 2, pool, 1_000_000, 16))
    got = attend_distributed(sites, q, k, v, d_out)
    for site in sites:
        assert not site.routes[MaskRule()][0].links
    for rank in range(2):
        rows = sites.tokens[128 * rank : 128 * (rank + 1)]
        tasks = sites[rank].routes[MaskRule()][0].home
        out, _ = attend(q[rows], k[rows], v[rows], tasks, scale=16**-0.5, backend="torch")
        assert torch.equal(got[0][rows], out)
    assert [s.take_report().calls for s in servers] == [2, 2]


@pytest.mark.parametrize("pool", POOLS)
def test_collect_is_the_adjoint_of_dispatch(pool):
    """<dispatch(x), y> = <x, collect(y)> over all ranks and servers of a plan, for query rows and for key rows."""
    lengths, ranks = np.array([500, 1, 99]), 3
    pool = POOLS[pool](ranks)
    routes = routes_of(plan_step(PlanInputs(lengths, (MaskRule(),), ranks, pool, 0, 16), MaskRule()))
    for kv in (False, True):
        g = torch.Generator().manual_seed(1)
        home = [torch.randn(200, 2, 4, generator=g, dtype=torch.float64) for _ in range(ranks)]
        back = [torch.zeros_like(x) for x in home]
        dispatched = torch.zeros((), dtype=torch.float64)
        for rank in range(ranks):
            for link in routes.of_trainer(rank).links:
                rows = torch.from_numpy(link.kv_rows if kv else link.q_rows)
                y = torch.randn(len(rows), 2, 4, generator=g, dtype=torch.float64)
                dispatched += (home[rank][rows] * y).sum()
                collect(back[rank], rows, y)
        collected = sum((x * b).sum() for x, b in zip(home, back, strict=True))
        torch.testing.assert_close(dispatched, collected)
