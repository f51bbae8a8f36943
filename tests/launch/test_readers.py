"""A host that does not see the driver's prepared documents makes them for itself, or is named."""

import json
import shutil

import pytest
import yaml
from documents import numbered_documents, write_json_lines

from distca.config import load_settings
from distca.errors import DataError, SettingsError
from distca.launch.data.batches import META, STARTS, TOKENS, read_meta
from distca.launch.data.identity import content_there
from distca.launch.data.prepare import prepare
from distca.launch.run.readers import Recipe, documents_here, wanted_of

HOST = "10.0.0.2"


@pytest.fixture
def recipe(tmp_path):
    """Two sources, the second with labels."""
    documents = numbered_documents([5, 9, 1, 300])
    write_json_lines(tmp_path / "a.jsonl", [dict(input_ids=ids) for ids in documents])
    write_json_lines(tmp_path / "b.jsonl", [dict(input_ids=ids, labels=[-100, *ids[1:]]) for ids in documents[:2]])
    values = dict(
        model=dict(config=dict(model_type="llama", vocab_size=400)),
        data=dict(
            sources=[dict(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")], cache=str(tmp_path / "cache")
        ),
        train=dict(tokens_per_step=4096, steps=3),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return Recipe(load_settings(tmp_path / "run.yaml", []), tmp_path / "run", 400)


@pytest.fixture
def wanted(recipe):
    """The documents that the driver has prepared."""
    return tuple(map(wanted_of, prepare(recipe.settings.data, 400)))


def test_a_host_that_sees_the_drivers_folders_reads_none_of_their_files(recipe, wanted):
    for source in wanted:
        (source.folder / TOKENS).unlink()
    assert documents_here(HOST, recipe, wanted) == tuple(source.folder for source in wanted)


@pytest.mark.parametrize("gone", [[0], [1], [0, 1]])
def test_what_a_host_lacks_it_makes_and_no_more(recipe, wanted, gone, tmp_path):
    for n in gone:
        shutil.rmtree(wanted[n].folder)
    for n in {0, 1} - set(gone):
        (tmp_path / "ab"[n]).with_suffix(".jsonl").unlink()
    made = documents_here(HOST, recipe, wanted)
    assert made == tuple(source.folder for source in wanted)
    assert [read_meta(folder)["content"] for folder in made] == [source.content for source in wanted]


def test_a_copy_elsewhere_of_the_same_contents_is_taken(recipe, wanted, tmp_path):
    """As a host's own disk, which somebody has filled."""
    for source in wanted:
        shutil.copytree(source.folder, tmp_path / "copy")
        shutil.rmtree(source.folder)
        (tmp_path / "copy").rename(source.folder)
        assert content_there(source.folder) == source.content
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert documents_here(HOST, recipe, wanted) == tuple(source.folder for source in wanted)


@pytest.mark.parametrize("name", [TOKENS, STARTS, "lengths.bin", "targets.bin", "labels.bin"])
def test_a_copy_with_another_byte_in_it_is_refused(recipe, wanted, tmp_path, name):
    source = wanted[1]
    shutil.copytree(source.folder, tmp_path / "copy")
    shutil.rmtree(source.folder)
    (tmp_path / "copy").rename(source.folder)
    content = bytearray((source.folder / name).read_bytes())
    content[-8] ^= 1
    (source.folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^host {HOST}: data.sources.1. .*b.jsonl. in {source.folder}: its files do"):
        documents_here(HOST, recipe, wanted)


def test_other_files_on_a_host_are_refused_by_name(recipe, wanted, tmp_path):
    shutil.rmtree(wanted[0].folder)
    write_json_lines(tmp_path / "a.jsonl", [dict(input_ids=[1, 2, 3])])
    sentence = f"^host {HOST}: data.sources.0. .*a.jsonl. in .*: the documents are not those of .*: a.jsonl has changed"
    with pytest.raises(DataError, match=sentence):
        documents_here(HOST, recipe, wanted)


def test_files_that_became_other_documents_there_are_refused(recipe, wanted):
    """The same identity, by a library that makes something else of it."""
    meta = read_meta(wanted[0].folder)
    (wanted[0].folder / META).write_text(json.dumps(meta | dict(content="0" * 32)))
    with pytest.raises(DataError, match=f"^host {HOST}: .* read in another way"):
        documents_here(HOST, recipe, wanted)


def test_a_host_with_neither_documents_nor_sources_is_told_what_is_missing(recipe, wanted, tmp_path):
    shutil.rmtree(wanted[0].folder)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SettingsError) as refused:
        documents_here(HOST, recipe, wanted)
    for part in (
        f"host {HOST} does not see",
        str(wanted[0].folder),
        f"data.sources[0] ({tmp_path}/a.jsonl)",
        "no such",
    ):
        assert part in str(refused.value)


def test_a_description_that_is_damaged_there_is_a_sentence_with_the_host(recipe, wanted):
    (wanted[0].folder / META).write_text("{")
    with pytest.raises(DataError, match=f"^host {HOST}: .*is damaged"):
        documents_here(HOST, recipe, wanted)
