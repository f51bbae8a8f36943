"""Which transport carries a run's links?

A decision made from numbers alone; parallel/transport.py makes what is chosen.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from distca.errors import SettingsError

Transports = Literal["auto", "pairs", "group", "nixl"]
MOST_WORKERS_IN_PAIRS = 16  # above it pairs' threads, sockets and seconds to open grow past a node's comfort
NIXL_PACKAGES = ("nixl_cu13", "nixl_cu12")


def choose_transport(wanted: Transports, num_workers: int) -> str:
    """The transport of a run: what was asked for, or with `auto` pairs up to 16 workers and one group above.

    NIXL comes on request only, as long as no cluster has measured it."""
    if wanted != "auto":
        return wanted
    return "pairs" if num_workers <= MOST_WORKERS_IN_PAIRS else "group"


def refuse_transport(wanted: Transports) -> None:
    """Raise SettingsError where this machine lacks what the transport needs."""
    if wanted == "nixl" and nixl_package() is None:
        raise SettingsError(
            "parallel.transport: nixl needs the package nixl, which is not installed: pip install 'distca[nixl]' (on "
            "Linux; nixl-cu13 beside a torch for CUDA 13), or set parallel.transport: auto"
        )


def nixl_package() -> str | None:
    """Name of the installed package that holds NIXL's interface, or None."""
    return next((name for name in NIXL_PACKAGES if importlib.util.find_spec(name)), None)
