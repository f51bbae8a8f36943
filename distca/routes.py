"""Which rows does a rank send and receive because of a plan?

A server's rows are sorted by document and position, so that the rows and keys of a task are contiguous, and every row
keeps its place in its document modulo `TILE`, with padding between:

    home rank 0  | doc 0 | doc 1 ...|        server 2  queries | doc 1 rows 128.. |  | doc 4 rows 0.. |
    home rank 1  | ... doc 1 | doc 4 |                 keys    | doc 1 keys 0..      |  | doc 4 keys 0.. |

A `Shipment` is a run of rows with one home rank and one server; both ends derive their row numbers from the same
table. A row goes
to a server once, however many of the server's tasks read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distca.arrays import order_by, ranges, sum_by
from distca.masks import Bands
from distca.plan import Plan, Pool

NO_ROWS = np.zeros(0, np.int64)
TILE = (
    128  # what kernels' tiles and blocks divide: theirs are then the document's own, wherever it was cut, and unshared
)


@dataclass(frozen=True, slots=True)
class Shipments:
    """Rows [home_row, home_row + rows) of `rank` are rows [server_row, server_row + rows) of `server`. In the server's
    order."""

    rank: np.ndarray  # (N,) int64
    server: np.ndarray  # (N,) int64
    home_row: np.ndarray  # (N,) int64
    server_row: np.ndarray  # (N,) int64
    rows: np.ndarray  # (N,) int64

    def of_rank(self, rank: int) -> dict[int, np.ndarray]:
        """Row numbers at home that the rank exchanges with each server, in the order in which they travel."""
        mine = np.flatnonzero(self.rank == rank)
        return _rows_by(self.server[mine], self.home_row[mine], self.rows[mine])

    def are_disjoint(self, rank: int) -> bool:
        """No row of the rank goes to more than one server."""
        mine = np.flatnonzero(self.rank == rank)
        mine = mine[np.argsort(self.home_row[mine])]
        return bool((self.home_row[mine[1:]] >= (self.home_row + self.rows)[mine[:-1]]).all())

    def of_server(self, server: int) -> dict[int, np.ndarray]:
        """Row numbers at the server that it exchanges with each rank, in the order in which they travel."""
        mine = np.arange(*np.searchsorted(self.server, [server, server + 1]))
        mine = mine[np.argsort(self.rank[mine], kind="stable")]
        return _rows_by(self.rank[mine], self.server_row[mine], self.rows[mine])


@dataclass(frozen=True, slots=True)
class Routes:
    """All rows that one plan moves, and every server's task list."""

    queries: Shipments
    keys: Shipments
    tasks: Bands  # (C,) the plan's tasks, in the packed rows of their server
    server: np.ndarray  # (C,) int64
    num_q_rows: np.ndarray  # (servers,) int64, with padding
    num_kv_rows: np.ndarray  # (servers,) int64, with padding
    pool: Pool
    digest: int

    def of_trainer(self, rank: int) -> TrainerRoute:
        q_rows, kv_rows = self.queries.of_rank(rank), self.keys.of_rank(rank)
        links = tuple(
            ServerRows(s, q_rows.get(s, NO_ROWS), kv_rows.get(s, NO_ROWS)) for s in sorted({*q_rows, *kv_rows})
        )
        return TrainerRoute(rank, links, self.queries.are_disjoint(rank), self.digest)

    def of_server(self, server: int) -> ServerRoute:
        q_rows, kv_rows = self.queries.of_server(server), self.keys.of_server(server)
        links = tuple(
            TrainerRows(r, q_rows.get(r, NO_ROWS), kv_rows.get(r, NO_ROWS)) for r in sorted({*q_rows, *kv_rows})
        )
        num_q, num_kv = int(self.num_q_rows[server]), int(self.num_kv_rows[server])
        return ServerRoute(server, links, self.tasks[self.server == server], num_q, num_kv, self.digest)

    def moved_rows(self) -> tuple[int, int]:
        """How many query rows and key/value rows are attended away from their home rank."""
        return _away(self.queries, self.pool), _away(self.keys, self.pool)


@dataclass(frozen=True, slots=True)
class ServerRows:
    """What a trainer exchanges with one server: its own row numbers."""

    server: int
    q_rows: np.ndarray  # (Q,) int64
    kv_rows: np.ndarray  # (K,) int64


@dataclass(frozen=True, slots=True)
class TrainerRows:
    """What a server exchanges with one trainer: the server's row numbers."""

    rank: int
    q_rows: np.ndarray  # (Q,) int64
    kv_rows: np.ndarray  # (K,) int64


@dataclass(frozen=True, slots=True)
class TrainerRoute:
    rank: int
    links: tuple[ServerRows, ...]
    rows_are_whole: bool
    """No query row is attended on more than one server: answers need no merging."""
    digest: int


@dataclass(frozen=True, slots=True)
class ServerRoute:
    server: int
    links: tuple[TrainerRows, ...]
    tasks: Bands
    num_q_rows: int
    """With padding, of which nothing travels."""
    num_kv_rows: int
    digest: int


def routes_of(plan: Plan) -> Routes:
    """Every row that has to be at a server for its tasks, once each."""
    b = plan.bands
    queries, q_base, num_q_rows = _ship(plan, b.q0, b.q1)
    keys, k_base, num_kv_rows = _ship(plan, b.k0, b.k1)
    tasks = Bands(q_base, q_base + b.q1 - b.q0, k_base, k_base + b.k1 - b.k0, b.lo, b.hi)
    return Routes(queries, keys, tasks, plan.server, num_q_rows, num_kv_rows, plan.pool, plan.digest())


def _ship(plan: Plan, start: np.ndarray, end: np.ndarray) -> tuple[Shipments, np.ndarray, np.ndarray]:
    """Shipments that cover the tasks' row ranges [start, end), the server row at which each task's range begins, and
    how many rows each server has."""
    span, first_task, span_end = _union(plan.server, plan.document, start, end)
    span_server, span_document, span_start = plan.server[first_task], plan.document[first_task], start[first_task]
    room = -(-span_end // TILE) * TILE - span_start // TILE * TILE
    before = np.cumsum(room) - room
    servers_before = np.searchsorted(span_server, np.arange(len(plan.pool)))
    span_row = before - np.append(before, room.sum())[servers_before][span_server] + span_start % TILE
    base = span_row[span] + start - span_start[span]

    # each span crosses one or more home segments of its document, which are consecutive when sorted by (document,
    # start)
    s = plan.segments
    order = order_by(s.document, s.start)
    of_document = np.bincount(s.document, minlength=len(plan.lengths))
    low = (np.cumsum(of_document) - of_document)[span_document]
    high = low + of_document[span_document]
    many = np.flatnonzero(high > low + 1)  # documents on one rank, by far the most, need no search
    stride = int(plan.lengths.max(initial=0)) + 1
    where = s.document[order] * stride
    low[many] = np.searchsorted(where + s.end[order], span_document[many] * stride + span_start[many], side="right")
    high[many] = np.searchsorted(where + s.start[order], span_document[many] * stride + span_end[many], side="left")
    crossed, segment = np.repeat(np.arange(len(low)), high - low), order[ranges(low, high - low)]
    first = np.maximum(span_start[crossed], s.start[segment])
    last = np.minimum(span_end[crossed], s.end[segment])
    shipments = Shipments(
        s.rank[segment],
        span_server[crossed],
        s.row[segment] + first - s.start[segment],
        span_row[crossed] + first - span_start[crossed],
        last - first,
    )
    return shipments, base, sum_by(span_server, room, len(plan.pool))


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


def _away(shipments: Shipments, pool: Pool) -> int:
    home = np.array([-1 if h is None else h for h in pool.home], np.int64)  # no rank is -1
    return int(shipments.rows[home[shipments.server] != shipments.rank].sum())


def _rows_by(peer: np.ndarray, first: np.ndarray, count: np.ndarray) -> dict[int, np.ndarray]:
    """The ranges [first, first + count) of each peer as row numbers; peers are sorted."""
    rows, ends = ranges(first, count), np.cumsum(count)
    peers, begin = np.unique(peer, return_index=True)
    return dict(zip(peers.tolist(), np.split(rows, ends[begin[1:] - 1]), strict=True)) if len(peers) else {}
