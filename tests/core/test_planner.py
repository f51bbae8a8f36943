"""A plan keeps its promises for any documents, pool and mask; routes bring every task exactly its rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distca.greedy import greedy_plan
from distca.masks import MaskRule
from distca.plan import PlanInputs, Pool, least_moved, make_pool
from distca.planner import plan_step
from distca.recovery import without_servers
from distca.routes import TILE, routes_of


def padded(lengths, num_ranks):
    """The lengths plus one document that makes the sum a multiple of the number of ranks."""
    return np.array([*lengths, num_ranks - sum(lengths) % num_ranks], np.int64)


pools = st.sampled_from(
    [
        make_pool(1, 0, True),
        make_pool(3, 0, True),
        make_pool(2, 2, False),
        make_pool(3, 1, False),
        make_pool(2, 3, True),
        make_pool(3, 2, True, 35),
        Pool((100, 7, 35), (None, None, 0)),
    ]
)
lengths_lists = st.lists(
    st.one_of(st.integers(0, 3), st.sampled_from([127, 128, 129, 698, 4096]), st.integers(1, 2000)),
    min_size=1,
    max_size=12,
)


def inputs_for(lengths, num_ranks, pool, window=0, tolerance=20_000, block=128):
    return PlanInputs(padded(lengths, num_ranks), (MaskRule(window),), num_ranks, pool, tolerance, block)


@settings(max_examples=150, deadline=None)
@given(
    lengths_lists,
    st.integers(1, 4),
    pools,
    st.sampled_from([0, 1, 100, 4096]),
    st.sampled_from([0, 20_000, 100_000]),
    st.sampled_from([16, 128]),
)
def test_a_plan_keeps_its_promises(lengths, extra_ranks, pool, window, tolerance, block):
    num_ranks = max([extra_ranks, *(h + 1 for h in pool.home if h is not None)])
    inputs = inputs_for(lengths, num_ranks, pool, window, tolerance, block)
    plan = plan_step(inputs, inputs.rules[0])
    plan.check()
    again = plan_step(PlanInputs.from_words(inputs.to_words()), inputs.rules[0])
    assert again.digest() == plan.digest()


@settings(max_examples=80, deadline=None)
@given(lengths_lists, pools, st.sampled_from([0, 100]))
def test_every_task_finds_its_rows_at_its_server(lengths, pool, window):
    num_ranks = max([2, *(h + 1 for h in pool.home if h is not None)])
    inputs = inputs_for(lengths, num_ranks, pool, window, block=16)
    plan = plan_step(inputs, inputs.rules[0])
    routes = routes_of(plan)
    offsets = np.cumsum(inputs.lengths) - inputs.lengths
    home = [
        np.full(int(inputs.lengths.sum()) // num_ranks, -1) for _ in range(num_ranks)
    ]  # the token each home row holds
    s = plan.segments
    for d, a, b, rank, row in zip(s.document, s.start, s.end, s.rank, s.row, strict=True):
        home[rank][row : row + b - a] = offsets[d] + np.arange(a, b)

    for server in range(len(pool)):
        route = routes.of_server(server)
        q_rows, kv_rows = np.full(route.num_q_rows, -1), np.full(route.num_kv_rows, -1)
        for at_server in route.links:
            at_home = next(x for x in routes.of_trainer(at_server.rank).links if x.server == server)
            assert (q_rows[at_server.q_rows] == -1).all() and (kv_rows[at_server.kv_rows] == -1).all()
            q_rows[at_server.q_rows] = home[at_server.rank][at_home.q_rows]
            kv_rows[at_server.kv_rows] = home[at_server.rank][at_home.kv_rows]
        for rows in q_rows, kv_rows:
            place, token = np.flatnonzero(rows >= 0), rows[rows >= 0]
            assert len(np.unique(token)) == len(token), "a row travels once"
            document = np.searchsorted(offsets, token, side="right") - 1
            assert ((place - (token - offsets[document])) % TILE == 0).all(), "a row keeps its place modulo TILE"
            assert len(rows) % TILE == 0
            tile, owner = np.unique(np.stack([place // TILE, document]), axis=1)
            assert len(np.unique(tile)) == len(tile), "documents share no tile"
        mine = np.flatnonzero(plan.server == server)
        assert len(mine) == len(route.tasks)
        for i, c in enumerate(mine):
            t, b, base = route.tasks, plan.bands, offsets[plan.document[c]]
            assert (q_rows[t.q0[i] : t.q1[i]] == base + np.arange(b.q0[c], b.q1[c])).all()
            assert (kv_rows[t.k0[i] : t.k1[i]] == base + np.arange(b.k0[c], b.k1[c])).all()
            assert (t.lo[i], t.hi[i]) == (b.lo[c], b.hi[c])


@pytest.mark.parametrize(
    "pool",
    [make_pool(8, 0, True), make_pool(8, 5, False), make_pool(8, 4, True, 50)],
    ids=["in place", "dedicated", "mixed"],
)
def test_one_long_document_is_shared_within_the_tolerance(pool):
    lengths = np.array([100_000, 4_000, 20_000, 7_072], np.int64)
    inputs = PlanInputs(lengths, (MaskRule(),), 8, pool, 20_000, 128)
    plan = plan_step(inputs, MaskRule())
    plan.check()
    assert plan.imbalance() <= 1.02
    assert len(plan.server) < 40 * len(pool), "tiles that lie side by side on one server are joined"


def test_balanced_documents_stay_at_home():
    inputs = PlanInputs(np.full(8, 512, np.int64), (MaskRule(),), 4, make_pool(4, 0, True), 20_000, 128)
    assert routes_of(plan_step(inputs, MaskRule())).moved_rows() == (0, 0)


def test_moved_rows_count_only_rows_away_from_home():
    inputs = PlanInputs(np.array([1024, 1024], np.int64), (MaskRule(),), 2, make_pool(2, 1, False), 20_000, 128)
    assert routes_of(plan_step(inputs, MaskRule())).moved_rows() == (2048, 2048)


def heavy_tailed(num_ranks, tokens, longest, seed):
    """Many short documents and a few of up to `longest` tokens, `tokens` for each of the ranks."""
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([rng.lognormal(6.5, 1.2, 40 * num_ranks), 4000 * rng.pareto(0.9, 4 * num_ranks)])
    drawn = np.clip(drawn, 1, longest).astype(np.int64)
    drawn = rng.permutation(drawn)
    ends = np.minimum(np.cumsum(drawn), num_ranks * tokens)
    lengths = np.diff(ends, prepend=0)
    return np.append(lengths[lengths > 0], num_ranks * tokens - ends[-1])


POOLS_OF_64 = {
    "in place": make_pool(64, 0, True),
    "quarter dedicated": make_pool(48, 16, True),
    "half dedicated": make_pool(32, 32, True),
    "dedicated": make_pool(32, 24, False),
    "two speeds": Pool((100, 35) * 32, tuple(range(64))),
    "two speeds, half dedicated": Pool((100, 35) * 32, (*range(32), *[None] * 32)),
}


@pytest.mark.parametrize("longest", [32_768, 131_072, 1_000_000])
@pytest.mark.parametrize("pool", POOLS_OF_64.values(), ids=POOLS_OF_64)
def test_every_pool_is_even_to_one_percent(pool, longest):
    ranks = max([32, *(h + 1 for h in pool.home if h is not None)])
    for seed in range(2):
        inputs = PlanInputs(heavy_tailed(ranks, 65_536, longest, seed), (MaskRule(),), ranks, pool, 10_000, 128)
        plan = plan_step(inputs, MaskRule())
        plan.check()
        assert plan.imbalance() <= 1.01


@pytest.mark.parametrize("group", [4, 8])
def test_fewer_bytes_than_the_greedy_planner_and_more_than_the_bound(group):
    inputs = PlanInputs(
        heavy_tailed(64, 65_536, 500_000, 0), (MaskRule(),), 64, make_pool(64, 0, True), 10_000, 128, group
    )
    ours, greedy = plan_step(inputs, MaskRule()), greedy_plan(inputs, MaskRule())
    greedy.check_cover()
    (q, kv), (greedy_q, greedy_kv) = routes_of(ours).moved_rows(), routes_of(greedy).moved_rows()
    assert least_moved(ours, group) <= group * q + kv <= 0.7 * (group * greedy_q + greedy_kv)


@settings(max_examples=40, deadline=None)
@given(lengths_lists, pools, st.randoms(use_true_random=False))
def test_permuting_documents_changes_only_their_names(lengths, pool, random):
    num_ranks = max([2, *(h + 1 for h in pool.home if h is not None)])
    inputs = inputs_for(lengths, num_ranks, pool, block=16)
    order = list(range(len(inputs.lengths)))
    random.shuffle(order)
    permuted = PlanInputs(inputs.lengths[order], inputs.rules, num_ranks, pool, inputs.tolerance, inputs.block)
    tasks = []
    for x in (inputs, permuted):
        plan = plan_step(x, MaskRule())
        b = plan.bands
        tasks.append(sorted(zip(plan.server, x.lengths[plan.document], b.q0, b.q1, b.k0, b.k1, strict=True)))
    assert tasks[0] == tasks[1]


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(0, 2**20), pools, st.sampled_from([(0,), (7, 0), (1, 300)]))
def test_a_giant_among_small_documents_and_several_masks_with_one_placement(lengths, giant, pool, windows):
    num_ranks = max([3, *(h + 1 for h in pool.home if h is not None)])
    rules = tuple(MaskRule(w) for w in windows)
    inputs = PlanInputs(padded([*lengths, giant], num_ranks), rules, num_ranks, pool, 10_000, 128)
    plans = [plan_step(inputs, rule) for rule in rules]
    for plan in plans:
        plan.check()
        for column in ("document", "start", "end", "rank", "row"):
            assert (getattr(plan.segments, column) == getattr(plans[0].segments, column)).all()


@settings(max_examples=60, deadline=None)
@given(lengths_lists, pools, st.data())
def test_lost_servers_tasks_move_to_survivors_with_their_cuts(lengths, pool, data):
    num_ranks = max([2, *(h + 1 for h in pool.home if h is not None)])
    plan = plan_step(inputs_for(lengths, num_ranks, pool, block=16), MaskRule())
    lost = data.draw(st.sets(st.integers(0, len(pool) - 1), max_size=len(pool) - 1))
    repaired = without_servers(plan, lost)
    repaired.check_cover()
    moved = np.isin(plan.server, list(lost))
    assert (repaired.server[~moved] == plan.server[~moved]).all() and not np.isin(repaired.server, list(lost)).any()
    assert repaired.bands is plan.bands and repaired.document is plan.document


def test_survivors_of_many_share_the_load_of_the_lost():
    inputs = PlanInputs(heavy_tailed(64, 65_536, 131_072, 1), (MaskRule(),), 64, make_pool(64, 0, True), 10_000, 128)
    plan = plan_step(inputs, MaskRule())
    for lost in ({5}, {0, 17, 63}):
        load = without_servers(plan, lost).load()
        assert load[list(lost)].sum() == 0 and load.max() < 2.1 * plan.load().mean()
