"""Small random models and inputs for `qwen2vl.py`, transformers and the NumPy model.

Each starts from three things that are fixed by a seed: a config (a dict like config.json), the
weights (a dict of float32 tensors under the published names) and the sequences of a batch.
`our_model`, `reference_model` and `run_numpy_model` build their model from them.
"""

import copy
import itertools
import types

import numpy as np
import torch

# Matmuls this small gain nothing from threads, and on a busy machine wait for them.
torch.set_num_threads(1)

# Ids of the special tokens in every small model; text tokens are those above LAST_SPECIAL.
VISION_START, VISION_END, IMAGE, VIDEO, PAD = 1, 2, 3, 4, 0
LAST_SPECIAL = 4


def small_config(
    heads=4,
    kv_heads=2,
    width=16,
    sections=(2, 3, 3),
    layers=2,
    tied=False,
    vision_heads=2,
    vision_width=16,
    depth=2,
    mlp_ratio=2,
    vocab=61,
    intermediate=48,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    **more,
):
    """Return a config.json in the flat layout; `width` and `vision_width` are head dimensions."""
    assert sum(sections) * 2 == width, "mrope_section splits half of a head dimension"
    return {
        "vocab_size": vocab,
        "hidden_size": heads * width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(sections)},
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": layers,
        "attention_dropout": 0.0,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "vision_config": {
            "depth": depth,
            "embed_dim": vision_heads * vision_width,
            "num_heads": vision_heads,
            "mlp_ratio": mlp_ratio,
            "hidden_size": heads * width,
            "in_channels": 3,
            "patch_size": patch_size,
            "spatial_merge_size": spatial_merge_size,
            "temporal_patch_size": temporal_patch_size,
        },
    } | more


# How published or plausible checkpoints differ: query heads per key head, head dimension,
# mrope_section, depth of the vision encoder and the decoder, tied or untied embeddings.
SHAPES = {
    "default": small_config(),
    "tied": small_config(tied=True),
    "one kv head": small_config(heads=6, kv_heads=1, width=8, sections=(1, 1, 2), layers=3),
    "no sharing": small_config(heads=3, kv_heads=3, width=24, sections=(4, 4, 4), tied=True),
    "like 7B": small_config(heads=7, kv_heads=1, width=32, sections=(4, 6, 6), layers=1, vocab=97),
    "real head widths": small_config(
        heads=2,
        kv_heads=1,
        width=128,
        sections=(16, 24, 24),
        vision_heads=1,
        vision_width=80,
        mlp_ratio=4,
    ),
    "deep": small_config(layers=5, depth=4, tied=True),
    "shallow": small_config(layers=1, depth=1, vision_heads=4, vision_width=8),
    "lopsided sections": small_config(sections=(6, 1, 1), vision_heads=3, vision_width=12),
    "six sections": small_config(sections=(2, 1, 1, 1, 2, 1), layers=1, depth=1),
    "other eps and theta": small_config(rms_norm_eps=1e-5, rope_theta=10000.0),
    "other patches": small_config(patch_size=6, temporal_patch_size=3, spatial_merge_size=3),
}


def random_shape(seed):
    """Return a random config, for the tests that need many."""
    pick = np.random.default_rng(seed)
    kv_heads, group = int(pick.integers(1, 4)), int(pick.integers(1, 5))
    half = int(pick.choice([4, 8, 12, 16, 32]))
    first, second = sorted(pick.choice(np.arange(1, half), size=2, replace=False).tolist())
    return small_config(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        width=2 * half,
        sections=(first, second - first, half - second),
        layers=int(pick.integers(1, 5)),
        tied=bool(pick.integers(2)),
        vision_heads=int(pick.integers(1, 4)),
        vision_width=int(pick.choice([8, 16, 20, 32])),
        depth=int(pick.integers(1, 4)),
        mlp_ratio=int(pick.choice([2, 4])),
        vocab=int(pick.integers(40, 120)),
    )


def random_weights(config, seed=0):
    """Return {published name: float32 tensor}; no bias is 0 and no norm weight 1."""
    g = torch.Generator().manual_seed(seed)
    weights = {}

    def normal(name, *shape, std=None, mean=0.0):
        std = std if std is not None else 1.2 * shape[-1] ** -0.5
        weights[name] = mean + std * torch.randn(*shape, generator=g)

    def linear(name, out_width, in_width, bias=True):
        normal(name + ".weight", out_width, in_width)
        if bias:
            normal(name + ".bias", out_width, std=0.2)

    def norm(name, width, bias):
        normal(name + ".weight", width, std=0.2, mean=1.0)
        if bias:
            normal(name + ".bias", width, std=0.2)

    v = config["vision_config"]
    E, C, inner = v["embed_dim"], config["hidden_size"], config["intermediate_size"]
    patch = (v["in_channels"], v["temporal_patch_size"], v["patch_size"], v["patch_size"])
    normal("visual.patch_embed.proj.weight", E, *patch, std=1.2 * np.prod(patch) ** -0.5)
    for i in range(v["depth"]):
        block = f"visual.blocks.{i}"
        norm(f"{block}.norm1", E, bias=True)
        norm(f"{block}.norm2", E, bias=True)
        linear(f"{block}.attn.qkv", 3 * E, E)
        linear(f"{block}.attn.proj", E, E)
        linear(f"{block}.mlp.fc1", v["mlp_ratio"] * E, E)
        linear(f"{block}.mlp.fc2", E, v["mlp_ratio"] * E)
    merged = E * v["spatial_merge_size"] ** 2
    norm("visual.merger.ln_q", E, bias=True)
    linear("visual.merger.mlp.0", merged, merged)
    linear("visual.merger.mlp.2", C, merged)

    normal("model.embed_tokens.weight", config["vocab_size"], C)
    kv_width = C // config["num_attention_heads"] * config["num_key_value_heads"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", C, bias=False)
        norm(f"{layer}.post_attention_layernorm", C, bias=False)
        linear(f"{layer}.self_attn.q_proj", C, C)
        linear(f"{layer}.self_attn.k_proj", kv_width, C)
        linear(f"{layer}.self_attn.v_proj", kv_width, C)
        linear(f"{layer}.self_attn.o_proj", C, C, bias=False)
        linear(f"{layer}.mlp.gate_proj", inner, C, bias=False)
        linear(f"{layer}.mlp.up_proj", inner, C, bias=False)
        linear(f"{layer}.mlp.down_proj", C, inner, bias=False)
    norm("model.norm", C, bias=False)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", config["vocab_size"], C)
    return weights


# ------------------------------------------------------------------------------------------- inputs


def random_sequence(config, parts, seed=0):
    """Return one sequence of random tokens and patches.

    Each part is an integer (that many text tokens), ("image", h, w) or ("video", t, h, w), where
    height and width count tokens, i.e. patches after merging. The result is a dict with the token
    ids under "ids", and (grids in patches, list of patch arrays) under "image" and "video".
    """
    pick = np.random.default_rng(seed)
    v = config["vision_config"]
    sequence = {"ids": [], "image": ([], []), "video": ([], [])}
    for part in parts:
        if isinstance(part, int):
            sequence["ids"] += pick.integers(
                LAST_SPECIAL + 1, config["vocab_size"], size=part
            ).tolist()
            continue
        kind, *grid = part
        t, h, w = [1, *grid] if kind == "image" else grid
        sequence["ids"] += [VISION_START, *[config[f"{kind}_token_id"]] * (t * h * w), VISION_END]
        h, w = h * v["spatial_merge_size"], w * v["spatial_merge_size"]
        columns = v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2
        sequence[kind][0].append([t, h, w])
        sequence[kind][1].append(pick.normal(size=(t * h * w, columns)).astype(np.float32))
    return sequence


def make_batch(sequences, dtype=torch.float32):
    """Return the arguments of `Qwen2VL.forward`, left padded, with a mask only if needed."""
    length = max(len(sequence["ids"]) for sequence in sequences)
    padding = [length - len(sequence["ids"]) for sequence in sequences]
    ids = [[PAD] * n + sequence["ids"] for n, sequence in zip(padding, sequences, strict=True)]
    batch = {"input_ids": torch.tensor(ids)}
    if any(padding):
        batch["attention_mask"] = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
    for kind, pixels_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = [grid for sequence in sequences for grid in sequence[kind][0]]
        if grids:
            patches = np.concatenate([part for sequence in sequences for part in sequence[kind][1]])
            batch[f"{kind}_grid_thw"] = torch.tensor(grids)
            batch[pixels_name] = torch.from_numpy(patches).to(dtype)
    return batch


# --------------------------------------------------------------------------------- the three models


def our_config(config):
    """Return the `Config` of a config.json."""
    from qwen2vl import Config, VisionConfig

    return Config(**(config | {"vision_config": VisionConfig(**config["vision_config"])}))


def our_model(config, weights, dtype=torch.float32, attn_implementation="sdpa"):
    """Return `Qwen2VL` with these weights, in evaluation mode."""
    from qwen2vl import Qwen2VL

    model = Qwen2VL(our_config(config), attn_implementation=attn_implementation)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, f"not parameters of the model: {unexpected}"
    assert set(missing) <= {"lm_head.weight"}, f"without a weight: {missing}"
    assert not missing or config["tie_word_embeddings"], "untied embeddings without an lm_head"
    return model.to(dtype).eval()


def reference_name(name):
    """Return the name in transformers 5 of a published tensor name."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def reference_model(config, weights, dtype=torch.float32, attn_implementation="eager"):
    """Return the model of transformers with these weights, in evaluation mode."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    # The nested layout of transformers 5. No token ends a sequence: the tests compare a fixed
    # number of steps. Copied, as transformers writes into rope_scaling.
    text_config = copy.deepcopy(config) | {"bos_token_id": None, "eos_token_id": None}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    top_level = {
        name: text_config.pop(name) for name in (*names, "tie_word_embeddings", "vision_config")
    }
    reference_config = Qwen2VLConfig(text_config=text_config, **top_level)
    reference_config._attn_implementation = attn_implementation
    model = Qwen2VLForConditionalGeneration(reference_config)
    renamed = {reference_name(name): tensor for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected, f"not parameters of the reference: {unexpected}"
    assert set(missing) <= {"lm_head.weight"}, f"without a weight in the reference: {missing}"
    model.tie_weights()
    return model.to(dtype).eval()


def token_types(config, input_ids):
    """Return the `mm_token_type_ids` of transformers 5: 0 text, 1 image, 2 video."""
    ids = torch.as_tensor(input_ids)
    return (ids == config["image_token_id"]).int() + 2 * (ids == config["video_token_id"]).int()


def reference_logits(model, config, batch):
    """Return the logits [B, S, V] of the reference for a batch of `make_batch`."""
    model.model.rope_deltas = None  # those of the last call
    types = token_types(config, batch["input_ids"])
    with torch.no_grad():
        return model(**batch, mm_token_type_ids=types, use_cache=False).logits


def reference_generation(model, config, batch, steps):
    """Generate `steps` tokens greedily with the reference and its cache.

    Return the ids with the prompt [B, S + steps], and the logits of each step [B, steps, V].
    """
    output = model.generate(
        **batch,
        mm_token_type_ids=token_types(config, batch["input_ids"]),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=PAD,
        suppress_tokens=[IMAGE, VIDEO],  # a placeholder without an image
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def cached_logits(model, batch, ids, prefill):
    """Return our logits [B, S, V] for ids [B, S], computed with a KV cache.

    The first `prefill` tokens run in one forward pass, with the images of the batch; the rest one
    by one.
    """
    from qwen2vl import KVCache

    mask = torch.ones_like(ids)
    if "attention_mask" in batch:
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    cache = KVCache(
        model.config, batch_size=len(ids), max_length=ids.shape[1], dtype=model.lm_head.weight.dtype
    )
    first = batch | {"input_ids": ids[:, :prefill], "attention_mask": mask[:, :prefill]}
    steps = [model(**first, cache=cache)]
    for i in range(prefill, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache))
    return torch.cat(steps, dim=1)


def run_numpy_model(config, weights, sequence):
    """Run `reference/numpy_model.py` in float64 on a sequence of `random_sequence`."""
    from reference import numpy_model

    float64_weights = {name: tensor.double().numpy() for name, tensor in weights.items()}
    image_grids, image_patches = sequence["image"]
    video_grids, video_patches = sequence["video"]
    return numpy_model.run(
        config,
        float64_weights,
        sequence["ids"],
        pixel_values=np.concatenate(image_patches) if image_grids else None,
        image_grid_thw=image_grids,
        pixel_values_videos=np.concatenate(video_patches) if video_grids else None,
        video_grid_thw=video_grids,
    )


def gap(a, b):
    """Return the largest absolute difference; infinity where either is NaN."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape
    return (a - b).abs().nan_to_num(float("inf")).max().item()


# ---------------------------------------------------------------------- a substitute for flash-attn


def fake_flash_attn():
    """Return a module for sys.modules["flash_attn"], for any device and dtype.

    Signature and semantics are those of flash-attn 2.8 (`flash_attn/flash_attn_interface.py`):
    packed sequences [total, heads, width], grouped key heads, a causal mask aligned to the bottom
    right, a window inclusive of both ends, and zeros for a query without keys to attend to.
    Arguments that flash-attn would reject or misread fail here. `module.calls` lists the calls.
    """
    module = types.ModuleType("flash_attn")
    module.calls = []

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        (total, heads, width), (_, kv_heads, _) = q.shape, k.shape
        assert k.shape == v.shape == (len(k), kv_heads, width), (
            "k and v are [total, kv heads, width]"
        )
        assert heads % kv_heads == 0, "query heads are a multiple of key heads"
        assert q.dtype == k.dtype == v.dtype
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (
            "the last dimension must be contiguous"
        )
        assert (dropout_p, softcap, alibi_slopes, block_table) == (0.0, 0.0, None, None)
        for cu_seqlens, longest, end in (
            (cu_seqlens_q, max_seqlen_q, total),
            (cu_seqlens_k, max_seqlen_k, len(k)),
        ):
            assert cu_seqlens.dtype == torch.int32, "cu_seqlens must be int32"
            assert cu_seqlens.device == q.device
            lengths = cu_seqlens.diff()
            assert cu_seqlens[0] == 0, "offsets start at 0"
            assert cu_seqlens[-1] == end, "offsets end at the total length"
            assert (lengths >= 0).all()
            assert type(longest) is int, "a tensor would synchronize the GPU"
            assert longest == lengths.max(), "max_seqlen determines how many blocks are launched"
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        module.calls.append(
            {"causal": causal, "cu_seqlens_q": cu_seqlens_q.tolist(), "heads": (heads, kv_heads)}
        )

        scale = width**-0.5 if softmax_scale is None else softmax_scale
        left, right = window_size
        if causal:
            right = 0
        out = torch.zeros_like(q)
        ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
        for (q0, k0), (q1, k1) in itertools.pairwise(ends):
            keys, values = (x[k0:k1].repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            i = torch.arange(q1 - q0, device=q.device)[:, None] + (k1 - k0) - (q1 - q0)
            j = torch.arange(k1 - k0, device=q.device)[None, :]
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device)
            mask &= (j >= i - left) if left >= 0 else True
            mask &= (j <= i + right) if right >= 0 else True
            scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * scale
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
            out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, values)
        return out

    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module
