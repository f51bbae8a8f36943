"""What does a run need that a cluster elsewhere may not have? This package, the run file, small inputs of this machine.

They become one folder, which Ray carries to every host of the job. Paths in the run file that lead into it are relative
to it; all others stay what they are, absolute, and must be there on the cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distca.config import FORMULAS, RunSettings, dump_settings, validate_settings
from distca.errors import SettingsError
from distca.launch.cluster.hosts import own_code
from distca.launch.data.files import below
from distca.launch.folder.paths import absolute_paths
from distca.paths import expanded, matching, root_of

RUN_FILE, INPUTS = "run.yaml", "inputs"
MOST_FILES = 10_000
MOST_BYTES = 64_000_000  # of all inputs; Ray's job server takes 100 MiB, and keeps them in its memory


@dataclass(slots=True)
class Parcel:
    """What is in it."""

    settings: RunSettings
    """As the job reads them."""
    packed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Inputs that are too large, or are not here: the cluster must have them under these paths."""


def pack(settings: RunSettings, folder: Path) -> Parcel:
    """Fill an empty folder. Raises SettingsError for an input that cannot be read."""
    parcel = Parcel(absolute_paths(settings))
    for name, file in own_code().items():
        place = folder / "distca" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    values, room = parcel.settings.model_dump(mode="json"), MOST_BYTES
    if str(settings.data.cache).startswith("~"):
        values["data"]["cache"] = str(settings.data.cache)  # in the home of whoever the job runs as
    for number, (section, name, held) in enumerate(_inputs(values, expanded(settings.data.cache))):
        path = section[name]
        if held is None or held.num_bytes > room:
            parcel.left.append(path)
            continue
        room -= held.num_bytes
        section[name] = _copy(path, held.files, folder, f"{INPUTS}/{number}")
        parcel.packed.append(path)
    parcel.settings = validate_settings(values)
    (folder / RUN_FILE).write_text(dump_settings(parcel.settings), encoding="utf-8")
    return parcel


@dataclass(frozen=True, slots=True)
class _Held:
    """What lies at a path."""

    files: list[Path]
    num_bytes: int


def _inputs(values: dict[str, Any], cache: Path) -> list[tuple[dict[str, Any], str, _Held | None]]:
    """(section, name, what is there) of every setting that holds the absolute path of something that a run reads; None
    for what is not here, or is too much. The smallest come first: a model's weights leave no room for a tokenizer."""
    data, planner = values["data"], values["planner"]
    places = [(source, "path") for source in data["sources"] if source["format"] != "hub"]
    places += [(data, "tokenizer"), (values["model"], "path")]
    places += [] if planner["cost"] in FORMULAS else [(planner, "cost")]
    found = [
        (section, name, _held(section[name], cache)) for section, name in places if os.path.isabs(section[name] or "")
    ]
    return sorted(found, key=lambda of: of[2].num_bytes if of[2] else 0)


def _held(path: str, cache: Path) -> _Held | None:
    """The files that a run would read; it looks no further than there is room for."""
    files, num_bytes = [], 0
    try:
        for file in _files(expanded(path), cache):
            num_bytes += file.stat().st_size
            files.append(file)
            if num_bytes > MOST_BYTES or len(files) > MOST_FILES:
                return None
    except OSError as error:
        raise SettingsError(f"{path} cannot be packed: {error.filename}: {error.strerror}") from None
    return _Held(files, num_bytes) if files else None


def _files(place: Path, cache: Path) -> Iterator[Path]:
    """Every file that a path of a run file means: one, all in a folder, or those that a pattern matches."""
    if os.path.isdir(place):
        yield from below(place, cache)
    elif os.path.isfile(place):
        yield place
    else:
        yield from (file for file in matching(place) if file.is_file())


def _copy(path: str, files: list[Path], folder: Path, place: str) -> str:
    """The path's new spelling, after its files were copied to `place` in the folder."""
    there = expanded(path)
    if there.is_dir():
        root, rest = there, ""
    elif there.is_file():
        root, rest = there.parent, there.name
    else:
        root, rest = root_of(there), str(there.relative_to(root_of(there)))
    for file in files:
        to = folder / place / file.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, to)
        except OSError as error:
            raise SettingsError(f"{path} cannot be packed: {file}: {error.strerror}") from None
    return os.path.join(place, rest) if rest else place
