"""`distca measure kernels` writes a table that reads back, and its two costs predict the calls they came from."""

import numpy as np
import pytest

from distca.errors import EXIT_OK, EXIT_SETTINGS
from distca.hardware import read_hardware
from distca.kernels.worklist import work_list
from distca.launch import cli
from distca.launch.bench import measure
from distca.launch.bench.measure import fit
from distca.masks import UNBOUNDED, Bands


def shard(rows: int, keys: int) -> Bands:
    return Bands.of((0, rows, 0, keys, -UNBOUNDED, keys - rows))


@pytest.mark.parametrize(("tile_s", "block_s"), [(3e-6, 1.6e-6), (0.0, 2e-6)])
def test_the_fit_finds_the_costs_that_made_the_times(tile_s, block_s):
    lists = [shard(rows, keys) for rows in (128, 300, 1024) for keys in (1024, 4096)]
    work = [work_list(bands, int(bands.q1.max()), 4, 128, 128) for bands in lists]
    found = fit(lists, [tile_s * len(w.items) + block_s * w.num_blocks() for w in work], 4)
    assert (found.tile_s, found.block_s) == pytest.approx((tile_s, block_s), rel=1e-6, abs=1e-12)
    assert found.error < 1e-6


def test_a_cost_is_never_negative():
    lists = [shard(128, keys) for keys in (128, 256, 512)]
    found = fit(lists, [1.0, 3.0, 7.0], 1)
    assert found.tile_s >= 0 and found.block_s > 0 and found.error > 0.1
    counts = np.array([1.0, 2.0, 4.0])  # blocks
    for cost in (0.99 * found.block_s, 1.01 * found.block_s):
        assert np.sqrt(np.mean((cost * counts / np.array([1.0, 3.0, 7.0]) - 1) ** 2)) > found.error


def test_the_command_times_the_torch_back_end_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "REPEATS", 1)
    out = tmp_path / "hardware/here.yaml"
    command = ["measure", "kernels", str(out), "--heads", "2", "1", "16", "--longest", "512", "--dtype", "fp32"]
    assert cli.run(command) == EXIT_OK
    table = read_hardware(out)
    assert table.rows == table.keys == (128, 512)
    for direction in ("forward", "backward"):
        tile = Bands.of((0, 512, 0, 512, -UNBOUNDED, UNBOUNDED))
        seconds = np.max(getattr(table, f"{direction}_s"))  # more keys never cost less, however the clock was disturbed
        assert table.cost(direction).of(tile)[0] == pytest.approx(seconds * 1e12, rel=1e-3), "planners read it"
        assert table.fit[direction].tile_s + table.fit[direction].block_s > 0
    assert set(table.speeds) >= {"a causal document", "packed documents", "a server's call as planned"}
    assert all(speed.forward > 0 and speed.backward > 0 for speed in table.speeds.values())
    assert table.backend == "torch" and "torch" in table.versions
    assert "us a block" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "triton"], "TRITON_INTERPRET"),
        (["--longest", "100"], "at least"),
        (["--backend", "torch", "--heads", "2", "1", "20", "--device", "cuda"], "multiples of 8"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.run(["measure", "kernels", str(tmp_path / "x.yaml"), *options]) == EXIT_SETTINGS
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


def test_an_operator_that_pytorch_does_not_have_leaves_the_table_whole(tmp_path, monkeypatch, caplog):
    def missing(*_):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(measure, "REPEATS", 1)
    monkeypatch.setattr(measure, "_dense", missing)
    command = ["measure", "kernels", str(tmp_path / "x.yaml"), "--heads", "2", "1", "16", "--longest", "512"]
    assert cli.run([*command, "--dtype", "fp32"]) == EXIT_OK
    assert set(read_hardware(tmp_path / "x.yaml").speeds) == {
        "a causal document",
        "packed documents",
        "a server's call as planned",
        "512 documents of 8 tokens",
    }
    assert "left out: SDPA, CPU" in caplog.text
