"""How does a run get onto a cluster elsewhere, and how does one follow and stop it there? By Ray's job server.

    with job_server("http://head:8265") as server:
        job = server.submit(settings, folder="/shared/runs/mine")
        code = server.follow(job, print)

A job is `distca train RUN --folder FOLDER`: it goes on from the checkpoint that it finds in its folder, so the same
run can be submitted again. It is asked to stop as Ctrl-C asks, and has time to save.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from distca.config import RunSettings
from distca.errors import EXIT_OK, EXIT_OTHER, EXIT_TRY_AGAIN, SettingsError, TryAgain, UserError, first_line
from distca.launch.cluster.parcel import RUN_FILE, Parcel, pack
from distca.launch.cluster.session import environment, our_token

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
SAVE_S = 600  # a job that is asked to stop has so long for its step and its checkpoint; Ray would give it 3 s
SILENCE_S = 120.0  # of a log; then it is asked for anew
PATIENCE_S = 60.0  # a job server that is gone for longer is given up; its jobs go on
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # they tell of every upload
NOT_FOUND = 127  # what a shell answers where a command is none
OURS, FOLDER = "distca", "distca_folder"  # in a job's metadata
OVER = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED})


@dataclass(frozen=True, slots=True)
class Job:
    """What the job server knows of a job."""

    name: str
    run: str
    folder: str
    state: str
    start_s: float | None
    """Seconds since 1970."""
    end_s: float | None
    exit_code: int | None
    """As a shell shows it; None where it is not over."""
    message: str

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@contextlib.contextmanager
def job_server(address: str | None, insecure: bool = False) -> Iterator[JobServer]:
    """The job server at an address, once it has answered and taken our token.

    Raises SettingsError or TryAgain. `address` is that of Ray's dashboard, http://host:8265; by default what the
    environment names (RAY_API_SERVER_ADDRESS, or RAY_ADDRESS where that is an http address)."""
    url = url_of(address, os.environ)
    takes_token = _lets_in(url, insecure)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    changes = dict(RAY_ADDRESS=None, RAY_API_SERVER_ADDRESS=None)  # would win over the address
    with environment(**changes if takes_token else changes | dict(RAY_AUTH_MODE="disabled")):
        yield JobServer(url)


def url_of(address: str | None, names: dict[str, str]) -> str:
    """The job server's URL: as asked for, or as the environment says."""
    if address is None:
        asked = [names.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
        address = next((found for found in asked if found.startswith(("http://", "https://"))), None)
    if address is None:
        raise SettingsError("which cluster? --address http://HOST:8265, the address of its Ray dashboard")
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # of a port that is no number
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 6379:
            return url.rstrip("/") if parts.port or parts.scheme == "https" else f"{url.rstrip('/')}:8265"
    raise SettingsError(
        f"--address {address} is not the address of a job server: that is http://HOST:8265, where Ray's head serves "
        "its dashboard (port 6379 is for drivers on the cluster: RAY_ADDRESS)"
    )


def _lets_in(url: str, insecure: bool) -> bool:
    """Whether the cluster asks for a token, and takes ours; False for one that asks for none, and is not told it."""
    if _answer(url, {}) == requests.codes.ok:
        sentence = f"the Ray cluster at {url} asks for no token: whoever reaches it can run any code on it"
        if not insecure:
            raise SettingsError(f"{sentence}. Start it with RAY_AUTH_MODE=token, or accept this: --insecure")
        logger.warning("%s", sentence)
        return False
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise SettingsError(
            f"the Ray cluster at {url} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<its file>"
        )
    our_token()  # or the sentence that there is none
    if _answer(url, get_auth_headers_if_auth_enabled({})) != requests.codes.ok:
        raise SettingsError(
            f"the Ray cluster at {url} refused our token: set RAY_AUTH_TOKEN_PATH to the file with its token"
        )
    return True


def _answer(url: str, token: dict[str, str]) -> int:
    """To the most harmless question: which version."""
    try:
        code = requests.get(f"{url}/api/version", headers=token, timeout=ANSWER_S, allow_redirects=False).status_code
    except requests.exceptions.SSLError as error:
        raise SettingsError(f"{url}: {_reason(error)}; REQUESTS_CA_BUNDLE names certificates to trust") from None
    except requests.exceptions.RequestException as error:
        raise TryAgain(f"no answer from a job server at {url}: {_reason(error)}") from None
    if code not in (requests.codes.ok, requests.codes.unauthorized, requests.codes.forbidden):
        raise SettingsError(f"{url} is no job server of Ray: it answers with HTTP status {code}")
    return code


def _reason(error: BaseException) -> str:
    """The innermost cause: the outer ones name objects."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return re.sub(r"^\[Errno -?\d+\] ", "", first_line(error))


class _Client(JobSubmissionClient):
    """Ray's, which would wait for ever for a server that has fallen silent."""

    def _do_request(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super()._do_request(*args, **{"timeout": PATIENCE_S, **kwargs})


class JobServer:
    """One cluster's, as one who has its token sees it."""

    def __init__(self, url: str):
        self.url = url
        with _in_words(url):
            self._client = _Client(url)

    def submit(
        self,
        settings: RunSettings,
        folder: str,
        options: Sequence[str] = (),
        python: str = "python",
    ) -> tuple[str, Parcel]:
        """Hand over a run that keeps `folder`; the job's name, and what was packed. `options` are for `distca train`.

        Raises SettingsError where a job that is not over has this folder."""
        for job in self.jobs():
            if job.folder == folder and not job.is_over:
                raise SettingsError(
                    f"{job.name} is training in {folder} already: follow it with `{self.command('logs', job.name)}`, "
                    "or name another --folder"
                )
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', settings.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        taken = {job.name for job in self.jobs()}
        name = next(n for n in (name, *(f"{name}-{k}" for k in range(2, 1000))) if n not in taken)
        words = [python, "-m", "distca.launch.entry", "train", RUN_FILE, "--folder", folder, *options]
        with tempfile.TemporaryDirectory(prefix="distca-job-") as draft:
            parcel = pack(settings, Path(draft))
            # Ray would leave out what the .gitignore of a folder with data names
            with _in_words(self.url), environment(RAY_RUNTIME_ENV_IGNORE_GITIGNORE="1"):
                self._client.submit_job(
                    entrypoint=f"exec {shlex.join(words)}",  # or a shell would stand between Ray and the run
                    submission_id=name,
                    runtime_env={
                        "working_dir": draft,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S)},
                    },
                    metadata={OURS: settings.name, FOLDER: folder},
                )
        return name, parcel

    def jobs(self) -> list[Job]:
        """Those that `submit` made, the oldest first."""
        with _in_words(self.url):
            found = self._client.list_jobs()
        ours = [job for job in found if job.submission_id and OURS in (job.metadata or {})]
        return [_job(job) for job in sorted(ours, key=lambda job: job.start_time or 0)]

    def job(self, name: str | None) -> Job:
        """The job of this name; the newest if none is asked for."""
        jobs = self.jobs()
        if not jobs:
            raise SettingsError(f"{self.url} knows no job of `distca submit`")
        if name is None:
            return jobs[-1]
        for job in jobs:
            if job.name == name:
                return job
        raise SettingsError(f"{self.url} knows no job {name}; these it knows: {', '.join(j.name for j in jobs[-5:])}")

    def command(self, verb: str, name: str) -> str:
        """What a person types to come back to a job."""
        return shlex.join(["distca", verb, name, "--address", self.url])

    def follow(self, name: str, say: Callable[[str], None]) -> Job:
        """Say what the job prints, from its beginning, until it is over."""
        said, lost, was_over = 0, None, False

        async def listen() -> None:
            nonlocal said
            start = 0  # of a piece, in all that the job has printed: each connection tells it from the beginning
            pieces = self._client.tail_job_logs(name)
            with contextlib.suppress(
                StopAsyncIteration, asyncio.TimeoutError
            ):  # silence may be a connection that is dead
                while piece := await asyncio.wait_for(anext(pieces), SILENCE_S):
                    end = start + len(piece)
                    if end > said:
                        say(piece[max(0, said - start) :])
                        said = end
                    start = end

        while True:
            is_cut = False
            try:
                asyncio.run(listen())
            except (aiohttp.ClientError, RuntimeError, OSError):
                is_cut = True
            try:
                job, lost = self.job(name), None
            except TryAgain as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > PATIENCE_S:
                    raise TryAgain(
                        f"{error}. If the cluster is still there, the job goes on: {self.command('logs', name)}"
                    ) from None
            else:
                if job.is_over and (was_over or not is_cut):
                    return job
                was_over = job.is_over  # once more, for the end of what it has printed
            time.sleep(0.5)

    def stop(self, name: str) -> bool:
        """Ask a job to stop, as Ctrl-C does; whether it was there to be asked."""
        with _in_words(self.url):
            return self._client.stop_job(name)

    def ended(self, job: Job) -> UserError | None:
        """How a job that is over ended, as an error with its exit code; None where it was a success."""
        if job.exit_code == EXIT_OK:
            return None
        if job.state == JobStatus.STOPPED:
            told = f"{job.name} was stopped; submit the run again to go on from its newest checkpoint"
        elif job.exit_code == NOT_FOUND:
            told = f"{job.name}: the cluster has no such Python: --python names the one that Ray's head runs with"
        elif job.exit_code == EXIT_TRY_AGAIN:
            told = f"{job.name} ended with {job.exit_code}: submit the run again to go on"
        else:
            told = f"{job.name} ended with {job.exit_code}" + ("" if not job.message else f": {job.message}")
        error = UserError(told)
        error.exit_code = job.exit_code
        return error


def _job(job: JobDetails) -> Job:
    code = job.driver_exit_code
    if code is not None:
        code = 128 - code if code < 0 else code  # a signal, as a shell shows it
    elif job.status == JobStatus.STOPPED:
        code = EXIT_TRY_AGAIN
    elif job.status in OVER:
        code = EXIT_OTHER
    message = "" if job.driver_exit_code is not None else (job.message or "")
    seconds = [moment and moment / 1000 for moment in (job.start_time, job.end_time)]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return Job(
        job.submission_id,
        job.metadata[OURS],
        job.metadata.get(FOLDER, ""),
        job.status.value if isinstance(job.status, JobStatus) else str(job.status),
        *seconds,
        code,
        lines[-1] if lines else "",
    )


@contextlib.contextmanager
def _in_words(url: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError:
        raise SettingsError(f"the Ray cluster at {url} does not take our token any more") from None
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise TryAgain(f"no answer from the job server at {url}: {_reason(error)}") from None
    except RuntimeError as error:  # of whatever else the server said, which ends in a traceback of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TryAgain(
            f"the job server at {url} could not do it: {lines[-1] if lines else 'no reason given'}"
        ) from None
