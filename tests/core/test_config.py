"""What a run file may say, how it is overridden, and what is said about one that is wrong."""

import pytest
import yaml

from distca.config import (
    RunSettings,
    Settings,
    describe_settings,
    dump_settings,
    load_settings,
    split_overrides,
    validate_settings,
)
from distca.errors import EXIT_SETTINGS, SettingsError


def values(**sections):
    """The smallest run file, with these sections added to it."""
    found = dict(
        model=dict(config=dict(model_type="llama")),
        data=dict(sources=[dict(path="a.jsonl"), dict(path="b.jsonl")]),
        train=dict(tokens_per_step=1200, steps=10),
    )
    for name, section in sections.items():
        found[name] = found.get(name, {}) | section if isinstance(section, dict) else section
    return found


def refusal(**sections) -> str:
    with pytest.raises(SettingsError) as caught:
        validate_settings(values(**sections), "x.yaml")
    assert caught.value.exit_code == EXIT_SETTINGS
    return str(caught.value)


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values()))
    return path


def loaded(run_file, *overrides) -> RunSettings:
    return load_settings(run_file, overrides)


# ---- what is wrong, all at once ----


def test_every_error_is_reported_at_once_with_its_path_and_what_is_allowed():
    text = refusal(
        sed=1,
        data=dict(sources=[dict(path="a", weight=0), dict(format="csv")]),
        train=dict(tokens_per_step=-4, steps="many", precision="fp8"),
        parallel=dict(trainer_capacity=101),
        planner=dict(block=100),
    )
    assert text.splitlines() == [
        "x.yaml: 9 settings to correct",
        "  data.sources[0].weight: Input should be greater than 0, got 0",
        "  data.sources[1].path: required, but not given",
        "  data.sources[1].format: Input should be 'auto', 'json', 'parquet', 'arrow', 'text' or 'hub', got 'csv'",
        "  train.tokens_per_step: Input should be greater than 0, got -4",
        "  train.steps: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        "  train.precision: Input should be 'fp32', 'bf16' or 'fp64', got 'fp8'",
        "  parallel.trainer_capacity: Input should be less than or equal to 100, got 101",
        "  planner.block: must be a power of two of at least 16, got 100",
        "  sed: no such setting; did you mean 'seed'?",
    ]


@pytest.mark.parametrize(
    "sections, sentence",
    [
        (dict(parallel=dict(trainer=2)), "parallel.trainer: no such setting; did you mean 'trainers'?"),
        (dict(train=dict(optimizer=dict(lr=1))), "train.optimizer.lr: no such setting; known here: learning_rate, "),
        (dict(data=dict(sources=[dict(pth="a", path="a")])), "data.sources[0].pth: no such setting; did you mean"),
        (dict(data=dict(sources=[])), "data.sources: "),
        (dict(parallel=dict(trainers=True)), "parallel.trainers: want integer, got True"),
        (dict(parallel=dict(zero_stage=True)), "parallel.zero_stage: want 0 | 1 | 2 | 3, got True"),
        (dict(parallel=dict(trainers_serve=1)), "parallel.trainers_serve: want true or false, got 1"),
        (dict(data=dict(max_document_tokens=True)), "data.max_document_tokens: want integer | none, got True"),
        (dict(train=True), "train: Input should be a valid dictionary"),
        (dict(monitor=dict(folder="")), "monitor.folder: empty: give a path, or leave it out"),
        (dict(model=dict(path="")), "model.path: String should have at least 1 character"),
        (dict(data=dict(sources=[dict(path="a", column="\0")])), "data.sources[0].column: holds a NUL character"),
        (dict(train=dict(clip_grad_norm=float("nan"))), "train.clip_grad_norm: Input should be a finite number, "),
        (dict(name="a/b"), "name: String should match pattern"),
        (dict(model=dict(path="x")), "model: give either `path`"),
        (dict(model=dict(config=dict(hidden_size=8))), "model: `config` needs `model_type`"),
        (dict(parallel=dict(servers=0, trainers_serve=False)), "parallel: nobody would compute attention: set"),
    ],
    ids=str,
)  # fmt: skip
def test_one_error_is_one_sentence(sections, sentence):
    first, line = refusal(**sections).splitlines()
    assert first == "x.yaml: 1 setting to correct"
    assert line.startswith(f"  {sentence}")


def test_a_frozen_setting_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        validate_settings(values()).seed = 3


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "3", "", "null"], ids=repr)
def test_a_run_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(
        SettingsError, match=r"run\.yaml: a run file is a mapping of sections \(model, data, train, …\)"
    ):
        load_settings(path)


def test_a_run_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="none.yaml: cannot read the run file: No such file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="cannot read the run file: Is a directory"):
        load_settings(tmp_path)
    for content in (b"a: [", b"\xff\xfe\x00", b"a: !!python/object:os.system {}"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(SettingsError, match=r"bad\.yaml: not a YAML file"):
            load_settings(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  steps: 3\n  steps: 4\n", "line 3, column 3: 'steps' is given twice"),
        ("model:\n  config: &a {b: *a}\n", "Circular reference"),
        ("name: 2001-13-45\n", "month must be in 1..12"),
        ("[" * 5000, "recursion"),
        ("a: [", "line 1, column 5: "),
        ("train: {steps: !!int ''}\n", "index out of range"),
        ("train: {steps: !!bool x}\n", "x"),
        ("train: !!map [b]\n", "expected a mapping node"),
    ],
)
def test_what_nobody_means_is_no_run_file(tmp_path, text, sentence):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SettingsError, match="not a YAML file") as caught:
        load_settings(tmp_path / "run.yaml")
    assert sentence in str(caught.value) and len(str(caught.value).splitlines()) == 1


# ---- tokens ----


@pytest.mark.parametrize(
    "trainers, train, per_rank, accumulation",
    [
        (1, {}, 1200, 1),
        (3, {}, 400, 1),
        (3, dict(accumulation=4), 100, 4),
        (3, dict(tokens_per_rank=100), 100, 4),
        (3, dict(tokens_per_rank=100, accumulation=4), 100, 4),
    ],
)
def test_tokens_per_rank_and_accumulation_follow_from_each_other(trainers, train, per_rank, accumulation):
    settings = validate_settings(values(train=train, parallel=dict(trainers=trainers)))
    assert (settings.tokens_per_rank, settings.accumulation) == (per_rank, accumulation)
    assert settings.tokens_per_micro_batch * settings.accumulation == settings.train.tokens_per_step


@pytest.mark.parametrize(
    "trainers, train, sentence",
    [
        (7, {}, "multiple of parallel.trainers x train.accumulation = 7; 1197 or 1204 would work"),
        (2, dict(tokens_per_rank=700), "multiple of parallel.trainers x train.tokens_per_rank = 1400; 1400 would work"),
        (1, dict(accumulation=7), "multiple of parallel.trainers x train.accumulation = 7; 1197 or 1204 would work"),
        (2, dict(tokens_per_rank=100, accumulation=5), "parallel.trainers = 1000, but train.tokens_per_step = 1200: "),
    ],
)
def test_tokens_that_cannot_be_shared_are_refused_with_numbers_that_work(trainers, train, sentence):
    assert sentence in refusal(train=train, parallel=dict(trainers=trainers))


# ---- overrides ----


def test_overrides_reach_every_depth(run_file):
    settings = loaded(
        run_file, "--seed", "5", "--train.steps=20", "--train.optimizer.learning-rate", "1e-3",
        "--data.sources.1.weight", "2", "--parallel.trainers-serve", "true", "--model.config.hidden_size", "64",
        "--data.max_document_tokens", "null", "--monitor.folder", "a=b c",
    )  # fmt: skip
    assert settings.seed == 5 and settings.train.steps == 20
    assert settings.train.optimizer.learning_rate == 1e-3
    assert [source.weight for source in settings.data.sources] == [1, 2]
    assert settings.model.config == {"model_type": "llama", "hidden_size": 64}
    assert settings.data.max_document_tokens is None and str(settings.monitor.folder) == "a=b c"


def test_the_last_of_two_overrides_counts_and_lists_can_be_replaced(run_file):
    settings = loaded(run_file, "--seed", "1", "--seed=2", "--data.sources", "[{path: c.txt}]")
    assert settings.seed == 2 and [source.path for source in settings.data.sources] == ["c.txt"]


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["--train.steps"], "--train.steps needs a value"),
        (["train.steps", "3"], "cannot read the argument 'train.steps': overrides look like --train.steps 10"),
        (["--train.steps.x", "3"], "--train.steps.x: train.steps is a single value, it has no 'x'"),
        (["--train.steps.x.y", "3"], "--train.steps.x.y: 'x' is below a single value"),
        (["--data.sources.2.weight", "3"], "--data.sources.2.weight: '2' is not a place in a list of 2"),
        (["--data.sources.first.weight", "3"], "'first' is not a place in a list of 2"),
        (["--seed", "[1"], "--seed: cannot read '[1' as a YAML value"),
        (["--train.stepz", "3"], "train.stepz: no such setting; did you mean 'steps'?"),
    ],
    ids=str,
)
def test_an_override_that_cannot_be_applied_is_refused(run_file, overrides, sentence):
    with pytest.raises(SettingsError) as caught:
        loaded(run_file, *overrides)
    assert sentence in str(caught.value)


def test_a_command_line_is_split_into_the_commands_words_and_overrides():
    words = ["train", "--train.steps", "-3", "run.yaml", "--insecure", "--seed=4", "--name", "x", "--data.cache"]
    own, overrides = split_overrides(words)
    assert own == ["train", "run.yaml", "--insecure"]
    assert overrides == ["--train.steps", "-3", "--seed=4", "--name", "x", "--data.cache"]


# ---- numbers, dumps and descriptions ----


def test_numbers_with_an_exponent_are_numbers_also_inside_a_models_configuration(tmp_path):
    """YAML 1.1 reads 1e-6 as text; Transformers then refused the norm's epsilon, or worse, kept the text."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values()) + "name: 1e5x\n")
    settings = loaded(path, "--model.config.rms_norm_eps", "1e-6", "--model.config.rope_theta=5E5")
    assert settings.model.config["rms_norm_eps"] == 1e-6 and settings.model.config["rope_theta"] == 5e5
    assert settings.name == "1e5x"


@pytest.mark.parametrize("name", ["run", "123", "1e5", "1.5", "true", "null"])
def test_what_is_dumped_loads_as_the_same_settings(tmp_path, name):
    config = dict(model_type="llama", rms_norm_eps=1e-06, x="1e-6", layers=["a", None, 2.5e-9])
    settings = validate_settings(values(name=name, seed=7, model=dict(config=config), parallel=dict(trainers=3)))
    path = tmp_path / "run.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(path) == settings


def leaves(model: type[Settings], prefix=""):
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_list_of_settings_covers_every_field_and_explains_it():
    described = {name: (allowed, default, meaning) for name, allowed, default, meaning in describe_settings()}
    assert set(leaves(RunSettings)) == {name for name in described if "[i]" not in name}
    assert {"data.sources[i].path", "data.sources[i].weight"} <= set(described)
    unexplained = [name for name, (*_, meaning) in described.items() if not meaning and name != "data.sources[i].path"]
    assert not unexplained
    assert described["train.tokens_per_rank"][:2] == ("integer > 0 | none", "default none")
    assert described["parallel.trainer_capacity"][:2] == ("integer >= 1, <= 100", "default 100")
    assert described["train.precision"][:2] == ("fp32 | bf16 | fp64", "default bf16")
    assert described["data.sources[i].path"][1] == "required"
    assert described["monitor.trace_steps"][:2] == ("[integer > 0, integer > 0] | none", "default none")


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([22, 20], "monitor.trace_steps: the first step comes first, got [22, 20]"),
        ([9, 11], "monitor.trace_steps = [9, 11], but the run has 10 steps (train.steps)"),
        ([0, 2], "monitor.trace_steps[0]: Input should be greater than 0, got 0"),
        ([True, 2], "monitor.trace_steps[0]: Input should be a valid integer, got True"),
        ([1, 2, 3], "monitor.trace_steps: The list should have at most 2 items"),
        (7, "monitor.trace_steps: Input should be a list, such as [a, b], got 7"),
    ],
    ids=str,
)
def test_steps_that_cannot_be_traced_are_refused(steps, sentence):
    with pytest.raises(SettingsError) as caught:
        validate_settings(values(monitor=dict(trace_steps=steps)))
    assert sentence in str(caught.value)
    assert validate_settings(values(monitor=dict(trace_steps=[9, 10]))).monitor.trace_steps == (9, 10)


def test_a_word_where_a_list_belongs_is_told_so():
    values = {"data": {"sources": [{"path": "x", "ignore_columns": "url"}]}}
    with pytest.raises(SettingsError) as caught:
        validate_settings(values)
    assert "data.sources[0].ignore_columns: Input should be a list, such as [a, b], got 'url'" in str(caught.value)
