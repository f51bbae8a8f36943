"""Where do the workers of a run find each other? At a key-value store of the driver's."""

from __future__ import annotations

import datetime
import socket

import torch.distributed as dist


def rendezvous_store(host: str, timeout_s: float = 120.0) -> tuple[dist.TCPStore, int]:
    """The driver's key-value store, in which workers find each other, and its port. Listens on `host` alone."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.bind(address)
    listener.listen(1024)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # left alone, the store would listen on every interface
    )
    return store, port


def connect_store(host: str, port: int, timeout_s: float = 120.0) -> dist.TCPStore:
    """A worker's connection to the driver's `rendezvous_store`."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
