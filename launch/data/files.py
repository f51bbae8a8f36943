"""Which files does a source mean, in which order?

`find_files` goes by endings, and refuses what looks like data but cannot be read: nothing that lies in a folder is
passed over without a word."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import logging
import lzma
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distca.config import SourceSettings
from distca.errors import DataError, first_line
from distca.launch.data.documents import Document, Problem
from distca.paths import expanded, looks_local, matching

logger = logging.getLogger(__name__)

_ENDINGS = {"json": "json", "jsonl": "json", "ndjson": "json", "parquet": "parquet", "arrow": "arrow", "txt": "text"}
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
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
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SPLITS = dict.fromkeys(("valid", "val", "dev"), "validation")
NO_ROWS = Problem("without rows", "has no rows")


@dataclass(frozen=True, slots=True)
class DataFile:
    path: Path
    name: str  # within the source
    format: str  # json, parquet, arrow or text

    @property
    def compression(self) -> str:
        suffix = self.path.suffix.lower()
        return suffix if suffix in OPENERS and self.format in ("json", "text") else ""


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


def find_files(name: str, source: SourceSettings, cache: Path | None = None) -> list[DataFile] | None:
    """A source's files in a fixed order; None for a data set on the hub. What lies in `cache` is none of them."""
    if source.path == "python-stdlib":
        _refuse_settings(name, source, "the standard library", ("subset", "revision", "column", "ignore_columns"))
        return _library_files(name)
    path = expanded(source.path)
    if source.format == "hub":
        return None
    if path.is_dir():
        files = _folder_files(name, source, path, cache)
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


def _folder_files(name: str, source: SourceSettings, folder: Path, cache: Path | None) -> list[DataFile]:
    """All files of the wanted format below a folder; of several splits that `save_to_disk` wrote, the wanted one."""
    if (folder / "dataset_dict.json").exists():
        folder = folder / source.split
        if not folder.is_dir():
            raise DataError(f"{name}: has no split {source.split!r}; set `split`")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return _saved_files(name, folder)
    files, aside = [], []
    for file in sorted(below(folder, cache)):
        if (format := _ending_format(file)) and source.format in ("auto", format) or source.format == "text":
            files.append(
                DataFile(file, str(file.relative_to(folder)), source.format if source.format != "auto" else format)
            )
        elif (remedy := _remedy(file)) and (
            source.format == "auto" or _ending_format(file.with_suffix("")) == source.format
        ):
            aside_too = "set `format`, which leaves other files aside, or " if source.format == "auto" else ""
            raise DataError(
                f"{name}: file {file} cannot be read here: {remedy}, or {aside_too}move it out of the folder"
            )
        else:
            aside.append(file)
    if not files:
        what = "json, parquet, arrow or text" if source.format == "auto" else source.format
        hint = f"; of other files say what they are: `path: {folder}/*` with `format`" if aside else ""
        raise DataError(f"{name}: there is no {what} file in {folder}, by its ending{hint}")
    _say_aside(name, aside)
    _say_splits(name, files)
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


def below(folder: Path, cache: Path | None) -> Iterator[Path]:
    """Files below a folder, in no order, through links to folders too; hidden ones are left aside, and `cache`."""
    seen = {os.path.realpath(cache)} if cache else set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(here, name) for name in files if not name.startswith("."))
        seen.add(real)


def _raise(error: OSError) -> None:
    raise error


def _glob_files(name: str, source: SourceSettings, pattern: Path) -> list[DataFile]:
    matches = matching(pattern)
    files = [match for match in matches if not match.is_dir()]
    if not files:
        raise DataError(f"{name}: no file matches; the pattern is looked up in {Path.cwd()}")
    if "**" not in source.path:  # which matches folders on its way
        _say_aside(name, [match for match in matches if match.is_dir()])
    root = Path(os.path.commonpath([file.parent for file in files]))
    found = [DataFile(file, str(file.relative_to(root)), _format(file, source)) for file in files]
    _say_splits(name, found)
    return found


def _say_splits(name: str, files: Sequence[DataFile]) -> None:
    """A folder's files are all trained on, which who has a data set's test split in it may not want."""
    found: dict[str, str] = {}
    for file in files:
        for part in Path(file.name).parts:
            if word := re.match(r"(train|test|validation|valid|val|dev|eval)(?![^\W\d_])", part.lower()):
                found.setdefault(_SPLITS.get(word[1], word[1]), file.name)
    if len(found) > 1:
        examples = ", ".join(map(repr, found.values()))
        logger.warning(
            "%s: by their names there are several splits (%s), and all are trained on; name one's files if that is not "
            "meant",
            name,
            examples,
        )


def _say_aside(name: str, aside: list[Path]) -> None:
    if aside:
        examples = ", ".join(map(shown, aside[:3]))
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
    if suffixes and f".{suffixes[-1]}" in OPENERS:
        suffixes.pop()
        return {"json": "json", "text": "text"}.get(_ENDINGS.get(suffixes[-1], "")) if suffixes else None
    return _ENDINGS.get(suffixes[-1]) if suffixes else None


def _remedy(path: Path) -> str | None:
    suffixes = path.name.lower().split(".")[1:]
    if not suffixes:
        return None
    if f".{suffixes[-1]}" in OPENERS:
        return "unpack it; only json and text files are read compressed" if len(suffixes) > 1 else None
    return _REMEDIES.get(suffixes[-1])


def _what_to_do(path: Path) -> str:
    if remedy := _remedy(path):
        return f"file {path} cannot be read here: {remedy}"
    known = ", ".join(f".{ending}" for ending in _ENDINGS)
    return f"the ending of {path} does not say its format (known: {known}); set `format` of the source"
