"""Which attention server computes which CA-task: the result that every rank agrees on.

A `Plan` is made from `PlanInputs` alone (integers: lengths, capacities, mask), by every rank for itself. Ranks compare
the 8-byte digest, never the plan. `Plan.check()` states what every plan guarantees:
  - each allowed (query, key) pair is in exactly one task, and each task has one server of the pool;
  - tasks are cut at multiples of `block` rows and keys counted from the document's start, or at a border between ranks;
  - no server's load exceeds its fair share by more than the tolerance plus one tile of block x block pairs;
  - every rank holds the same number of rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from math import isqrt

import numpy as np

from distca.arrays import order_by, sum_by
from distca.masks import Bands, MaskRule, bands_of
from distca.placement import Segments

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Pool:
    """All attention servers of a step."""

    capacity: tuple[int, ...]
    """Relative speed of each server; only ratios count."""
    home: tuple[int | None, ...]
    """The rank whose rows a server holds already, because it lives there; None for a dedicated server."""

    def __post_init__(self):
        assert len(self.capacity) == len(self.home) > 0, "a pool has at least one server"
        assert min(self.capacity) > 0, f"capacities are positive, got {self.capacity}"

    def __len__(self) -> int:
        return len(self.capacity)


def make_pool(trainers: int, servers: int, trainers_serve: bool, trainer_capacity: int = 100) -> Pool:
    """In place (no dedicated servers), dedicated (trainers do not serve) or mixed; serving trainers come first, in
    rank order."""
    serving = trainers if trainers_serve else 0
    return Pool((trainer_capacity,) * serving + (100,) * servers, tuple(range(serving)) + (None,) * servers)


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """Everything that plans of one micro-batch depend on."""

    lengths: np.ndarray  # (documents,) int64
    rules: tuple[MaskRule, ...]  # one plan for each
    num_ranks: int
    pool: Pool
    tolerance: int  # millionths of a fair share
    block: int
    group: int = 4  # query heads per key/value head: what moving a query row costs, in key/value rows

    def to_words(self) -> np.ndarray:
        """As int64 words, to cross a wire without pickle."""
        home = [0 if h is None else h + 1 for h in self.pool.home]
        windows = [rule.window for rule in self.rules]
        head = [self.num_ranks, self.tolerance, self.block, self.group, len(windows), len(self.pool), len(self.lengths)]
        return np.array([*head, *windows, *self.pool.capacity, *home, *self.lengths.tolist()], np.int64)

    @staticmethod
    def from_words(words: np.ndarray) -> PlanInputs:
        num_ranks, tolerance, block, group, num_rules, num_servers, num_documents = (int(w) for w in words[:7])
        windows, capacity, home, lengths = np.split(words[7:], np.cumsum([num_rules, num_servers, num_servers]))
        lengths = lengths[:num_documents]  # a message may be longer, up to its alignment
        pool = Pool(tuple(capacity.tolist()), tuple(h - 1 if h else None for h in home.tolist()))
        return PlanInputs(
            lengths, tuple(MaskRule(w) for w in windows.tolist()), num_ranks, pool, tolerance, block, group
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """CA-tasks of one micro-batch under one mask, with their servers. Sorted by document, first row, first key: the
    plan's order."""

    lengths: np.ndarray  # (documents,) int64
    rule: MaskRule
    segments: Segments
    pool: Pool
    document: np.ndarray  # (C,) int64, the task's document
    bands: Bands  # (C,) the task's pairs, in the document's own rows
    server: np.ndarray  # (C,) int64
    tolerance: int  # millionths of a fair share
    block: int

    def load(self) -> np.ndarray:
        """(servers,) int64: (query, key) pairs that each server computes."""
        return sum_by(self.server, self.bands.area(), len(self.pool))

    def load_at_home(self) -> np.ndarray:
        """(ranks,) int64: pairs that each rank would compute if every row were attended where it lives."""
        s = self.segments
        pairs = bands_of(self.rule, self.lengths)[s.document]
        rows = Bands(s.start, s.end, pairs.k0, pairs.k1, pairs.lo + s.start, pairs.hi + s.start)
        return sum_by(s.rank, rows.area(), int(s.rank.max(initial=0)) + 1)

    def imbalance(self) -> float:
        """The busiest server's load over its fair share."""
        return imbalance(self.load(), self.pool.capacity)

    def digest(self) -> int:
        """64 bits that differ when any task, server or segment does."""
        columns = [self.document, *(getattr(self.bands, f.name) for f in fields(Bands)), self.server]
        columns += [getattr(self.segments, f.name) for f in fields(Segments)]
        return _digest(columns)

    def check(self) -> None:
        """Raise AssertionError unless the plan keeps its promises (see the top of the file)."""
        self.check_cover()
        assert ((self.server >= 0) & (self.server < len(self.pool))).all(), "a task without a server"
        load, limit = self.load(), limits(int(self.bands.area().sum()), self.pool, self.tolerance)
        over = np.flatnonzero(load > limit + self.block**2)
        assert len(over) == 0, f"server {over[0]} has {load[over[0]]} pairs, its limit is {limit[over[0]]}"
        held = sum_by(self.segments.rank, self.segments.end - self.segments.start, int(self.segments.rank.max()) + 1)
        assert (held == held[0]).all(), f"ranks hold {held.tolist()} rows"

    def check_cover(self) -> None:
        """Raise AssertionError unless each allowed pair is in exactly one task and each row in one segment."""
        wanted, got = (
            bands_of(self.rule, self.lengths).area(),
            sum_by(self.document, self.bands.area(), len(self.lengths)),
        )
        wrong = np.flatnonzero(wanted != got)
        assert len(wrong) == 0, f"document {wrong[0]}: {got[wrong[0]]} pairs planned, {wanted[wrong[0]]} exist"
        bounds = np.searchsorted(self.document, np.arange(len(self.lengths) + 1))
        for d in np.flatnonzero(np.diff(bounds) > 1):
            b = self.bands[bounds[d] : bounds[d + 1]]
            q0, q1 = np.maximum(b.q0[:, None], b.q0), np.minimum(b.q1[:, None], b.q1)
            k0, k1 = np.maximum(b.k0[:, None], b.k0), np.minimum(b.k1[:, None], b.k1)
            common = Bands(
                q0, q1, k0, k1, *np.broadcast_arrays(b.lo + (q0 - b.q0) - (k0 - b.k0), b.hi + (q0 - b.q0) - (k0 - b.k0))
            )
            shared = np.where((q1 > q0) & (k1 > k0), common.area(), 0)
            assert (np.triu(shared, 1) == 0).all(), f"document {d}: two tasks share pairs"
        s = self.segments
        held = sum_by(s.document, s.end - s.start, len(self.lengths))
        assert (held == self.lengths).all(), "segments do not tile the documents"


def combined_digest(digests: list[int]) -> int:
    """One digest for the plans of a micro-batch, one per mask rule, in the rules' order."""
    return _digest([np.array(digests, np.int64)])


def _digest(columns: list[np.ndarray]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1  # fits an int64


def limits(total: int, pool: Pool, tolerance: int) -> np.ndarray:
    """(servers,) int64: the most pairs each server may get, (1 + tolerance) times its share of `total`."""
    share = shares(total, pool)
    return share + share * tolerance // MILLION


def shares(total: int, pool: Pool) -> np.ndarray:
    """(servers,) int64: `total` divided in proportion to capacity, rounded up."""
    whole = sum(pool.capacity)
    return np.array([-(-total * c // whole) for c in pool.capacity], np.int64)


def least_moved(plan: Plan, group: int) -> int:
    """A lower bound on what any exactly even plan moves, in key/value rows (a query row counts `group`), however it
    cuts.

    A server that holds at most r rows of one document computes at most A pairs of its own rows and keys. The E other
    pairs of its
    share need x query and y key rows from elsewhere with (r + x)(r + y) >= E + r^2; the cheapest x and y are known."""
    s = plan.segments
    share = shares(int(plan.load().sum()), plan.pool)
    order = order_by(s.rank, s.document)
    document, rank = s.document[order], s.rank[order]
    fresh = np.flatnonzero(np.append(True, (document[1:] != document[:-1]) | (rank[1:] != rank[:-1])))
    held = np.add.reduceat((s.end - s.start)[order], fresh)  # rows of one document on one rank
    most, own = (
        np.zeros(int(s.rank.max()) + 1, np.int64),
        sum_by(rank[fresh], held * (held + 1) // 2, int(s.rank.max()) + 1),
    )
    np.maximum.at(most, rank[fresh], held)
    total = 0
    for pairs, home in zip(share.tolist(), plan.pool.home, strict=True):
        r, away = (0, pairs) if home is None else (int(most[home]), pairs - int(own[home]))
        if away > 0 and away + r * r < group * r * r:
            total += away // r
        elif away > 0:
            total += max(0, 2 * isqrt(group * (away + r * r)) - (group + 1) * r)
    return total


def imbalance(load, capacity) -> float:
    """max(load / fair share); 1.0 when there is no load at all."""
    relative = np.asarray(load, float) / np.asarray(capacity, float)
    mean = np.sum(load) / np.sum(capacity)
    return float(relative.max() / mean) if mean > 0 else 1.0
