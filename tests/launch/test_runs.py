"""What a run keeps, so that it is complete by itself, and which settings may change when it goes on."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from documents import write_json_lines
from hardware_tables import write_hardware
from hypothesis import given
from hypothesis import strategies as st
from team import TINY_LLAMA, make_settings

from distca.config import RunSettings, validate_settings
from distca.errors import DataError, SettingsError
from distca.hardware import costs_of
from distca.launch.data.prepare import prepare
from distca.launch.folder.paths import absolute_paths
from distca.launch.folder.publish import Published
from distca.launch.folder.runs import (
    KERNEL_TIMES,
    MODEL,
    changes_since,
    differences,
    keep_model,
    kept_documents,
    known_documents,
    read_own_config,
    refuse_other_documents,
    with_kernel_times,
    with_own_model,
    with_own_tokenizer,
)
from distca.parallel.models import read_config

# ---- paths ----


def test_every_local_path_becomes_absolute_and_hub_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    table = write_hardware(tmp_path / "device.yaml")
    sources = ["rows.jsonl", "a/**/*.parquet", "models/none", "owner/name", "./owner", "~/x.jsonl", "python-stdlib"]
    (tmp_path / "rows.jsonl").touch()
    values = dict(
        model=dict(path="models/tiny"),
        data=dict(sources=[dict(path=path) for path in sources], tokenizer="owner/tokenizer", cache="cache"),
        train=dict(tokens_per_step=8, steps=1),
        planner=dict(cost=table.name),
        monitor=dict(folder="all/runs"),
    )
    found = absolute_paths(validate_settings(values))
    assert found.model.path == str(tmp_path / "models/tiny")
    here, home = (
        [str(tmp_path / path) for path in ("rows.jsonl", "a/**/*.parquet", "models/none", "owner")],
        Path.home(),
    )
    assert [source.path for source in found.data.sources] == [
        *here[:3], "owner/name", here[3], str(home / "x.jsonl"), "python-stdlib",
    ]  # fmt: skip
    assert found.data.tokenizer == "owner/tokenizer" and found.data.cache == tmp_path / "cache"
    assert found.planner.cost == str(table) and found.monitor.folder == tmp_path / "all/runs"
    assert absolute_paths(found) == found


def test_only_what_was_written_is_a_pattern(tmp_path, monkeypatch):
    folder = tmp_path / "runs [a]"
    write_json_lines(folder / "rows-1.jsonl", [{"input_ids": [1, 2, 3]}])
    monkeypatch.chdir(folder)
    settings = absolute_paths(make_settings(tmp_path, [50], data=dict(sources=[dict(path="rows-[0-9].jsonl")])))
    monkeypatch.chdir(tmp_path)
    assert prepare(settings.data, 96)


# ---- kernel times ----


def test_measured_times_stay_with_the_run(tmp_path):
    measured, run = write_hardware(tmp_path / "device.yaml"), tmp_path / "run"
    run.mkdir()
    settings = make_settings(tmp_path, [50], planner=dict(cost=str(measured)))
    own, costs = with_kernel_times(settings, run), costs_of(settings.planner)
    assert own.planner.cost == str(run / KERNEL_TIMES) and costs_of(own.planner) == costs

    write_hardware(measured, rows=[32, 128, 4096])  # measured anew
    assert with_kernel_times(own, run) == own, "resuming goes by the run's own"
    moved = run.rename(tmp_path / "moved")
    again = with_kernel_times(own, moved)
    assert again.planner.cost == str(moved / KERNEL_TIMES) and costs_of(again.planner) == costs


def test_other_times_at_a_resume_leave_those_that_the_run_went_by(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first, second = (write_hardware(tmp_path / f"{n}.yaml", rows=[16, 128, n]) for n in (2048, 4096))
    own = with_kernel_times(make_settings(tmp_path, [50], planner=dict(cost=str(first))), run)
    before = costs_of(own.planner)
    other = with_kernel_times(make_settings(tmp_path, [50], planner=dict(cost=str(second))), run)
    assert costs_of(own.planner) == before != costs_of(other.planner)
    first.unlink()
    second.unlink()
    moved = run.rename(tmp_path / "moved")
    for settings, costs in ((own, before), (other, costs_of(with_kernel_times(other, moved).planner))):
        again = with_kernel_times(settings, moved)
        assert costs_of(again.planner) == costs and Path(again.planner.cost).parent == moved
        assert with_kernel_times(again, moved) == again


def test_formulas_need_no_file(tmp_path):
    settings = make_settings(tmp_path, [50])
    assert with_kernel_times(settings, tmp_path / "nowhere") is settings


# ---- settings at a resume ----

nested = st.recursive(
    st.none() | st.integers(0, 3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
)


@given(nested, nested)
def test_differences_are_empty_exactly_for_equals_but_for_what_says_nothing(a, b):
    def plain(value):
        """Without nulls at the end of nothing: absent and null are the same."""
        return {name: v for name, v in _leaves(value).items() if v is not None}

    def _leaves(value, at=""):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        if not list(items):
            return {at: value}
        found = {}
        for name, v in value.items() if isinstance(value, dict) else enumerate(value):
            found |= _leaves(v, f"{at}.{name}")
        return found

    assert (not list(differences(a, b))) == (plain(a) == plain(b))


def checkpoint_of(settings: RunSettings, **facts) -> Published:
    return Published(
        Path("runs/a/checkpoints/step-000004"), 4, dict(settings=settings.model_dump(mode="json"), **facts)
    )


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        ("train", dict(steps=20), "train.steps 10 → 20"),
        ("train", dict(tokens_per_step=100), "train.tokens_per_step 50 → 100"),
        ("train", dict(schedule=dict(warmup_steps=3)), "train.schedule.warmup_steps 0 → 3"),
        ("train", dict(optimizer=dict(learning_rate=1e-4)), "train.optimizer.learning_rate 0.0003 → 0.0001"),
        ("parallel", dict(servers=2), "parallel.servers 0 → 2"),
    ],
)
def test_what_changes_at_a_resume_is_said(tmp_path, section, changed, said):
    before = make_settings(tmp_path, [50])
    assert changes_since(checkpoint_of(before), make_settings(tmp_path, [50], **{section: changed})) == [said]


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        ("train", dict(precision="bf16"), "train.precision: fp32 (asked for bf16)"),
        ("parallel", dict(zero_stage=2), "parallel.zero_stage: 1 (asked for 2)"),
        ("data", dict(max_document_tokens=8), "data.max_document_tokens: None (asked for 8)"),
    ],
)
def test_what_a_checkpoint_has_its_meaning_under_is_refused_by_name_alone(tmp_path, section, changed, said):
    before = make_settings(tmp_path, [50])
    with pytest.raises(SettingsError) as caught:
        changes_since(checkpoint_of(before), make_settings(tmp_path, [50], **{section: changed}))
    assert f"can only be resumed with {said}; steps, schedule" in str(caught.value)


def test_where_things_are_is_no_change(tmp_path):
    before = make_settings(tmp_path, [50])
    values = before.model_dump(mode="json")
    values["data"]["cache"], values["monitor"]["folder"] = "/elsewhere", "/other"
    values["data"]["sources"][0]["path"] = "/moved/documents.jsonl"
    assert changes_since(checkpoint_of(before), validate_settings(values)) == []
    values["model"]["activation_checkpointing"] = True
    said = ["model.activation_checkpointing False → True"]
    assert changes_since(checkpoint_of(before), validate_settings(values)) == said


# ---- documents, known by their content ----


def prepared(folder: Path, lengths) -> tuple:
    folder.mkdir(exist_ok=True)
    settings = make_settings(folder, lengths)
    return settings, prepare(settings.data, 96)


def test_equal_documents_are_the_same_wherever_they_lie_and_others_are_named_by_file(tmp_path):
    settings, documents = prepared(tmp_path / "a", [50, 7])
    checkpoint = checkpoint_of(settings, documents=known_documents(documents))
    refuse_other_documents(*prepared(tmp_path / "b", [50, 7]), checkpoint)
    changed, others = prepared(tmp_path / "c", [50, 8])
    with pytest.raises(DataError, match=r"have changed.*data.sources\[0\] \(.*c/documents.jsonl\): .* has changed"):
        refuse_other_documents(changed, others, checkpoint)
    with pytest.raises(DataError, match="2 sources, not 1"):
        refuse_other_documents(changed, (*documents, *others), checkpoint)


def test_a_file_that_is_there_twice_is_missed_where_one_of_them_goes(tmp_path):
    def documents_of(*names):
        folder = tmp_path / "-".join(names)
        for name in names:
            write_json_lines(folder / f"{name}.jsonl", [{"input_ids": [1, 2, 3]}])
        settings = make_settings(tmp_path, [50], data=dict(sources=[dict(path=str(folder))]))
        return settings, prepare(settings.data, 96)

    settings, both = documents_of("a", "b")
    checkpoint = checkpoint_of(settings, documents=known_documents(both))
    with pytest.raises(DataError, match="b.jsonl is gone"):
        refuse_other_documents(*documents_of("a"), checkpoint)


def test_ids_are_the_same_without_the_tokenizer_that_nobody_asked(tmp_path):
    settings, documents = prepared(tmp_path / "a", [50, 7])
    checkpoint = checkpoint_of(settings, documents=known_documents(documents))
    anew = prepare(settings.data, 96, str(tmp_path / "a model that is gone"))
    assert anew != documents
    refuse_other_documents(settings, anew, checkpoint)


def test_texts_are_read_with_the_runs_own_tokenizer_once_the_models_is_gone(tmp_path):
    model, source = tmp_path / "model", write_json_lines(tmp_path / "texts.jsonl", [{"text": "a b a"}, {"text": "b"}])
    transformers.AutoConfig.for_model(**TINY_LLAMA).save_pretrained(model)
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(
        model
    )
    values = make_settings(tmp_path, [50]).model_dump(mode="json")
    values["model"] = dict(path=str(model))
    values["data"]["sources"] = [dict(path=str(source))]
    settings = validate_settings(values)
    documents = prepare(settings.data, 96, settings.model.path)
    run, checkpoint = tmp_path / "run", checkpoint_of(settings, documents=known_documents(documents))
    run.mkdir()
    keep_model(run, settings, read_config(settings.model.path, None), documents)
    assert with_own_tokenizer(settings, run) is settings
    shutil.rmtree(model)
    shutil.rmtree(settings.data.cache)
    own = with_own_tokenizer(settings, run)
    refuse_other_documents(own, prepare(own.data, 96, own.model.path), checkpoint)


def test_documents_whose_files_are_gone_are_found_as_they_were_prepared(tmp_path):
    settings, documents = prepared(tmp_path / "a", [50, 7])
    checkpoint = checkpoint_of(settings, documents=known_documents(documents))
    (tmp_path / "a" / "documents.jsonl").unlink()
    assert kept_documents(settings, checkpoint) == documents
    for change in (dict(append_eos=False), dict(sources=[dict(path=str(tmp_path / "none.jsonl"))])):
        assert kept_documents(make_settings(tmp_path / "a", [50, 7], data=change), checkpoint) is None
    gone = json.loads(json.dumps(checkpoint.facts))
    gone["documents"][0]["identity"] = "0" * 32
    assert kept_documents(settings, checkpoint_of(settings, documents=gone["documents"])) is None


# ---- the model that a run is of ----


def run_of(tmp_path, settings) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    config = read_config(settings.model.path, settings.model.config, settings.model.revision)
    keep_model(run, settings, config, prepare(settings.data, 96))
    return run


def test_a_run_keeps_the_whole_configuration_and_goes_on_without_the_models_folder(tmp_path):
    model = tmp_path / "model"
    transformers.AutoConfig.for_model(**TINY_LLAMA).save_pretrained(model)
    generation = '{"temperature": 0.3, "_unknown": 1}'
    (model / "generation_config.json").write_text(generation)
    values = make_settings(tmp_path, [50]).model_dump(mode="json")
    values["model"] = dict(path=str(model), activation_checkpointing=True)
    settings = validate_settings(values)
    run = run_of(tmp_path, settings)
    (model / "config.json").unlink()

    own = with_own_model(settings, run, checkpoint_of(settings)).model
    assert own.path is None and own.activation_checkpointing
    config = read_config(None, own.config)
    assert {name: getattr(config, name) for name in TINY_LLAMA} == TINY_LLAMA
    assert (run / MODEL / "generation_config.json").read_text() == generation


def test_another_place_of_the_same_model_is_the_same_and_another_model_is_named_by_its_keys(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = make_settings(tmp_path, [50])
    run, checkpoint = run_of(tmp_path, settings), checkpoint_of(settings)
    copied, other = tmp_path / "copied", tmp_path / "other"
    transformers.AutoConfig.for_model(**TINY_LLAMA).save_pretrained(copied)
    transformers.AutoConfig.for_model(**TINY_LLAMA | dict(intermediate_size=80)).save_pretrained(other)

    def asked_for(path):
        return settings.model_copy(
            update={"model": settings.model.model_copy(update=dict(path=str(path), config=None))}
        )

    assert with_own_model(asked_for(copied), run, checkpoint).model.config == read_own_config(run)
    assert f"{copied}: the run's own model; its weights are those of {checkpoint.path}" in caplog.text
    with pytest.raises(SettingsError, match=r"is of another model: intermediate_size: 96 \(asked for 80\)$"):
        with_own_model(asked_for(other), run, checkpoint)
