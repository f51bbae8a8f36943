"""What is said of an error that nobody foresaw? One sentence with what to do, and where its traceback is.

    except Exception as error:
        raise in_words(error, folder) from error       # a UserError; the traceback is in folder/logs/driver.txt

Where the machine is the plain cause (disk, memory, permissions, limits), the sentence says so, whoever met it first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distca.errors import TryAgain, UserError
from distca.metrics import bytes_text

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
QUOTED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # of Rust (safetensors, tokenizers); of another process


@dataclass(frozen=True, slots=True)
class Room:
    """What a disk still takes."""

    bytes: int
    files: bool  # whether another file can be made: a file system may run out of inodes before it runs out of bytes

    def __str__(self) -> str:
        return f"{bytes_text(self.bytes)} are free" + ("" if self.files else ", but not one more file: no inodes are")


def in_words(error: Exception, folder: Path | None = None) -> UserError:
    """The error for people; its traceback is added to the logs of the run in `folder`, or to a new temporary file."""
    if isinstance(error, UserError):
        return error
    if full := full_disk(error):
        cause = {errno.EDQUOT: "your disk quota is used up", errno.EFBIG: "a file may not get this large (ulimit -f)"}
        place, reason = full.filename or folder or "any more", cause.get(full.errno, "the disk is full")
        return TryAgain(f"cannot write {place}: {reason}. Make room there, and run this again")
    where = _keep_traceback(error, folder and folder / "logs" / "driver.txt")
    for cause in _causes(error):
        if told := _plain(cause, where):
            return told
    return UserError(f"unexpected {_name(error)}. This is likely a fault of DistCA: please report it {where}")


def full_disk(error: BaseException) -> OSError | None:
    """The error, or what caused it, that says that a disk is full."""
    found = (cause for cause in map(_as_system_error, _causes(error)) if cause and cause.errno in NO_ROOM)
    return next(found, None)


def room(folder: str | os.PathLike) -> Room:
    """What is free where a folder is or will be."""
    place = Path(folder).absolute()
    found = os.statvfs(next(p for p in (place, *place.parents) if p.exists()))
    return Room(found.f_bavail * found.f_frsize, found.f_favail > 0 or not found.f_files)


def _plain(error: BaseException, where: str) -> UserError | None:
    if isinstance(error, MemoryError):
        return UserError(
            f"this process could not get the memory it asked for ({_name(error)}): free some, or make the job smaller "
            f"(a shorter train.tokens_per_step, a smaller model) {where}"
        )
    if isinstance(error, RecursionError):
        return UserError(f"something is nested too deeply for Python ({_name(error)}) {where}")
    found = _as_system_error(error)
    if found is None:
        return None
    if found.errno in NO_ACCESS:
        reason = "its file system is read-only" if found.errno == errno.EROFS else "permission denied"
        place = found.filename or "a file"
        return UserError(f"cannot open or write {place}: {reason}. Change that, or name another place {where}")
    if found.errno in (errno.EMFILE, errno.ENFILE):
        return UserError(f"too many open files: raise the limit (ulimit -n, for example 65536) {where}")
    if isinstance(error, OSError) and found.filename:
        return UserError(f"{found.filename}: {found.strerror or _name(error)} {where}")
    return None


def _as_system_error(error: BaseException) -> OSError | None:
    if isinstance(error, OSError) and error.errno:
        return error
    if quoted := QUOTED.search(str(error)):
        number = int(quoted[1] or quoted[2])
        return OSError(number, os.strerror(number))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _name(error: BaseException) -> str:
    """Its type and first line, as the last line of a traceback shows them."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _keep_traceback(error: BaseException, log: Path | None) -> str:
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}\n"
    for path in (log, Path(tempfile.gettempdir(), f"distca-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt")):
        with contextlib.suppress(OSError, AttributeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"(traceback: {path})"
    return f"(its traceback could be written nowhere; it ends in {_last_frame(error)})"


def _last_frame(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "no frame"
