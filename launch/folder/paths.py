"""Where are a run's files, whichever folder one stands in?"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from distca.config import FORMULAS, RunSettings, validate_settings
from distca.paths import expanded, looks_local


def absolute_paths(settings: RunSettings) -> RunSettings:
    """The settings with every path of this machine absolute; names on the hub stay as they are."""
    values = settings.model_dump()
    data, model = values["data"], values["model"]
    model["path"] = _absolute(model["path"])
    if data["tokenizer"] != "bytes":
        data["tokenizer"] = _absolute(data["tokenizer"])
    data["cache"] = _absolute(data["cache"], local=True)
    for source in data["sources"]:
        if source["format"] != "hub":
            source["path"] = _absolute(source["path"])
    values["monitor"]["folder"] = _absolute(values["monitor"]["folder"], local=True)
    if values["planner"]["cost"] not in FORMULAS:
        values["planner"]["cost"] = _absolute(values["planner"]["cost"], local=True)
    return validate_settings(values)


def obstacle(folder: Path) -> Path | None:
    """The place on the way to a folder that keeps it from being made or written to, if there is one."""
    there = nearest(folder)
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def nearest(folder: Path) -> Path:
    """The folder, or the nearest place on the way to it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))


def _absolute(name: str | Path | None, local: bool = False) -> str | None:
    if name is None:
        return None
    name, place = str(name), expanded(name)
    if glob.has_magic(name) and not local and not os.path.exists(place):
        return os.path.join(glob.escape(str(Path.cwd())), place)  # only what was written is a pattern
    if local or looks_local(name) or os.path.exists(place):
        return str(Path.cwd() / place)
    return name
