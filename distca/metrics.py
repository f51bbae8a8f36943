"""What does a run report, under which name, in which unit?

`METRICS` is the one list of names: TensorBoard's tags, and what is meant by each. `StepRecord` holds one step's
numbers, as a line for people (`line`) and as tagged values (`scalars`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """A name, its unit, what it means, and the field or property of `StepRecord` that holds it."""

    tag: str
    unit: str
    meaning: str
    field: str


METRICS = (
    Metric("train/loss", "nats/token", "mean over the step's target tokens, wherever they sit", "loss"),
    Metric("train/grad_norm", "1", "norm of the whole gradient, before clipping", "grad_norm"),
    Metric("train/lr", "1", "learning rate that the step used", "learning_rate"),
    Metric("train/targets", "tokens", "of the step that were predicted: what its loss is the mean over", "targets"),
    Metric("train/tokens_seen", "tokens", "of all steps so far, counted as they were taken", "tokens_seen"),
    Metric("train/targets_seen", "tokens", "predicted in all steps so far, counted as they were taken", "targets_seen"),
    Metric(
        "speed/tokens_per_s", "tokens/s", "tokens of the step over its seconds, all trainers together", "tokens_per_s"
    ),
    Metric(
        "speed/tflops_per_worker",
        "TFLOP/s",
        "that the model needs, over the step's seconds and all workers, dedicated servers too: 3 x (2 x weights in "
        "matrices x tokens + 4 x query heads x head size x pairs that masks allow, summed over layers); embeddings "
        "that are only looked up are no such weights, recomputing counts nothing",
        "tflops_per_worker",
    ),
    Metric("speed/step_s", "s", "to compute the step; saving and showing it not counted", "step_s"),
    Metric(
        "cad/imbalance_packed",
        "1",
        "heaviest predicted load over mean, if documents lay end to end in their order and nothing moved",
        "imbalance_packed",
    ),
    Metric("cad/imbalance_placed", "1", "the same where documents have been placed", "imbalance_placed"),
    Metric("cad/imbalance_planned", "1", "the same with tasks moved as planned", "imbalance_planned"),
    Metric("cad/imbalance_measured", "1", "heaviest busy time over mean, by the servers' clocks", "imbalance_measured"),
    Metric("cad/plan_ms", "ms", "to make the plan, on a host thread, one step ahead", "plan_ms"),
    Metric("cad/tasks", "tasks", "CA-tasks of the plan", "num_tasks"),
    Metric(
        "cad/bytes_moved", "bytes", "rows dispatched and collected, all layers, forward and backward", "bytes_moved"
    ),
    Metric("cad/attention_s", "s", "busy time of the busiest server", "attention_s"),
    Metric("cad/wait_s", "s", "that a trainer waited for attention and did nothing else, mean over trainers", "wait_s"),
    Metric(
        "cad/hidden_s",
        "s",
        "from sending attention's rows to waiting for them, in which a trainer did other work; mean over trainers",
        "hidden_s",
    ),
    Metric("cad/server_busy_s", "s", "busy time of each server; its number follows the tag", "server_busy_s"),
    Metric("data/documents", "documents", "in the step", "num_documents"),
    Metric("data/wait_s", "s", "that the step waited for its data", "data_wait_s"),
    Metric("data/epoch", "epochs", "passes over the data that were complete before the step's last documents", "epoch"),
    Metric("memory/trainer_rss_mib", "MiB", "memory of the largest trainer process", "trainer_rss_mib"),
    Metric("memory/server_rss_mib", "MiB", "memory of the largest dedicated server process", "server_rss_mib"),
    Metric("checkpoint/save_s", "s", "that the step was held up by saving a checkpoint", "checkpoint_save_s"),
)
TAGS = {metric.field: metric.tag for metric in METRICS}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step's numbers. What does not exist in a run, or was not measured in this step, is None.

    A step without targets has no loss, and nothing that only an update has."""

    step: int  # from 1
    num_steps: int  # of the whole run
    loss: float | None
    tokens: int  # of this step
    targets: int  # those among them that are predicted
    step_s: float
    tokens_seen: int
    targets_seen: int | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tflops_per_worker: float | None = None
    imbalance_packed: float | None = None
    imbalance_placed: float | None = None
    imbalance_planned: float | None = None
    imbalance_measured: float | None = None
    bytes_moved: int | None = None
    num_tasks: int | None = None
    plan_s: float | None = None
    attention_s: float | None = None
    wait_s: float | None = None
    hidden_s: float | None = None
    server_busy_s: tuple[float, ...] = ()  # (servers,)
    data_wait_s: float | None = None
    num_documents: int | None = None
    epoch: float | None = None
    trainer_rss_mib: float | None = None
    server_rss_mib: float | None = None
    checkpoint_save_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.step_s if self.step_s > 0 else None

    @property
    def plan_ms(self) -> float | None:
        return None if self.plan_s is None else 1000 * self.plan_s

    def line(self) -> str:
        """The step for people; lines of one run stand under each other in columns."""
        return "  ".join(self._columns()).rstrip()

    def _columns(self) -> Iterator[str]:
        width = len(str(self.num_steps))
        yield f"step {self.step:>{width}}/{self.num_steps}"
        yield f"loss {self.loss:7.4f}" if self.loss is not None else "no targets  "
        if self.tokens_per_s is not None:
            yield f"{_scaled(self.tokens_per_s):>5} tok/s"
        if self.tflops_per_worker is not None:
            yield f"{_scaled(1e12 * self.tflops_per_worker, 'FLOP/s'):>11} each"
        stages = [x for x in (self.imbalance_packed, self.imbalance_placed, self.imbalance_planned) if x is not None]
        if stages:
            yield "imbalance " + "→".join(f"{x:.2f}" for x in stages)
        if self.bytes_moved is not None:
            yield f"{bytes_text(self.bytes_moved):>7} moved"
        if self.attention_s is not None:
            yield f"attention {_seconds(self.attention_s)}"
        if self.wait_s is not None:
            hidden = "" if self.hidden_s is None else f" ({self.hidden_s:5.2f} hidden)"
            yield f"wait {_seconds(self.wait_s)}{hidden}"
        if self.checkpoint_save_s is not None:
            yield f"saved in {_seconds(self.checkpoint_save_s)}"

    def scalars(self) -> dict[str, float]:
        """{tag: value} of every number there is: None, NaN and infinities are left out."""
        found: dict[str, float] = {}
        for metric in METRICS:
            value = getattr(self, metric.field)
            if isinstance(value, tuple):
                found.update({f"{metric.tag}/{n}": v for n, v in enumerate(value) if math.isfinite(v)})
            elif value is not None and math.isfinite(value):
                found[metric.tag] = value
        return found

    def fields(self) -> dict[str, Any]:
        """{field: value} of every number there is, for files: what is None or not finite is left out."""
        found = dataclasses.asdict(self)
        return {k: v for k, v in found.items() if v is not None and (isinstance(v, tuple) or math.isfinite(v))}


def bytes_text(number: float) -> str:
    """A size for people: 873 B, 4.2 MB, 128 GB."""
    return _scaled(number, "B")


def _scaled(number: float, unit: str = "") -> str:
    """Two to four significant digits: 873, 5.1k, 128k; with a unit 873 B, 4.2 MB."""
    space = " " if unit else ""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{1 if scaled < 100 else 0}f}{space}{prefix}{unit}"
    return f"{number:.0f}{space}{unit}"


def _seconds(number: float) -> str:
    return f"{number:5.2f} s" if number < 100 else f"{number:5.0f} s"
