"""Which nano-batches run at once, and is it worth it?

A *pass* is one forward and backward of the model over one nano-batch, or over two that take turns: while the rows of
one are on the wire or at servers, a trainer computes the other's layers.

    accumulation 3, overlap on     micro-batch 0 | 1    one pass
                                   micro-batch 2a | 2b  one pass: the odd one's documents in two groups

Decisions from numbers alone: trainers make the same ones from the same lengths and settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

SMALLEST_PART = 8  # a group of less than 1/8 of the tokens hides too little to pay for smaller matrices
WORTH_IT = 0.05  # of a micro-batch's time; matrices of half the rows cost about as much


def num_passes(accumulation: int, on: bool) -> int:
    """Passes of a step with so many micro-batches."""
    return -(-accumulation // 2) if on else accumulation


def halves(lengths: np.ndarray, num_ranks: int) -> tuple[np.ndarray, ...]:
    """Which documents (their numbers, ascending) make the nano-batches of a micro-batch that has no other beside it.

    Two groups of nearly equal tokens, longest document first, each to the group with fewer; or all documents in one
    where that leaves a group with less than an eighth, or with no row for some rank."""
    tokens, members = [0, 0], ([], [])
    for document in np.argsort(-lengths, kind="stable").tolist():
        lighter = int(tokens[1] < tokens[0])
        tokens[lighter] += int(lengths[document])
        members[lighter].append(document)
    if min(tokens) * SMALLEST_PART < sum(tokens) or min(tokens) < num_ranks:
        return (np.arange(len(lengths)),)
    return tuple(np.array(sorted(group), np.int64) for group in members)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run looks like to somebody who decides about overlap. Seconds are of one micro-batch, forward and
    backward, all layers; None where nobody can tell."""

    own_processors: bool
    """No two workers share a processor."""
    servers: int
    """Dedicated ones."""
    layers_s: float | None = None
    """Everything but attention, on a trainer."""
    attention_s: float | None = None
    """On the slowest server."""
    wire_s: float | None = None
    """What moving rows adds for the slowest server."""


@dataclass(frozen=True, slots=True)
class Decision:
    on: bool
    reason: str


def decide(asked: Literal["auto", "on", "off"], outlook: Outlook) -> Decision:
    """Whether a run's passes hold two nano-batches."""
    if asked != "auto":
        return Decision(asked == "on", "as set")
    if not outlook.own_processors:
        return Decision(False, "workers share this machine's processors: where one waits, another computes")
    if outlook.layers_s is None or outlook.attention_s is None or outlook.wire_s is None:
        if outlook.servers:
            return Decision(True, "trainers compute while attention servers do")
        return Decision(False, "trainers serve themselves, and planner.wire does not say how long rows travel")
    apart, together = _without(outlook), _with(outlook)
    gain = 1 - together / apart if apart else 0.0
    told = (
        f"a micro-batch is predicted to take {_seconds(together)} instead of {_seconds(apart)} "
        f"({_seconds(outlook.layers_s)} layers, {_seconds(outlook.attention_s)} attention, "
        f"{_seconds(outlook.wire_s)} wire)"
    )
    return Decision(gain >= WORTH_IT, told)


def _without(outlook: Outlook) -> float:
    """One after the other."""
    return outlook.layers_s + outlook.attention_s + outlook.wire_s


def _with(outlook: Outlook) -> float:
    """As long as the slowest of those who work at the same time; never less than one nano-batch all by itself."""
    trainer = outlook.layers_s if outlook.servers else outlook.layers_s + outlook.attention_s
    elsewhere = outlook.attention_s + outlook.wire_s if outlook.servers else outlook.wire_s
    return max(trainer, elsewhere, _without(outlook) / 2)


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
