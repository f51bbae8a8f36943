"""How do files and hub data sets become documents?

`read_source` gives a source's documents one by one, each with the place it was found at. Nothing is read whole: lines,
elements of JSON arrays, row groups and record batches pass through one after the other. Whatever a file holds, what
comes back is a document or a `Problem` that names the row; after damage, reading goes on where the format allows it.
Text and JSON are read here, tables by `distca.launch.data.tables`.
"""

from __future__ import annotations

import codecs
import io
import json
import lzma
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from distca.config import SourceSettings
from distca.errors import first_line
from distca.launch.data.documents import EMPTY, Document, Problem, document_of, unreadable
from distca.launch.data.files import NO_ROWS, OPENERS, DataFile, Found
from distca.launch.data.tables import read_arrow, read_hub, read_parquet

CHUNK = 1 << 20  # bytes of a JSON array, read at once
LONG = 1 << 24  # characters of JSON from which on equal numbers are kept once: slower, and a third of the memory

_SIGNATURES = (
    (b"\x1f\x8b\x08", "is compressed with gzip: let its name end in .gz"),
    (b"\xfd7zXZ\x00", "is compressed with xz: let its name end in .xz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard, which is not read here: decompress it (`zstd -d`)"),
    (b"\x04\x22\x4d\x18", "is compressed with LZ4, which is not read here: decompress it (`lz4 -d`)"),
    (b"PK\x03\x04", "is a ZIP archive, which is not read here: unpack it"),
    (b"PAR1", "is a parquet file: let its name end in .parquet, or set `format: parquet`"),
    (b"ARROW1\x00\x00", "is an arrow file: let its name end in .arrow, or set `format: arrow`"),
    (b"version https://git-lfs.github.com/spec/", "is a pointer of Git LFS, not the data: fetch it (`git lfs pull`)"),
    (b"\x93NUMPY", "is a NumPy file, which is not read here: write its ids as parquet or JSON lines"),
)
_READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError)
_SPACE = re.compile(r"[ \t\n\r]*")
_BYTES_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as the error handler `surrogateescape` marks them


def read_source(name: str, source: SourceSettings, files: list[DataFile] | None) -> Iterator[Found]:
    if files is None:
        yield from read_hub(name, source)
        return
    for file in files:
        reader = {"text": _read_text, "json": _read_json, "parquet": read_parquet, "arrow": read_arrow}[file.format]
        try:
            if not stat.S_ISREG(file.path.stat().st_mode):
                yield Found(file.path, None, Problem("unreadable", "cannot be read: it is not an ordinary file"))
                continue
            if file.format in ("parquet", "arrow") and (problem := _no_table(file)):
                yield Found(file.path, None, problem)
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


def _no_table(file: DataFile) -> Problem | None:
    """What a file is that should hold a table, where pyarrow would only say that it does not."""
    with open(file.path, "rb") as stream:
        head = stream.read(64)
    return None if head.startswith((b"PAR1", b"ARROW1")) else _known_as(head)


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
    return OPENERS.get(file.compression, open)(file.path, "rb")


def _not_utf8(head: bytes) -> Problem | None:
    """What a file is that should hold UTF-8, by its first bytes."""
    if problem := _known_as(head):
        return problem
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return Problem("unreadable", "cannot be read: it is compressed with bzip2: let its name end in .bz2")
    if width := _width(head):
        code = f"UTF-{8 * width}"
        return Problem("unreadable", f"cannot be read: it is {code}; convert it (`iconv -f {code} -t UTF-8`)")
    return None


def _known_as(head: bytes) -> Problem | None:
    for signature, sentence in _SIGNATURES:
        if head.startswith(signature):
            return Problem("unreadable", f"cannot be read: it {sentence}")
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


# ---- JSON ----


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Problem:
    columns = dict(pairs)
    if len(columns) == len(pairs):
        return columns
    twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
    return Problem("broken JSON", f"gives column `{twice}` twice; which one counts cannot be known")


class _Interned(dict):
    """Numbers by their digits: equal ones are one object, so that a long list of ids takes 8 bytes each."""

    def __missing__(self, digits: str) -> int:
        if len(self) > 1 << 18:
            self.clear()
        number = self[digits] = int(digits)
        return number


def _decoder(size: int) -> json.JSONDecoder:
    return _PLAIN if size < LONG else json.JSONDecoder(object_pairs_hook=_unique, parse_int=_Interned().__getitem__)


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
