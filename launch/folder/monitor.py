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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from distca.config import MonitorSettings
from distca.launch.folder.status import EVENTS, STEPS
from distca.launch.folder.trace import StepTrace, summary
from distca.metrics import TAGS, StepRecord
from distca.trace import Kind

logger = logging.getLogger(__name__)

SIZE_INCH, DPI, LETTERS_PT = (4.5, 3.2), 160, 10
GREY, BLUE, ORANGE = "#b4bcc5", "#3b76b5", "#d9722e"
DOCUMENTS, TOKENS, ATTENTION = GREY, BLUE, ORANGE
LOADS = {"packed": GREY, "planned": BLUE, "measured": ORANGE}
KIND_COLOURS: dict[Kind, str] = {
    "model": BLUE,
    "kernels": ORANGE,
    "wait": "#e2e5e9",
    "send": "#7d4fa3",
    "optimizer": "#4a9c5d",
    "plan": "#c9a227",
    "ray": GREY,
    "wire": "#c3a5dd",
}
MOST_BARS = 64  # more servers are drawn as outlines: bars would be thinner than a pixel, and slow
MOST_ROWS = 9  # workers in a timeline
MOST_HOSTS = 6  # names of hosts beside each other


LAYOUT = {
    "DistCA": {
        "loss": ["Multiline", [TAGS["loss"]]],
        "tokens per second": ["Multiline", [TAGS["tokens_per_s"]]],
        "TFLOP/s per worker": ["Multiline", [TAGS["tflops_per_worker"]]],
        "imbalance of attention: documents packed in order, placed, planned; measured": [
            "Multiline",
            [TAGS[f"imbalance_{stage}"] for stage in ("packed", "placed", "planned", "measured")],
        ],
        "where a step's seconds go": [
            "Multiline",
            [TAGS["step_s"], TAGS["attention_s"], TAGS["wait_s"], TAGS["hidden_s"], TAGS["data_wait_s"]],
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
        self._writer.add_text("run/versions", _table(["", ""], extra.items()), self._first_step)
        self._writer.flush()

    def step(self, record: StepRecord) -> None:
        self._steps.write(json.dumps(record.fields(), allow_nan=False) + "\n")
        self._steps.flush()
        if self._writer is not None:
            for tag, value in record.scalars().items():
                self._writer.add_scalar(tag, value, record.step)

    def wants_pictures(self, step: int) -> bool:
        """Whether pictures are drawn of this step: the first one and every `images_every`th."""
        return self._writer is not None and (step == self._first_step or step % self._images_every == 0)

    def documents(self, step: int, lengths: Sequence[int]) -> None:
        if self.wants_pictures(step) and len(lengths):
            self._show("data/document_lengths", picture_of_documents(lengths), step)

    def server_load(
        self,
        step: int,
        packed: Sequence[float],
        planned: Sequence[float],
        measured: Sequence[float] | None = None,
        *,
        capacity: Sequence[float] | None = None,
        capacity_packed: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        hosts: Sequence[str] | None = None,
    ) -> None:
        """Seconds per worker: predicted with documents packed in their order and no task moved, predicted as planned,
        and busy by the servers' clocks. `hosts` are the workers', where there are several.

        Capacity 0 is for workers that take no part: dedicated servers before planning, trainers that do not serve."""
        if self.wants_pictures(step):
            shares = dict(capacity=capacity, capacity_packed=capacity_packed)
            picture = picture_of_load(packed, planned, measured, **shares, names=names, hosts=hosts)
            self._show("cad/server_load", picture, step)

    def timeline(self, recorded: StepTrace) -> None:
        """What every worker did in a step: a picture, and a table of seconds."""
        if self.wants_pictures(recorded.step):
            seconds = recorded.end - recorded.start
            self._show("step/timeline", picture_of_timeline(recorded.rows(), seconds), recorded.step)
            self._writer.add_text("step/seconds", _table(*summary([recorded])), recorded.step)

    def _show(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def event(self, step: int, text: str) -> None:
        """What happened besides steps: a server lost, a checkpoint saved."""
        with open(self._folder / EVENTS, "a", encoding="utf-8") as file:
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


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def picture_of_documents(lengths: Sequence[int]) -> np.ndarray:
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
    figure, axes = _figure()
    x = np.arange(len(counts[0]))
    series = (("documents", DOCUMENTS), ("tokens", TOKENS), ("attention", ATTENTION))
    for place, ((_, colour), count) in enumerate(zip(series, counts, strict=True)):
        axes.bar(x + 0.27 * (place - 1), 100 * count / count.sum(), 0.25, color=colour)
    every = math.ceil(len(x) / 7)
    axes.set_xticks(x[::every], [_tokens(2 ** (first + i)) for i in x[::every]])
    axes.set_xlabel("tokens, from … to below the next")
    axes.set_ylabel("%")
    _head(figure, f"{len(length):,} documents, the longest of {length.max():,} tokens", series)
    return _pixels(figure)


def picture_of_load(
    packed: Sequence[float],
    planned: Sequence[float],
    measured: Sequence[float] | None = None,
    *,
    capacity: Sequence[float] | None = None,
    capacity_packed: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    hosts: Sequence[str] | None = None,
) -> np.ndarray:
    """Load per worker as a multiple of its fair share, so that the highest bar is the imbalance: (height, width, 3)."""
    load = {"packed": packed, "planned": planned, **({} if measured is None else {"measured": measured})}
    shares = {"packed": capacity if capacity_packed is None else capacity_packed}
    relative = {name: _over_fair_share(seconds, shares.get(name, capacity)) for name, seconds in load.items()}
    figure, axes = _figure()
    x = np.arange(len(planned))
    draw = _outlines if len(x) > MOST_BARS else _bars
    draw(axes, relative)
    axes.axhline(1, color="#333333", lw=0.8, ls=(0, (4, 3)), zorder=0)
    if len(x) <= 6:
        labels = list(map(str, x)) if names is None else names if len(x) <= 4 else [n.replace(" ", "\n") for n in names]
        axes.set_xticks(x, labels if hosts is None else [f"{n}\n{h}" for n, h in zip(labels, hosts, strict=True)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if hosts is not None:
            _name_hosts(axes, hosts)
        axes.set_xlabel("server" if names is None else f"{names[0]} to {names[-1]}")
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.set_ylim(0, 1.08 * max(1.0, *(values.max() for values in relative.values())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    highest = [(f"{name} {heights.max():.2f}×", LOADS[name]) for name, heights in relative.items()]
    _head(figure, "Attention load over fair share, highest", highest)
    return _pixels(figure)


def _name_hosts(axes: Axes, hosts: Sequence[str]) -> None:
    """Bars have their host below them, each once for a row of neighbours; of very many hosts some have their names."""
    firsts = [n for n, host in enumerate(hosts) if n == 0 or host != hosts[n - 1]]
    for first in firsts[1:]:
        axes.axvline(first - 0.5, color="#333333", lw=0.5, ls=(0, (1, 3)), zorder=0)
    ends = [*firsts[1:], len(hosts)]
    middles = [(first + end - 1) / 2 for first, end in zip(firsts, ends, strict=True)]
    every = math.ceil(len(firsts) / MOST_HOSTS)
    axes.set_xticks(middles[::every], [hosts[first] for first in firsts[::every]])


def picture_of_timeline(rows: Mapping[str, Sequence[tuple[Kind, float, float]]], seconds: float) -> np.ndarray:
    """What each worker did, from 0 to `seconds`, as pieces (kind, start, end): (height, width, 3) bytes."""
    shown = _spread_out(list(rows), MOST_ROWS)
    some = "" if len(shown) == len(rows) else f", {len(shown)} of {len(rows)} workers"
    figure, axes = _figure()
    for place, name in enumerate(shown):
        for kind in dict.fromkeys(kind for kind, _, _ in rows[name]):
            pieces = [(a, b - a) for k, a, b in rows[name] if k == kind]
            axes.broken_barh(pieces, (place - 0.4, 0.8), color=KIND_COLOURS[kind], lw=0)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, seconds)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(visible=False)
    axes.set_xlabel("seconds")
    there = {kind for row in rows.values() for kind, _, _ in row}
    kinds = [(kind, colour) for kind, colour in KIND_COLOURS.items() if kind in there]
    _head(figure, f"A step of {seconds:.3g} s{some}", kinds)
    return _pixels(figure)


def _spread_out(names: list[str], most: int) -> list[str]:
    """At most so many of them, from the first to the last."""
    at = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return [names[i] for i in at]


def _bars(axes: Axes, load: Mapping[str, np.ndarray]) -> None:
    x = np.arange(len(load["planned"]))
    axes.bar(x, load["packed"], 0.84, color=LOADS["packed"])
    axes.bar(x, load["planned"], 0.5, color=LOADS["planned"])
    if "measured" in load:
        busy = np.flatnonzero(load["measured"])
        axes.hlines(load["measured"][busy], busy - 0.34, busy + 0.34, color=LOADS["measured"], lw=3)


def _outlines(axes: Axes, load: Mapping[str, np.ndarray]) -> None:
    edges = np.arange(len(load["planned"]) + 1) - 0.5
    axes.stairs(load["packed"], edges, fill=True, color=LOADS["packed"])
    axes.stairs(load["planned"], edges, baseline=None, color=LOADS["planned"], lw=1.6)
    if "measured" in load:
        axes.stairs(load["measured"], edges, baseline=None, color=LOADS["measured"], lw=1.0)


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


def _figure() -> tuple[Figure, Axes]:
    """Twice the size of TensorBoard's cards (about 360 pixels wide), so that letters of 10 points can be read there."""
    figure = Figure(figsize=SIZE_INCH, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=LETTERS_PT)
    axes.xaxis.label.set_size(LETTERS_PT)
    axes.yaxis.label.set_size(LETTERS_PT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _head(figure: Figure, title: str, series: Sequence[tuple[str, str]]) -> None:
    """A title, and what the colours stand for, above the picture."""
    patches = [Patch(color=colour, label=name) for name, colour in series]
    figure.legend(
        handles=patches,
        title=title,
        title_fontsize=LETTERS_PT + 1,
        alignment="left",
        loc="outside upper left",
        ncols=min(4, len(patches)),
        frameon=False,
        fontsize=LETTERS_PT,
        handlelength=0.8,
        handletextpad=0.4,
        columnspacing=1.0,
        borderaxespad=0.2,
    )


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
