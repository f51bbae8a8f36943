"""Is this name a folder of this machine, or a name on the Hugging Face hub? What looks local is never asked for
there."""

from __future__ import annotations

from pathlib import Path


def looks_local(name: str) -> bool:
    """Whether a name can only mean a file or folder here: hub names are `name` or `owner/name`, and an owner that is a
    folder here is that folder."""
    if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1:
        return True
    return Path(name.split("/")[0]).exists()
