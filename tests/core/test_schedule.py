import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.config import ScheduleSettings
from distca.schedule import learning_rate

NAMES = ("constant", "linear", "cosine")
runs = st.tuples(st.sampled_from(NAMES), st.integers(0, 40), st.integers(1, 60))


def rates(name: str, warmup: int, steps: int, peak: float = 1.0) -> list[float]:
    schedule = ScheduleSettings(name=name, warmup_steps=warmup)
    return [learning_rate(schedule, peak, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_the_rates_of_four_steps(name, warmup, expected):
    assert rates(name, warmup, 4) == pytest.approx(expected)


@given(runs)
def test_every_step_counts_and_none_goes_above_the_peak(run):
    assert all(0 < rate <= 1 for rate in rates(*run))


@given(runs)
def test_it_rises_to_the_peak_and_never_rises_again(run):
    _, warmup, steps = run
    found = rates(*run)
    assert found[:warmup] == sorted(found[:warmup]), "up"
    assert found[warmup:] == sorted(found[warmup:], reverse=True), "and down"
    assert warmup >= steps or found[warmup] == 1


def test_a_peak_of_zero_is_zero_throughout():
    assert rates("cosine", 2, 5, peak=0.0) == [0.0] * 5
