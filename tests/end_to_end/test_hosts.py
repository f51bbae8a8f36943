"""Runs over several hosts with addresses of their own, on a Ray cluster that asks for a token."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from commands import DISTCA, losses_alone, losses_of, wait_until, write_run_file
from hosts import Host, network, ray_cluster, ray_head, ray_node, without_ray

from distca.errors import EXIT_DATA, EXIT_OTHER, EXIT_SETTINGS, EXIT_TRY_AGAIN

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts():
    """Three for a cluster that stays, three for what a test starts."""
    with network(6) as made:
        yield made


@pytest.fixture(scope="module")
def environment(hosts, tmp_path_factory):
    """A driver's, whose cluster is three hosts of one CPU. Their names mean loopback, as on Debian."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
    before = f"mount --bind {folder}/hosts /etc/hosts"
    with ray_cluster(hosts[:3], folder, num_cpus=1, before=before) as made:
        yield made


POOLS = {
    "trainers on one host, servers on the others": dict(placement="apart"),
    "mixed over all": dict(placement="spread", trainers=3, servers=3, trainers_serve=True),
}


@pytest.mark.parametrize("transport", ["pairs", "group", "nixl"])
def test_a_step_over_three_hosts_is_exact(hosts, environment, tmp_path, transport):
    """By a mixed pool, of which every host has its share."""
    pool = dict(transport=transport, **POOLS["mixed over all"])
    run = write_run_file(tmp_path, "hosts", train=dict(steps=3, tokens_per_step=2049, precision="fp64"), parallel=pool)
    done = hosts[0].run([*DISTCA, "verify", str(run)], env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout


@pytest.mark.parametrize("pool", POOLS)
def test_losses_over_three_hosts_are_those_of_one_machine(hosts, environment, tmp_path, pool):
    sections = dict(train=dict(steps=20, tokens_per_step=2049 if "mixed" in pool else 2048), parallel=POOLS[pool])
    run = write_run_file(tmp_path, "hosts", **sections)
    command = [*DISTCA, "train", str(run), "--folder", str(tmp_path / "run")]
    with open(tmp_path / "output", "w") as output:
        driver = hosts[0].start(command, env=environment, cwd=tmp_path, stdout=output, stderr=output)
    said = (tmp_path / "output").read_text
    try:
        wait_until(lambda: driver.poll() is not None or (tmp_path / "run" / "workers.json").exists(), 200, said)
        assert driver.poll() is None, said()
        workers = json.loads((tmp_path / "run" / "workers.json").read_text())
        assert driver.wait(200) == 0, said()
    finally:
        driver.kill()
        driver.wait()
    of_role = {role: {w["host"] for w in workers if w["name"].startswith(role)} for role in ("trainer", "server")}
    addresses = {host.address for host in hosts[:3]}
    if "mixed" in pool:
        assert of_role == dict(trainer=addresses, server=addresses)
    else:
        assert len(of_role["trainer"]) == 1 and of_role["server"] == addresses - of_role["trainer"]
    assert re.search(rf"^hosts +{re.escape(hosts[0].address)}: trainer", said(), re.MULTILINE)
    assert losses_of(tmp_path / "run") == losses_alone(tmp_path, **sections)


def test_a_killed_driver_leaves_no_worker_on_any_host(hosts, environment, tmp_path):
    run = write_run_file(tmp_path, "hosts", train=dict(steps=10_000), parallel=dict(placement="apart"))
    with open(tmp_path / "output", "w") as output:
        driver = hosts[0].start([*DISTCA, "train", str(run)], env=environment, cwd=tmp_path, stdout=output)
    try:
        deadline = time.monotonic() + 120
        while not re.search(r"step +3/", said := (tmp_path / "output").read_text()):
            assert driver.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        assert all(working(host) for host in hosts[:3])
    finally:
        driver.kill()
        driver.wait()
    left = lambda: [name for host in hosts[:3] for name in working(host)]  # noqa: E731
    wait_until(lambda: not left(), 30, left)


def working(host: Host) -> list[str]:
    """Names of our workers' processes on a host."""
    names = []
    for pid in host.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(psutil.Process(pid).cmdline()))
    return [name for name in names if "_Host" in name]


# ---- hosts that do not fit ----


def refused(hosts, tmp_path, before: str, address: str | None = None) -> str:
    """What a driver says to a run whose servers come up on two other hosts, of which a shell has prepared the second;
    `address` is what its Ray goes by, if not its own."""
    pool = dict(trainers=1, servers=2, placement="apart")
    run = write_run_file(tmp_path, "hosts", train=dict(steps=3), parallel=pool)
    last = replace(hosts[5], address=address or hosts[5].address)
    with (
        ray_head(hosts[3], tmp_path, 1) as environment,
        ray_node(hosts[4], environment, tmp_path, 1),
        ray_node(last, environment, tmp_path, 1, before),
    ):
        done = hosts[3].run([*DISTCA, "train", str(run)], env=environment, cwd=tmp_path)
    assert done.returncode == EXIT_SETTINGS and "step 1" not in done.stdout, done.stdout
    return " ".join(done.stdout.split())


def test_a_host_that_another_does_not_reach_is_named(hosts, tmp_path):
    """Ray itself needs no way from one of its workers to another."""
    rules = ["add pref 10 lookup local", "del pref 0"]  # the kernel's first rule lets in whatever is addressed to it
    rules += [f"add pref 5 from {hosts[4].address} ipproto tcp dport 10000-65000 prohibit"]
    said = refused(hosts, tmp_path, " && ".join(f"ip rule {rule}" for rule in rules))
    assert f"host {hosts[4].address} does not reach host {hosts[5].address}" in said


def test_a_host_that_goes_by_loopback_is_named(hosts, tmp_path):
    """As where its name does, in Debian's /etc/hosts, and Ray asks for no more than that."""
    said = refused(hosts, tmp_path, "", "127.0.1.1")
    assert f"host {socket.gethostname()} of the cluster goes by the address 127.0.1.1" in said


def test_a_host_without_the_runs_folder_is_named(hosts, tmp_path):
    (tmp_path / "runs").mkdir()
    said = refused(hosts, tmp_path, f"mount -t tmpfs none {tmp_path}/runs")
    assert f"host {hosts[5].address} does not see what the driver writes into {tmp_path}/runs" in said


def test_a_host_with_another_version_is_named(hosts, tmp_path):
    other = tmp_path / "other" / "numpy-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    said = refused(hosts, tmp_path, f"export PYTHONPATH={other.parent}")
    assert f"host {hosts[5].address} has numpy 0.1, the driver's host has" in said


# ---- distca doctor ----


def test_the_doctor_asks_every_host_and_names_the_one_that_is_not_well(hosts, environment, tmp_path):
    (tmp_path / "runs").mkdir()
    run = write_run_file(tmp_path, "hosts", train=dict(steps=3))
    done = hosts[0].run([*DISTCA, "doctor", str(run)], env=environment, cwd=tmp_path)
    said = ", ".join(host.address for host in hosts[:3])
    assert done.returncode == 0 and f"{said}: one code and one set of libraries; all reach each other" in done.stdout
    small = "mount -t tmpfs -o size=64m none /dev/shm"
    with ray_head(hosts[3], tmp_path, 1) as other, ray_node(hosts[4], other, tmp_path, 1, small):
        done = hosts[3].run([*DISTCA, "doctor"], env=other, cwd=tmp_path)
    assert done.returncode == EXIT_OTHER and "set of libraries" in done.stdout, done.stdout
    assert f"failed  shared memory  on host {hosts[4].address}, /dev/shm has 67.1 MB" in done.stdout
    assert f"on host {hosts[3].address}" not in done.stdout


# ---- documents that each host has for itself ----


def trained_apart(hosts, tmp_path, before: str, name: str) -> subprocess.CompletedProcess:
    """Two trainers on two hosts, of which a shell has prepared the second. Their text lies in a folder `texts`."""
    texts = tmp_path / "texts"
    texts.mkdir(exist_ok=True)
    (texts / "a.txt").write_text("".join(f"line {n} of {n * n % 97}\n" for n in range(3000)))
    data = dict(sources=[dict(path=str(texts / "a.txt"), format="text")], cache=str(tmp_path / "cache"))
    run = write_run_file(tmp_path, name, data=data, train=dict(steps=3), parallel=dict(servers=0, trainers_serve=True))
    with ray_head(hosts[3], tmp_path, 1) as environment, ray_node(hosts[4], environment, tmp_path, 1, before):
        command = [*DISTCA, "train", str(run), "--parallel.placement", "spread", "--folder", str(tmp_path / name)]
        return hosts[3].run(command, env=environment, cwd=tmp_path)


def test_a_host_with_a_cache_of_its_own_prepares_for_itself_or_is_named(hosts, tmp_path):
    for name in ("own", "cache", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts").mkdir()
    own_cache = f"mount --bind {tmp_path}/own {tmp_path}/cache"
    done = trained_apart(hosts, tmp_path, own_cache, "first")
    assert done.returncode == 0, done.stdout
    made = {folder.name for folder in (tmp_path / "own").iterdir() if (folder / "meta.json").exists()}
    assert made == {folder.name for folder in (tmp_path / "cache").iterdir() if (folder / "meta.json").exists()}
    shutil.rmtree(tmp_path / "own")
    (tmp_path / "own").mkdir()
    no_texts = f"{own_cache} && mount --bind {tmp_path}/elsewhere {tmp_path}/texts"
    done = trained_apart(hosts, tmp_path, no_texts, "second")
    assert done.returncode == EXIT_DATA and f"host {hosts[4].address} has not the documents" in done.stdout, done.stdout
    (tmp_path / "elsewhere" / "a.txt").write_text("something else\n" * 3000)
    done = trained_apart(hosts, tmp_path, no_texts, "third")
    said = f"host {hosts[4].address} has prepared other documents than the driver"
    assert done.returncode == EXIT_DATA and said in done.stdout and "step 1" not in done.stdout, done.stdout


# ---- a batch job ----


SRUN = """#!{python}
# Runs its command in every namespace host at once, as srun does on a job's nodes.
import os, signal, subprocess, sys

command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")) :]
tasks = []
for n, host in enumerate("{hosts}".split()):
    os.environ["SLURM_NODEID"] = str(n)
    tasks.append(subprocess.Popen(["ip", "netns", "exec", host, *command]))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/scontrol.txt
"""


def test_the_batch_script_trains_saves_when_told_is_requeued_and_goes_on(hosts, tmp_path):
    """Uninterrupted, the same run has the same losses."""
    steps, job = 30, 4711
    run = write_run_file(tmp_path, "hosts", train=dict(steps=steps))
    script = subprocess.run([*DISTCA, "script", "slurm", run, "--per-node", "2"], capture_output=True, text=True)
    (tmp_path / "job.sh").write_text(script.stdout)
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    names = " ".join(host.name for host in hosts[3:5])
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (stand_ins / name).write_text(text.format(python=sys.executable, hosts=names, folder=tmp_path))
        (stand_ins / name).chmod(0o755)
    environment = without_ray() | {
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": "2",
    }

    def start(output):
        return hosts[3].start(["bash", tmp_path / "job.sh"], env=environment, stdout=output, stderr=output)

    def said():
        return (tmp_path / "output").read_text()

    with open(tmp_path / "output", "w") as output:
        first = start(output)
        deadline = time.monotonic() + 200
        while not re.search(r"step +5/", said()):
            assert first.poll() is None and time.monotonic() < deadline, said()
            time.sleep(0.1)
        first.terminate()  # as Slurm does ahead of the limit
        assert first.wait(120) == EXIT_TRY_AGAIN, said()
        assert (tmp_path / "scontrol.txt").read_text() == f"requeue {job}\n"
        assert not list(tmp_path.glob(".ray-token*")) and not any(host.pids() for host in hosts[3:5])
        second = start(output)
        assert second.wait(240) == 0, said()
    assert "resuming" in said() and (tmp_path / "scontrol.txt").read_text() == f"requeue {job}\n"
    folder = tmp_path / "runs" / f"hosts-{job}"
    assert losses_of(folder) == losses_alone(tmp_path, train=dict(steps=steps))
