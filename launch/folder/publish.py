"""How does a checkpoint become one that can be trusted?

    with publishing(folder, step, facts) as draft:     # draft: an empty folder, to be filled by any number of processes
        save_everything_into(draft)
    newest(folder)                                     # Published(path=folder/step-000012, step=12, facts=…)

A checkpoint is published, not written: files, a manifest with their checksums, fsync, one atomic rename. Promised:
  - whatever is called step-… was complete when it got that name; killing the writer at any moment changes no older one;
  - a checkpoint that is read has been checked byte for byte; a bad one is named, and the one before it is taken aloud;
  - asked for a checkpoint where none can be read, there is an error, never a silent start from nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distca.errors import DataError, TryAgain
from distca.launch.process.unforeseen import full_disk, room
from distca.metrics import bytes_text

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
LATEST = "latest"  # holds the name of the newest, for people and other tools; `newest` looks for itself
ALMOST_FULL_BYTES = 1 << 20  # a library may report a full disk as any error; with less than this left, it was that


class NoSpace(TryAgain):
    """The disk is full. What was published before is untouched; with room on the disk the run can go on from there."""


class BrokenCheckpoint(DataError):
    """A checkpoint that is not as it was published; the text names the file."""


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint that was found to be as it was written."""

    path: Path
    step: int
    facts: Mapping[str, Any]  # what the writer wanted to be known


@contextlib.contextmanager
def publishing(
    folder: str | Path, step: int, facts: Mapping[str, Any], *, needed_bytes: int | None = None
) -> Iterator[Path]:
    """An empty folder to write the checkpoint of `step` into; published when the block ends, removed if it raises.

    `facts` (JSON values) is read at the end, so the block may add to it. With `needed_bytes`, space is checked first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    if needed_bytes is not None:
        require_space(folder, needed_bytes)
    draft = folder / f".{_name(step)}.partial-{_me()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        yield draft
        _publish(folder, draft, step, facts)
    except BaseException as error:
        full, written, free = _is_full_disk(error, folder), _size(draft), room(folder)
        shutil.rmtree(draft, ignore_errors=True)
        if full:
            needs = f"{bytes_text(needed_bytes)}" if needed_bytes is not None else f"more than {bytes_text(written)}"
            raise NoSpace(
                f"no room for the checkpoint of step {step} in {folder}: it needs {needs}, {bytes_text(written)} were "
                f"written when the disk was full ({free}). {_kept(folder)}; make room there, or lower checkpoint.keep, "
                "and go on from it"
            ) from error
        raise


def require_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise `NoSpace` unless the folder's disk has that many bytes free."""
    free = room(folder)
    if not free.files or free.bytes < needed_bytes:
        raise NoSpace(
            f"no room in {folder}: {bytes_text(needed_bytes)} are needed, {free}. "
            "Nothing was written; free some space, or lower checkpoint.keep."
        )


def newest(folder: str | Path, *, strict: bool = False) -> Published:
    """The newest checkpoint that is as it was published; with `strict`, the newest, or an error if it is broken."""
    folder = Path(folder)
    paths = _published(folder)
    found = []
    for path in paths:
        try:
            checkpoint = verify(path)
        except BrokenCheckpoint as error:
            if strict:
                raise
            found.append(str(error))
            logger.warning("%s; trying the checkpoint before it", error)
            continue
        if found:
            logger.warning("going back to the checkpoint of step %d: %s", checkpoint.step, checkpoint.path)
        return checkpoint
    if not folder.is_dir():
        found.append("there is no such folder")
    elif not paths:
        found.append("no folder is called step-…; it holds " + (", ".join(sorted(os.listdir(folder))[:8]) or "nothing"))
    raise DataError(
        f"no checkpoint to resume from in {folder}: {'; '.join(found)}. Name a folder that has some, or start afresh "
        "without resuming."
    )


def verify(path: str | Path) -> Published:
    """Read every byte of a checkpoint and compare with its manifest; raise `BrokenCheckpoint`, naming the file."""
    path = Path(path)
    manifest = _read_manifest(path)
    for name, noted in manifest["files"].items():
        _check_size(path / name, noted["bytes"])
        try:
            digest = _digest(path / name)
        except OSError as error:
            raise BrokenCheckpoint(f"{path / name}: cannot be read: {error.strerror}") from None
        if digest != noted["blake2b"]:
            raise BrokenCheckpoint(f"{path / name}: its bytes have changed since it was published (checksum)")
    return Published(path, manifest["step"], manifest["facts"])


def steps_published(folder: str | Path) -> list[int]:
    """Of which steps there are checkpoints that lack no bytes, newest first; for a sentence: nothing is read again."""
    return [_step_of(path) for path in _published(Path(folder)) if _is_complete(path)]


def prune(folder: str | Path, keep: int, last: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints up to step `last`, the one just published; returns what was removed.

    Those of later steps go: the run went back behind them, so they are broken, or of a course that was not taken.
    Those that lack bytes do not count and the newest complete one always stays. Bytes are not read again for this.
    """
    assert keep >= 1, f"keep {keep} checkpoints"
    folder = Path(folder)
    _sweep(folder)
    paths = _published(folder)
    complete = [path for path in paths if _step_of(path) <= last and _is_complete(path)]
    if not complete:
        return []
    oldest = complete[:keep][-1]
    removed = [path for path in paths if not _step_of(oldest) <= _step_of(path) <= last]
    for path in removed:
        _remove(path)
    return removed


def _publish(folder: Path, draft: Path, step: int, facts: Mapping[str, Any]) -> None:
    files, folders = [], [draft]
    for place, inner, names in os.walk(draft):
        folders += [Path(place, name) for name in inner]
        files += [Path(place, name) for name in names]
    noted = {}
    for path in sorted(files):
        assert path.is_file() and not path.is_symlink(), f"{path}: only plain files can be published"
        _sync(path)
        noted[path.relative_to(draft).as_posix()] = {"bytes": path.stat().st_size, "blake2b": _digest(path)}
    assert MANIFEST not in noted, f"{MANIFEST} is ours to write"
    body = {"format": FORMAT, "step": step, "facts": dict(facts), "files": noted}
    _write(draft / MANIFEST, json.dumps({**body, "self": _digest_of(body)}, indent=1, ensure_ascii=False))
    for path in folders:
        _sync(path)
    target = folder / _name(step)
    if target.exists():  # of a run that went back behind it
        os.rename(target, _hidden(target))
    os.rename(draft, target)
    _sync(folder)
    pointer = folder / f".{LATEST}.partial-{_me()}"
    _write(pointer, target.name + "\n")
    os.replace(pointer, folder / LATEST)
    _sync(folder)
    _sweep(folder)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "self"}
        intact = manifest["self"] == _digest_of(body)
    except OSError as error:
        raise BrokenCheckpoint(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, KeyError):
        raise BrokenCheckpoint(f"{file}: is not a manifest") from None
    if not intact:
        raise BrokenCheckpoint(f"{file}: its bytes have changed since it was published (checksum)")
    if body["format"] != FORMAT:
        raise BrokenCheckpoint(f"{file}: has format {body['format']}, this version of DistCA reads format {FORMAT}")
    return body


def _is_complete(path: Path) -> bool:
    try:
        for name, noted in _read_manifest(path)["files"].items():
            _check_size(path / name, noted["bytes"])
    except BrokenCheckpoint:
        return False
    return True


def _check_size(file: Path, num_bytes: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise BrokenCheckpoint(f"{file}: cannot be read: {error.strerror}") from None
    if found != num_bytes:
        raise BrokenCheckpoint(f"{file}: has {found} bytes, {num_bytes} were published")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _published(folder: Path) -> list[Path]:
    """What is called a checkpoint, newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in paths if re.fullmatch(r"step-\d+", p.name)), key=_step_of, reverse=True)


def _me() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.removed-{_me()}")


def _remove(path: Path) -> None:
    hidden = _hidden(path)  # a half-removed checkpoint must not be called one
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what this process has hidden, and what dead processes of this machine left unfinished."""
    for path in folder.glob(".*-*"):
        found = re.fullmatch(r"\..+\.(partial|removed)-(.+)-(\d+)", path.name)
        if not found or found[2] != socket.gethostname():
            continue
        mine = int(found[3]) == os.getpid()
        if (mine and found[1] == "removed") or not (mine or _is_alive(int(found[3]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_full_disk(error: BaseException, folder: Path) -> bool:
    if full_disk(error):
        return True
    free = room(folder)
    return isinstance(error, Exception) and (not free.files or free.bytes < ALMOST_FULL_BYTES)


def _kept(folder: Path) -> str:
    steps = steps_published(folder)
    return f"The newest checkpoint is of step {steps[0]}" if steps else "There is no checkpoint yet"


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # somebody may be writing still
            total += path.stat().st_size if path.is_file() else 0
    return total


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=32).hexdigest()
