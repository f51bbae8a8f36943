"""What does a dedicated attention server do, and how do workers meet?

A plain class; `distca.launch.cluster.workers` gives it a process. It needs neither the model nor DeepSpeed, so it
starts in half a trainer's time.
"""

from __future__ import annotations

import resource
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distca.config import RunSettings
from distca.launch.cluster.hosts import own_addresses
from distca.launch.cluster.store import connect_store
from distca.parallel.link import Link
from distca.parallel.server import AttentionServer, ServerReport
from distca.parallel.transport import SERVER_END, TRAINER_END, Transport, make_transport
from distca.plan import Pool, make_pool
from distca.trace import Span, Trace, read_clock
from distca.transports import choose_transport


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where workers find each other."""

    host: str
    """Address of the driver's store; workers bind their links to this machine's address towards it."""
    port: int


class DedicatedServer:
    """A worker that only computes core attention."""

    def __init__(self, number: int, settings: RunSettings, meeting: Meeting, device: str):
        torch.set_num_threads(settings.parallel.threads)
        self._number, self._settings, self._meeting = number, settings, meeting
        self._device = torch.device(device)
        self._trace = Trace()
        self._server = AttentionServer(number, backend_of(settings), self._device, meet=self._meet, trace=self._trace)

    def connect(self, name: str = "") -> None:
        """Open the links to all trainers; servers of several pools that meet at one store give theirs a name."""
        store = connect_store(self._meeting.host, self._meeting.port, self._settings.parallel.start_timeout_s)
        self._store = dist.PrefixStore(name, store) if name else store
        worker = worker_of(self._number, self._settings)
        self._transport = transport_of(self._store, worker, self._settings, self._meeting, self._device)
        self._meet(rank for rank, server in first_meetings(self._settings) if server == self._number)

    def _meet(self, ranks: Iterable[int]) -> None:
        for rank, server in in_turn([(rank, self._number) for rank in ranks], self._settings):
            self._server.serve(rank, open_link(self._transport, rank, server, SERVER_END, self._settings))

    def record(self, is_on: bool) -> list[Span]:
        """See `Trace.record`."""
        return self._trace.record(is_on)

    def read_clock(self) -> tuple[str, float]:
        return read_clock()

    def take_report(self) -> tuple[ServerReport, float]:
        """What it did since the last call, and its largest memory in MiB."""
        return self._server.take_report(), rss_mib()


def backend_of(settings: RunSettings) -> str:
    return "torch" if settings.kernels.backend == "auto" else settings.kernels.backend


def pool_of(settings: RunSettings) -> Pool:
    p = settings.parallel
    return make_pool(p.trainers, p.servers, p.trainers_serve, p.trainer_capacity)


def announcers(settings: RunSettings) -> list[tuple[int, int]]:
    """(trainer, server): the trainer that tells each dedicated server what is planned; one is enough."""
    dedicated = [server for server, home in enumerate(pool_of(settings).home) if home is None]
    return [(n % settings.parallel.trainers, server) for n, server in enumerate(dedicated)]


def first_meetings(settings: RunSettings) -> list[tuple[int, int]]:
    """(trainer, server) of every link that is opened at the start. Others are when a plan first names the pair, but for
    links that are groups of two: to open one of these stops all threads of a process until the other side comes."""
    parallel, pool = settings.parallel, pool_of(settings)
    if choose_transport(parallel.transport, parallel.trainers + parallel.servers) != "pairs":
        return announcers(settings)
    return [(rank, server) for rank in range(parallel.trainers) for server in range(len(pool))]


def in_turn(pairs: Collection[tuple[int, int]], settings: RunSettings) -> list[tuple[int, int]]:
    """(trainer, server) pairs in the order in which all workers open them.

    Opening a link waits for the other side. One order for all cannot end in a circle, and going round like a tournament
    lets different pairs meet at the same time."""
    rounds = max(settings.parallel.trainers, len(pool_of(settings)))
    return sorted(pairs, key=lambda pair: ((pair[0] + pair[1]) % rounds, pair))


def worker_of(server: int, settings: RunSettings) -> int:
    """The worker where a server runs: its trainer for one in place; dedicated servers come after the trainers."""
    home, p = pool_of(settings).home, settings.parallel
    return p.trainers + server - (len(home) - p.servers) if home[server] is None else home[server]


def transport_of(
    store: dist.Store, worker: int, settings: RunSettings, meeting: Meeting, device: torch.device
) -> Transport:
    """What opens this worker's links."""
    p = settings.parallel
    num_workers = p.trainers + p.servers
    kind, address = choose_transport(p.transport, num_workers), own_address(meeting)
    return make_transport(kind, store, worker, num_workers, address, p.deadline_s, device)


def open_link(transport: Transport, rank: int, server: int, end: int, settings: RunSettings) -> Link:
    """Our end of the link between a trainer (end 0) and a server (end 1); waits for the other end."""
    peer = worker_of(server, settings) if end == TRAINER_END else rank
    return transport.open(peer, f"{rank}-{server}", end)


def own_address(meeting: Meeting) -> str:
    """The address of this machine that the others reach: the one it uses towards the driver."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((meeting.host, meeting.port))  # sends nothing
        return s.getsockname()[0]


def own_interface(meeting: Meeting) -> str:
    """The name of the network interface that has `own_address`."""
    return own_addresses()[own_address(meeting)]


def rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
