"""A link inside one process: the same methods as those between processes, without a wire."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace

import torch

from distca.parallel.link import Header, LinkError, Rows, pack
from distca.parallel.streams import to_device, to_host


class LocalLink:
    """A link inside one process. Rows are copied, as over a wire, so that neither end sees the other's later
    changes; those of a GPU by way of the host, as over Gloo."""

    def __init__(
        self,
        inbox: queue.SimpleQueue,
        outbox: queue.SimpleQueue,
        deadline_s: float | None = None,
        device: torch.device | None = None,
    ):
        self._inbox, self._outbox, self._deadline_s = inbox, outbox, deadline_s
        self._device = device or torch.device("cpu")
        self.bytes_sent = self.bytes_received = 0  # nothing crosses a wire

    @staticmethod
    def pair(deadline_s: float | None = None, device: torch.device | None = None) -> tuple[LocalLink, LocalLink]:
        """The trainer's end, which gives up after `deadline_s`, and the server's, which never does."""
        there, back = queue.SimpleQueue(), queue.SimpleQueue()
        return LocalLink(back, there, deadline_s, device), LocalLink(there, back, device=device)

    def send(self, header: Header, tensors: Sequence[torch.Tensor | Rows] = ()) -> None:
        payload = to_host(pack(tensors))
        self._outbox.put((replace(header, payload_bytes=payload.numel()), payload))

    def wait_message(self) -> tuple[Header, torch.Tensor]:
        try:
            header, payload = self._inbox.get(timeout=self._deadline_s)
        except queue.Empty:
            raise LinkError(f"no message within {self._deadline_s:g} s") from None
        return header, to_device(payload, self._device)
