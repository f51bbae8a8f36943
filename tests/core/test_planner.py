"""A plan keeps its promises for any documents, pool and mask; routes bring every task exactly its rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distca.arrays import ranges
from distca.cost import PairCost, RowBlockCost, TableCost, Wire
from distca.greedy import even_greedy_plan, greedy_plan
from distca.masks import UNBOUNDED, Bands, Mask, MaskRule, chunk_mask, prefix_mask, sink_mask
from distca.payoff import NOTHING_MOVES, predicted
from distca.plan import MILLION, PlanInputs, Pool, least_moved, limits, make_pool
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


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(1, 7), pools, st.sampled_from([0, 100]))
def test_rows_that_cannot_be_shared_equally_are_shared_up_to_one(lengths, extra_ranks, pool, window):
    """Of fewer rows than ranks, some ranks hold none."""
    num_ranks = max([extra_ranks, *(h + 1 for h in pool.home if h is not None)])
    inputs = PlanInputs(np.array(lengths, np.int64), (MaskRule(window),), num_ranks, pool, 20_000, 16)
    plan = plan_step(inputs, inputs.rules[0])
    plan.check()
    s = plan.segments
    held = np.bincount(s.rank, s.end - s.start, minlength=num_ranks)
    assert sorted(held.tolist()) == sorted((sum(lengths) + i) // num_ranks for i in range(num_ranks))


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


def test_a_large_server_above_its_limit_is_levelled_though_a_small_one_ends_up_worse():
    """For its capacity a small server's one tile is more than a large one's."""
    pool = Pool((35, 35, 35, 100, 100), (0, 1, 2, None, None))
    inputs = inputs_for([127, 4096, 4096, 178, 619], 4, pool, tolerance=0)
    plan_step(inputs, inputs.rules[0]).check()


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
        route, rank = routes.of_server(server), pool.home[server]
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
            is_part = np.bincount(document, minlength=len(offsets))[document] < inputs.lengths[document]
            place, token, document = place[is_part], token[is_part], document[is_part]
            assert ((place - (token - offsets[document])) % TILE == 0).all(), "a row keeps its place modulo TILE"
            tile, owner = np.unique(np.stack([place // TILE, document]), axis=1)
            assert len(np.unique(tile)) == len(tile), "documents in parts share no tile"
            assert len(rows) < TILE * (len(np.unique(tile)) + 1) + inputs.lengths.sum(), "whole documents: no padding"
        mine = np.flatnonzero(plan.server == server)
        at_home = routes.is_at_home[mine]
        assert len(mine) == len(route.tasks) + at_home.sum()
        bring = [(route.tasks, mine[~at_home], q_rows, kv_rows)]
        if rank is not None:
            bring.append((routes.of_trainer(rank).home, mine[at_home], home[rank], home[rank]))
        else:
            assert not at_home.any()
        for t, numbers, q, kv in bring:
            for i, c in enumerate(numbers):
                b, base = plan.bands, offsets[plan.document[c]]
                assert (q[t.q0[i] : t.q1[i]] == base + np.arange(b.q0[c], b.q1[c])).all()
                assert (kv[t.k0[i] : t.k1[i]] == base + np.arange(b.k0[c], b.k1[c])).all()
                assert (t.lo[i], t.hi[i]) == (b.lo[c], b.hi[c])

    for rank in range(num_ranks):
        route = routes.of_trainer(rank)
        at_home = [np.unique(np.concatenate([np.arange(q0, q1) for q0, q1, *_ in route.home.rows()] or [[]]))]
        rows, times = np.unique(np.concatenate(at_home + [x.q_rows for x in route.links]), return_counts=True)
        assert route.shared.tolist() == rows[times > 1].tolist()
        for x in route.links:
            assert sorted([*x.alone, *x.shared]) == list(range(len(x.q_rows)))
            assert (route.shared[x.into] == x.q_rows[x.shared]).all()


def test_documents_that_live_where_they_are_attended_are_nobodys_rows():
    """In place, two thousand short documents and nothing to balance: no server is sent a row."""
    inputs = PlanInputs(np.full(2000, 8, np.int64), (MaskRule(),), 4, make_pool(4, 0, True), 20_000, 128)
    routes = routes_of(plan_step(inputs, MaskRule()))
    for rank in range(4):
        assert not routes.of_trainer(rank).links and not routes.of_server(rank).links
        assert routes.of_trainer(rank).home.area().sum() == 500 * 36


def test_short_documents_take_no_more_rows_on_a_server_than_they_have():
    inputs = PlanInputs(np.full(2000, 8, np.int64), (MaskRule(),), 4, make_pool(4, 2, False), 20_000, 128)
    routes = routes_of(plan_step(inputs, MaskRule()))
    assert sum(routes.of_server(s).num_q_rows for s in range(2)) <= 16_000 + 2 * TILE


@settings(max_examples=80, deadline=None)
@given(lengths_lists, st.integers(1, 5), st.sampled_from([0, 1, 100]))
def test_loads_at_home_count_the_pairs_of_the_rows_that_a_rank_holds(lengths, num_ranks, window):
    """Placed: the rows of the plan's segments. Packed: the n-th equal part of all rows in their order."""
    inputs = inputs_for(lengths, num_ranks, make_pool(num_ranks, 0, True), window)
    plan = plan_step(inputs, inputs.rules[0])
    rows = np.concatenate([np.arange(1, length + 1) for length in inputs.lengths])
    pairs = np.minimum(rows, window) if window else rows  # that each row sees
    assert plan.load_packed().tolist() == pairs.reshape(num_ranks, -1).sum(1).tolist()
    first, s = np.cumsum(inputs.lengths) - inputs.lengths, plan.segments
    placed = pairs[ranges(first[s.document] + s.start, s.end - s.start)]
    assert plan.load_at_home().tolist() == placed.reshape(num_ranks, -1).sum(1).tolist()


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


@pytest.mark.parametrize("share", [1, 999_999, 10**10 + 7, 3 * 10**15])
@pytest.mark.parametrize("tolerance", [0, 10_000, NOTHING_MOVES])
def test_limits_are_exact_however_much_is_tolerated(share, tolerance):
    """A share of 10^10 times the tolerance of a plan that moves nothing wrapped around, and work was moved."""
    limit = min(2 * share, share + share * tolerance // MILLION)
    assert limits(2 * share, make_pool(2, 0, True), tolerance).tolist() == [limit, limit]


def test_balanced_documents_stay_at_home():
    inputs = PlanInputs(np.full(8, 512, np.int64), (MaskRule(),), 4, make_pool(4, 0, True), 20_000, 128)
    assert routes_of(plan_step(inputs, MaskRule())).moved_rows() == (0, 0)


def test_moved_rows_count_only_rows_away_from_home():
    inputs = PlanInputs(np.array([1024, 1024], np.int64), (MaskRule(),), 2, make_pool(2, 1, False), 20_000, 128)
    assert routes_of(plan_step(inputs, MaskRule())).moved_rows() == (2048, 2048)


@settings(max_examples=60, deadline=None)
@given(lengths_lists, pools, st.sampled_from([0, 100]), st.booleans(), st.data())
def test_moved_rows_and_traffic_are_the_sums_over_all_routes(lengths, pool, window, greedy, data):
    num_ranks = max([2, *(h + 1 for h in pool.home if h is not None)])
    inputs = inputs_for(lengths, num_ranks, pool, window, block=16)
    plan = (greedy_plan if greedy else plan_step)(inputs, inputs.rules[0])
    plan = without_servers(plan, data.draw(st.sets(st.integers(1, len(pool)), max_size=1)) & set(range(len(pool))))
    routes, moved = routes_of(plan), np.zeros((num_ranks, len(pool), 2), np.int64)
    for rank in range(num_ranks):
        for link in routes.of_trainer(rank).links:
            moved[rank, link.server] = len(link.q_rows), len(link.kv_rows)
    for server, home in enumerate(pool.home):
        for link in routes.of_server(server).links:
            assert moved[link.rank, server].tolist() == [len(link.q_rows), len(link.kv_rows)]
        if home is not None:
            moved[home, server] = 0
    assert routes.moved_rows() == tuple(moved.sum(axis=(0, 1)))
    received, sent = routes.traffic(num_ranks, 4, 2)
    halves = moved @ [4, 2]
    assert (received == halves.sum(axis=0)).all() and (sent == halves.sum(axis=1)).all()


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.data())
def test_a_digest_depends_on_every_number_and_its_place(lengths, data):
    plan = plan_step(inputs_for(lengths, 3, make_pool(3, 2, True), block=16), MaskRule())
    part = data.draw(st.sampled_from(["bands", "segments", "plan"]))
    table = plan if part == "plan" else getattr(plan, part)
    name = data.draw(st.sampled_from(["document", "server"] if part == "plan" else list(type(table).__slots__)))
    column = getattr(table, name).copy()
    at = data.draw(st.integers(0, len(column) - 1))
    other = data.draw(st.integers(0, len(column) - 1))
    if data.draw(st.booleans()) and column[at] != column[other]:
        column[[at, other]] = column[[other, at]]
    else:
        column[at] += data.draw(st.sampled_from([-128, -1, 1, 128, 2**40]))
    changed = replace(table, **{name: column})
    assert (changed if part == "plan" else replace(plan, **{part: changed})).digest() != plan.digest()


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


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("longest", [32_768, 131_072, 1_000_000])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_small_pools_move_fewer_bytes_than_the_greedy_planner(num_ranks, longest, group):
    for seed in range(4):
        lengths = heavy_tailed(num_ranks, 65_536, longest, seed)
        pool = make_pool(num_ranks, 0, True)
        inputs = PlanInputs(lengths, (MaskRule(),), num_ranks, pool, 10_000, 128, group)
        ours, greedy = plan_step(inputs, MaskRule()), even_greedy_plan(inputs, MaskRule())
        (q, kv), (greedy_q, greedy_kv) = routes_of(ours).moved_rows(), routes_of(greedy).moved_rows()
        assert group * q + kv <= 0.95 * (group * greedy_q + greedy_kv)


def test_nobody_receives_many_times_the_keys_that_others_do():
    """A document's last, small portions once were slivers: a few rows with all the keys that they see."""
    lengths = np.array([131_072] * 8 + [4096] * 256, np.int64)
    inputs = PlanInputs(lengths, (MaskRule(),), 64, make_pool(64, 0, True), 10_000, 128, 4)
    plan = plan_step(inputs, MaskRule())
    received, _ = routes_of(plan).traffic(64, query=0, key=1)
    assert plan.imbalance() <= 1.01 and received.max() < 3 * received.mean(), received


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


@st.composite
def masks(draw, lengths):
    """Any bands, none sharing a pair with another: each document's square is cut in four, each part gets a band."""
    far = st.sampled_from([-UNBOUNDED, UNBOUNDED])
    document, rows = [], []
    for d, length in enumerate(lengths):
        q, k = draw(st.integers(0, length)), draw(st.integers(0, length))
        for q0, q1, k0, k1 in ((0, q, 0, k), (0, q, k, length), (q, length, 0, k), (q, length, k, length)):
            if draw(st.booleans()):
                diagonal = st.one_of(far, st.integers(-length, length))
                rows.append((q0, q1, k0, k1, draw(diagonal), draw(diagonal)))
                document.append(d)
    return Mask(np.array(document, np.int64), Bands.of(*rows))


COSTS = {
    "pairs": PairCost(),
    "row blocks": RowBlockCost(16, 20),
    "table": TableCost((16, 64, 4096), (16, 256, 4096), ((90, 400, 5000), (300, 1500, 19000), (9000, 90000, 10**6))),
}


@settings(max_examples=120, deadline=None)
@given(lengths_lists, pools, st.sampled_from(sorted(COSTS)), st.data())
def test_any_bands_and_any_cost_are_planned_exactly(lengths, pool, cost, data):
    num_ranks = max([2, *(h + 1 for h in pool.home if h is not None)])
    lengths = padded(lengths, num_ranks)
    mask = data.draw(masks(lengths.tolist()))
    inputs = PlanInputs(lengths, (mask,), num_ranks, pool, 20_000, 16, costs=(COSTS[cost],))
    plan = plan_step(inputs, mask)
    plan.check()
    assert plan.digest() == plan_step(inputs, mask).digest()


@pytest.mark.parametrize("mask", ["prefix", "sinks and window", "chunks"])
@pytest.mark.parametrize("cost", [PairCost(), RowBlockCost()], ids=["pairs", "row blocks"])
def test_masks_of_several_bands_are_shared_evenly(mask, cost):
    lengths = heavy_tailed(32, 65_536, 262_144, 0)
    make = {
        "prefix": lambda: prefix_mask(lengths, lengths // 4),
        "sinks and window": lambda: sink_mask(lengths, 4, 8192),
        "chunks": lambda: chunk_mask(lengths, 8192),
    }
    mask = make[mask]()
    inputs = PlanInputs(lengths, (mask,), 32, make_pool(32, 0, True), 10_000, 128, costs=(cost,))
    plan = plan_step(inputs, mask)
    plan.check()
    assert plan.imbalance() <= 1.01


@pytest.mark.parametrize("cost", [RowBlockCost(), COSTS["table"]], ids=["row blocks", "table"])
@pytest.mark.parametrize("pool", POOLS_OF_64.values(), ids=POOLS_OF_64)
def test_every_pool_is_even_in_a_kernels_time(pool, cost):
    ranks = max([32, *(h + 1 for h in pool.home if h is not None)])
    lengths = heavy_tailed(ranks, 65_536, 262_144, 0)
    plan = plan_step(PlanInputs(lengths, (MaskRule(),), ranks, pool, 10_000, 128, costs=(cost,)), MaskRule())
    plan.check_cover()
    assert plan.imbalance() <= 1.01


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_is_planned_and_checked_too(lengths):
    plan = plan_step(
        PlanInputs(np.array(lengths, np.int64), (MaskRule(),), 2, make_pool(2, 1, True), 0, 16), MaskRule()
    )
    plan.check()
    assert len(plan.server) == 0 and least_moved(plan, 4) == 0


@pytest.mark.parametrize("column, change", [("start", 1), ("end", 1), ("row", 1), ("row", -1)])
def test_segments_that_do_not_tile_are_noticed(column, change):
    plan = plan_step(inputs_for([300, 200], 2, make_pool(2, 0, True), block=16), MaskRule())
    moved = getattr(plan.segments, column).copy()
    moved[-1] += change
    with pytest.raises(AssertionError, match="tile|end to end|ranks hold"):
        replace(plan, segments=replace(plan.segments, **{column: moved})).check()


@pytest.mark.parametrize("seed", range(4))
def test_a_table_with_dear_small_tiles_makes_no_plan_worse_than_staying_at_home(seed):
    """Where cutting costs much, the last unevenness had better stay."""
    table = TableCost((128, 512, 2048), (128, 512, 2048), ((400, 900, 2900), (700, 2600, 11000), (2500, 10500, 47000)))
    inputs = PlanInputs(heavy_tailed(4, 8_192, 8_192, seed), (MaskRule(),), 4, make_pool(4, 0, True), 10_000, 128)
    plan = plan_step(replace(inputs, costs=(table,)), MaskRule())
    assert predicted(plan) <= plan.load_at_home().max()


@pytest.mark.parametrize(
    ("bands", "complaint"),
    [
        (Bands.of((0, 2, 0, 3, -UNBOUNDED, 0)), "pairs planned"),
        (Bands.of((0, 3, 0, 3, 0, UNBOUNDED)), "forbids"),  # as many pairs, on the wrong side of the diagonal
        (Bands.of((2, 3, 0, 3, -UNBOUNDED, UNBOUNDED), (2, 3, 0, 3, -UNBOUNDED, 2)), "share pairs"),
    ],
)
def test_a_wrong_cover_is_noticed(bands, complaint):
    plan = plan_step(PlanInputs(np.array([3]), (MaskRule(),), 1, make_pool(1, 0, True), 0, 16), MaskRule())
    zeros = np.zeros(len(bands), np.int64)
    plan.check_cover()
    with pytest.raises(AssertionError, match=complaint):
        replace(plan, document=zeros, bands=bands, server=zeros).check_cover()


def test_a_server_may_be_a_group_of_ranks():
    lengths = heavy_tailed(32, 16_384, 131_072, 3)
    grouped = PlanInputs(lengths, (MaskRule(),), 32, make_pool(32, 1, True, ranks_per_home=8), 10_000, 128)
    single = PlanInputs(lengths, (MaskRule(),), 32, make_pool(32, 1, True), 10_000, 128)
    plan = plan_step(grouped, MaskRule())
    plan.check()
    assert len(plan.pool) == 5 and set(plan.segments.rank) == set(range(32))
    s = plan.segments
    for rank in range(32):
        mine = s.of_rank(rank)
        assert (mine.row == np.cumsum(mine.end - mine.start) - (mine.end - mine.start)).all(), "rows lie end to end"
    moved = [4 * q + kv for q, kv in (routes_of(plan_step(i, MaskRule())).moved_rows() for i in (grouped, single))]
    assert moved[0] < moved[1] / 2, "rows stay inside their group"


def test_where_the_wire_is_slow_work_stays_at_home():
    lengths = heavy_tailed(16, 8_192, 32_768, 1)
    inputs = PlanInputs(lengths, (MaskRule(),), 16, make_pool(16, 0, True), 10_000, 128)
    at_home = plan_step(replace(inputs, tolerance=10**9), MaskRule())
    even, moved, times = plan_step(inputs, MaskRule()), [], []
    for price in (0, 100, 1_000, 10_000, 1_000_000):
        wire = Wire(far=(2 * price, price), near=(price // 10, price // 20), ranks_per_node=4)
        plan = plan_step(replace(inputs, wires=(wire,)), MaskRule())
        assert predicted(plan, wire) <= min(predicted(even, wire), predicted(at_home, wire))
        moved.append(sum(routes_of(plan).moved_rows()))
        times.append(predicted(plan, wire))
    assert predicted(at_home) == at_home.load().max()
    assert moved[0] == sum(routes_of(even).moved_rows()) > moved[-1] and times == sorted(times)


@given(
    st.lists(st.integers(0, 2**40), max_size=5),
    st.sampled_from(sorted(COSTS)),
    st.booleans(),
    st.sampled_from([make_pool(8, 2, True, 35, 4), Pool((100, 7, 35), (None, None, 0), 1, 3)]),
    st.integers(0, 3),
)
def test_inputs_cross_a_wire(lengths, cost, two, pool, padding):
    costs = (COSTS[cost], RowBlockCost())[: 1 + two]
    wires = (Wire((5, 3), (2, 1), 8),) * (len(lengths) % 2 * len(costs))
    inputs = PlanInputs(np.array(lengths, np.int64), (MaskRule(), MaskRule(7)), 8, pool, 1, 16, 7, costs, wires)
    words = np.append(inputs.to_words(), np.zeros(padding, np.int64))
    again = PlanInputs.from_words(words)
    assert again.lengths.tolist() == lengths
    assert replace(again, lengths=inputs.lengths) == inputs


def across(plan, number):
    """Key/value rows that a plan moves from one of `number` runs of ranks to a server of another."""
    pool = replace(plan.pool, neighbourhoods=number)
    of_rank = replace(make_pool(32, 0, True), neighbourhoods=number).neighbourhood()
    of_server = pool.neighbourhood()
    far = lambda away: (of_server[away.server] != of_rank[away.rank]).astype(np.int64)  # noqa: E731
    return int(routes_of(plan).traffic(32, query=far, key=far)[0].sum())


@pytest.mark.parametrize("pool", [make_pool(32, 0, True), make_pool(32, 8, True)], ids=["in place", "mixed"])
def test_work_stays_in_neighbourhoods_that_hold_the_longest_document(pool):
    lengths = heavy_tailed(32, 65_536, 98_304, 0)
    plans = []
    for number in (1, 4):
        neighbours = replace(pool, neighbourhoods=number)
        plans.append(plan_step(PlanInputs(lengths, (MaskRule(),), 32, neighbours, 10_000, 128), MaskRule()))
        plans[-1].check()
        assert plans[-1].imbalance() <= 1.01
    assert across(plans[1], 4) < across(plans[0], 4) / 3


def test_neighbourhoods_too_small_for_the_longest_document_are_joined():
    lengths = np.array([200_000] + [1_000] * 56, np.int64)
    alone, eight = (
        plan_step(
            PlanInputs(lengths, (MaskRule(),), 32, replace(make_pool(32, 0, True), neighbourhoods=n), 10_000, 128),
            MaskRule(),
        )
        for n in (1, 8)
    )
    assert alone.digest() == eight.digest()


@settings(max_examples=60, deadline=None)
@given(lengths_lists, pools, st.integers(2, 5))
def test_any_number_of_neighbourhoods_keeps_the_promises(lengths, pool, number):
    num_ranks = max([2, *(h + 1 for h in pool.home if h is not None)])
    plan_step(inputs_for(lengths, num_ranks, replace(pool, neighbourhoods=number), block=16), MaskRule()).check()
