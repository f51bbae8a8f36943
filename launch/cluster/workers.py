"""Where do workers run, and how do they start, answer and end?

    with start_ray(run_folder, num_workers=4) as cluster:
        placement = place(cluster, trainers=4, timeout_s=120)
        workers = [spawn(Trainer, rank, placement=placement, bundle=rank, role="trainer") for rank in range(4)]
        gather([w.made for w in workers], 120, "starting")
        losses = gather([w.call("step", 1) for w in workers], 600, "running step 1")

Workers are plain classes: Ray gives them a process, and only this file knows that. It promises that every failure of a
worker reaches the caller as one `UserError` that names the worker and what it was doing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import worker as ray_driver
from ray._private.state import available_resources_per_node, state
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distca.config import Placement
from distca.errors import SettingsError, TryAgain, UserError
from distca.launch.cluster.hosts import (
    Common,
    listener,
    refuse_other_host,
    refuse_unreachable,
    unreachable,
)
from distca.launch.cluster.places import cpus_there, places_of, shared_out
from distca.launch.cluster.session import SAY_EVERY_S, Cluster, last_line, uncoloured
from distca.launch.process.parent import guard_parent
from distca.launch.process.stop import held

logger = logging.getLogger(__name__)

NODE = "ray.io/node-id"  # the label that Ray gives each node
ASK_AGAIN_S = 0.2
TAKEN_S = 5.0  # what is free is taken at once; later somebody else has it
LOSSES = (RayActorError, OutOfMemoryError, ActorUnavailableError)  # the worker's process is gone, or will be
LAST_WORDS_S, LAST_WORDS_BYTES = 15.0, 1 << 16  # for and of what a worker printed on another host
HEAD_LOST = re.compile(r"\bGCS\b|StatusCode\.|RPC [Ee]rror|rpc_code")
ROOT_CAUSE_S = 1.0  # after a first failure, others are awaited this long: the first to speak is often a victim


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
class _Node:
    """One of Ray's, with its CPUs and GPUs."""

    name: str
    host: str  # its address
    has: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Resources set aside for all workers, one bundle for each."""

    cluster: Cluster
    group: PlacementGroup
    num_cpus: float  # of each bundle
    num_gpus: int  # of each bundle
    hosts: tuple[str, ...]  # address of each bundle's


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


def place(
    cluster: Cluster,
    trainers: int,
    servers: int = 0,
    placement: Placement = "beside",
    *,
    timeout_s: float,
    gpus: bool = False,
    threads: int = 1,
) -> Reserved:
    """Set aside a place for each worker, trainers first: a GPU where `gpus`, and CPUs for its threads, or a fair share.

    Waits aloud while somebody else has them. Raises `TryAgain` after `timeout_s`; `SettingsError` at once where our own
    Ray can never have them. That is one host, where `placement` has nothing to say.
    """
    start = said = time.monotonic()
    wanted = (trainers, servers, "beside" if cluster.own else placement)
    with _asking() as ask_for:
        while True:
            nodes = _nodes()
            decided = _decided([node.has for node in nodes], wanted, gpus, threads)
            if cluster.own and decided is None:
                raise SettingsError(_missing(wanted, gpus, nodes, "this machine"))
            left_s = start + timeout_s - time.monotonic()
            ask_for([] if decided else [{"GPU": 1} if gpus else {"CPU": threads}] * (trainers + servers))
            if decided and (now_free := _free_now(nodes, decided[0], wanted, gpus, threads)):
                if reserved := _reserve(cluster, nodes, *now_free, gpus, max(0.1, min(TAKEN_S, left_s))):
                    return reserved
            now = time.monotonic()
            if now - start >= timeout_s:
                raise TryAgain(f"{_missing(wanted, gpus, nodes)} (waited {now - start:.0f} s)")
            if now - said >= SAY_EVERY_S:
                said, sentence = now, "waiting for a place for %d workers since %.0f s: %s"
                lacks = _missing(wanted, gpus, nodes)
                why = _awaited(nodes, decided[0], trainers + servers, gpus) if decided else lacks
                logger.info(sentence, trainers + servers, now - start, why)
            time.sleep(ASK_AGAIN_S)


@contextlib.contextmanager
def _asking() -> Iterator[Callable[[list[dict[str, float]]], None]]:
    """A wish for these resources that stays with Ray until another, or none, is asked for: a cluster that grows by
    itself does so for what somebody waits for."""
    groups: list[PlacementGroup] = []

    def ask_for(bundles: list[dict[str, float]]) -> None:
        if bool(bundles) == bool(groups):
            return
        with held():
            if bundles:
                groups.append(placement_group(bundles))
            else:
                ray.util.remove_placement_group(groups.pop())

    try:
        yield ask_for
    finally:
        ask_for([])


def _nodes() -> list[_Node]:
    """Those that are there, the driver's own first."""
    free = available_resources_per_node()
    own = ray.get_runtime_context().get_node_id()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            name, has = node["NodeID"], node["Resources"]
            held = free.get(name, {})
            counts = [{kind: float(of.get(kind, 0)) for kind in ("CPU", "GPU")} for of in (has, held)]
            found.append(_Node(name, node["NodeManagerAddress"], *counts))
    return sorted(found, key=lambda node: (node.name != own, ipaddress.ip_address(node.host)))


def _decided(
    have: Sequence[Mapping[str, float]], wanted: tuple[int, int, Placement], gpus: bool, threads: int
) -> tuple[float, list[int]] | None:
    """CPUs of each worker and its place, if nobody else were there; None where there is no room."""
    cpus = [node["CPU"] for node in have]
    if not gpus:
        return shared_out(cpus, threads, *wanted)
    places = places_of([int(node["GPU"]) for node in have], *wanted)
    # CPUs are counted to be fair to others, not exactly: with too few, workers are slow, but they start.
    return places and (cpus_there(cpus, threads, places), places)


def _free_now(
    nodes: Sequence[_Node], num_cpus: float, wanted: tuple[int, int, Placement], gpus: bool, threads: int
) -> tuple[float, list[int]] | None:
    """CPUs of each worker and its place, beside what others hold; a GPU worker makes do with the CPUs that are left."""
    free = [node.free for node in nodes]
    if gpus:
        return _decided(free, wanted, gpus, threads)
    places = places_of([int(round(100 * node["CPU"]) // round(100 * num_cpus)) for node in free], *wanted)
    return places and (num_cpus, places)


def _reserve(
    cluster: Cluster, nodes: Sequence[_Node], num_cpus: float, places: Sequence[int], gpus: bool, timeout_s: float
) -> Reserved | None:
    """All places at once, or none where somebody else was faster."""
    bundle, at = {"CPU": num_cpus, "GPU": float(gpus)}, [nodes[place] for place in places]
    bundle = {kind: number for kind, number in bundle.items() if number}
    group, ready = None, False
    try:
        with held():
            group = placement_group([bundle] * len(at), bundle_label_selector=[{NODE: node.name} for node in at])
        ready = group.wait(timeout_seconds=timeout_s)
    finally:
        if group and not ready:
            ray.util.remove_placement_group(group)
    return Reserved(cluster, group, num_cpus, int(gpus), tuple(node.host for node in at)) if ready else None


def _awaited(nodes: Sequence[_Node], num_cpus: float, num_workers: int, gpus: bool) -> str:
    kind, need = ("GPU", num_workers) if gpus else ("CPU", round(num_cpus * num_workers, 2))
    free = round(sum(node.free[kind] for node in nodes), 2)
    return f"they need {_count(need, kind)}, free are {_count(free, kind)}"


def _missing(wanted: tuple[int, int, Placement], gpus: bool, nodes: Sequence[_Node], where: str = "the cluster") -> str:
    """Why workers have no place, and what would help."""
    trainers, servers, placement = wanted
    workers, lower = trainers + servers, "lower parallel.trainers or parallel.servers"
    have, kind = [node.has for node in nodes], "GPU" if gpus else "CPU"
    has = sum(node[kind] for node in have)
    is_possible = _decided(have, wanted, gpus, 1) is not None
    if not is_possible and _decided(have, (trainers, servers, "beside"), gpus, 1):
        return (
            f"parallel.placement: {placement} finds no room for {_count(trainers, 'trainer')} and "
            f"{_count(servers, 'server')} on {_count(len(nodes), 'host')}: `beside` does"
        )
    held_by_others = ", and others hold them: wait for those, or " if is_possible else ": "
    if gpus:
        ways_out = f"{held_by_others}{lower}, or set parallel.device: cpu"
        return f"{workers} workers need {_count(workers, 'GPU')}, {where} has {has:g}{ways_out}"
    return f"{workers} workers share {_count(has, 'CPU')} of {where}{held_by_others}{lower}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def spawn(
    worker_class: type,
    *args: Any,
    placement: Reserved,
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
    options = dict(
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=bundle),
        max_concurrency=max_concurrency,
    )
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    return _start(placement.cluster, role, number, options, common, worker_class, args, kwargs)


def scout(
    worker_class: type, *args: Any, cluster: Cluster, node: str, number: int, common: Common | None = None
) -> Worker:
    """Start a process on one of Ray's nodes as `spawn` does, but one that takes no place from workers."""
    options = dict(num_cpus=0, num_gpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    return _start(cluster, "scout", number, options, common, worker_class, args, {})


def num_gpus() -> int:
    """Of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def nodes_by_host() -> dict[str, str]:
    """Ray's name for the node of each host that is there, by its address; the driver's own first."""
    return {node.host: node.name for node in _nodes()}


def _start(
    cluster: Cluster,
    role: str,
    number: int,
    options: dict[str, Any],
    common: Common | None,
    worker_class: type,
    args: tuple,
    kwargs: dict[str, Any],
) -> Worker:
    log = cluster.logs / f"{role}-{number}.txt"
    options |= dict(max_restarts=0, name=None)  # a worker that lost its state is not replaced behind our back
    actor = ray.remote(_Host).options(**options).remote(str(log), common, worker_class, args, kwargs)
    return Worker(role, number, log, actor, log.stat().st_size if log.exists() else 0, _kernel_ooms())


class _Host:
    """The process that Ray gives a worker.

    Errors of the worker's constructor are kept for `made`, which reports them as they are; Ray would only keep text.
    """

    def __init__(self, log: str, common: Common | None, worker_class: type, args: tuple, kwargs: dict):
        guard_parent()
        if os.path.isdir(os.path.dirname(log)):  # where it is not, Ray's own log has the words, until `_bring_home`
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
    refuse_unreachable(strangers(one_of, timeout_s))


def strangers(one_of: Mapping[str, Worker], timeout_s: float) -> dict[str, dict[str, str]]:
    """For each host, those that it does not reach, with the reasons; asked of a worker on each."""
    if len(one_of) == 1:
        return {}

    def ask(method: str, *arguments: Any) -> dict[str, Any]:
        calls = [Call(worker, getattr(worker.actor, method).remote(*arguments)) for worker in one_of.values()]
        return dict(zip(one_of, gather(calls, timeout_s, "looking whether hosts reach each other"), strict=True))

    return ask("unreachable", ask("listen"))


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
    failures: list[tuple[Worker, RayError]] = []
    start = said = time.monotonic()
    deadline = start + (float("inf") if timeout_s is None else timeout_s)
    pending = list(call_of)
    while pending and (left := deadline - time.monotonic()) > 0:
        done, pending = ray.wait(pending, num_returns=1, timeout=min(SAY_EVERY_S, left))
        for ref in done:
            try:
                answers[ref] = ray.get(ref)
            except RayError as error:
                failures.append((call_of[ref].worker, error))
                if len(failures) == 1:
                    deadline = time.monotonic() + ROOT_CAUSE_S
        now = time.monotonic()
        if now - said >= SAY_EVERY_S:
            logger.info(
                "%s since %.0f s; waiting for %s", what, now - start, _names(call_of[ref].worker for ref in pending)
            )
            said = now
    if failures:
        cause = min(range(len(failures)), key=lambda n: _rank_of_cause(failures[n][1]))
        _bring_home(*failures[cause])
        raise [_sentence(worker, error, what) for worker, error in failures][cause] from None
    if pending:
        silent = [call_of[ref].worker for ref in pending]
        raise WorkerSilent(f"{_names(silent)} gave no answer within {timeout_s:g} s while {what}", silent)
    return [answers[call.ref] for call in calls]


def _rank_of_cause(error: RayError) -> int:
    if isinstance(error, LOSSES):
        return 0
    return 1 if isinstance(error, RayTaskError) and isinstance(error.cause, UserError) else 2


def _names(workers: Iterator[Worker] | Sequence[Worker]) -> str:
    return ", ".join(str(worker) for worker in workers)


def _sentence(worker: Worker, error: RayError, what: str) -> UserError:
    """What Ray reports, as an error for people."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, UserError):
            return error.cause
        with open(worker.log, "a") as log:
            log.write(f"\nwhile {what}:\n{uncoloured(error)}\n")
        last = "".join(traceback.format_exception_only(error.cause)).strip()
        return WorkerFailed(f"{_who(worker, error)} failed while {what}: {last} (traceback: {worker.log})", [worker])
    if isinstance(error, LOSSES):
        return WorkerLost(f"lost {_who(worker, error)} while {what}: {_cause_of_death(worker, error)}", [worker])
    return WorkerFailed(f"{_who(worker, error)} failed while {what}: {last_line(error)}", [worker])


def _who(worker: Worker, error: RayError) -> str:
    """With its host, where that is another than the driver's."""
    host = _process_of(worker, error).host
    return f"{worker} on host {host}" if host and host != ray.util.get_node_ip_address() else str(worker)


@dataclass(frozen=True, slots=True)
class _Process:
    """What Ray knows of a worker's, also when it has ended."""

    pid: int = 0
    host: str = ""
    node: str = ""


def _process_of(worker: Worker, error: RayError) -> _Process:
    if HEAD_LOST.search(str(error)):  # nobody is left to ask, and Ray would try for a minute
        return _Process()
    try:
        known = state.actor_table(worker.actor._actor_id.hex())
    except (RayError, RuntimeError):
        known = {}
    return _Process(known["Pid"], known["Address"]["IPAddress"], known["Address"]["NodeID"]) if known else _Process()


def _bring_home(worker: Worker, error: RayError) -> None:
    """Put what a worker's process has printed elsewhere into its log: before the log was its own, or on a host that
    does not see the run's folder."""
    there = _process_of(worker, error)
    if not there.pid or isinstance(getattr(error, "cause", None), UserError) or _log_size(worker) > worker.log_start:
        return
    try:
        if there.node == ray.get_runtime_context().get_node_id():
            words = _last_words(there.pid)
        else:
            ask = ray.remote(_last_words).options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(there.node, soft=False)
            )
            words = ray.get(ask.remote(there.pid), timeout=LAST_WORDS_S)
    except RayError as reason:  # the host is lost, too
        logger.debug("%s: what it printed on host %s is not to be had: %s", worker, there.host, last_line(reason))
        return
    if words:
        with open(worker.log, "a") as log:
            log.write(f"what process {there.pid} printed on host {there.host}, at most its end:\n{words}")


def _last_words(pid: int) -> str:
    """The end of what a process of Ray's on this host has printed, by Ray's own logs."""
    found = []
    for file in sorted(Path(ray_driver._global_node.get_logs_dir_path()).glob(f"worker-*-{pid}.*")):
        with open(file, "rb") as printed:
            printed.seek(max(0, os.path.getsize(file) - LAST_WORDS_BYTES))
            lines = printed.read().decode(errors="replace").splitlines(keepends=True)
        found += [line for line in lines if not re.match(r":(job_id|actor_name|task_name):", line)]
    return "".join(found) if any(line.strip() for line in found) else ""


def _log_size(worker: Worker) -> int:
    return worker.log.stat().st_size if worker.log.exists() else 0


def _cause_of_death(worker: Worker, error: RayError) -> str:
    text = str(error)
    if isinstance(error, RayActorError) and error.actor_init_failed:  # what it is made of could not be imported there
        with open(worker.log, "a") as log:
            log.write(f"\n{uncoloured(error)}\n")
    if node := re.search(r"node has died\. Node Id: (\w+)", text):
        return f"host {_host_of(node[1])} was lost"
    if HEAD_LOST.search(text):
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
    return f"{last_line(error)} (its log: {worker.log})"


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
