"""How do a trainer and an attention server talk?

Over a link: a process group of exactly two, outside of every other group, so that a dead or hung peer closes this link and no
other (in Gloo one time-out closes all pairs of its group). Each message is a header of fixed size, then one packed payload:

    | header 160 B: kind, step, call, plan digest, shapes, scale, payload bytes, checksum | payload: tensors, each at 16 B |

Nothing on the wire is pickled. `LocalLink` has the same three methods for a trainer and a server in one process.
"""

from __future__ import annotations

import queue
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

PLAN, FORWARD, BACKWARD, REPLY, FAILURE, STOP = range(1, 7)
KIND_NAMES = {PLAN: "plan", FORWARD: "forward", BACKWARD: "backward", REPLY: "reply", FAILURE: "failure", STOP: "stop"}
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

HEADER = struct.Struct("<10q2d2q48x")  # magic, nine integers, two floats, size and checksum, room to grow: 160 bytes
MAGIC = 0x44434131  # "DCA1"; the last byte is the version of this layout
ALIGNMENT = 16
FOREVER = timedelta(days=3650)
MAX_IN_FLIGHT = 8  # sent messages whose buffers are kept; a peer that is this far behind makes the sender wait


class LinkError(RuntimeError):
    """The peer is gone, too late, or sent something broken. The link cannot be used any more."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a message is about; fields travel in this order, see HEADER."""

    kind: int
    step: int = 0
    """Micro-batch number, counted over the run."""
    call: int = 0
    """One layer's attention in one micro-batch; the reply carries its request's."""
    digest: int = 0
    """Of the plan that the rows follow."""
    window: int = 0
    """The mask rule."""
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    dtype: int = 0
    """Code of the rows' dtype, see DTYPES."""
    scale: float = 0.0
    softcap: float = 0.0
    payload_bytes: int = 0
    checksum: int = 0

    def pack(self) -> torch.Tensor:
        words = (
            MAGIC, self.kind, self.step, self.call, self.digest, self.window, self.query_heads, self.kv_heads, self.head_dim,
            self.dtype, self.scale, self.softcap, self.payload_bytes, self.checksum,
        )  # fmt: skip
        return torch.frombuffer(bytearray(HEADER.pack(*words)), dtype=torch.uint8)

    @staticmethod
    def unpack(data: torch.Tensor) -> Header:
        magic, *words = HEADER.unpack(data.numpy().tobytes())
        if magic != MAGIC:
            raise LinkError(
                "a message begins with something that is not a DistCA header: both ends must run the same version"
            )
        return Header(*words)


class Link(Protocol):
    """One end of the connection between a trainer and a server."""

    bytes_sent: int
    bytes_received: int

    def send(self, header: Header, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Post a message; returns before it has arrived. The tensors may change afterwards."""

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        """Wait for the next message: its header and its payload, (bytes,) uint8. Raises LinkError."""

    def close(self) -> None:
        """No more messages; buffers are freed."""


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors end to end as bytes, each starting at a multiple of 16: (bytes,) uint8. Its inverse is `unpack`."""
    sizes = [_padded(t.numel() * t.element_size()) for t in tensors]
    device = tensors[0].device if tensors else torch.device("cpu")
    payload = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    for tensor, part in zip(tensors, payload.split(sizes), strict=True):
        flat = tensor.reshape(-1)
        part[: flat.numel() * flat.element_size()].view(tensor.dtype).copy_(flat)
    return payload


def unpack(payload: torch.Tensor, like: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    """The tensors of a payload, given their shapes and dtypes; views, not copies."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in like]
    if sum(map(_padded, sizes)) != payload.numel():
        raise LinkError(f"a payload has {payload.numel()} bytes, the plan says {sum(map(_padded, sizes))}")
    parts = payload.split([_padded(s) for s in sizes])
    return [part[:size].view(dtype).view(shape) for part, size, (shape, dtype) in zip(parts, sizes, like, strict=True)]


def checksum(payload: torch.Tensor) -> int:
    """Of a payload: CRC-32 on the CPU; on a GPU the sum of its words, which any single flipped bit changes."""
    if payload.numel() == 0:
        return 0
    if payload.device.type == "cpu":
        return zlib.crc32(payload.numpy())
    return int(payload.view(torch.int32).sum(dtype=torch.int64))


class GroupLink:
    """A link over a two-rank process group: Gloo for headers, Gloo or NCCL for payloads.

    Only the end with a finite deadline gives up on its peer; a server waits for work for ever, and learns of a trainer's death
    because the connection breaks."""

    def __init__(
        self,
        store: dist.Store,
        name: str,
        end: int,
        address: str,
        deadline_s: float | None,
        device: torch.device,
        nccl: bool = False,
    ):
        self._peer, self._device, self._nccl = 1 - end, device, nccl
        self.name, self.bytes_sent, self.bytes_received = name, 0, 0
        self._timeout = timedelta(seconds=deadline_s) if deadline_s else FOREVER
        self._headers = _gloo(dist.PrefixStore(f"link/{name}", store), end, address, self._timeout)
        self._payloads = (
            _nccl(dist.PrefixStore(f"link/{name}/nccl", store), end, self._timeout) if nccl else self._headers
        )
        self._in_flight: deque[tuple[list, tuple]] = deque()

    def send(self, header: Header, tensors: Sequence[torch.Tensor] = ()) -> None:
        payload = pack(tensors)
        if not self._nccl:
            payload = payload.cpu()
        head = replace(header, payload_bytes=payload.numel(), checksum=checksum(payload)).pack()
        try:
            while len(self._in_flight) >= MAX_IN_FLIGHT:
                self._wait_oldest()
            works = [self._headers.send([head], self._peer, 0)]
            if payload.numel():
                works.append(self._payloads.send([payload], self._peer, 1))
        except RuntimeError as error:
            raise LinkError(f"link {self.name}: cannot send: {_first_line(error)}") from None
        self._in_flight.append((works, (head, payload)))
        self.bytes_sent += head.numel() + payload.numel()

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        try:
            head = torch.empty(HEADER.size, dtype=torch.uint8)
            self._headers.recv([head], self._peer, 0).wait()
            header = Header.unpack(head)
            payload = torch.empty(header.payload_bytes, dtype=torch.uint8, device=self._device if self._nccl else "cpu")
            if header.payload_bytes:
                self._payloads.recv([payload], self._peer, 1).wait()
        except LinkError:
            raise
        except RuntimeError as error:
            raise LinkError(f"link {self.name}: no message: {_first_line(error)}") from None
        if checksum(payload) != header.checksum:
            raise LinkError(f"link {self.name}: a {KIND_NAMES.get(header.kind)} message arrived damaged (checksum)")
        self.bytes_received += head.numel() + payload.numel()
        return header, payload.to(self._device)

    def close(self) -> None:
        self._in_flight.clear()
        self._headers = self._payloads = None

    def _wait_oldest(self) -> None:
        works, _buffers = self._in_flight.popleft()
        for work in works:
            work.wait()


class LocalLink:
    """A link inside one process. Rows are copied, as over a wire, so that neither end sees the other's later changes."""

    def __init__(self, inbox: queue.SimpleQueue, outbox: queue.SimpleQueue):
        self._inbox, self._outbox = inbox, outbox
        self.bytes_sent = self.bytes_received = 0  # nothing crosses a wire

    @staticmethod
    def pair() -> tuple[LocalLink, LocalLink]:
        there, back = queue.SimpleQueue(), queue.SimpleQueue()
        return LocalLink(back, there), LocalLink(there, back)

    def send(self, header: Header, tensors: Sequence[torch.Tensor] = ()) -> None:
        payload = pack(tensors)
        self._outbox.put((replace(header, payload_bytes=payload.numel()), payload))

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        return self._inbox.get()

    def close(self) -> None:
        pass


def _gloo(store: dist.Store, end: int, address: str, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._timeout, options._threads = timeout, 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, end, 2, options)


def _nccl(store: dist.Store, end: int, timeout: timedelta) -> dist.ProcessGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, end, 2, options)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
