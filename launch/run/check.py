"""Can this run be carried out? Its model, documents and settings are looked at before anything is started."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from distca.config import RunSettings
from distca.errors import DataError, SettingsError
from distca.hardware import costs_of, wires_of
from distca.launch.data.batches import Corpus
from distca.launch.data.prepare import prepare
from distca.launch.folder.publish import Published
from distca.launch.folder.runs import (
    kept_documents,
    refuse_other_documents,
    with_own_tokenizer,
)
from distca.launch.run.outlook import shape_of
from distca.launch.run.server import backend_of
from distca.launch.run.team import use_gpus
from distca.parallel.models import PretrainedConfig, check_model, layers_of, position_warning
from distca.parallel.precision import DTYPES
from distca.transports import refuse_transport

logger = logging.getLogger(__name__)


def check(settings: RunSettings) -> PretrainedConfig:
    """The model's configuration; whatever can be refused without documents and processes is refused here."""
    m, device = settings.model, "cuda" if use_gpus(settings) else "cpu"
    precision = DTYPES[settings.train.precision]
    config = check_model(m, backend_of(settings), precision, device)
    costs_of(settings.planner)  # a table that cannot be read
    refuse_transport(settings.parallel.transport)
    if settings.planner.wire.gb_per_s:
        wires_of(settings.planner, shape_of(layers_of(config)[0], precision))  # or one of another model's shape
    return config


def prepare_documents(settings: RunSettings, config: PretrainedConfig, console: Console) -> tuple[Path, ...]:
    """The run's documents."""
    with console.status("preparing documents"):
        documents = prepare(settings.data, config.vocab_size, settings.model.path, settings.model.revision)
    longest = max(int(lengths.max()) for lengths in Corpus(documents).lengths)
    limit = min(settings.data.max_document_tokens or longest, settings.tokens_per_micro_batch)
    if sentence := position_warning(config, min(longest, limit)):
        logger.warning(sentence)
    return documents


def prepare_again(
    settings: RunSettings, folder: Path, config: PretrainedConfig, console: Console, checkpoint: Published
) -> tuple[Path, ...]:
    """The documents that a checkpoint was made with, wherever their files and their tokenizer lie by now."""
    try:
        documents = prepare_documents(with_own_tokenizer(settings, folder), config, console)
    except (DataError, SettingsError) as error:
        kept = kept_documents(settings, checkpoint)
        if not kept:
            raise
        logger.warning("%s; going on with the documents as they were prepared before", error)
        return kept
    refuse_other_documents(settings, documents, checkpoint)
    return documents
