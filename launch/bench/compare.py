"""`distca compare` as people see it: lengths to repeat a race with, the table, the picture and the file of figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from distca.config import RunSettings
from distca.errors import SettingsError
from distca.launch.bench.plan import draw_lengths, read_lengths
from distca.launch.bench.race import Race

LENGTHS = "long-half, equal:N, short:N, heavy-tail or FILE.json"


def race_lengths(text: str, settings: RunSettings) -> np.ndarray:
    """Lengths of the documents of every micro-batch, which they fill; a file's say how many tokens that is."""
    tokens, per_rank = settings.tokens_per_micro_batch, settings.tokens_per_rank
    kind, _, number = text.partition(":")
    size = int(number) if number.isdigit() else 0
    if text == "long-half":
        half = tokens // 2
        return np.append(half, draw_lengths("short", max(1, tokens // 16), tokens - half, settings.seed))
    if text == "heavy-tail":
        return draw_lengths("heavy-tail", per_rank, tokens, settings.seed)
    if kind == "equal" and 0 < size <= tokens:
        return np.diff(np.arange(size + 1) * tokens // size)
    if kind == "short" and 0 < size <= tokens:
        return np.diff(np.append(np.arange(0, tokens, size), tokens))
    if text.endswith((".json", ".npy")):
        lengths = read_lengths(Path(text), settings.parallel.trainers)
        return lengths[lengths > 0]
    raise SettingsError(f"--lengths {text}: say {LENGTHS}, with N of at least 1 and at most {tokens:,} tokens")


def table_of(race: Race) -> Table:
    caption = (
        f"medians of {race.rounds} rounds in the same processes; a step is its slowest trainer's; x: how many times "
    )
    caption += "as fast as that method"
    table = Table(title=race.title(), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method")
    rivals = ["x\n" + rival.method.name.replace("-", "-\n") for rival in race.rivals]
    for heading in ("workers", "s/step", "spread", "tokens/s", *rivals):
        table.add_column(heading, justify="right")
    for times in race.times:
        ratios = ["" if times is rival else f"{race.ratio(times, rival):.2f}" for rival in race.rivals]
        spread = f"±{50 * (max(times.seconds) - min(times.seconds)) / times.median_s:.0f}%"
        figures = (f"{times.median_s:.3f}", spread, f"{race.tokens_per_s(times):,.0f}")
        style = None if times.method.is_baseline else "bold"
        table.add_row(times.method.title, str(times.method.workers), *figures, *ratios, style=style)
    for method in race.refused:
        table.add_row(method.title, "", "cannot", style="dim")
    return table


def plot(race: Race, path: Path) -> None:
    """A bar per method, its least and most as whiskers, and its ratio to the fastest of the others; 800 pixels."""
    figure = Figure(figsize=(8, 0.9 + 0.55 * (len(race.times) + len(race.refused))), layout="constrained", dpi=100)
    axes, rival = figure.subplots(), race.best_rival()
    most = max(max(times.seconds) for times in race.times)
    for y, times in enumerate(race.times):
        ends = [[times.median_s - min(times.seconds)], [max(times.seconds) - times.median_s]]
        colour = "0.65" if times.method.is_baseline else "tab:blue"
        axes.barh(y, times.median_s, xerr=ends, color=colour, height=0.62, capsize=4, ecolor="0.2")
        note = f"{times.median_s:.3g} s"
        if rival and times is not rival:
            note += f", ×{race.ratio(times, rival):.2f}"
        axes.text(max(times.seconds) + 0.02 * most, y, note, va="center", fontsize=12)
    for y, method in enumerate(race.refused, len(race.times)):
        axes.text(0.01 * most, y, f"cannot: {method.refusal}", va="center", fontsize=10, color="0.35")
    everybody = [times.method for times in race.times] + race.refused
    names = [f"{method.title} ({method.workers})" for method in everybody]
    axes.set_yticks(range(len(names)), names, fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * most)
    label = "seconds a step (workers in brackets)"
    axes.set_xlabel(label + (f"; × faster than {rival.method.title}" if rival else ""), fontsize=11)
    figure.suptitle(race.title(), fontsize=10)  # over the whole width, the axes are narrower
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def write_json(race: Race, path: Path) -> None:
    """methods: per name title, workers, median_s, least_s, most_s, tokens_per_s, loss, grad_norm, seconds (of each
    round), times_faster_than (rival -> ratio), or refused (why); beside them what was raced on."""
    methods, rival = {}, race.best_rival()
    for times in race.times:
        methods[times.method.name] = dict(
            title=times.method.title,
            workers=times.method.workers,
            median_s=times.median_s,
            least_s=min(times.seconds),
            most_s=max(times.seconds),
            tokens_per_s=race.tokens_per_s(times),
            loss=times.losses[-1],
            grad_norm=times.grad_norms[-1],
            seconds=times.seconds,
            losses=times.losses,
            times_faster_than={other.method.name: race.ratio(times, other) for other in race.rivals},
        )
    for method in race.refused:
        methods[method.name] = dict(title=method.title, workers=method.workers, refused=method.refusal)
    out = dict(
        tokens_per_step=race.settings.train.tokens_per_step,
        trainers=race.settings.parallel.trainers,
        precision=race.settings.train.precision,
        device=race.device,
        rounds=race.rounds,
        documents_per_step=len(race.lengths) / race.rounds,
        longest_document=max(race.lengths),
        best_rival=rival.method.name if rival else None,
        disagreements=race.disagreements(),
        advice=race.advice(),
        methods=methods,
        settings=race.settings.model_dump(mode="json"),
    )
    path.write_text(json.dumps(out, indent=2), encoding="utf-8")
