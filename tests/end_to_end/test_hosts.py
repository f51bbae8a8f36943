"""Runs over several hosts with addresses of their own, on a Ray cluster that asks for a token."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from hosts import network, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]

DISTCA = [sys.executable, "-m", "distca.launch.entry"]
MODEL = dict(
    model_type="llama",
    vocab_size=259,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def write_run_file(folder: Path, **train) -> Path:
    values = dict(
        name="hosts",
        model=dict(config=MODEL),
        data=dict(sources=[dict(path=f"{sysconfig.get_path('stdlib')}/t[a-e]*.py")], cache=str(folder / "cache")),
        train=dict(tokens_per_step=2048, steps=3) | train,
        parallel=dict(trainers=2, servers=2, trainers_serve=False, device="cpu"),
        monitor=dict(folder=str(folder / "runs")),
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two hosts of two CPUs, and the environment of a driver on the first."""
    with network(2) as hosts, ray_cluster(hosts, tmp_path_factory.mktemp("cluster"), num_cpus=2) as environment:
        yield hosts, environment


@pytest.mark.parametrize("transport", ["pairs", "group", "nixl"])
def test_a_step_over_two_hosts_is_exact(cluster, tmp_path, transport):
    hosts, environment = cluster
    run = write_run_file(tmp_path, precision="fp64")
    done = hosts[0].run([*DISTCA, "verify", str(run), "--parallel.transport", transport], env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout


def test_losses_over_two_hosts_are_those_of_one_machine(cluster, tmp_path):
    hosts, environment = cluster
    losses = {}
    for name, start in {"cluster": hosts[0].run, "alone": subprocess.run}.items():
        folder = tmp_path / name
        folder.mkdir()
        options = dict(env=environment) if name == "cluster" else dict(capture_output=True, text=True)
        done = start([*DISTCA, "train", str(write_run_file(folder))], cwd=folder, **options)
        assert done.returncode == 0, done.stdout
        [records] = (folder / "runs").glob("*/metrics.jsonl")
        losses[name] = [json.loads(line)["loss"] for line in records.read_text().splitlines()]
        [logs] = (folder / "runs").glob("*/logs")
    assert len(losses["alone"]) == 3 and losses["cluster"] == losses["alone"]
