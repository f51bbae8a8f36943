"""A run keeps what its plans are made from."""

from hardware_tables import write_hardware
from team import make_settings

from distca.hardware import costs_of
from distca.launch.train import KERNEL_TIMES, _with_kernel_times


def test_measured_times_stay_with_the_run(tmp_path):
    measured, run = write_hardware(tmp_path / "device.yaml"), tmp_path / "run"
    run.mkdir()
    settings = make_settings(tmp_path, [50], planner=dict(cost=str(measured)))
    own, costs = _with_kernel_times(settings, run), costs_of(settings.planner)
    assert own.planner.cost == str(run / KERNEL_TIMES) and costs_of(own.planner) == costs

    write_hardware(measured, rows=[32, 128, 4096])  # measured anew
    assert _with_kernel_times(own, run) == own, "resuming goes by the run's own"
    moved = run.rename(tmp_path / "moved")
    again = _with_kernel_times(own, moved)
    assert again.planner.cost == str(moved / KERNEL_TIMES) and costs_of(again.planner) == costs


def test_formulas_need_no_file(tmp_path):
    settings = make_settings(tmp_path, [50])
    assert _with_kernel_times(settings, tmp_path / "nowhere") is settings
