"""How much of the wire does overlap hide?

One trainer with a dedicated attention server behind a wire that takes as long as a layer: paired steps of an unmodified
model, as one nano-batch after the other and as two strands.

    python tests/measure_overlap.py [--ms 100] [--rounds 3] [--layers 3 12]

What a layer, the head and their backward take is slept, not computed, so that the figure is that of a trainer with a
processor of its own, on any machine. A layer's attention projections are a quarter of it; the head takes as long as
two layers (Llama 3 8B: 2.4); backward takes twice as long as forward, on the wire too.

    compute   both nano-batches, one after the other, attended at home: no wire, no server
    wire      both nano-batches' rows, there and back, all layers, forward and backward
    sum       one nano-batch after the other
    overlap   two strands; its last column is what counts: over the larger of compute and wire"""

import argparse
import statistics
import sys
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

from delayed_link import DelayedLink
from in_process import attention_of_ranks
from two_strands import LENGTHS, make_module

from distca.masks import MaskRule
from distca.parallel.core_attention import Exchange
from distca.parallel.server import AttentionServer
from distca.plan import PlanInputs, make_pool

HEAD_LAYERS, PROJECTIONS = 2.0, 0.25


class Sleep(torch.autograd.Function):
    """Nothing, for `seconds` forward and twice as many backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_x):
        time.sleep(2 * ctx.seconds)
        return d_x, None


def sleeping_model(layers: int, layer_s: float):
    """A small Llama whose modules take their time."""
    module = make_module(num_hidden_layers=layers)

    def slow(part: torch.nn.Module, seconds: float):
        part.register_forward_hook(lambda _module, _inputs, out: Sleep.apply(out, seconds))

    for layer in module.model.model.layers:
        slow(layer.input_layernorm, PROJECTIONS * layer_s)
        slow(layer.mlp, (1 - PROJECTIONS) * layer_s)
    slow(module.model.model.norm, HEAD_LAYERS * layer_s)
    return module


def attend_at_home(q_THD, k_TGD, v_TGD, *_):
    """What a call takes without a server; the mask makes no difference to that."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


class Trainer:
    """One trainer and one server; every message takes half of a layer's time."""

    def __init__(self, layers: int, layer_s: float, wire_s: float):
        self.module, self._pool, self._step = sleeping_model(layers, layer_s), make_pool(1, 1, False), 0
        near, far = DelayedLink.pair((wire_s / 2, wire_s))
        AttentionServer(0, "torch", torch.device("cpu")).serve(0, far)
        self._exchange = Exchange(0, {0: near})

    def nano_batch(self, lengths: list[int], at_home: bool) -> dict:
        if at_home:
            site = attend_at_home
        else:
            inputs = PlanInputs(np.array(lengths), (MaskRule(),), 1, self._pool, 20_000, 16)
            (site,) = attention_of_ranks([self._exchange], inputs, self._step)
        self._step += 1
        ids = torch.arange(sum(lengths)) % 96
        positions = torch.cat([torch.arange(length) for length in lengths])
        return dict(input_ids=ids, position_ids=positions, labels=ids, distca=site)

    def seconds(self, overlap: bool, at_home: bool = False) -> tuple[float, float]:
        """Forward and backward of both nano-batches."""
        forward_s = backward_s = 0.0
        batches = [self.nano_batch(lengths, at_home) for lengths in LENGTHS]
        for together in [batches] if overlap else [[batch] for batch in batches]:
            start = time.perf_counter()
            loss = self.module(together)
            middle = time.perf_counter()
            loss.backward()
            forward_s, backward_s = forward_s + middle - start, backward_s + time.perf_counter() - middle
        return forward_s, backward_s


def measure(layers: int, layer_s: float, rounds: int) -> None:
    trainer = Trainer(layers, layer_s, layer_s)
    ways = {"compute": (False, True), "sum": (False, False), "overlap": (True, False)}
    for way in ways.values():
        trainer.seconds(*way)  # warm up
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(trainer.seconds(*way))
    wire = np.array([2 * layers * layer_s, 4 * layers * layer_s])
    for part, name in enumerate(("forward", "backward", "step")):
        pick = sum if name == "step" else itemgetter(part)
        took = {what: statistics.median(map(pick, times)) for what, times in found.items()}
        ideal = max(took["compute"], pick(wire))
        print(
            f"{layers:2} layers, {name:8}  compute {took['compute']:6.3f} s  wire {pick(wire):6.3f} s  "
            f"sum {took['sum']:6.3f} s  overlap {took['overlap']:6.3f} s  = {took['overlap'] / ideal:.3f} x the larger"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=float, default=100.0, help="milliseconds of a layer, forward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for layers in asked.layers:
        measure(layers, asked.ms / 1e3, asked.rounds)
