"""The engine, DeepSpeed around a model on the device, and a trainer's pass over its rows: shown without a GPU.

PyTorch's `fake` process group stands in for NCCL: it says yes to everything, which is right for one rank alone. What
more ranks do to each other, only GPUs can show; what they do on CPUs, test_exactness.py does."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from fake_cuda import fake_cuda
from two_strands import LLAMA, gradients_of, make_batches, make_module

from distca.config import validate_settings
from distca.plan import make_pool

pytestmark = pytest.mark.slow

CUDA, STAGES = torch.device("cuda"), (0, 1, 2, 3)


def test_gradients_of_every_zero_stage_and_of_a_trainers_pass():
    """In a process of its own: DeepSpeed asks once for the kind of device."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    errors, norms = ours.recv()
    process.join()
    assert max(errors.values()) < 1e-5, errors
    assert len(errors) == len(STAGES) + 1 and len({round(norm, 3) for norm in norms}) == 1


def _run(pipe) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cuda")
    torch.set_num_threads(1)
    with fake_cuda():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        pipe.send(_errors())


def _errors() -> tuple[dict[str, float], list[float]]:
    from deepspeed.accelerator import get_accelerator

    from distca.launch.run.trainer import MicroBatch, Trainer
    from distca.parallel.engine import Engine, PlainEngine
    from distca.trace import Trace

    _complete(get_accelerator())
    pool, errors, norms = make_pool(1, 1, False), {}, []
    wanted = gradients_of(make_module(), make_batches([], pool))[1:]

    def error_of(engine) -> float:
        found = engine.full_gradients().values()
        return max(float((x - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True))

    for stage in STAGES:
        engine = Engine(_on_device(), _settings(stage), CUDA, 1)
        batches = make_batches([], pool, CUDA, "torch")
        engine.backward(engine.forward(batches), 1)
        errors[f"ZeRO {stage}"] = error_of(engine)
        engine.step(0.1)
        norms.append(engine.gradient_norm())
        assert engine.weights_are_finite()

    trainer, batches = object.__new__(Trainer), make_batches([], pool, CUDA, "reference")
    trainer._engine, trainer._device = PlainEngine(_on_device(torch.float64), _settings(0), CUDA, 1), CUDA
    trainer._trace = Trace()
    nano_batches = []
    for batch in batches:
        attention = batch["distca"]
        trainer._exchange = attention.exchange
        rows = tuple(batch[name].cpu().numpy() for name in ("input_ids", "position_ids", "labels"))
        nano_batches.append(
            MicroBatch(attention.step, most_rows=len(rows[0]), routes=attention.routes, rows=rows, summary=None)
        )
    trainer._forward_backward(tuple(nano_batches), 1)
    errors["a trainer's pass"] = error_of(trainer._engine)
    return errors, norms


def _on_device(dtype=torch.float32):
    torch.__future__.set_swap_module_params_on_conversion(True)
    module = make_module(dtype).to(CUDA)
    torch.__future__.set_swap_module_params_on_conversion(False)  # DeepSpeed moves it once more, from CUDA to CUDA
    return module


def _settings(stage: int):
    return validate_settings(
        dict(
            model=dict(config=LLAMA),
            data=dict(sources=[dict(path="none")]),
            train=dict(tokens_per_step=64, steps=1, precision="fp32"),
            parallel=dict(zero_stage=stage),
        )
    )


def _complete(accelerator) -> None:
    """What DeepSpeed asks its accelerator for and fake_cuda does not have: marks for profilers, sizes of memory."""
    for name in ("range_push", "range_pop", "empty_cache", "reset_peak_memory_stats"):
        setattr(accelerator, name, lambda *_args, **_kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "total_memory", "available_memory"):
        setattr(accelerator, name, lambda *_args, **_kwargs: 0)
    accelerator.is_available, accelerator.device_count = lambda: True, lambda: 1
