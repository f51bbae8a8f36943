"""What does a trainer do? It holds the model's layers, and its share of every micro-batch's rows.

A plain class; `distca.launch.cluster` gives it a process. While a step runs, a host thread plans the next one from its
documents' lengths and reads its tokens.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distca.config import RunSettings
from distca.cost import AttentionShape
from distca.hardware import costs_of, wires_of
from distca.kernels.merge import statistics_dtype
from distca.launch.cluster import LOOPBACK, connect_store
from distca.launch.data import Corpus, DocumentStream, Rows
from distca.launch.server import Meeting, backend_of, meetings, open_link, pool_of, rss_mib, transport_of
from distca.launch.verify import Comparison, Document, compare_with_one_device
from distca.masks import MaskRule
from distca.order import Cursor, Pieces
from distca.parallel.attach import AttentionCall, PackedCausalLM, checkpoint_activations, probe
from distca.parallel.core_attention import CallStatistics, CoreAttention, Exchange
from distca.parallel.engine import DTYPES, Engine, PlainEngine
from distca.parallel.link import LocalLink
from distca.parallel.models import build_model, read_config
from distca.parallel.server import AttentionServer, ServerReport
from distca.plan import MILLION, PlanInputs, combined_digest, imbalance
from distca.planner import plan_directions
from distca.routes import TrainerRoute, routes_of
from distca.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A step's plans in numbers, summed over micro-batches and layers."""

    load_at_home: np.ndarray  # (trainers,) int64 cost, if every row were attended where it lives
    load: np.ndarray  # (servers,) int64 cost, as planned
    num_tasks: int  # of one layer of each mask rule and plan
    predicted_bytes: int  # on the wire, forward and backward

    def __add__(self, other: PlanSummary) -> PlanSummary:
        return PlanSummary(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def imbalance_before(self) -> float:
        return imbalance(self.load_at_home, np.ones(len(self.load_at_home)))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one trainer needs for a micro-batch; the plan's inputs are the same on all."""

    number: int
    inputs: PlanInputs
    digest: int
    routes: dict[MaskRule, tuple[TrainerRoute, TrainerRoute]]  # forward and backward
    rows: Rows
    summary: PlanSummary


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's micro-batches, planned only if there is anything to learn."""

    step: int
    pieces: list[Pieces]
    micro_batches: list[MicroBatch]
    targets: int
    cursor: Cursor
    """Where the next step begins."""
    plan_s: float


@dataclass(frozen=True, slots=True)
class TrainerReport:
    """One trainer's part in a step. A step without targets changes nothing: what only an update has is None."""

    summed_loss: float
    targets: int  # of the whole step
    grad_norm: float | None  # before clipping; not finite where the step was refused
    learning_rate: float | None  # that the step used
    cursor: tuple[int, int]
    lengths: np.ndarray  # of all documents of the step
    epoch: int
    plan: PlanSummary | None
    plan_s: float
    data_wait_s: float
    exchange: CallStatistics
    server: ServerReport | None  # where trainers serve
    rss_mib: float


class Trainer:
    """A worker that holds the model's layers, or its share of them under ZeRO."""

    def __init__(self, rank: int, settings: RunSettings, meeting: Meeting, device: str, documents: tuple[Path, ...]):
        torch.set_num_threads(settings.parallel.threads)
        self._rank, self._settings, self._meeting = rank, settings, meeting
        self._device = torch.device(device)
        parallel, self._pool = settings.parallel, pool_of(settings)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(parallel.trainers), LOCAL_RANK="0")  # what DeepSpeed reads
        if meeting.host == LOOPBACK:  # Gloo would take the address that the machine's name stands for
            os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        self._store = connect_store(meeting.host, meeting.port, parallel.start_timeout_s)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("trainers", self._store), rank=rank, world_size=parallel.trainers
        )

        m = settings.model
        config = read_config(m.path, m.config, m.revision)
        self._stream = DocumentStream(Corpus(documents), settings.data, settings.seed, settings.tokens_per_micro_batch)
        self._module = PackedCausalLM(
            build_model(config, m.path, m.revision, DTYPES[settings.train.precision], settings.seed),
            settings.train.loss_chunk,
        )
        self._calls = probe(self._module)
        self._rules = tuple(sorted({call.rule for call in self._calls}))
        self._costs = costs_of(settings.planner)
        self._wires = wires_of(settings.planner, shape_of(self._calls[0], DTYPES[settings.train.precision]))
        if m.activation_checkpointing:
            checkpoint_activations(self._module.model)
        self._module.train()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead")
        self._next: Future[StepBatch] | None = None
        self._server: AttentionServer | None = None
        self._engine: Engine | PlainEngine | None = None

    def connect(self) -> None:
        """Open the links to all servers and start the engine; every worker must be made by now."""
        links, home = {}, self._pool.home
        self._transport = transport_of(self._store, self._rank, self._settings, self._meeting, self._device)
        if self._rank in home:
            own = home.index(self._rank)
            self._server = AttentionServer(own, backend_of(self._settings), self._device)
            links[own], far_end = LocalLink.pair(self._settings.parallel.deadline_s)
            self._server.serve(self._rank, far_end)
        for rank, server in meetings(self._settings):
            end = 0 if rank == self._rank else 1 if home[server] == self._rank else None
            if end is None:
                continue
            link = open_link(self._transport, rank, server, end, self._settings)
            if end == 0:
                links[server] = link
            else:
                self._server.serve(rank, link)
        self._exchange = Exchange(self._rank, links)
        kind = PlainEngine if self._settings.train.precision == "fp64" else Engine
        self._engine = kind(self._module, self._settings, self._device)

    def load(self, folder: Path) -> None:
        self._engine.load(folder)

    def save(self, folder: Path) -> None:
        self._engine.save(folder)

    def weights_are_finite(self) -> bool:
        return self._engine.weights_are_finite()

    def seek(self, step: int, cursor: Cursor) -> None:
        """The next call of `step` is step `step` (from 1), with documents from `cursor` on."""
        self._step = step
        self._next = self._ahead.submit(self._prepare, step, cursor)

    def step(self) -> TrainerReport:
        """One optimizer step."""
        start = time.perf_counter()
        batch = self._next.result()
        data_wait_s = time.perf_counter() - start
        self._step += 1
        self._next = self._ahead.submit(self._prepare, self._step, batch.cursor)
        random_state = np.random.SeedSequence([self._settings.seed, self._step, self._rank]).generate_state(1)
        torch.manual_seed(int(random_state[0]))  # random layers resume exactly
        summed_loss, train = 0.0, self._settings.train
        rate = learning_rate(train.schedule, train.optimizer.learning_rate, batch.step, train.steps)
        for micro_batch in batch.micro_batches:
            summed_loss += self._forward_backward(micro_batch, batch.targets)
            self._engine.step(rate)
        return self._report(batch, summed_loss, rate, data_wait_s)

    def verify(self) -> Comparison | None:
        """Gradients of the next step against one device; the comparison is rank 0's."""
        batch = self._next.result()
        loss, gradients = self._gradients(batch)
        if self._rank:
            return None
        corpus = self._stream.corpus
        documents = [
            Document(corpus.tokens(*where), corpus.labels(*where)) for p in batch.pieces for where in _places(p)
        ]
        return compare_with_one_device(self._settings, batch.step, documents, loss, gradients)

    def _gradients(self, batch: StepBatch) -> tuple[float, dict[str, torch.Tensor]]:
        """The step's mean loss and whole gradients, which are not applied."""
        summed_loss = 0.0
        for number, micro_batch in enumerate(batch.micro_batches):
            summed_loss += self._forward_backward(micro_batch, batch.targets)
            if number < len(batch.micro_batches) - 1 and isinstance(self._engine, Engine):
                self._engine.step(0.0)  # only the last one would update
        gradients = self._engine.full_gradients()
        total = torch.tensor(summed_loss, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / batch.targets, gradients

    def describe(self) -> dict:
        """For the start of a run: parameters, layers and the masks they ask for."""
        layers = {str(rule): sum(call.rule == rule for call in self._calls) for rule in self._rules}
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self._module.parameters())
        return dict(parameters=parameters, layers=layers)

    def _forward_backward(self, micro_batch: MicroBatch, targets: int) -> float:
        self._exchange.announce(micro_batch.number, micro_batch.inputs, micro_batch.digest)
        attention = CoreAttention(self._exchange, micro_batch.number, micro_batch.routes)
        rows = [torch.from_numpy(x).to(self._device) for x in micro_batch.rows]
        summed_loss = self._engine.forward(input_ids=rows[0], position_ids=rows[1], labels=rows[2], distca=attention)
        self._engine.backward(summed_loss, targets)
        return float(summed_loss.detach())

    def _prepare(self, step: int, cursor: Cursor) -> StepBatch:
        """Lengths, plans, routes and rows of a step, on the host thread."""
        pieces, cursor = self._stream.step(cursor, self._settings.accumulation)
        targets = sum(map(self._stream.num_targets, pieces))
        start, first = time.perf_counter(), (step - 1) * self._settings.accumulation
        micro_batches = [self._plan(first + number, p) for number, p in enumerate(pieces)] if targets else []
        return StepBatch(step, pieces, micro_batches, targets, cursor, time.perf_counter() - start)

    def _plan(self, number: int, pieces: Pieces) -> MicroBatch:
        planner, trainers = self._settings.planner, self._settings.parallel.trainers
        tolerance, group = round(planner.tolerance * MILLION), max(c.query_heads // c.kv_heads for c in self._calls)
        inputs = PlanInputs(
            pieces.lengths, self._rules, trainers, self._pool, tolerance, planner.block, group, self._costs, self._wires
        )
        plans = {rule: plan_directions(inputs, rule) for rule in self._rules}
        routes = {plan: routes_of(plan) for both in plans.values() for plan in both}
        my_routes = {plan: r.of_trainer(self._rank) for plan, r in routes.items()}
        mine = plans[self._rules[0]][0].segments.of_rank(self._rank)
        rows = self._stream.rows(pieces, mine.document, mine.start, mine.end)
        figures = {plan: (plan.load_at_home(), plan.load(), r.moved_rows()) for plan, r in routes.items()}
        load_at_home, load, moved = np.zeros(trainers, np.int64), np.zeros(len(self._pool), np.int64), 0
        for call in self._calls:
            for plan in set(plans[call.rule]):
                load_at_home, load = load_at_home + figures[plan][0], load + figures[plan][1]
            shape = shape_of(call, DTYPES[self._settings.train.precision])
            for backward, plan in enumerate(plans[call.rule]):
                moved += shape.wire_bytes(*figures[plan][2], bool(backward))
        summary = PlanSummary(load_at_home, load, sum(len(plan.server) for plan in routes), moved)
        digest = combined_digest([routes[plan].digest for both in plans.values() for plan in both])
        return MicroBatch(
            number,
            inputs,
            digest,
            {rule: tuple(my_routes[plan] for plan in both) for rule, both in plans.items()},
            rows,
            summary,
        )

    def _report(self, batch: StepBatch, summed_loss: float, rate: float, data_wait_s: float) -> TrainerReport:
        plans = [micro_batch.summary for micro_batch in batch.micro_batches]
        return TrainerReport(
            summed_loss=summed_loss,
            targets=batch.targets,
            grad_norm=self._engine.gradient_norm() if batch.targets else None,
            learning_rate=rate if batch.targets else None,
            cursor=(batch.cursor.document, batch.cursor.offset),
            lengths=np.concatenate([p.lengths for p in batch.pieces]),
            epoch=int(max(p.epoch.max() for p in batch.pieces)),
            plan=reduce(add, plans) if plans else None,
            plan_s=batch.plan_s,
            data_wait_s=data_wait_s,
            exchange=self._exchange.take_statistics(),
            server=self._server.take_report() if self._server else None,
            rss_mib=rss_mib(),
        )


def shape_of(call: AttentionCall, dtype: torch.dtype) -> AttentionShape:
    """What a layer's rows cost on the wire."""
    return AttentionShape(
        call.query_heads, call.kv_heads, call.head_dim, dtype.itemsize, statistics_dtype(dtype).itemsize
    )


def _places(pieces: Pieces):
    return zip(pieces.source.tolist(), pieces.row.tolist(), pieces.start.tolist(), pieces.end.tolist(), strict=True)
