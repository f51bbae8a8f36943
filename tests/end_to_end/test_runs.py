"""Whole runs, as a user starts them: the `distca` command, its Ray, its workers, what they leave, and every way to end.

One uninterrupted run is the truth; runs of the same settings are interrupted, and resumed in one way or another."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from commands import DISTCA, wait_until, write_run_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distca.config import load_settings
from distca.launch.data.batches import Corpus, DocumentStream
from distca.launch.data.prepare import prepare
from distca.launch.folder.publish import newest
from distca.metrics import METRICS
from distca.order import Cursor

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]  # several runs, on any machine

MARK = "DISTCA_TEST_RUN"  # in the environment of a command and of all that it starts
STEPS, EVERY, KEEP = 16, 3, 2
START_S, END_S = 500, 15
SECTIONS = dict(train=dict(steps=STEPS), checkpoint=dict(every_steps=EVERY, keep=KEEP), monitor=dict(images_every=8))


@dataclass
class Ended:
    """A command that is over."""

    code: int
    out: str
    err: str


class Command:
    """A `distca` command in a process group of its own."""

    def __init__(self, folder: Path, *arguments, pipe: bool = False):
        self.mark = uuid.uuid4().hex
        self._out, self._err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        with open(self._out, "w") as out, open(self._err, "w") as err:
            environment = os.environ | {MARK: self.mark}
            self.process = subprocess.Popen(
                [*DISTCA, *map(str, arguments)],
                stdout=subprocess.PIPE if pipe else out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    def said(self) -> str:
        return self._out.read_text()

    def end(self) -> Ended:
        code = self.process.wait(timeout=START_S)
        return Ended(code, self._out.read_text(), self._err.read_text())

    def processes(self) -> list[psutil.Process]:
        """All that it started and that is still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def signal_all(self, number: int) -> None:
        for process in self.processes():
            try:
                process.send_signal(number)
            except psutil.Error:
                continue

    def worker(self, name: str) -> psutil.Process:
        """The process that prints into the log of this name."""
        for process in self.processes():
            try:
                if os.readlink(f"/proc/{process.pid}/fd/1").endswith(f"/logs/{name}.txt"):
                    return process
            except OSError:
                continue
        raise AssertionError(f"no process prints into {name}.txt")

    def assert_nothing_survives(self) -> None:
        wait_until(lambda: not self.processes(), END_S, lambda: f"left over: {self.processes()}")


def distca(folder: Path, *arguments) -> Ended:
    command = Command(folder, *arguments)
    ended = command.end()
    command.assert_nothing_survives()
    return ended


def only_run(folder: Path, name: str) -> Path:
    (run,) = (folder / "runs").glob(f"{name}-*")
    return run


def losses(run: Path) -> dict[int, float]:
    """Exact, by step; each stands once, also those that a kill undid, and what is counted goes on."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, record in enumerate(records, 1):
        assert record["step"] == number and record["tokens_seen"] == 2048 * number
    return {record["step"]: record["loss"] for record in records}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_one_sentence(ended: Ended, code: int) -> str:
    """A message for people and nothing else; returns it."""
    assert ended.code == code, f"{ended.code}\n{ended.out}\n{ended.err}"
    (line,) = ended.err.splitlines()
    assert line.startswith("distca: ") and "Traceback" not in ended.out
    return line


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nobody disturbs: (its folder, what the command said)."""
    before = shared_memory()
    ended = distca(folder, "train", write_run_file(folder, "whole", **SECTIONS))
    assert ended.code == 0, ended.out + ended.err
    assert shared_memory() <= before
    return only_run(folder, "whole"), ended


def interrupted(folder: Path, name: str, interrupt) -> tuple[Path, Command, Ended]:
    """A run to which `interrupt(command)` happens in some step after the first two checkpoints."""
    command = Command(folder, "train", write_run_file(folder, name, **SECTIONS))
    try:
        wait_until(lambda: list((folder / "runs").glob(f"{name}-*/metrics.jsonl")), START_S, lambda: "no run began")
        run = only_run(folder, name)
        wait_until(lambda: len(losses(run)) > 2 * EVERY, START_S, lambda: f"only {losses(run)}")
        interrupt(command)
        ended = command.end()
        command.assert_nothing_survives()
    finally:
        for process in command.processes():
            process.kill()
    assert len(losses(run)) < STEPS, "it had ended before it was interrupted"
    return run, command, ended


def resumed(folder: Path, run: Path, *overrides) -> Ended:
    ended = distca(folder, "resume", run, *overrides)
    assert ended.code == 0, ended.out + ended.err
    assert len(losses(run)) == STEPS
    return ended


def test_a_run_learns_and_says_where_it_is(whole):
    run, ended = whole
    found = losses(run)
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < 0.9 * found[1]
    assert ended.err == ""
    assert f"the run is in {run}" in ended.out and f"tensorboard.main --logdir {run}" in ended.out
    assert ended.out.count("\nstep ") == STEPS + 1, "a line per step, and one that says what a step is"
    assert load_settings(run / "run.yaml").train.steps == STEPS


def test_a_run_keeps_its_newest_checkpoints_and_nothing_unfinished(whole):
    run, _ = whole
    assert checkpoints(run) == ["latest", "step-000015", "step-000016"]
    assert newest(run / "checkpoints", strict=True).step == STEPS
    events = (run / "events.txt").read_text().splitlines()
    assert [line.split("checkpoint of ")[1] for line in events] == [
        f"step {step} published" for step in (3, 6, 9, 12, 15, 16)
    ]
    hidden = [path for path in run.rglob(".*")]
    assert not hidden


def test_tensorboard_has_every_documented_tag_and_the_pictures(whole):
    run, _ = whole
    seen = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    seen.Reload()
    documented = {metric.tag for metric in METRICS}
    busy = "cad/server_busy_s"
    assert set(seen.Tags()["scalars"]) == documented - {busy} | {f"{busy}/0", f"{busy}/1"}
    assert [e.step for e in seen.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert all(e.value > 0 for n in (0, 1) for e in seen.Scalars(f"{busy}/{n}"))
    for tag in ("data/document_lengths", "cad/server_load"):
        assert [image.step for image in seen.Images(tag)] == [1, 8, 16]
    texts = {"run/settings/text_summary", "run/versions/text_summary", "run/events/text_summary"}
    assert texts | {"custom_scalars__config__"} <= set(seen.Tags()["tensors"])


@pytest.fixture(scope="module")
def stopped(folder):
    """Stopped by SIGTERM to all of its processes at once, as Slurm sends it, exported as it stood, resumed: (its
    folder, the checkpoint then, what resume said)."""
    run, _, ended = interrupted(folder, "stopped", lambda command: command.signal_all(signal.SIGTERM))
    sentence, last = assert_one_sentence(ended, 75), max(losses(run))
    assert f"distca resume {run}" in sentence and f"step {last}" in sentence
    checkpoint = newest(run / "checkpoints", strict=True)
    assert checkpoint.step == last
    exported = distca(folder, "export", run, folder / "exported")
    assert exported.code == 0 and f"step {last} exported" in exported.out, exported.err
    return run, checkpoint, resumed(folder, run)


def test_a_stopped_run_goes_on_bit_for_bit(stopped, whole):
    run, checkpoint, ended = stopped
    assert f"after step {checkpoint.step}" in ended.out
    assert losses(run) == losses(whole[0])


def test_an_exported_model_has_the_loss_that_the_run_has_next(folder, stopped):
    """The run goes on with its own weights; Transformers computes the next step's documents with the exported ones."""
    run, checkpoint, _ = stopped
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")
    settings = load_settings(run / "run.yaml")
    stream = DocumentStream(Corpus(prepare(settings.data, 259)), settings.data, settings.seed, 2048)
    pieces, _ = stream.pieces(Cursor(*checkpoint.facts["cursor"]))
    total, targets = 0.0, 0
    for at in zip(pieces.source, pieces.row, pieces.start, pieces.end, strict=True):
        ids = torch.from_numpy(stream.corpus.tokens(*map(int, at)))[None]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            targets += ids.shape[1] - 1
    assert total / targets == pytest.approx(losses(run)[checkpoint.step + 1], rel=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder / "exported")("ab").input_ids == [100, 101, 1]


def test_ctrl_c_in_a_terminal_stops_in_the_same_way(folder, whole):
    """A terminal sends it to all processes of the command, workers too."""
    run, _, ended = interrupted(folder, "ctrl-c", lambda command: os.killpg(command.process.pid, signal.SIGINT))
    assert_one_sentence(ended, 75)
    assert newest(run / "checkpoints", strict=True).step == max(losses(run))
    assert losses(run).items() < losses(whole[0]).items(), "the same settings, the same bits"


@pytest.mark.parametrize("moment", range(4))
def test_a_run_that_is_asked_before_its_first_step_leaves_nothing(folder, moment):
    """Importing, preparing, starting Ray, starting workers: at random, of all that comes before `run.yaml`."""
    draw, name = random.Random(moment), f"early-{moment}"
    command = Command(folder, "train", write_run_file(folder, name, **SECTIONS))
    try:
        began, longest_s = [  # a start takes about 3 s after the one, and 1 s after the other
            (lambda: "model:" in command.said(), 2.0),
            (lambda: list((folder / "runs").glob(f"{name}-*")), 0.6),
        ][moment % 2]
        if moment:
            wait_until(lambda: began() or command.process.poll() is not None, START_S, lambda: "it did not begin")
        time.sleep(draw.uniform(0.1, longest_s))
        command.signal_all(draw.choice([signal.SIGTERM, signal.SIGINT]))
        sentence = assert_one_sentence(command.end(), 75)
        command.assert_nothing_survives()
    finally:
        for process in command.processes():
            process.kill()
    assert "stopped before" in sentence, sentence
    assert not list((folder / "runs").glob(f"{name}-*"))


def test_a_run_goes_on_without_its_terminal_and_its_reader(folder, whole):
    """`distca train run.yaml | head -3`, and the terminal is closed."""
    command = Command(folder, "train", write_run_file(folder, "alone", **SECTIONS), pipe=True)
    try:
        for _ in range(3):
            assert command.process.stdout.readline()
        command.process.stdout.close()
        wait_until(lambda: list((folder / "runs").glob("alone-*/metrics.jsonl")), START_S, lambda: "no run began")
        command.signal_all(signal.SIGHUP)
        ended = command.end()
        command.assert_nothing_survives()
    finally:
        for process in command.processes():
            process.kill()
    assert (ended.code, ended.err) == (0, "")
    assert losses(only_run(folder, "alone")) == losses(whole[0])


def test_a_full_disk_ends_a_run_with_the_checkpoint_it_has(folder, stopped):
    """Where events are written there is no room; what was saved before is named."""
    copy = folder / "runs" / "full"
    shutil.copytree(stopped[0], copy)
    (copy / "events.txt").unlink()
    (copy / "events.txt").symlink_to("/dev/full")
    last = newest(copy / "checkpoints").step
    ended = distca(folder, "resume", copy, "--train.steps", str(last + 9))
    sentence = assert_one_sentence(ended, 75)
    assert f"cannot write {copy}: the disk is full" in sentence
    step = newest(copy / "checkpoints", strict=True).step
    assert step > last and f"the newest checkpoint is of step {step}; go on with: distca resume {copy}" in sentence


def test_after_sigkill_of_the_driver_and_a_broken_checkpoint_the_one_before_gives_the_same_bits(folder, whole):
    before = shared_memory()
    run, _, ended = interrupted(folder, "killed", lambda command: command.process.kill())
    assert ended.code == -signal.SIGKILL
    assert shared_memory() <= before
    last = newest(run / "checkpoints").path
    file = next(last.glob("deepspeed/*_optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = resumed(folder, run).out
    assert f"{file}: its bytes have changed" in said
    assert "going back to the checkpoint of step" in said
    assert losses(run) == losses(whole[0])


def test_a_killed_server_is_one_sentence_and_another_number_of_servers_goes_on(folder, whole):
    run, _, ended = interrupted(folder, "no-server", lambda command: command.worker("server-1").kill())
    assert "server 1" in assert_one_sentence(ended, 1)
    resumed(folder, run, "--parallel.servers", "1", "--parallel.trainers-serve", "true")
    assert losses(run) == pytest.approx(losses(whole[0]), rel=1e-5)
    assert load_settings(run / "run.yaml").parallel.servers == 1


def test_a_killed_trainer_is_one_sentence(folder):
    _, _, ended = interrupted(folder, "no-trainer", lambda command: command.worker("trainer-1").kill())
    sentence = assert_one_sentence(ended, 1)
    assert re.search("lost trainer 1 while (running step|recording a trace)", sentence), sentence
