"""Is a name that a user gives a place on this machine, or a name on the Hugging Face hub?

A name that looks like a place is never asked for on the hub: nobody wants to wait for a network to learn of a typing
error, nor train on what a stranger uploaded under a missing folder's name."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

DATA_ENDINGS = frozenset(
    "json jsonl ndjson parquet arrow feather txt text md csv tsv gz bz2 xz zst lz4 zip tar tgz 7z mds npy npz bin idx "
    "h5 hdf5 avro orc pkl pt pth ckpt safetensors gguf model yaml yml".split()
)


def looks_local(name: str) -> bool:
    """Would a person who reads this name look for it on this machine? Whether it is there is another question."""
    first = name.partition("/")[0]
    return written_as_path(name) or os.path.exists(name) or ("/" in name and os.path.isdir(first))


def written_as_path(name: str) -> bool:
    """Whether a name can be none on the hub, whatever there is in the folder one stands in."""
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith("/")
        or Path(name).suffix.lower().lstrip(".") in DATA_ENDINGS
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    )


def expanded(path: str | Path) -> Path:
    """With `~` as the home folder; a user whom this machine does not know is left as written, and will not be found."""
    return Path(os.path.expanduser(path))


def matching(pattern: Path) -> list[Path]:
    """What a pattern such as `runs/*.jsonl` means, in the order of its names; `**` goes through folders."""
    root = root_of(pattern)
    whole = os.path.join(glob.escape(str(root)), pattern.relative_to(root))
    return [Path(found) for found in sorted(glob.glob(whole, recursive=True))]


def root_of(pattern: Path) -> Path:
    """The folder in which a pattern is looked for: those that are there are meant by their names, also where these look
    like patterns, as in `run [1]/*.jsonl`."""
    return next((folder for folder in pattern.parents if os.path.isdir(folder)), Path())
