import dataclasses
import json
import math
import subprocess
import sys

import pytest

from distca.metrics import METRICS, StepRecord

FULL = StepRecord(
    step=12,
    num_steps=60,
    loss=3.4125,
    grad_norm=0.83,
    learning_rate=3e-4,
    tokens=8192,
    targets=8000,
    step_s=1.6,
    tokens_seen=98304,
    targets_seen=96000,
    tflops_per_worker=0.0051,
    imbalance_packed=1.83,
    imbalance_placed=1.31,
    imbalance_planned=1.01,
    imbalance_measured=1.07,
    bytes_moved=4_200_000,
    num_tasks=37,
    plan_s=0.0031,
    attention_s=0.21,
    wait_s=0.18,
    hidden_s=0.4,
    server_busy_s=(0.2, 0.21, 0.19, 0.2),
    data_wait_s=0.0,
    num_documents=21,
    epoch=0.4,
    trainer_rss_mib=512.0,
    server_rss_mib=300.0,
)
BARE = StepRecord(step=1, num_steps=60, loss=math.nan, tokens=10, targets=9, step_s=0.0, tokens_seen=10)


def test_names_are_unique_and_each_has_a_unit_a_meaning_and_a_field():
    assert len({m.tag for m in METRICS}) == len({m.field for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.unit and metric.meaning and hasattr(FULL, metric.field), metric


def test_every_number_of_a_record_has_a_name():
    held = {m.field for m in METRICS} | {"step", "num_steps", "tokens", "plan_s"}  # the last two as speed and plan_ms
    assert {f.name for f in dataclasses.fields(StepRecord)} <= held


def test_a_line_reads_like_this():
    assert FULL.line() == (
        "step 12/60  loss  3.4125   5.1k tok/s  5.1 GFLOP/s each  imbalance 1.83→1.31→1.01   4.2 MB moved  "
        "attention  0.21 s  wait  0.18 s ( 0.40 hidden)"
    )


@pytest.mark.parametrize("tokens, step_s, moved", [(1, 0.9, 0), (123_456, 0.01, 999_999), (3_000_000, 2.0, 73 << 30)])
def test_lines_stand_in_columns(tokens, step_s, moved):
    other = dataclasses.replace(FULL, step=7, loss=12.0, tokens=tokens, step_s=step_s, bytes_moved=moved, plan_s=0.12)
    words = ["loss", "tok/s", "FLOP/s", "imbalance", "moved", "attention", "wait", "hidden"]
    assert [other.line().index(w) for w in words] == [FULL.line().index(w) for w in words]


def test_a_line_fits_a_wide_terminal():
    numbers = dict(loss=12.0, tflops_per_worker=412.3, bytes_moved=12_300_000_000, wait_s=99.9, hidden_s=99.9)
    assert len(dataclasses.replace(FULL, step=9999, num_steps=10_000, **numbers).line()) <= 150


def test_what_is_not_measured_leaves_its_part_of_the_line_out():
    in_one_process = dataclasses.replace(FULL, imbalance_packed=None, imbalance_placed=None, hidden_s=None)
    assert "  imbalance 1.01  " in in_one_process.line() and in_one_process.line().endswith("wait  0.18 s")


def test_what_is_not_there_is_left_out_but_people_see_a_loss_of_nan():
    assert BARE.line() == "step  1/60  loss     nan"
    assert BARE.scalars() == {"train/targets": 9, "train/tokens_seen": 10, "speed/step_s": 0.0}
    assert json.loads(json.dumps(BARE.fields(), allow_nan=False)) == {
        "step": 1, "num_steps": 60, "tokens": 10, "targets": 9, "step_s": 0.0, "tokens_seen": 10, "server_busy_s": []
    }  # fmt: skip


def test_a_step_without_targets_says_so_in_place_of_its_loss():
    nothing = dataclasses.replace(FULL, loss=None, targets=0)
    assert nothing.line() == FULL.line().replace("loss  3.4125", "no targets  ")
    assert "train/loss" not in nothing.scalars() and nothing.scalars()["train/targets"] == 0
    assert "loss" not in nothing.fields()


def test_scalars_hold_every_server_and_units_as_named():
    scalars = FULL.scalars()
    assert scalars["cad/server_busy_s/3"] == 0.2 and "cad/server_busy_s" not in scalars
    assert scalars["cad/plan_ms"] == pytest.approx(3.1)
    assert scalars["speed/tokens_per_s"] == pytest.approx(5120)
    assert "checkpoint/save_s" not in scalars


def test_reading_metrics_needs_no_torch():
    code = "import sys, distca.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
