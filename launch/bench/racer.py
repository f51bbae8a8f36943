"""How does one trainer run steps by several methods in turn? Its model, engine and documents are the same for all.

Plain classes, in processes of `distca.launch.cluster.workers`. A method is an *entrant*: a trainer of its own pool, or
one whose model calls a baseline's attention. Entrants share everything but their pool, links and batches, so that
nothing but the method differs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from distca.arrays import sum_by
from distca.config import RunSettings
from distca.launch.data.batches import Rows
from distca.launch.run.plan_inputs import plan_inputs_of
from distca.launch.run.server import DedicatedServer, Meeting, backend_of
from distca.launch.run.trainer import PlanSummary, Trainer
from distca.order import Cursor, Pieces
from distca.overlap import Decision
from distca.parallel.baselines import BASELINES, Baseline
from distca.parallel.core_attention import Exchange


@dataclass(frozen=True, slots=True)
class Lap:
    """One trainer's part in one step by one method."""

    seconds: float
    """From a barrier of all trainers to the end of its own step."""
    summed_loss: float
    targets: int  # of the whole step
    grad_norm: float | None


@dataclass(frozen=True, slots=True)
class BaselineBatch:
    """What one trainer needs for a micro-batch of a baseline."""

    number: int
    attention: Baseline
    rows: Rows
    most_rows: int
    """Of any trainer."""
    summary: PlanSummary


class BaselineTrainer(Trainer):
    """A trainer whose core attention another method computes: no plan, no servers."""

    def enter(self, method: str) -> None:
        self._method = BASELINES[method]
        self._exchange, self._server = Exchange(self._rank, {}), None

    def _plan(self, number: int, pieces: Pieces, oldest: int) -> BaselineBatch:
        ranks = self._settings.parallel.trainers
        segments = self._method.layout(pieces.lengths, ranks)
        own = segments.of_rank(self._rank)
        attention = self._method(self._rank, ranks, pieces.lengths, backend_of(self._settings))
        rows = self._stream.rows(pieces, own.document, own.start, own.end)
        nothing = PlanSummary(np.zeros(ranks, np.int64), np.zeros(0, np.int64), 0, 0, 0.0)
        most_rows = int(sum_by(segments.rank, segments.end - segments.start, ranks).max())
        return BaselineBatch(number, attention, rows, most_rows, nothing)

    def _attention(self, batch: BaselineBatch) -> Baseline:
        return batch.attention


class PoolTrainer(Trainer):
    """A trainer of one of several pools."""

    def enter(self, method: str) -> None:
        self._planned_from = plan_inputs_of(self._settings, self._calls, np.zeros(0, np.int64))
        self._store = dist.PrefixStore(method, self._store)
        self._overlap = Decision(self._settings.parallel.overlap == "on", "raced")
        self._join_servers()


class Racer(Trainer):
    """A trainer that takes part in steps by every method."""

    def connect(self) -> None:
        self._start_engine()
        self._entrants: dict[str, BaselineTrainer | PoolTrainer] = {}

    def enter(self, method: str, settings: RunSettings) -> None:
        """Make ready for a method; all trainers and servers enter it at the same time."""
        kind = BaselineTrainer if method in BASELINES else PoolTrainer
        entrant = kind.__new__(kind)  # not a model of its own: it shares this one
        vars(entrant).update(vars(self), _settings=settings)
        entrant.enter(method)
        self._entrants[method] = entrant

    def seek(self, step: int, cursor: Cursor) -> None:
        for entrant in self._entrants.values():
            entrant.seek(step, cursor)

    def race(self, method: str) -> Lap:
        """The method's next step."""
        entrant = self._entrants[method]
        dist.barrier()
        start = time.perf_counter()
        report = entrant.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return Lap(time.perf_counter() - start, report.summed_loss, report.targets, report.grad_norm)


class RacingServer:
    """A dedicated attention server in every pool that has one."""

    def __init__(self, number: int, settings: RunSettings, meeting: Meeting, device: str):
        self._nth = number - (settings.parallel.trainers if settings.parallel.trainers_serve else 0)
        self._meeting, self._device = meeting, device
        self._servers: list[DedicatedServer] = []

    def connect(self) -> None:
        """Links are opened as pools are entered."""

    def enter(self, method: str, settings: RunSettings) -> None:
        parallel = settings.parallel
        if method in BASELINES or self._nth >= parallel.servers:
            return
        number = self._nth + (parallel.trainers if parallel.trainers_serve else 0)
        server = DedicatedServer(number, settings, self._meeting, self._device)
        server.connect(method)
        self._servers.append(server)
