"""DeepSpeed around two strands: the gradients of a plain backward, and under ZeRO 3 no weight stays once it has gone."""

import multiprocessing
import os

import pytest
import torch
from two_strands import LLAMA, gradients_of, make_batches, make_module

from distca.config import validate_settings
from distca.parallel.attach import checkpoint_activations
from distca.parallel.engine import Engine
from distca.plan import make_pool

pytestmark = pytest.mark.slow

WIDE = dict(
    hidden_size=352, intermediate_size=400, num_hidden_layers=2
)  # DeepSpeed never splits weights of fewer than 100,000 numbers
PASSES = 3  # ZeRO 3 notes the order of modules in the second and fetches ahead in the third


@pytest.mark.parametrize(("zero_stage", "checkpointing"), [(0, False), (1, False), (2, True), (3, False), (3, True)])
def test_gradients_and_weights_under_zero(zero_stage, checkpointing, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distca.parallel.engine", "transformers.models.llama.modeling_llama"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_passes, args=(theirs, tmp_path / "store", zero_stage, checkpointing), daemon=True)
    process.start()
    theirs.close()
    errors, held = ours.recv()
    process.join()
    assert max(errors) < 1e-5
    if zero_stage == 3:
        assert held == [0] * PASSES, f"gathered weights of layers when backward has passed them all: {held}"


def _passes(pipe, store, zero_stage, checkpointing):
    import torch.distributed as dist

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    train = dict(tokens_per_step=64, steps=1, precision="fp32")
    settings = validate_settings(
        dict(
            model=dict(config=LLAMA),
            data=dict(sources=[dict(path="none")]),
            train=train,
            parallel=dict(zero_stage=zero_stage),
        )
    )
    pool, module = make_pool(1, 1, True), make_module(**WIDE)
    wanted = gradients_of(module, make_batches([], pool))[1:]
    module.zero_grad()
    if checkpointing:
        checkpoint_activations(module.model)
    engine = Engine(module, settings, torch.device("cpu"), PASSES)
    layers, held = module.model.model.layers, []

    def note_weights(_gradient):
        """The gradient of an embedded nano-batch comes last."""
        held.append(sum(p.ds_status.name == "AVAILABLE" and not p.ds_persist for p in layers.parameters()))

    if zero_stage == 3:
        embedding = module.model.get_input_embeddings()
        embedding.register_forward_hook(lambda _module, _inputs, out: out.register_hook(note_weights) and None)
    for number in range(PASSES):
        batches = make_batches([], pool)
        engine.backward(engine.forward(batches), 1)
        if number < PASSES - 1:
            engine.step(0.0)
    got = engine.full_gradients().values()
    errors = [float((g - PASSES * w).norm() / (PASSES * w).norm()) for g, w in zip(got, wanted, strict=True)]
    pipe.send((errors, held[1::2]))
