"""Masks over the targets: what is trained is the mean over the targets that exist, wherever they sit, and nothing where
there are none.

Real trainers and servers over Gloo against `oracle.py`, which gets its documents from here, not from the stored form.
"""

import numpy as np
import pytest
import torch
from documents import write_prepared
from oracle import Oracle
from team import Team, make_settings, verified

from distca.config import RunSettings
from distca.cost import AttentionShape
from distca.hardware import plan_inputs
from distca.launch.data.batches import NO_TARGET, Corpus, DocumentStream
from distca.launch.run.server import pool_of
from distca.launch.run.trainer import Trainer
from distca.masks import MaskRule
from distca.order import Cursor
from distca.parallel.engine import full_weights
from distca.planner import plan_directions
from distca.schedule import learning_rate

pytestmark = pytest.mark.slow

TOKENS, STEPS = 240, 5
LENGTHS = [1, 7, 127, 29, 98, 6, 2, 190, 40, 33, 1, 61, 18, 150, 9, 77, 240, 25, 86]
WITHOUT_A_RANK, NOTHING, WITHOUT_A_MICRO_BATCH, ONE_TARGET = 2, 3, 4, 5  # what is special of a step


def settings_of(folder, accumulation=1, precision="fp32", train=None, **parallel) -> RunSettings:
    """A smooth optimizer (large eps): it does not blow rounding errors of tiny gradients up to whole steps."""
    optimizer = dict(learning_rate=1e-2, eps=1e-3)
    sizes = dict(tokens_per_step=TOKENS, accumulation=accumulation, precision=precision, steps=STEPS)
    rates = dict(optimizer=optimizer, schedule=dict(name="cosine", warmup_steps=2), clip_grad_norm=0.5)
    train = sizes | rates | (train or {})
    return make_settings(folder, LENGTHS, train=train, parallel=parallel)


class Masked:
    """Documents with labels, and what each step of a run trains on."""

    def __init__(self, folder, settings: RunSettings):
        random = np.random.default_rng(0)
        ids = [random.integers(0, 96, length) for length in LENGTHS]
        labels = [x.copy() for x in ids]
        for x in labels:
            other = random.random(len(x)) < 0.2
            x[other] = random.integers(0, 96, other.sum())  # a label need not be the token
            x[random.random(len(x)) < 0.4] = NO_TARGET
        unmasked = write_prepared(folder / "unmasked", ids, None)
        stream = DocumentStream(Corpus([unmasked]), settings.data, settings.seed, settings.tokens_per_micro_batch)
        cursor, self.steps = Cursor(), []
        for step in range(1, STEPS + 1):
            pieces, cursor = stream.step(cursor, settings.accumulation)
            for number, these in enumerate(pieces):
                for document, at in _masked_rows(settings, step, number, these):
                    labels[these.row[document]][these.start[document] + at] = NO_TARGET
            if step == ONE_TARGET:
                last = next(p for p in range(len(pieces[-1])) if pieces[-1].lengths[p] > 1)
                labels[pieces[-1].row[last]][pieces[-1].end[last] - 1] = 5
            self.steps.append(pieces)
        assert max(p.epoch.max() for pieces in self.steps for p in pieces) == 0, "each token once"
        self.ids, self.labels = ids, labels
        self.folders = (write_prepared(folder / "masked", ids, labels),)

    def documents(self, step: int, micro_batch: int | None = None):
        """Ids and labels of a step's (or a micro-batch's) documents."""
        pieces = self.steps[step - 1] if micro_batch is None else self.steps[step - 1][micro_batch : micro_batch + 1]
        return [
            (self.ids[row][start:end].tolist(), self.labels[row][start:end].tolist())
            for p in pieces
            for row, start, end in zip(p.row, p.start, p.end, strict=True)
        ]

    def targets(self, step: int, micro_batch: int | None = None) -> int:
        return sum(label != NO_TARGET for _, x in self.documents(step, micro_batch) for label in x[1:])


def _masked_rows(settings: RunSettings, step: int, number: int, pieces):
    """(document, tokens in it) that the special steps leave without targets."""
    if step in (NOTHING, ONE_TARGET) or (step == WITHOUT_A_MICRO_BATCH and number == 0 and settings.accumulation > 1):
        yield from ((document, np.arange(length)) for document, length in enumerate(pieces.lengths))
    if step == WITHOUT_A_RANK and settings.parallel.trainers > 1:
        trainers, shape = settings.parallel.trainers, AttentionShape(8, 2, 8, 4)
        inputs = plan_inputs(settings.planner, pieces.lengths, (MaskRule(),), trainers, pool_of(settings), shape)
        mine = plan_directions(inputs, MaskRule())[0].segments.of_rank(1)
        for document, start, end in zip(mine.document, mine.start, mine.end, strict=True):
            yield document, np.arange(start + 1, min(end + 1, pieces.lengths[document]))  # what its rows predict


class Graded(Trainer):
    """A trainer that shows a step's gradients."""

    def gradients(self):
        batch = self._next.result()
        self._next = self._ahead.submit(self._prepare, batch.step + 1, batch.cursor)
        self._module.zero_grad()
        return self._gradients(batch) if batch.targets else None


def distance(found: dict, wanted: dict, scale: dict | None = None) -> float:
    """The largest difference of any parameter, relative to its size or another one."""
    size = lambda x: float(x.detach().double().norm())  # noqa: E731
    return max(size(found[name].double() - x.double()) / size((scale or wanted)[name]) for name, x in wanted.items())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("trainers", [1, 2, 3])
def test_gradients_are_those_of_the_mean_over_the_targets_that_exist(tmp_path, trainers, accumulation):
    settings = settings_of(tmp_path, accumulation, "fp64", trainers=trainers, servers=1)
    masked, oracle = Masked(tmp_path, settings), Oracle(settings, torch.float64)
    assert not masked.targets(NOTHING) and masked.targets(ONE_TARGET) == 1
    assert accumulation == 1 or not masked.targets(WITHOUT_A_MICRO_BATCH, 0)
    with Team(settings, Graded, masked.folders) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        for step in range(1, STEPS + 1):
            found = team.ask(team.trainers, "gradients")
            if step == NOTHING:
                assert found == [None] * trainers
                continue
            loss, gradients = oracle.gradients(masked.documents(step))
            assert found[0][0] == pytest.approx(loss, rel=1e-12), step
            assert distance({n.removeprefix("model."): g for n, g in found[0][1].items()}, gradients) < 1e-10, step


@pytest.mark.parametrize(
    ("trainers", "zero_stage", "accumulation"),
    [(t, z, 1 + (t + z) % 2) for t in (1, 2, 3) for z in (0, 1, 2, 3)],
)
def test_training_under_masks_is_that_of_one_plain_process(tmp_path, trainers, zero_stage, accumulation):
    """Losses, norms, rates and weights: with clipping, a warm-up, and a step without targets that counts for the rate
    and not for Adam."""
    settings = settings_of(tmp_path, accumulation, trainers=trainers, zero_stage=zero_stage)
    if zero_stage == 3:
        recomputed = settings.model.model_copy(update={"activation_checkpointing": True})
        settings = settings.model_copy(update={"model": recomputed})
    masked, oracle = Masked(tmp_path, settings), Oracle(settings)
    before, train = oracle.weights(), settings.train
    with Team(settings, documents=masked.folders) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        for step in range(1, STEPS + 1):
            reports = team.ask(team.trainers, "step")
            first = reports[0]
            assert first.targets == masked.targets(step)
            if step == NOTHING:
                assert not first.summed_loss and not first.exchange.calls
                assert first.grad_norm is None and first.learning_rate is None
                continue
            if step == WITHOUT_A_RANK and trainers > 1:
                assert not reports[1].summed_loss and reports[1].exchange.calls
            rate = learning_rate(train.schedule, 1e-2, step, STEPS)
            loss, norm = oracle.step(masked.documents(step), rate)
            assert sum(r.summed_loss for r in reports) / first.targets == pytest.approx(loss, rel=1e-5), step
            assert [r.grad_norm for r in reports] == pytest.approx([norm] * trainers, rel=1e-5), step
            assert first.learning_rate == rate
        team.ask(team.trainers, "save", tmp_path / "saved")
    after, found = oracle.weights(), full_weights(tmp_path / "saved")
    moved = {name: after[name] - before[name] for name in after}
    assert distance({n.removeprefix("model."): w for n, w in found.items()}, after, moved) < 1e-4, (
        "relative to how far a parameter went; one near 1 is rounded at 1e-5 of that"
    )


def same(one, other) -> bool:
    """Whether two loaded checkpoints hold the same values to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(x, other[name]) for name, x in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or not isinstance(one, (int, float, str, bool, type(None)))


def saved_state(folder):
    return {
        path.name: torch.load(path, weights_only=False, map_location="cpu") for path in sorted(folder.rglob("*.pt"))
    }


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_without_targets_leaves_every_bit_and_a_run_resumes_behind_it(tmp_path, zero_stage):
    settings = settings_of(tmp_path, 2, trainers=2, zero_stage=zero_stage)
    masked = Masked(tmp_path, settings)
    with Team(settings, documents=masked.folders) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        team.losses(NOTHING - 1)
        team.ask(team.trainers, "save", tmp_path / "before")
        (report, _) = team.ask(team.trainers, "step")
        team.ask(team.trainers, "save", tmp_path / "after")
        going_on = team.losses(STEPS - NOTHING)
        team.ask(team.trainers, "save", tmp_path / "end")
    assert same(saved_state(tmp_path / "before"), saved_state(tmp_path / "after"))
    assert not same(saved_state(tmp_path / "before"), saved_state(tmp_path / "end"))
    with Team(settings, documents=masked.folders) as team:
        team.ask(team.trainers, "load", tmp_path / "after")
        team.ask(team.trainers, "seek", NOTHING + 1, Cursor(*report.cursor))
        assert team.losses(STEPS - NOTHING) == going_on
        team.ask(team.trainers, "save", tmp_path / "resumed")
    assert same(saved_state(tmp_path / "resumed"), saved_state(tmp_path / "end"))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_run_that_begins_without_targets_is_saved_and_resumed(tmp_path, zero_stage):
    """The optimizer has no state yet when it is saved."""
    settings = settings_of(tmp_path, trainers=2, zero_stage=zero_stage)
    masked = Masked(tmp_path, settings)
    losses = []
    for name in ("one", "other"):
        with Team(settings, documents=masked.folders) as team:
            if name == "other":
                team.ask(team.trainers, "load", tmp_path / "one")
            team.ask(team.trainers, "save", tmp_path / name)
            team.ask(team.trainers, "seek", 1, Cursor())
            losses.append(team.losses(2))
    assert losses[0] == losses[1]


def test_verify_takes_the_first_step_with_targets(tmp_path):
    settings = settings_of(tmp_path, 2, "fp64", trainers=2)
    masked = Masked(tmp_path, settings)
    for p in masked.steps[0]:
        for row, start, end in zip(p.row, p.start, p.end, strict=True):
            masked.labels[row][start:end] = NO_TARGET
    result = verified(settings, (write_prepared(tmp_path / "late", masked.ids, masked.labels),))
    assert result.passed and result.step == 2


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_verify_mixes_sources_with_labels_and_without(tmp_path, precision):
    settings = settings_of(tmp_path, 2, precision, trainers=2, servers=1)
    masked = Masked(tmp_path, settings)
    two = settings.data.model_copy(update={"sources": settings.data.sources * 2})
    both = (*masked.folders, write_prepared(tmp_path / "plain", masked.ids, None))
    result = verified(settings.model_copy(update={"data": two}), both)
    assert result.passed and result.step == 1, f"{result.parameters[0]}, loss off by {result.loss_error:.2e}"


@pytest.mark.parametrize(("zero_stage", "name"), [(0, "linear"), (1, "cosine"), (2, "cosine"), (3, "linear")])
def test_a_run_that_is_extended_uses_the_rates_of_the_longer_run_and_the_numbers_asked_for(tmp_path, zero_stage, name):
    def settings(steps):
        """The longer run also clips, decays and averages otherwise."""
        others = dict(beta1=0.8, beta2=0.9, weight_decay=0.5) if steps > 2 else {}
        train = dict(steps=steps, schedule=dict(name=name, warmup_steps=1), clip_grad_norm=0.05 if others else 0.5)
        train["optimizer"] = dict(learning_rate=1e-2, eps=1e-3, **others)
        return settings_of(tmp_path, train=train, trainers=2, zero_stage=zero_stage)

    oracle, rates = Oracle(settings(2)), []
    before, masked = oracle.weights(), Masked(tmp_path, settings(2))
    cursor = Cursor()
    for done, steps in ((0, 2), (2, 6)):
        oracle.go_by(settings(steps))
        with Team(settings(steps), documents=masked.folders) as team:
            if done:
                team.ask(team.trainers, "load", tmp_path / "2")
            team.ask(team.trainers, "seek", done + 1, cursor)
            for step in range(done + 1, min(steps, STEPS) + 1):
                report = team.ask(team.trainers, "step")[0]
                cursor = Cursor(*report.cursor)
                rates.append(report.learning_rate)
                wanted = learning_rate(settings(steps).train.schedule, 1e-2, step, steps)
                if step != NOTHING:
                    oracle.step(masked.documents(step), wanted)
                    assert report.learning_rate == wanted
            team.ask(team.trainers, "save", tmp_path / str(steps))
    assert all(rate is None or rate > 0 for rate in rates)
    after, found = oracle.weights(), full_weights(tmp_path / "6")
    moved = {name: after[name] - before[name] for name in after}
    assert distance({n.removeprefix("model."): w for n, w in found.items()}, after, moved) < 1e-4


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(tmp_path, zero_stage):
    train = dict(optimizer=dict(learning_rate=1e30), schedule=dict(name="constant"))
    settings = settings_of(tmp_path, 2, train=train, trainers=2, zero_stage=zero_stage)
    masked = Masked(tmp_path, settings)
    with Team(settings, documents=masked.folders) as team:
        team.ask(team.trainers, "seek", 1, Cursor())
        assert all(np.isfinite(r.grad_norm) for r in team.ask(team.trainers, "step"))
        assert team.ask(team.trainers, "weights_are_finite") == [True, True]
        team.ask(team.trainers, "save", tmp_path / "before")
        assert not any(np.isfinite(r.grad_norm) for r in team.ask(team.trainers, "step"))
        team.ask(team.trainers, "save", tmp_path / "after")
    before, after = (full_weights(tmp_path / name) for name in ("before", "after"))
    assert same(before, after)


class Poisoned(Trainer):
    """Starts from weights that hold a number which is none, in a row that no document reads."""

    def connect(self) -> None:
        with torch.no_grad():
            self._module.model.get_input_embeddings().weight[95, 0] = torch.nan
        super().connect()


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_weights_that_are_not_finite_are_noticed(tmp_path, zero_stage):
    settings = settings_of(tmp_path, trainers=2, zero_stage=zero_stage)
    with Team(settings, Poisoned) as team:
        assert not all(team.ask(team.trainers, "weights_are_finite"))
