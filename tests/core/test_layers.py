"""Imports point one way, each outside library has its few places, and what is installed is what lies here.

distca/ decides <- kernels/ computes <- parallel/ moves <- launch/ runs; the last three are linked into distca/."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("distca", "kernels", "parallel", "launch")  # a file may import from its own folder and those before it
ROOMS = ("process", "data", "folder", "cluster", "run", "bench")  # of launch/, by the same rule; others lie above them
FILES = sorted(file for layer in LAYERS for file in (ROOT / layer).rglob("*.py"))
EVERYWHERE = set(sys.stdlib_module_names) | {"distca", "numpy"}

# Where a library may be imported; a folder stands for all its files. What is in no row may be imported nowhere.
PLACES = {
    "torch": ["kernels", "parallel", "launch"],
    "torch.distributed": [
        *("parallel/baselines.py", "parallel/engine.py", "parallel/link.py"),
        *("parallel/nixl_link.py", "parallel/transport.py"),
        *("launch/cluster/store.py", "launch/bench/racer.py", "launch/run/server.py", "launch/run/trainer.py"),
    ],
    "torch.utils.tensorboard": ["launch/folder/monitor.py"],
    "triton": ["kernels"],
    "deepspeed": ["parallel/engine.py"],
    "transformers": ["parallel/attach.py", "parallel/models.py", "launch/data/encode.py", "launch/folder/runs.py"],
    "tokenizers": ["launch/data/encode.py"],
    "pyarrow": ["launch/data/read.py", "launch/data/tables.py"],
    "datasets": ["launch/data/tables.py"],
    "ray": ["launch/cluster"],
    "grpc": ["launch/cluster/session.py"],
    "aiohttp": ["launch/cluster/jobs.py"],
    "requests": ["launch/cluster/jobs.py"],
    "matplotlib": ["launch/bench/compare.py", "launch/folder/monitor.py", "launch/bench/plan.py"],
    "pydantic": ["distca/config.py", "distca/hardware.py"],
    "yaml": ["distca/config.py", "distca/hardware.py", "launch/cluster/scripts.py"],
    "psutil": ["launch/cluster/hosts.py"],
    "packaging": ["launch/cluster/doctor.py"],
    "xxhash": ["parallel/link.py"],
    "tyro": ["launch/cli.py"],
    "rich": ["launch/cli.py", "launch/bench", "launch/run"],
}


def imports_of(source: str) -> list[str]:
    """Full names of the modules that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name, not a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer_of(name: str) -> str | None:
    """The folder that a module of ours lies in; None for others' modules."""
    first, second, *_ = [*name.split("."), ""]
    assert first not in LAYERS[1:], f"write distca.{name}, not {name}: there are packages of that name"
    return None if first != "distca" else second if second in LAYERS else "distca"


def room_of(path: str) -> int:
    """Which of launch/'s rooms a file (launch/run/train.py) or module (launch.run.train) lies in, as a number."""
    _, room, *_ = [*path.replace("/", ".").split("."), ""]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def problems_of(file: str, source: str) -> list[str]:
    """What is wrong with a file's imports; `file` relative to the repository."""
    own, found = LAYERS.index(file.split("/")[0]), []
    for name in imports_of(source):
        layer = layer_of(name)
        is_above = layer is not None and LAYERS.index(layer) > own
        if is_above or (layer == "launch" and room_of(name.removeprefix("distca.")) > room_of(file)):
            found.append(f"{file} imports {name}, which lies above it")
        rows = [library for library in PLACES if f"{name}.".startswith(f"{library}.")]
        places = PLACES[max(rows, key=len)] if rows else []
        allowed = name.split(".")[0] in EVERYWHERE or any(file == p or file.startswith(f"{p}/") for p in places)
        if not allowed:
            found.append(f"{file} imports {name}, which belongs into {', '.join(places) or 'no file'}")
    return found


@pytest.mark.parametrize("file", [str(file.relative_to(ROOT)) for file in FILES])
def test_a_file_imports_only_what_lies_below_it_and_libraries_in_their_places(file):
    assert problems_of(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("distca/plan.py", "from distca.kernels.merge import merge"),
        ("distca/plan.py", "import distca.launch.cli"),
        ("distca/plan.py", "import torch"),
        ("kernels/merge.py", "def f():\n    from distca import parallel"),
        ("kernels/merge.py", "import torch.distributed as dist"),
        ("parallel/link.py", "from transformers import AutoModel"),
        ("launch/run/train.py", "import ray"),
        ("launch/run/train.py", "from distca.launch.bench.race import race"),
        ("launch/run/train.py", "import distca.launch.cli"),
        ("launch/run/train.py", "import httpx"),
    ],
)
def test_planted_imports_are_found(file, line):
    assert problems_of(file, line)


@pytest.mark.parametrize("line", ["import kernels", "from launch.train import train", "from . import plan"])
def test_other_spellings_of_our_modules_are_refused(line):
    with pytest.raises(AssertionError, match="write"):
        problems_of("launch/run/train.py", line)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("distca.planner", ["torch", "ray", "pydantic"]),
        ("distca.config", ["torch", "ray", "numpy"]),
        ("distca.launch.cli", ["torch", "ray", "transformers", "datasets"]),
        ("distca.launch.folder.monitor", ["torch", "tensorboard"]),
        ("distca.launch.run.server", ["deepspeed", "transformers", "datasets"]),
    ],
)
def test_a_light_module_stays_light(module, absent):
    """Seconds of start-up, for a command line and for each attention server."""
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_three_relative_links_join_the_folders():
    for layer in LAYERS[1:]:
        link = ROOT / "distca" / layer
        assert link.is_symlink() and os.readlink(link) == f"../{layer}"
        assert not (ROOT / layer / "__init__.py").exists(), f"with one, {layer} hides other packages of that name"


def builder_is_here() -> bool:
    """Whether this environment holds what [build-system] in pyproject.toml asks for."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


def test_a_wheel_holds_every_module(tmp_path):
    """A forgotten file shows only to those who install it."""
    tree, wheels = tmp_path / "tree", tmp_path / "wheels"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "distca", *LAYERS[1:]):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name, **(dict(symlinks=True) if copy is shutil.copytree else {}))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(tree)]
    if builder_is_here():
        command.insert(4, "--no-build-isolation")  # nothing to download
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    wanted = {str(f.relative_to(ROOT)) for f in FILES}
    assert packed == {name if name.startswith("distca/") else f"distca/{name}" for name in wanted}
