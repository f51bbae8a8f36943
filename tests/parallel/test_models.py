"""Whatever a configuration or a weights folder has wrong is a sentence before a run starts; what passes is exact."""

import json
import logging
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from distca.config import ModelSettings
from distca.errors import SettingsError, Unsupported
from distca.kernels.attention import attend, attend_backward
from distca.masks import MaskRule
from distca.parallel import attach, models
from distca.parallel.attach import PROBE_LENGTHS, PackedCausalLM, packed, probe
from distca.parallel.models import (
    FAMILIES,
    build_model,
    check_model,
    layers_of,
    position_warning,
    read_config,
    reason,
    without_advice,
)
from distca.parallel.precision import Fp64Throughout

TINY = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    pad_token_id=0,
)
WINDOWED = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
GEMMA = dict(query_pre_attn_scalar=9, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **WINDOWED)
OWN = {
    "llama": {},
    "mistral": dict(sliding_window=5),
    "qwen2": dict(use_sliding_window=True, **WINDOWED),
    "qwen3": dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "gemma2": GEMMA,
    "gemma3_text": dict(query_pre_attn_scalar=9, **WINDOWED),
    "phi3": dict(sliding_window=7, eos_token_id=3),
    "olmo2": dict(eos_token_id=3),
}


def config_of(family, **changes):
    values = {"model_type": family, **TINY, **OWN[family], **changes}
    return {key: value for key, value in values.items() if value is not ...}


def check(config=None, path=None, revision=None, dtype=torch.float32):
    given = dict(config=config) if path is None else dict(path=str(path), revision=revision)
    return check_model(ModelSettings(**given), "reference", dtype, "cpu")


def refused(config=None, path=None) -> str:
    with pytest.raises(SettingsError) as error:
        check(config, path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_as_written_and_as_saved(family, tmp_path):
    config = check(config_of(family))
    with without_advice():
        build_model(config, None, None, torch.float32, seed=0).save_pretrained(tmp_path)
    assert layers_of(check(path=tmp_path)) == layers_of(config)


# ---- keys ----

MISSPELLED = {
    "rope": (dict(rope_parameters=dict(rope_typ="linear", factor=4.0)), "'rope_typ'; did you mean 'rope_type'?"),
    "rope, old name": (dict(rope_scaling=dict(typ="linear", factor=4.0)), "rope_scaling: no such key 'typ'"),
    "size": (dict(hiden_size=32), "'hiden_size'; did you mean 'hidden_size'?"),
    "several": (dict(hiden_size=32, vocabsize=9), "'vocabsize'; did you mean 'vocab_size'?"),
    "theta": (dict(rope_tetha=5e5), "'rope_tetha'; did you mean 'rope_theta'?"),
    "another family's": (dict(sliding_window=4), "no such key 'sliding_window'"),
    "another family's cap": (dict(final_logit_softcapping=4.0), "no such key 'final_logit_softcapping'"),
    "generation": (dict(temperature=0.7), "no such key 'temperature'"),
}


@pytest.mark.parametrize("case", MISSPELLED)
def test_keys_that_a_class_does_not_know_are_refused_with_the_nearest(case):
    changes, sentence = MISSPELLED[case]
    text = refused(config_of("llama", **changes))
    assert text.startswith("model.config: ") and sentence in text
    assert all(key in text for key in changes if not key.startswith("rope_p") and key != "rope_scaling")


def write_folder(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "key", ["rope_scalin", "rope_parameter", "sliding_windows", "num_key_value_head", "rope_tetha"]
)
def test_a_near_miss_in_a_folder_is_refused(tmp_path, key):
    path = write_folder(tmp_path, **config_of("mistral"), **{key: 4})
    with pytest.raises(SettingsError, match=f"no such key '{key}'; did you mean '"):
        read_config(path, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(layer_types=["sliding_attention", "full_attention"]), "layer_types"),
        (dict(hidden_act=["silu"]), "hidden_act = ['silu'] is no activation"),
        (dict(hidden_act={}), "hidden_act = {} is no activation"),
    ],
)
def test_values_that_no_class_foresees_are_refused_in_a_folder_too(tmp_path, changes, sentence):
    with pytest.raises(SettingsError) as caught:
        read_config(write_folder(tmp_path, **config_of("llama", **changes)), None)
    assert sentence in str(caught.value)


def test_other_unknown_keys_of_a_folder_are_one_warning(tmp_path, caplog):
    path = write_folder(tmp_path, **config_of("llama"), lm_head_multiplier=3, frobnicate=True, auto_map={"x": "y"})
    with caplog.at_level(logging.WARNING):
        read_config(path, None)
    (record,) = caplog.records
    assert "lm_head_multiplier, frobnicate" in record.getMessage() and "auto_map" not in record.getMessage()


PUBLISHED = {  # the configurations that people download, shortened to what is particular
    "Llama 2": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], _name_or_path="meta-llama/Llama-2-7b-hf",
        bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
        intermediate_size=11008, max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False,
        torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True, vocab_size=32000,
    ),
    "Llama 3.1": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009], hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.42.3",
        use_cache=True, vocab_size=128256,
    ),
    "Mistral 7B": dict(
        model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
        hidden_size=4096, initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0.dev0",
        use_cache=True, vocab_size=32000, head_dim=None, attention_dropout=0.0,
    ),
    "Qwen 2.5": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, hidden_act="silu", hidden_size=3584, initializer_range=0.02, intermediate_size=18944,
        max_position_embeddings=32768, max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.43.1", use_cache=True,
        use_mrope=False, use_sliding_window=False, vocab_size=152064,
        rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn", finetuned=True),
    ),
    "Qwen 3": dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=12288, max_position_embeddings=40960, max_window_layers=36,
        num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
        use_sliding_window=False, vocab_size=151936,
    ),
    "Gemma 2": dict(
        model_type="gemma2", architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid", eos_token_id=1,
        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", hidden_size=2304, initializer_range=0.02, intermediate_size=9216,
        max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
        pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
        sliding_window_size=4096, torch_dtype="float32", transformers_version="4.42.4", use_cache=True,
        vocab_size=256000,
    ),
    "Gemma 3 1B": dict(
        model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        attn_logit_softcapping=None, bos_token_id=2, cache_implementation="hybrid", eos_token_id=[1, 106],
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        initializer_range=0.02, intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4,
        num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, torch_dtype="bfloat16", use_cache=True, vocab_size=262144,
    ),
    "Phi 3 mini 4k": dict(
        model_type="phi3", architectures=["Phi3ForCausalLM"], _name_or_path="Phi-3-mini-4k-instruct",
        attention_bias=False, attention_dropout=0.0, bos_token_id=1, embd_pdrop=0.0, eos_token_id=32000,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, hidden_act="silu", hidden_size=3072,
        initializer_range=0.02, intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, original_max_position_embeddings=4096, pad_token_id=32000,
        resid_pdrop=0.0, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
        tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=32064,
    ),
    "Phi 4 mini": dict(
        model_type="phi3", architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=199999, embd_pdrop=0.0, eos_token_id=199999, full_attn_mod=1, hidden_act="silu", hidden_size=3072,
        initializer_range=0.02, intermediate_size=8192, interpolate_factor=1, lm_head_bias=False,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=24, num_hidden_layers=32,
        num_key_value_heads=8, original_max_position_embeddings=4096, pad_token_id=199999, partial_rotary_factor=0.75,
        resid_pdrop=0.0, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
        torch_dtype="bfloat16", use_cache=True, vocab_size=200064,
    ),
    "OLMo 2": dict(
        model_type="olmo2", architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        eos_token_id=100257, hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        pad_token_id=100277, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False,
        torch_dtype="float32", transformers_version="4.47.0.dev0", use_cache=True, vocab_size=100352,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_pass_and_say_nothing_that_nobody_can_act_on(tmp_path, caplog, name):
    with caplog.at_level(logging.WARNING):
        config = read_config(write_folder(tmp_path, **PUBLISHED[name]), None)
    unread = {"Phi 4 mini": ["full_attn_mod, interpolate_factor"], "Gemma 2": ["sliding_window_size"]}.get(name, [])
    assert [record.getMessage().rpartition("does not read: ")[2] for record in caplog.records] == unread
    assert len(layers_of(config)) == PUBLISHED[name]["num_hidden_layers"]


def test_a_cap_in_a_folder_whose_model_has_none_is_refused(tmp_path):
    path = write_folder(tmp_path, **config_of("llama"), final_logit_softcapping=3.0)
    with pytest.raises(SettingsError, match="no such key 'final_logit_softcapping'"):
        read_config(path, None)


# ---- values ----

YARN = dict(rope_type="yarn", factor=4.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
VALUES = {
    "window of nothing": ("mistral", dict(sliding_window=0), "sliding_window = 0 lets no row see a key"),
    "negative window": ("phi3", dict(sliding_window=-1), "sliding_window = -1 lets no row see a key"),
    "true window": ("mistral", dict(sliding_window=True), "sliding_window = True: want int or null"),
    "window in words": ("mistral", dict(sliding_window="4096"), "sliding_window = '4096': want int or null"),
    "half a window": ("gemma2", dict(sliding_window=2.5), "sliding_window = 2.5: want int or null"),
    "window of some layers": ("qwen3", dict(sliding_window=0), "sliding_window = 0 lets no row"),
    "kind without window": ("gemma2", dict(sliding_window=None), "layer_types has sliding_attention: give sliding"),
    "kind without switch": ("qwen2", dict(use_sliding_window=False), "and use_sliding_window: true"),
    "no layer kinds": ("gemma2", dict(layer_types=[]), "must be equal to the number of `layer_types` (0)"),
    "too many layer kinds": ("qwen2", dict(layer_types=["full_attention"] * 3), "number of `layer_types` (3)"),
    "unknown layer kind": ("gemma2", dict(layer_types=["full_attention", "slide"]), "no kind of layer 'slide'; known"),
    "chunks": ("gemma3_text", dict(layer_types=["chunked_attention"] * 2), "no kind of layer 'chunked_attention'"),
    "cap of nothing": ("gemma2", dict(attn_logit_softcapping=0.0), "want a positive number, or null"),
    "final cap of nothing": ("gemma2", dict(final_logit_softcapping=0.0), "want a positive number, or null"),
    "negative cap": ("gemma3_text", dict(attn_logit_softcapping=-2.0), "want a positive number, or null"),
    "head size 0": ("qwen2", dict(head_dim=0), "head_dim = 0: want a whole number of at least 1"),
    "odd heads": ("llama", dict(head_dim=7), "RoPE requires an even rotary dimension"),
    "no key heads": ("llama", dict(num_key_value_heads=0), "num_key_value_heads = 0: want a whole number"),
    "uneven key heads": ("mistral", dict(num_key_value_heads=3), "cannot share 3 key/value heads evenly"),
    "more key heads": ("llama", dict(num_key_value_heads=8), "cannot share 8 key/value heads evenly"),
    "no layers": ("llama", dict(num_hidden_layers=0), "num_hidden_layers = 0: want a whole number"),
    "no scale": ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar = 0: want a whole number"),
    "negative scale": ("gemma3_text", dict(query_pre_attn_scalar=-4), "query_pre_attn_scalar = -4"),
    "no pattern": ("gemma3_text", dict(sliding_window_pattern=0, layer_types=None), "sliding_window_pattern = 0"),
    "true size": ("llama", dict(vocab_size=True), "vocab_size = True: want a whole number"),
    "size in words": ("llama", dict(num_attention_heads="many"), "num_attention_heads = 'many'"),
    "switch in words": ("llama", dict(tie_word_embeddings="false"), "tie_word_embeddings = 'false': want bool"),
    "switch as number": ("qwen2", dict(use_sliding_window=0), "use_sliding_window = 0: want bool"),
    "nan": ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan is not a finite number"),
    "negative spread": ("mistral", dict(initializer_range=-0.02), "initializer_range = -0.02"),
    "activation": ("llama", dict(hidden_act="sillu"), "'sillu' is no activation; did you mean 'silu'?"),
    "heads and size": ("llama", dict(hidden_size=18), "not a multiple of the number of attention heads (4)"),
    "dtype": ("llama", dict(dtype="float99"), "float99"),
    "no dropout given": ("llama", dict(attention_dropout=None), "set it to 0.0"),
    "tuples": ("llama", dict(return_dict=False), "does not make a model that runs"),
    "not causal": ("llama", dict(is_causal=0), "only causal"),
    "per layer": ("llama", dict(per_layer_config={0: dict(num_attention_heads=2)}), "per_layer_config"),
    "pad": ("llama", dict(pad_token_id=-1), "pad_token_id = -1 is no token of a vocabulary of 64"),
    "end": ("llama", dict(eos_token_id=[1, 64]), "eos_token_id = 64 is no token"),
    "begin": ("qwen2", dict(bos_token_id=151643), "bos_token_id = 151643 is no token"),
    "rope list": ("llama", dict(rope_parameters=[]), "rope_parameters = []: want a mapping"),
    "rope nothing": ("llama", dict(rope_scaling=0), "rope_scaling = 0: want a mapping"),
    "rope kind": ("llama", dict(rope_parameters=dict(rope_type="liner", factor=2.0)), "did you mean 'linear'?"),
    "rope no kind": ("llama", dict(rope_parameters=dict(factor=2.0)), "rope_type 'default' does not use 'factor'"),
    "rope null kind": ("llama", dict(rope_parameters=dict(rope_type=None)), "null is no type"),
    "rope no factor": ("llama", dict(rope_parameters=dict(rope_type="linear")), "needs 'factor'"),
    "rope null factor": ("llama", dict(rope_parameters=YARN | dict(factor=None)), "needs 'factor'"),
    "rope text": ("llama", dict(rope_parameters=YARN | dict(factor="4")), "factor = '4': want a number of at least 1"),
    "rope 0": ("llama", dict(rope_parameters=YARN | dict(beta_fast=0)), "beta_fast = 0: want a positive number"),
    "rope true": ("llama", dict(rope_parameters=YARN | dict(factor=True)), "factor = True"),
    "rope betas": ("llama", dict(rope_parameters=YARN | dict(beta_slow=40)), "must not be less than beta_slow"),
    "rope one scale": ("llama", dict(rope_parameters=YARN | dict(mscale=1.0)), "mscale has no effect alone"),
    "rope others' key": ("llama", dict(rope_parameters=YARN | dict(low_freq_factor=1.0)), "llama3 does"),
    "rope freq": ("llama", dict(rope_parameters=LLAMA3 | dict(high_freq_factor=1.0)), "greater than low_freq_factor"),
    "rope kinds": ("llama", dict(rope_parameters=YARN | dict(type="linear")), "'yarn' and type 'linear' differ"),
    "eps": ("llama", dict(rms_norm_eps=0.0), "rms_norm_eps = 0.0: want a positive number"),
    "range": ("llama", dict(initializer_range=2.0), "initializer_range: Value must be greater"),
    "rope old kind": ("gemma3_text", dict(rope_scaling=dict(type="linear", factor=4.0)), "write rope_type: linear"),
    "rope twice": ("llama", dict(rope_parameters=YARN, rope_scaling=LLAMA3), "both given and differ"),
    "theta": ("llama", dict(rope_theta=0), "rope_theta = 0: want a positive number"),
    "theta twice": ("llama", dict(rope_theta=5e5, rope_parameters=dict(rope_theta=1e4)), "differ: give one"),
    "rope flat": ("gemma3_text", dict(rope_parameters=YARN), "one mapping for each of full_attention, sliding"),
    "rope nested": ("qwen2", dict(rope_parameters=dict(full_attention=YARN)), "no such key 'full_attention'"),
    "rope part": ("llama", dict(partial_rotary_factor=0.5), "always rotates whole heads"),
    "rope part 0": ("phi3", dict(partial_rotary_factor=0), "want a number above 0, at most 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_meant_are_refused(case):
    family, changes, sentence = VALUES[case]
    assert sentence in refused(config_of(family, **changes))


FINE = {
    "an unused window": ("qwen2", dict(use_sliding_window=False, sliding_window=0, layer_types=None)),
    "no window": ("mistral", dict(sliding_window=None)),
    "no key heads given": ("llama", dict(num_key_value_heads=None)),
    "empty rope": ("llama", dict(rope_parameters={})),
    "rope of one kind of layer": ("gemma3_text", dict(rope_parameters=dict(full_attention=dict(rope_type="default")))),
    "one theta twice": ("llama", dict(rope_theta=1e4, rope_parameters=dict(rope_theta=1e4))),
    "yarn": ("llama", dict(rope_parameters=YARN | dict(original_max_position_embeddings=16, truncate=False))),
}


@pytest.mark.parametrize("case", FINE)
def test_values_that_mean_what_the_model_does_pass(case):
    family, changes = FINE[case]
    check(config_of(family, **changes))


@pytest.mark.parametrize("family", ["phi3", "olmo2"])
def test_end_ids_of_a_class_that_a_small_vocabulary_lacks_are_none(family):
    assert check(config_of(family, eos_token_id=...)).eos_token_id is None


def test_loading_and_saving_draw_no_bars(tmp_path, capfd):
    config = check(config_of("llama"))
    with without_advice():
        build_model(config, None, None, torch.float32, seed=0).save_pretrained(tmp_path)
    build_model(check(path=tmp_path), str(tmp_path), None, torch.float32, seed=0)
    assert capfd.readouterr() == ("", "")


def test_reading_a_mapping_leaves_it_as_it_was():
    config = config_of("llama", rope_parameters=dict(rope_type="linear", factor=2.0))
    before = json.dumps(config)
    read_config(None, config)
    assert json.dumps(config) == before


def test_a_reason_keeps_all_its_lines_within_bounds():
    assert reason(ValueError("first\n\n   second")) == "first second"
    assert reason(KeyError("a\nb")) == "a b" and reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 1000))) == 400


# ---- masks ----


def test_a_mask_that_is_not_the_rule_is_refused_also_far_out():
    window = lambda w: lambda _b, _h, q, k: (k <= q) & (k > q - w)  # noqa: E731
    attach.refuse_other_mask("Layer", MaskRule(5000), window(5000), 64)
    attach.refuse_other_mask("Layer", MaskRule(), window(1 << 30), 8192)
    for rule, other in (MaskRule(5000), 4999), (MaskRule(5000), 5001), (MaskRule(), 8000), (MaskRule(4), 1 << 30):
        with pytest.raises(Unsupported, match="its own mask is another"):
            attach.refuse_other_mask("Layer", rule, window(other), 8192)


def test_a_layer_whose_mask_is_another_than_it_tells_us_is_refused(monkeypatch):
    """As if the model's code had changed: Transformers masks by a window of which the layers say nothing."""
    hidden = partial(modeling_llama.create_causal_mask, and_mask_function=lambda _b, _h, q, k: k > q - 40)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", hidden)
    assert "LlamaAttention asks for a causal mask, but its own mask is another" in refused(config_of("llama"))


# ---- weights ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = read_config(None, config_of("llama", num_hidden_layers=3))
    build_model(config, None, None, torch.bfloat16, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))


def reconfigure(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder):
    """The same weights in two files, the second of which the index names and the folder lacks."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata=dict(format="pt"))
    index = dict(metadata={}, weight_map={name: file for file, part in parts.items() for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "missing": (lambda f: rewrite(f, lambda w: w.pop(UP)), f"missing: {UP}"),
    "another shape": (lambda f: rewrite(f, lambda w: w.update({Q: w[Q][:8]})), f"{Q} is (8, 16), the configuration"),
    "another width": (lambda f: reconfigure(f, intermediate_size=32), "is (24, 16), the configuration wants (32, 16)"),
    "another vocabulary": (lambda f: reconfigure(f, vocab_size=70), "is (64, 16), the configuration wants (70, 16)"),
    "fewer layers": (lambda f: reconfigure(f, num_hidden_layers=2), "no place in the model for: model.layers.2."),
    "more layers": (lambda f: reconfigure(f, num_hidden_layers=4), "missing: model.layers.3."),
    "too many": (lambda f: rewrite(f, lambda w: w.update(extra=torch.ones(3))), "no place in the model for: extra"),
    "no head": (lambda f: rewrite(f, lambda w: w.pop("lm_head.weight")), "missing: lm_head.weight"),
    "another model": (
        lambda f: rewrite(f, lambda w: [w.update({f"h.{n}": w.pop(n)}) for n in list(w)]), "are of another model"
    ),
    "integers": (lambda f: rewrite(f, lambda w: w.update({Q: w[Q].to(torch.int8)})), "are int8, which cannot be"),
    "cut off": (cut, "model.safetensors is damaged or no weights"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or no weights"),
    "text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "is damaged or no weights"),
    "missing shard": (lambda f: (shard(f), (f / "model-2-of-2.safetensors").unlink()), "lacks model-2-of-2.safetens"),
    "no index": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{")), "is no index of weights"
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights from"),
    "other files": (
        lambda f: (f / "model.safetensors").rename(f / "llama.gguf"), "not there (only llama.gguf)"
    ),
    "pickle of nothing": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"junk")), "damaged or no"
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no config.json is in that folder"),
    "broken configuration": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "no configuration from"),
    "adapter": (adapter, "an adapter, not a model"),
    "generation ids": (
        lambda f: reconfigure(f, "generation_config.json", eos_token_id=[2, 900]), "eos_token_id = 900 is no token"
    ),
    "generation text": (lambda f: (f / "generation_config.json").write_text("{,"), "cannot be read"),
    "quantized": (
        lambda f: reconfigure(f, quantization_config=dict(quant_method="fp8")), "quantized weights cannot be trained"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_weights_that_are_not_the_models_are_refused(folder, case):
    damage, sentence = DAMAGE[case]
    damage(folder)
    assert sentence in refused(path=folder)


@pytest.mark.parametrize("case", ["missing", "another shape", "fewer layers", "no head", "cut off", "missing shard"])
def test_trainers_refuse_them_too(folder, case):
    DAMAGE[case][0](folder)
    config = read_config(str(folder), None)
    with pytest.raises(SettingsError, match="^model.path: "):
        build_model(config, str(folder), None, torch.float32, seed=0)


def without_prefix(folder):
    """A checkpoint of the model without its head, as `LlamaModel.save_pretrained` writes it; the head is tied."""
    reconfigure(folder, tie_word_embeddings=True)
    strip = lambda w: [w.pop("lm_head.weight")] + [w.update({n[6:]: w.pop(n)}) for n in list(w) if n[:6] == "model."]  # noqa: E731
    rewrite(folder, strip)


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def old_buffers(folder):
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))


def tied(folder):
    reconfigure(folder, tie_word_embeddings=True)
    rewrite(folder, lambda w: w.pop("lm_head.weight"))


@pytest.mark.parametrize("change", [shard, without_prefix, as_pickle, old_buffers, tied])
def test_weights_that_transformers_takes_whole_pass_and_load(folder, change):
    change(folder)
    config = check(path=folder)
    model = build_model(config, str(folder), None, torch.float32, seed=0)
    assert len(probe(PackedCausalLM(model, 64))) == 3


def test_checking_weights_takes_no_memory_for_them(tmp_path, monkeypatch):
    """A model of 8 B parameters, of which only the header of its file is here."""
    config = PUBLISHED["Llama 3.1"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(None, config), dtype=torch.bfloat16)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    write_folder(tmp_path, **config)
    offset, header = 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)  # a hole
    check(path=tmp_path, dtype=torch.bfloat16)


# ---- where models come from ----


@pytest.mark.parametrize("path", ["./none", "/none/here", "a/b/c", "~/no-such-model", "here/none", "..", "file"])
def test_what_looks_local_is_never_asked_for_on_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(models.PretrainedConfig, "get_config_dict", lambda *_, **__: pytest.fail("asked the hub"))
    text = refused(path=path)
    assert text.startswith(f"model: no configuration from {path}: ") and ("no " in text or "it is a file" in text)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(config=dict(model_type="llama"), revision="main"), "leave it out"),
        (dict(path="./model", revision="main"), "leave it out"),
        (dict(path=""), "at least 1 character"),
        (dict(path="owner/model", revision=" "), "is empty"),
        (dict(path="owner/model", config=dict(model_type="llama")), "not both"),
        (dict(config={}), "needs `model_type`"),
    ],
)
def test_settings_that_would_mean_nothing_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelSettings(**given)


# ---- positions ----


def test_positions_beyond_the_models_are_said_with_both_numbers():
    plain = read_config(None, config_of("llama"))
    assert position_warning(plain, 64) is None
    assert "65 tokens go beyond position 64," in position_warning(plain, 65)
    scaled = read_config(None, config_of("llama", rope_scaling=dict(YARN, original_max_position_embeddings=64)))
    assert position_warning(scaled, 256) is None and "position 256," in position_warning(scaled, 257)


# ---- refused, or exact ----

WRONG = st.sampled_from([0, 1, -1, 2, 3, 2.5, 0.0, 0.5, 3.0, True, False, None, "", "4", "full", [], {}, [1]])
ROPES = st.one_of(
    WRONG,
    st.fixed_dictionaries(
        {},
        optional=dict(
            rope_type=st.sampled_from(["default", "linear", "yarn", "llama3", "dynamic", "liner", None]),
            rope_typ=st.just("linear"),
            type=st.sampled_from(["default", "linear", "yarn"]),
            factor=st.sampled_from([4.0, 2, 0.5, "4", None]),
            rope_theta=st.sampled_from([1e4, 50, 0, None]),
            original_max_position_embeddings=st.sampled_from([16, 0, 8.5]),
            low_freq_factor=st.sampled_from([1.0, 0]),
            high_freq_factor=st.sampled_from([4.0, 1.0]),
            beta_fast=st.sampled_from([32, 0, 0.5]),
            mscale=st.sampled_from([1.0, 0.0]),
            mscale_all_dim=st.just(0.7),
            attention_factor=st.sampled_from([1.2, 0.0]),
            truncate=st.sampled_from([True, False, 0]),
            partial_rotary_factor=st.sampled_from([1.0, 0.5, 0]),
            full_attention=st.sampled_from([None, {}, dict(rope_type="linear", factor=2.0), dict(rope_typ="linear")]),
            sliding_attention=st.sampled_from([None, {}, dict(rope_type="default")]),
        ),
    ),
)
LAYER_TYPES = st.lists(st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]), max_size=3)
MORE = (
    *("max_window_layers", "attention_bias", "rms_norm_eps", "rope_theta", "partial_rotary_factor", "is_causal"),
    *("tie_word_embeddings", "sliding_window_pattern", "use_bidirectional_attention"),
)
INTERESTING = dict.fromkeys((*TINY, *(key for own in OWN.values() for key in own), *MORE), WRONG)
INTERESTING |= dict(rope_parameters=ROPES, rope_scaling=ROPES, layer_types=st.one_of(LAYER_TYPES, WRONG))
MUTATIONS = st.lists(
    st.sampled_from(sorted(INTERESTING)).flatmap(
        lambda key: st.tuples(
            st.sampled_from(["set", "set", "set", "drop", "misspell"]), st.just(key), INTERESTING[key]
        )
    ),
    min_size=1,
    max_size=3,
)


def mutated(family, mutations):
    config = config_of(family)
    for what, key, value in mutations:
        if what == "set":
            config[key] = value
        elif what == "drop":
            config.pop(key, None)
        elif key in config:
            config[key[:2] + key[3:]] = config.pop(key)
    # what a class would choose for a size left out is too large for a test
    return {key: TINY[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | config


class Attend(torch.autograd.Function):
    """Attention of two documents in one pack, by the reference."""

    @staticmethod
    def forward(ctx, q, k, v, rule, scale, softcap):
        ctx.told = dict(tasks=packed(rule, PROBE_LENGTHS), scale=scale, softcap=softcap, backend="reference")
        out, lse = attend(q, k, v, **ctx.told)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        delta, d_out = (out * d_out).sum(-1), d_out.contiguous()
        return *attend_backward(q, k, v, lse, delta, d_out, **ctx.told), None, None, None


def assert_same(ours, theirs, what, whole=1e-30):
    error = float((ours - theirs).detach().norm() / theirs.detach().norm().clamp_min(max(whole, 1e-30)))
    assert error <= 1e-10, f"{what} differ by {error:.1e}"


def assert_exact(raw):
    """Hidden states and all gradients of two packed documents are those of the stock model on each alone."""
    ours = PackedCausalLM(build_model(read_config(None, raw), None, None, torch.float64, seed=1), 64)
    capped = raw.get("attn_logit_softcapping") is not None or raw["model_type"] == "gemma2"
    stock = build_model(
        read_config(None, raw), None, None, torch.float64, seed=1, attention="eager" if capped else "sdpa"
    )
    for model in (ours, stock):
        model.eval()
    ids = torch.arange(sum(PROBE_LENGTHS)) * 7 % ours.model.config.vocab_size
    positions = torch.cat([torch.arange(n) for n in PROBE_LENGTHS])
    with Fp64Throughout():
        hidden = ours.hidden(
            ids, positions, lambda q, k, v, rule, scale, cap=0.0: Attend.apply(q, k, v, rule, scale, cap)
        )
        theirs = torch.cat(
            [
                stock.base_model(input_ids=d[None], use_cache=False).last_hidden_state[0]
                for d in ids.split(PROBE_LENGTHS)
            ]
        )
        logits = torch.cat([stock(input_ids=d[None], use_cache=False).logits[0] for d in ids.split(PROBE_LENGTHS)])
        assert_same(hidden, theirs, "hidden states")
        assert_same(ours.logits(hidden), logits, "logits")
        direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        ((hidden * direction).sum() + ours.logits(hidden).square().sum()).backward()
        ((theirs * direction).sum() + logits.square().sum()).backward()
    gradients = dict(stock.named_parameters())
    whole = float(torch.stack([p.grad.norm() for p in gradients.values() if p.grad is not None]).norm())
    for name, parameter in ours.model.named_parameters():
        if gradients[name].grad is not None:
            assert_same(parameter.grad, gradients[name].grad, name, 1e-7 * whole)


def refused_or_exact(family, mutations):
    raw = mutated(family, mutations)
    try:
        check(raw)
    except SettingsError as error:
        assert "\n" not in str(error)
    else:
        assert_exact(raw)


quick = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@quick
@given(st.sampled_from(FAMILIES), MUTATIONS)
def test_a_changed_configuration_is_refused_or_exact(family, mutations):
    refused_or_exact(family, mutations)


@pytest.mark.slow
@settings(quick, max_examples=300)
@given(st.sampled_from(FAMILIES), MUTATIONS)
def test_many_changed_configurations_are_refused_or_exact(family, mutations):
    refused_or_exact(family, mutations)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact(family):
    assert_exact(config_of(family))
