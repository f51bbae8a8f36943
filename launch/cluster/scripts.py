"""What does one hand to a cluster's scheduler, so that a run file trains there?

`slurm` writes a batch script, `kuberay` the manifests of a RayJob. Both say in comments what each part is for: they are
meant to be read, kept and changed. The run keeps its own folder, and the command in them goes on from the checkpoint
that it finds there, so whatever starts the job again loses no more than the steps since then.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from distca.config import RunSettings, dump_settings
from distca.errors import EXIT_TRY_AGAIN, SettingsError

RAY_CPUS = 1  # for Ray itself, on every node
SAVE_S = 180  # a stopped run saves a checkpoint, which may take that long
RETRIES = 10
SHARED = "/shared"


@dataclass(frozen=True, slots=True)
class Nodes:
    """What a run asks of a cluster."""

    num_nodes: int
    workers: int
    """On each node, at most: trainers and dedicated servers."""
    gpus: int
    """On each node."""
    cpus: int
    """On each node."""


def nodes_of(settings: RunSettings, per_node: int, cpus_per_worker: int | None) -> Nodes:
    """How many nodes hold all workers, `per_node` on each, and what each of them must have."""
    parallel = settings.parallel
    num_workers = parallel.trainers + parallel.servers
    if per_node < 1 or (cpus_per_worker is not None and cpus_per_worker < parallel.threads):
        raise SettingsError(
            f"want at least 1 worker on a node, and a CPU for each of a worker's {parallel.threads} threads "
            "(parallel.threads)"
        )
    workers = min(per_node, num_workers)
    gpus = 0 if parallel.device == "cpu" else workers
    cpus = workers * (cpus_per_worker or max(parallel.threads, 8 if gpus else 1)) + RAY_CPUS
    return Nodes(math.ceil(num_workers / per_node), workers, gpus, cpus)


def slurm(
    run: Path,
    settings: RunSettings,
    overrides: Sequence[str],
    nodes: Nodes,
    time_limit: str,
    memory: str,
    interface: str | None,
    setup: str,
    options: Sequence[str],
) -> str:
    """A batch script; `options` are further lines for `#SBATCH`."""
    lines = [
        (f"--job-name={settings.name}", ""),
        (f"--nodes={nodes.num_nodes}", ""),
        ("--ntasks-per-node=1", "one Ray on each, which starts the workers"),
        (f"--cpus-per-task={nodes.cpus}", "and one is for Ray itself"),
        *([(f"--gpus-per-node={nodes.gpus}", "")] if nodes.gpus else []),
        (f"--mem={memory}", "of each node; 0 is all of it"),
        (f"--time={time_limit}", ""),
        (f"--signal=B:TERM@{SAVE_S}", "so many seconds before the end: time to save a checkpoint"),
        ("--requeue", "and go on from that"),
        ("--open-mode=append", "in the same log"),
        ("--output=%x-%j.txt", ""),
        *((option, "") for option in options),
    ]
    address = (
        f'ip -4 -o address show dev {shlex.quote(interface)} | awk \'{{sub("/.*", "", $4); print $4; exit}}\''
        if interface
        else "hostname -I | awk '{print $1}'"
    )
    return SLURM.format(
        run=shlex.quote(str(run)),
        sbatch="\n".join(f"#SBATCH {option:<24} # {why}" if why else f"#SBATCH {option}" for option, why in lines),
        setup=setup.strip() or "# here `distca` and `ray` become callable: module load ..., source .venv/bin/activate",
        address=address,
        cpus=nodes.cpus,
        gpus=nodes.gpus,
        hosts=nodes.num_nodes,
        name=shlex.quote(settings.name),
        runs=shlex.quote(str(settings.monitor.folder)),
        overrides="".join(f" {shlex.quote(word)}" for word in overrides),
        again=EXIT_TRY_AGAIN,
    )


SLURM = """\
#!/bin/bash
# Trains {run} with DistCA. Submit it with: sbatch THIS_FILE
{sbatch}

set -euo pipefail
umask 077  # what this job writes, its token first of all, is for nobody else
cd "$SLURM_SUBMIT_DIR"

{setup}

# ---- one Ray for this job alone: whoever has no token gets nothing from it ----
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID" RAY_USAGE_STATS_ENABLED=0
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH"
own_address() {{ {address}; }}
HEAD_ADDRESS=$(own_address)  # this script runs on the first node, where Ray's head and the driver will be
HEAD_PORT=$((20000 + SLURM_JOB_ID % 2500))  # jobs that share a node have different ones
CLIENT_PORT=$((HEAD_PORT + 2500)) AGENT_PORT=$((HEAD_PORT + 5000))
export HEAD_ADDRESS HEAD_PORT CLIENT_PORT AGENT_PORT
export -f own_address

# shellcheck disable=SC2016  # it is each node's shell that is to expand it
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
    options=(--block --node-ip-address="$(own_address)" --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats)
    options+=(--dashboard-agent-listen-port="$AGENT_PORT")
    if [ "$SLURM_NODEID" = 0 ]; then
        options+=(--port="$HEAD_PORT" --ray-client-server-port="$CLIENT_PORT" --include-dashboard=false)
        exec ray start --head "${{options[@]}}"
    fi
    until (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$HEAD_PORT") 2>/dev/null; do sleep 1; done
    exec ray start --address="$HEAD_ADDRESS:$HEAD_PORT" "${{options[@]}}"
' > "ray-$SLURM_JOB_ID.txt" 2>&1 &
ray=$!

# ---- the run: in a folder of this job, so that it goes on there after a requeue ----
until (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$HEAD_PORT") 2>/dev/null; do
    kill -0 "$ray" || {{ echo "Ray did not start: see ray-$SLURM_JOB_ID.txt" >&2; exit 1; }}
    sleep 1
done
export RAY_ADDRESS="$HEAD_ADDRESS:$HEAD_PORT"
distca train {run} --folder {runs}/{name}-"$SLURM_JOB_ID" --hosts {hosts}{overrides} &
driver=$!
trap 'kill -TERM "$driver"' TERM  # the time is nearly over, or the job is preempted: it saves a checkpoint

code=0
while kill -0 "$driver" 2>/dev/null; do  # a signal ends `wait` before the driver has ended
    code=0
    wait "$driver" || code=$?
done

kill "$ray" 2>/dev/null || true
wait "$ray" 2>/dev/null || true
rm -f "$RAY_AUTH_TOKEN_PATH"
if [ "$code" = {again} ]; then  # stopped with a checkpoint, or try again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def kuberay(
    settings: RunSettings,
    nodes: Nodes,
    image: str,
    memory: str,
    claim: str,
    shared_memory: str,
    hours: float,
) -> str:
    """Manifests of a ConfigMap with the run file and of a RayJob, for KubeRay 1.5 or newer."""
    name = _kubernetes_name(settings.name)
    command = ["distca", "train", "/run-file/run.yaml", "--folder", f"{SHARED}/runs/{name}"]
    command += ["--hosts", str(nodes.num_nodes + 1)]
    head = _pod(image, "ray-head", {"cpu": "2", "memory": "8Gi"}, claim, shared_memory, name)
    resources = {"cpu": str(nodes.cpus), "memory": memory}
    if nodes.gpus:
        resources["nvidia.com/gpu"] = str(nodes.gpus)
    worker = _pod(image, "ray-worker", resources, claim, shared_memory, name)
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": nodes.num_nodes,
                "minReplicas": nodes.num_nodes,
                "maxReplicas": nodes.num_nodes,
                "rayStartParams": {},
                "template": worker,
            }
        ],
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": shlex.join(command),
            "submissionMode": "K8sJobMode",
            "backoffLimit": RETRIES,
            "activeDeadlineSeconds": round(hours * 3600),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-run-file"},
        "data": {"run.yaml": dump_settings(settings)},
    }
    manifests = yaml.dump_all([files, job], Dumper=_Readable, sort_keys=False, width=10_000)
    return KUBERAY.format(claim=claim, shared=SHARED, retries=RETRIES) + manifests


KUBERAY = """\
# Trains with DistCA on KubeRay 1.5 or newer. Submit it with: kubectl apply -f THIS_FILE
# The run file is the ConfigMap below. Its data and model are read from, and the run is kept in, the volume of the claim
# {claim!r}, which all pods see at {shared}: paths in the run file are paths there. A job that fails is tried again, up
# to {retries} times, and goes on from its newest checkpoint. Ray asks for a token, which KubeRay makes and hands out.
"""


class _Readable(yaml.SafeDumper):
    """Lines of a text stay lines, and nothing refers to something further up."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def _pod(
    image: str, container: str, resources: dict[str, str], claim: str, shared_memory: str, name: str
) -> dict[str, Any]:
    mounts = {"shared": SHARED, "run-file": "/run-file", "shared-memory": "/dev/shm"}
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "resources": {"limits": resources, "requests": resources},
                    "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
                }
            ],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "run-file", "configMap": {"name": f"{name}-run-file"}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
            ],
        }
    }


def _kubernetes_name(name: str) -> str:
    """A DNS label: lower-case letters, digits and dashes, a letter first; KubeRay adds to it, so it is short."""
    made = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")
    return f"distca-{made}"[:40].rstrip("-")
