"""Nothing that has the mark outlives the driver, whichever way it ends, and nothing else is touched.

Here without Ray: drivers that start sleepers, and sleepers that start more."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from distca.launch.process import keeper
from distca.launch.process.keeper import MARK, keeping

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of its processes")

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]
GONE_S = 5

# Starts a process every few milliseconds, which starts another; some of them leave the group and the session.
BUSY = """
import os, subprocess, sys, time
from distca.launch.process.keeper import keeping

sleep = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]
nested = [sys.executable, "-S", "-c", f"import subprocess, time; subprocess.Popen({sleep}); time.sleep(1000)"]
print("begun", flush=True)
with keeping(sys.argv[1]) as mark:
    environment = os.environ | mark
    while True:
        for number in range(2):
            subprocess.Popen(nested, env=environment, start_new_session=bool(number), preexec_fn=lambda: None)
        print("more", flush=True)
        time.sleep(0.005)
"""


def of(folder) -> list[psutil.Process]:
    """Processes that name the folder, in their environment or as an argument: all of a driver, and its keeper."""
    found = []
    for process in psutil.process_iter():
        try:
            named = process.environ().get(MARK) == str(folder) or str(folder) in process.cmdline()
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(folder, but=()) -> None:
    deadline = time.monotonic() + GONE_S
    while left := [process for process in of(folder) if process.pid not in but]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def keeper_of(folder) -> psutil.Process:
    (process,) = [p for p in of(folder) if keeper.__file__ in p.cmdline()]
    return process


@pytest.fixture
def folder(tmp_path):
    """Of this test alone, with something in it."""
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    (folder / "file").touch()
    yield folder
    for left in of(folder):
        left.kill()


@pytest.mark.parametrize("seed", range(20))
def test_after_a_kill_at_any_moment_nothing_is_left(folder, seed):
    draw = random.Random(seed)
    driver = subprocess.Popen([sys.executable, "-c", BUSY, folder], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "begun\n"
    for _ in range(draw.randrange(4)):
        driver.stdout.readline()
    time.sleep(draw.uniform(0, 0.05))
    driver.kill()
    driver.stdout.read()  # to its end: nothing that is left holds our pipe for longer
    wait_until_gone(folder)
    driver.wait()


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_the_ordinary_end_is_the_same(folder, raised):
    try:
        with keeping(folder) as mark:
            children = [subprocess.Popen(SLEEP, env=os.environ | mark) for _ in range(3)]
            assert all(child.poll() is None for child in children)
            if raised:
                raise raised
    except (ValueError, KeyboardInterrupt):
        pass
    assert [child.wait(60) for child in children] == [-signal.SIGKILL] * 3
    assert not of(folder) and not folder.exists()


def test_what_has_lost_its_environment_is_known_by_what_it_writes_and_a_reader_is_spared(folder):
    """Ray's agents put their title where their environment was; a person may look at a log at that moment."""
    with keeping(folder), open(folder / "log", "w") as log, open(folder / "log") as text:
        writer = subprocess.Popen(SLEEP, stdout=log)
        reader = subprocess.Popen(SLEEP, stdin=text, env=os.environ | {MARK: f"{folder}-of-another"})
        other = subprocess.Popen(SLEEP)
    assert writer.wait(60) == -signal.SIGKILL
    assert reader.poll() is None and other.poll() is None
    for spared in (reader, other):
        spared.kill()
        spared.wait()


def test_it_hears_no_signal_and_holds_no_pipe(folder):
    """All that a terminal, a scheduler or a careless `kill` sends."""
    with keeping(folder) as mark:
        child = subprocess.Popen(SLEEP, env=os.environ | mark)
        process = keeper_of(folder)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM):
            process.send_signal(number)
        assert os.getsid(process.pid) == process.pid
        files = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}
        assert files == {os.devnull}
        assert child.poll() is None
    assert child.wait(60) == -signal.SIGKILL and not process.is_running()


def test_a_driver_whose_keeper_was_killed_does_the_work_itself(folder):
    with keeping(folder) as mark:
        child = subprocess.Popen(SLEEP, env=os.environ | mark)
        keeper_of(folder).kill()
    assert child.wait(60) == -signal.SIGKILL


def test_a_child_of_the_driver_that_holds_the_pipe_does_not_keep_it_waiting(folder):
    """One that was forked and never became another program, as multiprocessing does."""
    code = """
import os, subprocess, sys, time
from distca.launch.process.keeper import keeping
with keeping(sys.argv[1]) as mark:
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"], env=os.environ | mark)
    child = os.fork()
    if not child:
        time.sleep(1000)
    print(child, flush=True)
    time.sleep(1000)
"""
    driver = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    forked = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    wait_until_gone(folder, but=[forked])
    os.kill(forked, signal.SIGKILL)


def test_where_the_kernel_gives_no_handle_of_a_process_it_is_ended_all_the_same(folder, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    child = subprocess.Popen(SLEEP, env=os.environ | {keeper.MARK: str(folder)})
    assert keeper.end_all_of(str(folder), os.getpid())
    assert child.wait(60) == -signal.SIGKILL
