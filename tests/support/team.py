"""A run's workers as plain processes over Gloo:
the same trainers and servers that Ray starts, without Ray's seconds."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import ExitStack
from pathlib import Path

from documents import write_json_lines

from distca.config import RunSettings, validate_settings
from distca.launch.cluster.hosts import LOOPBACK
from distca.launch.cluster.store import rendezvous_store
from distca.launch.data.batches import first_step_with_targets
from distca.launch.data.prepare import prepare
from distca.launch.run.server import DedicatedServer, Meeting
from distca.launch.run.trainer import Trainer

PRELOAD = ["distca.launch.run.trainer", "torch._dynamo", "transformers.models.llama.modeling_llama"]
ANSWER_S = 200

TINY_LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
)


def make_settings(folder: Path, lengths: list[int], model: dict | None = None, **sections) -> RunSettings:
    """Settings of a small run over documents of these lengths, in this order or any; sections override."""
    tokens = [[(7 * n + 3 * i + i * i // 5) % 96 for i in range(length)] for n, length in enumerate(lengths)]
    source = write_json_lines(folder / "documents.jsonl", ({"input_ids": ids} for ids in tokens))
    values = dict(
        model=dict(config=TINY_LLAMA | (model or {})),
        data=dict(sources=[dict(path=str(source))], cache=str(folder / "cache")),
        train=dict(tokens_per_step=sum(lengths), steps=10, precision="fp32", loss_chunk=100),
        planner=dict(block=16),
        monitor=dict(folder=str(folder / "runs")),
    )
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return validate_settings(values)


class Team:
    """Trainers and dedicated servers (of the given classes) of `settings`, joined by links; the settings' documents, or
    prepared ones."""

    def __init__(
        self,
        settings: RunSettings,
        trainer: type[Trainer] = Trainer,
        documents: tuple[Path, ...] | None = None,
        server: type = DedicatedServer,
    ):
        self._stack = ExitStack()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        parallel = settings.parallel
        documents = documents or prepare(settings.data, 96)
        self._settings, self._documents = settings, documents
        self._store, port = rendezvous_store(LOOPBACK)
        common = (settings, Meeting(LOOPBACK, port), "cpu")
        first = parallel.trainers if parallel.trainers_serve else 0
        made = [(trainer, rank, *common, documents) for rank in range(parallel.trainers)]
        made += [(server, first + n, *common) for n in range(parallel.servers)]
        self._pipes, self.processes = [], []
        for what in made:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, *what), daemon=True)
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)
        self.trainers, self.servers = range(parallel.trainers), range(parallel.trainers, len(made))
        self.ask([*self.trainers, *self.servers], "connect")

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def ask(self, workers, method: str, *arguments) -> list:
        """Ask all these workers the same, at the same time; the first failure is raised."""
        for worker in workers:
            self._pipes[worker].send((method, arguments))
        answers = []
        for worker in workers:
            assert self._pipes[worker].poll(ANSWER_S), f"worker {worker} gave no answer to {method}"
            answers.append(self._pipes[worker].recv())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def verify(self):
        """The comparison of one step with one device."""
        self.ask(self.trainers, "seek", *first_step_with_targets(self._settings, self._documents))
        return self.ask(self.trainers, "verify")[0]

    def losses(self, steps: int) -> list[float]:
        """Mean losses of the next steps."""
        found = []
        for _ in range(steps):
            reports = self.ask(self.trainers, "step")
            found.append(sum(r.summed_loss for r in reports) / reports[0].targets)
        return found


def verified(settings: RunSettings, documents: tuple[Path, ...] | None = None):
    """The comparison of one step of a team of its own with one device."""
    with Team(settings, documents=documents) as team:
        return team.verify()


def _worker(pipe, kind, *arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    worker = error = None
    try:
        worker = kind(*arguments)
    except BaseException as failure:
        error = failure
    while True:
        method, values = pipe.recv()
        try:
            if error:
                raise error
            pipe.send(getattr(worker, method)(*values))
        except BaseException as failure:
            pipe.send(failure)
