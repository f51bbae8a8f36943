"""Where does a run's folder come from, and what is said of a run that ended in a way nobody foresaw?"""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from distca.config import RunSettings
from distca.errors import DataError, SettingsError, TryAgain, UserError
from distca.launch.folder.paths import obstacle
from distca.launch.folder.publish import steps_published
from distca.launch.folder.runs import (
    KERNEL_TIMES,
    MODEL,
)
from distca.launch.folder.status import CHECKPOINTS, EVENTS, RUN_FILE, STEPS, WORKERS
from distca.launch.process.unforeseen import in_words

logger = logging.getLogger(__name__)

OF_A_RUN = {RUN_FILE, CHECKPOINTS, STEPS, EVENTS, WORKERS, MODEL, KERNEL_TIMES, "logs", "tensorboard", "traces"}


@contextmanager
def new_folder(settings: RunSettings, prefix: str = "", own: Path | None = None) -> Iterator[Path]:
    """A folder of this run's own, gone again where the run is refused before its first step."""
    folder = _make_named(own.absolute()) if own else _make_folder(settings, prefix)
    try:
        yield folder
    except (SettingsError, DataError, TryAgain, KeyboardInterrupt):
        if not (folder / RUN_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def accounted(folder: Path) -> Iterator[None]:
    """What nobody foresaw leaves in words, its traceback among the run's logs, and with the way to go on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told, steps = in_words(error, folder), steps_published(folder / CHECKPOINTS)
        if steps:
            way = f"the newest checkpoint is of step {steps[0]}; go on with: {go_on(folder)}"
            raise type(told)(f"{told}; {way}") from error
        raise told from error


def go_on(folder: Path) -> str:
    """The command that does, as a shell takes it."""
    return f"distca resume {shlex.quote(str(folder))}"


def refuse_folder(folder: Path) -> None:
    """Raise where no run's folder can be made, before the work that it would be for."""
    if there := obstacle(folder):
        raise SettingsError(f"monitor.folder: cannot make {folder}: {there} is no folder that can be written to")


def _make_folder(settings: RunSettings, prefix: str) -> Path:
    """Named after the run and its start, with a number where that is taken."""
    start = f"{prefix}{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = settings.monitor.folder / (start if attempt == 1 else f"{start}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise SettingsError(f"monitor.folder: cannot make {folder}: {error.strerror}") from None
    raise SettingsError(f"{folder}: a thousand runs began in this second")


def _make_named(folder: Path) -> Path:
    """A folder of this name. What an attempt that saved nothing has left there is set aside."""
    try:
        if folder.exists():
            others = {p.name for p in folder.iterdir() if not p.name.startswith(".")} - OF_A_RUN
            if others:
                raise SettingsError(
                    f"--folder: {folder} is not a run's: it holds {sorted(others)[0]}. Name a folder that is not there"
                )
            aside = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.unfinished-{n}")).exists())
            folder.rename(aside)
            logger.warning("%s holds no checkpoint to go on from: it is now %s", folder, aside)
        folder.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"--folder: cannot make {folder}: {error.strerror}") from None
    return folder
