"""`distca plan`: what would the planner do with these documents? A table,
a picture, a file that other tools can score."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from distca.cost import PairCost
from distca.errors import SettingsError
from distca.greedy import even_greedy_plan, greedy_plan
from distca.masks import UNBOUNDED, Mask, MaskRule, chunk_mask, prefix_mask, sink_mask
from distca.payoff import predicted
from distca.plan import Plan, PlanInputs, Pool, imbalance, least_moved, make_pool
from distca.planner import plan_step
from distca.routes import routes_of

SHAPES = {
    "heavy-tail": "log-normal with a Pareto tail: web text, a few documents fill the context",
    "long-half": "half of the tokens in documents that fill the context",
    "uniform": "every length up to the context equally likely",
    "short": "log-normal around 1000 tokens: nothing to gain",
    "full": "every document fills the context",
}
PLANNERS = {"tiles": plan_step, "greedy": greedy_plan, "greedy-even": even_greedy_plan}


def draw_lengths(shape: str, context: int, tokens: int, seed: int) -> np.ndarray:
    """Lengths of a named shape that sum to `tokens`; none exceeds `context`."""
    if shape not in SHAPES:
        raise SettingsError(
            f"no shape '{shape}'; there are: " + "; ".join(f"{name} ({what})" for name, what in SHAPES.items())
        )
    rng, drawn, total = np.random.default_rng(seed), [], 0
    while total < tokens:
        body = np.exp(rng.normal(np.log(1000), 1.2, 4096))
        if shape == "heavy-tail":
            body = np.concatenate([body, 8000 * (1 + rng.pareto(0.9, 64))])
        elif shape == "long-half":
            body = np.concatenate([body, np.full(max(1, int(body.sum()) // context), context)])
        elif shape == "uniform":
            body = rng.uniform(1, context, 512)
        elif shape == "full":
            body = np.full(64, context)
        drawn.append(rng.permutation(np.clip(body, 1, context).astype(np.int64)))
        total += int(drawn[-1].sum())
    ends = np.minimum(np.cumsum(np.concatenate(drawn)), tokens)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0]


def read_lengths(path: Path, trainers: int) -> np.ndarray:
    """Lengths from a .json list or .npy column; the last document is shortened so that trainers can hold equal rows."""
    try:
        lengths = np.load(path) if path.suffix == ".npy" else np.array(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"cannot read lengths from {path}: {error}. Give a .json list or a .npy column of integers."
        ) from error
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 0).any() or lengths.sum() < trainers:
        raise SettingsError(
            f"{path}: expected a list of lengths that sum to at least one token for each of {trainers} trainers"
        )
    ends = np.minimum(np.cumsum(lengths.astype(np.int64)), int(lengths.sum()) // trainers * trainers)
    return np.diff(ends, prepend=0)


def parse_pool(text: str, trainers: int, gpus_per_server: int = 1) -> Pool:
    """in-place, dedicated:N or mixed:N."""
    if trainers % gpus_per_server:
        raise SettingsError(f"{trainers} trainers are no whole number of servers of {gpus_per_server} GPUs")
    kind, _, count = text.partition(":")
    if text == "in-place":
        return make_pool(trainers, 0, True, ranks_per_home=gpus_per_server)
    if kind in ("dedicated", "mixed") and count.isdigit() and int(count) > 0:
        return make_pool(trainers, int(count), kind == "mixed", ranks_per_home=gpus_per_server)
    raise SettingsError(f"pool '{text}': say in-place, dedicated:N or mixed:N with N attention servers")


def parse_mask(text: str, lengths: np.ndarray) -> MaskRule | Mask:
    """causal, window:N, sinks:S+window:N, prefix:N or chunk:N, in tokens; the same in every document."""
    found = re.fullmatch(r"causal|(?:sinks:(\d+)\+)?(window):(\d+)|(prefix|chunk):(\d+)", text)
    sinks, window, size, kind, other = found.groups() if found else [None] * 5
    if not found or not all(0 < int(n) < UNBOUNDED for n in (size, other) if n):
        raise SettingsError(f"mask '{text}': say causal, window:N, sinks:S+window:N, prefix:N or chunk:N, in tokens")
    if sinks:
        return sink_mask(lengths, int(sinks), int(size))
    if kind:
        return chunk_mask(lengths, int(other)) if kind == "chunk" else prefix_mask(lengths, int(other))
    return MaskRule(int(size)) if window else MaskRule()


@dataclass(frozen=True, slots=True)
class PlanScore:
    """A plan in figures. Bytes are in key/value rows; a query row and its answer count as `group` of them."""

    name: str
    load: tuple[float, float, float]
    """Least, mean and most work of a server, as a part of its fair share."""
    moved: int
    worst_rank: float
    """Most that one rank or server sends or receives one way:
    half of `group` for a query row, 1 for a key/value row."""
    time: int
    """Predicted, in the unit of the plan's cost."""
    plan_ms: float


def score(name: str, plan: Plan, inputs: PlanInputs, direction: int, plan_ms: float) -> PlanScore:
    routes = routes_of(plan)
    q_rows, kv_rows = routes.moved_rows()
    worst = max(x.max() for x in routes.traffic(inputs.num_ranks, inputs.group, 2)) / 2
    moved, load = inputs.group * q_rows + kv_rows, _spread(plan.load(), plan.pool.capacity)
    time = predicted(plan, inputs.wires[direction] if inputs.wires else None)
    return PlanScore(name, load, moved, float(worst), time, plan_ms)


def _spread(load, capacity) -> tuple[float, float, float]:
    relative = np.asarray(load, float) / np.asarray(capacity, float) * (sum(capacity) / max(1, float(np.sum(load))))
    return float(relative.min()), float(relative.mean()), float(relative.max())


@dataclass(frozen=True, slots=True)
class PlanStudy:
    """One batch of documents planned by the chosen planner and by those it is compared with."""

    inputs: PlanInputs
    plan: Plan
    scores: list[PlanScore]
    load_packed: np.ndarray  # (ranks,) int64, with documents end to end in their order
    load_at_home: np.ndarray  # (ranks,) int64, with documents where the plan places them
    least_moved: int | None
    """Lower bound of any exactly even plan; None where it has not been proved: it is for pairs under a causal mask."""

    def table(self) -> Table:
        i, tokens = self.inputs, max(1, int(self.inputs.lengths.sum()) // self.inputs.num_ranks)
        title = f"{len(i.lengths)} documents, {i.num_ranks} trainers with {tokens:,} tokens each, "
        title += f"{len(i.pool)} servers, {i.group} query heads per key/value head"
        caption = "bytes in key/value rows per token; worst rank: per token of one rank, one way; time: the best is 1; "
        caption += "lower bound: of any exactly even plan"
        if i.wires:
            caption += "; work stays at home where moving it would take longer"
        table = Table(title=title, caption=caption)
        for heading in ("", "least load", "mean", "most", "bytes", "worst rank", "time", "plan ms"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
        best = max(1, min(s.time for s in self.scores))
        for s in self.scores:
            bytes_ = (f"{s.moved / tokens / i.num_ranks:.3f}", f"{s.worst_rank / tokens:.2f}")
            table.add_row(s.name, *(f"{x:.3f}" for x in s.load), *bytes_, f"{s.time / best:.3f}", f"{s.plan_ms:.1f}")
        for name, load in (("packed in order", self.load_packed), ("all at home", self.load_at_home)):
            table.add_row(name, *(f"{x:.3f}" for x in _spread(load, [1] * i.num_ranks)))
        if self.least_moved is not None:
            table.add_row("lower bound", "", "", "1.000", f"{self.least_moved / tokens / i.num_ranks:.3f}")
        return table

    def plot(self, path: Path) -> None:
        """Load per server before and after, as a part of a fair share."""
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        axes = figure.subplots()
        total = self.load_at_home.sum() / max(1, len(self.load_at_home))
        stages = (("packed in order", self.load_packed, "0.8"), ("all at home", self.load_at_home, "0.5"))
        for label, load, grey in stages:
            axes.step(range(len(load)), load / max(1.0, total), where="mid", label=label, color=grey)
        capacity = np.array(self.inputs.pool.capacity, float)
        share = capacity / capacity.sum() * max(1, int(self.plan.load().sum()))
        label = f"planned, worst {imbalance(self.plan.load(), capacity):.3f}"
        axes.step(range(len(capacity)), self.plan.load() / share, where="mid", label=label)
        axes.set(xlabel="rank or server", ylabel="load / fair share", ylim=(0, None))
        axes.legend()
        figure.savefig(path, dpi=120)

    def write_json(self, path: Path) -> None:
        """lengths, trainers, servers, in_place, capacity, home [document, start, end, rank], tasks [document, q0, q1,
        k0, k1, server]. A group of ranks that is one server is one trainer here. Causal masks only: nothing in the
        format says another."""
        s, b, pool = self.plan.segments, self.plan.bands, self.plan.pool
        out = {
            "lengths": self.inputs.lengths.tolist(),
            "trainers": self.inputs.num_ranks // pool.ranks_per_home,
            "servers": len(pool),
            "in_place": sum(rank is not None for rank in pool.home),
            "capacity": list(pool.capacity),
            "home": np.stack([s.document, s.start, s.end, s.rank // pool.ranks_per_home], 1).tolist(),
            "tasks": np.stack([self.plan.document, b.q0, b.q1, b.k0, b.k1, self.plan.server], 1).tolist(),
        }
        path.write_text(json.dumps(out))


def study(inputs: PlanInputs, planner: str = "tiles") -> list[PlanStudy]:
    """Plan with the chosen planner, and with the others for comparison: once, or for forward and backward."""
    if planner not in PLANNERS:
        raise SettingsError(f"no planner '{planner}'; there are: {', '.join(PLANNERS)}")
    return [_study(inputs, planner, direction) for direction in range(len(inputs.costs))]


def _study(inputs: PlanInputs, planner: str, direction: int) -> PlanStudy:
    (rule,), plans, scores = inputs.rules, {}, []
    for name in dict.fromkeys([planner, *PLANNERS]):
        start = time.perf_counter()
        plans[name] = PLANNERS[name](inputs, rule, direction)
        plan_ms = 1e3 * (time.perf_counter() - start)
        plans[name].check_cover()
        scores.append(score(name, plans[name], inputs, direction, plan_ms))
    plan, causal_pairs = plans[planner], rule == MaskRule() and inputs.costs[direction] == PairCost()
    provable = causal_pairs and inputs.pool.ranks_per_home == 1 and not inputs.wires
    least = least_moved(plan, inputs.group) if provable else None
    return PlanStudy(inputs, plan, scores, plan.load_packed(), plan.load_at_home(), least)
