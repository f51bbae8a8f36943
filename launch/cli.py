"""The command line: parse, load the run file, call one function, turn errors into a sentence and an exit code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TextIO

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distca.config import describe_settings, dump_settings, load_settings, split_overrides, study_settings
from distca.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_OTHER, SettingsError, TryAgain, UserError
from distca.launch.process.forkserver import RayOptions, forkserver
from distca.launch.process.stop import ending, held, listening, was_asked
from distca.launch.process.unforeseen import in_words
from distca.paths import expanded

if TYPE_CHECKING:
    from distca.launch.cluster.jobs import JobServer
    from distca.plan import PlanInputs

ABOUT = """Train Hugging Face causal language models with their core attention on attention servers.

Exit codes: 0 ok, 2 bad settings, 3 bad data, 75 stopped with a checkpoint or try again, 1 other."""

# Commands import what they run only when they run: `distca --help` and `distca settings` start without torch and Ray;
# those that start workers let the fork server import at the same time.


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """What commands that start workers have in common."""

    insecure: bool = False
    """Join a Ray cluster (RAY_ADDRESS) that asks for no token."""
    hosts: int = 1
    """Wait until the Ray cluster has so many hosts; those of a batch job come up one after the other."""

    @contextlib.contextmanager
    def ray(self, device: str = "auto") -> Iterator[RayOptions]:
        """Workers' imports begin now."""
        with forkserver(device) as server:
            yield RayOptions(self.insecure, self.hosts, server)

    def go_on(self, folder: Path, settings: Any, console: Console) -> int:
        """From the newest checkpoint of a run, under these settings."""
        with self.ray(settings.parallel.device) as ray:
            from distca.launch.run.train import resume

            _say_where(resume(folder, settings, console, ray), console)
        return EXIT_OK


@dataclass(frozen=True)
class Train(OnRay):
    """Train from a run file. Any setting can be given as --section.key value; `distca settings` lists them all."""

    stopped: ClassVar[str] = "stopped before step 1, as asked; nothing was left behind"
    run: tyro.conf.Positional[Path]
    """YAML run file."""
    folder: Path | None = None
    """Keep the run in this folder instead of a new one of `monitor.folder`. If it holds a checkpoint, go on from that,
    under the settings of this run file: a job that is started again does not begin anew."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        settings = load_settings(self.run, overrides)
        if self.folder:
            from distca.launch.folder.status import was_begun

            if was_begun(self.folder):
                return self.go_on(self.folder, settings, console)
        console.print(dump_settings(settings), style="dim", highlight=False, markup=False)
        with self.ray(settings.parallel.device) as ray:
            from distca.launch.run.train import train

            _say_where(train(settings, console, ray, self.folder), console)
        return EXIT_OK


@dataclass(frozen=True)
class Resume(OnRay):
    """Go on from a run's newest checkpoint, bit for bit.
    --parallel.servers and other settings of the pool may change."""

    stopped: ClassVar[str] = "stopped before its first step, as asked; the run stays as it was"
    folder: tyro.conf.Positional[Path]
    """The run's folder."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.folder.status import RUN_FILE

        return self.go_on(self.folder, load_settings(self.folder / RUN_FILE, overrides), console)


@dataclass(frozen=True)
class Verify(OnRay):
    """Compare one distributed step (loss, every gradient) with one device, for your model, data and settings.

    Exit code 0 if all agree within what the precision allows, 1 if not."""

    run: tyro.conf.Positional[Path]
    """YAML run file."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        settings = load_settings(self.run, overrides)
        with self.ray(settings.parallel.device) as ray:
            from distca.launch.run.train import verify

            result = verify(settings, console, ray)
        table = Table(title=f"gradients of {len(result.parameters)} parameters, the worst first")
        for heading in ("parameter", "relative error", "allowed"):
            table.add_column(heading)
        for p in result.parameters[:8]:
            table.add_row(p.name, f"{p.error:.2e}", f"{p.allowed:.1e}", style=None if p.passed else "bold red")
        console.print(table)
        if result.step > 1:
            console.print(f"step {result.step}: the first that has anything to learn", highlight=False)
        console.print(
            f"{result.num_documents} documents, {result.num_tokens:,} tokens; loss {result.loss:.12f}, on one device "
            f"{result.reference_loss:.12f}: relative error {result.loss_error:.2e} (allowed {result.loss_allowed:.1e})",
            highlight=False,
        )
        verdict = "[bold green]PASSED[/]" if result.passed else "[bold red]FAILED[/]"
        worst = result.parameters[0]
        console.print(f"{verdict}: worst relative gradient error {worst.error:.2e} ({worst.name})", highlight=False)
        return EXIT_OK if result.passed else EXIT_OTHER


@dataclass(frozen=True)
class Compare(OnRay):
    """Race DistCA against local packing, Ulysses and all-gather of keys and values (zigzag), on your model, documents
    and machine: which is fastest, and what to set.

    Methods take turns, step by step, in the same processes with the same engine and optimizer (at a learning rate of
    0); their losses must agree. Exit code 0 if they do, 1 if not. Nothing is kept but what you ask for."""

    stopped: ClassVar[str] = "stopped as asked; nothing was left behind"
    run: tyro.conf.Positional[Path]
    """YAML run file."""
    steps: int = 5
    """Optimizer steps of each method that count; medians are taken over them."""
    warmup: int = 1
    """Steps of each method before those, which do not count."""
    methods: str = ""
    """Some of local,ulysses,all-gather,in-place,mixed,dedicated, with commas between, the last three also with -overlap
    behind them; default: all."""
    servers: int | None = None
    """Dedicated attention servers of the mixed and the dedicated pool, processes or GPUs beside the trainers; default:
    parallel.servers of the run file."""
    lengths: str | None = None
    """Instead of the run's documents, random tokens in documents of these lengths, which fill a micro-batch: long-half
    (one of half of its tokens, short ones), equal:N (N documents), short:N (each of N tokens), heavy-tail (as web
    text; none is longer than a trainer holds), or a FILE.json with a list of tokens per document."""
    plot: Path | None = None
    """Write a picture (PNG): seconds a step of every method."""
    json: Path | None = None
    """Write the figures: per method median seconds, tokens per second, loss, ratios."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        self._refuse()
        pool = [] if self.servers is None else ["--parallel.servers", str(self.servers)]
        settings = load_settings(self.run, [*overrides, *pool, "--parallel.trainers_serve", "true"])
        asked = [name.strip() for name in self.methods.split(",") if name.strip()]
        with self.ray(settings.parallel.device) as ray:
            from distca.launch.bench.compare import plot, race_lengths, table_of, write_json
            from distca.launch.bench.race import compare

            lengths = race_lengths(self.lengths, settings) if self.lengths else None
            race = compare(settings, console, asked, lengths, self.warmup, self.steps, ray)
        console.print(table_of(race))
        for method in race.refused:
            console.print(f"{method.title} cannot: {method.refusal}", highlight=False)
        if self.plot:
            plot(race, self.plot)
        if self.json:
            write_json(race, self.json)
        for sentence in race.disagreements():
            console.print(f"[bold red]an error of DistCA's:[/] {escape(sentence)}", highlight=False)
        if race.disagreements():
            return EXIT_OTHER
        console.print(race.agreement(), highlight=False)
        console.print(f"[bold]{escape(race.advice())}[/]", highlight=False)
        return EXIT_OK

    def _refuse(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("servers", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise SettingsError(f"--{name} {getattr(self, name)}: must be at least {least}")
        _refuse_missing_folders(self.json, self.plot)


@dataclass(frozen=True)
class Plan:
    """Plan document lengths without running anything: balance, bytes and time beside the paper's greedy and a lower
    bound. With a run file, plan its own documents for its own pool; else `lengths`, or lengths drawn from `shape`.
    Settings of the planner can be given as --planner.key value (without a run file the tolerance is 0.01), the seed of
    drawn lengths as --seed value."""

    run: tyro.conf.Positional[Path | None] = None
    """YAML run file. What it says of trainers, tokens, pool and heads replaces the options below."""
    micro_batch: int = 1
    """Which of the run's micro-batches; 1 is the first."""
    lengths: Path | None = None
    """Document lengths (tokens), a .json list or .npy column."""
    shape: str = "heavy-tail"
    """Named synthetic lengths: heavy-tail, long-half, uniform, short or full."""
    context: int = 131072
    """Longest drawn document, in tokens."""
    trainers: int = 64
    """Ranks that hold tokens."""
    tokens_per_trainer: int = 131072
    """Tokens on each rank."""
    pool: str = "in-place"
    """in-place, dedicated:N or mixed:N, with N dedicated attention servers."""
    gpus_per_server: int = 1
    """A group of so many trainers is one server, such as the GPUs of one NVLink domain; heads are split inside."""
    query_heads: int = 32
    """Of the model; with kv_heads and head_dim what a moved row costs (bf16)."""
    kv_heads: int = 8
    """Key/value heads of the model."""
    head_dim: int = 128
    """Size of a head."""
    group: int | None = None
    """Query heads per key/value head: what moving a query row costs,
    in key/value rows. Default: query_heads / kv_heads."""
    mask: str = "causal"
    """causal, window:N, sinks:S+window:N, prefix:N or chunk:N, in tokens."""
    planner: Literal["tiles", "greedy", "greedy-even"] = "tiles"
    """Whose plan to draw and write; the table shows all."""
    plot: Path | None = None
    """Write a picture of the load per server before and after (PNG)."""
    json: Path | None = None
    """Write the plan: lengths, home segments, tasks with their servers."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.bench.plan import parse_mask, study

        self._refuse()
        inputs = self._inputs(overrides)
        inputs = replace(inputs, rules=(parse_mask(self.mask, inputs.lengths),))
        directions = study(inputs, self.planner)
        for name, result in zip(("forward", "backward"), directions, strict=False):
            if len(directions) > 1:
                console.print(f"\n[bold]{name}[/]")
            console.print(result.table())
        if self.run:
            from distca.launch.run.plan_inputs import overlap_of_run

            told = overlap_of_run(load_settings(self.run, overrides), inputs.lengths)
            console.print(f"[bold]overlap[/] {escape(told)}", highlight=False)
        if self.plot:
            directions[0].plot(self.plot)
        if self.json:
            directions[0].write_json(self.json)
        return EXIT_OK

    def _refuse(self) -> None:
        counts = ("micro_batch", "context", "trainers", "tokens_per_trainer", "gpus_per_server")
        for name in (*counts, "query_heads", "kv_heads", "head_dim", "group"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.query_heads % self.kv_heads:
            raise SettingsError(f"{self.query_heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.json and self.mask != "causal":
            raise SettingsError("the plan's file holds causal plans only: leave --json or --mask out")
        _refuse_missing_folders(self.json, self.plot)

    def _inputs(self, overrides: list[str]) -> PlanInputs:
        if self.run:
            from distca.launch.run.plan_inputs import inputs_of_run

            return inputs_of_run(load_settings(self.run, overrides), self.micro_batch)
        from distca.cost import AttentionShape
        from distca.hardware import plan_inputs
        from distca.launch.bench.plan import draw_lengths, parse_pool, read_lengths
        from distca.masks import MaskRule

        settings = study_settings(overrides)
        if self.lengths:
            lengths = read_lengths(self.lengths, self.trainers)
        else:
            lengths = draw_lengths(self.shape, self.context, self.trainers * self.tokens_per_trainer, settings.seed)
        pool = parse_pool(self.pool, self.trainers, self.gpus_per_server)
        shape = AttentionShape(self.query_heads, self.kv_heads, self.head_dim, element_bytes=2)
        return plan_inputs(settings.planner, lengths, (MaskRule(),), self.trainers, pool, shape, self.group)


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face model folder that AutoModelForCausalLM.from_pretrained loads."""

    folder: tyro.conf.Positional[Path]
    """The run's folder."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist yet."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.folder.export import export

        _refuse_overrides("export", overrides)
        step = export(self.folder, self.out)
        console.print(f"step {step} exported to {escape(str(self.out))}", highlight=False)
        return EXIT_OK


@dataclass(frozen=True)
class Measure:
    """Time core attention on this machine, and write the table that predicts other calls; or what links cost."""

    what: tyro.conf.Positional[Literal["kernels", "links"]]
    """What to measure. `links` takes the last three options, `kernels` the others."""
    out: tyro.conf.Positional[Path]
    """YAML file to write, for example configs/hardware/NAME.yaml."""
    backend: str = "torch"
    """As `kernels.backend` in a run file."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    heads: tuple[int, int, int] = (32, 8, 128)
    """Query heads, key/value heads, head size."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of q, k and v."""
    longest: int = 32768
    """Most keys that a timed row sees."""
    minutes: float = 8.0
    """Time to spend on the table; its longest keys are left out if they do not fit. Comparisons come on top."""
    transport: Literal["pairs", "group", "nixl"] = "pairs"
    """As `parallel.transport` in a run file."""
    workers: int = 8
    """Processes to start."""
    neighbours: int = 4
    """Workers that each one has links to: an even number, or all others."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.hardware import write_hardware
        from distca.launch.bench.measure import measure_kernels, table_of

        _refuse_overrides("measure", overrides)
        if self.what == "links":
            return self._links(console)
        shape, command = (self.heads, self.dtype, self.longest, 60 * self.minutes), " ".join(sys.argv)
        with console.status("") as status:
            times = measure_kernels(self.backend, self.device, *shape, command, status.update)
        write_hardware(self.out, times)
        console.print(table_of(times))
        console.print(f"written to {escape(str(self.out))}", highlight=False)
        return EXIT_OK

    def _links(self, console: Console) -> int:
        from distca.launch.bench.measure_links import measure_links, table_of
        from distca.transports import refuse_transport

        refuse_transport(self.transport)
        if not 1 <= self.neighbours < self.workers:
            raise SettingsError(
                f"{self.workers} workers have 1 to {self.workers - 1} neighbours, not {self.neighbours}"
            )
        with console.status("") as status:
            found = measure_links(self.transport, self.workers, self.neighbours, status.update)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text("".join(f"{name}: {value}\n" for name, value in found.items()))
        console.print(table_of(found))
        console.print(f"written to {escape(str(self.out))}", highlight=False)
        return EXIT_OK


@dataclass(frozen=True)
class Status:
    """What is a run doing now? Step, loss, speed, workers and what happened, from its folder alone."""

    folder: tyro.conf.Positional[Path | None] = None
    """The run's folder; default: the one in runs/ that had the last step."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.folder.status import lines_of, newest_run, status

        _refuse_overrides("status", overrides)
        for word, text in lines_of(status(self.folder or newest_run(Path("runs")))):
            console.print(f"[bold]{word:11}[/] {escape(text)}", highlight=False)
        return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class OnJobServer:
    """What commands that speak with a cluster's job server have in common."""

    address: str | None = None
    """Of the cluster's Ray dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if it is an
    http address. Its token is looked for where Ray does: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."""
    insecure: bool = False
    """Take a cluster that asks for no token."""

    def server(self) -> contextlib.AbstractContextManager[JobServer]:
        from distca.launch.cluster.jobs import job_server

        return job_server(self.address, self.insecure)

    @staticmethod
    def follow(server: JobServer, name: str, console: Console) -> int:
        """Show what a job prints until it is over; its exit code becomes ours."""
        job = server.follow(name, lambda text: console.print(text, end="", markup=False, highlight=False))
        if error := server.ended(job):
            raise error
        return EXIT_OK

    @staticmethod
    def detached(server: JobServer, name: str, console: Console) -> int:
        """An interrupt ends the following, not the job: say how to come back."""
        console.print(f"\nno longer following {escape(name)}, which goes on", highlight=False)
        console.print(f"      follow:  {escape(server.command('logs', name))}", highlight=False)
        console.print(f"      stop:    {escape(server.command('stop', name))}", highlight=False)
        return EXIT_INTERRUPTED


@dataclass(frozen=True)
class Submit(OnJobServer):
    """Train a run file as a job of a Ray cluster, and follow it there. Ctrl-C stops following, not the job.

    This package, the run file and small inputs are handed over; larger ones must be on the cluster under the same
    paths. Exit code: the job's. After 75, the same command goes on from the newest checkpoint."""

    run: tyro.conf.Positional[Path]
    """YAML run file."""
    folder: Path | None = None
    """Keep the run in this folder of the cluster, which all its hosts see; default: monitor.folder/NAME. If it holds a
    checkpoint, go on from that."""
    follow_log: bool = True
    """Show what the job prints until it is over; else come back at once."""
    hosts: int = 1
    """Let the job wait until the cluster has so many hosts."""
    python: str = "python"
    """The Python of the cluster's environment, which has torch, DeepSpeed and transformers."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        settings = load_settings(self.run, overrides)
        folder = os.path.abspath(expanded(self.folder or settings.monitor.folder / settings.name))
        options = ["--hosts", str(self.hosts)] * (self.hosts > 1) + ["--insecure"] * self.insecure
        with self.server() as server:
            name = None
            try:
                with held():  # or an interrupt would leave a job that nobody was told of
                    name, parcel = server.submit(settings, folder, options, self.python)
                console.print(f"[bold]job[/]        {escape(name)} at {escape(server.url)}", highlight=False)
                console.print(f"[bold]run[/]        {escape(folder)}, on the cluster", highlight=False)
                for path in parcel.packed:
                    console.print(f"[bold]packed[/]     {escape(path)}", highlight=False)
                for path in parcel.left:
                    console.print(f"[bold]not packed[/] {escape(path)}: must be there on the cluster", highlight=False)
                if self.follow_log:
                    return self.follow(server, name, console)
            except KeyboardInterrupt:
                if name is None:
                    raise
                return self.detached(server, name, console)
            console.print(f"      follow:  {escape(server.command('logs', name))}", highlight=False)
        return EXIT_OK


@dataclass(frozen=True)
class Jobs(OnJobServer):
    """List the jobs that were submitted to a cluster, the newest last."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.folder.status import duration

        _refuse_overrides("jobs", overrides)
        table = Table("job", "state", "exit code", "started", "took", "run's folder", box=None, pad_edge=False)
        with self.server() as server:
            jobs = server.jobs()
        for job in jobs:
            started = "" if job.start_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_s))
            took = "" if job.start_s is None else duration((job.end_s or time.time()) - job.start_s)
            code = "" if job.exit_code is None else str(job.exit_code)
            table.add_row(*map(escape, (job.name, job.state.lower(), code, started, took, job.folder)))
        if not jobs:
            console.print(f"no jobs at {escape(server.url)}", highlight=False)
        else:
            Console(width=max(console.width, 1000)).print(table)  # names are there to be copied, whole
        return EXIT_OK


@dataclass(frozen=True)
class Logs(OnJobServer):
    """Show what a job has printed, and follow it until it is over.
    Ctrl-C stops following, not the job. Exit code: the job's."""

    job: tyro.conf.Positional[str | None] = None
    """Its name, as `distca jobs` lists it; default: the newest."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        _refuse_overrides("logs", overrides)
        with self.server() as server:
            name = server.job(self.job).name
            try:
                return self.follow(server, name, console)
            except KeyboardInterrupt:
                return self.detached(server, name, console)


@dataclass(frozen=True)
class Stop(OnJobServer):
    """Stop a job: it finishes its step and saves a checkpoint, from which the same run can be submitted again."""

    stopped: ClassVar[str] = "no longer waiting; a job that was asked to stop ends after its checkpoint"
    job: tyro.conf.Positional[str | None] = None
    """Its name, as `distca jobs` lists it; default: the newest."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        _refuse_overrides("stop", overrides)
        with self.server() as server:
            job = server.job(self.job)
            if job.is_over or not server.stop(job.name):
                raise SettingsError(f"{job.name} is over already: {job.state.lower()}")
            with console.status(f"waiting for {job.name} to save its checkpoint and end"):
                while not (job := server.job(job.name)).is_over:
                    time.sleep(0.5)
        console.print(f"{escape(str(server.ended(job) or f'{job.name} was done'))}", highlight=False)
        return EXIT_OK


@dataclass(frozen=True)
class Doctor:
    """Look whether this machine, and what a run file asks of it, is fit for a run; a line for each check.

    Exit code 0 if nothing has failed, 1 if something has."""

    run: tyro.conf.Positional[Path | None] = None
    """YAML run file."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        settings = load_settings(self.run, overrides) if self.run else None
        from distca.launch.cluster.doctor import Finding, examine

        def tell(finding: Finding) -> None:
            colour = {"ok": "green", "warning": "yellow", "failed": "bold red"}[finding.level]
            advice = f": {finding.advice}" if finding.advice else ""
            line = f"[{colour}]{finding.level:8}[/]{finding.what:15}{escape(finding.found)}{escape(advice)}"
            console.print(line, highlight=False)

        return EXIT_OTHER if examine(settings, tell) == "failed" else EXIT_OK


@dataclass(frozen=True)
class Slurm:
    """A batch script: sbatch it, and the run starts, saves before the time limit, is requeued and goes on."""

    run: tyro.conf.Positional[Path]
    """YAML run file, as the nodes see it."""
    per_node: int = 8
    """Workers (trainers and dedicated servers) on each node; on GPUs, its GPUs."""
    cpus_per_worker: int | None = None
    """Default: parallel.threads; with GPUs at least 8."""
    time: str = "24:00:00"
    """Limit, as sbatch takes it; the run is stopped with a checkpoint three minutes earlier."""
    memory: str = "0"
    """Of each node, as sbatch takes it; 0 is all of it."""
    interface: str | None = None
    """Network interface of the nodes between which rows travel, such as ib0;
    default: the one of their first address."""
    partition: str | None = None
    account: str | None = None
    setup: str = ""
    """Shell commands that make `distca` and `ray` callable on a node."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.cluster.scripts import nodes_of, slurm

        settings = load_settings(self.run, overrides)
        nodes = nodes_of(settings, self.per_node, self.cpus_per_worker)
        named = {"partition": self.partition, "account": self.account}
        options = [f"--{name}={value}" for name, value in named.items() if value]
        asked = (self.time, self.memory, self.interface, self.setup, options)
        print(slurm(self.run.absolute(), settings, overrides, nodes, *asked), end="")
        return EXIT_OK


@dataclass(frozen=True)
class KubeRay:
    """Manifests of a RayJob and of the run file that it trains from: kubectl apply them."""

    run: tyro.conf.Positional[Path]
    """YAML run file; its paths are paths in the pods."""
    image: str
    """Container image with `distca` and `ray`."""
    claim: str
    """PersistentVolumeClaim that many nodes may write: data, model and runs, at /shared in every pod."""
    per_node: int = 8
    """Workers (trainers and dedicated servers) in each pod; on GPUs, its GPUs."""
    cpus_per_worker: int | None = None
    """Default: parallel.threads; with GPUs at least 8."""
    memory: str = "64Gi"
    """Of each worker's pod."""
    shared_memory: str = "8Gi"
    """Of each pod's /dev/shm, which counts as its memory."""
    hours: float = 24.0
    """Limit of the whole job."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        from distca.launch.cluster.scripts import kuberay, nodes_of

        settings = load_settings(self.run, overrides)
        nodes = nodes_of(settings, self.per_node, self.cpus_per_worker)
        asked = (self.image, self.memory, self.claim, self.shared_memory, self.hours)
        print(kuberay(settings, nodes, *asked), end="")
        return EXIT_OK


@dataclass(frozen=True)
class Script:
    """Print what a cluster's scheduler takes: a Slurm batch script or KubeRay manifests for a run file."""

    of: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Slurm, tyro.conf.subcommand("slurm")] | Annotated[KubeRay, tyro.conf.subcommand("kuberay")]
    ]

    def __call__(self, overrides: list[str], console: Console) -> int:
        return self.of(overrides, console)


@dataclass(frozen=True)
class ListSettings:
    """List every setting: allowed values, default, meaning."""

    def __call__(self, overrides: list[str], console: Console) -> int:
        _refuse_overrides("settings", overrides)
        for name, allowed, default, meaning in describe_settings():
            console.print(f"[bold]{escape(name)}[/]  [dim]{escape(allowed)}, {escape(default)}[/]", highlight=False)
            console.print(f"    {escape(meaning)}", highlight=False)
        return EXIT_OK


class StoppedAtOnce(UserError):
    """A second Ctrl-C."""

    exit_code = EXIT_INTERRUPTED


class ConsoleHandler(logging.Handler):
    """Log records among the console's own lines, never broken in two: they hold paths to be copied."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, highlight=False, markup=False)


class _LastingStream:
    """A stream that may lose its reader (a pipe's other end, a terminal, room on a disk): the rest goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what the stream still holds must be able to leave it
        os.close(nowhere)


@contextlib.contextmanager
def _lasting_output() -> Iterator[None]:
    """A run does not end because nobody reads on, as in `distca train run.yaml | head`."""
    before = sys.stdout, sys.stderr
    there = [stream or open(os.devnull, "w") for stream in before]  # noqa: SIM115 - closed as the process ends
    for stream in there:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a locale has no arrows
    sys.stdout, sys.stderr = map(_LastingStream, there)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


ListThem = Annotated[ListSettings, tyro.conf.subcommand("settings")]
Command = (
    Train
    | Resume
    | Status
    | Verify
    | Compare
    | Plan
    | Export
    | Measure
    | Doctor
    | Script
    | ListThem
    | Submit
    | Jobs
    | Logs
    | Stop
)


def run(arguments: list[str]) -> int:
    """One command; its exit code."""
    with listening(), _lasting_output():
        command = None
        try:
            console = Console(soft_wrap=True)
            logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ConsoleHandler(console)])
            logging.getLogger("distca").setLevel(logging.INFO)
            rest, overrides = split_overrides(arguments)
            command = tyro.cli(Command, prog="distca", description=ABOUT, args=rest)
            code = command(overrides, console)
            ending()
            return code
        except (Exception, KeyboardInterrupt) as error:
            ending()
            told = _told(error, getattr(command, "stopped", "stopped, as asked; nothing was written"))
        Console(stderr=True, soft_wrap=True).print(f"[bold red]distca:[/] {escape(str(told))}", highlight=False)
        return told.exit_code


def _told(error: BaseException, stopped: str) -> UserError:
    """What ended a command, for its user; `stopped` is how this command ends where it was asked to."""
    if was_asked():  # whatever a library made of it
        return TryAgain(stopped)
    if isinstance(error, KeyboardInterrupt):
        return StoppedAtOnce("stopped at once; nothing was saved after the last checkpoint")
    return error if isinstance(error, UserError) else in_words(error)


def _refuse_overrides(command: str, overrides: list[str]) -> None:
    if overrides:
        raise SettingsError(f"distca {command} takes no settings, found {overrides[0]}")


def _refuse_missing_folders(*files: Path | None) -> None:
    for path in files:
        if path and not path.absolute().parent.is_dir():
            raise SettingsError(f"{path}: there is no folder {path.absolute().parent}")


def _say_where(folder: Path, console: Console) -> None:
    curves = shlex.join([sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"])
    console.print(f"\n[bold green]done[/]  the run is in {escape(str(folder))}", highlight=False)
    console.print(f"      curves:  {escape(curves)}", highlight=False)
    console.print(f"      model:   distca export {escape(shlex.quote(str(folder)))} OUT", highlight=False)
