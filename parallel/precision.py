"""In which precision does a run compute, and which can it train with?

Without DeepSpeed: the driver asks this too, and starts a second faster for not importing it."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from distca.config import RunSettings
from distca.errors import Unsupported

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def refuse_precision(settings: RunSettings) -> None:
    """Raise Unsupported for a precision that DeepSpeed does not train with, or wrongly."""
    if settings.train.precision == "fp64":
        raise Unsupported("train.precision: fp64 is for `distca verify`; DeepSpeed trains with fp32 or bf16")
    if settings.train.precision == "bf16" and settings.parallel.zero_stage == 0:
        # DeepSpeed's stage-0 bf16 optimizer steps once on zero gradients,
        # which shifts Adam's bias correction by one step
        raise Unsupported("train.precision: bf16 needs parallel.zero_stage of at least 1; stage 0 trains with fp32")


class Fp64Throughout(TorchFunctionMode):
    """Where a model asks for fp32 by name (norms, rotary angles), it gets fp64: its own rounding would hide ours."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widen = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{name: widen(x) for name, x in (kwargs or {}).items()})
