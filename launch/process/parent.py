"""How does a process end with the one that started it?"""

import ctypes
import os
import signal
import sys
import threading
import time


def guard_parent() -> None:
    """Make this process end when its parent does, even while it is stuck in native code or stopped.

    Ray's workers end by themselves when they find their raylet gone; the kernel does not leave that to them.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died just before
            os.kill(os.getpid(), signal.SIGKILL)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="guard_parent", daemon=True).start()
