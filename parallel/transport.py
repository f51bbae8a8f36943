"""How do workers come to have links?

A transport belongs to a worker and opens its links, one for each trainer-server pair that a plan uses:

    pairs   a Gloo group of exactly two for every link, outside of every other group: a dead or hung peer closes its
            link and no other. A listening socket and two threads for each.
    group   one Gloo group of all workers, which connects a pair when its link is opened. One listening socket and two
            threads whatever the number of links, a connection per neighbour. In Gloo one time-out closes all pairs of
            its group, so an end that gives up on its peer gives up this worker's other links with it.
    nixl    one NIXL agent (nixl_link.py). As lean as `group`, and a lost peer is an error of its own links alone.

Workers are numbered: trainers first, then dedicated servers. Everything binds to the worker's own address alone.
"""

from __future__ import annotations

import hashlib
import threading
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from distca.parallel.link import FOREVER, GroupLink, Link, LinkError, first_line
from distca.parallel.nixl_link import NixlTransport

OPENING = timedelta(minutes=10)  # for the other end to come; the driver gives up earlier
TRAINER_END, SERVER_END = 0, 1
NAME_BYTES = 16  # of the digest by which both ends know that they open the same link


class Transport(Protocol):
    """What opens a worker's links."""

    def open(self, peer: int, name: str, end: int) -> Link:
        """Our end of a link to worker `peer`, which opens a link of this name too: the trainer's end (0), whose
        deadline is finite, or the server's (1). Waits for the other end. Raises LinkError."""

    def close(self) -> None:
        """Give everything back; links cannot be used any more."""


def make_transport(
    kind: str,
    store: dist.Store,
    worker: int,
    num_workers: int,
    address: str,
    deadline_s: float,
    device: torch.device,
) -> Transport:
    """The transport of one worker, of `kind` pairs, group or nixl; all workers of a run make the same.

    `store` is where they find each other, `address` this worker's own, `deadline_s` how long a trainer's end waits.
    """
    made = {"pairs": PairTransport, "group": GroupTransport, "nixl": NixlTransport}[kind]
    return made(store, worker, num_workers, address, deadline_s, device)


class PairTransport:
    """A two-rank group for every link."""

    def __init__(
        self, store: dist.Store, worker: int, num_workers: int, address: str, deadline_s: float, device: torch.device
    ):
        self._store, self._address, self._deadline_s, self._device = store, address, deadline_s, device

    def open(self, peer: int, name: str, end: int) -> GroupLink:
        store, deadline_s = dist.PrefixStore(f"link/{name}", self._store), self._deadline_s if end == 0 else None
        try:
            headers = _gloo(store, end, 2, self._address)
        except RuntimeError as error:
            raise LinkError(f"link {name}: cannot be opened: {first_line(error)}") from None
        nccl = None
        if self._device.type == "cuda":
            ways = [_nccl(dist.PrefixStore(f"nccl-{n}", store), end, 2, deadline_s) for n in (0, 1)]
            nccl = (ways[end], ways[1 - end])
        return GroupLink(name, headers, 1 - end, deadline_s, self._device, nccl=nccl)

    def close(self) -> None:
        pass  # a link's group goes with the link


class GroupTransport:
    """One group of all workers; a link is a connection of it, and a pair of tags.

    Payloads on CUDA go over four NCCL groups of all workers, which make a communicator for a pair when that first
    sends. Which of the four depends on the sender's role and on which end has the lower number, so that each
    communicator carries one link's payloads in one direction."""

    def __init__(
        self, store: dist.Store, worker: int, num_workers: int, address: str, deadline_s: float, device: torch.device
    ):
        self._worker, self._deadline_s, self._device = worker, deadline_s, device
        store = dist.PrefixStore("links", store)
        self._headers = _gloo(store, worker, num_workers, address, lazy=True)
        self._nccl = {}
        if device.type == "cuda":
            for role in (TRAINER_END, SERVER_END):
                for way in ("up", "down"):
                    own = dist.PrefixStore(f"nccl-{role}-{way}", store)
                    self._nccl[role, way] = _nccl(own, worker, num_workers, deadline_s)
        self._opening, self._tags = threading.Lock(), set()

    def open(self, peer: int, name: str, end: int) -> GroupLink:
        digest = hashlib.sha256(name.encode()).digest()[:NAME_BYTES]
        tag = int.from_bytes(digest[:4], "big") >> 4 << 2  # headers' tag; payloads have the next
        with self._opening:
            if (peer, tag) in self._tags:
                raise LinkError(f"link {name}: cannot be opened: worker {peer} has a link with this name already")
            self._tags.add((peer, tag))
        ours, theirs = (torch.frombuffer(bytearray(digest), dtype=torch.uint8) for _ in range(2))
        try:  # connects, which waits until the other end does so too
            sent = self._headers.send([ours], peer, tag)
            self._headers.recv([theirs], peer, tag).wait(OPENING)
            sent.wait(OPENING)
        except RuntimeError as error:
            raise LinkError(f"link {name}: cannot be opened: {first_line(error)}") from None
        if not torch.equal(ours, theirs):
            raise LinkError(f"link {name}: cannot be opened: worker {peer} opens a link with another name")
        deadline_s = self._deadline_s if end == TRAINER_END else None
        nccl = None
        if self._nccl:
            out, into = ("up", "down") if self._worker < peer else ("down", "up")
            nccl = (self._nccl[end, out], self._nccl[1 - end, into])
        return GroupLink(name, self._headers, peer, deadline_s, self._device, tag, nccl)

    def close(self) -> None:
        self._headers = self._nccl = None


def _gloo(store: dist.Store, rank: int, size: int, address: str, lazy: bool = False) -> dist.ProcessGroupGloo:
    """A Gloo group bound to `address`; a lazy one does not wait for the others, and connects to those it talks to."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout, options._threads = OPENING, 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address, lazy_init=lazy)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, deadline_s: float | None) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=deadline_s) if deadline_s else FOREVER
    return dist.ProcessGroupNCCL(store, rank, size, options)
