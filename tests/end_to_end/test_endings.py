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

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]  # several runs, on any machine

MOMENTS = int(os.environ.get("DISTCA_TEST_MOMENTS", 6))
AT_ONCE = 2  # commands that run at the same time
STEPS = 30
GONE_S, END_S = 5, 200
MARK = "DISTCA_TEST_ENDING"

# `distca train` with the timetable of `distca.launch.run.train` and none of its work.
LIGHT = """
from distca.launch.process import stop
stop.listen()
import shutil, sys, time, types
from pathlib import Path
from distca.errors import TryAgain
from distca.launch import cli
from distca.launch.cluster.session import start_ray
from distca.launch.cluster.workers import gather, place, spawn

STEPS = int(sys.argv[3])

class Worker:
    def step(self):
        time.sleep(0.1)

def light(settings, console, ray, own_folder):
    folder = Path(sys.argv[2]) / "run"
    folder.mkdir()
    try:
        with start_ray(folder, ray, num_workers=2) as cluster:
            placement = place(cluster, 2, timeout_s=100)
            workers = [spawn(Worker, placement=placement, bundle=n, role="trainer") for n in range(2)]
            gather([w.made for w in workers], 100, "starting")
            asked = stop.finishing()
            (folder / "run.yaml").touch()
            for step in range(1, STEPS + 1):
                gather([w.call("step") for w in workers], 100, f"running step {step}")
                (folder / "next").write_text(str(step))
                (folder / "next").replace(folder / "done")
                if asked.is_set() and step < STEPS:
                    (folder / "saved").write_text(str(step))
                    raise TryAgain(f"stopped as asked after step {step}")
    except KeyboardInterrupt:
        if not (folder / "run.yaml").exists():
            shutil.rmtree(folder)
        raise
    return folder

if __name__ == "__main__":
    settings = types.SimpleNamespace(parallel=types.SimpleNamespace(device="cpu"))
    cli.load_settings, cli.dump_settings = lambda *_: settings, lambda _: ""
    sys.modules["distca.launch.run.train"] = types.SimpleNamespace(train=light)
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


@dataclass(frozen=True)
class Moment:
    """So many seconds after a step was done; step 0 is before everything."""

    step: int
    seconds: float

    def wait(self, folder: Path, process: subprocess.Popen) -> bool:
        """Whether it came before the process had ended."""
        while process.poll() is None and steps_done(folder) < self.step:
            time.sleep(0.01)
        try:
            process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            return True
        return False


def moments(seed: int, count: int, first_s: float, whole_s: float) -> list[Moment]:
    """While it starts, which takes nearly all of the time, and while it runs and stops, in turns."""
    draw = random.Random(seed)
    starting = [Moment(0, draw.uniform(first_s, whole_s)) for _ in range(count)]
    running = [Moment(draw.randint(1, STEPS), draw.uniform(0, 0.3)) for _ in range(count)]
    return [both[number % 2] for number, both in enumerate(zip(starting, running, strict=True))]


def steps_done(folder: Path) -> int:
    return number_in(folder / "run" / "done")


def number_in(file: Path) -> int:
    return int(file.read_text() or 0) if file.exists() else 0


def run(folder: Path, moment: Moment, end) -> Ended:
    """The light command; at the moment `end(process, all of its processes)` happens to it, if it is still there."""
    folder.mkdir()
    mark, (out, err) = uuid.uuid4().hex, (folder / "out", folder / "err")
    with open(out, "w") as stdout, open(err, "w") as stderr:
        command = [sys.executable, folder.parent / "light.py", __file__, folder, str(STEPS)]
        environment = os.environ | {MARK: mark}
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
    try:
        if moment.wait(folder, process):
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
        ended = run(folder / f"whole-{number}", Moment(STEPS + 1, END_S), None)
        assert (ended.code, steps_done(ended.folder)) == (0, STEPS), ended
        return time.monotonic() - start

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return max(pool.map(one, range(AT_ONCE)))


def ended_at(folder: Path, name: str, at: list[Moment], ends: list) -> list[Ended]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(run, [folder / f"{name}-{number}" for number in range(len(at))], at, ends))


def kill(process, _) -> None:
    process.kill()


def test_after_sigkill_at_any_moment_nothing_is_left(folder, whole_s):
    all_ended = ended_at(folder, "killed", moments(0, MOMENTS, 0.05, whole_s), [kill] * MOMENTS)
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
    kinds = list(product([to_driver, to_group, to_all], [signal.SIGTERM, signal.SIGINT]))
    ends = [to(number) for to, number in islice(cycle(kinds), MOMENTS)]
    before = after = 0
    for ended in ended_at(folder, "asked", moments(1, MOMENTS, 0.5, whole_s), ends):
        assert "Traceback" not in ended.out + ended.err, ended
        if ended.code == 0:  # it was done, or about to be
            assert steps_done(ended.folder) == STEPS and not ended.err, ended
            continue
        (sentence,) = ended.err.splitlines()
        assert ended.code == 75 and sentence.startswith("distca: stopped "), ended
        if "before" in sentence:
            before += 1
            assert not (ended.folder / "run").exists(), ended
        else:
            after += 1
            assert number_in(ended.folder / "run" / "saved") == steps_done(ended.folder) > 0, ended
    print(f"{before} stopped before step 1, {after} after a step")


def test_a_lost_terminal_ends_nothing(folder, whole_s):
    """Whoever it was told to."""
    at = moments(2, 2, 0.5, whole_s)
    for ended in ended_at(folder, "alone", at, [to_driver(signal.SIGHUP), to_all(signal.SIGHUP)]):
        assert (ended.code, steps_done(ended.folder), ended.err) == (0, STEPS, ""), ended
