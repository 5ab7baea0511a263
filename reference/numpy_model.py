"""The whole of Qwen2-VL in float64 NumPy, straight from the formulas: the ground truth.

    config, weights, ids, patches, grids ── run ──> logits, positions, features, hidden states

It shares no line with `qwen2vl.py`. One sequence, no cache, no batch, no optimization: each
function is one formula of the paper (arXiv 2409.12191) or of the published checkpoint, so that it
can be checked by reading. The error of a float32 or half-precision run is its distance from this
one.

    config    config.json as a dict in the hub's flat layout, or a `qwen2vl.Config`
    weights   {tensor name in the published checkpoint: float64 array}

It computes what the published configurations use, and the sliding window; `check_config` refuses
the rest.

Sources: "Qwen2-VL", arXiv 2409.12191; transformers 5.23.0, `models/qwen2_vl/modeling_qwen2_vl.py`.

Shapes: S tokens of the sequence, C their width (hidden_size), V vocabulary,
        N patches of all images, E their width (embed_dim),
        T image tokens (N / 4: one for a 2×2 block of patches),
        H heads, G key/value heads, D dimension of one head.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]
States = dict[str, Array]


# ---------------------------------------------------------------------------------- small formulas
def linear(weights: Weights, name: str, x: Array, bias: bool = True) -> Array:
    """Return x Wᵀ + b for x [..., in] → [..., out]. W is stored as [out, in]."""
    y = x @ weights[f"{name}.weight"].T
    if bias:
        y = y + weights[f"{name}.bias"]
    return y


def layer_norm(weights: Weights, name: str, x: Array, eps: float = 1e-6) -> Array:
    """Normalize each vector to mean 0 and variance 1, then scale and shift it.

    Source: arXiv 1607.06450 §3.
    """
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered**2).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weights: Weights, name: str, x: Array, eps: float) -> Array:
    """Divide each vector by its root mean square, then scale it. Source: arXiv 1910.07467 §4."""
    mean_square = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weights[f"{name}.weight"]


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), in a form that does not overflow for very negative x."""
    return 0.5 * (1 + np.tanh(x / 2))


def silu(x: Array) -> Array:
    """Return x · sigmoid(x), the decoder's activation. Source: arXiv 1606.08415 §2."""
    return x * sigmoid(x)


def quick_gelu(x: Array) -> Array:
    """Return x · sigmoid(1.702 x), the activation in the vision encoder's blocks.

    Source: arXiv 1606.08415 §2.
    """
    return x * sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Return x times the cumulative normal distribution at x: exact, no tanh approximation."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, mask: NDArray[np.bool_]) -> Array:
    """Return softmax(q kᵀ / √D) v over the positions that the mask allows.

    q [H, S, D]; k and v [G, S, D]; mask [S, S], True where query (row) attends to key (column) →
    [S, H · D].
    Source: arXiv 1706.03762 §3.2; shared key/value heads, arXiv 2305.13245 §2.
    """
    queries_per_key = q.shape[0] // k.shape[0]
    k = np.repeat(k, queries_per_key, axis=0)  # [H, S, D]: query heads 0, 1, … share key head 0
    v = np.repeat(v, queries_per_key, axis=0)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])  # [H, S, S]
    probabilities = softmax(np.where(mask, scores, -np.inf))
    return merge_heads(probabilities @ v)


def split_heads(x: Array, heads: int) -> Array:
    """Split the last axis into heads: [S, H · D] → [H, S, D]."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def merge_heads(x: Array) -> Array:
    """Join the heads to one axis: [H, S, D] → [S, H · D]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def apply_rotary_pos_emb(x: Array, angles: Array) -> Array:
    """Rotate each pair (x[d], x[d + D/2]) by its angle: x [H, S, D], angles [S, D / 2] → [H, S, D].

    Source: RoFormer, arXiv 2104.09864 §3.4; the checkpoints pair the halves instead of neighbors.
    """
    first, second = np.split(x, 2, axis=-1)
    cos = np.cos(angles)
    sin = np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# ---------------------------------------------------------------------------------- vision encoder
def patch_positions(grid_thw: ArrayLike, merge: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return the row, the column and the temporal slice of each patch: three integer arrays [N].

    grid_thw [images, 3]: temporal slices, rows and columns of patches. Slices are numbered through
    all images. Patches come block by block of merge × merge, so that those of one image token are
    consecutive.
    """
    rows = []
    columns = []
    slices = []
    next_slice = 0
    for t, h, w in np.asarray(grid_thw).tolist():
        for _ in range(t):
            for block_row in range(0, h, merge):
                for block_column in range(0, w, merge):
                    for row in range(block_row, block_row + merge):
                        for column in range(block_column, block_column + merge):
                            rows.append(row)
                            columns.append(column)
                            slices.append(next_slice)
            next_slice += 1
    return np.array(rows), np.array(columns), np.array(slices)


def vision_angles(rows: NDArray, columns: NDArray, head_dim: int) -> Array:
    """Return the rotary angles [N, D / 2] of each patch: half from its row, half from its column.

    Source: `Qwen2VLVisionRotaryEmbedding`; theta is 10000 in every checkpoint.
    """
    exponents = np.arange(0, head_dim // 2, 2) / (head_dim // 2)  # [D / 4]
    inv_freq = 10000.0**-exponents
    return np.concatenate([np.outer(rows, inv_freq), np.outer(columns, inv_freq)], axis=-1)


def vision_encoder(
    config: dict, weights: Weights, pixels: Array, grid_thw: ArrayLike, states: States
) -> Array:
    """Encode the patches of images or videos as features in the decoder's width.

    pixels [N, channels · frames · height · width of a patch]; grid_thw [images, 3] → [T, C]. The
    activations after the patch embedding and after each block are written to `states`.
    Source: arXiv 2409.12191 §2.1; `Qwen2VisionTransformerPretrainedModel`.
    """
    vision_config = config["vision_config"]
    embed_dim = vision_config["embed_dim"]
    heads = vision_config["num_heads"]
    merge = vision_config.get("spatial_merge_size", 2)
    rows, columns, slices = patch_positions(grid_thw, merge)
    angles = vision_angles(rows, columns, embed_dim // heads)
    # A patch attends to those of its own temporal slice of its own image.
    mask = slices[:, None] == slices[None, :]  # [N, N]

    kernel = weights["visual.patch_embed.proj.weight"].reshape(embed_dim, -1)
    h = pixels @ kernel.T  # [N, E]: a convolution whose stride is its size is a matmul
    states["patch embedding"] = h
    for i in range(vision_config["depth"]):
        h = vision_block(weights, f"visual.blocks.{i}", h, heads, angles, mask)
        states[f"block {i}"] = h
    return patch_merger(weights, h, merge * merge * embed_dim)


def vision_block(
    weights: Weights, name: str, h: Array, heads: int, angles: Array, mask: NDArray[np.bool_]
) -> Array:
    """Apply one block of the vision encoder, attention and MLP with residuals: [N, E] → [N, E]."""
    qkv = linear(weights, f"{name}.attn.qkv", layer_norm(weights, f"{name}.norm1", h))
    q, k, v = np.split(qkv, 3, axis=-1)
    q = apply_rotary_pos_emb(split_heads(q, heads), angles)
    k = apply_rotary_pos_emb(split_heads(k, heads), angles)
    v = split_heads(v, heads)
    h = h + linear(weights, f"{name}.attn.proj", attention(q, k, v, mask))
    inner = linear(weights, f"{name}.mlp.fc1", layer_norm(weights, f"{name}.norm2", h))
    return h + linear(weights, f"{name}.mlp.fc2", quick_gelu(inner))


def patch_merger(weights: Weights, h: Array, width: int) -> Array:
    """Join the patches of each block to a vector of `width`, and map it to the decoder's width.

    [N, E] → [T, C]. Source: arXiv 2409.12191 §2.1; `PatchMerger`.
    """
    blocks = layer_norm(weights, "visual.merger.ln_q", h).reshape(-1, width)
    inner = gelu(linear(weights, "visual.merger.mlp.0", blocks))
    return linear(weights, "visual.merger.mlp.2", inner)


# --------------------------------------------------------------------------------------- positions
def rope_positions(
    config: dict,
    ids: list[int],
    image_grid_thw: ArrayLike = (),
    video_grid_thw: ArrayLike = (),
) -> tuple[NDArray[np.int64], int]:
    """Return the M-RoPE position of each token and the rope delta.

    ids [S]; grids [images or videos, 3] in patches, in reading order → positions int [3, S] (time,
    height, width), and the number to add to the sequence's length to get its next position.

    A text token at position p has (p, p, p). An image's tokens have (p + t, p + row, p + column),
    and the text after it continues one after the largest of these.
    Source: arXiv 2409.12191 §2.1 and Figure 3.
    """
    merge = config["vision_config"].get("spatial_merge_size", 2)
    grids = {
        config["image_token_id"]: iter(np.asarray(image_grid_thw).tolist()),
        config["video_token_id"]: iter(np.asarray(video_grid_thw).tolist()),
    }
    positions: list[tuple[int, int, int]] = []
    next_position = 0
    while len(positions) < len(ids):
        token = ids[len(positions)]
        if token not in grids:
            positions.append((next_position, next_position, next_position))
            next_position += 1
            continue
        t, h, w = next(grids[token])
        h = h // merge
        w = w // merge
        for frame in range(t):
            for row in range(h):
                for column in range(w):
                    positions.append(
                        (next_position + frame, next_position + row, next_position + column)
                    )
        next_position += max(t, h, w)
    return np.array(positions).T, next_position - len(ids)


# ----------------------------------------------------------------------------------------- decoder
def decoder_angles(config: dict, positions: NDArray) -> Array:
    """Return the M-RoPE angles [S, D / 2] for positions [3, S].

    Each axis (time, height, width) drives its own section of the frequencies; mrope_section holds
    their sizes.
    Source: arXiv 2409.12191 §2.1; `Qwen2VLRotaryEmbedding`.
    """
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    inv_freq = float(config["rope_theta"]) ** -(np.arange(0, head_dim, 2) / head_dim)  # [D / 2]
    sections = config["rope_scaling"]["mrope_section"]
    axis = np.repeat(np.arange(len(sections)) % 3, sections)  # [D / 2]: 0 time, 1 height, 2 width
    return positions[axis].T * inv_freq


def decoder_mask(config: dict, layer: int, length: int) -> NDArray[np.bool_]:
    """Return the attention mask [S, S] of one layer: causal, and sliding in the layers that are.

    Source: arXiv 1706.03762 §3.2.3; the window, arXiv 2004.05150 §3.1.
    """
    query = np.arange(length)[:, None]
    key = np.arange(length)[None, :]
    mask = key <= query
    if config.get("use_sliding_window", False) and layer >= config["max_window_layers"]:
        mask &= key > query - config["sliding_window"]
    return mask


def decoder_layer(
    config: dict, weights: Weights, name: str, h: Array, angles: Array, mask: NDArray[np.bool_]
) -> Array:
    """Apply one layer of the decoder, attention and SwiGLU MLP with residuals: [S, C] → [S, C].

    Source: `Qwen2VLDecoderLayer`; SwiGLU, arXiv 2002.05202 §2.
    """
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    eps = config["rms_norm_eps"]
    x = rms_norm(weights, f"{name}.input_layernorm", h, eps)
    q = split_heads(linear(weights, f"{name}.self_attn.q_proj", x), heads)
    k = split_heads(linear(weights, f"{name}.self_attn.k_proj", x), kv_heads)
    v = split_heads(linear(weights, f"{name}.self_attn.v_proj", x), kv_heads)
    q = apply_rotary_pos_emb(q, angles)
    k = apply_rotary_pos_emb(k, angles)
    h = h + linear(weights, f"{name}.self_attn.o_proj", attention(q, k, v, mask), bias=False)
    x = rms_norm(weights, f"{name}.post_attention_layernorm", h, eps)
    gate = silu(linear(weights, f"{name}.mlp.gate_proj", x, bias=False))
    up = linear(weights, f"{name}.mlp.up_proj", x, bias=False)
    return h + linear(weights, f"{name}.mlp.down_proj", gate * up, bias=False)


def decoder(
    config: dict, weights: Weights, embeddings: Array, positions: NDArray, states: States
) -> Array:
    """Return the logits [S, V] for embeddings [S, C] at positions [3, S].

    The activations after each layer and after the final norm are written to `states`.
    """
    angles = decoder_angles(config, positions)
    h = embeddings
    for i in range(config["num_hidden_layers"]):
        mask = decoder_mask(config, i, len(embeddings))
        h = decoder_layer(config, weights, f"model.layers.{i}", h, angles, mask)
        states[f"layer {i}"] = h
    h = rms_norm(weights, "model.norm", h, config["rms_norm_eps"])
    states["final norm"] = h
    if config["tie_word_embeddings"]:
        return h @ weights["model.embed_tokens.weight"].T
    return h @ weights["lm_head.weight"].T


# --------------------------------------------------------------------------------------- the model
def check_config(config: dict) -> None:
    """Raise ValueError for a configuration that is not computed here."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"expected hidden_act 'silu', got {config['hidden_act']!r}")
    vision_act = config["vision_config"].get("hidden_act", "quick_gelu")
    if vision_act != "quick_gelu":
        raise ValueError(
            f"expected the vision encoder's hidden_act 'quick_gelu', got {vision_act!r}"
        )
    scaling = config["rope_scaling"]
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ValueError(f"expected the rope type 'default' or 'mrope', got {rope_type!r}")


def run(
    config: Any,
    weights: Weights,
    ids: ArrayLike,
    pixel_values: ArrayLike | None = None,
    image_grid_thw: ArrayLike = (),
    pixel_values_videos: ArrayLike | None = None,
    video_grid_thw: ArrayLike = (),
) -> dict[str, Any]:
    """Run one sequence of token ids [S], with its images and videos, through the whole model.

    pixel_values, pixel_values_videos: patches [N, ...]; image_grid_thw, video_grid_thw [images or
    videos, 3].
    Returns a dict:

        logits      [S, V]
        positions   int [3, S]
        rope_delta  int
        vision      features [T, C] of the images, None without images
        video       the same of the videos
        states      {name: activations after that part}; those of the vision encoder are under
        "vision" and "video"

    Raises ValueError for a configuration that is not computed here and for weights of another
    dtype.
    """
    if not isinstance(config, dict):
        config = dataclasses.asdict(config)
    check_config(config)
    for name, array in weights.items():
        if array.dtype != np.float64:
            raise ValueError(f"{name}: expected float64, got {array.dtype}")
    input_ids = np.asarray(ids)
    states: dict[str, Any] = {}
    image_features = None
    video_features = None
    h = weights["model.embed_tokens.weight"][input_ids]  # [S, C], a copy
    if pixel_values is not None:
        states["vision"] = {}
        pixels = np.asarray(pixel_values, np.float64)
        image_features = vision_encoder(config, weights, pixels, image_grid_thw, states["vision"])
        h[input_ids == config["image_token_id"]] = (
            image_features  # the placeholders, in reading order
        )
    if pixel_values_videos is not None:
        states["video"] = {}
        pixels = np.asarray(pixel_values_videos, np.float64)
        video_features = vision_encoder(config, weights, pixels, video_grid_thw, states["video"])
        h[input_ids == config["video_token_id"]] = video_features
    positions, rope_delta = rope_positions(
        config, input_ids.tolist(), image_grid_thw, video_grid_thw
    )
    return {
        "logits": decoder(config, weights, h, positions, states),
        "positions": positions,
        "rope_delta": rope_delta,
        "vision": image_features,
        "video": video_features,
        "states": states,
    }
