"""How do rows get into messages and out of them?

A route's row numbers become tensors on the device once, when its plan is made, and serve all layers.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import numpy as np
import torch

from distca.routes import ServerRoute, TrainerRoute

Route = TypeVar("Route", TrainerRoute, ServerRoute)


def on_device(route: Route, device: torch.device) -> Route:
    """The same route with tensors on `device` for arrays, also in its links."""
    return _with_tensors(replace(route, links=tuple(_with_tensors(at, device) for at in route.links)), device)


def _with_tensors(at, device: torch.device):
    arrays = {f.name: getattr(at, f.name) for f in fields(at)}
    tables = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)}
    return replace(at, **{name: torch.from_numpy(x).to(device) for name, x in tables.items()})
