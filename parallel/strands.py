"""How do two nano-batches take turns, so that one computes while the other's attention is away?

Each runs the unmodified model on a thread of its own, a *strand*; they hand a baton to one another inside every
attention call, between sending and waiting, and only who holds it runs:

    strand 0   layer 0, send |                | wait, layer 1, send |                     | wait, layer 2 ...
    strand 1                 | layer 0, send  |                     | wait, layer 1, send |
    wire, servers             0 0 0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 0 0 0

Backward needs nothing of this. Autograd runs what was recorded last first, so it meets the operators in the reverse
order and alternates by itself, in one thread. It goes by numbers that each thread counts for itself: a strand that
takes the baton first counts on to where the other one stopped.

Threads rather than coroutines, because torch keeps modes (gradients, autocast, checkpointing) per thread: a strand that
stops inside a layer must not leave its modes to the other.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Stopped(BaseException):
    """Ends a strand because another one failed."""


def run_strands(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the functions return, run in turns that change at every `hand_over`.

    The first error of a strand is raised here; the other strands end at their next turn. Torch's modes of the caller
    hold in the strands, each of which draws random numbers of its own: a layer that is recomputed in one go gets
    those it had. One function alone runs right here."""
    if len(functions) == 1:
        return [functions[0]()]
    baton, ambient = _Baton(len(functions)), _Ambient()
    results: list[Any] = [None] * len(functions)
    seeds = torch.randint(2**62, (len(functions),)).tolist()
    before = _random_state()

    def strand(me: int, function: Callable[[], Any]) -> None:
        _here.hand_over = lambda: baton.hand_over(me)
        try:
            with ExitStack() as stack:
                baton.wait_turn(me)
                ambient.enter(stack)
                torch.manual_seed(seeds[me])
                results[me] = function()
        except BaseException as error:
            baton.fail(error)
        finally:
            baton.leave(me)

    threads = [
        threading.Thread(
            target=contextvars.copy_context().run, args=(strand, me, function), name=f"strand-{me}", daemon=True
        )
        for me, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # such as an interrupt, which reaches the main thread only
        baton.fail(error)
        raise
    finally:
        for thread in threads:
            thread.join()
        _set_random_state(before)
    if baton.failure is not None:
        raise baton.failure
    return results


def hand_over() -> None:
    """Let the other strands run until it is this one's turn again; outside of strands, nothing."""
    getattr(_here, "hand_over", _nothing)()


_here = threading.local()


def _nothing() -> None:
    pass


class _Baton:
    """Whose turn it is, and how far autograd has counted."""

    def __init__(self, num_strands: int):
        self._turns = [threading.Semaphore(me == 0) for me in range(num_strands)]
        self._running = list(range(num_strands))
        self._sequence = 0
        self.failure: BaseException | None = None

    def wait_turn(self, me: int) -> None:
        self._turns[me].acquire()
        if self.failure is not None:
            raise Stopped
        _count_up_to(self._sequence)

    def hand_over(self, me: int) -> None:
        if len(self._running) == 1:
            return
        random = _random_state()
        self._pass_on(self._after(me))
        self.wait_turn(me)
        _set_random_state(random)

    def fail(self, error: BaseException) -> None:
        """The first failure counts; whoever gets a turn from here on stops."""
        if self.failure is None and not isinstance(error, Stopped):
            self.failure = error

    def leave(self, me: int) -> None:
        following = self._after(me)
        self._running.remove(me)
        if self._running:
            self._pass_on(following)

    def _after(self, me: int) -> int:
        return self._running[(self._running.index(me) + 1) % len(self._running)]

    def _pass_on(self, to: int) -> None:
        self._sequence = torch.autograd._get_sequence_nr()
        self._turns[to].release()


class _Ambient:
    """What of torch's state belongs to the calling thread."""

    def __init__(self):
        self._contexts: list[Callable[[], Any]] = []
        if torch.cuda.is_initialized():
            device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
            self._contexts += [lambda: torch.cuda.device(device), lambda: torch.cuda.stream(stream)]
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._contexts += [lambda: torch.inference_mode(inference), lambda: torch.set_grad_enabled(gradients)]
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                self._contexts.append(_autocast(device_type))
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks:
            self._contexts.append(lambda: torch.autograd.graph.saved_tensors_hooks(*hooks))
        modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
        self._contexts += [lambda mode=mode: mode for mode in modes]

    def enter(self, stack: ExitStack) -> None:
        for context in self._contexts:
            stack.enter_context(context())


def _autocast(device_type: str) -> Callable[[], Any]:
    dtype, cache = torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device_type, dtype, cache_enabled=cache)


def _count_up_to(sequence: int) -> None:
    """Advance this thread's count of autograd nodes, which nothing but making nodes does: one for each tensor here.

    Outside of the modes that may be on: these nodes are no part of the model."""
    missing = sequence - torch.autograd._get_sequence_nr()
    if missing > 0:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.enable_grad():
            torch.atleast_1d([torch.zeros((), requires_grad=True)] * missing)


def _random_state() -> list[torch.Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda)
