"""What does a run's folder hold, so that the run is complete by itself, and under which settings may it go on?

    run.yaml            its settings, every local path absolute
    model/              the model's configuration and generation settings, and the tokenizer
    kernel_times.yaml   the table that plans are made from, where one is used
    checkpoints/        what `distca.launch.folder.publish` promises
    logs/  tensorboard/  metrics.jsonl  events.txt  traces/
    workers.json        while it lasts

It can be moved, resumed and exported wherever it lies, also when the folders that it began from are gone: weights are
in its checkpoints, and documents are known by their content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from distca.config import FORMULAS, ModelSettings, RunSettings, dump_settings
from distca.errors import DataError, SettingsError, first_line
from distca.hardware import read_hardware, write_hardware
from distca.launch.data.batches import read_meta
from distca.launch.data.encode import load_tokenizer, tokenizer_name
from distca.launch.data.identity import find_prepared
from distca.launch.folder.publish import Published
from distca.launch.folder.status import RUN_FILE
from distca.parallel.models import mapping_of, read_config
from distca.paths import looks_local

logger = logging.getLogger(__name__)

KERNEL_TIMES, MODEL = "kernel_times.yaml", "model"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
PROVENANCE = ("_name_or_path", "transformers_version", "architectures*", "dtype", "torch_dtype")  # changes no model
MOST_NAMED = 5  # files in one sentence

BOUND = (
    *("seed", "parallel.trainers", "parallel.zero_stage", "train.precision"),
    *("data.sources.*.weight", "data.max_document_tokens"),
)
"""What a checkpoint's files, or its place in the data, have a meaning under. The model and the documents are compared
by their content; everything else may change at a resume."""
ELSEWHERE = (
    *("model.path", "model.revision", "model.config*", "data.cache", "data.tokenizer*", "data.sources.*.path"),
    *("planner.cost", "monitor.*"),
)
"""Where things are, or what is compared by content: nothing to be said of it."""


def write_settings(settings: RunSettings, folder: Path) -> None:
    """What `resume` goes by; at no moment half a file."""
    draft = folder / f".{RUN_FILE}"
    draft.write_text(dump_settings(settings), encoding="utf-8")
    draft.replace(folder / RUN_FILE)


def with_kernel_times(settings: RunSettings, folder: Path) -> RunSettings:
    """The settings with the planner's table in the run's own folder, which every worker sees and nobody measures
    anew: plans stay the same."""
    if settings.planner.cost in FORMULAS:
        return settings
    named, own = Path(settings.planner.cost), folder / KERNEL_TIMES
    if not named.exists() and (folder / named.name).exists():  # the folder has been moved since
        named = folder / named.name
    times = read_hardware(named)
    if own.exists() and read_hardware(own) != times:  # nothing that the run went by is written over
        digest = hashlib.blake2b(times.model_dump_json().encode(), digest_size=4).hexdigest()
        own = own.with_stem(f"{own.stem}-{digest}")
    write_hardware(own, times)
    planner = settings.planner.model_copy(update={"cost": str(own.resolve())})
    return settings.model_copy(update={"planner": planner})


# ---- under which settings a checkpoint goes on ----


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists as (dotted name, value); an empty one is a value itself."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    items = list(items)
    if not items:
        yield prefix.removesuffix("."), values
    for name, value in items:
        yield from leaves(value, f"{prefix}{name}.")


def differences(before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value before, value after) of everything in which two nested mappings differ; None: not there."""
    old, new = dict(leaves(before)), dict(leaves(after))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def changes_since(checkpoint: Published, settings: RunSettings) -> list[str]:
    """What is another setting than the checkpoint was made with, in words;
    raises `SettingsError` for what may not be."""
    changed = list(differences(checkpoint.facts["settings"], settings.model_dump(mode="json")))
    wrong = [f"{name}: {old} (asked for {new})" for name, old, new in changed if _is_one_of(name, BOUND)]
    if wrong:
        raise SettingsError(
            f"{checkpoint.path} can only be resumed with {', '.join(wrong)}; steps, schedule, optimizer, tokens per "
            "step and attention servers may change"
        )
    return [f"{name} {old} → {new}" for name, old, new in changed if not _is_one_of(name, ELSEWHERE)]


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# ---- the documents that a checkpoint has a place in ----


def known_documents(documents: Sequence[Path]) -> list[dict[str, Any]]:
    """What a checkpoint notes of its documents: what they hold, where they are prepared, the files they came from."""
    return [{name: meta[name] for name in ("content", "identity", "files")} for meta in map(read_meta, documents)]


def kept_documents(settings: RunSettings, checkpoint: Published) -> tuple[Path, ...] | None:
    """The checkpoint's documents as they were prepared before, where all of them are still there and no others, nor
    another way to read them, are asked for."""
    asked = differences(checkpoint.facts["settings"]["data"], settings.model_dump(mode="json")["data"])
    found = [find_prepared(settings.data.cache, document["identity"]) for document in checkpoint.facts["documents"]]
    return tuple(found) if all(found) and all(name == "cache" for name, _, _ in asked) else None


def refuse_other_documents(settings: RunSettings, documents: Sequence[Path], checkpoint: Published) -> None:
    """Raise `DataError` where a checkpoint's place in its documents has no meaning, naming what is another."""
    before, now = checkpoint.facts["documents"], known_documents(documents)
    if [d["content"] for d in before] == [d["content"] for d in now]:
        return
    wrong = [f"{len(now)} sources, not {len(before)}"] if len(now) != len(before) else []
    for number, (old, new) in enumerate(zip(before, now, strict=False)):
        if old["content"] != new["content"]:
            path = settings.data.sources[number].path
            wrong.append(f"data.sources[{number}] ({path}): {other_files(old['files'], new['files'])}")
    raise DataError(
        f"{checkpoint.path}: the documents have changed since, and its place in them has no meaning now: "
        f"{'; '.join(wrong)}. Restore them, or start a new run"
    )


def other_files(before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> str:
    """In which files two states of a source differ, by content."""
    old, new = Counter(digest for _, digest in before), Counter(digest for _, digest in now)
    gone = [name for name, digest in before if old[digest] > new[digest]]
    come = [name for name, digest in now if new[digest] > old[digest]]
    words = [f"{name} has changed" for name in come if name in gone]
    words += [f"{name} is new" for name in come if name not in gone] + [f"{n} is gone" for n in gone if n not in come]
    if not words:
        words = ["its files come in another order, or are read in another way (tokenizer, columns, end tokens)"]
    return ", ".join(words[:MOST_NAMED]) + (f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else "")


def with_own_tokenizer(settings: RunSettings, folder: Path) -> RunSettings:
    """The settings with the run's own copy of its tokenizer, where the one that they name is not there any more."""
    name = tokenizer_name(settings.data, settings.model.path)
    own = folder / MODEL
    if name == "bytes" or not looks_local(name) or os.path.exists(name) or not (own / TOKENIZER).exists():
        return settings
    data = settings.data.model_copy(update={"tokenizer": str(own), "tokenizer_revision": None})
    return settings.model_copy(update={"data": data})


# ---- the model that a run is of ----


def keep_model(folder: Path, settings: RunSettings, config: PretrainedConfig, documents: Sequence[Path]) -> None:
    """Copy what a model is, besides its weights, into the run's folder."""
    own, model = folder / MODEL, settings.model
    own.mkdir()
    whole = mapping_of(config)  # with defaults: another version may have others
    (own / CONFIG).write_text(json.dumps(whole, indent=2), encoding="utf-8")
    tokenizer = tokenizer_of_run(settings, any(read_meta(of_source)["text"] for of_source in documents))
    if tokenizer is not None:
        tokenizer.save_pretrained(own)
    if model.path is not None:  # as it is: what its makers wrote may not pass today's checks
        generation = cached_file(
            model.path, GENERATION, revision=model.revision, _raise_exceptions_for_missing_entries=False
        )
        if generation:
            shutil.copyfile(generation, own / GENERATION)


def tokenizer_of_run(settings: RunSettings, is_text: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer that texts became ids with; where the data held ids, the one that is named for them, or the
    model's own, or none."""
    named, model = settings.data.tokenizer, settings.model
    if is_text or named not in (None, "bytes"):
        return load_tokenizer(settings.data, model.path, model.revision)
    if model.path is None:
        return None
    try:
        return load_tokenizer(settings.data.model_copy(update={"tokenizer": None}), model.path, model.revision)
    except SettingsError as error:
        logger.warning("%s: the run and its exports have no tokenizer: %s", model.path, first_line(error))
        return None


def with_own_model(settings: RunSettings, folder: Path, checkpoint: Published) -> RunSettings:
    """The settings with the model described by the run's own folder: its weights come from the checkpoint.

    Raises `SettingsError` where the settings ask for another model than the run is of."""
    own = read_own_config(folder)
    asked, began = settings.model, ModelSettings.model_validate(checkpoint.facts["settings"]["model"])
    if (asked.path, asked.revision, asked.config) != (began.path, began.revision, began.config):
        other = mapping_of(read_config(asked.path, asked.config, asked.revision))
        changed = [change for change in differences(own, other) if not _is_one_of(change[0], PROVENANCE)]
        wrong = [f"{name}: {old} (asked for {new})" for name, old, new in changed]
        if wrong:
            raise SettingsError(f"{checkpoint.path} is of another model: {', '.join(wrong)}")
        if asked.path is not None:
            logger.info("%s: the run's own model; its weights are those of %s", asked.path, checkpoint.path)
    model = ModelSettings(config=own, activation_checkpointing=asked.activation_checkpointing)
    return settings.model_copy(update={"model": model})


def read_own_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run keeps."""
    path = folder / MODEL / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path}: the run's own copy of its model's configuration cannot be read: {error}"
        ) from None
