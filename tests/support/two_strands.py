"""A small model over two nano-batches in one process, with attention servers behind local links."""

import numpy as np
import torch
from in_process import CPU, attention_of_ranks, make_exchanges

from distca.masks import MaskRule
from distca.parallel.attach import StrandedCausalLM
from distca.parallel.core_attention import CoreAttention
from distca.parallel.models import build_model, read_config
from distca.plan import PlanInputs, make_pool

LAYERS = 3
LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
LENGTHS = ([9, 22, 1], [40, 3])  # of the two nano-batches


class Noted(CoreAttention):
    """A CoreAttention that notes what it does."""

    def note_in(self, name: str, events: list[str]):
        self.name, self.events = name, events
        return self

    def send_forward(self, *arguments):
        super().send_forward(*arguments)
        self.events.append(f"send {self.name}{arguments[3]}")

    def wait_forward(self, q, call):
        self.events.append(f"wait {self.name}{call}")
        return super().wait_forward(q, call)

    def send_backward(self, *arguments):
        super().send_backward(*arguments)
        self.events.append(f"send back {self.name}{arguments[-1]}")

    def wait_backward(self, *arguments):
        self.events.append(f"wait back {self.name}{arguments[-1]}")
        return super().wait_backward(*arguments)


def make_module(dtype=torch.float32, **changes) -> StrandedCausalLM:
    config = read_config(None, LLAMA | changes)
    return StrandedCausalLM(build_model(config, None, None, dtype, seed=0), 16).train()


def make_batches(events: list[str], pool=None, device=CPU, backend="reference") -> list[dict]:
    """A nano-batch for each of `LENGTHS`, on one rank with the servers of `pool`."""
    pool = pool or make_pool(1, 1, False)
    (exchange,), _servers = make_exchanges(1, pool, backend, device)
    batches = []
    for step, (name, lengths) in enumerate(zip("ab", LENGTHS, strict=True)):
        inputs = PlanInputs(np.array(lengths), (MaskRule(),), 1, pool, 20_000, 16)
        sites = attention_of_ranks([exchange], inputs, step, device=device)
        site = Noted(exchange, step, sites[0].routes).note_in(name, events)
        ids = torch.arange(sum(lengths)) * 7 % 96
        order = sites.tokens
        positions = torch.cat([torch.arange(length) for length in lengths])[order]
        rows = dict(input_ids=ids[order], position_ids=positions, labels=(ids * 5 % 96)[order])
        batches.append({name: x.to(device) for name, x in rows.items()} | dict(distca=site))
    return batches


def gradients_of(module, batches) -> list[torch.Tensor]:
    module.zero_grad()
    loss = module(batches)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters())]
