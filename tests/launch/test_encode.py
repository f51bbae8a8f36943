"""From texts to token ids."""

import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import tokenizers
import transformers
from documents import as_bytes, data_settings, refusal, stored, write_json_lines
from hypothesis import given
from hypothesis import strategies as st

from distca.config import DataSettings
from distca.errors import SettingsError
from distca.launch.data import encode as encode_module
from distca.launch.data.batches import Corpus
from distca.launch.data.encode import Encoder, load_tokenizer
from distca.launch.data.prepare import prepare


@pytest.fixture
def offline(monkeypatch):
    """As HF_HUB_OFFLINE=1 before the start; both libraries read the variable when they are imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_bytes_are_encoded_as_the_byte_tokenizer_does():
    """Left out: the spelling of special tokens ("</s>"), which text must not be able to write."""
    tokenizer = load_tokenizer(DataSettings(sources=[{"path": "x"}]))
    assert isinstance(tokenizer, transformers.ByT5Tokenizer) and len(tokenizer) == 259
    encode = Encoder(DataSettings(sources=[{"path": "x"}]))

    @given(st.text(max_size=40).filter(lambda text: "<" not in text))
    def agree(text):
        assert encode([text])[0].tolist() == tokenizer(text)["input_ids"]

    agree()


SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
LETTERS = list("w12</s>pad")


def save_tokenizer(folder, kind: str, template: bool = True, **edits):
    """A small tokenizer of a kind, which puts <s> before and </s> after a text if it has a template."""
    words = {word: number for number, word in enumerate([*SPECIAL, "w1", "w2"])}
    letters = {word: number for number, word in enumerate([*SPECIAL, *dict.fromkeys(LETTERS)])}
    models, spaces = tokenizers.models, tokenizers.pre_tokenizers.WhitespaceSplit()
    pieces = [(word, 0.0) for word in SPECIAL] + [(letter, -2.0) for letter in dict.fromkeys(["\u2581", *LETTERS])]
    model, before = {
        "words": (models.WordLevel(words, unk_token="<unk>"), spaces),
        "words without unk": (models.WordLevel(words, unk_token="none"), spaces),
        "pieces": (models.Unigram(pieces, unk_id=2), tokenizers.pre_tokenizers.Metaspace()),
        "pairs": (models.BPE(letters, [], unk_token="<unk>"), spaces),
        "merged": (models.BPE({**letters, "</": 20}, [("<", "/")], unk_token="<unk>"), spaces),
        "parts": (models.WordPiece(words, unk_token="<unk>"), spaces),
    }[kind]
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = before
    if template:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=3, **named)
    fast.save_pretrained(folder)
    description = folder / "tokenizer.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), **edits}))
    return folder


KINDS = ["words", "pieces", "pairs", "merged", "parts"]


def encoder(folder, **settings):
    return Encoder(DataSettings(sources=[{"path": "x"}], tokenizer=str(folder), **settings))


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_cannot_write_control_tokens(tmp_path, kind, template):
    """`<s> w1 </s>` keeps its characters (or becomes unknown words), and has one beginning and end around it."""
    encode = encoder(save_tokenizer(tmp_path / "t", kind, template))
    (plain,) = encode(["w1 w2"])
    for text in ("<s> w1 w2 </s>", "<pad> w1 w2", "w1 </s> w2", "</s>", "</s></s>", "<pad>"):
        (ids,) = encode([text])
        inside = ids[template:-1].tolist()
        assert not {0, 1, 3} & set(inside) and inside
        assert ids[-1] == 1 and plain[-1] == 1 and (not template or ids[0] == plain[0] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_parsed_control_tokens_stand_once_at_each_border(tmp_path, kind):
    for template in (True, False):
        encode = encoder(save_tokenizer(tmp_path / f"{template}", kind, template), control_tokens="parse")
        space = [4] if kind == "pieces" else []
        (plain,) = encode(["w1 w2"])
        inside = plain[template:-1].tolist()
        for text in ("<s>w1 w2</s>", "<s> w1 w2</s>", "<s><s>w1 w2</s></s>"):
            (ids,) = encode([text])
            found = [number for number in ids.tolist() if number not in space]
            assert found == [0, *(number for number in inside if number not in space), 1]
        (ids,) = encode(["w1 <pad> </s> w2"])
        assert ids.tolist().count(3) == 1 and ids.tolist().count(1) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizers_files_say_about_lengths_cuts_and_pads_nothing(tmp_path, kind):
    plain = encoder(save_tokenizer(tmp_path / "plain", kind))(["w1 w2 w1 w2", "w1"])
    cutting = save_tokenizer(
        tmp_path / "cutting",
        kind,
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 3,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    assert [ids.tolist() for ids in encoder(cutting)(["w1 w2 w1 w2", "w1"])] == [ids.tolist() for ids in plain]


def test_a_text_that_the_tokenizer_fails_on_is_a_bad_document(tmp_path, caplog):
    folder = save_tokenizer(tmp_path / "t", "words without unk")
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in ("w1", "other", "w2", " ")])
    said = refusal(data_settings(tmp_path / "cache", path, tokenizer=str(folder)))
    assert f"file {path}, row 1" in said and "the tokenizer cannot encode the text" in said
    skipping = data_settings(tmp_path / "cache", path, tokenizer=str(folder), on_bad_document="skip")
    assert stored(skipping) == [[0, 4, 1], [0, 5, 1]]
    assert "1 cannot be tokenised" in caplog.text and "1 empty" in caplog.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tokenizers as models have them: byte pairs over bytes, and sentence pieces."""
    folder = tmp_path_factory.mktemp("trained")
    text = [Path(module.__file__).read_text() for module in (json, gzip)] + ["zwölf Boxkämpfer “jagen” 日本語 🙂 " * 20]
    backends = {
        "byte pairs": tokenizers.ByteLevelBPETokenizer(),
        "sentence pieces": tokenizers.SentencePieceUnigramTokenizer(),
        "pairs of pieces": tokenizers.SentencePieceBPETokenizer(),
    }
    for name, backend in backends.items():
        unknown = {"unk_token": "<unk>"} if name == "sentence pieces" else {}
        backend.train_from_iterator(text, vocab_size=800, special_tokens=["<unk>", "</s>"], **unknown)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="</s>")
        fast.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", ["byte pairs", "sentence pieces", "pairs of pieces"])
def test_a_long_text_has_the_same_tokens_in_parts(trained, kind, monkeypatch):
    whole = encoder(trained / kind)
    parts = encoder(trained / kind)
    words = ["def ", "  ", "\n\n", "x" * 9, "日本語", "🙂", "é", "“quoted”", "import json\n", "</s>", "1234567", "\t"]
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(words, 400)) for _ in range(20)] + [" " * 2000, "a" * 3000, "🙂" * 700]
    expected = [ids.tolist() for ids in whole(texts)]
    monkeypatch.setattr(encode_module, "LONG_TEXT", 500)
    monkeypatch.setattr(encode_module, "PART", 301)
    monkeypatch.setattr(encode_module, "OVERLAP", 128)
    assert [ids.tolist() for ids in parts(texts)] == expected


def test_a_tokenizer_that_would_drop_a_character_is_not_believed(tmp_path):
    """Byte pairs without an unknown token leave out what they do not know."""
    folder = save_tokenizer(tmp_path / "t", "pairs")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["unk_token"] = None
    (folder / "tokenizer.json").write_text(json.dumps(description))
    good, bad = encoder(folder)(["w1 w2", "w1é"])
    assert good.tolist() == [0, 4, 5, 4, 6, 1]
    assert "has no token for 'é'" in bad.sentence


def test_a_tokenizer_written_in_python_keeps_the_rule(tmp_path):
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "t")
    assert [ids.tolist() for ids in encoder(tmp_path / "t")(["a</s>"])] == as_bytes(["a</s>"])
    parsed = encoder(tmp_path / "t", control_tokens="parse")(["a</s>", "<pad>a"])
    assert [ids.tolist() for ids in parsed] == [[100, 1], [0, 100, 1]]


def test_the_models_own_tokenizer_is_the_default(tmp_path):
    folder = save_tokenizer(tmp_path / "model", "words")
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    corpus = Corpus(prepare(data_settings(tmp_path / "cache", path), 259, str(folder)))
    assert corpus.tokens(0, 0).tolist() == [0, 4, 5, 1]
    assert stored(data_settings(tmp_path / "cache", path)) == as_bytes(["w1 w2"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SettingsError, match="set `data.tokenizer`"):
        prepare(data_settings(tmp_path / "cache", path), 259, str(folder))


@pytest.mark.parametrize("harm", [b"", b"{", b"[]", b"\xff", b'{"version": "1.0"}', b"[" * 100_000], ids=repr)
def test_a_damaged_tokenizer_is_refused_in_words(tmp_path, harm):
    folder = save_tokenizer(tmp_path / "t", "words")
    (folder / "tokenizer.json").write_bytes(harm)
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "w1"}])
    with pytest.raises(SettingsError, match="data.tokenizer: cannot load"):
        prepare(data_settings(tmp_path / "cache", path, tokenizer=str(folder)), 259)


@pytest.mark.parametrize("name", ["./none", "/no/where", "~/none", "a/b/c", "none.json", "a\\b", "here/none"])
def test_what_looks_like_a_folder_is_never_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "w1"}])
    with pytest.raises(SettingsError, match="there is no such folder"):
        prepare(data_settings(tmp_path / "cache", path, tokenizer=name), 259)


def test_a_tokenizer_that_makes_larger_ids_than_the_model_knows_is_refused(tmp_path):
    words = save_tokenizer(tmp_path / "t", "words")
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "w1"}, {"text": "w1 w2"}])
    said = refusal(data_settings(tmp_path / "cache", path, tokenizer=str(words)), vocab_size=5)
    assert "row 1" in said and "token id 5" in said and "`data.tokenizer`" in said and "`vocab_size`" in said


def test_a_tokenizer_that_is_nowhere_is_named(tmp_path, offline):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(SettingsError, match="data.tokenizer: cannot load 'nobody/nowhere'"):
        prepare(data_settings(tmp_path / "cache", path, tokenizer="nobody/nowhere"), 259)


def test_a_tokenizer_that_is_a_file_is_refused_with_what_to_give(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match="is a file; give the folder that it lies in"):
        prepare(data_settings(tmp_path / "cache", path, tokenizer=str(tmp_path / "tokenizer.json")), 259)
