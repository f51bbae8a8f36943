"""Run files as people spoil them: a key misspelled, a value of another kind, a line cut off, bytes that are no text.

Either the command refuses with a sentence, its documented exit code and nothing left behind, or all that the file says
is in the settings that the run goes by: nothing ends in a traceback, and nothing is passed over."""

import copy
import random
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml
from documents import write_json_lines
from team import TINY_LLAMA

from distca.errors import EXIT_DATA, EXIT_SETTINGS
from distca.launch import cli
from distca.launch.run import train

pytestmark = pytest.mark.slow

NUM_FILES = 200
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 7, 10**6, 10**30, 0.5, -0.5, 1e-9, 1e300, float("nan"), float("inf"), "", " "),
    *("none", "auto", "yes", "3", "1e-3", "0x10", "1:30", "ü🙂", "\x00", "a" * 5000, "../up", "/", "~", "~nobody/x"),
    *([], [1], ["rows.jsonl"], {}, {"path": "rows.jsonl"}, {"a": {"b": 1}}, [[]], [{}], [None]),
)


class RayWasAboutToStart(BaseException):
    pass


def valid() -> dict:
    return dict(
        name="fuzz",
        seed=3,
        model=dict(config=dict(TINY_LLAMA), activation_checkpointing=False),
        data=dict(
            sources=[dict(path="rows.jsonl", weight=2, format="json"), dict(path="more.jsonl")],
            tokenizer="bytes",
            max_document_tokens=50,
            cache="cache",
        ),
        train=dict(
            tokens_per_step=60,
            accumulation=1,
            steps=4,
            precision="fp32",
            clip_grad_norm=1.0,
            optimizer=dict(learning_rate=1e-3, beta1=0.9),
            schedule=dict(name="linear", warmup_steps=2),
        ),
        parallel=dict(trainers=2, servers=1, trainers_serve=True, zero_stage=1, deadline_s=60.0),
        planner=dict(tolerance=0.05, block=128, cost="pairs"),
        kernels=dict(backend="auto"),
        checkpoint=dict(every_steps=2, keep=1),
        monitor=dict(folder="runs", tensorboard=False, images_every=3),
    )


def places(values, path=()):
    """Every key and index in nested values, as paths."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        yield (*path, name)
        yield from places(value, (*path, name))


def at(values, path):
    for name in path:
        values = values[name]
    return values


def spoil(draw: random.Random) -> bytes:
    """The text of a valid run file with one to three things changed."""
    values = valid()
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(list(places(values)))
        here, name = at(values, path[:-1]), path[-1]
        how = draw.choice(["value", "value", "drop", "misspell", "add", "move"])
        if how == "value":
            here[name] = copy.deepcopy(draw.choice(VALUES))
        elif how == "drop":
            del here[name]
        elif how == "misspell" and isinstance(here, dict):
            letter = draw.randrange(len(name))
            here[name[:letter] + draw.choice(["", "x", "_"]) + name[letter + 1 :]] = here.pop(name)
        elif how == "add" and isinstance(here, dict):
            name = draw.choice(["steps", "path", "extra", "weight", "config", "0", "ü"])
            here[name] = copy.deepcopy(draw.choice(VALUES))
        elif isinstance(here, dict):
            values[name] = here.pop(name)
    text = bytearray(yaml.safe_dump(values, allow_unicode=True, sort_keys=False).encode())
    if draw.random() < 0.3:  # damage that is no YAML value
        for _ in range(draw.randint(1, 3)):
            where = draw.randrange(len(text))
            damage = draw.choice([b"\t", b"\xff", b"\x00", b": ", b"- ", b"*", b"&a ", b"{", b'"', b"!!", b"\n", b"#"])
            if draw.random() < 0.5:
                text[where:where] = damage
            else:
                del text[where : where + draw.randint(1, 40)]
    return bytes(text)


def given(values, path=()):
    """What a run file says, as (path, value), without what says nothing."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    items = list(items)
    if not items and values not in ({}, [], None):
        yield path, values
    for name, value in items:
        yield from given(value, (*path, name))


def is_kept(value, kept) -> bool:
    if isinstance(kept, (bool, int, float)) and isinstance(value, str):
        return str(kept).lower() == value.lower() or float(value) == kept
    if isinstance(kept, str) and isinstance(value, str):  # a path may be made absolute
        return kept == value or Path(kept) == Path(value).expanduser().absolute()
    if isinstance(kept, float) and isinstance(value, int):
        return not isinstance(value, bool) and kept == float(value)
    return kept == value and isinstance(kept, bool) == isinstance(value, bool)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the variable, read at the import
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.timeout(600)
def test_a_spoiled_run_file_is_refused_in_words_or_kept_whole(folder, capsys, monkeypatch):
    began = []

    def team(settings, *_, **__):
        began.append(settings)
        raise RayWasAboutToStart

    monkeypatch.setattr(train, "team_of", team)
    write_json_lines(folder / "rows.jsonl", [{"input_ids": list(range(1, 90))}])
    write_json_lines(folder / "more.jsonl", [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7, 8]}])
    refused = 0
    for seed in range(NUM_FILES):
        text = spoil(random.Random(seed))
        (folder / "run.yaml").write_bytes(text)
        began.clear()
        try:
            code = cli.run(["train", "run.yaml"])
        except RayWasAboutToStart:
            (settings,) = began
            resolved = settings.model_dump(mode="json")
            for path, value in given(yaml.safe_load(text)):
                assert is_kept(value, at(resolved, path)), (
                    f"seed {seed}: {path} = {value!r}, not {at(resolved, path)!r}"
                )
            shutil.rmtree("runs", ignore_errors=True)
            continue
        out, err = capsys.readouterr()
        assert code in (EXIT_SETTINGS, EXIT_DATA), f"seed {seed}: exit {code}\n{out}\n{err}"
        assert err.startswith("distca: ") and "Traceback" not in out + err, f"seed {seed}: {err}"
        assert not list(folder.glob("runs/*")), f"seed {seed}"
        refused += 1
    assert NUM_FILES / 3 < refused < NUM_FILES, "the test spoils too much or too little"
