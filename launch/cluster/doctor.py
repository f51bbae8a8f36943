"""Is this machine, and what a run file asks of it, fit for a run?

Every check looks at one thing, says in one line what it found, and what to do where that is not right. Nothing is
kept, and nothing is started but a process on each host of a cluster (RAY_ADDRESS), which looks around there. The checks
decide from numbers that they are given, so each can be asked what if.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from distca.config import RunSettings
from distca.errors import UserError
from distca.launch.cluster.hosts import LOOPBACK, common, own_addresses, own_code, refuse_loopback
from distca.launch.cluster.session import OBJECT_STORE_BYTES, cluster_at, start_ray
from distca.launch.cluster.workers import gather, nodes_of_cluster, refuse_strangers, scout
from distca.launch.folder.make import refuse_folder
from distca.launch.process.forkserver import RayOptions
from distca.launch.process.limits import enough_allowed
from distca.launch.process.unforeseen import room
from distca.metrics import bytes_text
from distca.paths import expanded

SHARED_MEMORY = OBJECT_STORE_BYTES + (64 << 20)
LOW_DISK, LITTLE_DISK = 1 << 30, 10 << 30
CLOCK_S = 120.0  # two clocks that differ by less are taken for one
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
    shm = Path("/dev/shm")
    yield shared_memory(shutil.disk_usage(shm).total if shm.is_dir() else 0)
    yield clock(time.time(), _newest_file(), _file_clock(Path(tempfile.gettempdir())))
    yield (ray := _ray())
    if settings:
        yield from places(settings)
        yield processors(settings, len(os.sched_getaffinity(0)))
    if ray.level == "ok" and _is_cluster():
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
        try:
            refuse_folder(folder.absolute(), name)
        except UserError as error:
            yield Finding("failed", name, str(error).removeprefix(f"{name}: "), f"set {name} to another folder")
            continue
        free = room(folder).bytes
        level = "failed" if free < LOW_DISK else "warning" if free < LITTLE_DISK else "ok"
        advice = "" if level == "ok" else "free some: documents and checkpoints go there"
        yield Finding(level, name, f"{folder}: {bytes_text(free)} free", advice)
    sources = [source.path for source in settings.data.sources if source.path.startswith(("/", ".", "~"))]
    local = {"model.path": settings.model.path} if (settings.model.path or "").startswith(("/", ".", "~")) else {}
    for name, path in local.items() | {(f"data.sources {path}", path) for path in sources if "*" not in path}:
        if not os.access(expanded(path), os.R_OK):
            yield Finding("failed", name, f"{path} cannot be read", "correct the path, or who may read it")


def processors(settings: RunSettings, cpus: int) -> Finding:
    parallel = settings.parallel
    workers = parallel.trainers + parallel.servers
    found = f"{workers} workers x {parallel.threads} threads on {cpus} CPUs"
    if _is_cluster() or workers * parallel.threads <= cpus:
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
    if count and wanted and count < workers and not _is_cluster():
        yield Finding("failed", "GPUs", f"{workers} workers want one each", "fewer workers, or a cluster (RAY_ADDRESS)")


def _allowed(settings: RunSettings | None) -> Iterator[Finding]:
    workers = settings.parallel.trainers + settings.parallel.servers if settings else 1
    try:
        with enough_allowed(workers, LOOPBACK):
            yield Finding("ok", "limits", "open files, threads and addresses suffice; loopback answers")
    except UserError as error:
        found, _, advice = str(error).partition(": ")
        yield Finding("failed", "limits", found, advice)


def _is_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "local")
    if not _is_cluster():
        return Finding("ok", "Ray", "RAY_ADDRESS is not set: a run starts a Ray of its own, on loopback, with a token")
    try:
        gcs = cluster_at(address)
    except UserError as error:
        found, _, advice = str(error).partition(": ")
        return Finding("failed", "Ray", found, advice)
    return Finding("ok", "Ray", f"the cluster at {gcs} takes our token")


class Scout:
    """Looks around on one host of a cluster."""

    def look(self, settings: RunSettings | None) -> tuple[list[Finding], float]:
        """What is not as it should be, and the time."""
        shm = Path("/dev/shm")
        found = [shared_memory(shutil.disk_usage(shm).total if shm.is_dir() else 0), *_allowed(settings)]
        found += places(settings) if settings else ()
        return [finding for finding in found if finding.level != "ok"], time.time()


def _hosts(settings: RunSettings | None) -> Iterator[Finding]:
    """Every host of the cluster, asked by a process there that takes no place from workers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cluster = stack.enter_context(start_ray(folder, RayOptions(insecure=True), num_workers=1))
        nodes = nodes_of_cluster()
        try:
            refuse_loopback({node.host: node.name for node in nodes})
        except UserError as error:
            found, _, advice = str(error).partition(": ")
            yield Finding("failed", "hosts", found, advice)
            return
        shared = [settings.monitor.folder] if settings and settings.monitor.folder.is_dir() else []
        model = settings and settings.model.path
        wanted = stack.enter_context(common(shared, [Path(model)] if model and Path(model).exists() else []))
        asked = [scout(Scout, cluster=cluster, node=node, number=n, common=wanted) for n, node in enumerate(nodes)]
        there, clocks = {}, []
        for node, one in zip(nodes, asked, strict=True):
            try:
                [process] = gather([one.made], HOST_S, "coming up")
                before = time.time()
                [(findings, now)] = gather([one.call("look", settings)], HOST_S, "looking around")
            except UserError as error:
                found, _, advice = str(error).partition(": ")
                yield Finding("failed", "host", found if node.host in found else f"{node.host}: {found}", advice)
                continue
            there[one] = process
            clocks.append(now - (before + time.time()) / 2)
            for finding in findings:
                yield replace(finding, found=f"on host {node.host}, {finding.found}")
            if abs(clocks[-1]) > HOST_CLOCK_S:
                found = f"host {node.host} is {clocks[-1]:+.1f} s away from this one"
                yield Finding("warning", "clock", found, "let all hosts have one time (NTP): logs and traces go by it")
        try:
            refuse_strangers(list(there), list(there.values()), HOST_S)
        except UserError as error:
            found, _, advice = str(error).partition(": ")
            yield Finding("failed", "hosts", found, advice)
            return
        if len(there) == len(nodes):
            names = ", ".join(node.host for node in nodes)
            facts = "one code and one set of libraries; all reach each other; clocks within"
            yield Finding("ok", "hosts", f"{names}: {facts} {max(map(abs, clocks)):.1f} s")


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
