"""What a host is asked before a run begins there, and in which words it is refused."""

import re
import socket

import pytest

from distca.errors import SettingsError
from distca.launch.cluster import hosts
from distca.launch.cluster.hosts import (
    common,
    listener,
    own_code,
    refuse_loopback,
    refuse_other_host,
    refuse_unreachable,
    unreachable,
    versions,
)


def test_a_host_like_the_drivers_is_taken_and_nothing_stays_in_the_folder(tmp_path):
    (tmp_path / "meta").write_text("{}")
    with common([tmp_path], [tmp_path / "meta"]) as wanted:
        refuse_other_host(wanted, "10.0.0.2")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


@pytest.mark.parametrize("name", ["torch", "distca's code", "Python"])
def test_another_version_is_refused_with_both_and_the_host(tmp_path, monkeypatch, name):
    with common([tmp_path], []) as wanted:
        ours = versions()
        monkeypatch.setattr(hosts, "versions", lambda: ours | {name: "0.0"})
        sentence = re.escape(f"host 10.0.0.2 has {name} 0.0, the driver's host has {ours[name]}")
        with pytest.raises(SettingsError, match=f"^{sentence}"):
            refuse_other_host(wanted, "10.0.0.2")


def test_our_own_code_is_known_by_its_contents(tmp_path, monkeypatch):
    before, files = versions()["distca's code"], own_code()
    assert {"errors.py", "kernels/merge.py", "launch/run/train.py"} <= files.keys()
    (tmp_path / "merge.py").write_text("x = 1\n")
    monkeypatch.setattr(hosts, "own_code", lambda: files | {"kernels/merge.py": tmp_path / "merge.py"})
    versions.cache_clear()
    assert versions()["distca's code"] != before
    versions.cache_clear()


def test_a_folder_that_is_another_one_there_is_refused(tmp_path):
    with common([tmp_path], []) as wanted:
        (tmp_path / wanted.mark).unlink()
        with pytest.raises(SettingsError, match=f"^host 10.0.0.2 does not see what the driver writes into {tmp_path}"):
            refuse_other_host(wanted, "10.0.0.2")


def test_a_model_that_a_host_lacks_is_named(tmp_path):
    with common([], [tmp_path / "model"]) as wanted:
        with pytest.raises(SettingsError, match=f"^host 10.0.0.2 cannot read {tmp_path}/model"):
            refuse_other_host(wanted, "10.0.0.2")


def test_whom_a_host_does_not_reach_is_named_with_the_reason():
    with listener("127.0.0.1") as open_, listener("127.0.0.2") as shut:
        places = {"127.0.0.1": open_.getsockname()[1], "127.0.0.2": shut.getsockname()[1]}
        assert unreachable(places) == {}
        shut.close()
        missed = unreachable(places)
    assert missed == {"127.0.0.2": "Connection refused"}
    with pytest.raises(SettingsError, match="^host 127.0.0.1 does not reach host 127.0.0.2 .Connection refused"):
        refuse_unreachable({"127.0.0.1": missed})
    refuse_unreachable({"127.0.0.1": {}})


def test_a_host_that_never_answers_is_given_up():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(full.getsockname())
            assert unreachable({"127.0.0.1": full.getsockname()[1]}, 0.3) == {"127.0.0.1": "no answer"}


def test_an_address_that_means_whoever_asks_is_refused_among_several():
    refuse_loopback({"127.0.0.1": "laptop"})
    refuse_loopback({"10.0.0.1": "a", "10.0.0.2": "b"})
    with pytest.raises(SettingsError, match="host b .* 127.0.1.1, at which no other reaches it: .*--node-ip-address"):
        refuse_loopback({"10.0.0.1": "a", "127.0.1.1": "b"})
