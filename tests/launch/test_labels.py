"""From stored labels to rows, and what a run does where there is nothing to predict."""

from pathlib import Path

import numpy as np
import pytest
from documents import data_settings, write_json_lines, write_prepared
from hypothesis import given
from hypothesis import strategies as st
from team import make_settings

from distca.errors import DataError
from distca.launch.data.batches import NO_TARGET, Corpus, DocumentStream, first_step_with_targets, read_meta
from distca.launch.data.prepare import prepare
from distca.order import Cursor, Pieces

LENGTHS = [1, 2, 40, 7, 1, 90, 13, 64, 3]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A source with labels, one without, one whose labels are never a target: (corpus, ids, labels)."""
    folder, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(1)
    ids = [[random.integers(0, 96, length) for length in LENGTHS] for _ in range(3)]
    some = [np.where(random.random(len(x)) < 0.5, random.integers(0, 96, len(x)), NO_TARGET) for x in ids[0]]
    never = [np.where(np.arange(len(x)) == 0, x, NO_TARGET) for x in ids[2]]
    labels = [some, ids[1], never]
    stored = (some, None, never)
    folders = [write_prepared(folder / str(n), ids[n], stored[n]) for n in range(3)]
    return Corpus(folders), ids, labels


def stream_of(corpus: Corpus, tokens: int, longest: int | None) -> DocumentStream:
    settings = data_settings(Path("unused"), *map(str, range(len(corpus.num_documents))), max_document_tokens=longest)
    return DocumentStream(corpus, settings, 0, tokens)


def wanted_labels(labels, pieces: Pieces) -> list[np.ndarray]:
    """By the definition: a row's label is that of the next token of its piece."""
    columns = zip(pieces.source, pieces.row, pieces.start, pieces.end, strict=True)
    return [np.append(labels[source][row][start + 1 : end], NO_TARGET) for source, row, start, end in columns]


@given(tokens=st.integers(2, 70), longest=st.none() | st.integers(2, 50), ranks=st.integers(1, 5), data=st.data())
def test_a_row_has_the_label_of_its_pieces_next_token_wherever_pieces_and_ranks_end(
    sources, tokens, longest, ranks, data
):
    corpus, ids, labels = sources
    stream, cursor = stream_of(corpus, tokens, longest), Cursor()
    for _ in range(4):
        pieces, cursor = stream.pieces(cursor)
        wanted = wanted_labels(labels, pieces)
        cuts = np.unique([0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=ranks))])
        ends = np.cumsum(pieces.lengths)
        borders = np.unique(np.concatenate([cuts, ends - pieces.lengths, ends]))
        document = np.searchsorted(ends, borders[:-1], side="right")
        start, end = (x - (ends - pieces.lengths)[document] for x in (borders[:-1], borders[1:]))
        shuffled = data.draw(st.permutations(range(len(document))))
        rows = stream.rows(pieces, *(x[shuffled] for x in (document, start, end)))
        parts = [wanted[d][s:e] for d, s, e in zip(document[shuffled], start[shuffled], end[shuffled], strict=True)]
        assert rows.labels.tolist() == np.concatenate(parts).tolist()
        num_targets = [int((x != NO_TARGET).sum()) for x in wanted]
        assert corpus.targets_of(pieces).tolist() == num_targets
        assert stream.num_targets(pieces) == sum(num_targets)


def test_what_a_source_says_of_its_targets_is_what_its_documents_have(sources):
    corpus, _, labels = sources
    assert list(corpus.num_targets) == [sum(int((x[1:] != NO_TARGET).sum()) for x in source) for source in labels]
    assert corpus.num_targets[2] == 0


def test_a_source_without_labels_has_its_tokens_for_labels(sources):
    corpus, ids, labels = sources
    for source in range(3):
        for row in range(len(LENGTHS)):
            assert corpus.tokens(source, row).tolist() == ids[source][row].tolist()
            assert corpus.labels(source, row).tolist() == labels[source][row].tolist()


def run_over(folder, labels, **train):
    """A run over one document of ten tokens a step, with these labels."""
    settings = make_settings(folder, [10], train=dict(tokens_per_step=10, steps=6) | train)
    return settings, [write_prepared(folder / "prepared", [range(10)] * len(labels), labels)]


def test_the_first_step_with_targets_is_found_with_its_place_in_the_data(tmp_path):
    settings, folders = run_over(tmp_path, [[NO_TARGET] * 10] * 3 + [[NO_TARGET] * 9 + [4]])
    step, cursor = first_step_with_targets(settings, folders)
    stream = DocumentStream(Corpus(folders), settings.data, settings.seed, 10)
    assert cursor == Cursor(step - 1, 0) and stream.pieces(cursor)[0].row.tolist() == [3]


def test_a_run_in_which_no_step_has_anything_to_predict_is_refused(tmp_path):
    settings, folders = run_over(tmp_path, [[5] + [NO_TARGET] * 9] * 3)
    with pytest.raises(DataError, match="nothing to predict in any of the run's 6 steps"):
        first_step_with_targets(settings, folders)


@pytest.mark.parametrize("with_labels", [True, False])
def test_what_is_prepared_from_files_is_what_these_tests_write(tmp_path, sources, with_labels):
    _, ids, labels = sources
    rows = [
        {"input_ids": x.tolist()} | ({"labels": y.tolist()} if with_labels else {})
        for x, y in zip(ids[0], labels[0], strict=True)
    ]
    path = write_json_lines(tmp_path / "rows.jsonl", rows)
    (prepared,) = prepare(data_settings(tmp_path / "cache", path), 96)
    written = write_prepared(tmp_path / "written", ids[0], labels[0] if with_labels else None)
    for name in ("tokens.bin", "starts.bin", "lengths.bin", "targets.bin", *(["labels.bin"] if with_labels else [])):
        assert (prepared / name).read_bytes() == (written / name).read_bytes(), name
    assert (prepared / "labels.bin").exists() == with_labels
    for name in ("documents", "tokens", "targets", "dtype", "labels"):
        assert read_meta(prepared)[name] == read_meta(written)[name], name
