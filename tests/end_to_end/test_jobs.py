"""A run as a job of a cluster elsewhere: three hosts with addresses of their own, and a client that is on none."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import DISTCA, losses_alone, losses_of, wait_until, write_run_file
from hosts import RAY, network, own_sessions, ray_cluster, ray_head, ray_node
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distca.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_SETTINGS, EXIT_TRY_AGAIN

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]

STEPS = 20
TRAIN = dict(steps=STEPS, tokens_per_step=8192)  # seconds of steps, so that a run is stopped in the middle


class Client:
    """A machine from which jobs are submitted, with the cluster's token."""

    def __init__(self, host, environment, address):
        self.host, self.address = host, f"http://{address}:8265"
        self.environment = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}

    def command(self, verb, *arguments):
        return [*DISTCA, verb, *map(str, arguments), "--address", self.address]

    def run(self, verb, *arguments, **environment) -> subprocess.CompletedProcess:
        wanted = {name: value for name, value in (self.environment | environment).items() if value is not None}
        return self.host.run(self.command(verb, *arguments), env=wanted)


def curves(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run now."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=dict(scalars=0, tensors=0)).Reload()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with (
        network(4) as hosts,
        ray_cluster(hosts[:3], tmp_path_factory.mktemp("cluster"), num_cpus=1, job_server=True) as environment,
    ):
        yield Client(hosts[3], environment, hosts[0].address)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one machine."""
    return losses_alone(tmp_path_factory.mktemp("alone"), train=TRAIN)


def test_a_job_trains_as_one_machine_does_and_its_exit_code_is_ours(client, alone, tmp_path):
    run = write_run_file(tmp_path, "job", train=TRAIN)
    done = client.run("submit", run, "--hosts", 3)
    assert done.returncode == EXIT_OK, done.stdout
    assert f"step {STEPS}/{STEPS}" in done.stdout and "packed" in done.stdout
    assert losses_of(tmp_path / "runs" / "job") == alone
    again = client.run("submit", run)
    assert again.returncode == EXIT_SETTINGS and f"step {STEPS} of {STEPS} is done" in again.stdout
    (name,) = re.findall(r"^job +(\S+) at", done.stdout, re.MULTILINE)
    listed = client.run("jobs").stdout
    assert re.search(rf"{re.escape(name)} +succeeded +0 ", listed), listed
    assert f"step {STEPS}/{STEPS}" in client.run("logs", name).stdout


def test_a_job_goes_on_without_its_follower_is_stopped_with_a_checkpoint_and_resumes(client, alone, tmp_path):
    run = write_run_file(tmp_path, "resumed", train=TRAIN)
    with open(tmp_path / "output", "w") as output:
        command = client.command("submit", run)
        follower = client.host.start(command, env=client.environment, stdout=output, stderr=output)
    said = (tmp_path / "output").read_text
    wait_until(lambda: re.search(r"step +2/", said()), 120, said)
    busy = client.run("submit", run)
    assert busy.returncode == EXIT_SETTINGS and "is training in" in busy.stdout
    assert 1 <= max(loss.step for loss in curves(tmp_path / "runs" / "resumed").Scalars("train/loss")) < STEPS
    follower.send_signal(signal.SIGINT)
    assert follower.wait(30) == EXIT_INTERRUPTED, said()
    name = re.search(r"no longer following (\S+), which goes on", said())[1]
    assert f"distca logs {name} --address {client.address}" in said()
    assert "running" in client.run("jobs").stdout

    stopped = client.run("stop", name)
    assert stopped.returncode == EXIT_OK and "go on from its newest checkpoint" in stopped.stdout, stopped.stdout
    logs = client.run("logs", name)
    assert logs.returncode == EXIT_TRY_AGAIN and "stopped as asked after step" in logs.stdout, logs.stdout
    assert 2 <= len(losses_of(tmp_path / "runs" / "resumed")) < STEPS
    assert client.run("stop", name).returncode == EXIT_SETTINGS

    done = client.run("submit", run)
    assert done.returncode == EXIT_OK and "resuming" in done.stdout, done.stdout
    assert losses_of(tmp_path / "runs" / "resumed") == alone
    seen = curves(tmp_path / "runs" / "resumed")
    assert [loss.step for loss in seen.Scalars("train/loss")] == list(range(1, STEPS + 1))
    facts = b"".join(seen.Tensors("run/versions/text_summary")[-1].tensor_proto.string_val).decode()
    assert re.search(r"hosts.*10\.\d+\.\d+\.\d+: trainers 0-1; 10\.\d+\.\d+\.\d+: servers 0-1", facts), facts


def test_who_has_no_token_or_another_one_is_told_so(client, tmp_path):
    (tmp_path / "other").write_text("a" * 64)
    for environment, sentence in (
        (dict(RAY_AUTH_MODE=None, RAY_AUTH_TOKEN_PATH=None), "asks for a token: set RAY_AUTH_MODE=token"),
        (dict(RAY_AUTH_TOKEN_PATH=str(tmp_path / "other")), "refused our token"),
        (dict(RAY_AUTH_TOKEN_PATH=str(tmp_path / "none")), "we have none"),
    ):
        done = client.run("submit", write_run_file(tmp_path, "secret", train=dict(steps=1)), **environment)
        assert done.returncode == EXIT_SETTINGS and sentence in done.stdout, done.stdout
    assert "secret" not in client.run("jobs").stdout


@pytest.fixture
def pods(tmp_path):
    """What a shell does on a host so that it has a pod's two volumes, which are folders of this test."""
    if os.geteuid():
        pytest.skip("would show that the manifest's command trains in pods; only root can make their folders")
    made = [place for place in (Path("/run-file"), Path("/shared")) if not place.exists()]
    for place in made:
        place.mkdir()
    for name in ("run-file", "shared"):
        (tmp_path / name).mkdir()
    yield " && ".join(f"mount --bind {tmp_path}/{name} /{name}" for name in ("run-file", "shared"))
    for place in made:
        place.rmdir()


def test_the_manifests_command_trains_in_pods_with_its_volumes(pods, tmp_path):
    """As a job, as KubeRay starts it; the head has no CPUs of its own."""
    run = write_run_file(tmp_path, "Pods", train=dict(steps=5), data=dict(cache="/shared/cache"))
    command = [*DISTCA, "script", "kuberay", run, "--image", "registry/distca:1", "--claim", "data", "--per-node", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    run_file, job = yaml.safe_load_all(printed)
    (tmp_path / "run-file" / "run.yaml").write_text(run_file["data"]["run.yaml"])
    spec = job["spec"]
    num_workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network(num_workers + 2))
        head = ray_head(hosts[0], tmp_path, 0, job_server=True, before=pods)
        environment = stack.enter_context(head)
        for host in hosts[1:-1]:
            before = f"{pods} && {own_sessions(environment)}"
            stack.enter_context(ray_node(host, environment, tmp_path, 2, before))
        submit = [*RAY, "job", "submit", "--address", f"http://{hosts[0].address}:8265", "--"]
        client = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        done = hosts[-1].run([*submit, *shlex.split(spec["entrypoint"])], env=client)  # as KubeRay puts it together
    assert done.returncode == 0, done.stdout
    assert len(losses_of(tmp_path / "shared" / "runs" / "distca-pods")) == 5


def test_a_cluster_without_room_is_try_again(client, tmp_path):
    holds = write_run_file(tmp_path, "holds", train=dict(steps=10_000))
    assert client.run("submit", holds, "--no-follow-log").returncode == EXIT_OK
    (name,) = re.findall(r"holds-\S+", client.run("jobs").stdout)
    try:
        wait_until(lambda: (tmp_path / "runs" / "holds" / "metrics.jsonl").exists(), 120, lambda: "no step")
        wants = write_run_file(tmp_path, "wants", train=dict(steps=1), parallel=dict(trainers=4, start_timeout_s=3.0))
        done = client.run("submit", wants)
        assert done.returncode == EXIT_TRY_AGAIN, done.stdout
        assert "6 workers share 3 CPUs of the cluster, and others hold them" in done.stdout
        assert not (tmp_path / "runs" / "wants").exists()
    finally:
        assert client.run("stop", name).returncode == EXIT_OK
