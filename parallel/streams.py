"""In which order do the threads of a process use its GPU?

Whatever computes, the model and a server's kernels alike, is launched on the device's *default stream*, from whichever
thread: so tensors go from thread to thread without anybody waiting. What brings rows in or out has *side streams*, so
that it neither queues behind kernels which it does not need nor keeps them waiting for a wire:

    default    | kernels of call 1 | kernels of call 2 | kernels of call 3 |
    sending                        '> gather answer 1, to the host or NCCL |
    receiving  | rows of call 3, from the host or NCCL |

Out of the default stream leads an event of the moment when the rows were complete (`mark`, `running_on`). Into it leads
the host: what a side stream has brought is handed on when it is there, and with `record_stream`, so that PyTorch does
not give its memory to the side stream again before the default stream has read it. Nothing waits for the whole device.

On a CPU all of this is nothing: what is asked for is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A new one. Its launches are short and others wait for them,
    so they go before those that queue on the default stream."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Of this thread: the default one, where nobody has set another."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def mark(device: torch.device) -> torch.cuda.Event | None:
    """When all that this thread's stream has been asked for so far is done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def running_on(stream: torch.cuda.Stream | None, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """What is launched within runs on `stream`, once `after` has happened."""
    if stream is None:
        yield
        return
    if after:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield


def keep(stream: torch.cuda.Stream | None, tensors: Iterable[torch.Tensor]) -> None:
    """Whatever becomes of these tensors, their memory stays as it is for what `stream` has been asked for."""
    for x in tensors:
        if x.is_cuda:
            x.record_stream(stream)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy for the host to read, in pinned memory; waits until this thread's stream has made it, for no other."""
    if x.device.type == "cpu":
        return x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    mark(x.device).synchronize()
    return copy


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same tensor on `device`, complete when this returns; for launches of this thread's stream.

    A copy from pinned memory (`host_buffer`) spares one more copy on the host."""
    if x.device.type == device.type:
        return x
    consumer = torch.cuda.current_stream(device)
    with running_on(_copies_to(device)):
        there = x.pin_memory().to(device, non_blocking=True)
        mark(device).synchronize()  # nothing else is on this stream; `x` may change afterwards
    keep(consumer, [there])
    return there


def host_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """(bytes,) uint8 on the host, for copies to `device` or from it. Memory that is free again is not pinned anew."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


@lru_cache
def _copies_to(device: torch.device) -> torch.cuda.Stream:
    return side_stream(device)
