"""Can this back end compute that? A table, and the sentence that refuses what is not in it.

A new back end adds its rows here. Settings are checked against this table before step 1, and `attend` checks once more.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _nothing() -> None:
    return None


def _triton() -> str | None:
    return None if find_spec("triton") else "Triton, which is not installed"


def _interpreter() -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch; it has no other
    return _triton() or (None if interpreted else "Triton's interpreter, slow and for tests: TRITON_INTERPRET=1")


def _flash() -> str | None:
    built = torch.backends.cuda.is_flash_attention_available()
    return None if built else "FlashAttention, which this PyTorch is built without"


@dataclass(frozen=True, slots=True)
class Capability:
    """What one back end can do on one kind of device."""

    dtypes: tuple[torch.dtype, ...]
    softcap: bool
    head_dim_step: int = 1
    """Head sizes must be multiples of this."""
    max_head_dim: int | None = None
    missing: Callable[[], str | None] = _nothing
    """What it needs and does not find here, in words; None where it finds everything."""

    def __str__(self) -> str:
        sizes = f"head sizes that are multiples of {self.head_dim_step}" if self.head_dim_step > 1 else "any head size"
        sizes += f" up to {self.max_head_dim}" if self.max_head_dim else ""
        softcap = "with or without softcap" if self.softcap else "no softcap"
        return f"{', '.join(_short(dtype) for dtype in self.dtypes)}; {sizes}; {softcap}"

    def can(self, head_dim: int, dtype: torch.dtype, softcap: float) -> bool:
        fits = head_dim % self.head_dim_step == 0 and head_dim <= (self.max_head_dim or head_dim)
        return dtype in self.dtypes and fits and (self.softcap or not softcap) and not self.missing()


# (back end, torch.device.type); in order of preference where several can do the same
CAPABILITIES: dict[tuple[str, str], Capability] = {
    ("torch", "cpu"): Capability(FLOATS, softcap=False),
    ("torch", "cuda"): Capability(FLOATS[1:], softcap=False, head_dim_step=8),
    ("triton", "cuda"): Capability(FLOATS[1:], softcap=True, head_dim_step=8, max_head_dim=256, missing=_triton),
    # the interpreter multiplies bf16 numbers as if they were integers, and says nothing
    ("triton", "cpu"): Capability((torch.float32, torch.float16), softcap=True, max_head_dim=256, missing=_interpreter),
    ("flash", "cuda"): Capability(FLOATS[2:], softcap=False, head_dim_step=8, max_head_dim=256, missing=_flash),
    ("reference", "cpu"): Capability(FLOATS, softcap=True),
    ("reference", "cuda"): Capability(FLOATS, softcap=True),
}


def refusal(backend: str, *, head_dim: int, dtype: torch.dtype, softcap: float, device_type: str) -> str | None:
    """None where `backend` can compute this exactly; else a sentence: what was asked, what is possible, what to set."""
    capability = CAPABILITIES.get((backend, device_type))
    if capability and capability.can(head_dim, dtype, softcap):
        return None
    able = [name for (name, kind), c in CAPABILITIES.items() if kind == device_type and c.can(head_dim, dtype, softcap)]
    asked = f"head size {head_dim} in {_short(dtype)}" + (f" with softcap {softcap:g}" if softcap else "")
    there = f"on {device_type} it can do: {capability}" if capability else f"it does not exist on {device_type}"
    if capability and (missing := capability.missing()):
        there = f"on {device_type} it needs {missing}"
    advice = f"set `kernels.backend: {able[0]}`" if able else "no back end can: change the dtype or the device"
    return f"kernels.backend '{backend}' cannot compute core attention for {asked} ({there}); {advice}."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
