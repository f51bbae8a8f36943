"""How does a text become token ids?

Every text is encoded whole: nothing that a tokenizer's files say about lengths ever cuts or pads a document. Each
document has the tokenizer's beginning and end exactly once. Whether a text can spell a special token is the user's
choice (`data.control_tokens`), and `text` holds for every kind of tokenizer: libraries stop looking for special tokens
when asked to (`split_special_tokens`), but word and unigram models then find them in their own vocabulary, so here they
are taken out of it.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from distca.config import DataSettings
from distca.errors import SettingsError, first_line
from distca.launch.data.documents import Problem
from distca.paths import expanded, looks_local

logger = logging.getLogger(__name__)

BYTE_EOS, BYTE_OFFSET = 1, 3  # ByT5's: ids 0 to 2 are pad, end of sequence and unknown
PART = 1 << 18  # characters of a long text that are encoded at once
LONG_TEXT = 1 << 20  # characters; shorter ones are encoded at once: a tokenizer needs some 200 bytes per token
OVERLAP = 1 << 12  # characters that two parts of a long text share
_NO_TOKENS = Problem("empty", "the tokenizer makes no token of the text")


def tokenizer_name(settings: DataSettings, model_path: str | None = None) -> str:
    """`bytes`, or the folder or hub name of the tokenizer that texts are encoded with."""
    return settings.tokenizer or model_path or "bytes"


def load_tokenizer(
    settings: DataSettings, model_path: str | None = None, model_revision: str | None = None
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that `data.tokenizer` names, else the model's own; no code from the hub is ever run."""
    name = tokenizer_name(settings, model_path)
    if name == "bytes":
        return transformers.ByT5Tokenizer(extra_ids=0)
    revision = settings.tokenizer_revision if settings.tokenizer else model_revision
    place = str(expanded(name))
    advice = "Give a folder with tokenizer files, a hub name that this machine can reach or has downloaded, or `bytes`"
    if not settings.tokenizer:
        advice = "`model.path` has no tokenizer that can be used, and texts need one: set `data.tokenizer`. " + advice
    if looks_local(name) and not Path(place).exists():
        raise SettingsError(f"data.tokenizer: cannot load {name!r}: there is no such folder\n{advice}")
    if Path(place).is_file():
        raise SettingsError(f"data.tokenizer: {name!r} is a file; give the folder that it lies in")
    try:
        return transformers.AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except BaseException as error:  # files of all kinds are parsed here, in part by Rust, whose panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise SettingsError(f"data.tokenizer: cannot load {name!r}: {first_line(error)}\n{advice}") from error


class Encoder:
    """Texts to token ids. The tokenizer is loaded for the first text: token ids need none."""

    def __init__(self, settings: DataSettings, model_path: str | None = None, model_revision: str | None = None):
        self._settings = settings
        self._model = (model_path, model_revision)
        self._name = tokenizer_name(settings, model_path)
        self._tokenizer: _Tokenizer | None = None
        if self._name == "bytes" and settings.control_tokens == "parse":
            raise SettingsError("data.control_tokens: parse needs a tokenizer with special tokens; set data.tokenizer")

    def __call__(self, texts: list[str]) -> list[np.ndarray | Problem]:
        if self._name == "bytes":
            return [self._encode_bytes(text) for text in texts]
        if self._tokenizer is None:
            self._tokenizer = self._load()
        contents = self._contents(texts)
        return [self._finished(text, content) for text, content in zip(texts, contents, strict=True)]

    def _load(self) -> _Tokenizer:
        tokenizer = load_tokenizer(self._settings, *self._model)
        if self._settings.append_eos and tokenizer.eos_token_id is None:
            raise SettingsError(f"data.tokenizer: {self._name!r} has no end of sequence; set data.append_eos: false")
        parse = self._settings.control_tokens == "parse"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if isinstance(backend, tokenizers.Tokenizer):
            return _of_backend(backend, tokenizer, parse)
        return _of_python(tokenizer, parse)

    def _contents(self, texts: list[str]) -> list[np.ndarray | Problem]:
        """Tokens of the texts alone. A text that the tokenizer fails on does not harm its neighbours."""
        try:
            return self._tokenizer.encode(texts)
        except BaseException as error:  # from Rust come a bare Exception and panics, which are no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            if len(texts) > 1:
                return [content for text in texts for content in self._contents([text])]
            return [Problem("cannot be tokenised", f"the tokenizer cannot encode the text: {first_line(error)}")]

    def _finished(self, text: str, content: np.ndarray | Problem) -> np.ndarray | Problem:
        """With the beginning and the end, each once."""
        tokenizer = self._tokenizer
        if isinstance(content, Problem):
            return content
        before, after = tokenizer.before, tokenizer.after
        if self._settings.control_tokens == "parse":
            if tokenizer.bos is not None and len(content) and content[0] == tokenizer.bos:
                content = content[
                    np.argmax(content != tokenizer.bos) if (content != tokenizer.bos).any() else len(content) :
                ]
                before = before if tokenizer.bos in before else (tokenizer.bos, *before)
            if tokenizer.eos is not None and len(content) and content[-1] == tokenizer.eos:
                other = np.flatnonzero(content != tokenizer.eos)
                content = content[: other[-1] + 1 if len(other) else 0]
                after = after if tokenizer.eos in after else (*after, tokenizer.eos)
        elif len(strange := content[np.isin(content, tokenizer.control)]):
            return Problem(
                "a control token in the text",
                f"the tokenizer makes control token {int(strange[0])} of the text itself; write the text otherwise, or "
                "set data.control_tokens: parse",
            )
        if not len(content):
            return _NO_TOKENS
        if dropped := tokenizer.drops(text):
            return Problem("cannot be tokenised", f"the tokenizer has no token for {dropped!r} and would drop it")
        if self._settings.append_eos and tokenizer.eos not in after[-1:]:
            after = (*after, tokenizer.eos)
        return np.concatenate([before, content, after], dtype=content.dtype, casting="unsafe")

    def _encode_bytes(self, text: str) -> np.ndarray:
        """What ByT5Tokenizer gives, hundreds of times as fast, except that text never becomes a special token."""
        if len(text) < PART:
            content = np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET)
            return np.append(content, np.uint16(BYTE_EOS)) if self._settings.append_eos else content
        starts = range(0, len(text), PART)  # part by part, without a second copy of a long text
        size = len(text) if text.isascii() else sum(len(text[start : start + PART].encode()) for start in starts)
        ids, at = np.full(size + self._settings.append_eos, BYTE_EOS, np.uint16), 0
        for start in starts:
            content = np.frombuffer(text[start : start + PART].encode(), np.uint8)
            np.add(content, BYTE_OFFSET, out=ids[at : at + len(content)], dtype=np.uint16)
            at += len(content)
        return ids


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A tokenizer taken apart: the text's own tokens, and what stands around them."""

    encode: Callable[[list[str]], list[np.ndarray]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    bos: int | None
    eos: int | None
    control: tuple[int, ...]  # ids that a text must not become, unless it is parsed for them
    drops: Callable[[str], str] = lambda text: ""  # characters of a text that would vanish


def _of_backend(
    backend: tokenizers.Tokenizer, tokenizer: transformers.PreTrainedTokenizerBase, parse: bool
) -> _Tokenizer:
    """A tokenizer of the library `tokenizers`."""
    control = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    parts = json.loads(backend.to_str())
    before, after = _around(backend)
    own = tokenizers.Tokenizer.from_str(json.dumps(_undisturbed(parts, () if parse else control)))
    own.encode_special_tokens = not parse
    unknown = {parts["model"].get("unk_id"), control.get(parts["model"].get("unk_token"))}
    return _Tokenizer(
        encode=lambda texts: _encoded(own, texts),
        before=before,
        after=after,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        control=() if parse else tuple(sorted(set(control.values()) - unknown)),
        **({"drops": _dropped_by(own)} if _may_drop(parts) else {}),
    )


def _encoded(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    short = [text for text in texts if len(text) < LONG_TEXT]
    encoded = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    return [
        np.array(next(encoded).ids, np.uint32) if len(text) < LONG_TEXT else _encoded_in_parts(tokenizer, text)
        for text in texts
    ]


def _encoded_in_parts(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """The tokens of a long text, in the memory of a part.

    Neighbouring parts overlap, and are joined in the middle of it if they agree on everything about there: the one has
    all that comes before, the other all that comes after, so neither matters to these tokens, nor do the cuts. Where
    they do not agree, the text is encoded at once."""
    joined: list[np.ndarray] = []
    ids, starts = _part(tokenizer, text, 0)
    for begin in range(PART, len(text), PART):
        next_ids, next_starts = _part(tokenizer, text, begin)
        first, middle, last = (begin + quarter * OVERLAP // 4 for quarter in (1, 2, 3))
        inside, next_inside = (first <= starts) & (starts < last), (first <= next_starts) & (next_starts < last)
        same = np.array_equal(ids[inside], next_ids[next_inside])
        if not (same and inside.any() and np.array_equal(starts[inside], next_starts[next_inside])):
            return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
        joined.append(ids[starts < middle])
        ids, starts = next_ids[next_starts >= middle], next_starts[next_starts >= middle]
    return np.concatenate([*joined, ids])


def _part(tokenizer: tokenizers.Tokenizer, text: str, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a part and its overlap with the next, and the characters at which they start."""
    encoding = tokenizer.encode(text[begin : begin + PART + OVERLAP], add_special_tokens=False)
    starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding))
    return np.array(encoding.ids, np.uint32), begin + starts


def _may_drop(parts: dict[str, Any]) -> bool:
    """Byte pairs without a token for the unknown leave out, without a word, what they were not trained on."""
    model = parts["model"]
    before = json.dumps([parts["pre_tokenizer"], parts["normalizer"]])
    spells_bytes = model.get("byte_fallback") or "ByteLevel" in before
    return model.get("type") == "BPE" and model.get("unk_token") is None and not spells_bytes


def _dropped_by(tokenizer: tokenizers.Tokenizer) -> Callable[[str], str]:
    known: dict[str, bool] = {}

    def drops(text: str) -> str:
        for sign in sorted(set(text)):
            if sign not in known:
                known[sign] = sign.isspace() or bool(tokenizer.encode(sign, add_special_tokens=False).ids)
            if not known[sign]:
                return sign
        return ""

    return drops


def _around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x"))
    if backend.post_processor is None:
        return (), ()
    probe.post_processor = backend.post_processor
    encoding = probe.encode("x")
    at = encoding.special_tokens_mask.index(0)
    return tuple(encoding.ids[:at]), tuple(encoding.ids[at + 1 :])


def _undisturbed(parts: dict[str, Any], hidden: Any) -> dict[str, Any]:
    """A tokenizer's description without what would cut, pad or change a text, nor the words `hidden` in its vocabulary.

    Hidden words keep their ids under names that nobody can write."""
    names = {word: f"{secrets.token_hex(16)}" for word in hidden}
    model = dict(parts["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(word, word): number for word, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(word, word), score] for word, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if names and model.get("merges"):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        kept = [not ({*pair, "".join(pair)} & names.keys()) for pair in pairs]
        model["merges"] = [pair for pair, keep in zip(model["merges"], kept, strict=True) if keep]
    if "dropout" in model:
        model["dropout"] = None
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in parts["added_tokens"]]
    return {**parts, "model": model, "added_tokens": added, "truncation": None, "padding": None}


def _of_python(tokenizer: transformers.PreTrainedTokenizerBase, parse: bool) -> _Tokenizer:
    """A tokenizer written in Python."""
    around = tokenizer.build_inputs_with_special_tokens([-1])
    at = around.index(-1)
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control = (control | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}

    def encode(texts: list[str]) -> list[np.ndarray]:
        options = dict(add_special_tokens=False, truncation=False, padding=False, split_special_tokens=not parse)
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False, **options)
        return [np.array(ids, np.int64) for ids in encoded["input_ids"]]

    return _Tokenizer(
        encode=encode,
        before=tuple(around[:at]),
        after=tuple(around[at + 1 :]),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        control=() if parse else tuple(sorted(control)),
    )
