"""Prepared documents: by what they are known, found again, and made by several at once."""

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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers
from documents import as_bytes, data_settings, refusal, stored, write_json_lines

from distca.config import DataSettings
from distca.errors import DataError, SettingsError
from distca.launch.data import identity as identity_module
from distca.launch.data import prepare as prepare_module
from distca.launch.data import read as read_module
from distca.launch.data.batches import META, Corpus, read_meta
from distca.launch.data.identity import DIGESTS, find_prepared, tokenizer_identity
from distca.launch.data.prepare import UNFINISHED, prepare

TEXTS = ["one", "zwölf Boxkämpfer", "日本語 🙂", "a\x00b\n"]


def test_a_second_run_reads_no_document(tmp_path, monkeypatch):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    first = prepare(data_settings(tmp_path / "cache", path), 259)
    monkeypatch.setattr(read_module, "read_source", lambda *_: pytest.fail("read the source again"))
    assert prepare(data_settings(tmp_path / "cache", path, weights=[7]), 259) == first


@pytest.fixture
def words(tmp_path):
    """A tokenizer's folder, as a person would have it."""
    folder = tmp_path / "words"
    vocab = {"[UNK]": 0, "[EOS]": 1, "a": 2, "b": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")
    fast.save_pretrained(folder)
    return folder


def test_whatever_decides_the_tokens_makes_another_folder(tmp_path, words):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a", "other": "b"}])
    cache = tmp_path / "cache"
    folders = [prepare(data_settings(cache, path), 259)]
    folders.append(prepare(data_settings(cache, path), 300))
    folders.append(prepare(data_settings(cache, path, on_bad_document="skip"), 259))
    folders.append(prepare(data_settings(cache, path, tokenizer=str(words)), 259))
    folders.append(prepare(data_settings(cache, path, tokenizer=str(words), control_tokens="parse"), 259))
    for source in ({"column": "other"}, {"ignore_columns": ["other"]}):
        folders.append(prepare(DataSettings(sources=[{"path": str(path), **source}], cache=cache), 259))
    write_json_lines(path, [{"text": "ab"}])
    folders.append(prepare(data_settings(cache, path), 259))
    folders.append(prepare(data_settings(cache, path, append_eos=False), 259))
    special = words / "tokenizer_config.json"
    special.write_text(special.read_text() + " ")
    folders.append(prepare(data_settings(cache, path, tokenizer=str(words)), 259))
    assert len(set(folders)) == len(folders)


def test_names_places_and_times_do_not_decide(tmp_path, words, monkeypatch):
    folder = tmp_path / "data"
    write_json_lines(folder / "a.jsonl", [{"text": "a"}])
    write_json_lines(folder / "b.jsonl", [{"text": "b"}])
    cache = tmp_path / "cache"
    first = prepare(data_settings(cache, folder, tokenizer=str(words)), 259)
    os.utime(folder / "a.jsonl", (1, 1))
    os.utime(words / "tokenizer.json", (1, 1))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "b.jsonl").rename(tmp_path / "copy" / "c.jsonl")
    words.rename(tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    for place in (folder, tmp_path / "copy", "copy", "data/*.jsonl"):
        assert prepare(data_settings(cache, place, tokenizer="./renamed"), 259) == first


def test_a_change_shows_whatever_its_size_and_time(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    cache = tmp_path / "cache"
    for text in "bcd":
        time_stamp = path.stat().st_mtime_ns
        write_json_lines(path, [{"text": text}])
        os.utime(path, ns=(time_stamp, time_stamp))
        assert stored(data_settings(cache, path)) == as_bytes([text])


def test_contents_are_looked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(identity_module, "SETTLED_S", -1.0)  # as if the file had been there for a while
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    settings = data_settings(tmp_path / "cache", path)
    first = prepare(settings, 259)
    with monkeypatch.context() as patched:
        patched.setattr(identity_module, "_digest", lambda _: pytest.fail("read the file again"))
        assert prepare(settings, 259) == first
    for harm in ("", "{", "[]", '{"x": 1}', json.dumps({str(path): [1, 2]}), "\0"):
        (tmp_path / "cache" / DIGESTS).write_text(harm)
        assert prepare(settings, 259) == first


def test_prepared_documents_are_found_without_their_source(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    cache = tmp_path / "cache"
    (folder,) = prepare(data_settings(cache, path), 259)
    path.unlink()
    assert find_prepared(cache, read_meta(folder)["identity"]) == folder
    assert find_prepared(cache, "0" * 32) is None
    assert [name for name, _ in json.loads((folder / META).read_text())["files"]] == ["a.jsonl"]


def test_a_source_without_a_single_target_is_refused(tmp_path):
    rows = {
        "every document is a single token": [{"input_ids": [5]}] * 20,
        "labels or masks leave out every token": [{"input_ids": [5, 6], "loss_mask": [1, 0]}],
        "leave out every token": [{"input_ids": [5, 6], "labels": [-100, -100]}],
    }
    for number, (why, documents) in enumerate(rows.items()):
        path = write_json_lines(tmp_path / f"{number}.jsonl", documents)
        assert why in refusal(data_settings(tmp_path / "cache", path))
    path = write_json_lines(tmp_path / "texts.jsonl", [{"text": "x"}])
    assert "nothing to predict" in refusal(data_settings(tmp_path / "cache", path, append_eos=False))


KILLED = """
import os, signal, sys
from pathlib import Path
from documents import data_settings
from distca.launch.data import prepare

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
    (leftover,) = (tmp_path / "cache").glob(f"{UNFINISHED}*")
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
    assert [folder.name for folder in (tmp_path / "cache").iterdir() if folder.is_dir()] == [results[0][0].name]


def test_prepared_files_that_are_damaged_or_gone_are_refused(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    (folder,) = prepare(data_settings(tmp_path / "cache", path), 259)
    os.truncate(folder / "tokens.bin", 4)
    with pytest.raises(DataError, match="holds 2 numbers, not 4; delete the folder"):
        Corpus([folder])
    with pytest.raises(DataError, match="put `data.cache` on a file system"):
        Corpus([tmp_path / "elsewhere"])


PEAK = """
import resource, sys
from pathlib import Path
from documents import data_settings
from distca.launch.data.prepare import prepare

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(data_settings(Path(sys.argv[1]), sys.argv[2], tokenizer="bytes"), 60_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.txt", "a.parquet", "ids.jsonl"])
def test_a_long_row_needs_a_few_times_its_size(tmp_path, kind):
    text = "".join(chr(97 + number % 26) for number in range(1 << 20)) * 40
    if kind == "ids.jsonl":
        write_json_lines(tmp_path / kind, [{"input_ids": [*range(30_000, 40_000)] * 600}])
    elif kind == "a.parquet":
        pq.write_table(pa.table({"text": [text]}), tmp_path / kind, compression="none", use_dictionary=False)
    else:
        content = {"a.txt": text, "a.json": json.dumps([{"text": text}])}
        (tmp_path / kind).write_text(content.get(kind) or json.dumps({"text": text}) + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "cache"), str(tmp_path / kind)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=True).stdout
    assert int(said.split()[-1]) * 1024 < 6.5 * (tmp_path / kind).stat().st_size


def test_what_lies_there_twice_is_said(tmp_path, caplog):
    folder = tmp_path / "data"
    path = write_json_lines(folder / "a.jsonl", [{"text": "a"}])
    write_json_lines(folder / "b.jsonl", [{"text": "b"}])
    (folder / "empty.jsonl").touch()
    (folder / "none.jsonl").touch()
    prepare(data_settings(tmp_path / "cache", folder), 259)
    assert "look the same" not in caplog.text
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (folder / "c.jsonl").symlink_to("b.jsonl")
    prepare(data_settings(tmp_path / "cache", folder), 259)
    assert "2 files look the same as others of it" in caplog.text
    assert "'a.jsonl' and 'a.jsonl.gz'; 'b.jsonl' and 'c.jsonl'" in caplog.text


def test_a_damaged_description_is_made_again_once_its_folder_is_deleted(tmp_path):
    settings = data_settings(tmp_path / "cache", write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}]))
    (folder,) = prepare(settings, 259)
    (folder / META).write_text("{")
    with pytest.raises(DataError, match="delete the folder"):
        prepare(settings, 259)
    shutil.rmtree(folder)
    assert prepare(settings, 259) == (folder,)


def test_a_file_that_changes_after_its_digest_was_made_is_not_stored_under_it(tmp_path, monkeypatch):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    settings = data_settings(tmp_path / "cache", path)

    def digests_then_a_change(files, cache):
        found = identity_module.digests_of(files, cache)
        write_json_lines(path, [{"text": "another"}])
        return found

    monkeypatch.setattr(prepare_module, "digests_of", digests_then_a_change)
    assert "files changed while they were read" in refusal(settings)
    monkeypatch.undo()
    write_json_lines(path, [{"text": "one"}])
    assert stored(settings) == as_bytes(["one"])


def test_equal_files_are_another_tokenizer_in_the_hands_of_another_class(tmp_path):
    """A model's configuration may say which class reads its vocabulary."""
    identities = []
    for model_type in ("gpt2", "roberta"):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({"<s>": 0, "a": 1}))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 8}))
        settings = data_settings(tmp_path / "cache", "x", tokenizer=str(folder))
        identities.append(tokenizer_identity(settings, None, None, settings.cache))
    assert identities[0] != identities[1]


def test_a_cache_below_a_file_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(SettingsError, match="data.cache: cannot write"):
        prepare(data_settings(tmp_path / "file" / "cache", path), 259)


def test_a_folder_that_is_in_the_way_and_one_without_description_are_named(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    settings = data_settings(tmp_path / "cache", path)
    (folder,) = prepare(settings, 259)
    (folder / META).write_text("{}")
    with pytest.raises(DataError, match="is damaged .*delete the folder"):
        prepare(settings, 259)
    (folder / META).unlink()
    with pytest.raises(SettingsError, match="holds no prepared documents; delete it"):
        prepare(settings, 259)
