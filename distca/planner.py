"""Cut core attention into CA-tasks and give every server of the pool the same predicted work for its capacity.

A decision from integers alone: equal inputs give an equal plan, on every rank, machine and run.

Most of the work is done where `placement.place` put the rows, and never cut. Only the *surplus* moves: what a server's
rows need beyond its limit. It is cut off the documents with most work per row, as rectangles far from the diagonal:

           keys  0              X                   One document, three stripes on three ranks.
    rows   0     \\
    rank 5       | \\             server 5 has time    home   keeps the columns next to the diagonal: it holds
                 |   \\           left                        these keys already
    rows 16K     +-----+-\\                           tile   a receiver's rectangle: `group` times as wide as high,
    rank 0       |tile |   \\                                because a moved query row costs `group` moved key rows
                 |  8  |home \\                       band   tiles side by side, one row range; the last band of a
    rows 32K     +--+--+-------\\                            stripe goes on in the next, so a tile may cross the
    rank 1       |8 |tile|       \\                          border between two ranks
                 |  |  9 |  home   \\
                 +--+----+-----------\\
                 |tile 11| home        \\
                 +-------+---------------\\

  1. `_surplus`   which pieces (rows of one document on one rank) give away how many pairs
  2. `_regions`   from which rows and keys of each piece
  3. `_match`     to whom: whole rooms, those of servers that hold some of the document's keys first, then the largest,
                  then the smallest that is large enough; few edges, since a tile costs the square root of its work. All
                  that is given lies on one line, document by document:
                      given    | A stripe 1 |  A stripe 2       | B ...
                      bands    |   band 0      |  band 1  | b 2 | band 3 ...
                      portions | 8    | 9      | 11  | 3  | 4   | 4 ...
  4. `_tiles`     cut: every overlap on that line becomes rows of a region, split among its portions by exact area

Cuts are searched on the mask's exact area, so any band mask is planned the same way; they lie on multiples of `block`.
What a cut is off by stays at home: a quarter of the tolerance is left for that, and where it is not enough
(`block` rows of a long document on a small pool) `leveling.level` takes the rest out.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np

from distca.arrays import order_by, spread, sum_by
from distca.leveling import level
from distca.masks import Bands, MaskRule, bands_of, crop, cut
from distca.placement import place
from distca.plan import MILLION, Plan, PlanInputs, Pool, limits, shares

NOBODY = -1  # inside this file: no server


def plan_step(inputs: PlanInputs, rule: MaskRule) -> Plan:
    """Plan one micro-batch under one of its mask rules. Every rule of the same inputs gets the same placement."""
    pool, total_rows = inputs.pool, int(inputs.lengths.sum())
    # from here on documents go by their place in this order: their numbers decide nothing
    by_length = order_by(int(inputs.lengths.max(initial=0)) - inputs.lengths)
    lengths = inputs.lengths[by_length]
    documents = bands_of(rule, lengths)
    work = sum(bands_of(r, lengths).area() for r in inputs.rules)
    total_work = int(work.sum())
    rows = np.full(inputs.num_ranks, total_rows // inputs.num_ranks)
    segments = place(lengths, work, _rank_shares(inputs, total_work), rows, inputs.group, inputs.block)

    if any(home is not None for home in pool.home):
        homes, server = segments, _home_servers(segments.rank, pool, inputs.num_ranks)
    else:  # no rows lie on a server: place documents once more, as if they did
        spread = np.diff(np.arange(len(pool) + 1) * total_rows // len(pool))
        homes = place(lengths, work, shares(total_work, pool), spread, inputs.group, inputs.block)
        server = homes.rank
    whole = documents[homes.document]
    pieces = cut(whole, homes.start, homes.end, whole.k0, whole.k1)
    area = pieces.area()
    total = int(area.sum())
    server = _adopt(server, area, shares(total, pool))
    load = sum_by(server, area, len(pool))

    limit = limits(total, pool, inputs.tolerance * 3 // 4)
    moved = _share_out(homes.document, pieces, area, server, load, limit, inputs)
    stays = area > 0
    stays[moved.given] = False
    document = by_length[np.concatenate([homes.document[stays], homes.document[moved.piece]])]
    bands, server = _join(pieces[stays], moved.tiles), np.concatenate([server[stays], moved.server])
    allowed = limits(total, pool, inputs.tolerance)
    if (sum_by(server, bands.area(), len(pool)) > allowed).any():
        share = shares(total, pool)
        largest_tile = int(share.min()) * inputs.tolerance // MILLION // 2
        task, bands, server = level(bands, server, share, allowed, inputs.block, largest_tile)
        document = document[task]
    order = order_by(document, bands.q0, bands.k0)
    return Plan(
        inputs.lengths,
        rule,
        replace(segments, document=by_length[segments.document]),
        pool,
        document[order],
        bands[order],
        server[order],
        inputs.tolerance,
        inputs.block,
    )


def _rank_shares(inputs: PlanInputs, total: int) -> np.ndarray:
    """(ranks,) pairs that each rank should hold: in proportion to the server that lives there, all alike if none
    does."""
    weight = [0] * inputs.num_ranks
    for capacity, rank in zip(inputs.pool.capacity, inputs.pool.home, strict=True):
        if rank is not None:
            weight[rank] = capacity
    weight = weight if any(weight) else [1] * inputs.num_ranks
    return np.array([-(-total * w // sum(weight)) for w in weight], np.int64)


def _home_servers(rank: np.ndarray, pool: Pool, num_ranks: int) -> np.ndarray:
    """(N,) the server that lives on each rank, or NOBODY."""
    server_of = np.full(num_ranks, NOBODY, np.int64)
    for server, home in enumerate(pool.home):
        if home is not None:
            server_of[home] = server
    return server_of[rank]


def _adopt(server: np.ndarray, area: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(N,) servers where NOBODY's pieces, most work first, went to whoever had most room left: a home in name only."""
    orphans = np.flatnonzero((server == NOBODY) & (area > 0))
    adopted = np.where(server == NOBODY, 0, server)
    if len(orphans) == 0:
        return adopted
    room = share - sum_by(server[server >= 0], area[server >= 0], len(share))
    heap = [(-pairs, s) for s, pairs in enumerate(room.tolist())]
    heapq.heapify(heap)
    orphans = orphans[np.argsort(-area[orphans], kind="stable")]
    for piece, pairs in zip(orphans.tolist(), area[orphans].tolist(), strict=True):
        key, adopted[piece] = heap[0]
        heapq.heapreplace(heap, (key + pairs, int(adopted[piece])))
    return adopted


@dataclass(frozen=True, slots=True)
class _Moved:
    """Pieces of which something is given away, and all their parts, those that stay included."""

    given: np.ndarray  # (E,) int64, numbers of pieces
    tiles: Bands  # (C,)
    piece: np.ndarray  # (C,) int64, the piece that a tile is part of
    server: np.ndarray  # (C,) int64


def _share_out(document, pieces: Bands, area, server, load, limit, inputs: PlanInputs) -> _Moved:
    """Stages 1 to 4: what goes where when no server may exceed `limit`."""
    given, amount = _surplus(pieces, area, server, load, limit)
    room = np.maximum(limit - load, 0)
    if len(given) == 0 or not room.any():
        return _Moved(given[:0], pieces[:0], given[:0], given[:0])
    regions = _regions(pieces[given], area[given], amount, int(room.max()), inputs.group, inputs.block)
    # documents that give most come first: they take the largest rooms
    of_document = sum_by(document[given], amount, len(inputs.lengths))[document[given]]
    order = order_by(int(of_document.max()) - of_document, document[given], regions.q0)
    given, amount, regions = given[order], amount[order], regions[order]
    near = (room >= room.max() // 8)[server] & np.isin(document, document[given])
    holders = _servers_of(document[near], server[near])
    line = _match(document[given], amount, regions, room, holders, inputs.group)
    tiles, item, tile_server = _tiles(regions, pieces[given], amount, amount == area[given], line, inputs.block)
    tile_piece = given[item]
    tile_server = np.where(tile_server == NOBODY, server[tile_piece], tile_server)
    tiles = cut(tiles, tiles.q0, tiles.q1, tiles.k0, tiles.k1)
    useful = tiles.q1 > tiles.q0
    return _Moved(given, tiles[useful], tile_piece[useful], tile_server[useful])


def _surplus(pieces: Bands, area, server, load, limit) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces of overloaded servers give away how many pairs: those with most work per row first."""
    donors = np.flatnonzero((load > limit)[server] & (area > 0))
    per_row = area[donors] // (pieces.q1 - pieces.q0)[donors]
    donors = donors[np.lexsort((-per_row, server[donors]))]
    before = np.cumsum(area[donors]) - area[donors]
    before -= before[np.searchsorted(server[donors], server[donors])]  # counted from each server's own first piece
    amount = np.clip((load - limit)[server[donors]] - before, 0, area[donors])
    return donors[amount > 0], amount[amount > 0]


def _regions(pieces: Bands, area, amount, largest_room: int, group: int, block: int) -> Bands:
    """(E,) the rows and keys from which each piece gives, with a little more than `amount` pairs unless it gives all.

    Either all rows, and home needs fewer of the keys left of its own; or only so many of the last rows that tiles get
    their
    best shape, which is cheaper when little is given."""
    rows = pieces.q1 - pieces.q0
    tile = np.minimum(amount, largest_room)
    width = np.array([max(1, isqrt(group * pairs)) for pairs in tile.tolist()], np.int64)  # of a tile of the best shape
    num_tiles = -(-amount // np.maximum(tile, 1))
    cost_all = group * rows + (num_tiles - 1) * amount // rows
    cost_some = 2 * width * np.maximum(amount // np.maximum(tile, 1), 1)
    wanted = amount + amount // 8
    left = crop(pieces, pieces.q0, pieces.q1, pieces.k0, pieces.q0).area()  # below the diagonal for every row
    all_rows = (left >= wanted) & (cost_all <= cost_some)
    top, last = pieces.q0.copy(), np.where(all_rows, pieces.q0, pieces.k1)

    some = np.flatnonzero(~all_rows & (amount < area))
    if len(some):
        # the first, that is highest, of some heights whose rectangle left of its own first row is large enough
        b, tries = pieces[some], 32
        height = amount[some] // width[some] + np.arange(tries)[:, None] * -(-(b.q1 - b.q0) // tries)
        tops = np.maximum((b.q1 - height) // block * block, b.q0)
        tall = b[np.tile(np.arange(len(some)), tries)]
        enough = crop(tall, tops.ravel(), tall.q1, tall.k0, tops.ravel()).area().reshape(tries, -1) >= wanted[some]
        found, chosen = enough.any(axis=0), tops[enough.argmax(axis=0), np.arange(len(some))]
        # none is: whole rows, with all the keys they see
        rest = np.maximum(area[some] - wanted[some], 0)
        whole_rows = _search(lambda y: crop(b, b.q0, y, b.k0, b.k1).area(), b.q0, b.q1, rest, block, down=True)
        top[some] = np.where(found, chosen, whole_rows)
        last[some] = np.where(found, chosen, b.k1)
    return crop(pieces, top, pieces.q1, pieces.k0, last)


@dataclass(frozen=True, slots=True)
class _Line:
    """All that is given, laid end to end: where bands end, and the portions (one receiver's part of one band)."""

    band_end: np.ndarray  # (B,) int64
    portion_end: np.ndarray  # (P,) int64
    portion_band: np.ndarray  # (P,) int64
    portion_server: np.ndarray  # (P,) int64


def _servers_of(document, server) -> dict[int, set[int]]:
    """The servers that hold rows of each document."""
    holders = {}
    for d, s in zip(document.tolist(), server.tolist(), strict=True):
        holders.setdefault(d, set()).add(s)
    return holders


def _match(document, amount, regions: Bands, room, holders: dict[int, set[int]], group: int) -> _Line:
    """Receivers for every document's surplus, grouped into bands that are as many tiles wide as suits the region.

    `holders` with room for a document of which they hold rows come first: these keys do not move."""
    documents, amounts, rows = document.tolist(), amount.tolist(), (regions.q1 - regions.q0).tolist()
    # rooms are ordered in 64ths of the largest, so that a server which was promised a little less keeps its place
    unit = max(1, int(room.max()) // 64)
    room = room.tolist()
    entry = lambda server: ((room[server] + unit // 2) // unit, -server)  # noqa: E731
    waiting = sorted(entry(server) for server, pairs in enumerate(room) if pairs)
    band_end, portion_end, portion_band, portion_server = [], [], [], []
    at, first = 0, 0
    while first < len(documents):
        last = first
        while last < len(documents) and documents[last] == documents[first]:
            last += 1
        portions, left, held = [], sum(amounts[first:last]), holders.get(documents[first], ())
        near = sorted((s for s in held if room[s]), key=lambda s: (-room[s], s))
        while left and waiting:
            while near and room[near[0]] > left:
                del near[0]
            if near:
                chosen = bisect_left(waiting, entry(near.pop(0)))
            else:
                chosen = min(bisect_left(waiting, (left // unit + 2,)), len(waiting) - 1)
            server = -waiting.pop(chosen)[1]
            portions.append((min(room[server], left), server))
            left -= portions[-1][0]
            room[server] -= portions[-1][0]
            if room[server]:
                insort(waiting, entry(server))
        portions.sort(key=lambda portion: -portion[0])

        piece, piece_end = first, at + amounts[first]
        while portions:
            while at >= piece_end and piece + 1 < last:
                piece += 1
                piece_end += amounts[piece]
            width, tile = amounts[piece] // max(1, rows[piece]), max(1, isqrt(group * portions[0][0]))
            abreast = max(1, (2 * width + tile) // (2 * tile))
            band, rest = portions[:abreast], portions[abreast:]
            if len(rest) <= abreast and _cheaper_together(band, rest, width, group):
                band, rest = portions, []
            for pairs, server in sorted(band, key=lambda portion: portion[1] not in held):  # holders' keys lie left
                at += pairs
                portion_end.append(at)
                portion_band.append(len(band_end))
                portion_server.append(server)
            portions = rest
            band_end.append(at)
        first = last
    return _Line(*(np.array(x, np.int64) for x in (band_end, portion_end, portion_band, portion_server)))


def _cheaper_together(band, rest, width: int, group: int) -> bool:
    """Do two lists of (pairs, server) move fewer rows as one band? One of n tiles and p pairs moves n * p / width query
    rows and `width` key rows."""
    crossed = len(rest) * sum(pairs for pairs, _ in band) + len(band) * sum(pairs for pairs, _ in rest)
    return group * crossed < width * width


def _tiles(regions: Bands, pieces: Bands, amount, all_given, line: _Line, block: int):
    """Every part of the giving pieces as bands, the item (row of `regions`) each belongs to, its server or NOBODY for
    home."""
    item_end = np.minimum(np.cumsum(amount), line.band_end[-1])
    item_start, band_start = np.append(0, item_end[:-1]), np.append(0, line.band_end[:-1])
    borders = np.unique(np.concatenate([[0], item_end, line.band_end]))
    start, end = borders[:-1], borders[1:]
    item, band = np.searchsorted(item_end, start, side="right"), np.searchsorted(line.band_end, start, side="right")

    # rows of each part: as much of its region's area as the part is of what the piece gives
    inside = regions[item]
    above = _share(end - item_start[item], inside.area(), (item_end - item_start)[item])
    bottom = _search(
        lambda y: crop(inside, inside.q0, y, inside.k0, inside.k1).area(), inside.q0, inside.q1, above, block
    )
    bottom = _at_least_a_block(bottom, item, inside, block)
    top = np.where(np.append(True, item[1:] != item[:-1]), inside.q0, np.append(0, bottom[:-1]))
    parts = crop(inside, top, bottom, inside.k0, inside.k1)

    # keys of each tile: the band's portions side by side
    first = np.searchsorted(line.portion_band, band)
    count = np.searchsorted(line.portion_band, band, side="right") - first
    part, number = spread(count)
    portion = first[part] + number
    goal = np.where(all_given[item], parts.area(), np.minimum(end - start, parts.area()))[part]
    wide = parts[part]
    left_area = _share(
        line.portion_end[portion] - band_start[band[part]], goal, (line.band_end - band_start)[band[part]]
    )
    right = _search(lambda x: crop(wide, wide.q0, wide.q1, wide.k0, x).area(), wide.k0, wide.k1, left_area, block)
    outermost = number == count[part] - 1
    right = np.where(outermost & all_given[item[part]], wide.k1, right)
    left = np.where(number == 0, wide.k0, np.append(0, right[:-1]))
    tiles = crop(wide, wide.q0, wide.q1, left, right)

    # home keeps what is right of the tiles, and the rows above the region or below its last part
    own = pieces[item]
    beside = crop(own, parts.q0, parts.q1, right[outermost], own.k1)
    over = crop(pieces, pieces.q0, regions.q0, pieces.k0, pieces.k1)
    covered = np.full(len(pieces), 0, np.int64)
    np.maximum.at(covered, item, parts.q1)
    under = crop(pieces, np.maximum(covered, regions.q0), pieces.q1, pieces.k0, pieces.k1)
    home = _join(beside, over, under)
    items = np.concatenate([item[part], item, np.arange(len(pieces)), np.arange(len(pieces))])
    return _join(tiles, home), items, np.append(line.portion_server[portion], np.full(len(home), NOBODY))


def _search(area_up_to: Callable, low, high, target, block: int, down: bool = False) -> np.ndarray:
    """The multiples of `block` between low and high (or these) where a growing area is nearest to target, or just
    below it."""
    at = lambda x: np.minimum(np.maximum(x * block, low), high)  # noqa: E731
    below, above = low // block, -(-high // block)
    for _ in range(int((above - below).max(initial=0)).bit_length()):
        middle = (below + above) // 2
        less = area_up_to(at(middle)) <= target
        below, above = np.where(less, middle, below), np.where(less, above, middle)
    if down:
        return at(below)
    return at(np.where(target - area_up_to(at(below)) <= area_up_to(at(above)) - target, below, above))


def _at_least_a_block(bottom, item, inside: Bands, block: int) -> np.ndarray:
    """Lower borders of parts, moved so that no part of an item is without rows if there are enough; an item's last is
    its end."""
    first = np.searchsorted(item, item)
    number, count = np.arange(len(item)) - first, np.searchsorted(item, item, side="right") - first
    low, high = inside.q0 // block, -(-inside.q1 // block)
    lift = item * (int(high.max(initial=0)) + len(item) + 1)  # lets one running maximum serve all items
    rows = np.maximum.accumulate(np.maximum(-(-bottom // block) - number - 1, low) + lift) - lift + number + 1
    rows = np.minimum(rows, high - (count - 1 - number)) * block
    return np.where(number == count - 1, inside.q1, np.minimum(np.maximum(rows, inside.q0), inside.q1))


def _share(part, amount, whole) -> np.ndarray:
    """amount * part // whole for part <= whole, where the product may not fit 64 bits: then to 31 bits of part /
    whole."""
    shift = max(0, int(whole.max(initial=1)).bit_length() + int(amount.max(initial=1)).bit_length() - 62)
    half = shift // 2
    return np.minimum(
        ((part >> (shift - half)) * (amount >> half) // np.maximum(whole >> (shift - half), 1)) << half, amount
    )


def _join(*bands: Bands) -> Bands:
    return Bands(*(np.concatenate([getattr(b, column) for b in bands]) for column in Bands.__slots__))
