"""The back end "flash" brings any task list into calls that FlashAttention's operator can do, and adds them up.

What the calls compute is shown by test_attention.py, with the operators emulated; here is how they are cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_painted import count
from problems import ALL, CASES, NONE, Problem, assert_as_good_as_plain, causal, joined, pieces_of, run_in_nan_memory

from distca.kernels import flash
from distca.kernels.capability import refusal
from distca.kernels.flash import Call, calls_of
from distca.masks import Bands

ROWS, KEYS = 13, 17


@st.composite
def task_lists(draw) -> Bands:
    def band():
        q0, q1 = sorted(draw(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS))))
        k0, k1 = sorted(draw(st.tuples(st.integers(0, KEYS), st.integers(0, KEYS))))
        diagonal = st.one_of(st.sampled_from([NONE, ALL]), st.integers(-15, 18))
        return q0, q1, k0, k1, draw(diagonal), draw(diagonal)

    return Bands.of(*(band() for _ in range(draw(st.integers(0, 5)))))


def bands_of(call: Call) -> Bands:
    """What the operator makes of a call: windows around the diagonal that ends in each sequence's last corner."""
    s = call.sequences
    corner = (s.k1 - s.k0) - (s.q1 - s.q0)
    lo = corner - call.left if call.left >= 0 else corner + NONE
    hi = corner + call.right if call.right >= 0 else corner + ALL
    return Bands(s.q0, s.q1, s.k0, s.k1, lo, hi)


@settings(max_examples=100, deadline=None)
@given(tasks=task_lists(), keys_per_call=st.sampled_from([5, 30, flash.KEYS_PER_CALL]))
def test_calls_hold_each_pair_of_the_tasks_once(tasks, keys_per_call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "KEYS_PER_CALL", keys_per_call)
        calls = list(calls_of(tasks))
    found = sum((count(bands_of(call), ROWS, KEYS) for call in calls), np.zeros((ROWS, KEYS), np.int64))
    assert np.array_equal(found, count(tasks, ROWS, KEYS))
    for call in calls:
        assert call.left >= -1 and call.right in (-1, 0)
        assert (bands_of(call).area() > 0).all()
        for at in range(len(call.sequences)):
            one = count(bands_of(call)[at : at + 1], ROWS, KEYS)
            seen = one[call.sequences.q0[at] : call.sequences.q1[at], call.sequences.k0[at] : call.sequences.k1[at]]
            assert seen.any(1).all() and seen[:, 0].any() and seen[:, -1].any(), (
                "no row, and no last key, is for nothing"
            )


@settings(max_examples=50, deadline=None)
@given(tasks=task_lists())
def test_a_row_that_several_tasks_cover_is_counted_in_list_order(tasks):
    """Tasks of a row that see its keys: the n-th of them gives the part that is merged n-th."""
    expected = {q: [] for q in range(ROWS)}
    for at in range(len(tasks)):
        for q in np.flatnonzero(count(tasks[at : at + 1], ROWS, KEYS).any(1)):
            expected[int(q)].append(count(tasks[at : at + 1], ROWS, KEYS)[q])
    found = {q: {} for q in range(ROWS)}
    for call in calls_of(tasks):
        painted = [count(bands_of(call)[at : at + 1], ROWS, KEYS) for at in range(len(call.sequences))]
        index = np.repeat(np.arange(len(call.sequences)), call.sequences.q1 - call.sequences.q0)
        for q, at, nth in zip(call.rows().tolist(), index, call.nth.tolist(), strict=True):
            assert nth not in found[q]
            found[q][nth] = painted[at][q]
    for q in range(ROWS):
        assert sorted(found[q]) == list(range(len(expected[q])))
        assert all(np.array_equal(found[q][n], keys) for n, keys in enumerate(expected[q]))


@pytest.mark.parametrize(
    "tasks, masks",
    [
        (causal(5, 700, 129), [(-1, 0)]),
        (joined(pieces_of(causal(5, 700, 129), [100, 228, 701], "q")), [(-1, 0)]),
        (joined(pieces_of(causal(700), [128, 300], "k")), [(-1, -1), (-1, 0)]),
        (joined(pieces_of(Bands.of((0, 700, 0, 700, -99, 0)), [300, 428], "q")), [(99, 0)]),
        (Bands.of((0, 700, 0, 700, -99, 0), (700, 750, 700, 750, -99, 0)), [(-1, 0), (99, 0)]),
        (Bands.of((0, 5, 0, 9, NONE, ALL)), [(-1, -1)]),
        (Bands.of((0, 90, 0, 20, 0, 40)), [(0, -1)]),
    ],
    ids=["documents", "cut along rows", "cut along keys", "a window, cut", "a short one", "full", "keys run out"],
)
def test_documents_under_one_rule_need_few_calls(tasks, masks):
    assert [(call.left, call.right) for call in calls_of(tasks)] == masks


def test_keys_are_copied_for_a_bounded_number_of_sequences_at_a_time():
    n = np.arange(1000)
    shards = Bands(n * 8, n * 8 + 8, 0 * n, 0 * n + 1024, 0 * n + NONE, 0 * n + ALL)
    calls = list(calls_of(shards))
    assert max(len(call.keys()) for call in calls) <= flash.KEYS_PER_CALL + 1024
    assert len(calls) == 8 and sum(len(call.rows()) for call in calls) == 8000


def test_many_short_documents_fit_into_one_launch():
    """A sequence is a row of the launch, of which there are 65,535."""
    calls = list(calls_of(causal(*[1] * 200_000)))
    assert max(len(call.sequences) for call in calls) < 65_536 and sum(len(call.rows()) for call in calls) == 200_000


def test_a_cpu_is_refused_in_words():
    plain = {"head_dim": 64, "dtype": torch.bfloat16, "softcap": 0.0}
    sentence = refusal("flash", **plain, device_type="cpu")
    assert "'flash'" in sentence and "does not exist on cpu" in sentence and "kernels.backend: torch" in sentence


def test_a_gpu_needs_a_pytorch_with_it(monkeypatch):
    plain = {"head_dim": 64, "dtype": torch.bfloat16, "softcap": 0.0, "device_type": "cuda"}
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "needs FlashAttention, which this PyTorch is built without" in refusal("flash", **plain)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert refusal("flash", **plain) is None
    assert "bfloat16, float16; head sizes that are multiples of 8 up to 256; no softcap" in refusal(
        "flash", **plain | {"dtype": torch.float32}
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="would show that the operator, emulated elsewhere, does what we take it to do"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_errs_at_most_twice_as_much_as_plain_attention(name, head_dim, dtype):
    problem = Problem.of(*CASES[name], (8, 2), head_dim).to(dtype)
    found = run_in_nan_memory(problem.to(dtype, "cuda"), "flash")
    assert_as_good_as_plain([x.cpu() for x in found], problem)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that equal calls give an equal out and lse")
def test_a_gpu_gives_the_same_bits_forward():
    problem = Problem.of(*CASES["sinks and a window"], (8, 2), 128).to(torch.bfloat16, "cuda")
    first = problem.forward("flash")
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(problem.forward("flash"), first, strict=True))
