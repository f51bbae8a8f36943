"""What can a run be asked to do?

A run is one YAML file read into the frozen models below; the text under a field is its documentation. Unknown keys are
errors, all errors are reported at once, and nothing outside this file and its overrides changes what a run does.

    settings = load_settings("configs/runs/tiny_cpu.yaml", ["--train.steps", "10"])
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from distca.errors import SettingsError
from distca.paths import written_as_path
from distca.transports import Transports

KIND_NAMES = {str: "text", int: "integer", float: "number", bool: "true | false", Path: "path", dict: "mapping"}
KIND_NAMES |= {NoneType: "none", tuple: "list of texts"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


Step = Annotated[PositiveInt, Strict()]  # in a list, where `Settings._as_written` does not look


def _takes_numbers(kind: Any) -> bool:
    return kind in (int, float) or isinstance(kind, int) or any(map(_takes_numbers, get_args(kind)))


class Settings(BaseModel):
    """Frozen, strict about names, documented by the strings under its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, str_min_length=1
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """What Python and pydantic would take for something else than what was written."""
        kind = cls.model_fields[info.field_name].annotation
        if value == "" and kind is Path:  # the folder one happens to stand in
            raise ValueError("empty: give a path, or leave it out")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character, which no name may")
        if isinstance(value, bool) and _takes_numbers(kind):  # as 0 or 1
            raise ValueError(f"want {_allowed(kind)}, got {value!r}")
        if kind is bool and isinstance(value, (int, float)) and not isinstance(value, bool):
            raise ValueError(f"want true or false, got {value!r}")
        return value


class ModelSettings(Settings):
    path: str | None = None
    """Weights to start from: a folder, or a name on the Hugging Face hub. Leave out to start from `config`."""
    revision: str | None = None
    """Commit, tag or branch of `path`, where that is a hub name."""
    config: dict[str, Any] | None = None
    """A Hugging Face configuration (`model_type: llama`, `hidden_size: …`) for a model with fresh weights."""
    activation_checkpointing: bool = False
    """Recompute layers in backward instead of keeping their activations; attention calls are kept, not repeated."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        if (self.path is None) == (self.config is None):
            raise ValueError(
                "give either `path` (weights to start from) or `config` (fresh weights), not both or neither"
            )
        for name in ("path", "revision"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"`{name}` is empty: name something, or leave it out")
        if self.revision is not None and (self.path is None or written_as_path(self.path)):
            raise ValueError(
                "`revision` is of a name on the hub, but the model comes from "
                + (f"the folder {self.path}" if self.path else "`config`")
                + ": leave it out"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` needs `model_type`, for example `model_type: llama`")
        return self


class SourceSettings(Settings):
    path: str
    """A file, a glob of files (`data/**/*.jsonl`), a folder, a name on the Hugging Face hub, or `python-stdlib`: the
    source files of this Python's own standard library."""
    format: Literal["auto", "json", "parquet", "arrow", "text", "hub"] = "auto"
    """`auto` goes by the files' ending. `text`: each file is one document.
    `hub`: `path` is a data set's name on the hub."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set. Default: what was newest when the set was first prepared."""
    column: str | None = None
    """Column with the document: text, or a list of token ids. Default: `input_ids` or `text`, whichever there is.
    Beside token ids, `labels` (Hugging Face's: unshifted, -100 for none) and masks such as `loss_mask`,
    `completion_mask` or `assistant_masks` say what is to be learnt; `attention_mask` says where padding begins."""
    ignore_columns: tuple[str, ...] = ()
    """Columns left aside on purpose. Needed for those that carry a meaning: masks and labels that are not to count, a
    second text, images. Columns without a known meaning are named in the log and need not be here."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Share of this source in the training tokens, relative to the other sources' weights."""

    @model_validator(mode="after")
    def _column_is_wanted(self) -> SourceSettings:
        if self.column in self.ignore_columns:
            raise ValueError(f"`column` {self.column} is also in `ignore_columns`: it cannot be both")
        return self


class DataSettings(Settings):
    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    """Where documents come from."""
    tokenizer: str | None = None
    """`bytes` (built in, nothing to download), or a tokenizer's folder or hub name. Default: the model's own where
    `model.path` is given, else `bytes`. Not used for token ids."""
    tokenizer_revision: str | None = None
    """Commit, tag or branch of a hub tokenizer."""
    append_eos: bool = True
    """End every text document with the tokenizer's end-of-sequence token, if the tokenizer does not do so itself; it
    may also put a beginning-of-sequence token first, as its model expects. Token ids are taken as they are."""
    control_tokens: Literal["text", "parse"] = "text"
    """What a text means that spells a special token, such as `</s>` or `<pad>`. `text`: these characters; only the
    tokenizer's own beginning and end are special tokens, so no document can write them. `parse`: the special token,
    for texts that hold a template's tokens on purpose; a beginning or end that is in the text stands there once."""
    max_document_tokens: int | None = Field(None, ge=2)
    """Longer documents are cut into documents of this many tokens (at least 2: a single token has nothing to predict).
    Default: as many as a micro-batch holds."""
    on_bad_document: Literal["error", "skip"] = "error"
    """Empty documents, ids outside the vocabulary, unreadable files: stop, or leave out and count."""
    cache: Path = Path("~/.cache/distca")
    """Folder for tokenised documents, made once per contents of a source and tokenizer. Every machine that trains must
    see it."""

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> DataSettings:
        if self.tokenizer == "bytes" and self.control_tokens == "parse":
            raise ValueError("control_tokens: parse needs a tokenizer with special tokens in texts, not `bytes`")
        if self.tokenizer_revision is not None and (
            self.tokenizer is None or self.tokenizer == "bytes" or written_as_path(self.tokenizer)
        ):
            raise ValueError("tokenizer_revision belongs to a hub name in `tokenizer`; leave it out")
        return self


class OptimizerSettings(Settings):
    """AdamW."""

    learning_rate: float = Field(3e-4, ge=0, le=1e30, allow_inf_nan=False)
    """Peak of the schedule."""
    weight_decay: float = Field(0.1, ge=0, le=1e6)
    """Decoupled; not applied to vectors (norms, biases)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay per step of the mean of gradients."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay per step of the mean of squared gradients."""
    eps: float = Field(1e-8, gt=0, le=1e30)
    """Added to the root of the squared gradients' mean."""


class ScheduleSettings(Settings):
    name: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up of w steps, for step s (from 1) of S = `train.steps`; x = (s - w - 1) / (S - w) is 0 at
    step w + 1 and would be 1 one step after the last. `constant`: the peak. `linear`: peak · (1 - x). `cosine`:
    peak · (1 + cos(pi · x)) / 2. A run resumed with more steps, or another schedule, goes on with the rates that a new
    run with those settings has at these steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps w of linear rise: step s of them uses peak · s / (w + 1), step w + 1 the peak. A run of w steps or fewer
    never gets there."""


class TrainSettings(Settings):
    tokens_per_step: PositiveInt
    """Tokens in one optimizer step, over all trainers."""
    tokens_per_rank: PositiveInt | None = None
    """Tokens that a trainer holds at once (a micro-batch's share);
    sets memory. Default: follows from `accumulation`."""
    accumulation: PositiveInt | None = None
    """Micro-batches per optimizer step. Default: follows from `tokens_per_rank`; 1 if neither is given."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    precision: Literal["fp32", "bf16", "fp64"] = "bf16"
    """Of weights, activations and what goes over the wire;
    with bf16 DeepSpeed keeps fp32 master weights. fp64 is for `verify`."""
    clip_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Largest norm of the whole gradient; 0 switches clipping off. A step whose gradient is not finite changes nothing
    and ends the run."""
    loss_chunk: PositiveInt = 1024
    """Rows whose logits exist at the same time."""
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()


Placement = Literal["beside", "apart", "spread"]


class ParallelSettings(Settings):
    trainers: PositiveInt = 1
    """Processes that hold the model's layers, one per GPU (or CPU process)."""
    servers: int = Field(0, ge=0)
    """Dedicated attention servers: processes that only compute core attention."""
    trainers_serve: bool = True
    """Trainers are attention servers too. With servers = 0: in place.
    With servers > 0: mixed; false makes the pool dedicated."""
    trainer_capacity: int = Field(100, ge=1, le=100)
    """Share (percent) of a dedicated server's attention work that a serving trainer takes in a mixed pool."""
    placement: Placement = "beside"
    """Where workers are if there are several hosts. `beside`: trainers on as few as possible, dedicated servers in the
    room left there, then on others. `apart`: dedicated servers on hosts without trainers, as many on each. `spread`:
    every host has its share of both."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed splits over trainers: 1 optimizer states, 2 and gradients, 3 and weights."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Run the model on two nano-batches in turns, so that a trainer computes one's layers while the other's attention
    is at servers or on the wire: two micro-batches of a step, or an odd one's documents in two groups. `auto`: where
    that is predicted to pay. Gradients are the same up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; `auto` takes GPUs if there are enough for every worker."""
    threads: PositiveInt = 1
    """CPU threads per worker."""
    transport: Transports = "auto"
    """What carries rows between trainers and servers. `pairs`: a process group for every trainer-server pair; a lost
    or slow peer ends its own link alone. `group`: one process group of all workers, which connects those that talk to
    each other; grows with neighbours, not with pairs. `nixl`: NIXL over UCX (InfiniBand, RoCE, NVLink, TCP, shared
    memory), as lean and with lost peers kept apart; needs `pip install distca[nixl]`. `auto`: pairs up to 16 workers,
    group above."""
    deadline_s: float = Field(120.0, gt=0, allow_inf_nan=False)
    """Seconds a trainer waits for one attention call before it gives the server up."""
    start_timeout_s: float = Field(120.0, gt=0, allow_inf_nan=False)
    """Seconds to wait for the cluster's resources and for workers to come up."""

    @field_validator("overlap", mode="before")
    @classmethod
    def _on_and_off(cls, value: Any) -> Any:
        """YAML reads on and off as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _somebody_serves(self) -> ParallelSettings:
        if not self.servers and not self.trainers_serve:
            raise ValueError("nobody would compute attention: set `servers` above 0, or `trainers_serve: true`")
        return self


class WireSettings(Settings):
    gb_per_s: PositiveFloat | None = None
    """Gigabytes per second and direction between a trainer or server and another node. Given, work stays at home where
    moving it would take longer; default: work is shared out evenly whatever that takes."""
    gb_per_s_in_node: PositiveFloat | None = None
    """The same inside a node. Default: as between nodes."""
    ranks_per_node: PositiveInt | None = None
    """Trainers on one node. Default: as they are placed."""
    tflops: PositiveFloat | None = None
    """TFLOP per second that a server's kernels reach. Needed with `cost` pairs or row-blocks; a table of measured times
    has it."""


FORMULAS = ("pairs", "row-blocks")  # of planner.cost; anything else is a file


class PlannerSettings(Settings):
    tolerance: float = Field(0.02, ge=0, le=1)
    """A server's load may exceed its fair share by this fraction, where a cut of `block` rows allows it."""
    block: int = 128
    """Tasks are cut at multiples of this many rows and keys, counted from the document's start."""

    cost: str = "pairs"
    """What servers get equal amounts of. `pairs`: (query, key) pairs. `row-blocks`: pairs and a kernel's overhead per
    block of 128 rows. Or a YAML file with measured times (configs/hardware)."""
    backward: Literal["same-plan", "own-plan"] = "same-plan"
    """Whether backward, whose kernels have other costs, gets a plan of its own."""
    neighbourhoods: PositiveInt | None = None
    """Trainers and servers are in so many runs, such as racks, in their order; work leaves a neighbourhood only where
    its own servers have no time left. Neighbourhoods too small for the longest document are joined. Default: the nodes,
    where `wire.gb_per_s_in_node` says that they are nearer; else one."""
    wire: WireSettings = WireSettings()

    @model_validator(mode="after")
    def _speeds_are_comparable(self) -> PlannerSettings:
        formula = self.cost in FORMULAS
        if not self.wire.gb_per_s and self.wire != WireSettings():
            raise ValueError("wire: without gb_per_s its other settings say nothing")
        if self.wire.gb_per_s and formula and not self.wire.tflops:
            raise ValueError(f"wire.gb_per_s needs wire.tflops with cost: {self.cost}, to compare moving and computing")
        if self.wire.tflops and not formula:
            raise ValueError(f"wire.tflops: leave it out, {self.cost} says how fast kernels are")
        return self

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int) -> int:
        if block < 16 or block & (block - 1):
            raise ValueError(f"must be a power of two of at least 16, got {block}")
        return block


class KernelSettings(Settings):
    backend: Literal["auto", "torch", "triton", "flash", "reference"] = "auto"
    """`torch`: fused operators of PyTorch, any device; what `auto` takes. `triton`: our own kernels, one launch for all
    tasks of a call, on CUDA. `flash`: the FlashAttention 2 inside PyTorch, on CUDA in half precision; the last bits of
    its gradients change from run to run. `reference`: plain and slow, computes everything DistCA knows."""


class CheckpointSettings(Settings):
    every_steps: int = Field(0, ge=0)
    """Steps between checkpoints; 0 keeps only the last step's."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""


class MonitorSettings(Settings):
    folder: Path = Path("runs")
    """Runs are written to a new folder in here, named after the run and its start."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    images_every: PositiveInt = 20
    """Steps between pictures (document lengths, load per server, one step's timeline)."""
    trace_steps: tuple[Step, Step] | None = None
    """First and last step, both included, of which a trace of all workers is written into the run's folder, for
    Perfetto (ui.perfetto.dev) or chrome://tracing. Default: none."""

    @field_validator("trace_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"the first step comes first, got {list(steps)}")
        return steps


class StudySettings(Settings):
    """What `distca plan` needs to know without a run file."""

    seed: int = Field(0, ge=0)
    planner: PlannerSettings


class RunSettings(Settings):
    """One run: everything that decides what it computes and where."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run, used in its folder's name."""
    seed: int = Field(0, ge=0)
    """Of fresh weights, data order and random layers."""
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    parallel: ParallelSettings = ParallelSettings()
    planner: PlannerSettings = PlannerSettings()
    kernels: KernelSettings = KernelSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    monitor: MonitorSettings = MonitorSettings()

    @model_validator(mode="after")
    def _numbers_fit(self) -> RunSettings:
        train, trainers = self.train, self.parallel.trainers
        if train.tokens_per_rank is not None and train.accumulation is not None:
            product = train.tokens_per_rank * train.accumulation * trainers
            if product != train.tokens_per_step:
                raise ValueError(
                    f"train.tokens_per_rank x train.accumulation x parallel.trainers = {product}, but "
                    "train.tokens_per_step = "
                    f"{train.tokens_per_step}: leave one of the two out, or set train.tokens_per_step: {product}"
                )
        per_round = trainers * (train.tokens_per_rank or train.accumulation or 1)
        if train.tokens_per_step % per_round:
            lower = train.tokens_per_step // per_round * per_round
            near = " or ".join(str(n) for n in (lower, lower + per_round) if n)
            what = "train.tokens_per_rank" if train.tokens_per_rank else "train.accumulation"
            raise ValueError(
                f"train.tokens_per_step = {train.tokens_per_step} cannot be shared equally: it must be a multiple of "
                f"parallel.trainers x {what} = {per_round}; {near} would work"
            )
        traced = self.monitor.trace_steps
        if traced and traced[1] > train.steps:
            raise ValueError(f"monitor.trace_steps = {list(traced)}, but the run has {train.steps} steps (train.steps)")
        if self.tokens_per_micro_batch == 1:
            raise ValueError(
                "a micro-batch of 1 token has nothing to predict: raise train.tokens_per_step (or tokens_per_rank)"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.train.tokens_per_step // (self.parallel.trainers * self.tokens_per_rank)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one micro-batch on one trainer."""
        return self.train.tokens_per_rank or self.train.tokens_per_step // (
            self.parallel.trainers * (self.train.accumulation or 1)
        )

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one micro-batch, over all trainers: no document is longer."""
        return self.tokens_per_rank * self.parallel.trainers


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-6 is a number, and what is given twice is a mistake."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that `_Loader` would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run file and apply `--section.key value` overrides; raise `SettingsError` with every error found."""
    try:
        values = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the run file: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: a run file is a mapping of sections (model, data, train, …), found {type(values).__name__}"
        )
    for key, value in _parse_overrides(overrides):
        _put(values, key, value)
    return validate_settings(values, str(path))


def _parse(text: str) -> Any:
    """Values of a YAML text; ValueError for whatever is none, or is written in a way that nobody means."""
    try:
        values = yaml.load(text, _Loader)
        json.dumps(values, default=str, skipkeys=True)  # refuses what holds itself by an anchor
        return values
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = f"line {at.line + 1}, column {at.column + 1}: " if at else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def study_settings(overrides: Sequence[str]) -> StudySettings:
    """The settings of a study without a run file: `--planner.key value` and `--seed value` over its defaults."""
    values: dict[str, Any] = {"planner": {"tolerance": 0.01}}
    for key, value in _parse_overrides(overrides):
        if key.partition(".")[0] not in StudySettings.model_fields:
            raise SettingsError(f"--{key}: without a run file only --planner.key and --seed can be given")
        _put(values, key, value)
    return validate_settings(values, model=StudySettings)


def validate_settings(values: dict[str, Any], origin: str = "settings", model: type[Settings] = RunSettings) -> Any:
    """A mapping, as a run file holds it, to settings; raise `SettingsError` with every error found."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = _own_problems(error.errors())
        lines = [f"  {line}" for problem in problems for line in _sentence(problem).splitlines()]
        plural = "" if len(problems) == 1 else "s"
        raise SettingsError("\n".join([f"{origin}: {len(problems)} setting{plural} to correct", *lines])) from None


def dump_settings(settings: Settings) -> str:
    """Settings as YAML that reads back to an equal value."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe_settings() -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (name, allowed values, default, explanation)."""
    yield from _describe(RunSettings, "")


def _describe(model: type[Settings], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from _describe(kind, f"{prefix}{name}.")
        elif name == "sources":
            yield prefix + name, "list", "required", " ".join((field.description or "").split())
            yield from _describe(SourceSettings, f"{prefix}{name}[i].")
        else:
            shown = "none" if field.default in (None, ()) else field.default
            default = "required" if field.is_required() else f"default {shown}"
            yield prefix + name, _allowed(kind, field.metadata), default, " ".join((field.description or "").split())


def _allowed(kind: Any, limits: Sequence[Any] = ()) -> str:
    """A field's type and bounds for people: `integer > 0 | none`."""
    if get_origin(kind) is Annotated:
        return _allowed(get_args(kind)[0], kind.__metadata__)
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_allowed, get_args(kind)))
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        return f"[{', '.join(map(_allowed, get_args(kind)))}]"
    bounds = [f" {sign} {getattr(m, name)}" for m in limits for name, sign in SIGNS.items() if hasattr(m, name)]
    return KIND_NAMES[get_origin(kind) or kind] + ",".join(bounds)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line as (the command's own words, overrides): overrides are `--section.key value` and the top level's
    `--name` and `--seed`."""
    own, overrides, rest = [], [], list(arguments)
    while rest:
        word = rest.pop(0)
        name = word[2:].partition("=")[0].replace("-", "_")
        section, dot, _ = name.partition(".")
        is_setting = section in RunSettings.model_fields if dot else name in ("name", "seed")
        if not word.startswith("--") or not is_setting:
            own.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest:
            overrides.append(rest.pop(0))
    return own, overrides


def _parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """`--a.b 3` or `--a.b=3`, values read as YAML; dashes in names stand for underscores."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise SettingsError(f"cannot read the argument {word!r}: overrides look like --train.steps 10")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise SettingsError(f"--{key} needs a value")
            value = rest.pop(0)
        try:
            yield key.replace("-", "_"), _parse(value)
        except ValueError:
            raise SettingsError(f"--{key}: cannot read {value!r} as a YAML value") from None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.2.c` in nested mappings and lists, making mappings on the way."""
    *path, last = key.split(".")
    here: Any = values
    for name in path:
        here = _step(here, name, key)
    if isinstance(here, list):
        here[_index(here, last, key)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise SettingsError(f"--{key}: {'.'.join(path)} is a single value, it has no {last!r}")


def _step(here: Any, name: str, key: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, name, key)]
    if not isinstance(here, dict):
        raise SettingsError(f"--{key}: {name!r} is below a single value")
    if here.get(name) is None:
        here[name] = {}
    return here[name]


def _index(here: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(here):
        raise SettingsError(f"--{key}: {name!r} is not a place in a list of {len(here)}")
    return int(name)


def _own_problems(problems: list[Any]) -> list[Any]:
    """Without lists that pydantic calls too short because it has thrown out their faulty entries,
    which are named anyway."""
    paths = [p["loc"] for p in problems]
    below = lambda at: any(len(path) > len(at) and path[: len(at)] == at for path in paths)  # noqa: E731
    return [p for p in problems if p["type"] != "too_short" or not below(p["loc"])]


def _sentence(problem: Any) -> str:
    """One pydantic error as a line: the key's path, what is wrong, what is allowed."""
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".")
    if problem["type"] == "extra_forbidden":
        known = list(_fields_at(problem["loc"][:-1]))
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{path}: no such setting; {hint}"
    if problem["type"] == "missing":
        return f"{path}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ").replace("Tuple should", "The list should")
    if problem["type"] == "tuple_type":  # Python's word for it, not YAML's
        message = "Input should be a list, such as [a, b]"
    given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    return f"{path}: {message}{given}" if path else f"{message}"


def _fields_at(path: Sequence[str | int]) -> Sequence[str]:
    model: type[Settings] = RunSettings
    for name in path:
        if isinstance(name, str):
            kind = SourceSettings if name == "sources" else model.model_fields[name].annotation
            model = kind  # type: ignore[assignment]
    return tuple(model.model_fields)
