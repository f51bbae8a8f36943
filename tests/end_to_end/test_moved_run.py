"""A run is complete by itself: begun from relative paths, moved with its folder, its model and data elsewhere or gone,
it goes on with the same bits, and what it exports loads and generates as its model did."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
import yaml
from documents import write_json_lines
from team import TINY_LLAMA

from distca.launch.folder.publish import newest

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]  # several runs, on any machine

DISTCA = str(Path(sys.executable).with_name("distca"))
STEPS, SAVED = 4, 2
START_S = 300
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def distca(cwd: Path, *arguments) -> str:
    ended = subprocess.run([DISTCA, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 0 and not ended.stderr, ended.stdout + ended.stderr
    return ended.stdout


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_model(folder: Path) -> None:
    """A small Llama with weights, a word tokenizer with a chat template, and generation settings."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij", "user", "system"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    llama = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY_LLAMA))
    llama.save_pretrained(folder)
    settings = dict(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7, eos_token_id=[2, 5])
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """A run of ids with labels, and of text, begun in a folder of which nothing but copies is left: (run, losses)."""
    first = tmp_path_factory.mktemp("first")
    write_model(first / "models" / "tiny")
    ids = [[(5 * n + i * i) % 90 for i in range(20 + 13 * n)] for n in range(8)]
    rows = [{"input_ids": row, "labels": [-100] * 9 + row[9:]} for row in ids]
    write_json_lines(first / "data" / "ids.jsonl", rows)
    write_json_lines(first / "data" / "text.jsonl", [{"text": "a b c d e f g h i j " * n} for n in range(1, 9)])
    values = dict(
        name="moved",
        model=dict(path="models/tiny"),
        data=dict(sources=[dict(path="data/ids.jsonl"), dict(path="data/text*.jsonl")], cache="cache"),
        train=dict(tokens_per_step=300, steps=STEPS, precision="fp32", optimizer=dict(learning_rate=3e-3)),
        parallel=dict(trainers=1, servers=1, trainers_serve=False, zero_stage=3),
        checkpoint=dict(every_steps=SAVED, keep=2),
    )
    (first / "run.yaml").write_text(yaml.safe_dump(values))
    distca(first, "train", "run.yaml")
    (run,) = (first / "runs").iterdir()
    found = losses(run)
    shutil.rmtree(newest(run / "checkpoints").path)
    second = tmp_path_factory.mktemp("second")
    shutil.copytree(first / "models" / "tiny", second / "weights")
    shutil.copytree(first / "data", second / "texts")
    moved = Path(shutil.move(run, second / "went [on] ü"))
    shutil.rmtree(first)
    return moved, found


def test_it_goes_on_with_the_same_bits_and_exports_what_its_model_was(began, tmp_path):
    run, truth = began
    elsewhere = run.parent
    exported = tmp_path / "exported"
    distca(tmp_path, "export", run, exported)
    sources = ["--data.sources.0.path", "texts/ids.jsonl", "--data.sources.1.path", "texts/text.jsonl"]
    said = distca(elsewhere, "resume", run.name, *sources, "--data.cache", "new-cache", "--data.tokenizer", "weights")
    assert f"after step {SAVED}" in said and os.listdir(elsewhere / "new-cache")
    assert len(truth) == STEPS and losses(run) == truth

    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    generation = model.generation_config
    assert (generation.temperature, generation.top_p, generation.max_new_tokens) == (0.6, 0.9, 7)
    assert generation.do_sample and generation.eos_token_id == [2, 5]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == TEMPLATE and tokenizer("a c").input_ids == [3, 5]
    prompt = torch.tensor([tokenizer("a b c").input_ids])
    assert model.generate(prompt).shape[1] <= 3 + 7
