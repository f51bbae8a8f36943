"""Which rows does a rank send and receive because of a plan?

*At home* is a task whose rows and keys lie side by side on the rank that its server lives on: nothing of it moves, and
it is attended where its rows are. Of all other tasks a server gets the rows, so that those of a task are contiguous. A
part of a document keeps its place in the document modulo `TILE`, with padding between; whole documents follow without:

    home rank 0  | doc 0 | doc 1 ...|        server 2  queries | doc 1 rows 128.. |  | doc 4 | doc 5 |
    home rank 1  | ... doc 1 | doc 4 | doc 5 |         keys    | doc 1 keys 0..      |  | doc 4 | doc 5 |

A *shipment* is a run of rows with one home rank and one server; both ends derive their row numbers from the same
shipments, in the order in which the rows lie at the server. A row goes to a server once, however many of the server's
tasks read it. Nobody works out all shipments of a plan: a trainer needs those of its own documents, a server those of
its own tasks, and most documents are attended where they live.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from distca.arrays import order_by, ranges, sum_by
from distca.masks import Bands
from distca.plan import Plan

NO_ROWS = np.zeros(0, np.int64)
TILE = 128
"""Tiles and blocks of kernels divide it: so those of a document that is cut are its own, wherever it was cut."""
Weight = int | Callable[["Shipments"], np.ndarray]


@dataclass(frozen=True, slots=True)
class Routes:
    """All rows that one plan moves, and every server's task list, for whoever asks."""

    plan: Plan
    digest: int
    is_at_home: np.ndarray  # (C,) bool, of the plan's tasks
    at_home: Bands
    """The tasks at home, in the plan's order, in the row numbers of their ranks."""

    def of_trainer(self, rank: int) -> TrainerRoute:
        segments = self.plan.segments
        tasks = _tasks_of(self.plan, np.unique(segments.document[segments.rank == rank]))
        queries, keys = (x.of_rank(rank) for x, *_ in _ship(self.plan, tasks[~self.is_at_home[tasks]]))
        q_rows, kv_rows = (_rows_by(x.server, x.home_row, x.rows) for x in (queries, keys))
        home = self.at_home[_homes(self.plan)[self.plan.server[self.is_at_home]] == rank]
        servers = sorted({*q_rows, *kv_rows})
        parts = [_covered(home), *(q_rows.get(s, NO_ROWS) for s in servers)]
        times = np.bincount(np.concatenate(parts))  # how many of them compute a part of a row
        shared = np.flatnonzero(times > 1)
        links = []
        for s, part in zip(servers, parts[1:], strict=True):
            is_shared = times[part] > 1
            links.append(
                ServerRows(
                    server=s,
                    q_rows=part,
                    kv_rows=kv_rows.get(s, NO_ROWS),
                    alone=np.flatnonzero(~is_shared),
                    shared=np.flatnonzero(is_shared),
                    into=np.searchsorted(shared, part[is_shared]),
                )
            )
        return TrainerRoute(rank, home, tuple(links), shared, self.digest)

    def of_server(self, server: int) -> ServerRoute:
        tasks = np.flatnonzero((self.plan.server == server) & ~self.is_at_home)
        (queries, q0, num_q_rows), (keys, k0, num_kv_rows) = _ship(self.plan, tasks)
        q_rows, kv_rows = queries.by_rank(), keys.by_rank()
        links = tuple(
            TrainerRows(r, q_rows.get(r, NO_ROWS), kv_rows.get(r, NO_ROWS)) for r in sorted({*q_rows, *kv_rows})
        )
        packed = _moved_to(self.plan.bands[tasks], q0, k0)
        return ServerRoute(server, links, packed, num_q_rows, num_kv_rows, self.digest)

    def moved_rows(self) -> tuple[int, int]:
        """How many query rows and key/value rows are attended away from their home rank."""
        return tuple(int(shipments.rows.sum()) for shipments in _ship_away(self.plan))

    def traffic(self, num_ranks: int, query: Weight, key: Weight) -> tuple[np.ndarray, np.ndarray]:
        """(servers,) and (ranks,) int64: what each receives and sends away from home, if a query row weighs `query`
        and a key/value row `key`: a number, or a function that gives one for each shipment."""
        received, sent = np.zeros(len(self.plan.pool), np.int64), np.zeros(num_ranks, np.int64)
        for away, weight in zip(_ship_away(self.plan), (query, key), strict=True):
            weighed = away.rows * (weight(away) if callable(weight) else weight)
            received += sum_by(away.server, weighed, len(received))
            sent += sum_by(away.rank, weighed, num_ranks)
        return received, sent


@dataclass(frozen=True, slots=True)
class Shipments:
    """Rows [home_row, home_row + rows) of `rank` are rows [server_row, server_row + rows) of `server`, if that is the
    only server. In this order."""

    rank: np.ndarray  # (N,) int64
    server: np.ndarray  # (N,) int64
    home_row: np.ndarray  # (N,) int64
    server_row: np.ndarray  # (N,) int64
    rows: np.ndarray  # (N,) int64

    def __getitem__(self, index) -> Shipments:
        return Shipments(*(getattr(self, field.name)[index] for field in fields(self)))

    def of_rank(self, rank: int) -> Shipments:
        return self[self.rank == rank]

    def by_rank(self) -> dict[int, np.ndarray]:
        """All shipments of one server: the server's row numbers that each rank sends,
        in the order in which they travel."""
        return _rows_by(self.rank, self.server_row, self.rows)


@dataclass(frozen=True, slots=True)
class ServerRows:
    """What a trainer exchanges with one server: its own row numbers."""

    server: int
    q_rows: np.ndarray  # (Q,) int64
    kv_rows: np.ndarray  # (K,) int64
    alone: np.ndarray  # (A,) int64, which of q_rows only this server computes
    shared: np.ndarray  # (Q - A,) int64, the others
    into: np.ndarray  # (Q - A,) int64, where these are in the route's `shared`


@dataclass(frozen=True, slots=True)
class TrainerRows:
    """What a server exchanges with one trainer: the server's row numbers."""

    rank: int
    q_rows: np.ndarray  # (Q,) int64
    kv_rows: np.ndarray  # (K,) int64


@dataclass(frozen=True, slots=True)
class TrainerRoute:
    rank: int
    home: Bands
    """Tasks at home, in this rank's row numbers."""
    links: tuple[ServerRows, ...]
    shared: np.ndarray  # (M,) int64
    """Query rows that several compute a part of (home, servers), ascending: these parts are merged."""
    digest: int


@dataclass(frozen=True, slots=True)
class ServerRoute:
    server: int
    links: tuple[TrainerRows, ...]
    """One for each rank whose rows it needs; the rank that the server lives on may be one of them."""
    tasks: Bands
    num_q_rows: int
    """With padding, of which nothing travels."""
    num_kv_rows: int
    digest: int


def routes_of(plan: Plan) -> Routes:
    """Every row that has to be at a server for its tasks, once each."""
    is_at_home, at_home = _tasks_at_home(plan)
    return Routes(plan, plan.digest(), is_at_home, at_home)


def _homes(plan: Plan) -> np.ndarray:
    """(servers,) int64: the one rank that each server lives on; -1 where there is none or a group of them."""
    single = plan.pool.ranks_per_home == 1
    return np.array([h if h is not None and single else -1 for h in plan.pool.home], np.int64)


def _tasks_at_home(plan: Plan) -> tuple[np.ndarray, Bands]:
    """Which tasks are at home, and these in the row numbers of their ranks."""
    s, b, home = plan.segments, plan.bands, _homes(plan)[plan.server]
    order, stride = order_by(s.document, s.start), int(plan.lengths.max(initial=0)) + 1
    ends = s.document[order] * stride + s.end[order]

    def segment_of(start, end) -> tuple[np.ndarray, np.ndarray]:
        """Segment of each row range [start, end) of a task's document, and whether the segment holds all of it."""
        found = np.searchsorted(ends, plan.document * stride + start, side="right")
        segment = order[np.minimum(found, len(order) - 1)] if len(order) else found
        return segment, (end > start) & (s.rank[segment] == home) & (end <= s.end[segment])

    of_rows, rows_are_here = segment_of(b.q0, b.q1)
    of_keys, keys_are_here = segment_of(b.k0, b.k1)
    here = rows_are_here & keys_are_here
    of_rows, of_keys, b = of_rows[here], of_keys[here], b[here]
    q0, k0 = s.row[of_rows] + b.q0 - s.start[of_rows], s.row[of_keys] + b.k0 - s.start[of_keys]
    return here, _moved_to(b, q0, k0)


def _moved_to(bands: Bands, q0: np.ndarray, k0: np.ndarray) -> Bands:
    """The same bands with these first rows and keys."""
    return Bands(q0, q0 + bands.q1 - bands.q0, k0, k0 + bands.k1 - bands.k0, bands.lo, bands.hi)


def _covered(bands: Bands) -> np.ndarray:
    """The rows of any band, ascending, once each."""
    size = int(bands.q1.max(initial=0)) + 1
    opened = np.bincount(bands.q0, minlength=size) - np.bincount(bands.q1, minlength=size)
    return np.flatnonzero(np.cumsum(opened))


def _tasks_of(plan: Plan, documents: np.ndarray) -> np.ndarray:
    """The plan's tasks of some documents, in the plan's order if the documents are."""
    first = np.searchsorted(plan.document, documents)
    return ranges(first, np.searchsorted(plan.document, documents, side="right") - first)


def _ship_away(plan: Plan) -> list[Shipments]:
    """Query rows and key/value rows that are attended away from their home rank."""
    s, pool = plan.segments, plan.pool
    home_of_server = np.array([-1 if h is None else h for h in pool.home], np.int64)  # nobody lives in -1
    home = s.rank // pool.ranks_per_home
    last_home = np.zeros(len(plan.lengths), np.int64)
    last_home[s.document] = home
    has_one_home = np.ones(len(plan.lengths), bool)
    has_one_home[s.document[last_home[s.document] != home]] = False
    stays = has_one_home[plan.document] & (last_home[plan.document] == home_of_server[plan.server])
    shipments = [x for x, *_ in _ship(plan, np.flatnonzero(~stays))]
    return [x[home_of_server[x.server] != x.rank // pool.ranks_per_home] for x in shipments]


def _ship(plan: Plan, tasks: np.ndarray) -> tuple[tuple[Shipments, np.ndarray, int], ...]:
    """For queries, then for keys: what some tasks need, the server row at which each task's own begin, and the number
    of server rows; both count on over servers."""
    b, server, document = plan.bands[tasks], plan.server[tasks], plan.document[tasks]
    involved = np.zeros(len(plan.lengths), bool)
    involved[document] = True
    s = plan.segments
    segments = np.flatnonzero(involved[s.document])
    segments = segments[order_by(s.document[segments], s.start[segments])]
    return tuple(
        _ship_ranges(plan, segments, server, document, start, end) for start, end in ((b.q0, b.q1), (b.k0, b.k1))
    )


def _ship_ranges(plan: Plan, segments, server, document, start, end) -> tuple[Shipments, np.ndarray, int]:
    """Shipments that cover the row ranges [start, end) of documents for servers, at which server row each range begins,
    and the number of server rows. `segments`, sorted by document and start, hold all rows of these documents."""
    span, first_range, span_end = _union(server, document, start, end)
    span_server, span_document, span_start = server[first_range], document[first_range], start[first_range]
    is_part = span_end - span_start < plan.lengths[span_document]
    padded = -(-span_end // TILE) * TILE - span_start // TILE * TILE
    room, order = np.where(is_part, padded, span_end - span_start), np.argsort(~is_part, kind="stable")
    span_row = np.empty_like(room)
    span_row[order] = np.cumsum(room[order]) - room[order]
    span_row[is_part] += span_start[is_part] % TILE

    # each span crosses one or more segments of its document, which are consecutive
    s, stride = plan.segments, int(plan.lengths.max(initial=0)) + 1
    base, lift = s.document[segments] * stride, span_document * stride
    low = np.searchsorted(base + s.end[segments], lift + span_start, side="right")
    high = np.searchsorted(base + s.start[segments], lift + span_end, side="left")
    crossed, segment = np.repeat(np.arange(len(low)), high - low), segments[ranges(low, high - low)]
    first = np.maximum(span_start[crossed], s.start[segment])
    last = np.minimum(span_end[crossed], s.end[segment])
    home_row, server_row = s.row[segment] + first - s.start[segment], span_row[crossed] + first - span_start[crossed]
    shipments = Shipments(s.rank[segment], span_server[crossed], home_row, server_row, last - first)
    return shipments, span_row[span] + start - span_start[span], int(room.sum())


def _union(server, document, start, end) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranges that overlap or touch, within one server and document, become one span; spans are sorted by server,
    document, start.

    Each range's span, each span's first range, each span's end."""
    order = order_by(server, document, start)
    server, document, start, end = server[order], document[order], start[order], end[order]
    fresh = np.append(True, (server[1:] != server[:-1]) | (document[1:] != document[:-1]))[: len(order)]
    # a running maximum of the ends that starts anew in each group: groups are lifted above one another
    lift = np.cumsum(fresh) * (int(end.max(initial=0)) + 1)
    reach = np.maximum.accumulate(end + lift) - lift
    fresh[1:] |= start[1:] > reach[:-1]
    span = np.empty(len(order), np.int64)
    span[order] = np.cumsum(fresh) - 1
    first = np.flatnonzero(fresh)
    return span, order[first], np.maximum.reduceat(end, first) if len(first) else end


def _rows_by(peer: np.ndarray, first: np.ndarray, count: np.ndarray) -> dict[int, np.ndarray]:
    """The ranges [first, first + count) of each peer as row numbers."""
    order = np.argsort(peer, kind="stable")
    peer, first, count = peer[order], first[order], count[order]
    end = np.cumsum(count)
    rows = np.empty(int(count.sum()), np.int64)  # ranges are few and long: filling beats one big sum with temporaries
    for value, start, stop in zip(first.tolist(), (end - count).tolist(), end.tolist(), strict=True):
        rows[start:stop] = np.arange(value, value + stop - start)
    peers, begin = np.unique(peer, return_index=True)
    return dict(zip(peers.tolist(), np.split(rows, end[begin[1:] - 1]), strict=True)) if len(peers) else {}
