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
from distca.launch.cluster.hosts import own_code
from distca.launch.folder.paths import absolute_paths
from distca.paths import expanded, matching, root_of

RUN_FILE, INPUTS = "run.yaml", "inputs"
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
    """Fill an empty folder."""
    parcel = Parcel(absolute_paths(settings))
    for name, file in own_code().items():
        place = folder / "distca" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    values, room = parcel.settings.model_dump(mode="json"), MOST_BYTES
    for number, (section, name) in enumerate(_inputs(values)):
        path = section[name]
        files = _files(path)
        size = sum(file.stat().st_size for file in files)
        if not files or size > room:
            parcel.left.append(path)
            continue
        room -= size
        section[name] = _copy(path, files, folder, f"{INPUTS}/{number}")
        parcel.packed.append(path)
    parcel.settings = validate_settings(values)
    (folder / RUN_FILE).write_text(dump_settings(parcel.settings), encoding="utf-8")
    return parcel


def _inputs(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(section, name) of every setting that holds the absolute path of something that a run reads."""
    data, planner = values["data"], values["planner"]
    places = [(source, "path") for source in data["sources"] if source["format"] != "hub"]
    places += [(data, "tokenizer"), (values["model"], "path")]
    places += [] if planner["cost"] in FORMULAS else [(planner, "cost")]
    # small ones first: a model's weights leave no room for a tokenizer
    held = [(sum(f.stat().st_size for f in _files(s[n])), s, n) for s, n in places if s[n] and os.path.isabs(s[n])]
    yield from ((section, name) for _, section, name in sorted(held, key=lambda of: of[0]))


def _files(path: str) -> list[Path]:
    """Every file that a path of a run file may mean: one, all in a folder, or those that a pattern matches."""
    place = expanded(path)
    if place.is_dir():
        walked = os.walk(place, followlinks=False)
        return [Path(here, name) for here, _, names in walked for name in names if Path(here, name).is_file()]
    if place.is_file():
        return [place]
    return [file for file in matching(place) if file.is_file()]


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
        shutil.copyfile(file, to)
    return os.path.join(place, rest) if rest else place
