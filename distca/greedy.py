"""The greedy planner that the paper (arXiv 2510.18121, section 4) describes: the baseline that ours is compared with.

Documents lie on ranks in their order; one that crosses a border gives both ranks an equal part from its head and its
tail. What a
rank holds of a document is an *item*. Servers with too little work, the emptiest first, take from those with too much:
always the
item that gives most work per byte, whole or in part, until each is short of no more than `tolerance`. An item takes
its rows with
all the keys before them. It bounds how much a server falls short, not how much it exceeds; and it does not see who has
to send.
"""

from __future__ import annotations

import numpy as np

from distca.arrays import order_by, sum_by
from distca.masks import Mask, MaskRule, mask_of, tighten
from distca.placement import Segments
from distca.plan import MILLION, Plan, PlanInputs, bands_in, shares

TOLERANCE = 100_000
"""As published, in millionths."""


def greedy_plan(inputs: PlanInputs, rule: MaskRule | Mask, direction: int = 0, tolerance: int = TOLERANCE) -> Plan:
    """The paper's plan of a micro-batch: it makes pairs even, whatever the direction's cost, which its loads are told
    in. Servers that live nowhere start without work, ranks without a server lend theirs one."""
    mask, size = mask_of(rule, inputs.lengths), inputs.pool.ranks_per_home
    segments, item, item_rank = _head_and_tail(inputs.lengths, inputs.num_ranks)
    home = {rank: server for server, rank in enumerate(inputs.pool.home) if rank is not None}
    server = np.array([home.get(r // size, r % len(inputs.pool)) for r in item_rank.tolist()], np.int64)
    item, server = _migrate(item, server, inputs, mask, tolerance)

    # rows [1, 2) of an item are its head, [3, 4) its tail
    document = np.concatenate([item[:, 0], item[:, 0]])
    start, end = np.concatenate([item[:, 1], item[:, 3]]), np.concatenate([item[:, 2], item[:, 4]])
    part, bands = bands_in(mask, document, start, end)
    bands, document, server = tighten(bands), document[part], np.concatenate([server, server])[part]
    useful = np.flatnonzero(bands.q1 > bands.q0)
    useful = useful[order_by(document[useful], bands.q0[useful], bands.k0[useful])]
    return Plan(
        inputs.lengths,
        mask,
        inputs.costs[direction],
        segments,
        inputs.pool,
        document[useful],
        bands[useful],
        server[useful],
        tolerance,
        inputs.block,
    )


def even_greedy_plan(inputs: PlanInputs, rule: MaskRule | Mask, direction: int = 0, imbalance: float = 1.02) -> Plan:
    """The same with a tolerance that shrinks until the worst server is at most `imbalance` times its share."""
    tolerance = TOLERANCE
    for _ in range(9):
        plan = greedy_plan(inputs, rule, direction, tolerance)
        if plan.imbalance() <= imbalance:
            break
        tolerance //= 4
    return plan


def _head_and_tail(lengths: np.ndarray, num_ranks: int) -> tuple[Segments, np.ndarray, np.ndarray]:
    """Segments, and items (document, head start, head end, tail start, tail end) with their ranks."""
    tokens = int(lengths.sum()) // num_ranks
    segments, items, rank, free = [], [], 0, tokens
    for document, length in enumerate(lengths.tolist()):
        head, tail = 0, length
        while head < tail:
            rows = min(free, tail - head)
            front = rows // 2
            item = (document, head, head + front, tail - (rows - front), tail)
            if rows == tail - head:
                segments.append((document, head, tail, rank, tokens - free))
            else:
                if front:
                    segments.append((document, *item[1:3], rank, tokens - free))
                segments.append((document, *item[3:5], rank, tokens - free + front))
            items.append((*item, rank))
            head, tail, free = item[2], item[3], free - rows
            if not free:
                rank, free = rank + 1, tokens
    columns = np.array(segments, np.int64).reshape(-1, 5).T
    items = np.array(items, np.int64).reshape(-1, 6)
    return Segments(*columns), items[:, :5], items[:, 5]


def _migrate(item: np.ndarray, server: np.ndarray, inputs: PlanInputs, mask: Mask, tolerance: int):
    """Items after the greedy's moves, with their servers."""

    def pairs_of(items: np.ndarray) -> np.ndarray:
        pairs = np.zeros(len(items), np.int64)
        for i in (1, 3):
            part, bands = bands_in(mask, items[:, 0], items[:, i], items[:, i + 1])
            pairs += sum_by(part, bands.area(), len(items))
        return pairs

    pairs = pairs_of(item)
    share = shares(int(pairs.sum()), inputs.pool)
    surplus = sum_by(server, pairs, len(inputs.pool)) - share
    for taker in np.argsort(surplus, kind="stable").tolist():
        while -int(surplus[taker]) * MILLION > tolerance * int(share[taker]):
            from_ = np.flatnonzero((surplus[server] > 0) & (pairs > 0))
            if len(from_) == 0:
                break
            given = np.minimum(np.minimum(pairs[from_], surplus[server[from_]]), -surplus[taker])
            length = inputs.lengths[item[from_, 0]]
            # a row and its mirror image see `length` keys together; the paper counts all the document's keys as sent
            moved = inputs.group * 2 * given / (length + 1) + length
            best = int(np.argmax(given / moved))
            chosen, amount = from_[best], int(given[best])
            donor = server[chosen]
            if amount < pairs[chosen]:
                document, a, b, c, d = item[chosen].tolist()
                rows = min(amount // int(inputs.lengths[document]), b - a, d - c)
                if rows == 0:
                    break
                inner = np.array([[document, b - rows, b, c, c + rows]], np.int64)
                amount = int(pairs_of(inner)[0])
                if amount == 0:  # a window may leave these rows nothing
                    break
                item[chosen] = (document, a, b - rows, c + rows, d)
                pairs[chosen] -= amount
                item, server, pairs = np.concatenate([item, inner]), np.append(server, taker), np.append(pairs, amount)
            else:
                server[chosen] = taker
            surplus[donor] -= amount
            surplus[taker] += amount
    return item, server
