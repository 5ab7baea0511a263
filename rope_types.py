"""Scaled RoPE: rotary frequencies for sequences longer than those of the training.

    rope_type, parameters, inv_freq, seq_len ── scale_inv_freq ──> inv_freq, attention scaling

The published checkpoints do not use any of this. A configuration whose `rope_scaling` names a type
other than "default" (in older files "mrope") has its frequencies scaled here, before `qwen2vl.py`
splits them into sections for time, height and width, so every type works with M-RoPE. One function
computes each type, from plain numbers.

Every function takes `inv_freq`, the unscaled inverse frequencies theta^(-2i/D), and returns the
scaled ones and the attention scaling: a factor for cos and sin (1.0 where the type has none).

Two types, dynamic and longrope, depend on the sequence length, which is the largest position of the
call plus one:

* It is computed for each sequence of a batch separately, so that a sequence in a batch gets the
  result it gets alone. (The reference uses the longest sequence of the batch for all.)
* It is not remembered between calls. (For dynamic, the reference keeps the largest length of
  earlier calls until a call that is shorter than max_position_embeddings.)
* Cached keys keep the rotation of their own step. Beyond the trained length, a cached decode step
  rotates its query and key with the frequencies of the new length. The reference's `generate`
  computes the same. The result differs from a run without a cache, which rotates all keys with the
  same frequencies.

Source: transformers 5.23.0, `modeling_rope_utils.py`, and the papers named at each function.

Shapes: B batch, D head dimension. inv_freq is [D / 2], and [B, 1, D / 2] where it depends on the
length.
"""

import math
import reprlib
import warnings

import torch
from torch import Tensor

from config_fields import is_positive

# The fields of `rope_scaling` that each type reads.
REQUIRED_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL_FIELDS = {
    "linear": (),
    "dynamic": (),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "factor", "attention_factor"),
}
# Fields that are read elsewhere, or that the reference writes for every type.
COMMON_FIELDS = ("type", "rope_type", "mrope_section", "rope_theta", "partial_rotary_factor")


# ---------------------------------------------------------------------- one function for each type
def linear(inv_freq: Tensor, factor: float) -> tuple[Tensor, float]:
    """Divide all frequencies by `factor`: position p gets the angles that p / factor had.

    inv_freq [D / 2] → [D / 2], 1.0.
    Source: position interpolation, arXiv 2306.15595 §2.3;
    `_compute_linear_scaling_rope_parameters`.
    """
    return inv_freq / factor, 1.0


def dynamic(
    inv_freq: Tensor, head_dim: int, factor: float, trained_length: int, seq_len: Tensor | int
) -> tuple[Tensor, float]:
    """Increase theta with the length of the sequence ("dynamic NTK").

    With s = max(1, seq_len / trained_length) and g = factor · s - (factor - 1), theta is multiplied
    by g^(D / (D - 2)). This divides frequency i by g^(2i / (D - 2)): the fastest by 1, the slowest
    by g. Up to the trained length nothing changes.

    inv_freq [D / 2]; trained_length in tokens; seq_len in tokens, an int or [B, 1, 1]
    → [D / 2] or [B, 1, D / 2], 1.0.
    Source: YaRN, arXiv 2309.00071 §3.1 and appendix B, after posts by the Reddit users bloc97 and
    emozilla; `_compute_dynamic_ntk_parameters`.
    """
    seq_len = torch.as_tensor(seq_len, device=inv_freq.device)
    length_ratio = (seq_len.to(inv_freq.dtype) / trained_length).clamp(min=1)  # [B, 1, 1]
    growth = factor * length_ratio - (factor - 1)
    even = torch.arange(0, head_dim, 2, device=inv_freq.device, dtype=inv_freq.dtype)
    return inv_freq / growth ** (even / (head_dim - 2)), 1.0


def yarn(
    inv_freq: Tensor,
    head_dim: int,
    theta: float,
    factor: float,
    trained_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> tuple[Tensor, float]:
    """Divide the slow frequencies by `factor`, keep the fast ones, and interpolate between them.

    A frequency is fast if it makes more than `beta_fast` rotations within the trained length, and
    slow if it makes fewer than `beta_slow`. In between, the weight of the division rises linearly
    with the index of the frequency. `truncate` rounds the two ends of that ramp outward to
    integers. For `mscale` and `mscale_all_dim` see `yarn_attention_scaling`.

    inv_freq [D / 2]; trained_length: tokens → [D / 2], attention scaling.
    Source: YaRN, arXiv 2309.00071 §3.2 to 3.4; `_compute_yarn_parameters`.
    """
    start = yarn_index(beta_fast, head_dim, theta, trained_length)
    end = yarn_index(beta_slow, head_dim, theta, trained_length)
    if truncate:
        start = math.floor(start)
        end = math.ceil(end)
    start = max(start, 0)
    end = min(end, head_dim - 1)
    if start == end:
        end += 0.001  # a step instead of a ramp; the value is the reference's
    index = torch.arange(head_dim // 2, device=inv_freq.device, dtype=inv_freq.dtype)
    divided = ((index - start) / (end - start)).clamp(0, 1)  # the weight of inv_freq / factor
    scaled = inv_freq * (1 - divided) + inv_freq / factor * divided
    return scaled, yarn_attention_scaling(factor, mscale, mscale_all_dim)


def yarn_index(rotations: float, head_dim: int, theta: float, trained_length: int) -> float:
    """Return the index of the frequency that makes `rotations` rotations within the trained length.

    This is the real number i for which trained_length · theta^(-2i/D) = 2π · rotations.
    Source: YaRN, arXiv 2309.00071 §3.2; `find_correction_dim` in `_compute_yarn_parameters`.
    """
    wavelength = trained_length / rotations  # tokens in one rotation
    return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))


def yarn_attention_scaling(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Return yarn's factor for cos and sin: 0.1 ln(factor) + 1, and 1.0 for factors up to 1.

    With both `mscale` and `mscale_all_dim`, which DeepSeek's checkpoints have, it is
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
    Source: YaRN, arXiv 2309.00071 §3.4; `get_mscale` in `_compute_yarn_parameters`.
    """
    if factor <= 1:
        return 1.0
    if not mscale or not mscale_all_dim:
        return 0.1 * math.log(factor) + 1
    numerator = 0.1 * mscale * math.log(factor) + 1
    denominator = 0.1 * mscale_all_dim * math.log(factor) + 1
    return numerator / denominator


def llama3(
    inv_freq: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    trained_length: int,
) -> tuple[Tensor, float]:
    """Divide slow frequencies by `factor`, keep fast ones, and interpolate by rotations.

    A frequency is slow if it makes fewer than `low_freq_factor` rotations within the trained
    length, and fast if it makes more than `high_freq_factor`. In between, the weight of the
    unscaled frequency rises linearly with the number of rotations. (In yarn it is linear in the
    index.)

    inv_freq [D / 2]; trained_length: tokens → [D / 2], 1.0.
    Source: Llama 3.1, arXiv 2407.21783 §3.4, and its published code; `_compute_llama3_parameters`.
    """
    rotations = trained_length * inv_freq / (2 * math.pi)
    kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inv_freq * kept + inv_freq / factor * (1 - kept), 1.0


def longrope(
    inv_freq: Tensor,
    short_factor: list[float],
    long_factor: list[float],
    factor: float,
    trained_length: int,
    seq_len: Tensor | int,
) -> tuple[Tensor, float]:
    """Divide each frequency by its own factor, found by search.

    The factors are `short_factor` up to the trained length and `long_factor` beyond it. In both
    cases the attention scaling is sqrt(1 + ln(factor) / ln(trained_length)), and 1.0 for factors
    up to 1.

    inv_freq [D / 2]; short_factor, long_factor: D / 2 numbers; trained_length in tokens; seq_len in
    tokens, an int or [B, 1, 1] → [D / 2] or [B, 1, D / 2], attention scaling.
    Source: LongRoPE, arXiv 2402.13753 §3, and its published code; `_compute_longrope_parameters`.
    """
    seq_len = torch.as_tensor(seq_len, device=inv_freq.device)
    short = inv_freq.new_tensor(short_factor)
    long = inv_freq.new_tensor(long_factor)
    scaled = inv_freq / torch.where(seq_len > trained_length, long, short)
    if factor <= 1:
        return scaled, 1.0
    return scaled, math.sqrt(1 + math.log(factor) / math.log(trained_length))


# -------------------------------------------------------------------------- from the configuration
def original_length(parameters: dict, max_position_embeddings: int) -> int:
    """Return the number of tokens the unscaled frequencies were trained with.

    This is `original_max_position_embeddings`; where it is missing, max_position_embeddings, as in
    the reference.
    """
    return parameters.get("original_max_position_embeddings") or max_position_embeddings


def scale_inv_freq(
    rope_type: str,
    parameters: dict,
    inv_freq: Tensor,
    seq_len: Tensor | int,
    *,
    head_dim: int,
    theta: float,
    max_position_embeddings: int,
) -> tuple[Tensor, float]:
    """Scale the inverse frequencies as `rope_type` and its parameters specify.

    parameters: the `rope_scaling` of config.json, valid for `check_parameters`. inv_freq [D / 2].
    seq_len: the largest position plus one, an int or int64 [B, 1, 1] (one value for each sequence).
    theta, max_position_embeddings: the fields of config.json.
    Returns inv_freq, [D / 2] or [B, 1, D / 2], in the dtype it came in, and the attention scaling.
    """
    if rope_type == "linear":
        return linear(inv_freq, parameters["factor"])
    if rope_type == "dynamic":
        # The reference ignores original_max_position_embeddings for this type.
        return dynamic(inv_freq, head_dim, parameters["factor"], max_position_embeddings, seq_len)
    trained_length = original_length(parameters, max_position_embeddings)
    if rope_type == "llama3":
        return llama3(
            inv_freq,
            parameters["factor"],
            parameters["low_freq_factor"],
            parameters["high_freq_factor"],
            trained_length,
        )
    factor = parameters.get("factor") or max_position_embeddings / trained_length
    if rope_type == "yarn":
        inv_freq, scaling = yarn(
            inv_freq,
            head_dim,
            theta,
            factor,
            trained_length,
            parameters.get("beta_fast") or 32.0,
            parameters.get("beta_slow") or 1.0,
            parameters.get("truncate", True),
            parameters.get("mscale"),
            parameters.get("mscale_all_dim"),
        )
    elif rope_type == "longrope":
        inv_freq, scaling = longrope(
            inv_freq,
            parameters["short_factor"],
            parameters["long_factor"],
            factor,
            trained_length,
            seq_len,
        )
    else:
        raise ValueError(f"expected a rope type of {supported_types()}, got {rope_type!r}")
    if parameters.get("attention_factor") is not None:
        scaling = parameters["attention_factor"]
    return inv_freq, scaling


def supported_types() -> str:
    """Return the names of the scaled types, for a message."""
    return ", ".join(REQUIRED_FIELDS)


# ---------------------------------------------------------------------------------------- checking
def check_parameters(
    rope_type: str, parameters: dict, head_dim: int, max_position_embeddings: int
) -> None:
    """Check the `rope_scaling` of a configuration whose type is other than "default".

    Raises ValueError for an unknown type, a missing field and a value that cannot be computed with.
    Warns of each field that the type does not read.
    """
    if not isinstance(rope_type, str) or rope_type not in REQUIRED_FIELDS:
        raise ValueError(
            f"rope_scaling: expected a rope type of default, mrope, {supported_types()}, "
            f"got {rope_type!r}"
        )
    for name in REQUIRED_FIELDS[rope_type]:
        check_required(rope_type, parameters, name)
    known = REQUIRED_FIELDS[rope_type] + OPTIONAL_FIELDS[rope_type]
    for name in known:
        if parameters.get(name) is not None:
            check_value(name, parameters[name], head_dim)
    check_combination(rope_type, parameters, head_dim, max_position_embeddings)
    for name in sorted(parameters.keys() - {*known, *COMMON_FIELDS}):
        warnings.warn(
            f"rope_scaling holds a field that type {rope_type!r} does not read: {name}",
            stacklevel=2,
        )


def check_combination(
    rope_type: str, parameters: dict, head_dim: int, max_position_embeddings: int
) -> None:
    """Raise ValueError for values that are valid alone and cannot be computed with together."""
    rotated_share = parameters.get("partial_rotary_factor")
    if rotated_share not in (None, 1):
        raise ValueError(f"rope_scaling: expected partial_rotary_factor 1, got {rotated_share!r}")
    if rope_type == "dynamic" and head_dim < 4:
        raise ValueError(
            "rope_scaling of type 'dynamic': expected a head dimension of 4 or more, "
            f"got {head_dim}"
        )
    trained_length = original_length(parameters, max_position_embeddings)
    if rope_type == "longrope" and trained_length < 2:
        raise ValueError(
            "rope_scaling of type 'longrope': expected original_max_position_embeddings of 2 or "
            f"more, got {trained_length}"
        )
    if rope_type != "llama3":
        return
    low = parameters["low_freq_factor"]
    high = parameters["high_freq_factor"]
    if low >= high:
        raise ValueError(
            f"rope_scaling: expected low_freq_factor below high_freq_factor, got {low} and {high}"
        )


def check_required(rope_type: str, parameters: dict, name: str) -> None:
    """Raise ValueError if a required field is missing or null.

    yarn's factor may be null: it is then max_position_embeddings /
    original_max_position_embeddings.
    """
    if name not in parameters:
        raise ValueError(f"rope_scaling of type {rope_type!r}: expected a field {name}, got none")
    if parameters[name] is None and rope_type != "yarn":
        raise ValueError(f"rope_scaling of type {rope_type!r}: expected a field {name}, got null")


def check_value(name: str, value: object, head_dim: int) -> None:
    """Raise ValueError if the value of a field is not of the kind that its type computes with."""
    if isinstance(value, int) and value >= 2**31:  # no tensor can be divided by 2**64
        raise ValueError(
            f"rope_scaling: expected {name} as an integer of at most 32 bits or a float, "
            f"got {reprlib.repr(value)}"
        )
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"rope_scaling: expected {name} to be true or false, got {value!r}")
        return
    if name in ("mscale", "mscale_all_dim"):
        if value != 0 and not is_positive(value):  # 0 counts as absent, as in the reference
            raise ValueError(
                f"rope_scaling: expected {name} of at least 0, got {reprlib.repr(value)}"
            )
        return
    if name not in ("short_factor", "long_factor"):
        if not is_positive(value):
            raise ValueError(f"rope_scaling: expected a positive {name}, got {reprlib.repr(value)}")
        return
    if not isinstance(value, list) or len(value) != head_dim // 2:
        raise ValueError(
            f"rope_scaling: expected {name} to be a list of {head_dim // 2} numbers, "
            f"got {value!r:.80}"
        )
    if not all(is_positive(item) for item in value):
        raise ValueError(f"rope_scaling: expected positive numbers in {name}, got {value!r:.80}")
