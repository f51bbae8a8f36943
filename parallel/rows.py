"""How do rows get into messages and out of them?

A route's row numbers become tensors on the device once, when its plan is made, and serve all layers.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import numpy as np
import torch

from distca.parallel.streams import to_device
from distca.routes import ServerRoute, TrainerRoute

Route = TypeVar("Route", TrainerRoute, ServerRoute)


def on_device(route: Route, device: torch.device) -> Route:
    """The same route with tensors on `device` for arrays, also in its links. All go there in one copy."""
    holders = [route, *route.links]
    tables = [{f.name: x for f in fields(at) if isinstance(x := getattr(at, f.name), np.ndarray)} for at in holders]
    arrays = [x for table in tables for x in table.values()]
    if not arrays:
        return route
    there = iter(to_device(torch.from_numpy(np.concatenate(arrays)), device).split([len(x) for x in arrays]))
    moved = [replace(at, **{name: next(there) for name in table}) for at, table in zip(holders, tables, strict=True)]
    return replace(moved[0], links=tuple(moved[1:]))
