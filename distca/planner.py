"""Cut core attention into CA-tasks and give every server of the pool the same predicted work for its capacity."""

from __future__ import annotations

from dataclasses import dataclass
from bisect import bisect_left, bisect_right, insort
from math import isqrt

import numpy as np

from distca.masks import Bands, MaskRule, bands_of, crop, cut
from distca.placement import Segments, place
from distca.plan import MILLION, Plan, PlanInputs, Pool, limits, shares, sum_by

NOBODY = -1  # inside this file: no server


def plan_step(inputs: PlanInputs, rule: MaskRule) -> Plan:
    documents = bands_of(rule, inputs.lengths)
    work = documents.area() if inputs.rules == (rule,) else sum(bands_of(r, inputs.lengths).area() for r in inputs.rules)
    segments = place(inputs.lengths, work, share_of_ranks(inputs, int(work.sum())), inputs.group, inputs.block)
    rows = documents[segments.document]
    pieces = cut(rows, segments.start, segments.end, rows.k0, rows.k1)
    area = pieces.area()
    total = int(area.sum())
    share = shares(total, inputs.pool)
    limit = share + share * (inputs.tolerance * AIM[0] // AIM[1]) // MILLION
    server = _adopt(_home_server(segments, inputs.pool), area, share)
    load = sum_by(server, area, len(inputs.pool))

    piece, amount = _surplus(server, area, pieces, load, limit)
    rooms = np.maximum(limit - load, 0)
    kept, tile_piece, tiles, tile_server = _export(segments, pieces, area, server, piece, amount, rooms, inputs)
    which = np.concatenate([kept, tile_piece])
    bands = _join(pieces[kept], tiles)
    bands = cut(bands, bands.q0, bands.q1, bands.k0, bands.k1)
    task_server = np.concatenate([server[kept], tile_server])
    document = segments.document[which]
    useful = bands.q1 > bands.q0
    document, bands, task_server = document[useful], bands[useful], task_server[useful]
    order = np.lexsort((bands.k0, bands.q0, document))
    return Plan(inputs.lengths, rule, segments, inputs.pool, document[order], bands[order], task_server[order],
                inputs.tolerance, inputs.block)

AIM = (3, 4)

def share_of_ranks(inputs: PlanInputs, total: int) -> np.ndarray:
    """(ranks,) pairs that each rank should hold: all alike if no server lives on a rank, else in proportion to its server."""
    weight = [0] * inputs.num_ranks
    for capacity, rank in zip(inputs.pool.capacity, inputs.pool.home, strict=True):
        if rank is not None:
            weight[rank] = capacity
    whole = sum(weight)
    return np.array([-(-total * w // whole) if whole else -(-total // inputs.num_ranks) for w in weight], np.int64)


def _home_server(segments: Segments, pool: Pool) -> np.ndarray:
    ranks = int(segments.rank.max(initial=0)) + 1
    server_of = np.full(ranks, NOBODY, np.int64)
    for server, rank in enumerate(pool.home):
        if rank is not None:
            server_of[rank] = server
    return server_of[segments.rank]


def _adopt(server, area, share):
    free = np.flatnonzero(server == NOBODY)
    if len(free) == 0:
        return server
    server = server.copy()
    room = share - sum_by(server[server >= 0], area[server >= 0], len(share))
    import heapq
    heap = [(-x, s) for s, x in enumerate(room.tolist())]
    heapq.heapify(heap)
    order = free[np.argsort(-area[free], kind="stable")]
    big = order[area[order] * 64 > share.min()]
    for p in big.tolist():
        x, s = heapq.heappop(heap)
        server[p] = s
        heapq.heappush(heap, (x + int(area[p]), s))
    small = order[len(big):]
    left = np.zeros(len(share), np.int64)
    for x, s in heap:
        left[s] = max(0, -x)
    by_room = np.argsort(-left, kind="stable")
    middle = np.cumsum(area[small]) - area[small] // 2 - 1
    slot = np.searchsorted(np.cumsum(left[by_room]), middle, side="right")
    server[small] = by_room[np.minimum(slot, len(share) - 1)]
    return server


def _surplus(server, area, pieces, load, limit):
    donors = np.flatnonzero((load > limit)[server] & (area > 0))
    density = area[donors] // np.maximum(pieces.q1 - pieces.q0, 1)[donors]
    donors = donors[np.lexsort((-density, server[donors]))]
    s = server[donors]
    w = area[donors]
    before = np.cumsum(w) - w
    first = np.searchsorted(s, s)  # of the same server
    before -= before[first] if len(first) else 0
    amount = np.clip((load - limit)[s] - before, 0, w)
    keep = amount > 0
    return donors[keep], amount[keep]


def _regions(b: Bands, area, amount, typical, group, block):
    """Top row of each export region, last key."""
    rows = b.q1 - b.q0
    left = crop(b, b.q0, b.q1, b.k0, b.q0).area()
    top = b.q0.copy()
    last = b.k1.copy()
    whole = amount >= area
    rect = np.maximum(rows, 1)
    e = np.minimum(amount, typical)
    w = np.array([max(1, isqrt(int(group * x))) for x in e], np.int64)
    part_cost = 2 * (amount // np.maximum(e, 1) + 1) * w
    part_cost = np.maximum(2 * w, 2 * amount // np.maximum(e // w, 1))
    all_cost = group * rows + np.maximum(amount // rect - w * 0, 0) * np.maximum(amount // np.maximum(e, 1) - 1, 0)
    columns = ~whole & (left >= amount + amount // 8) & (all_cost <= part_cost)
    last[columns] = b.q0[columns]
    rest = np.flatnonzero(~whole & ~columns)
    if len(rest):
        r, S = b[rest], amount[rest]
        h = np.maximum(S // w[rest], 1)
        n = 32
        step = np.maximum(-(-(r.q1 - r.q0) // n), 1)
        j = np.arange(1, n + 1)[:, None]
        cand = np.maximum((r.q1 - np.minimum(h + (j - 1) * step, r.q1 - r.q0)) // block * block, r.q0)
        flat = cand.ravel()
        idx = np.tile(np.arange(len(rest)), n)
        rr = r[idx]
        ok = (crop(rr, flat, rr.q1, rr.k0, flat).area() >= (S + S // 8)[idx]).reshape(n, -1)
        firstok = np.argmax(ok, axis=0)
        feasible = ok[firstok, np.arange(len(rest))]
        t = cand[firstok, np.arange(len(rest))]
        top[rest] = np.where(feasible, t, top[rest])
        last[rest] = np.where(feasible, t, last[rest])
        bad = rest[~feasible]
        if len(bad):
            r = b[bad]
            up = _row_where(r, area[bad] - amount[bad] - amount[bad] // 8, block, down=True)
            top[bad] = up
    return top, last


def _row_where(b, target, block, down=False):
    """The row at which the band's area above it is nearest to target."""
    return _search(lambda y: crop(b, b.q0, y, b.k0, b.k1).area(), b.q0, b.q1, target, block, down)


def _key_where(b, target, block):
    return _search(lambda x: crop(b, b.q0, b.q1, b.k0, x).area(), b.k0, b.k1, target, block)


def _search(area_up_to, low, high, target, block, down=False):
    """Multiple of block (or an end) at which area_up_to is nearest to the target."""
    lo, hi = low // block, -(-high // block)  # area(lo) <= target, area(hi) >= target
    at = lambda x: np.clip(x * block, low, high)  # noqa
    while len(lo) and int((hi - lo).max()) > 1:
        mid = (lo + hi) // 2
        less = area_up_to(at(mid)) <= target
        lo, hi = np.where(less, mid, lo), np.where(less, hi, mid)
    if down:
        return at(lo)
    a, b = area_up_to(at(lo)), area_up_to(at(hi))
    return at(np.where(target - a <= b - target, lo, hi))


def _export(segments, pieces, area, server, piece, amount, rooms, inputs):
    block, group = inputs.block, inputs.group
    if len(piece) == 0:
        return np.arange(len(area)), np.zeros(0, np.int64), pieces[:0], np.zeros(0, np.int64)
    receivers = np.argsort(-rooms, kind="stable")
    typical = int(rooms[receivers[0]])
    top, last = _regions(pieces[piece], area[piece], amount, typical, group, block)
    region = crop(pieces[piece], top, pieces.q1[piece], pieces.k0[piece], last)
    region_area = region.area()
    full = amount >= area[piece]
    # documents with most to give first, inside one: by rows
    document = segments.document[piece]
    by_doc = sum_by(document, amount, int(document.max()) + 1)
    order = np.lexsort((region.q0, document, -by_doc[document]))
    piece, amount, region, region_area, full, document = piece[order], amount[order], region[order], region_area[order], full[order], document[order]

    item_end = np.cumsum(amount)
    band_end, portion_end, portion_server, portion_band = _bands_of_line(document, amount, region, receivers, rooms, group)
    # parts: overlaps of bands and items
    total = int(item_end[-1])
    borders = np.unique(np.concatenate([[0], item_end, band_end]))
    part_start, part_end = borders[:-1], borders[1:]
    item = np.searchsorted(item_end, part_start, side="right")
    band = np.searchsorted(band_end, part_start, side="right")
    # rows of parts
    item_start = item_end - amount
    # cumulative region area at the part's end
    frac = _scale(part_end - item_start[item], region_area[item], amount[item])
    bottom = _row_where(region[item], frac, block)
    lastpart = np.append(item[1:] != item[:-1], True)
    bottom[lastpart] = region.q1[item[lastpart]]
    bottom = _at_least_a_block(bottom, item, region, block)
    # at least one block each
    firstpart = np.append(True, item[1:] != item[:-1])
    prev = np.where(firstpart, region.q0[item], np.roll(bottom, 1))
    parts = crop(region[item], prev, bottom, region.k0[item], region.k1[item])
    # tiles: every portion of the band in every part
    first_p = np.searchsorted(portion_band, np.arange(len(band_end)))
    count_p = np.diff(np.append(first_p, len(portion_band)))
    part_of = np.repeat(np.arange(len(parts)), count_p[band])
    offs = np.arange(len(part_of)) - np.repeat(np.cumsum(count_p[band]) - count_p[band], count_p[band])
    portion = first_p[band[part_of]] + offs
    band_start = np.append(0, band_end[:-1])
    done = portion_end[portion] - band_start[band[part_of]]
    width_of_band = band_end - band_start
    size = part_end - part_start
    # how much of the part's area lies left of this tile's right edge
    part_full = full[item]
    parea = parts.area()
    goal = np.where(part_full, parea, np.minimum(size, parea))
    target = _scale(done, goal[part_of], width_of_band[band[part_of]])
    right = _key_where(parts[part_of], target, block)
    lastp = offs == count_p[band[part_of]] - 1
    force = lastp & part_full[part_of]
    right[force] = parts.k1[part_of][force]
    left = np.where(offs == 0, parts.k0[part_of], np.roll(right, 1))
    tiles = crop(parts[part_of], parts.q0[part_of], parts.q1[part_of], left, right)
    tile_piece, tile_server = piece[item[part_of]], portion_server[portion]
    # what home keeps
    rest_left = right[lastp]
    whole = pieces[piece[item]]
    rest = crop(whole, parts.q0, parts.q1, rest_left, whole.k1)
    own = pieces[piece]
    above = crop(own, own.q0, region.q0, own.k0, own.k1)
    keep = np.ones(len(area), bool)
    keep[piece] = False
    return (np.flatnonzero(keep), np.concatenate([tile_piece, piece[item], piece]), _join(tiles, rest, above),
            np.concatenate([tile_server, server[piece[item]], server[piece]]))


def _at_least_a_block(bottom, item, region, block):
    """Move the lower borders of parts, in order, so that none inside an item is without rows where the item has enough."""
    first = np.searchsorted(item, item)
    number = np.arange(len(item)) - first
    count = np.searchsorted(item, item, side="right") - first
    low, high = region.q0[item] // block, -(-region.q1[item] // block)
    y = -(-bottom // block)
    lift = item * (int(high.max(initial=0)) + len(item) + 1)
    y = np.maximum.accumulate(np.maximum(y - number - 1, low) + lift) - lift + number + 1
    y = np.minimum(y, high - (count - 1 - number))
    return np.clip(y * block, region.q0[item], region.q1[item])


def _scale(x, up, down):
    """x * up // down without overflow, for x <= down."""
    shift = 0
    big = int(max(int(x.max(initial=0)), 1)) * int(max(int(up.max(initial=0)), 1))
    while big >> shift >= 1 << 62:
        shift += 1
    return (x >> shift) * up // np.maximum(down >> shift, 1) if shift else x * up // np.maximum(down, 1)


def _bands_of_line(document, amount, region, receivers, rooms, group):
    """Give every document's exports to receivers: whole rooms, largest first; what remains goes where it just fits."""
    rows = (region.q1 - region.q0).tolist()
    amounts, docs = amount.tolist(), document.tolist()
    waiting = sorted((room, -server) for server, room in enumerate(rooms.tolist()) if room)  # smallest room first
    band_end, portion_end, portion_server, portion_band = [], [], [], []
    pos, first = 0, 0
    while first < len(docs):
        last = bisect_right(docs, docs[first], lo=first) if False else first
        while last < len(docs) and docs[last] == docs[first]:
            last += 1
        left = sum(amounts[first:last])
        portions = []
        while left > 0 and waiting:
            fits = bisect_left(waiting, (left,))
            room, server = waiting.pop(min(fits, len(waiting) - 1))
            take = min(room, left)
            portions.append((take, -server))
            left -= take
            if room > take:
                insort(waiting, (room - take, server))
        item, item_end, at = first, pos + amounts[first], 0
        while at < len(portions):
            while pos >= item_end and item + 1 < last:
                item += 1
                item_end += amounts[item]
            width = amounts[item] // max(1, rows[item])
            size = max(1, isqrt(group * portions[at][0]))
            for take, server in portions[at : at + max(1, (2 * width + size) // (2 * size))]:
                pos += take
                at += 1
                portion_end.append(pos)
                portion_server.append(server)
                portion_band.append(len(band_end))
            band_end.append(pos)
        first = last
    return tuple(np.array(x, np.int64) for x in (band_end, portion_end, portion_server, portion_band))


def _join(*bands):
    return Bands(*(np.concatenate([getattr(b, c) for b in bands]) for c in Bands.__slots__))
