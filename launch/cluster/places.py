"""Which worker goes to which host?

A decision from numbers alone: how many workers each host has room for, and how trainers and dedicated servers are to
lie. What every answer guarantees:
  - no host gets more workers than it has room for;
  - trainers of one host have consecutive ranks, and its servers consecutive numbers;
  - trainers are on as few hosts as possible, but for `spread`; with `apart` on none that has a dedicated server;
  - equal rooms in equal order give equal places.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from distca.config import Placement


def places_of(rooms: Sequence[int], trainers: int, servers: int, placement: Placement) -> list[int] | None:
    """The host of each worker, trainers first, as a number in `rooms`; None where they do not fit so. Among equals the
    earlier host is taken."""
    largest_first = sorted(range(len(rooms)), key=lambda host: -rooms[host])
    if placement == "spread":
        of_trainers = _spread(rooms, [0] * len(rooms), trainers)
        of_servers = of_trainers and _spread(rooms, of_trainers, servers)
        order = range(len(rooms))
    elif placement == "beside":
        of_trainers = _filled(rooms, largest_first, trainers)
        order = sorted(largest_first, key=lambda host: not (of_trainers and of_trainers[host]))
        left = [room - taken for room, taken in zip(rooms, of_trainers or rooms, strict=True)]
        of_servers = of_trainers and _filled(left, order, servers)
    else:
        of_trainers, of_servers = _apart(rooms, largest_first, trainers, servers)
        order = largest_first
    if not of_trainers or not of_servers:
        return None
    return [host for counts in (of_trainers, of_servers) for host in order for _ in range(counts[host])]


def shared_out(
    cpus: Sequence[float], threads: int, trainers: int, servers: int, placement: Placement
) -> tuple[float, list[int]] | None:
    """The most CPUs, up to `threads`, that each worker can have on hosts of so many, in hundredths, and the places that
    go with it. None where not even 0.01 of one makes them fit."""
    workers = trainers + servers
    shares = {min(100 * threads, int(100 * n / k)) for n in cpus for k in range(1, workers + 1)} - {0} | {1}
    ascending = sorted(shares)

    def places(share: int) -> list[int] | None:
        return places_of([int(100 * n) // share for n in cpus], trainers, servers, placement)

    # smaller shares leave more room: the first that does not fit ends those that do
    fitting = bisect_right(ascending, False, key=lambda share: places(share) is None)
    if not fitting:
        return None
    share = ascending[fitting - 1]
    return share / 100, places(share)


def cpus_there(cpus: Sequence[float], threads: int, places: Sequence[int]) -> float:
    """The most CPUs, up to `threads`, that each worker can have at its place, in hundredths; 0 where one finds none."""
    return min(100 * threads, *(int(100 * cpus[host] / number) for host, number in Counter(places).items())) / 100


def who_is_where(hosts: Sequence[str], trainers: int) -> str:
    """For people: which workers are on which host; `hosts` of the trainers, then of the servers."""
    named: dict[str, list[str]] = {}
    for role, of_role in (("trainer", hosts[:trainers]), ("server", hosts[trainers:])):
        for host, number in Counter(of_role).items():
            first = of_role.index(host)
            span = f"{role} {first}" if number == 1 else f"{role}s {first}-{first + number - 1}"
            named.setdefault(host, []).append(span)
    return "; ".join(f"{host}: {', '.join(spans)}" for host, spans in named.items())


def _filled(rooms: Sequence[int], order: Sequence[int], workers: int) -> list[int] | None:
    """How many workers each host gets if one after the other is filled."""
    counts = [0] * len(rooms)
    for host in order:
        counts[host] = min(rooms[host], workers)
        workers -= counts[host]
    return None if workers else counts


def _spread(rooms: Sequence[int], before: Sequence[int], workers: int) -> list[int] | None:
    """How many each host gets if they are as even as rooms allow; of equal hosts that with fewer workers `before`."""
    counts = [0] * len(rooms)
    for _ in range(workers):
        free = [host for host, room in enumerate(rooms) if before[host] + counts[host] < room]
        if not free:
            return None
        counts[min(free, key=lambda host: (counts[host], before[host]))] += 1
    return counts


def _apart(
    rooms: Sequence[int], largest_first: Sequence[int], trainers: int, servers: int
) -> tuple[list[int] | None, list[int] | None]:
    """Trainers on the fewest hosts that leave enough others for the servers; of as many hosts, on the smallest."""
    enough = max(trainers, servers)  # more room on one host makes no difference, and keeps the sums below small
    useful = [min(room, enough) for room in rooms]
    fewest: dict[int, tuple[int, ...]] = {0: ()}  # room -> the fewest hosts that have it together
    for host, room in enumerate(useful):
        for before, hosts in list(fewest.items()):
            if before >= trainers or not room:
                continue
            if before + room not in fewest or len(hosts) + 1 < len(fewest[before + room]):
                fewest[before + room] = (*hosts, host)
    found = [(len(hosts), room, hosts) for room, hosts in fewest.items() if trainers <= room <= sum(useful) - servers]
    if not found:
        return None, None
    _, _, hosts = min(found)
    of_trainers = _filled(rooms, [host for host in largest_first if host in hosts], trainers)
    others = [0 if taken else room for room, taken in zip(rooms, of_trainers, strict=True)]
    return of_trainers, _spread(others, [0] * len(rooms), servers)
