"""How one plain process trains: the stock model on each document alone, labels shifted by hand, the loss summed over
the targets that are left and divided by their number, torch's AdamW. Of a run it knows its settings' numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from distca.config import RunSettings
from distca.parallel.precision import Fp64Throughout

Step = Sequence[tuple[Sequence[int], Sequence[int]]]  # documents, each as ids and labels


class Oracle:
    def __init__(self, settings: RunSettings, dtype: torch.dtype = torch.float32):
        torch.manual_seed(settings.seed)
        config = AutoConfig.for_model(**settings.model.config)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").to(dtype)
        self._exactly = Fp64Throughout if dtype == torch.float64 else nullcontext
        weights = list(self.model.parameters())
        matrices, vectors = [w for w in weights if w.dim() >= 2], [w for w in weights if w.dim() < 2]
        self._optimizer = torch.optim.AdamW([dict(params=matrices), dict(params=vectors)], lr=0.0)
        self.go_by(settings)

    def go_by(self, settings: RunSettings) -> None:
        """Take the settings' numbers from here on."""
        self._clip, o = settings.train.clip_grad_norm, settings.train.optimizer
        for group, weight_decay in zip(self._optimizer.param_groups, (o.weight_decay, 0.0), strict=True):
            group.update(betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=weight_decay)

    def gradients(self, documents: Step) -> tuple[float, dict[str, torch.Tensor]]:
        """The mean loss over the documents' targets and its gradients."""
        self.model.zero_grad()
        total, targets = 0.0, sum(label != -100 for _, labels in documents for label in labels[1:])
        for ids, labels in documents:
            if len(ids) < 2:
                continue
            with self._exactly():
                logits = self.model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
                loss = cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum", ignore_index=-100)
                (loss / targets).backward()
            total += float(loss.detach())
        return total / targets, {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def step(self, documents: Step, rate: float) -> tuple[float, float]:
        """Train on a step's documents at this rate; the loss, and the gradient's norm before clipping."""
        loss, gradients = self.gradients(documents)
        norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
        if self._clip and norm > self._clip:
            for parameter in self.model.parameters():
                parameter.grad *= self._clip / norm
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return loss, norm

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}
