"""From files to documents: what is read, what is refused, and how it is said."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import as_bytes, data_settings, refusal, stored, write_json_lines, write_parquet

from distca.config import DataSettings
from distca.errors import SettingsError
from distca.launch.data import encode as encode_module
from distca.launch.data import prepare as prepare_module
from distca.launch.data import read as read_module
from distca.launch.data.batches import META, Corpus
from distca.launch.data.prepare import prepare

TEXTS = ["one", "zwölf Boxkämpfer", "日本語 🙂", "a\x00b\n"]
IDS = [[5, 6, 7], [8], [250, 0, 1, 2]]


@pytest.fixture
def offline(monkeypatch):
    """As HF_HUB_OFFLINE=1 before the start; both libraries read the variable when they are imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


# ---- formats ----


def test_json_lines_and_json_arrays_hold_the_same_documents(tmp_path):
    rows = [{"text": text, "other": 1} for text in TEXTS]
    lines = write_json_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"\n" + lines.read_bytes()))
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        assert stored(data_settings(tmp_path / "cache", tmp_path / name)) == as_bytes(TEXTS)


def test_parquet_and_arrow_hold_the_same_documents(tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    arrow = next((tmp_path / "folder").glob("*.arrow"))
    for path in (tmp_path / "a.parquet", arrow, tmp_path / "folder", tmp_path / "splits"):
        assert stored(data_settings(tmp_path / "cache", path)) == as_bytes(TEXTS)


def test_a_text_file_is_one_document(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    assert stored(data_settings(tmp_path / "cache", tmp_path)) == as_bytes(TEXTS)
    assert stored(data_settings(tmp_path / "cache", tmp_path / "*.txt")) == as_bytes(TEXTS)


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b/2", "a/9", "a/10", "c"):
        write_json_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    settings = data_settings(tmp_path / "cache", tmp_path / "**/*.jsonl")
    assert stored(settings) == as_bytes(["a/10", "a/9", "b/2", "c"])


def test_names_may_hold_the_signs_of_globs(tmp_path):
    path = write_parquet(tmp_path / "part[1]*.parquet", {"input_ids": IDS})
    assert stored(data_settings(tmp_path / "cache", path)) == IDS


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_token_ids_are_taken_as_they_are_and_need_no_tokenizer(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(encode_module, "load_tokenizer", lambda *_: pytest.fail("loaded a tokenizer"))
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        write_json_lines(path, [{"input_ids": ids, "title": "not this"} for ids in IDS])
    else:
        write_parquet(path, {"input_ids": IDS, "title": ["not this"] * 3})
    assert stored(data_settings(tmp_path / "cache", path, tokenizer="nobody/nowhere")) == IDS


def test_a_named_column_is_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["wrong"], "story": ["right"]})
    settings = DataSettings(
        sources=[{"path": str(path), "column": "story"}], cache=tmp_path / "cache", append_eos=False
    )
    assert stored(settings) == as_bytes(["right"], eos=False)


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32"), (1 << 20, "uint32")])
def test_the_largest_id_of_a_vocabulary_is_stored_unharmed(tmp_path, vocab_size, dtype):
    path = write_json_lines(tmp_path / "a.jsonl", [{"input_ids": [0, vocab_size - 1]}])
    settings = data_settings(tmp_path / "cache", path)
    assert stored(settings, vocab_size) == [[0, vocab_size - 1]]
    assert json.loads((prepare(settings, vocab_size)[0] / META).read_text())["dtype"] == dtype


def test_batches_do_not_show_in_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(prepare_module, "BATCH_SIZE", 20)
    texts = ["x" * length for length in (1, 50, 2, 3, 4, 5, 30, 30, 1)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts})
    assert stored(data_settings(tmp_path / "cache", path)) == as_bytes(texts)


def test_the_standard_library_is_a_corpus_with_a_long_tail(tmp_path):
    (folder,) = prepare(data_settings(tmp_path, "python-stdlib"), 259)
    lengths = Corpus([folder]).lengths[0]
    assert len(lengths) > 300 and lengths.sum() > 5_000_000
    assert lengths.max() > 20 * np.median(lengths)


# ---- refusals ----

BAD_ROWS = {
    "empty text": ({"text": ""}, "empty"),
    "no ids": ({"input_ids": []}, "empty"),
    "null": ({"text": None}, "missing (null in column `text`)"),
    "id as large as the vocabulary": (
        {"input_ids": [1, 259]},
        "token id 259 is outside the model's vocabulary (0 to 258)",
    ),
    "negative id": ({"input_ids": [1, -1]}, "token id -1 is outside"),
    "an id beyond int64": ({"input_ids": [1 << 70]}, "list of integer token ids"),
    "a fraction": ({"input_ids": [1.5]}, "holds [1.5]; a document is text, or a list of integer token ids"),
    "nested lists": ({"input_ids": [[1], [2, 3]]}, "list of integer token ids"),
    "a number": ({"text": 3}, "holds 3; a document is text"),
    "no such column": ({"txt": "x"}, "has no column `text` (columns: `txt`); set `column`"),
    "not an object": ("x", "not an object"),
    "broken JSON": (b'{"text": "x', "is not JSON"),
    "broken encoding": (b'{"text": "\xff"}', "cannot be read"),
    "half a surrogate pair": ({"text": "\ud800"}, "not valid Unicode"),
}


@pytest.mark.parametrize("bad, wanted", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(tmp_path, bad, wanted, caplog):
    good = [{"text": "x"}, {"text": "y"}]
    if isinstance(bad, dict) and "input_ids" in bad:
        good = [{"input_ids": ids} for ids in as_bytes("xy")]
    path = write_json_lines(tmp_path / "a.jsonl", [good[0], bad, good[1], bad])
    said = refusal(data_settings(tmp_path / "cache", path))
    for part in (f"data.sources[0] ({path})", f"file {path}", "row 1", wanted, "data.on_bad_document: skip"):
        assert part in said
    skipping = data_settings(tmp_path / "cache", path, on_bad_document="skip")
    for _ in range(2):  # also when it was prepared before
        caplog.clear()
        assert stored(skipping) == as_bytes(["x", "y"])
        assert "left out 2" in caplog.text and "row 1" in caplog.text


def test_reasons_are_counted_apart(tmp_path, caplog):
    rows = [{"input_ids": []}, {"input_ids": [1, 2]}, {"input_ids": [999]}, {"input_ids": []}, b"{"]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    prepare(data_settings(tmp_path / "cache", path, on_bad_document="skip"), 259)
    for part in ("left out 4", "2 empty (first: ", "1 id outside the vocabulary (first: ", "1 broken JSON (first: "):
        assert part in caplog.text


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = write_parquet(folder / "good.parquet", {"text": ["x" * 1000] * 50}).read_bytes()
    (folder / "good.parquet").unlink()
    contents = {
        "garbage.parquet": (b"PAR1 and no more", "cannot be read"),
        "cut.parquet": (good[: len(good) // 2], "cannot be read"),
        "garbage.arrow": (b"no arrow", "cannot be read"),
        "latin.txt": ("Bär".encode("latin-1"), "cannot be read: 'utf-8' codec"),
        "empty.txt": (b"", "the document is empty"),
        "cut.json": (b'[{"text": "x"}, {"te', "is not a JSON array: there is '{\"te'"),
        "garbage.jsonl.gz": (b"no gzip", "cannot be read"),
        "cut.jsonl.gz": (gzip.compress(os.urandom(1000).hex().encode())[:-20], "cannot be read"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, wanted) for name, (_, wanted) in contents.items()}


def write_good_file(path: Path) -> None:
    if path.suffix == ".parquet":
        write_parquet(path, {"text": ["x"]})
    elif path.suffix == ".arrow":
        table = pa.table({"text": ["x"]})
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write(table)
    elif path.suffix == ".txt":
        path.write_text("x")
    else:
        write_json_lines(path, [{"text": "x"}])


def test_a_bad_file_is_named_or_left_out(tmp_path, caplog):
    for name, (path, wanted) in bad_files(tmp_path).items():
        said = refusal(data_settings(tmp_path / "cache", path))
        assert f"file {path}" in said and wanted in said, said
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        shutil.move(path, folder / f"a.{name}")
        write_good_file(folder / f"b.{name.removesuffix('.gz')}")
        caplog.clear()
        assert stored(data_settings(tmp_path / "cache", folder, on_bad_document="skip")) == as_bytes(
            "xx" if name == "cut.json" else "x"  # what stands before the damage is good
        )
        assert "left out 1" in caplog.text and f"a.{name}" in caplog.text
        shutil.rmtree(tmp_path / "cache")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    link = tmp_path / "gone.jsonl"
    link.symlink_to(tmp_path / "nowhere.jsonl")
    assert f"file {link}: cannot be read: No such file" in refusal(data_settings(tmp_path / "cache", link))
    assert f"file {link}" in refusal(data_settings(tmp_path / "cache", tmp_path / "*.jsonl"))


@pytest.mark.skipif(
    os.geteuid() == 0, reason="root may read everything; would show that a permission error names the file"
)
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    path.chmod(0)
    assert f"file {path}" in refusal(data_settings(tmp_path / "cache", path))


def test_columns_are_checked_in_tables(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"txt": ["x"], "number": [1.5]})
    said = refusal(data_settings(tmp_path / "cache", path))
    assert f"file {path}: has no column `text` (columns: `txt`, `number`)" in said
    wrong = DataSettings(sources=[{"path": str(path), "column": "number"}], cache=tmp_path / "cache")
    assert f"file {path}, row 0" in refusal(wrong) and "column `number` holds 1.5; a document is" in refusal(wrong)


def test_bad_rows_of_tables_are_named(tmp_path):
    rows = [[1, 2], None, [2, None], [], [7, 300], [3]]
    path = write_parquet(tmp_path / "a.parquet", {"input_ids": rows})
    said = refusal(data_settings(tmp_path / "cache", path))
    assert f"file {path}, row 1" in said and "null" in said
    assert stored(data_settings(tmp_path / "cache", path, on_bad_document="skip")) == [[1, 2], [3]]


def test_what_is_not_there_is_said(tmp_path, offline):
    cases = {
        "*.jsonl": "no file matches",
        "a.jsonl": "no such file or folder",
        "/no/such/folder": "no such file or folder",
        "nobody/nowhere": "neither a file or folder here nor a data set on the Hugging Face hub",
    }
    for path, wanted in cases.items():
        said = refusal(data_settings(tmp_path / "cache", path))
        assert said.startswith(f"data.sources[0] ({path}): ") and wanted in said
    (tmp_path / "empty").mkdir()
    assert "there is no json, parquet, arrow or text file" in refusal(data_settings(tmp_path / "c", tmp_path / "empty"))


def test_a_data_set_read_as_the_hub_gives_it_names_its_rows(tmp_path):
    """A folder stands for the hub here: `datasets` reads both the same way."""
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train-0.parquet", {"text": ["x", "", "y"]})
    write_parquet(tmp_path / "set" / "validation-0.parquet", {"text": ["z"]})
    source = {"path": str(tmp_path / "set"), "format": "hub"}
    assert "row 1" in refusal(DataSettings(sources=[source], cache=tmp_path / "cache"))
    skipping = DataSettings(sources=[source], cache=tmp_path / "cache", on_bad_document="skip")
    assert stored(skipping) == as_bytes(["x", "y"])
    validation = DataSettings(sources=[{**source, "split": "validation"}], cache=tmp_path / "cache")
    assert stored(validation) == as_bytes(["z"])
    shutil.rmtree(tmp_path / "cache")
    unknown = DataSettings(sources=[{**source, "split": "dev"}], cache=tmp_path / "cache")
    assert "is not a data set on the Hugging Face hub that can be read" in refusal(unknown)


def test_files_of_several_kinds_in_one_folder_are_refused(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "notes.txt").write_text("y")
    assert "holds files of json and text; set `format`" in refusal(data_settings(tmp_path / "cache", tmp_path))
    source = {"path": str(tmp_path), "format": "json"}
    assert stored(DataSettings(sources=[source], cache=tmp_path / "cache")) == as_bytes(["x"])


def test_an_ending_that_says_nothing_is_refused_unless_the_format_is_given(tmp_path):
    (tmp_path / "a.md").write_text("x")
    assert "set `format`" in refusal(data_settings(tmp_path / "cache", tmp_path / "a.md"))
    source = {"path": str(tmp_path / "a.md"), "format": "text"}
    assert stored(DataSettings(sources=[source], cache=tmp_path / "cache")) == as_bytes(["x"])


def test_a_source_without_any_good_document_is_refused_even_when_skipping(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": ""}])
    said = refusal(data_settings(tmp_path / "cache", path, on_bad_document="skip"))
    assert "no document to train on" in said and "2 empty" in said


def test_a_cache_that_cannot_be_written_is_a_setting_to_change(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(SettingsError, match="data.cache: cannot write"):
        prepare(data_settings(path / "cache", path), 259)


# ---- encodings, compression, layouts ----


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl", "jsonl.gz", "json"])
def test_a_byte_order_mark_is_not_content(tmp_path, ending):
    content = {"txt": "ab", "jsonl": '{"text": "ab"}\n', "json": '[{"text": "ab"}]'}[ending.partition(".")[0]]
    marked = b"\xef\xbb\xbf" + content.encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(marked) if ending.endswith("gz") else marked)
    assert stored(data_settings(tmp_path / "cache", path)) == as_bytes(["ab"])


WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json"])
@pytest.mark.parametrize("encoding", WIDE)
def test_other_encodings_are_named(tmp_path, encoding, ending):
    content = {"txt": "a few words", "jsonl": '{"text": "ab"}\n{"text": "c"}\n', "json": '[{"text": "ab"}]'}[ending]
    (tmp_path / f"a.{ending}").write_bytes(content.encode(encoding))
    said = refusal(data_settings(tmp_path / "cache", tmp_path / f"a.{ending}"))
    assert f"it is {encoding[:6].upper()}; convert it" in said


COMPRESSED = {
    "gzip": (gzip.compress, "let its name end in .gz"),
    "bzip2": (bz2.compress, "let its name end in .bz2"),
    "xz": (lzma.compress, "let its name end in .xz"),
    "Zstandard": (lambda content: pa.compress(content, "zstd", asbytes=True), "decompress it (`zstd -d`)"),
    "ZIP": (lambda content: b"PK\x03\x04" + content, "unpack it"),
    "parquet": (lambda content: b"PAR1" + content, "let its name end in .parquet"),
    "arrow": (lambda content: b"ARROW1\0\0" + content, "let its name end in .arrow"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("compress, wanted", COMPRESSED.values(), ids=COMPRESSED)
def test_what_a_file_really_is_is_said(tmp_path, compress, wanted, name):
    content = compress(b'{"text": "ab"}\n' * 50)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert wanted in refusal(data_settings(tmp_path / "cache", tmp_path / name))


UNREAD = ["a.jsonl.zst", "a.zst", "a.csv", "a.tsv", "a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.mds", "a.npy", "a.bin"]


@pytest.mark.parametrize("name", [*UNREAD, "a.idx", "a.h5", "a.parquet.gz", "a.csv.gz", "a.orc", "a.pkl"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside good files"])
def test_data_that_is_not_read_is_refused_by_name(tmp_path, name, alone):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    if not alone:
        write_json_lines(folder / "b.jsonl", [{"text": "ab"}])
    for place in [folder / name] if alone else [folder, f"{folder}/*"]:
        said = refusal(data_settings(tmp_path / "cache", place))
        assert str(folder / name) in said and "cannot be read here: " in said


def test_other_files_of_a_folder_are_named_once(tmp_path, caplog):
    write_json_lines(tmp_path / "data" / "b.jsonl", [{"text": "ab"}])
    for name in ("README.md", "_SUCCESS", "deep/code.py", ".hidden"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    write_json_lines(tmp_path / "elsewhere" / "c.jsonl", [{"text": "cd"}])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "linked" / "loop").symlink_to(tmp_path / "data")
    assert stored(data_settings(tmp_path / "cache", tmp_path / "data")) == as_bytes(["ab", "cd"])
    assert caplog.text.count("left aside 3 that are not data by their ending") == 1


BROKEN_JSON = {
    "an object over several lines": ('{\n "text": "ab"\n}\n', "an object must be on one line (`jq -c .`"),
    "an object of columns": ('{"text": ["ab", "cd"]}', "write one row per text"),
    "columns of ids": ('{"input_ids": [[1, 2], [3]]}', "one row is one document"),
    "a column twice": ('{"text": "ab", "text": "cd"}', "gives column `text` twice"),
    "too deep": ('{"text": "ab", "x": ' + "[" * 200_000, "not JSON"),
    "a number too long": ('{"input_ids": [' + "9" * 5000 + "]}", "not JSON that can be read"),
    "two on a line": ('{"text": "ab"} {"text": "cd"}', "a line is one object"),
}


@pytest.mark.parametrize("content, wanted", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_json_that_is_not_rows_gets_a_reason(tmp_path, content, wanted):
    (tmp_path / "a.jsonl").write_text(content)
    assert wanted in refusal(data_settings(tmp_path / "cache", tmp_path / "a.jsonl"))
    (tmp_path / "b.json").write_text("[" + content)
    assert str(tmp_path / "b.json") in refusal(data_settings(tmp_path / "cache", tmp_path / "b.json"))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    texts = ['a\\"]}é🙂', "\\u00e9\\ud83d\\ude42", "b" * 100]
    rows = [{"text": text, "n": -1.5e-7, "t": [True, None]} for text in texts]
    monkeypatch.setattr(read_module, "CHUNK", chunk)
    for number, dumped in enumerate((json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False))):
        (tmp_path / f"{number}.json").write_text(f" \n{dumped}\n ")
        assert stored(data_settings(tmp_path / "c", tmp_path / f"{number}.json")) == as_bytes(texts)
        shutil.rmtree(tmp_path / "c")


def test_the_row_named_is_the_bad_one(tmp_path):
    good = [{"text": f"{number:03}" * 40} for number in range(300)]
    lines = write_json_lines(tmp_path / "a.jsonl", good[:200]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    (tmp_path / "bad.json").write_bytes(json.dumps(good[:7])[:-1].encode() + b', {"text": "\xff"}, {"text": "x"}]')
    (tmp_path / "bad.jsonl").write_bytes(lines + b'{"text": "\xff"}\n' + lines)
    kept = [gzip.compress(lines)[:-9], 200]
    for name, row in (("bad.json", 7), ("bad.jsonl", 200)):
        assert f"row {row} (counted" in refusal(data_settings(tmp_path / "cache", tmp_path / name)), name
    skipping = data_settings(tmp_path / "cache", tmp_path / "cut.jsonl.gz", on_bad_document="skip")
    found = len(stored(skipping))
    assert f"row {found} (counted" in refusal(data_settings(tmp_path / "other", tmp_path / "cut.jsonl.gz"))
    assert found >= kept[1] - 80  # a decompressor works in blocks


def test_a_damaged_page_loses_its_row_group_and_no_more(tmp_path, caplog):
    texts = [f"{number:05}" for number in range(300)]
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="zstd", write_page_checksum=True)
    meta = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[meta.data_page_offset + meta.total_compressed_size // 2] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(content)
    said = refusal(data_settings(tmp_path / "cache", tmp_path / "a.parquet"))
    assert "row 100 (counted from 0): cannot be read" in said and "rows 100 to 199" in said
    skipping = data_settings(tmp_path / "cache", tmp_path / "a.parquet", on_bad_document="skip")
    assert stored(skipping) == as_bytes(texts[:100] + texts[200:])


def test_a_row_group_that_has_fewer_rows_than_it_says_is_damaged(tmp_path, monkeypatch):
    """pyarrow then gives the other groups' rows and says nothing."""
    pq.write_table(pa.table({"text": list("abcde")}), tmp_path / "a.parquet", row_group_size=1)
    whole = pq.ParquetFile.iter_batches

    def without_c(table, batch_size, row_groups, **options):
        return whole(table, batch_size, [group for group in row_groups if group != 2], **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", without_c)
    assert "row 2 (counted from 0)" in refusal(data_settings(tmp_path / "cache", tmp_path / "a.parquet"))
    skipping = data_settings(tmp_path / "cache", tmp_path / "a.parquet", on_bad_document="skip")
    assert stored(skipping) == as_bytes("abde")


def test_shards_without_rows_are_said_and_a_source_of_them_is_refused(tmp_path, caplog):
    folder = tmp_path / "data"
    empty = pa.table({"text": pa.array([], pa.string())})
    contents = {"a.parquet": empty, "a.arrow": empty, "a.jsonl": "", "a.json": " [ ] ", "b.jsonl": "\n \n"}
    for name, content in contents.items():
        place = folder / name.partition(".")[2]
        place.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(content, place / name)
        elif name.endswith("arrow"):
            with pa.ipc.new_file(place / name, content.schema) as writer:
                writer.write_table(content)
        else:
            (place / name).write_text(content)
    for place in sorted(folder.iterdir()):
        assert "no document to train on: there are no rows" in refusal(data_settings(tmp_path / "none", place))
        write_good_file(place / f"z.{place.name}")
        caplog.clear()
        assert stored(data_settings(tmp_path / "cache", place)) == as_bytes("x")
        assert "without rows" in caplog.text and str(place) in caplog.text


def test_what_save_to_disk_wrote_is_read_by_its_own_list(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["ab", "cd"]})
    data.save_to_disk(str(tmp_path / "saved"))
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "saved" / "cache-123.arrow")
    assert stored(data_settings(tmp_path / "cache", tmp_path / "saved")) == as_bytes(["ab", "cd"])


@pytest.mark.parametrize(
    "setting",
    [{"subset": "x"}, {"revision": "x"}, {"column": "x"}, {"ignore_columns": ["x"]}, {"split": "test"}],
    ids=str,
)
def test_settings_without_a_meaning_to_the_files_are_refused(tmp_path, setting):
    (tmp_path / "a.txt").write_text("x")
    source = {"path": str(tmp_path / "a.txt"), **setting}
    assert next(iter(setting)) in refusal(DataSettings(sources=[source], cache=tmp_path / "cache"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "not an ordinary file" in refusal(data_settings(tmp_path / "cache", tmp_path / "a.jsonl"))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet", "arrow"])
def test_names_of_files_need_not_be_text(tmp_path, ending):
    folder = tmp_path / "data" / os.fsdecode(b"\xff\xe9")
    folder.mkdir(parents=True)
    write_good_file(tmp_path / f"a.{ending}")
    (tmp_path / f"a.{ending}").rename(folder / os.fsdecode(b"\xff." + ending.encode()))
    assert stored(data_settings(tmp_path / "cache", tmp_path / "data")) == as_bytes("x")
    next(folder.iterdir()).write_bytes(b"\xff")
    assert r"\xff\xe9" in refusal(data_settings(tmp_path / "other", tmp_path / "data"))


def test_a_home_that_nobody_has_is_not_found(tmp_path):
    assert "no such file or folder" in refusal(data_settings(tmp_path / "cache", "~nobody-at-all/data"))


def test_lists_without_images_and_texts_as_bytes_in_a_table(tmp_path):
    image = pa.struct([("bytes", pa.binary())])
    table = pa.table({"text": ["ab", "cd"], "images": pa.array([[], None], pa.list_(image))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert stored(data_settings(tmp_path / "cache", tmp_path / "a.parquet")) == as_bytes(["ab", "cd"])
    pq.write_table(pa.table({"text": [b"ab"]}), tmp_path / "b.parquet")
    assert "store it as a string of UTF-8" in refusal(data_settings(tmp_path / "other", tmp_path / "b.parquet"))
    pq.write_table(pa.table({"text": ["ab"], "images": pa.array([[{"bytes": b"x"}]])}), tmp_path / "c.parquet")
    assert "column `images`" in refusal(data_settings(tmp_path / "other", tmp_path / "c.parquet"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs_is_not_the_data(tmp_path, name):
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    assert "`git lfs pull`" in refusal(data_settings(tmp_path / "cache", tmp_path / name))


def test_splits_in_one_folder_are_said(tmp_path, caplog):
    for name in ("data/train-00000.jsonl", "data/train-00001.jsonl", "data/test-00000.jsonl", "training.jsonl"):
        write_json_lines(tmp_path / "set" / name, [{"text": "ab"}])
    with caplog.at_level("WARNING"):
        assert len(stored(data_settings(tmp_path / "cache", tmp_path / "set"))) == 4
    assert "several splits ('data/test-00000.jsonl', 'data/train-00000.jsonl')" in caplog.text
    caplog.clear()
    stored(data_settings(tmp_path / "cache", tmp_path / "set" / "**" / "train*.jsonl"))
    assert "several splits" not in caplog.text


def test_a_pattern_below_a_folder_whose_name_looks_like_one(tmp_path):
    write_json_lines(tmp_path / "set [1]" / "a.jsonl", [{"text": "ab"}])
    assert stored(data_settings(tmp_path / "cache", tmp_path / "set [1]" / "*.jsonl")) == as_bytes(["ab"])
    write_json_lines(tmp_path / "set 2" / "a.jsonl", [{"text": "cd"}])
    assert stored(data_settings(tmp_path / "cache", tmp_path / "set [2]" / "*.jsonl")) == as_bytes(["cd"])


def test_files_without_an_ending_are_read_where_they_are_named(tmp_path):
    write_json_lines(tmp_path / "set" / "part-00000", [{"text": "ab"}])
    assert f"`path: {tmp_path}/set/*` with `format`" in refusal(data_settings(tmp_path / "cache", tmp_path / "set"))
    source = {"path": f"{tmp_path}/set/*", "format": "json"}
    assert stored(DataSettings(sources=[source], cache=tmp_path / "cache")) == as_bytes(["ab"])


def test_the_cache_may_lie_among_the_data(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    for _ in range(2):
        assert stored(data_settings(tmp_path / "cache", tmp_path)) == as_bytes(["ab"])
    with pytest.raises(SettingsError, match="give prepared documents their own"):
        prepare(data_settings(tmp_path, tmp_path), 259)


def test_a_folder_with_two_names_is_read_by_its_first(tmp_path):
    for name in "mz":
        write_json_lines(tmp_path / "set" / name / "x.jsonl", [{"text": name}])
    (tmp_path / "set" / "a").symlink_to("z")
    assert stored(data_settings(tmp_path / "cache", tmp_path / "set")) == as_bytes(["z", "m"])
