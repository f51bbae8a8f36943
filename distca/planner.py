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
                  then the smallest that is large enough; few edges, since a tile costs the square root of its work.
                  `_bands` groups them for the fewest rows moved: a server that holds rows of a document has, or must
                  fetch anyway, all keys up to there, so its tile lies leftmost and may be wider. All that is given lies
                  on one line, document by document:
                      given    | A stripe 1 |  A stripe 2       | B ...
                      bands    |   band 0      |  band 1  | b 2 | band 3 ...
                      portions | 8    | 9      | 11  | 3  | 4   | 4 ...
  4. `_tiles`     cut: every overlap on that line becomes rows of a region, split among its portions by cost

Cuts are searched on the cost of the mask's exact pairs, so any band mask and any cost are planned the same way; they
lie on multiples of `block`. What a cut is off by stays at home: a quarter of the tolerance is left for it. Where that
is not enough, stages 1 to 4 share out what is still too much, and where that is not enough either (`block` rows of a
long document on a small pool) `leveling.level` takes the rest out.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf, isqrt

import numpy as np

from distca.arrays import order_by, spread, sum_by
from distca.cost import Cost, PairCost
from distca.leveling import level
from distca.masks import Bands, Mask, MaskRule, crop, join, mask_of, tighten
from distca.payoff import fastest
from distca.placement import Segments, equal_rows, place_in_neighbourhoods, split_ranks
from distca.plan import MILLION, Plan, PlanInputs, Pool, bands_in, limits, shares

NOBODY = -1  # inside this file: no server
ROUNDS = 3  # a cut costs a server a little more than it saves another, unless costs are pairs; then one round is enough


def plan_step(inputs: PlanInputs, rule: MaskRule | Mask, direction: int = 0) -> Plan:
    """Plan one micro-batch under one of its mask rules and the cost of one direction, a number in `inputs.costs`. All
    plans of the same inputs have the same placement."""
    pool, cost = inputs.pool, inputs.costs[direction]
    # from here on documents go by their place in this order: their numbers decide nothing, but for the order of equally
    # long ones under a `Mask` that treats them differently
    by_length = order_by(int(inputs.lengths.max(initial=0)) - inputs.lengths)
    lengths = inputs.lengths[by_length]
    masks = {r: r.of_documents(by_length) if isinstance(r, Mask) else mask_of(r, lengths) for r in inputs.rules}
    work = sum(sum_by(m.document, c.of(m.bands), len(lengths)) for m in masks.values() for c in inputs.costs)
    inputs = replace(inputs, pool=_joined_neighbourhoods(pool, work))
    segments, homes, server = _homes(lengths, work, inputs)
    at, pieces = bands_in(masks[rule], homes.document, homes.start, homes.end)
    if isinstance(rule, Mask):  # a rule's bands are tight
        pieces = tighten(pieces)
        useful = pieces.q1 > pieces.q0
        at, pieces = at[useful], pieces[useful]
    costs = cost.of(pieces)
    server = _adopt(server, sum_by(at, costs, len(server)), shares(int(costs.sum()), pool))

    def plan_at(tolerance: int) -> Plan:
        document, bands, at_server = _even_out(homes.document[at], pieces, costs, server[at], cost, tolerance, inputs)
        document = by_length[document]
        order = order_by(document, bands.q0, bands.k0)
        return Plan(
            inputs.lengths,
            mask_of(rule, inputs.lengths),
            cost,
            replace(segments, document=by_length[segments.document]),
            pool,
            document[order],
            bands[order],
            at_server[order],
            tolerance,
            inputs.block,
        )

    return fastest(plan_at, inputs.tolerance, inputs.wires[direction]) if inputs.wires else plan_at(inputs.tolerance)


def plan_directions(inputs: PlanInputs, rule: MaskRule | Mask) -> tuple[Plan, Plan]:
    """The plans of forward and backward; the same one where one cost stands for both."""
    forward = plan_step(inputs, rule)
    if inputs.costs[-1] == inputs.costs[0] and inputs.wires[-1:] == inputs.wires[:1]:
        return forward, forward
    return forward, plan_step(inputs, rule, 1)


def _joined_neighbourhoods(pool: Pool, work: np.ndarray) -> Pool:
    """The pool with neighbourhoods joined, so many to one, until the longest document fits: else they would cost more
    than they save (bounded pools as in Libra, arXiv 2607.23250)."""
    number = pool.neighbourhoods
    while number > 1 and int(work.max(initial=0)) * number > int(work.sum()):
        number = next(number // n for n in range(2, number + 1) if number % n == 0)
    return replace(pool, neighbourhoods=number)


def _homes(lengths, work, inputs: PlanInputs) -> tuple[Segments, Segments, np.ndarray]:
    """Where rows lie, where planning starts from, and the server there or NOBODY: (segments,), (homes,), (homes,)."""
    pool, num_homes, total_rows = inputs.pool, inputs.num_ranks // inputs.pool.ranks_per_home, int(lengths.sum())
    rows, how = equal_rows(total_rows, num_homes), (inputs.group, inputs.block, pool.neighbourhoods)
    homes = place_in_neighbourhoods(lengths, work, _home_shares(pool, num_homes, int(work.sum())), rows, *how)
    segments = homes
    if pool.ranks_per_home > 1:
        assert total_rows % inputs.num_ranks == 0, f"{total_rows} rows for {inputs.num_ranks} ranks in groups"
        segments = split_ranks(homes, pool.ranks_per_home, total_rows // inputs.num_ranks)
    if any(home is not None for home in pool.home):
        return segments, homes, _home_servers(homes.rank, pool, num_homes)
    # no rows lie on a server: place documents once more, as if they did
    rows = equal_rows(total_rows, len(pool))
    homes = place_in_neighbourhoods(lengths, work, shares(int(work.sum()), pool), rows, *how)
    return segments, homes, homes.rank


def _home_shares(pool: Pool, num_homes: int, total: int) -> np.ndarray:
    """(homes,) work that each home should hold: in proportion to the server that lives there,
    all alike if none does."""
    weight = [0] * num_homes
    for capacity, home in zip(pool.capacity, pool.home, strict=True):
        if home is not None:
            weight[home] = capacity
    weight = weight if any(weight) else [1] * num_homes
    whole = sum(weight)
    return np.array([-(-total * w // whole) for w in weight], np.int64)


def _home_servers(home: np.ndarray, pool: Pool, num_homes: int) -> np.ndarray:
    """(N,) the server that lives in each home, or NOBODY."""
    server_of = np.full(num_homes, NOBODY, np.int64)
    for server, at in enumerate(pool.home):
        if at is not None:
            server_of[at] = server
    return server_of[home]


def _adopt(server: np.ndarray, costs: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(N,) servers where NOBODY's pieces, most work first, went to whoever had most room left: a home in name only."""
    orphans = np.flatnonzero((server == NOBODY) & (costs > 0))
    adopted = np.where(server == NOBODY, 0, server)
    if len(orphans) == 0:
        return adopted
    room = share - sum_by(server[server >= 0], costs[server >= 0], len(share))
    heap = [(-pairs, s) for s, pairs in enumerate(room.tolist())]
    heapq.heapify(heap)
    orphans = orphans[np.argsort(-costs[orphans], kind="stable")]
    for piece, amount in zip(orphans.tolist(), costs[orphans].tolist(), strict=True):
        key, adopted[piece] = heap[0]
        heapq.heapreplace(heap, (key + amount, int(adopted[piece])))
    return adopted


def _even_out(
    document, bands: Bands, costs, server, cost: Cost, tolerance: int, inputs: PlanInputs
) -> tuple[np.ndarray, Bands, np.ndarray]:
    """Tasks at home and their costs -> tasks of servers that are all within the tolerance: document, band, server."""
    pool = inputs.pool
    near_first = [pool.neighbourhood()] if pool.neighbourhoods > 1 else []
    for neighbourhood in [*near_first, *[np.zeros(len(pool), np.int64)] * ROUNDS]:
        total, load = int(costs.sum()), sum_by(server, costs, len(pool))
        if (load <= limits(total, pool, tolerance)).all():
            return document, bands, server
        limit = limits(total, pool, tolerance * 3 // 4)
        moved = _share_out(document, bands, costs, server, load, limit, neighbourhood, cost, inputs)
        stays = np.ones(len(bands), bool)
        stays[moved.given] = False
        stays = np.flatnonzero(stays)
        document = np.concatenate([document[stays], document[moved.piece]])
        bands, server = join(bands[stays], moved.tiles), np.concatenate([server[stays], moved.server])
        costs = np.concatenate([costs[stays], cost.of(moved.tiles)])
    total, share = int(costs.sum()), shares(int(costs.sum()), pool)
    allowed = limits(total, pool, tolerance)
    load = sum_by(server, costs, len(pool))
    if (load > allowed).any():
        largest_tile = int(share.min()) * tolerance // MILLION // 2
        task, cuts, at = level(bands, server, cost, share, allowed, inputs.block, largest_tile)
        levelled = sum_by(at, cost.of(cuts), len(pool))
        # costs other than pairs grow with every cut; and a small server may end up worse than a large one was, which
        # is better only where the large one was further above its limit than is promised
        breaks_promise = isinstance(cost, PairCost) and (load > allowed + inputs.block**2).any()
        if breaks_promise or _worst(levelled, pool) < _worst(load, pool):
            document, bands, server = document[task], cuts, at
    return document, bands, server


def _worst(load: np.ndarray, pool: Pool) -> int:
    """The largest load for its server's capacity, in millionths."""
    return max(MILLION * cost // capacity for cost, capacity in zip(load.tolist(), pool.capacity, strict=True))


@dataclass(frozen=True, slots=True)
class _Moved:
    """Pieces of which something is given away, and all their parts, those that stay included."""

    given: np.ndarray  # (E,) int64, numbers of pieces
    tiles: Bands  # (C,)
    piece: np.ndarray  # (C,) int64, the piece that a tile is part of
    server: np.ndarray  # (C,) int64


def _share_out(
    document, pieces: Bands, costs, server, load, limit, neighbourhood, cost: Cost, inputs: PlanInputs
) -> _Moved:
    """Stages 1 to 4: what goes where when no server may exceed `limit` and
    nothing leaves its `neighbourhood`, (servers,)."""
    # what lies of one document in different neighbourhoods is shared out like different documents
    document = document * (int(neighbourhood.max()) + 1) + neighbourhood[server]
    given, amount = _surplus(pieces, costs, server, load, limit)
    room = np.maximum(limit - load, 0)
    if len(given) == 0 or not room.any():
        return _Moved(given[:0], pieces[:0], given[:0], given[:0])
    total = int(costs.sum())
    pairs = total if isinstance(cost, PairCost) else int(pieces.area().sum())
    shape = _TileShape(inputs.group, pairs, total)
    of_document = sum_by(document[given], amount, int(document.max()) + 1)
    gives = of_document[document[given]]
    tile = np.minimum(gives, int(room.sum()) // np.count_nonzero(room))  # a usual one
    regions = _regions(pieces[given], costs[given], amount, tile, shape, cost, inputs.block)
    # documents that give most come first: they take the largest rooms
    order = order_by(int(gives.max()) - gives, document[given], regions.q0)
    given, amount, regions = given[order], amount[order], regions[order]
    near = (room >= room.max() // 8)[server] & (of_document > 0)[document]
    holders = _keys_at_hand(document[near], server[near], pieces.k1[near])
    line = _match(document[given], amount, regions, room, neighbourhood, holders, shape)
    tiles, item, tile_server = _tiles(regions, pieces[given], amount, amount == costs[given], line, cost, inputs.block)
    tile_piece = given[item]
    tile_server = np.where(tile_server == NOBODY, server[tile_piece], tile_server)
    tiles = tighten(tiles)
    useful = tiles.q1 > tiles.q0
    return _Moved(given, tiles[useful], tile_piece[useful], tile_server[useful])


@dataclass(frozen=True, slots=True)
class _TileShape:
    """What a tile should look like: `group` times as wide as high, `pairs` of the mask for each `cost`."""

    group: int
    pairs: int
    cost: int

    def pairs_of(self, cost: int) -> int:
        return cost * self.pairs // self.cost

    def width(self, cost: int) -> int:
        """Keys of a tile of that cost."""
        return max(1, isqrt(self.group * self.pairs_of(cost)))


def _surplus(pieces: Bands, costs, server, load, limit) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces of overloaded servers give away how much: those with most work per row first."""
    donors = np.flatnonzero((load > limit)[server] & (costs > 0))
    per_row = costs[donors] // (pieces.q1 - pieces.q0)[donors]
    donors = donors[order_by(server[donors], int(per_row.max(initial=0)) - per_row)]
    costs, server = costs[donors], server[donors]
    before = np.cumsum(costs) - costs
    first = np.searchsorted(server, np.arange(len(load)))
    before -= before[first[server]]  # counted from each server's own first piece
    amount = np.clip((load - limit)[server] - before, 0, costs)
    return donors[amount > 0], amount[amount > 0]


def _regions(pieces: Bands, costs, amount, tile, shape: _TileShape, cost: Cost, block: int) -> Bands:
    """(E,) the rows and keys from which each piece gives, with a little more than `amount` unless it gives all.

    Either all rows, and home needs fewer of the keys left of its own; or only so many of the last rows that a tile of
    cost `tile` gets its best shape, which is cheaper when little is given."""
    rows = pieces.q1 - pieces.q0
    width = np.array([shape.width(c) for c in tile.tolist()], np.int64)
    pairs = np.array([shape.pairs_of(c) for c in amount.tolist()], np.int64)
    num_tiles = -(-amount // np.maximum(tile, 1))
    cost_all = shape.group * rows + (num_tiles - 1) * pairs // rows
    cost_some = shape.group * pairs // width + pairs // rows  # few rows, but home needs all its keys
    wanted = amount + amount // 8
    left = cost.of(crop(pieces, pieces.q0, pieces.q1, pieces.k0, pieces.q0))  # below the diagonal for every row
    all_rows = (left >= wanted) & (2 * cost_all <= 3 * cost_some)  # few tiles get their best shape
    top, last = pieces.q0.copy(), np.where(all_rows, pieces.q0, pieces.k1)

    some = np.flatnonzero(~all_rows & (amount < costs))
    if len(some):
        # the first, that is highest, of some heights whose rectangle left of its own first row is large enough
        b, tries = pieces[some], 32
        height = pairs[some] // width[some] + np.arange(tries)[:, None] * -(-(b.q1 - b.q0) // tries)
        tops = np.maximum((b.q1 - height) // block * block, b.q0)
        tall = b[np.tile(np.arange(len(some)), tries)]
        large = cost.of(crop(tall, tops.ravel(), tall.q1, tall.k0, tops.ravel()))
        enough = large.reshape(tries, -1) >= wanted[some]
        found, chosen = enough.any(axis=0), tops[enough.argmax(axis=0), np.arange(len(some))]
        # none is: whole rows, with all the keys they see
        rest = np.maximum(costs[some] - wanted[some], 0)
        whole_rows = _search(lambda y: cost.of(replace(b, q1=y)), b.q0, b.q1, rest, block, down=True)
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


def _keys_at_hand(document, server, end) -> dict[int, dict[int, int]]:
    """For each document, the servers that hold rows of it and where the keys end that these rows see: a server needs
    them for its own rows, so a tile may use them for nothing."""
    holders = {}
    for d, s, key in zip(document.tolist(), server.tolist(), end.tolist(), strict=True):
        of_document = holders.setdefault(d, {})
        of_document[s] = max(of_document.get(s, 0), key)
    return holders


def _match(
    document, amount, regions: Bands, room, neighbourhood, holders: dict[int, dict[int, int]], shape: _TileShape
) -> _Line:
    """Receivers for every document's surplus, grouped into bands.

    `holders` with room for a document of which they hold rows come first: these keys do not move."""
    documents, amounts, rows = document.tolist(), amount.tolist(), (regions.q1 - regions.q0).tolist()
    # rooms are ordered in 64ths of the largest, so that a server which was promised a little less keeps its place
    unit = max(1, int(room.max()) // 64)
    room = room.tolist()
    entry = lambda server: ((room[server] + unit // 2) // unit, -server)  # noqa: E731
    everywhere = [[] for _ in range(int(neighbourhood.max()) + 1)]
    for server in np.flatnonzero(room).tolist():
        insort(everywhere[neighbourhood[server]], entry(server))
    band_end, portion_end, portion_band, portion_server = [], [], [], []
    at, first = 0, 0
    while first < len(documents):
        last = first
        while last < len(documents) and documents[last] == documents[first]:
            last += 1
        portions, left, held = [], sum(amounts[first:last]), holders.get(documents[first], {})
        waiting = everywhere[documents[first] % len(everywhere)]
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
        bands = _bands(portions, amounts[first:last], rows[first:last], held, shape)
        for band in [*bands, [(left, NOBODY)]] if left else bands:
            for pairs, server in band:
                at += pairs
                portion_end.append(at)
                portion_band.append(len(band_end))
                portion_server.append(server)
            band_end.append(at)
        first = last
    return _Line(*(np.array(x, np.int64) for x in (band_end, portion_end, portion_band, portion_server)))


def _bands(portions, amounts, rows, held: dict[int, int], shape: _TileShape) -> list[list[tuple[int, int]]]:
    """Portions (cost, server) of one document as bands, as many tiles wide as suits the rows they are cut from.

    Regions of early rows are narrow, so the smallest portion comes first, or the second smallest where keys that are at
    hand make it fit better. Beside it lies what would not move less alone."""
    ends, row_ends = [*accumulate(amounts)], [*accumulate(rows)]
    widths = [shape.pairs_of(amount) // max(1, r) for amount, r in zip(amounts, rows, strict=True)]

    def moved(band, start: int) -> int:
        """All query rows of the band once for each server, and the keys that it does not hold."""
        end = start + sum([cost for cost, _ in band])
        first = bisect_right(ends, start, 0, len(ends) - 1)
        last = bisect_left(ends, end, first, len(ends) - 1)
        height = row_ends[last] - (ends[last] - end) * rows[last] // amounts[last]
        height -= row_ends[first] - (ends[first] - start) * rows[first] // amounts[first]
        total, width = shape.group * len(band) * height, max(widths[first : last + 1])
        left, before = 0, 0
        for cost, server in band:
            before += cost
            right = width * before // (end - start)
            total += max(0, right - max(left, held.get(server, 0)))
            left = right
        return total

    def alone(cost: int, server: int) -> int:
        """What a portion moves in its best shape."""
        keys, pairs = held.get(server, 0), shape.pairs_of(cost)
        width = max(shape.width(cost), keys)
        return shape.group * pairs // width + width - keys

    def beside(band, others):
        return sorted(band + others, key=lambda portion: held.get(portion[1], inf))  # holders' keys lie left

    bands, at, rest = [], 0, sorted(portions)
    best = {server: alone(cost, server) for cost, server in portions}
    while rest:
        band, so_far = rest[:1], moved(rest[:1], at)
        if len(rest) > 1 and (rest[0][1] in held or rest[1][1] in held):
            instead = moved(rest[1:2], at)
            if instead - best[rest[1][1]] < so_far - best[rest[0][1]]:
                band, so_far = rest[1:2], instead
        rest.remove(band[0])
        while rest:
            wider = beside(band, rest[:1])
            together = moved(wider, at)
            if together > so_far + best[rest[0][1]]:
                break
            band, so_far, rest = wider, together, rest[1:]
        end = at + sum(cost for cost, _ in band)
        if 0 < len(rest) <= len(band) and moved(beside(band, rest), at) < so_far + moved(rest, end):
            band, rest = beside(band, rest), []
        bands.append(band)
        at = end
    return bands


def _tiles(regions: Bands, pieces: Bands, amount, all_given, line: _Line, cost: Cost, block: int):
    """Every part of the giving pieces as bands, the item (row of `regions`)
    each belongs to, its server or NOBODY for home."""
    item_end = np.minimum(np.cumsum(amount), line.band_end[-1])
    item_start, band_start = np.append(0, item_end[:-1]), np.append(0, line.band_end[:-1])
    borders = np.unique(np.concatenate([[0], item_end, line.band_end]))
    start, end = borders[:-1], borders[1:]
    item, band = np.searchsorted(item_end, start, side="right"), np.searchsorted(line.band_end, start, side="right")

    # rows of each part: as much of its region's area as the part is of what the piece gives
    inside = regions[item]
    above = _share(end - item_start[item], cost.of(inside), (item_end - item_start)[item])
    bottom = _search(lambda y: cost.of(replace(inside, q1=y)), inside.q0, inside.q1, above, block)
    bottom = _at_least_a_block(bottom, item, inside, block)
    top = np.where(np.append(True, item[1:] != item[:-1]), inside.q0, np.append(0, bottom[:-1]))
    parts = crop(inside, top, bottom, inside.k0, inside.k1)

    # keys of each tile: the band's portions side by side
    first = np.searchsorted(line.portion_band, band)
    count = np.searchsorted(line.portion_band, band, side="right") - first
    part, number = spread(count)
    portion = first[part] + number
    costs = cost.of(parts)
    goal = np.where(all_given[item], costs, np.minimum(end - start, costs))[part]
    wide = parts[part]
    left_area = _share(
        line.portion_end[portion] - band_start[band[part]], goal, (line.band_end - band_start)[band[part]]
    )
    right = _search(lambda x: cost.of(replace(wide, k1=x)), wide.k0, wide.k1, left_area, block)
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
    home = join(beside, over, under)
    items = np.concatenate([item[part], item, np.arange(len(pieces)), np.arange(len(pieces))])
    return join(tiles, home), items, np.append(line.portion_server[portion], np.full(len(home), NOBODY))


def _search(cost_up_to: Callable, low, high, target, block: int, down: bool = False) -> np.ndarray:
    """The multiples of `block` between low and high (or these) where a growing cost is nearest to target, or just
    below it."""
    at = lambda x: np.minimum(np.maximum(x * block, low), high)  # noqa: E731
    below, above = low // block, -(-high // block)
    for _ in range(int((above - below).max(initial=0)).bit_length()):
        middle = (below + above) // 2
        less = cost_up_to(at(middle)) <= target
        below, above = np.where(less, middle, below), np.where(less, above, middle)
    if down:
        return at(below)
    return at(np.where(target - cost_up_to(at(below)) <= cost_up_to(at(above)) - target, below, above))


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
    """amount * part // whole for part <= whole, where the product may not fit 64 bits:
    then to 31 bits of part / whole."""
    shift = max(0, int(whole.max(initial=1)).bit_length() + int(amount.max(initial=1)).bit_length() - 62)
    half = shift // 2
    return np.minimum(
        ((part >> (shift - half)) * (amount >> half) // np.maximum(whole >> (shift - half), 1)) << half, amount
    )
