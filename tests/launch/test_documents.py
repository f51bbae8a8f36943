"""Any columns in any format: a row is stored as it means, or refused by the name of what stands in the way."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import as_bytes, data_settings, refusal, stored, stored_labels, write_json_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distca.config import DataSettings, SourceSettings
from distca.launch.data.batches import NO_TARGET
from distca.launch.data.documents import Document, Problem, document_of

PLAIN = SourceSettings(path="x")


def of(row: dict[str, Any], **source: Any) -> Document | Problem:
    return document_of(row, SourceSettings(path="x", **source))


def labels_of(row: dict[str, Any], **source: Any) -> list[int]:
    document = of(row, **source)
    assert isinstance(document, Document), document
    return (document.content if document.labels is None else document.labels).tolist()


# ---- what columns mean ----

TARGETS = "loss_mask completion_mask assistant_masks assistant_mask response_mask lossMask LOSS-MASK".split()


@st.composite
def rows(draw) -> tuple[dict[str, Any], list[int] | None]:
    """Token ids with columns beside them, and the labels that they mean; None for a row that means none."""
    ids = draw(st.lists(st.integers(0, 99), min_size=1, max_size=8))
    n = len(ids)
    row: dict[str, Any] = {"input_ids": ids}
    meant, kept, good = list(ids), n, True
    flags = st.sampled_from([0, 1, True, False, 0.0, 1.0])
    if draw(st.booleans()):
        row["labels"] = draw(st.lists(st.sampled_from([NO_TARGET, 0, 7, 99]), min_size=n, max_size=n))
        meant = list(row["labels"])
    for name in draw(st.lists(st.sampled_from(TARGETS), unique=True, max_size=2)):
        mask = row[name] = draw(st.lists(flags, min_size=n, max_size=n))
        meant = [label if flag else NO_TARGET for label, flag in zip(meant, mask, strict=True)]
    if draw(st.booleans()):
        mask = row["attention_mask"] = draw(
            st.integers(0, n).map(lambda ones: [1] * ones + [0] * (n - ones))
            | st.lists(st.integers(0, 2), min_size=n, max_size=n)
        )
        kept = sum(flag == 1 for flag in mask)
        good &= mask == [1] * kept + [0] * (n - kept) and kept > 0
    if draw(st.booleans()):
        some = st.lists(st.integers(0, n), min_size=n, max_size=n)
        positions = row["position_ids"] = draw(st.just([*range(n)]) | some)
        good &= positions[:kept] == [*range(kept)]
    if draw(st.booleans()):
        zeros = row["token_type_ids"] = draw(st.just([0] * n) | st.lists(st.integers(0, 1), min_size=n, max_size=n))
        good &= not any(zeros[:kept])
    for name in draw(st.lists(st.sampled_from(["url", "length", "meta", "quality"]), unique=True)):
        row[name] = draw(st.sampled_from(["x", 3, None, {"a": 1}, [1, 2]]))
    for name in draw(st.lists(st.sampled_from(["labels", "loss_mask", "seq_idx", "images"]), unique=True, max_size=1)):
        row.setdefault(name, None)  # a null is not there
    row = {name: row[name] for name in draw(st.permutations(list(row)))}
    return row, meant[:kept] if good else None


@given(rows())
def test_columns_beside_token_ids_mean_what_they_say(drawn):
    row, meant = drawn
    if meant is None:
        assert isinstance(of(row), Problem)
        return
    assert of(row).content.tolist() == row["input_ids"][: len(meant)]
    assert labels_of(row) == meant
    assert set(of(row).unused) >= {name for name in ("url", "length", "meta", "quality") if name in row}


REFUSED: dict[str, Any] = {
    "seq_idx": [0, 0, 1],
    "cu_seqlens": [0, 2, 3],
    "cu_seq_lens_q": [0, 2, 3],
    "segment_ids": [1, 1, 2],
    "embedding": [[0.5], [0.5], [0.5]],
    "document_ids": [0, 0, 1],
    "sequence_ids": [0, 0, 1],
    "seq_lengths": [2, 1],
    "lengths": [2, 1],
    "pixel_values": [[0.5]],
    "images": ["a.png"],
    "image": "a.png",
    "audio": {"path": "x"},
    "input_features": [[0.5]],
    "inputs_embeds": [[0.5]],
    "loss_weights": [0.5, 1, 1],
    "sample_weight": 0.5,
    "weight": 2,
    "prompt_mask": [1, 1, 0],
    "mask": [1, 1, 0],
    "padding_mask": [0, 0, 1],
    "decoder_input_ids": [1, 2, 3],
    "label_ids": [1, 2, 3],
    "label": [1, 2, 3],
    "targets": [1, 2, 3],
    "tokens": ["a", "b", "c"],
    "text": "abc",
    "messages": [{"role": "user", "content": "x"}],
    "position_ids": [0, 1, 0],
    "special_tokens_mask": [1, 0, 0],
    "token_type_ids": [0, 1, 1],
    "loss_mask": [0.5, 1, 1],
    "completion_mask": "011",
    "assistant_masks": [1, 1],
    "attention_mask": [0, 1, 1],
    "labels": [-100, 6.5, 7],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name_unless_it_is_ignored(name):
    row = {"input_ids": [5, 6, 7], name: REFUSED[name]}
    for spelt in {name, name.replace("_", "-"), name.title().replace("_", "")}:
        problem = of({"input_ids": [5, 6, 7], spelt: REFUSED[name]})
        assert isinstance(problem, Problem) and f"`{spelt}`" in problem.sentence, problem
    document = of(row, ignore_columns=[name])
    assert isinstance(document, Document) and document.labels is None and document.ignored == (name,)


BESIDE_TEXT = ["labels", "loss_mask", "attention_mask", "assistant_masks", "images", "weight", "messages", "prompt"]


@pytest.mark.parametrize("name", [*BESIDE_TEXT, "input_ids", "tokens", "completion", "chosen", "position_ids"])
def test_what_speaks_of_tokens_or_is_a_second_document_is_refused_beside_text(name):
    problem = of({"text": "abc", name: [1, 2, 3]})
    assert isinstance(problem, Problem) and f"`{name}`" in problem.sentence and problem.asks, problem
    assert isinstance(of({"text": "abc", name: [1, 2, 3]}, ignore_columns=[name]), Document)


HARMLESS: list[dict[str, Any]] = [
    {"text": "abc", "embedding": [0.5, 0.25]},
    {"text": "abc", "labels": 3},
    {"text": "abc", "images": []},
    {"text": "abc", "document_ids": "a-17"},
    {"input_ids": [5, 6], "sample_ids": 3, "seq_idx": 0},
    {"input_ids": [5, 6], "category_ids": [], "images": []},
]


@pytest.mark.parametrize("row", HARMLESS, ids=str)
def test_what_is_said_of_a_row_as_a_whole_is_named_and_not_refused(row):
    document = of(row)
    assert isinstance(document, Document) and document.labels is None
    assert {*document.unused} == row.keys() - {"text", "input_ids"}


@pytest.mark.parametrize("name", ["kids", "spaced_tokens"])
def test_a_text_of_words_is_text_whatever_the_chosen_column_is_called(name):
    assert of({name: "two words"}, column=name).content == "two words"
    assert "not token ids" in of({name: "5 6 7"}, column=name).sentence
    assert "not token ids" in of({"input_ids": "two words"}, column="input_ids").sentence


def test_a_column_that_the_user_chose_is_the_document():
    row = {"doc": [5, 6, 7], "text": "x", "input_ids": [1], "loss_mask": [0, 1, 0]}
    assert labels_of(row, column="doc") == [NO_TARGET, 6, NO_TARGET]
    assert of({"text": "x", "messages": []}, column="text").content == "x"
    assert isinstance(of({"text": "x", "labels": [1]}, column="text"), Problem)
    assert "has no column `doc`" in of({"text": "x"}, column="doc").sentence


NOT_DOCUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": "[5,6,7]"}, "holds the text '[5,6,7]', not token ids"),
    ({"input_ids": [1, True, 2]}, "list of integer token ids"),
    ({"input_ids": [1, 2.0]}, "list of integer token ids"),
    ({"input_ids": [1], "labels": np.array([2**64 - 100], np.uint64)}, "column `labels` holds array([184467"),
    ({"input_ids": [1, None]}, "list of integer token ids"),
    ({"input_ids": ["1"]}, "list of integer token ids"),
    ({"input_ids": {"0": 1}}, "list of integer token ids"),
    ({"text": ["a", "b"]}, "write one row per text"),
    ({"text": [1, 2]}, "in `input_ids`, or set `column`"),
    ({"messages": [{"role": "user"}]}, "chat templates are not applied yet"),
    ({"prompt": "a", "completion": "b"}, "`prompt`, `completion`, which are not joined here"),
    ({"content": "a"}, "has no column `text` (columns: `content`); set `column`"),
    ({"text": "a", "Text": "b"}, "could each be the document"),
]


@pytest.mark.parametrize("row, wanted", NOT_DOCUMENTS, ids=str)
def test_what_is_no_document_is_said(row, wanted):
    assert wanted in of(row).sentence


NAMES = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # what a setting may hold


@given(st.dictionaries(st.text(max_size=12), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
), max_size=5), st.none() | st.text(NAMES, min_size=1, max_size=5))  # fmt: skip
def test_no_row_ends_in_anything_but_a_document_or_a_problem(row, column):
    for name in ("text", "input_ids", column):
        for value in list(row.values()):
            found = of({**row, name or "text": value}, column=column)
            assert isinstance(found, (Document, Problem))


# ---- the same rows in every format ----


def write_rows(path: Path, rows: list[dict[str, Any]], group: int) -> Path:
    """Rows in the format of the path's ending; tables in groups of so many rows, with an empty group in front."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    ending = path.name.partition(".")[2]
    if ending == "json":
        path.write_text(json.dumps(rows, indent=group))
    elif ending in ("parquet", "arrow"):
        table = pa.table(columns)
        if ending == "arrow":
            new = pa.ipc.new_stream if group % 2 else pa.ipc.new_file
            with new(path, table.schema) as writer:
                for batch in (table.slice(0, 0), *table.to_batches(max_chunksize=group)):
                    writer.write(batch)
        else:
            with pq.ParquetWriter(path, table.schema) as writer:
                for at in (None, *range(0, len(rows), group)):
                    writer.write_table(table.slice(at or 0, 0 if at is None else group))
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress, "jsonl.xz": lzma.compress}
        path.write_bytes(compress[ending](lines))
    return path


ENDINGS = ["jsonl", "json", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "parquet", "arrow"]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_format_its_groups_and_shards_do_not_show_in_what_is_stored(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("formats")
    documents = data.draw(st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=6), min_size=1, max_size=9))
    masks = [data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))) for ids in documents]
    masks[0] = [1] * len(documents[0])
    kind = data.draw(st.sampled_from(["text", "ids", "masked"]))
    expected, labels = documents, documents
    if kind == "text":
        texts = ["".join(chr(200 + number) for number in ids) for ids in documents]
        rows, expected = [{"text": text} for text in texts], as_bytes(texts)
        labels = expected
    elif kind == "ids":
        rows = [{"input_ids": ids} for ids in documents]
    else:
        rows = [{"input_ids": ids, "loss_mask": mask} for ids, mask in zip(documents, masks, strict=True)]
        labels = [
            [number if flag else NO_TARGET for number, flag in zip(ids, mask, strict=True)]
            for ids, mask in zip(documents, masks, strict=True)
        ]
    known = set()
    for number, ending in enumerate(ENDINGS):
        place = folder / str(number)
        place.mkdir()
        cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
        for shard, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
            if begin < end or ending != "arrow":
                write_rows(place / f"{shard}.{ending}", rows[begin:end], data.draw(st.integers(1, 4)))
        source = data_settings(folder / "cache", place)
        assert stored(source) == expected and stored_labels(source) == labels, (ending, cuts)
        known.add(json.dumps(stored(source)))
    assert len(known) == 1


LIST_TYPES = {
    "list": pa.list_(pa.int32()),
    "large list": pa.large_list(pa.int64()),
    "view": pa.list_view(pa.uint16()),
    "fixed": pa.list_(pa.int16(), 3),
    "dictionary": pa.list_(pa.dictionary(pa.int8(), pa.int64())),
}


@pytest.mark.parametrize("type", LIST_TYPES.values(), ids=LIST_TYPES)
def test_lists_of_every_kind_are_ids(tmp_path, type):
    table = pa.table({"input_ids": pa.array([[5, 6, 7], [8, 9, 10]], type)})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write(table)
    assert stored(data_settings(tmp_path / "cache", tmp_path / "a.arrow")) == [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("type", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_texts_of_every_kind_are_texts(tmp_path, type):
    table = pa.table({"text": pa.array(["a", "b", "a"], pa.string()).cast(type)})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write(table)
    assert stored(data_settings(tmp_path / "cache", tmp_path / "a.arrow")) == as_bytes("aba")


# ---- rows that differ in kind ----

TWO_KINDS = {
    "text and ids": ({"text": "ab"}, {"input_ids": [1, 2]}),
    "with and without labels": ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}),
    "two masks": ({"input_ids": [1, 2], "loss_mask": [1, 1]}, {"input_ids": [1, 2], "completion_mask": [1, 1]}),
}


@pytest.mark.parametrize("apart", [False, True], ids=["one file", "two files"])
@pytest.mark.parametrize("one, other", TWO_KINDS.values(), ids=TWO_KINDS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_two_kinds_are_a_question_also_when_skipping(tmp_path, one, other, apart, ending):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, rows in enumerate([[one], [other]] if apart else [[one, other]]):
        write_rows(folder / f"{number}.{ending}", rows, 2)
    for on_bad_document in ("error", "skip"):
        said = refusal(data_settings(tmp_path / "cache", folder, on_bad_document=on_bad_document))
        assert "row 0" in said and ("row 1" in said or f"1.{ending}" in said) and "one kind" in said


def test_a_row_without_the_chosen_column_is_a_bad_document(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "ab"}, {"doc": "cd"}])
    source = {"path": str(path), "column": "doc"}
    skipping = DataSettings(sources=[source], cache=tmp_path / "cache", on_bad_document="skip")
    assert stored(skipping) == as_bytes(["cd"])


def test_columns_without_use_are_named_once(tmp_path, caplog):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a", "url": 1}, {"text": "b", "id": 2, "url": 3}])
    assert stored(data_settings(tmp_path / "cache", path)) == as_bytes("ab")
    assert caplog.text.count("not trained on: columns `url`, `id`") == 1


def test_a_column_to_ignore_that_no_document_has_is_a_mistake(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a", "url": 1}])
    source = {"path": str(path), "ignore_columns": ["ulr"]}
    said = refusal(DataSettings(sources=[source], cache=tmp_path / "cache"))
    assert "`ulr`, which no document has" in said and "`url`" in said


def test_labels_that_were_shifted_are_noticed(tmp_path, caplog):
    ids = [5, 6, 7, 8, 9, 10]
    path = write_json_lines(tmp_path / "a.jsonl", [{"input_ids": ids, "labels": [*ids[1:], NO_TARGET]}] * 3)
    stored(data_settings(tmp_path / "cache", path))
    assert "the labels of 3 documents are the next tokens" in caplog.text
    caplog.clear()
    same = [5] * 6
    rows = [{"input_ids": ids, "labels": [NO_TARGET, *ids[1:]]}, {"input_ids": same, "labels": [NO_TARGET, *same[1:]]}]
    stored(data_settings(tmp_path / "cache", write_json_lines(tmp_path / "b.jsonl", rows)))
    assert "next tokens" not in caplog.text


def test_a_document_that_is_ignored_is_not_called_null():
    assert "has no column `text` (columns: `url`)" in of({"text": "a", "url": "b"}, ignore_columns=["text"]).sentence
