"""What a job takes along, and what is said before it is one. That jobs run: tests/end_to_end/test_jobs.py."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from commands import MODEL, write_run_file

from distca.config import load_settings, validate_settings
from distca.errors import SettingsError, TryAgain
from distca.launch import cli
from distca.launch.cluster import jobs, parcel
from distca.launch.cluster.hosts import versions
from distca.launch.cluster.jobs import job_server, url_of
from distca.launch.cluster.parcel import MOST_BYTES, RUN_FILE, pack
from distca.launch.data.prepare import prepare


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with texts, and an empty one for the parcel."""
    monkeypatch.chdir(tmp_path)
    for name in ("a [1]/x.txt", "a [1]/deep/y.txt", "a [1]/z.md", "table.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name} says something\n" * 40)
    (tmp_path / "parcel").mkdir()
    return tmp_path


def contents(sources, cache) -> list[str]:
    """Of prepared documents, whatever their sources are called."""
    values = dict(sources=sources, cache=str(cache), tokenizer="bytes")
    settings = validate_settings(dict(model=dict(config=MODEL), data=values, train=dict(steps=1, tokens_per_step=9)))
    return [path.name for path in prepare(settings.data, 259)]  # named by their identity


@pytest.mark.parametrize("path", ["a [1]", "a [1]/x.txt", "a [1]/*.txt", "a [1]/**/*.txt", "./a [1]/deep/../*.md"])
def test_documents_are_the_same_where_the_parcel_is_opened(here, monkeypatch, path):
    before = contents([dict(path=path, format="text")], here / "cache")
    run = write_run_file(here, "run", data=dict(sources=[dict(path=path, format="text")]), train=dict(steps=1))
    packed = pack(load_settings(run), here / "parcel")
    assert len(packed.packed) == 1 and not packed.left
    there = (here / "parcel").rename(here / "elsewhere")
    for old in ("a [1]", "cache"):
        (here / old).rename(here / f"{old} is gone")
    monkeypatch.chdir(there)
    source = yaml.safe_load((there / RUN_FILE).read_text())["data"]["sources"][0]
    assert contents([dict(path=source["path"], format="text")], here / "cache") == before


def test_what_is_large_or_not_here_stays_where_it_is_and_small_things_are_taken_first(here, monkeypatch):
    monkeypatch.setattr(parcel, "MOST_BYTES", 2000)
    (here / "model").mkdir()
    (here / "model" / "weights").write_bytes(bytes(1500))
    sources = [dict(path=str(here / name), format="text") for name in ("model/weights", "a [1]/x.txt", "not-here.txt")]
    run = write_run_file(
        here, "run", data=dict(sources=sources), train=dict(steps=1), model=dict(path=str(here / "model"))
    )
    values = yaml.safe_load(run.read_text())
    del values["model"]["config"]
    run.write_text(yaml.safe_dump(values))
    packed = pack(load_settings(run), here / "parcel")
    assert packed.packed == [str(here / "a [1]/x.txt")]
    assert set(packed.left) == {str(here / name) for name in ("model", "model/weights", "not-here.txt")}
    paths = [source.path for source in packed.settings.data.sources]
    assert [os.path.isabs(path) for path in paths] == [True, False, True]


def test_a_folder_is_packed_as_a_run_reads_it(here, tmp_path_factory):
    """Through a link to another disk, and without what is hidden: a run never reads that, and it may be a secret."""
    far = tmp_path_factory.mktemp("far")
    (far / "z.txt").write_text("far away")
    (here / "a [1]" / "link").symlink_to(far)
    for name in (".env", ".gitignore", ".hidden/x.txt"):
        (here / "a [1]" / name).parent.mkdir(exist_ok=True)
        (here / "a [1]" / name).write_text("*")
    run = write_run_file(here, "run", data=dict(sources=[dict(path="a [1]", format="text")]), train=dict(steps=1))
    pack(load_settings(run), here / "parcel")
    packed = {path.relative_to(here / "parcel/inputs/0").as_posix() for path in (here / "parcel/inputs/0").rglob("*.*")}
    assert packed == {"x.txt", "deep/y.txt", "z.md", "link/z.txt"}


def test_a_folder_that_cannot_be_read_whole_is_no_parcel(here):
    (here / "a [1]" / "gone.txt").symlink_to("nowhere")
    run = write_run_file(here, "run", data=dict(sources=[dict(path="a [1]", format="text")]), train=dict(steps=1))
    with pytest.raises(SettingsError, match=r"a \[1\] cannot be packed: .*gone.txt: No such file"):
        pack(load_settings(run), here / "parcel")


def test_no_more_files_are_looked_at_than_there_is_room_for(here, monkeypatch):
    monkeypatch.setattr(parcel, "MOST_FILES", 2)
    run = write_run_file(here, "run", data=dict(sources=[dict(path="a [1]", format="text")]), train=dict(steps=1))
    assert pack(load_settings(run), here / "parcel").left == [str(here / "a [1]")]


def test_a_cache_in_the_home_is_in_that_of_whoever_the_job_runs_as(here):
    run = write_run_file(here, "run", data=dict(cache="~/.cache/distca"), train=dict(steps=1))
    assert str(pack(load_settings(run), here / "parcel").settings.data.cache) == "~/.cache/distca"


def test_the_parcel_runs_this_code_wherever_it_is_opened(here):
    pack(load_settings(write_run_file(here, "run", train=dict(steps=1))), here / "parcel")
    code = 'import distca, distca.launch.cluster.hosts as h; print(distca.__file__, h.versions()["distca\'s code"])'
    run = subprocess.run([sys.executable, "-c", code], cwd=here / "parcel", capture_output=True, text=True)
    assert run.stdout.split() == [str(here / "parcel/distca/__init__.py"), versions()["distca's code"]], run.stderr
    assert sum(file.stat().st_size for file in (here / "parcel/distca").rglob("*")) < MOST_BYTES / 10


def test_only_what_the_run_reads_is_taken_and_the_hub_is_left_alone(here):
    sources = [dict(path="someone/data", format="hub"), dict(path="python-stdlib")]
    run = write_run_file(here, "run", data=dict(sources=sources), train=dict(steps=1), planner=dict(cost="table.yaml"))
    packed = pack(load_settings(run), here / "parcel")
    assert packed.packed == [str(here / "table.yaml")] and not packed.left
    assert [source.path for source in packed.settings.data.sources] == ["someone/data", "python-stdlib"]
    assert packed.settings.monitor.folder == here / "runs" and packed.settings.data.cache == here / "cache"


@pytest.mark.parametrize(
    "address, environment, url",
    [
        ("head", {}, "http://head:8265"),
        ("head:1234", {}, "http://head:1234"),
        ("http://head:8265/", {}, "http://head:8265"),
        ("https://ray.example.org/cluster", {}, "https://ray.example.org/cluster"),
        (None, dict(RAY_ADDRESS="http://head:8265"), "http://head:8265"),
        (None, dict(RAY_API_SERVER_ADDRESS="http://one:1", RAY_ADDRESS="http://two:2"), "http://one:1"),
        ("head:1", dict(RAY_ADDRESS="http://other:8265"), "http://head:1"),
    ],
)
def test_addresses_are_taken_as_people_write_them(address, environment, url):
    assert url_of(address, environment) == url


@pytest.mark.parametrize("address", ["head:6379", "ftp://head", "ray://head:10001", "http://head:port", "", "http://"])
def test_other_addresses_are_refused_with_the_right_one(address):
    with pytest.raises(SettingsError, match=r"is not the address of a job server: that is http://HOST:8265"):
        url_of(address, {})


@pytest.mark.parametrize("environment", [{}, dict(RAY_ADDRESS="10.0.0.1:6379"), dict(RAY_ADDRESS="auto")])
def test_without_an_address_it_is_asked_for(environment):
    with pytest.raises(SettingsError, match="--address http://HOST:8265"):
        url_of(None, environment)


@contextlib.contextmanager
def server(answer: int):
    """Of HTTP, which answers every question so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers)
            self.send_response(answer)
            self.end_headers()
            self.wfile.write(b"[]" if self.path.startswith("/api/jobs") else b'{"ray_version": "2.60.0"}')

        def log_message(self, *_):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}", asked
        made.shutdown()


def test_an_open_cluster_is_refused_before_our_token_goes_there(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("secret" * 8)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with server(200) as (url, asked):
        with pytest.raises(SettingsError, match="asks for no token: whoever reaches it .* --insecure"):
            with job_server(url):
                pass
        with job_server(url, insecure=True) as taken:
            assert taken.url == url and not taken.jobs()
    assert len(asked) > 3 and not any("secret" in str(headers) for headers in asked)


class Broken:
    """A job's log whose connection is cut now and then, and the server that has it."""

    def __init__(self, cuts, monkeypatch):
        self.cuts, self.states = cuts, iter([*["RUNNING"] * len(cuts), "SUCCEEDED", "SUCCEEDED"])
        monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
        self.server = object.__new__(jobs.JobServer)
        self.server.url, self.server._client = "http://head:8265", self
        self.server.job = lambda name: jobs.Job(name, "run", "/runs", next(self.states), 0.0, 1.0, 0, "")

    async def tail_job_logs(self, name):
        text = "one two three four five"
        if self.cuts:
            yield text[: self.cuts.pop(0)]
            raise RuntimeError("connection closed unexpectedly")
        for start in range(0, len(text), 5):
            yield text[start : start + 5]


@pytest.mark.parametrize("cuts", [[], [3], [0, 9, 4], [23], list(range(1, 23))], ids=str)
def test_a_log_that_is_cut_again_and_again_is_said_once_and_whole(monkeypatch, cuts):
    said = []
    assert Broken(list(cuts), monkeypatch).server.follow("job", said.append).is_over
    assert "".join(said) == "one two three four five"


@pytest.mark.parametrize("answer", [404, 500, 302])
def test_what_is_no_job_server_is_told_from_one(answer):
    with server(answer) as (url, _), pytest.raises(SettingsError, match=f"is no job server of Ray.* status {answer}"):
        with job_server(url):
            pass


def test_an_address_where_nobody_answers_is_try_again(monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_S", 0.5)
    with pytest.raises(TryAgain, match="no answer from a job server at http://127.0.0.1:1: Connection refused"):
        with job_server("127.0.0.1:1"):
            pass


@pytest.mark.parametrize("verb", ["submit", "jobs", "logs", "stop"])
def test_help_names_the_token(verb, capsys):
    with pytest.raises(SystemExit):
        cli.run([verb, "--help"])
    assert "RAY_AUTH_TOKEN_PATH" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["jobs", "logs", "stop"])
def test_settings_are_for_submit_alone(verb, capsys):
    assert cli.run([verb, "--train.steps", "3"]) == 2
    assert f"distca {verb} takes no settings" in capsys.readouterr().err


def test_a_job_that_cannot_be_packed_is_not_submitted(here, capsys):
    (here / "bad.yaml").write_text("train: {step: 3}")
    assert cli.run(["submit", str(Path("bad.yaml")), "--address", "127.0.0.1:1"]) == 2
    assert "train.step: no such setting" in capsys.readouterr().err
