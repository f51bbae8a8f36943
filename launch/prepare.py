"""How do files and hub data sets become stored token ids?

`prepare` runs once, in the driver. It reads every source document by document, refuses or leaves out what cannot be
trained on, and stores the rest in the form that `distca.launch.data` maps. A source's folder is named after everything
that decides its content, and appears complete or not at all: a second run finds it, a second process at the same time
finds it or makes an equal one.

JSON and text files are read here, so that an error can name the row; parquet, arrow and the hub are read by `datasets`.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import os
import re
import reprlib
import shutil
import sysconfig
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers

from distca.config import DataSettings, SourceSettings
from distca.errors import DataError, SettingsError
from distca.launch.data import LENGTHS, META, STARTS, TARGETS, TOKENS, read_meta

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # of the stored files and of everything here that decides their content
BATCH_DOCUMENTS = 1024  # tokenised and written together: at most so many,
BATCH_SIZE = 1 << 22  # or of so many characters and ids
PROGRESS_S = 10.0
LEFTOVER_S = 24 * 3600.0  # an unfinished folder that nobody wrote to for this long was left by a killed process
UNFINISHED = ".unfinished-"
BYTE_EOS, BYTE_OFFSET = 1, 3  # ByT5's: ids 0 to 2 are pad, end of sequence and unknown

_ENDINGS = {"json": "json", "jsonl": "json", "ndjson": "json", "parquet": "parquet", "arrow": "arrow", "txt": "text"}
_OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NOT_DATA = {"state.json", "dataset_info.json", "dataset_dict.json"}  # what `save_to_disk` puts beside its arrow files
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_WANTED = "a document is text, or a list of integer token ids"
_TEXT_TYPES = {"string", "large_string", "string_view"}
_READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a document, or the rest of a file, cannot be trained on."""

    reason: str  # few words, to be counted
    sentence: str  # continues after "file x, row 3: "


@dataclass(frozen=True, slots=True)
class Found:
    """A document and where it was: `row` counts from 0, in JSON lines every line; text files have none."""

    file: Path | None  # None on the hub
    row: int | None
    content: str | np.ndarray | Problem

    @property
    def place(self) -> str:
        parts = [f"file {self.file}"] if self.file else []
        parts += [f"row {self.row} (counted from 0)"] if self.row is not None else []
        return ", ".join(parts)


_EMPTY = Problem("empty", "the document is empty")
_EMPTY_FILE = Problem("empty", "the file is empty")


def prepare(settings: DataSettings, vocab_size: int) -> tuple[Path, ...]:
    """Store every source's documents as token ids below `vocab_size` (the model's), unless that was done before.

    Returns a folder per source, for `Corpus`. Raises `DataError` for the first document, file or source that cannot be
    used; with `on_bad_document: skip` documents and files are left out instead, and a warning says how many and why."""
    encoder = Encoder(settings)
    return tuple(_prepare_source(settings, number, encoder, vocab_size) for number in range(len(settings.sources)))


def load_tokenizer(settings: DataSettings) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that `data.tokenizer` names; no code from the hub is ever run."""
    if settings.tokenizer == "bytes":
        return transformers.ByT5Tokenizer(extra_ids=0)
    name, revision = str(Path(settings.tokenizer).expanduser()), settings.tokenizer_revision
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SettingsError(
            f"data.tokenizer: cannot load {settings.tokenizer!r}: {_first_line(error)}\n"
            "Give a folder with tokenizer files, a hub name that this machine can reach or has downloaded, or `bytes`"
        ) from error


class Encoder:
    """Text to token ids. The tokenizer is loaded for the first text: token ids need none."""

    def __init__(self, settings: DataSettings):
        self._settings = settings
        self._tokenizer: transformers.PreTrainedTokenizerBase | None = None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        if self._settings.tokenizer == "bytes":
            return [self._encode_bytes(text) for text in texts]
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._settings)
            if self._settings.append_eos and self._tokenizer.eos_token_id is None:
                name = self._settings.tokenizer
                raise SettingsError(f"data.tokenizer: {name!r} has no end of sequence; set data.append_eos: false")
        eos = self._tokenizer.eos_token_id
        encoded = self._tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        if self._settings.append_eos:
            encoded = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]
        return [np.array(ids, np.int64) for ids in encoded]

    def _encode_bytes(self, text: str) -> np.ndarray:
        """What ByT5Tokenizer gives, hundreds of times as fast, except that text never becomes a special token."""
        ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) + BYTE_OFFSET
        return np.append(ids, BYTE_EOS) if self._settings.append_eos else ids


# ---- where documents are ----


def find_files(name: str, source: SourceSettings) -> list[tuple[Path, str]] | None:
    """A source's files in a fixed order, each with its format; None for a data set on the hub."""
    if source.path == "python-stdlib":
        return [(path, "text") for path in _library_files(name)]
    if source.format == "hub":
        return None
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = _folder_files(name, source, path)
    elif path.exists() or path.is_symlink():
        files = [path]
    elif glob.has_magic(source.path):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if not Path(match).is_dir()]
        if not files:
            raise DataError(f"{name}: no file matches; the pattern is looked up in {Path.cwd()}")
    elif source.format == "auto" and not _ending_format(path) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        return None
    else:
        raise DataError(f"{name}: there is no such file or folder; the path is looked up in {Path.cwd()}")
    formats = [(file, _ending_format(file) if source.format == "auto" else source.format) for file in files]
    unknown = [file for file, format in formats if format is None]
    if unknown:
        raise DataError(f"{name}: the ending of {unknown[0]} does not say its format; set `format` of the source")
    if len(kinds := sorted({format for _, format in formats})) > 1:
        raise DataError(f"{name}: holds files of {' and '.join(kinds)}; set `format`, or make a source of each")
    return formats


def _folder_files(name: str, source: SourceSettings, folder: Path) -> list[Path]:
    """All files of the wanted format below a folder; of several splits that `save_to_disk` wrote, the wanted one."""
    if (folder / "dataset_dict.json").exists():
        folder = folder / source.split
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        wanted = _ending_format(file) is not None if source.format == "auto" else _ending_format(file) == source.format
        wanted = (wanted or source.format == "text") and file.name not in _NOT_DATA
        if wanted and not hidden and not file.is_dir():
            files.append(file)
    if not files:
        what = "json, parquet, arrow or text" if source.format == "auto" else source.format
        raise DataError(f"{name}: there is no {what} file in {folder}")
    return files


def _library_files(name: str) -> list[Path]:
    """This Python's own modules that hold anything, without tests and installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(folder).parts)]
    files = sorted((path for path in files if path.stat().st_size), key=lambda path: path.relative_to(folder).parts)
    if not files:
        raise DataError(f"{name}: this Python keeps no source files in {folder}; name files of your own instead")
    return files


def _ending_format(path: Path) -> str | None:
    suffixes = path.name.lower().split(".")[1:]
    if suffixes and f".{suffixes[-1]}" in _OPENERS:
        suffixes.pop()
    return _ENDINGS.get(suffixes[-1]) if suffixes else None


# ---- reading documents ----


def _read_source(name: str, source: SourceSettings, files: list[tuple[Path, str]] | None) -> Iterator[Found]:
    if files is None:
        yield from _read_hub(name, source)
        return
    for file, format in files:
        if format == "text":
            yield _read_text(file)
        elif format == "json":
            yield from _read_json(file, source)
        else:
            yield from _read_table(file, format, source)


def _read_text(file: Path) -> Found:
    """The whole file is one document."""
    try:
        with _open(file) as stream:
            return Found(file, None, _checked(stream.read().decode("utf-8")))
    except _READ_ERRORS as error:
        return Found(file, None, _unreadable(error))


def _read_json(file: Path, source: SourceSettings) -> Iterator[Found]:
    """One object per line, or one array of objects (which is read whole). A broken line is one bad document."""
    row = None
    try:
        with _open(file) as stream:
            lines = ((number, line) for number, line in enumerate(stream) if line.strip())
            head = next(lines, None)
            if head is None:
                yield Found(file, None, _EMPTY_FILE)
            elif head[1].lstrip().startswith(b"["):
                for row, value in enumerate(json.loads(head[1] + stream.read())):
                    yield Found(file, row, _from_object(value, source))
            else:
                for row, line in itertools.chain([head], lines):
                    yield Found(file, row, _from_line(line, source))
    except _READ_ERRORS as error:
        yield Found(file, row, _unreadable(error))
    except ValueError as error:
        yield Found(file, None, Problem("broken JSON", f"is not a JSON array ({error})"))


def _from_line(line: bytes, source: SourceSettings) -> str | np.ndarray | Problem:
    try:
        return _from_object(json.loads(line), source)
    except UnicodeDecodeError as error:
        return _unreadable(error)
    except ValueError as error:
        return Problem("broken JSON", f"is not JSON ({error}); a line is one object, or the file one array of objects")


def _from_object(value: Any, source: SourceSettings) -> str | np.ndarray | Problem:
    if not isinstance(value, dict):
        return Problem("broken JSON", f"is a {type(value).__name__}, not an object with columns")
    column = _column(source, value)
    return _checked(value[column]) if column in value else _missing(column, value)


def _read_table(file: Path, format: str, source: SourceSettings) -> Iterator[Found]:
    rows = itertools.count()
    try:
        data = datasets.load_dataset(format, data_files=[glob.escape(str(file))], split="train", streaming=True)
        for content in _from_tables(data, source):
            yield Found(file, None if isinstance(content, _WholeFile) else next(rows), content)
    except Exception as error:  # pyarrow and datasets raise all kinds; each means that the file cannot be read further
        yield Found(file, next(rows), _unreadable(error))


def _read_hub(name: str, source: SourceSettings) -> Iterator[Found]:
    rows = 0
    try:
        data = datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision, streaming=True
        )
        for content in _from_tables(data, source):
            yield Found(None, rows, content)
            rows += 1
    except Exception as error:  # as above, and everything a network can do
        where = "neither a file or folder here nor" if source.format == "auto" else "not"
        raise DataError(
            f"{name}: is {where} a data set on the Hugging Face hub that can be read: {_first_line(error)} (after "
            f"{rows} rows). Check the name, `subset`, `split` and `revision`, and that this machine reaches the hub"
        ) from error


class _WholeFile(Problem):
    """A problem of a file's every row."""


def _from_tables(data: datasets.IterableDataset, source: SourceSettings) -> Iterator[str | np.ndarray | Problem]:
    for table in data.with_format("arrow").iter(batch_size=BATCH_DOCUMENTS):
        column = _column(source, table.column_names)
        if column not in table.column_names:
            yield _WholeFile("no such column", _missing(column, table.column_names).sentence)
            return
        values = table.column(column)
        if str(values.type) in _TEXT_TYPES:
            yield from map(_checked, values.to_pylist())
        elif re.fullmatch(r"u?int\d+", str(getattr(values.type, "value_type", ""))):
            for value in values:
                yield _checked(value.values.to_numpy(zero_copy_only=False) if value.is_valid else None)
        else:
            yield _WholeFile("wrong type", f"column `{column}` holds {values.type}; {_WANTED}")
            return


def _column(source: SourceSettings, available: Iterable[str]) -> str:
    return source.column or ("input_ids" if "input_ids" in available else "text")


def _checked(value: Any) -> str | np.ndarray | Problem:
    """A column's value as text or int64 ids, or what is wrong with it."""
    if value is None:
        return Problem("empty", "the document is missing (null)")
    if isinstance(value, str):
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            return Problem("unreadable", "the text holds half a surrogate pair, which is not valid Unicode")
        return value or _EMPTY
    try:
        ids = np.asarray(value) if isinstance(value, (list, np.ndarray)) else None
    except (ValueError, OverflowError):  # lists of unequal depth
        ids = None
    if ids is not None and ids.ndim == 1 and not ids.size:
        return _EMPTY
    if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
        return Problem("wrong type", f"holds {reprlib.repr(value)}; {_WANTED}")
    return ids.astype(np.int64)


def _missing(column: str, available: Iterable[str]) -> Problem:
    columns = ", ".join(f"`{name}`" for name in available) or "none"
    return Problem("no such column", f"has no column `{column}` (columns: {columns}); set `column` of the source")


def _unreadable(error: Exception) -> Problem:
    return Problem("unreadable", f"cannot be read: {_first_line(error).rstrip('.')}")


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


def _open(file: Path):
    return _OPENERS.get(file.suffix.lower(), open)(file, "rb")


# ---- storing documents ----


def _prepare_source(settings: DataSettings, number: int, encoder: Encoder, vocab_size: int) -> Path:
    source = settings.sources[number]
    name = f"data.sources[{number}] ({source.path})"
    try:
        files = find_files(name, source)
    except OSError as error:
        raise DataError(f"{name}: cannot be looked up: {error.strerror or error}: {error.filename}") from error
    cache = settings.cache.expanduser()
    folder = cache / _folder_name(settings, source, files, vocab_size)
    try:
        if not (folder / META).exists():
            _remove_leftovers(cache)
            _make_folder(folder, settings, name, source, files, encoder, vocab_size)
    except OSError as error:
        raise SettingsError(f"data.cache: cannot write {folder}: {error.strerror or error}") from error
    meta = read_meta(folder)
    logger.info("%s: %d documents, %d tokens in %s", name, meta["documents"], meta["tokens"], folder)
    if meta["left_out"]:
        logger.warning("%s: left out %s", name, _summary(meta["left_out"]))
    return folder


def _folder_name(
    settings: DataSettings, source: SourceSettings, files: list[tuple[Path, str]] | None, vocab_size: int
) -> str:
    """Readable, and different for everything that decides what is stored. A weight does not."""
    tokenizer_files = sorted(path for path in Path(settings.tokenizer).expanduser().glob("*") if path.is_file())
    identity = {
        "version": FORMAT_VERSION,
        "source": source.model_dump(mode="json", exclude={"weight"}),
        "files": [(*_stamp(file), format) for file, format in files or []],
        "tokenizer": [settings.tokenizer, settings.tokenizer_revision, [_stamp(file) for file in tokenizer_files]],
        "append_eos": settings.append_eos,
        "on_bad_document": settings.on_bad_document,
        "vocab_size": vocab_size,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", source.path).strip("-")[-40:].strip("-")
    return f"{readable or 'source'}-{digest}"


def _stamp(file: Path) -> tuple[str, int, int]:
    """What changes when a file does; a file that cannot be looked at is reported when it is read."""
    try:
        stat = file.stat()
    except OSError:
        return str(file.absolute()), -1, -1
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns


def _make_folder(
    folder: Path,
    settings: DataSettings,
    name: str,
    source: SourceSettings,
    files: list[tuple[Path, str]] | None,
    encoder: Encoder,
    vocab_size: int,
) -> None:
    """Write into an unfinished folder, then rename it. Who comes second finds the name taken and drops its own."""
    unfinished = folder.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        refusals = _Refusals(name, skip=settings.on_bad_document == "skip")
        with _Store(unfinished, "uint16" if vocab_size <= 1 << 16 else "uint32") as store:
            _store_documents(name, _read_source(name, source, files), encoder, vocab_size, store, refusals)
            if not store.num_documents:
                why = f": left out {_summary(refusals.left_out)}" if refusals.left_out else ": there are no rows"
                raise DataError(f"{name}: no document to train on{why}")
            store.finish({"source": source.path, "left_out": refusals.left_out})
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


def _store_documents(
    name: str, documents: Iterator[Found], encoder: Encoder, vocab_size: int, store: _Store, refusals: _Refusals
) -> None:
    begin = said = time.monotonic()
    for batch in _batches(documents, refusals):
        texts = [index for index, found in enumerate(batch) if isinstance(found.content, str)]
        ids = [found.content for found in batch]
        for index, encoded in zip(texts, encoder([batch[i].content for i in texts]) if texts else [], strict=True):
            ids[index] = encoded
        good = []
        for found, document in zip(batch, ids, strict=True):
            problem = _ids_problem(document, vocab_size, isinstance(found.content, str))
            if problem:
                refusals.refuse(found.place, problem)
            else:
                good.append(document)
        store.append(good)
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            progress = (store.num_documents, store.num_tokens, store.num_tokens / (said - begin), batch[-1].place)
            logger.info("%s: %d documents, %d tokens, %.0f tokens/s, at %s", name, *progress)


def _batches(documents: Iterator[Found], refusals: _Refusals) -> Iterator[list[Found]]:
    batch, size = [], 0
    for found in documents:
        if isinstance(found.content, Problem):
            refusals.refuse(found.place, found.content)
            continue
        batch.append(found)
        size += len(found.content)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids_problem(ids: np.ndarray, vocab_size: int, from_text: bool) -> Problem | None:
    if not ids.size:
        return _EMPTY
    low, high = int(ids.min()), int(ids.max())
    if 0 <= low and high < vocab_size:
        return None
    what = f"token id {low if low < 0 else high} is outside the model's vocabulary (0 to {vocab_size - 1})"
    if from_text:
        advice = f"set `data.tokenizer` to the model's own, or `vocab_size` in `model.config` above {high}"
    elif low < 0:
        advice = "ids are at least 0"
    else:
        advice = f"train the model these ids were made for, or set `vocab_size` in `model.config` above {high}"
    return Problem("id outside the vocabulary", f"{what}; {advice}")


class _Refusals:
    """Stops at the first bad document, or counts them: `left_out[reason] = [count, place of the first]`."""

    def __init__(self, name: str, skip: bool):
        self._name = name
        self._skip = skip
        self.left_out: dict[str, list] = {}

    def refuse(self, place: str, problem: Problem) -> None:
        if not self._skip:
            advice = "To leave out what cannot be used, set data.on_bad_document: skip"
            raise DataError(f"{self._name}: {place}: {problem.sentence}. {advice}")
        self.left_out.setdefault(problem.reason, [0, place])[0] += 1


def _summary(left_out: dict[str, list]) -> str:
    total = sum(count for count, _ in left_out.values())
    reasons = "; ".join(f"{count} {reason} (first: {place})" for reason, (count, place) in left_out.items())
    return f"{total} documents or files: {reasons}"


class _Store:
    """The files of one source, written front to back."""

    def __init__(self, folder: Path, dtype: str):
        self._folder = folder
        self._dtype = dtype
        self._files = {name: open(folder / name, "wb") for name in (TOKENS, STARTS, LENGTHS, TARGETS)}
        self.num_documents = 0
        self.num_tokens = 0

    def append(self, documents: list[np.ndarray]) -> None:
        if not documents:
            return
        lengths = np.array([len(document) for document in documents], np.int64)
        starts = self.num_tokens + np.cumsum(lengths) - lengths
        self._files[TOKENS].write(np.concatenate(documents).astype(self._dtype).data)
        self._files[STARTS].write(starts.data)
        self._files[LENGTHS].write(lengths.data)
        self._files[TARGETS].write((lengths - 1).data)
        self.num_documents += len(documents)
        self.num_tokens += int(lengths.sum())

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def finish(self, meta: dict) -> None:
        """Bring everything to the disk, the description last."""
        counts = {"documents": self.num_documents, "tokens": self.num_tokens, "dtype": self._dtype}
        counts |= {"targets": self.num_tokens - self.num_documents, "labels": False}
        self._files[META] = open(self._folder / META, "wb")
        self._files[META].write(json.dumps({**meta, **counts, "version": FORMAT_VERSION}, indent=2).encode())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
