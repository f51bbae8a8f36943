"""From files to rows: what is stored, what is refused and how it is said, and what a micro-batch holds."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import tokenizers
import transformers
from documents import data_settings, prepared_corpus, write_json_lines, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from distca.config import DataSettings
from distca.errors import DataError, SettingsError
from distca.launch import prepare as prepare_module
from distca.launch.data import META, NO_TARGET, Corpus, DocumentStream, num_targets
from distca.launch.prepare import UNFINISHED, Encoder, load_tokenizer, prepare
from distca.order import Cursor

TEXTS = ["one", "zwölf Boxkämpfer", "日本語 🙂", "a\x00b\n"]
IDS = [[5, 6, 7], [8], [250, 0, 1, 2]]


@pytest.fixture
def offline(monkeypatch):
    """As HF_HUB_OFFLINE=1 before the start; both libraries read the variable when they are imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def stored(settings: DataSettings, vocab_size: int = 259, source: int = 0) -> list[list[int]]:
    corpus = Corpus(prepare(settings, vocab_size))
    return [corpus.tokens(source, row).tolist() for row in range(corpus.num_documents[source])]


def as_bytes(texts, eos=True):
    return [[byte + 3 for byte in text.encode()] + [1] * eos for text in texts]


def refusal(settings: DataSettings, vocab_size: int = 259) -> str:
    with pytest.raises(DataError) as caught:
        prepare(settings, vocab_size)
    assert not list(settings.cache.glob("*")), "a refused source must leave nothing"
    return str(caught.value)


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
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda settings: pytest.fail("loaded a tokenizer"))
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        write_json_lines(path, [{"input_ids": ids, "text": "not this"} for ids in IDS])
    else:
        write_parquet(path, {"input_ids": IDS, "text": ["not this"] * 3})
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


# ---- tokenizers ----


def test_bytes_are_encoded_as_the_byte_tokenizer_does():
    """Left out: the spelling of special tokens ("</s>"), which text must not be able to write."""
    tokenizer = load_tokenizer(DataSettings(sources=[{"path": "x"}]))
    assert isinstance(tokenizer, transformers.ByT5Tokenizer) and len(tokenizer) == 259
    encode = Encoder(DataSettings(sources=[{"path": "x"}]))

    @given(st.text(max_size=40).filter(lambda text: "<" not in text))
    def agree(text):
        assert encode([text])[0].tolist() == tokenizer(text)["input_ids"]

    agree()


@pytest.fixture
def word_tokenizer(tmp_path) -> Path:
    """A folder with a tokenizer of words: [BOS] first, no [EOS] of its own."""
    words = {word: number for number, word in enumerate(["[UNK]", "[BOS]", "[EOS]", "a", "b", "c"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A $B", special_tokens=[("[BOS]", 1)]
    )
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_a_tokenizer_from_a_folder_is_used_with_its_own_beginning(tmp_path, word_tokenizer):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a b z"}, {"text": "c [EOS]"}])
    assert stored(data_settings(tmp_path / "cache", path, tokenizer=str(word_tokenizer))) == [
        [1, 3, 4, 0, 2],
        [1, 5, 2],
    ]
    without = data_settings(tmp_path / "cache", path, tokenizer=str(word_tokenizer), append_eos=False)
    assert stored(without) == [[1, 3, 4, 0], [1, 5, 2]]


def test_a_tokenizer_that_makes_larger_ids_than_the_model_knows_is_refused(tmp_path, word_tokenizer):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a c"}])
    said = refusal(data_settings(tmp_path / "cache", path, tokenizer=str(word_tokenizer)), vocab_size=5)
    assert "row 1" in said and "token id 5" in said and "`data.tokenizer`" in said and "`vocab_size`" in said


def test_a_tokenizer_that_is_nowhere_is_named(tmp_path, offline):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(SettingsError, match="data.tokenizer: cannot load 'nobody/nowhere'"):
        prepare(data_settings(tmp_path / "cache", path, tokenizer="nobody/nowhere"), 259)


# ---- refusals ----

BAD_ROWS = {
    "empty text": ({"text": ""}, "empty"),
    "no ids": ({"input_ids": []}, "empty"),
    "null": ({"text": None}, "missing (null)"),
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
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}, bad, {"text": "y"}, bad])
    said = refusal(data_settings(tmp_path / "cache", path))
    for part in (f"data.sources[0] ({path})", f"file {path}", "row 1", wanted, "data.on_bad_document: skip"):
        assert part in said
    skipping = data_settings(tmp_path / "cache", path, on_bad_document="skip")
    for _ in range(2):  # also when it was prepared before
        caplog.clear()
        assert stored(skipping) == as_bytes(["x", "y"])
        assert "left out 2" in caplog.text and "row 1" in caplog.text


def test_reasons_are_counted_apart(tmp_path, caplog):
    rows = [{"text": ""}, {"text": "x"}, {"input_ids": [999]}, {"text": ""}, b"{"]
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
        "empty.jsonl": (b"\n", "the file is empty"),
        "cut.json": (b'[{"text": "x"}, {"te', "is not a JSON array"),
        "garbage.jsonl.gz": (b"no gzip", "cannot be read"),
        "cut.jsonl.gz": (gzip.compress(os.urandom(1000).hex().encode())[:-20], "cannot be read"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, wanted) for name, (_, wanted) in contents.items()}


def write_good_file(path: Path) -> None:
    if path.suffix == ".parquet":
        write_parquet(path, {"text": ["x"]})
    elif path.suffix == ".txt":
        path.write_text("x")
    else:
        write_json_lines(path, [{"text": "x"}])


def test_a_bad_file_is_named_or_left_out(tmp_path, caplog):
    for name, (path, wanted) in bad_files(tmp_path).items():
        said = refusal(data_settings(tmp_path / "cache", path))
        assert f"file {path}" in said and wanted in said, said
        if path.suffix == ".arrow":  # `datasets` writes arrow files only as whole folders
            continue
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        shutil.move(path, folder / f"a.{name}")
        write_good_file(folder / f"b.{name.removesuffix('.gz')}")
        caplog.clear()
        assert stored(data_settings(tmp_path / "cache", folder, on_bad_document="skip")) == as_bytes(["x"])
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
    assert f"file {path}: column `number` holds double" in refusal(wrong)


def test_bad_rows_of_tables_are_named(tmp_path):
    rows = [[1], None, [2, None], [], [7, 300], [3]]
    path = write_parquet(tmp_path / "a.parquet", {"input_ids": rows})
    said = refusal(data_settings(tmp_path / "cache", path))
    assert f"file {path}, row 1" in said and "null" in said
    assert stored(data_settings(tmp_path / "cache", path, on_bad_document="skip")) == [[1], [3]]


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


# ---- the cache ----


def test_a_second_run_reads_no_document(tmp_path, monkeypatch):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    first = prepare(data_settings(tmp_path / "cache", path), 259)
    monkeypatch.setattr(prepare_module, "_read_source", lambda *_: pytest.fail("read the source again"))
    assert prepare(data_settings(tmp_path / "cache", path, weights=[7]), 259) == first


def test_whatever_decides_the_tokens_makes_another_folder(tmp_path, word_tokenizer):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    cache = tmp_path / "cache"
    folders = [prepare(data_settings(cache, path), 259)]
    folders.append(prepare(data_settings(cache, path), 300))
    folders.append(prepare(data_settings(cache, path, append_eos=False), 259))
    folders.append(prepare(data_settings(cache, path, on_bad_document="skip"), 259))
    folders.append(prepare(data_settings(cache, path, tokenizer=str(word_tokenizer)), 259))
    write_json_lines(path, [{"text": "b"}])
    folders.append(prepare(data_settings(cache, path), 259))
    os.utime(word_tokenizer / "tokenizer.json", (1, 1))
    folders.append(prepare(data_settings(cache, path, tokenizer=str(word_tokenizer)), 259))
    assert len(set(folders)) == len(folders)


KILLED = """
import os, signal, sys
from pathlib import Path
from documents import data_settings
from distca.launch import prepare

append = prepare._Store.append

def append_and_die(store, documents):
    append(store, documents)
    store._files["tokens.bin"].flush()
    os.kill(os.getpid(), signal.SIGKILL)

prepare._Store.append = append_and_die
prepare.prepare(data_settings(Path(sys.argv[1]), sys.argv[2]), 259)
"""


def test_a_killed_preparation_leaves_nothing_that_would_be_used(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    support = Path(sys.modules["documents"].__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(support)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), str(path)]
    assert subprocess.run(command, env=environment, timeout=240).returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "cache").iterdir()
    assert leftover.name.startswith(UNFINISHED) and (leftover / "tokens.bin").stat().st_size > 0

    settings = data_settings(tmp_path / "cache", path)
    assert stored(settings) == as_bytes(TEXTS)
    assert leftover.exists()  # it might belong to a running process
    two_days_ago = time.time() - 2 * 24 * 3600
    for entry in (*leftover.iterdir(), leftover):
        os.utime(entry, (two_days_ago, two_days_ago))
    assert stored(settings, 300) == as_bytes(TEXTS)
    assert not leftover.exists()


def test_several_preparers_at_once_agree(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(3000)])
    settings = data_settings(tmp_path / "cache", path)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: prepare(settings, 259), range(6)))
    assert len(set(results)) == 1
    assert stored(settings) == as_bytes(str(i) for i in range(3000))
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [results[0][0].name]


def test_prepared_files_that_are_damaged_or_gone_are_refused(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    (folder,) = prepare(data_settings(tmp_path / "cache", path), 259)
    os.truncate(folder / "tokens.bin", 4)
    with pytest.raises(DataError, match="holds 2 numbers, not 4; delete the folder"):
        Corpus([folder])
    with pytest.raises(DataError, match="put `data.cache` on a file system"):
        Corpus([tmp_path / "elsewhere"])


# ---- micro-batches ----


def walk(stream: DocumentStream, num_micro_batches: int, cursor=Cursor()):  # noqa: B008 - frozen
    for _ in range(num_micro_batches):
        pieces, cursor = stream.pieces(cursor)
        yield pieces


def whole_rows(stream, pieces):
    documents = np.arange(len(pieces))
    return stream.rows(pieces, documents, np.zeros_like(documents), pieces.lengths)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Tokens that tell where they come from, and lengths of all kinds."""
    random = np.random.default_rng(0)
    long_tail = np.ceil(random.pareto(1.2, 60) * 5).clip(1, 400).astype(int).tolist()
    return prepared_corpus(tmp_path_factory.mktemp("two"), long_tail, [1, 1, 90, 17] * 5)


def test_rows_hold_the_pieces_tokens_positions_and_next_tokens(two_sources):
    settings, corpus = two_sources
    stream = DocumentStream(corpus, settings, seed=0, tokens_per_micro_batch=256)
    for pieces in walk(stream, 20):
        rows = whole_rows(stream, pieces)
        assert rows.input_ids.dtype == rows.position_ids.dtype == rows.labels.dtype == np.int64
        assert len(rows.input_ids) == 256
        at = 0
        for source, row, start, end in zip(pieces.source, pieces.row, pieces.start, pieces.end, strict=True):
            tokens = corpus.tokens(source, row, start, end)
            inside = slice(at, at + len(tokens))
            assert np.array_equal(rows.input_ids[inside], tokens)
            assert np.array_equal(rows.position_ids[inside], np.arange(len(tokens)))
            assert np.array_equal(rows.labels[inside], [*tokens[1:], NO_TARGET])
            at += len(tokens)
        assert np.count_nonzero(rows.labels != NO_TARGET) == num_targets(pieces)


@given(num_ranks=st.integers(1, 5), seed=st.integers(0, 9), data=st.data())
def test_rows_do_not_depend_on_how_pieces_are_cut_over_ranks(two_sources, num_ranks, seed, data):
    settings, corpus = two_sources
    stream = DocumentStream(corpus, settings, seed, tokens_per_micro_batch=240)
    pieces, _ = stream.pieces(Cursor(data.draw(st.integers(0, 500))))
    cuts = np.sort(data.draw(st.lists(st.integers(0, 240), min_size=num_ranks - 1, max_size=num_ranks - 1)))
    ends = np.cumsum(pieces.lengths)
    parts = []
    for first, last in zip([0, *cuts], [*cuts, 240], strict=True):  # a rank's rows, as segments of pieces
        here = np.flatnonzero((ends > first) & (ends - pieces.lengths < last))
        begins = ends[here] - pieces.lengths[here]
        starts, stops = np.maximum(first, begins) - begins, np.minimum(last, ends[here]) - begins
        parts.append(stream.rows(pieces, here, starts, stops))
    for whole, *cut in zip(whole_rows(stream, pieces), *parts, strict=True):
        assert np.array_equal(np.concatenate(cut), whole)


def test_an_epoch_holds_every_token_once_and_in_documents(tmp_path):
    lengths = [3, 50, 1, 1, 20, 7]
    settings, corpus = prepared_corpus(tmp_path, lengths)
    stream = DocumentStream(corpus, settings, seed=5, tokens_per_micro_batch=41)  # two micro-batches per epoch
    ids = np.concatenate([whole_rows(stream, pieces).input_ids for pieces in walk(stream, 6)])
    for epoch in np.split(ids, 3):
        assert sorted(epoch) == list(range(82))
        jumps = epoch[:-1][np.diff(epoch) != 1]  # a jump is only allowed after a document's last token
        assert set(jumps) <= set(np.cumsum(lengths) - 1)


def test_longer_documents_are_cut_as_the_settings_say(two_sources):
    settings, corpus = two_sources
    stream = DocumentStream(corpus, settings.model_copy(update={"max_document_tokens": 32}), 0, 256)
    assert max(pieces.lengths.max() for pieces in walk(stream, 20)) == 32
    assert DocumentStream(corpus, settings, 0, 256).max_document_tokens == 256


def test_weights_are_shares_of_tokens(tmp_path):
    random = np.random.default_rng(1)
    lengths = [random.integers(1, 20, 400), random.integers(100, 900, 50), [1000] * 3]
    settings, corpus = prepared_corpus(tmp_path, *(x.tolist() if hasattr(x, "tolist") else x for x in lengths))
    weights = [0.2, 5, 1.5]
    sources = [source.model_copy(update={"weight": w}) for source, w in zip(settings.sources, weights, strict=True)]
    stream = DocumentStream(corpus, settings.model_copy(update={"sources": tuple(sources)}), 0, 1 << 20)
    taken = np.zeros(3)
    for pieces in walk(stream, 10):
        taken += np.bincount(pieces.source, pieces.lengths, minlength=3)
    np.testing.assert_allclose(taken / taken.sum(), np.array(weights) / sum(weights), rtol=0.01)


def test_a_stream_resumes_from_two_integers(two_sources):
    settings, corpus = two_sources
    going_on = list(walk(DocumentStream(corpus, settings, 3, 256), 8))
    cursor = Cursor()
    for _ in range(5):
        _, cursor = DocumentStream(corpus, settings, 3, 256).pieces(cursor)
    document, offset = json.loads(json.dumps([cursor.document, cursor.offset]))
    resumed = DocumentStream(corpus, settings, 3, 256)
    for one, other in zip(going_on[5:], walk(resumed, 3, Cursor(document, offset)), strict=True):
        assert np.array_equal(whole_rows(resumed, one), whole_rows(resumed, other))
