"""How do links go over NIXL (https://github.com/ai-dynamo/nixl), with UCX below it?

A worker has one agent. The two ends of a link learn each other's through the store when it is opened. Then a message is
a one-sided WRITE of its payload into a slot of the receiver's registered memory and a notification that holds its
header, in this order:

    sender                                  receiver
    takes a free slot
    asks for room, if the slot is small     registers more memory, tells where
    packs the payload into its own copy
    of the slot, WRITEs it, notifies        takes the payload out of the slot, frees it

A link has SLOTS slots for each direction, so a sender is at most so many messages ahead; a slot's memory grows to the
largest message that it has carried. One thread per worker looks for notifications and drives transfers: it sleeps
between its looks, longer the longer nothing comes, as a spinning one starves the threads that compute. It also pings
every peer, so that a dead one is noticed where nothing is sent. NIXL is called under one lock.

Notifications are structs with a checksum; nothing in them is trusted before it is checked.
"""

from __future__ import annotations

import atexit
import base64
import fcntl
import importlib
import json
import logging
import os
import socket
import struct
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from distca.parallel.link import (
    HEADER,
    MAX_IN_FLIGHT,
    Damaged,
    Header,
    LinkError,
    Rows,
    check_payload,
    first_line,
    pack,
    packed_size,
    seal,
)
from distca.transports import nixl_package

logger = logging.getLogger(__name__)

SLOTS = MAX_IN_FLIGHT
HELLO, MESSAGE, FREE, WANT, ROOM, PING, CLOSE = range(1, 8)
NOTE = struct.Struct("<4sIBBIq")  # magic, checksum of what follows, kind, slot, link's number at the receiver, a number
PLACE = struct.Struct("<QQ")  # a slot's device and address, before the metadata that make it reachable
MAGIC = b"DCN1"
LONGEST_NOTE = LONGEST_CARD = 1 << 16  # bytes; a GPU's registration has a key per network device
MOST_BYTES = 1 << 36  # of one payload; what asks for more is broken
CHUNK = 1 << 30  # bytes of one descriptor; a longer payload is several, written as one
LOOK_S = (20e-6, 1e-3)  # between two looks: the shortest, after something came, and the longest
GROWTH = 1.3
PING_S = 0.2
OPENING_S, OPENING_LOOK_S = 600.0, 0.005  # for the other end to come; the driver gives up earlier
INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR


@dataclass(slots=True)
class _Slot:
    """Memory that a message passes through, at either end."""

    memory: torch.Tensor | None = None  # ours, registered
    registered: Any = None
    remote: tuple[int, int, int] = (0, 0, 0)  # of the receiver's, at the sender: address, bytes, device


class NixlTransport:
    """One agent, the links over it, and the thread that looks for notifications."""

    def __init__(
        self, store: dist.Store, worker: int, num_workers: int, address: str, deadline_s: float, device: torch.device
    ):
        self._store, self._deadline_s, self._device = dist.PrefixStore("nixl", store), deadline_s, device
        api, bindings = _load(address, device)
        self._errors = tuple(v for n, v in vars(bindings).items() if n.startswith("nixl") and n.endswith("Error"))
        self._kind, self._device_number = ("VRAM", device.index or 0) if device.type == "cuda" else ("DRAM", 0)
        self._nixl = threading.RLock()
        name = f"{worker}-{uuid.uuid4().hex}"  # of a worker that comes again too, no other run's or earlier self's
        try:
            self._agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        except self._errors as error:
            raise LinkError(f"NIXL cannot be started on {address}: {first_line(error)}") from None
        self._links: list[NixlLink] = []
        self._peers: set[str] = set()  # agents that we can reach
        self._transfers: deque[tuple[NixlLink, Any]] = deque()
        self._wake, self._closing = threading.Event(), False
        self._looking = threading.Thread(target=self._look_forever, name="nixl", daemon=True)
        self._looking.start()
        atexit.register(self.close)  # no thread may be inside NIXL while its library is unloaded

    def open(self, peer: int, name: str, end: int) -> NixlLink:
        with self._nixl:
            link = NixlLink(self, name, self._deadline_s if end == 0 else None, self._device)
            self._links.append(link)  # before the peer can know of it
            number = len(self._links) - 1
            card = dict(agent=self._agent.name, link=number, metadata=_text(self._agent.get_agent_metadata()))
        self._store.set(f"{name}/{end}", json.dumps(card))
        card = self._wait_card(name, f"{name}/{1 - end}")
        try:
            link.agent, link.number, metadata = (
                str(card["agent"]),
                int(card["link"]),
                base64.b64decode(card["metadata"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LinkError(
                f"link {name}: cannot be opened: worker {peer} introduces itself wrongly: {error}"
            ) from None
        with self._nixl:
            try:
                if link.agent not in self._peers:
                    loaded = self._agent.add_remote_agent(metadata)
                    if (loaded.decode() if isinstance(loaded, bytes) else loaded) != link.agent:
                        raise LinkError(f"link {name}: cannot be opened: worker {peer} has another agent than it says")
                    self._peers.add(link.agent)
            except self._errors as error:
                raise LinkError(f"link {name}: cannot be opened: {first_line(error)}") from None
        self.notify(link, HELLO)
        link.wait(lambda: link.greeted, "cannot be opened", OPENING_S)
        return link

    def close(self) -> None:
        with self._nixl:
            if self._closing:
                return
            for link in self._links:
                if link.error is None and link.agent in self._peers:
                    self.notify(link, CLOSE)
            self._closing = True
        self._wake.set()
        self._looking.join()
        atexit.unregister(self.close)
        for link in self._links:
            link.fail(LinkError("closed at this end"))
        with self._nixl:
            self._transfers.clear()
            for slot in (slot for link in self._links for slot in (*link.outgoing, *link.incoming)):
                self._forget(slot)
            for peer in self._peers:
                try:
                    self._agent.remove_remote_agent(peer)
                except self._errors as error:
                    logger.debug("agent %s had gone: %s", peer, error)
            self._agent = None

    # ---- for links ----

    def notify(self, link: NixlLink, kind: int, slot: int = 0, number: int = 0, body: bytes = b"") -> None:
        """Send a notification; a peer that is gone fails the link, which says so to whoever waits for it."""
        with self._nixl:
            if self._closing:
                return
            try:
                self._agent.send_notif(link.agent, _note(kind, slot, link.number, number, body))
            except self._errors as error:
                self._lose(link.agent, error)

    def write(self, link: NixlLink, slot: int, num_bytes: int, number: int, head: bytes) -> None:
        """Start writing the slot's payload into the peer's; its notification follows."""
        note, at = _note(MESSAGE, slot, link.number, number, head), link.outgoing[slot]
        address, _, device = at.remote
        parts = [(start, min(CHUNK, num_bytes - start)) for start in range(0, num_bytes, CHUNK)]
        with self._nixl:
            if self._closing:
                return
            here = [(at.memory.data_ptr() + start, size, self._device_number) for start, size in parts]
            there = [(address + start, size, device) for start, size in parts]
            try:
                transfer = self._agent.initialize_xfer(
                    "WRITE",
                    self._agent.get_xfer_descs(here, self._kind),
                    self._agent.get_xfer_descs(there, self._kind),
                    link.agent,
                    note,
                )
                self._agent.transfer(transfer)
            except self._errors as error:
                return self._lose(link.agent, error)
            self._transfers.append((link, transfer))
        self._wake.set()

    def grow(self, slot: _Slot, num_bytes: int) -> None:
        """Give a slot registered memory for at least so many bytes."""
        with self._nixl:
            self._forget(slot)
            slot.memory = torch.empty(_rounded(num_bytes), dtype=torch.uint8, device=self._device)
            slot.registered = self._agent.register_memory(slot.memory)

    def expect_soon(self) -> None:
        """Look for notifications at short intervals again."""
        self._wake.set()

    # ---- the thread ----

    def _look_forever(self) -> None:
        pause, pinged = LOOK_S[0], time.monotonic()
        while not self._closing:
            try:
                came = self._look()
            except Exception as error:  # whatever it is, those that wait must hear of it
                logger.exception("the thread that looks for notifications has ended")
                for link in self._links:
                    link.fail(LinkError(f"{type(error).__name__}: {first_line(error)}"))
                return
            if came:
                pause = LOOK_S[0]
            elif time.monotonic() - pinged > PING_S:
                pinged = time.monotonic()
                self._ping()
            if self._wake.wait(pause):
                self._wake.clear()
                pause = LOOK_S[0]
            pause = min(pause * GROWTH, LOOK_S[1])

    def _look(self) -> bool:
        """Take what came, and drive what goes; whether there was anything."""
        with self._nixl:
            try:
                found = self._agent.get_new_notifs()
            except self._errors as error:
                logger.warning("NIXL cannot look for notifications: %s", first_line(error))
                found = {}
            moved = self._drive()
        for agent, notes in found.items():
            for note in notes:
                self._take(agent if isinstance(agent, str) else agent.decode(), note)
        return bool(found) or moved

    def _drive(self) -> bool:
        before = len(self._transfers)
        for _ in range(before):
            link, transfer = self._transfers.popleft()
            try:
                if self._agent.check_xfer_state(transfer) == "PROC":
                    self._transfers.append((link, transfer))
                else:
                    self._agent.release_xfer_handle(transfer)
            except self._errors as error:
                self._lose(link.agent, error)
        return len(self._transfers) < before

    def _take(self, agent: str, note: bytes) -> None:
        """Act on a notification. One that fits no link is left alone: its sender is none of our run's."""
        try:
            kind, slot, number, value, body = _read(note)
        except Damaged as error:
            for link in self._links_to(agent):
                link.fail(Damaged(str(error)))
            return
        link = self._links[number] if number < len(self._links) else None
        if link is None or link.agent not in ("", agent):
            return logger.warning("a notification of agent %s belongs to none of its links", agent)
        try:
            if kind == WANT:
                self._make_room(link, slot, value)
            elif kind == CLOSE:
                link.fail(LinkError("the other end has closed it"))
            elif kind != PING:
                link.take(kind, slot, value, body)
        except LinkError as error:
            link.fail(error)

    def _make_room(self, link: NixlLink, slot: int, num_bytes: int) -> None:
        if not 0 < num_bytes <= MOST_BYTES:
            raise Damaged(f"the peer asks for room for {num_bytes} bytes")
        at = link.incoming[slot]
        with self._nixl:
            try:
                self.grow(at, num_bytes)
                metadata = self._agent.get_partial_agent_metadata(at.registered, True)
            except (RuntimeError, *self._errors) as error:
                raise LinkError(f"no memory for {num_bytes} bytes: {first_line(error)}") from None
            body = PLACE.pack(self._device_number, at.memory.data_ptr()) + metadata
            self.notify(link, ROOM, slot, at.memory.numel(), body)

    def learn(self, metadata: bytes) -> None:
        """Make memory that the peer has registered reachable."""
        with self._nixl:
            try:
                self._agent.add_remote_agent(metadata)
            except self._errors as error:
                raise LinkError(f"the peer's memory cannot be reached: {first_line(error)}") from None

    def _ping(self) -> None:
        for peer in list(self._peers):
            link = next((link for link in self._links_to(peer) if link.error is None), None)
            if link:
                self.notify(link, PING)

    def _links_to(self, agent: str) -> list[NixlLink]:
        return [link for link in self._links if link.agent == agent]

    def _lose(self, agent: str, error: Exception) -> None:
        for link in self._links_to(agent):
            link.fail(LinkError(f"the other end is gone: {first_line(error)}"))

    def _forget(self, slot: _Slot) -> None:
        if slot.registered is not None:
            try:
                self._agent.deregister_memory(slot.registered)
            except self._errors as error:
                logger.debug("memory was not registered any more: %s", error)
        slot.memory = slot.registered = None

    def _wait_card(self, name: str, key: str) -> Any:
        """What the other end has written; other threads may use the store meanwhile."""
        end = time.monotonic() + OPENING_S
        while not self._store.check([key]):
            if self._closing or time.monotonic() > end:
                raise LinkError(f"link {name}: cannot be opened: the other end did not come")
            time.sleep(OPENING_LOOK_S)
        card = self._store.get(key)
        if len(card) > LONGEST_CARD:
            raise LinkError(f"link {name}: cannot be opened: the other end introduces itself with {len(card)} bytes")
        try:
            return json.loads(card)
        except ValueError:
            raise LinkError(f"link {name}: cannot be opened: the other end introduces itself in no JSON") from None


class NixlLink:
    """One end of a link over NIXL. Several threads may send, one may wait for messages."""

    def __init__(self, transport: NixlTransport, name: str, deadline_s: float | None, device: torch.device):
        self._transport, self._deadline_s, self._device = transport, deadline_s, device
        self.name, self.bytes_sent, self.bytes_received = name, 0, 0
        self.agent, self.number = "", 0  # the peer's agent, and the number that this link has there
        self.greeted = False
        self.error: LinkError | None = None
        self.outgoing, self.incoming = [_Slot() for _ in range(SLOTS)], [_Slot() for _ in range(SLOTS)]
        self._free = set(range(SLOTS))
        self._early: dict[int, tuple[int, bytes]] = {}  # messages that wait for an earlier one, by number
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._num_sent = self._num_arrived = self._num_received = 0
        self._sending, self._changed = threading.Lock(), threading.Condition(threading.RLock())

    def send(self, header: Header, tensors: Sequence[torch.Tensor | Rows] = ()) -> None:
        size = packed_size(tensors)
        if size > MOST_BYTES:
            raise LinkError(f"link {self.name}: cannot send: {size} bytes, a message holds {MOST_BYTES}")
        with self._sending:
            self._wait_sendable(lambda: self._free)
            with self._changed:
                number = min(self._free)  # the lowest: few slots grow where few messages are under way
                self._free.remove(number)
            slot = self.outgoing[number]
            if size > slot.remote[1]:
                self._transport.notify(self, WANT, number, size)
                self._wait_sendable(lambda: size <= slot.remote[1])
            if size and (slot.memory is None or size > slot.memory.numel()):
                self._transport.grow(slot, size)
            payload = pack(tensors, slot.memory[:size] if size else None)
            head = replace(seal(header, payload), received=self._num_received).pack().numpy().tobytes()
            if size:
                self._transport.write(self, number, size, self._num_sent, head)
            else:
                self._transport.notify(self, MESSAGE, number, self._num_sent, head)
            self._wait_sendable(lambda: True)
            self._num_sent += 1
            self.bytes_sent += len(head) + size

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        self._transport.expect_soon()
        self.wait(lambda: self._inbox, "no message", self._deadline_s)
        number, head = self._inbox.popleft()
        slot = self.incoming[number]
        try:
            header = Header.unpack(torch.frombuffer(bytearray(head), dtype=torch.uint8))
            size = header.payload_bytes
            if not 0 <= size <= (slot.memory.numel() if slot.memory is not None else 0):
                raise Damaged(f"a message says that it has {size} bytes, more than its slot")
            payload = torch.empty(size, dtype=torch.uint8, device=self._device)
            if size:
                payload.copy_(slot.memory[:size])
            check_payload(header, payload)
        except Damaged as error:
            raise Damaged(f"link {self.name}: {error}") from None
        self._transport.notify(self, FREE, number)
        self._num_received += 1
        self.bytes_received += len(head) + size
        return header, payload

    def wait(self, come: Callable[[], Any], what: str, timeout_s: float | None) -> None:
        """Wait until `come()`. Raises LinkError where the link fails or the time is up before."""
        with self._changed:
            self._changed.wait_for(lambda: come() or self.error is not None, timeout_s)
            if come():
                return
            if self.error is None:
                self.fail(LinkError(f"Timed out waiting {timeout_s:g} s for the other end"))
            raise type(self.error)(f"link {self.name}: {what}: {self.error}")

    def _wait_sendable(self, come: Callable[[], Any]) -> None:
        """A failed link takes no message, whatever else is ready."""
        self.wait(lambda: self.error is None and come(), "cannot send", self._deadline_s)

    def fail(self, error: LinkError) -> None:
        """Whoever waits, and whoever sends from here on, gets the error; the first one counts."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def take(self, kind: int, slot: int, number: int, body: bytes) -> None:
        """A notification of the peer's."""
        if kind == ROOM:
            if len(body) < PLACE.size or not 0 < number <= 2 * MOST_BYTES:
                raise Damaged("the peer gives room that makes no sense")
            self._transport.learn(body[PLACE.size :])
        with self._changed:
            if kind == HELLO:
                self.greeted = True
            elif kind == FREE:
                self._free.add(slot)
            elif kind == ROOM:
                device, address = PLACE.unpack_from(body)
                self.outgoing[slot].remote = (address, number, device)
            elif len(body) == HEADER.size and 0 <= number - self._num_arrived < SLOTS:
                self._early[number] = (slot, body)
                while self._num_arrived in self._early:  # a short message overtakes a long one
                    self._inbox.append(self._early.pop(self._num_arrived))
                    self._num_arrived += 1
            else:
                raise Damaged("a message of another size or number than expected")
            self._changed.notify_all()


def _note(kind: int, slot: int, link: int, number: int, body: bytes) -> bytes:
    rest = NOTE.pack(MAGIC, 0, kind, slot, link, number)[8:] + body
    return MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


def _read(note: bytes) -> tuple[int, int, int, int, bytes]:
    """A notification's kind, slot, link, number and body. Raises Damaged."""
    if not NOTE.size <= len(note) <= LONGEST_NOTE:
        raise Damaged(f"a notification of {len(note)} bytes")
    magic, check, kind, slot, link, number = NOTE.unpack_from(note)
    if magic != MAGIC:
        raise Damaged("a notification that is not DistCA's: both ends must run the same version")
    if check != zlib.crc32(note[8:]):
        raise Damaged("a notification arrived damaged (checksum)")
    if not HELLO <= kind <= CLOSE or slot >= SLOTS:
        raise Damaged(f"a notification of unknown kind {kind} or slot {slot}")
    return kind, slot, link, number, note[NOTE.size :]


def _rounded(num_bytes: int) -> int:
    """A size for memory that is to hold so many bytes: up to an eighth more, so that it need not grow each time."""
    step = 1 << max(16, num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step


def _load(address: str, device: torch.device) -> tuple[ModuleType, ModuleType]:
    """NIXL's interface and its bindings, told where to bind."""
    package = nixl_package()
    if package is None:
        raise LinkError("NIXL is not installed on this machine: pip install distca[nixl]")
    _tell_ucx(address, device)
    return importlib.import_module(f"{package}._api"), importlib.import_module(f"{package}._bindings")


def _tell_ucx(address: str, device: torch.device) -> None:
    """UCX listens on the interfaces that its environment names, by default on all: name the one with our address, and
    RDMA devices, which no address of a stranger reaches. On a cluster, what its operators have set counts instead."""
    own = _interface_of(address)
    ways = "tcp,self,sm" + (",cuda" if device.type == "cuda" else "")
    if own.startswith("lo"):
        os.environ["UCX_NET_DEVICES"] = own
        os.environ.setdefault("UCX_TLS", ways)
    else:
        rdma = [f"{path.name}:1" for path in sorted(Path("/sys/class/infiniband").glob("*"))]
        os.environ.setdefault("UCX_NET_DEVICES", ",".join([own, *rdma]))
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # a lost peer is told by its link


def _interface_of(address: str) -> str:
    """Name of the network interface with this address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(s.fileno(), INTERFACE_ADDRESS, struct.pack("256s", name.encode()))[20:24]
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found) == address:
                return name
    raise LinkError(f"no network interface has the address {address}")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
