"""Who ends what Ray started when its driver cannot?

    with keeping(folder) as mark:            # {"DISTCA_KEPT": folder}: goes into the environment of what is started
        …
    # nothing is left of what was started, and neither is the folder

A process of a few megabytes that waits beside the driver for the driver's end, of whatever kind, SIGKILL included. It
then kills, until none is left, this user's processes that belong to the folder: their environment says so, as it is
inherited, or they write into it (Ray's agents overwrite their environment with their title). Promised:
  - it ends nothing that does not belong to the folder, and a reader of the folder's files does not;
  - it outlives every signal but SIGKILL, has its own session, and holds none of the driver's files or pipes;
  - the driver's ordinary end goes the same way, so there is one to be tested.

Only Linux tells this of processes; elsewhere nothing is kept, and Ray's processes end as they can.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

MARK = "DISTCA_KEPT"
CALM_SCANS, SCAN_EVERY_S = 5, 0.02  # a process that is just becoming another has no environment for a moment
STARTING_S = 1.0  # what the driver was starting when it ended may hold the pipe as long, before it has its mark
GIVE_UP_S = 60.0  # a process that the kernel cannot end, on a file system that hangs


@contextlib.contextmanager
def keeping(folder: str | os.PathLike) -> Iterator[dict[str, str]]:
    """The mark, as an environment variable; on the way out all that has it is ended, and the folder removed.

    The folder's name must be new: it is all that tells its processes from others."""
    if sys.platform != "linux":
        yield {}
        return
    folder = os.path.realpath(folder)
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), folder, str(os.getpid())]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # it is deaf from its birth
    try:
        keeper = subprocess.Popen(command, **pipes, cwd="/", start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield {MARK: folder}
    finally:
        keeper.stdin.close()
        if keeper.wait() != 0:  # killed itself
            end_all_of(folder, os.getpid())


def end_all_of(folder: str, driver: int) -> bool:
    """Kill what belongs to the folder, but for the driver, until nothing does;
    False if it is still there after `GIVE_UP_S`."""
    calm, deadline = 0, time.monotonic() + GIVE_UP_S
    while calm < CALM_SCANS:
        others = set(map(int, filter(str.isdigit, os.listdir("/proc")))) - {driver}
        found = [pid for pid in others if _belongs(pid, folder)]
        for pid in found:
            _kill(pid, folder)
        calm = 0 if found else calm + 1
        if found and time.monotonic() > deadline:
            return False
        time.sleep(SCAN_EVERY_S)
    return True


def _belongs(pid: int, folder: str) -> bool:
    """Whether the folder's mark is in a process's environment, or the process writes into the folder."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        with open(f"/proc/{pid}/environ", "rb") as file:  # of the dead it is empty
            if f"{MARK}={folder}".encode() in file.read().split(b"\0"):
                return True
        return any(_writes_into(pid, number, folder) for number in os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has ended, or is none of ours
        return False


def _writes_into(pid: int, number: str, folder: str) -> bool:
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
            return False
        with open(f"/proc/{pid}/fdinfo/{number}") as file:
            flags = dict(line.split(":") for line in file if line.startswith("flags"))
    except OSError:  # closed meanwhile
        return False
    return int(flags["flags"], 8) & os.O_ACCMODE != os.O_RDONLY


def _kill(pid: int, folder: str) -> None:
    """The process that belongs to the folder, and no other that got its number meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except (OSError, AttributeError):  # an older kernel, or a sandbox that forbids it
            if _belongs(pid, folder):
                os.kill(pid, signal.SIGKILL)
            return
        try:
            if _belongs(pid, folder):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _await_end(driver: int) -> None:
    """Until nobody holds the other end of our input: the driver, and for a moment what it has just forked."""
    gone_since = None
    while True:
        readable, _, _ = select.select([0], [], [], 0.25)
        if readable and not os.read(0, 1):
            return
        if os.getppid() != driver:
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > STARTING_S:
                return


if __name__ == "__main__":
    folder, driver = sys.argv[1], int(sys.argv[2])
    _await_end(driver)
    all_ended = end_all_of(folder, driver)
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(not all_ended)
