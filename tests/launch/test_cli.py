"""What a user is told, and with which exit code, when a command cannot do what was asked; nothing is left behind.

All but the last are refused before Ray starts, so they run here in this process."""

import io
import json
import shlex
import shutil
import socket

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from documents import write_json_lines
from hardware_tables import write_hardware
from rich.console import Console
from team import TINY_LLAMA

from distca.config import describe_settings, dump_settings, load_settings
from distca.errors import EXIT_DATA, EXIT_OK, EXIT_OTHER, EXIT_SETTINGS, EXIT_TRY_AGAIN
from distca.launch import cli
from distca.launch.cluster.workers import WorkerLost
from distca.launch.data.prepare import prepare
from distca.launch.folder.paths import absolute_paths
from distca.launch.folder.publish import publishing
from distca.launch.folder.runs import keep_model, known_documents
from distca.launch.run import team, train
from distca.launch.run.check import check, prepare_documents
from distca.parallel.models import build_model, read_config

ROWS = [{"input_ids": list(range(1, 90))}, {"input_ids": [5, 6, 7]}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where everything happens; Ray must not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(team, "start_ray", no_ray)
    return tmp_path


class RayWasAboutToStart(BaseException):
    """No error that a command may put into words."""


def no_ray(*_, **__):
    raise RayWasAboutToStart


def write_run(folder, model=None, sources=None, **sections):
    values = dict(
        model=dict(config=TINY_LLAMA | (model or {})),
        data=dict(sources=sources or [dict(path="rows.jsonl")], cache=str(folder / "cache")),
        train=dict(tokens_per_step=60, steps=4, precision="fp32"),
        monitor=dict(folder=str(folder / "runs")),
    )
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    if not (folder / "rows.jsonl").exists():
        write_json_lines(folder / "rows.jsonl", ROWS)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def said(capsys, code, *arguments) -> str:
    """What a failing command writes to stderr: one message, no trace."""
    assert cli.run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    assert err.startswith("distca: ") and err.count("distca: ") == 1 and err.endswith("\n")
    assert "Traceback" not in out + err
    return err.removeprefix("distca: ").strip()


def assert_nothing_left(folder):
    """No run, no verify folder, no prepared or half-prepared documents."""
    left = [path for name in ("runs", "cache") for path in (folder / name).rglob("*")]
    assert not left


# ---- models ----

GEMMA = dict(
    model_type="gemma2", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=8, attn_logit_softcapping=5.0
)
MODELS = {
    "family": (dict(model_type="gpt2"), "model type 'gpt2' has not been proved exact; these have: llama, mistral"),
    "no family": (dict(model_type="lama"), "model: no configuration from"),
    "dropout": (dict(attention_dropout=0.1), "attention_dropout = 0.1 is not supported: set it to 0.0"),
    "bidirectional": (
        dict(model_type="gemma3_text", use_bidirectional_attention=True),
        "bidirectional attention is not supported",
    ),
    "rope": (
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        "rope_type 'dynamic' changes with the longest position that a rank sees",
    ),
    "soft cap": (
        GEMMA,
        "kernels.backend 'torch' cannot compute core attention for head size 8 in float32 with softcap",
    ),
}


MODELS |= {
    "misspelled": (
        dict(rope_parameters=dict(rope_typ="linear", factor=4.0)),
        "model.config: rope_parameters: no such key 'rope_typ'; did you mean 'rope_type'?",
    ),
    "no window": (
        dict(model_type="mistral", sliding_window=0),
        "sliding_window = 0 lets no row see a key: give how many keys a row sees, itself included, or null",
    ),
    "heads": (dict(num_key_value_heads=3), "8 query heads of size 8 cannot share 3 key/value heads evenly"),
    "ids": (dict(eos_token_id=96), "model.config: eos_token_id = 96 is no token of a vocabulary of 96"),
    "two lines": (dict(tie_word_embeddings="no"), "model.config: tie_word_embeddings = 'no': want bool"),
}


@pytest.mark.parametrize("command", ["train", "verify"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_cannot_be_trained_exactly_is_refused(folder, capsys, model, command):
    config, sentence = MODELS[model]
    text = said(capsys, EXIT_SETTINGS, command, write_run(folder, config))
    assert text.startswith(sentence) and len(text.splitlines()) == 1
    assert_nothing_left(folder)


def test_a_refusal_names_the_back_end_that_works(folder, capsys):
    text = said(capsys, EXIT_SETTINGS, "train", write_run(folder, GEMMA))
    assert "set `kernels.backend: reference`" in text


def test_a_model_without_weights_is_refused(folder, capsys, offline):
    (folder / "empty").mkdir()
    run = write_run(folder)
    for path in ("empty", "somebody/model-that-is-not-here"):
        text = said(capsys, EXIT_SETTINGS, "train", run, "--model.config", "null", "--model.path", path)
        place = folder / path if path == "empty" else path
        assert text.startswith(f"model: no configuration from {place}")
    assert_nothing_left(folder)


@pytest.mark.parametrize("command", ["train", "verify"])
def test_weights_of_another_shape_are_refused_before_data_and_ray(folder, capsys, command):
    build_model(read_config(None, TINY_LLAMA), None, None, torch.float32, seed=0).save_pretrained(folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | dict(vocab_size=100)))
    capsys.readouterr()
    run = write_run(folder)
    text = said(capsys, EXIT_SETTINGS, command, run, "--model.config", "null", "--model.path", "model")
    assert "embed_tokens.weight is (96, 64), the configuration wants (100, 64)" in text
    assert_nothing_left(folder)


def test_documents_longer_than_the_models_positions_are_said(folder, caplog):
    settings = load_settings(write_run(folder, dict(max_position_embeddings=50)))
    prepare_documents(settings, check(settings), Console(file=io.StringIO()))
    (text,) = [r.getMessage() for r in caplog.records if "position" in r.getMessage()]
    assert text.startswith("documents of up to 60 tokens go beyond position 50,")


# ---- settings ----

SETTINGS = {
    "bf16 without ZeRO": (
        ["--train.precision", "bf16", "--parallel.zero_stage", "0"],
        "train.precision: bf16 needs parallel.zero_stage of at least 1",
    ),
    "tokens": (["--parallel.trainers", "7"], "run.yaml: 1 setting to correct\n  train.tokens_per_step = 60 cannot be"),
    "nobody serves": (["--parallel.trainers_serve", "false"], "nobody would compute attention"),
    "unknown": (["--train.step", "3"], "train.step: no such setting; did you mean 'steps'?"),
    "no value": (["--train.steps"], "--train.steps needs a value"),
    "tokenizer": (["--data.tokenizer", "./none"], "/none': there is no such folder"),
}


@pytest.mark.parametrize("command", ["train", "verify"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused(folder, capsys, offline, case, command):
    overrides, sentence = SETTINGS[case]
    text_of = [dict(path="words.txt")] if case == "tokenizer" else None
    (folder / "words.txt").write_text("some words")
    assert sentence in said(capsys, EXIT_SETTINGS, command, write_run(folder, sources=text_of), *overrides)
    assert_nothing_left(folder)


def test_fp64_verifies_but_does_not_train(folder, capsys):
    run = write_run(folder, train=dict(precision="fp64"))
    assert "fp64 is for `distca verify`" in said(capsys, EXIT_SETTINGS, "train", run)
    assert_nothing_left(folder)
    with pytest.raises(RayWasAboutToStart):
        cli.run(["verify", str(run)])


def test_a_run_file_that_is_not_there_or_no_yaml_is_refused(folder, capsys):
    assert "cannot read the run file" in said(capsys, EXIT_SETTINGS, "train", "none.yaml")
    (folder / "a.yaml").write_text("a: [")
    assert "a.yaml: not a YAML file" in said(capsys, EXIT_SETTINGS, "verify", "a.yaml")


def test_a_folder_that_cannot_be_written_is_refused(folder, capsys):
    (folder / "file").write_text("")
    run = write_run(folder)
    assert "monitor.folder: cannot make" in said(capsys, EXIT_SETTINGS, "train", run, "--monitor.folder", "file/runs")
    assert "data.cache: cannot write" in said(capsys, EXIT_SETTINGS, "train", run, "--data.cache", "file/cache")


# ---- data ----


@pytest.fixture
def offline(monkeypatch):
    """As HF_HUB_OFFLINE=1 before the start; both libraries read the variable when they are imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


BAD_ROWS = {
    "empty": ({"input_ids": []}, "row 1 (counted from 0): the document is empty"),
    "vocabulary": ({"input_ids": [1, 96]}, "row 1 (counted from 0): token id 96 is outside the model's vocabulary"),
    "negative": ({"input_ids": [1, -1]}, "row 1 (counted from 0): token id -1 is outside"),
    "broken": (b'{"input_ids": [1, 2', "row 1 (counted from 0): is not JSON"),
    "column": ({"body": "x"}, "row 1 (counted from 0): has no column `text` (columns: `body`)"),
    "type": ({"input_ids": 3}, "row 1 (counted from 0): column `input_ids` holds 3; a document is text, or a list of"),
}  # fmt: skip


def test_a_table_of_another_models_times_is_refused_where_it_would_be_needed(folder, capsys):
    planner = dict(cost=str(write_hardware(folder / "times.yaml", query_heads=4)), wire=dict(gb_per_s=1.0))
    text = said(capsys, EXIT_SETTINGS, "train", write_run(folder, planner=planner))
    assert "holds times of 4:2 heads of 8, the model has 8:2 of 8" in text
    assert_nothing_left(folder)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_document_is_named_with_its_file_and_row(folder, capsys, case):
    row, sentence = BAD_ROWS[case]
    write_json_lines(folder / "rows.jsonl", [ROWS[0], row])
    text = said(capsys, EXIT_DATA, "train", write_run(folder))
    assert text.startswith(f"data.sources[0] ({folder}/rows.jsonl): file {folder}/rows.jsonl, ") and sentence in text
    assert "data.on_bad_document: skip" in text
    assert_nothing_left(folder)


BAD_SOURCES = {
    "missing": (dict(path="none.jsonl"), "there is no such file or folder"),
    "glob": (dict(path="none/**/*.jsonl"), "no file matches"),
    "ending": (dict(path="words"), "does not say its format; set `format` of the source"),
    "unreadable": (dict(path="folder.jsonl/x.parquet"), "row 0 (counted from 0): cannot be read: Parquet") ,
    "no text": (dict(path="latin.txt"), "file latin.txt: cannot be read"),
    "hub": (dict(path="somebody/not-here"), "is neither a file or folder here nor a data set on the Hugging Face hub"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_source_that_cannot_be_read_is_named(folder, capsys, offline, case):
    source, sentence = BAD_SOURCES[case]
    (folder / "words").write_text("words")
    (folder / "latin.txt").write_bytes("ümlaut".encode("latin-1"))
    (folder / "folder.jsonl").mkdir()
    (folder / "folder.jsonl" / "x.parquet").write_bytes(b"PAR1 it is not")
    text = said(capsys, EXIT_DATA, "train", write_run(folder, sources=[source]))
    assert text.startswith(f"data.sources[0] ({folder}/{source['path']}): ") or case == "hub" and sentence in text
    assert_nothing_left(folder)


# ---- resume and export ----


def finished_run(folder, step=4):
    """A run's folder with a checkpoint that nobody will get as far as to read."""
    run = folder / "runs" / "a"
    run.mkdir(parents=True)
    settings = absolute_paths(load_settings(write_run(folder)))
    (run / "run.yaml").write_text(dump_settings(settings))
    documents = prepare(settings.data, 96)
    keep_model(run, settings, read_config(None, settings.model.config), documents)
    known = dict(settings=settings.model_dump(mode="json"), documents=known_documents(documents), cursor=[0, 0])
    with publishing(run / "checkpoints", step, known) as draft:
        (draft / "weights").write_text("x")
    return run


def test_resume_needs_a_run_and_a_checkpoint(folder, capsys):
    assert "none/run.yaml: cannot read the run file" in said(capsys, EXIT_SETTINGS, "resume", "none")
    run = finished_run(folder)
    (run / "checkpoints" / "step-000004" / "weights").write_text("y")
    text = said(capsys, EXIT_DATA, "resume", run)
    assert "no checkpoint to resume from" in text and "its bytes have changed" in text
    shutil.rmtree(run / "checkpoints")
    assert "there is no such folder" in said(capsys, EXIT_DATA, "resume", run)


@pytest.mark.parametrize(
    "override, sentence",
    [
        (["--parallel.trainers", "2"], "parallel.trainers: 1 (asked for 2)"),
        (["--parallel.zero_stage", "2"], "parallel.zero_stage: 1 (asked for 2)"),
        (["--train.precision", "bf16"], "train.precision: fp32 (asked for bf16)"),
        (["--seed", "7"], "seed: 0 (asked for 7)"),
        (["--data.max_document_tokens", "9"], "data.max_document_tokens: None (asked for 9)"),
        ([], "step 4 of 4 is done; ask for more: --train.steps 8"),
        (["--kernels.backend", "triton2"], "kernels.backend: Input should be 'auto'"),
        (["--model.config.attention_dropout", "0.5", "--train.steps", "9"], "attention_dropout = 0.5 is not supported"),
        (["--model.config.hidden_size", "48", "--train.steps", "9"], "another model: hidden_size: 64 (asked for 48)"),
    ],
    ids=str,
)
def test_resume_refuses_what_does_not_fit_and_leaves_the_run_as_it_was(folder, capsys, override, sentence):
    run = finished_run(folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert sentence in said(capsys, EXIT_SETTINGS, "resume", run, *override)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_export_refuses_an_existing_folder_and_settings(folder, capsys):
    run = finished_run(folder)
    (folder / "out").mkdir()
    assert "out exists already: name a folder that does not" in said(capsys, EXIT_SETTINGS, "export", run, "out")
    (folder / "link").symlink_to("nowhere")
    assert "link exists already" in said(capsys, EXIT_SETTINGS, "export", run, "link")
    text = said(capsys, EXIT_SETTINGS, "export", run, "other", "--train.steps", "3")
    assert text == "distca export takes no settings, found --train.steps"
    assert "none is no run's folder: there is no run.yaml" in said(capsys, EXIT_SETTINGS, "export", "none", "other")
    assert not (folder / "other").exists() and not list((folder / "out").iterdir())


@pytest.mark.parametrize("name", ["a [b] c", "[/bold]", "[bold]", "zwölf [läufe]", "a'b"])
def test_folders_are_shown_as_they_are_called_and_commands_as_a_shell_takes_them(folder, capsys, monkeypatch, name):
    (folder / name).parent.mkdir(exist_ok=True)
    run = finished_run(folder).rename(folder / name)
    monkeypatch.setattr(train, "_run", lambda *_: None)
    assert cli.run(["resume", str(run), "--train.steps", "9"]) == EXIT_OK
    out = capsys.readouterr().out
    assert f"resuming {run} after step 4\n" in out and f"the run is in {run}\n" in out
    (command,) = [line.split("model:")[1] for line in out.splitlines() if "distca export" in line]
    assert shlex.split(command) == ["distca", "export", str(run), "OUT"]


# ---- help ----


@pytest.mark.parametrize("command", ["train", "resume", "verify", "export", "settings"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.run([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and f"usage: distca {command}" in out
    assert len(out.splitlines()[2]) > 20, "a sentence on what it does"


def test_help_names_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for word in ("train", "resume", "verify", "export", "settings", "2 bad settings", "3 bad data", "75 stopped"):
        assert word in out


def test_settings_lists_every_setting_with_units(capsys):
    assert cli.run(["settings"]) == EXIT_OK
    out = capsys.readouterr().out
    for name, allowed, default, _ in describe_settings():
        assert f"{name}  {allowed}, {default}\n" in out
    assert "parallel.deadline_s  number > 0, default 120.0\n    Seconds a trainer waits" in out


@pytest.mark.parametrize("arguments", [["trian", "x.yaml"], ["train"], ["train", "x.yaml", "--trian.steps", "3"], []])
def test_a_command_line_that_cannot_be_parsed_ends_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.run(arguments)
    assert caught.value.code == EXIT_SETTINGS and capsys.readouterr().err


# ---- what happens later ----


def test_a_cluster_that_does_not_answer_is_try_again_and_leaves_no_run(folder, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert "no answer from the Ray cluster" in said(capsys, EXIT_TRY_AGAIN, "train", write_run(folder))
    assert not list((folder / "runs").iterdir())


def test_a_lost_worker_ends_with_1_and_keeps_its_logs(folder, capsys, monkeypatch):
    def lost(run_folder, *_, **__):
        (run_folder / "logs").mkdir()
        raise WorkerLost("lost trainer 0 while starting: its process was killed", [])

    monkeypatch.setattr(team, "start_ray", lost)
    assert "lost trainer 0" in said(capsys, EXIT_OTHER, "train", write_run(folder))
    assert list((folder / "runs").glob("*/logs"))


def test_ctrl_c_before_the_first_step_is_said(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(team, "start_ray", interrupt)
    assert "stopped at once" in said(capsys, 130, "train", write_run(folder))


@pytest.mark.alone
@pytest.mark.slow
def test_what_only_a_worker_can_see_comes_out_as_its_sentence_and_leaves_no_run(folder, capsys, monkeypatch):
    """Real Ray. The names and shapes of the weights are right, so the driver is content; one is no number."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    model = build_model(read_config(None, TINY_LLAMA), None, None, torch.float32, seed=0)
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(folder / "model")
    run = write_run(folder)
    capsys.readouterr()
    text = said(capsys, EXIT_SETTINGS, "train", run, "--model.config", "null", "--model.path", "model")
    assert text.startswith("llama: its outputs are not finite: the weights hold NaN or infinity")
    assert not list((folder / "runs").iterdir())
    assert load_settings(run)
