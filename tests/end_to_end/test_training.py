"""Optimizer steps over real trainers and servers: the pool changes nothing, and a repeat gives the same bits.

One process each, over Gloo, under DeepSpeed; `test_exactness.py` holds a step to one device, this file runs to runs."""

import pytest
import torch
from team import Team, make_settings

from distca.kernels.attention import BACKENDS
from distca.launch.run.trainer import Trainer, TrainerReport
from distca.order import Cursor

pytestmark = pytest.mark.slow

STEPS = 10
LENGTHS = [1, 7, 127, 129, 698, 6, 2, 190, 40, 333]  # 1533 tokens: a step of 600 begins and ends inside documents
POOLS = {
    "1 trainer, 2 dedicated": dict(trainers=1, servers=2, trainers_serve=False),
    "3 trainers, in place": dict(trainers=3),
    "3 trainers, 2 dedicated": dict(trainers=3, servers=2, trainers_serve=False),
    "3 trainers, 2 mixed": dict(trainers=3, servers=2, trainers_serve=True),
    "3 trainers, 1 mixed, taking half": dict(trainers=3, servers=1, trainers_serve=True, trainer_capacity=50),
}
DEDICATED = dict(trainers=2, servers=2, trainers_serve=False)


def settings_of(folder, train=None, **parallel):
    """600 tokens per step and large updates: an error in one step shows in the next."""
    folder.mkdir(exist_ok=True)
    train = dict(tokens_per_step=600, steps=STEPS, optimizer=dict(learning_rate=3e-3)) | (train or {})
    return make_settings(folder, LENGTHS, train=train, parallel=parallel)


def losses_of(settings, steps=STEPS):
    with Team(settings) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        return team.losses(steps)


def go(team, steps) -> tuple[list[float], TrainerReport]:
    """The losses of the next steps, and the first trainer's last report."""
    found = []
    for _ in range(steps):
        reports = team.ask(team.trainers, "step")
        found.append(sum(r.summed_loss for r in reports) / reports[0].targets)
    return found, reports[0]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What every other way to train must give: one trainer, which attends by itself."""
    losses = losses_of(settings_of(tmp_path_factory.mktemp("one"), trainers=1))
    assert losses[-1] < 0.95 * losses[0], f"nothing is learned, so the comparison says little: {losses}"
    return losses


@pytest.mark.parametrize("pool", POOLS)
def test_the_pool_changes_no_loss(tmp_path, one_process, pool):
    assert losses_of(settings_of(tmp_path, **POOLS[pool])) == pytest.approx(one_process, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_zero_stage_changes_no_loss(tmp_path, one_process, zero_stage):
    settings = settings_of(tmp_path, **DEDICATED, zero_stage=zero_stage)
    assert losses_of(settings) == pytest.approx(one_process, rel=1e-5)


def test_the_same_settings_twice_give_the_same_bits(tmp_path):
    parallel = dict(trainers=3, servers=2, trainers_serve=True)
    assert losses_of(settings_of(tmp_path, **parallel), 5) == losses_of(settings_of(tmp_path, **parallel), 5)


class HandsOff(Trainer):
    """A trainer that cannot compute core attention once it has started: whatever tries, raises."""

    def connect(self) -> None:
        super().connect()
        BACKENDS.clear()

        def refuse(*_, **__):
            raise AssertionError("a trainer computes attention by itself")

        torch.nn.functional.scaled_dot_product_attention = refuse


def test_trainers_of_a_dedicated_pool_compute_no_attention_and_servers_are_busy(tmp_path):
    with Team(settings_of(tmp_path, **DEDICATED), trainer=HandsOff) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        _, report = go(team, 2)
        served = [report for report, _ in team.ask(team.servers, "take_report")]
    assert report.server is None
    assert report.exchange.calls == 2 * 2, "two layers, forward and backward"
    assert all(s.busy_s > 0 and s.calls and s.bytes_received and s.bytes_sent for s in served)
    assert sum(s.pairs for s in served) >= 2 * int(report.plan.load.sum()), "the plan counts forward alone"


def test_a_trainer_that_computed_attention_would_be_noticed(tmp_path):
    with Team(settings_of(tmp_path, trainers=2), trainer=HandsOff) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        with pytest.raises(Exception, match="torch"):
            go(team, 1)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_saved_run_goes_on_with_the_same_bits(tmp_path, zero_stage):
    settings, saved = settings_of(tmp_path, **DEDICATED, zero_stage=zero_stage), tmp_path / "saved"
    with Team(settings) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        _, report = go(team, 3)
        team.ask(team.trainers, "save", saved)
        going_on, _ = go(team, 4)
    with Team(settings) as team:
        team.ask(team.trainers, "load", saved)
        team.ask(team.trainers, "seek", 4, Cursor(*report.cursor))
        assert go(team, 4)[0] == going_on
    if zero_stage not in (1, 3):
        return
    with Team(settings_of(tmp_path, trainers=2, servers=1, zero_stage=zero_stage)) as team:
        team.ask(team.trainers, "load", saved)
        team.ask(team.trainers, "seek", 4, Cursor(*report.cursor))
        assert go(team, 4)[0] == pytest.approx(going_on, rel=1e-5), "another pool"
