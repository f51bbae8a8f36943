"""How does a run go from a run file to a trained model?

The driver's part: prepare documents, start Ray, place and join the workers, then step by step ask all trainers for one
optimizer step, report it, and publish checkpoints. Readable top to bottom: `train` is the timetable.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from distca.config import RunSettings, dump_settings
from distca.errors import SettingsError, TryAgain, UserError
from distca.launch.cluster.hosts import versions
from distca.launch.cluster.places import who_is_where
from distca.launch.cluster.workers import (
    WorkerFailed,
    WorkerLost,
    gather,
)
from distca.launch.data.batches import Corpus, first_step_with_targets
from distca.launch.folder.make import accounted, go_on, new_folder, refuse_folder
from distca.launch.folder.monitor import Monitor
from distca.launch.folder.paths import absolute_paths
from distca.launch.folder.publish import Published, newest, prune, publishing
from distca.launch.folder.runs import (
    changes_since,
    keep_model,
    known_documents,
    with_kernel_times,
    with_own_model,
    write_settings,
)
from distca.launch.folder.status import CHECKPOINTS, taking_part
from distca.launch.folder.trace import StepTrace
from distca.launch.process.forkserver import OWN_RAY, RayOptions
from distca.launch.process.stop import finishing
from distca.launch.run.check import check, prepare_again, prepare_documents
from distca.launch.run.recorder import Recorder
from distca.launch.run.server import pool_of
from distca.launch.run.team import Team, ask, refuse_bad_start, serving, team_of, weights_are_finite
from distca.launch.run.trainer import PlanSummary, TrainerReport
from distca.launch.run.verify import Comparison
from distca.metrics import StepRecord
from distca.order import Cursor
from distca.parallel.precision import refuse_precision
from distca.parallel.server import ServerReport
from distca.plan import imbalance

logger = logging.getLogger(__name__)
SIGN_OF_LIFE_S = 5.0  # a server that is well answers at once: its calls run on other threads


def train(settings: RunSettings, console: Console, ray: RayOptions = OWN_RAY, own_folder: Path | None = None) -> Path:
    """Run from the first step, in a folder of this name or a new one in `monitor.folder`; returns the folder."""
    settings = absolute_paths(settings)
    refuse_precision(settings)
    config = check(settings)
    refuse_folder((own_folder or settings.monitor.folder).absolute())
    documents = prepare_documents(settings, config, console)
    first_step_with_targets(settings, documents)  # refused before anything is started
    with new_folder(settings, own=own_folder) as folder, accounted(folder):
        console.print(f"[bold]run[/] {escape(str(folder))}", highlight=False)
        keep_model(folder, settings, config, documents)
        settings = with_kernel_times(settings, folder)
        _run(settings, settings, folder, documents, None, console, ray)
    return folder


def resume(folder: Path, settings: RunSettings, console: Console, ray: RayOptions = OWN_RAY) -> Path:
    """Go on from a run's newest checkpoint, in its folder; `settings` may differ from the run's in the pool, the number
    of steps, …"""
    folder, settings = folder.absolute(), absolute_paths(settings)
    checkpoint = newest(folder / CHECKPOINTS)
    changes = changes_since(checkpoint, settings)
    refuse_precision(settings)
    if checkpoint.step >= settings.train.steps:
        raise SettingsError(
            f"{folder}: step {checkpoint.step} of {settings.train.steps} is done; ask for more: --train.steps "
            f"{checkpoint.step * 2}"
        )
    settings = with_kernel_times(settings, folder)
    working = with_own_model(settings, folder, checkpoint)
    documents = prepare_again(settings, folder, check(working), console, checkpoint)
    console.print(f"[bold]resuming[/] {escape(str(folder))} after step {checkpoint.step}", highlight=False)
    for change in changes:
        console.print(f"[bold]changed[/]  {escape(change)}, from step {checkpoint.step + 1} on", highlight=False)
    with accounted(folder):
        _run(settings, working, folder, documents, checkpoint, console, ray)
    return folder


def verify(settings: RunSettings, console: Console, ray: RayOptions = OWN_RAY) -> Comparison:
    """One step of the run, distributed, against one device."""
    if settings.train.precision != "fp64":
        refuse_precision(settings)
    settings = absolute_paths(settings)
    documents = prepare_documents(settings, check(settings), console)
    step, cursor = first_step_with_targets(settings, documents)
    with (
        new_folder(settings, prefix="verify-") as folder,
        accounted(folder),
        team_of(with_kernel_times(settings, folder), folder, documents, console, ray) as team,
        console.status("one step distributed, and one on one device"),
    ):
        refuse_bad_start(settings, team)
        ask(team.trainers, "seek", step, cursor, what="reading its documents")
        result = ask(team.trainers, "verify", what="verifying")[0]
    shutil.rmtree(folder)  # nothing but logs, of use only after a failure
    if not np.isfinite(result.reference_loss):
        raise UserError(
            f"on one device the loss of step {step} is {result.reference_loss}: the model's own numbers overflow, so "
            "there is nothing to compare with"
        )
    return result


def _run(
    run_file: RunSettings,
    settings: RunSettings,
    folder: Path,
    documents: tuple[Path, ...],
    start: Published | None,
    console: Console,
    ray: RayOptions,
) -> None:
    """Steps after `start` (or all), to the end of the run or until asked to stop.

    `run_file` is what the run's file says, `settings` what its workers go by: after `start` the run's own model."""
    steps, done = settings.train.steps, start.step if start else 0
    cursor = Cursor(*start.facts["cursor"]) if start else Cursor()
    with team_of(settings, folder, documents, console, ray, run_file=run_file) as team:
        if start:
            ask(team.trainers, "load", start.path, what="loading the checkpoint")
        else:
            refuse_bad_start(settings, team)
        ask(team.trainers, "seek", done + 1, cursor, what="reading its documents")
        asked = finishing()  # until here a request ends the command, and nothing of it is left
        write_settings(run_file, folder)
        before = start.facts["record"] if start else None
        monitor = Monitor(folder, settings.monitor, first_step=done + 1, before=before)
        recorder = Recorder(folder, settings.monitor.trace_steps, team.trainers, serving(settings, team), team.names)
        everybody = zip(team.trainers + team.servers, team.processes, strict=True)
        with taking_part(folder, {str(w): (p.host, p.pid) for w, p in everybody}), closing(recorder), closing(monitor):
            monitor.start(dump_settings(run_file), versions() | _describe(settings, team, documents, console))
            reporter = _Reporter(settings, team, monitor, console)
            seen, saved = before or dict(tokens_seen=0, targets_seen=0), done
            for step in range(done + 1, steps + 1):
                recorder.start(step, monitor.wants_pictures(step))
                clock = time.perf_counter()
                with recorder.trace.span("ray", f"step {step} of all trainers"):
                    trainers = _step(team, step)
                with recorder.trace.span("ray", "reports of dedicated servers"):
                    servers = ask(team.servers, "take_report", what=f"reporting step {step}")
                record = _record(settings, step, time.perf_counter() - clock, seen, trainers, servers)
                seen = record.fields()
                recorded = recorder.finish(step, trainers[0].plan and trainers[0].plan.load, record.server_busy_s)
                _refuse_bad_numbers(record, saved)
                if _is_due(settings, step) or asked.is_set():
                    if not weights_are_finite(team):
                        raise UserError(_stopped_because(f"step {step} left weights that are not finite", saved))
                    save_s = _publish(run_file, folder, documents, team, record, trainers[0], monitor)
                    saved, record = step, replace(record, checkpoint_save_s=save_s)
                reporter.show(record, trainers, recorded)
                if asked.is_set() and saved == step < steps:
                    raise TryAgain(
                        f"stopped as asked after step {step}, with a checkpoint; go on with: {go_on(folder)}"
                    )


def _step(team: Team, step: int) -> list[TrainerReport]:
    """One step of all trainers. Where it fails for want of an attention server, that server is the one to be named."""
    what = f"running step {step}"
    try:
        return ask(team.trainers, "step", what=what)
    except WorkerLost:
        raise
    except WorkerFailed:
        gather([server.made for server in team.servers], SIGN_OF_LIFE_S, what)
        raise


def _refuse_bad_numbers(record: StepRecord, saved: int) -> None:
    """A step that is not a number has changed no weight, and is the last."""
    numbers = {"a loss": record.loss, "a gradient norm": record.grad_norm}
    bad = [f"{name} of {value}" for name, value in numbers.items() if value is not None and not np.isfinite(value)]
    if bad:
        raise UserError(_stopped_because(f"step {record.step} has {' and '.join(bad)}", saved))


def _stopped_because(what: str, saved: int) -> str:
    newest = f"its newest checkpoint is of step {saved}" if saved else "it has no checkpoint yet"
    return (
        f"{what}: the run stops here and saves nothing of it; {newest}. Try a lower train.optimizer.learning_rate, a "
        "longer train.schedule.warmup_steps or a smaller train.clip_grad_norm"
    )


def _is_due(settings: RunSettings, step: int) -> bool:
    every = settings.checkpoint.every_steps
    return step == settings.train.steps or bool(every and step % every == 0)


def _publish(
    settings: RunSettings,
    folder: Path,
    documents: tuple[Path, ...],
    team: Team,
    record: StepRecord,
    report: TrainerReport,
    monitor: Monitor,
) -> float:
    """Publish a checkpoint and forget the oldest; the seconds that took."""
    start, step = time.perf_counter(), record.step
    facts = dict(
        settings=settings.model_dump(mode="json"),
        documents=known_documents(documents),
        cursor=list(report.cursor),
        record=record.fields(),
    )
    with publishing(folder / CHECKPOINTS, step, facts) as draft:
        ask(team.trainers, "save", draft, what=f"saving step {step}")
    prune(folder / CHECKPOINTS, settings.checkpoint.keep, step)
    monitor.event(step, f"checkpoint of step {step} published")
    return time.perf_counter() - start


def _record(
    settings: RunSettings,
    step: int,
    step_s: float,
    before: Mapping[str, Any],
    trainers: list[TrainerReport],
    servers: list[tuple[ServerReport, float]],
) -> StepRecord:
    """One step's numbers from all workers' reports; what is counted goes on from the step before."""
    first, tokens = trainers[0], settings.train.tokens_per_step
    record = StepRecord(
        step=step,
        num_steps=settings.train.steps,
        loss=None,
        tokens=tokens,
        targets=first.targets,
        step_s=step_s,
        tokens_seen=before["tokens_seen"] + tokens,
        targets_seen=before["targets_seen"] + first.targets,
        data_wait_s=max(t.data_wait_s for t in trainers),
        num_documents=len(first.lengths),
        epoch=float(first.epoch),
        trainer_rss_mib=max(t.rss_mib for t in trainers),
        server_rss_mib=max((rss for _, rss in servers), default=None),
    )
    if not first.targets:
        return record
    busy_s, capacity = _busy_s(trainers, servers), pool_of(settings).capacity
    at_home, num_workers = np.ones(len(trainers)), len(trainers) + len(servers)
    return replace(
        record,
        loss=sum(t.summed_loss for t in trainers) / first.targets,
        grad_norm=first.grad_norm,
        learning_rate=first.learning_rate,
        tflops_per_worker=first.plan.flops / step_s / num_workers / 1e12,
        imbalance_packed=imbalance(first.load_packed, at_home),
        imbalance_placed=imbalance(first.plan.load_placed, at_home),
        imbalance_planned=imbalance(first.plan.load, capacity),
        imbalance_measured=imbalance(busy_s, capacity),
        bytes_moved=sum(t.exchange.bytes_sent + t.exchange.bytes_received for t in trainers),
        num_tasks=first.plan.num_tasks,
        plan_s=first.plan_s,
        attention_s=max(busy_s),
        wait_s=sum(t.exchange.wait_s for t in trainers) / len(trainers),
        hidden_s=sum(t.exchange.hidden_s for t in trainers) / len(trainers),
        server_busy_s=busy_s,
    )


def _busy_s(trainers: list[TrainerReport], servers: list[tuple[ServerReport, float]]) -> tuple[float, ...]:
    """Seconds in kernels of each server, in the pool's order."""
    return tuple(t.server.busy_s for t in trainers if t.server) + tuple(report.busy_s for report, _ in servers)


class _Reporter:
    """What people see of the steps: a line each, TensorBoard's numbers, and now and then pictures."""

    def __init__(self, settings: RunSettings, team: Team, monitor: Monitor, console: Console):
        self._pool, self._team, self._monitor, self._console = pool_of(settings), team, monitor, console
        self._lengths: list[np.ndarray] = []  # of the documents since the last picture

    def show(self, record: StepRecord, trainers: list[TrainerReport], recorded: StepTrace | None) -> None:
        self._console.print(record.line(), highlight=False)
        self._monitor.step(record)
        self._lengths.append(trainers[0].lengths)
        if self._monitor.wants_pictures(record.step):
            self._monitor.documents(record.step, np.concatenate(self._lengths))
            self._lengths.clear()
            if trainers[0].plan:
                self._show_load(record, trainers[0].plan, trainers[0].load_packed)
        if recorded:
            self._monitor.timeline(recorded)
        if not record.targets:
            self._monitor.event(record.step, "no targets: weights and optimizer stay as they are")

    def _show_load(self, record: StepRecord, plan: PlanSummary, load_packed: np.ndarray) -> None:
        """A bar per worker, trainers first: with documents in their order they would do all the work, as planned the
        pool does."""
        workers = self._team.trainers + self._team.servers
        in_pool = np.zeros((3, len(workers)))
        in_pool[:, len(workers) - len(self._pool) :] = plan.load, record.server_busy_s, self._pool.capacity
        planned, busy_s, capacity = in_pool
        packed = np.append(load_packed, np.zeros(len(self._team.servers)))
        seconds_per_pair = busy_s.sum() / max(1.0, planned.sum())
        self._monitor.server_load(
            record.step,
            packed * seconds_per_pair,
            planned * seconds_per_pair,
            busy_s,
            capacity=capacity,
            capacity_packed=np.append(np.ones(len(self._team.trainers)), np.zeros(len(self._team.servers))),
            names=[str(worker) for worker in workers],
            hosts=self._team.hosts,
        )


def _describe(settings: RunSettings, team: Team, documents: tuple[Path, ...], console: Console) -> dict[str, str]:
    """Say what is about to run."""
    told = ask(team.trainers[:1], "describe", what="describing the model")[0]
    corpus, names = Corpus(documents), [source.path for source in settings.data.sources]
    masks = ", ".join(f"{n} layers {rule}" for rule, n in told["layers"].items())
    facts = {
        "model": f"{told['parameters'] / 1e6:.2f} M parameters, {masks}",
        "documents": f"{sum(corpus.num_documents):,} with {sum(corpus.num_tokens):,} tokens, "
        f"{sum(corpus.num_targets):,} of them to be predicted, from {', '.join(names)}",
        "step": f"{settings.train.tokens_per_step:,} tokens = {settings.parallel.trainers} trainers x "
        f"{settings.tokens_per_rank:,} x {settings.accumulation} micro-batches",
        "attention": f"{', '.join(map(str, serving(settings, team)))}; back end {settings.kernels.backend}, "
        f"ZeRO stage {settings.parallel.zero_stage}, {settings.train.precision}",
        "overlap": told["overlap"],
    }
    hosts = [process.host for process in team.processes]
    if len(set(hosts)) > 1:
        facts["hosts"] = who_is_where(hosts, settings.parallel.trainers)
    for name, text in facts.items():
        console.print(f"[bold]{name:10}[/] {escape(text)}", highlight=False)
    return facts
