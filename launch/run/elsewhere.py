"""Are the run's documents on every host that has trainers? Where they are not, it prepares them for itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distca.config import DataSettings, RunSettings
from distca.errors import DataError, UserError
from distca.launch.cluster.hosts import Common
from distca.launch.cluster.session import Cluster
from distca.launch.cluster.workers import Reserved, gather, scout
from distca.launch.data.batches import META, read_meta
from distca.launch.data.prepare import prepare
from distca.launch.folder.runs import MODEL, TOKENIZER
from distca.parallel.models import read_config


def documents_of_hosts(
    cluster: Cluster,
    placement: Reserved,
    settings: RunSettings,
    folder: Path,
    documents: tuple[Path, ...],
    common: Common | None,
) -> dict[str, tuple[Path, ...]]:
    """The folders of the prepared documents on each host with trainers, by its address; the driver's are `documents`.

    Raises DataError where a host has neither them nor what they are made from, or has prepared other ones."""
    nodes = {node.host: node for node in placement.nodes[: settings.parallel.trainers]}
    found = dict.fromkeys(nodes, documents)
    others = {host: node for host, node in nodes.items() if host != cluster.host}
    scouts = {
        host: scout(Preparer, settings, folder, host, cluster=cluster, node=node, number=number, common=common)
        for number, (host, node) in enumerate(others.items())
    }
    what = "looking for the run's documents"
    gather([one.made for one in scouts.values()], settings.parallel.start_timeout_s, what)
    contents = [read_meta(of_source)["content"] for of_source in documents]
    asked = [one.call("documents", documents, contents) for one in scouts.values()]
    found |= zip(scouts, gather(asked, None, what), strict=True)  # it may take as long as on the driver's host
    for one in scouts.values():
        one.kill()
    return found


class Preparer:
    """One host's."""

    def __init__(self, settings: RunSettings, folder: Path, host: str):
        self._settings, self._folder, self._host = settings, folder, host

    def documents(self, folders: tuple[Path, ...], contents: list[str]) -> tuple[Path, ...]:
        """The driver's `folders` where these hold the same here; else those that are made here."""
        if self._contents(folders) == contents:
            return folders
        name, why = f"host {self._host}", None
        for data in self._readings():
            try:
                made = self._prepare(data)
            except UserError as error:
                why = why or error
                continue
            if self._contents(made) == contents:
                return made
        if why:
            raise DataError(
                f"{name} has not the documents that the driver has prepared in {folders[0].parent}, and cannot prepare "
                f"them: {why}. Let data.cache, or the sources, be on a file system that all hosts share"
            )
        raise DataError(
            f"{name} has prepared other documents than the driver: the files of data.sources differ there. Let them be "
            "the same on all hosts, or data.cache on a file system that all hosts share"
        )

    def _contents(self, folders: tuple[Path, ...]) -> list[str | None]:
        return [read_meta(folder)["content"] if (folder / META).exists() else None for folder in folders]

    def _readings(self) -> Iterator[DataSettings]:
        """A run that was resumed may have no other tokenizer than its own copy."""
        yield self._settings.data
        if (self._folder / MODEL / TOKENIZER).exists():
            yield self._settings.data.model_copy(update={"tokenizer": str(self._folder / MODEL)})

    def _prepare(self, data: DataSettings) -> tuple[Path, ...]:
        model = self._settings.model
        vocab_size = read_config(model.path, model.config, model.revision).vocab_size
        return prepare(data, vocab_size, model.path, model.revision)
