"""How is the last unevenness of a plan taken out, exactly?

The planner's cuts may be off by a row block of a long document. Where a server ends above its limit because of that,
its tasks are cut into tiles; it keeps what fits, and the rest goes where there is room:

    released   |tile|tile| tile |tile|tile|  tile  |tile|      laid end to end
    rooms      |  server 2  |  server 0   | server 1 |         laid end to end beside it, largest first;
                                                               each tile goes where its middle falls

Tiles are `block` rows high and hold at most `largest` pairs, or block x block, so nobody ends more than one tile above
its share. Neighbouring tiles on one server are joined again.
"""

from __future__ import annotations

import numpy as np

from distca.arrays import spread, sum_by
from distca.cost import Cost
from distca.masks import Bands, crop, cut, join

HOMELESS = -1  # inside this file: no server yet


def level(
    bands: Bands, server: np.ndarray, cost: Cost, share: np.ndarray, limit: np.ndarray, block: int, largest: int
) -> tuple[np.ndarray, Bands, np.ndarray]:
    """Tasks and their servers -> (which task each new one is part of, its band, its server).

    Afterwards no server is above `limit` by more than one tile of `largest` pairs, if the cost is in pairs; else by
    its part of what the cuts cost, too."""
    largest = max(block**2, largest)
    piece, tiles, server = _keep_at_home(bands, server, cost, limit, block, largest)
    costs = cost.of(tiles)
    kept = sum_by(server[server >= 0], costs[server >= 0], len(share))
    server = _fill_rooms(costs, server, np.maximum(share - kept, 0))
    piece, tiles, server = _join(piece, tiles, server)
    return piece, cut(bands[piece], tiles.q0, tiles.q1, tiles.k0, tiles.k1), server


def _keep_at_home(
    pieces: Bands, home: np.ndarray, cost: Cost, limit: np.ndarray, block: int, largest_tile: int
) -> tuple[np.ndarray, Bands, np.ndarray]:
    """Tiles with the server that keeps them, HOMELESS for those released. Pieces that stay whole are one tile each."""
    costs = cost.of(pieces)
    at_ease = (sum_by(home, costs, len(limit)) <= limit)[home]
    whole, split = np.flatnonzero(at_ease & (costs > 0)), np.flatnonzero(~at_ease & (costs > 0))

    piece, tiles = _tile(pieces[split], block, largest_tile)
    piece, server = split[piece], np.full(len(piece), HOMELESS, np.int64)
    for donor in np.unique(home[split]):
        mine = np.flatnonzero(home[piece] == donor)
        # short documents first; inside one, early rows first
        mine = mine[np.argsort(costs[piece[mine]], kind="stable")]
        stays = np.cumsum(cost.of(tiles[mine])) <= limit[donor]
        server[mine[stays]] = donor
    return np.concatenate([whole, piece]), join(pieces[whole], tiles), np.concatenate([home[whole], server])


def _tile(bands: Bands, block: int, largest: int) -> tuple[np.ndarray, Bands]:
    """Cut bands into row blocks, and row blocks of more than `largest` pairs across the keys,
    all at multiples of `block`."""
    index, first = spread((bands.q1 - 1) // block - bands.q0 // block + 1)
    start = (bands.q0 // block)[index] * block + first * block
    rows = cut(bands[index], start, start + block, bands.k0[index], bands.k1[index])
    low, width = rows.k0 // block * block, largest // block // block * block
    step = np.where(rows.area() > largest, width, np.maximum(rows.k1 - low, 1))
    part_of, part = spread(np.where(rows.area() > 0, -(-(rows.k1 - low) // step), 0))
    low = low[part_of] + part * step[part_of]
    tiles = crop(rows[part_of], rows.q0[part_of], rows.q1[part_of], low, low + step[part_of])
    useful = tiles.area() > 0
    return index[part_of][useful], tiles[useful]


def _fill_rooms(costs: np.ndarray, server: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Give every HOMELESS tile a server: each goes where its middle falls when rooms are laid end to end,
    largest first."""
    free = np.flatnonzero(server == HOMELESS)
    order = np.argsort(-room, kind="stable")
    needed = int(costs[free].sum())
    room = room + max(0, needed - int(room.sum())) // len(room) + 1  # tiles may cost more than what they were cut from
    middle = np.cumsum(costs[free]) - costs[free] // 2 - 1
    slot = np.searchsorted(np.cumsum(room[order]), middle, side="right")
    filled = server.copy()
    filled[free] = order[np.minimum(slot, len(room) - 1)]
    return filled


def _join(piece: np.ndarray, tiles: Bands, server: np.ndarray) -> tuple[np.ndarray, Bands, np.ndarray]:
    """Join neighbours on one server: first along the keys of a row block, then row blocks that see all their keys."""
    order = np.lexsort((tiles.k0, tiles.q0, piece))
    piece, tiles, server = piece[order], tiles[order], server[order]
    first = np.flatnonzero(_changes(piece, tiles.q0, server))
    last = np.append(first[1:], len(piece)) - 1
    # a row block is whole when one server has it all;
    # then its key bounds are the piece's own and may grow with the rows
    alone = np.flatnonzero(_changes(piece, tiles.q0))
    whole = np.isin(first, alone) & np.isin(last + 1, np.append(alone, len(piece)))
    piece, server = piece[first], server[first]
    rows = Bands(tiles.q0[first], tiles.q1[first], tiles.k0[first], tiles.k1[last], tiles.lo[first], tiles.hi[first])

    fresh = _changes(piece, server) | ~whole | ~np.append(False, whole[:-1])
    first = np.flatnonzero(fresh)
    if len(first) == 0:
        return piece, rows, server
    joined = Bands(
        rows.q0[first],
        np.maximum.reduceat(rows.q1, first),
        np.minimum.reduceat(rows.k0, first),
        np.maximum.reduceat(rows.k1, first),
        rows.lo[first],
        rows.hi[first],
    )
    return piece[first], joined, server[first]


def _changes(*columns: np.ndarray) -> np.ndarray:
    """True where any column differs from the entry before; the first entry counts as a change."""
    fresh = np.ones(len(columns[0]), bool)
    if len(fresh) > 1:
        fresh[1:] = np.any([c[1:] != c[:-1] for c in columns], axis=0)
    return fresh
