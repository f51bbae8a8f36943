"""A distributed step equals one device, loss and every gradient, for every pool, model family, precision and ZeRO
stage.

Real trainers and servers, one process each, over Gloo;
the reference is the stock Transformers model on each document alone."""

import pytest
from hardware_tables import write_hardware
from interpreter import interpreted
from team import Team, make_settings, verified

from distca.order import Cursor

pytestmark = pytest.mark.slow

AWKWARD = [1, 7, 127, 129, 698, 6, 2, 190, 40]  # 1200 tokens, for 1, 2 and 3 trainers
LLAMA_7_HEADS = dict(hidden_size=56, num_attention_heads=7, num_key_value_heads=7)
GEMMA = dict(hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=8, sliding_window=100)
FAMILIES = {
    "llama, 7 heads": LLAMA_7_HEADS,
    "llama, tied embeddings": dict(tie_word_embeddings=True),
    "qwen2, biases": dict(model_type="qwen2"),
    "qwen2, window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=60, max_window_layers=1),
    "qwen3": dict(model_type="qwen3"),
    "mistral, window": dict(model_type="mistral", sliding_window=100),
    "gemma3, window": dict(model_type="gemma3_text", layer_types=["sliding_attention", "full_attention"], **GEMMA),
    "phi3": dict(model_type="phi3", pad_token_id=0),
    "olmo2": dict(model_type="olmo2"),
}
ALSO_FP32 = ("llama, 7 heads", "qwen3", "mistral, window", "gemma3, window")


def verify(tmp_path, lengths, model=None, **sections):
    return verified(make_settings(tmp_path, lengths, model, **sections))


def assert_passed(result, num_parameters_at_least=15):
    worst = result.parameters[0]
    assert result.passed, (
        f"loss off by {result.loss_error:.2e}, {worst.name} by {worst.error:.2e}, allowed {worst.allowed:.0e}"
    )
    assert len(result.parameters) >= num_parameters_at_least


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("trainers_serve", "servers"), [(serve, n) for serve in (True, False) for n in (0, 1, 2, 3) if serve or n]
)
@pytest.mark.parametrize("trainers", [1, 2, 3])
def test_every_pool(tmp_path, trainers, trainers_serve, servers, precision):
    parallel = dict(trainers=trainers, servers=servers, trainers_serve=trainers_serve)
    assert_passed(verify(tmp_path, AWKWARD, parallel=parallel, train=dict(precision=precision)))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("trainers_serve", [True, False])
def test_one_document_that_spans_all_trainers(tmp_path, trainers_serve, precision):
    parallel = dict(trainers=3, servers=2, trainers_serve=trainers_serve)
    assert_passed(verify(tmp_path, [1500], parallel=parallel, train=dict(precision=precision)))


@pytest.mark.parametrize(
    ("family", "precision"), [(f, "fp64") for f in FAMILIES] + [(f, "fp32") for f in FAMILIES if f in ALSO_FP32]
)
def test_every_family(tmp_path, family, precision):
    parallel = dict(trainers=2, servers=1, trainers_serve=True)
    assert_passed(verify(tmp_path, AWKWARD, FAMILIES[family], parallel=parallel, train=dict(precision=precision)))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_gemma2_with_soft_caps_through_the_reference_back_end(tmp_path, precision):
    model = dict(model_type="gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=3.0, **GEMMA)
    sections = dict(parallel=dict(trainers=2, servers=2, trainers_serve=False), kernels=dict(backend="reference"))
    assert_passed(verify(tmp_path, AWKWARD, model, train=dict(precision=precision), **sections))


@pytest.mark.parametrize(("zero_stage", "accumulation"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_every_zero_stage(tmp_path, zero_stage, accumulation):
    parallel = dict(trainers=2, servers=1, trainers_serve=False, zero_stage=zero_stage)
    assert_passed(verify(tmp_path, AWKWARD, parallel=parallel, train=dict(accumulation=accumulation)))


def test_measured_kernel_times_and_a_plan_of_its_own_for_backward(tmp_path):
    table = write_hardware(tmp_path / "device.yaml")
    planner = dict(block=16, cost=str(table), backward="own-plan", wire=dict(gb_per_s=0.5))
    parallel = dict(trainers=2, servers=2, trainers_serve=True)
    assert_passed(verify(tmp_path, AWKWARD, parallel=parallel, planner=planner, train=dict(precision="fp64")))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_is_at_most_twice_as_far_off_as_plain_bf16(tmp_path, zero_stage):
    parallel = dict(trainers=2, servers=2, trainers_serve=False, zero_stage=zero_stage)
    assert_passed(verify(tmp_path, AWKWARD, parallel=parallel, train=dict(precision="bf16")))


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_activation_checkpointing(tmp_path, zero_stage):
    parallel = dict(trainers=2, servers=1, trainers_serve=True, zero_stage=zero_stage)
    settings = make_settings(tmp_path, AWKWARD, parallel=parallel)
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"activation_checkpointing": True})}
    )
    with Team(settings) as team:
        assert_passed(team.verify())
        (report, _rss) = team.ask(team.servers, "take_report")[0]
    assert report.calls == 4, "two layers, forward and backward: attention is not repeated"


OVERLAPS = {  # accumulation, ZeRO stage, pool, precision
    "in place": (1, 0, dict(servers=0), "fp32"),
    "dedicated, two micro-batches": (2, 3, dict(servers=2, trainers_serve=False), "fp32"),
    "mixed, an odd micro-batch": (3, 2, dict(servers=1), "fp32"),
    "three trainers": (1, 1, dict(servers=1, trainers=3), "fp64"),
    "dedicated, odd": (3, 1, dict(servers=1, trainers_serve=False), "fp64"),
}


@pytest.mark.parametrize(
    ("accumulation", "zero_stage", "pool", "precision", "checkpointing"),
    [(*case, recomputed) for case in OVERLAPS.values() for recomputed in (False, True)],
)
def test_two_nano_batches_at_once(tmp_path, accumulation, zero_stage, pool, precision, checkpointing):
    """Pairs of micro-batches, and documents of one in two groups whose tokens no rank can share equally."""
    parallel = dict(trainers=2, overlap="on", zero_stage=zero_stage) | pool
    train = dict(accumulation=accumulation, precision=precision)
    settings = make_settings(tmp_path, AWKWARD, parallel=parallel, train=train)
    model = settings.model.model_copy(update={"activation_checkpointing": checkpointing})
    assert_passed(verified(settings.model_copy(update={"model": model})))


@pytest.mark.parametrize("lengths", [[1200], [1100, 100], [3, 1197]], ids=str)
def test_overlap_with_one_document_of_nearly_all_tokens(tmp_path, lengths):
    """Nothing to divide: the pass is one nano-batch on every rank."""
    parallel = dict(trainers=3, servers=1, trainers_serve=False, overlap="on")
    assert_passed(verify(tmp_path, lengths, parallel=parallel))


def test_a_server_without_work_in_one_of_two_nano_batches(tmp_path):
    parallel = dict(trainers=2, servers=3, trainers_serve=False, overlap="on")
    assert_passed(verify(tmp_path, [1] * 100 + [100], parallel=parallel, planner=dict(block=128)))


def test_steps_with_overlap_have_the_same_losses_every_time_and_nearly_those_without(tmp_path):
    def losses(overlap):
        settings = make_settings(
            tmp_path, AWKWARD, parallel=dict(trainers=2, servers=1, overlap=overlap), train=dict(accumulation=3)
        )
        with Team(settings) as team:
            team.ask(team.trainers, "seek", 1, Cursor())
            return team.losses(4)

    on, again, off = losses("on"), losses("on"), losses("off")
    assert on == again
    assert on == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize(("model", "lengths"), [("llama", [1, 129, 250, 20]), ("mistral, window", [330, 70])])
def test_the_triton_kernels_in_their_interpreter(tmp_path, model, lengths):
    sections = dict(parallel=dict(trainers=2, servers=2, trainers_serve=False), kernels=dict(backend="triton"))
    settings = make_settings(tmp_path, lengths, FAMILIES.get(model), **sections)
    assert_passed(interpreted(verified, settings))
