"""What does a run plan from? The lengths of its documents, its pool and its planner's settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np
import torch

from distca.config import RunSettings
from distca.hardware import plan_inputs
from distca.launch.cluster.places import who_is_where
from distca.launch.data.batches import Corpus, DocumentStream
from distca.launch.data.prepare import prepare
from distca.launch.folder.paths import absolute_paths
from distca.launch.run.outlook import describe_overlap, outlook_of, shape_of
from distca.launch.run.server import pool_of
from distca.masks import MaskRule
from distca.order import Cursor
from distca.overlap import decide
from distca.parallel.attach import AttentionCall
from distca.parallel.models import layers_of, read_config
from distca.parallel.precision import DTYPES
from distca.plan import PlanInputs


def plan_inputs_of(settings: RunSettings, calls: Sequence[AttentionCall], lengths: np.ndarray) -> PlanInputs:
    """What trainers and servers plan a micro-batch of these lengths from; `calls` are the model's layers."""
    return plan_inputs(
        settings.planner,
        lengths,
        tuple(sorted({call.rule for call in calls})),
        settings.parallel.trainers,
        pool_of(settings),
        shape_of(calls[0], DTYPES[settings.train.precision]),
        max(call.query_heads // call.kv_heads for call in calls),
    )


def knowing_nodes(settings: RunSettings, hosts: Sequence[str]) -> RunSettings:
    """The settings with what the planner is told of nodes, where they price the wire inside a node and say no more;
    `hosts` are those of the trainers, then of the dedicated servers, each one's workers in a row."""
    planner, wire, trainers = settings.planner, settings.planner.wire, settings.parallel.trainers
    if not wire.gb_per_s_in_node:
        return settings
    of_servers = Counter(hosts[trainers : trainers + settings.parallel.servers])  # a race's pools take the first ones
    of_trainers = Counter(hosts[:trainers])
    *full, last = of_trainers.values()
    most = max(of_trainers.values())
    ranks_per_node = most if set(full) <= {most} else gcd(*full, last)  # runs of equal length, the last may be shorter
    # a neighbourhood is a run of equal length of trainers, and one of dedicated servers
    is_even = len({(number, of_servers[host]) for host, number in of_trainers.items()}) == 1
    number = len(of_trainers) if is_even and of_servers.keys() <= of_trainers.keys() else 1
    found = dict(
        wire=wire.model_copy(update=dict(ranks_per_node=wire.ranks_per_node or ranks_per_node)),
        neighbourhoods=planner.neighbourhoods or number,
    )
    return settings.model_copy(update=dict(planner=planner.model_copy(update=found)))


def uneven_nodes(settings: RunSettings, hosts: Sequence[str]) -> str | None:
    """What the planner takes nodes for that hold unequal numbers of workers, in words; None where it knows them as they
    are, where the settings say it all, and where they do not ask."""
    asked, known = settings.planner, knowing_nodes(settings, hosts).planner
    of_trainers, taken = Counter(hosts[: settings.parallel.trainers]), []
    if not asked.wire.ranks_per_node and (size := known.wire.ranks_per_node or 0):
        if size < max(of_trainers.values()):
            taken.append(f"planner.wire.ranks_per_node: {size}")
    if not asked.neighbourhoods and known.neighbourhoods and known.neighbourhoods < len(set(hosts)):
        taken.append(f"planner.neighbourhoods: {known.neighbourhoods}")
    where = who_is_where(hosts, settings.parallel.trainers)
    return f"hosts hold unequal numbers of workers ({where}): plans go by {', '.join(taken)}" if taken else None


def overlap_of_run(settings: RunSettings, lengths: np.ndarray) -> str:
    """Whether a run on this machine would overlap two nano-batches, why, and what memory that takes."""
    m, parallel = settings.model, settings.parallel
    config = read_config(m.path, m.config, m.revision)
    calls = layers_of(config)
    enough = torch.cuda.device_count() >= parallel.trainers + parallel.servers
    device = ("cuda" if enough else "cpu") if parallel.device == "auto" else parallel.device
    outlook = outlook_of(settings, plan_inputs_of(settings, calls, lengths), calls, config, device)
    return describe_overlap(settings, decide(parallel.overlap, outlook), config)


def inputs_of_run(settings: RunSettings, micro_batch: int) -> PlanInputs:
    """What a run would plan its n-th micro-batch from (1 is the first), under a causal mask; the run is not started."""
    settings = absolute_paths(settings)
    m = settings.model
    config = read_config(m.path, m.config, m.revision)
    corpus = Corpus(prepare(settings.data, config.vocab_size, m.path, m.revision))
    stream = DocumentStream(corpus, settings.data, settings.seed, settings.tokens_per_micro_batch)
    cursor = Cursor()
    for _ in range(micro_batch):
        pieces, cursor = stream.pieces(cursor)
    return replace(plan_inputs_of(settings, layers_of(config), pieces.lengths), rules=(MaskRule(),))
