"""`qwen2vl.py` compared with transformers (live), the NumPy model in float64, and itself.

The tolerances separate right from wrong: for models of this size a correct float32 run differs from
the reference by at most 1e-5 to 3e-5, and every injected fault changes it by 1e-4 or more. Faults
below float32 precision (an eps of 1e-5 in a LayerNorm) show in the float64 comparison at 1e-9.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import SHAPES, gap, make_batch, our_config, our_model, random_sequence, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl import (
    AttentionContext,
    KVCache,
    Qwen2VL,
    eager_attention,
    get_rope_index,
    sdpa_attention,
)

FLOAT32 = 3e-5  # largest absolute difference from transformers in float32
FLOAT64 = 1e-9  # largest absolute difference from the NumPy model in float64
SAME = 1e-12  # between two computations of the same float64 numbers
GOLDEN = Path(__file__).parents[1] / "golden"
IMPLEMENTATIONS = ("eager", "sdpa", "flash")

pytestmark = pytest.mark.usefixtures("no_gradients")

# The parts of `random_sequence`: a number of text tokens, an image (height, width) or a video
# (time, height, width).
CONVERSATIONS = {
    "text only": [11],
    "one image": [5, ("image", 2, 3), 4],
    "several images in a message": [2, ("image", 2, 2), ("image", 3, 1), ("image", 1, 4), 5],
    "several messages": [4, ("image", 3, 2), 7, ("image", 1, 1), ("image", 2, 2), 6],
    "a video": [3, ("video", 3, 2, 3), 2],
    "an image and a video": [1, ("video", 2, 2, 2), 3, ("image", 2, 4), 2],
}


# Arguments of the model for images and for videos, and the NumPy model's name of their features.
VISION_INPUTS = (
    ("pixel_values", "image_grid_thw", "vision"),
    ("pixel_values_videos", "video_grid_thw", "video"),
)


def sequences_of(config):
    """Return one sequence per conversation."""
    return [
        random_sequence(config, parts, seed) for seed, parts in enumerate(CONVERSATIONS.values())
    ]


@cache
def weights_of(shape):
    return random_weights(SHAPES[shape], seed=list(SHAPES).index(shape))


@cache
def ours(shape, dtype=torch.float32, attn_implementation="sdpa"):
    """Return our model of a shape, built once."""
    return our_model(SHAPES[shape], weights_of(shape), dtype, attn_implementation)


@cache
def reference(shape):
    """Return the model of transformers of a shape, built once."""
    pytest.importorskip(
        "transformers", reason="compared live; the golden files need no transformers"
    )
    return helpers.reference_model(SHAPES[shape], weights_of(shape))


def real_tokens(batch):
    """Return the mask of the tokens that are not padding, bool [B, S]."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


# ----------------------------------------------------- parity with transformers and the NumPy model


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES)
def test_features_and_logits_in_float32_equal_the_reference(shape):
    config = SHAPES[shape]
    model = ours(shape)
    theirs = reference(shape)
    for sequence in sequences_of(config):
        batch = make_batch([sequence])
        assert gap(model(**batch), helpers.reference_logits(theirs, config, batch)) <= FLOAT32
        for pixels, grid, _ in VISION_INPUTS:
            if pixels in batch:
                expected = theirs.model.visual(batch[pixels], batch[grid]).pooler_output
                assert gap(model.visual(batch[pixels], batch[grid]), expected) <= FLOAT32


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES)
def test_padded_batch_in_float32_equals_the_reference(shape):
    config = SHAPES[shape]
    batch = make_batch(sequences_of(config))
    real = real_tokens(batch)
    assert not real.all()
    expected = helpers.reference_logits(reference(shape), config, batch)
    assert gap(ours(shape)(**batch)[real], expected[real]) <= FLOAT32


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES)
def test_model_in_float64_equals_the_numpy_model(shape):
    config = SHAPES[shape]
    model = ours(shape, torch.float64)
    for sequence in sequences_of(config):
        batch = make_batch([sequence], torch.float64)
        expected = helpers.run_numpy_model(config, weights_of(shape), sequence)
        assert gap(model(**batch)[0], expected["logits"]) <= FLOAT64
        for pixels, grid, kind in VISION_INPUTS:
            if pixels in batch:
                assert gap(model.visual(batch[pixels], batch[grid]), expected[kind]) <= FLOAT64
        positions, deltas = rope_index(config, batch)
        assert positions[:, 0].tolist() == expected["positions"].tolist()
        assert deltas.tolist() == [[expected["rope_delta"]]]


def test_each_layer_in_float64_equals_the_numpy_model():
    """Locate a fault in its layer."""
    config = SHAPES["deep"]
    model = our_model(config, weights_of("deep"), torch.float64)
    sequence = random_sequence(config, [3, ("image", 2, 3), ("image", 1, 2), 4])
    outputs = {}
    modules = {"patch embedding": model.visual.patch_embed, "final norm": model.model.norm}
    modules |= {f"block {i}": block for i, block in enumerate(model.visual.blocks)}
    modules |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out})
        )
    model(**make_batch([sequence], torch.float64))
    states = helpers.run_numpy_model(config, weights_of("deep"), sequence)["states"]
    states |= states.pop("vision")
    assert states.keys() == outputs.keys()
    for name, expected in states.items():
        assert gap(outputs[name].reshape(expected.shape), expected) <= FLOAT64, name


@pytest.fixture
def float64_reference(monkeypatch):
    """Return a function that builds the reference with float64 in place of each cast to float32."""
    code = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    float64_torch = vars(torch) | {"float": torch.double, "float32": torch.double}
    monkeypatch.setattr(code, "torch", SimpleNamespace(**float64_torch))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return lambda config, weights: helpers.reference_model(config, weights, torch.float64)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [*SHAPES, "sliding window"])
def test_numpy_model_equals_the_reference_in_float64(shape, float64_reference):
    """Check the NumPy model itself, including the sliding window."""
    sliding = helpers.small_config(
        layers=4, use_sliding_window=True, sliding_window=7, max_window_layers=1
    )
    config = SHAPES.get(shape, sliding)
    weights = random_weights(config, seed=3)
    theirs = float64_reference(config, weights)
    for sequence in sequences_of(config):
        expected = helpers.reference_logits(theirs, config, make_batch([sequence], torch.float64))[
            0
        ]
        assert expected.dtype == torch.float64
        found = helpers.run_numpy_model(config, weights, sequence)["logits"]
        assert gap(found, expected) <= SAME


@pytest.mark.slow
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_error_in_bfloat16_is_at_most_that_of_the_reference(attn_implementation):
    """Compare both with float64: two bfloat16 runs differ by more than the error of either."""
    pytest.importorskip("transformers")
    our_error = 0.0
    reference_error = 0.0
    for seed in range(12):
        config = helpers.random_shape(seed)
        # Weights and pixels that are exact in bfloat16, so that only the computation rounds.
        weights = {name: t.bfloat16().float() for name, t in random_weights(config, seed).items()}
        exact_model = our_model(config, weights, torch.float64)
        model = our_model(config, weights, torch.bfloat16, attn_implementation)
        theirs = helpers.reference_model(config, weights, torch.bfloat16, attn_implementation)
        # The last sequence is long: the error of a RoPE table in bfloat16 grows with the position.
        for parts in (
            [20],
            [5, ("image", 2, 3), 3, ("image", 1, 1), 4],
            [60, ("image", 5, 7), 140],
        ):
            batch = make_batch([random_sequence(config, parts, seed)], torch.bfloat16)
            exact_logits = exact_model(**cast(batch, torch.float64))
            reference_logits = helpers.reference_logits(theirs, config, batch)
            our_error += (model(**batch) - exact_logits).abs().mean().item()
            reference_error += (reference_logits - exact_logits).abs().mean().item()
    assert our_error / reference_error <= 1.05


def test_cached_decoding_equals_the_reference():
    """Compare the logits of eight greedy tokens after a padded batch with images."""
    config = SHAPES["default"]
    model = ours("default")
    theirs = reference("default")
    names = ("one image", "several messages")
    batch = make_batch([random_sequence(config, CONVERSATIONS[name], 5) for name in names])
    generated = theirs.generate(
        **batch,
        mm_token_type_ids=helpers.token_types(config, batch["input_ids"]),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=helpers.PAD,
    )
    cache = KVCache(model.config, batch_size=2, max_length=generated.sequences.shape[1])
    logits = model(**batch, cache=cache, logits_to_keep=1)
    mask = batch["attention_mask"]
    for step, expected in enumerate(generated.logits):
        assert gap(logits[:, -1], expected) <= FLOAT32
        new = generated.sequences[:, batch["input_ids"].shape[1] + step, None]
        assert torch.equal(logits[:, -1:].argmax(-1), new)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        if step < 7:
            logits = model(new, attention_mask=mask, cache=cache)


def cast(batch, dtype):
    """Return the batch with its floating-point tensors in another dtype."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


# ------------------------------------------------------------------------------------- golden files


@cache
def golden(model):
    """Return the config, the weights and the arrays of a golden model, see make_golden_model.py."""
    file = np.load(GOLDEN / "model.npz")
    prefix = f"{model}/"
    arrays = {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}
    weights = {
        name.removeprefix("weights/"): torch.from_numpy(array.astype(np.float32))
        for name, array in arrays.items()
        if name.startswith("weights/")
    }
    return json.loads(str(arrays["config"])), weights, arrays


def golden_batch(arrays, case, dtype):
    """Return the keyword arguments of `Qwen2VL.forward` of a golden case."""
    names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
    )
    batch = {n: torch.from_numpy(arrays[f"{case}/{n}"]) for n in names if f"{case}/{n}" in arrays}
    return cast(batch, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("case", ["row", "batch"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_model_equals_the_golden_file(name, case, flash):
    config, weights, arrays = golden(name)
    for attn_implementation in IMPLEMENTATIONS:
        batch = golden_batch(arrays, case, torch.float32)
        model = our_model(config, weights, attn_implementation=attn_implementation)
        positions, deltas = rope_index(config, batch)
        assert positions.tolist() == arrays[f"{case}/position_ids"].tolist()
        assert deltas.tolist() == arrays[f"{case}/rope_deltas"].tolist()
        real = real_tokens(batch)
        assert gap(model(**batch)[real], arrays[f"{case}/logits"][real]) <= FLOAT32
        features = model.visual(batch["pixel_values"], batch["image_grid_thw"])
        assert gap(features, arrays[f"{case}/features"]) <= FLOAT32
        features = model.visual(batch["pixel_values_videos"], batch["video_grid_thw"])
        assert gap(features, arrays[f"{case}/features_videos"]) <= FLOAT32


# ---------------------------------------------------------------------------------------- positions


def rope_index(config, batch):
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return get_rope_index(
        our_config(config), **{name: batch[name] for name in names if name in batch}
    )


sizes = st.integers(1, 5)
images = st.tuples(st.just("image"), sizes, sizes)
# In transformers 5 the text after a video overlaps its positions where time exceeds both height and
# width.
short_videos = st.tuples(st.just("video"), sizes, sizes, sizes).filter(
    lambda video: video[1] <= max(video[2:])
)
conversations = st.lists(st.one_of(st.integers(1, 6), images, short_videos), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=80)
@given(parts=st.lists(conversations, min_size=1, max_size=3))
def test_get_rope_index_equals_the_reference(parts):
    config = SHAPES["default"]
    batch = make_batch([small_sequence(config, conversation) for conversation in parts])
    positions, deltas = rope_index(config, batch)
    expected, expected_deltas = reference("default").model.get_rope_index(
        batch["input_ids"],
        helpers.token_types(config, batch["input_ids"]),
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch.get("attention_mask"),
    )
    assert torch.equal(positions, expected)
    assert torch.equal(deltas, expected_deltas)
    assert positions.dtype == deltas.dtype == torch.int64


def small_sequence(config, parts):
    """Return a sequence whose patches have one value instead of over a thousand."""
    vision = config["vision_config"] | {"in_channels": 1, "temporal_patch_size": 1, "patch_size": 1}
    return random_sequence(config | {"vision_config": vision}, parts)


def test_get_rope_index_continues_after_a_video_longer_than_wide():
    """Apply the paper's rule by hand to a video of 4×1×2 tokens, which starts at position 3."""
    sequence = small_sequence(SHAPES["default"], [2, ("video", 4, 1, 2), 1])
    positions, deltas = rope_index(SHAPES["default"], make_batch([sequence]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8],  # time: two tokens per temporal slice
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 7, 8],  # height: one row
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 7, 8],  # width: two columns
    ]  # the vision end is at 3 + max(4, 1, 2)
    assert deltas.tolist() == [[9 - 13]]


def test_get_rope_index_equals_the_golden_positions_of_long_videos():
    """Compare with transformers 4.57.6, which follows the paper; see make_golden_model.py."""
    cases = json.loads((GOLDEN / "positions.json").read_text())
    assert any(
        part[0] == "video" and part[1] > max(part[2:])
        for case in cases
        for part in case["parts"]
        if part[1:]
    )
    for case in cases:
        parts = [part[0] if len(part) == 1 else tuple(part) for part in case["parts"]]
        batch = make_batch([small_sequence(SHAPES["default"], parts)])
        positions, deltas = rope_index(SHAPES["default"], batch)
        assert positions[:, 0].tolist() == case["position_ids"]
        assert deltas.item() == case["rope_delta"]


@pytest.mark.parametrize(
    "grids",
    [
        {"image_grid_thw": torch.tensor([[1, 4, 6]])},  # six tokens, four placeholders
        {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])},  # an image without placeholders
        {"video_grid_thw": torch.tensor([[1, 4, 4]])},  # of the wrong kind
    ],
    ids=["too large", "one too many", "video"],
)
def test_get_rope_index_refuses_grids_that_do_not_match_the_placeholders(grids):
    config = our_config(SHAPES["default"])
    ids = torch.tensor([small_sequence(SHAPES["default"], [2, ("image", 2, 2), 1])["ids"]])
    with pytest.raises(ValueError, match="placeholder"):
        get_rope_index(config, ids, **grids)


# ------------------------------------------------------------------------ attention implementations


@pytest.mark.sweep
@pytest.mark.parametrize("shape", ["default", "one kv head", "no sharing", "other patches"])
def test_attention_implementations_agree(shape, flash):
    config = SHAPES[shape]
    batches = [make_batch([sequence], torch.float64) for sequence in sequences_of(config)]
    batches.append(make_batch(sequences_of(config), torch.float64))  # left padded
    for batch in batches:
        real = real_tokens(batch)
        expected = ours(shape, torch.float64, "eager")(**batch)[real]
        for attn_implementation in ("sdpa", "flash"):
            logits = ours(shape, torch.float64, attn_implementation)(**batch)[real]
            assert gap(logits, expected) <= SAME


def test_flash_attention_gets_packed_sequences(flash):
    """Check the offsets: per temporal slice in vision, per sequence and causal in the decoder."""
    config = SHAPES["one kv head"]
    sequences = [
        random_sequence(config, [2, ("image", 2, 3), 1]),
        random_sequence(config, [3, ("video", 2, 1, 2), 5]),
    ]
    ours("one kv head", torch.float64, "flash")(**make_batch(sequences, torch.float64))
    lengths = [len(sequence["ids"]) for sequence in sequences]
    assert lengths == [11, 14]
    vision = (2, 2)
    text = (6, 1)
    blocks = config["vision_config"]["depth"]
    layers = config["num_hidden_layers"]
    assert flash.calls == (
        [{"causal": False, "cu_seqlens_q": [0, 24], "heads": vision}] * blocks
        + [{"causal": False, "cu_seqlens_q": [0, 8, 16], "heads": vision}] * blocks
        + [{"causal": True, "cu_seqlens_q": [0, lengths[0], sum(lengths)], "heads": text}] * layers
    )


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, SAME), (torch.float32, FLOAT32 / 3)], ids=str
)
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["default", "tied", "one kv head"])
def test_batch_equals_each_sequence_alone(shape, attn_implementation, dtype, tolerance, flash):
    model = ours(shape, dtype, attn_implementation)
    sequences = sequences_of(SHAPES[shape])
    batch_logits = model(**make_batch(sequences, dtype))
    for sequence, logits in zip(sequences, batch_logits, strict=True):
        alone = model(**make_batch([sequence], dtype))[0]
        assert gap(logits[-len(sequence["ids"]) :], alone) <= tolerance


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_padding_does_not_change_the_logits(attn_implementation, flash):
    """Check long padding with other ids, and that no logit is NaN."""
    config = SHAPES["default"]
    model = ours("default", torch.float64, attn_implementation)
    sequences = [random_sequence(config, [40]), random_sequence(config, [2, ("image", 2, 2), 3])]
    batch = make_batch(sequences, torch.float64)
    logits = model(**batch)
    padding = ~real_tokens(batch)
    assert logits.isfinite().all()
    batch["input_ids"][padding] = config["vocab_size"] - 1
    assert gap(model(**batch)[~padding], logits[~padding]) == 0


# ----------------------------------------------------------------------------------------- KV cache


@pytest.mark.sweep
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["default", "tied", "one kv head"])
def test_kv_cache_equals_run_without_cache(shape, attn_implementation, flash):
    """Prefill a left-padded batch up to its last five tokens, then decode token by token."""
    config = SHAPES[shape]
    model = ours(shape, torch.float64, attn_implementation)
    names = ("text only", "several images in a message", "several messages")
    sequences = [random_sequence(config, CONVERSATIONS[name], 7) for name in names]
    batch = make_batch(sequences, torch.float64)
    expected = model(**batch)
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    prefill = ids.shape[1] - 5
    cache = KVCache(model.config, batch_size=3, max_length=ids.shape[1], dtype=torch.float64)
    first = batch | {"input_ids": ids[:, :prefill], "attention_mask": mask[:, :prefill]}
    steps = [model(**first, cache=cache)]
    for i in range(prefill, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache))
    assert cache.length == ids.shape[1]
    assert gap(torch.cat(steps, dim=1)[mask.bool()], expected[mask.bool()]) <= SAME


CHATS = [
    [[4, ("image", 2, 3), 2], [3, ("image", 1, 4), 2], [1]],
    [[9], [1, ("image", 3, 1), ("image", 2, 2), 5], [6]],
]


@pytest.mark.sweep
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chats", [CHATS, CHATS[:1]], ids=["two of different lengths", "one"])
def test_kv_cache_continues_a_conversation(chats, attn_implementation, flash):
    """Run three turns, with new images in the second: several new tokens follow cached ones.

    Positions continue, and with two conversations the cache contains padding in the middle.
    """
    config = SHAPES["default"]
    model = ours("default", torch.float64, attn_implementation)
    sequences = [
        [random_sequence(config, turn, 10 * c + t) for t, turn in enumerate(chat)]
        for c, chat in enumerate(chats)
    ]
    cache = KVCache(model.config, batch_size=len(chats), max_length=64, dtype=torch.float64)
    mask = torch.zeros(len(chats), 0, dtype=torch.long)
    outputs = [[] for _ in chats]
    for turn in zip(*sequences, strict=True):
        batch = make_batch(turn, torch.float64)
        mask = torch.cat([mask, real_tokens(batch).long()], dim=1)
        if len(chats) > 1:
            batch["attention_mask"] = mask
        logits = model(**batch, cache=cache)
        for chat_logits, new, real in zip(outputs, logits, real_tokens(batch), strict=True):
            chat_logits.append(new[real[-new.shape[0] :]])
    for turns, chat_logits, parts in zip(sequences, outputs, chats, strict=True):
        joined = {"ids": [i for turn in turns for i in turn["ids"]], "video": ([], [])}
        joined["image"] = tuple([x for turn in turns for x in turn["image"][k]] for k in (0, 1))
        alone = model(**make_batch([joined], torch.float64))[0]
        assert gap(torch.cat(chat_logits), alone) <= SAME, parts


def test_model_keeps_no_state_between_calls():
    """Positions of one call must not leak into the next, as they have in other implementations."""
    model = ours("default", torch.float64)
    sequences = sequences_of(SHAPES["default"])
    first = make_batch([sequences[2]], torch.float64)
    second = make_batch([sequences[3]], torch.float64)
    before = model(**first)
    model(**second, cache=KVCache(model.config, batch_size=1, max_length=64, dtype=torch.float64))
    model(torch.tensor([[7, 8, 9]]))
    assert gap(model(**first), before) == 0


def test_logits_to_keep_returns_the_last_logits():
    model = ours("default", torch.float64)
    batch = make_batch(sequences_of(SHAPES["default"]), torch.float64)
    assert gap(model(**batch, logits_to_keep=2), model(**batch)[:, -2:]) <= SAME


def test_full_kv_cache_is_an_error():
    model = ours("default")
    cache = KVCache(model.config, batch_size=1, max_length=4)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        model(torch.tensor([[8, 9]]), cache=cache)


# -------------------------------------------------- hidden states, embeddings, loss, initialization


def test_hidden_states_equal_the_reference_base_model():
    config = SHAPES["default"]
    model = ours("default")
    theirs = reference("default")
    batch = make_batch(sequences_of(config))
    theirs.model.rope_deltas = None
    types = helpers.token_types(config, batch["input_ids"])
    expected = theirs.model(**batch, mm_token_type_ids=types, use_cache=False).last_hidden_state
    real = real_tokens(batch)
    hidden_states = model.hidden_states(**batch)
    assert hidden_states.shape == (*batch["input_ids"].shape, config["hidden_size"])
    assert gap(hidden_states[real], expected[real]) <= FLOAT32
    assert gap(model.lm_head(hidden_states), model(**batch)) == 0


def test_inputs_embeds_equal_the_ids_they_embed():
    model = ours("default", torch.float64)
    text = torch.tensor([[20, 21, 22, 23]])
    embeds = model.model.embed_tokens(text)
    assert gap(model(inputs_embeds=embeds), model(text)) == 0
    assert gap(model(inputs_embeds=embeds * 0), model(text)) > 1e-3

    batch = make_batch(sequences_of(SHAPES["default"]), torch.float64)
    embeds = model.model.embed_tokens(batch["input_ids"])
    assert gap(model(**batch, inputs_embeds=embeds), model(**batch)) == 0


def test_inputs_embeds_without_ids_refuse_images():
    model = ours("default")
    batch = make_batch(sequences_of(SHAPES["default"])[1:2])
    embeds = model.model.embed_tokens(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="need input_ids"):
        model(**batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="got neither"):
        model()


def test_labels_give_the_loss_of_the_reference():
    config = SHAPES["default"]
    model = ours("default")
    theirs = reference("default")
    batch = make_batch(sequences_of(config))
    # The first token of a padded sequence would be predicted from padding, which has no meaning in
    # either model.
    predicted = real_tokens(batch) & real_tokens(batch).roll(1, dims=1)
    labels = batch["input_ids"].masked_fill(~predicted, -100)
    theirs.model.rope_deltas = None
    types = helpers.token_types(config, batch["input_ids"])
    expected = theirs(**batch, mm_token_type_ids=types, labels=labels, use_cache=False).loss
    loss, logits = model(**batch, labels=labels)
    assert gap(loss, expected) <= FLOAT32
    assert gap(logits, model(**batch)) == 0


def test_new_model_starts_with_the_published_initialization():
    config = our_config(SHAPES["default"])
    config.initializer_range = 0.1
    torch.manual_seed(0)
    model = Qwen2VL(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:  # of a norm
            assert (parameter == 1).all(), name
        else:
            assert 0.08 < parameter.std() < 0.12, name
            assert abs(parameter.mean()) < 0.02, name


def test_attn_implementation_plain_is_still_accepted():
    with pytest.warns(UserWarning, match="eager"):
        model = Qwen2VL(our_config(SHAPES["default"]), attn_implementation="plain")
    assert model.attn_implementation == "eager"


# -------------------------------------------------------------- memory, dtypes and kernels of a run


class TensorRecorder(TorchDispatchMode):
    """Record the dtypes and the largest size of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        values = output if isinstance(output, (tuple, list)) else [output]
        for value in values:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
                self.dtypes.add(value.dtype)
        return output


@pytest.mark.sweep
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("grids", [[[1, 12, 12]] * 24, [[1, 12, 14], [1, 14, 12], [1, 10, 16]] * 8])
def test_vision_encoder_allocates_no_matrix_of_patches_by_patches(
    attn_implementation, grids, flash
):
    """Encode 24 images, of one size and of several."""
    config = helpers.small_config(vision_heads=1, vision_width=16, depth=1, patch_size=2)
    weights = random_weights(config)
    visual = our_model(config, weights, attn_implementation=attn_implementation).visual
    patches = sum(t * h * w for t, h, w in grids)
    with TensorRecorder() as recorder:
        visual(torch.zeros(patches, 3 * 2 * 2 * 2), torch.tensor(grids))
    assert recorder.largest < patches**2 / 10


def test_sdpa_attention_groups_the_heads_of_a_key_for_one_query(monkeypatch):
    """Also with a kernel whose output has another memory layout, as on CUDA."""
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **sdpa_kwargs):
        calls.append((list(q.shape), list(k.shape)))
        return original(q, k, v, **sdpa_kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    q = torch.randn(3, 6, 1, 8)
    k = torch.randn(3, 2, 5, 8)
    v = torch.randn(3, 2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()[:, None, None]
    context = AttentionContext(mask=mask)
    output = sdpa_attention(q, k, v, context)
    assert (output - eager_attention(q, k, v, context)).abs().max() < 1e-6
    assert calls == [([3, 2, 3, 8], [3, 2, 5, 8])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_attention_allocates_no_scores_where_heads_share_a_key(dtype, masked):
    tokens = 256
    q = torch.randn(1, 6, tokens, 8, dtype=dtype)
    k = torch.randn(1, 2, tokens, 8, dtype=dtype)
    v = torch.randn(1, 2, tokens, 8, dtype=dtype)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril(-1)
    mask[..., 0] = True
    context = AttentionContext(mask=mask) if masked else AttentionContext(causal=True)
    with TensorRecorder() as recorder:
        output = sdpa_attention(q, k, v, context)
    # One head's scores, or a float mask of the fused kernel, are the most that is allowed.
    assert recorder.largest <= tokens**2
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert gap(output, eager_attention(q, k, v, context)) < tolerance


def test_vision_encoder_calls_sdpa_without_a_mask(monkeypatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask=None, **sdpa_kwargs):
        calls.append((q.shape[2], attn_mask))
        return original(q, k, v, attn_mask=attn_mask, **sdpa_kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    parts = [("image", 2, 2), ("image", 3, 4), ("image", 1, 2), 3]
    batch = make_batch([random_sequence(SHAPES["default"], parts)])
    ours("default").visual(batch["pixel_values"], batch["image_grid_thw"])
    assert {length for length, _ in calls} == {16, 48, 8}
    assert all(mask is None for _, mask in calls)


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_model_in_float64_never_casts_to_another_dtype(attn_implementation, flash):
    """Other dtypes are compared with it."""
    model = ours("default", torch.float64, attn_implementation)
    batch = make_batch(sequences_of(SHAPES["default"]), torch.float64)
    with TensorRecorder() as recorder:
        model(**batch)
    assert {dtype for dtype in recorder.dtypes if dtype.is_floating_point} == {torch.float64}


# ----------------------------------------------------------------------------------- invalid inputs


def test_model_refuses_inputs_that_do_not_match():
    config = SHAPES["default"]
    model = ours("default")
    batch = make_batch([random_sequence(config, [2, ("image", 2, 2), 3])])
    larger_image = {
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values": torch.zeros(24, 1176),
    }
    with pytest.raises(ValueError, match=r"4 placeholders.* 6"):
        model(**(batch | larger_image))
    with pytest.raises(ValueError, match=r"16 patches.*24"):
        model.visual(batch["pixel_values"], torch.tensor([[1, 4, 6]]))
    with pytest.raises(ValueError, match="attention_mask"):
        model(batch["input_ids"], attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="attn_implementation is 'fast'"):
        our_model(config, weights_of("default"), attn_implementation="fast")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_attention_heads": 5}, r"\b5 .*\b64\b"),
        ({"num_key_value_heads": 3}, r"\b4, got 3\b"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}},
            r"mrope_section: .*got \[2, 3, 4\]",
        ),
        ({"rope_scaling": {"type": "elastic", "mrope_section": [2, 3, 3]}}, "elastic"),
        ({"hidden_act": "swish9"}, "swish9"),
    ],
)
def test_config_refuses_impossible_values(change, names):
    with pytest.raises(ValueError, match=names):
        our_config(SHAPES["default"] | change)


def test_sequence_without_new_tokens_keeps_its_position():
    """In a batch of chats one may have ended: its part of a later turn is all padding."""
    config = SHAPES["default"]
    model = ours("default", torch.float64)
    cache = KVCache(model.config, batch_size=2, max_length=32, dtype=torch.float64)
    model(torch.tensor([[5, 6, 7], [8, 9, 10]]), cache=cache)
    turn = make_batch(
        [
            random_sequence(config, [1, ("image", 2, 2)]),
            {"ids": [], "image": ([], []), "video": ([], [])},
        ]
    )
    turn["pixel_values"] = turn["pixel_values"].double()
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), turn["attention_mask"]], dim=1)
    logits = model(**(turn | {"attention_mask": mask}), cache=cache)
    assert logits.isfinite().all()
    assert cache.next_position.tolist() == [[3 + 1 + 1 + 2 + 1], [3]]
