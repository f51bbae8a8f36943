"""A link inside one process whose messages arrive as late as over a real wire, and use no processor on their way."""

from __future__ import annotations

import queue
import time
from dataclasses import replace

from distca.parallel.link import BACKWARD, PLAN, REPLY, Header, LinkError, pack


class DelayedLink:
    """One end. A message of a call arrives `delays[0]` (forward) or `delays[1]` (backward) seconds after it was sent; a
    plan at once."""

    def __init__(self, inbox: queue.SimpleQueue, outbox: queue.SimpleQueue, delays: tuple[float, float]):
        self._inbox, self._outbox, self._delays = inbox, outbox, delays
        self._asked: dict[tuple[int, int], int] = {}  # (micro-batch, call) -> whether backward
        self.bytes_sent = self.bytes_received = 0

    @staticmethod
    def pair(delays: tuple[float, float]) -> tuple[DelayedLink, DelayedLink]:
        there, back = queue.SimpleQueue(), queue.SimpleQueue()
        return DelayedLink(back, there, delays), DelayedLink(there, back, delays)

    def send(self, header: Header, tensors=()) -> None:
        call, backward = (header.step, header.call), header.kind == BACKWARD
        if header.kind == REPLY:  # as late as its request
            backward = self._asked[call]
        late = 0.0 if header.kind == PLAN else self._delays[backward]
        payload = pack(tensors)
        arrives = time.perf_counter() + late
        self._outbox.put((replace(header, payload_bytes=payload.numel()), payload, arrives))

    def wait_message(self):
        try:
            header, payload, arrives = self._inbox.get(timeout=60)
        except queue.Empty:
            raise LinkError("no message within 60 s") from None
        time.sleep(max(0.0, arrives - time.perf_counter()))
        self._asked[header.step, header.call] = header.kind == BACKWARD
        return header, payload
