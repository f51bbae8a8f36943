"""How does a checkpoint leave DistCA? As an ordinary Hugging Face folder: configuration, safetensors, tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distca.errors import SettingsError
from distca.launch.folder.publish import newest
from distca.launch.folder.runs import CONFIG, MODEL, read_own_config
from distca.launch.folder.status import CHECKPOINTS, RUN_FILE
from distca.parallel.engine import full_weights
from distca.parallel.models import build_model, read_config, without_advice
from distca.parallel.precision import DTYPES


def export(folder: Path, out: Path) -> int:
    """Write the run's newest checkpoint to `out`, all or nothing; returns its step."""
    if os.path.lexists(out):
        raise SettingsError(f"{out} exists already: name a folder that does not")
    if not (folder / RUN_FILE).is_file():
        raise SettingsError(f"{folder} is no run's folder: there is no {RUN_FILE} in it")
    draft = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        draft.rmdir()
    except OSError as error:
        raise SettingsError(f"cannot write to {out}: {error.strerror}; name a place that you may write to") from None
    checkpoint = newest(folder / CHECKPOINTS)
    began = checkpoint.facts["settings"]  # the run's file may say by now how it is to go on
    config = read_config(None, read_own_config(folder))
    model = build_model(config, None, None, DTYPES[began["train"]["precision"]], began["seed"], attention="sdpa")
    weights = {name.removeprefix("model."): value for name, value in full_weights(checkpoint.path).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    every, once = (dict(model.named_parameters(remove_duplicate=remove)) for remove in (False, True))
    tied = every.keys() - once.keys()
    assert not unexpected and set(missing) <= tied, f"the checkpoint lacks {missing} and has {unexpected} too many"
    model.tie_weights()

    try:
        with without_advice():
            model.save_pretrained(draft)
        for file in (folder / MODEL).iterdir():  # the tokenizer, and how the model is to generate
            if file.is_dir():
                shutil.copytree(file, draft / file.name)
            elif file.name != CONFIG:
                shutil.copyfile(file, draft / file.name)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return checkpoint.step
