"""What does a request to stop mean at this moment?

    listen()                   # first thing of all: nothing has begun, so a request ends the process at once
    with listening():          # a command: a request is a KeyboardInterrupt, and `finally` blocks tidy up
        with held():           # what must not be torn in two: requests come when it is over
            …
        asked = finishing()    # from here to the command's end requests are only noted: a run ends after a step

SIGTERM and SIGINT ask, whoever sends them, one or both, once or to every process of the run: those that Ray starts
inherit a mask from `deaf` and hear nothing. What is asked again within `SAME_S` is the same request. While a run is
finishing, only another Ctrl-C stops it at once. SIGHUP is said and changes nothing: a terminal that was closed takes
no run with it. The only file that sets a signal's handler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from distca.errors import EXIT_TRY_AGAIN

logger = logging.getLogger(__name__)

REQUESTS = (signal.SIGTERM, signal.SIGINT)
HEARD = (*REQUESTS, signal.SIGHUP)
AGAIN_S = 0.05
PATIENCE_S = 60.0  # Ray starts and ends in a few seconds; where it hangs, it is given up
SAME_S = 1.0  # a scheduler tells the group, and then each process; a person's second Ctrl-C takes longer


class _Listener:
    """What has been asked of the command that runs."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.finishing = self.ending = False
        self._timer: threading.Timer | None = None
        self.holds, self._held_since, self._pending = 0, 0.0, False
        self._heard = -SAME_S

    def hear(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            _say("the terminal is gone; this goes on without it")
            return
        if self.ending:
            return
        again, before = self.asked.is_set(), self._heard
        self._heard = time.monotonic()
        self.asked.set()
        same = again and self._heard - before < SAME_S
        if self.finishing and not again:
            _say("finishing the step and saving it; press Ctrl-C once more to stop at once")
        elif not same and (not self.finishing or number == signal.SIGINT):
            self._pending = True
        self.heed()

    def heed(self) -> None:
        """Raise what is to be raised, unless something must not be torn in two."""
        if not self._pending:
            return
        if self.holds and (left_s := self._held_since + PATIENCE_S - time.monotonic()) > 0:
            self._ask_again_in(left_s)
            return
        self._pending = False
        raise KeyboardInterrupt

    def hold(self) -> None:
        if not self.holds:
            self._held_since = time.monotonic()
        self.holds += 1

    def let_go(self) -> None:
        self.holds -= 1
        if not self.holds:
            self.forget()
            self.heed()

    def forget(self) -> None:
        """Nobody is to be asked again."""
        if self._timer:
            self._timer.cancel()

    def _ask_again_in(self, seconds: float) -> None:
        self.forget()
        self._timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()

    def unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """Python was where no exception gets out, as in the callback of a weak reference: ask again, a moment later."""
        if self.asked.is_set() and issubclass(found.exc_type, KeyboardInterrupt):
            self._pending = True
            self._ask_again_in(AGAIN_S)
        else:
            sys.__unraisablehook__(found)


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
    handlers, hook = _set({number: _listener.hear for number in HEARD}), sys.unraisablehook
    sys.unraisablehook = _listener.unraisable
    try:
        yield
    finally:
        _listener.forget()
        sys.unraisablehook = hook
        # after the command of a process nothing is to be stopped any more, and Python's own ending takes a second
        _set({number: signal.SIG_IGN if handler is _leave else handler for number, handler in handlers.items()})


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Requests, until the end of something that must not be torn in two; but for no longer than `PATIENCE_S`."""
    listener = _listener
    listener.hold()
    try:
        yield
    finally:
        listener.let_go()


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Requests are not heard, nor ever by the processes and threads that start here: they inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def finishing() -> threading.Event:
    """Set when somebody asks; until the command's end it is ours to heed. Raises if somebody has asked before."""
    with held():
        _listener.finishing = True
        if _listener.asked.is_set():  # and some library took the exception for its own
            _listener.finishing = False
            raise KeyboardInterrupt
    return _listener.asked


def ending() -> None:
    """The command is over, well or not: what is asked now changes nothing."""
    _listener.ending = True
    _listener.forget()


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
