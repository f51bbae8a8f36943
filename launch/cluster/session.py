"""Which Ray does a run use, how does it start, and how does it end?

A Ray of the run's own, or the cluster that RAY_ADDRESS names. What this file promises:
  - a Ray of our own listens on loopback alone, asks for a token that nobody else knows, and joins no other;
  - whichever way the driver ends, all that its Ray has started ends too, even what is stuck in native code;
  - a signal that asks a run to stop is for the driver alone, also where everybody gets it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private import utils as ray_utils
from ray._private import worker as ray_driver
from ray._private.node import Node
from ray._raylet import (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
    persist_port,
)
from ray.exceptions import (
    AuthenticationError,
)

from distca.errors import SettingsError, TryAgain, UserError
from distca.launch.cluster.hosts import (
    LOOPBACK,
    refuse_loopback,
)
from distca.launch.process.forkserver import ALLOCATOR, OWN_RAY, ForkServer, RayOptions
from distca.launch.process.keeper import keeping
from distca.launch.process.limits import enough_allowed
from distca.launch.process.stop import deaf, held

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 << 20  # rows travel over our own links; the store holds settings and reports
SAY_EVERY_S = 30.0  # how often waiting is said aloud
AGENT_PORTS = (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)
LONGEST_TEMP_ROOT = 12  # a socket's path has at most 107 bytes, and Ray's and our names take about 92


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that this driver is connected to."""

    own: bool  # started by us, for this run alone
    host: str  # address at which workers reach the driver
    logs: Path  # folder for what each worker prints


@contextlib.contextmanager
def start_ray(
    run_folder: str | Path,
    options: RayOptions = OWN_RAY,
    *,
    num_workers: int,
    threads: int = 1,
    gpus: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """Ray for one run: the cluster that RAY_ADDRESS names (as inside a Ray job), else one of our own on this machine.

    `env` is set in every worker. Workers print into `run_folder/logs`. A cluster that does not ask for a token is
    refused unless `options` say otherwise. Workers without a GPU come from their fork server, if there is one. On the
    way out Ray is shut down and the environment as before.
    Requests to stop wait while Ray starts and while it ends; its processes never hear of them.
    """
    assert not ray.is_initialized(), "this process is connected to a Ray already"
    # The kernel ends our processes when the *thread* that started them ends.
    assert threading.current_thread() is threading.main_thread(), "Ray is started from the main thread"
    logs = Path(run_folder).resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    worker_env = {name: os.environ.get(name, value) for name, value in ALLOCATOR.items()}
    worker_env |= {"OMP_NUM_THREADS": str(threads), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}), **(env or {})}
    address = os.environ.get("RAY_ADDRESS", "local")
    own = address in ("", "local")
    if own and options.hosts > 1:
        raise SettingsError(f"--hosts {options.hosts}: a Ray of one's own is on this host alone; set RAY_ADDRESS")
    if own:
        started = _start_own(num_workers, gpus, worker_env, logs, None if gpus else options.forkserver)
    else:
        started = _join(address, worker_env, options.insecure)
    with contextlib.ExitStack() as stack:
        try:
            with held(), _signals_kept():
                stack.enter_context(environment(PYTHONBREAKPOINT=os.environ.get("PYTHONBREAKPOINT")))
                host = stack.enter_context(started)
            yield Cluster(own=own, host=host, logs=logs)
        finally:
            with held():
                stack.close()


@contextlib.contextmanager
def _start_own(
    num_workers: int, gpus: bool, worker_env: Mapping[str, str], logs: Path, forkserver: ForkServer | None
) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_private_folder())
        token = folder / "token"
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        stack.enter_context(
            environment(
                RAY_AUTH_MODE="token",
                RAY_AUTH_TOKEN=None,  # would win over the path
                RAY_AUTH_TOKEN_PATH=str(token),
                RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # the one way to make every part of Ray listen on loopback only
                RAY_USAGE_STATS_ENABLED="0",
                RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # without it, a warning per process
            )
        )
        # what RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 does, for this process: it imported Ray before the variable was set
        stack.enter_context(_replaced(ray_constants, "ENABLE_RAY_CLUSTER", False))
        stack.enter_context(_replaced(ray_driver, "print_to_stdstream", _to_log))
        stack.enter_context(enough_allowed(num_workers, LOOPBACK))
        mark = stack.enter_context(keeping(folder))
        stack.callback(_shut_down)
        if forkserver:
            forkserver.listen(folder)
        with (
            _lean(forkserver),
            environment(**worker_env, **mark),  # workers inherit it from Ray's processes, which start here
            _failing_in_words(folder, logs),
        ):
            ray.init(
                address="local",
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder / "ray"),  # Ray opens this folder to everybody, so it lies in one that is closed
                num_cpus=num_workers,  # a count of places, not of cores: a laptop runs more workers than it has cores
                num_gpus=None if gpus else 0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield LOOPBACK


@contextlib.contextmanager
def _lean(forkserver: ForkServer | None) -> Iterator[None]:
    """Ray starts without what a single run does not use, and which takes most of its start: its dashboard, autoscaler
    and printing of logs, and the two agents of its raylet. What would start a worker asks the fork server to."""
    start = services.start_ray_process

    def start_ray_process(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_RAYLET:
            command = _without_agents(command, forkserver)
        return start(command, process_type, **options)

    with contextlib.ExitStack() as stack:
        for unused in ("start_monitor", "start_log_monitor", "start_api_server"):
            stack.enter_context(_replaced(Node, unused, lambda self, **_: None))
        # looks for what its dashboard would import by importing it
        stack.enter_context(_replaced(ray_utils, "get_dashboard_dependency_error", lambda: None))
        stack.enter_context(_replaced(services, "start_ray_process", start_ray_process))
        yield


def _without_agents(command: list[str], forkserver: ForkServer | None) -> list[str]:
    """A raylet's command, with sleepers for its agents, for which it waits otherwise, and without which it ends."""
    options = dict(part.partition("=")[::2] for part in command[1:])
    for port in AGENT_PORTS:  # where it looks for an agent's; -1 is Ray's own word for one that is not there
        persist_port(options["--session_dir"], options["--node_id"], port, -1)
    changed = dict.fromkeys(("--dashboard_agent_command", "--runtime_env_agent_command"), "sleep 2147483647")
    if forkserver:
        script = os.path.join(os.path.dirname(ray.__file__), "_private", "workers", "default_worker.py")
        asking = subprocess.list2cmdline(forkserver.command(script))
        changed["--python_worker_command"] = options["--python_worker_command"].replace(script, asking)
    return [f"{name}={changed[name]}" if (name := part.partition("=")[0]) in changed else part for part in command]


@contextlib.contextmanager
def _failing_in_words(folder: Path, logs: Path) -> Iterator[None]:
    """What Ray's processes wrote about a start that failed is kept, as their folder is not."""
    try:
        yield
    except Exception as error:
        log = logs / "ray.txt"
        with open(log, "w", encoding="utf-8") as kept:
            kept.write(f"{''.join(traceback.format_exception(error))}\n")
            for file in sorted(folder.glob("ray/session_latest/logs/*.*")):
                kept.write(f"---- {file.name}\n{file.read_text(errors='replace')}\n")
        raise UserError(f"Ray did not start on this machine: {last_line(error)} (its own words: {log})") from error


def _shut_down() -> None:
    """End Ray and what it started here; left alone it asks each process with a SIGTERM, which none hears, and waits."""
    if node := ray_driver._global_node:
        node.kill_all_processes = lambda **_: type(node).kill_all_processes(node, check_alive=False, wait=True)
    ray.shutdown()


def cluster_at(address: str, insecure: bool = False) -> str:
    """The address of the cluster's GCS, once it has answered and taken our token. Raises SettingsError or TryAgain."""
    if "://" in address:
        raise SettingsError(
            f"RAY_ADDRESS={address} is not the address of a cluster's GCS (host:6379). Use `distca submit RUN.yaml "
            f"--address {address}`, run this on a node of the cluster, or unset RAY_ADDRESS to start a Ray of its own "
            "here."
        )
    try:
        gcs = services.canonicalize_bootstrap_address(address)  # looks up "auto", and a name's number
    except ValueError:
        raise SettingsError(f"RAY_ADDRESS={address} is not an address like host:6379") from None
    except ConnectionError as error:
        raise TryAgain(f"no answer from the Ray cluster at {address} (RAY_ADDRESS): {last_line(error)}") from None
    protected = not _lets_in(gcs, {})  # before our own token goes there
    if not protected:
        sentence = f"the Ray cluster at {gcs} asks for no token: whoever reaches it can run any code on it"
        if not insecure:
            raise SettingsError(f"{sentence}. Start it with RAY_AUTH_MODE=token, or accept this: --insecure")
        logger.warning("%s", sentence)
    if protected and get_authentication_mode() != AuthenticationMode.TOKEN:
        raise SettingsError(
            f"the Ray cluster at {gcs} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<its file>"
        )
    if protected and not _lets_in(gcs, our_token()):  # Ray would try for half a minute
        raise SettingsError(
            f"the Ray cluster at {gcs} refused our token: set RAY_AUTH_TOKEN_PATH to the file with its token"
        )
    return gcs


@contextlib.contextmanager
def _join(address: str, worker_env: Mapping[str, str], insecure: bool) -> Iterator[str]:
    gcs = cluster_at(address, insecure)
    logger.info("joining the Ray cluster at %s (RAY_ADDRESS)", gcs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(ray_driver, "print_to_stdstream", _to_log))
        stack.callback(ray.shutdown)
        of_workers = {"env_vars": dict(worker_env)}
        try:
            ray.init(address=gcs, runtime_env=of_workers, log_to_driver=False, logging_level=logging.ERROR)
        except AuthenticationError as error:
            raise SettingsError(f"the Ray cluster at {gcs} refused our token: {last_line(error)}") from None
        except ConnectionError as error:
            raise TryAgain(f"the Ray cluster at {gcs} did not let us in: {last_line(error)}") from None
        yield ray.util.get_node_ip_address()


def _lets_in(gcs_address: str, token: Mapping[str, str]) -> bool:
    """Whether the cluster answers a caller with this header; asked with the most harmless of its questions."""
    with grpc.insecure_channel(gcs_address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=10, metadata=tuple(token.items()))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise TryAgain(
                f"no answer from the Ray cluster at {gcs_address} (RAY_ADDRESS): {error.code().name}: {error.details()}"
            ) from None
    return True


def our_token() -> Mapping[str, str]:
    """The header that Ray's own calls have."""
    try:
        return AuthenticationTokenLoader.instance().get_token_for_http_header()
    except (AuthenticationError, RuntimeError) as error:
        reason = last_line(error).split(". ")[0]
        raise SettingsError(f"the Ray cluster asks for a token, and we have none: {reason}") from None


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Environment variables for a while; None takes one away."""
    before = {name: os.environ.get(name) for name in values}

    def put(changes: Mapping[str, str | None]) -> None:
        for name, value in changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        Config.initialize("")  # Ray read the environment when it was imported
        AuthenticationTokenLoader.instance().reset_cache()

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Something of Ray's is something else for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _DeafProcess(services.ConsolePopen):
    """One that no request to stop reaches, and none that it starts."""

    def __init__(self, *args: Any, **kwargs: Any):
        with deaf():
            super().__init__(*args, **kwargs)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Requests to stop are for the driver alone; and Ray would put handlers for SIGTERM, in Python and in native code,
    that end it whatever it is doing."""
    with (
        _replaced(services, "ConsolePopen", _DeafProcess),
        _replaced(ray_utils, "set_sigterm_handler", lambda handler: None),
        _replaced(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
    ):
        yield


def _to_log(data: Mapping[str, Any], **_: Any) -> None:
    """Where Ray's own paragraphs about dead workers go: `gather` says the same in a sentence."""
    logger.debug("ray: %s", " ".join(data["lines"]))


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A new folder that only this user can enter, for Ray's sockets, logs and token; gone on the way out.

    A killed driver leaves its folder behind: it is unlocked then, and the next start removes it.
    """
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_TEMP_ROOT:
        root = Path("/tmp")
    for old in root.glob("distca-ray-*"):
        with contextlib.suppress(OSError), open(old / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix="distca-ray-", dir=root))
    except OSError as error:
        raise SettingsError(
            f"no folder for Ray's sockets can be made in {root}: {error.strerror}. Let TMPDIR name a folder of at most "
            f"{LONGEST_TEMP_ROOT} letters that can be written to, as their paths cannot be longer"
        ) from None
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def wait_for_hosts(num_hosts: int, timeout_s: float) -> None:
    """Wait until Ray has so many hosts: those of a job come up one after the other. Raises `TryAgain`; `SettingsError`
    where no other would reach one of them."""
    start = said = time.monotonic()
    while len(there := hosts_by_address()) < num_hosts:
        refuse_loopback(there)
        now = time.monotonic()
        sentence = f"{len(there)} of {num_hosts} hosts are there: {', '.join(there)}"
        if now - start >= timeout_s:
            raise TryAgain(f"after {timeout_s:.0f} s {sentence}; the logs of Ray on the others say why")
        if now - said >= SAY_EVERY_S:
            logger.info("%s", sentence)
            said = now
        time.sleep(0.2)
    refuse_loopback(there)


def hosts_by_address() -> dict[str, str]:
    """Names of the hosts that Ray has, by their addresses."""
    return {node["NodeManagerAddress"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}


def uncoloured(error: BaseException) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in uncoloured(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
