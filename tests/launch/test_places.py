"""Where workers go: every one somewhere, no host above its room, and as the run file says."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distca.config import validate_settings
from distca.launch.cluster.places import cpus_there, places_of, shared_out, who_is_where
from distca.launch.run.plan_inputs import knowing_nodes, uneven_nodes

ROOMS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
PLACEMENTS = ["beside", "apart", "spread"]


def runs(hosts: list[int]) -> list[int]:
    """Hosts in the order in which they come, one after the other."""
    return [host for n, host in enumerate(hosts) if n == 0 or hosts[n - 1] != host]


@settings(max_examples=400)
@given(rooms=ROOMS, trainers=st.integers(1, 20), servers=st.integers(0, 20), placement=st.sampled_from(PLACEMENTS))
def test_every_worker_has_a_place_no_host_too_many_and_hosts_come_one_after_the_other(
    rooms, trainers, servers, placement
):
    places = places_of(rooms, trainers, servers, placement)
    if placement != "apart":
        assert (places is None) == (sum(rooms) < trainers + servers)
    if places is None:
        return
    assert places == places_of(list(rooms), trainers, servers, placement)
    assert len(places) == trainers + servers
    assert all(places.count(host) <= room for host, room in enumerate(rooms))
    of_trainers, of_servers = places[:trainers], places[trainers:]
    for of_role in (of_trainers, of_servers):
        assert len(runs(of_role)) == len(set(of_role))
    if placement == "apart":
        assert not set(of_trainers) & set(of_servers)
    if placement == "beside":
        fewest = next(n for n in range(1, 7) if sum(sorted(rooms, reverse=True)[:n]) >= trainers)
        assert len(set(of_trainers)) == fewest
        room_left = sum(rooms[host] for host in set(of_trainers)) - trainers
        assert sum(host in of_trainers for host in of_servers) == min(servers, room_left)


@settings(max_examples=300)
@given(room=st.integers(1, 6), hosts=st.integers(1, 6), trainers=st.integers(1, 12), servers=st.integers(1, 12))
def test_equal_hosts_are_found_for_those_apart_where_there_are_any(room, hosts, trainers, servers):
    needed = -(-trainers // room) + -(-servers // room)
    places = places_of([room] * hosts, trainers, servers, "apart")
    assert (places is None) == (needed > hosts)
    assert places is None or len(set(places[:trainers])) == -(-trainers // room)


@settings(max_examples=400)
@given(
    rooms=st.lists(st.integers(0, 7), min_size=1, max_size=5), trainers=st.integers(1, 12), servers=st.integers(1, 12)
)
def test_trainers_apart_are_on_the_fewest_hosts_that_leave_room_for_the_servers(rooms, trainers, servers):
    """Not only hosts of neighbouring sizes go together: those of 1 and 3 hold four trainers, and that of 2 the rest."""
    fewest = [
        number
        for number in range(1, len(rooms) + 1)
        for chosen in combinations(rooms, number)
        if sum(chosen) >= trainers and sum(rooms) - sum(chosen) >= servers
    ]
    places = places_of(rooms, trainers, servers, "apart")
    assert (places is None) == (not fewest)
    assert places is None or len(set(places[:trainers])) == fewest[0]


def test_trainers_apart_leave_the_large_host_to_the_servers_if_these_need_it():
    assert places_of([4, 2, 2], 2, 5, "apart") == [1, 1, 0, 0, 0, 2, 2]
    assert places_of([4, 2, 2], 2, 4, "apart") == [1, 1, 0, 0, 2, 2]
    assert places_of([4, 2], 3, 3, "apart") is None
    assert places_of([1, 2, 3], 4, 2, "apart") == [2, 2, 2, 0, 1, 1]


@settings(max_examples=300)
@given(hosts=st.integers(1, 6), trainers=st.integers(1, 20), servers=st.integers(0, 20), more=st.integers(0, 5))
def test_where_there_is_room_a_spread_is_even(hosts, trainers, servers, more):
    room = -(-trainers // hosts) + -(-servers // hosts) + more
    places = places_of([room] * hosts, trainers, servers, "spread")
    for of_role in (places[:trainers], places[trainers:], places):
        counts = [of_role.count(host) for host in range(hosts)]
        assert max(counts) - min(counts) <= 1


def test_among_equals_the_first_host_is_taken():
    assert places_of([2, 2, 2], 2, 2, "beside") == [0, 0, 1, 1]
    assert places_of([2, 2, 2], 3, 3, "spread") == [0, 1, 2, 0, 1, 2]
    assert places_of([1, 2, 2], 2, 1, "beside") == [1, 1, 2]


@pytest.mark.parametrize(
    "cpus, workers, share",
    [
        ([1.0, 1.0, 1.0], 4, 0.5),
        ([1.0, 1.0, 1.0], 3, 1.0),
        ([2.0], 4, 0.5),
        ([8.0, 1.0], 9, 1.0),
        ([8.0, 0.5], 9, 0.88),
        ([0.0, 0.0], 3, None),
        ([16.0], 3, 1.0),
        ([1.0], 200, None),
    ],
)
def test_cpus_are_shared_by_those_of_one_host(cpus, workers, share):
    found = shared_out(cpus, 1, workers, 0, "beside")
    assert (found and found[0]) == share


@settings(max_examples=200)
@given(
    cpus=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]), min_size=1, max_size=4),
    trainers=st.integers(1, 6),
    servers=st.integers(0, 6),
    threads=st.integers(1, 4),
    placement=st.sampled_from(PLACEMENTS),
)
def test_no_larger_share_of_cpus_would_do(cpus, trainers, servers, threads, placement):
    def fits(hundredths):
        return places_of([int(100 * n) // hundredths for n in cpus], trainers, servers, placement) is not None

    found = shared_out(cpus, threads, trainers, servers, placement)
    if found is None:
        assert not fits(1)
        return
    share = round(100 * found[0])
    assert fits(share) and share <= 100 * threads
    assert share == 100 * threads or not any(fits(larger) for larger in range(share + 1, 100 * threads + 1))


def test_three_hosts_of_one_cpu_hold_trainers_on_one_and_servers_on_the_others():
    assert shared_out([1.0, 1.0, 1.0], 1, 3, 3, "apart") == (0.33, [0, 0, 0, 1, 1, 2])


@pytest.mark.parametrize(
    "cpus, threads, places, each",
    [([4.0, 1.0], 2, [0, 0, 1], 1.0), ([8.0], 2, [0, 0], 2.0), ([2.0], 1, [0] * 3, 0.66), ([9.0, 0.0], 2, [0, 1], 0.0)],
)
def test_workers_get_the_cpus_of_the_place_that_has_least(cpus, threads, places, each):
    assert cpus_there(cpus, threads, places) == each


def test_who_is_where_is_said_by_host():
    hosts = ["10.0.0.1"] * 2 + ["10.0.0.2", "10.0.0.1"]
    assert who_is_where(hosts, 2) == "10.0.0.1: trainers 0-1, server 1; 10.0.0.2: server 0"
    assert who_is_where(["a", "b"], 2) == "a: trainer 0; b: trainer 1"


# ---- what the planner is told ----


def run_of(hosts, trainers, planner):
    values = dict(
        model=dict(config=dict(model_type="llama")),
        data=dict(sources=[dict(path="x.txt")]),
        train=dict(steps=1, tokens_per_step=8 * trainers),
        parallel=dict(trainers=trainers, servers=len(hosts) - trainers),
        planner=planner,
    )
    return validate_settings(values)


def told(hosts, trainers, **planner):
    planner = knowing_nodes(run_of(hosts, trainers, planner), hosts).planner
    return planner.wire.ranks_per_node, planner.neighbourhoods


WIRE = dict(gb_per_s=10.0, gb_per_s_in_node=100.0, tflops=100.0)


@pytest.mark.parametrize(
    "hosts, trainers, ranks_per_node, neighbourhoods",
    [
        ("aaabbb", 6, 3, 2),
        ("aaabb", 5, 3, 1),  # the last node has fewer: no equal neighbourhoods
        ("aabbbb", 6, 2, 1),  # b is taken for two nodes: what is called near is
        ("aaab" + "b", 5, 3, 1),
        ("aabb" + "ab", 4, 2, 2),
        ("aabb" + "cd", 4, 2, 1),
        ("aabb" + "a", 4, 2, 1),
        ("aaaa", 4, 4, 1),
        ("abc", 3, 1, 3),
    ],
)
def test_the_planner_learns_of_nodes_where_the_wire_inside_them_has_a_price(
    hosts, trainers, ranks_per_node, neighbourhoods
):
    assert told(list(hosts), trainers, wire=WIRE) == (ranks_per_node, neighbourhoods)


def test_what_is_set_stays_and_without_prices_nothing_is_told():
    assert told(list("aabb"), 4) == (None, None)
    assert told(list("aabb"), 4, wire=dict(gb_per_s=10.0, tflops=1.0)) == (None, None)
    assert told(list("aabb"), 4, wire=WIRE | dict(ranks_per_node=1), neighbourhoods=4) == (1, 4)


@settings(max_examples=200)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_ranks_that_are_called_near_are_on_one_node(counts):
    hosts = [str(node) for node, number in enumerate(counts) for _ in range(number)]
    size, _ = told(hosts, len(hosts), wire=WIRE)
    assert all(hosts[a] == hosts[b] for a, b in combinations(range(len(hosts)), 2) if a // size == b // size)


@pytest.mark.parametrize(
    "hosts, trainers, taken",
    [
        ("aabb", 4, None),
        ("aabbab", 4, None),
        ("aaaa", 2, None),
        ("aaabb", 5, "planner.neighbourhoods: 1"),
        ("aabbb", 5, "planner.wire.ranks_per_node: 1, planner.neighbourhoods: 1"),
        ("aabba", 4, "planner.neighbourhoods: 1"),
    ],
)
def test_nodes_with_unequal_numbers_of_workers_are_told_for_what_they_are_taken(hosts, trainers, taken):
    said = uneven_nodes(run_of(hosts, trainers, dict(wire=WIRE)), list(hosts))
    assert (said and said.partition("plans go by ")[2]) == taken
    assert uneven_nodes(run_of(hosts, trainers, {}), list(hosts)) is None
    set_by_hand = dict(wire=WIRE | dict(ranks_per_node=1), neighbourhoods=1)
    assert uneven_nodes(run_of(hosts, trainers, set_by_hand), list(hosts)) is None


def test_a_pool_with_fewer_servers_than_there_are_is_told_of_its_own():
    """As in a race, where each pool has some of the workers."""
    hosts = list("aabb") + list("ab")
    assert knowing_nodes(run_of(hosts[:4], 4, dict(wire=WIRE)), hosts).planner.neighbourhoods == 2
    assert knowing_nodes(run_of(hosts[:5], 4, dict(wire=WIRE)), hosts).planner.neighbourhoods == 1
