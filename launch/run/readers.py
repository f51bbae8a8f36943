"""Where does each host that trains read the run's documents?

Where the driver has prepared them, if the host sees that folder or has the same documents at its place. Otherwise it
prepares them for itself, once and before a trainer starts there. Whatever it reads is compared with what the driver
has, by content: every rank takes its rows from the same tokens.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distca.config import RunSettings
from distca.errors import DataError, SettingsError, UserError
from distca.launch.cluster.hosts import Common
from distca.launch.cluster.session import Cluster
from distca.launch.cluster.workers import gather, nodes_by_host, scout
from distca.launch.data.batches import META, STARTS, TARGETS, read_meta
from distca.launch.data.identity import content_there, digests_of, stamps_of
from distca.launch.data.prepare import prepare
from distca.launch.folder.runs import other_files, with_own_tokenizer
from distca.parallel.models import read_config


@dataclass(frozen=True, slots=True)
class Recipe:
    """What documents are made with, on any host."""

    settings: RunSettings  # as the run file says: a resumed run's own model has no tokenizer
    folder: Path  # the run's, which keeps a copy of its tokenizer
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source's documents, as the driver has prepared them."""

    folder: Path
    content: str
    files: Sequence[tuple[str, str]]  # names and digests of what they were made from
    derived: Sequence[str]  # digests of the columns that `content` leaves out
    stamp: list[int]  # of the folder's description: where it is the same, so is the folder


def documents_by_host(
    cluster: Cluster,
    hosts: Collection[str],
    settings: RunSettings,
    run_file: RunSettings,
    folder: Path,
    documents: tuple[Path, ...],
    common: Common | None,
) -> dict[str, tuple[Path, ...]]:
    """The folders with prepared documents on each of these hosts; `documents` are the driver's own.

    `settings` are those of the workers, `run_file` what the documents were made from, `folder` the run's.
    Raises SettingsError where a host has neither them nor what they are made from, DataError where its are others."""
    found = dict.fromkeys(hosts, documents)
    others = [host for host in found if host != cluster.host]
    if cluster.own or not others:
        return found
    m = settings.model
    recipe = Recipe(run_file, folder, read_config(m.path, m.config, m.revision).vocab_size)
    nodes, wanted = nodes_by_host(), tuple(map(wanted_of, documents))
    readers = [
        scout(Reader, host, recipe, wanted, cluster=cluster, node=nodes[host], number=number, common=common)
        for number, host in enumerate(others)
    ]
    gather([reader.made for reader in readers], settings.parallel.start_timeout_s, "looking at the other hosts")
    asked = [reader.call("documents") for reader in readers]
    found |= zip(others, gather(asked, None, "preparing documents on the other hosts"), strict=True)
    for reader in readers:
        reader.kill()
    return found


class Reader:
    """One host's; all its trainers read what it finds."""

    def __init__(self, host: str, recipe: Recipe, wanted: Sequence[Wanted]):
        self._arguments = host, recipe, wanted

    def documents(self) -> tuple[Path, ...]:
        return documents_here(*self._arguments)


def wanted_of(folder: Path) -> Wanted:
    meta = read_meta(folder)
    return Wanted(folder, meta["content"], meta["files"], _derived(folder), *stamps_of([folder / META]))


def documents_here(host: str, recipe: Recipe, wanted: Sequence[Wanted]) -> tuple[Path, ...]:
    """The folders of these documents on this host, some of which it may have to make; see `documents_by_host`."""
    found = {n: source.folder for n, source in enumerate(wanted) if os.access(source.folder / META, os.R_OK)}
    missing = [n for n in range(len(wanted)) if n not in found]
    if missing:
        found |= zip(missing, _made_here(host, recipe, missing, wanted[missing[0]].folder), strict=True)
    for n, source in enumerate(wanted):
        path = recipe.settings.data.sources[n].path
        try:
            difference = _difference(source, found[n])
        except DataError as error:
            raise DataError(f"host {host}: {error}") from None
        if difference:
            raise DataError(f"host {host}: data.sources[{n}] ({path}) in {found[n]}: {difference}")
    return tuple(found[n] for n in range(len(wanted)))


def _made_here(host: str, recipe: Recipe, numbers: Sequence[int], lacking: Path) -> tuple[Path, ...]:
    settings = with_own_tokenizer(recipe.settings, recipe.folder)
    try:
        return prepare(settings.data, recipe.vocab_size, settings.model.path, settings.model.revision, numbers)
    except UserError as error:
        raise SettingsError(
            f"host {host} does not see the prepared documents {lacking}, and cannot prepare them for itself: {error}. "
            "Let data.cache be on a file system that all hosts share, or what is named in data be at the same place on "
            "each"
        ) from None


def _difference(wanted: Wanted, folder: Path) -> str | None:
    """Why a folder's documents are not those that the driver has; None where they are."""
    meta: dict[str, Any] = read_meta(folder)
    if meta.get("content") != wanted.content:
        why = other_files(wanted.files, meta.get("files", []))
        return f"the documents are not those of the driver's host: {why}"
    is_same_folder = folder == wanted.folder and stamps_of([folder / META]) == [wanted.stamp]
    if is_same_folder or (content_there(folder) == wanted.content and _derived(folder) == wanted.derived):
        return None
    return f"its files do not hold what its {META} says; delete it there, and it will be made again"


def _derived(folder: Path) -> list[str]:
    return digests_of([folder / STARTS, folder / TARGETS], folder.parent)
