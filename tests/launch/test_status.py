"""A run's folder tells what the run is doing, also when its driver was killed and when a line is half written."""

import json
import os
import subprocess
import time

import pytest
import yaml

from distca.errors import EXIT_DATA, EXIT_OK
from distca.launch import cli
from distca.launch.folder import status
from distca.metrics import StepRecord


def step(number: int, seconds: float = 0.5) -> StepRecord:
    sizes = dict(num_steps=40, tokens=1000, targets=990, tokens_seen=1000 * number)
    return StepRecord(step=number, loss=5.0 - 0.1 * number, step_s=seconds, **sizes)


def make_run(folder, steps: int, ago_s: float = 0.0):
    folder.mkdir(parents=True)
    model = dict(config=dict(model_type="llama", vocab_size=300))
    values = dict(name="x", model=model, data=dict(sources=[dict(path="python-stdlib")]))
    values["train"] = dict(tokens_per_step=1000, steps=40)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    lines = [json.dumps(step(n + 1).fields()) + "\n" for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "num_st')
    then = time.time() - ago_s
    os.utime(folder / "metrics.jsonl", (then, then))
    return folder


@pytest.mark.parametrize(
    ("steps", "ago_s", "takes_part", "state"),
    [
        (0, 0, True, "running: before its first step"),
        (7, 2, True, "running: step 7 of 40, 2 s ago"),
        (7, 3700, True, "no sign of life: step 7 of 40, 1 h 1 min ago; its driver may have been killed"),
        (7, 90_000, False, "stopped: step 7 of 40, 1 d 1 h ago"),
        (40, 61, False, "done: step 40 of 40, 1 min 1 s ago"),
    ],
)
def test_a_folder_tells_its_runs_state(tmp_path, steps, ago_s, takes_part, state):
    folder = make_run(tmp_path / "run", steps, ago_s)
    with status.taking_part(folder, {"trainer 0": ("10.0.0.2", 17)}):
        if not takes_part:
            (folder / "workers.json").unlink()
        found = status.status(folder)
    assert found.state == state and found.step == steps
    names = [place.name for place in found.places]
    assert names == (["driver", "trainer 0"] if takes_part else [])


def test_steps_that_take_long_are_not_taken_for_a_death(tmp_path):
    folder = make_run(tmp_path / "run", 0, 300)
    (folder / "metrics.jsonl").write_text(json.dumps(step(1, 100.0).fields()) + "\n")
    then = time.time() - 300
    os.utime(folder / "metrics.jsonl", (then, then))
    with status.taking_part(folder, {}):
        assert status.status(folder).state == "running: step 1 of 40, 5 min ago"


def test_workers_of_other_hosts_are_not_looked_for_among_our_processes(tmp_path):
    """Numbers of processes say nothing on another host, where this one may be anything or nothing."""
    folder = make_run(tmp_path / "run", 7)
    (gone := subprocess.Popen(["true"])).wait()
    workers = {"trainer 0": ("10.0.0.2", gone.pid), "server 0": ("10.0.0.3", os.getpid())}
    with status.taking_part(folder, workers):
        found = status.status(folder)
    assert found.state.startswith("running")
    lines = [text for word, text in status.lines_of(found) if word == "worker"]
    assert lines[1:] == [f"{name:10} {host}, process {pid}" for name, (host, pid) in workers.items()]


def test_nobody_takes_part_any_more_whichever_way_a_driver_ends(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    with pytest.raises(RuntimeError), status.taking_part(folder, {}):
        raise RuntimeError
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "run.yaml"]


def test_it_is_printed_with_loss_speed_workers_and_events(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs" / "old", 3, 500)
    new = make_run(tmp_path / "runs" / "new", 8)
    (new / "events.txt").write_text("".join(f"2026-01-01 00:00:0{n}  step {n}  happened\n" for n in range(9)))
    monkeypatch.chdir(tmp_path)
    with status.taking_part(new, {"server 1": ("10.0.0.3", 4321)}):
        assert cli.run(["status"]) == EXIT_OK
    told = capsys.readouterr().out
    for part in (
        "running: step 8 of 40",
        "4.2000, from 4.9000 in step 1",
        "2,000 tokens/s, 0.50 s a step",
        "about 16 s",
    ):
        assert part in told
    assert "server 1   10.0.0.3, process 4321" in told and told.count("happened") == 5 and "none yet" in told


@pytest.mark.parametrize(("command", "said"), [(["status", "."], "no run.yaml"), (["status"], "no run's folder in")])
def test_a_folder_that_is_none_of_a_run_is_refused(tmp_path, capsys, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    assert cli.run(command) == EXIT_DATA
    assert said in " ".join(capsys.readouterr().err.split())
