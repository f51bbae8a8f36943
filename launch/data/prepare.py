"""How are documents stored, and found again?

`prepare` runs once, in the driver. It reads every source document by document, refuses or leaves out what cannot be
trained on, and stores the rest in the form that `distca.launch.data.batches` maps. A source's folder is named by its
identity, and appears complete or not at all: a second run finds it, a second process at the same time finds it or makes
an equal one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from distca.config import DataSettings, SourceSettings
from distca.errors import DataError, SettingsError
from distca.launch.data.batches import LABELS, LENGTHS, META, NO_TARGET, STARTS, TARGETS, TOKENS, read_meta
from distca.launch.data.documents import EMPTY, Problem, are_shifted
from distca.launch.data.encode import Encoder
from distca.launch.data.files import NO_ROWS, DataFile, Found, find_files, shown
from distca.launch.data.identity import (
    FORMAT_VERSION,
    UNREADABLE,
    content_of,
    digests_of,
    find_prepared,
    identity,
    stamps_of,
    tokenizer_identity,
)
from distca.paths import expanded

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 1024  # tokenised and written together: at most so many,
BATCH_SIZE = 1 << 22  # or of so many characters and ids
WRITE_TOKENS = 1 << 22  # converted to the stored type at once
PROGRESS_S = 10.0
LEFTOVER_S = 24 * 3600.0  # an unfinished folder that nobody wrote to for this long was left by a killed process
UNFINISHED = ".unfinished-"


def prepare(
    settings: DataSettings,
    vocab_size: int,
    model_path: str | None = None,
    model_revision: str | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[Path, ...]:
    """Store every source's documents as token ids below `vocab_size` (the model's), unless that was done before.

    Returns a folder per source, for `Corpus`. Raises `DataError` for the first document, file or source that cannot be
    used; with `on_bad_document: skip` documents and files are left out instead, and a warning says how many and why.
    `model_path` is where the tokenizer comes from if the settings name none. `numbers`: of these sources alone."""
    encoder = Encoder(settings, model_path, model_revision)
    cache = expanded(settings.cache)
    identify = functools.partial(tokenizer_identity, settings, model_path, model_revision, cache)
    try:
        tokenizer = identify()
    except OSError as error:
        raise SettingsError(f"data.tokenizer: cannot be looked up: {error.strerror}: {error.filename}") from error
    known = (encoder, tokenizer, lambda: identify() == tokenizer)
    asked = range(len(settings.sources)) if numbers is None else numbers
    return tuple(_prepare_source(settings, n, *known, vocab_size) for n in asked)


def _prepare_source(
    settings: DataSettings,
    number: int,
    encoder: Encoder,
    tokenizer: object,
    is_same_tokenizer: Callable[[], bool],
    vocab_size: int,
) -> Path:
    source = settings.sources[number]
    name = f"data.sources[{number}] ({source.path})"
    cache = expanded(settings.cache)
    try:
        if expanded(source.path).is_dir() and os.path.realpath(cache) == os.path.realpath(expanded(source.path)):
            raise SettingsError(f"data.cache: {cache} is the folder of {name}; give prepared documents their own")
        files = find_files(name, source, cache)
        paths = [file.path for file in files or []]
        stamps = stamps_of(paths)  # before anything of the files is read
        digests = None if files is None else digests_of(paths, cache)
    except OSError as error:
        raise DataError(f"{name}: cannot be looked up: {error.strerror or error}: {error.filename}") from error
    known = None if files is None else list(zip(files, digests, strict=True))
    if source.path != "python-stdlib":
        _say_twins(name, known or [], [size for size, *_ in stamps])
    own = identity(settings, source, known, tokenizer, vocab_size)
    folder = cache / own
    try:
        if not find_prepared(cache, own):
            _remove_leftovers(cache)
            described = {"identity": own, "files": [[file.name, digest] for file, digest in known or []]}
            is_same = lambda: stamps_of(paths) == stamps and is_same_tokenizer()  # noqa: E731
            _make_folder(folder, settings, name, source, files, is_same, encoder, vocab_size, described)
    except OSError as error:
        if folder.exists() and not find_prepared(cache, own):
            raise SettingsError(f"data.cache: {folder} holds no prepared documents; delete it") from error
        raise SettingsError(f"data.cache: cannot write {folder}: {error.strerror or error}") from error
    _describe(name, folder)
    return folder


def _describe(name: str, folder: Path) -> None:
    """What was found, said whenever it is used, not only when it was stored."""
    meta = read_meta(folder)
    counts = (meta["documents"], meta["tokens"], meta["targets"], folder)
    logger.info("%s: %d documents, %d tokens, %d of them targets, in %s", name, *counts)
    if meta["left_out"]:
        logger.warning("%s: left out %s", name, _summary(meta["left_out"]))
    if meta["unused"]:
        logger.warning("%s: not trained on: columns %s", name, _few(meta["unused"], "`{}`"))
    if meta.get("shifted"):
        logger.warning(
            "%s: the labels of %d documents are the next tokens, as if shifted before. Here a label is the token "
            "itself: the model would learn to predict the token after the next one",
            name,
            meta["shifted"],
        )
    if meta["without_rows"]:
        logger.warning("%s: without rows: %s", name, _few(meta["without_rows"]))


def _say_twins(name: str, known: list[tuple[DataFile, str]], sizes: list[int]) -> None:
    """What lies there twice, as a link or packed and unpacked, is trained on twice."""
    names: dict[str, str] = {}
    twins = []
    for (file, digest), size in zip(known, sizes, strict=True):
        unpacked = file.name[: len(file.name) - len(file.compression)] if file.compression else file.name
        keys = [f"name {unpacked}"] + ([digest] if digest != UNREADABLE and size else [])
        other = next((names[key] for key in keys if key in names), None)
        twins += [f"{other!r} and {file.name!r}"] if other is not None else []
        for key in keys:
            names.setdefault(key, file.name)
    if twins:
        logger.warning(
            "%s: %d files look the same as others of it, and are trained on as well: %s%s",
            name,
            len(twins),
            "; ".join(twins[:3]),
            "; …" if len(twins) > 3 else "",
        )


def _few(names: list[str], form: str = "{}") -> str:
    shown = ", ".join(map(form.format, names[:20]))
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def _make_folder(
    folder: Path,
    settings: DataSettings,
    name: str,
    source: SourceSettings,
    files: list[DataFile] | None,
    is_same: Callable[[], bool],
    encoder: Encoder,
    vocab_size: int,
    described: dict,
) -> None:
    """Write into an unfinished folder, then rename it. Who comes second finds the name taken and drops its own."""
    unfinished = folder.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    from distca.launch.data.read import read_source  # a second of imports that documents which are prepared do without

    try:
        seen = _Seen(name, skip=settings.on_bad_document == "skip")
        with _Store(unfinished, "uint16" if vocab_size <= 1 << 16 else "uint32") as store:
            _store_documents(name, read_source(name, source, files), encoder, vocab_size, store, seen)
            seen.check(source, store)
            if not is_same():
                raise DataError(f"{name}: files changed while they were read; start again when they are complete")
            store.finish({"source": source.path, **described, **seen.facts()})
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / META).exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    for unfinished in cache.glob(f"{UNFINISHED}*"):
        try:
            last_write = max(path.stat().st_mtime for path in (unfinished, *unfinished.iterdir()))
        except OSError:  # finished or removed by its owner in the meantime
            continue
        if time.time() - last_write > LEFTOVER_S:
            shutil.rmtree(unfinished, ignore_errors=True)


# ---- from documents to the store ----


def _store_documents(
    name: str, documents: Iterator[Found], encoder: Encoder, vocab_size: int, store: _Store, seen: _Seen
) -> None:
    begin = said = time.monotonic()
    for batch in _batches(documents, seen):
        texts = [index for index, found in enumerate(batch) if isinstance(found.content.content, str)]
        ids = [found.content.content for found in batch]
        for index, encoded in zip(texts, encoder([ids[i] for i in texts]) if texts else [], strict=True):
            ids[index] = encoded
        good: list[tuple[np.ndarray, np.ndarray | None]] = []
        for found, document in zip(batch, ids, strict=True):
            labels = found.content.labels
            problem = document if isinstance(document, Problem) else _ids_problem(document, vocab_size, bool(texts))
            if not problem and labels is not None and (labels != NO_TARGET).any():
                problem = _ids_problem(labels[labels != NO_TARGET], vocab_size, False, "label")
            if problem:
                seen.refuse(found.place, problem)
            else:
                seen.shifted += labels is not None and are_shifted(document, labels)
                good.append((document, labels))
        store.append(good)
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            progress = (store.num_documents, store.num_tokens, store.num_tokens / (said - begin), batch[-1].place)
            logger.info("%s: %d documents, %d tokens, %.0f tokens/s, at %s", name, *progress)


def _batches(documents: Iterator[Found], seen: _Seen) -> Iterator[list[Found]]:
    batch, size = [], 0
    for found in documents:
        if not seen.is_document(found):
            continue
        batch.append(found)
        size += len(found.content.content)
        del found  # its text is not kept while the next one is read
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids_problem(ids: np.ndarray, vocab_size: int, from_text: bool, what: str = "token id") -> Problem | None:
    if not ids.size:
        return EMPTY
    low, high = int(ids.min()), int(ids.max())
    if 0 <= low and high < vocab_size:
        return None
    outside = f"{what} {low if low < 0 else high} is outside the model's vocabulary (0 to {vocab_size - 1})"
    if from_text:
        advice = f"set `data.tokenizer` to the model's own, or `vocab_size` in `model.config` above {high}"
    elif low < 0:
        advice = "ids are at least 0" if what == "token id" else f"labels are ids of at least 0, or {NO_TARGET}"
    else:
        advice = f"train the model these ids were made for, or set `vocab_size` in `model.config` above {high}"
    return Problem("id outside the vocabulary", f"{outside}; {advice}")


class _Seen:
    """What a source has shown so far. Stops at the first bad document, or counts them:
    `left_out[reason] = [count, place of the first]`."""

    def __init__(self, name: str, skip: bool):
        self._name = name
        self._skip = skip
        self._kind: tuple[str, str] | None = None  # of the first document, and its place
        self._columns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # of the last document
        self._unused: dict[str, None] = {}
        self._ignored: set[str] = set()
        self._without_rows: list[str] = []
        self._is_text = False
        self.left_out: dict[str, list] = {}
        self.shifted = 0  # documents whose labels seem to be

    def is_document(self, found: Found) -> bool:
        document = found.content
        if document is NO_ROWS:
            self._without_rows.append(shown(found.file))
            return False
        if isinstance(document, Problem):
            self.refuse(found.place, document)
            return False
        if self._kind is None:
            self._kind = document.kind, found.place
        elif document.kind != self._kind[0]:
            kind, place = self._kind
            raise DataError(
                f"{self._name}: {found.place} is {document.kind}, but {place} is {kind}. A source holds documents of "
                "one kind: make a source of each, or say in `column` and `ignore_columns` what is meant"
            )
        self._is_text = isinstance(document.content, str)
        columns = (document.unused, document.ignored)
        if columns != self._columns:
            self._columns = columns
            self._unused.update(dict.fromkeys(document.unused))
            self._ignored.update(document.ignored)
        return True

    def refuse(self, place: str, problem: Problem) -> None:
        at = f"{place}: " if place else ""
        if problem.asks:
            raise DataError(f"{self._name}: {at}{problem.sentence}")
        if not self._skip:
            advice = "To leave out what cannot be used, set data.on_bad_document: skip"
            raise DataError(f"{self._name}: {at}{problem.sentence}. {advice}")
        self.left_out.setdefault(problem.reason, [0, place])[0] += 1

    def check(self, source: SourceSettings, store: _Store) -> None:
        """After the last document: is there anything to train on, and did the settings speak of what is there?"""
        if not store.num_documents:
            why = f": left out {_summary(self.left_out)}" if self.left_out else ": there are no rows"
            raise DataError(f"{self._name}: no document to train on{why}")
        if missing := [name for name in source.ignore_columns if name not in self._ignored]:
            raise DataError(
                f"{self._name}: `ignore_columns` names {_few(missing, '`{}`')}, which no document has; beside the "
                f"document there are {_few(list(self._unused), '`{}`') or 'no other columns'}"
            )
        if not store.num_targets:
            if store.num_tokens == store.num_documents:
                why = "every document is a single token, which nothing comes before"
            else:
                why = "labels or masks leave out every token that another one comes before"
            raise DataError(f"{self._name}: nothing to predict in {store.num_documents} documents: {why}")

    def facts(self) -> dict:
        found = {"text": self._is_text, "unused": list(self._unused), "without_rows": self._without_rows}
        return {"left_out": self.left_out, "shifted": self.shifted, **found}


def _summary(left_out: dict[str, list]) -> str:
    total = sum(count for count, _ in left_out.values())
    reasons = "; ".join(f"{count} {reason} (first: {place})" for reason, (count, place) in left_out.items())
    return f"{total} documents or files: {reasons}"


# ---- the store ----


def _num_targets(ids: np.ndarray, labels: np.ndarray | None) -> int:
    """The first token of a document is never one: nothing comes before it."""
    return len(ids) - 1 if labels is None else int(np.count_nonzero(labels[1:] != NO_TARGET))


class _Store:
    """The files of one source, written front to back."""

    def __init__(self, folder: Path, dtype: str):
        self._folder = folder
        self._dtype = dtype
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in (TOKENS, LENGTHS, LABELS)}
        self._files = {name: self._open(name) for name in (TOKENS, STARTS, LENGTHS, TARGETS)}
        self.num_documents = 0
        self.num_tokens = 0
        self.num_targets = 0

    def _open(self, name: str) -> IO[bytes]:
        return open(self._folder / name, "wb", buffering=1 << 18)

    def append(self, documents: list[tuple[np.ndarray, np.ndarray | None]]) -> None:
        """Documents' ids, and their labels where they are not the ids."""
        if not documents:
            return
        if LABELS not in self._files and any(labels is not None for _, labels in documents):
            self._begin_labels()
        lengths = np.array([len(ids) for ids, _ in documents], np.int64)
        targets = np.array([_num_targets(*document) for document in documents], np.int64)
        self._write(TOKENS, [ids for ids, _ in documents], self._dtype)
        if LABELS in self._files:
            self._write(LABELS, [ids if labels is None else labels for ids, labels in documents], "int32")
        self._files[STARTS].write((self.num_tokens + np.cumsum(lengths) - lengths).data)
        self._put(LENGTHS, lengths)
        self._files[TARGETS].write(targets.data)
        self.num_documents += len(documents)
        self.num_tokens += int(lengths.sum())
        self.num_targets += int(targets.sum())

    def _write(self, name: str, arrays: list[np.ndarray], dtype: str) -> None:
        """Short ones together, long ones piece by piece, so that none is copied as a whole."""
        if sum(map(len, arrays)) <= WRITE_TOKENS:
            self._put(name, np.concatenate(arrays).astype(dtype, copy=False))
            return
        for array in arrays:
            for at in range(0, len(array), WRITE_TOKENS):
                self._put(name, array[at : at + WRITE_TOKENS].astype(dtype, copy=False))

    def _put(self, name: str, numbers: np.ndarray) -> None:
        self._files[name].write(numbers.data)
        self._digests[name].update(numbers.data)

    def _begin_labels(self) -> None:
        """Give the documents so far their tokens for labels."""
        self._files[TOKENS].flush()
        self._files[LABELS] = self._open(LABELS)
        if self.num_tokens:
            self._write(LABELS, [np.memmap(self._folder / TOKENS, self._dtype, "r")], "int32")

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def finish(self, meta: dict) -> None:
        """Bring everything to the disk, the description last."""
        counts = {"documents": self.num_documents, "tokens": self.num_tokens, "targets": self.num_targets}
        stored = {"dtype": self._dtype, "labels": LABELS in self._files, "version": FORMAT_VERSION}
        stored["content"] = content_of(digest.hexdigest() for digest in self._digests.values())
        self._files[META] = self._open(META)
        self._files[META].write(json.dumps({**meta, **counts, **stored}, indent=2).encode())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
