"""`distca measure links` opens real links between processes and says what they cost."""

import pytest
import yaml

from distca.errors import EXIT_OK, EXIT_SETTINGS
from distca.launch import cli
from distca.launch.bench.measure_links import _pairs


@pytest.mark.parametrize(("workers", "neighbours"), [(2, 1), (5, 2), (8, 4), (7, 6), (64, 63)])
def test_every_worker_has_the_neighbours_asked_for(workers, neighbours):
    pairs = _pairs(workers, neighbours)
    assert len(set(pairs)) == len(pairs) and all(a < b for a, b in pairs)
    assert all(sum(worker in pair for pair in pairs) == neighbours for worker in range(workers))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["pairs", "group"])
def test_sockets_grow_with_neighbours(tmp_path, transport):
    """One listening socket and a connection for each neighbour in a group; both for each link in pairs."""
    out = tmp_path / "links.yaml"
    command = ["measure", "links", str(out), "--transport", transport, "--workers", "5", "--neighbours", "2"]
    assert cli.run(command) == EXIT_OK
    found = yaml.safe_load(out.read_text())
    assert found["sockets_per_worker"] == {"pairs": 4, "group": 3}[transport]
    assert found["open_s"] > 0 and found["small_round_trip_us"] > 0


def test_more_neighbours_than_there_are_is_refused(tmp_path, capsys):
    assert cli.run(["measure", "links", str(tmp_path / "x"), "--workers", "4", "--neighbours", "4"]) == EXIT_SETTINGS
    assert "4 workers have 1 to 3" in capsys.readouterr().err
