import ctypes
import http.client
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import psutil
import pytest
import ray
from ray.util import placement_group_table

from distca.errors import DataError, SettingsError, TryAgain
from distca.launch.cluster import session
from distca.launch.cluster import workers as workers_module
from distca.launch.cluster.session import start_ray
from distca.launch.cluster.store import connect_store, rendezvous_store
from distca.launch.cluster.workers import (
    WorkerFailed,
    WorkerLost,
    WorkerSilent,
    gather,
    place,
    spawn,
)

MARK = "DISTCA_TEST_MARK"  # set in a driver's environment and inherited by all that it starts


class Echo:
    """A worker that does as it is told."""

    def __init__(self, number=0, bad=False):
        if bad:
            raise DataError("rows.jsonl, row 7: empty document")
        self.number = number

    def number_of(self):
        return self.number

    def environment(self, *names):
        return [os.environ.get(name) for name in names]

    def say(self, text):
        print(text)

    def fail(self, error):
        raise error

    def die(self, how):
        if how == "exit code":
            sys.exit(4)
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.string_at(0)

    def sleep(self, seconds):
        time.sleep(seconds)

    def hold_interpreter(self):
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock: no thread of this process runs Python

    def store_value(self, port):
        return connect_store("127.0.0.1", port).get("greeting")


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # ended meanwhile, or of another user
            continue
    return found


def ended(mark: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := marked(mark):
        assert time.monotonic() < deadline, [(p.pid, p.cmdline()) for p in left]
        time.sleep(0.1)


def environment_now() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def listeners(processes) -> set[tuple[str, int]]:
    found = set()
    for process in processes:
        try:
            found |= {tuple(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def loopback_only():
    return session._replaced(session.ray_constants, "ENABLE_RAY_CLUSTER", False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# Without Ray


def test_the_store_listens_on_loopback_alone():
    before = listeners([psutil.Process()])
    store, port = rendezvous_store("127.0.0.1")
    store.set("greeting", "hello")
    assert connect_store("127.0.0.1", port).get("greeting") == b"hello"
    opened = listeners([psutil.Process()]) - before
    assert [p for _, p in opened] == [port]
    assert all(is_loopback(address) for address, _ in opened)


def test_a_guarded_process_ends_with_its_parent():
    child = "import ctypes; from distca.launch.process.parent import guard_parent; guard_parent();"
    child += "print('up', flush=True); ctypes.PyDLL(None).sleep(1000)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(1000)"
    mark = uuid.uuid4().hex
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, MARK: mark}, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"up\n"
    assert len(marked(mark)) == 2
    parent.kill()
    parent.wait()
    ended(mark, 5)


def test_the_address_of_a_job_server_is_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(SettingsError, match="distca submit RUN.yaml --address http://127.0.0.1:8265"):
        with start_ray(tmp_path, num_workers=1):
            pass


def test_an_environment_comes_back(monkeypatch):
    monkeypatch.setenv("DISTCA_A", "1")
    monkeypatch.delenv("DISTCA_B", raising=False)
    with session.environment(DISTCA_A=None, DISTCA_B="2"):
        assert "DISTCA_A" not in os.environ and os.environ["DISTCA_B"] == "2"
    assert os.environ["DISTCA_A"] == "1" and "DISTCA_B" not in os.environ


def test_the_folder_of_a_dead_driver_is_removed_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "LONGEST_TEMP_ROOT", 1000)
    monkeypatch.setattr(session.tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / "distca-ray-dead"
    dead.mkdir()
    (dead / "lock").touch()
    with session._private_folder() as living:
        assert living.stat().st_mode & 0o777 == 0o700
        with session._private_folder():
            assert living.exists() and not dead.exists()
    assert not list(tmp_path.iterdir())


def test_a_lost_host_is_named_instead_of_rays_paragraphs(monkeypatch):
    node = "ab" * 28
    monkeypatch.setattr(workers_module.ray, "nodes", lambda: [{"NodeID": node, "NodeManagerAddress": "10.1.2.3"}])
    monkeypatch.setattr(workers_module, "_process_of", lambda worker, error: workers_module._Process())
    worker = workers_module.Worker("trainer", 1, None, None, 0, 0)
    said = {
        f"The actor died because its node has died. Node Id: {node}\n\tterminated unexpectedly: x": "host 10.1.2.3",
        f"The actor died because its node has died. Node Id: {node[::-1]}": f"host of Ray's node {node[::-1]}",
        "Failed to connect to GCS within 60 seconds.\nstatus: StatusCode.UNAVAILABLE": "the host that runs Ray's head",
    }
    for text, host in said.items():
        error = ray.exceptions.ActorUnavailableError(text, None)
        assert str(workers_module._sentence(worker, error, "running step 3")) == (
            f"lost trainer 1 while running step 3: {host} was lost"
        )


# Somebody else's cluster


def test_a_cluster_that_does_not_answer_is_said_so_soon(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with (
        loopback_only(),
        pytest.raises(TryAgain, match="no answer from the Ray cluster at 127.0.0.1:.*UNAVAIL"),
    ):
        with start_ray(tmp_path, num_workers=1):
            pass


def test_a_cluster_that_asks_for_no_token_is_refused_before_it_is_told_anything(tmp_path, monkeypatch):
    answer = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    open_to_all = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": answer})
    server = grpc.server(ThreadPoolExecutor(1), handlers=[open_to_all])
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    with loopback_only(), pytest.raises(SettingsError, match="asks for no token.*--insecure"):
        with start_ray(tmp_path, num_workers=1):
            pass
    server.stop(0)


@pytest.fixture
def head(tmp_path, monkeypatch):
    """A cluster on loopback that asks for the token in the file; its address is in RAY_ADDRESS. It counts two GPUs."""
    mark, port, token = uuid.uuid4().hex, free_port(), tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    with session.environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_USAGE_STATS_ENABLED="0",
        **{MARK: mark},
    ):
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += ["--include-dashboard=false", "--num-cpus=1", "--num-gpus=2", f"--temp-dir=/tmp/{mark[:8]}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
        with open(tmp_path / "head.txt", "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setattr(session.ray_constants, "ENABLE_RAY_CLUSTER", False)  # or this driver looks beyond loopback
    deadline = time.monotonic() + 60
    while "runtime started" not in (tmp_path / "head.txt").read_text():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "head.txt").read_text()
        time.sleep(0.2)
    yield token
    process.terminate()
    process.wait(120)
    for left in marked(mark):
        left.kill()
    shutil.rmtree(f"/tmp/{mark[:8]}")


@pytest.mark.alone
@pytest.mark.slow
def test_a_cluster_is_joined_with_its_token_and_not_without(head, tmp_path):
    with session.environment(RAY_AUTH_MODE="disabled"), pytest.raises(SettingsError, match="asks for a token"):
        with start_ray(tmp_path, num_workers=2):
            pass
    (tmp_path / "wrong").write_text("f" * 64)
    for path, reason in {"wrong": "refused our token", "nowhere": "asks for a token, and we have none"}.items():
        with session.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / path)):
            with pytest.raises(SettingsError, match=reason), start_ray(tmp_path, num_workers=2):
                pass
    with session.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(head)):
        with start_ray(tmp_path, num_workers=2, threads=2) as joined:
            placement = place(joined, 2, timeout_s=100, threads=2)
            assert not joined.own and placement.num_cpus == 0.5  # a fair share of the one there is
            worker = spawn(Echo, placement=placement, bundle=0, role="trainer")
            gather([worker.made], 60, "starting")
            assert gather([worker.call("environment", "OMP_NUM_THREADS")], 60, "looking") == [["2"]]
            with_gpus = place(joined, 1, 1, timeout_s=100, gpus=True)  # though all CPUs are taken
            assert (with_gpus.num_cpus, with_gpus.num_gpus) == (0, 1)
            worker = spawn(Echo, placement=with_gpus, bundle=1, role="server")
            gather([worker.made], 60, "starting")
            with pytest.raises(TryAgain, match="need 2 GPUs, the cluster has 2, and others hold them: wait for those"):
                place(joined, 2, timeout_s=0.5, gpus=True)
            with pytest.raises(TryAgain, match="apart finds no room for 1 trainer and 1 server on 1 host: `beside`"):
                place(joined, 1, 1, "apart", timeout_s=0.5)
    assert not ray.is_initialized()


# One Ray for the tests below, which therefore come after those that join another


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    environment, handler = environment_now(), signal.getsignal(signal.SIGTERM)
    with start_ray(tmp_path_factory.mktemp("run"), num_workers=4, threads=3) as own:
        yield own, (placement := place(own, 4, timeout_s=60)), mark
        stuck = spawn(Echo, placement=placement, bundle=3, role="server")
        gather([stuck.made], 60, "starting")
        stuck.call("hold_interpreter")
        assert len(marked(mark)) >= 6
    ended(mark, 15)
    assert environment_now() == environment and signal.getsignal(signal.SIGTERM) == handler
    del os.environ[MARK]


@pytest.fixture(scope="module")
def workers(running):
    made = [spawn(Echo, n, placement=running[1], bundle=n, role="trainer", max_concurrency=2) for n in range(2)]
    gather([w.made for w in made], 60, "starting")
    return made


@pytest.fixture
def one(running):
    """A worker that the test may spoil."""
    worker = spawn(Echo, 5, placement=running[1], bundle=3, role="server", number=5)
    gather([worker.made], 60, "starting")
    yield worker
    worker.kill()


@pytest.mark.alone
@pytest.mark.slow
def test_answers_come_in_the_order_of_the_calls(workers):
    calls = [workers[1].call("number_of"), workers[0].call("number_of"), workers[1].call("number_of")]
    assert gather(calls, 60, "counting") == [1, 0, 1]


@pytest.mark.alone
@pytest.mark.slow
def test_workers_have_their_environment_and_no_gpu(workers):
    [values] = gather([workers[0].call("environment", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")], 60, "looking")
    assert values == ["3", ""]
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.alone
@pytest.mark.slow
def test_what_a_worker_prints_is_in_its_log(workers):
    gather([workers[0].call("say", "three words here")], 60, "talking")
    assert "three words here" in workers[0].log.read_text()


@pytest.mark.alone
@pytest.mark.slow
def test_a_user_error_comes_out_as_it_was(workers):
    with pytest.raises(DataError, match="^row 3 is empty$"):
        gather([workers[0].call("fail", DataError("row 3 is empty"))], 60, "reading data")


@pytest.mark.alone
@pytest.mark.slow
def test_a_user_error_of_a_constructor_comes_out_as_it_was(running):
    worker = spawn(Echo, bad=True, placement=running[1], bundle=2, role="trainer")
    with pytest.raises(DataError, match="^rows.jsonl, row 7: empty document$"):
        gather([worker.made], 60, "starting")
    worker.kill()


@pytest.mark.alone
@pytest.mark.slow
def test_another_exception_names_the_worker_and_its_traceback_is_in_the_log(workers):
    with pytest.raises(
        WorkerFailed, match=r"^trainer 1 failed while running step 12: KeyError: 'loss' \(traceback: "
    ) as e:
        gather([workers[1].call("fail", KeyError("loss"))], 60, "running step 12")
    assert e.value.workers == (workers[1],)
    assert "while running step 12" in workers[1].log.read_text() and "in fail" in workers[1].log.read_text()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(
    "how, cause",
    [("exit code", "exit code 4"), ("SIGKILL", "killed from outside or ended without a word"), ("SIGSEGV", "SIGSEGV")],
)
def test_a_dead_worker_is_lost_with_its_cause(one, workers, how, cause, capfd):
    """Its peers, who fail because of it and may be heard first, are not blamed."""
    calls = [workers[0].call("fail", RuntimeError("connection closed by peer")), one.call("die", how)]
    start = time.monotonic()
    with pytest.raises(WorkerLost, match=f"^lost server 5 while running step 1: .*{cause}"):
        gather(calls, 60, "running step 1")
    assert time.monotonic() - start < 40
    assert "worker died" not in capfd.readouterr().out  # Ray's own paragraph


@pytest.mark.alone
@pytest.mark.slow
def test_a_silent_worker_is_named_after_the_time_out(workers, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "SAY_EVERY_S", 0.2)
    caplog.set_level("INFO")
    with pytest.raises(WorkerSilent, match=r"^trainer 1 gave no answer within 3 s while running step 2"):
        gather([workers[0].call("number_of"), workers[1].call("sleep", 9)], 3, "running step 2")
    assert "waiting for trainer 1" in caplog.text


@pytest.mark.alone
@pytest.mark.slow
def test_gpus_that_a_machine_of_our_own_lacks_are_refused_at_once(running):
    with pytest.raises(SettingsError, match="^3 workers need 3 GPUs, this machine has 0: lower parallel.trainers or"):
        place(running[0], 3, gpus=True, timeout_s=60)


@pytest.mark.alone
@pytest.mark.slow
def test_taken_places_are_waited_for_aloud(running, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "SAY_EVERY_S", 0.4)
    caplog.set_level("INFO")
    with pytest.raises(TryAgain, match="4 workers share 4 CPUs of the cluster, and others hold them"):
        place(running[0], 4, timeout_s=1)
    assert "they need 4 CPUs, free are 0 CPUs" in caplog.text


def groups() -> list[str]:
    """States of the placement groups that there have been, but for those that are gone."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.mark.alone
@pytest.mark.slow
def test_a_place_that_somebody_else_has_taken_meanwhile_is_given_up_and_looked_for_again(running, monkeypatch):
    """What nodes say of their room is always of a moment ago."""
    asked = []

    def a_moment_ago():
        asked.append(groups())
        return {node["NodeID"]: node["Resources"] for node in ray.nodes()}

    monkeypatch.setattr(workers_module, "available_resources_per_node", a_moment_ago)
    monkeypatch.setattr(workers_module, "TAKEN_S", 0.2)
    with pytest.raises(TryAgain, match="others hold them"):
        place(running[0], 2, 2, timeout_s=1.5)
    assert len(asked) > 1 and all(before == ["CREATED"] for before in asked) and groups() == ["CREATED"]


@pytest.mark.alone
@pytest.mark.slow
def test_a_cluster_that_lacks_hosts_is_asked_for_what_they_would_have_while_somebody_waits(running, monkeypatch):
    """One that grows by itself does so for nothing else."""
    asked = []
    free = workers_module.available_resources_per_node
    monkeypatch.setattr(workers_module, "available_resources_per_node", lambda: asked.append(groups()) or free())
    with pytest.raises(TryAgain, match="2 workers need 2 GPUs, the cluster has 0"):
        place(replace(running[0], own=False), 2, gpus=True, timeout_s=1.5)
    assert asked[0] == groups() == ["CREATED"] and sorted(asked[-1]) == ["CREATED", "PENDING"]


@pytest.mark.alone
@pytest.mark.slow
def test_who_is_interrupted_while_waiting_for_a_place_leaves_no_group(running, monkeypatch):
    def interrupted(group, timeout_seconds):
        raise KeyboardInterrupt

    resources = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    monkeypatch.setattr(workers_module, "available_resources_per_node", lambda: resources)
    monkeypatch.setattr(workers_module.PlacementGroup, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place(running[0], 4, timeout_s=60)
    assert groups() == ["CREATED"]


@pytest.mark.alone
@pytest.mark.slow
def test_workers_meet_in_the_drivers_store(workers):
    store, port = rendezvous_store("127.0.0.1")
    store.set("greeting", "hello")
    assert gather([workers[0].call("store_value", port)], 60, "meeting") == [b"hello"]


@pytest.mark.alone
@pytest.mark.slow
def test_nothing_listens_beyond_loopback_and_nothing_answers_without_a_token(running, workers):
    open_ports = listeners(marked(running[2]))
    assert len(open_ports) > 3
    assert [address for address, _ in open_ports if not is_loopback(address)] == []
    assert not session._lets_in(ray.get_runtime_context().gcs_address, {})
    for _, port in open_ports:
        job = b'{"entrypoint": "id"}'
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/job_agent/jobs/", data=job, method="POST")
        with pytest.raises((OSError, http.client.HTTPException)) as refusal:
            urllib.request.urlopen(request, timeout=5)
        if isinstance(refusal.value, urllib.error.HTTPError):
            assert 400 <= refusal.value.code < 500, refusal.value


@pytest.mark.alone
@pytest.mark.slow
def test_the_token_is_for_its_owner_alone(running):
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    assert os.stat(token).st_mode & 0o777 == 0o600
    folder = os.path.dirname(token)
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert ray.get_runtime_context().get_session_name() in os.listdir(f"{folder}/ray")


# Endings, each of a driver of its own


DRIVER = """
import ctypes, os, signal, sys
from distca.launch.cluster.session import start_ray
from distca.launch.cluster.workers import gather, place, spawn

class Worker:
    def hold_interpreter(self):
        ctypes.PyDLL(None).sleep(1000)
    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs in the background is born deaf to Ctrl-C
    ending, folder = sys.argv[1:]
    num_workers = 2 if ending == "SIGKILL" else 1
    with start_ray(folder, num_workers=num_workers) as cluster:
        placement = place(cluster, num_workers, timeout_s=60)
        workers = [spawn(Worker, placement=placement, bundle=n, role="trainer") for n in range(num_workers)]
        gather([w.made for w in workers], 100, "starting")
        calls = [w.call(how) for w, how in zip(workers, ["hold_interpreter", "stop"])]
        print("up", flush=True)
        sys.stdin.readline()
        gather(calls, 100, "hanging")
"""
# Python raises for the first two: they stand for every exception. The end of the `running` fixture is the ordinary one.
ENDINGS = ["SIGINT", "SIGTERM", "SIGKILL"]


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """One driver per ending, started together, as starting is what takes long."""
    folder = tmp_path_factory.mktemp("drivers")
    (folder / "driver.py").write_text(DRIVER)
    started = {}
    for ending in ENDINGS:
        mark = uuid.uuid4().hex
        command = [sys.executable, folder / "driver.py", ending, folder / ending]
        environment = {**os.environ, MARK: mark}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started[ending] = mark, subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    yield started
    for mark, process in started.values():
        process.kill()
        process.communicate()
        for orphan in marked(mark):
            orphan.kill()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_however_a_driver_ends_nothing_of_it_stays(drivers, ending):
    """A worker of each holds the interpreter's lock in native code; where SIGKILL ends it, a second one is stopped."""
    mark, driver = drivers[ending]
    said = driver.stdout.readline()
    assert said == "up\n", driver.communicate()
    assert len(marked(mark)) >= 6
    driver.stdin.write("\n")
    driver.stdin.flush()
    time.sleep(0.5)
    where = os.killpg if ending == "SIGINT" else os.kill  # Ctrl-C reaches the whole group
    where(driver.pid, getattr(signal, ending))
    driver.communicate(timeout=100)
    ended(mark, 15)
    assert driver.returncode != 0
