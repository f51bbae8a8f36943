"""Documents for tests: made on the spot, small, and recognisable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from distca.config import DataSettings
from distca.errors import DataError
from distca.launch.data.batches import LABELS, LENGTHS, META, NO_TARGET, STARTS, TARGETS, TOKENS, Corpus
from distca.launch.data.prepare import prepare


def numbered_documents(lengths: Sequence[int], first_token: int = 0) -> list[list[int]]:
    """Token ids that count on through all documents: a token tells its document and position."""
    ends = np.cumsum(lengths)
    return [
        list(range(first_token + end - length, first_token + end)) for length, end in zip(lengths, ends, strict=True)
    ]


def write_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A row is a value to store as JSON, or bytes to put there as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return path


def data_settings(
    cache: Path, *paths: Path | str, weights: Sequence[float] | None = None, **settings: Any
) -> DataSettings:
    """One source per path."""
    sources = [{"path": str(path)} for path in paths]
    for source, weight in zip(sources, weights or [], strict=bool(weights)):
        source["weight"] = weight
    return DataSettings(sources=sources, cache=cache, **settings)


def write_prepared(folder: Path, documents: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None) -> Path:
    """Documents in the form that `Corpus` maps; labels as Hugging Face means them."""
    folder.mkdir(parents=True)
    lengths = np.array([len(ids) for ids in documents], np.int64)
    tokens, meant = np.concatenate(documents), np.concatenate(documents if labels is None else labels)
    starts = np.cumsum(lengths) - lengths
    is_target = meant != NO_TARGET
    is_target[starts] = False
    targets = np.add.reduceat(is_target.astype(np.int64), starts)
    columns = {TOKENS: tokens.astype(np.uint16), STARTS: starts, LENGTHS: lengths, TARGETS: targets}
    if labels is not None:
        columns[LABELS] = meant.astype(np.int32)
    for name, column in columns.items():
        column.tofile(folder / name)
    meta = dict(source=folder.name, documents=len(lengths), tokens=len(tokens), dtype="uint16", left_out={})
    meta |= dict(targets=int(targets.sum()), labels=labels is not None)
    (folder / META).write_text(json.dumps(meta))
    return folder


def prepared_corpus(folder: Path, *lengths: Sequence[int], **settings: Any) -> tuple[DataSettings, Corpus]:
    """A corpus of one source per list of lengths; its tokens count on through all documents of all sources."""
    paths, num_tokens = [], 0
    for number, source in enumerate(lengths):
        documents = numbered_documents(source, num_tokens)
        paths.append(write_json_lines(folder / f"{number}.jsonl", ({"input_ids": ids} for ids in documents)))
        num_tokens += sum(source)
    data = data_settings(folder / "cache", *paths, **settings)
    return data, Corpus(prepare(data, max(num_tokens, 2)))


def stored(settings: DataSettings, vocab_size: int = 259, source: int = 0) -> list[list[int]]:
    """What `prepare` stores of a source, as lists of token ids."""
    corpus = Corpus(prepare(settings, vocab_size))
    return [corpus.tokens(source, row).tolist() for row in range(corpus.num_documents[source])]


def stored_labels(settings: DataSettings, vocab_size: int = 259, source: int = 0) -> list[list[int]]:
    corpus = Corpus(prepare(settings, vocab_size))
    return [corpus.labels(source, row).tolist() for row in range(corpus.num_documents[source])]


def as_bytes(texts: Iterable[str], eos: bool = True) -> list[list[int]]:
    return [[byte + 3 for byte in text.encode()] + [1] * eos for text in texts]


def refusal(settings: DataSettings, vocab_size: int = 259) -> str:
    with pytest.raises(DataError) as caught:
        prepare(settings, vocab_size)
    assert not [path for path in settings.cache.glob("*") if path.is_dir()], "a refused source must leave nothing"
    return str(caught.value)
