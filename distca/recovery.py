"""Who takes over when attention servers are lost in the middle of a step?

Only the lost servers' tasks move, and they keep their cuts: no other server's work changes. The next step gets a fresh
plan without the lost servers. Runs do not use this yet: a lost server stops the run.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from distca.arrays import sum_by
from distca.plan import Plan

UNIT = 1024  # loads are compared per capacity, as integers


def without_servers(plan: Plan, lost: Collection[int]) -> Plan:
    """The same tasks; those of `lost` servers, most work first, go to the survivor that is done first."""
    is_lost = np.zeros(len(plan.pool), bool)
    is_lost[list(lost)] = True
    survivors = np.flatnonzero(~is_lost).tolist()
    assert survivors, f"all {len(plan.pool)} servers are lost"
    moving, server = np.flatnonzero(is_lost[plan.server]), plan.server.copy()
    if len(survivors) == 1:
        server[moving] = survivors[0]
        return replace(plan, server=server)
    costs = plan.cost.of(plan.bands)
    moving = moving[np.argsort(-costs[moving], kind="stable")]
    load, capacity = sum_by(plan.server, costs, len(plan.pool)).tolist(), plan.pool.capacity
    heap = [(UNIT * load[s] // capacity[s], s) for s in survivors]
    heapq.heapify(heap)
    for task, cost in zip(moving.tolist(), costs[moving].tolist(), strict=True):
        done, survivor = heap[0]
        server[task] = survivor
        heapq.heapreplace(heap, (done + UNIT * cost // capacity[survivor], survivor))
    return replace(plan, server=server)
