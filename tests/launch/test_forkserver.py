"""A worker that comes out of the fork server is what the raylet has started, and the server outlives nobody.

What a start imports is part of how long it takes: the driver and a server do without what they do not use."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from distca.launch.process.forkserver import forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

SCRIPT = """
import json, os, sys
here = dict(argv=sys.argv[1:], name=__name__, cwd=os.getcwd(), asked=os.environ.get("ASKED"), parent=os.getppid())
print(json.dumps(here | dict(preloaded="colorsys" in sys.modules)), flush=True)
print("aside", file=sys.stderr, flush=True)
"""

DRIVER = """
import sys, time
from pathlib import Path
from distca.launch.process.forkserver import forkserver
with forkserver("cpu", ("colorsys",)) as server:
    server.listen(Path(sys.argv[1]))
    print(server._process.pid, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "a worker.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def start(command: list[str], folder, **variables) -> subprocess.CompletedProcess:
    options = dict(capture_output=True, text=True, timeout=60, cwd=folder, env=os.environ | variables)
    return subprocess.run([sys.executable, *command], **options)


def test_a_fork_has_the_arguments_environment_folder_and_files_of_what_was_started(tmp_path, script):
    with forkserver("cpu", ["colorsys"]) as server:
        server.listen(tmp_path)
        for number in range(3):
            ended = start([*server.command(script), "--n", str(number), "two words"], tmp_path, ASKED=f"é{number}")
            told = json.loads(ended.stdout)
            assert told["argv"] == ["--n", str(number), "two words"]
            assert (told["name"], told["cwd"], told["asked"]) == ("__main__", str(tmp_path), f"é{number}")
            assert told["preloaded"] and told["parent"] == server._process.pid
            assert ended.stderr == "aside\n"


def test_without_its_server_a_worker_starts_by_itself(tmp_path, script, caplog):
    with forkserver("cpu", ["colorsys"]) as server:
        server.listen(tmp_path)
        command = server.command(script)
        server._process.kill()
        server._process.wait()
        for there in (command, server.command(script)):
            told = json.loads(start([*there, "x"], tmp_path).stdout)
            assert told["argv"] == ["x"] and not told["preloaded"] and told["parent"] != server._process.pid
    assert "each of them imports by itself" in caplog.text


@pytest.mark.parametrize("preloaded", ["colorsys", "no_such_module"])
def test_a_server_that_nobody_has_asked_is_gone_with_its_block(preloaded):
    with forkserver("cpu", [preloaded]) as server:
        process = psutil.Process(server._process.pid)
    assert not process.is_running()


def test_it_ends_with_a_driver_that_was_killed(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(driver.stdout.readline()))
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 30
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_cluster_of_others_starts_its_workers_itself(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with forkserver("cpu") as server:
        assert server is None


LEAN = [
    ("distca.launch.cli", "torch ray numpy transformers matplotlib"),
    ("distca.launch.process.forkserver", "torch ray numpy pydantic"),
    pytest.param("distca.launch.run.server", "transformers deepspeed datasets pyarrow", marks=pytest.mark.slow),
    pytest.param("distca.launch.run.train", "deepspeed datasets pandas tensorboard", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("module, absent", LEAN)
def test_what_a_start_does_not_need_is_not_imported(module, absent):
    code = f"import sys, {module}; print([name for name in {absent.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
