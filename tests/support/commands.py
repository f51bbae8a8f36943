"""A small run of the `distca` command as a user starts it: its run file, its losses, and waiting for what it does."""

import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import yaml
from hosts import without_ray

DISTCA = [sys.executable, "-m", "distca.launch.entry"]  # as the script `distca` does
MODEL = dict(
    model_type="llama",
    vocab_size=259,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)


def write_run_file(folder: Path, name: str, **sections) -> Path:
    """2 trainers and 2 dedicated servers learn some of Python's own source; sections override."""
    text = f"{sysconfig.get_path('stdlib')}/t[a-e]*.py"
    values = dict(
        name=name,
        model=dict(config=MODEL),
        data=dict(sources=[dict(path=text, format="text")], cache=str(folder / "cache")),
        train=dict(tokens_per_step=2048, precision="fp32", optimizer=dict(learning_rate=3e-3)),
        parallel=dict(trainers=2, servers=2, trainers_serve=False),
        monitor=dict(folder=str(folder / "runs")),
    )
    for section, own in sections.items():
        values[section] = values.get(section, {}) | own
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait_until(true, seconds, what):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(0.02)


def losses_of(folder: Path) -> list[float]:
    """Of a run, step by step; every step is there once."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def losses_alone(folder: Path, **sections) -> list[float]:
    """Of a run on this machine, by a Ray of its own."""
    (folder / "alone").mkdir()
    run = write_run_file(folder / "alone", "alone", **sections)
    command = [*DISTCA, "train", run, "--folder", folder / "alone" / "run"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_ray())
    assert done.returncode == 0, done.stdout + done.stderr
    return losses_of(folder / "alone" / "run")
