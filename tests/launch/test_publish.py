import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distca.errors import DataError
from distca.launch.folder import publish
from distca.launch.folder.publish import BrokenCheckpoint, NoSpace, newest, prune, publishing, require_space, verify


def put(folder: Path, step: int, size: int = 3000) -> Path:
    with publishing(folder, step, {"loss": 1 / step}) as draft:
        (draft / "weights").mkdir()
        for rank in range(2):
            (draft / "weights" / f"rank-{rank}.bin").write_bytes(random.Random(step * 10 + rank).randbytes(size))
        (draft / "data.json").write_text(json.dumps({"step": step}))
        (draft / "empty").touch()
    return folder / f"step-{step:06d}"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_published_is_found_with_its_step_and_facts(tmp_path):
    put(tmp_path, 6)
    path = put(tmp_path, 12)
    found = newest(tmp_path)
    assert (found.path, found.step, found.facts) == (path, 12, {"loss": 1 / 12})
    assert (tmp_path / "latest").read_text() == "step-000012\n"
    assert names(tmp_path) == {"latest", "step-000006", "step-000012"}


def test_facts_may_be_learned_while_writing(tmp_path):
    facts = {}
    with publishing(tmp_path, 1, facts):
        facts["tokens_seen"] = 77
    assert newest(tmp_path).facts == {"tokens_seen": 77}


def test_nothing_is_published_when_writing_raises(tmp_path):
    put(tmp_path, 1)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with publishing(tmp_path, 2, {}) as draft:
                (draft / "half").write_text("h")
                assert draft.exists() and draft.parent == tmp_path
                raise error
    assert names(tmp_path) == {"latest", "step-000001"}


def test_a_step_published_again_replaces_the_one_before(tmp_path):
    put(tmp_path, 2)
    with publishing(tmp_path, 2, {"again": True}) as draft:
        (draft / "other").touch()
    assert newest(tmp_path).facts == {"again": True}
    assert names(tmp_path) == {"latest", "step-000002"}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGES = {"flipped bit": flip, "truncated": truncate, "deleted": Path.unlink}


@pytest.mark.parametrize("file", ["weights/rank-1.bin", "data.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage, file):
    put(tmp_path, 1)
    bad = put(tmp_path, 2) / file
    DAMAGES[damage](bad)
    assert newest(tmp_path).step == 1
    assert str(bad) in caplog.text and "going back to the checkpoint of step 1" in caplog.text
    with pytest.raises(BrokenCheckpoint, match="rank-1|data|manifest"):
        newest(tmp_path, strict=True)
    with pytest.raises(BrokenCheckpoint):
        verify(bad.parent if bad.parent.name.startswith("step") else bad.parent.parent)


def test_a_missing_or_wrong_pointer_does_no_harm(tmp_path):
    put(tmp_path, 1)
    put(tmp_path, 2)
    (tmp_path / "latest").unlink()
    assert newest(tmp_path).step == 2
    (tmp_path / "latest").write_text("step-000099\n")
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("what", ["missing", "empty", "wrong", "all bad"])
def test_with_nothing_to_resume_from_there_is_an_error_that_says_where_it_looked(tmp_path, what):
    folder = tmp_path / "checkpoints"
    expected = {"missing": "no such folder", "empty": "it holds nothing", "wrong": "it holds model.bin"}.get(what)
    if what != "missing":
        folder.mkdir()
    if what == "wrong":
        (folder / "model.bin").touch()
    if what == "all bad":
        for step in (1, 2):
            truncate(put(folder, step) / "data.json")
        expected = "step-000002/data.json.*step-000001/data.json"
    with pytest.raises(DataError, match=f"(?s)no checkpoint to resume from in .*checkpoints: .*{expected}"):
        newest(folder)


def test_the_newest_stay_and_damaged_ones_do_not_count(tmp_path):
    for step in range(1, 6):
        put(tmp_path, step)
    (tmp_path / "step-000005" / "data.json").unlink()
    assert [path.name for path in prune(tmp_path, 2, 5)] == ["step-000002", "step-000001"]
    assert names(tmp_path) == {"latest", "step-000003", "step-000004", "step-000005"}
    truncate(tmp_path / "step-000004" / "data.json")
    assert prune(tmp_path, 1, 5) == []  # step 3 is the newest complete one
    assert newest(tmp_path).step == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_what_a_run_went_back_behind_is_not_kept_in_place_of_what_it_made_since(tmp_path, keep):
    for step in (2, 4, 6):
        put(tmp_path, step)
    file = tmp_path / "step-000006" / "data.json"
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))  # as many bytes as before
    assert newest(tmp_path).step == 4
    put(tmp_path, 5)
    prune(tmp_path, keep, 5)
    assert names(tmp_path) == {"latest", "step-000005", "step-000004"} - ({"step-000004"} if keep == 1 else set())
    assert newest(tmp_path, strict=True).step == 5


def test_a_future_format_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "FORMAT", publish.FORMAT + 1)
    path = put(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(BrokenCheckpoint, match="format 3, this version of DistCA reads format 2"):
        verify(path)


# Full disks


def test_space_is_checked_before_anything_is_written(tmp_path):
    put(tmp_path, 1)
    with pytest.raises(NoSpace, match=r"1000\d* TB are needed, .* are free"):
        require_space(tmp_path / "not" / "yet", 10**15)
    with pytest.raises(NoSpace):
        with publishing(tmp_path, 2, {}, needed_bytes=10**15):
            raise AssertionError("not reached")
    assert newest(tmp_path).step == 1


@pytest.mark.parametrize("where", ["while writing", "in the manifest"])
def test_a_full_disk_costs_no_older_checkpoint(tmp_path, monkeypatch, where):
    put(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "in the manifest":
        monkeypatch.setattr(publish, "_write", full)
    said = "checkpoint of step 2 in .*: it needs 5.0 kB, 3.0 kB were written .* newest checkpoint is of step 1"
    with pytest.raises(NoSpace, match=said):
        with publishing(tmp_path, 2, {}, needed_bytes=5000) as draft:
            (draft / "half").write_bytes(bytes(3000))
            if where == "while writing":
                full()
    assert names(tmp_path) == {"latest", "step-000001"} and newest(tmp_path).step == 1


def test_a_limit_on_file_size_is_a_full_disk_too(tmp_path):
    put(tmp_path, 1)
    code = """
import resource, sys
from distca.launch.folder.publish import NoSpace, publishing
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with publishing(sys.argv[1], 2, {}) as draft:
        (draft / "big").write_bytes(bytes(1_000_000))
except NoSpace as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert "it needs more than 100 kB" in said, said
    assert names(tmp_path) == {"latest", "step-000001"} and newest(tmp_path).step == 1


# Killed writers

WRITER = """
import sys
from pathlib import Path
from distca.launch.folder.publish import prune, publishing

folder, step = Path(sys.argv[1]), int(sys.argv[2])
print("up", flush=True)
while True:
    step += 1
    with publishing(folder, step, {"step": step}) as draft:
        for rank in range(3):
            (draft / f"rank-{rank}.bin").write_bytes(step.to_bytes(4, "big") * 50_000)
    prune(folder, 2, step)
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_what_it_had_published(tmp_path):
    random.seed(0)
    unfinished = last = rounds = 0
    while rounds < 12 or (not (last and unfinished) and rounds < 200):  # on a busy machine many die before they write
        rounds += 1
        command = [sys.executable, "-c", WRITER, tmp_path, str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "up\n"
            time.sleep(random.uniform(0.01, 0.12))
            writer.send_signal(signal.SIGKILL)
            said = [int(line) for line in writer.stdout.read().split()]
        if not said and not last:
            continue
        unfinished += any(".partial-" in name for name in names(tmp_path))
        last, found = max([last, *said]), newest(tmp_path, strict=True)
        assert found.step in (last, last + 1)  # killed between publishing and saying so
        assert found.facts == {"step": found.step}
        assert (found.path / "rank-2.bin").read_bytes() == found.step.to_bytes(4, "big") * 50_000
        last = found.step
    assert last > 0 and unfinished > 0, "this test has shown nothing"
    put(tmp_path, last + 1)
    assert not [name for name in names(tmp_path) if name.startswith(".")]  # what the dead left is gone


def test_unfinished_work_of_a_living_writer_is_left_alone(tmp_path):
    with publishing(tmp_path, 1, {}) as draft:
        os.rename(draft, other := tmp_path / f".step-000001.partial-{publish.socket.gethostname()}-{os.getppid()}")
        put(tmp_path, 2)
        assert other.exists()
        os.rename(other, draft)
    assert newest(tmp_path).step == 2
