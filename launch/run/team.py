"""Who carries out a run? Its workers, started where the cluster has room and joined by their links."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from distca.config import RunSettings
from distca.errors import SettingsError
from distca.launch.cluster.hosts import common
from distca.launch.cluster.session import start_ray, wait_for_hosts
from distca.launch.cluster.store import rendezvous_store
from distca.launch.cluster.workers import Worker, WorkerProcess, gather, num_gpus, place, refuse_strangers, spawn
from distca.launch.process.forkserver import RayOptions
from distca.launch.run.plan_inputs import knowing_nodes, uneven_nodes
from distca.launch.run.readers import documents_by_host
from distca.launch.run.server import DedicatedServer, Meeting
from distca.launch.run.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Team:
    """All workers of a run, joined by their links."""

    trainers: list[Worker]
    servers: list[Worker]
    processes: list[WorkerProcess]
    """Of the trainers, then of the servers."""

    @property
    def hosts(self) -> list[str] | None:
        """Of every worker, trainers first, in few letters; None where there is one host."""
        addresses = [process.host for process in self.processes]
        return shortened(addresses) if len(set(addresses)) > 1 else None

    @property
    def names(self) -> dict[str, str]:
        """What people know each worker by: with its host, where there are several."""
        workers = list(map(str, self.trainers + self.servers))
        if not self.hosts:
            return {worker: worker for worker in workers}
        return {worker: f"{worker} on {host}" for worker, host in zip(workers, self.hosts, strict=True)}


@contextmanager
def team_of(
    settings: RunSettings,
    folder: Path,
    documents: tuple[Path, ...],
    console: Console,
    ray: RayOptions,
    trainer: type = Trainer,
    server: type = DedicatedServer,
    run_file: RunSettings | None = None,
) -> Iterator[Team]:
    """Ray, a place for every worker, workers joined by links; all gone on the way out.

    `run_file` says what the documents were made from, where that is not in `settings`."""
    parallel = settings.parallel
    num_workers, timeout_s = parallel.trainers + parallel.servers, parallel.start_timeout_s
    gpus, there = use_gpus(settings), torch.cuda.device_count()
    if there and not gpus and parallel.device == "auto":
        logger.warning(
            "%d workers, but %d GPUs: using the CPU; for GPUs lower parallel.trainers or parallel.servers",
            num_workers,
            there,
        )
    with ExitStack() as stack:
        with console.status("starting Ray"):
            options = dict(num_workers=num_workers, threads=parallel.threads, gpus=gpus)
            cluster = stack.enter_context(start_ray(folder, ray, **options))
            wait_for_hosts(ray.hosts, timeout_s)
            if not gpus and parallel.device == "auto" and not cluster.own and (count := num_gpus()):
                logger.warning("the cluster has %d GPUs, and this run takes none: set parallel.device: cuda", count)
            counts = (parallel.trainers, parallel.servers, parallel.placement)
            placement = place(cluster, *counts, timeout_s=timeout_s, gpus=gpus, threads=parallel.threads)
            if uneven := uneven_nodes(settings, placement.hosts):
                logger.info("%s", uneven)
            settings = knowing_nodes(settings, placement.hosts)
        with console.status(
            f"starting {parallel.trainers} trainers and {parallel.servers} dedicated attention servers"
        ):
            store, port = rendezvous_store(cluster.host, timeout_s)
            stack.callback(lambda: store)  # the workers' meeting point lives as long as they do
            of_trainers = None if cluster.own else stack.enter_context(common([folder], _read(settings)))
            arguments = (settings, Meeting(cluster.host, port), "cuda" if gpus else "cpu")
            first = parallel.trainers if parallel.trainers_serve else 0
            where = dict(placement=placement, role="server", common=of_trainers and replace(of_trainers, files=()))
            servers = [
                spawn(server, first + n, *arguments, bundle=parallel.trainers + n, number=n, **where)
                for n in range(parallel.servers)
            ]
            hosts, made_with = placement.hosts[: parallel.trainers], (settings, run_file or settings, folder)
            of_hosts = documents_by_host(cluster, hosts, *made_with, documents, of_trainers)
            where = dict(placement=placement, role="trainer", common=of_trainers)
            trainers = [
                spawn(trainer, rank, *arguments, of_hosts[host], bundle=rank, **where)
                for rank, host in enumerate(hosts)
            ]
            processes = gather([w.made for w in trainers + servers], timeout_s, "starting")
            refuse_strangers(trainers + servers, processes, timeout_s)
            ask(trainers + servers, "connect", what="meeting the others", timeout_s=timeout_s)
        yield Team(trainers, servers, processes)


def shortened(addresses: Sequence[str]) -> list[str]:
    """Without the parts, from the left, that all have in common."""
    parts = [address.split(".") for address in addresses]
    common_parts = len(os.path.commonprefix(parts))
    return ["…" * bool(common_parts) + ".".join(part[common_parts:]) for part in parts]


def _read(settings: RunSettings) -> list[Path]:
    """Files and folders that every trainer reads; a model of a hub is not among them."""
    model = settings.model.path
    return [Path(model)] if model and Path(model).exists() else []


def ask(workers: list[Worker], method: str, *arguments, what: str, timeout_s: float | None = None) -> list:
    """Ask all workers the same; their answers in order, or one error in words."""
    return gather([w.call(method, *arguments) for w in workers], timeout_s, what)


def refuse_bad_start(settings: RunSettings, team: Team) -> None:
    if not weights_are_finite(team):
        raise SettingsError(f"model.path: the weights from {settings.model.path} hold numbers that are not finite")


def weights_are_finite(team: Team) -> bool:
    return all(ask(team.trainers, "weights_are_finite", what="looking at the weights"))


def serving(settings: RunSettings, team: Team) -> list[Worker]:
    """Who computes attention, in the pool's order."""
    return (team.trainers if settings.parallel.trainers_serve else []) + team.servers


def use_gpus(settings: RunSettings) -> bool:
    """Whether every worker gets a GPU."""
    wanted, num_workers = settings.parallel.device, settings.parallel.trainers + settings.parallel.servers
    return wanted == "cuda" or (wanted == "auto" and torch.cuda.device_count() >= num_workers)
