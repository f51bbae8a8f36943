"""How do parquet and arrow files, and data sets on the hub, become rows?

Columns that have no say are not read, and no more rows are in memory than a batch. Damage costs the rows that it
reaches, each named; what pyarrow leaves out without a word is missed."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from distca.config import SourceSettings
from distca.errors import DataError, first_line
from distca.launch.data.documents import Document, Opaque, Problem, columns_to_read, document_of, unreadable
from distca.launch.data.files import NO_ROWS, DataFile, Found

BATCH_ROWS = 64  # of a table, at most
EXPANSION = 4  # bytes in memory for one in a parquet file, about: ids and masks are packed there
BATCH_BYTES = 1 << 25  # of a table, about, when it is in memory


def read_parquet(file: DataFile, source: SourceSettings) -> Iterator[Found]:
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
    """Row by row, from row `done` on, what can be read of row groups that begin at row `first`;
    each group until its damage."""
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
        run.append(group)
        run_rows, run_bytes = run_rows + num_rows, run_bytes + num_bytes
    if run:
        yield run, _batch_rows(run_rows, run_bytes)


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(num_bytes, 1)))


def read_arrow(file: DataFile, source: SourceSettings) -> Iterator[Found]:
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


def read_hub(name: str, source: SourceSettings) -> Iterator[Found]:
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
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
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
    return map(_opaque_value, array)


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


def _opaque_value(value: pa.Scalar) -> Any:
    """Of a list, only whether there is anything in it."""
    if not value.is_valid:
        return None
    return [] if _is_list(value.type) and not len(value.values) else Opaque(str(value.type))


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
