"""Where do workers run, and how do they start, answer and end?

    with start_ray(run_folder, num_workers=4) as cluster:
        placement = place(cluster, num_workers=4, timeout_s=120)
        workers = [spawn(Trainer, rank, placement=placement, bundle=rank, role="trainer") for rank in range(4)]
        gather([w.made for w in workers], 120, "starting")
        losses = gather([w.call("step", 1) for w in workers], 600, "running step 1")

Workers are plain classes: Ray gives them a process, and only this file knows that. What this file promises:
  - a Ray of our own listens on loopback alone, asks for a token that nobody else knows, and joins no other;
  - whichever way the driver ends, all that its Ray has started ends too, even what is stuck in native code;
  - a signal that asks a run to stop is for the driver alone, also where everybody gets it;
  - every failure of a worker reaches the caller as one `UserError` that names the worker and what it was doing.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
import torch.distributed as dist
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
    ActorUnavailableError,
    AuthenticationError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distca.errors import SettingsError, TryAgain, UserError
from distca.launch.forkserver import ALLOCATOR, OWN_RAY, ForkServer, RayOptions
from distca.launch.hosts import (
    Common,
    listener,
    refuse_loopback,
    refuse_other_host,
    refuse_unreachable,
    unreachable,
)
from distca.launch.keeper import keeping
from distca.launch.limits import enough_allowed
from distca.launch.parent import guard_parent
from distca.launch.stop import deaf, held

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 128 << 20  # rows travel over our own links; the store holds settings and reports
SAY_EVERY_S = 30.0  # how often waiting is said aloud
ROOT_CAUSE_S = 1.0  # after a first failure, others are awaited this long: the first to speak is often a victim
AGENT_PORTS = (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)
LONGEST_TEMP_ROOT = 12  # a socket's path has at most 107 bytes, and Ray's and our names take about 92


class WorkerFailed(UserError):
    """A worker raised, died or fell silent; `workers` are those concerned."""

    def __init__(self, message: str, workers: Sequence[Worker]):
        super().__init__(message)
        self.workers = tuple(workers)


class WorkerLost(WorkerFailed):
    """A worker's process is gone."""


class WorkerSilent(WorkerFailed):
    """Workers did not answer in time; their processes may still be there."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that this driver is connected to."""

    own: bool  # started by us, for this run alone
    host: str  # address at which workers reach the driver
    logs: Path  # folder for what each worker prints


@dataclass(frozen=True, slots=True)
class Placement:
    """Resources set aside for all workers, one bundle for each."""

    cluster: Cluster
    group: PlacementGroup
    num_cpus: float  # of each bundle
    num_gpus: int  # of each bundle


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """Where a worker came up."""

    pid: int
    host: str
    gpu_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker in its own process, as the driver sees it."""

    role: str
    number: int
    log: Path  # what it prints, and the traceback of what it raised
    actor: Any
    log_start: int  # bytes that its log held before: of a predecessor, or of the run before
    kernel_ooms: int  # on this machine, before it started

    def __str__(self) -> str:
        return f"{self.role} {self.number}"

    @property
    def made(self) -> Call:
        """Answers with its `WorkerProcess` when the worker is constructed."""
        return Call(self, self.actor.made.remote())

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call:
        """Ask the worker to run one of its methods; returns at once, see `gather`."""
        return Call(self, self.actor.call.remote(method, args, kwargs))

    def kill(self) -> None:
        """End the process now. Its bundle is free for a successor."""
        ray.kill(self.actor, no_restart=True)


@dataclass(frozen=True, slots=True)
class Call:
    """A question to a worker, not yet answered."""

    worker: Worker
    ref: ray.ObjectRef


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
                stack.enter_context(_environment(PYTHONBREAKPOINT=os.environ.get("PYTHONBREAKPOINT")))
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
            _environment(
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
            _environment(**worker_env, **mark),  # workers inherit it from Ray's processes, which start here
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
        raise UserError(f"Ray did not start on this machine: {_last_line(error)} (its own words: {log})") from error


def _shut_down() -> None:
    """End Ray and what it started here; left alone it asks each process with a SIGTERM, which none hears, and waits."""
    if node := ray_driver._global_node:
        node.kill_all_processes = lambda **_: type(node).kill_all_processes(node, check_alive=False, wait=True)
    ray.shutdown()


def cluster_at(address: str, insecure: bool = False) -> str:
    """The address of the cluster's GCS, once it has answered and taken our token. Raises SettingsError or TryAgain."""
    if "://" in address:
        raise SettingsError(
            f"RAY_ADDRESS={address} is not the address of a cluster's GCS (host:6379). Use `ray job submit --address "
            f"{address} -- distca train ...`, run this on a node of the cluster, or unset RAY_ADDRESS to start a Ray "
            "of its own here."
        )
    try:
        gcs = services.canonicalize_bootstrap_address(address)  # looks up "auto", and a name's number
    except ValueError:
        raise SettingsError(f"RAY_ADDRESS={address} is not an address like host:6379") from None
    except ConnectionError as error:
        raise TryAgain(f"no answer from the Ray cluster at {address} (RAY_ADDRESS): {_last_line(error)}") from None
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
    if protected and not _lets_in(gcs, _our_token()):  # Ray would try for half a minute
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
        environment = {"env_vars": dict(worker_env)}
        try:
            ray.init(address=gcs, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except AuthenticationError as error:
            raise SettingsError(f"the Ray cluster at {gcs} refused our token: {_last_line(error)}") from None
        except ConnectionError as error:
            raise TryAgain(f"the Ray cluster at {gcs} did not let us in: {_last_line(error)}") from None
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


def _our_token() -> Mapping[str, str]:
    """The header that Ray's own calls have."""
    try:
        return AuthenticationTokenLoader.instance().get_token_for_http_header()
    except (AuthenticationError, RuntimeError) as error:
        reason = _last_line(error).split(". ")[0]
        raise SettingsError(f"the Ray cluster asks for a token, and we have none: {reason}") from None


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
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
    """Wait until Ray has so many hosts: those of a job come up one after the other. Raises `TryAgain`."""
    start = said = time.monotonic()
    while len(there := [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]) < num_hosts:
        now = time.monotonic()
        sentence = f"{len(there)} of {num_hosts} hosts are there: {', '.join(there)}"
        if now - start >= timeout_s:
            raise TryAgain(f"after {timeout_s:.0f} s {sentence}; the logs of Ray on the others say why")
        if now - said >= SAY_EVERY_S:
            logger.info("%s", sentence)
            said = now
        time.sleep(0.2)


def place(cluster: Cluster, num_workers: int, *, timeout_s: float, gpus: bool = False, threads: int = 1) -> Placement:
    """Set aside a place for each worker: one GPU where `gpus`, and CPUs for its threads, or a fair share of CPUs.

    Waits aloud while somebody else has them. Raises `TryAgain` after `timeout_s`; `SettingsError` at once where our own
    Ray can never have them.
    """
    have, hosts = ray.cluster_resources(), [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    num_gpus = num_workers if gpus else 0
    if cluster.own and have.get("GPU", 0) < num_gpus:
        raise SettingsError(_missing(num_workers, num_gpus, have, "this machine"))
    # CPUs are counted to be fair to others, not exactly: with too few, workers are slow, but they start.
    num_cpus = min(float(threads), cpu_share(hosts, num_workers))
    bundle = {"CPU": num_cpus, **({"GPU": 1} if gpus else {})}
    group = placement_group([bundle] * num_workers, strategy="PACK")
    start = time.monotonic()
    while not group.wait(timeout_seconds=max(0.1, min(SAY_EVERY_S, start + timeout_s - time.monotonic()))):
        waited = time.monotonic() - start
        if waited >= timeout_s:
            ray.util.remove_placement_group(group)
            sentence = _missing(num_workers, num_gpus, ray.cluster_resources(), "the cluster")
            raise TryAgain(f"{sentence} (waited {waited:.0f} s)")
        free = ray.available_resources()
        logger.info(
            "waiting for a place for %d workers since %.0f s: they need %s, free are %s",
            num_workers,
            waited,
            _amount(num_gpus, num_cpus * num_workers),
            _amount(free.get("GPU", 0) if gpus else 0, free.get("CPU", 0)),
        )
    return Placement(cluster, group, num_cpus, int(gpus))


def cpu_share(hosts: Sequence[float], num_workers: int) -> float:
    """The most CPUs, in hundredths, that each of the workers can have on hosts of so many CPUs; 0.01 where there are
    none to share. A worker is on one host."""
    shares = {int(100 * cpus / n) for cpus in hosts for n in range(1, num_workers + 1)}
    fitting = [share for share in shares if share and sum(int(100 * cpus) // share for cpus in hosts) >= num_workers]
    return max(fitting, default=1) / 100


def _missing(num_workers: int, num_gpus: int, have: Mapping[str, float], where: str) -> str:
    if num_gpus:
        return (
            f"{num_workers} workers need {_count(num_gpus, 'GPU')}, {where} has {have.get('GPU', 0):g}: lower "
            "parallel.trainers or parallel.servers, or set parallel.device: cpu"
        )
    return (
        f"{num_workers} workers share {_count(have.get('CPU', 0), 'CPU')} of {where}, and others hold them: wait for "
        "those, or lower parallel.trainers or parallel.servers"
    )


def _amount(num_gpus: float, num_cpus: float) -> str:
    return (f"{_count(num_gpus, 'GPU')} and " if num_gpus else "") + _count(round(num_cpus, 2), "CPU")


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def spawn(
    worker_class: type,
    *args: Any,
    placement: Placement,
    bundle: int,
    role: str,
    number: int | None = None,
    env: Mapping[str, str] | None = None,
    max_concurrency: int = 1,
    common: Common | None = None,
    **kwargs: Any,
) -> Worker:
    """Start a process in the placement's bundle that makes `worker_class(*args, **kwargs)`; await its `made`.

    With `common` it first looks whether its host has what all must have (`refuse_other_host`).
    `number` counts workers of a role (default: the bundle). `env` of a single worker costs a second, as Ray then cannot
    use a process that it keeps ready. `max_concurrency` calls run at the same time, each in a thread.
    """
    number = bundle if number is None else number
    log = placement.cluster.logs / f"{role}-{number}.txt"
    strategy = PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=bundle)
    options = dict(
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus,
        scheduling_strategy=strategy,
        max_concurrency=max_concurrency,
        max_restarts=0,  # a worker that lost its state is not replaced behind our back
        name=None,
    )
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    actor = ray.remote(_Host).options(**options).remote(str(log), common, worker_class, args, kwargs)
    return Worker(role, number, log, actor, log.stat().st_size if log.exists() else 0, _kernel_ooms())


class _Host:
    """The process that Ray gives a worker.

    Errors of the worker's constructor are kept for `made`, which reports them as they are; Ray would only keep text.
    """

    def __init__(self, log: str, common: Common | None, worker_class: type, args: tuple, kwargs: dict):
        guard_parent()
        if os.path.isdir(os.path.dirname(log)):  # on another node without shared folders, Ray's own log has to do
            _print_into(log)
        self._error: Exception | None = None
        try:
            if common:
                refuse_other_host(common, ray.util.get_node_ip_address())
            self._worker = worker_class(*args, **kwargs)
        except Exception as error:
            self._error = error

    def made(self) -> WorkerProcess:
        if self._error is not None:
            raise self._error
        gpu_ids = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return WorkerProcess(os.getpid(), ray.util.get_node_ip_address(), gpu_ids)

    def listen(self) -> int:
        """A port of this host at which it answers, until `listen` is called again."""
        self._listener = listener(ray.util.get_node_ip_address())
        return self._listener.getsockname()[1]

    def unreachable(self, places: dict[str, int]) -> dict[str, str]:
        return unreachable(places)

    def call(self, method: str, args: tuple, kwargs: dict) -> Any:
        if self._error is not None:
            raise self._error
        return getattr(self._worker, method)(*args, **kwargs)


def refuse_strangers(workers: Sequence[Worker], processes: Sequence[WorkerProcess], timeout_s: float) -> None:
    """Raise SettingsError where a worker's host does not reach another's, by the addresses that they have in Ray."""
    one_of = {process.host: worker for worker, process in zip(workers, processes, strict=True)}
    if len(one_of) == 1:
        return
    refuse_loopback(list(one_of))

    def ask(method: str, *arguments: Any) -> dict[str, Any]:
        calls = [Call(worker, getattr(worker.actor, method).remote(*arguments)) for worker in one_of.values()]
        return dict(zip(one_of, gather(calls, timeout_s, "looking whether hosts reach each other"), strict=True))

    refuse_unreachable(ask("unreachable", ask("listen")))


def _print_into(log: str) -> None:
    """Send what this process prints, native code included, to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def gather(calls: Sequence[Call], timeout_s: float | None, what: str) -> list[Any]:
    """Wait for the answers, in the order of the calls. `what` completes "while …": "running step 12".

    A `UserError` raised in a worker is raised here as it was. Any other exception becomes a `WorkerFailed` with its
    last line, and its traceback goes to the worker's log. A dead worker becomes `WorkerLost`, no answer within
    `timeout_s` `WorkerSilent`. Where several fail, the likeliest root cause is raised: a death comes first.
    """
    call_of = {call.ref: call for call in calls}
    answers: dict[ray.ObjectRef, Any] = {}
    failures: list[UserError] = []
    start = said = time.monotonic()
    deadline = start + (float("inf") if timeout_s is None else timeout_s)
    pending = list(call_of)
    while pending and (left := deadline - time.monotonic()) > 0:
        done, pending = ray.wait(pending, num_returns=1, timeout=min(SAY_EVERY_S, left))
        for ref in done:
            try:
                answers[ref] = ray.get(ref)
            except RayError as error:
                failures.append(_sentence(call_of[ref].worker, error, what))
                if len(failures) == 1:
                    deadline = time.monotonic() + ROOT_CAUSE_S
        now = time.monotonic()
        if now - said >= SAY_EVERY_S:
            logger.info(
                "%s since %.0f s; waiting for %s", what, now - start, _names(call_of[ref].worker for ref in pending)
            )
            said = now
    if failures:
        raise min(failures, key=_rank_of_cause) from None
    if pending:
        silent = [call_of[ref].worker for ref in pending]
        raise WorkerSilent(f"{_names(silent)} gave no answer within {timeout_s:g} s while {what}", silent)
    return [answers[call.ref] for call in calls]


def _rank_of_cause(failure: UserError) -> int:
    return 0 if isinstance(failure, WorkerLost) else 2 if isinstance(failure, WorkerFailed) else 1


def _names(workers: Iterator[Worker] | Sequence[Worker]) -> str:
    return ", ".join(str(worker) for worker in workers)


def _sentence(worker: Worker, error: RayError, what: str) -> UserError:
    """What Ray reports, as an error for people."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, UserError):
            return error.cause
        with open(worker.log, "a") as log:
            log.write(f"\nwhile {what}:\n{_uncoloured(error)}\n")
        last = "".join(traceback.format_exception_only(error.cause)).strip()
        return WorkerFailed(f"{worker} failed while {what}: {last} (traceback: {worker.log})", [worker])
    if isinstance(error, (RayActorError, OutOfMemoryError, ActorUnavailableError)):
        return WorkerLost(f"lost {worker} while {what}: {_cause_of_death(worker, error)}", [worker])
    return WorkerFailed(f"{worker} failed while {what}: {_last_line(error)}", [worker])


def _cause_of_death(worker: Worker, error: RayError) -> str:
    text = str(error)
    if node := re.search(r"node has died\. Node Id: (\w+)", text):
        return f"host {_host_of(node[1])} was lost"
    if re.search(r"\bGCS\b|StatusCode\.|RPC [Ee]rror|rpc_code", text):
        return "the host that runs Ray's head was lost"
    if code := re.search(r"exit code (-?\d+)", text):
        return f"its process ended with exit code {code[1]} (its log: {worker.log})"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return "Ray ended its process because the node was running out of memory"
    if "End of file" in text:
        if crash := _crash(worker):
            return f"its process crashed: {crash} (its log: {worker.log})"
        if _kernel_ooms() > worker.kernel_ooms:
            return "its process was killed, and the kernel has killed for want of memory meanwhile"
        return f"its process was killed from outside or ended without a word (its log: {worker.log})"
    return _last_line(error)


def _host_of(node: str) -> str:
    """The address of a Ray node, which Ray still knows when the node is gone."""
    try:
        return next(found["NodeManagerAddress"] for found in ray.nodes() if found["NodeID"] == node)
    except (StopIteration, RayError, RuntimeError):
        return f"of Ray's node {node}"


def _crash(worker: Worker) -> str | None:
    """What Ray or Python's fault handler wrote when native code crashed, such as "SIGSEGV"."""
    try:
        with open(worker.log, "rb") as file:
            file.seek(max(worker.log_start, os.path.getsize(worker.log) - 65536))
            tail = file.read().decode(errors="replace")
    except OSError:
        return None
    found = re.search(r"^Fatal Python error: (.*)$|^\*\*\* (SIG\w+) received", tail, re.MULTILINE)
    return found and (found[1] or found[2])


def _kernel_ooms() -> int:
    """How often this machine's kernel has killed for want of memory; 0 where it does not tell."""
    try:
        counters = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)", counters, re.MULTILINE)
    return int(found[1]) if found else 0


def _uncoloured(error: BaseException) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in _uncoloured(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def rendezvous_store(host: str, timeout_s: float = 120.0) -> tuple[dist.TCPStore, int]:
    """The driver's key-value store, in which workers find each other, and its port. Listens on `host` alone."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.bind(address)
    listener.listen(1024)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # left alone, the store would listen on every interface
    )
    return store, port


def connect_store(host: str, port: int, timeout_s: float = 120.0) -> dist.TCPStore:
    """A worker's connection to the driver's `rendezvous_store`."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
