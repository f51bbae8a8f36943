"""What does a trainer do? It holds the model's layers, and its share of every micro-batch's rows.

A plain class; `distca.launch.cluster.workers` gives it a process. While a step runs, a host thread plans the next one
from its documents' lengths and reads its tokens.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from distca.config import RunSettings
from distca.cost import model_flops
from distca.launch.cluster.hosts import LOOPBACK
from distca.launch.cluster.store import connect_store
from distca.launch.data.batches import Corpus, DocumentStream, Rows
from distca.launch.run.outlook import describe_overlap, outlook_of, shape_of
from distca.launch.run.plan_inputs import plan_inputs_of
from distca.launch.run.server import (
    Meeting,
    announcers,
    backend_of,
    first_meetings,
    in_turn,
    open_link,
    own_interface,
    rss_mib,
    transport_of,
)
from distca.launch.run.verify import Comparison, Document, compare_with_one_device
from distca.masks import MaskRule, mask_of
from distca.order import Cursor, Pieces
from distca.overlap import Decision, decide, halves, num_passes
from distca.parallel.attach import StrandedCausalLM, checkpoint_activations, probe
from distca.parallel.core_attention import CallStatistics, CoreAttention, Exchange
from distca.parallel.models import build_model, read_config
from distca.parallel.precision import DTYPES
from distca.parallel.rows import on_device
from distca.parallel.server import AttentionServer, ServerReport
from distca.parallel.streams import to_device
from distca.parallel.transport import SERVER_END, TRAINER_END
from distca.placement import packed_in_order
from distca.plan import Plan, combined_digest, load_at_home
from distca.planner import plan_directions
from distca.routes import Routes, TrainerRoute, routes_of
from distca.schedule import learning_rate
from distca.trace import Span, Trace, read_clock

if TYPE_CHECKING:
    from distca.parallel.engine import Engine, PlainEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A step's plans in numbers, summed over micro-batches and layers."""

    load_placed: np.ndarray  # (trainers,) int64 cost, if every row were attended where it has been placed
    load: np.ndarray  # (servers,) int64 cost, as planned
    num_tasks: int  # of one layer of each mask rule and plan
    predicted_bytes: int  # on the wire, forward and backward
    flops: float  # of the whole model, see `model_flops`

    def __add__(self, other: PlanSummary) -> PlanSummary:
        return PlanSummary(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one trainer needs for a micro-batch, or a nano-batch of its documents."""

    number: int
    """Even for the first of a pass, one more for the second."""
    most_rows: int
    """Of a rank."""
    routes: dict[MaskRule, tuple[TrainerRoute, TrainerRoute]]  # forward and backward
    rows: Rows
    summary: PlanSummary


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's passes, planned only if there is anything to learn."""

    step: int
    pieces: list[Pieces]
    passes: list[tuple[MicroBatch, ...]]
    """What one backward each is about: a nano-batch, or two that take turns."""
    targets: int
    load_packed: np.ndarray | None
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
    load_packed: np.ndarray | None  # (trainers,) cost, if each micro-batch's documents lay in order and stayed there
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
        parallel = settings.parallel
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(parallel.trainers), LOCAL_RANK="0")  # what DeepSpeed reads
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # or they would take what the host's name stands for
            if meeting.host == LOOPBACK or name not in os.environ:
                os.environ[name] = own_interface(meeting)
        self._store = connect_store(meeting.host, meeting.port, parallel.start_timeout_s)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("trainers", self._store), rank=rank, world_size=parallel.trainers
        )

        m = settings.model
        self._config = config = read_config(m.path, m.config, m.revision)
        self._stream = DocumentStream(Corpus(documents), settings.data, settings.seed, settings.tokens_per_micro_batch)
        self._module = StrandedCausalLM(
            build_model(config, m.path, m.revision, DTYPES[settings.train.precision], settings.seed),
            settings.train.loss_chunk,
        )
        self._weights_per_token = self._module.weights_per_token()
        self._calls = probe(self._module)
        self._planned_from = plan_inputs_of(settings, self._calls, np.zeros(0, np.int64))  # and from each one's lengths
        if m.activation_checkpointing:
            checkpoint_activations(self._module.model)
        self._module.train()
        self._overlap = self._decide_overlap()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead")
        self._next: Future[StepBatch] | None = None
        self._server: AttentionServer | None = None
        self._trace = Trace()
        self._engine: Engine | PlainEngine | None = None

    def connect(self) -> None:
        """Open the links to all servers and start the engine; every worker must be made by now."""
        self._join_servers()
        self._start_engine()

    def _join_servers(self) -> None:
        """Make this trainer's server, if it has one, and open the links that are there from the start."""
        home, parallel = self._planned_from.pool.home, self._settings.parallel
        self._transport = transport_of(self._store, self._rank, self._settings, self._meeting, self._device)
        if self._rank in home:
            own, backend = home.index(self._rank), backend_of(self._settings)
            self._server = AttentionServer(
                own, backend, self._device, self._rank, deadline_s=parallel.deadline_s, trace=self._trace
            )
        self._exchange = Exchange(self._rank, {}, self._server, trace=self._trace)
        self._met: set[tuple[int, int]] = set()
        self._meet(first_meetings(self._settings))
        self._announces_to = [server for rank, server in announcers(self._settings) if rank == self._rank]

    def _meet(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Open the links of those (trainer, server) pairs that this trainer is in and that have none yet."""
        home = self._planned_from.pool.home
        for rank, server in in_turn(set(pairs) - self._met, self._settings):
            if home[server] == rank:
                continue
            if rank == self._rank:
                self._exchange.links[server] = open_link(self._transport, rank, server, TRAINER_END, self._settings)
            elif home[server] == self._rank:
                self._server.serve(rank, open_link(self._transport, rank, server, SERVER_END, self._settings))
            self._met.add((rank, server))

    def _start_engine(self) -> None:
        # the driver, which only names this class, does without DeepSpeed
        from distca.parallel.engine import Engine, PlainEngine

        kind = PlainEngine if self._settings.train.precision == "fp64" else Engine
        passes = num_passes(self._settings.accumulation, self._overlap.on)
        self._engine = kind(self._module, self._settings, self._device, passes)

    def record(self, is_on: bool) -> list[Span]:
        """See `Trace.record`."""
        return self._trace.record(is_on)

    def read_clock(self) -> tuple[str, float]:
        return read_clock()

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
        with self._trace.span("wait", "the next step's plan and rows"):
            batch = self._next.result()
        data_wait_s = time.perf_counter() - start
        self._step += 1
        self._next = self._ahead.submit(self._prepare, self._step, batch.cursor)
        random_state = np.random.SeedSequence([self._settings.seed, self._step, self._rank]).generate_state(1)
        torch.manual_seed(int(random_state[0]))  # random layers resume exactly
        losses, train = [], self._settings.train
        rate = learning_rate(train.schedule, train.optimizer.learning_rate, batch.step, train.steps)
        for nano_batches in batch.passes:
            losses.append(self._forward_backward(nano_batches, batch.targets))
            with self._trace.span("optimizer", "reduce gradients, update weights"):
                self._engine.step(rate)
        return self._report(batch, sum(map(float, losses), 0.0), rate, data_wait_s)

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
        losses = []
        for number, nano_batches in enumerate(batch.passes):
            losses.append(self._forward_backward(nano_batches, batch.targets))
            if number < len(batch.passes) - 1 and self._settings.train.precision != "fp64":
                self._engine.step(0.0)  # only the last one would update
        gradients = self._engine.full_gradients()
        # on the device: NCCL adds up nothing else
        total = torch.tensor(sum(map(float, losses), 0.0), dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total) / batch.targets, gradients

    def describe(self) -> dict:
        """For the start of a run: parameters, layers and the masks they ask for, overlap."""
        layers = {str(rule): sum(call.rule == rule for call in self._calls) for rule in self._planned_from.rules}
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self._module.parameters())
        overlap = describe_overlap(self._settings, self._overlap, self._config)
        return dict(parameters=parameters, layers=layers, overlap=overlap)

    def _decide_overlap(self) -> Decision:
        """Rank 0's decision: machines may differ in what they have."""
        pieces, _ = self._stream.pieces(Cursor())
        inputs, asked = replace(self._planned_from, lengths=pieces.lengths), self._settings.parallel.overlap
        decision = decide(asked, outlook_of(self._settings, inputs, self._calls, self._config, self._device.type))
        on = torch.tensor([decision.on], dtype=torch.int32, device=self._device)
        dist.broadcast(on, 0)
        return replace(decision, on=bool(on))

    def _forward_backward(self, nano_batches: tuple[MicroBatch, ...], targets: int) -> torch.Tensor:
        """The pass's summed loss, on the device: reading it would make the host wait for the whole backward."""
        inputs = []
        for nano_batch in nano_batches:
            attention = self._attention(nano_batch)
            rows = [to_device(torch.from_numpy(x), self._device) for x in nano_batch.rows]
            names = dict(zip(("input_ids", "position_ids", "labels"), rows, strict=True))
            inputs.append(names | dict(distca=attention, most_rows=nano_batch.most_rows))
        facts = dict(nano_batches=[nano_batch.number for nano_batch in nano_batches])
        with self._trace.span("model", "forward", **facts):
            summed_loss = self._engine.forward(inputs)
        with self._trace.span("model", "backward", **facts):
            self._engine.backward(summed_loss, targets)
        return summed_loss.detach()

    def _attention(self, nano_batch: MicroBatch) -> CoreAttention:
        return CoreAttention(self._exchange, nano_batch.number, nano_batch.routes)

    def _prepare(self, step: int, cursor: Cursor) -> StepBatch:
        """Lengths, plans, routes and rows of a step, on the host thread; servers get to know the plans here."""
        with self._trace.span("plan", f"documents of step {step}"):
            pieces, cursor = self._stream.step(cursor, self._settings.accumulation)
            targets = sum(map(self._stream.num_targets, pieces))
        start = time.perf_counter()
        with self._trace.span("plan", f"plans, routes and rows of step {step}"):
            passes = self._passes(step, pieces) if targets else []
        load_packed = sum(self._load_packed(p.lengths) for p in pieces) if targets else None
        return StepBatch(step, pieces, passes, targets, load_packed, cursor, time.perf_counter() - start)

    def _load_packed(self, lengths: np.ndarray) -> np.ndarray:
        """(trainers,) int64: the cost of all layers, forward and backward, if documents lay end to end in their order
        and every row were attended where it lies."""
        trainers, costs = self._planned_from.num_ranks, self._planned_from.costs
        segments = packed_in_order(lengths, trainers)
        of_rule = {
            rule: sum(load_at_home(segments, mask_of(rule, lengths), cost, trainers) for cost in costs)
            for rule in self._planned_from.rules
        }
        return sum(of_rule[call.rule] for call in self._calls)

    def _passes(self, step: int, pieces: list[Pieces]) -> list[tuple[MicroBatch, ...]]:
        """The step's micro-batches in pairs where they overlap, an odd one's documents in two groups."""
        if not self._overlap.on:
            of_passes = [[p] for p in pieces]
        else:
            of_passes = [pieces[i : i + 2] for i in range(0, len(pieces), 2)]
            if len(of_passes[-1]) == 1:
                (odd,) = of_passes[-1]
                of_passes[-1] = [odd[group] for group in halves(odd.lengths, self._settings.parallel.trainers)]
        first = (step - 1) * len(of_passes)
        oldest = max(0, 2 * (first - len(of_passes)))  # while this step is prepared, the one before it may run
        return [
            tuple(self._plan(2 * (first + number) + part, p, oldest) for part, p in enumerate(parts))
            for number, parts in enumerate(of_passes)
        ]

    def _plan(self, number: int, pieces: Pieces, oldest: int) -> MicroBatch:
        inputs = replace(self._planned_from, lengths=pieces.lengths)
        trainers = inputs.num_ranks
        plans = {rule: plan_directions(inputs, rule) for rule in self._planned_from.rules}
        routes = {plan: routes_of(plan) for both in plans.values() for plan in both}
        digest = combined_digest([routes[plan].digest for both in plans.values() for plan in both])
        for server in self._announces_to:  # first: a server opens its ends of links when it knows the plan
            self._exchange.announce(server, number, inputs, digest, oldest)
        mine = {plan: r.of_trainer(self._rank) for plan, r in routes.items()}
        served = {plan: r.of_server(self._server.number) for plan, r in routes.items()} if self._server else {}
        pairs = {(self._rank, at.server) for route in mine.values() for at in route.links}
        self._meet(pairs | {(at.rank, self._server.number) for route in served.values() for at in route.links})
        if self._server:
            by_window = {rule.window: tuple(served[plan] for plan in both) for rule, both in plans.items()}
            self._server.adopt(number, by_window, oldest)
        my_routes = {plan: on_device(route, self._device) for plan, route in mine.items()}
        held = plans[self._planned_from.rules[0]][0].segments.of_rank(self._rank)
        rows = self._stream.rows(pieces, held.document, held.start, held.end)
        summary = self._summary(plans, routes, int(pieces.lengths.sum()))
        return MicroBatch(
            number,
            -(-int(pieces.lengths.sum()) // trainers),
            {rule: tuple(my_routes[plan] for plan in both) for rule, both in plans.items()},
            rows,
            summary,
        )

    def _summary(
        self, plans: dict[MaskRule, tuple[Plan, Plan]], routes: dict[Plan, Routes], tokens: int
    ) -> PlanSummary:
        loads = {plan: (plan.load_at_home(), plan.load()) for plan in routes}
        moved_rows = {plan: r.moved_rows() for plan, r in routes.items()}
        pairs = {rule: int(forward.bands.area().sum()) for rule, (forward, _) in plans.items()}
        placed, load = (np.zeros_like(x) for x in next(iter(loads.values())))
        moved_bytes, attention_flops = 0, 0.0
        for call in self._calls:
            for plan in set(plans[call.rule]):
                placed, load = placed + loads[plan][0], load + loads[plan][1]
            shape = shape_of(call, DTYPES[self._settings.train.precision])
            attention_flops += shape.flops(pairs[call.rule])
            for backward, plan in enumerate(plans[call.rule]):
                moved_bytes += shape.wire_bytes(*moved_rows[plan], bool(backward))
        return PlanSummary(
            placed,
            load,
            num_tasks=sum(len(plan.server) for plan in routes),
            predicted_bytes=moved_bytes,
            flops=model_flops(self._weights_per_token, tokens, attention_flops),
        )

    def _report(self, batch: StepBatch, summed_loss: float, rate: float, data_wait_s: float) -> TrainerReport:
        plans = [nano_batch.summary for nano_batches in batch.passes for nano_batch in nano_batches]
        return TrainerReport(
            summed_loss=summed_loss,
            targets=batch.targets,
            grad_norm=self._engine.gradient_norm() if batch.targets else None,
            learning_rate=rate if batch.targets else None,
            cursor=(batch.cursor.document, batch.cursor.offset),
            lengths=np.concatenate([p.lengths for p in batch.pieces]),
            epoch=int(max(p.epoch.max() for p in batch.pieces)),
            plan=reduce(add, plans) if plans else None,
            load_packed=batch.load_packed,
            plan_s=batch.plan_s,
            data_wait_s=data_wait_s,
            exchange=self._exchange.take_statistics(),
            server=self._server.take_report() if self._server else None,
            rss_mib=rss_mib(),
        )


def _places(pieces: Pieces):
    return zip(pieces.source.tolist(), pieces.row.tolist(), pieces.start.tolist(), pieces.end.tolist(), strict=True)
