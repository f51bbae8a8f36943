"""Runs over several hosts with addresses of their own, on a Ray cluster that asks for a token."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from commands import DISTCA, losses_alone, losses_of, wait_until, write_run_file
from hosts import Host, closed, network, ray_cluster, ray_head, ray_node, without_ray

from distca.errors import EXIT_SETTINGS, EXIT_TRY_AGAIN

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts():
    """Three for a cluster that stays, three for what a test starts, two with documents of their own."""
    with network(8) as made:
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
    pool = dict(transport=transport, placement="apart")
    run = write_run_file(tmp_path, "hosts", train=dict(steps=3, precision="fp64"), parallel=pool)
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
    with closed(hosts[5], hosts[4]):
        said = refused(hosts, tmp_path, "")
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


# ---- hosts that keep documents for themselves ----


@pytest.fixture(scope="module")
def own_caches(hosts, tmp_path_factory):
    """Two hosts of two CPUs, and a folder of whose `cache` and `text` the second sees its own, which the folder has as
    `cache-there` and `text-there`."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("cache", "text"):
        (folder / name).mkdir()
        (folder / f"{name}-there").mkdir()
    before = " && ".join(f"mount --bind {folder}/{name}-there {folder}/{name}" for name in ("cache", "text"))
    before += f" && export PYTHONPATH={folder}/text:$PYTHONPATH"
    with ray_head(hosts[6], folder, 2) as environment, ray_node(hosts[7], environment, folder, 2, before):
        yield environment, folder


def write_text(folder: Path, *lines: str) -> None:
    (folder / "a.txt").write_text("".join(f"{line} {n} of {n * n % 97}\n" for n in range(1500) for line in lines))


def trained_spread(hosts, own_caches, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Four trainers on the two hosts, whose text lies in the folder of `own_caches`."""
    environment, own = own_caches
    data = dict(sources=[dict(path=f"{own}/text/*.txt", format="text")], cache=str(own / "cache"))
    pool = dict(trainers=4, servers=0, trainers_serve=True, placement="spread")
    run = write_run_file(folder, "own", data=data, train=dict(steps=3), parallel=pool)
    command = [*DISTCA, "train", str(run), "--folder", str(folder / "run"), *options]
    return hosts[6].run(command, env=environment, cwd=folder)


def prepared_in(cache: Path) -> list[str]:
    return sorted(path.parent.name for path in cache.glob("*/meta.json"))


def test_a_host_with_a_cache_of_its_own_prepares_documents_once(hosts, own_caches, tmp_path):
    """And a second run, whose text is gone, goes by what it finds there."""
    _, own = own_caches
    for name in ("text", "text-there"):
        write_text(own / name, "line")
    done = trained_spread(hosts, own_caches, tmp_path)
    assert done.returncode == 0, done.stdout
    assert prepared_in(own / "cache-there") == prepared_in(own / "cache") and not list(own.glob("*/.unfinished*"))
    losses = losses_of(tmp_path / "run")
    (own / "text-there" / "a.txt").unlink()
    (tmp_path / "again").mkdir()
    done = trained_spread(hosts, own_caches, tmp_path / "again")
    assert done.returncode == 0 and losses_of(tmp_path / "again" / "run") == losses, done.stdout


@pytest.mark.parametrize(
    ("there", "said", "code"),
    [
        (None, "does not see the prepared documents {cache}/.*, and cannot prepare them for itself: .*{text}", 2),
        ("another line", r"data.sources\[0\] .* are not those of the driver's host: a.txt has changed", 3),
    ],
    ids=["no text", "another text"],
)
def test_a_host_that_cannot_read_the_runs_documents_is_named(hosts, own_caches, tmp_path, there, said, code):
    _, own = own_caches
    write_text(own / "text", f"a line for {there}")
    for old in (own / "text-there").iterdir():
        old.unlink()
    if there:
        write_text(own / "text-there", there)
    done = trained_spread(hosts, own_caches, tmp_path)
    assert done.returncode == code and "step 1" not in done.stdout, done.stdout
    pattern = said.format(cache=own / "cache", text=own / "text")
    assert re.search(f"host {hosts[7].address}:? {pattern}", " ".join(done.stdout.split())), done.stdout


SEND_A_SCOUT = """
import sys
from lonely import Lonely
from distca.launch.cluster.session import start_ray
from distca.launch.cluster.workers import WorkerFailed, gather, nodes_by_host, scout

with start_ray(sys.argv[1], num_workers=1) as cluster:
    own, other = nodes_by_host().values()
    worker = scout(Lonely, cluster=cluster, node=other, number=0)
    try:
        gather([worker.made], 60, "starting")
    except WorkerFailed as error:
        print(error)
    print("its log:", worker.log.read_text())
"""


@pytest.mark.parametrize(
    ("module", "said", "in_log"),
    [
        ("print('farewell', flush=True); import os; os._exit(4)", "its process ended|ended without a word", "farewell"),
        ("import only_elsewhere", "No module named 'only_elsewhere'", "import only_elsewhere"),
        ("import ctypes; ctypes.string_at(0)", "its process crashed: SIGSEGV", "Fatal Python error"),
        ("class Lonely:\n  def __init__(self): print('farewell'); 1 / 0", "ZeroDivisionError", "farewell"),
    ],
    ids=["ends at import", "raises at import", "crashes at import", "raises"],
)
def test_what_a_worker_on_another_host_said_last_comes_home(hosts, own_caches, tmp_path, module, said, in_log):
    """Where it does not see the run's folder, or failed before it had a log there."""
    environment, own = own_caches
    (own / "text" / "lonely.py").write_text("class Lonely: pass")
    (own / "text-there" / "lonely.py").write_text(module)
    environment = environment | {"PYTHONPATH": f"{own}/text:{os.environ.get('PYTHONPATH', '')}"}
    done = hosts[6].run([sys.executable, "-c", SEND_A_SCOUT, str(own / "cache" / "run")], env=environment, cwd=tmp_path)
    assert re.search(f"scout 0 on host {hosts[7].address} .*{said}.*{own}/cache/run/logs/scout-0.txt", done.stdout), (
        done.stdout
    )
    assert in_log in done.stdout.partition("\nits log:")[2], done.stdout


# ---- the doctor's visits ----


def diagnosis(host: Host, environment, tmp_path, *command: str) -> tuple[str, int]:
    done = host.run([*DISTCA, "doctor", *command], env=environment, cwd=tmp_path)
    return " ".join(done.stdout.split()), done.returncode


def test_hosts_that_are_well_take_the_doctor_three_lines(hosts, environment, tmp_path):
    run = write_run_file(tmp_path, "hosts", train=dict(steps=3))
    said, code = diagnosis(hosts[0], environment, tmp_path, str(run))
    names = ", ".join(host.address for host in hosts[:3])
    assert f"ok hosts 3 hosts: the same versions, each reaches every other, {names} ok clocks 3 hosts:" in said, said
    assert "other hosts 2 hosts: fit in limits, shared memory, clock," in said, said
    assert code == 0 and not list(tmp_path.glob("**/.seen-*")), said


def test_the_doctor_names_the_hosts_that_are_not_well(hosts, tmp_path):
    """One that another does not reach, with another library, a clock of its own and not the run's folder."""
    (tmp_path / "runs").mkdir()
    other = tmp_path / "other"
    (other / "numpy-0.1.dist-info").mkdir(parents=True)
    (other / "numpy-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    (other / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 30\n")
    before = [f"mount -t tmpfs none {tmp_path}/runs", f"export PYTHONPATH={other}:$PYTHONPATH"]
    run = write_run_file(tmp_path, "hosts", train=dict(steps=3))
    with (
        closed(hosts[5], hosts[4]),
        ray_head(hosts[3], tmp_path, 1) as environment,
        ray_node(hosts[4], environment, tmp_path, 1),
        ray_node(hosts[5], environment, tmp_path, 1, " && ".join(before)),
    ):
        said, code = diagnosis(hosts[3], environment, tmp_path, str(run))
    sick = hosts[5].address
    for part in (
        f"failed versions host {sick} has numpy 0.1",
        f"failed folders host {sick} does not see what the driver writes into {tmp_path}/runs",
        f"failed network host {hosts[4].address} does not reach host {sick}",
        f"warning clocks host {sick} is 30.0 s ahead of",
    ):
        assert part in said, said
    assert code == 1 and f"versions host {hosts[4].address}" not in said, said


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
