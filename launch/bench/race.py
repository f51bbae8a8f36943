"""A race between methods: who takes part, in which order, and what came of it.

Methods take turns in the same processes, on the same documents, with the same engine and optimizer (at a learning rate
of 0, so that weights stay what they are), in an order that is turned round after every round.
`distca.launch.bench.racer` is a trainer's part, `distca.launch.bench.compare` shows what came of it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from distca.config import RunSettings, validate_settings
from distca.errors import DataError, SettingsError
from distca.launch.bench.racer import Lap, Racer, RacingServer
from distca.launch.data.batches import first_step_with_targets, pieces_of_steps
from distca.launch.folder.make import accounted, new_folder
from distca.launch.folder.paths import absolute_paths
from distca.launch.folder.runs import (
    with_kernel_times,
)
from distca.launch.process.forkserver import OWN_RAY, RayOptions
from distca.launch.run.check import check, prepare_documents
from distca.launch.run.plan_inputs import knowing_nodes
from distca.launch.run.team import Team, ask, refuse_bad_start, team_of, use_gpus
from distca.parallel.baselines import BASELINES
from distca.parallel.models import layers_of
from distca.parallel.precision import refuse_precision

TITLES = {
    "local": "local packing",
    "ulysses": "Ulysses",
    "all-gather": "zigzag all-gather",
    "in-place": "DistCA in place",
    "in-place-overlap": "DistCA in place, overlap",
    "mixed": "DistCA mixed",
    "mixed-overlap": "DistCA mixed, overlap",
    "dedicated": "DistCA dedicated",
    "dedicated-overlap": "DistCA dedicated, overlap",
}
POOLS = {
    "in-place": dict(servers=False, trainers_serve=True),
    "mixed": dict(servers=True, trainers_serve=True),
    "dedicated": dict(servers=True, trainers_serve=False),
}
OVERLAP = "-overlap"
# relative; a gradient's norm sums what losses average, and backward rounds more often than forward
LOSS_AGREES, NORM_AGREES = {"fp32": 1e-5, "bf16": 1e-3}, {"fp32": 1e-4, "bf16": 1e-2}
BF16_FACTOR = 2.0  # what plain runs of half precision differ by, times this
WORTH_SAYING = 0.01  # ratios closer to 1 than this are equal


@dataclass(frozen=True, slots=True)
class Method:
    """One way to compute core attention, and the settings that its workers go by."""

    name: str
    settings: RunSettings
    refusal: str | None = None
    """Why it cannot take part."""

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def is_baseline(self) -> bool:
        return self.name in BASELINES

    @property
    def overlaps(self) -> bool:
        return self.settings.parallel.overlap == "on"

    @property
    def workers(self) -> int:
        """Processes (on GPUs: GPUs) that it keeps busy."""
        return self.settings.parallel.trainers + (0 if self.is_baseline else self.settings.parallel.servers)


def methods_of(settings: RunSettings, asked: Sequence[str]) -> list[Method]:
    """Those asked for (all if none), where pools with dedicated servers have `parallel.servers` of them."""
    if unknown := [name for name in asked if name not in TITLES]:
        raise SettingsError(f"--methods {','.join(unknown)}: there are {', '.join(TITLES)}")
    servers, found = settings.parallel.servers, []
    for name in [name for name in TITLES if name in asked or not asked]:
        pool = POOLS.get(name.removesuffix(OVERLAP), POOLS["in-place"])
        if pool["servers"] and not servers:
            if asked:
                raise SettingsError(f"--methods {name}: needs dedicated attention servers; give --servers N")
            continue
        overlap = "on" if name.endswith(OVERLAP) else "off"
        own = dict(servers=servers if pool["servers"] else 0, trainers_serve=pool["trainers_serve"], overlap=overlap)
        found.append(Method(name, _with(settings, parallel=own)))
    return found


def refusing(methods: Sequence[Method], query_heads: Sequence[int], lengths: Sequence[np.ndarray]) -> list[Method]:
    """The methods, each with what it cannot do of these layers and of micro-batches of these lengths."""
    found = []
    for method in methods:
        ranks, refusal = method.settings.parallel.trainers, None
        if method.is_baseline:
            baseline = BASELINES[method.name]
            refusal = next(filter(None, (baseline.refusal(query_heads, held, ranks) for held in lengths)), None)
            if not refusal and any(len(set(baseline.layout(held, ranks).rank)) < ranks for held in lengths):
                refusal = "there are fewer documents than trainers"  # models of Transformers want a row at least
        elif method.overlaps and method.settings.accumulation > 1:
            refusal = "all share one engine, which with overlap would accumulate in fewer passes: race one micro-batch"
        found.append(Method(method.name, method.settings, refusal))
    return found


def race_settings(settings: RunSettings, asked: Sequence[str], rounds: int) -> RunSettings:
    """What a race's workers are started with: as many servers as any method needs, weights that stay the same."""
    settings = _with(settings, parallel=dict(trainers_serve=True, overlap="off"))
    servers = max(method.settings.parallel.servers for method in methods_of(settings, asked))
    optimizer = settings.train.optimizer.model_dump() | dict(learning_rate=0.0)
    steps = settings.train.steps + rounds + 1  # before the first with targets; the one prepared ahead of the end
    return _with(settings, parallel=dict(servers=servers), train=dict(optimizer=optimizer, steps=steps))


def _with(settings: RunSettings, **sections: dict[str, Any]) -> RunSettings:
    values = settings.model_dump()
    return validate_settings(values | {name: values[name] | section for name, section in sections.items()})


def drawn(settings: RunSettings, lengths: np.ndarray, vocab_size: int, folder: Path) -> RunSettings:
    """The settings with documents of these lengths for data, of random tokens, in `folder`.

    They are one epoch, and fill a micro-batch, so every micro-batch holds all of them."""
    source = folder / "documents.jsonl"
    random = np.random.default_rng(settings.seed)
    with open(source, "w", encoding="utf-8") as file:
        for length in lengths.tolist():
            file.write(json.dumps({"input_ids": random.integers(0, vocab_size, length).tolist()}) + "\n")
    data = dict(sources=[dict(path=str(source))], max_document_tokens=None, cache=str(folder / "prepared"))
    tokens, accumulation = int(lengths.sum()), settings.accumulation
    train = dict(tokens_per_step=tokens * accumulation, tokens_per_rank=None, accumulation=accumulation)
    return _with(settings, data=data, train=train)


def order_of(methods: Sequence[Method], number: int) -> list[Method]:
    """Forwards and backwards in turn, so that a machine that gets slower or faster favours nobody."""
    return list(methods) if number % 2 == 0 else list(reversed(methods))


@dataclass(slots=True)
class Times:
    """One method's counted steps."""

    method: Method
    seconds: list[float] = field(default_factory=list)
    """Of the slowest trainer, step by step."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def add(self, laps: Sequence[Lap]) -> None:
        """All trainers' parts in one step."""
        self.seconds.append(max(lap.seconds for lap in laps))
        self.losses.append(sum(lap.summed_loss for lap in laps) / laps[0].targets)
        self.grad_norms.append(laps[0].grad_norm)

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True, slots=True)
class Race:
    """What came of it."""

    settings: RunSettings
    times: list[Times]  # of those that took part, in the order of TITLES
    refused: list[Method]
    lengths: list[int]
    """Of all documents of the counted rounds."""
    rounds: int
    device: str

    @property
    def rivals(self) -> list[Times]:
        return [times for times in self.times if times.method.is_baseline]

    @property
    def ours(self) -> list[Times]:
        return [times for times in self.times if not times.method.is_baseline]

    def disagreements(self) -> list[str]:
        """A sentence for every method whose loss or gradient is not that of the first, which does least: empty where
        all computed the same."""
        first, *others = self.times
        return [
            f"{what} of step {step + 1} by {other.method.title} is {found:.8g}, by {first.method.title} {wanted:.8g}: "
            f"relative difference {abs(found - wanted) / abs(wanted):.1e}, allowed {allowed:.1e}"
            for what, name, least in (("loss", "losses", LOSS_AGREES), ("gradient norm", "grad_norms", NORM_AGREES))
            for other in others
            for allowed in [self._allowed(name, least)]
            for step, (found, wanted) in enumerate(zip(getattr(other, name), getattr(first, name), strict=True))
            if not abs(found - wanted) <= allowed * abs(wanted)  # false for nan
        ]

    def _allowed(self, name: str, least: dict[str, float]) -> float:
        """In half precision, what the baselines, which are plain runs, differ by among themselves counts too."""
        precision = self.settings.train.precision
        if precision != "bf16" or len(self.rivals) < 2:
            return least[precision]
        plain = np.array([getattr(times, name) for times in self.rivals])
        return max(least[precision], BF16_FACTOR * float((np.ptp(plain, axis=0) / np.abs(plain).min(0)).max()))

    def ratio(self, times: Times, rival: Times) -> float:
        """How many times as fast as `rival`: the median over rounds, each on the same documents."""
        return float(np.median(np.array(rival.seconds) / np.array(times.seconds)))

    def best_rival(self) -> Times | None:
        return min(self.rivals, key=lambda times: times.median_s, default=None)

    def tokens_per_s(self, times: Times) -> float:
        return self.settings.train.tokens_per_step / times.median_s

    def title(self) -> str:
        s, lengths = self.settings, np.array(self.lengths)
        return (
            f"{s.train.tokens_per_step:,} tokens a step, {len(lengths) / self.rounds:,.0f} documents (longest "
            f"{lengths.max():,}), {s.parallel.trainers} trainers, {s.train.precision}, {self.device}"
        )

    def agreement(self) -> str:
        """What all computed, where nobody disagrees."""
        loss, precision = self.times[0].losses[-1], self.settings.train.precision
        return (
            f"losses agree (the last is {loss:.6f}) within {self._allowed('losses', LOSS_AGREES):.0e}, gradient norms "
            f"within {self._allowed('grad_norms', NORM_AGREES):.0e}, in {precision}"
        )

    def advice(self) -> str:
        """What to set in the run file, and what that is worth here."""
        if not self.ours:
            return "No pool of DistCA took part: there is nothing to set."
        best = max(self.ours, key=lambda times: self.tokens_per_s(times) / times.method.workers)
        told = f"Set {_settings_of(best.method)} ({_with_workers(best.method)})"
        if rival := self.best_rival():
            told += f": {_compared(self.ratio(best, rival))} {rival.method.title}, the fastest of the others"
        if (fastest := min(self.ours, key=lambda times: times.median_s)) is not best:
            told += f". {self.ratio(fastest, best):.2f} times as fast as that is {_with_workers(fastest.method)}: "
            told += _settings_of(fastest.method)
        return told + "."


def _settings_of(method: Method) -> str:
    parallel = method.settings.parallel
    serve = str(parallel.trainers_serve).lower()
    return f"parallel.servers: {parallel.servers}, trainers_serve: {serve} and overlap: {parallel.overlap}"


def _with_workers(method: Method) -> str:
    return f"{method.title} with {method.workers} worker{'' if method.workers == 1 else 's'}"


def _compared(ratio: float) -> str:
    if abs(ratio - 1) < WORTH_SAYING:
        return "as fast as"
    return f"{ratio:.2f} times as fast as" if ratio > 1 else f"its steps take {1 / ratio:.2f} times as long as those of"


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
    config = check(settings)
    with new_folder(settings, prefix="compare-") as folder, accounted(folder):
        if lengths is not None:
            settings = drawn(settings, lengths, config.vocab_size, folder)
        documents = prepare_documents(settings, config, console)
        step, cursor = first_step_with_targets(settings, documents)
        pieces = pieces_of_steps(settings, documents, cursor, warmup + rounds)
        settings = with_kernel_times(settings, folder)
        query_heads = [layer.query_heads for layer in layers_of(config)]
        methods = refusing(methods_of(settings, asked), query_heads, [p.lengths for p in chain(*pieces)])
        able = [method for method in methods if not method.refusal]
        if not able:
            raise SettingsError("; ".join(f"{method.title} cannot race: {method.refusal}" for method in methods))
        with team_of(settings, folder, documents, console, ray, Racer, RacingServer) as team:
            refuse_bad_start(settings, team)
            hosts = [process.host for process in team.processes]
            for method in able:
                what, known = f"meeting the others for {method.title}", knowing_nodes(method.settings, hosts)
                ask(team.trainers + team.servers, "enter", method.name, known, what=what)
            ask(team.trainers, "seek", step, cursor, what="reading its documents")
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
                laps = ask(team.trainers, "race", method.name, what=f"racing with {method.title}, {name}")
                seconds[method.name] = max(lap.seconds for lap in laps)
                if number >= warmup and laps[0].targets:
                    times[methods.index(method)].add(laps)
            told = ", ".join(f"{method.title} {seconds[method.name]:.3g} s" for method in methods)
            console.print(f"{name}: {told}", style="dim", highlight=False)
    if not times[0].seconds:
        raise DataError("nothing to predict in any of the race's rounds: ask for more --steps")
    return times


def _device_of(settings: RunSettings) -> str:
    if use_gpus(settings):
        return torch.cuda.get_device_name(0)
    threads = settings.parallel.threads
    return f"CPU with {threads} thread{'' if threads == 1 else 's'} a worker"
