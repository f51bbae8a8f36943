"""Strands take turns at every attention call, forward and backward; errors, modes and random numbers are in order."""

import threading
from functools import partial

import pytest
import torch
from two_strands import LAYERS, gradients_of, make_batches, make_module

from distca.parallel.attach import PackedCausalLM, checkpoint_activations
from distca.parallel.strands import hand_over, run_strands
from distca.plan import make_pool

FORWARD = (
    ["send a0", "send b0"]
    + [event for layer in range(LAYERS - 1) for s in "ab" for event in (f"wait {s}{layer}", f"send {s}{layer + 1}")]
    + [f"wait {s}{LAYERS - 1}" for s in "ab"]
)


def reversed_order(forward: list[str]) -> list[str]:
    swap = {"send": "wait back", "wait": "send back"}
    return [" ".join((swap[e.split()[0]], e.split()[1])) for e in reversed(forward)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_forward_and_backward_alternate_and_each_call_happens_once(checkpointing):
    module, events = make_module(), []
    if checkpointing:
        checkpoint_activations(module.model)
    gradients_of(module, make_batches(events))
    assert events == FORWARD + reversed_order(FORWARD)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pool", [make_pool(1, 0, True), make_pool(1, 2, False), make_pool(1, 1, True)], ids=str)
def test_two_strands_give_the_gradients_of_one_after_the_other(pool, checkpointing):
    module = make_module(torch.float64)
    if checkpointing:
        checkpoint_activations(module.model)
    together = gradients_of(module, make_batches([], pool))
    apart = [gradients_of(module, [batch]) for batch in make_batches([], pool)]
    for got, *parts in zip(together, *apart, strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=1e-12, atol=1e-12)
    again = gradients_of(module, make_batches([], pool))
    assert all(map(torch.equal, together, again))


def test_layers_that_draw_random_numbers_are_recomputed_with_the_same_ones():
    """Dropout that comes after the attention of a checkpointed layer: between both halves the other strand draws."""
    module = make_module(torch.float64)
    for layer in module.model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _m, _x, out: torch.nn.functional.dropout(out, 0.5))
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _x, out: torch.nn.functional.dropout(out, 0.5))
    torch.manual_seed(5)
    kept = gradients_of(module, make_batches([]))
    checkpoint_activations(module.model)
    torch.manual_seed(5)
    recomputed = gradients_of(module, make_batches([]))
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.equal(gradients_of(module, make_batches([]))[0], kept[0]), "dropout is on"


def test_only_one_strand_runs_and_turns_go_round():
    seen, running = [], threading.Lock()

    def strand(name, calls):
        for call in range(calls):
            assert running.acquire(blocking=False)
            seen.append(f"{name}{call}")
            running.release()
            hand_over()
        return name

    assert run_strands([partial(strand, *x) for x in (("a", 2), ("b", 4), ("c", 0))]) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "a1", "b1", "b2", "b3"], "a strand with more calls goes on alone"


def test_outside_of_strands_there_is_nobody_to_hand_over_to():
    hand_over()
    assert run_strands([lambda: hand_over() or 5]) == [5]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_comes_out_as_itself_and_ends_the_other_strand(failing):
    ended = []

    def fails():
        hand_over()
        raise LookupError("as it is")

    def goes_on():
        try:
            while True:
                hand_over()
        finally:
            ended.append(True)

    functions = [goes_on, goes_on]
    functions[failing] = fails
    before = threading.active_count()
    with pytest.raises(LookupError, match="as it is"):
        run_strands(functions)
    assert ended == [True] and threading.active_count() == before


def test_torchs_modes_of_the_caller_hold_in_the_strands():
    class Doubled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is torch.relu else out

    def strand():
        hand_over()
        x = torch.ones(2, 2, requires_grad=True)
        return torch.is_grad_enabled(), (x @ x).dtype, float(torch.relu(x.detach())[0, 0])

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Doubled():
        assert run_strands([strand, strand]) == [(False, torch.bfloat16, 2.0)] * 2
    assert run_strands([strand, strand]) == [(True, torch.float32, 1.0)] * 2


def test_strands_draw_other_numbers_than_each_other_and_the_same_in_every_run():
    def strand():
        first = torch.rand(3)
        hand_over()
        return torch.cat([first, torch.rand(3)])

    def draw():
        torch.manual_seed(3)
        return [*run_strands([strand, strand]), torch.rand(3)]

    first, second, after = draw()
    assert not torch.equal(first, second)
    assert all(map(torch.equal, draw(), (first, second, after)))


def test_a_nano_batch_alone_is_a_plain_forward():
    module, (first, _) = make_module(), make_batches([])
    plain = PackedCausalLM.forward(module, **first)
    (first, _) = make_batches([])
    assert torch.equal(plain, module([first]))
