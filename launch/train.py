"""How does a run go from a run file to a trained model?

The driver's part: prepare documents, start Ray, place and join the workers, then step by step ask all trainers for one
optimizer step, report it, and publish checkpoints. Readable top to bottom: `train` is the timetable.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from distca.config import RunSettings, dump_settings, load_settings
from distca.errors import DataError, SettingsError, TryAgain, UserError
from distca.hardware import costs_of, wires_of
from distca.launch.cluster import (
    Worker,
    WorkerFailed,
    WorkerLost,
    WorkerProcess,
    gather,
    place,
    refuse_strangers,
    rendezvous_store,
    spawn,
    start_ray,
    wait_for_hosts,
)
from distca.launch.data import META, Corpus, first_step_with_targets, pieces_of_steps
from distca.launch.forkserver import OWN_RAY, RayOptions
from distca.launch.hosts import common
from distca.launch.monitor import Monitor
from distca.launch.outlook import shape_of
from distca.launch.prepare import prepare
from distca.launch.publish import Published, newest, prune, publishing, steps_published
from distca.launch.race import Method, Race, Times, drawn, methods_of, order_of, race_settings, refusing
from distca.launch.racer import Racer, RacingServer
from distca.launch.recorder import Recorder
from distca.launch.runs import (
    KERNEL_TIMES,
    MODEL,
    absolute_paths,
    changes_since,
    keep_model,
    kept_documents,
    known_documents,
    refuse_other_documents,
    with_kernel_times,
    with_own_model,
    with_own_tokenizer,
    write_settings,
)
from distca.launch.server import DedicatedServer, Meeting, backend_of, pool_of
from distca.launch.status import CHECKPOINTS, EVENTS, RUN_FILE, STEPS, WORKERS, taking_part
from distca.launch.stop import finishing
from distca.launch.trace import StepTrace
from distca.launch.trainer import PlanSummary, Trainer, TrainerReport
from distca.launch.unforeseen import in_words
from distca.launch.verify import Comparison
from distca.metrics import StepRecord
from distca.order import Cursor
from distca.parallel.models import PretrainedConfig, check_model, layers_of, position_warning
from distca.parallel.precision import DTYPES, refuse_precision
from distca.parallel.server import ServerReport
from distca.plan import imbalance
from distca.transports import refuse_transport

logger = logging.getLogger(__name__)

OF_A_RUN = {RUN_FILE, CHECKPOINTS, STEPS, EVENTS, WORKERS, MODEL, KERNEL_TIMES, "logs", "tensorboard", "traces"}
SIGN_OF_LIFE_S = 5.0  # a server that is well answers at once: its calls run on other threads


def train(settings: RunSettings, console: Console, ray: RayOptions = OWN_RAY, own_folder: Path | None = None) -> Path:
    """Run from the first step, in a folder of this name or a new one in `monitor.folder`; returns the folder."""
    settings = absolute_paths(settings)
    refuse_precision(settings)
    config = _check(settings)
    _refuse_folder(settings.monitor.folder)
    documents = _prepare(settings, config, console)
    first_step_with_targets(settings, documents)  # refused before anything is started
    with _new_folder(settings, own=own_folder) as folder, _accounted(folder):
        console.print(f"[bold]run[/] {escape(str(folder))}", highlight=False)
        keep_model(folder, settings, config, documents)
        settings = with_kernel_times(settings, folder)
        _run(settings, settings, folder, documents, None, console, ray)
    return folder


def resume(folder: Path, overrides: list[str], console: Console, ray: RayOptions = OWN_RAY) -> Path:
    """Go on from a run's newest checkpoint, in its folder; `overrides` may change the pool, the number of steps, …"""
    folder = folder.absolute()
    settings = absolute_paths(load_settings(folder / RUN_FILE, overrides))
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
    documents = _prepare_again(settings, folder, _check(working), console, checkpoint)
    console.print(f"[bold]resuming[/] {escape(str(folder))} after step {checkpoint.step}", highlight=False)
    for change in changes:
        console.print(f"[bold]changed[/]  {escape(change)}, from step {checkpoint.step + 1} on", highlight=False)
    with _accounted(folder):
        _run(settings, working, folder, documents, checkpoint, console, ray)
    return folder


def verify(settings: RunSettings, console: Console, ray: RayOptions = OWN_RAY) -> Comparison:
    """One step of the run, distributed, against one device."""
    if settings.train.precision != "fp64":
        refuse_precision(settings)
    settings = absolute_paths(settings)
    documents = _prepare(settings, _check(settings), console)
    step, cursor = first_step_with_targets(settings, documents)
    with (
        _new_folder(settings, prefix="verify-") as folder,
        _accounted(folder),
        _team(with_kernel_times(settings, folder), folder, documents, console, ray) as team,
        console.status("one step distributed, and one on one device"),
    ):
        _refuse_bad_start(settings, team)
        _ask(team.trainers, "seek", step, cursor, what="reading its documents")
        result = _ask(team.trainers, "verify", what="verifying")[0]
    shutil.rmtree(folder)  # nothing but logs, of use only after a failure
    if not np.isfinite(result.reference_loss):
        raise UserError(
            f"on one device the loss of step {step} is {result.reference_loss}: the model's own numbers overflow, so "
            "there is nothing to compare with"
        )
    return result


def compare(
    settings: RunSettings,
    console: Console,
    asked: Sequence[str] = (),
    lengths: np.ndarray | None = None,
    warmup: int = 1,
    rounds: int = 5,
    ray: RayOptions = OWN_RAY,
) -> Race:
    """`rounds` optimizer steps by every method asked for (all, if none is), after `warmup` of each, on the run's own
    documents, or on drawn ones of these `lengths`."""
    settings = race_settings(absolute_paths(settings), asked, warmup + rounds)
    refuse_precision(settings)
    config = _check(settings)
    with _new_folder(settings, prefix="compare-") as folder, _accounted(folder):
        if lengths is not None:
            settings = drawn(settings, lengths, config.vocab_size, folder)
        documents = _prepare(settings, config, console)
        step, cursor = first_step_with_targets(settings, documents)
        pieces = pieces_of_steps(settings, documents, cursor, warmup + rounds)
        settings = with_kernel_times(settings, folder)
        query_heads = [layer.query_heads for layer in layers_of(config)]
        methods = refusing(methods_of(settings, asked), query_heads, [p.lengths for p in chain(*pieces)])
        able = [method for method in methods if not method.refusal]
        if not able:
            raise SettingsError("; ".join(f"{method.title} cannot race: {method.refusal}" for method in methods))
        with _team(settings, folder, documents, console, ray, Racer, RacingServer) as team:
            _refuse_bad_start(settings, team)
            for method in able:
                what = f"meeting the others for {method.title}"
                _ask(team.trainers + team.servers, "enter", method.name, method.settings, what=what)
            _ask(team.trainers, "seek", step, cursor, what="reading its documents")
            times = _race(team, able, warmup, rounds, console)
    shutil.rmtree(folder)  # as after `verify`
    held, refused = [p.lengths for p in chain(*pieces[warmup:])], [m for m in methods if m.refusal]
    return Race(settings, times, refused, np.concatenate(held).tolist(), rounds, _device_of(settings))


def _race(team: Team, methods: list[Method], warmup: int, rounds: int, console: Console) -> list[Times]:
    times, start = [Times(method) for method in methods], time.perf_counter()
    with console.status("") as status:
        for number in range(warmup + rounds):
            name = f"round {number + 1 - warmup} of {rounds}" if number >= warmup else "warming up"
            seconds = {}
            for done, method in enumerate(order_of(methods, number)):
                done += number * len(methods)
                left_s = (time.perf_counter() - start) * ((warmup + rounds) * len(methods) / done - 1) if done else None
                left = "" if left_s is None else f", about {left_s:.0f} s left"
                status.update(f"{name}: {method.title}{left}")
                laps = _ask(team.trainers, "race", method.name, what=f"racing with {method.title}, {name}")
                seconds[method.name] = max(lap.seconds for lap in laps)
                if number >= warmup and laps[0].targets:
                    times[methods.index(method)].add(laps)
            told = ", ".join(f"{method.title} {seconds[method.name]:.3g} s" for method in methods)
            console.print(f"{name}: {told}", style="dim", highlight=False)
    if not times[0].seconds:
        raise DataError("nothing to predict in any of the race's rounds: ask for more --steps")
    return times


def _device_of(settings: RunSettings) -> str:
    if _use_gpus(settings):
        return torch.cuda.get_device_name(0)
    threads = settings.parallel.threads
    return f"CPU with {threads} thread{'' if threads == 1 else 's'} a worker"


@dataclass(frozen=True, slots=True)
class Team:
    """All workers of a run, joined by their links."""

    trainers: list[Worker]
    servers: list[Worker]
    processes: list[WorkerProcess]
    """Of the trainers, then of the servers."""


@contextmanager
def _team(
    settings: RunSettings,
    folder: Path,
    documents: tuple[Path, ...],
    console: Console,
    ray: RayOptions,
    trainer: type = Trainer,
    server: type = DedicatedServer,
) -> Iterator[Team]:
    """Ray, a place for every worker, workers joined by links; all gone on the way out."""
    parallel = settings.parallel
    num_workers, timeout_s = parallel.trainers + parallel.servers, parallel.start_timeout_s
    gpus, there = _use_gpus(settings), torch.cuda.device_count()
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
            placement = place(cluster, num_workers, timeout_s=timeout_s, gpus=gpus, threads=parallel.threads)
        with console.status(
            f"starting {parallel.trainers} trainers and {parallel.servers} dedicated attention servers"
        ):
            store, port = rendezvous_store(cluster.host, timeout_s)
            stack.callback(lambda: store)  # the workers' meeting point lives as long as they do
            looked_for = None if cluster.own else stack.enter_context(common([folder], _read(settings, documents)))
            arguments = (settings, Meeting(cluster.host, port), "cuda" if gpus else "cpu")
            where = dict(placement=placement, common=looked_for)
            trainers = [
                spawn(trainer, rank, *arguments, documents, bundle=rank, role="trainer", **where)
                for rank in range(parallel.trainers)
            ]
            first = parallel.trainers if parallel.trainers_serve else 0
            servers = [
                spawn(server, first + n, *arguments, bundle=parallel.trainers + n, role="server", number=n, **where)
                for n in range(parallel.servers)
            ]
            processes = gather([w.made for w in trainers + servers], timeout_s, "starting")
            refuse_strangers(trainers + servers, processes, timeout_s)
            _ask(trainers + servers, "connect", what="meeting the others", timeout_s=timeout_s)
        yield Team(trainers, servers, processes)


def _read(settings: RunSettings, documents: tuple[Path, ...]) -> list[Path]:
    """Files and folders that workers read; a model of a hub is not among them."""
    files, model = [folder / META for folder in documents], settings.model.path
    return [*files, Path(model)] if model and Path(model).exists() else files


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
    with _team(settings, folder, documents, console, ray) as team:
        if start:
            _ask(team.trainers, "load", start.path, what="loading the checkpoint")
        else:
            _refuse_bad_start(settings, team)
        _ask(team.trainers, "seek", done + 1, cursor, what="reading its documents")
        asked = finishing()  # until here a request ends the command, and nothing of it is left
        write_settings(run_file, folder)
        before = start.facts["record"] if start else None
        monitor = Monitor(folder, settings.monitor, first_step=done + 1, before=before)
        recorder = Recorder(folder, settings.monitor.trace_steps, team.trainers, _serving(settings, team))
        everybody = zip(team.trainers + team.servers, team.processes, strict=True)
        with taking_part(folder, {str(w): (p.host, p.pid) for w, p in everybody}), closing(recorder), closing(monitor):
            monitor.start(dump_settings(run_file), _versions() | _describe(settings, team, documents, console))
            reporter = _Reporter(settings, team, monitor, console)
            seen, saved = before or dict(tokens_seen=0, targets_seen=0), done
            for step in range(done + 1, steps + 1):
                recorder.start(step, monitor.wants_pictures(step))
                clock = time.perf_counter()
                with recorder.trace.span("ray", f"step {step} of all trainers"):
                    trainers = _step(team, step)
                with recorder.trace.span("ray", "reports of dedicated servers"):
                    servers = _ask(team.servers, "take_report", what=f"reporting step {step}")
                record = _record(settings, step, time.perf_counter() - clock, seen, trainers, servers)
                seen = record.fields()
                recorded = recorder.finish(step, trainers[0].plan and trainers[0].plan.load, record.server_busy_s)
                _refuse_bad_numbers(record, saved)
                if _is_due(settings, step) or asked.is_set():
                    if not _weights_are_finite(team):
                        raise UserError(_stopped_because(f"step {step} left weights that are not finite", saved))
                    save_s = _publish(run_file, folder, documents, team, record, trainers[0], monitor)
                    saved, record = step, replace(record, checkpoint_save_s=save_s)
                reporter.show(record, trainers, recorded)
                if asked.is_set() and saved == step < steps:
                    raise TryAgain(
                        f"stopped as asked after step {step}, with a checkpoint; go on with: {_go_on(folder)}"
                    )


def _ask(workers: list[Worker], method: str, *arguments, what: str, timeout_s: float | None = None) -> list:
    """Ask all workers the same; their answers in order, or one error in words."""
    return gather([w.call(method, *arguments) for w in workers], timeout_s, what)


def _step(team: Team, step: int) -> list[TrainerReport]:
    """One step of all trainers. Where it fails for want of an attention server, that server is the one to be named."""
    what = f"running step {step}"
    try:
        return _ask(team.trainers, "step", what=what)
    except WorkerLost:
        raise
    except WorkerFailed:
        gather([server.made for server in team.servers], SIGN_OF_LIFE_S, what)
        raise


def _refuse_bad_start(settings: RunSettings, team: Team) -> None:
    if not _weights_are_finite(team):
        raise SettingsError(f"model.path: the weights from {settings.model.path} hold numbers that are not finite")


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


def _weights_are_finite(team: Team) -> bool:
    return all(_ask(team.trainers, "weights_are_finite", what="looking at the weights"))


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
        _ask(team.trainers, "save", draft, what=f"saving step {step}")
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
        )


def _describe(settings: RunSettings, team: Team, documents: tuple[Path, ...], console: Console) -> dict[str, str]:
    """Say what is about to run."""
    told = _ask(team.trainers[:1], "describe", what="describing the model")[0]
    corpus, names = Corpus(documents), [source.path for source in settings.data.sources]
    masks = ", ".join(f"{n} layers {rule}" for rule, n in told["layers"].items())
    facts = {
        "model": f"{told['parameters'] / 1e6:.2f} M parameters, {masks}",
        "documents": f"{sum(corpus.num_documents):,} with {sum(corpus.num_tokens):,} tokens, "
        f"{sum(corpus.num_targets):,} of them to be predicted, from {', '.join(names)}",
        "step": f"{settings.train.tokens_per_step:,} tokens = {settings.parallel.trainers} trainers x "
        f"{settings.tokens_per_rank:,} x {settings.accumulation} micro-batches",
        "attention": f"{', '.join(map(str, _serving(settings, team)))}; back end {settings.kernels.backend}, "
        f"ZeRO stage {settings.parallel.zero_stage}, {settings.train.precision}",
        "overlap": told["overlap"],
    }
    for name, text in facts.items():
        console.print(f"[bold]{name:10}[/] {escape(text)}", highlight=False)
    return facts


def _serving(settings: RunSettings, team: Team) -> list[Worker]:
    """Who computes attention, in the pool's order."""
    return (team.trainers if settings.parallel.trainers_serve else []) + team.servers


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("distca", "torch", "deepspeed", "ray", "transformers")
    }


def _check(settings: RunSettings) -> PretrainedConfig:
    """The model's configuration; whatever can be refused without documents and processes is refused here."""
    m, device = settings.model, "cuda" if _use_gpus(settings) else "cpu"
    precision = DTYPES[settings.train.precision]
    config = check_model(m, backend_of(settings), precision, device)
    costs_of(settings.planner)  # a table that cannot be read
    refuse_transport(settings.parallel.transport)
    if settings.planner.wire.gb_per_s:
        wires_of(settings.planner, shape_of(layers_of(config)[0], precision))  # or one of another model's shape
    return config


def _prepare(settings: RunSettings, config: PretrainedConfig, console: Console) -> tuple[Path, ...]:
    """The run's documents."""
    with console.status("preparing documents"):
        documents = prepare(settings.data, config.vocab_size, settings.model.path, settings.model.revision)
    longest = max(int(lengths.max()) for lengths in Corpus(documents).lengths)
    limit = min(settings.data.max_document_tokens or longest, settings.tokens_per_micro_batch)
    if sentence := position_warning(config, min(longest, limit)):
        logger.warning(sentence)
    return documents


def _prepare_again(
    settings: RunSettings, folder: Path, config: PretrainedConfig, console: Console, checkpoint: Published
) -> tuple[Path, ...]:
    """The documents that a checkpoint was made with, wherever their files and their tokenizer lie by now."""
    try:
        documents = _prepare(with_own_tokenizer(settings, folder), config, console)
    except (DataError, SettingsError) as error:
        kept = kept_documents(settings, checkpoint)
        if not kept:
            raise
        logger.warning("%s; going on with the documents as they were prepared before", error)
        return kept
    refuse_other_documents(settings, documents, checkpoint)
    return documents


@contextmanager
def _new_folder(settings: RunSettings, prefix: str = "", own: Path | None = None) -> Iterator[Path]:
    """A folder of this run's own, gone again where the run is refused before its first step."""
    folder = _make_named(own.absolute()) if own else _make_folder(settings, prefix)
    try:
        yield folder
    except (SettingsError, DataError, TryAgain, KeyboardInterrupt):
        if not (folder / RUN_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _accounted(folder: Path) -> Iterator[None]:
    """What nobody foresaw leaves in words, its traceback among the run's logs, and with the way to go on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told, steps = in_words(error, folder), steps_published(folder / CHECKPOINTS)
        if steps:
            go_on = f"the newest checkpoint is of step {steps[0]}; go on with: {_go_on(folder)}"
            raise type(told)(f"{told}; {go_on}") from error
        raise told from error


def _go_on(folder: Path) -> str:
    """The command that does, as a shell takes it."""
    return f"distca resume {shlex.quote(str(folder))}"


def _refuse_folder(folder: Path) -> None:
    """Raise where no run's folder can be made, before the work that it would be for."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise SettingsError(f"monitor.folder: cannot make {folder}: {there} is no folder that can be written to")


def _make_folder(settings: RunSettings, prefix: str) -> Path:
    """Named after the run and its start, with a number where that is taken."""
    start = f"{prefix}{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = settings.monitor.folder / (start if attempt == 1 else f"{start}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise SettingsError(f"monitor.folder: cannot make {folder}: {error.strerror}") from None
    raise SettingsError(f"{folder}: a thousand runs began in this second")


def _make_named(folder: Path) -> Path:
    """A folder of this name. What an attempt that saved nothing has left there is set aside."""
    try:
        if folder.exists():
            others = {p.name for p in folder.iterdir() if not p.name.startswith(".")} - OF_A_RUN
            if others:
                raise SettingsError(
                    f"--folder: {folder} is not a run's: it holds {sorted(others)[0]}. Name a folder that is not there"
                )
            aside = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.unfinished-{n}")).exists())
            folder.rename(aside)
            logger.warning("%s holds no checkpoint to go on from: it is now %s", folder, aside)
        folder.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"--folder: cannot make {folder}: {error.strerror}") from None
    return folder


def _use_gpus(settings: RunSettings) -> bool:
    """Whether every worker gets a GPU."""
    wanted, num_workers = settings.parallel.device, settings.parallel.trainers + settings.parallel.servers
    return wanted == "cuda" or (wanted == "auto" and torch.cuda.device_count() >= num_workers)
