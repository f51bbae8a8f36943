"""Which models come in, what their layers ask for, and what is refused in words. In one process."""

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_process import attention_of_ranks, make_exchanges
from transformers import AutoConfig, AutoModelForCausalLM

from distca.errors import SettingsError, Unsupported
from distca.masks import MaskRule
from distca.parallel.attach import (
    NAME,
    PROBE_LENGTHS,
    PackedCausalLM,
    ProbeAttention,
    distca_attention,
    probe,
)
from distca.parallel.models import build_model, read_config
from distca.plan import PlanInputs, make_pool

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
)
ALTERNATING = ["sliding_attention", "full_attention"]
QWEN2_WINDOW = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
FAMILIES = {  # configuration, windows of the two layers, scale, softcap
    "llama": ({}, (0, 0), 8**-0.5, 0.0),
    "mistral": (dict(sliding_window=5), (5, 5), 8**-0.5, 0.0),
    "qwen2": (QWEN2_WINDOW, (0, 5), 8**-0.5, 0.0),
    "qwen3": (dict(head_dim=16), (0, 0), 0.25, 0.0),
    "gemma2": (dict(query_pre_attn_scalar=25, sliding_window=6, attn_logit_softcapping=3.0), (6, 0), 0.2, 3.0),
    "gemma3_text": (
        dict(query_pre_attn_scalar=16, sliding_window=6, layer_types=ALTERNATING),
        (6, 0),
        0.25,
        0.0,
    ),
    "phi3": (dict(sliding_window=7), (7, 7), 8**-0.5, 0.0),
    "olmo2": ({}, (0, 0), 8**-0.5, 0.0),
}


def make_model(family="llama", dtype=torch.float32, chunk=64, **changes) -> PackedCausalLM:
    config = read_config(None, dict(model_type=family, **TINY | FAMILIES[family][0] | changes))
    return PackedCausalLM(build_model(config, None, None, dtype, seed=0), chunk)


def unproved_model(family, **changes) -> PackedCausalLM:
    """A model of a family that `read_config` would refuse already."""
    config = AutoConfig.for_model(family, **TINY | changes)
    return PackedCausalLM(AutoModelForCausalLM.from_config(config, attn_implementation=NAME), 64)


# ---- what is found ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_what_each_layer_asks_for(family):
    changes, windows, scale, softcap = FAMILIES[family]
    calls = probe(make_model(family), "reference")
    assert [call.rule for call in calls] == [MaskRule(w) for w in windows]
    for call in calls:
        assert (call.scale, call.softcap) == (pytest.approx(scale), softcap)
        assert (call.query_heads, call.kv_heads, call.head_dim) == (4, 2, changes.get("head_dim", 8))


def test_the_probe_leaves_the_model_as_it_was():
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe(model, "torch")
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fresh_weights_are_the_same_in_every_precision_and_follow_the_seed():
    config = read_config(None, dict(model_type="llama", **TINY))
    fp32, bf16 = (build_model(config, None, None, dtype, seed=3) for dtype in (torch.float32, torch.bfloat16))
    other = build_model(config, None, None, torch.float32, seed=4)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(fp32.parameters(), bf16.parameters(), strict=True))
    assert not torch.equal(fp32.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
def test_rotary_frequencies_stay_fp32_in_a_bf16_model(tmp_path, loaded):
    """In bf16 position 1000 would be some other position."""
    config = read_config(None, dict(model_type="llama", **TINY))
    model = build_model(config, None, None, torch.bfloat16, seed=0)
    exact = build_model(config, None, None, torch.float32, seed=0)
    if loaded:
        model.save_pretrained(tmp_path)
        model = build_model(config, str(tmp_path), None, torch.bfloat16, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found, wanted = dict(model.named_buffers()), dict(exact.named_buffers())
    assert found.keys() == wanted.keys() and any("inv_freq" in name for name in found)
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], wanted[name]) for name in found)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (dict(model_type="bloom"), "'bloom' has not been proved exact; these have: llama, "),
        (dict(model_type="llama", attention_dropout=0.1), "set it to 0.0"),
        (dict(model_type="gemma3_text", use_bidirectional_attention=True), "only causal"),
        (dict(model_type="llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "'dynamic'"),
        (dict(model_type="no such model"), "no configuration from"),
        (dict(model_type="llama", num_attention_heads="many"), "num_attention_heads = 'many': want a whole number"),
    ],
    ids=["family", "dropout", "bidirectional", "dynamic rope", "unknown", "nonsense"],
)
def test_configurations_that_would_train_to_something_else_are_refused(config, sentence):
    with pytest.raises(SettingsError, match=sentence):
        read_config(None, {**TINY, **config})


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no configuration from"):
        read_config(str(tmp_path), None)


def call_model(model=None, rows=1, tokens=23, **keywords):
    ids = torch.arange(rows * tokens).view(rows, tokens) % 90
    return (model or make_model()).model(input_ids=ids, use_cache=False, **keywords)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        (dict(), "needs the keyword distca"),
        (dict(rows=2, distca=ProbeAttention("reference")), "one packed row of documents"),
        (dict(attention_mask=torch.ones(1, 23).tril(-1), distca=ProbeAttention("reference")), "without padding"),
        (dict(distca=ProbeAttention("reference"), sideways=3), "asks for sideways"),
        (dict(distca=ProbeAttention("reference"), is_causal=False), "only causal"),
    ],
    ids=["no plan", "batch", "padding", "unknown keyword", "not causal"],
)
def test_calls_that_we_would_get_wrong_are_refused(keywords, sentence):
    with pytest.raises(Unsupported, match=sentence):
        call_model(**keywords)


def test_a_mask_that_hides_nothing_is_no_padding():
    run = ProbeAttention("reference")
    call_model(attention_mask=torch.ones(1, 23, dtype=torch.int64), distca=run)
    assert len(run.calls) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(dropout=0.1), "dropout of 0.1"),
        (dict(s_aux=torch.zeros(4)), "asks for s_aux"),
        (dict(value=torch.zeros(1, 2, 9, 4)), "value heads of size 4"),
        (dict(key=torch.zeros(1, 2, 12, 8)), "one packed row"),
        (dict(module=SimpleNamespace(is_causal=False)), "only causal"),
    ],
    ids=["dropout", "sinks", "MLA", "cache", "bidirectional"],
)
def test_layers_that_ask_for_what_we_do_not_compute_are_refused(changes, sentence):
    asked = dict(module=None, query=torch.zeros(1, 4, 9, 8), key=torch.zeros(1, 2, 9, 8), value=torch.zeros(1, 2, 9, 8))
    with pytest.raises(Unsupported, match=sentence):
        distca_attention(**asked | dict(attention_mask=None, distca=ProbeAttention("reference")) | changes)


def test_sinks_of_a_real_model_are_refused():
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(Unsupported, match="asks for s_aux"):
        probe(unproved_model("gpt_oss", **experts), "reference")


def test_value_heads_of_another_size_of_a_real_model_are_refused():
    small = dict(
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4
    )
    with pytest.raises(Unsupported, match="value heads of size 6 .*MLA"):
        probe(unproved_model("deepseek_v3", **small, num_key_value_heads=4, head_dim=4), "reference")


class Fake(torch.nn.Module):
    """A model of two layers, as far as the probe can see; `stock` is what it does without us."""

    def __init__(self, mix, stock=None, head=lambda x: x):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=96, num_hidden_layers=2, model_type="fake", _attn_implementation=NAME)
        self.embedding, self.mix, self.stock, self.head = torch.nn.Embedding(96, 8), mix, stock or mix, head
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))

    def base_model(self, input_ids, use_cache, position_ids=None, distca=None):
        mix = self.stock if distca is None else self.mix
        distca = distca or ProbeAttention("reference", (input_ids.shape[1],))
        return SimpleNamespace(last_hidden_state=mix(self.embedding(input_ids[0]), distca)[None])

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.head(self.base_model(**inputs).last_hidden_state))

    def set_attn_implementation(self, name):
        self.config._attn_implementation = name

    def get_output_embeddings(self):
        return torch.nn.Identity()


def attend_twice(x, distca):
    for _ in range(2):
        x = x + distca(x[:, None], x[:, None], x[:, None], MaskRule(), 1.0)[:, 0]
    return x


def attend_everything(x, _):
    """Attention that ignores where documents begin."""
    return torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        (lambda x, _: x, "2 layers made 0 attention calls"),
        (lambda x, distca: attend_twice(attend_twice(x, distca), distca), "2 layers made 4 attention calls"),
        (lambda x, distca: attend_everything(attend_twice(x, distca), distca), "mixes documents"),
        (lambda x, distca: attend_twice(x, distca).roll(1, 0), "mixes documents"),
        (lambda x, distca: attend_twice(torch.zeros_like(x), distca), "does not read them"),
    ],
    ids=["never calls us", "calls too often", "ignores boundaries", "shifts rows", "is blind"],
)
def test_models_that_would_be_silently_wrong_fail_the_probe(mix, sentence):
    with pytest.raises(Unsupported, match=sentence):
        probe(PackedCausalLM(Fake(mix), 64), "reference")


def test_the_fake_model_itself_passes_the_probe():
    model = Fake(attend_twice)
    assert len(probe(PackedCausalLM(model, 64), "reference")) == 2
    assert model.config._attn_implementation == NAME


def attend_loudly(x, distca):
    """A tenth more of everything that is attended."""
    return x + 1.1 * (attend_twice(x, distca) - x)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Fake(attend_twice, stock=attend_loudly), "the hidden states of a document differ from the stock model's"),
        (Fake(attend_twice, head=lambda x: 30 * torch.tanh(x / 30)), "the logits of a document differ"),
        (Fake(lambda x, distca: attend_twice(x, distca) * torch.inf), "hold NaN or infinity"),
    ],
    ids=["attention", "head", "not finite"],
)
def test_models_whose_own_attention_or_head_is_another_fail_the_probe(model, sentence):
    with pytest.raises(Unsupported, match=sentence):
        probe(PackedCausalLM(model, 64))
    assert model.config._attn_implementation == NAME and model.training


# ---- the loss ----


def loss_and_gradients(chunk, labels, loss=None, **changes):
    """Through real attention: two documents, one trainer, two servers."""
    torch.manual_seed(0)
    model = make_model(dtype=torch.float64, chunk=chunk, **changes)
    pool = make_pool(1, 2, False)
    exchanges, _ = make_exchanges(1, pool)
    inputs = PlanInputs(np.array(PROBE_LENGTHS), (MaskRule(), MaskRule(6)), 1, pool, 0, 16)
    (site,) = attention_of_ranks(exchanges, inputs)
    rows = len(labels)
    ids, positions = torch.arange(rows) * 5 % 96, torch.cat([torch.arange(n) for n in PROBE_LENGTHS])
    total = (loss or PackedCausalLM.forward)(model, ids, positions, labels, site)
    total.backward()
    return total.detach(), [p.grad for p in model.parameters()]


def whole_loss(model, ids, positions, labels, distca):
    """All logits at once, by Transformers' own head."""
    logits = model.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, distca=distca).logits[0]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def some_labels():
    labels = torch.arange(sum(PROBE_LENGTHS)) * 3 % 96
    labels[[PROBE_LENGTHS[0] - 1, -1]] = -100
    return labels


@pytest.mark.parametrize(
    "changes", [dict(), dict(family="gemma2", final_logit_softcapping=2.0)], ids=["llama", "gemma2"]
)
@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_the_chunked_loss_is_the_whole_loss(chunk, changes):
    loss, gradients = loss_and_gradients(chunk, some_labels(), **changes)
    whole, whole_gradients = loss_and_gradients(chunk, some_labels(), whole_loss, **changes)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for a, b in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # norms compute in fp32


def test_no_target_at_all_is_a_loss_of_nothing():
    """A rank's rows may all be last tokens of their documents; a mean would be 0 / 0."""
    loss, gradients = loss_and_gradients(7, torch.full((sum(PROBE_LENGTHS),), -100))
    assert loss == 0 and all(g is not None and (g == 0).all() for g in gradients)


def test_a_bf16_model_sums_its_loss_in_fp32():
    model = make_model(dtype=torch.bfloat16)
    positions = torch.cat([torch.arange(n) for n in PROBE_LENGTHS])
    assert model(torch.arange(23), positions, some_labels(), ProbeAttention("reference")).dtype == torch.float32


# ---- the engine ----


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_engine_keeps_rotary_frequencies_in_fp32(tmp_path, zero_stage):
    """DeepSpeed casts a bf16 model's buffers too; positions in the hundreds would then coincide."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_buffers_in_engine, args=(theirs, tmp_path / "store", zero_stage), daemon=True)
    process.start()
    try:
        assert ours.poll(90), "no answer"
        found, wanted = ours.recv()
    finally:
        process.kill()
        process.join()
    assert found == wanted and all(dtype == "torch.float32" for dtype, _ in found.values())


def _buffers_in_engine(pipe, store, zero_stage):
    import os

    import torch.distributed as dist

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    from distca.config import validate_settings
    from distca.parallel.engine import Engine

    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    sections = dict(train=dict(tokens_per_step=64, steps=1, precision="bf16"), parallel=dict(zero_stage=zero_stage))
    settings = validate_settings(
        dict(model=dict(config=dict(model_type="llama")), data=dict(sources=[dict(path="none")]), **sections)
    )
    module = make_model(dtype=torch.bfloat16)
    tell = lambda m: {n: (str(b.dtype), b.tolist()) for n, b in m.named_buffers()}  # noqa: E731
    wanted = tell(module)
    engine = Engine(module, settings, torch.device("cpu"), 1)
    pipe.send((tell(engine.deepspeed.module), wanted))
