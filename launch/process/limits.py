"""Does this machine allow what Ray's processes need?

Asked before they start: in native code, Ray and gRPC end a process that meets a limit, or wait for minutes.
The figures are what a small run was seen to use, with room to spare.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distca.errors import SettingsError

OPEN_FILES, OPEN_FILES_WANTED = 256, 65536
ADDRESS_BYTES = 6 << 30  # of one process
RAYS_THREADS, WORKERS_THREADS = 200, 40


@contextmanager
def enough_allowed(num_workers: int, host: str) -> Iterator[None]:
    """Raise `SettingsError` that names the limit, or let the processes that start here open more files."""
    files, most_files = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    for refusal in refusals(num_workers, _number(most_files), _number(addresses), _free_threads()):
        raise SettingsError(refusal)
    _refuse_deaf(host)
    more = min(OPEN_FILES_WANTED, _number(most_files))
    if _number(files) < more:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(more), most_files))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def refusals(num_workers: int, files: float, address_bytes: float, threads: float) -> Iterator[str]:
    """What is too little, each as a sentence."""
    needed = max(OPEN_FILES, 8 * num_workers)
    if files < needed:
        yield (
            f"Ray and {num_workers} workers need {needed} open files each, this shell allows {files:g}: raise the "
            f"limit (ulimit -n {OPEN_FILES_WANTED})"
        )
    if address_bytes < ADDRESS_BYTES:
        yield (
            f"a worker reserves {ADDRESS_BYTES >> 30} GiB of addresses, this shell allows {address_bytes / 2**30:.1f} "
            "GiB: lift the limit (ulimit -v unlimited); memory itself is better limited by a container"
        )
    needed = RAYS_THREADS + WORKERS_THREADS * num_workers
    if threads < needed:
        yield (
            f"Ray and {num_workers} workers start about {needed} threads, this user may start {threads:g} more: raise "
            "the limit (ulimit -u, or --pids-limit of a container), or use fewer workers"
        )


def _refuse_deaf(host: str) -> None:
    """Whether a process here can reach another over `host`."""
    try:
        with socket.create_server((host, 0)) as server, socket.create_connection(server.getsockname(), timeout=10):
            pass
    except OSError as error:
        raise SettingsError(
            f"processes of this machine cannot reach each other over {host} ({error.strerror or error}): its loopback "
            "interface is missing or down (ip link set lo up)"
        ) from None


def _free_threads() -> float:
    """How many more this user may start, by its own limit and by its container's; infinity if none is known."""
    free = [float("inf")]
    allowed = _number(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    if allowed < float("inf") and os.getuid() != 0:  # the kernel does not hold root to it
        free.append(allowed - _own_threads())
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")):  # version 2, and 1
        with suppress(OSError, ValueError):  # none, or "max"
            free.append(int((folder / "pids.max").read_text()) - int((folder / "pids.current").read_text()))
    return max(0.0, min(free))


def _own_threads() -> int:
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.getuid():
                total += len(os.listdir(process / "task"))
    return total


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else float(limit)
