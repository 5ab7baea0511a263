"""Qwen2-VL: token ids and image patches in, logits out.

Read from top to bottom, in the order in which data meets the parts: the configuration, the vision
encoder that turns patches into tokens, the three positions of each token, the decoder, and the
model that joins them. Attention comes right before the first layer that calls it. Plain PyTorch, no
files, no network: `preprocess.py` makes the batch, `load_weights.py` fills the parameters,
`generate.py` turns logits into text. Parameters carry the names of the published checkpoint.

Sources: "Qwen2-VL" (arXiv 2409.12191) for the design; transformers 5.23.0,
`models/qwen2_vl`, for the numerics.

Shapes: B batch size, S new tokens, K all tokens so far (cached + new),
        C width of the decoder (hidden_size), H query heads, G key/value heads (G divides H),
        D width of one head, V vocabulary, N patches of all images and videos together,
        E width of the vision encoder (embed_dim),
        T vision tokens (N / 4: a 2×2 block of patches becomes one token).
"""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rope_types
from config_fields import Positive, Size, check_fields, is_integer
from cpu_attention import block_attention, is_faster_in_blocks
from linear import Linear, fast_linear


# ------------------------------------------------------------------------------------ configuration
def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that CLIP-like vision encoders were trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU. The published models use the exact one (in `PatchMerger`)."""
    return F.gelu(x, approximate="tanh")


# By the names of transformers 5.23.0, `activations.py`. The published
# models have "silu" and "quick_gelu".
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
}


MAX_LAYERS = 1000  # a larger number is a damaged file, and building the layers would never end


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

    Raises ValueError for a value of the wrong type or out of range, and for
    fields that contradict each other.
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

    def __post_init__(self) -> None:
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
    """The fields of config.json that shape the computation.

    A field absent from the file has the reference's default.
    Raises ValueError for a value of the wrong type or out of range, for fields that contradict each
    other, and for what this file does not compute.
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
    initializer_range: Positive = 0.02  # standard deviation of a new model's weights
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
        """Return how many tokens a token of this layer attends to, with itself; None: all of them.

        Source: arXiv 2004.05150 §3.1.
        """
        if self.use_sliding_window and layer >= self.max_window_layers:
            return self.sliding_window
        return None

    def __post_init__(self) -> None:
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
        """Raise ValueError if rope_scaling does not fit the heads or the type of RoPE."""
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
    """Upcast half precision to float32.

    float32 and float64 stay, so that a float64 run never rounds below it.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------- rotary position embedding (RoPE)
def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle. x [..., D]; cos and sin broadcast to it.

    Source: RoFormer, arXiv 2104.09864 §3.4, with halves instead of neighbors
    as pairs, as in the checkpoints.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos + rotated * sin


def compute_inv_freq(width: int, theta: float, like: Tensor) -> Tensor:
    """Return theta^(-2i/width) for i = 0 … width/2 - 1, in at least float32: [width / 2].

    Computed on each call rather than kept as a buffer: a buffer would follow `model.to(bfloat16)`
    and ruin the angles, and would have no values on a model built on the meta device.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=like.device, dtype=dtype) / width
    return 1.0 / theta**exponents


def vision_rotary_embedding(
    grid_thw: list[list[int]], head_dim: int, merge_size: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [N, D] for each patch: half of the angles encode its row, half its column.

    Patches come in the order of preprocessing, merge block by merge block; so do their (y, x).
    Source: transformers 5.23.0, `Qwen2VLVisionRotaryEmbedding`.
    """
    positions_per_image = []
    for t, h, w in grid_thw:
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        yx = torch.stack((y, x), dim=-1)  # [h, w, 2]
        blocks = yx.view(h // merge_size, merge_size, w // merge_size, merge_size, 2)
        yx = blocks.transpose(1, 2).reshape(h * w, 2)  # merge block by merge block
        positions_per_image.append(yx.repeat(t, 1))  # the same in each temporal slice
    positions = torch.cat(positions_per_image).to(like.device)  # [N, 2]
    inv_freq = compute_inv_freq(head_dim // 2, 10000.0, like)  # [D / 4]
    angles = (positions[..., None] * inv_freq).flatten(1)  # [N, D / 2]: y, then x
    angles = angles.repeat(1, 2)  # [N, D]: the same for both halves of each pair
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------------------------- attention
@dataclass
class AttentionContext:
    """Which queries attend to which keys: computed once per forward pass, shared by all layers.

    Without any of the fields, every query attends to every key. The first three serve eager and
    sdpa attention; the others hold the same facts in the packed form of flash-attn: all
    sequences end to end, without padding.
    """

    causal: bool = False  # each token attends to itself and to all before it
    mask: Tensor | None = None  # bool [B, 1, S, K], True: attends; where `causal` is not enough
    seqlens: list[int] | None = None  # S holds several sequences of these lengths, end to end
    cu_seqlens_q: Tensor | None = (
        None  # int32 [sequences + 1]: where each sequence begins, and the end
    )
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    unpadded_q: Tensor | None = None  # which rows of [B·S] are no padding; None: all
    unpadded_k: Tensor | None = None
    window: int | None = None  # how many tokens a token attends to, itself included; None: all
    dropout: float = 0.0  # share of attention weights set to zero at random, in training


def repeat_heads(x: Tensor, count: int) -> Tensor:
    """Return keys or values [B, G, K, D] as [B, count, K, D], once for each query head."""
    return x.repeat_interleave(count // x.shape[1], dim=1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Compute softmax(q kᵀ / √D) v, one line per step of the formula.

    q [B, H, S, D]; k, v [B, G, K, D], each head shared by H / G query heads → [B, H, S, D].
    Source: "Attention Is All You Need" §3.2; grouped queries arXiv 2305.13245.
    """
    if context.seqlens is not None:
        return attend_per_sequence(eager_attention, q, k, v, context.seqlens)
    k = repeat_heads(k, q.shape[1])  # [B, H, K, D]
    v = repeat_heads(v, q.shape[1])
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # [B, H, S, K]
    mask = context.mask
    if context.causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = at_least_float32(scores).softmax(-1).to(q.dtype)
    return F.dropout(weights, context.dropout) @ v


FEW_QUERIES = 12  # up to so many new tokens, heads that share a key are faster as its queries


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """The same by PyTorch's fused kernels, which hold no [S, K] scores.

    Shapes as in `eager_attention`. Long sequences on a CPU where those are slow: in blocks.
    """
    if context.seqlens is not None:
        return attend_per_sequence(sdpa_attention, q, k, v, context.seqlens)
    shape = q.shape
    mask = context.mask
    if mask is None and context.dropout == 0 and is_faster_in_blocks(q, k):
        return block_attention(q, k, v, context.causal)
    if shape[2] <= FEW_QUERIES and not context.causal:
        # A few new tokens: the query heads that share a key pass as queries of one head, which
        # is far faster than to repeat the keys.
        q = q.reshape(shape[0], k.shape[1], -1, shape[3])  # [B, G, H / G · S, D]
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, shape[1] // k.shape[1], 1)  # [B, 1, H / G · S, K]
    else:
        # enable_gqa has no fused kernel on CPUs before torch 2.9, nor with a mask on GPUs: PyTorch
        # would then compute all [S, K] scores.
        k = repeat_heads(k, shape[1])
        v = repeat_heads(v, shape[1])
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=context.causal,
        dropout_p=context.dropout,
    )
    return out.reshape(shape)


def attend_per_sequence(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, seqlens: list[int]
) -> Tensor:
    """Attend within each of the sequences that lie end to end in q, k, v [1, H, N, D].

    No N×N matrix is ever built: sequences of one length become the batch
    dimension, others follow one another.
    """
    context = AttentionContext()
    if len(set(seqlens)) > 1:
        parts = zip(q.split(seqlens, 2), k.split(seqlens, 2), v.split(seqlens, 2), strict=True)
        return torch.cat([attend(*part, context) for part in parts], dim=2)
    q = q[0].unflatten(1, (len(seqlens), -1)).transpose(0, 1)  # [sequences, H, length, D]
    k = k[0].unflatten(1, (len(seqlens), -1)).transpose(0, 1)
    v = v[0].unflatten(1, (len(seqlens), -1)).transpose(0, 1)
    out = attend(q, k, v, context)
    return out.transpose(0, 1).flatten(1, 2)[None]  # [1, H, N, D]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """The same by flash-attn (CUDA, half precision), which takes packed sequences.

    Padding gives zeros.
    Shapes as in `eager_attention`.
    Source: arXiv 2307.08691; flash-attn 2, `flash_attn_varlen_func`.
    """
    if context.cu_seqlens_q is None:
        # One new token per sequence only reads the cache: nothing to gain,
        # and packing would copy all of it.
        return sdpa_attention(q, k, v, context)
    from flash_attn import flash_attn_varlen_func

    batch_size = q.shape[0]
    q = q.transpose(1, 2).flatten(0, 1)  # [B·S, H, D]
    k = k.transpose(1, 2).flatten(0, 1)  # [B·K, G, D]
    v = v.transpose(1, 2).flatten(0, 1)
    out = torch.zeros_like(q)
    if context.unpadded_q is not None:
        q = q[context.unpadded_q]
        k = k[context.unpadded_k]
        v = v[context.unpadded_k]
    packed = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=context.cu_seqlens_q,
        cu_seqlens_k=context.cu_seqlens_k,
        max_seqlen_q=context.max_seqlen_q,
        max_seqlen_k=context.max_seqlen_k,
        dropout_p=context.dropout,
        causal=context.causal,  # aligns the last query with the last key of a sequence
        window_size=(-1 if context.window is None else context.window - 1, -1),
    )
    if context.unpadded_q is None:
        out = packed
    else:
        out[context.unpadded_q] = packed
    return out.unflatten(0, (batch_size, -1)).transpose(1, 2)  # [B, H, S, D]


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention, "flash": flash_attention}


def cumulative_seqlens(seqlens: Tensor) -> Tensor:
    """Lengths [sequences] → offsets int32 [sequences + 1], which begin with 0."""
    return F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))


def vision_attention_context(grid_thw: list[list[int]], device: torch.device) -> AttentionContext:
    """Return the context in which a patch attends to the patches of its own temporal slice.

    Each slice of h·w patches is a sequence.
    """
    seqlens = []
    for t, h, w in grid_thw:
        seqlens += [h * w] * t
    cu_seqlens = cumulative_seqlens(torch.tensor(seqlens)).to(device)
    longest = max(seqlens)
    return AttentionContext(
        seqlens=seqlens if len(seqlens) > 1 else None,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )


# ---------------------------------------------------------------------------------- residual blocks
def run_block(block: nn.Module, checkpointing: bool, x: Tensor, *arguments: Any) -> Tensor:
    """Return block(x, *arguments).

    checkpointing: keep nothing but x for the backward pass, which computes the rest once more: a
    third more work, for memory that no longer grows with what is inside a block. Without gradients
    it changes nothing. Source: arXiv 1604.06174.
    """
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, *arguments, use_reentrant=False)
    return block(x, *arguments)


# ----------------------------------------------------------------------------------- vision encoder
class PatchEmbed(nn.Module):
    """One patch → one vector."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # The published weight is that of a 3-D convolution whose stride equals its
        # kernel. Then each patch meets the kernel exactly once, and the convolution is
        # one matmul, which is far faster.
        self.proj = nn.Conv3d(
            config.in_channels, config.embed_dim, kernel, stride=kernel, bias=False
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)  # [E, channels · frames · height · width]
        return fast_linear(pixel_values.to(weight.dtype), weight)  # [N, E]


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, attn_implementation: str):
        super().__init__()
        self.num_heads = config.num_heads
        self.attend = ATTENTION[attn_implementation]
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        qkv = self.qkv(x).view(len(x), 3, self.num_heads, -1)  # [N, 3, H, D]
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # each [1, H, N, D]
        # Rotated in float32, unlike in the decoder, and rounded back only after.
        q = apply_rotary_pos_emb(at_least_float32(q), cos, sin).to(x.dtype)
        k = apply_rotary_pos_emb(at_least_float32(k), cos, sin).to(x.dtype)
        out = self.attend(q, k, v, context)  # [1, H, N, D]
        return self.proj(out[0].transpose(0, 1).flatten(1))  # [N, E]


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        inner = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, inner)
        self.fc2 = Linear(inner, config.embed_dim)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, attn_implementation: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config, attn_implementation)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, context)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """A 2×2 block of patches → one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merged_width = config.embed_dim * config.spatial_merge_size**2  # 4E
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        # nn.GELU() is the exact one; its tanh approximation would be off by 2e-3 in the logits.
        self.mlp = nn.Sequential(
            Linear(self.merged_width, self.merged_width),
            nn.GELU(),
            Linear(self.merged_width, config.hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        # The patches of a block are neighbors in memory (that is why preprocessing orders
        # them so): merging them is a view.
        return self.mlp(self.ln_q(x).view(-1, self.merged_width))  # [T, C]


class VisionTransformer(nn.Module):
    """Patches of images and videos of any size, end to end → vision tokens, in the same order."""

    def __init__(self, config: VisionConfig, attn_implementation: str = "sdpa"):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(VisionBlock(config, attn_implementation))
        self.merger = PatchMerger(config)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Return the vision tokens [T, C].

        pixel_values [N, channels · frames · height · width of a patch], grid_thw [images, 3].
        """
        grids = grid_thw.tolist()
        expected = sum(t * h * w for t, h, w in grids)
        if expected != len(pixel_values):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} patches, expected {expected} "
                f"for grid_thw {grids}"
            )
        x = self.patch_embed(pixel_values)  # [N, E]
        head_dim = self.config.embed_dim // self.config.num_heads
        cos, sin = vision_rotary_embedding(grids, head_dim, self.config.spatial_merge_size, like=x)
        # Frames do not attend to each other here; time is the decoder's business.
        context = vision_attention_context(grids, x.device)
        for block in self.blocks:
            x = run_block(block, self.gradient_checkpointing, x, cos, sin, context)
        return self.merger(x)  # no norm in between, unlike most vision transformers


# -------------------------------------------------------------------------------- positions: M-RoPE
def get_rope_index(
    config: Config,
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the three positions of each token, and the offset from a length to the next position.

    input_ids, attention_mask (1 real, 0 padding) [B, S]; grids [images or videos, 3] in patches, in
    reading order → position_ids int64 [3, B, S] (0 where padded), rope_deltas int64 [B, 1].

    Source: arXiv 2409.12191 §2.1 and Figure 3. (transformers 5.x continues after a
    video at p + max(H, W), so that text overlaps the tail of a long one; 4.x and the
    published weights follow the paper.)
    Raises ValueError if the placeholders in input_ids do not match the grids.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    mask = attention_mask.long()
    position_ids = ((mask.cumsum(1) - 1) * mask).repeat(3, 1, 1)  # correct where there is only text
    if image_grid_thw is not None or video_grid_thw is not None:
        grids = {
            config.image_token_id: [] if image_grid_thw is None else image_grid_thw.tolist(),
            config.video_token_id: [] if video_grid_thw is None else video_grid_thw.tolist(),
        }
        merge_size = config.vision_config.spatial_merge_size
        for b, real in enumerate(mask.bool()):
            ids = input_ids[b, real].tolist()
            spans = find_vision_spans(ids, grids, merge_size)
            position_ids[:, b, real] = sequence_positions(len(ids), spans).to(input_ids.device)
        for token_id, unused in grids.items():
            if unused:
                raise ValueError(
                    f"input_ids has no placeholders (id {token_id}) for {len(unused)} of the grids"
                )
    largest = position_ids.masked_fill(mask == 0, -1).amax((0, 2))[:, None]  # [B, 1]
    rope_deltas = largest + 1 - mask.sum(1, keepdim=True)
    return position_ids, rope_deltas


def find_vision_spans(
    ids: list[int], grids: dict[int, list[list[int]]], merge_size: int
) -> list[tuple[int, list[int]]]:
    """Pair each run of placeholders in a sequence with its grid.

    Return [(start, merged grid [T, H, W]), ...].
    grids: by placeholder id, in patches; a grid that is used is removed from its list.
    """
    spans = []
    start = 0
    while start < len(ids):
        token_id = ids[start]
        if token_id not in grids:
            start += 1
            continue
        if not grids[token_id]:
            raise ValueError(
                f"there is no grid for the placeholders (id {token_id}) at token {start}"
            )
        t, h, w = grids[token_id].pop(0)
        merged = [t, h // merge_size, w // merge_size]
        end = start + math.prod(merged)
        if end == start or ids[start:end] != [token_id] * (end - start):
            raise ValueError(
                f"the placeholders (id {token_id}) at token {start} do not match their grid: "
                f"{[t, h, w]} makes {end - start} tokens"
            )
        spans.append((start, merged))
        start = end
    return spans


def sequence_positions(length: int, spans: list[tuple[int, list[int]]]) -> Tensor:
    """Return the positions [3, S] of one sequence of `length` tokens with vision tokens at `spans`.

    A text token takes one step on all three axes. An image of T×H×W tokens starts at the next free
    position p and spans (p + t, p + y, p + x); the text after it continues at p + max(T, H, W),
    one after its largest position.
    """
    positions = [torch.zeros(3, 0, dtype=torch.long)]  # a sequence may be empty
    p = 0  # the next free position
    end = 0  # of what has been numbered so far
    for start, (t, h, w) in spans:
        text = torch.arange(start - end).expand(3, -1)
        positions.append(p + text)
        p += start - end
        block = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
        positions.append(p + block)  # [3, T·H·W]
        p += max(t, h, w)
        end = start + t * h * w
    positions.append(p + torch.arange(length - end).expand(3, -1))
    return torch.cat(positions, dim=1)


def multimodal_rotary_embedding(
    config: Config, position_ids: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, 1, S, D] of M-RoPE, in `like`'s dtype.

    position_ids [3, B, S]: time, height and width.
    `mrope_section` splits the frequencies, fast ones first: [16, 24, 24] gives the first 16 to
    time, the next 24 to height, the last 24 to width. A text token has three equal positions,
    which makes this 1-D RoPE for it.
    Source: arXiv 2409.12191 §2.1; transformers 5.23.0, `Qwen2VLRotaryEmbedding`.
    """
    axis = []  # [D / 2]: which of the three positions drives a frequency
    for i, count in enumerate(config.rope_scaling["mrope_section"]):
        axis += [i % 3] * count
    positions = position_ids[axis].permute(1, 2, 0)  # [B, S, D / 2]
    inv_freq = compute_inv_freq(config.head_dim, config.rope_theta, like)  # [D / 2]
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


# ------------------------------------------------------------------------------------------ decoder
class KVCache:
    """Keys and values of all tokens so far, and the next position of each sequence.

    Memory is allocated for `capacity` tokens, by default all of max_length,
    and doubled when that is full.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ):
        self.max_length = max_length
        self.length = 0  # tokens stored, padding included: the same for all sequences
        shape = (
            config.num_hidden_layers,
            batch_size,
            config.num_key_value_heads,
            max_length if capacity is None else capacity,
            config.head_dim,
        )
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.next_position = torch.zeros(batch_size, 1, dtype=torch.long, device=device)  # [B, 1]

    @property
    def capacity(self) -> int:
        """How many tokens there is memory for."""
        return self.keys.shape[3]

    def reserve(self, length: int) -> None:
        """Reserve memory for `length` tokens in all. Raises ValueError for more than max_length."""
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

    def set_length(self, length: int) -> None:
        """Let go of the tokens after the first `length`, or take back some that were let go of.

        They are text, in which each token is one position. What is let go of stays in memory until
        other tokens are stored there or the memory grows.
        """
        self.next_position = self.next_position + (length - self.length)
        self.length = length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new k, v [B, G, S, D]; return views of all so far, [B, G, K, D]."""
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
        # In half precision the sum of squares would lose its small terms.
        upcast = at_least_float32(x)
        normalized = upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: G key/value heads serve H query heads.

    Source: arXiv 2305.13245.
    """

    def __init__(self, config: Config, layer: int, attn_implementation: str):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.attend = ATTENTION[attn_implementation]
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)  # q, k, v have biases, o none
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: AttentionContext,
        cache: KVCache | None,
    ) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, G, S, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = apply_rotary_pos_emb(q, cos, sin)
        k = apply_rotary_pos_emb(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, G, K, D]
        out = self.attend(q, k, v, context)  # [B, H, S, D]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, S, C]


class MLP(nn.Module):
    """SwiGLU: one projection gates the other. Source: arXiv 2002.05202."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, layer: int, attn_implementation: str):
        super().__init__()
        self.window = config.window(layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, attn_implementation)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: AttentionContext,
        cache: KVCache | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def decoder_attention_context(
    x: Tensor,
    cached: int,
    attention_mask: Tensor | None,
    attn_implementation: str,
    window: int | None = None,
    dropout: float = 0.0,
) -> AttentionContext:
    """Return the context in which a token of x [B, S, C] attends to itself and those before it.

    Those are cached and new tokens, at most `window`, and no padding.
    attention_mask [B, K]: 1 real, 0 padding; None: nothing is padded.
    """
    new = x.shape[1]
    if window is not None and window >= cached + new:
        window = None  # it leaves nothing out
    if attention_mask is not None and attention_mask.all():
        attention_mask = None  # nothing is padded: the fast kernels need no mask
    if attn_implementation == "flash" and new > 1:
        return packed_attention_context(x, cached, attention_mask, window, dropout)
    # PyTorch's causal flag aligns the first query with the first key, so it is
    # right only if nothing is cached.
    flag_is_enough = cached == 0 or new == 1
    if flag_is_enough and attention_mask is None and window is None:
        return AttentionContext(causal=new > 1, dropout=dropout)
    mask = decoder_mask(x, cached, attention_mask, window)
    return AttentionContext(mask=mask, dropout=dropout)


def decoder_mask(
    x: Tensor, cached: int, attention_mask: Tensor | None, window: int | None
) -> Tensor:
    """Return the dense form, bool [B, 1, S, K], of what `decoder_attention_context` describes."""
    batch_size, new = x.shape[:2]
    total = cached + new
    query = torch.arange(cached, total, device=x.device)[:, None]  # [S, 1]
    key = torch.arange(total, device=x.device)  # [K]
    mask = (key <= query).expand(batch_size, 1, new, total)
    if window is not None:
        # Distances count real tokens only: in a batched chat, padding lies between the turns, too.
        index = key[None] if attention_mask is None else attention_mask.cumsum(1)  # [B or 1, K]
        distance = index[:, None, cached:, None] - index[:, None, None]
        mask = mask & (distance < window)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
        # Padding attends to itself, or its softmax would be 0/0 and the NaN
        # would spread through the values.
        mask = mask | (key == query)
    return mask


def packed_attention_context(
    x: Tensor, cached: int, attention_mask: Tensor | None, window: int | None, dropout: float
) -> AttentionContext:
    """Return the same in the form that flash-attn takes.

    Each batch element is a sequence without its padding.
    """
    batch_size, new = x.shape[:2]
    total = cached + new
    if attention_mask is None:
        lengths_q = torch.full((batch_size,), new, device=x.device)
        lengths_k = torch.full((batch_size,), total, device=x.device)
        unpadded_q = unpadded_k = None
    else:
        new_mask = attention_mask[:, cached:]
        lengths_q = new_mask.sum(1)
        lengths_k = attention_mask.sum(1)
        unpadded_q = new_mask.flatten().nonzero()[:, 0]
        unpadded_k = attention_mask.flatten().nonzero()[:, 0]
    return AttentionContext(
        causal=True,
        cu_seqlens_q=cumulative_seqlens(lengths_q),
        cu_seqlens_k=cumulative_seqlens(lengths_k),
        max_seqlen_q=int(lengths_q.max()),
        max_seqlen_k=int(lengths_k.max()),
        unpadded_q=unpadded_q,
        unpadded_k=unpadded_k,
        window=window,
        dropout=dropout,
    )


class Decoder(nn.Module):
    """Embedded tokens → hidden states from which the next token is predicted."""

    def __init__(self, config: Config, attn_implementation: str = "sdpa"):
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for layer in range(config.num_hidden_layers):
            self.layers.append(DecoderLayer(config, layer, attn_implementation))
        # {None} in the published models
        self.windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [B, S, C], position_ids [3, B, S], attention_mask [B, K] → [B, S, C]."""
        batch_size, new = x.shape[:2]
        cached = 0 if cache is None else cache.length
        total = cached + new
        if cache is not None:
            cache.reserve(total)
        if attention_mask is not None and attention_mask.shape != (batch_size, total):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, expected {[batch_size, total]}"
            )
        cos, sin = multimodal_rotary_embedding(self.config, position_ids, like=x)
        dropout = self.config.attention_dropout if self.training else 0.0
        contexts: dict[Any, AttentionContext] = {}  # by window
        for window in self.windows:
            contexts[window] = decoder_attention_context(
                x, cached, attention_mask, self.attn_implementation, window, dropout
            )
        # A layer that is computed twice would store its keys twice.
        checkpointing = self.gradient_checkpointing and cache is None
        for layer in self.layers:
            x = run_block(layer, checkpointing, x, cos, sin, contexts[layer.window], cache)
        if cache is not None:
            cache.length = total
        return self.norm(x)


# ---------------------------------------------------------------------------------------- the model
class Qwen2VL(nn.Module):
    """The whole model: vision tokens replace their placeholders and are read with the text."""

    def __init__(self, config: Config, attn_implementation: str = "sdpa"):
        """Build the model with the published initialization.

        attn_implementation: "eager" (the formula line by line), "sdpa" (PyTorch's fused
        kernels) or "flash" (flash-attn).
        """
        super().__init__()
        if attn_implementation == "plain":
            warnings.warn('attn_implementation "plain" is now called "eager"', stacklevel=2)
            attn_implementation = "eager"
        if attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation is {attn_implementation!r}, "
                f"expected one of {', '.join(ATTENTION)}"
            )
        self.config = config
        self.attn_implementation = attn_implementation
        self.visual = VisionTransformer(config.vision_config, attn_implementation)
        self.model = Decoder(config, attn_implementation)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.apply(self.init_weights)
        self.generation_config: dict = {}  # generation_config.json, where the checkpoint has one

    def tie_weights(self) -> None:
        """Use one matrix to embed a token and to score it, where `tie_word_embeddings` is true."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def enable_gradient_checkpointing(self) -> None:
        """Let `run_block` compute each block twice in training, for less memory."""
        self.visual.gradient_checkpointing = True
        self.model.gradient_checkpointing = True

    def init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights from N(0, initializer_range²); biases are 0.

        Norms are constructed with their values, weights of 1.
        Source: transformers 5.23.0, `PreTrainedModel._init_weights`.
        """
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)

    def merge_vision_features(
        self,
        x: Tensor,
        input_ids: Tensor,
        token_id: int,
        pixel_values: Tensor,
        grid_thw: Tensor | None,
    ) -> Tensor:
        """Return x [B, S, C] with vision tokens for the placeholders `token_id`, in order."""
        if grid_thw is None:
            raise ValueError("expected a grid_thw with the pixel values, got None")
        features = self.visual(pixel_values, grid_thw)  # [T, C]
        placeholders = input_ids == token_id  # [B, S]
        count = int(placeholders.sum())
        if count != len(features):
            raise ValueError(
                f"input_ids has {count} placeholders (id {token_id}), "
                f"expected {len(features)} for grid_thw"
            )
        # The dtypes differ under autocast, in training.
        return x.masked_scatter(placeholders[..., None], features.to(x.dtype))

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, C] after the last norm, before `lm_head`.

        input_ids [B, S] int64; attention_mask [B, K]: 1 real, 0 padding (on the
        left), over cached and new tokens;
        None: all are real.
        position_ids [3, B, S]: by default `get_rope_index` of the new
        tokens, continued from the cache.
        cache: what earlier calls computed; the new tokens are added to it.
        pixel_values, image_grid_thw (and the same for videos): the images of *these* input_ids
        only, so a decode step passes none and the vision encoder runs once per image.
        inputs_embeds [B, S, C]: take the place of the embedded input_ids, which are then needed
        only to locate placeholders and may be left out for text.

        Source: transformers 5.23.0, `Qwen2VLModel.forward`, whose `last_hidden_state` this equals.
        """
        config = self.config
        if input_ids is None:
            input_ids = text_ids_for(inputs_embeds, pixel_values, pixel_values_videos)
        x = (
            self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        )  # [B, S, C]
        if pixel_values is not None:
            x = self.merge_vision_features(
                x, input_ids, config.image_token_id, pixel_values, image_grid_thw
            )
        if pixel_values_videos is not None:
            x = self.merge_vision_features(
                x, input_ids, config.video_token_id, pixel_values_videos, video_grid_thw
            )
        if position_ids is None:
            new_mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            position_ids, rope_deltas = get_rope_index(
                config, input_ids, image_grid_thw, video_grid_thw, new_mask
            )
            if cache is not None:
                # Positions only ever count on from the largest so far, so new tokens are
                # numbered by themselves and shifted: the same line serves a prefill, a decode
                # step and the next turn of a chat.
                position_ids = position_ids + cache.next_position
                new_length: int | Tensor = input_ids.shape[1]
                if new_mask is not None:
                    new_length = new_mask.sum(1, keepdim=True)  # [B, 1]
                cache.next_position = cache.next_position + new_length + rope_deltas
        return self.model(x, position_ids, attention_mask, cache)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits [B, S, V] of the token after each of input_ids [B, S].

        The arguments up to inputs_embeds are those of `hidden_states`.
        labels [B, S]: the ids themselves, -100 where the loss is not to count;
        then (loss, logits) is returned.
        logits_to_keep: score only the last so many positions (0: all); a prefill needs just one.
        """
        x = self.hidden_states(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            inputs_embeds,
        )  # [B, S, C]
        logits = self.lm_head(x[:, -logits_to_keep:])
        if labels is None:
            return logits
        return next_token_loss(logits, labels), logits


def text_ids_for(inputs_embeds: Tensor | None, *pixels: Tensor | None) -> Tensor:
    """Return ids [B, S] in place of embeddings of text: no id is a placeholder.

    Raises ValueError.
    """
    if inputs_embeds is None:
        raise ValueError("expected input_ids or inputs_embeds, got neither")
    if any(values is not None for values in pixels):
        raise ValueError(
            "images and videos need input_ids beside inputs_embeds, to find their places"
        )
    return torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [B, S, V] at the labels [B, S] shifted by one.

    Labels of -100 are left out.
    Source: transformers 5.23.0, `ForCausalLMLoss`.
    """
    predictions = at_least_float32(logits[:, :-1]).flatten(0, 1)
    return F.cross_entropy(predictions, labels[:, 1:].flatten(), ignore_index=-100)
