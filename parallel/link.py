"""How do a trainer and an attention server talk?

Over a link, which a transport opens (see transport.py). Each message is a header of fixed size, then one packed
payload:

    | header 160 B: kind, step, call, digest, shapes, scale, payload bytes, checksums | payload: tensors, each at 16 B |

A checksum covers every byte of both: a wrong scale would be as silent as a wrong row. Nothing on the wire is pickled.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import xxhash

from distca.kernels.rows import Part, gather
from distca.parallel.streams import current_stream, host_buffer, keep, running_on, side_stream, to_device, to_host

PLAN, FORWARD, BACKWARD, REPLY, FAILURE = range(1, 6)
KIND_NAMES = {PLAN: "plan", FORWARD: "forward", BACKWARD: "backward", REPLY: "reply", FAILURE: "failure"}
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

FIELDS = struct.Struct("<10q2d3q")  # magic, nine integers, two floats; received, payload's size and checksum
HEADER = struct.Struct("<120sI36x")  # the fields, their checksum, room to grow: 160 bytes
MAGIC = 0x44434131  # "DCA1"; the last byte is the version of this layout
ALIGNMENT = 16
FOREVER = timedelta(days=3650)
MAX_IN_FLIGHT = 8  # sent messages whose buffers are kept; a peer that is this far behind makes the sender wait


class LinkError(RuntimeError):
    """The peer is gone, too late, or sent something broken. The link cannot be used any more."""


class Damaged(LinkError):
    """The peer is there, but what arrived is not what it sent."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a message is about; fields travel in this order, see FIELDS. The link itself fills in the last three."""

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
    received: int = 0
    """Messages that the sender has taken from this link: their buffers are free at the other end."""
    payload_bytes: int = 0
    checksum: int = 0

    def pack(self) -> torch.Tensor:
        fields = FIELDS.pack(MAGIC, *astuple(self))
        return torch.frombuffer(bytearray(HEADER.pack(fields, zlib.crc32(fields))), dtype=torch.uint8)

    @staticmethod
    def unpack(data: torch.Tensor) -> Header:
        fields, check = HEADER.unpack(data.numpy().tobytes())
        magic, *words = FIELDS.unpack(fields)
        if magic != MAGIC:
            raise Damaged(
                "a message begins with something that is not a DistCA header: both ends must run the same version"
            )
        if check != zlib.crc32(fields):
            raise Damaged("a header arrived damaged (checksum)")
        return Header(*words)

    def key(self) -> tuple[int, int, int]:
        """Which call it belongs to."""
        return self.step, self.call, self.kind

    def name(self) -> str:
        """The same for people."""
        return f"{KIND_NAMES.get(self.kind)} call {self.call} of micro-batch {self.step}"

    def asks_the_same(self, other: Header) -> bool:
        """Whether both ask for the same computation; what concerns their links and payloads may differ."""
        return replace(self, received=0, payload_bytes=0, checksum=0) == replace(
            other, received=0, payload_bytes=0, checksum=0
        )


class Rows(NamedTuple):
    """Some rows of a tensor, to be sent: they are gathered where the message is written."""

    of: torch.Tensor  # (T, ...)
    index: torch.Tensor | None = None  # (N,) int64; None is all of them

    @staticmethod
    def all_of(x: torch.Tensor | Rows) -> Rows:
        return x if isinstance(x, Rows) else Rows(x)

    @property
    def shape(self) -> torch.Size:
        return self.of.shape if self.index is None else torch.Size((len(self.index), *self.of.shape[1:]))

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.of.element_size()

    def gathered(self) -> torch.Tensor:
        return self.of if self.index is None else self.of.index_select(0, self.index)


class Link(Protocol):
    """One end of the connection between a trainer and a server."""

    bytes_sent: int
    bytes_received: int

    def send(self, header: Header, tensors: Sequence[torch.Tensor | Rows] = ()) -> None:
        """Post a message; returns before it has arrived. The tensors may change afterwards."""

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        """Wait for the next message: its header and its payload, (bytes,) uint8. Raises LinkError."""


def packed_size(tensors: Sequence[torch.Tensor | Rows]) -> int:
    """Bytes that `pack` makes of the tensors."""
    return sum(_padded(x.num_bytes) for x in map(Rows.all_of, tensors))


def pack(tensors: Sequence[torch.Tensor | Rows], out: torch.Tensor | None = None) -> torch.Tensor:
    """Tensors end to end as bytes, each starting at a multiple of 16: (bytes,) uint8, written into `out` where that is
    given. Its inverse is `unpack`."""
    rows = [Rows.all_of(x) for x in tensors]
    sizes = [_padded(x.num_bytes) for x in rows]
    if out is None:
        out = torch.empty(sum(sizes), dtype=torch.uint8, device=rows[0].of.device if rows else "cpu")
    gathered = []
    for x, part in zip(rows, out.split(sizes), strict=True):
        place = part[: x.num_bytes].view(x.of.dtype).view(x.shape)
        if x.index is None:
            place.copy_(x.of)
        else:
            gathered.append(Part(x.of, x.index, place))
        part[x.num_bytes :] = 0
    gather(gathered)
    return out


def unpack(payload: torch.Tensor, like: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    """The tensors of a payload, given their shapes and dtypes; views, not copies."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in like]
    if sum(map(_padded, sizes)) != payload.numel():
        raise LinkError(f"a payload has {payload.numel()} bytes, the plan says {sum(map(_padded, sizes))}")
    parts = payload.split([_padded(s) for s in sizes])
    return [part[:size].view(dtype).view(shape) for part, size, (shape, dtype) in zip(parts, sizes, like, strict=True)]


def checksum(payload: torch.Tensor) -> int:
    """Of a payload: XXH3 on the CPU, which no copy notices; on a GPU the sum of its words,
    which any single flipped bit changes."""
    if payload.numel() == 0:
        return 0
    if payload.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(payload.numpy()) >> 1  # fits a signed word
    return int(payload.view(torch.int32).sum(dtype=torch.int64))


def seal(header: Header, payload: torch.Tensor) -> Header:
    """The header with what it says of its payload."""
    return replace(header, payload_bytes=payload.numel(), checksum=checksum(payload))


def check_payload(header: Header, payload: torch.Tensor) -> None:
    """Raise Damaged where the payload is not what the header was sealed with."""
    if checksum(payload) != header.checksum:
        raise Damaged(f"a {KIND_NAMES.get(header.kind)} message arrived damaged (checksum)")


class GroupLink:
    """A link over a process group: headers go over Gloo; payloads too, or over NCCL.

    Only the end with a finite deadline gives up on its peer; a server waits for work for ever, and learns of a
    trainer's death because the connection breaks. Several threads may send, one may wait for messages.

    `nccl` is one group for payloads out and one for payloads in: NCCL runs what is posted to a communicator in the
    order of posting, so two ends that sent to each other over the same one would each wait for the other to receive.
    """

    def __init__(
        self,
        name: str,
        headers: dist.ProcessGroup,
        peer: int,
        deadline_s: float | None,
        device: torch.device,
        tag: int = 0,
        nccl: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    ):
        self.name, self.bytes_sent, self.bytes_received = name, 0, 0
        self._headers, self._peer, self._device, self._tag = headers, peer, device, tag
        self._payloads_out, self._payloads_in = nccl or (headers, headers)
        self._payload_device = device if nccl else torch.device("cpu")
        self._timeout = timedelta(seconds=deadline_s) if deadline_s else FOREVER
        self._receiving = side_stream(device)
        self._sending, self._counting = threading.Lock(), threading.Lock()
        # of messages that may not have arrived: works, buffers, and the stream whose memory these are
        self._in_flight: deque[tuple[list, tuple, torch.cuda.Stream | None]] = deque()
        self._num_freed = self._num_received = 0

    def send(self, header: Header, tensors: Sequence[torch.Tensor | Rows] = ()) -> None:
        payload = pack(tensors)
        payload = to_host(payload) if self._payload_device.type == "cpu" else to_device(payload, self._payload_device)
        header = seal(header, payload)
        with self._sending:  # a header and its payload stay together
            head = replace(header, received=self._num_received).pack()
            try:
                self._wait_arrived(self._num_freed + len(self._in_flight) - MAX_IN_FLIGHT + 1)
                works = [self._headers.send([head], self._peer, self._tag)]
                if payload.numel():
                    works.append(self._payloads_out.send([payload], self._peer, self._tag + 1))
            except RuntimeError as error:
                raise LinkError(f"link {self.name}: cannot send: {first_line(error)}") from None
            self._in_flight.append((works, (head, payload), current_stream(self._device)))
            self.bytes_sent += head.numel() + payload.numel()

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        consumer = current_stream(self._device)
        with running_on(self._receiving):  # what NCCL's works make wait is this stream, and no kernels
            header, payload = self._receive()
        keep(consumer, [payload])
        return header, to_device(payload, self._device)

    def _receive(self) -> tuple[Header, torch.Tensor]:
        try:
            head = torch.empty(HEADER.size, dtype=torch.uint8)
            self._headers.recv([head], self._peer, self._tag).wait(self._timeout)
            header = Header.unpack(head)
            if self._payload_device.type == "cpu":
                payload = host_buffer(header.payload_bytes, self._device)
            else:
                payload = torch.empty(header.payload_bytes, dtype=torch.uint8, device=self._payload_device)
            if header.payload_bytes:
                self._payloads_in.recv([payload], self._peer, self._tag + 1).wait(self._timeout)
            self._wait_arrived(header.received)
            check_payload(header, payload)
        except Damaged as error:
            raise Damaged(f"link {self.name}: {error}") from None
        except RuntimeError as error:
            raise LinkError(f"link {self.name}: no message: {first_line(error)}") from None
        self._num_received += 1
        self.bytes_received += head.numel() + payload.numel()
        return header, payload

    def _wait_arrived(self, num_messages: int) -> None:
        """Free the buffers of the first `num_messages` messages ever sent, once they have arrived."""
        while True:
            with self._counting:
                if self._num_freed >= num_messages or not self._in_flight:
                    return
                works, _buffers, stream = self._in_flight.popleft()
                self._num_freed += 1
            with running_on(stream):  # which may write to the buffers again, and so waits until NCCL has read them
                for work in works:
                    work.wait(self._timeout)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
