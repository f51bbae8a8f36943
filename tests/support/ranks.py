"""Real processes with a default process group over Gloo, made once for many cases."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

ANSWER_S = 60


class Ranks:
    """Up to `most` processes; `run` gives a function to the first of them, each a rank of a new default group."""

    def __init__(self, most: int, preload: list[str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._groups = 0
        self._pipes, self._processes = [], []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._store.port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
            process.join()

    def run(self, ranks: int, function: Callable, *arguments) -> list:
        """What `function(rank, ranks, *arguments)` returns on each; the first failure is raised."""
        self._groups += 1
        for rank, pipe in enumerate(self._pipes[:ranks]):
            pipe.send((self._groups, rank, ranks, function, arguments))
        answers = []
        for pipe in self._pipes[:ranks]:
            assert pipe.poll(ANSWER_S), "no answer from a rank"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def _work(pipe, port: int):
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    while True:
        group, rank, ranks, function, arguments = pipe.recv()
        mine = dist.PrefixStore(f"group/{group}", store)
        dist.init_process_group("gloo", store=mine, rank=rank, world_size=ranks, timeout=timedelta(seconds=ANSWER_S))
        try:
            pipe.send(function(rank, ranks, *arguments))
        except BaseException as failure:
            pipe.send(failure)
        dist.destroy_process_group()
