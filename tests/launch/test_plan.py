"""The plan command's study: what it prints, draws and writes is about the plan that was made."""

import json

import numpy as np
import pytest
from rich.console import Console

from distca.errors import UserError
from distca.launch.plan import SHAPES, draw_lengths, parse_pool, read_lengths, study


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_sum_to_the_tokens_and_keep_to_the_context(shape):
    lengths = draw_lengths(shape, 32_768, 8 * 32_768, 3)
    assert lengths.sum() == 8 * 32_768 and 0 < lengths.min() and lengths.max() <= 32_768
    assert (lengths == draw_lengths(shape, 32_768, 8 * 32_768, 3)).all()


@pytest.mark.parametrize("pool", ["in-place", "dedicated:3", "mixed:2"])
def test_a_study_shows_draws_and_writes_its_plan(pool, tmp_path):
    lengths = draw_lengths("heavy-tail", 32_768, 8 * 16_384, 0)
    result = study(lengths, 8, parse_pool(pool, 8), group=4)
    console = Console(record=True, width=120)
    console.print(result.table())
    text = console.export_text()
    assert all(word in text for word in ("tiles", "greedy", "greedy-even", "all at home", "lower bound"))
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
