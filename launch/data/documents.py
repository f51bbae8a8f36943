"""How does a row become a document?

A row maps column names to values, wherever it comes from: JSON, parquet, arrow, the hub. `document_of` finds the column
with the document and everything beside it that has a say about training, and promises that no column is dropped
without a word:

  - targets (`labels`, `loss_mask` and their kin) become the document's labels, padding (`attention_mask`) is cut off;
  - what carries nothing (`position_ids` that only count, `token_type_ids` that are all 0) is accepted;
  - what is known to carry meaning that training would not honour is refused by name;
  - two columns that could both be the document are a question to the user;
  - every other column is named in `Document.unused`.

Names count however they are written: `lossMask`, `loss-mask` and `LOSS_MASK` are one column.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distca.config import SourceSettings
from distca.errors import first_line
from distca.launch.data.batches import NO_TARGET


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a document, or the rest of a file, cannot be trained on."""

    reason: str  # few words, to be counted
    sentence: str  # continues after "file x, row 3: "
    asks: bool = False  # a question about the whole source, which leaving a row out would not answer


@dataclass(frozen=True, slots=True)
class Document:
    kind: str  # what it was made from; one source holds documents of one kind
    content: str | np.ndarray  # text, or (n,) token ids
    labels: np.ndarray | None = None  # (n,) what is to be predicted at each token, or NO_TARGET; None: the tokens
    unused: tuple[str, ...] = ()  # columns without a meaning to training
    ignored: tuple[str, ...] = ()  # columns left aside because the settings say so


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is there and neither text, a number, nor a list of numbers; only its type is known."""

    type: str

    def __repr__(self) -> str:
        return f"a value of type {self.type}"


EMPTY = Problem("empty", "the document is empty")

_WANTED = "a document is text, or a list of integer token ids"
_CHATS = "messages conversations conversation dialog dialogue chat chosen rejected".split()
_PAIRS = "prompt completion".split()
_OWNERS = "loss completion assistant assistants assistanttokens response responses target targets train training label"
_TARGET_MASKS = {f"{owner}{mask}" for owner in [*_OWNERS.split(), "labels", "answer"] for mask in ("mask", "masks")}
_KNOWN = (
    {"inputids": "ids", "text": "text", "labels": "labels"}
    | dict.fromkeys(("attentionmask", "attentionmasks", "attnmask"), "padding")
    | dict.fromkeys(("positionids", "posids"), "positions")
    | dict.fromkeys(("tokentypeids", "specialtokensmask", "specialtokenmask"), "zeros")
    | dict.fromkeys(_TARGET_MASKS, "masks")
    | dict.fromkeys(_CHATS, "chat")
    | dict.fromkeys(_PAIRS, "pair")
)
_PIECES = (  # names of lists that tell the pieces of a packed row; a number or a word there only names the row
    "seqidx|sequenceidx|cuseqlens?(q|k|kv)?|maxseqlens?(q|k|kv)?|maxlength(q|k)|segmentids?|documentids|docids"
    "|sequenceids|sampleids|(seq|sequence|document|doc|piece|segment)(lens|lengths)"
)
_REFUSED = {  # names, as whole words without their separators, and why they cannot be honoured
    "only text and token ids are trained on": (
        "(pixel|image|audio|video|speech|vision)(s|es|values?|features?|sizes?|gridthw|bytes|embeds?)*"
        "(images|videos|audios)?|pixelvalues.*|inputfeatures|inputvalues|mmtokentypeids|imagesizes|imagegridthw"
        "|videogridthw|secondpergridts|speeches"
    ),
    "only token ids enter the model": "(inputs?|encoder|decoder|prompt|token)embed(s|ding|dings)|encoderhiddenstates",
    "targets count once or not at all; there are no weights": (
        "(loss|sample|token|example|importance|row|instance|document|label|target|class)?(weight|weights|weighting)"
        "|lossscales?"
    ),
}
_MAY_CARRY_MEANING = rf"(masks?|ids|tokens|lengths|positions|label|targets?)$|^embed(s|ding|dings)$|^({_PIECES})$"
_IGNORE = "to train without it, name it in the source's `ignore_columns`"


def unreadable(error: BaseException) -> Problem:
    return Problem("unreadable", f"cannot be read: {first_line(error).rstrip('.')}")


def document_of(row: Mapping[str, Any], source: SourceSettings, others: tuple[str, ...] = ()) -> Document | Problem:
    """A row's document, or why there is none. A null counts as absent; `others` are columns that were not read."""
    present = tuple(name for name, value in row.items() if not _is_absent(name, value, source))
    shape = _shape((*row, *others), present, source.column, source.ignore_columns)
    if isinstance(shape, Problem):
        return shape
    value = row[shape.document]
    if isinstance(value, str):
        return _text_document(value, row, shape, named_by_user=source.column is not None)
    if shape.role == "text" and source.column is None:
        return _not_text(shape.document, value)
    return _ids_document(value, row, shape)


def _is_absent(name: str, value: Any, source: SourceSettings) -> bool:
    """An empty list of images, or of ids of some sort, carries nothing."""
    if value is None or name == source.column or not _is_list(value) or not _is_empty(value):
        return value is None
    return _role(name) == "refused" or _may_carry_meaning(name)


def columns_to_read(names: Sequence[str], source: SourceSettings) -> list[str]:
    """Which of a table's columns `document_of` looks at."""
    wanted = [name for name in names if name not in source.ignore_columns]
    return [name for name in wanted if name == source.column or _role(name) or _may_carry_meaning(name)]


# ---- what the columns of a row mean ----


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the columns of a row mean, by their names."""

    document: str
    role: str  # of the document's column, by its name
    labels: tuple[str, ...]
    masks: tuple[str, ...]
    padding: tuple[str, ...]
    positions: tuple[str, ...]
    zeros: tuple[str, ...]
    beside: tuple[str, ...]  # all of these five
    suspects: tuple[str, ...]  # carry meaning if they hold lists
    unused: tuple[str, ...]
    ignored: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _shape(
    names: tuple[str, ...], present: tuple[str, ...], column: str | None, ignore: tuple[str, ...]
) -> _Shape | Problem:
    present = tuple(name for name in present if name not in ignore)
    by_role: dict[str, list[str]] = {}
    for name in present:
        by_role.setdefault("document" if name == column else _role(name), []).append(name)
    for name in by_role.pop("refused", []):
        return _question(f"column `{name}` carries meaning that cannot be honoured: {_why_refused(name)}; {_IGNORE}")
    ids, texts, chats, pairs = (by_role.pop(role, []) for role in ("ids", "text", "chat", "pair"))
    if column is None:
        left = tuple(name for name in names if name not in ignore)
        found = _document_column(left, ids, texts, chats, pairs)
        others: list[str] = []
    else:
        found, others = by_role.get("document", [_absent(column, names)])[0], [*ids, *texts, *chats, *pairs]
    if isinstance(found, Problem):
        return found
    for role, sort in (("labels", "labels"), ("padding", "attention masks"), ("positions", "positions")):
        if len(twins := by_role.get(role, [])) > 1:
            return _question(f"columns {_listed(twins)} are all {sort}; name all but one in `ignore_columns`")
    unknown = by_role.get("", [])
    beside = {role: tuple(by_role.get(role, ())) for role in ("labels", "masks", "padding", "positions", "zeros")}
    return _Shape(
        document=found,
        role=_role(found),
        **beside,
        beside=tuple(name for names in beside.values() for name in names),
        suspects=tuple(filter(_may_carry_meaning, unknown)),
        unused=(*others, *unknown, *(name for name in names if name not in present and name not in ignore)),
        ignored=tuple(name for name in names if name in ignore),
    )


def _document_column(
    names: Sequence[str], ids: list[str], texts: list[str], chats: list[str], pairs: list[str]
) -> str | Problem:
    """Which column holds the document, when the settings do not say."""
    candidates = [*ids, *texts, *chats, *pairs]
    if not ids and not texts:
        if chats:
            return _question(
                f"holds a conversation in {_listed(chats)}, and chat templates are not applied yet. Apply the "
                "tokenizer's before (`apply_chat_template(…, return_dict=True, return_assistant_tokens_mask=True)`) "
                "and store what it gives as `input_ids` with `assistant_masks`; or, where a column is plain text, set "
                "`column` to it"
            )
        if pairs:
            return _question(
                f"holds {_listed(pairs)}, which are not joined here. Store them joined as `text`, or as `input_ids` "
                "with `labels` or a `completion_mask`, or set `column` to train on one of them alone"
            )
        null = [name for name in names if _role(name) in ("ids", "text")]
        return _absent(null[0] if null else "text", names)
    if len(candidates) > 1:
        first, rest = candidates[0], candidates[1:]
        return _question(
            f"columns {_listed(candidates)} could each be the document. Say which one is trained on: for example "
            f"`column: {first}` and `ignore_columns: [{', '.join(rest)}]` in the source"
        )
    return candidates[0]


def _absent(column: str, names: Sequence[str]) -> Problem:
    if column in names:
        return Problem("empty", f"the document is missing (null in column `{column}`)")
    columns = _listed(names) or "none"
    return Problem("no such column", f"has no column `{column}` (columns: {columns}); set `column` of the source")


@functools.lru_cache(maxsize=4096)
def _role(name: str) -> str:
    """ids, text, labels, masks, padding, positions, zeros, chat, pair, refused; empty for a name that says nothing."""
    return _KNOWN.get(_plain(name)) or ("refused" if _why_refused(name) else "")


@functools.lru_cache(maxsize=4096)
def _why_refused(name: str) -> str | None:
    return next((why for why, pattern in _REFUSED.items() if re.fullmatch(pattern, _plain(name))), None)


@functools.lru_cache(maxsize=4096)
def _may_carry_meaning(name: str) -> bool:
    """Does a name look like one value per token: some mask, ids of some sort, tokens, labels, targets, pieces?"""
    return not _role(name) and re.search(_MAY_CARRY_MEANING, _plain(name)) is not None


@functools.lru_cache(maxsize=4096)
def _tells_pieces(name: str) -> bool:
    return re.fullmatch(_PIECES, _plain(name)) is not None


@functools.lru_cache(maxsize=4096)
def _means_ids(name: str) -> bool:
    return re.search(r"(ids|tokens)$", _plain(name)) is not None


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s]+", "", name).lower()


def _listed(names: Sequence[str]) -> str:
    shown = [f"`{name}`" for name in names[:12]]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _question(sentence: str) -> Problem:
    return Problem("a question", sentence, asks=True)


# ---- text ----


def _text_document(value: str, row: Mapping[str, Any], shape: _Shape, named_by_user: bool) -> Document | Problem:
    if shape.role == "ids" or _means_ids(shape.document) and not re.search(r"[^\W\d_]", value):
        advice = "store them as a list of integers"
        return Problem(
            "wrong type", f"column `{shape.document}` holds the text {reprlib.repr(value)}, not token ids; {advice}"
        )
    classes = tuple(name for name in shape.labels if isinstance(row[name], (int, float)))  # of the whole text
    if beside := [name for name in shape.beside if name not in classes]:
        return _question(
            f"column `{beside[0]}` stands beside text, but it speaks of tokens: store the tokens too, as "
            f"`input_ids`; {_IGNORE}"
        )
    for name in shape.suspects:
        if (_tells_pieces(name) or re.search(r"masks?$|label|target", _plain(name))) and _is_list(row[name]):
            return _suspect(name, "text")
        if (
            not named_by_user
            and _means_ids(name)
            and _are_ids(row[name])
            and _plain(name) in ("ids", "tokenids", "tokens")
        ):
            return _question(
                f"columns `{shape.document}` and `{name}` could each be the document. Say which one is trained on: for "
                f"example `column: {shape.document}` and `ignore_columns: [{name}]` in the source"
            )
    if not value:
        return EMPTY
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        return Problem("unreadable", "the text holds half a surrogate pair, which is not valid Unicode")
    return Document(f"text in `{shape.document}`", value, None, (*shape.unused, *classes), shape.ignored)


def _not_text(column: str, value: Any) -> Problem:
    if isinstance(value, Opaque) and "binary" in value.type and "<" not in value.type:
        return Problem("wrong type", f"column `{column}` holds {value!r}, not text; store it as a string of UTF-8")
    if isinstance(value, list) and value and isinstance(value[0], str) or isinstance(value, Opaque):
        return Problem(
            "wrong type",
            f"column `{column}` holds {reprlib.repr(value)}; a row is one document: write one row per text",
        )
    return Problem(
        "wrong type", f"column `{column}` holds {reprlib.repr(value)}; {_WANTED} (in `input_ids`, or set `column`)"
    )


# ---- token ids and what stands beside them ----


def _ids_document(value: Any, row: Mapping[str, Any], shape: _Shape) -> Document | Problem:
    for name in shape.suspects:
        if _is_list(row[name]):
            return _suspect(name, "token ids")
    ids = _ids(value)
    if ids is None:
        nested = isinstance(value, list) and value and isinstance(value[0], list)
        advice = "; one row is one document: write one row per list" if nested else ""
        return Problem("wrong type", f"column `{shape.document}` holds {reprlib.repr(value)}; {_WANTED}{advice}")
    columns: dict[str, np.ndarray] = {}
    for name in shape.beside:
        read = _ids if name in (*shape.labels, *shape.positions) else _flags
        column = read(row[name])
        if column is None:
            return _not_per_token(name, row[name], name in (*shape.labels, *shape.positions))
        if len(column) != len(ids):
            return Problem(
                "unequal lengths", f"column `{name}` holds {len(column)} values for {len(ids)} tokens; each needs one"
            )
        columns[name] = column
    kept = len(ids)
    for name in shape.padding:
        kept = int(np.count_nonzero(columns[name]))
        if not columns[name][:kept].all():
            return Problem(
                "padding not at the end",
                f"column `{name}` masks tokens before the last one that counts; only padding at the end can be cut "
                "off: pad on the right, or write each document without padding",
            )
    ids = ids[:kept]
    if not len(ids):
        return EMPTY
    for name in shape.positions:
        if not np.array_equal(columns[name][:kept], np.arange(kept)):
            return Problem(
                "positions that do not count from 0",
                f"column `{name}` does not count 0, 1, 2, …, and positions are always those in the document: write one "
                f"row per document; {_IGNORE}",
            )
    for name in shape.zeros:
        if columns[name][:kept].any():
            heedless = f"column `{name}` is not all 0, and what it marks would not be heeded; {_IGNORE}"
            return Problem(f"`{name}` that are not 0", heedless)
    labels = _labels(
        ids, [columns[name][:kept] for name in shape.labels], [columns[name][:kept] for name in shape.masks]
    )
    beside = f" with {_listed(sorted(shape.beside))}" if shape.beside else ""
    return Document(f"token ids in `{shape.document}`{beside}", ids, labels, shape.unused, shape.ignored)


def _labels(ids: np.ndarray, labels: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray | None:
    """A token is a target only where all say so; None where that is every token and its own id."""
    result = labels[0] if labels else ids
    for mask in masks:
        result = np.where(mask, result.astype(np.int64), NO_TARGET)
    return None if result is ids or np.array_equal(result, ids) else result.astype(np.int64)


def are_shifted(ids: np.ndarray, labels: np.ndarray) -> bool:
    """Is every label the next token, and not the token itself? A few may be by chance."""
    targets = np.flatnonzero(labels[:-1] != NO_TARGET)
    return (
        len(targets) > 3
        and np.array_equal(labels[targets], ids[targets + 1])
        and not np.array_equal(labels[targets], ids[targets])
    )


def _not_per_token(name: str, value: Any, integers: bool) -> Problem:
    wanted = f"integers (labels: token ids, or {NO_TARGET})" if integers else "values 0 and 1"
    packed = ""
    if _role(name) == "padding":
        packed = "; if it numbers the pieces of a packed row, write one row per document"
    return Problem("wrong type", f"column `{name}` holds {reprlib.repr(value)}, not a list of {wanted}{packed}")


def _suspect(name: str, beside: str) -> Problem:
    if _tells_pieces(name):
        return _question(
            f"column `{name}` carries meaning that cannot be honoured: pieces of packed rows are not taken apart; "
            f"write one row per document; {_IGNORE}"
        )
    return _question(
        f"column `{name}` beside {beside} looks as if it carried meaning that cannot be honoured (what can: `labels`, "
        f"`loss_mask`, `completion_mask`, `assistant_masks`, `attention_mask`, beside token ids); {_IGNORE}"
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, np.ndarray, Opaque))


def _is_empty(value: Any) -> bool:
    return not isinstance(value, Opaque) and len(value) == 0


def _are_ids(value: Any) -> bool:
    return _is_list(value) and _ids(value) is not None


def _ids(value: Any) -> np.ndarray | None:
    """A list of integers as an array; None for anything else. True is not 1."""
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
            return None  # as int64 it would be another number, and may be NO_TARGET
        return value if value.dtype.kind in "iu" and value.ndim == 1 else None
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        return None
    try:
        return np.array(value, np.int64)
    except OverflowError:
        return None


def _flags(value: Any) -> np.ndarray | None:
    """A list of zeros and ones as booleans; None for anything else."""
    if isinstance(value, list) and not set(map(type, value)) - {bool, int, float}:
        value = np.array(value) if value else np.zeros(0, bool)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "biuf":
        return None
    ones = value == 1
    return ones if (ones | (value == 0)).all() else None
