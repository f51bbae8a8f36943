"""A small run of the `distca` command as a user starts it: its run file, and waiting for what it does."""

import sys
import sysconfig
import time
from pathlib import Path

import yaml

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
