"""Can the hosts of a run work together? Asked before the first step, where an answer is still a sentence.

Each worker looks around on the host where it came up, before it begins: the same code and libraries as the driver, and
the same folders. Then one worker of each host connects to one of every other, on a port as the links will use them.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import platform
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import psutil

from distca import __version__
from distca.errors import SettingsError

LIBRARIES = ("torch", "deepspeed", "ray", "transformers", "numpy")
LOOPBACK = "127.0.0.1"
REACH_S = 5.0  # a host that answers slower than this will not carry rows


@dataclass(frozen=True, slots=True)
class Common:
    """What every host must have, as the driver sees it."""

    versions: Mapping[str, str]
    folders: tuple[Path, ...]  # written by the driver and by workers
    files: tuple[Path, ...]  # read
    mark: str  # name of a file that the driver has put into each folder


@contextlib.contextmanager
def common(folders: Sequence[Path], files: Sequence[Path]) -> Iterator[Common]:
    """What this host has; while it lasts, the folders hold the mark."""
    made = Common(versions(), tuple(folders), tuple(files), f".seen-{secrets.token_hex(8)}")
    with contextlib.ExitStack() as stack:
        for folder in made.folders:
            mark = folder / made.mark
            stack.callback(mark.unlink, missing_ok=True)
            mark.touch()
        yield made


def refuse_other_host(wanted: Common, host: str) -> None:
    """Raise SettingsError, with the name of this host, where it is not like the driver's."""
    for sentence in chain(other_versions(wanted, host), out_of_reach(wanted, host)):
        raise SettingsError(sentence)


def other_versions(wanted: Common, host: str) -> Iterator[str]:
    """What this host has in another version than the driver's, in sentences with its name."""
    here = versions()
    for name, there in wanted.versions.items():
        if here[name] != there:
            yield (
                f"host {host} has {name} {here[name]}, the driver's host has {there}: all hosts of a run need the same"
            )


def out_of_reach(wanted: Common, host: str) -> Iterator[str]:
    """Folders that this host does not share with the driver's, and files that it cannot read, in such sentences."""
    for folder in wanted.folders:
        if not (folder / wanted.mark).exists():
            yield (
                f"host {host} does not see what the driver writes into {folder}: let monitor.folder be on a file "
                "system that all hosts share"
            )
            continue
        own = folder / f"{wanted.mark}-{secrets.token_hex(4)}"
        try:
            own.touch()
            own.unlink()
        except OSError as error:
            yield f"host {host} cannot write into {folder}: {error.strerror}"
    for file in wanted.files:
        if not os.access(file, os.R_OK):
            yield (
                f"host {host} cannot read {file}: let model.path be on a file system that all hosts share, or at the "
                "same place on each"
            )


@lru_cache
def versions() -> dict[str, str]:
    """Of what computes: equal versions may still be different code, so ours is known by its contents too."""
    found = {"Python": platform.python_version(), "distca": __version__}  # a job's copy is not installed
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    content = hashlib.sha256()
    for name, file in sorted(own_code().items()):
        content.update(f"{name}\0".encode() + file.read_bytes())
    found["distca's code"] = content.hexdigest()[:12]
    return found


def own_code() -> dict[str, Path]:
    """The files of this package, by their places in it; links are followed, as a wheel holds files for them."""
    root = Path(find_spec("distca").submodule_search_locations[0])
    folders = os.walk(root, followlinks=True)
    files = (Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))
    return {file.relative_to(root).as_posix(): file for file in files}


def own_addresses() -> dict[str, str]:
    """IPv4 addresses of this host, each with the name of its interface; of those that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family == socket.AF_INET
    }


def listener(host: str) -> socket.socket:
    """A socket that others can connect to at this address."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.bind((host, 0))
    made.listen(128)
    return made


def unreachable(places: Mapping[str, int], timeout_s: float = REACH_S) -> dict[str, str]:
    """Hosts at whose port nobody answers, each with the reason."""
    missed = {}
    for host, port in places.items():
        try:
            socket.create_connection((host, port), timeout_s).close()
        except OSError as error:
            missed[host] = error.strerror or "no answer"
    return missed


def refuse_unreachable(missed: Mapping[str, Mapping[str, str]]) -> None:
    """Raise SettingsError where a host does not reach another; `missed` is `unreachable` of each."""
    for sentence in barriers(missed):
        raise SettingsError(sentence)


def barriers(missed: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Which hosts do not reach which, in sentences."""
    for here, others in missed.items():
        for there, reason in others.items():
            yield (
                f"host {here} does not reach host {there} ({reason}): workers listen on ports that the kernel picks, "
                "so let the hosts of a run reach each other on all ports"
            )


def refuse_loopback(names: Mapping[str, str]) -> None:
    """Raise SettingsError where one of several hosts goes by an address that stands for whoever asks; `names` of hosts
    by their addresses."""
    for host, name in names.items():
        if len(names) > 1 and ipaddress.ip_address(host).is_loopback:
            raise SettingsError(
                f"host {name} of the cluster goes by the address {host}, at which no other reaches it: start its Ray "
                "with --node-ip-address and the address that the others use"
            )
