"""Are these the same data as before?

Prepared documents are known by what decides them: the contents of the files in their order, the tokenizer's contents,
and the settings that have a say. Names, places and times have none, so what was touched, copied or moved is the same.

Reading all files again just to know that would be slow, so their digests are kept in `digests.json` beside the prepared
documents, valid while a file's size, times and inode stay. That is a short cut and never the truth: a file that was
changed a moment ago is not trusted to show its next change by its time, and is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distca.config import DataSettings, SourceSettings
from distca.launch.data.batches import LABELS, LENGTHS, META, TOKENS
from distca.launch.data.encode import tokenizer_name
from distca.launch.data.files import DataFile
from distca.paths import expanded

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3  # of the stored files and of everything that decides their content
DIGESTS = "digests.json"
SETTLED_S = 2.0  # a file changed less long ago may change again without another time stamp
MAX_DIGESTS = 200_000
UNREADABLE = "unreadable"

_TOKENIZER_FILE = re.compile(
    r".*(token|vocab|merges|tekken|dict|emoji).*\.(json|txt)|.*\.(model|tiktoken|spm|bpe|vocab|codes)"
)
_DECIDES_CLASS = ("model_type", "tokenizer_class")  # in a folder's config.json


def find_prepared(cache: Path, identity: str) -> Path | None:
    """The prepared documents of this identity, if they are still there; their sources need not be."""
    folder = expanded(cache) / identity
    return folder if (folder / META).exists() else None


def content_of(digests: Iterable[str]) -> str:
    """The digest of all that training sees, from those of ids, lengths and labels."""
    return hashlib.blake2b(b"".join(map(bytes.fromhex, digests)), digest_size=16).hexdigest()


def content_there(folder: Path) -> str | None:
    """What `content` in a prepared folder's description has to be, by its files; None where one cannot be read."""
    files = [folder / TOKENS, folder / LENGTHS, folder / LABELS]
    digests = digests_of(files, folder.parent)
    if not files[-1].exists():
        digests[-1] = hashlib.blake2b(digest_size=16).hexdigest()
    return None if UNREADABLE in digests else content_of(digests)


def identity(
    settings: DataSettings,
    source: SourceSettings,
    files: Iterable[tuple[DataFile, str]] | None,
    tokenizer: Any,
    vocab_size: int,
) -> str:
    """Equal for equal documents: everything that decides what is stored, and nothing else. A weight does not."""
    decides = {
        "version": FORMAT_VERSION,
        "files": [(file.format, file.compression, digest) for file, digest in files or []],
        "hub": None if files is not None else [source.path, source.subset, source.split, source.revision],
        "column": source.column,
        "ignore_columns": sorted(source.ignore_columns),
        "tokenizer": tokenizer,
        "append_eos": settings.append_eos,
        "control_tokens": settings.control_tokens,
        "on_bad_document": settings.on_bad_document,
        "vocab_size": vocab_size,
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenizer_identity(settings: DataSettings, model_path: str | None, model_revision: str | None, cache: Path) -> Any:
    """A local tokenizer is known by the contents of its files, one on the hub by its name and revision."""
    name = tokenizer_name(settings, model_path)
    folder = expanded(name)
    if name == "bytes" or not folder.exists():
        return [name, settings.tokenizer_revision if settings.tokenizer else model_revision]
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in found if _TOKENIZER_FILE.fullmatch(path.name.lower()) and path.is_file()]
    digests = [[path.name, digest] for path, digest in zip(files, digests_of(files, cache), strict=True)]
    return [*digests, *_class_of(folder)]


def _class_of(folder: Path) -> list[Any]:
    """Equal files are another tokenizer in the hands of another class, which the model's configuration may choose."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return [config.get(key) for key in _DECIDES_CLASS]
    except (OSError, ValueError, AttributeError, RecursionError):
        return []


def digests_of(files: list[Path], cache: Path) -> list[str]:
    """The digests of files' contents; of one that cannot be read, `UNREADABLE`: reading it will say why."""
    known = _read_digests(cache / DIGESTS)
    stamps = stamps_of(files)
    names = [str(file.absolute()) for file in files]
    fresh = [number for number, name in enumerate(names) if known.get(name, [None])[:-1] != stamps[number]]
    result = [known.get(name, [UNREADABLE])[-1] for name in names]
    if fresh:
        total = sum(stamps[number][0] for number in fresh)
        if total > 1 << 30:
            logger.info("looking at the contents of %d files, %.1f GB", len(fresh), total / 1e9)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for number, digest in zip(fresh, pool.map(lambda number: _digest(files[number]), fresh), strict=True):
                result[number] = digest
        now = time.time_ns()
        learnt = {
            names[number]: [*stamps[number], result[number]]
            for number in fresh
            if result[number] != UNREADABLE
            and _stamp(files[number]) == stamps[number]
            and now - max(stamps[number][1:3]) > SETTLED_S * 1e9
        }
        _keep_digests(cache / DIGESTS, learnt)
    return result


def stamps_of(files: Iterable[Path]) -> list[list[int]]:
    """What changes when files do."""
    return [_stamp(file) for file in files]


def _stamp(file: Path) -> list[int]:
    """Also a program that sets the time back is noticed: it changes the time of the last change of status."""
    try:
        stat = file.stat()
    except OSError:
        return [-1, -1, -1, -1]
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        if not file.is_file():  # a pipe would be waited for
            return UNREADABLE
        with open(file, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return UNREADABLE
    return digest.hexdigest()


def _read_digests(path: Path) -> dict[str, list]:
    """Name to [size, mtime, ctime, inode, digest]; whatever cannot be read counts as not known."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: entry
            for name, entry in known.items()
            if isinstance(entry, list) and len(entry) == 5 and re.fullmatch(r"[0-9a-f]{32}", str(entry[-1]))
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _keep_digests(path: Path, learnt: dict[str, list]) -> None:
    """Two runs at once may lose each other's entries, which are then made again; no reader sees half a file."""
    if not learnt:
        return
    entries = {**_read_digests(path), **learnt}
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(dict(list(entries.items())[-MAX_DIGESTS:])), encoding="utf-8")
        draft.replace(path)
    except OSError as error:  # a short cut only; whether documents can be stored will be seen
        with contextlib.suppress(OSError):
            draft.unlink()
        logger.debug("%s is not kept: %s", path, error)
