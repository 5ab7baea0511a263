"""Rotary embeddings that reach beyond the length of the training: what `rope_scaling` can ask for beside the default.

The published checkpoints need none of this. A configuration whose `rope_scaling` names another type has its
frequencies stretched here, before `qwen2vl.py` deals them out to time, height and width: every type works with
M-RoPE. The field is called "rope_type" or, in older files, "type"; the function of a type has its name.

Each function takes the plain frequencies, theta^(-2i/D), and gives the stretched ones, with the factor for cos and
sin (None: 1). Two types, dynamic and longrope, choose by the length of the text so far. What that means here:

* The length is the largest position of the call plus one, taken for each row of a batch by itself, so that a row
  gives what it gives alone. (The reference takes the longest row's for all.)
* Nothing is remembered. (The reference keeps the largest length of earlier, unrelated calls for dynamic, until a
  call that is shorter than max_position_embeddings.)
* Cached keys stay as they were turned. A step of cached decoding beyond the border turns its query and key by the
  new length's frequencies, while the keys before it keep those of their own step. That is what the reference's
  `generate` computes, and no cache could do better: with other frequencies the layers above would have had other
  values as well. Whoever wants the numbers of a run without a cache runs the whole text again.

Source: transformers 5.23.0, `modeling_rope_utils.py`, and the papers named at each function.

Letters: B rows, D width of a head. `length` is [B, 1, 1]; frequencies are [D / 2], or [B, 1, D / 2] by row.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qwen2vl import Config

Stretched = tuple[Tensor, float | None]


def linear(inverse: Tensor, length: Tensor, config: Config) -> Stretched:
    """All positions closer together, by `factor`.

    Source: "Extending Context Window of Large Language Models via Positional Interpolation", arXiv 2306.15595 §2.3;
    `_compute_linear_scaling_rope_parameters`.
    """
    return inverse / config.rope_scaling["factor"], None


def dynamic(inverse: Tensor, length: Tensor, config: Config) -> Stretched:
    """A larger theta, the more so the longer the text is: fast frequencies stay, the slowest is stretched most.

    Up to max_position_embeddings tokens nothing changes. For a text s times as long, theta grows by g^(D/(D-2)) with
    g = factor · s - (factor - 1), which stretches frequency i by g^(2i/(D-2)): from 1 to g.
    Source: "dynamic NTK" by the Reddit users bloc97 and emozilla, as told in YaRN, arXiv 2309.00071 §3.1 and
    appendix B; `_compute_dynamic_ntk_parameters`.
    """
    factor, trained, width = (
        config.rope_scaling["factor"],
        config.max_position_embeddings,
        config.head_dim,
    )
    growth = factor * (length.to(inverse.dtype) / trained).clamp(min=1) - (factor - 1)  # [B, 1, 1]
    exponents = torch.arange(0, width, 2, device=inverse.device, dtype=inverse.dtype) / (width - 2)
    return inverse / growth**exponents, None


def yarn(inverse: Tensor, length: Tensor, config: Config) -> Stretched:
    """Stretched by `factor` where a frequency turns only a few times within the trained length, else as it is.

    Between `beta_fast` (32) and `beta_slow` (1) turns a ramp leads from one to the other, linear in the index of the
    frequency. The attention is sharpened, too: cos and sin are scaled by 0.1 ln(factor) + 1 (`attention_factor`
    replaces it; `mscale` and `mscale_all_dim` weigh it, as DeepSeek does).
    Source: "YaRN", arXiv 2309.00071 §3.2 to 3.4; `_compute_yarn_parameters`.
    """
    scaling, width, trained = config.rope_scaling, config.head_dim, original_length(config)
    factor = scaling["factor"] or config.max_position_embeddings / trained

    def index_of(turns: float) -> float:
        """The i, not rounded, at which theta^(-2i/D) makes so many turns within the trained length."""
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = index_of(scaling.get("beta_fast") or 32), index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0  # a step instead of a ramp
    index = torch.arange(width // 2, device=inverse.device, dtype=inverse.dtype)
    stretch = ((index - first) / (last - first)).clamp(
        0, 1
    )  # 0: as it is, 1: stretched by the whole factor

    def sharpening(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale, weights = (
        scaling.get("attention_factor"),
        (scaling.get("mscale"), scaling.get("mscale_all_dim")),
    )
    if scale is None:
        scale = sharpening(weights[0]) / sharpening(weights[1]) if all(weights) else sharpening(1)
    return inverse * (1 - stretch) + inverse / factor * stretch, scale


def llama3(inverse: Tensor, length: Tensor, config: Config) -> Stretched:
    """Stretched by `factor` below `low_freq_factor` turns within the trained length, not above `high_freq_factor`.

    In between, the two are mixed, linear in the number of turns (where yarn is linear in the index).
    Source: Llama 3.1, arXiv 2407.21783 §3.4, and its published code; `_compute_llama3_parameters`.
    """
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original_length(config) * inverse / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(
        0, 1
    )  # 1: as it is, 0: stretched by the whole factor
    return inverse * keep + inverse / scaling["factor"] * (1 - keep), None


def longrope(inverse: Tensor, length: Tensor, config: Config) -> Stretched:
    """Each frequency has a factor of its own, found by search: `short_factor` up to the trained length, `long_factor`
    beyond it.

    cos and sin are scaled, in both cases, by sqrt(1 + ln(factor) / ln(trained length)); `attention_factor` replaces
    that, and without a `factor` it is max_position_embeddings / trained length.
    Source: "LongRoPE", arXiv 2402.13753 §3, and its published code; `_compute_longrope_parameters`.
    """
    scaling, trained = config.rope_scaling, original_length(config)
    short, long = (inverse.new_tensor(scaling[name]) for name in ("short_factor", "long_factor"))
    scale = scaling.get("attention_factor")
    if scale is None:
        factor = scaling.get("factor") or config.max_position_embeddings / trained
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return inverse / torch.where(length > trained, long, short), scale


TYPES = {function.__name__: function for function in (linear, dynamic, yarn, llama3, longrope)}
# The reference takes max_position_embeddings where original_max_position_embeddings is missing; so do we.
REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
    ),  # may be null: then it is max_position_embeddings / original_max_position_embeddings
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
LISTS = ("short_factor", "long_factor")
NUMBERS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
           "low_freq_factor", "high_freq_factor")  # fmt: skip
OTHERS = ("type", "rope_type", "mrope_section", "mscale", "mscale_all_dim", "truncate")


def original_length(config: Config) -> int:
    """How many tokens a text of the training had at most, before any stretching."""
    return (
        config.rope_scaling.get("original_max_position_embeddings")
        or config.max_position_embeddings
    )


def stretch(config: Config, inverse: Tensor, position_ids: Tensor) -> Stretched:
    """The plain frequencies [D / 2] as the configuration's rope type wants them for position_ids [3, B, S]."""
    length = position_ids.amax((0, 2))[:, None, None] + 1  # [B, 1, 1]
    return TYPES[config.rope_type](inverse, length, config)


def check(config: Config) -> None:
    """Raises ValueError for a type that is not known, and for fields that it needs and lacks or cannot use.

    Warns of fields that no type knows.
    """
    scaling, name, half = config.rope_scaling, config.rope_type, config.head_dim // 2
    if name not in TYPES:
        raise ValueError(
            f"configuration: rope type is {name!r}, supported are default, mrope, {', '.join(TYPES)}"
        )
    for field in REQUIRED[name]:
        if field not in scaling or (scaling[field] is None and name != "yarn"):
            raise ValueError(
                f"configuration: rope_scaling of type {name!r} lacks the field {field}"
            )
    for field in scaling.keys() & {*LISTS, *NUMBERS}:
        value, numbers = scaling[field], scaling[field] if field in LISTS else [scaling[field]]
        if field in LISTS and not (isinstance(value, list) and len(value) == half):
            raise ValueError(
                f"configuration: rope_scaling's {field} must be a list of {half} numbers, is {value!r}"
            )
        if value is not None and not all(isinstance(x, int | float) and x > 0 for x in numbers):
            raise ValueError(
                f"configuration: rope_scaling's {field} must be positive, is {value!r}"
            )
    for field in sorted(scaling.keys() - {*LISTS, *NUMBERS, *OTHERS}):
        warnings.warn(f"configuration: rope_scaling holds an unknown field: {field}", stacklevel=4)
    if name == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            "configuration: rope_scaling's low_freq_factor must be below its high_freq_factor"
        )
