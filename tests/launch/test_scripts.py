"""What schedulers are handed: scripts that a shell takes, manifests with fields that KubeRay knows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distca.config import load_settings, validate_settings
from distca.errors import EXIT_OK, EXIT_SETTINGS
from distca.launch import cli
from distca.launch.cluster.scripts import _kubernetes_name, nodes_of

# The fields that we use, as KubeRay's RayJob (ray.io/v1) and Kubernetes' pods name them: a dict is an object, a list of
# one its items, a type a value.
RESOURCES = {"limits": {str: str}, "requests": {str: str}}
POD = {
    "spec": {
        "containers": [
            {"name": str, "image": str, "resources": RESOURCES, "volumeMounts": [{"name": str, "mountPath": str}]}
        ],
        "volumes": [
            {
                "name": str,
                "persistentVolumeClaim": {"claimName": str},
                "configMap": {"name": str},
                "emptyDir": {"medium": str, "sizeLimit": str},
            }
        ],
    }
}
WORKERS = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": {str: str},
    "template": POD,
}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "submissionMode": str,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": {str: str}, "template": POD},
            "workerGroupSpecs": [WORKERS],
        },
    },
}


def refuse_unknown(found, known, at="") -> None:
    if isinstance(known, dict) and str in known:
        assert all(isinstance(k, str) and isinstance(v, known[str]) for k, v in found.items()), at
    elif isinstance(known, dict):
        for name, value in found.items():
            assert name in known, f"{at}.{name}"
            refuse_unknown(value, known[name], f"{at}.{name}")
    elif isinstance(known, list):
        for item in found:
            refuse_unknown(item, known[0], at)
    else:
        assert type(found) is known, f"{at}: {found!r}"


def write_run_file(folder, name="my.run_1", **parallel):
    values = dict(
        name=name,
        model=dict(config=dict(model_type="llama", vocab_size=300, hidden_size=32, num_attention_heads=2)),
        data=dict(sources=[dict(path="python-stdlib")]),
        train=dict(tokens_per_step=12_288, steps=3),
        parallel=dict(device="cpu") | parallel,
    )
    path = folder / "it's a run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def printed(capsys, *command) -> str:
    assert cli.run([str(word) for word in command]) == EXIT_OK
    return capsys.readouterr().out


def directives(script: str) -> list[str]:
    lines = (line for line in script.splitlines() if line.startswith("#SBATCH"))
    return [line.removeprefix("#SBATCH ").partition(" #")[0].strip() for line in lines]


def test_a_batch_script_asks_for_what_the_run_file_needs(tmp_path, capsys):
    run = write_run_file(tmp_path, trainers=12, servers=5, trainers_serve=False, device="cuda", threads=2)
    script = printed(capsys, "script", "slurm", run, "--time", "1:00:00", "--partition", "long", "--seed", "7")
    asked = directives(script)
    assert {"--nodes=3", "--gpus-per-node=8", "--ntasks-per-node=1", "--time=1:00:00", "--partition=long"} < set(asked)
    assert {"--requeue", "--signal=B:TERM@180", "--open-mode=append"} < set(asked)
    assert "--cpus-per-task=65" in asked  # 8 for each worker, 1 for Ray
    assert "--hosts 3 --seed 7 &" in script and "include-dashboard=false" in script


def test_without_gpus_a_node_has_a_cpu_for_each_thread(tmp_path, capsys):
    run = write_run_file(tmp_path, trainers=3, servers=0, trainers_serve=True, threads=4)
    asked = directives(printed(capsys, "script", "slurm", run, "--per-node", "2", "--memory", "30G"))
    assert {"--nodes=2", "--cpus-per-task=9", "--mem=30G"} < set(asked) and not any("gpu" in line for line in asked)


@pytest.mark.parametrize("shell", [["bash", "-n"], ["shellcheck", "--severity=style"]], ids=lambda shell: shell[0])
@pytest.mark.parametrize("options", [[], ["--interface", "ib0", "--setup", "module load 'my env'"]], ids=len)
def test_a_shell_finds_nothing_wrong_with_it(tmp_path, capsys, shell, options):
    program = shutil.which(shell[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    script = tmp_path / "job.sh"
    script.write_text(printed(capsys, "script", "slurm", write_run_file(tmp_path), *options))
    done = subprocess.run([program, *shell[1:], script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_manifest_has_fields_that_kuberay_knows(tmp_path, capsys):
    run = write_run_file(tmp_path, trainers=12, servers=4, trainers_serve=False, device="cuda")
    out = printed(capsys, "script", "kuberay", run, "--image", "registry/distca:1", "--claim", "data", "--hours", "0.5")
    files, job = yaml.safe_load_all(out)
    refuse_unknown(job, RAY_JOB)
    assert (job["apiVersion"], job["kind"], files["kind"]) == ("ray.io/v1", "RayJob", "ConfigMap")
    spec = job["spec"]
    assert (spec["activeDeadlineSeconds"], spec["rayClusterSpec"]["authOptions"]) == (1800, {"mode": "token"})
    [workers] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    assert (workers["replicas"], container["resources"]["limits"]["nvidia.com/gpu"]) == (2, "8")
    assert validate_settings(yaml.safe_load(files["data"]["run.yaml"])) == load_settings(run, [])
    assert "&id" not in out and spec["entrypoint"].startswith("distca train /run-file/run.yaml --folder /shared/runs/")


@pytest.mark.parametrize("name", ["tiny", "A Run/with: everything_!" * 9, "-", "ünï"])
def test_a_name_becomes_one_that_kubernetes_takes(name):
    made = _kubernetes_name(name)
    assert 0 < len(made) <= 40 and made[0].isalpha() and made[-1].isalnum()
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in made) and made == made.lower()


@pytest.mark.parametrize("options", [["--per-node", "0"], ["--cpus-per-worker", "1"]])
def test_nodes_that_cannot_hold_a_worker_are_refused(tmp_path, capsys, options):
    run = write_run_file(tmp_path, threads=2)
    assert cli.run(["script", "slurm", str(run), *options]) == EXIT_SETTINGS
    assert "a CPU for each of a worker's 2 threads" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("trainers", "servers", "per_node", "nodes"), [(1, 0, 8, 1), (8, 0, 8, 1), (8, 1, 8, 2)])
def test_every_worker_has_a_place(tmp_path, trainers, servers, per_node, nodes):
    run = write_run_file(tmp_path, trainers=trainers, servers=servers, trainers_serve=True)
    found = nodes_of(load_settings(run, []), per_node, None)
    assert found.num_nodes == nodes and found.num_nodes * found.workers >= trainers + servers
