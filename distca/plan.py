"""Which attention server computes which CA-task: the result that every rank agrees on.

A `Plan` is made from `PlanInputs` alone (integers: lengths, capacities, mask, cost), by every rank for itself. Ranks
compare the 8-byte digest, never the plan. `Plan.check()` states what every plan guarantees:
  - each allowed (query, key) pair is in exactly one task, and each task has one server of the pool;
  - tasks are cut at multiples of `block` rows and keys counted from the document's start, or at a border between ranks
    (the greedy's plans, which are there to compare with, anywhere);
  - no server's load exceeds its fair share by more than the tolerance plus one tile of block x block pairs, where the
    cost is the number of pairs (other costs grow with every cut, by an amount that no bound is given for);
  - every rank holds the same number of rows, up to one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from math import isqrt

import numpy as np

from distca.arrays import order_by, spread, sum_by
from distca.cost import Cost, PairCost, Wire, cost_from_words
from distca.masks import Bands, Mask, MaskRule, cut, intersect
from distca.placement import Segments, packed_in_order

MILLION = 1_000_000
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: Knuth's multiplicative hashing


@dataclass(frozen=True, slots=True)
class Pool:
    """All attention servers of a step."""

    capacity: tuple[int, ...]
    """Relative speed of each server; only ratios count."""
    home: tuple[int | None, ...]
    """The rank whose rows a server holds already, because it lives there; None for a dedicated server."""
    ranks_per_home: int = 1
    """A server that is a group of GPUs, such as one NVLink domain, lives on as many ranks: its home `h` is the ranks
    from h * ranks_per_home on. Heads are split inside the group."""
    neighbourhoods: int = 1
    """Ranks and servers are in so many runs, in their order, and work leaves a neighbourhood only where its own servers
    have no time left. The planner joins neighbourhoods that are too small for the longest document."""

    def __post_init__(self):
        assert len(self.capacity) == len(self.home) > 0, "a pool has at least one server"
        assert min(self.capacity) > 0, f"capacities are positive, got {self.capacity}"

    def __len__(self) -> int:
        return len(self.capacity)

    def neighbourhood(self) -> np.ndarray:
        """(servers,) int64: which one each server is in;
        dedicated servers and those that live somewhere are counted apart."""
        dedicated = np.array([home is None for home in self.home])
        number = np.where(dedicated, np.cumsum(dedicated), np.cumsum(~dedicated)) - 1
        size = np.where(dedicated, dedicated.sum(), (~dedicated).sum())
        return ((number + 1) * self.neighbourhoods - 1) // np.maximum(size, 1)


def make_pool(
    trainers: int, servers: int, trainers_serve: bool, trainer_capacity: int = 100, ranks_per_home: int = 1
) -> Pool:
    """In place (no dedicated servers), dedicated (trainers do not serve) or mixed; serving trainers come first, in
    rank order."""
    serving = trainers // ranks_per_home if trainers_serve else 0
    capacity = (trainer_capacity,) * serving + (100,) * servers
    return Pool(capacity, tuple(range(serving)) + (None,) * servers, ranks_per_home)


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """Everything that plans of one micro-batch depend on."""

    lengths: np.ndarray  # (documents,) int64
    rules: tuple[MaskRule | Mask, ...]  # one plan for each
    num_ranks: int
    pool: Pool
    tolerance: int  # millionths of a fair share
    block: int
    group: int = 4  # query heads per key/value head: what moving a query row costs, in key/value rows
    costs: tuple[Cost, ...] = (PairCost(),)
    """One plan for each: forward and backward may be planned apart, or together by the sum of their costs."""
    wires: tuple[Wire, ...] = ()
    """What moving costs, one for each of `costs`, if work is to stay at home where moving it does not pay."""

    def __post_init__(self):
        size, homes = self.pool.ranks_per_home, [home for home in self.pool.home if home is not None]
        assert self.num_ranks % size == 0, f"{self.num_ranks} ranks are no whole number of groups of {size}"
        assert len(set(homes)) == len(homes), f"two servers live in one place: {homes}"
        assert all(0 <= home < self.num_ranks // size for home in homes), f"{self.num_ranks} ranks, homes {homes}"
        assert len(self.costs) in (1, 2) and len(self.wires) in (0, len(self.costs)), "one cost and wire per direction"

    def to_words(self) -> np.ndarray:
        """As int64 words, to cross a wire without pickle. Rules only: nobody sends a `Mask`."""
        pool, costs = self.pool, [cost.to_words() for cost in self.costs]
        sections = [
            [self.num_ranks, self.tolerance, self.block, self.group, pool.ranks_per_home, pool.neighbourhoods],
            [rule.window for rule in self.rules],
            pool.capacity,
            [0 if h is None else h + 1 for h in pool.home],
            [len(words) for words in costs],
            [word for words in costs for word in words],
            [word for wire in self.wires for word in (*wire.far, *wire.near, wire.ranks_per_node)],
            self.lengths.tolist(),
        ]
        return np.array([len(sections), *map(len, sections), *(word for s in sections for word in s)], np.int64)

    @staticmethod
    def from_words(words: np.ndarray) -> PlanInputs:
        num_sections = int(words[0])
        ends = np.cumsum(words[1 : num_sections + 1]) + num_sections + 1
        # a message may be longer than its last section, up to its alignment
        head, windows, capacity, home, sizes, costs, wires, lengths, _ = np.split(words, ends)
        num_ranks, tolerance, block, group, *groups = head[num_sections + 1 :].tolist()
        pool = Pool(tuple(capacity.tolist()), tuple(h - 1 if h else None for h in home.tolist()), *groups)
        rules = tuple(MaskRule(window) for window in windows.tolist())
        costs = tuple(cost_from_words(part.tolist()) for part in np.split(costs, np.cumsum(sizes)[:-1]))
        wires = tuple(Wire((a, b), (c, d), ranks) for a, b, c, d, ranks in wires.reshape(-1, 5).tolist())
        return PlanInputs(lengths, rules, num_ranks, pool, tolerance, block, group, costs, wires)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """CA-tasks of one micro-batch under one mask, with their servers. Sorted by document, first row, first key: the
    plan's order. Equal only to itself; compare digests."""

    lengths: np.ndarray  # (documents,) int64
    mask: Mask
    cost: Cost
    segments: Segments
    pool: Pool
    document: np.ndarray  # (C,) int64, the task's document
    bands: Bands  # (C,) the task's pairs, in the document's own rows
    server: np.ndarray  # (C,) int64
    tolerance: int  # millionths of a fair share
    block: int

    def load(self) -> np.ndarray:
        """(servers,) int64: the cost of each server's tasks."""
        return sum_by(self.server, self.cost.of(self.bands), len(self.pool))

    def load_at_home(self) -> np.ndarray:
        """(ranks,) int64: what each rank's tasks would cost if every row were attended where it lives."""
        return load_at_home(self.segments, self.mask, self.cost, int(self.segments.rank.max(initial=0)) + 1)

    def load_packed(self) -> np.ndarray:
        """(ranks,) int64: the same if documents lay end to end in their own order,
        instead of where they were placed."""
        num_ranks = int(self.segments.rank.max(initial=0)) + 1
        return load_at_home(packed_in_order(self.lengths, num_ranks), self.mask, self.cost, num_ranks)

    def imbalance(self) -> float:
        """The busiest server's load over its fair share."""
        return imbalance(self.load(), self.pool.capacity)

    def digest(self) -> int:
        """63 bits that differ when any task, server or segment does; what the plan was made from is not in them."""
        tasks = [self.document, *(getattr(self.bands, f.name) for f in fields(Bands)), self.server]
        return _digest(tasks, [getattr(self.segments, f.name) for f in fields(Segments)])

    def check(self) -> None:
        """Raise AssertionError unless the plan keeps its promises (see the top of the file)."""
        self.check_cover()
        assert ((self.server >= 0) & (self.server < len(self.pool))).all(), "a task without a server"
        if isinstance(self.cost, PairCost):
            load, limit = self.load(), limits(int(self.bands.area().sum()), self.pool, self.tolerance)
            over = np.flatnonzero(load > limit + self.block**2)
            assert len(over) == 0, f"server {over[0]} has {load[over[0]]} pairs, its limit is {limit[over[0]]}"
        s = self.segments
        held = sum_by(s.rank, s.end - s.start, int(s.rank.max(initial=0)) + 1)
        assert held.max(initial=0) - held.min(initial=held.max(initial=0)) <= 1, f"ranks hold {held.tolist()} rows"
        order = order_by(s.rank, s.row)
        rows, first = (s.end - s.start)[order], (np.cumsum(held) - held)[s.rank[order]]
        assert (s.row[order] == np.cumsum(rows) - rows - first).all(), "a rank's rows do not lie end to end"

    def check_cover(self) -> None:
        """Raise AssertionError unless each allowed pair is in exactly one task and each row in one segment."""
        allowed, tasks = self.mask, self.bands
        assert (np.diff(self.document) >= 0).all(), "tasks are not in the plan's order"
        wanted, got = (
            sum_by(document, bands.area(), len(self.lengths))
            for document, bands in ((allowed.document, allowed.bands), (self.document, tasks))
        )
        wrong = np.flatnonzero(wanted != got)
        assert len(wrong) == 0, f"document {wrong[0]}: {got[wrong[0]]} pairs planned, {wanted[wrong[0]]} exist"
        # as many pairs as there are, all of them allowed, none twice
        task, nth = spread(np.bincount(allowed.document, minlength=len(self.lengths))[self.document])
        band = np.searchsorted(allowed.document, self.document)[task] + nth
        inside = sum_by(task, intersect(tasks[task], allowed.bands[band]).area(), len(tasks))
        outside = np.flatnonzero(inside != tasks.area())
        assert len(outside) == 0, f"task {outside[0]} has pairs that its document {self.document[outside[0]]} forbids"
        bounds = np.searchsorted(self.document, np.arange(len(self.lengths) + 1))
        for d in np.flatnonzero(np.diff(bounds) > 1):
            first, second = np.triu_indices(bounds[d + 1] - bounds[d], 1)
            mine = tasks[bounds[d] : bounds[d + 1]]
            assert not intersect(mine[first], mine[second]).area().any(), f"document {d}: two tasks share pairs"
        s = self.segments
        held = sum_by(s.document, s.end - s.start, len(self.lengths))
        order = order_by(s.document, s.start)
        document, start, end = s.document[order], s.start[order], s.end[order]
        first = np.append(True, document[1:] != document[:-1])[: len(document)]
        tiled = start == np.where(first, 0, np.append(0, end[:-1])[: len(end)])
        assert (held == self.lengths).all() and tiled.all(), "segments do not tile the documents"


def bands_in(mask: Mask, document, start, end) -> tuple[np.ndarray, Bands]:
    """The bands of row ranges [start, end) of documents: which range each belongs to, the band cut to it."""
    count = np.bincount(mask.document, minlength=int(document.max(initial=-1)) + 1)
    index, nth = spread(count[document])
    whole = mask.bands[(np.cumsum(count) - count)[document[index]] + nth]
    start, end = start[index], end[index]
    cropped = np.flatnonzero((start > whole.q0) | (end < whole.q1))  # few: most documents are whole
    inside = cut(whole[cropped], start[cropped], end[cropped], whole.k0[cropped], whole.k1[cropped])
    for column in Bands.__slots__:
        getattr(whole, column)[cropped] = getattr(inside, column)
    return index, whole


def load_at_home(segments: Segments, mask: Mask, cost: Cost, num_ranks: int) -> np.ndarray:
    """(ranks,) int64: the cost of attending each row on the rank that holds it, all keys at hand."""
    segment, bands = bands_in(mask, segments.document, segments.start, segments.end)
    return sum_by(segments.rank[segment], cost.of(bands), num_ranks)


def combined_digest(digests: list[int]) -> int:
    """One digest for the plans of a micro-batch, one per mask rule, in the rules' order."""
    return _digest([np.array(digests, np.int64)])


def _digest(*tables: list[np.ndarray]) -> int:
    """63 bits of tables of int64 columns."""
    digest = hashlib.blake2b(digest_size=8)
    for columns in tables:
        # One word per row before hashing, which is the slow part: the columns times powers of GOLDEN, modulo 2^64. Rows
        # that differ in one column differ in the word (GOLDEN is odd); others agree with a chance of 2^-64.
        words = np.zeros(len(columns[0]), np.uint64)
        for column in columns:
            words *= GOLDEN
            words += np.asarray(column, np.int64).view(np.uint64)
        digest.update(words.astype("<u8", copy=False))
    return int.from_bytes(digest.digest(), "little") >> 1  # fits an int64


def limits(total: int, pool: Pool, tolerance: int) -> np.ndarray:
    """(servers,) int64: the most that each server may get, (1 + tolerance) times its share of `total`, or all."""
    return np.array([min(total, s + s * tolerance // MILLION) for s in shares(total, pool).tolist()], np.int64)


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
    if len(rank) == 0:
        return 0
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
