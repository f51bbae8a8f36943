"""What does a micro-batch hold: first as lengths, then as tokens?

`distca.launch.data.prepare` stores each source once, as a folder of flat files that any number of processes map into
memory:

    tokens.bin    the documents' token ids, one after the other (uint16 or uint32)
    starts.bin    int64 per document: where its tokens begin in tokens.bin
    lengths.bin   int64 per document: how many they are
    targets.bin   int64 per document: how many of its tokens are targets, which training learns to predict
    labels.bin    int32 per token, where the source has labels: the token itself, or NO_TARGET
    meta.json     what it was made from, counts, the type of token ids; written last

A token is a target where it is not the first of its document and its label is not NO_TARGET; without labels every token
is its own.

    corpus = Corpus(prepare(settings.data, vocab_size))
    stream = DocumentStream(corpus, settings.data, settings.seed, settings.tokens_per_micro_batch)
    pieces, cursor = stream.pieces(cursor)                                 # lengths only: cheap, a step ahead
    ids, positions, labels = stream.rows(pieces, documents, starts, ends)  # the rows of one rank
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distca.config import DataSettings, RunSettings
from distca.errors import DataError
from distca.order import Cursor, DocumentOrder, Pieces, next_pieces

META, TOKENS, STARTS, LENGTHS = "meta.json", "tokens.bin", "starts.bin", "lengths.bin"
LABELS, TARGETS = "labels.bin", "targets.bin"
NO_TARGET = -100  # what torch's cross entropy leaves out


class Rows(NamedTuple):
    """Token rows of one rank, as the model takes them."""

    input_ids: np.ndarray  # (T,) int64
    position_ids: np.ndarray  # (T,) int64, position within the piece
    labels: np.ndarray  # (T,) int64, the label of the piece's next token; NO_TARGET at its last


class Corpus:
    """Prepared documents, read-only; opening maps files and reads none."""

    def __init__(self, folders: Sequence[Path]):
        metas = [read_meta(Path(folder)) for folder in folders]
        mapped = list(zip(map(Path, folders), metas, strict=True))
        self.num_documents: tuple[int, ...] = tuple(meta["documents"] for meta in metas)
        self.num_tokens: tuple[int, ...] = tuple(meta["tokens"] for meta in metas)
        self.num_targets: tuple[int, ...] = tuple(meta["targets"] for meta in metas)
        self.lengths = tuple(_map(folder / LENGTHS, "int64", meta["documents"]) for folder, meta in mapped)
        self._starts = tuple(_map(folder / STARTS, "int64", meta["documents"]) for folder, meta in mapped)
        self._tokens = tuple(_map(folder / TOKENS, meta["dtype"], meta["tokens"]) for folder, meta in mapped)
        self._targets = tuple(_map(folder / TARGETS, "int64", meta["documents"]) for folder, meta in mapped)
        self._labels = tuple(
            _map(folder / LABELS, "int32", meta["tokens"]) if meta["labels"] else None for folder, meta in mapped
        )

    def tokens(self, source: int, row: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids [start, end) of a stored document, int64."""
        return self._part(self._tokens, source, row, start, end)

    def labels(self, source: int, row: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Labels [start, end) of a stored document, int64: each token's own, NO_TARGET where it is not to be learnt.

        A source without labels has its tokens for labels."""
        return self._part(self._tokens if self._labels[source] is None else self._labels, source, row, start, end)

    def targets_of(self, pieces: Pieces) -> np.ndarray:
        """(P,) int64 targets of each piece; its first token has nothing before it to be predicted from."""
        found = pieces.lengths - 1
        for source in np.flatnonzero([labels is not None for labels in self._labels]):
            here = np.flatnonzero(pieces.source == source)
            row, whole = pieces.row[here], pieces.lengths[here] == self.lengths[source][pieces.row[here]]
            found[here[whole]] = self._targets[source][row[whole]]
            for piece in here[~whole]:
                labels = self.labels(source, pieces.row[piece], pieces.start[piece] + 1, pieces.end[piece])
                found[piece] = np.count_nonzero(labels != NO_TARGET)
        return found

    def _part(self, columns: Sequence[np.ndarray], source: int, row: int, start: int, end: int | None) -> np.ndarray:
        length = int(self.lengths[source][row])
        end = length if end is None else end
        assert 0 <= start <= end <= length, f"tokens {start} to {end} of a document of {length}"
        first = int(self._starts[source][row])
        return columns[source][first + start : first + end].astype(np.int64)


class DocumentStream:
    """The endless stream of micro-batches. It has no state: a `Cursor` says where it stands."""

    def __init__(self, corpus: Corpus, settings: DataSettings, seed: int, tokens_per_micro_batch: int):
        self.corpus = corpus
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_document_tokens = min(settings.max_document_tokens or tokens_per_micro_batch, tokens_per_micro_batch)
        # weights are shares of tokens; an order interleaves documents
        rates = [
            Fraction(source.weight) * documents / tokens
            for source, documents, tokens in zip(settings.sources, corpus.num_documents, corpus.num_tokens, strict=True)
        ]
        self._order = DocumentOrder(seed, corpus.num_documents, rates)

    def pieces(self, cursor: Cursor) -> tuple[Pieces, Cursor]:
        """The documents of the micro-batch that begins at `cursor`, and where the next begins. Reads no token."""
        return next_pieces(
            self._order, self.corpus.lengths, cursor, self.tokens_per_micro_batch, self.max_document_tokens
        )

    def step(self, cursor: Cursor, accumulation: int) -> tuple[list[Pieces], Cursor]:
        """The micro-batches of the step that begins at `cursor`, and where the next begins."""
        found = []
        for _ in range(accumulation):
            pieces, cursor = self.pieces(cursor)
            found.append(pieces)
        return found, cursor

    def num_targets(self, pieces: Pieces) -> int:
        """How many rows of these pieces have a label."""
        return int(self.corpus.targets_of(pieces).sum())

    def rows(self, pieces: Pieces, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Rows:
        """The rows of segments, in the given order: positions [start, end) of piece `document`, from the piece's start.

        A row's label is that of the piece's next token, also where that token belongs to the next segment."""
        documents, starts, ends = (np.asarray(x, np.int64) for x in (documents, starts, ends))
        num_rows = ends - starts
        inside = (0 <= starts) & (starts <= ends) & (ends <= pieces.lengths[documents])
        assert inside.all(), f"segments {np.flatnonzero(~inside)} reach out of their pieces"
        rows = Rows(*(np.full(num_rows.sum(), NO_TARGET) for _ in Rows._fields))
        segments = pieces[documents]
        first, last = segments.start + starts, np.minimum(segments.start + ends + 1, segments.end)
        columns = (np.cumsum(num_rows) - num_rows, num_rows, starts, segments.source, segments.row, first, last)
        for at, size, position, source, row, start, end in zip(*(c.tolist() for c in columns), strict=True):
            rows.input_ids[at : at + size] = self.corpus.tokens(source, row, start, start + size)
            rows.position_ids[at : at + size] = np.arange(position, position + size)
            if size:
                labels = self.corpus.labels(source, row, start + 1, end)  # one less if the piece ends here
                rows.labels[at : at + size][: len(labels)] = labels
        return rows


def first_step_with_targets(settings: RunSettings, folders: Sequence[Path]) -> tuple[int, Cursor]:
    """The first step of a run that has anything to learn, and where it begins; DataError where none has."""
    stream = DocumentStream(Corpus(folders), settings.data, settings.seed, settings.tokens_per_micro_batch)
    following = Cursor()
    for step in range(1, settings.train.steps + 1):
        cursor = following
        pieces, following = stream.step(cursor, settings.accumulation)
        if any(map(stream.num_targets, pieces)):
            return step, cursor
    names = ", ".join(source.path for source in settings.data.sources)
    raise DataError(
        f"{names}: there is nothing to predict in any of the run's "
        f"{settings.train.steps} steps. A token is predicted from those before it in its document, unless its label is "
        f"{NO_TARGET}: give longer documents, or labels that leave some"
    )


def pieces_of_steps(settings: RunSettings, folders: Sequence[Path], cursor: Cursor, steps: int) -> list[list[Pieces]]:
    """The micro-batches of so many steps from `cursor` on; no token is read."""
    stream, found = DocumentStream(Corpus(folders), settings.data, settings.seed, settings.tokens_per_micro_batch), []
    for _ in range(steps):
        pieces, cursor = stream.step(cursor, settings.accumulation)
        found.append(pieces)
    return found


def read_meta(folder: Path) -> dict:
    """What a prepared folder says about itself."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not {"documents", "tokens", "targets"} <= meta.keys():
            raise ValueError("it describes no documents")
        return meta
    except ValueError as error:
        raise DataError(f"{folder / META}: is damaged ({error}); delete the folder and it will be made again") from None
    except OSError as error:
        raise DataError(
            f"{folder}: no prepared documents can be read here ({error}). Every machine that trains must see this "
            "folder: put `data.cache` on a file system that all of them share"
        ) from None


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    remedy = f"delete the folder {path.parent} and it will be made again"
    try:
        mapped = np.asarray(np.memmap(path, np.dtype(dtype), mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped ({error}); {remedy}") from None
    if len(mapped) != size:
        raise DataError(f"{path}: holds {len(mapped)} numbers, not {size}; {remedy}")
    return mapped
