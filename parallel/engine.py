"""How does DeepSpeed train the model, and what of it do we switch off or mend?

The default process group is the trainers' alone: DeepSpeed makes its groups over it.
The only file that imports deepspeed."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from glob import has_magic
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist

os.environ.setdefault(
    "DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"
)  # left to itself, DeepSpeed guesses aloud

import deepspeed
import deepspeed.ops
from deepspeed.runtime import compiler
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_grad, zero_to_fp32
from deepspeed.utils.tensor_fragment import fragment_address
from torch.nn.utils import clip_grad_norm_

from distca.config import RunSettings
from distca.parallel.precision import Fp64Throughout, refuse_precision

# DeepSpeed imports its Muon optimizer for every run, only to ask whether it is the one, and decorating Muon's functions
# loads torch's whole compiler: 3.5 of the 4 seconds that making an engine takes. Nobody calls them here.
with mock.patch.object(compiler, "compile", lambda: lambda function: function):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

# DeepSpeed calls what PyTorch has given new names; no user can change that.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


class Engine:
    """A DeepSpeed engine around a module that returns a summed loss; `passes` are the backwards of a step."""

    def __init__(self, module: torch.nn.Module, settings: RunSettings, device: torch.device, passes: int):
        _quieten(device)
        train, self._settings, self._passes = settings.train, settings, passes
        refuse_precision(settings)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        optimizer = torch.optim.AdamW(
            _parameter_groups(module, train.optimizer.weight_decay),
            lr=train.optimizer.learning_rate,
            betas=(train.optimizer.beta1, train.optimizer.beta2),
            eps=train.optimizer.eps,
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, dist_init_required=False, config=_deepspeed_config(settings, passes)
        )
        self._gradient_norm: float | None = None
        if settings.parallel.zero_stage == 3:
            _release_after_each_backward(self.deepspeed)
        # DeepSpeed casts buffers too; rotary frequencies must not be
        for name, buffer in self.deepspeed.module.named_buffers():
            buffer.data = buffers[name].to(buffer.device)

    def forward(self, nano_batches: list[dict]) -> torch.Tensor:
        return self.deepspeed(nano_batches=nano_batches)

    def backward(self, summed_loss: torch.Tensor, targets_in_step: int) -> None:
        """Add the gradient of the mean loss over all targets of the step, of which `summed_loss` is this pass's part
        here.

        DeepSpeed averages over ranks and passes, so the sum is scaled up by their number."""
        parts = self._settings.parallel.trainers * self._passes
        self.deepspeed.backward(summed_loss * (parts / targets_in_step))

    def step(self, learning_rate: float) -> None:
        """Apply the pass; the weights are updated, at this rate, when the accumulated ones are complete.

        A gradient that is not finite updates nothing: the weights stay what they were."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._settings.parallel.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
            self._gradient_norm = self._clip()
        self.deepspeed.step()

    def gradient_norm(self) -> float:
        """Of the last step's whole gradient, before clipping; not finite where the step was refused."""
        return float(self.deepspeed.get_global_grad_norm() if self._gradient_norm is None else self._gradient_norm)

    def weights_are_finite(self) -> bool:
        """Whether this trainer's share of them is."""
        return _are_finite(self.deepspeed.module)

    def _clip(self) -> float:
        """What DeepSpeed's optimizers do in the other stages; in stage 0 it has none of its own, clips without a word
        and applies whatever comes out."""
        largest = self._settings.train.clip_grad_norm or float("inf")
        norm = float(clip_grad_norm_(self.deepspeed.module.parameters(), largest))
        if not math.isfinite(norm):
            self.deepspeed.zero_grad()  # AdamW passes over parameters without a gradient
        return norm

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Every parameter's gradient, whole and on the CPU, before `step` of the last pass; a collective call."""
        gradients = {}
        for name, parameter in self.deepspeed.module.named_parameters():
            full = parameter.grad if self._settings.parallel.zero_stage == 0 else safe_get_full_grad(parameter)
            gradients[name] = full.detach().to("cpu", copy=True) if full is not None else None
        return gradients

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into `folder`; a collective call."""
        self.deepspeed.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; a collective call."""
        groups = self.deepspeed.optimizer.param_groups
        asked = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        with _weights_only(), _without_magic(folder) as plain:
            path, _ = self.deepspeed.load_checkpoint(str(plain), tag=TAG)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
        # a checkpoint brings the optimizer's state, the settings its numbers
        for group, values in zip(self.deepspeed.optimizer.param_groups, asked, strict=True):
            group.update(values)
        if self._settings.parallel.zero_stage:
            self.deepspeed.optimizer.clip_grad = self._settings.train.clip_grad_norm


class PlainEngine:
    """The same gradients without DeepSpeed, which knows no fp64:
    plain sums over trainers. It verifies, it does not train."""

    def __init__(self, module: torch.nn.Module, settings: RunSettings, device: torch.device, passes: int):
        self._module = module.to(device)
        for part in module.modules():  # each for itself: layers are recomputed where no mode of the caller's holds
            part.forward = _in_fp64(part.forward)

    def forward(self, nano_batches: list[dict]) -> torch.Tensor:
        return self._module(nano_batches)

    def backward(self, summed_loss: torch.Tensor, targets_in_step: int) -> None:
        (summed_loss / targets_in_step).backward()

    def full_gradients(self) -> dict[str, torch.Tensor]:
        gradients = {}
        for name, parameter in self._module.named_parameters():
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(total)
            gradients[name] = total.cpu()
        return gradients

    def weights_are_finite(self) -> bool:
        return _are_finite(self._module)


def _in_fp64(forward: Callable) -> Callable:
    @wraps(forward)
    def widened(*arguments, **keywords):
        with Fp64Throughout():
            return forward(*arguments, **keywords)

    return widened


TAG = "deepspeed"
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def full_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a saved checkpoint in one process, by name in the saved module."""
    states = folder / TAG / "mp_rank_00_model_states.pt"  # whole, unless ZeRO 3 has split the weights
    with _weights_only(), _without_magic(folder) as plain, _in_silence():
        if states.exists():
            return torch.load(states, map_location="cpu", weights_only=True)["module"]
        return zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(plain), tag=TAG)


@contextmanager
def _in_silence() -> Iterator[None]:
    """DeepSpeed says what it gathers, and draws bars."""
    with redirect_stdout(StringIO()), mock.patch.object(zero_to_fp32, "tqdm", lambda items, **_: items):
        yield


@contextmanager
def _without_magic(folder: Path) -> Iterator[Path]:
    """The folder under a name that DeepSpeed, which looks for files by patterns, does not take for one."""
    if not has_magic(str(folder)):
        yield folder
        return
    with TemporaryDirectory() as place:
        link = Path(place) / "checkpoint"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


@contextmanager
def _weights_only():
    """DeepSpeed loads with weights_only=False, which runs whatever a hostile file says;
    allow tensors and its own few classes."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(FORCE) if before is None else os.environ.update({FORCE: before})


def _release_after_each_backward(engine: deepspeed.DeepSpeedEngine) -> None:
    """Under ZeRO 3, let a module's gathered weights go after each of its backwards.

    DeepSpeed counts a module's inputs that still need a gradient in one number per module, which every forward sets
    back to 0: of two forwards before a backward, as strands make them, only one would release, and at the end of
    backward all weights would be there. Here every forward counts its own."""
    for module in engine.module.modules():
        module.post_bwd_fn = _counting_release(module, engine.optimizer.parameter_offload)


def _counting_release(module: torch.nn.Module, offload) -> type[torch.autograd.Function]:
    class Release(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.detach()

        @staticmethod
        def setup_context(ctx, inputs, output):
            if not inputs[0].requires_grad:
                return
            if module.ds_grads_remaining == 0:  # the first input of a forward
                module.distca_inputs_left = [0]
            module.ds_grads_remaining += 1
            ctx.left = module.distca_inputs_left
            ctx.left[0] += 1

        @staticmethod
        def backward(ctx, *gradients):
            ctx.left[0] -= 1
            if ctx.left[0] == 0:
                offload.post_sub_module_backward_function(module)
            return gradients

    return Release


def _deepspeed_config(settings: RunSettings, passes: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,  # one packed row; tokens are our unit
        "gradient_accumulation_steps": passes,
        "gradient_clipping": settings.train.clip_grad_norm if settings.parallel.zero_stage else 0.0,  # see Engine._clip
        "zero_optimization": {"stage": settings.parallel.zero_stage},
        "bf16": {"enabled": settings.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _are_finite(module: torch.nn.Module) -> bool:
    weights = (getattr(p, "ds_tensor", p) for p in module.parameters())  # under ZeRO 3, what this trainer holds
    return all(bool(torch.isfinite(w).all()) for w in weights)


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (norms, biases) do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _quieten(device: torch.device) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # this op is compiled at first use (over a minute) and leaves 69 MB per process in /dev/shm;
        # ZeRO does not need it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
