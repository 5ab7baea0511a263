"""Qwen2-VL: one batch of token ids and picture patches in, logits out.

Read from top to bottom: configuration, attention, the two rotary embeddings, the vision transformer that turns
patches into tokens, the decoder that reads those tokens between the words, and the model that joins them. Plain
PyTorch, no files, no network: `preprocess.py` makes the batch, `load_weights.py` fills the parameters, `generate.py`
turns logits into words. Parameters carry the names of the published checkpoint.

Sources: "Qwen2-VL" (arXiv 2409.12191) for the design; transformers 5.23.0, `models/qwen2_vl`, for the numerics.

Shapes: B batch, S new tokens, K all tokens so far (cached + new), C width of the decoder (hidden_size),
        H query heads, G key/value heads (G divides H), D width of one head, V vocabulary,
        N patches of all pictures together, E width of the vision transformer (embed_dim),
        T image tokens (N / 4: a 2×2 block of patches becomes one token).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rope_types


# ---------------------------------------------------------------------------------------------- configuration
def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that CLIP-like vision towers were trained with."""
    return x * torch.sigmoid(1.702 * x)


# By the names that transformers 5.23.0 has for them in `activations.py`.
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "quick_gelu": quick_gelu,
}
ACTIVATIONS |= {
    n: getattr(F, n)
    for n in ("relu", "relu6", "leaky_relu", "hardswish", "mish", "tanh", "sigmoid")
}
for same in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"):
    ACTIVATIONS[same] = partial(F.gelu, approximate="tanh")


# The annotation of a configuration's field names what it accepts, one of FIELD_TYPES; " | None" adds null.
Size = int  # a positive integer
Positive = float  # a positive number
MAX_LAYERS = 1000  # a larger number is a damaged file, and building the layers would never end


def is_integer(value: object) -> bool:
    """Return whether the value is an integer, not a boolean, that fits into 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def is_number(value: object) -> bool:
    """Return whether the value is an integer or a finite float, not a boolean, within the range of float64."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_token_id_or_list(value: object) -> bool:
    """Return whether the value is one integer or a list of them."""
    return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))


FIELD_TYPES = {  # annotation → the check of a value, and the words for what is expected
    "Size": (lambda value: is_integer(value) and value > 0, "a positive integer"),
    "int": (is_integer, "an integer"),
    "int | list[int]": (is_token_id_or_list, "an integer or a list of integers"),
    "Positive": (lambda value: is_number(value) and value > 0, "a positive number"),
    "float": (is_number, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "dict": (lambda value: isinstance(value, dict), "an object"),
    "VisionConfig": (lambda value: isinstance(value, VisionConfig), "a VisionConfig"),
}


def check_fields(config: Config | VisionConfig, prefix: str = "") -> None:
    """Raise ValueError naming the first field whose value is not what its annotation asks for."""
    for field_ in fields(config):
        value = getattr(config, field_.name)
        kind = field_.type.removesuffix(" | None")
        if value is None and kind != field_.type:
            continue
        fits, expected = FIELD_TYPES[kind]
        if not fits(value):
            got = reprlib.repr(value)
            raise ValueError(f"{prefix}{field_.name}: expected {expected}, got {got}")


def check_activation(name: str, value: str) -> None:
    """Raise ValueError if the activation of that field is not implemented."""
    if value not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_layer_count(name: str, value: int) -> None:
    """Raise ValueError if no real model can have so many layers."""
    if value > MAX_LAYERS:
        raise ValueError(f"{name}: expected at most {MAX_LAYERS}, got {value}")


@dataclass
class VisionConfig:
    """The `vision_config` of config.json. A field absent from the file has the reference's default.

    Raises ValueError for a value of the wrong type or out of range, and for fields that contradict each other.
    Source: transformers 5.23.0, `Qwen2VLVisionConfig`.
    """

    depth: Size = 32  # transformer blocks
    embed_dim: Size = 1280  # E
    num_heads: Size = 16
    mlp_ratio: Positive = 4
    hidden_size: Size = 3584  # width of the image tokens: the decoder's C
    hidden_act: str = "quick_gelu"
    in_channels: Size = 3
    patch_size: Size = 14  # pixels per side
    temporal_patch_size: Size = 2  # frames in one patch; a still image is repeated
    spatial_merge_size: Size = 2  # patches per side that become one token

    def __post_init__(self):
        check_fields(self, "vision_config.")
        check_layer_count("vision_config.depth", self.depth)
        if self.embed_dim % (4 * self.num_heads):  # 2-D RoPE: pairs for two axes in each head
            raise ValueError(
                f"vision_config.embed_dim: expected a multiple of 4 · {self.num_heads} heads, "
                f"got {self.embed_dim}"
            )
        if self.embed_dim * self.mlp_ratio >= 2**31:
            raise ValueError(
                f"vision_config.mlp_ratio: expected a smaller number, got {self.mlp_ratio}"
            )
        check_activation("vision_config.hidden_act", self.hidden_act)


@dataclass
class Config:
    """The fields of config.json that shape the computation. A field absent from the file has the reference's default.

    Raises ValueError for a value of the wrong type or out of range, for fields that contradict each other, and for
    what this file does not compute.
    Source: transformers 5.23.0, `Qwen2VLConfig` and `Qwen2VLTextConfig`.
    """

    vocab_size: Size = 152064
    hidden_size: Size = 8192  # C
    intermediate_size: Size = 29568  # inner width of the MLP
    num_hidden_layers: Size = 80
    num_attention_heads: Size = 64  # H
    num_key_value_heads: Size = 8  # G
    hidden_act: str = "silu"
    max_position_embeddings: Size = 32768
    rms_norm_eps: Positive = 1e-5  # 1e-6 in the published checkpoints
    rope_theta: Positive = 1e6
    rope_scaling: dict = field(
        default_factory=lambda: {"type": "mrope", "mrope_section": [16, 24, 24]}
    )
    use_sliding_window: bool = False
    sliding_window: int | None = 4096  # how many tokens a token attends to, itself included
    max_window_layers: int = 80  # the layers from this one on have the window, if it is used
    attention_dropout: float = 0.0  # of the decoder's attention, in training only
    tie_word_embeddings: bool = False  # true: the output head is the embedding table
    image_token_id: int = 151655  # <|image_pad|>: the placeholder of one image token
    video_token_id: int = 151656  # <|video_pad|>
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = None
    vision_config: VisionConfig = field(default_factory=lambda: VisionConfig(hidden_size=8192))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_type(self) -> str:
        """Return "default" (in the published files "mrope") or a type of `rope_types.py`."""
        name = self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "default"))
        return "default" if name == "mrope" else name

    def window(self, layer: int) -> int | None:
        """Return how many tokens a token attends to in this layer, itself included; None: all of them.

        Source: arXiv 2004.05150 §3.1.
        """
        if self.use_sliding_window and layer >= self.max_window_layers:
            return self.sliding_window
        return None

    def __post_init__(self):
        check_fields(self)
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):  # RoPE rotates pairs within a head
            raise ValueError(
                f"hidden_size: expected a multiple of 2 · {heads} heads, got {self.hidden_size}"
            )
        check_layer_count("num_hidden_layers", self.num_hidden_layers)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, "
                f"got {self.num_key_value_heads}"
            )
        check_activation("hidden_act", self.hidden_act)
        self.check_rope()
        if self.use_sliding_window and self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window: expected at least 1, got {self.sliding_window}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"attention_dropout: expected at least 0 and below 1, got {self.attention_dropout}"
            )
        if self.vision_config.hidden_size != self.hidden_size:
            raise ValueError(
                f"vision_config.hidden_size: expected the decoder's hidden_size "
                f"{self.hidden_size}, got {self.vision_config.hidden_size}"
            )
        if self.rope_type != "default":
            rope_types.check_parameters(
                self.rope_type, self.rope_scaling, self.head_dim, self.max_position_embeddings
            )

    def check_rope(self) -> None:
        """Raise ValueError if the fields of rope_scaling do not fit the heads or the type of RoPE."""
        section = self.rope_scaling.get("mrope_section")
        if not isinstance(section, list) or not all(is_integer(size) for size in section):
            raise ValueError(
                "rope_scaling's mrope_section: expected a list of integers, "
                f"got {reprlib.repr(section)}"
            )
        if min(section, default=0) < 0 or sum(section) != self.head_dim // 2:
            raise ValueError(
                "rope_scaling's mrope_section: expected sizes that sum to half the head width, "
                f"{self.head_dim // 2}, got {reprlib.repr(section)}"
            )
        if not isinstance(self.rope_type, str):
            got = reprlib.repr(self.rope_type)
            raise ValueError(f"rope_scaling's rope_type: expected a string, got {got}")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision → float32; float32 and float64 stay, so that a float64 run never rounds below it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------- attention
@dataclass
class AttentionPlan:
    """Who may look at whom: worked out once per forward pass, shared by all layers.

    With neither of the first three fields, everyone sees everyone.
    """

    way: str  # "plain", "sdpa" or "flash"
    causal: bool = False  # each token sees itself and all before it
    mask: Tensor | None = (
        None  # bool [B, 1, S, K], True = visible: where `causal` alone does not say it
    )
    slices: list[int] | None = (
        None  # [N] is cut into pieces of these lengths that do not see each other
    )
    packed: dict | None = None  # the same in flash-attn's terms, made only for that way
    dropout: float = 0.0  # the share of looks that is left out, by chance


def plan_vision(slices: list[int], way: str, device: torch.device) -> AttentionPlan:
    """A patch sees the patches of its own temporal slice; `slices` holds the number of patches of each."""
    if way != "flash":
        return AttentionPlan(way, slices=slices)
    from extras import flash

    return AttentionPlan(way, packed=flash.pack_slices(slices, device))


def plan_decoder(
    x: Tensor,
    cached: int,
    attention_mask: Tensor | None,
    way: str,
    window: int | None = None,
    dropout: float = 0.0,
) -> AttentionPlan:
    """A token of x [B, S, C] sees itself and those before it, cached and new, at most `window`, but no padding."""
    rows, new, total, device = x.shape[0], x.shape[1], cached + x.shape[1], x.device
    window = (
        None if window is None or window >= total else window
    )  # where it leaves nothing out, there is none
    if (
        attention_mask is not None and attention_mask.all()
    ):  # nothing is padded: the quick ways are open
        attention_mask = None
    if way == "flash" and new > 1:
        from extras import flash

        return AttentionPlan(
            way, packed=flash.pack_rows(x, cached, attention_mask, window, dropout)
        )
    if (
        way == "flash"
    ):  # one new token only reads the cache: nothing to gain, and packing would copy it all
        way = "sdpa"
    # PyTorch's causal flag aligns the first query with the first key, so it is right only if nothing is cached.
    if attention_mask is None and window is None and (cached == 0 or new == 1):
        return AttentionPlan(way, causal=new > 1, dropout=dropout)
    query, key = (
        torch.arange(cached, total, device=device)[:, None],
        torch.arange(total, device=device),
    )
    mask = (key <= query).expand(rows, 1, new, total)
    if window is not None:  # padding does not count: in a chat it stands between the turns, too
        place = key[None] if attention_mask is None else attention_mask.cumsum(1)  # [B, K]
        mask = mask & (place[:, None, cached:, None] - place[:, None, None] < window)
    if attention_mask is not None:
        # Padding sees itself, or its softmax would be 0/0 and the NaN would spread through the values.
        mask = mask & attention_mask[:, None, None].bool() | (key == query)
    return AttentionPlan(way, mask=mask, dropout=dropout)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q kᵀ / √D) v where the plan allows a look, in the way the plan names.

    q [B, H, S, D]; k, v [B, G, K, D], each key/value head shared by H / G query heads → [B, H, S, D].
    Source: "Attention Is All You Need" §3.2; grouped queries arXiv 2305.13245; flash-attn arXiv 2307.08691.
    """
    if plan.way == "flash":
        from extras import flash

        return flash.attention(q, k, v, **plan.packed)
    if plan.slices is not None and len(plan.slices) > 1:
        # No N×N product is ever made: equal slices stand side by side as a batch, unequal ones take turns.
        one = AttentionPlan(plan.way)
        if len(set(plan.slices)) == 1:
            q, k, v = (x[0].unflatten(1, (len(plan.slices), -1)).transpose(0, 1) for x in (q, k, v))
            return attention(q, k, v, one).transpose(0, 1).flatten(1, 2)[None]
        parts = zip(*(x.split(plan.slices, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*part, one) for part in parts], dim=2)
    if plan.way == "sdpa":
        shape, more = (
            q.shape,
            {"attn_mask": plan.mask, "is_causal": plan.causal, "dropout_p": plan.dropout},
        )
        if (
            shape[2] == 1
        ):  # the heads that share a key pass for queries of one head: far quicker than enable_gqa
            q = q.reshape(shape[0], k.shape[1], -1, shape[3])
        return F.scaled_dot_product_attention(
            q, k, v, enable_gqa=q.shape[1] != k.shape[1], **more
        ).reshape(shape)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [B, H, K, D]
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # [B, H, S, K]
    mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if plan.causal else plan.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(at_least_float32(scores).softmax(-1).to(q.dtype), plan.dropout) @ v


# ----------------------------------------------------------------------------------- rotary position embedding
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its angle. x [..., D]; cos and sin broadcast to it.

    Source: RoFormer, arXiv 2104.09864 §3.4, with halves instead of neighbours as pairs, as in the checkpoints.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(width: int, theta: float, like: Tensor) -> Tensor:
    """theta^(-2i/width) for i = 0 … width/2 - 1, in at least float32: [width / 2].

    Made anew on each call rather than kept as a buffer: a buffer would follow `model.to(bfloat16)` and ruin the
    angles, and would have no values on a model built on the meta device.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return 1.0 / theta ** (torch.arange(0, width, 2, device=like.device, dtype=dtype) / width)


def vision_rotary(
    grid_thw: list[list[int]], head_dim: int, merge: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D] that tell a patch its row and column; half of the angles belong to each.

    Patches come in the order of preprocessing, merge block by merge block, so their (y, x) must too.
    Source: transformers 5.23.0, `Qwen2VLVisionRotaryEmbedding`.
    """
    positions = []
    for t, h, w in grid_thw:
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        yx = torch.stack((y, x), dim=-1).view(h // merge, merge, w // merge, merge, 2)
        positions.append(
            yx.transpose(1, 2).reshape(h * w, 2).repeat(t, 1)
        )  # the same in each temporal slice
    positions = torch.cat(positions).to(like.device)  # [N, 2]
    angles = positions[..., None] * inverse_frequencies(
        head_dim // 2, 10000.0, like
    )  # [N, 2, D / 4]
    angles = angles.flatten(1).repeat(
        1, 2
    )  # [N, D]: y then x, and again for the second half of each pair
    return angles.cos(), angles.sin()


def multimodal_rotary(config: Config, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """M-RoPE: cos and sin [B, 1, S, D] from position_ids [3, B, S] (time, height, width), in `like`'s dtype.

    `mrope_section` deals the frequencies out, fast ones first: [16, 24, 24] gives the first 16 to time, the next
    24 to height, the last 24 to width. A word has three equal positions, which makes this plain 1-D rope for it.
    Source: arXiv 2409.12191 §2.1; transformers 5.23.0, `Qwen2VLRotaryEmbedding`.
    """
    section = config.rope_scaling["mrope_section"]
    axis = [
        i % 3 for i, count in enumerate(section) for _ in range(count)
    ]  # [D / 2], which row drives it
    positions = position_ids[axis].permute(1, 2, 0)  # [B, S, D / 2]
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, like)
    attention_scaling = 1.0
    if config.rope_type != "default":
        inv_freq, attention_scaling = rope_types.scale_inv_freq(
            config.rope_type,
            config.rope_scaling,
            inv_freq,
            seq_len=position_ids.amax((0, 2))[:, None, None] + 1,  # [B, 1, 1]
            head_dim=config.head_dim,
            theta=config.rope_theta,
            max_position_embeddings=config.max_position_embeddings,
        )
    angles = (positions * inv_freq).repeat(1, 1, 2)[:, None]  # [B, 1, S, D]
    cos = angles.cos() * attention_scaling
    sin = angles.sin() * attention_scaling
    return cos.to(like.dtype), sin.to(like.dtype)


def get_rope_index(
    config: Config, input_ids: Tensor, image_grid_thw: Tensor | None = None, video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The three positions of each token, and what to add to a row's length to get its next position.

    input_ids, attention_mask (1 real, 0 padding) [B, S]; grids [pictures or clips, 3] in patches, in reading order
    → position_ids int64 [3, B, S] (0 where padded), rope_deltas int64 [B, 1].

    A word takes one step on all three axes. A picture of T×H×W tokens starts at the next free position p and
    spans (p + t, p + y, p + x); the words after it go on at p + max(T, H, W), one after its largest position.
    Source: arXiv 2409.12191 §2.1 and Figure 3. (transformers 5.x goes on at p + max(H, W), so that words overlap
    the tail of a long clip; 4.x and the published weights follow the paper.)
    Raises ValueError if the placeholders in input_ids do not fit the grids.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    position_ids = ((mask.cumsum(1) - 1) * mask).repeat(
        3, 1, 1
    )  # right already where there are only words
    if image_grid_thw is not None or video_grid_thw is not None:
        grids = {
            config.image_token_id: iter([] if image_grid_thw is None else image_grid_thw.tolist()),
            config.video_token_id: iter([] if video_grid_thw is None else video_grid_thw.tolist()),
        }
        for row, real in enumerate(mask.bool()):
            positions = row_positions(
                input_ids[row, real].tolist(), grids, config.vision_config.spatial_merge_size
            )
            position_ids[:, row, real] = positions.to(input_ids.device)
        for token_id, rest in grids.items():
            if left := len(list(rest)):
                raise ValueError(f"{left} grids have no placeholders (id {token_id}) in input_ids")
    largest = position_ids.masked_fill(mask == 0, -1).amax((0, 2))[:, None]  # [B, 1]
    rope_deltas = largest + 1 - mask.sum(1, keepdim=True)
    return position_ids, rope_deltas


def row_positions(ids: list[int], grids: dict[int, Iterator[list[int]]], merge: int) -> Tensor:
    """The positions [3, S] of one row without padding; takes the next grid of a kind for each of its pictures."""
    start, p, parts = (
        0,
        0,
        [torch.zeros(3, 0, dtype=torch.long)],
    )  # a row may be empty: one that has ended, say
    while start < len(ids):
        token = ids[start]
        if token in grids:
            grid = next(grids[token], None)
            t, h, w = (grid[0], grid[1] // merge, grid[2] // merge) if grid else (0, 0, 0)
            end, step = start + t * h * w, max(t, h, w)
            if end == start or ids[start:end] != [token] * (end - start):
                raise ValueError(
                    f"the placeholders (id {token}) from token {start} on do not fit their grid: "
                    f"{'there is none left' if grid is None else f'{grid} makes {end - start} tokens'}"
                )
            block = torch.cartesian_prod(
                torch.arange(t), torch.arange(h), torch.arange(w)
            ).T  # [3, T·H·W]
        else:
            end = next((i for i in range(start, len(ids)) if ids[i] in grids), len(ids))
            step = end - start
            block = torch.arange(step).expand(3, -1)
        parts.append(p + block)
        start, p = end, p + step
    return torch.cat(parts, dim=1)


# ----------------------------------------------------------------------------------------- vision transformer
class PatchEmbed(nn.Module):
    """One patch → one vector."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # The published weight is that of a 3-D convolution whose stride equals its kernel. Then each patch meets
        # the kernel exactly once, and the convolution is one matrix product, which is far faster.
        self.proj = nn.Conv3d(
            config.in_channels, config.embed_dim, kernel, stride=kernel, bias=False
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)  # [E, channels · frames · height · width]
        return F.linear(pixel_values.to(weight.dtype), weight)  # [N, E]


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> Tensor:
        qkv = self.qkv(x).view(len(x), 3, self.num_heads, -1)  # [N, 3, H, D]
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # each [1, H, N, D]
        # Turned in float32, unlike in the decoder, and rounded back only after.
        q, k = (rotate(at_least_float32(y), cos, sin).to(x.dtype) for y in (q, k))
        out = attention(q, k, v, plan)  # [1, H, N, D]
        return self.proj(out[0].transpose(0, 1).flatten(1))  # [N, E]


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        inner = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, inner)
        self.fc2 = nn.Linear(inner, config.embed_dim)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, plan)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """A 2×2 block of patches → one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merged = config.embed_dim * config.spatial_merge_size**2  # 4E
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        # nn.GELU() is the exact one here; its tanh approximation would be off by 2e-3 in the logits.
        self.mlp = nn.Sequential(
            nn.Linear(self.merged, self.merged),
            nn.GELU(),
            nn.Linear(self.merged, config.hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        # The patches of a block are neighbours in memory (that is why preprocessing orders them so): merging
        # them is a view.
        return self.mlp(self.ln_q(x).view(-1, self.merged))  # [T, C]


class VisionTransformer(nn.Module):
    """Patches of pictures and clips of any sizes, end to end → image tokens, in the same order."""

    def __init__(self, config: VisionConfig, attention: str = "sdpa"):
        super().__init__()
        self.config, self.attention = config, attention
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """pixel_values [N, channels · frames · height · width of a patch], grid_thw [pictures, 3] → [T, C]."""
        grids, config = grid_thw.tolist(), self.config
        x = self.patch_embed(pixel_values)  # [N, E]
        if (expected := sum(t * h * w for t, h, w in grids)) != len(x):
            raise ValueError(f"pixel_values has {len(x)} patches, grid_thw {grids} says {expected}")
        head_dim = config.embed_dim // config.num_heads
        cos, sin = vision_rotary(grids, head_dim, config.spatial_merge_size, like=x)
        # A clip's frames do not see each other here; time is the decoder's business.
        plan = plan_vision([h * w for t, h, w in grids for _ in range(t)], self.attention, x.device)
        for block in self.blocks:
            x = block(x, cos, sin, plan)
        return self.merger(x)  # no norm in between, unlike most vision transformers


# --------------------------------------------------------------------------------------------------- decoder
class KVCache:
    """Keys and values of all tokens so far, and the next position of each sequence.

    Memory is allocated for `capacity` tokens, by default all of max_length, and doubled when that is full.
    """

    def __init__(
        self,
        config: Config,
        rows: int,
        max_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ):
        self.max_length = max_length
        self.length = 0  # tokens stored, padding included: the same for all sequences
        shape = (
            config.num_hidden_layers,
            rows,
            config.num_key_value_heads,
            max_length if capacity is None else capacity,
            config.head_dim,
        )
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.next_position = torch.zeros(rows, 1, dtype=torch.long, device=device)  # [B, 1]

    @property
    def capacity(self) -> int:
        """How many tokens there is memory for."""
        return self.keys.shape[3]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all. Raises ValueError for more than max_length."""
        if length > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, {length} are needed")
        if length <= self.capacity:
            return
        capacity = min(self.max_length, max(length, 2 * self.capacity))
        shape = (*self.keys.shape[:3], capacity, self.keys.shape[4])
        keys = self.keys.new_empty(shape)
        values = self.values.new_empty(shape)
        keys[..., : self.length, :] = self.keys[..., : self.length, :]
        values[..., : self.length, :] = self.values[..., : self.length, :]
        self.keys = keys
        self.values = values

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new k, v [B, G, S, D]; return all of them so far, [B, G, K, D], as views."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """x / rms(x) · weight: no mean, no bias. Source: arXiv 1910.07467."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(
            x
        )  # the sum of squares would lose its small terms in half precision
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        inner, shared = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner)  # q, k and v have biases, o has none
        self.k_proj = nn.Linear(config.hidden_size, shared)
        self.v_proj = nn.Linear(config.hidden_size, shared)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, cache: KVCache | None
    ) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # q [B, H, S, D]; k, v [B, G, S, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, G, K, D]
        out = attention(q, k, v, plan)  # [B, H, S, D]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, S, C]


class MLP(nn.Module):
    """SwiGLU: one projection gates the other. Source: arXiv 2002.05202."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.window = config.window(layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, plan, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedded words and pictures → what to say next, as vectors."""

    def __init__(self, config: Config, attention: str = "sdpa"):
        super().__init__()
        self.config, self.attention = config, attention
        table = torch.empty(
            config.vocab_size, config.hidden_size
        )  # "meta" would import torch._dynamo to draw it
        self.embed_tokens = nn.Embedding.from_pretrained(
            table if table.is_meta else table.normal_(), freeze=False
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.windows = {layer.window for layer in self.layers}  # {None} in the published models
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [B, S, C], position_ids [3, B, S], attention_mask [B, K] → [B, S, C]."""
        rows, new = x.shape[:2]
        total = new if cache is None else cache.length + new
        if cache is not None:
            cache.reserve(total)
        if attention_mask is not None and attention_mask.shape != (rows, total):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, expected {[rows, total]}"
            )
        cos, sin = multimodal_rotary(self.config, position_ids, like=x)
        dropout = self.config.attention_dropout if self.training else 0.0
        plans = {
            w: plan_decoder(x, total - new, attention_mask, self.attention, w, dropout)
            for w in self.windows
        }
        for layer in self.layers:
            x = layer(x, cos, sin, plans[layer.window], cache)
        if cache is not None:
            cache.length = total
        return self.norm(x)


# -------------------------------------------------------------------------------------------------- the model
class Qwen2VL(nn.Module):
    """The whole: pictures become tokens, stand in the text where their placeholders stood, and are read with it."""

    def __init__(self, config: Config, attention: str = "sdpa"):
        """attention: "plain" (the textbook lines), "sdpa" (PyTorch's fused kernels) or "flash" (flash-attn)."""
        super().__init__()
        if attention not in ("plain", "sdpa", "flash"):
            raise ValueError(f"attention is {attention!r}, expected 'plain', 'sdpa' or 'flash'")
        self.config = config
        self.visual = VisionTransformer(config.vision_config, attention)
        self.model = Decoder(config, attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.generation_config: dict = {}  # generation_config.json, where the checkpoint has one

    def tie_weights(self) -> None:
        """One table both embeds a token and scores it, in the small models (`tie_word_embeddings`)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(
        self, input_ids: Tensor, token_id: int, pixels: Tensor, grid_thw: Tensor, x: Tensor
    ) -> Tensor:
        """x [B, S, C] with the tokens of pictures or clips in the place of their placeholders, in reading order."""
        features = self.visual(pixels, grid_thw)  # [T, C]
        places = input_ids == token_id  # [B, S]
        if (count := int(places.sum())) != len(features):
            raise ValueError(
                f"input_ids has {count} placeholders (id {token_id}), grid_thw {len(features)}"
            )
        return x.masked_scatter(
            places[..., None], features.to(x.dtype)
        )  # they differ under autocast, in training

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        cache: KVCache | None = None, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None, video_grid_thw: Tensor | None = None, logits_to_keep: int = 0,
    ) -> Tensor:  # fmt: skip
        """Logits [B, S, V] of the token after each of input_ids [B, S].

        attention_mask [B, K]: 1 real, 0 padding (on the left), over cached and new tokens; None: all are real.
        position_ids [3, B, S]: by default get_rope_index of the new tokens, going on where the cache stands.
        cache: what earlier calls computed; the new tokens are added to it.
        pixel_values, image_grid_thw (and the same for videos): the pictures of *these* input_ids only, so a
        decode step passes none and the vision transformer runs once per picture.
        logits_to_keep: score only the last so many positions (0: all); a prefill needs just one.
        """
        config = self.config
        x = self.model.embed_tokens(input_ids)  # [B, S, C]
        if pixel_values is not None:
            x = self.embed(input_ids, config.image_token_id, pixel_values, image_grid_thw, x)
        if pixel_values_videos is not None:
            x = self.embed(input_ids, config.video_token_id, pixel_values_videos, video_grid_thw, x)
        if position_ids is None:
            new_mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            position_ids, rope_deltas = get_rope_index(
                config, input_ids, image_grid_thw, video_grid_thw, new_mask
            )
            if cache is not None:
                # Positions only ever count on from the largest so far, so new tokens are numbered by themselves
                # and moved: the same line serves a prefill, a decode step and the next turn of a chat.
                position_ids = position_ids + cache.next_position
                length = input_ids.shape[1] if new_mask is None else new_mask.sum(1, keepdim=True)
                cache.next_position = cache.next_position + length + rope_deltas
        x = self.model(x, position_ids, attention_mask, cache)  # [B, S, C]
        return self.lm_head(x[:, -logits_to_keep:])
