"""Where do the workers of a Ray of our own come from? From one process that has imported what they need.

    with forkserver() as server:        # as early as can be: it imports while the driver does its own work
        server.listen(folder)           # the folder that Ray's processes belong to
        server.command(default_worker)  # what Ray's raylet is to run for a worker, instead of its own script

PyTorch, Transformers and DeepSpeed take a trainer five seconds of CPU to import and a server two. Here they are
imported once, and every worker is a fork of that process. What the raylet starts hands its arguments, environment and
files to the fork and ends. Ray itself, which reads its environment when it is imported, is left to the forks. Promised:
  - the server ends with the driver, however that ends, and all that it has forked ends with the server;
  - nobody but this user reaches its socket, which lies in the folder and goes with it;
  - no signal to stop reaches it or its forks;
  - where it cannot be (another system, a GPU, which no fork may have seen before, a cluster of others) or is gone,
    workers start as Ray starts them.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import importlib
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distca.launch.process.parent import guard_parent
from distca.launch.process.stop import deaf

logger = logging.getLogger(__name__)

PRELOADED = (
    *("distca.parallel.engine", "distca.parallel.models", "distca.parallel.core_attention", "distca.parallel.server"),
    *("distca.planner", "distca.hardware", "distca.schedule", "distca.launch.data.batches", "distca.launch.run.verify"),
    *("google.protobuf.message", "grpc", "jsonschema", "msgpack", "psutil", "requests"),  # what Ray imports
)
START_WORKER = Path(__file__).with_name("start_worker.py")
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # imports start no threads, and see no GPU
# A step frees large buffers and asks for the same ones again: glibc keeps them, instead of having the kernel clear
# every page anew. It reads this when a process starts, so forks have their server's.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
PART_BYTES = 1 << 16


class ForkServer:
    """The driver's end."""

    def __init__(self, process: subprocess.Popen, control: socket.socket):
        self._process, self._control, self._address = process, control, ""

    def listen(self, folder: Path) -> None:
        """Take requests at a socket in the folder; until the server has imported everything they wait."""
        self._address = str(folder / "fork")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, open(folder / "fork.txt", "w") as log:
            listener.bind(self._address)
            listener.listen(128)
            with contextlib.suppress(OSError):  # it is gone, and workers start without it
                socket.send_fds(self._control, [b"!"], [listener.fileno(), log.fileno()])

    def command(self, worker_script: str) -> list[str]:
        """What starts a worker instead of `python worker_script`, but for `python`."""
        if self._process.poll() is not None:
            logger.warning("the process that was to fork the workers has ended; each of them imports by itself")
            return [worker_script]
        return [str(START_WORKER), self._address, worker_script]


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How a command comes to its Ray and its workers."""

    insecure: bool = False
    """Join a cluster that asks for no token."""
    hosts: int = 1
    """Wait until the cluster has so many."""
    forkserver: ForkServer | None = None


OWN_RAY = RayOptions()


@contextlib.contextmanager
def forkserver(device: str = "auto", preloaded: Sequence[str] = PRELOADED) -> Iterator[ForkServer | None]:
    """Begin to import what workers need; None where they must start by themselves."""
    if not _can_fork(device):
        yield None
        return
    ours, theirs = socket.socketpair()
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with deaf(), theirs:
        command = [sys.executable, "-m", __name__, str(os.getpid()), *preloaded]
        process = subprocess.Popen(command, env=ALLOCATOR | os.environ | ALONE, stdin=theirs, **quiet)
    try:
        yield ForkServer(process, ours)
    finally:
        ours.close()
        process.kill()
        process.wait()


def _can_fork(device: str) -> bool:
    own_ray = os.environ.get("RAY_ADDRESS", "local") in ("", "local")
    return sys.platform == "linux" and own_ray and (device == "cpu" or not glob.glob("/dev/nvidia*"))


def _serve(control: socket.socket) -> list[str]:
    """Fork for every request, until the driver is gone. Returns in each fork: the command it is to run."""
    _, fds, _, _ = socket.recv_fds(control, 1, 2)
    if not fds:
        sys.exit(0)
    listener, log = socket.socket(fileno=fds[0]), fds[1]
    os.dup2(log, 1)
    os.dup2(log, 2)  # what writes into the folder belongs to it
    os.close(log)
    while True:
        readable, _, _ = select.select([listener, control], [], [])
        if control in readable:
            sys.exit(0)
        with listener.accept()[0] as connection:
            request, files = _read(connection)
            if not request:
                continue
            if os.fork() == 0:
                listener.close()
                control.detach()  # file 0, which becomes another
                return _take_over(request, files)
            connection.sendall(b"!")
        for file in files:
            os.close(file)


def _read(connection: socket.socket) -> tuple[dict, list[int]]:
    parts, files = [], []
    while True:
        part, fds, _, _ = socket.recv_fds(connection, PART_BYTES, 3)
        files += fds
        if not part:
            return (json.loads(b"".join(parts)) if parts else {}), files
        parts.append(part)


def _take_over(request: dict, files: list[int]) -> list[str]:
    """Become what the raylet has started, in all that it gave to it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    random.seed()
    return request["command"]


def main() -> None:
    guard_parent()
    if os.getppid() != int(sys.argv[1]):  # the driver ended before that
        return
    control = socket.socket(fileno=0)
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what forks share is not looked at again, and so not copied
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("imports have started threads, which no fork would have")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that have ended leave nothing behind
    sys.argv = _serve(control)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
