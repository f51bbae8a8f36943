"""How do tests get several hosts? Network namespaces of this machine, each with an address of its own, on one bridge.

    with network(3) as hosts, ray_cluster(hosts, folder, num_cpus=2) as environment:
        done = hosts[0].run(["distca", "verify", "run.yaml"], env=environment)

Their files are the same. Each can have its own /etc/hosts. Only root can make them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

START_S = 90
PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def start(self, command: Sequence[str], **options) -> subprocess.Popen:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def run(self, command: Sequence[str], timeout_s: float = 240, **options) -> subprocess.CompletedProcess:
        """Its output, both streams as one text."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=60)
            raise AssertionError(f"{command} took more than {timeout_s:g} s:\n{output}") from None
        return subprocess.CompletedProcess(command, process.returncode, output)

    def pids(self) -> list[int]:
        """Processes that use its network."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[list[Host]]:
    """Hosts that reach each other and nothing else; whatever runs there is killed at the end. Skips without root."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("would show that hosts with addresses of their own work together; only root can make them, with ip")
    mark = secrets.token_hex(3)
    bridge, subnet = f"dcb{mark}", f"10.{64 + os.getpid() % 64}.{secrets.randbelow(256)}"
    hosts = [Host(f"distca-{mark}-{n}", f"{subnet}.{n + 1}") for n in range(num_hosts)]
    with contextlib.ExitStack() as stack:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            stack.callback(_ip, "link", "del", bridge)
            _ip("link", "set", bridge, "up")
            for n, host in enumerate(hosts):
                _ip("netns", "add", host.name)
                stack.callback(_end, host)
                ours = f"dcv{mark}{n}"
                _ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", host.name)
                _ip("link", "set", ours, "master", bridge, "up")
                _ip("-n", host.name, "link", "set", "lo", "up")
                _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
                _ip("-n", host.name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:  # a container that forbids it even to root
            pytest.skip(f"would show that hosts with addresses of their own work together: {error.stderr.strip()}")
        yield hosts


@contextlib.contextmanager
def closed(host: Host, to: Host) -> Iterator[None]:
    """The other host cannot connect to ports that the kernel picks here, for a while; Ray needs none of its nodes'
    workers to reach those of another."""
    rules = [  # the kernel's first one lets in whatever is addressed to it
        ("add", "del", "pref 10 lookup local"),
        ("del", "add", "pref 0 lookup local"),
        ("add", "del", f"pref 5 from {to.address} ipproto tcp dport 10000-65000 prohibit"),
    ]
    for do, _, rule in rules:
        _ip("-n", host.name, "rule", do, *rule.split())
    try:
        yield
    finally:
        for _, undo, rule in reversed(rules):
            _ip("-n", host.name, "rule", undo, *rule.split())


def without_ray() -> dict[str, str]:
    """The environment, of which nothing chooses a Ray or an interface."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_"))}


@contextlib.contextmanager
def ray_head(
    host: Host, folder: Path, num_cpus: int, job_server: bool = False, before: str = ""
) -> Iterator[dict[str, str]]:
    """A Ray that asks for a token: the environment of a driver, and of the nodes that join. Its jobs find Python in
    the environment of these tests. `before`: see `ray_node`."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    sessions = tempfile.mkdtemp(prefix="hosts-", dir="/tmp")  # Ray's sockets want a short path
    environment = without_ray() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"{host.address}:{PORT}",
        "RAY_TMPDIR": sessions,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    options = ["--head", f"--port={PORT}", f"--include-dashboard={job_server}".lower()]
    options += [f"--dashboard-host={host.address}"] if job_server else []
    try:
        with _node(host, options, environment, folder, num_cpus, before):
            yield environment
    finally:
        shutil.rmtree(sessions, ignore_errors=True)


@contextlib.contextmanager
def ray_node(
    host: Host, environment: Mapping[str, str], folder: Path, num_cpus: int, before: str = ""
) -> Iterator[None]:
    """A further node, after a shell has run `before` on its host: what that mounts, only the node sees."""
    with _node(host, [f"--address={environment['RAY_ADDRESS']}"], environment, folder, num_cpus, before):
        yield


def own_sessions(environment: Mapping[str, str]) -> str:
    """`before` of a node that runs jobs: Ray brings their files into a folder of each host,
    which is one and the same here."""
    return f"mount -t tmpfs tmpfs {environment['RAY_TMPDIR']}"


@contextlib.contextmanager
def ray_cluster(
    hosts: Sequence[Host], folder: Path, num_cpus: int, job_server: bool = False, before: str = ":"
) -> Iterator[dict[str, str]]:
    """A Ray node on every host, the head on the first: the environment of a driver. `before`: see `ray_node`."""
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(ray_head(hosts[0], folder, num_cpus, job_server, before))
        before += f" && {own_sessions(environment)}" if job_server else ""
        for host in hosts[1:]:
            stack.enter_context(ray_node(host, environment, folder, num_cpus, before))
        yield environment


@contextlib.contextmanager
def _node(
    host: Host, options: Sequence[str], environment: Mapping[str, str], folder: Path, num_cpus: int, before: str = ""
) -> Iterator[None]:
    command = [*RAY, "start", "--block", *options, f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}"]
    command += ["--object-store-memory=100000000"]
    log = folder / f"{host.name}.txt"
    with open(log, "w") as output:
        shell = ["sh", "-c", f'{before or ":"} && exec "$@"', "sh", *command]
        environment = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        node = host.start(shell, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while "runtime started" not in log.read_text():
            assert time.monotonic() < deadline and node.poll() is None, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        node.kill()
        node.wait()
        _kill_all(host)


def _end(host: Host) -> None:
    _kill_all(host)
    _ip("netns", "del", host.name)


def _kill_all(host: Host) -> None:
    """Until none is left: they start others."""
    while pids := host.pids():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
