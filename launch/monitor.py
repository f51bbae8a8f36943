"""How does a person see what a run is doing?

TensorBoard gets the names of `distca/metrics.py`, pictures of document lengths and of load per server, the settings,
and a first page laid out here; `metrics.jsonl` gets every step's `StepRecord` once, as a line, `events.txt` the rest.
The only file that imports tensorboard, and only when it is to be written.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from distca.config import MonitorSettings
from distca.metrics import TAGS, StepRecord

logger = logging.getLogger(__name__)

DOCUMENTS, TOKENS, ATTENTION = "#9aa5b1", "#3b76b5", "#d9722e"
MOST_BARS = 64  # more servers are drawn as outlines: bars would be thinner than a pixel, and slow
BEFORE, PLANNED, MEASURED = "#c3c9d0", "#3b76b5", "#d9722e"

STEPS = "metrics.jsonl"

LAYOUT = {
    "DistCA": {
        "loss": ["Multiline", [TAGS["loss"]]],
        "tokens per second": ["Multiline", [TAGS["tokens_per_s"]]],
        "imbalance of attention: before, planned, measured": [
            "Multiline",
            [TAGS["imbalance_before"], TAGS["imbalance_planned"], TAGS["imbalance_measured"]],
        ],
        "where a step's seconds go": [
            "Multiline",
            [TAGS["step_s"], TAGS["attention_s"], TAGS["wait_s"], TAGS["data_wait_s"]],
        ],
        "busy seconds of each server": ["Multiline", [TAGS["server_busy_s"] + "/.*"]],
        "memory per process": ["Multiline", [TAGS["trainer_rss_mib"], TAGS["server_rss_mib"]]],
    }
}


class Monitor:
    """Writes a run's numbers into its folder. A resumed run goes on with `first_step`: what was recorded of that step
    and later ones has been undone and goes, and `before`, the record of the step before, is put where it is missing."""

    def __init__(
        self,
        folder: str | Path,
        settings: MonitorSettings,
        *,
        first_step: int = 1,
        before: Mapping[str, Any] | None = None,
    ):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._images_every = settings.images_every
        self._first_step = first_step
        _go_back(self._folder / STEPS, first_step, before)
        self._steps = open(self._folder / STEPS, "a", encoding="utf-8")
        self._writer = _tensorboard_writer(self._folder / "tensorboard", first_step) if settings.tensorboard else None

    def start(self, settings_text: str, extra: Mapping[str, str]) -> None:
        """Show the resolved settings (YAML) and whatever else is known before the first step, such as versions."""
        if self._writer is None:
            return
        self._writer.add_custom_scalars(LAYOUT)
        self._writer.add_text("run/settings", _preformatted(settings_text), self._first_step)
        rows = "\n".join(f"| {name} | {value} |" for name, value in extra.items())
        self._writer.add_text("run/versions", f"| | |\n| --- | --- |\n{rows}", self._first_step)
        self._writer.flush()

    def step(self, record: StepRecord) -> None:
        self._steps.write(json.dumps(record.fields(), allow_nan=False) + "\n")
        self._steps.flush()
        if self._writer is not None:
            for tag, value in record.scalars().items():
                self._writer.add_scalar(tag, value, record.step)

    def wants_pictures(self, step: int) -> bool:
        """Whether `documents` and `server_load` draw at this step: the first one and every `images_every`th."""
        return self._writer is not None and (step == self._first_step or step % self._images_every == 0)

    def documents(self, step: int, lengths: Sequence[int]) -> None:
        if self.wants_pictures(step) and len(lengths):
            self._writer.add_image(
                "data/document_lengths", picture_of_documents(step, lengths), step, dataformats="HWC"
            )

    def server_load(
        self,
        step: int,
        before: Sequence[float],
        planned: Sequence[float],
        measured: Sequence[float] | None = None,
        *,
        capacity: Sequence[float] | None = None,
        capacity_before: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Seconds per worker: predicted if no task moved, predicted as planned, and busy by the servers' clocks.

        Capacity 0 is for workers that take no part: dedicated servers before planning, trainers that do not serve."""
        if self.wants_pictures(step):
            capacities = dict(capacity=capacity, capacity_before=capacity_before)
            picture = picture_of_load(step, before, planned, measured, **capacities, names=names)
            self._writer.add_image("cad/server_load", picture, step, dataformats="HWC")

    def event(self, step: int, text: str) -> None:
        """What happened besides steps: a server lost, a checkpoint saved."""
        with open(self._folder / "events.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  step {step}  {text}\n")
        if self._writer is not None:
            self._writer.add_text("run/events", text, step)
            self._writer.flush()

    def close(self) -> None:
        self._steps.close()
        if self._writer is not None:
            self._writer.close()


def _go_back(path: Path, first_step: int, before: Mapping[str, Any] | None) -> None:
    """Leave one line, the last written, of each step below `first_step`, in their order; at no moment half a file."""
    lines: dict[int, str] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            lines[int(json.loads(line)["step"])] = line
        except (ValueError, TypeError, KeyError):  # torn when its writer was killed
            continue
    if before is not None:
        lines.setdefault(int(before["step"]), json.dumps(before, allow_nan=False))
    kept = "".join(f"{lines[step]}\n" for step in sorted(lines) if step < first_step)
    if kept == text:
        return
    draft = path.with_name(f".{path.name}")
    draft.write_text(kept, encoding="utf-8")
    draft.replace(path)


def _tensorboard_writer(folder: Path, first_step: int):
    from torch.utils.tensorboard import SummaryWriter  # a second of imports that `tensorboard: false` does without

    return SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else None, flush_secs=5)


def _preformatted(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def picture_of_documents(step: int, lengths: Sequence[int]) -> np.ndarray:
    """Shares of documents, of tokens and of causal attention per doubling of length: (height, width, 3) bytes.

    The three differ, and that is the whole problem: most documents are short, most attention is in the few long ones.
    """
    length = np.asarray(lengths, dtype=np.int64)
    length = length[length > 0]
    bins = np.floor(np.log2(length)).astype(int)
    first = bins.min()
    counts = [
        np.bincount(bins - first, weights=weight)
        for weight in (np.ones(len(length)), length, length * (length + 1) / 2)
    ]
    figure, axes = _figure(
        f"Documents of step {step}: {len(length):,} with {length.sum():,} tokens, longest {length.max():,}"
    )
    x = np.arange(len(counts[0]))
    series = (("documents", DOCUMENTS), ("tokens", TOKENS), ("attention", ATTENTION))
    for place, ((name, colour), count) in enumerate(zip(series, counts, strict=True)):
        axes.bar(x + 0.27 * (place - 1), 100 * count / count.sum(), 0.25, color=colour, label=name)
    if len(x) <= 16:
        for i, number in enumerate(counts[0].astype(int)):
            if number:
                at = (i - 0.27, 100 * number / len(length))
                axes.annotate(
                    f"{number:,}", at, (0, 2), textcoords="offset points", ha="center", size=8, color="#6b7682"
                )
    every = math.ceil(len(x) / 12)
    axes.set_xticks(x[::every], [_tokens(2 ** (first + i)) for i in x[::every]])
    axes.set_xlabel("tokens in the document, from … to below the next")
    axes.set_ylabel("% of the step")
    axes.margins(y=0.08)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.1))
    return _pixels(figure)


def picture_of_load(
    step: int,
    before: Sequence[float],
    planned: Sequence[float],
    measured: Sequence[float] | None = None,
    *,
    capacity: Sequence[float] | None = None,
    capacity_before: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Load per worker as a multiple of its fair share, so that the highest bar is the imbalance: (height, width, 3)."""
    load = {"before": before, "planned": planned, **({} if measured is None else {"measured": measured})}
    shares = {"before": capacity if capacity_before is None else capacity_before}
    relative = {name: _over_fair_share(seconds, shares.get(name, capacity)) for name, seconds in load.items()}
    said = ", ".join(f"{heights.max():.2f} {name}" for name, heights in relative.items())
    figure, axes = _figure(f"Attention load of step {step}; imbalance {said}")
    x = np.arange(len(planned))
    draw = _outlines if len(x) > MOST_BARS else _bars
    shown = draw(axes, relative)
    axes.axhline(1, color="#333333", lw=0.8, ls=(0, (4, 3)), zorder=0)
    if len(x) <= 16:
        axes.set_xticks(
            x, x if names is None else names, rotation=0 if len(x) <= 8 else 45, ha="center" if len(x) <= 8 else "right"
        )
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    if len(x) > 16 or names is None:
        axes.set_xlabel("server")
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_ylim(0, 1.12 * max(1.0, *(values.max() for values in relative.values())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_ylabel("load over fair share")
    axes.legend(shown, list(load), frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.1))
    return _pixels(figure)


def _bars(axes: Axes, load: Mapping[str, np.ndarray]) -> list[Artist]:
    x = np.arange(len(load["planned"]))
    shown = [axes.bar(x, load["before"], 0.84, color=BEFORE), axes.bar(x, load["planned"], 0.5, color=PLANNED)]
    if "measured" in load:
        shown.append(axes.hlines(load["measured"], x - 0.34, x + 0.34, color=MEASURED, lw=3))
    return shown


def _outlines(axes: Axes, load: Mapping[str, np.ndarray]) -> list[Artist]:
    edges = np.arange(len(load["planned"]) + 1) - 0.5
    shown = [
        axes.stairs(load["before"], edges, fill=True, color=BEFORE),
        axes.stairs(load["planned"], edges, baseline=None, color=PLANNED, lw=1.6),
    ]
    if "measured" in load:
        shown.append(axes.stairs(load["measured"], edges, baseline=None, color=MEASURED, lw=1.0))
    return shown


def _over_fair_share(seconds: Sequence[float], capacity: Sequence[float] | None) -> np.ndarray:
    values = np.asarray(seconds, dtype=float)
    share = np.ones(len(values)) if capacity is None else np.asarray(capacity, dtype=float)
    total = values.sum()
    if total <= 0:
        return values
    return np.divide(values, total * share / share.sum(), out=np.zeros_like(values), where=share > 0)


def _tokens(number: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
