"""How do files and hub data sets become rows?

`find_files` says which files a source means, in a fixed order, and refuses what looks like data but cannot be read.
`read_source` gives their documents one by one, each with the place it was found at. Nothing is read whole: lines,
elements of JSON arrays, row groups and record batches pass through one after the other. Whatever a file holds, what
comes back is a document or a `Problem` that names the row; after damage, reading goes on where the format allows it.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from distca.config import SourceSettings
from distca.errors import DataError, first_line
from distca.launch.documents import EMPTY, Document, Opaque, Problem, columns_to_read, document_of
from distca.paths import expanded, looks_local

logger = logging.getLogger(__name__)

BATCH_ROWS = 64  # of a table, at most
EXPANSION = 4  # bytes in memory for one in a parquet file, about: ids and masks are packed there
BATCH_BYTES = 1 << 25  # of a table, about, when it is in memory
CHUNK = 1 << 20  # bytes of a JSON array, read at once
LONG = 1 << 24  # characters of JSON from which on equal numbers are kept once: slower, and a third of the memory

_ENDINGS = {"json": "json", "jsonl": "json", "ndjson": "json", "parquet": "parquet", "arrow": "arrow", "txt": "text"}
_OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UNREAD = {  # endings of data that is not read here, and what to do
    "zst zstd lz4 lzo lz sz snappy br z lzma": "decompress it, or compress it with gzip, bzip2 or xz",
    "zip tar tgz tbz2 txz 7z rar": "unpack it",
    "csv tsv xls xlsx ods db sqlite sqlite3 avro orc feather xml yaml yml": (
        "convert it to parquet or JSON lines, for example with pandas"
    ),
    "mds npy npz bin idx h5 hdf5 pkl pickle pt pth tfrecord tfrecords msgpack lance mat": (
        "write its token ids as parquet or JSON lines, in a column `input_ids`"
    ),
}
_REMEDIES = {ending: remedy for endings, remedy in _UNREAD.items() for ending in endings.split()}
_SIGNATURES = (
    (b"\x1f\x8b\x08", "is compressed with gzip: let its name end in .gz"),
    (b"\xfd7zXZ\x00", "is compressed with xz: let its name end in .xz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard, which is not read here: decompress it (`zstd -d`)"),
    (b"\x04\x22\x4d\x18", "is compressed with LZ4, which is not read here: decompress it (`lz4 -d`)"),
    (b"PK\x03\x04", "is a ZIP archive, which is not read here: unpack it"),
    (b"PAR1", "is a parquet file: let its name end in .parquet, or set `format: parquet`"),
    (b"ARROW1\x00\x00", "is an arrow file: let its name end in .arrow, or set `format: arrow`"),
    (b"\x93NUMPY", "is a NumPy file, which is not read here: write its ids as parquet or JSON lines"),
)
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError)
_SPACE = re.compile(r"[ \t\n\r]*")
_BYTES_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as the error handler `surrogateescape` marks them

NO_ROWS = Problem("without rows", "has no rows")


@dataclass(frozen=True, slots=True)
class DataFile:
    path: Path
    name: str  # within the source
    format: str  # json, parquet, arrow or text

    @property
    def compression(self) -> str:
        suffix = self.path.suffix.lower()
        return suffix if suffix in _OPENERS and self.format in ("json", "text") else ""


@dataclass(frozen=True, slots=True)
class Found:
    """A document and where it was: `row` counts from 0, in JSON lines every line; text files have none."""

    file: Path | None  # None on the hub
    row: int | None
    content: Document | Problem

    @property
    def place(self) -> str:
        parts = [f"file {shown(self.file)}"] if self.file else []
        parts += [f"row {self.row} (counted from 0)"] if self.row is not None else []
        return ", ".join(parts)


def shown(path: Path) -> str:
    """A path as it can be printed: names need not be text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---- which files ----


def find_files(name: str, source: SourceSettings) -> list[DataFile] | None:
    """A source's files in a fixed order; None for a data set on the hub."""
    if source.path == "python-stdlib":
        _refuse_settings(name, source, "the standard library", ("subset", "revision", "column", "ignore_columns"))
        return _library_files(name)
    path = expanded(source.path)
    if source.format == "hub":
        return None
    if path.is_dir():
        files = _folder_files(name, source, path)
    elif path.exists() or path.is_symlink():
        files = [DataFile(path, path.name, _format(path, source))]
    elif glob.has_magic(source.path):
        files = _glob_files(name, source, path)
    elif source.format == "auto" and not looks_local(source.path):
        return None
    else:
        raise DataError(f"{name}: there is no such file or folder; the path is looked up in {Path.cwd()}")
    for file in files:
        if not file.format:
            raise DataError(f"{name}: {_what_to_do(file.path)}")
    if len(kinds := sorted({file.format for file in files})) > 1:
        raise DataError(f"{name}: holds files of {' and '.join(kinds)}; set `format`, or make a source of each")
    _refuse_settings(name, source, "files", ("subset", "revision"))
    if kinds == ["text"]:
        _refuse_settings(name, source, "text files", ("column", "ignore_columns"))
    if source.split != "train" and not (path / "dataset_dict.json").exists():
        raise DataError(f"{name}: `split: {source.split}` has no meaning to these files; name the split's own files")
    return files


def _refuse_settings(name: str, source: SourceSettings, what: str, settings: Sequence[str]) -> None:
    for setting in settings:
        if getattr(source, setting):
            raise DataError(f"{name}: `{setting}` has no meaning to {what}; leave it out")


def _folder_files(name: str, source: SourceSettings, folder: Path) -> list[DataFile]:
    """All files of the wanted format below a folder; of several splits that `save_to_disk` wrote, the wanted one."""
    if (folder / "dataset_dict.json").exists():
        folder = folder / source.split
        if not folder.is_dir():
            raise DataError(f"{name}: has no split {source.split!r}; set `split`")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return _saved_files(name, folder)
    files, aside = [], []
    for file in _walk(folder):
        if (format := _ending_format(file)) and source.format in ("auto", format) or source.format == "text":
            files.append(
                DataFile(file, str(file.relative_to(folder)), source.format if source.format != "auto" else format)
            )
        elif (remedy := _remedy(file)) and (
            source.format == "auto" or _ending_format(file.with_suffix("")) == source.format
        ):
            raise DataError(f"{name}: file {file} cannot be read here: {remedy}, or move it out of the folder")
        else:
            aside.append(file)
    if not files:
        what = "json, parquet, arrow or text" if source.format == "auto" else source.format
        raise DataError(f"{name}: there is no {what} file in {folder}")
    _say_aside(name, aside)
    return files


def _saved_files(name: str, folder: Path) -> list[DataFile]:
    """What `save_to_disk` wrote: its own list, since `datasets` may have put files of its cache beside them."""
    try:
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [DataFile(folder / entry["filename"], entry["filename"], "arrow") for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{name}: {folder / 'state.json'} does not list the data set's files ({first_line(error)}); save it again, "
            f"or name the files: {folder}/*.arrow"
        ) from error


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in the order of their paths, through links to folders too; hidden ones are left aside."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            found += [Path(here, name) for name in files if not name.startswith(".")]
        seen.add(real)
    return iter(sorted(found))


def _raise(error: OSError) -> None:
    raise error


def _glob_files(name: str, source: SourceSettings, pattern: Path) -> list[DataFile]:
    matches = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    files = [match for match in matches if not match.is_dir()]
    if not files:
        raise DataError(f"{name}: no file matches; the pattern is looked up in {Path.cwd()}")
    if "**" not in source.path:  # which matches folders on its way
        _say_aside(name, [match for match in matches if match.is_dir()])
    root = Path(os.path.commonpath([file.parent for file in files]))
    return [DataFile(file, str(file.relative_to(root)), _format(file, source)) for file in files]


def _say_aside(name: str, aside: list[Path]) -> None:
    if aside:
        examples = ", ".join(str(path) for path in aside[:3])
        logger.warning("%s: left aside %d that are not data by their ending: %s", name, len(aside), examples)


def _library_files(name: str) -> list[DataFile]:
    """This Python's own modules that hold anything, without tests and installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(folder).parts)]
    files = sorted((path for path in files if path.stat().st_size), key=lambda path: path.relative_to(folder).parts)
    if not files:
        raise DataError(f"{name}: this Python keeps no source files in {folder}; name files of your own instead")
    return [DataFile(path, str(path.relative_to(folder)), "text") for path in files]


def _format(path: Path, source: SourceSettings) -> str:
    return (_ending_format(path) or "") if source.format == "auto" else source.format


def _ending_format(path: Path) -> str | None:
    suffixes = path.name.lower().split(".")[1:]
    if suffixes and f".{suffixes[-1]}" in _OPENERS:
        suffixes.pop()
        return {"json": "json", "text": "text"}.get(_ENDINGS.get(suffixes[-1], "")) if suffixes else None
    return _ENDINGS.get(suffixes[-1]) if suffixes else None


def _remedy(path: Path) -> str | None:
    suffixes = path.name.lower().split(".")[1:]
    if not suffixes:
        return None
    if f".{suffixes[-1]}" in _OPENERS:
        return "unpack it; only json and text files are read compressed" if len(suffixes) > 1 else None
    return _REMEDIES.get(suffixes[-1])


def _what_to_do(path: Path) -> str:
    if remedy := _remedy(path):
        return f"file {path} cannot be read here: {remedy}"
    known = ", ".join(f".{ending}" for ending in _ENDINGS)
    return f"the ending of {path} does not say its format (known: {known}); set `format` of the source"


# ---- reading ----


def read_source(name: str, source: SourceSettings, files: list[DataFile] | None) -> Iterator[Found]:
    if files is None:
        yield from _read_hub(name, source)
        return
    for file in files:
        reader = {"text": _read_text, "json": _read_json, "parquet": _read_parquet, "arrow": _read_arrow}[file.format]
        try:
            if not stat.S_ISREG(file.path.stat().st_mode):
                yield Found(file.path, None, Problem("unreadable", "cannot be read: it is not an ordinary file"))
                continue
        except OSError as error:
            yield Found(file.path, None, unreadable(error))
            continue
        row = None
        try:
            for found in reader(file, source):
                row = found.row
                yield found
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, NotImplementedError) as error:
            # pyarrow also fails where nobody expects it, as in the names of columns
            yield Found(file.path, None if row is None else row + 1, unreadable(error))


def _read_text(file: DataFile, source: SourceSettings) -> Iterator[Found]:
    """The whole file is one document."""
    try:
        with _open(file) as stream:
            content: str | Problem = _decoded(stream.read())
    except _READ_ERRORS as error:
        content = unreadable(error)
    if isinstance(content, str):
        content = document_of({"text": content}, source) if content else EMPTY
    yield Found(file.path, None, content)


def _decoded(content: bytes) -> str | Problem:
    problem = _not_utf8(content[:256])
    return problem or content.removeprefix(codecs.BOM_UTF8).decode("utf-8")


def _open(file: DataFile) -> io.BufferedIOBase:
    return _OPENERS.get(file.compression, open)(file.path, "rb")


def _not_utf8(head: bytes) -> Problem | None:
    """What a file is that should hold UTF-8, by its first bytes."""
    for signature, sentence in _SIGNATURES:
        if head.startswith(signature):
            return Problem("unreadable", f"cannot be read: it {sentence}")
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return Problem("unreadable", "cannot be read: it is compressed with bzip2: let its name end in .bz2")
    if width := _width(head):
        code = f"UTF-{8 * width}"
        return Problem("unreadable", f"cannot be read: it is {code}; convert it (`iconv -f {code} -t UTF-8`)")
    return None


def _width(head: bytes) -> int | None:
    """Bytes per character of a text that is not UTF-8: by its byte-order mark, or since all but one of them are 0."""
    marked = {4: (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), 2: (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    for width, marks in marked.items():
        columns = [head[at::width] for at in range(width)]
        one_is_text = sum(map(all, columns)) == 1 and sum(map(any, columns)) == 1
        if head.startswith(marks) or one_is_text and len(head) >= 8:
            return width
    return None


def unreadable(error: BaseException) -> Problem:
    return Problem("unreadable", f"cannot be read: {first_line(error).rstrip('.')}")


# ---- JSON ----


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Problem:
    columns = dict(pairs)
    if len(columns) == len(pairs):
        return columns
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return Problem("broken JSON", f"gives column `{twice}` twice; which one counts cannot be known")


class _Interned(dict):
    """Numbers by their digits: equal ones are one object, so that a long list of ids takes 8 bytes each."""

    def __missing__(self, digits: str) -> int:
        if len(self) > 1 << 18:
            self.clear()
        number = self[digits] = int(digits)
        return number


def _decoder(size: int) -> json.JSONDecoder:
    return (
        _PLAIN if size < LONG else json.JSONDecoder(object_pairs_hook=_unique, parse_int=_Interned().__getitem__)
    )


_PLAIN = json.JSONDecoder(object_pairs_hook=_unique)


def _read_json(file: DataFile, source: SourceSettings) -> Iterator[Found]:
    """One object per line, or one array of objects. A broken line is one bad document."""
    row: int | None = None
    try:
        with _open(file) as stream:
            head = stream.read(4096)
            stream.seek(0)
            if problem := _not_utf8(head):
                yield Found(file.path, None, problem)
                return
            is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            row = 0
            nothing = True
            for content in (_array_rows if is_array else _line_rows)(stream, source):
                if content is not None:
                    nothing = False
                    yield Found(file.path, row, content)
                row += 1
            if nothing:
                yield Found(file.path, None, NO_ROWS)
    except _READ_ERRORS as error:
        yield Found(file.path, row, unreadable(error))


def _line_rows(stream: io.BufferedIOBase, source: SourceSettings) -> Iterator[Document | Problem | None]:
    """A row per line; None for an empty one."""
    while line := stream.readline():
        line = line.removeprefix(codecs.BOM_UTF8)  # in front of the first, and of others where files were joined
        if not line or line.isspace():
            yield None
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            content: Document | Problem = unreadable(error)
        else:
            del line  # of a long line, as few copies as possible exist at the same time
            content = _from_line(text, source)
            del text
        yield content
        del content


def _from_line(text: str, source: SourceSettings) -> Document | Problem:
    try:
        value = _decoder(len(text)).decode(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            advice = "the line ends within a value; an object must be on one line (`jq -c .` writes it so)"
        else:
            advice = "a line is one object, or the file one array of objects"
        return Problem("broken JSON", f"is not JSON ({error}); {advice}")
    except (ValueError, RecursionError) as error:
        return _too_much(error)
    return _from_value(value, source)


def _too_much(error: Exception) -> Problem:
    what = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
    return Problem("broken JSON", f"is not JSON that can be read: {what}")


def _from_value(value: Any, source: SourceSettings) -> Document | Problem:
    if isinstance(value, Problem):
        return value
    if not isinstance(value, dict):
        return Problem("broken JSON", f"is a {type(value).__name__}, not an object with columns")
    return document_of(value, source)


def _array_rows(stream: io.BufferedIOBase, source: SourceSettings) -> Iterator[Document | Problem | None]:
    """A row per element; after a broken one, nothing can be said about the rest."""
    text = _Text(stream)
    try:
        text.skip_space()
        text.take("[")
        text.skip_space()
        if not text.take("]"):
            while True:
                content = _from_value(text.value(), source)
                yield content
                del content
                text.skip_space()
                if text.take("]"):
                    break
                if not text.take(","):
                    raise _Broken(f"{text.found()}, where a comma or the array's end belongs")
                text.skip_space()
        text.skip_space()
        if not text.at_end():
            raise _Broken(f"{text.found()}, after the array's end")
    except _Broken as error:
        yield Problem("broken JSON", f"is not a JSON array: {error}; nothing is read from here on")


class _Broken(Exception):
    """Where an array goes on cannot be known."""


class _Text:
    """A stream of UTF-8 that is looked at from front to back, a chunk at a time."""

    def __init__(self, stream: io.BufferedIOBase):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False

    def _more(self, least: int = 1) -> None:
        parts = [self._text[self._at :]]
        wanted = len(parts[0]) + least
        size = len(parts[0])
        while size < wanted and not self._ended:
            chunk = self._stream.read1(CHUNK)
            self._ended = not chunk
            parts.append(self._decoder.decode(chunk, final=self._ended))
            size += len(parts[-1])
        self._text, self._at = "".join(parts), 0

    def skip_space(self) -> None:
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return
            self._more()

    def take(self, sign: str) -> bool:
        found = self._text.startswith(sign, self._at)
        self._at += found
        return found

    def at_end(self) -> bool:
        return self._at == len(self._text) and self._ended

    def found(self) -> str:
        return "it ends" if self.at_end() else f"there is {self._text[self._at : self._at + 20]!r}"

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            size = len(self._text) - self._at
            try:
                value, end = _decoder(size).raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                # cut off by the chunk's end, if it fails there; 16 characters hold any escape and any word of JSON
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if self._ended or not cut:
                    raise _Broken(f"{self.found()} ({error.msg})") from None
            except (ValueError, RecursionError) as error:
                raise _Broken(_too_much(error).sentence) from None
            self._more(max(size, 1))
        begin, self._at = self._at, end
        if not self._text.isascii() and _BYTES_NOT_UTF8.search(self._text, begin, end):
            return Problem("unreadable", "cannot be read: it is not UTF-8")
        if self._at > CHUNK:
            self._text, self._at = self._text[self._at :], 0
        return value


# ---- tables ----


def _read_parquet(file: DataFile, source: SourceSettings) -> Iterator[Found]:
    try:
        table = pq.ParquetFile(pa.OSFile(os.fsencode(file.path)), page_checksum_verification=True)
        names, meta = table.schema_arrow.names, table.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        if sum(sizes) != meta.num_rows:
            raise ValueError(f"it says it has {meta.num_rows} rows, and its row groups say {sum(sizes)}")
    except Exception as error:  # pyarrow raises all kinds; each means that the file cannot be read
        yield Found(file.path, None, unreadable(error))
        return
    if problem := _column_problem(names, source) if sum(sizes) else NO_ROWS:
        yield Found(file.path, None, problem)
        return
    columns, first = columns_to_read(names, source), 0
    for groups, batch_rows in _runs_of_groups(meta, sizes):
        num_rows, row = sum(sizes[group] for group in groups), first
        batches = _group_batches(table, batch_rows, groups, columns)
        if len(groups) > 1:
            batches = _complete(batches, num_rows)
        while row < first + num_rows:
            batch = _next(batches)
            if not isinstance(batch, pa.RecordBatch):
                yield from _damaged_groups(table, file.path, groups, sizes, first, row, names, source)
                break
            for content in _table_rows(batch, names, source):
                yield Found(file.path, row, content)
                row += 1
        first += num_rows


def _group_batches(
    table: pq.ParquetFile, batch_rows: int, groups: Sequence[int], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Nothing is looked at, and can fail, before the first batch is asked for."""
    yield from table.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False)


def _complete(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of several groups, or none if some are missing: which ones, only each group alone can tell."""
    try:
        found = list(batches)
    except Exception:  # as above; what it was is said when the groups are read alone
        found = []
    return iter(found if sum(batch.num_rows for batch in found) == num_rows else [])


def _next(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | Problem:
    try:
        return next(batches)
    except StopIteration:
        return Problem("unreadable", "cannot be read: rows are missing")
    except Exception as error:  # as above
        return unreadable(error)


def _damaged_groups(
    table: pq.ParquetFile,
    path: Path,
    groups: Sequence[int],
    sizes: Sequence[int],
    first: int,
    done: int,
    names: Sequence[str],
    source: SourceSettings,
) -> Iterator[Found]:
    """Row by row, from row `done` on, what can be read of row groups that begin at row `first`; each group until its
    damage."""
    for group in groups:
        batches = _group_batches(table, 1, [group], columns_to_read(names, source))
        for row in range(first, first + sizes[group]):
            batch = _next(batches)
            if isinstance(batch, Problem):
                rest = f"; rows {row} to {first + sizes[group] - 1}, the rest of its row group, are lost"
                yield Found(path, max(row, done), Problem(batch.reason, batch.sentence + rest))
                break
            if row >= done:
                yield from (Found(path, row, content) for content in _table_rows(batch, names, source))
        first += sizes[group]


def _runs_of_groups(meta: pq.FileMetaData, sizes: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Row groups to read together, without those that have no rows, and how many rows at a time keep memory small.

    Only a group's own size is looked at: asking a damaged file for those of its columns can end the process."""
    run: list[int] = []
    run_rows = run_bytes = 0
    for group, num_rows in enumerate(sizes):
        if num_rows <= 0:
            continue
        num_bytes = EXPANSION * max(meta.row_group(group).total_byte_size, 0)
        if run and run_bytes + num_bytes > BATCH_BYTES:
            yield run, _batch_rows(run_rows, run_bytes)
            run, run_rows, run_bytes = [], 0, 0
        run, run_rows, run_bytes = [*run, group], run_rows + num_rows, run_bytes + num_bytes
    if run:
        yield run, _batch_rows(run_rows, run_bytes)


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(num_bytes, 1)))


def _read_arrow(file: DataFile, source: SourceSettings) -> Iterator[Found]:
    row = 0
    try:
        batches, names = _arrow_batches(file.path, source)
    except Exception as error:  # pyarrow raises all kinds; each means that the file cannot be read
        yield Found(file.path, None, unreadable(error))
        return
    problem = _column_problem(names, source)
    while (batch := next(batches, None)) is not None:
        if isinstance(batch, Problem):
            yield Found(file.path, row, batch)
            return
        if problem and batch.num_rows:
            yield Found(file.path, None, problem)
            return
        for content in _valid_rows(batch, names, source):
            yield Found(file.path, row, content)
            row += 1
    if not row:
        yield Found(file.path, None, NO_ROWS)


def _arrow_batches(path: Path, source: SourceSettings) -> tuple[Iterator[pa.RecordBatch | Problem], list[str]]:
    """Record batches of the columns that matter, and the names of all columns. Arrow has a file and a stream format."""
    mapped = pa.memory_map(os.fsencode(path))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    open_any = pa.ipc.open_file if is_file else pa.ipc.open_stream
    names = open_any(mapped).schema.names
    columns = columns_to_read(names, source)
    mapped.seek(0)
    included = [number for number, name in enumerate(names) if name in columns]
    reader = open_any(mapped, options=pa.ipc.IpcReadOptions(included_fields=included) if included else None)
    return _batches_of(reader, is_file), names


def _batches_of(reader: Any, is_file: bool) -> Iterator[pa.RecordBatch | Problem]:
    numbers = range(reader.num_record_batches) if is_file else itertools.count()
    for number in numbers:
        try:
            yield reader.get_batch(number) if is_file else reader.read_next_batch()
        except StopIteration:
            return
        except Exception as error:  # as above
            yield unreadable(error)
            return


def _valid_rows(batch: pa.RecordBatch, names: Sequence[str], source: SourceSettings) -> Iterator[Document | Problem]:
    """An arrow file is mapped as it is: offsets that a damage bent must not be followed."""
    try:
        batch.validate()
    except Exception as error:  # as above
        yield unreadable(error)
        return
    try:
        batch.validate(full=True)
        yield from _table_rows(batch, names, source)
        return
    except pa.ArrowException:
        pass
    for number in range(batch.num_rows):
        one = batch.slice(number, 1)
        try:
            one.validate(full=True)
        except Exception as error:  # as above
            yield unreadable(error)
        else:
            yield from _table_rows(one, names, source)


def _read_hub(name: str, source: SourceSettings) -> Iterator[Found]:
    rows = 0
    try:
        data = datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision, streaming=True
        )
        for table in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
            if problem := _column_problem(table.column_names, source):
                yield Found(None, None, problem)
                return
            read = table.select(columns_to_read(table.column_names, source))
            for batch in read.to_batches():
                for content in _table_rows(batch, table.column_names, source):
                    yield Found(None, rows, content)
                    rows += 1
    except Exception as error:  # as above, and everything a network can do
        where = "neither a file or folder here nor" if source.format == "auto" else "not"
        raise DataError(
            f"{name}: is {where} a data set on the Hugging Face hub that can be read: {first_line(error)} (after "
            f"{rows} rows). Check the name, `subset`, `split` and `revision`, and that this machine reaches the hub"
        ) from error


def _column_problem(names: Sequence[str], source: SourceSettings) -> Problem | None:
    """What is wrong with a table's every row."""
    for name in names:
        if names.count(name) > 1:
            return Problem("a column twice", f"has column `{name}` twice; which one counts cannot be known")
    if not columns_to_read(names, source):
        problem = document_of({}, source, tuple(names))
        assert isinstance(problem, Problem)
        return problem
    return None


def _table_rows(batch: pa.RecordBatch, names: Sequence[str], source: SourceSettings) -> Iterator[Document | Problem]:
    read = batch.schema.names
    wanted = set(columns_to_read(names, source)) & set(read)
    others = tuple(name for name in names if name not in wanted)
    read = [name for name in read if name in wanted]
    for values in zip(*(_values(batch.column(name)) for name in read), strict=True):
        broken = [value for value in values if isinstance(value, Problem)]
        yield broken[0] if broken else document_of(dict(zip(read, values, strict=True)), source, others)


def _values(array: pa.Array) -> Iterator[Any]:
    """A column's values: text, numbers, lists of numbers as arrays; None for a null."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    type, types = array.type, pa.types
    shown = type.value_type if types.is_dictionary(type) else type
    if _is_text(shown):
        return map(_text_value, array)
    if types.is_boolean(shown) or types.is_integer(shown) or types.is_floating(shown) or types.is_null(shown):
        return (value.as_py() for value in array)
    if _is_list(type) and (_is_number(type.value_type) or types.is_null(type.value_type)):
        return map(_list_value, array)
    return (Opaque(str(type)) if valid else None for valid in array.is_valid().to_pylist())


def _is_text(type: pa.DataType) -> bool:
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _is_list(type: pa.DataType) -> bool:
    kinds = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    return isinstance(type, kinds)


def _is_number(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_boolean(type)


def _text_value(value: pa.Scalar) -> str | Problem | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return unreadable(error)


def _list_value(value: pa.Scalar) -> Any:
    """A list's numbers as an array, without a copy where that is possible; as a list where there are nulls."""
    if not value.is_valid:
        return None
    items = value.values
    if pa.types.is_dictionary(items.type):
        items = items.dictionary_decode()
    if items.null_count or pa.types.is_null(items.type):
        return items.to_pylist()
    return items.to_numpy(zero_copy_only=False)
