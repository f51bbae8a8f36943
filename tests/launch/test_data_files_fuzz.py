"""Thousands of files as nobody should have them: each is stored just as plain parsers read it, or refused in words."""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import data_settings

from distca.errors import UserError
from distca.launch.data.batches import META, NO_TARGET, Corpus
from distca.launch.data.prepare import prepare

VOCAB = 259
DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
Meaning = tuple[list[int], list[int]]


# ---- the oracle: what a file means, parsed as a whole by other means ----


def meaning(row: Any) -> Meaning | None:
    """Ids and labels of a row; None for one that is not to be trained on."""
    if not isinstance(row, dict):
        return None
    names = [plain(name) for name, value in row.items() if value is not None]
    row = {plain(name): value for name, value in row.items() if value is not None}
    if len(row) < len(names):
        return None
    if ("text" in row) == ("input_ids" in row):
        return None
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str) or not text or {"labels", "loss_mask", "attention_mask"} & row.keys():
            return None
        try:
            ids = [byte + 3 for byte in text.encode()] + [1]
        except UnicodeEncodeError:
            return None
        return ids, ids
    ids = row["input_ids"]
    if not isinstance(ids, list):
        return None
    labels, ones = row.get("labels", ids), [1] * len(ids)
    mask, padding = row.get("loss_mask", ones), row.get("attention_mask", ones)
    if not all(isinstance(column, list) and len(column) == len(ids) for column in (labels, mask, padding)):
        return None
    if not all(type(x) is int and abs(x) < 1 << 63 for x in [*ids, *labels]):
        return None
    if not all(type(x) in (int, float, bool) and x in (0, 1) for x in [*mask, *padding]):
        return None
    kept = sum(padding)
    if not kept or any(padding[int(kept) :]):
        return None
    pairs = list(zip(ids, labels, mask, strict=True))[: int(kept)]
    known = {NO_TARGET, *range(VOCAB)}
    if not all(0 <= x < VOCAB and (label in known or not flag) for x, label, flag in pairs):
        return None
    return [x for x, _, _ in pairs], [label if flag else NO_TARGET for _, label, flag in pairs]


def plain(name: str) -> str:
    """A known name, if it is one in other letters."""
    key = "".join(sign for sign in name.lower() if sign not in "-_. \t\n")
    return next((known for known in KNOWN if known.replace("_", "") == key), name)


def kind(row: Any) -> frozenset:
    return frozenset(name for name, value in row.items() if value is not None and plain(name) in KNOWN)


KNOWN = {"text", "input_ids", "labels", "loss_mask", "attention_mask"}


def no_twice(pairs: list) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def parsed(path: Path) -> list[Any] | None:
    """All rows of a file, or None if it is not one."""
    content = path.read_bytes()
    if path.suffix in DECOMPRESS and content:
        content = DECOMPRESS[path.suffix](content)
    if ".txt" in path.name:
        return [{"text": content.decode("utf-8-sig")}]
    if ".jsonl" in path.name or ".json" in path.name:
        text = content.decode("utf-8-sig")
        if text.strip(" \t\r\n").startswith("["):
            return json.loads(text, object_pairs_hook=no_twice)
        lines = [line.removeprefix("\ufeff") for line in text.split("\n")]  # joined files have marks within
        lines = [line for line in lines if line.strip(" \t\r\f\v")]
        return [json.loads(line, object_pairs_hook=no_twice) for line in lines]
    # what is damaged in a column that nobody reads does no harm
    if path.suffix == ".parquet":
        names = pq.read_schema(path).names
        known = [name for name in names if plain(name) in KNOWN]
        table = pq.read_table(path, columns=known, page_checksum_verification=True)
        if table.num_rows != pq.read_metadata(path).num_rows:  # pyarrow says nothing of it
            raise ValueError("rows are missing")
    else:
        names = pa.ipc.open_stream(pa.OSFile(str(path))).schema.names
        included = [number for number, name in enumerate(names) if plain(name) in KNOWN]
        options = pa.ipc.IpcReadOptions(included_fields=included)
        table = pa.ipc.open_stream(pa.OSFile(str(path)), options=options).read_all()
        table.validate(full=True)
    if len({*names}) != len(names):
        raise ValueError("twice")
    return [dict.fromkeys(names) | row for row in table.to_pylist()]


def expected(path: Path) -> tuple[list[Meaning] | None, set[str]]:
    """What is to be stored, None if the file is to be refused; and columns that have no known meaning."""
    try:
        rows = parsed(path)
        meanings = [meaning(row) for row in rows]
        kinds = {kind(row) for row in rows}
    except Exception:  # whatever a parser says
        return None, set()
    others = {name for row in rows for name in row if plain(name) not in KNOWN}
    if not rows or None in meanings or len(kinds) != 1:
        return None, others
    if not any(label != NO_TARGET for _, labels in meanings for label in labels[1:]):
        return None, others
    return meanings, others


# ---- files ----


def some_rows(r: random.Random) -> list[dict[str, Any]]:
    columns = r.choice([["text"], ["input_ids"], ["input_ids", "labels"], ["input_ids", "loss_mask", "attention_mask"]])
    columns += r.choice([[], [], ["url"], ["length"]])
    return [one_row(r, columns) for _ in range(r.randrange(0, 12))]


def one_row(r: random.Random, columns: list[str]) -> dict[str, Any]:
    n = r.choice([1, 2, 3, 8, 30])
    ones = r.randrange(1, n + 1)
    values = {
        "text": "".join(r.choice(["a", "é", "🙂", "\n", '"', "<", "\\", "\x00", " "]) for _ in range(n)),
        "input_ids": [r.randrange(VOCAB) for _ in range(n)],
        "labels": [r.choice([NO_TARGET, r.randrange(VOCAB)]) for _ in range(n)],
        "loss_mask": [r.randrange(2) for _ in range(n)],
        "attention_mask": [1] * ones + [0] * (n - ones),
        "url": "http://x",
        "length": n,
    }
    row = {name: values[name] for name in columns}
    if not r.randrange(25):
        lists = [[], [[1]], [1, True], [1.0], [0.5], [999], {"a": 1}]
        row[r.choice(list(row))] = r.choice([None, "", 1.5, True, float("nan"), -1, 1 << 70, "[1]", *lists])
    return row


def write(path: Path, rows: list[dict[str, Any]], r: random.Random) -> None:
    stem = path.name.partition(".")[2]
    if stem in ("parquet", "arrow"):
        columns = {name: [row.get(name) for row in rows] for name in (rows[0] if rows else ())}
        table = pa.table(columns or {"text": pa.array([], pa.string())})
        if stem == "parquet":
            options = dict(compression=r.choice(["none", "snappy", "zstd"]), use_dictionary=r.choice([True, False]))
            pq.write_table(table, path, row_group_size=r.choice([1, 3, 1000]), **options)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=r.choice([1, 3, 1000]))
        return
    if stem.startswith("txt"):
        content = str(rows[0].get("text", "") if rows else "").encode()
    elif stem.startswith("jsonl"):
        content = b"".join(json.dumps(row, ensure_ascii=r.choice([True, False])).encode() + b"\n" for row in rows)
    else:
        content = json.dumps(rows, indent=r.choice([None, 1])).encode()
    content = r.choice([b"", b"", b"", b"\xef\xbb\xbf"]) + content
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))


def harm(content: bytes, r: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(r.choice([0, 1, 1, 1, 3])):
        at = r.randrange(len(data) + 1)
        way = r.randrange(7)
        if way == 0:
            del data[at:]
        elif way == 1 and at < len(data):
            data[at] ^= 1 << r.randrange(8)
        elif way == 2:
            data[at:at] = r.choice([*(bytes([sign]) for sign in b'\n[]{}",: 1\0\xff'), b"\xef\xbb\xbf"])
        elif way == 3:
            del data[at : at + r.randrange(1, 9)]
        elif way == 4:
            data[at:at] = data[at : at + r.randrange(1, 60)]
        elif way == 5:
            data[at : at + 4] = r.randbytes(4)
        else:
            data += r.choice([b"\n", b"\0" * 9, b"garbage", bytes(data[: r.randrange(60)])])
    return bytes(data)


ENDINGS = "jsonl jsonl json jsonl.gz json.gz jsonl.xz jsonl.bz2 txt txt.gz parquet arrow".split()


def run(path: Path, cache: Path, on_bad_document: str) -> tuple[list[Meaning] | None, dict, str]:
    """What was stored and its description, or None and what was said."""
    settings = data_settings(cache, path, on_bad_document=on_bad_document, tokenizer="bytes")
    try:
        (folder,) = prepare(settings, VOCAB)
    except UserError as error:
        return None, {}, str(error)
    corpus = Corpus([folder])
    rows = range(corpus.num_documents[0])
    stored = [(corpus.tokens(0, row).tolist(), corpus.labels(0, row).tolist()) for row in rows]
    return stored, json.loads((folder / META).read_text()), ""


@pytest.mark.slow
def test_any_file_is_stored_exactly_or_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    r, seen, begin = random.Random(8), Counter(), time.monotonic()
    for number in range(2500):
        path = tmp_path / f"{number}.{r.choice(ENDINGS)}"
        rows = some_rows(r)
        try:
            write(path, rows, r)
        except (pa.ArrowException, OverflowError):  # odd values that a table cannot hold
            path.write_bytes(r.randbytes(50))
        if r.randrange(3):
            path.write_bytes(harm(path.read_bytes(), r))
        wanted, others = expected(path)
        stored, meta, said = run(path, tmp_path / "cache", "error")
        if stored is None:
            assert str(path) in said and said.count("\n") < 3 and len(said) < 2000, said
            named = any(f"`{name}`" in said for name in others)  # a name that harm made, and that may carry meaning
            assert wanted is None or named, (path, said)
        else:
            assert stored == wanted, (path, path.read_bytes()[:2000])
            assert others <= set(meta["unused"]), (path, others)
        seen["refused" if stored is None else "stored", wanted is None] += 1
        skipped, meta, said = run(path, tmp_path / "cache", "skip")
        if stored is not None:
            assert skipped == stored
        elif skipped is not None:
            left_out = sum(count for count, _ in meta["left_out"].values())
            assert left_out and str(path) in str(meta["left_out"]), path
            if path.suffix == ".jsonl" and not others:
                lines = [line for line in path.read_bytes().split(b"\n") if line.strip() and line != b"\xef\xbb\xbf"]
                assert len(skipped) + left_out == len(lines)
        path.unlink()
        if number % 200 == 199:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert seen["stored", False] > 500 and seen["refused", True] > 500, seen
    print(seen, f"{time.monotonic() - begin:.0f} s")
