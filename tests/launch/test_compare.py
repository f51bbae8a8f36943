"""A race between methods: who takes part, that all compute the same, what is shown, and what is called an error."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from team import Team, make_settings

from distca.errors import SettingsError
from distca.launch.bench.compare import plot, race_lengths, table_of, write_json
from distca.launch.bench.race import TITLES, Race, Times, drawn, methods_of, order_of, race_settings, refusing
from distca.launch.bench.racer import Racer, RacingServer
from distca.launch.data.batches import Corpus, DocumentStream, pieces_of_steps
from distca.launch.data.prepare import prepare
from distca.order import Cursor

ONE_OF_EACH = {"trainers": 2, "servers": 1}


def settings_of(folder, lengths=(60, 20, 40, 7, 1), asked=(), **sections):
    sections = {"parallel": ONE_OF_EACH} | sections
    return race_settings(make_settings(folder, list(lengths), **sections), asked, rounds=3)


# ---- real processes ----


def raced(settings, steps=2):
    """Per method: every round's mean loss and gradient norm."""
    methods = [method for method in refusing(methods_of(settings, ()), [], []) if not method.refusal]
    with Team(settings, Racer, server=RacingServer) as team:
        for method in methods:
            team.ask([*team.trainers, *team.servers], "enter", method.name, method.settings)
        team.ask(team.trainers, "seek", 1, Cursor())
        found = {method.name: Times(method) for method in methods}
        for number in range(steps):
            for method in order_of(methods, number):
                found[method.name].add(team.ask(team.trainers, "race", method.name))
        assert all(team.ask(team.trainers, "weights_are_finite"))
    return Race(settings, list(found.values()), [], [1], steps, "CPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "sections"),
    [
        ((60, 20, 40, 7, 1), {}),
        ((600, 200, 40, 8), {"parallel": ONE_OF_EACH | {"zero_stage": 3}}),
        ((64, 64), {"model": {"num_key_value_heads": 8}}),
        ((60, 20, 41, 7), {"train": {"tokens_per_step": 128, "accumulation": 2}}),
    ],
    ids=["short", "ZeRO 3 and a document that is cut", "as many key/value heads as query heads", "accumulation"],
)
def test_every_method_computes_the_same_step_and_changes_no_weight(tmp_path, lengths, sections):
    """The documents are one epoch, so every step has the same loss if the weights stay what they are."""
    race = raced(settings_of(tmp_path, lengths, **sections))
    alone = [name for name in TITLES if not name.endswith("-overlap")]  # who shares an engine that accumulates
    assert [times.method.name for times in race.times] == (alone if "train" in sections else list(TITLES))
    assert race.disagreements() == []
    if "train" not in sections:
        losses = [loss for times in race.times for loss in times.losses]
        assert max(losses) - min(losses) < 1e-5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_keeps_what_all_methods_attention_returned(tmp_path, precision):
    settings = settings_of(tmp_path, (600, 200, 40, 8), train={"precision": precision})
    model = settings.model.model_copy(update={"activation_checkpointing": True})
    assert raced(settings.model_copy(update={"model": model})).disagreements() == []


# ---- who takes part ----


def test_pools_with_dedicated_servers_take_part_where_there_are_some(tmp_path):
    methods = methods_of(settings_of(tmp_path), ())
    assert [(m.name, m.workers) for m in methods] == [
        *(("local", 2), ("ulysses", 2), ("all-gather", 2)),
        *(("in-place", 2), ("in-place-overlap", 2), ("mixed", 3), ("mixed-overlap", 3)),
        *(("dedicated", 3), ("dedicated-overlap", 3)),
    ]
    assert [m.name for m in methods if m.overlaps] == ["in-place-overlap", "mixed-overlap", "dedicated-overlap"]
    pools = {m.name: (m.settings.parallel.servers, m.settings.parallel.trainers_serve) for m in methods}
    assert (pools["in-place"], pools["mixed"], pools["dedicated"]) == ((0, True), (1, True), (1, False))
    alone = settings_of(tmp_path, parallel={"trainers": 2})
    assert [m.name for m in methods_of(alone, ()) if not m.is_baseline] == ["in-place", "in-place-overlap"]
    with pytest.raises(SettingsError, match="--methods mixed: needs dedicated attention servers; give --servers N"):
        methods_of(alone, ["mixed"])
    with pytest.raises(SettingsError, match="--methods ring: there are local, ulysses"):
        methods_of(alone, ["ring", "local"])


def test_overlap_races_where_it_leaves_the_engine_as_it_is(tmp_path):
    several = settings_of(tmp_path, train={"accumulation": 2})
    held = [np.array([64, 64])]
    told = {m.name: m.refusal for m in refusing(methods_of(several, ["in-place", "in-place-overlap"]), [8], held)}
    assert told["in-place"] is None and "race one micro-batch" in told["in-place-overlap"]


def test_servers_that_no_method_uses_are_not_started(tmp_path):
    assert settings_of(tmp_path, asked=["ulysses", "in-place"]).parallel.servers == 0
    assert settings_of(tmp_path).parallel.servers == 1


def test_what_a_method_cannot_do_is_said_and_the_others_race_on(tmp_path):
    methods = methods_of(settings_of(tmp_path), ())
    found = {m.name: m.refusal for m in refusing(methods, [7, 7], [np.array([100, 28]), np.array([64, 64])])}
    assert found.pop("local") == "a document of 100 tokens is longer than a rank holds (64)"
    assert found.pop("ulysses") == "7 query heads cannot be shared out evenly over 2 trainers"
    assert set(found.values()) == {None}
    few = {m.name: m.refusal for m in refusing(methods, [8], [np.array([2])])}
    assert few["all-gather"] == "there are fewer documents than trainers" and few["ulysses"] is None


def test_methods_take_turns_in_both_orders():
    assert [order_of("abc", n) for n in range(3)] == [list("abc"), list("cba"), list("abc")]


# ---- documents ----


@pytest.mark.parametrize("text", ["long-half", "equal:7", "short:8", "heavy-tail", "FILE"])
def test_drawn_documents_fill_every_micro_batch_uncut(tmp_path, text):
    (tmp_path / "lengths.json").write_text("[5, 0, 90, 34]")
    settings = settings_of(tmp_path, train={"tokens_per_step": 2000, "accumulation": 2})
    lengths = race_lengths(text.replace("FILE", str(tmp_path / "lengths.json")), settings)
    settings = drawn(settings, lengths, 96, tmp_path)
    assert settings.tokens_per_micro_batch == lengths.sum() and settings.accumulation == 2
    documents = prepare(settings.data, 96)
    for pieces in pieces_of_steps(settings, documents, Cursor(), 3):
        assert [sorted(p.lengths.tolist()) for p in pieces] == [sorted(lengths.tolist())] * 2
    assert DocumentStream(Corpus(documents), settings.data, 0, 10).corpus.tokens(0, 0).max() < 96


def test_named_lengths_are_what_their_names_say(tmp_path):
    settings = settings_of(tmp_path, train={"tokens_per_step": 2000})
    assert race_lengths("long-half", settings)[0] == 1000
    assert race_lengths("equal:8", settings).tolist() == [250] * 8
    assert race_lengths("short:8", settings).tolist() == [8] * 250
    assert race_lengths("heavy-tail", settings).max() <= 1000
    for wrong in ("equal", "equal:0", "short:2001", "long", "equal:x"):
        with pytest.raises(SettingsError, match="long-half, equal:N, short:N, heavy-tail or FILE.json"):
            race_lengths(wrong, settings)


# ---- what came of it ----


@pytest.fixture
def race(tmp_path):
    seconds = {
        "local": [2.0, 4.0, 3.0],
        "ulysses": [1.0, 2.0, 1.5],
        "in-place": [0.8, 1.6, 1.2],
        "mixed": [0.7, 1.4, 1],
    }
    settings = settings_of(tmp_path)
    methods = {m.name: m for m in methods_of(settings, ())}
    times = [Times(methods[name], list(values), [5.0] * 3, [1.0] * 3) for name, values in seconds.items()]
    refused = [replace(methods["all-gather"], refusal="7 query heads cannot be shared out evenly over 2 trainers")]
    return Race(settings, times, refused, [60, 20, 40, 8] * 3, 3, "CPU with 1 thread a worker")


def test_ratios_are_medians_of_rounds(race):
    assert race.ratio(race.times[2], race.times[0]) == pytest.approx(2.5)
    assert race.best_rival().method.name == "ulysses"


def test_the_table_is_legible_in_80_columns(race):
    gather = Times(replace(race.refused[0], refusal=None), [100.0, 120.0, 110.0])
    console = Console(record=True, width=80)
    console.print(table_of(replace(race, times=[*race.times[:2], gather, *race.times[2:]])))
    text = console.export_text()
    print(text)
    row = next(line for line in text.splitlines() if line.lstrip().startswith("DistCA in place")).split()
    assert row[3:5] == ["2", "1.200"] and row[-3:] == ["2.50", "1.25", "91.67"]
    assert all(word in text for word in ("zigzag all-gather", "tokens/s", "cannot", "128 tokens a step, 4 documents"))
    assert "…" not in text


def test_the_advice_says_what_to_set_and_does_not_hide_workers(race):
    assert race.advice() == (
        "Set parallel.servers: 0, trainers_serve: true and overlap: off (DistCA in place with 2 workers): 1.25 times "
        "as fast as Ulysses, the fastest of the others. 1.14 times as fast as that is DistCA mixed with 3 workers: "
        "parallel.servers: 1, trainers_serve: true and overlap: off."
    )
    slower = replace(race, times=[*race.times[:2], Times(race.times[2].method, [2.0, 4.0, 3.0])])
    assert "its steps take 2.00 times as long as those of Ulysses" in slower.advice()


def test_a_method_that_computes_something_else_is_named(race):
    assert race.disagreements() == []
    race.times[2].losses[1] *= 1 + 3e-5
    (sentence,) = race.disagreements()
    assert sentence.startswith(
        "loss of step 2 by DistCA in place is 5.00015, by local packing 5: relative difference 3"
    )
    race.times[1].grad_norms[2] = float("nan")
    assert len(race.disagreements()) == 2


def test_half_precision_is_held_to_what_plain_runs_differ_by(race):
    settings = race.settings.model_copy(update={"train": race.settings.train.model_copy(update={"precision": "bf16"})})
    race = replace(race, settings=settings)
    race.times[1].losses[0] *= 1.004  # a plain run
    race.times[2].losses[0] *= 1.006
    assert race.disagreements() == []
    race.times[2].losses[0] *= 1.006
    assert len(race.disagreements()) == 1


def test_the_picture_is_800_pixels_wide_and_the_file_holds_every_figure(race, tmp_path):
    plot(race, tmp_path / "race.png")
    assert struct.unpack(">I", (tmp_path / "race.png").read_bytes()[16:20]) == (800,)
    write_json(race, tmp_path / "race.json")
    found = json.loads((tmp_path / "race.json").read_text())
    assert found["methods"]["mixed"]["median_s"] == 1.0 and found["methods"]["mixed"]["workers"] == 3
    assert found["methods"]["mixed"]["tokens_per_s"] == race.settings.train.tokens_per_step
    assert found["methods"]["mixed"]["times_faster_than"]["ulysses"] == pytest.approx(1.4286, 1e-3)
    assert found["methods"]["all-gather"]["refused"].startswith("7 query heads")
    assert found["best_rival"] == "ulysses" and found["disagreements"] == [] and found["documents_per_step"] == 4
