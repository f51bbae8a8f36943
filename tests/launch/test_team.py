"""What people know the workers of a run by."""

import pytest

from distca.launch.cluster.workers import Worker, WorkerProcess
from distca.launch.run.team import Team, shortened


def team(*hosts: str) -> Team:
    trainers, servers = ([Worker(role, n, None, None, 0, 0) for n in range(2)] for role in ("trainer", "server"))
    return Team(trainers, servers, [WorkerProcess(n, host, ()) for n, host in enumerate(hosts)])


def test_workers_have_their_hosts_in_their_names_where_there_are_several():
    names = team("10.1.12.1", "10.1.12.2", "10.1.12.2", "10.1.13.1").names
    assert list(names) == ["trainer 0", "trainer 1", "server 0", "server 1"]
    assert list(names.values())[0] == "trainer 0 on …12.1" and list(names.values())[3] == "server 1 on …13.1"
    assert list(team(*["127.0.0.1"] * 4).names.values()) == list(names)


@pytest.mark.parametrize(
    ("addresses", "short"),
    [
        (["10.0.0.1", "10.0.0.2"], ["…1", "…2"]),
        (["10.0.0.1", "192.168.0.1"], ["10.0.0.1", "192.168.0.1"]),
        (["10.0.0.1", "10.0.0.11"], ["…1", "…11"]),
    ],
)
def test_addresses_are_known_by_the_parts_in_which_they_differ(addresses, short):
    assert shortened(addresses) == short
