"""What `distca doctor` says of machines that are not as they should be."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

from distca.config import load_settings
from distca.errors import EXIT_OK, EXIT_OTHER
from distca.launch import cli
from distca.launch.cluster import doctor
from distca.launch.cluster.doctor import (
    Finding,
    clock,
    clocks,
    disk,
    libraries,
    network,
    places,
    processors,
    shared_memory,
    summed_up,
)

NOW = 1.8e9


def settings_of(tmp_path, **sections):
    values = dict(
        model=dict(config=dict(model_type="llama", vocab_size=300)),
        data=dict(sources=[dict(path="python-stdlib")], cache=str(tmp_path / "cache")),
        train=dict(tokens_per_step=4096, steps=3),
        parallel=dict(device="cpu"),
        monitor=dict(folder=str(tmp_path / "runs")),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | sections))
    return load_settings(tmp_path / "run.yaml", [])


def test_a_machine_that_runs_the_tests_has_its_libraries():
    [finding] = libraries(doctor._installed(), "3.11.2")
    assert finding.level == "ok" and "torch" in finding.found


@pytest.mark.parametrize(("there", "said"), [(None, "tyro is missing"), ("0.1", "tyro 0.1, wanted >=0.9")])
def test_a_library_that_is_missing_or_old_is_named(there, said):
    [finding] = libraries(doctor._installed() | {"tyro": there}, "3.11.2")
    assert finding.level == "failed" and said in finding.found and "pip install" in finding.advice


@pytest.mark.parametrize(
    ("addresses", "named", "levels", "said"),
    [
        ({"127.0.0.1": "lo", "10.0.0.3": "eth0"}, "10.0.0.3", ["ok"], "eth0 10.0.0.3"),
        ({"127.0.0.1": "lo", "10.0.0.3": "eth0"}, "127.0.1.1", ["ok", "warning"], "node7 stands for 127.0.1.1"),
        ({"127.0.0.1": "lo", "10.0.0.3": "eth0"}, None, ["ok", "warning"], "node7 stands for no address"),
        ({"127.0.0.1": "lo"}, "127.0.1.1", ["warning"], "only loopback"),
        ({}, None, ["warning"], "no interface is up"),
    ],
)
def test_addresses_that_others_reach_are_told_from_those_that_nobody_does(addresses, named, levels, said):
    findings = list(network(addresses, "node7", named))
    assert [finding.level for finding in findings] == levels
    assert said in findings[-1].found


@pytest.mark.parametrize(("size", "level"), [(0, "failed"), (64 << 20, "failed"), (1 << 30, "ok")])
def test_shared_memory_of_a_bare_container_is_too_little(size, level):
    finding = shared_memory(size)
    assert finding.level == level and ("--shm-size" in finding.advice) == (level == "failed")


@pytest.mark.parametrize(
    ("now", "written", "level", "said"),
    [
        (NOW, NOW + 1, "ok", ""),
        (NOW - 86_400, NOW - 86_400, "failed", "by this clock"),
        (NOW + 500, NOW, "warning", "500 s away"),
    ],
)
def test_a_clock_is_wrong_before_the_package_was_made_or_away_from_the_file_servers(now, written, level, said):
    finding = clock(now, NOW - 60, written)
    assert finding.level == level and said in finding.found


def test_a_clock_that_is_set_wrong_is_noticed(monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 20 * 365 * 86_400)
    told = []
    assert doctor.examine(None, told.append) == "failed"
    assert "clock" in [finding.what for finding in told if finding.level == "failed"]


def test_folders_and_files_that_a_run_cannot_use_are_named(tmp_path):
    (tmp_path / "file").touch()
    data = dict(sources=[dict(path=str(tmp_path / "nowhere.jsonl"))], cache=str(tmp_path / "cache"))
    settings = settings_of(tmp_path, monitor=dict(folder=str(tmp_path / "file" / "runs")), data=data)
    failed = {finding.what for finding in places(settings) if finding.level == "failed"}
    assert failed == {"monitor.folder", f"data.sources {tmp_path}/nowhere.jsonl"}
    assert not [finding for finding in places(settings_of(tmp_path)) if finding.level == "failed"]


def test_more_threads_than_cpus_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = settings_of(tmp_path, parallel=dict(device="cpu", trainers=2, servers=2, trainers_serve=False))
    assert [processors(settings, cpus).level for cpus in (3, 4)] == ["warning", "ok"]


def test_a_cluster_that_does_not_answer_is_said(monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cli.run(["doctor"]) == EXIT_OTHER
    assert "failed Ray no answer from the Ray cluster at" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "failed"), (5 << 30, "warning"), (50 << 30, "ok")])
def test_little_room_is_said_with_what_it_is_for(tmp_path, free, level):
    finding = disk("disk", tmp_path, free, "logs are there")
    assert finding.level == level and ("logs are there" in finding.advice) == (level != "ok")


def test_hosts_that_are_well_are_one_line_and_others_are_named_together():
    small, well = Finding("failed", "shared memory", "64 MB", "more"), Finding("ok", "limits", "suffice")
    told = {f"10.0.0.{n}": [well, Finding("ok", "shared memory", f"{n} GB")] for n in range(1, 30)}
    assert list(summed_up(told)) == [Finding("ok", "other hosts", "29 hosts: fit in limits, shared memory")]
    told |= {"10.0.0.8": [well, small], "10.0.0.9": [well, small], "10.0.0.10": [replace(well, level="warning")]}
    assert list(summed_up(told)) == [
        replace(small, found="hosts 10.0.0.8, 10.0.0.9: 64 MB"),
        Finding("warning", "limits", "host 10.0.0.10: suffice"),
    ]


@pytest.mark.parametrize(
    ("behind", "error", "said"),
    [(0.4, 0.01, ""), (3.0, 0.01, "behind"), (-3.0, 0.01, "ahead of"), (3.0, 2.5, "")],
)
def test_a_hosts_clock_is_far_where_that_is_certain(behind, error, said):
    [finding] = clocks({"10.0.0.1": (0.0, 0.0), "10.0.0.2": (behind, error)})
    assert (finding.level == "warning") == bool(said)
    assert finding.found == (f"host 10.0.0.2 is 3.0 s {said} the driver's" if said else finding.found)


def can_unshare() -> bool:
    tried = shutil.which("unshare") and not os.geteuid()
    return bool(tried) and not subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode


@pytest.mark.skipif(not can_unshare(), reason="would show a real machine of that kind, which only root can make")
@pytest.mark.parametrize(
    ("before", "said", "code"),
    [
        ("mount -t tmpfs -o size=64m none /dev/shm", "failed shared memory /dev/shm has 67.1 MB", EXIT_OTHER),
        ("true", "failed limits processes of this machine cannot reach each other over 127.0.0.1", EXIT_OTHER),
        ("ip link set lo up", "warning addresses only loopback", EXIT_OK),
    ],
    ids=["64 MB of /dev/shm", "no loopback", "no routes"],
)
def test_a_machine_of_that_kind_is_seen_through(tmp_path, before, said, code):
    command = ["unshare", "--mount", "--net", "sh", "-c", f'{before} && exec "$@"', "sh"]
    command += [sys.executable, "-m", "distca.launch.entry", "doctor"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert said in " ".join(done.stdout.split()), done.stdout + done.stderr
    assert done.returncode == code or "shm" in before
