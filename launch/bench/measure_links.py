"""What do a worker's links cost on this machine, by transport?

Processes of the links alone: each opens links to its next `neighbours` workers round a ring, then says how long that
took and what it holds. Workers 0 and 1 also time a small message and one of 16 MiB, there and back.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.table import Table

from distca.launch.cluster.hosts import LOOPBACK
from distca.launch.cluster.store import connect_store, rendezvous_store
from distca.launch.process.parent import guard_parent
from distca.parallel.link import FORWARD, Header, Link
from distca.parallel.transport import SERVER_END, TRAINER_END, make_transport

LARGE, REPEATS, ANSWER_S = 16 << 20, 15, 300.0


def measure_links(transport: str, workers: int, neighbours: int, say: Callable[[str], None]) -> dict[str, float]:
    """Medians over workers, and the slowest worker's time to open; seconds, MiB and counts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distca.launch.bench.measure_links"])
    store, port = rendezvous_store(LOOPBACK, ANSWER_S)
    team = []
    for worker in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, transport, worker, workers, neighbours, port))
        process.start()
        theirs.close()
        team.append((process, ours))
    try:
        say(f"starting {workers} processes")
        before = [_answer(pipe) for _, pipe in team]
        say(f"opening {neighbours} links of each")
        for _, pipe in team:
            pipe.send("open")
        after = [_answer(pipe) for _, pipe in team]
        say("timing messages")
        team[0][1].send("time")
        times = _answer(team[0][1])
    finally:
        for process, _ in team:
            process.kill()
        for process, _ in team:
            process.join()
    return dict(
        transport=transport,
        workers=workers,
        neighbours=neighbours,
        open_s=max(a["open_s"] for a in after),
        threads_per_worker=_grown("threads", before, after),
        sockets_per_worker=_grown("sockets", before, after),
        grown_rss_mib_per_worker=_grown("rss_mib", before, after),
        pss_mib_per_worker=statistics.median(a["pss_mib"] for a in after),  # of the whole process
        **times,
    )


def _grown(key: str, before: list[dict[str, float]], after: list[dict[str, float]]) -> float:
    return statistics.median(a[key] - b[key] for a, b in zip(after, before, strict=True))


def table_of(found: Mapping[str, float]) -> Table:
    table = Table(title=f"links of {found['workers']} workers, {found['neighbours']} neighbours each")
    table.add_column("what")
    table.add_column(str(found["transport"]), justify="right")
    for name, value in found.items():
        if isinstance(value, (float, int)) and name not in ("workers", "neighbours"):
            table.add_row(name, f"{value:.4g}")
    return table


def _answer(pipe: Connection) -> dict[str, float]:
    if not pipe.poll(ANSWER_S):
        raise TimeoutError(f"a worker gave no answer within {ANSWER_S:g} s")
    return pipe.recv()


def _work(pipe: Connection, kind: str, worker: int, workers: int, neighbours: int, port: int) -> None:
    guard_parent()
    torch.set_num_threads(1)
    store = connect_store(LOOPBACK, port, ANSWER_S)
    pipe.send(_holdings())
    pipe.recv()
    start = time.perf_counter()
    transport = make_transport(kind, store, worker, workers, LOOPBACK, ANSWER_S, torch.device("cpu"))
    links = {}
    for trainer, server in _pairs(workers, neighbours):
        if worker in (trainer, server):
            end, peer = (TRAINER_END, server) if worker == trainer else (SERVER_END, trainer)
            links[trainer, server] = transport.open(peer, f"{trainer}-{server}", end)
    pipe.send(_holdings() | dict(open_s=time.perf_counter() - start))
    if worker == 1:
        _echo(links[0, 1])
    pipe.recv()
    pipe.send(_times(links[0, 1]))
    pipe.recv()


def _pairs(workers: int, neighbours: int) -> list[tuple[int, int]]:
    """Every worker with its next ones round the ring, each pair once, in one order for all (see `meetings`)."""
    pairs = {
        tuple(sorted((worker, (worker + away) % workers)))
        for worker in range(workers)
        for away in range(1, neighbours // 2 + neighbours % 2 + 1)
    }
    return sorted(pairs, key=lambda pair: (sum(pair) % workers, pair))


def _times(link: Link) -> dict[str, float]:
    return {
        "small_round_trip_us": 1e6 * _round_trip(link, 64),
        "16_mib_gb_per_s": 2 * LARGE / _round_trip(link, LARGE) / 1e9,
    }


def _round_trip(link: Link, size: int) -> float:
    data, seconds = torch.zeros(size, dtype=torch.uint8), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        link.send(Header(FORWARD), [data])
        link.wait_message()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _echo(link: Link) -> None:
    for _ in range(2 * REPEATS):
        header, payload = link.wait_message()
        link.send(header, [payload])


def _holdings() -> dict[str, float]:
    """What the kernel counts for this process: threads, sockets, memory in MiB."""
    held = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    shared = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    return dict(
        threads=float(held["Threads"]),
        sockets=float(sum(name.startswith("socket:") for name in names)),
        rss_mib=int(held["VmRSS"].split()[0]) / 1024,
        pss_mib=int(shared["Pss"].split()[0]) / 1024,
        open_s=0.0,
    )


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
