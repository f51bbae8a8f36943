"""Is a distributed step right? The same documents, weights and loss on one device, by Transformers' own attention.

The reference knows nothing of us: each document alone, unpacked, through the stock model (`sdpa`, or `eager` where
attention is soft-capped), its own positions, labels shifted here by hand, plain cross entropy summed over the targets
that are left and divided by their number. What must agree:

    fp64   loss and every gradient within 1e-10 (relative, 2-norm)
    fp32   within 1e-5
    bf16   at most twice as far from an fp32 reference as a plain bf16 run of one device is
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from distca.config import RunSettings
from distca.parallel.models import build_model, read_config
from distca.parallel.precision import DTYPES, Fp64Throughout

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5}
BF16_FACTOR = 2.0
BF16_FLOOR = 1e-3  # below this both runs are noise
NEGLIGIBLE = (
    1e-7  # a parameter whose true gradient is zero (a key bias) has no relative error: it is held to the whole gradient
)


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it is stored: labels as Hugging Face means them, each token's own, -100 where it is none."""

    ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ParameterError:
    """How far a parameter's gradient is from the reference."""

    name: str
    error: float
    """|g - reference| / |reference|, 2-norms."""
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for nan


@dataclass(frozen=True, slots=True)
class Comparison:
    """A distributed step beside a single device."""

    step: int
    """Which one; steps before it have nothing to learn."""
    loss: float
    reference_loss: float
    loss_allowed: float
    parameters: tuple[ParameterError, ...]
    """Worst first, measured by how much of what is allowed they use."""
    num_documents: int
    num_tokens: int

    @property
    def loss_error(self) -> float:
        return _relative(abs(self.loss - self.reference_loss), abs(self.reference_loss))

    @property
    def passed(self) -> bool:
        return self.loss_error <= self.loss_allowed and all(p.passed for p in self.parameters)


def compare_with_one_device(
    settings: RunSettings, step: int, documents: list[Document], loss: float, gradients: dict[str, torch.Tensor]
) -> Comparison:
    """Run the reference in this process and compare; `gradients` by name in `PackedCausalLM`."""
    precision = settings.train.precision
    exact = "fp32" if precision == "bf16" else precision
    reference_loss, reference = single_device_step(settings, documents, DTYPES[exact])
    whole = float(torch.stack([g.double().norm() for g in reference.values()]).norm())
    if precision == "bf16":
        plain_loss, plain = single_device_step(settings, documents, torch.bfloat16)
        loss_allowed = max(BF16_FLOOR, BF16_FACTOR * _relative(abs(plain_loss - reference_loss), abs(reference_loss)))
        allowed = {name: max(BF16_FLOOR, BF16_FACTOR * _error(plain[name], g, whole)) for name, g in reference.items()}
    else:
        loss_allowed, allowed = TOLERANCES[precision], dict.fromkeys(reference, TOLERANCES[precision])
    parameters = [
        ParameterError(name, _error(gradients.get(f"model.{name}"), g, whole), allowed[name])
        for name, g in reference.items()
    ]
    parameters.sort(key=lambda p: p.error / p.allowed if p.error == p.error else float("inf"), reverse=True)
    num_tokens = sum(map(len, documents))
    return Comparison(step, loss, reference_loss, loss_allowed, tuple(parameters), len(documents), num_tokens)


def single_device_step(
    settings: RunSettings, documents: list[Document], dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all targets, and every parameter's gradient, of the stock model in one process."""
    m = settings.model
    config = read_config(m.path, m.config, m.revision)
    attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
    model = build_model(config, m.path, m.revision, DTYPES[settings.train.precision], settings.seed, attention)
    for parameter in model.parameters():  # the run's own weights, rounded as the run rounds them
        parameter.data = parameter.data.to(dtype)
    model.train()
    targets = sum(int((document.labels[1:] != -100).sum()) for document in documents)
    total = 0.0
    with Fp64Throughout() if dtype == torch.float64 else nullcontext():
        for document in documents:
            keep = torch.from_numpy(document.labels[1:] != -100)
            if not keep.any():
                continue
            logits = model(input_ids=torch.from_numpy(document.ids)[None], use_cache=False).logits[0, :-1][keep]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            wanted = torch.from_numpy(document.labels[1:])[keep]
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return total, gradients


def _error(gradient: torch.Tensor | None, reference: torch.Tensor, whole: float) -> float:
    """Relative to the parameter's own gradient; where that is nothing beside the whole gradient,
    relative to the whole."""
    if gradient is None:
        return float("inf")
    size = float(reference.double().norm())
    difference = float((gradient.double() - reference.double()).norm())
    return _relative(difference, size if size > NEGLIGIBLE * whole else whole)


def _relative(difference: float, size: float) -> float:
    """Beside nothing, no difference is none and any other is infinite."""
    return difference / size if size else 0.0 if difference == 0 else float("inf")
