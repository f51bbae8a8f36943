"""What a back end cannot compute exactly is refused in a sentence that says what would work."""

import pytest
import torch

from distca.errors import Unsupported
from distca.kernels import capability
from distca.kernels.attention import BACKENDS, attend
from distca.kernels.capability import CAPABILITIES, refusal
from distca.masks import Bands

PLAIN = {"head_dim": 64, "dtype": torch.bfloat16, "softcap": 0.0, "device_type": "cpu"}


@pytest.mark.parametrize("backend, device_type", sorted({*CAPABILITIES} - {("triton", "cpu"), ("flash", "cuda")}))
def test_plain_attention_is_refused_by_no_back_end(backend, device_type):
    assert refusal(backend, **PLAIN | {"device_type": device_type}) is None


def test_triton_needs_its_interpreter_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    single = PLAIN | {"dtype": torch.float32}
    sentence = refusal("triton", **single)
    assert "interpreter" in sentence and "TRITON_INTERPRET=1" in sentence and "kernels.backend: torch" in sentence
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal("triton", **single) is None
    assert "float32, float16" in refusal("triton", **PLAIN), "the interpreter computes bf16 wrongly"


def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(capability, "find_spec", lambda name: None)
    assert "needs Triton, which is not installed" in refusal("triton", **PLAIN | {"device_type": "cuda"})


def test_the_table_and_the_back_ends_have_the_same_names():
    assert {backend for backend, _ in CAPABILITIES} == set(BACKENDS)


@pytest.mark.parametrize(
    "backend, asked, words",
    [
        ("torch", {"softcap": 30.0}, ["'torch'", "softcap 30", "no softcap", "kernels.backend: reference"]),
        ("torch", {"head_dim": 20, "device_type": "cuda"}, ["head size 20", "multiples of 8", "kernels.backend: ref"]),
        ("torch", {"dtype": torch.float64, "device_type": "cuda"}, ["float64", "float32", "kernels.backend: ref"]),
        ("torch", {"dtype": torch.float8_e4m3fn}, ["float8_e4m3fn", "bfloat16", "change the dtype"]),
        ("triton", {"head_dim": 512, "device_type": "cuda"}, ["up to 256", "kernels.backend: torch"]),
        ("triton", {"dtype": torch.float64, "device_type": "cuda"}, ["float64", "float32", "kernels.backend: ref"]),
        ("flashy", {}, ["'flashy'", "does not exist on cpu", "kernels.backend: torch"]),
        ("torch", {"device_type": "mps"}, ["does not exist on mps", "change the dtype or the device"]),
    ],
    ids=str,
)
def test_a_refusal_says_what_was_asked_what_is_possible_and_what_to_set(backend, asked, words):
    sentence = refusal(backend, **PLAIN | asked)
    assert not [word for word in words if word not in sentence], sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_attend_raises_the_refusal():
    q, k = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    with pytest.raises(Unsupported, match="kernels.backend: reference"):
        attend(q, k, k, Bands.of((0, 4, 0, 4, 0, 0)), scale=1.0, softcap=5.0, backend="torch")


@pytest.mark.parametrize(
    "tasks", [(0, 5, 0, 4, 0, 0), (0, 4, 1, 5, 0, 0), (-1, 2, 0, 2, 0, 0), (3, 2, 0, 1, 0, 0)], ids=str
)
def test_tasks_outside_of_the_rows_are_an_error_of_ours(tasks):
    q, k = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    with pytest.raises(AssertionError, match="tasks outside of 4 rows x 4 keys"):
        attend(q, k, k, Bands.of(tasks), scale=1.0, backend="torch")
