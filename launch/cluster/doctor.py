"""Is this machine, and what a run file asks of it, fit for a run?

Every check looks at one thing, says in one line what it found, and what to do where that is not right. Nothing is
kept, and nothing is started but, with RAY_ADDRESS, a process that looks around on every host of the cluster. The checks
decide from numbers that they are given, so each can be asked what if.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from distca.config import RunSettings
from distca.errors import UserError
from distca.launch.cluster.hosts import (
    LOOPBACK,
    Common,
    barriers,
    common,
    other_versions,
    out_of_reach,
    own_addresses,
    own_code,
    refuse_loopback,
)
from distca.launch.cluster.session import OBJECT_STORE_BYTES, Cluster, cluster_at, hosts_by_address, start_ray
from distca.launch.cluster.workers import Worker, gather, nodes_by_host, scout, strangers
from distca.launch.folder.paths import absolute_paths, nearest, obstacle
from distca.launch.folder.trace import clock_shift
from distca.launch.process.limits import enough_allowed
from distca.launch.process.unforeseen import room
from distca.metrics import bytes_text
from distca.paths import expanded

SHARED_MEMORY = OBJECT_STORE_BYTES + (64 << 20)
LOW_DISK, LITTLE_DISK = 1 << 30, 10 << 30
CLOCK_S = 120.0  # two clocks that differ by less are taken for one
HOST_CLOCK_S = 1.0  # between hosts of a cluster, whose logs are read side by side
PINGS = 5
HOST_S = 60.0  # for any answer of a host
CPU_BUILD = "+cpu"
HOST_S = 60.0  # for each answer of a host of a cluster
HOST_CLOCK_S = 2.0
Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    level: Level
    what: str
    found: str
    advice: str = ""


def examine(settings: RunSettings | None, tell: Callable[[Finding], None]) -> Level:
    """Tell every finding as it comes; returns the worst level."""
    worst: Level = "ok"
    for finding in _findings(settings):
        tell(finding)
        worst = max(worst, finding.level, key=("ok", "warning", "failed").index)
    return worst


def _findings(settings: RunSettings | None) -> Iterator[Finding]:
    yield from libraries(_installed(), platform.python_version())
    yield from _gpus(settings)
    yield from _allowed(settings)
    yield from network(own_addresses(), socket.gethostname(), _address_of(socket.gethostname()))
    yield _shared_memory()
    yield clock(time.time(), _newest_file(), _file_clock(Path(tempfile.gettempdir())))
    cluster = _cluster()
    yield cluster
    if settings:
        yield from places(settings)
        yield processors(settings, len(os.sched_getaffinity(0)))
    if is_cluster() and cluster.level == "ok":
        yield from _hosts(settings)


def libraries(installed: Mapping[str, str | None], python: str) -> Iterator[Finding]:
    """What the package asks for, beside what there is."""
    wrong = []
    for text in requires("distca") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        there = installed.get(wanted.name)
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name} {there or 'is missing'}, wanted {wanted.specifier}")
    told = ", ".join(f"{name} {installed.get(name)}" for name in ("torch", "deepspeed", "ray", "transformers"))
    if wrong:
        yield Finding("failed", "libraries", "; ".join(wrong), "pip install -U -c constraints.txt distca")
    else:
        yield Finding("ok", "libraries", f"Python {python}, {told}")


def network(addresses: Mapping[str, str], name: str, named: str | None) -> Iterator[Finding]:
    """`addresses` are this machine's with their interfaces, `named` is what its own name stands for."""
    others = {address: interface for address, interface in addresses.items() if not ip_address(address).is_loopback}
    if not others:
        found = "only loopback" if addresses else "no interface is up"
        yield Finding("warning", "addresses", found, "enough for a run on this machine; no other host reaches it")
        return
    yield Finding("ok", "addresses", ", ".join(f"{interface} {address}" for address, interface in others.items()))
    if named is None or ip_address(named).is_loopback:
        means = f"stands for {named}" if named else "stands for no address"
        advice = "runs go by the addresses of Ray's nodes, so start those with --node-ip-address"
        yield Finding("warning", "host name", f"{name} {means}", advice)


def shared_memory(total_bytes: int) -> Finding:
    found = f"/dev/shm has {bytes_text(total_bytes)}"
    if total_bytes >= SHARED_MEMORY:
        return Finding("ok", "shared memory", found)
    advice = f"Ray and NCCL want {bytes_text(SHARED_MEMORY)} and more: in a container --shm-size=8g"
    return Finding("failed", "shared memory", found, advice)


def clock(now: float, newest_file: float, written_at: float) -> Finding:
    """Seconds since 1970: now, of the newest file of this package, and of a file that was written just now."""
    if now < newest_file - CLOCK_S:
        found = f"it is {_day(now)} by this clock, and the package is of {_day(newest_file)}"
        return Finding("failed", "clock", found, "set it (timedatectl set-ntp true): certificates and logs go by it")
    if abs(now - written_at) > CLOCK_S:
        found = f"a file that was written now is {abs(now - written_at):.0f} s away"
        return Finding("warning", "clock", found, "let this machine and its file server have one time (NTP)")
    return Finding("ok", "clock", _day(now))


def places(settings: RunSettings) -> Iterator[Finding]:
    """Folders of a run file."""
    folders = {"monitor.folder": settings.monitor.folder, "data.cache": expanded(settings.data.cache)}
    for name, folder in folders.items():
        if there := obstacle(folder):
            yield Finding("failed", name, f"{folder}: {there} cannot be written to", f"set {name} to another folder")
        else:
            yield disk(name, folder, room(folder).bytes, "documents and checkpoints go there")
    sources = [source.path for source in settings.data.sources if source.path.startswith(("/", ".", "~"))]
    local = {"model.path": settings.model.path} if (settings.model.path or "").startswith(("/", ".", "~")) else {}
    for name, path in local.items() | {(f"data.sources {path}", path) for path in sources if "*" not in path}:
        if not os.access(expanded(path), os.R_OK):
            yield Finding("failed", name, f"{path} cannot be read", "correct the path, or who may read it")


def disk(name: str, folder: Path, free: int, use: str) -> Finding:
    level = "failed" if free < LOW_DISK else "warning" if free < LITTLE_DISK else "ok"
    return Finding(level, name, f"{folder}: {bytes_text(free)} free", "" if level == "ok" else f"free some: {use}")


def processors(settings: RunSettings, cpus: int) -> Finding:
    parallel = settings.parallel
    workers = parallel.trainers + parallel.servers
    found = f"{workers} workers x {parallel.threads} threads on {cpus} CPUs"
    if is_cluster() or workers * parallel.threads <= cpus:
        return Finding("ok", "workers", found)
    return Finding("warning", "workers", found, "they take turns: fewer workers or threads may be as fast")


def _gpus(settings: RunSettings | None) -> Iterator[Finding]:
    import torch

    count, wanted = torch.cuda.device_count(), settings and settings.parallel.device == "cuda"
    if count:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("ok", "GPUs", f"{count} x {torch.cuda.get_device_name(0)}, NCCL {nccl}")
    elif CPU_BUILD in torch.__version__ and os.path.exists("/dev/nvidiactl"):
        advice = "install PyTorch's CUDA build: pip install torch"
        found = f"there, but torch {torch.__version__} has no CUDA"
        yield Finding("failed" if wanted else "warning", "GPUs", found, advice)
    else:
        yield Finding("failed" if wanted else "ok", "GPUs", "none", "parallel.device: cpu" if wanted else "")
    workers = settings.parallel.trainers + settings.parallel.servers if settings else 0
    if count and wanted and count < workers and not is_cluster():
        yield Finding("failed", "GPUs", f"{workers} workers want one each", "fewer workers, or a cluster (RAY_ADDRESS)")


def _allowed(settings: RunSettings | None) -> Iterator[Finding]:
    workers = settings.parallel.trainers + settings.parallel.servers if settings else 1
    try:
        with enough_allowed(workers, LOOPBACK):
            yield Finding("ok", "limits", "open files, threads and addresses suffice; loopback answers")
    except UserError as error:
        found, _, advice = str(error).partition(": ")
        yield Finding("failed", "limits", found, advice)


def is_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def _shared_memory() -> Finding:
    shm = Path("/dev/shm")
    return shared_memory(shutil.disk_usage(shm).total if shm.is_dir() else 0)


def _cluster() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "local")
    if not is_cluster():
        return Finding("ok", "Ray", "RAY_ADDRESS is not set: a run starts a Ray of its own, on loopback, with a token")
    try:
        gcs = cluster_at(address)
    except UserError as error:
        found, _, advice = str(error).partition(": ")
        return Finding("failed", "Ray", found, advice)
    return Finding("ok", "Ray", f"the cluster at {gcs} takes our token")


# ---- the hosts of a cluster ----


class Visitor:
    """Looks around on one host."""

    def compare(self, wanted: Common, host: str) -> list[Finding]:
        """Where it is not like the driver's host."""
        versions = [_failed("versions", sentence) for sentence in other_versions(wanted, host)]
        return versions + [_failed("folders", sentence) for sentence in out_of_reach(wanted, host)]

    def look(self, settings: RunSettings | None) -> list[Finding]:
        """What it says of itself, by the checks of the driver's machine."""
        temporary = Path(tempfile.gettempdir())
        found = [*_allowed(settings), _shared_memory(), clock(time.time(), _newest_file(), _file_clock(temporary))]
        found.append(disk("disk", temporary, room(temporary).bytes, "Ray's sessions and logs are there"))
        return [*found, *(map(_of_any_host, places(settings)) if settings else ())]

    def time(self) -> float:
        return time.time()


def _of_any_host(finding: Finding) -> Finding:
    """Hosts without trainers read no documents, nor do those that see the driver's prepared ones."""
    if finding.level == "failed" and finding.what.startswith("data.sources"):
        return replace(finding, level="warning", advice="needed where trainers are and data.cache is not shared")
    return finding


def _hosts(settings: RunSettings | None) -> Iterator[Finding]:
    """What every host of the cluster says, beside the driver's."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(start_ray(folder, num_workers=1))
            refuse_loopback(hosts_by_address())
            settings = settings and absolute_paths(settings)  # a host stands in another folder
            shared = [nearest(settings.monitor.folder)] if settings and not obstacle(settings.monitor.folder) else []
            model = [Path(settings.model.path)] if settings and settings.model.path else []
            wanted = stack.enter_context(common(shared, [path for path in model if path.exists()]))
            found = _visited(cluster, settings, wanted)
        except UserError as error:
            found = [_failed("hosts", str(error))]
    yield from found


def _visited(cluster: Cluster, settings: RunSettings | None, wanted: Common) -> list[Finding]:
    nodes, found = nodes_by_host(), []
    visitors = {
        host: scout(Visitor, cluster=cluster, node=node, number=n) for n, (host, node) in enumerate(nodes.items())
    }
    told: dict[str, list[Finding]] = {}
    unlike: list[Finding] = []
    away_s: dict[str, tuple[float, float]] = {}
    for host, visitor in list(visitors.items()):
        try:
            gather([visitor.made], HOST_S, "coming up")
            unlike += _ask(visitor, "compare", wanted, host)
            told[host] = _ask(visitor, "look", settings)
            away_s[host] = clock_shift([_ping(visitor) for _ in range(PINGS)])
        except UserError as error:
            found.append(_failed("hosts", re.sub(r" \((its log|traceback): [^)]*\)$", "", str(error))))
            del visitors[host]
    told.pop(cluster.host, None)  # it has been asked as this machine
    found += unlike
    try:
        unreached = list(barriers(strangers(visitors, HOST_S))) if visitors else []
    except UserError as error:
        unreached = [str(error)]
    found += [_failed("network", sentence) for sentence in unreached]
    if len(visitors) == len(nodes):
        same = [] if any(finding.what == "versions" for finding in unlike) else ["the same versions"]
        same += ["each reaches every other"] if not unreached and len(nodes) > 1 else []
        found.append(Finding("ok", "hosts", f"{_number(nodes)}: {', '.join([*same, *nodes])}"))
    return found + list(clocks(away_s)) + list(summed_up(told))


def summed_up(told: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """A line for what hosts are not fit in, those with the same named together, and one for the rest."""
    hosts_with: dict[Finding, list[str]] = {}
    for host, findings in told.items():
        for finding in findings:
            hosts_with.setdefault(finding, []).append(host)
    wrong = {finding: hosts for finding, hosts in hosts_with.items() if finding.level != "ok"}
    for finding, hosts in wrong.items():
        named = f"host{'' if len(hosts) == 1 else 's'} {', '.join(hosts)}"
        yield replace(finding, found=f"{named}: {finding.found}")
    fit = dict.fromkeys(finding.what for finding in hosts_with if finding.what not in {w.what for w in wrong})
    if fit:
        yield Finding("ok", "other hosts", f"{_number(told)}: fit in {', '.join(fit)}")


def clocks(shifts: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Seconds by which each host is behind the driver's, and how wrong that may be."""
    far = {host: behind_s for host, (behind_s, error_s) in shifts.items() if abs(behind_s) - error_s > HOST_CLOCK_S}
    for host, behind_s in far.items():
        found = f"host {host} is {abs(behind_s):.1f} s {'behind' if behind_s > 0 else 'ahead of'} the driver's"
        advice = "let all hosts have one time (timedatectl set-ntp true): logs and the ages of files go by it"
        yield Finding("warning", "clocks", found, advice)
    if shifts and not far:
        most_s = max(abs(behind_s) for behind_s, _ in shifts.values())
        yield Finding("ok", "clocks", f"{_number(shifts)}: at most {most_s:.2f} s from the driver's")


def _ask(visitor: Worker, method: str, *arguments: object) -> list:
    [answer] = gather([visitor.call(method, *arguments)], HOST_S, "looking around")
    return answer


def _ping(visitor: Worker) -> tuple[float, float, float]:
    asked = time.time()
    return asked, _ask(visitor, "time"), time.time()


def _failed(what: str, sentence: str) -> Finding:
    found, _, advice = sentence.partition(": ")
    return Finding("failed", what, found, advice)


def _number(hosts: Mapping[str, object]) -> str:
    return f"{len(hosts)} host{'' if len(hosts) == 1 else 's'}"


def _installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for text in requires("distca") or ():
        name = Requirement(text).name
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _address_of(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _newest_file() -> float:
    return max(file.stat().st_mtime for file in own_code().values())


def _file_clock(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
