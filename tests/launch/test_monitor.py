import json
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from distca.config import MonitorSettings
from distca.launch.folder.monitor import (
    DPI,
    KIND_COLOURS,
    LAYOUT,
    LETTERS_PT,
    SIZE_INCH,
    Monitor,
    picture_of_documents,
    picture_of_load,
    picture_of_timeline,
)
from distca.launch.folder.trace import Recording, StepTrace
from distca.metrics import METRICS, StepRecord
from distca.trace import KINDS, Span

CARD = (int(SIZE_INCH[1] * DPI), int(SIZE_INCH[0] * DPI), 3)


def record(step: int, **more) -> StepRecord:
    numbers = dict(num_steps=9, loss=3.0 - step, tokens=100, targets=99, step_s=0.5, tokens_seen=100 * step)
    return StepRecord(step=step, **numbers | more)


RECORDINGS = [
    Recording("trainer 0", [Span("model", "forward", "MainThread", 5.0, 5.6)]),
    Recording("server 0", [Span("kernels", "forward", "compute", 5.2, 5.5)]),
    Recording("driver", []),
]


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_shows_scalars_pictures_texts_and_a_first_page(tmp_path):
    monitor = Monitor(tmp_path, MonitorSettings(images_every=2))
    monitor.start("name: demo\nseed: 0\n", {"torch": "2.13.0"})
    for step in (1, 2, 3):
        monitor.documents(step, [5, 700, 1])
        monitor.server_load(step, [3, 1], [2, 2], [2.1, 1.9], names=["trainer 0", "server 0"])
        monitor.timeline(StepTrace(step, 5.0, 6.0, RECORDINGS))
        monitor.step(record(step, server_busy_s=(0.25, 0.5), imbalance_planned=float("nan")))
    monitor.event(3, "server 1 lost; its tasks went to server 0")
    monitor.close()
    seen = events(tmp_path)
    assert [(e.step, e.value) for e in seen.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert seen.Scalars("cad/server_busy_s/1")[0].value == 0.5
    assert "cad/imbalance_planned" not in seen.Tags()["scalars"]
    for tag in ("data/document_lengths", "cad/server_load", "step/timeline"):
        assert [image.step for image in seen.Images(tag)] == [1, 2]
        assert seen.Images(tag)[0].width == 720
    texts = {tag: seen.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in (
        "run/settings", "run/versions", "run/events", "step/seconds"
    )}  # fmt: skip
    assert b"name: demo" in texts["run/settings"] and b"2.13.0" in texts["run/versions"]
    assert b"server 1 lost" in texts["run/events"]
    assert b"| server 0 | 0.000 | 0.300 | 0.700 |" in texts["step/seconds"]
    layout = layout_pb2.Layout.FromString(seen.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["DistCA"]
    assert len(layout.category[0].chart) == len(LAYOUT["DistCA"])


def test_the_first_page_shows_only_names_that_exist():
    known = {m.tag for m in METRICS}
    for chart, (_, tags) in LAYOUT["DistCA"].items():
        assert all(tag.removesuffix("/.*") in known for tag in tags), chart


def test_every_step_and_event_is_a_line_and_a_resumed_run_appends(tmp_path):
    for first_step in (1, 3):
        monitor = Monitor(tmp_path, MonitorSettings(tensorboard=False), first_step=first_step)
        for step in (first_step, first_step + 1):
            monitor.step(record(step, grad_norm=float("inf")))
        monitor.event(first_step, "saved")
        monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == 2.0 and "grad_norm" not in lines[0]
    assert [line.split("  ")[1:] for line in (tmp_path / "events.txt").read_text().splitlines()] == [
        ["step 1", "saved"],
        ["step 3", "saved"],
    ]


def steps_and_losses(folder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def go(folder, first_step, steps, loss, before=None):
    monitor = Monitor(folder, MonitorSettings(tensorboard=False), first_step=first_step, before=before)
    for step in steps:
        monitor.step(record(step, loss=loss))
    monitor.close()


def test_each_step_stands_once_after_kills_and_torn_lines(tmp_path):
    """A kill leaves steps that the resumed run does again, and half a line."""
    go(tmp_path, 1, range(1, 6), loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(6).fields())[:40])
    go(tmp_path, 4, range(4, 8), loss=2.0)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "no draft is left"


def test_steps_that_stand_twice_since_an_older_version_keep_the_run_that_went_on(tmp_path):
    go(tmp_path, 1, [1, 2, 3], loss=1.0)
    (tmp_path / "metrics.jsonl").write_text(
        (tmp_path / "metrics.jsonl").read_text() + json.dumps(record(3, loss=2.0).fields()) + "\n"
    )
    go(tmp_path, 4, [4], loss=3.0)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]


def test_a_step_that_was_saved_but_not_recorded_is_put_back(tmp_path):
    """Killed after a checkpoint's publication and before the step's line."""
    go(tmp_path, 1, [1, 2], loss=1.0)
    go(tmp_path, 4, [4], loss=2.0, before=record(3, loss=9.0).fields())
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 2.0)]
    go(tmp_path, 4, [4], loss=5.0, before=record(3, loss=7.0).fields())
    assert steps_and_losses(tmp_path)[2:] == [(3, 9.0), (4, 5.0)]


def test_after_a_resume_every_step_is_there_once_and_in_one_run(tmp_path):
    """Its driver was killed after step 5, whose checkpoint is of step 3; meanwhile somebody looks at it."""
    first = Monitor(tmp_path, MonitorSettings(images_every=1))
    for step in range(1, 6):
        first.step(record(step, loss=1.0))
        first.documents(step, [3, 700])
    first._writer.flush()
    assert [e.step for e in events(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4, 5], "while it is live"
    second = Monitor(tmp_path, MonitorSettings(images_every=1), first_step=4)
    second.start("a: 1", dict(hosts="10.0.0.1: trainer 0; 10.0.0.2: server 0"))
    for step in (4, 5, 6, 7):
        second.step(record(step, loss=2.0))
        second.documents(step, [3, 700])
    second.close()
    seen = events(tmp_path)
    losses = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert [(e.step, e.value) for e in seen.Scalars("train/loss")] == losses
    assert [image.step for image in seen.Images("data/document_lengths")] == list(range(1, 8))
    assert b"10.0.0.2: server 0" in seen.Tensors("run/versions/text_summary")[-1].tensor_proto.string_val[0]
    folders = {path.parent for path in tmp_path.rglob("*tfevents*")}
    assert folders == {tmp_path / "tensorboard"} and len(list(tmp_path.rglob("*tfevents*"))) == 2


def test_without_tensorboard_there_are_no_event_files_and_no_import_of_it(tmp_path):
    code = f"""
import sys
from distca.config import MonitorSettings
from distca.launch.folder.monitor import Monitor
monitor = Monitor({str(tmp_path)!r}, MonitorSettings(tensorboard=False))
monitor.start("a: 1", {{}})
monitor.documents(1, [3])
monitor.server_load(1, [1], [1])
assert not monitor.wants_pictures(1)
monitor.close()
sys.exit("tensorboard" in sys.modules or "torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "lengths", [[1], [7, 7, 7], [1, 1 << 20], list(range(1, 3000)), [0, 5]], ids=lambda x: str(x)[:20]
)
def test_any_documents_can_be_drawn(lengths):
    picture = picture_of_documents(lengths)
    assert picture.shape == CARD and picture.dtype == np.uint8 and picture.std() > 0


@pytest.mark.parametrize("num_servers", [1, 4, 6, 17, 300])
def test_any_number_of_servers_can_be_drawn(num_servers):
    random = np.random.default_rng(0)
    packed, planned, measured = random.random((3, num_servers))
    names = [f"server {n}" for n in range(num_servers)]
    picture = picture_of_load(packed, planned, measured, capacity=1 + random.random(num_servers), names=names)
    assert picture.shape == CARD and picture.std() > 0
    assert picture_of_load(np.zeros(num_servers), np.zeros(num_servers)).std() > 0
    hosts = [f"…12.{n // 3}" for n in range(num_servers)]
    on_hosts = picture_of_load(packed, planned, names=names, hosts=hosts)
    assert on_hosts.shape == CARD and (on_hosts != picture_of_load(packed, planned, names=names)).any()


@pytest.mark.parametrize("num_workers", [1, 4, 300])
def test_any_number_of_workers_has_a_timeline(num_workers):
    rows = {f"trainer {n}": [(kind, n / 1e3, n / 1e3 + 0.5) for kind in KINDS] for n in range(num_workers)}
    picture = picture_of_timeline(rows | {"server 0": []}, 1.0)
    assert picture.shape == CARD and picture.std() > 0


def test_letters_can_be_read_on_a_card_of_360_pixels():
    height, width, _ = CARD
    assert LETTERS_PT / 72 * DPI * 360 / width >= 10 and 0.6 < height / width < 0.8


def test_every_kind_of_span_has_a_colour_of_its_own():
    assert set(KIND_COLOURS) == set(KINDS) and len(set(KIND_COLOURS.values())) == len(KINDS)


def test_the_same_numbers_are_the_same_picture():
    assert np.array_equal(picture_of_load([1, 2], [1, 1]), picture_of_load([1, 2], [1, 1]))
