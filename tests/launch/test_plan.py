"""The plan command's study: what it prints, draws and writes is about the plan that was made."""

import json
from dataclasses import replace

import numpy as np
import pytest
from documents import write_json_lines
from rich.console import Console

from distca.cost import RowBlockCost, TableCost
from distca.errors import UserError
from distca.launch.bench.plan import SHAPES, draw_lengths, parse_mask, parse_pool, read_lengths, study
from distca.launch.cli import run
from distca.masks import MaskRule
from distca.plan import PlanInputs


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_sum_to_the_tokens_and_keep_to_the_context(shape):
    lengths = draw_lengths(shape, 32_768, 8 * 32_768, 3)
    assert lengths.sum() == 8 * 32_768 and 0 < lengths.min() and lengths.max() <= 32_768
    assert (lengths == draw_lengths(shape, 32_768, 8 * 32_768, 3)).all()


def inputs_of(lengths, trainers, pool="in-place", gpus_per_server=1, **more):
    pool = parse_pool(pool, trainers, gpus_per_server)
    return PlanInputs(lengths, (MaskRule(),), trainers, pool, 10_000, 128, **more)


@pytest.mark.parametrize("pool", ["in-place", "dedicated:3", "mixed:2"])
def test_a_study_shows_draws_and_writes_its_plan(pool, tmp_path):
    lengths = draw_lengths("heavy-tail", 32_768, 8 * 16_384, 0)
    (result,) = study(inputs_of(lengths, 8, pool))
    console = Console(record=True, width=120)
    console.print(result.table())
    text = console.export_text()
    assert all(word in text for word in ("tiles", "greedy", "greedy-even", "packed in order", "at home", "lower bound"))
    result.plot(tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    result.write_json(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    tasks = np.array(plan["tasks"])
    assert len(tasks) == len(result.plan.server) and tasks[:, 5].max() < plan["servers"] == len(result.plan.pool)
    assert sum(end - start for _, start, end, _ in plan["home"]) == lengths.sum()


def test_lengths_from_files_are_shared_equally(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 7, 1]))
    (tmp_path / "b.json").write_text("[5, 7, 1]")
    assert read_lengths(tmp_path / "a.npy", 4).tolist() == read_lengths(tmp_path / "b.json", 4).tolist() == [5, 7, 0]
    (tmp_path / "c.json").write_text("[1.5]")
    with pytest.raises(UserError, match="expected a list of lengths"):
        read_lengths(tmp_path / "c.json", 1)


@pytest.mark.parametrize("text", ["", "mixed", "dedicated:0", "pool"])
def test_a_pool_that_is_none_of_the_three_is_refused(text):
    with pytest.raises(UserError, match="in-place, dedicated:N or mixed:N"):
        parse_pool(text, 4)


@pytest.mark.parametrize("text", ["", "window", "window:0", "sinks:4", "sinks:4+chunk:3", "prefix:-1", "full"])
def test_a_mask_that_is_none_of_the_five_is_refused(text):
    with pytest.raises(UserError, match="causal, window:N"):
        parse_mask(text, np.array([5]))


@pytest.mark.parametrize("text", ["causal", "window:7", "sinks:2+window:7", "prefix:9", "chunk:16"])
def test_every_mask_can_be_studied(text):
    lengths = draw_lengths("heavy-tail", 8_192, 4 * 8_192, 0)
    inputs = replace(inputs_of(lengths, 4), rules=(parse_mask(text, lengths),))
    (result,) = study(inputs)
    assert result.plan.imbalance() < 1.01 and (result.least_moved is None) == (text != "causal")


def test_directions_with_costs_of_their_own_are_studied_apart():
    lengths = draw_lengths("heavy-tail", 8_192, 4 * 8_192, 0)
    table = TableCost((128, 4096), (128, 4096), ((10, 200), (250, 7000)))
    forward, backward = study(inputs_of(lengths, 4, costs=(RowBlockCost(), table)))
    assert forward.plan.cost == RowBlockCost() and backward.plan.cost == table


def test_a_group_of_gpus_is_one_trainer_to_other_tools(tmp_path):
    lengths = draw_lengths("heavy-tail", 8_192, 8 * 8_192, 0)
    (result,) = study(inputs_of(lengths, 8, "mixed:1", gpus_per_server=4))
    result.write_json(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["trainers"], plan["servers"], plan["in_place"]) == (2, 3, 2)
    with pytest.raises(UserError, match="no whole number"):
        parse_pool("in-place", 8, 3)


RUN_FILE = """
model: {config: {model_type: llama, vocab_size: 64, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1,
        num_attention_heads: 8, num_key_value_heads: 2}}
data: {sources: [{path: documents.jsonl}], cache: cache}
train: {tokens_per_step: 600, steps: 3, precision: fp32}
parallel: {trainers: 2, servers: 1}
"""


def test_the_command_plans_a_runs_own_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "documents.jsonl", ({"input_ids": ids} for ids in numbered_ids([300, 200, 100])))
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    assert run(["plan", "run.yaml", "--json", "plan.json", "--planner.block", "16", "--micro-batch", "2"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sum(plan["lengths"]) == 600 and plan["trainers"] == 2 and plan["servers"] == 3
    assert "4 query heads" in capsys.readouterr().out


def test_the_command_without_a_run_takes_settings_of_the_planner_alone(tmp_path, capsys):
    small = ["plan", "--trainers", "4", "--tokens-per-trainer", "4096", "--context", "8192"]
    flags = ["--planner", "greedy", "--seed", "3", "--plot", str(tmp_path / "load.png"), "--gpus-per-server", "2"]
    wire = ["--planner.cost", "row-blocks", "--planner.wire.gb_per_s", "0.01", "--planner.wire.tflops", "400"]
    assert run([*small, *flags, *wire, "--planner.backward", "own-plan"]) == 0
    text = capsys.readouterr().out
    assert text.count("greedy-even") == 2 and "stays at home" in text and (tmp_path / "load.png").exists()
    assert run([*small, "--train.steps", "3"]) == 2
    assert "only --planner.key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--context", "0"], "--context 0: must be at least 1"),
        (["--trainers", "-2"], "at least 1"),
        (["--group", "0"], "at least 1"),
        (["--query-heads", "30"], "cannot share 8"),
        (["--json", "x.json", "--mask", "window:8"], "causal plans only"),
        (["--plot", "nowhere/x.png"], "there is no folder"),
        (["--planner.cost", "pair"], "pairs, row-blocks, or a file"),
        (["--planner.wire.tflops", "5"], "without gb_per_s"),
        (["--mask", "window:00"], "causal, window:N"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_a_sentence(flags, words, capsys):
    assert run(["plan", "--trainers", "4", "--tokens-per-trainer", "4096", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_documents_of_ten_million_tokens_are_studied(tmp_path):
    (tmp_path / "lengths.json").write_text(json.dumps([10_000_000] + [1000] * 1000))
    assert run(["plan", "--trainers", "4", "--lengths", str(tmp_path / "lengths.json")]) == 0


def numbered_ids(lengths):
    return [[i % 64 for i in range(length)] for length in lengths]
