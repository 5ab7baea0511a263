"""The whole of Qwen2-VL once more, in plain float64 NumPy: the judge between two implementations.

It shares no line with `qwen2vl.py`. One sequence, no cache, no batch, no trick for speed: each function is
one formula of the paper (arXiv 2409.12191) or of the published checkpoint, so that it can be checked by eye.
Half-precision and float32 runs are judged by their distance to this one; see `tests/test_qwen2vl.py`.

    config   config.json as a dict, or any object with its field names (`qwen2vl.Config` is one)
    w        {tensor name in the published checkpoint: float64 array}

Letters:  S tokens of the sequence   C their width        V vocabulary
          N patches of all pictures  E their width        T image tokens (N / 4: a 2x2 block of patches each)
          H heads                    K key/value heads    D width of one head
"""

import math

import numpy as np


def read(config, name, default=None):
    return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)


# ------------------------------------------------------------------------------------------- small formulas


def linear(w, name, x, bias=True):
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if bias else y


def layer_norm(w, name, x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(w, name, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name + ".weight"]


def sigmoid(x):
    return 0.5 * (
        1 + np.tanh(x / 2)
    )  # the same as 1 / (1 + exp(-x)), which overflows for very negative x


def silu(x):
    return x * sigmoid(x)


def quick_gelu(x):
    return x * sigmoid(1.702 * x)


def gelu(x):
    """The exact one, x times the normal distribution's cumulative probability; no tanh approximation."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(q, k, v, visible):
    """q [H, S, D], k and v [K, S, D], visible [S, S] (row: who looks, column: at whom) -> [S, H * D]."""
    group = q.shape[0] // k.shape[0]  # query heads 0..group-1 share key/value head 0, and so on
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = np.where(
        visible, q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]), -np.inf
    )  # [H, S, S]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def split_heads(x, heads):
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)  # [S, H * D] -> [H, S, D]


def rotate(x, angles):
    """Turn each pair (x[d], x[d + D/2]) by its angle: x [H, S, D], angles [S, D / 2]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# ------------------------------------------------------------------------------------------ the vision tower


def patch_places(grid_thw, merge):
    """Row y, column x and temporal slice of each patch: three arrays [N].

    Patches come 2x2 block by 2x2 block, so that the four that one image token is made of are neighbours.
    """
    places, slices = [], 0
    for t, h, w in np.asarray(grid_thw).tolist():
        for _ in range(t):
            for block_y in range(0, h, merge):
                for block_x in range(0, w, merge):
                    for y in range(block_y, block_y + merge):
                        places += [(y, x, slices) for x in range(block_x, block_x + merge)]
            slices += 1  # patches see each other within one slice of one picture, never beyond
    return np.array(places).T


def vision(config, w, pixels, grid_thw, states):
    """pixels [N, 3 * 2 * 14 * 14], grid_thw [pictures, 3] -> features [T, C]."""
    c = read(config, "vision_config")
    embed_dim, heads, merge = (
        read(c, "embed_dim"),
        read(c, "num_heads"),
        read(c, "spatial_merge_size", 2),
    )
    y, x, slices = patch_places(grid_thw, merge)
    head_width = embed_dim // heads
    # Half of a head turns with the row, half with the column: D/4 frequencies each.
    frequencies = 10000.0 ** -(np.arange(0, head_width // 2, 2) / (head_width // 2))
    angles = np.concatenate(
        [np.outer(y, frequencies), np.outer(x, frequencies)], axis=-1
    )  # [N, D / 2]
    same_slice = slices[:, None] == slices[None, :]

    h = pixels @ w["visual.patch_embed.proj.weight"].reshape(embed_dim, -1).T  # [N, E]
    states["patch embedding"] = h
    for i in range(read(c, "depth")):
        block = f"visual.blocks.{i}."
        q, k, v = np.split(
            linear(w, block + "attn.qkv", layer_norm(w, block + "norm1", h)), 3, axis=-1
        )
        q, k = rotate(split_heads(q, heads), angles), rotate(split_heads(k, heads), angles)
        h = h + linear(w, block + "attn.proj", attend(q, k, split_heads(v, heads), same_slice))
        inner = quick_gelu(linear(w, block + "mlp.fc1", layer_norm(w, block + "norm2", h)))
        h = h + linear(w, block + "mlp.fc2", inner)
        states[f"block {i}"] = h
    blocks = layer_norm(w, "visual.merger.ln_q", h).reshape(
        -1, merge * merge * embed_dim
    )  # [T, 4E]
    return linear(w, "visual.merger.mlp.2", gelu(linear(w, "visual.merger.mlp.0", blocks)))


# -------------------------------------------------------------------------------------------------- positions


def rope_positions(config, ids, image_grid_thw=(), video_grid_thw=()):
    """M-RoPE (paper, section 2.1): a place (time, row, column) for each token -> ([3, S], rope_delta).

    A text token stands at (p, p, p). A picture's tokens spread out from (p, p, p), and what follows starts
    after the largest coordinate they reached.
    """
    merge = read(read(config, "vision_config"), "spatial_merge_size", 2)
    grids = {
        read(config, "image_token_id"): iter(np.asarray(image_grid_thw).tolist()),
        read(config, "video_token_id"): iter(np.asarray(video_grid_thw).tolist()),
    }
    ids, places, p = list(ids), [], 0
    while len(places) < len(ids):
        token = ids[len(places)]
        if token in grids:
            t, h, w = next(grids[token])
            h, w = h // merge, w // merge
            places += [(p + a, p + b, p + c) for a in range(t) for b in range(h) for c in range(w)]
            p += max(t, h, w)
        else:
            places.append((p, p, p))
            p += 1
    positions = np.array(places).T
    return positions, positions.max() + 1 - len(ids)


# ------------------------------------------------------------------------------------------------ the decoder


def decoder(config, w, embeddings, positions, states):
    """embeddings [S, C], positions [3, S] -> logits [S, V]."""
    heads, kv_heads = read(config, "num_attention_heads"), read(config, "num_key_value_heads")
    eps, length = read(config, "rms_norm_eps"), len(embeddings)
    head_width = read(config, "hidden_size") // heads
    # Each axis (time, row, column) drives its own share of the frequencies: mrope_section says how many.
    frequencies = float(read(config, "rope_theta")) ** -(np.arange(0, head_width, 2) / head_width)
    sections = read(config, "rope_scaling")["mrope_section"]
    axis = np.repeat(np.arange(len(sections)) % 3, sections)  # [D / 2]
    angles = positions[axis].T * frequencies  # [S, D / 2]
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]

    h = embeddings
    for i in range(read(config, "num_hidden_layers")):
        visible = key <= query
        if read(config, "use_sliding_window", False) and i >= read(config, "max_window_layers"):
            visible &= key > query - read(config, "sliding_window")
        layer = f"model.layers.{i}."
        x = rms_norm(w, layer + "input_layernorm", h, eps)
        q = rotate(split_heads(linear(w, layer + "self_attn.q_proj", x), heads), angles)
        k = rotate(split_heads(linear(w, layer + "self_attn.k_proj", x), kv_heads), angles)
        v = split_heads(linear(w, layer + "self_attn.v_proj", x), kv_heads)
        h = h + linear(w, layer + "self_attn.o_proj", attend(q, k, v, visible), bias=False)
        x = rms_norm(w, layer + "post_attention_layernorm", h, eps)
        inner = silu(linear(w, layer + "mlp.gate_proj", x, bias=False))
        inner = inner * linear(w, layer + "mlp.up_proj", x, bias=False)
        h = h + linear(w, layer + "mlp.down_proj", inner, bias=False)
        states[f"layer {i}"] = h
    states["final norm"] = h = rms_norm(w, "model.norm", h, eps)
    tied = read(config, "tie_word_embeddings")
    return h @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


# -------------------------------------------------------------------------------------------------- the whole


def run(
    config,
    w,
    ids,
    pixel_values=None,
    image_grid_thw=(),
    pixel_values_videos=None,
    video_grid_thw=(),
):
    """One sequence of token ids [S], with its pictures and clips, through the whole model.

    Gives a dict: "logits" [S, V], "positions" [3, S], "rope_delta", "vision" (features [T, C] of the images)
    and "video" (of the clips), each None where there is none, and "states": the activations after every part,
    those of the vision tower under "vision" and "video".
    """
    ids, states = np.asarray(ids), {}
    h = w["model.embed_tokens.weight"][ids]
    features = {"vision": None, "video": None}
    for kind, token, pixels, grid in (
        ("vision", read(config, "image_token_id"), pixel_values, image_grid_thw),
        ("video", read(config, "video_token_id"), pixel_values_videos, video_grid_thw),
    ):
        if pixels is not None:
            states[kind] = {}
            features[kind] = vision(config, w, np.asarray(pixels, np.float64), grid, states[kind])
            h[ids == token] = features[kind]  # the placeholders, in reading order
    positions, delta = rope_positions(config, ids.tolist(), image_grid_thw, video_grid_thw)
    logits = decoder(config, w, h, positions, states)
    return features | {
        "positions": positions,
        "rope_delta": delta,
        "logits": logits,
        "states": states,
    }
