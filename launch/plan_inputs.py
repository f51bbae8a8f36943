"""What would a run plan from? The lengths of its own documents, its pool and its planner's settings, without starting
it."""

from __future__ import annotations

import numpy as np
import torch

from distca.config import RunSettings
from distca.cost import AttentionShape
from distca.hardware import costs_of, wires_of
from distca.launch.data import Corpus, DocumentStream
from distca.launch.outlook import describe_overlap, outlook_of, shape_of
from distca.launch.prepare import prepare
from distca.launch.runs import absolute_paths
from distca.launch.server import pool_of
from distca.masks import MaskRule
from distca.order import Cursor
from distca.overlap import decide
from distca.parallel.models import layers_of, read_config
from distca.parallel.precision import DTYPES
from distca.plan import MILLION, PlanInputs


def overlap_of_run(settings: RunSettings, lengths: np.ndarray) -> str:
    """Whether a run on this machine would overlap two nano-batches, why, and what memory that takes."""
    m, planner, precision = settings.model, settings.planner, DTYPES[settings.train.precision]
    config = read_config(m.path, m.config, m.revision)
    calls = layers_of(config)
    inputs = PlanInputs(
        lengths,
        tuple(sorted({call.rule for call in calls})),
        settings.parallel.trainers,
        pool_of(settings),
        round(planner.tolerance * MILLION),
        planner.block,
        max(call.query_heads // call.kv_heads for call in calls),
        costs_of(planner),
        wires_of(planner, shape_of(calls[0], precision)),
    )
    parallel, asked = settings.parallel, settings.parallel.device
    enough = torch.cuda.device_count() >= parallel.trainers + parallel.servers
    device = ("cuda" if enough else "cpu") if asked == "auto" else asked
    decision = decide(parallel.overlap, outlook_of(settings, inputs, calls, config, device))
    return describe_overlap(settings, decision, config)


def inputs_of_run(settings: RunSettings, micro_batch: int) -> PlanInputs:
    """What a run's trainers plan its n-th micro-batch from (1 is the first), under a causal mask."""
    settings = absolute_paths(settings)
    m, planner = settings.model, settings.planner
    config = read_config(m.path, m.config, m.revision)
    corpus = Corpus(prepare(settings.data, config.vocab_size, m.path, m.revision))
    stream = DocumentStream(corpus, settings.data, settings.seed, settings.tokens_per_micro_batch)
    cursor = Cursor()
    for _ in range(micro_batch):
        pieces, cursor = stream.pieces(cursor)
    first = layers_of(config)[0]
    precision = DTYPES[settings.train.precision]
    shape = AttentionShape(first.query_heads, first.kv_heads, first.head_dim, precision.itemsize)
    return PlanInputs(
        pieces.lengths,
        (MaskRule(),),
        settings.parallel.trainers,
        pool_of(settings),
        round(planner.tolerance * MILLION),
        planner.block,
        first.query_heads // first.kv_heads,
        costs_of(planner),
        wires_of(planner, shape),
    )
