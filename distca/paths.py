"""Is a name that somebody wrote a place on this machine, or a name on the Hugging Face hub?"""

from __future__ import annotations

from pathlib import Path


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path, there or not. What looks like one is never asked for on the hub."""
    first, slash, rest = name.partition("/")
    if not name or name[0] in "/.~" or "\\" in name or "/" in rest or name.endswith("/"):
        return True
    return bool(slash) and Path(first).is_dir()
