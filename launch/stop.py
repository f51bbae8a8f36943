"""What does a request to stop mean at this moment?

    listen()                   # first thing of all: nothing has begun, so a request ends the process at once
    with listening():          # a command: a request is a KeyboardInterrupt, and `finally` blocks tidy up
        with held():           # what must not be torn in two: requests come when it is over
            …
        asked = finishing()    # from here to the command's end requests are only noted: a run ends after a step

SIGTERM and SIGINT ask, whoever sends them, one or both, once or to every process of the run: those that Ray starts
inherit a mask from `held` and hear nothing. What is asked again within `SAME_S` is the same request. While a run is
finishing, only another Ctrl-C stops it at once. SIGHUP is said and changes nothing: a terminal that was closed takes
no run with it. The only file that sets a signal's handler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

from distca.errors import EXIT_TRY_AGAIN

logger = logging.getLogger(__name__)

REQUESTS = (signal.SIGTERM, signal.SIGINT)
HEARD = (*REQUESTS, signal.SIGHUP)
SAME_S = 1.0  # a scheduler tells the group, and then each process; a person's second Ctrl-C takes longer


class _Listener:
    """What has been asked of the command that runs."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.finishing = False
        self._heard = -SAME_S

    def hear(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            _say("the terminal is gone; this goes on without it")
            return
        again, before = self.asked.is_set(), self._heard
        self._heard = time.monotonic()
        self.asked.set()
        if again and self._heard - before < SAME_S:
            return
        if not self.finishing:
            raise KeyboardInterrupt
        if not again:
            _say("finishing the step and saving it; press Ctrl-C once more to stop at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


_listener = _Listener()


def listen() -> None:
    """From now on a request ends the process, as long as nothing has begun."""
    _set({number: _leave for number in HEARD})


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Requests to one command. Elsewhere than in the main thread Python hears no signals, and nothing changes."""
    global _listener
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = _Listener()
    before = _set({number: _listener.hear for number in HEARD})
    try:
        yield
    finally:
        _set(before)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Requests, and what starts here hears none: threads and processes inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # those that came meanwhile are heard here


def finishing() -> threading.Event:
    """Set when somebody asks; until the command's end it is ours to heed. Raises if somebody has asked before."""
    with held():
        if was_asked():  # and some library took the exception for its own
            raise KeyboardInterrupt
        _listener.finishing = True
    return _listener.asked


def was_asked() -> bool:
    """Whether the command was asked to stop before `finishing`."""
    return _listener.asked.is_set() and not _listener.finishing


def _set(handlers: dict) -> dict:
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def _leave(number: int, _frame: object) -> None:
    if number != signal.SIGHUP:
        with contextlib.suppress(OSError):
            os.write(2, b"distca: stopped before anything began, as asked\n")
        os._exit(EXIT_TRY_AGAIN)


def _say(text: str) -> None:
    with contextlib.suppress(RuntimeError, OSError):  # we may have interrupted somebody who was writing
        logger.warning("%s", text)
