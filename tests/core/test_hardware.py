"""Measured times and the wire's speed become the planner's integers; what is no table is refused in words."""

import pytest
from hardware_tables import write_hardware

from distca.config import PlannerSettings, validate_settings
from distca.cost import AttentionShape, PairCost, RowBlockCost
from distca.errors import SettingsError
from distca.hardware import costs_of, read_hardware, wires_of
from distca.masks import UNBOUNDED, Bands

SHAPE = AttentionShape(query_heads=8, kv_heads=2, head_dim=8, element_bytes=4)


def test_one_plan_has_the_time_of_both_directions(tmp_path):
    path = str(write_hardware(tmp_path / "device.yaml"))
    table = read_hardware(path)
    (both,) = costs_of(PlannerSettings(cost=path))
    forward, backward = costs_of(PlannerSettings(cost=path, backward="own-plan"))
    for i in range(len(table.rows)):
        for j in range(len(table.keys)):
            seconds = table.forward_s[i][j], table.backward_s[i][j]
            tile = Bands.of((0, table.rows[i], 0, table.keys[j], -UNBOUNDED, UNBOUNDED))
            assert forward.of(tile)[0] == pytest.approx(seconds[0] * 1e12, rel=1e-5)
            assert backward.of(tile)[0] == pytest.approx(seconds[1] * 1e12, rel=1e-5)
            assert both.of(tile)[0] == pytest.approx(sum(seconds) * 1e12, rel=1e-5)


@pytest.mark.parametrize("cost, kind", [("pairs", PairCost), ("row-blocks", RowBlockCost)])
def test_a_formula_is_the_same_in_both_directions(cost, kind):
    assert costs_of(PlannerSettings(cost=cost)) == (kind(),)
    assert costs_of(PlannerSettings(cost=cost, backward="own-plan")) == (kind(), kind())


def test_a_row_costs_what_the_server_could_compute_meanwhile():
    assert wires_of(PlannerSettings(), SHAPE) == ()
    wire = dict(gb_per_s=2.0, gb_per_s_in_node=20.0, ranks_per_node=4, tflops=0.5)
    (both,) = wires_of(PlannerSettings(wire=wire), SHAPE)
    pair_s = (SHAPE.flops(1) + SHAPE.flops(1, backward=True)) / 0.5e12
    query_s = (SHAPE.bytes_to_server(1, 0) + SHAPE.bytes_to_server(1, 0, True)) / 2e9
    kv_s = (SHAPE.bytes_to_server(0, 1) + SHAPE.bytes_to_server(0, 1, True)) / 2e9
    assert both.far == (round(query_s / pair_s), round(kv_s / pair_s)) and both.ranks_per_node == 4
    assert both.near == (round(query_s / 10 / pair_s), round(kv_s / 10 / pair_s))
    forward, backward = wires_of(PlannerSettings(wire=wire, backward="own-plan"), SHAPE)
    assert forward != backward


@pytest.mark.parametrize(
    "changes", [dict(rows=[5]), dict(keys=[9, 8, 7, 6]), dict(forward_s=[[1.0]]), dict(backward_s=3), dict(more=1)]
)
def test_a_table_that_is_none_is_refused(tmp_path, changes):
    with pytest.raises(SettingsError, match="no table|not a table"):
        read_hardware(write_hardware(tmp_path / "device.yaml", **changes))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot read"):
        read_hardware(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("planner", "complaint"),
    [
        (dict(wire=dict(gb_per_s=1)), "needs wire.tflops"),
        (dict(cost="device.yaml", wire=dict(gb_per_s=1, tflops=3)), "leave it out"),
        (dict(wire=dict(gb_per_s=-1, tflops=3)), "greater than 0"),
    ],
)
def test_speeds_that_do_not_go_together_are_refused(planner, complaint):
    run = dict(model=dict(path="x"), data=dict(sources=[dict(path="y")]), train=dict(tokens_per_step=8, steps=1))
    with pytest.raises(SettingsError, match=complaint):
        validate_settings(run | dict(planner=planner))
