"""What do attention and the wire cost on this hardware?

`configs/hardware/NAME.yaml` holds times measured on one kind of device (rows x keys tiles, forward and backward). The
planner's settings name such a file, or a formula, and the speed of the wire; this file turns them into the whole
numbers that plans are made from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

from distca.config import FORMULAS, PlannerSettings
from distca.cost import PICOSECONDS, AttentionShape, Cost, PairCost, RowBlockCost, TableCost, Wire
from distca.errors import SettingsError
from distca.masks import Mask, MaskRule
from distca.plan import MILLION, PlanInputs, Pool


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Speed(Record):
    """TFLOP per second of useful operations: 4 x head size for each visible pair and query head forward, 2.5 times as
    many backward, whatever the kernels do."""

    forward: float
    backward: float


class TileFit(Record):
    """Seconds of a call = tile_s x tiles of 128 query rows + block_s x blocks of 128 x 128, over all query heads."""

    tile_s: float
    block_s: float
    error: float
    """Root mean square of the relative errors over the timed calls."""


class HardwareTable(Record):
    """Seconds of one layer's attention on full tiles of rows[i] x keys[j], each as one of many in a call."""

    device: str
    """Name of the device as its driver gives it."""
    versions: dict[str, str]
    """Of python, torch, triton."""
    date: str
    command: str
    """What measured it."""
    backend: str
    query_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    dtype: Literal["bf16", "fp16", "fp32"]
    rows: tuple[PositiveInt, ...]
    keys: tuple[PositiveInt, ...]
    forward_s: tuple[tuple[PositiveFloat, ...], ...]
    backward_s: tuple[tuple[PositiveFloat, ...], ...]
    fit: dict[Literal["forward", "backward"], TileFit] = {}
    """For people, and for shapes beyond the table."""
    speeds: dict[str, Speed] = {}
    """For people: whole documents, calls as planned, and PyTorch's own operators, timed in the same process."""

    @model_validator(mode="after")
    def _is_a_table(self) -> HardwareTable:
        for grid in (self.rows, self.keys):
            if len(grid) < 2 or any(a >= b for a, b in zip(grid, grid[1:], strict=False)):
                raise ValueError(f"rows and keys must be two or more ascending numbers, got {list(grid)}")
        for name in ("forward_s", "backward_s"):
            if [len(row) for row in getattr(self, name)] != [len(self.keys)] * len(self.rows):
                raise ValueError(f"{name} must be {len(self.rows)} lists of {len(self.keys)} times")
        return self

    def cost(self, *directions: Literal["forward", "backward"]) -> TableCost:
        """The table of one direction, or of both together."""
        tables = [self.forward_s if direction == "forward" else self.backward_s for direction in directions]
        seconds = [[sum(cell) for cell in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
        picoseconds = np.maximum(1, np.rint(np.array(seconds) * PICOSECONDS).astype(np.int64))
        for axis in (0, 1):  # noise of measuring must not make a larger tile the cheaper one
            picoseconds = np.maximum.accumulate(picoseconds, axis=axis)
        return TableCost(self.rows, self.keys, tuple(map(tuple, picoseconds.tolist())))


def read_hardware(path: str | Path) -> HardwareTable:
    """Raise SettingsError, in words, for a file that is no table."""
    try:
        return HardwareTable.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(
            f"planner.cost: cannot read {path}: {error.strerror}; it is pairs, row-blocks, or a file of measured times"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise SettingsError(f"planner.cost: {path} is not a table of measured kernel times: {error}") from None


def write_hardware(path: Path, table: HardwareTable) -> None:
    """At no moment half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(yaml.safe_dump(table.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    draft.replace(path)


def plan_inputs(
    planner: PlannerSettings,
    lengths: np.ndarray,
    rules: tuple[MaskRule | Mask, ...],
    num_ranks: int,
    pool: Pool,
    shape: AttentionShape,
    group: int | None = None,
) -> PlanInputs:
    """What a micro-batch of documents of these lengths is planned from, as the settings say; `group` if layers differ
    in their query heads per key/value head."""
    return PlanInputs(
        lengths,
        rules,
        num_ranks,
        replace(pool, neighbourhoods=planner.neighbourhoods or 1),
        round(planner.tolerance * MILLION),
        planner.block,
        group or shape.query_heads // shape.kv_heads,
        costs_of(planner),
        wires_of(planner, shape),
    )


def costs_of(planner: PlannerSettings) -> tuple[Cost, ...]:
    """One cost for both directions, or one for each."""
    two = planner.backward == "own-plan"
    if planner.cost in FORMULAS:
        return (PairCost() if planner.cost == "pairs" else RowBlockCost(),) * (1 + two)
    table = read_hardware(planner.cost)
    return (table.cost("forward"), table.cost("backward")) if two else (table.cost("forward", "backward"),)


def wires_of(planner: PlannerSettings, shape: AttentionShape) -> tuple[Wire, ...]:
    """For each of `costs_of`, the price of a row of `shape`;
    none where the settings do not say how fast the wire is."""
    if planner.wire.gb_per_s is None:
        return ()
    if planner.wire.tflops is None:
        table, asked = read_hardware(planner.cost), (shape.query_heads, shape.kv_heads, shape.head_dim)
        if (table.query_heads, table.kv_heads, table.head_dim) != asked:
            raise SettingsError(
                f"planner.cost: {planner.cost} holds times of {table.query_heads}:{table.kv_heads} heads of "
                f"{table.head_dim}, the model has {asked[0]}:{asked[1]} of {asked[2]}. To compare computing with "
                "moving (planner.wire), measure the model's shape: distca measure kernels --heads"
            )
    separate = planner.backward == "own-plan"
    return tuple(_wire(planner, shape, d) for d in ([(False,), (True,)] if separate else [(False, True)]))


def _wire(planner: PlannerSettings, shape: AttentionShape, directions: tuple[bool, ...]) -> Wire:
    wire = planner.wire
    if wire.tflops is None:
        units_per_s = float(PICOSECONDS)
    else:
        units_per_s = wire.tflops * 1e12 / sum(shape.flops(1, backward) for backward in directions)

    def price(query_rows: int, kv_rows: int, gb_per_s: float) -> int:
        ways = (shape.bytes_to_server, shape.bytes_to_trainer)
        most = max(sum(way(query_rows, kv_rows, backward) for backward in directions) for way in ways)
        return round(most / (gb_per_s * 1e9) * units_per_s)

    near = wire.gb_per_s_in_node or wire.gb_per_s
    far_near = (tuple(price(*row, speed) for row in ((1, 0), (0, 1))) for speed in (wire.gb_per_s, near))
    return Wire(*far_near, wire.ranks_per_node or 1)
