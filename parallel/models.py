"""May this model be trained exactly, and are its weights those it needs? What is wrong is said before a run starts.

`check_model` is what the driver asks: the configuration's keys and values are judged as written, the model is built
without memory (on PyTorch's meta device) and run once, so that what its layers ask for, the masks that Transformers
itself would give them, and a folder's weights are all seen before data and workers. `build_model` is what trainers ask.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from distca.config import ModelSettings
from distca.errors import SettingsError, Unsupported
from distca.kernels.capability import refusal
from distca.parallel.attach import CHECKED, NAME, AttentionCall, dry_run, saved_bytes
from distca.parallel.model_keys import SOFTCAPS, key_problems, near_misses, rope_problems, value_problems
from distca.paths import expanded, looks_local

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")
"""Model types held to the dense reference by the tests. A new one is a word here and a row in their table."""

LONGEST_REASON = 400
CONFIG_FILE, GENERATION_FILE, ADAPTER_FILE = "config.json", "generation_config.json", "adapter_config.json"
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # as Transformers looks
WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Keys that are no fields of a class, but read by it, by the model or by the loader
READ_BY_ALL = {"model_type", "head_dim", "rope_scaling", "rope_theta", "torch_dtype"}
READ_BY = {
    "phi3": {"partial_rotary_factor"},
    "gemma3_text": {"sliding_window_pattern", "rope_local_base_freq"},
}
READ_BY_NO_CLASS = {"partial_rotary_factor", "use_bidirectional_attention", "is_causal", "per_layer_config"}  # refused
BOOKKEEPING = {  # of published folders; no model is another for them
    *("_name_or_path", "name_or_path", "_commit_hash", "auto_map", "transformers_version", "pretraining_tp"),
    *("_attn_implementation", "attn_implementation", "cache_implementation", "_sliding_window_pattern"),
    *("num_labels", "hidden_act", "use_cache", "use_mrope", "unsloth_fixed", "unsloth_version"),
}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


# ---- configurations ----


def read_config(path: str | None, config: dict | None, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration, from a folder (config.json is enough), the hub or a mapping; refused if it does not
    mean what it says, or if we could not train it exactly."""
    where = "model.config" if path is None else f"model.path {path}"
    raw = copy.deepcopy(config) if config is not None else _read_folder(path, revision)
    if not isinstance(raw, dict):
        raise SettingsError(f"model: no configuration from {path}: {CONFIG_FILE} holds no mapping")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise SettingsError(
            f"model: no configuration from {path or 'model.config'}: there is no model type {family!r}; these can be "
            f"trained: {', '.join(FAMILIES)}"
        )
    if family not in FAMILIES:
        raise Unsupported(f"model type {family!r} has not been proved exact; these have: {', '.join(FAMILIES)}")
    problems = _unknown_keys(raw, family, written_here=config is not None, where=where)
    problems += value_problems(raw) + rope_problems(family, raw)
    for key in ("hidden_act", "hidden_activation"):
        if raw.get(key) is not None and key in _fields_of(family) and not _is_activation(raw[key]):
            near = difflib.get_close_matches(str(raw[key]), ACT2FN, 1)
            problems.append(f"{key} = {raw[key]!r} is no activation" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise SettingsError(f"{where}: {_joined(problems)}")
    with without_advice():
        try:
            if config is not None:
                found = AutoConfig.for_model(**raw)
            else:
                found = AutoConfig.from_pretrained(str(expanded(path)), revision=revision, trust_remote_code=False)
        except Exception as error:  # whatever a class makes of values it did not expect
            raise SettingsError(f"{where}: {_field_words(error, raw) or reason(error)}") from None
    has_windows = "sliding_attention" in (getattr(found, "layer_types", None) or ())
    if has_windows and not hasattr(found, "sliding_window"):
        raise SettingsError(f"{where}: layer_types has sliding_attention, which a {family} model does not know")
    if has_windows and found.sliding_window is None:
        switch = " and use_sliding_window: true" if hasattr(found, "use_sliding_window") else ""
        raise SettingsError(f"{where}: layer_types has sliding_attention: give sliding_window{switch}")
    rope = getattr(found, "rope_parameters", None) or {}
    for one in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        if one.get("type") not in (None, one.get("rope_type")):  # the class has left it aside
            raise SettingsError(f"{where}: {family} reads no `type` of RoPE here: write rope_type: {one['type']}")
    _refuse_special_ids(found, raw, where)
    if config is None:
        _refuse_generation_ids(found, path)
    refuse_config(found)
    return found


def refuse_config(config: PretrainedConfig) -> None:
    """Raise Unsupported for a configuration that would train to something else than a single device does."""
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout != 0:
        raise Unsupported(f"attention_dropout = {dropout} is not supported: set it to 0.0 in the model's configuration")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is not True:
        raise Unsupported("bidirectional attention is not supported: only causal language models can be trained")
    if getattr(config, "is_heterogeneous", False):
        raise Unsupported("per_layer_config is not supported: all layers must have the same heads")
    if getattr(config, "quantization_config", None) is not None:
        raise Unsupported(
            "quantization_config is set: quantized weights cannot be trained; name a model with bf16 or fp32 weights"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {of.get("rope_type") for of in (rope, *rope.values()) if isinstance(of, dict)}  # of all layers, or of each
    for kind in kinds & {"dynamic", "longrope"}:
        raise Unsupported(
            f"rope_type {kind!r} changes with the longest position that a rank sees, so ranks would disagree: use "
            "'default', 'linear', 'yarn' or 'llama3'"
        )


def position_warning(config: PretrainedConfig, longest_piece: int) -> str | None:
    """A sentence where documents reach positions that the rotary embedding is not made for."""
    limit = config.max_position_embeddings
    rope = config.rope_parameters
    rope = rope.get("full_attention") or rope
    if (factor := rope.get("factor")) is not None:  # what scaling reaches, whether or not the limit has been raised too
        limit = max(limit, int(factor * (rope.get("original_max_position_embeddings") or limit)))
    if longest_piece <= limit:
        return None
    return (
        f"documents of up to {longest_piece:,} tokens go beyond position {limit:,}, the last that the model is made "
        "for (max_position_embeddings); positions past it are trained as they come. To stay within, set "
        "data.max_document_tokens; to reach further, scale RoPE (rope_parameters: rope_type yarn, llama3 or linear, "
        "and a factor)"
    )


def reason(error: BaseException) -> str:
    """All that an error says, in one line of bearable length."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r"^Class validation error for validator '\w+':\s*\w+: ", "", str(text))
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1].rstrip()}…"


def _read_folder(path: str, revision: str | None) -> Any:
    """config.json as it is written."""
    where = str(expanded(path))
    if looks_local(path):
        folder = Path(where)
        if not folder.exists():
            raise SettingsError(f"model: no configuration from {path}: there is no folder {folder.absolute()}")
        if not folder.is_dir():
            raise SettingsError(f"model: no configuration from {path}: it is a file; name the folder that holds it")
        if not (folder / CONFIG_FILE).is_file():
            adapter = "an adapter, not a model: merge it into its base model first"
            lacks = adapter if (folder / ADAPTER_FILE).exists() else f"no {CONFIG_FILE} is in that folder"
            raise SettingsError(f"model: no configuration from {path}: {lacks}")
    try:
        raw, _ = PretrainedConfig.get_config_dict(where, revision=revision)
    except Exception as error:
        raise SettingsError(f"model: no configuration from {path}: {reason(error)}") from None
    return raw


def _unknown_keys(raw: dict[str, Any], family: str, *, written_here: bool, where: str) -> list[str]:
    """Problems with keys that nothing reads: all of them in a mapping that somebody wrote for this run; in a published
    folder, which carries keys of other days, the misspelled ones, and a warning that names the rest."""
    own = READ_BY_ALL | READ_BY.get(family, set())
    known = _fields_of(family) | own
    refused_elsewhere = READ_BY_NO_CLASS | set(BOOKKEEPING if not written_here else ())
    judged = {key: value for key, value in raw.items() if key not in refused_elsewhere or key in known}
    if written_here:
        tolerated = {"_name_or_path", "name_or_path", "_commit_hash", "auto_map", "num_labels"}
        common = {
            field.name for field in fields(PretrainedConfig)
        } | tolerated  # to all models, so nobody's misspelling
        return key_problems({key: v for key, v in judged.items() if key not in common}, sorted(known - common))
    elsewhere = set().union(*(_fields_of(name) for name in FAMILIES))
    ours = [key for key in SOFTCAPS if raw.get(key) is not None and key not in known]  # our head reads it by name
    problems = near_misses(judged, sorted(known), elsewhere) + key_problems(dict.fromkeys(ours), sorted(known))
    off = (False, None)  # a feature of some other day that is switched off
    if not problems and (rest := [key for key, value in judged.items() if key not in known and value not in off]):
        logger.warning("%s: %s has keys that a %s model does not read: %s", where, CONFIG_FILE, family, ", ".join(rest))
    return problems


def _is_activation(name: Any) -> bool:
    return isinstance(name, str) and name in ACT2FN


def mapping_of(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration that was read, as a mapping for `read_config`: all that its class reads, defaults too."""
    common = {field.name for field in fields(PretrainedConfig)}
    own = common | _fields_of(config.model_type) | READ_BY_ALL | READ_BY.get(config.model_type, set())
    return {key: value for key, value in config.to_dict().items() if key in own}


def _fields_of(family: str) -> set[str]:
    kind = CONFIG_MAPPING[family]
    return {field.name for field in fields(kind)} | set(kind.attribute_map)


def _refuse_special_ids(config: PretrainedConfig, raw: dict[str, Any], where: str) -> None:
    """Ids that somebody wrote must be tokens of the model; a class's own that are none are dropped."""
    problems = []
    for name in SPECIAL_IDS:
        wrong = _outside(getattr(config, name, None), config.vocab_size)
        if wrong and raw.get(name) is not None:
            problems.append(_outside_words(name, wrong, config.vocab_size))
        elif wrong:
            setattr(config, name, None)
    if problems:
        raise SettingsError(f"{where}: {_joined(problems)}")


def _refuse_generation_ids(config: PretrainedConfig, path: str) -> None:
    """The same for what a folder says about generation, which an export hands on."""
    file = expanded(path) / GENERATION_FILE
    if not file.is_file():
        return
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"model: {file} cannot be read: {reason(error)}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"model: {file} holds no mapping")
    found = {name: _outside(raw.get(name), config.vocab_size) for name in SPECIAL_IDS}
    problems = [_outside_words(name, wrong, config.vocab_size) for name, wrong in found.items() if wrong]
    if problems:
        raise SettingsError(f"model.path: {file}: {_joined(problems)}")


def _outside(ids: Any, vocab_size: int) -> list:
    """Those that are no tokens of the vocabulary."""
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size]


def _outside_words(name: str, wrong: list, vocab_size: int) -> str:
    return f"{name} = {', '.join(map(repr, wrong))} is no token of a vocabulary of {vocab_size} (null means none)"


def _field_words(error: Exception, raw: dict[str, Any]) -> str | None:
    """A class's complaint about one field, in fewer words."""
    if not (match := re.match(r"Validation error for field '(\w+)':\s*(\w+): (.*)", str(error))):
        return None
    if match[2] != "TypeError":
        return f"{match[1]}: {match[3]}"
    key, kinds = match[1], {field.name: field.type for field in fields(CONFIG_MAPPING[raw["model_type"]])}
    kind = getattr(kinds[key], "__name__", None) or str(kinds[key])
    if "RopeParameters" in kind:
        return None
    for python, words in (("NoneType", "null"), ("None", "null"), (" | ", " or ")):
        kind = kind.replace(python, words)
    return f"{key} = {raw.get(key)!r}: want {kind}"


def _joined(problems: list[str]) -> str:
    return "; ".join(problems)


# ---- the driver's check ----


def check_model(settings: ModelSettings, backend: str, dtype: torch.dtype, device_type: str) -> PretrainedConfig:
    """The configuration, once nothing is left that would stop its trainers: keys, values, every layer's attention, the
    back end, the weights of a local folder. Takes no memory for weights."""
    config = read_config(settings.path, settings.config, settings.revision)
    for call in set(layers_of(config, _name(settings))):
        sentence = refusal(backend, head_dim=call.head_dim, dtype=dtype, softcap=call.softcap, device_type=device_type)
        if sentence:
            raise Unsupported(sentence)
    if settings.path is not None and looks_local(settings.path):
        check_weights(config, settings.path)
    return config


def _name(settings: ModelSettings) -> str:
    return "model.config" if settings.path is None else f"model.path {settings.path}"


def layers_of(config: PretrainedConfig, where: str = "model.config") -> list[AttentionCall]:
    """What every layer asks for, and the same as Transformers' own masks allow; from a model without memory."""
    with without_advice():
        try:
            return dry_run(_without_memory(config, torch.float32, CHECKED))
        except SettingsError:
            raise
        except Exception as error:  # a class and PyTorch say in their own ways that numbers do not fit
            raise SettingsError(f"{where} does not make a model that runs: {reason(error)}") from None


def num_matrix_weights(config: PretrainedConfig) -> int:
    """Weights that every token is multiplied with: all but an embedding that is not the head's too."""
    with without_advice():
        model = _without_memory(config, torch.float32, CHECKED)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.numel() for p in model.parameters()) - (0 if embedding is head else embedding.numel())


def activation_bytes(config: PretrainedConfig, dtype: torch.dtype, checkpointing: bool) -> int:
    """What training keeps of one token between forward and backward, logits aside; from a model without memory."""
    with without_advice():
        model = _without_memory(config, dtype, CHECKED).train()
        return saved_bytes(model, checkpointing)


def _without_memory(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)


def check_weights(config: PretrainedConfig, path: str) -> None:
    """Refuse a folder whose weights are not those of the model: only headers are read."""
    folder = expanded(path)
    found = _headers(folder, path)
    wrong = {str(x.dtype).removeprefix("torch.") for x in found.values() if x.dtype not in WEIGHT_DTYPES}
    if wrong:
        raise SettingsError(
            f"model.path: the weights of {path} are {', '.join(sorted(wrong))}, which cannot be trained; save them as "
            "bf16, fp16 or fp32"
        )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with without_advice():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        own = {name.removeprefix(f"{kind.base_model_prefix}.") for name in model.state_dict()}
        if not own & {name.removeprefix(f"{kind.base_model_prefix}.") for name in found}:
            raise SettingsError(
                f"model.path: the weights of {path} are of another model: they are called {_some(list(found), 2)}; a "
                f"{config.model_type} model's {_some(list(model.state_dict()), 2)}"
            )
        # a number spread over a shape takes no memory, so Transformers itself can say what fits
        spread = {name: torch.zeros(()).expand(x.shape) for name, x in found.items()}
        try:
            _, report = kind.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=spread,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            raise SettingsError(f"model.path: the weights of {path} cannot be loaded: {reason(error)}") from None
    _refuse_report(report, path)


def _headers(folder: Path, path: str) -> dict[str, torch.Tensor]:
    """Names, shapes and types of a folder's weights, as tensors without memory."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if first is None:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_ENDINGS)
        instead = f" (only {_some(others)})" if others else ""
        raise SettingsError(
            f"model.path: no weights from {path}: {SAFE_WEIGHTS_NAME}, or shards and {SAFE_WEIGHTS_INDEX_NAME}, are "
            f"wanted, and not there{instead}"
        )
    files = [first]
    if first.name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        try:
            files = [folder / name for name in sorted(set(json.loads(first.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"model.path: {first} is no index of weights: {reason(error)}") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise SettingsError(f"model.path: {path} lacks {_some(missing)}, which {first.name} names")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            part = load_state_dict(str(file), map_location="meta")
            assert isinstance(part, dict) and all(isinstance(x, torch.Tensor) for x in part.values()), "not all tensors"
            found |= part
        except Exception as error:  # whatever a safetensors header or a pickle ends in
            raise SettingsError(f"model.path: {file} is damaged or no weights: {reason(error)}") from None
    if not found:
        raise SettingsError(f"model.path: {first} holds no weights")
    return found


def _refuse_report(report: dict[str, Any], path: str) -> None:
    """Raise where Transformers would have made up, thrown away or left out weights, for which it only warns."""
    problems = [
        f"{name} is {tuple(found)}, the configuration wants {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])[:3]
    ]
    if len(report["mismatched_keys"]) > 3:
        problems.append(f"{len(report['mismatched_keys']) - 3} more of another shape")
    if report["missing_keys"]:
        problems.append(f"missing: {_some(sorted(report['missing_keys']))}")
    if report["unexpected_keys"]:
        problems.append(f"no place in the model for: {_some(sorted(report['unexpected_keys']))}")
    problems += report["error_msgs"]
    if problems:
        raise SettingsError(f"model.path: the weights of {path} do not fit its {CONFIG_FILE}: {_joined(problems)}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


# ---- models ----


def build_model(
    config: PretrainedConfig,
    path: str | None,
    revision: str | None,
    dtype: torch.dtype,
    seed: int,
    attention: str = NAME,
):
    """The model with its weights, on the CPU: loaded, or fresh (the same for the same seed, whatever the dtype)."""
    if path is not None:
        options = dict(revision=revision, config=config, dtype=dtype, trust_remote_code=False)
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # so that we refuse in our own words
        with without_advice():
            try:
                model, report = AutoModelForCausalLM.from_pretrained(
                    str(expanded(path)), attn_implementation=attention, **options
                )
            except Exception as error:  # files, the network, and what PyTorch says of shapes
                raise SettingsError(f"model.path: no weights from {path}: {reason(error)}") from None
        _refuse_report(report, path)
        return model
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    for parameter in model.parameters():  # buffers keep their precision: bf16 rotary frequencies would move positions
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def without_advice() -> Iterator[None]:
    """Transformers' warnings and progress bars say what we refuse in words, or what nobody can act on."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
