"""What does a run know about its own speed, before its first step? Enough to decide about overlap,
and to say what it takes."""

from __future__ import annotations

import os

import torch

from distca.config import RunSettings
from distca.cost import PICOSECONDS, AttentionShape
from distca.kernels.merge import statistics_dtype
from distca.overlap import Decision, Outlook
from distca.parallel.attach import AttentionCall
from distca.parallel.models import PretrainedConfig, activation_bytes, num_matrix_weights
from distca.parallel.precision import DTYPES
from distca.payoff import predicted
from distca.plan import PlanInputs
from distca.planner import plan_step

MIB = 2**20


def outlook_of(
    settings: RunSettings, inputs: PlanInputs, calls: list[AttentionCall], config: PretrainedConfig, device: str
) -> Outlook:
    """From a micro-batch's `inputs`; with seconds only where the settings say how fast wire and kernels are."""
    parallel = settings.parallel
    workers = parallel.trainers + parallel.servers
    own = device == "cuda" or workers * parallel.threads <= len(os.sched_getaffinity(0))
    if not inputs.wires or not own or parallel.overlap != "auto":
        return Outlook(own, parallel.servers)
    attention_s = wire_s = server_s = flops = 0.0
    for rule in inputs.rules:
        layers = [call for call in calls if call.rule == rule]
        shape = shape_of(layers[0], DTYPES[settings.train.precision])
        for direction, wire in enumerate(inputs.wires):
            directions = (False, True) if len(inputs.wires) == 1 else (bool(direction),)
            flops_of_pair = sum(shape.flops(1, backward) for backward in directions)
            tflops = settings.planner.wire.tflops
            units_per_s = PICOSECONDS if tflops is None else tflops * 1e12 / flops_of_pair
            plan = plan_step(inputs, rule, direction)
            alone = predicted(plan)
            attention_s += len(layers) * alone / units_per_s
            wire_s += len(layers) * (predicted(plan, wire) - alone) / units_per_s
            server_s += len(layers) * int(plan.load().sum()) / units_per_s
            flops += len(layers) * int(plan.bands.area().sum()) * flops_of_pair
    repeats = 8 if settings.model.activation_checkpointing else 6  # operations for each weight and token
    work = repeats * num_matrix_weights(config) * settings.tokens_per_rank
    return Outlook(own, parallel.servers, work * server_s / flops if flops else 0.0, attention_s, wire_s)


def describe_overlap(settings: RunSettings, decision: Decision, config: PretrainedConfig) -> str:
    """In words, with the memory that the second strand takes on each trainer."""
    if not decision.on:
        return f"off: {decision.reason}"
    per_token = activation_bytes(
        config, DTYPES[settings.train.precision], checkpointing=settings.model.activation_checkpointing
    )
    held = settings.tokens_per_rank * per_token / MIB
    about = f"about {held:,.0f} MiB of activations ({per_token / 1024:,.1f} KiB per token)"
    if settings.accumulation == 1:
        return f"on: {decision.reason}; a rank's tokens in two parts, {about}, as without"
    return f"on: {decision.reason}; two micro-batches at once, {about} each"


def shape_of(call: AttentionCall, dtype: torch.dtype) -> AttentionShape:
    """What a layer's rows cost on the wire."""
    return AttentionShape(
        call.query_heads, call.kv_heads, call.head_dim, dtype.itemsize, statistics_dtype(dtype).itemsize
    )
