"""What Ray needs is asked of the machine before Ray starts, and what is missing is named."""

import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distca.launch.process.limits import refusals

INFINITE = float("inf")
START = """
import resource, sys
from distca.errors import SettingsError
from distca.launch.cluster.session import start_ray
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2)
try:
    with start_ray(sys.argv[3], num_workers=4):
        print("started")
except SettingsError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "value", "remedy"), [("RLIMIT_NOFILE", 64, "ulimit -n"), ("RLIMIT_AS", 5 << 30, "ulimit -v unlimited")]
)
def test_ray_does_not_start_under_a_limit_that_ends_it(tmp_path, limit, value, remedy):
    run = subprocess.run(
        [sys.executable, "-c", START, limit, str(value), tmp_path], capture_output=True, text=True, timeout=240
    )
    assert remedy in run.stdout and len(run.stdout.splitlines()) == 1 and not run.stderr, run


@given(
    workers=st.integers(1, 4096), files=st.integers(0, 1 << 20), gib=st.integers(0, 64), threads=st.integers(0, 1 << 20)
)
def test_what_is_enough_for_many_is_enough_for_fewer(workers, files, gib, threads):
    found = list(refusals(workers, files, gib << 30, threads))
    assert len(list(refusals(max(1, workers // 2), files, gib << 30, threads))) <= len(found)
    assert not list(refusals(workers, INFINITE, INFINITE, INFINITE))
    assert all(len(sentence.splitlines()) == 1 for sentence in found)


def test_each_limit_is_named_with_its_remedy():
    remedies = {"ulimit -n": (64, INFINITE, INFINITE), "ulimit -v": (INFINITE, 1 << 30, INFINITE)}
    for remedy, found in (remedies | {"ulimit -u": (INFINITE, INFINITE, 30)}).items():
        (sentence,) = refusals(4, *found)
        assert remedy in sentence


def test_the_limit_on_open_files_is_as_before_afterwards():
    from distca.launch.process.limits import enough_allowed

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with enough_allowed(2, "127.0.0.1"):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
