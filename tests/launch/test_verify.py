"""The reference that a distributed step is compared with."""

import math

import numpy as np
import pytest
import torch
from oracle import Oracle
from team import make_settings

from distca.launch.data.batches import NO_TARGET
from distca.launch.run.verify import Comparison, Document, ParameterError, compare_with_one_device, single_device_step


def documents_of(*labels: list[int]) -> list[Document]:
    return [Document(np.arange(len(x)) + 3, np.array(x)) for x in labels]


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path, [10], train=dict(precision="fp64"))


def test_the_reference_shifts_labels_and_divides_by_the_targets_that_are_left(settings):
    documents = documents_of([1, 2, NO_TARGET, 4], [9] + [NO_TARGET] * 5, [7], [5, 5, 5])
    loss, gradients = single_device_step(settings, documents, torch.float64)
    oracle = Oracle(settings, torch.float64)
    wanted_loss, wanted = oracle.gradients([(d.ids.tolist(), d.labels.tolist()) for d in documents])
    assert loss == pytest.approx(wanted_loss, rel=1e-14)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-16)
    found = compare_with_one_device(settings, 3, documents, loss, {f"model.{n}": g for n, g in wanted.items()})
    assert found.passed and (found.step, found.num_documents, found.num_tokens) == (3, 4, 14)


@pytest.mark.parametrize(
    ("loss", "reference", "error"), [(0.0, 0.0, 0.0), (1e-9, 0.0, math.inf), (1.5, 1.0, 0.5), (math.nan, 0.0, math.inf)]
)
def test_errors_beside_nothing_are_none_or_infinite(loss, reference, error):
    found = Comparison(1, loss, reference, 1e-5, (ParameterError("w", 0.0, 1e-5),), 1, 2)
    assert found.loss_error == error and found.passed == (error == 0.0)


def test_a_model_without_any_gradient_is_compared_without_dividing_by_zero(tmp_path):
    """With one token in the vocabulary nothing can be learnt: loss and gradients are zero."""
    settings = make_settings(tmp_path, [10], model=dict(vocab_size=1, pad_token_id=None), train=dict(precision="fp64"))
    documents = [Document(np.zeros(4, np.int64), np.zeros(4, np.int64))]
    loss, gradients = single_device_step(settings, documents, torch.float64)
    found = compare_with_one_device(settings, 1, documents, loss, {f"model.{n}": g for n, g in gradients.items()})
    assert loss == 0.0 and found.passed
