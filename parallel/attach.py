"""How does an unmodified Hugging Face model come to use our core attention, and which models may?

Transformers looks attention up by name (`attn_implementation="distca"`) and hands unknown keywords of `model(...)`
through to it, so the micro-batch's `CoreAttention` travels in band, as the keyword `distca`. What a layer asks for
beyond q, k, v arrives as keywords too; whatever we do not compute exactly is refused, never ignored.

Before the first step `probe` runs the model on two short documents: every attention layer must call us, and changing
one document must leave the other as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from distca.errors import SettingsError, Unsupported
from distca.kernels.attention import attend
from distca.kernels.capability import refusal
from distca.masks import Bands, MaskRule, bands_of

disable_progress_bar()  # per worker, and into logs

# Shape suffixes: T packed rows, H query heads, G key/value heads, D head size, V vocabulary.

NAME = "distca"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")
"""Model types held to the dense reference by the tests. A new one is a word here and a row in their table."""

IGNORED_KEYWORDS = {
    "position_ids",
    "use_cache",
    "is_causal",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
PROBE_LENGTHS = (9, 14)


def distca_attention(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **others
):
    """Transformers' attention interface: (1, H, T, D), (1, G, T, D) twice -> (1, T, H, D), None."""
    core_attention = others.pop("distca", None)
    if core_attention is None:
        raise Unsupported(
            "attn_implementation='distca' needs the keyword distca=CoreAttention(...) in the model's call; for "
            "generation use 'sdpa'"
        )
    if attention_mask is not None:
        raise Unsupported(
            "padding masks are not supported: pack documents without padding and leave attention_mask out"
        )
    if dropout:
        raise Unsupported(
            f"dropout of {dropout} in attention is not supported: set attention_dropout: 0.0 in the model's "
            "configuration"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise Unsupported(
            f"one packed row of documents is expected, got queries {tuple(query.shape)} and keys {tuple(key.shape)}"
        )
    if value.shape[-1] != query.shape[-1]:
        raise Unsupported(
            f"value heads of size {value.shape[-1]} beside query heads of size {query.shape[-1]} are not supported "
            "(MLA)"
        )
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise Unsupported(f"{type(module).__name__} looks ahead: only causal attention is supported")
    unknown = {name for name, value in others.items() if value is not None} - IGNORED_KEYWORDS
    if unknown:
        raise Unsupported(
            f"{type(module).__name__} asks for {', '.join(sorted(unknown))}, which DistCA does not compute"
        )
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out_THD = core_attention(q_THD, k_TGD, v_TGD, MaskRule(sliding_window or 0), float(scale), float(softcap or 0.0))
    return out_THD[None], None


def padding_mask(*, attention_mask=None, **_):
    """Transformers' mask interface: no mask is built; a padding mask is handed on, so that `distca_attention` can
    refuse it."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register(NAME, distca_attention)
AttentionMaskInterface.register(NAME, padding_mask)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asks for, as the probe saw it."""

    rule: MaskRule
    scale: float
    softcap: float
    query_heads: int
    kv_heads: int
    head_dim: int


class PackedCausalLM(torch.nn.Module):
    """A Hugging Face causal LM over packed rows that returns the summed loss of its labels."""

    def __init__(self, model: PreTrainedModel, loss_chunk: int):
        super().__init__()
        self.model, self.loss_chunk = model, loss_chunk

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, distca: Callable
    ) -> torch.Tensor:
        """(T,) token ids, positions and next tokens (-100: none) -> sum of cross entropies, fp32 (fp64 for an fp64
        model).

        Logits exist for `loss_chunk` rows at a time, forward and backward."""
        hidden_TD = self.hidden(input_ids, position_ids, distca)
        total = hidden_TD.new_zeros((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        for hidden, target in zip(hidden_TD.split(self.loss_chunk), labels.split(self.loss_chunk), strict=True):
            total = total + checkpoint(self._loss, hidden, target, use_reentrant=False)
        return total

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, distca: Callable) -> torch.Tensor:
        """(T, hidden size): what the language-model head reads."""
        out = self.model.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, distca=distca
        )
        return out.last_hidden_state[0]

    def _loss(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits_TV = self.model.get_output_embeddings()(hidden)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap:
            logits_TV = cap * torch.tanh(logits_TV / cap)
        return torch.nn.functional.cross_entropy(logits_TV, target, ignore_index=-100, reduction="sum")


def read_config(path: str | None, config: dict | None, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration, from a folder, the hub or a mapping; refused if we could not train it exactly."""
    try:
        if config is not None:
            found = AutoConfig.for_model(**config)
        else:
            found = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
        raise SettingsError(f"model: no configuration from {path or config}: {_first_line(error)}") from None
    refuse_config(found)
    return found


def refuse_config(config: PretrainedConfig) -> None:
    """Raise Unsupported for a configuration that would train to something else than a single device does."""
    if config.model_type not in FAMILIES:
        raise Unsupported(
            f"model type {config.model_type!r} has not been proved exact; these have: {', '.join(FAMILIES)}"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise Unsupported(
            f"attention_dropout = {config.attention_dropout} is not supported: set it to 0.0 in the model's "
            "configuration"
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise Unsupported("bidirectional attention is not supported: only causal language models can be trained")
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))} & {
        "dynamic",
        "longrope",
    }:
        raise Unsupported(
            f"rope_type {kind!r} changes with the longest position that a rank sees, so ranks would disagree: use "
            "'default', 'linear', 'yarn' or 'llama3'"
        )


def refuse_kernels(config: PretrainedConfig, backend: str, dtype: torch.dtype, device_type: str) -> None:
    """Raise Unsupported where the back end lacks what the configuration asks for; the probe sees what layers really
    ask."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
    sentence = refusal(backend, head_dim=head_dim, dtype=dtype, softcap=softcap, device_type=device_type)
    if sentence:
        raise Unsupported(sentence)


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
        try:
            return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, **options)
        except (ValueError, OSError) as error:
            raise SettingsError(f"model.path: no weights from {path}: {_first_line(error)}") from None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    for parameter in model.parameters():  # buffers keep their precision: bf16 rotary frequencies would move positions
        parameter.data = parameter.data.to(dtype)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute layers in backward, but keep what attention calls returned: no row crosses the wire twice."""
    context = partial(create_selective_checkpoint_contexts, _keep_attention)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})


def _keep_attention(_context, operator, *_args, **_kwargs):
    keep = operator in (torch.ops.distca.begin.default, torch.ops.distca.end.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(slots=True)
class ProbeAttention:
    """A CoreAttention for one process: attends two documents on the spot and notes what every layer asked for."""

    backend: str
    lengths: tuple[int, ...] = PROBE_LENGTHS
    calls: list[AttentionCall] = field(default_factory=list)

    def __call__(self, q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0) -> torch.Tensor:
        self.calls.append(AttentionCall(rule, scale, softcap, q_THD.shape[1], k_TGD.shape[1], q_THD.shape[2]))
        out_THD, _ = attend(
            q_THD, k_TGD, v_TGD, packed(rule, self.lengths), scale=scale, softcap=softcap, backend=self.backend
        )
        return out_THD


def packed(rule: MaskRule, lengths: tuple[int, ...]) -> Bands:
    """Documents one after the other in one buffer, as bands."""
    bands, start = bands_of(rule, lengths), torch.tensor((0, *lengths[:-1])).cumsum(0).numpy()
    return Bands(bands.q0 + start, bands.q1 + start, bands.k0 + start, bands.k1 + start, bands.lo, bands.hi)


def probe(model: PackedCausalLM, backend: str) -> list[AttentionCall]:
    """What each layer asks for, in order; raises Unsupported for a model that would be silently wrong."""
    vocab, layers = model.model.config.vocab_size, model.model.config.num_hidden_layers
    first, second = PROBE_LENGTHS
    positions = torch.cat([torch.arange(first), torch.arange(second)])
    tokens = torch.arange(first + second) * 7 % vocab
    changed = torch.cat([(tokens[:first] + 1) % vocab, tokens[first:]])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        run = ProbeAttention(backend)
        before, after = model.hidden(tokens, positions, run), model.hidden(changed, positions, ProbeAttention(backend))
    model.train(was_training)
    name = model.model.config.model_type
    if len(run.calls) != layers:
        raise Unsupported(
            f"{name}: {layers} layers made {len(run.calls)} attention calls; only models whose every layer is "
            "attention can be trained"
        )
    if not torch.equal(before[first:], after[first:]):
        raise Unsupported(f"{name}: changing one document changes the next one in the pack; this model mixes documents")
    if torch.equal(before[:first], after[:first]):
        raise Unsupported(
            f"{name}: changing a document's tokens does not change its output; the model does not read them"
        )
    return run.calls


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
