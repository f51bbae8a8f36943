"""How does an unmodified Hugging Face model come to use our core attention, and is it the same attention as its own?

Transformers looks attention up by name (`attn_implementation="distca"`) and hands unknown keywords of `model(...)`
through to it, so the micro-batch's `CoreAttention` travels in band, as the keyword `distca`. What a layer asks for
beyond q, k, v arrives as keywords too; whatever we do not compute exactly is refused, never ignored.

`dry_run` runs a model without memory for weights: it tells what every layer asks for, and refuses a layer whose mask,
as Transformers builds it, is another than the rule we compute. Before the first step `probe` runs the model on two
short documents: every attention layer must call us, changing one document must leave the other as it is, and each
document must come out as from the stock model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from distca.errors import Unsupported
from distca.kernels.attention import attend
from distca.masks import Bands, MaskRule, bands_of
from distca.parallel.strands import run_strands

# Shape suffixes: T packed rows, H query heads, G key/value heads, D head size, V vocabulary.

NAME, CHECKED = "distca", "distca-checked"

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
AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative 2-norm; norms and angles round to fp32 in both
AGREEMENT_16_BIT = 0.1
LONGEST_ROW = 1 << 18  # rows of a mask further out are not looked at


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
    if query.shape[1] % key.shape[1] or not query.shape[-1]:
        raise Unsupported(
            f"{query.shape[1]} query heads of size {query.shape[-1]} cannot share {key.shape[1]} key/value heads evenly"
        )
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise Unsupported(f"{type(module).__name__} looks ahead: only causal attention is supported")
    unknown = {name for name, value in others.items() if value is not None} - IGNORED_KEYWORDS
    if unknown:
        raise Unsupported(
            f"{type(module).__name__} asks for {', '.join(sorted(unknown))}, which DistCA does not compute"
        )
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else _positive(scaling, "scaling", "attention scores")
    cap = 0.0 if softcap is None else _positive(softcap, "a soft cap", "attention scores")
    out_THD = core_attention(q_THD, k_TGD, v_TGD, rule_of(sliding_window), scale, cap)
    return out_THD[None], None


def rule_of(sliding_window: int | None) -> MaskRule:
    """None is no window; any other value is one, as in the model, so 0 hides everything and is refused."""
    if sliding_window is None:
        return MaskRule()
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, int) or sliding_window < 1:
        raise Unsupported(
            f"sliding_window = {sliding_window!r} lets no row see a key: give how many keys a row sees, itself "
            "included, or null for all before it"
        )
    return MaskRule(sliding_window)


def _positive(value: float, name: str, of: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise Unsupported(f"{name} of {value!r} for {of} is not supported: want a positive number, or null")
    return float(value)


def padding_mask(*, attention_mask=None, **_):
    """Transformers' mask interface: no mask is built; a padding mask is handed on, so that `distca_attention` can
    refuse it."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def checked_attention(module, query, key, value, attention_mask, *, distca, **keywords):
    """`distca_attention`, where the stock model would use the same mask."""

    def compared(q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0):
        if attention_mask is not None:
            longest = getattr(module.config, "max_position_embeddings", None) or 0
            refuse_other_mask(type(module).__name__, rule, attention_mask, longest)
        return distca(q_THD, k_TGD, v_TGD, rule, scale, softcap)

    return distca_attention(module, query, key, value, None, distca=compared, **keywords)


def stock_mask(*, mask_function, **_):
    """Transformers' mask interface: instead of a mask, the function of rows and keys that it would be filled from."""
    return mask_function


@lru_cache(maxsize=4)  # layers share their masks
def refuse_other_mask(name: str, rule: MaskRule, mask_function: Callable, longest: int) -> None:
    """Raise where Transformers' mask of a long document is not the rule's: at its first rows, at its last, and around
    the window's edge."""
    length = min(LONGEST_ROW, max(64, longest, 2 * rule.window + 2))
    edges = {0, 1, 2, length // 2, length - 1, rule.window - 1, rule.window, rule.window + 1}
    rows, keys = torch.tensor(sorted(r for r in edges if 0 <= r < length))[:, None], torch.arange(length)[None]
    band = bands_of(rule, np.array([length]))
    ours = (keys - rows >= int(band.lo[0])) & (keys - rows <= int(band.hi[0]))
    if not torch.equal(ours, mask_function(0, 0, rows, keys).expand_as(ours)):
        raise Unsupported(f"{name} asks for a {rule} mask, but its own mask is another: this model cannot be trained")


AttentionInterface.register(NAME, distca_attention)
AttentionMaskInterface.register(NAME, padding_mask)
AttentionInterface.register(CHECKED, checked_attention)
AttentionMaskInterface.register(CHECKED, stock_mask)


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
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        distca: Callable,
        most_rows: int = 0,
    ) -> torch.Tensor:
        """(T,) token ids, positions and next tokens (-100: none) -> sum of cross entropies, fp32 (fp64 for an fp64
        model).

        Logits exist for at most `loss_chunk` rows at a time, forward and backward. Where ranks hold unequal amounts,
        `most_rows` is the largest: all ask for the head's weights, which ZeRO 3 shares, equally often."""
        hidden_TD = self.hidden(input_ids, position_ids, distca)
        total = hidden_TD.new_zeros((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        num_chunks = max(1, -(-max(most_rows, len(labels)) // self.loss_chunk))
        chunks = hidden_TD.tensor_split(num_chunks), labels.tensor_split(num_chunks)
        for hidden, target in zip(*chunks, strict=True):
            total = total + checkpoint(self._loss, hidden, target, use_reentrant=False)
        return total

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, distca: Callable) -> torch.Tensor:
        """(T, hidden size): what the language-model head reads."""
        out = self.model.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, distca=distca
        )
        return out.last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden size) -> (T, V) in the loss's precision."""
        logits_TV = self.model.get_output_embeddings()(hidden)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)

    def weights_per_token(self) -> int:
        """How many weights each token is multiplied with: those of matrices, without embeddings that are only looked
        up. Asked before ZeRO splits them."""
        head = self.model.get_output_embeddings()
        looked_up = {m.weight for m in self.model.modules() if isinstance(m, torch.nn.Embedding)} - {head.weight}
        return sum(p.numel() for p in self.model.parameters() if p.dim() >= 2 and p not in looked_up)

    def _loss(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits_TV = self.logits(hidden)
        return torch.nn.functional.cross_entropy(logits_TV, target, ignore_index=-100, reduction="sum")


class StrandedCausalLM(PackedCausalLM):
    """The same over one or more nano-batches, each on a strand of its own.

    DeepSpeed enters it once: what it does around a forward, such as noting in which order ZeRO 3 needs the weights, is
    about all strands together."""

    def forward(self, nano_batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Arguments of `PackedCausalLM` for each -> their summed loss."""
        losses = run_strands([partial(super(StrandedCausalLM, self).forward, **batch) for batch in nano_batches])
        # one node, so that backward finds all strands' ends at once: in a chain of sums one would wait for another
        return torch.stack(losses).sum()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute layers in backward, but keep what attention calls returned: no row crosses the wire twice."""
    context = partial(create_selective_checkpoint_contexts, _keep_attention)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})


def _keep_attention(_context, operator, *_args, **_kwargs):
    keep = operator.namespace == "distca"
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


def dry_run(model: PreTrainedModel) -> list[AttentionCall]:
    """What each layer of a model on the meta device (built for `CHECKED`) asks for, in order; nothing is computed."""
    calls: list[AttentionCall] = []

    def note(q_THD, k_TGD, v_TGD, rule: MaskRule, scale: float, softcap: float = 0.0):
        calls.append(AttentionCall(rule, scale, softcap, q_THD.shape[1], k_TGD.shape[1], q_THD.shape[2]))
        return torch.empty_like(q_THD)

    with torch.no_grad():
        PackedCausalLM(model, 1).logits(_meta_hidden(model, PROBE_LENGTHS[0], note))
    _refuse_odd_calls(model, calls)
    return calls


def saved_bytes(model: PreTrainedModel, checkpointing: bool, tokens: int = 64) -> int:
    """What each token leaves behind for backward in a model on the meta device (built for `CHECKED`), logits aside."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}  # storages, which many saved tensors may share

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def attend(q_THD, k_TGD, v_TGD, *_):
        out_THD = q_THD.clone()  # carries gradients on, like attention
        statistics = q_THD.new_empty(q_THD.shape[:2], dtype=torch.promote_types(q_THD.dtype, torch.float32))
        for tensor in (out_THD, statistics) if checkpointing else (q_THD, k_TGD, v_TGD, out_THD, statistics):
            keep(tensor)
        return out_THD

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _meta_hidden(model, tokens, attend)
    return sum(s.nbytes() for s in kept.values()) // tokens


def _meta_hidden(model: PreTrainedModel, tokens: int, attend: Callable) -> torch.Tensor:
    """(T, hidden size) of a model on the meta device."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    # a padding mask of one length keeps Transformers from looking for packed documents, which meta tensors do not tell
    everything = dict(attention_mask=torch.ones_like(ids), use_cache=False, distca=attend)
    return model.base_model(input_ids=ids, position_ids=ids, **everything).last_hidden_state[0]


def probe(model: PackedCausalLM, backend: str = "reference") -> list[AttentionCall]:
    """What each layer asks for, in order; raises Unsupported for a model that would be silently wrong."""
    vocab, name = model.model.config.vocab_size, model.model.config.model_type
    first, second = PROBE_LENGTHS
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE_LENGTHS])
    tokens = torch.arange(first + second, device=device) * 7 % vocab
    changed = torch.cat([(tokens[:first] + 1) % vocab, tokens[first:]])
    with _evaluating(model):
        run = ProbeAttention(backend)
        before, after = model.hidden(tokens, positions, run), model.hidden(changed, positions, ProbeAttention(backend))
        _refuse_odd_calls(model.model, run.calls)
        if not before.isfinite().all():
            raise Unsupported(
                f"{name}: its outputs are not finite: the weights hold NaN or infinity, or are too large for "
                f"{before.dtype}".replace("torch.", "")
            )
        if not torch.equal(before[first:], after[first:]):
            raise Unsupported(
                f"{name}: changing one document changes the next one in the pack; this model mixes documents"
            )
        if vocab > 1 and torch.equal(before[:first], after[:first]):
            raise Unsupported(
                f"{name}: changing a document's tokens does not change its output; the model does not read them"
            )
        for ids, ours in zip(tokens.split(PROBE_LENGTHS), before.split(PROBE_LENGTHS), strict=True):
            _refuse_other_outputs(model, ids, ours, capped=any(call.softcap for call in run.calls))
    return run.calls


def _refuse_odd_calls(model: PreTrainedModel, calls: list[AttentionCall]) -> None:
    layers, name = model.config.num_hidden_layers, model.config.model_type
    if len(calls) != layers:
        raise Unsupported(
            f"{name}: {layers} layers made {len(calls)} attention calls; only models whose every layer is "
            "attention can be trained"
        )
    if not calls:
        raise Unsupported(f"{name}: a model without layers cannot be trained")


def _refuse_other_outputs(model: PackedCausalLM, ids: torch.Tensor, ours: torch.Tensor, capped: bool) -> None:
    """Raise where the stock model, on this document alone, says something else than we do."""
    with _attention(model.model, "eager" if capped else "sdpa"):  # Transformers' sdpa knows no soft cap
        hidden = model.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        logits = model.model(input_ids=ids[None], use_cache=False).logits[0]
    allowed = AGREEMENT.get(ours.dtype, AGREEMENT_16_BIT)
    for what, found, wanted in ("hidden states", ours, hidden), ("logits", model.logits(hidden), logits):
        found, wanted = found.double(), wanted.double()
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))
        if not error <= allowed:
            raise Unsupported(
                f"{model.model.config.model_type}: the {what} of a document differ from the stock model's by "
                f"{error:.1e} (allowed {allowed:.0e}): its attention or head is something else than DistCA computes"
            )


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The same weights under another attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients; every module's mode and the random state as they were."""
    modes, state = {module: module.training for module in model.modules()}, torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        torch.set_rng_state(state)
