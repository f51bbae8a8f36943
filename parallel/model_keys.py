"""Which keys of a model's configuration mean something, and which of their values cannot be meant?

A configuration class of Transformers keeps what it does not know and reads nothing of it, so a misspelled key trains
another model without a word. Here every key and value is judged as it was written, before any class has filled in or
thrown away something. All functions are pure; a problem is a clause that names the key, what is wrong and what would
do.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator
from typing import Any

NEAR = 0.8  # difflib's ratio from which a name is taken for another one's misspelling

ROPE_TYPES = {  # what must be given, and what may be, beside the type and rope_theta
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("original_max_position_embeddings", "attention_factor", "factor"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}
ROPE_BOOKKEEPING = ("finetuned",)  # of published configurations; read by nobody
ROPE_OLD_NAMES = {"su": "longrope"}
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor") + tuple(
    sorted({key for required, optional in ROPE_TYPES.values() for key in required + optional})
)

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
    *("original_max_position_embeddings", "sliding_window_pattern"),
)
NOT_NEGATIVE = ("initializer_range", "max_window_layers")
POSITIVE = ("rms_norm_eps",)  # with 0, a row of zeros becomes NaN
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
PER_LAYER_KIND = ("gemma3_text",)  # families whose rope_parameters hold one mapping per kind of layer
LAYER_KINDS = ("full_attention", "sliding_attention")
ROTATES_A_PART = ("phi3",)  # families that read partial_rotary_factor


def key_problems(raw: dict[str, Any], known: Collection[str]) -> list[str]:
    """One problem for every key that is not among the known."""
    return [f"no such key {key!r}; {_hint(key, known)}" for key in raw if key not in known]


def near_misses(raw: dict[str, Any], known: Collection[str], elsewhere: Collection[str]) -> list[str]:
    """Problems with unknown keys that can only be misspelled; what is a key of some other model is none."""
    return [
        f"no such key {key!r}; did you mean {near[0]!r}?"
        for key in raw
        if key not in known
        and key not in elsewhere
        and (near := difflib.get_close_matches(key, known, 1, NEAR))
        and raw.get(near[0]) != raw[key]  # published files say some things twice
    ]


def value_problems(raw: dict[str, Any]) -> list[str]:
    """Values that no model of these families can mean, whatever its class would do with them. None is absent; 0 and
    the like are not."""
    floats = [(path, value) for path, value in _floats(raw) if not math.isfinite(value)]
    problems = [f"{path} = {value!r} is not a finite number" for path, value in floats]
    for key in SIZES:
        if raw.get(key) is not None and not (_is_int(raw[key]) and raw[key] >= 1):
            problems.append(f"{key} = {raw[key]!r}: want a whole number of at least 1")
    for key in NOT_NEGATIVE:
        if raw.get(key) is not None and not (_is_number(raw[key]) and raw[key] >= 0) and key not in dict(floats):
            problems.append(f"{key} = {raw[key]!r}: want a number that is not negative")
    for key in POSITIVE:
        if raw.get(key) is not None and not (_is_number(raw[key]) and raw[key] > 0) and key not in dict(floats):
            problems.append(f"{key} = {raw[key]!r}: want a positive number")
    for key in SOFTCAPS:
        if raw.get(key) is not None and not (_is_number(raw[key]) and raw[key] > 0):
            problems.append(f"{key} = {raw[key]!r}: the model divides by it; want a positive number, or null")
    if isinstance(kinds := raw.get("layer_types"), list):
        wrong = sorted({repr(kind) for kind in kinds if kind not in LAYER_KINDS})
        if wrong:
            problems.append(
                f"layer_types: there is no kind of layer {', '.join(wrong)}; known: {', '.join(LAYER_KINDS)}"
            )
    return problems


def rope_problems(family: str, raw: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration's rotary embedding: unknown types, keys that the type does not use or lacks,
    values that cannot be, and things said twice."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    problems = [
        f"{key} = {raw[key]!r}: want a positive number"
        for key in ("rope_theta", "rope_local_base_freq")
        if raw.get(key) is not None and not (_is_number(raw[key]) and raw[key] > 0)
    ]
    given = {key: value for key, value in (("rope_parameters", new), ("rope_scaling", old)) if value is not None}
    for key, value in given.items():
        if not isinstance(value, dict):
            problems.append(f"{key} = {value!r}: want a mapping such as {{rope_type: linear, factor: 4.0}}, or null")
    if problems:
        return problems
    if len(given) == 2 and new != old:
        return ["rope_parameters and rope_scaling (its old name) are both given and differ: leave one out"]
    problems += _partial_problems("partial_rotary_factor", family, raw)
    for key, value in given.items():
        if family in PER_LAYER_KIND and key == "rope_parameters":
            if wrong := [repr(kind) for kind in value if kind not in LAYER_KINDS]:
                problems.append(
                    f"{key}: no such key {', '.join(wrong)}; {family} wants one mapping for each of "
                    f"{', '.join(LAYER_KINDS)}"
                )
            for kind in LAYER_KINDS:
                inner = value.get(kind)
                if inner is not None and not isinstance(inner, dict):
                    problems.append(f"{key}.{kind} = {inner!r}: want a mapping, or null")
                elif inner:
                    outer_theta = "rope_theta" if kind == "full_attention" else "rope_local_base_freq"
                    problems += _one_rope(f"{key}.{kind}", family, inner) + _said_twice(raw, outer_theta, key, inner)
        elif value:
            problems += _one_rope(key, family, value) + _said_twice(raw, "rope_theta", key, value)
    return problems


def _one_rope(path: str, family: str, rope: dict[str, Any]) -> list[str]:
    rope = {key: value for key, value in rope.items() if key not in ROPE_BOOKKEEPING}
    both = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if len(both) == 2 and both[0] != both[1]:
        return [f"{path}: rope_type {both[0]!r} and type {both[1]!r} differ"]
    if any(key in rope and rope[key] is None for key in ("rope_type", "type")) and not both:
        return [f"{path}.rope_type: null is no type; known: {', '.join(ROPE_TYPES)}"]
    kind = both[0] if both else "default"
    kind = ROPE_OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        near = difflib.get_close_matches(str(kind), ROPE_TYPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ROPE_TYPES)}"
        return [f"{path}: there is no rope_type {kind!r}; {hint}"]
    required, optional = ROPE_TYPES[kind]
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *required, *optional}
    if misspelled := [key for key in rope if key not in used and key not in ROPE_KEYS]:
        return [f"{path}: no such key {key!r}; {_hint(key, ROPE_KEYS)}" for key in misspelled]
    problems = []
    for key in rope:
        if key not in used:
            takers = [name for name, (must, may) in ROPE_TYPES.items() if key in must + may]
            advice = f"{' or '.join(takers)} does" + ("" if both else "; no rope_type is given")
            problems.append(f"{path}: rope_type {kind!r} does not use {key!r}; {advice}")
    problems += [f"{path}: rope_type {kind!r} needs {key!r}" for key in required if rope.get(key) is None]
    for key, value in rope.items():
        if value is None and key == "rope_theta":
            problems.append(f"{path}.rope_theta: null is no base; leave it out for the model's own")
        if value is None or key not in used or key in ("rope_type", "type", "partial_rotary_factor"):
            continue
        if key == "truncate":
            fine, wanted = isinstance(value, bool), "true or false"
        elif key == "original_max_position_embeddings":
            fine, wanted = _is_int(value) and value >= 1, "a whole number of at least 1"
        elif key in ("short_factor", "long_factor"):
            fine, wanted = isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"
        elif key == "factor":
            fine, wanted = _is_number(value) and value >= 1, "a number of at least 1"
        else:
            fine, wanted = _is_number(value) and value > 0, "a positive number"
        if not fine:
            problems.append(f"{path}.{key} = {value!r}: want {wanted}")
    problems += _partial_problems(f"{path}.partial_rotary_factor", family, rope)
    return problems or _pairs_of_values(path, rope)


def _pairs_of_values(path: str, rope: dict[str, Any]) -> list[str]:
    """Values that are fine alone, but not beside each other."""
    problems = []
    if rope.get("low_freq_factor") is not None and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append(f"{path}: high_freq_factor must be greater than low_freq_factor")
    betas = {"beta_fast": 32, "beta_slow": 1} | {key: value for key, value in rope.items() if value is not None}
    fast, slow = betas["beta_fast"], betas["beta_slow"]
    if fast < slow:
        problems.append(f"{path}: beta_fast = {fast} must not be less than beta_slow = {slow}")
    scales = [key for key in ("mscale", "mscale_all_dim") if rope.get(key) is not None]
    if len(scales) == 1:
        problems.append(f"{path}: {scales[0]} has no effect alone; give mscale and mscale_all_dim, or neither")
    if len(scales) == 2 and rope.get("attention_factor") is not None:
        problems.append(f"{path}: mscale and mscale_all_dim have no effect beside attention_factor")
    return problems


def _partial_problems(path: str, family: str, rope: dict[str, Any]) -> list[str]:
    part = rope.get("partial_rotary_factor")
    if part is None:
        return []
    if not (_is_number(part) and 0 < part <= 1):
        return [f"{path} = {part!r}: want a number above 0, at most 1"]
    if part != 1 and family not in ROTATES_A_PART:
        return [f"{path} = {part!r}: {family} always rotates whole heads; leave it out"]
    return []


def _said_twice(raw: dict[str, Any], outer: str, path: str, rope: dict[str, Any]) -> list[str]:
    """Beside `rope_theta` inside, one outside counts for nothing."""
    if raw.get(outer) is None or rope.get("rope_theta") is None or raw[outer] == rope["rope_theta"]:
        return []
    return [f"{outer} = {raw[outer]} and {path}'s rope_theta = {rope['rope_theta']} differ: give one"]


def _floats(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _floats(inner, f"{path}[{index}]")


def _hint(key: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {near[0]!r}?" if near else "leave it out"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
