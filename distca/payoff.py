"""Does moving this work pay?

An even plan is the fastest one only while its rows travel faster than its work is done. A server is done after its
tasks and its rows, so a plan takes the time of the slowest

    tasks of a server / its speed  +  the larger of: rows it receives, rows that its own ranks send

and where that is more than at home, work had better stay. What moves is what lies above a level, 1 + tolerance times
the fair share, so the level decides how much moves:

    level   1.01   1.02   1.05   ...   most at home           time  |\\                  __/  tasks
            all moves     ...          nothing moves                | \\__     ______---/
                                                                    |    `----'     rows travel
    `fastest` raises it while the predicted time falls.             +-----------------------> level
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distca.cost import Wire
from distca.plan import MILLION, Plan
from distca.routes import Shipments, routes_of

WIDER = [MILLION * 2**k // 64 for k in range(10)]
NOTHING_MOVES = 10_000 * MILLION


def predicted(plan: Plan, wire: Wire | None = None) -> int:
    """Cost until the last server is done, for a server of the pool's best capacity;
    without `wire`, of the tasks alone."""
    capacity = np.array(plan.pool.capacity, np.int64)
    tasks = plan.load() * capacity.max() // capacity
    if wire is None:
        return int(tasks.max())
    received, sent = _traffic(plan, wire)
    rows, size = received.copy(), plan.pool.ranks_per_home
    for server, home in enumerate(plan.pool.home):
        if home is not None:
            rows[server] = max(rows[server], sent[home * size : (home + 1) * size].max(initial=0))
    return max(int((tasks + rows).max()), int(sent.max()))


def fastest(plan_at: Callable[[int], Plan], tolerance: int, wire: Wire) -> Plan:
    """Of the plans that `plan_at` makes for growing tolerances (millionths), the one with least predicted time."""
    best = plan_at(tolerance)
    least, misses = predicted(best, wire), 0
    for wider in [*(t for t in WIDER if t > tolerance), NOTHING_MOVES]:
        if misses == 2 and wider != NOTHING_MOVES:
            continue
        plan = plan_at(wider)
        time = predicted(plan, wire)
        misses = 0 if time < least else misses + 1
        if time < least:
            best, least = plan, time
    return best


def _traffic(plan: Plan, wire: Wire) -> tuple[np.ndarray, np.ndarray]:
    """(servers,) and (ranks,) int64: what receiving and what sending costs."""
    pool, size = plan.pool, wire.ranks_per_node
    node = np.array([-1 if h is None else h * pool.ranks_per_home // size for h in pool.home], np.int64)

    def row_of(kind: int) -> Callable[[Shipments], np.ndarray]:
        return lambda away: np.where(node[away.server] == away.rank // size, wire.near[kind], wire.far[kind])

    return routes_of(plan).traffic(int(plan.segments.rank.max(initial=0)) + 1, row_of(0), row_of(1))
