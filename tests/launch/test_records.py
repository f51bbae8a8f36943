"""What is recorded of a step is what the step used, and counts go on from what was counted."""

import dataclasses
import json
import math

import numpy as np
import pytest
from team import make_settings

from distca.errors import UserError
from distca.launch.run.train import _record, _refuse_bad_numbers
from distca.launch.run.trainer import PlanSummary, TrainerReport
from distca.parallel.core_attention import CallStatistics
from distca.parallel.server import ServerReport


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path, [30, 70], train=dict(tokens_per_step=100), parallel=dict(trainers=2))


SUMMARY = PlanSummary(np.array([7, 1]), np.array([4, 4]), num_tasks=2, predicted_bytes=0, flops=8e9)


def report(summed_loss=120.0, targets=80, **others) -> TrainerReport:
    learnt = dict(grad_norm=0.5, learning_rate=1e-3, plan=SUMMARY, load_packed=np.array([9, 3]))
    nothing = dict(grad_norm=None, learning_rate=None, plan=None, load_packed=None)
    of_step = dict(cursor=(2, 0), lengths=np.array([30, 70]), epoch=0, plan_s=0.0, data_wait_s=0.0, rss_mib=1.0)
    of_workers = dict(exchange=CallStatistics(), server=ServerReport())
    values = dict(summed_loss=summed_loss, targets=targets, **of_step, **of_workers)
    return TrainerReport(**values | (learnt if targets else nothing) | others)


def test_the_loss_is_the_mean_over_the_targets_that_exist(settings):
    record = _record(settings, 1, 0.1, dict(tokens_seen=0, targets_seen=0), [report(120.0), report(0.0)], [])
    assert (record.loss, record.learning_rate, record.grad_norm) == (1.5, 1e-3, 0.5)
    assert (record.tokens, record.targets, record.tokens_seen, record.targets_seen) == (100, 80, 100, 80)


def test_what_balancing_did_is_recorded_stage_by_stage(settings):
    record = _record(settings, 1, 0.1, dict(tokens_seen=0, targets_seen=0), [report()] * 2, [])
    assert (record.imbalance_packed, record.imbalance_placed, record.imbalance_planned) == (1.5, 1.75, 1.0)


def test_flops_are_shared_by_all_workers_and_waiting_is_split_into_exposed_and_hidden(tmp_path):
    dedicated = dict(trainers=2, servers=2, trainers_serve=False)
    settings = make_settings(tmp_path, [30, 70], train=dict(tokens_per_step=100), parallel=dedicated)
    trainers = [
        report(server=None, exchange=CallStatistics(wait_s=wait_s, hidden_s=hidden_s))
        for wait_s, hidden_s in ((0.1, 0.6), (0.3, 0.2))
    ]
    servers = [(ServerReport(busy_s=0.5), 1.0)] * 2
    record = _record(settings, 1, 0.5, dict(tokens_seen=0, targets_seen=0), trainers, servers)
    assert record.tflops_per_worker == pytest.approx(8e9 / 0.5 / 4 / 1e12)
    assert (record.wait_s, record.hidden_s) == (pytest.approx(0.2), pytest.approx(0.4))


def test_a_step_without_targets_has_no_loss_and_nothing_that_an_update_has(settings):
    record = _record(settings, 4, 0.1, dict(tokens_seen=300, targets_seen=9), [report(0.0, 0)] * 2, [])
    _refuse_bad_numbers(record, saved=0)
    assert (record.tokens_seen, record.targets_seen, record.num_documents) == (400, 9, 2)
    assert "no targets" in record.line()
    assert not {"loss", "grad_norm", "learning_rate", "imbalance_planned"} & record.fields().keys()


def test_counts_go_on_under_other_settings_and_through_a_checkpoints_facts(settings):
    """Steps before a resume had another size: they are not counted anew."""
    first = _record(settings, 1, 0.1, dict(tokens_seen=0, targets_seen=0), [report()] * 2, [])
    facts = json.loads(json.dumps(first.fields(), allow_nan=False))
    larger = settings.model_copy(update={"train": settings.train.model_copy(update={"tokens_per_step": 600})})
    second = _record(larger, 2, 0.1, facts, [report(targets=500)] * 2, [])
    assert (second.tokens_seen, second.targets_seen) == (700, 580)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (dict(summed_loss=math.nan), "step 3 has a loss of nan: "),
        (dict(grad_norm=math.inf), "step 3 has a gradient norm of inf: "),
        (dict(summed_loss=math.inf, grad_norm=math.nan), "a loss of inf and a gradient norm of nan: "),
    ],
)
@pytest.mark.parametrize(("saved", "newest"), [(0, "it has no checkpoint yet"), (2, "newest checkpoint is of step 2")])
def test_numbers_that_are_none_end_the_run_in_a_sentence(settings, numbers, said, saved, newest):
    good = _record(settings, 3, 0.1, dict(tokens_seen=0, targets_seen=0), [report()] * 2, [])
    _refuse_bad_numbers(good, saved)
    trainers = [dataclasses.replace(report(), **numbers), report()]
    bad = _record(settings, 3, 0.1, dict(tokens_seen=0, targets_seen=0), trainers, [])
    with pytest.raises(UserError) as error:
        _refuse_bad_numbers(bad, saved)
    assert said in str(error.value) and newest in str(error.value) and "\n" not in str(error.value)
