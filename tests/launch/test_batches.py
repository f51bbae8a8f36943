"""What a micro-batch holds."""

import json

import numpy as np
import pytest
from documents import prepared_corpus
from hypothesis import given
from hypothesis import strategies as st

from distca.launch.data.batches import NO_TARGET, DocumentStream
from distca.order import Cursor


def walk(stream: DocumentStream, num_micro_batches: int, cursor=Cursor()):  # noqa: B008 - frozen
    for _ in range(num_micro_batches):
        pieces, cursor = stream.pieces(cursor)
        yield pieces


def whole_rows(stream, pieces):
    documents = np.arange(len(pieces))
    return stream.rows(pieces, documents, np.zeros_like(documents), pieces.lengths)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Tokens that tell where they come from, and lengths of all kinds."""
    random = np.random.default_rng(0)
    long_tail = np.ceil(random.pareto(1.2, 60) * 5).clip(1, 400).astype(int).tolist()
    return prepared_corpus(tmp_path_factory.mktemp("two"), long_tail, [1, 1, 90, 17] * 5)


def test_rows_hold_the_pieces_tokens_positions_and_next_tokens(two_sources):
    settings, corpus = two_sources
    stream = DocumentStream(corpus, settings, seed=0, tokens_per_micro_batch=256)
    for pieces in walk(stream, 20):
        rows = whole_rows(stream, pieces)
        assert rows.input_ids.dtype == rows.position_ids.dtype == rows.labels.dtype == np.int64
        assert len(rows.input_ids) == 256
        at = 0
        for source, row, start, end in zip(pieces.source, pieces.row, pieces.start, pieces.end, strict=True):
            tokens = corpus.tokens(source, row, start, end)
            inside = slice(at, at + len(tokens))
            assert np.array_equal(rows.input_ids[inside], tokens)
            assert np.array_equal(rows.position_ids[inside], np.arange(len(tokens)))
            assert np.array_equal(rows.labels[inside], [*tokens[1:], NO_TARGET])
            at += len(tokens)
        assert np.count_nonzero(rows.labels != NO_TARGET) == stream.num_targets(pieces)


@given(num_ranks=st.integers(1, 5), seed=st.integers(0, 9), data=st.data())
def test_rows_do_not_depend_on_how_pieces_are_cut_over_ranks(two_sources, num_ranks, seed, data):
    settings, corpus = two_sources
    stream = DocumentStream(corpus, settings, seed, tokens_per_micro_batch=240)
    pieces, _ = stream.pieces(Cursor(data.draw(st.integers(0, 500))))
    cuts = np.sort(data.draw(st.lists(st.integers(0, 240), min_size=num_ranks - 1, max_size=num_ranks - 1)))
    ends = np.cumsum(pieces.lengths)
    parts = []
    for first, last in zip([0, *cuts], [*cuts, 240], strict=True):  # a rank's rows, as segments of pieces
        here = np.flatnonzero((ends > first) & (ends - pieces.lengths < last))
        begins = ends[here] - pieces.lengths[here]
        starts, stops = np.maximum(first, begins) - begins, np.minimum(last, ends[here]) - begins
        parts.append(stream.rows(pieces, here, starts, stops))
    for whole, *cut in zip(whole_rows(stream, pieces), *parts, strict=True):
        assert np.array_equal(np.concatenate(cut), whole)


def test_an_epoch_holds_every_token_once_and_in_documents(tmp_path):
    lengths = [3, 50, 1, 1, 20, 7]
    settings, corpus = prepared_corpus(tmp_path, lengths)
    stream = DocumentStream(corpus, settings, seed=5, tokens_per_micro_batch=41)  # two micro-batches per epoch
    ids = np.concatenate([whole_rows(stream, pieces).input_ids for pieces in walk(stream, 6)])
    for epoch in np.split(ids, 3):
        assert sorted(epoch) == list(range(82))
        jumps = epoch[:-1][np.diff(epoch) != 1]  # a jump is only allowed after a document's last token
        assert set(jumps) <= set(np.cumsum(lengths) - 1)


def test_longer_documents_are_cut_as_the_settings_say(two_sources):
    settings, corpus = two_sources
    stream = DocumentStream(corpus, settings.model_copy(update={"max_document_tokens": 32}), 0, 256)
    assert max(pieces.lengths.max() for pieces in walk(stream, 20)) == 32
    assert DocumentStream(corpus, settings, 0, 256).max_document_tokens == 256


def test_weights_are_shares_of_tokens(tmp_path):
    random = np.random.default_rng(1)
    lengths = [random.integers(1, 20, 400), random.integers(100, 900, 50), [1000] * 3]
    settings, corpus = prepared_corpus(tmp_path, *(x.tolist() if hasattr(x, "tolist") else x for x in lengths))
    weights = [0.2, 5, 1.5]
    sources = [source.model_copy(update={"weight": w}) for source, w in zip(settings.sources, weights, strict=True)]
    stream = DocumentStream(corpus, settings.model_copy(update={"sources": tuple(sources)}), 0, 1 << 20)
    taken = np.zeros(3)
    for pieces in walk(stream, 10):
        taken += np.bincount(pieces.source, pieces.lengths, minlength=3)
    np.testing.assert_allclose(taken / taken.sum(), np.array(weights) / sum(weights), rtol=0.01)


def test_a_stream_resumes_from_two_integers(two_sources):
    settings, corpus = two_sources
    going_on = list(walk(DocumentStream(corpus, settings, 3, 256), 8))
    cursor = Cursor()
    for _ in range(5):
        _, cursor = DocumentStream(corpus, settings, 3, 256).pieces(cursor)
    document, offset = json.loads(json.dumps([cursor.document, cursor.offset]))
    resumed = DocumentStream(corpus, settings, 3, 256)
    for one, other in zip(going_on[5:], walk(resumed, 3, Cursor(document, offset)), strict=True):
        assert np.array_equal(whole_rows(resumed, one), whole_rows(resumed, other))
