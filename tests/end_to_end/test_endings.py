"""A command may end at any moment, in any way, and so may all its processes at once: what is left then?

The command here is light: the real command line, Ray and workers, but they only wait, so that many can be ended.
DISTCA_TEST_MOMENTS is the number of moments of each kind."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]

MOMENTS = int(os.environ.get("DISTCA_TEST_MOMENTS", 8))
AT_ONCE = 2  # commands that run at the same time
GONE_S, END_S = 5, 200
MARK = "DISTCA_TEST_ENDING"

# `distca train` with the timetable of `distca.launch.train` and none of its work.
LIGHT = """
from distca.launch import stop
stop.listen()
import shutil, sys, time, types
from pathlib import Path
from distca.errors import TryAgain
from distca.launch import cli
from distca.launch.cluster import gather, place, spawn, start_ray

class Worker:
    def step(self):
        time.sleep(0.05)

def light(settings, console, insecure):
    folder = Path(sys.argv[2]) / "run"
    folder.mkdir()
    try:
        with start_ray(folder, num_workers=2) as cluster:
            placement = place(cluster, 2, timeout_s=100)
            workers = [spawn(Worker, placement=placement, bundle=n, role="trainer") for n in range(2)]
            gather([w.made for w in workers], 100, "starting")
            asked = stop.finishing()
            (folder / "run.yaml").touch()
            for step in range(1, 31):
                gather([w.call("step") for w in workers], 100, f"running step {step}")
                (folder / "done").write_text(str(step))
                if asked.is_set() and step < 30:
                    (folder / "saved").write_text(str(step))
                    raise TryAgain(f"stopped as asked after step {step}")
    except KeyboardInterrupt:
        if not (folder / "run.yaml").exists():
            shutil.rmtree(folder)
        raise
    return folder

if __name__ == "__main__":
    cli.load_settings, cli.dump_settings = lambda *_: None, lambda _: ""
    sys.modules["distca.launch.train"] = types.SimpleNamespace(train=light)
    sys.exit(cli.run(["train", sys.argv[1]]))
"""


@dataclass
class Ended:
    """What a command that something happened to has left."""

    code: int
    out: str
    err: str
    folder: Path
    gone_s: float  # from the end that was made of it until nothing of it was left

    def number_in(self, name: str) -> int:
        file = self.folder / "run" / name
        return int(file.read_text()) if file.exists() else 0


def left_of(mark: str, session: int) -> list[psutil.Process]:
    """By the mark, and by the session too: Ray's agents overwrite their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = os.getsid(process.pid) == session or process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def run(folder: Path, moment_s: float, end) -> Ended:
    """The light command; after so many seconds `end(process, all of its processes)` happens to it, if it is still
    there."""
    folder.mkdir()
    mark, (out, err) = uuid.uuid4().hex, (folder / "out", folder / "err")
    with open(out, "w") as stdout, open(err, "w") as stderr:
        command = [sys.executable, folder.parent / "light.py", __file__, folder]
        environment = os.environ | {MARK: mark}
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
    try:
        try:
            process.wait(moment_s)
        except subprocess.TimeoutExpired:
            end(process, lambda: left_of(mark, process.pid))
        killed = time.monotonic()
        code = process.wait(END_S)
        if code != -signal.SIGKILL:
            killed = time.monotonic()
        while (left := left_of(mark, process.pid)) and time.monotonic() - killed < 60:
            time.sleep(0.02)
        assert not left, left
        return Ended(code, out.read_text(), err.read_text(), folder, time.monotonic() - killed)
    finally:
        for orphan in left_of(mark, process.pid):
            orphan.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    (folder / "light.py").write_text(LIGHT)
    return folder


@pytest.fixture(scope="module")
def whole_s(folder) -> float:
    """How long one that nobody disturbs takes on this machine, with as many others beside it as later."""

    def one(number: int) -> float:
        start = time.monotonic()
        ended = run(folder / f"whole-{number}", END_S, None)
        assert (ended.code, ended.number_in("done")) == (0, 30), ended
        return time.monotonic() - start

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return max(pool.map(one, range(AT_ONCE)))


def ended_at(folder: Path, name: str, moments: list[float], ends: list) -> list[Ended]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        names = [folder / f"{name}-{number}" for number in range(len(moments))]
        return list(pool.map(run, names, moments, ends))


def kill(process, _) -> None:
    process.kill()


def test_after_sigkill_at_any_moment_nothing_is_left(folder, whole_s, record_property):
    draw = random.Random(0)
    moments = [draw.uniform(0.05, whole_s) for _ in range(MOMENTS)]
    all_ended = ended_at(folder, "killed", moments, [kill] * MOMENTS)
    gone = sorted(ended.gone_s for ended in all_ended if ended.code == -signal.SIGKILL)
    assert gone, "none was killed in time"
    print(f"{len(gone)} killed; until nothing was left: median {gone[len(gone) // 2]:.2f} s, longest {gone[-1]:.2f} s")
    assert gone[-1] < GONE_S


def to_driver(number: int):
    return lambda process, _: process.send_signal(number)


def to_group(number: int):
    return lambda process, _: os.killpg(process.pid, number)


def to_all(number: int):
    def end(_, processes) -> None:
        for process in processes():
            try:
                process.send_signal(number)
            except psutil.Error:
                continue

    return end


def test_a_request_at_any_moment_to_any_processes_leaves_a_saved_run_or_none(folder, whole_s):
    """From the first moment at which Python can hear of it."""
    draw = random.Random(1)
    kinds = list(product([to_driver, to_group, to_all], [signal.SIGTERM, signal.SIGINT]))
    ends = [to(number) for to, number in islice(cycle(kinds), MOMENTS)]
    moments = [draw.uniform(0.5, whole_s) for _ in ends]
    before = after = 0
    for ended in ended_at(folder, "asked", moments, ends):
        assert "Traceback" not in ended.out + ended.err, ended
        if ended.code == 0:  # it was done, or about to be
            assert ended.number_in("done") == 30 and not ended.err, ended
            continue
        (sentence,) = ended.err.splitlines()
        assert ended.code == 75 and sentence.startswith("distca: stopped "), ended
        if "before" in sentence:
            before += 1
            assert not (ended.folder / "run").exists(), ended
        else:
            after += 1
            assert ended.number_in("saved") == ended.number_in("done") > 0, ended
    print(f"{before} stopped before step 1, {after} after a step")


def test_a_lost_terminal_ends_nothing(folder, whole_s):
    """Whoever it was told to."""
    draw = random.Random(2)
    moments = [draw.uniform(0.5, whole_s) for _ in range(2)]
    for ended in ended_at(folder, "alone", moments, [to_driver(signal.SIGHUP), to_all(signal.SIGHUP)]):
        assert (ended.code, ended.number_in("done"), ended.err) == (0, 30, ""), ended
