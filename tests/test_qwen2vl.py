"""`qwen2vl.py` against transformers (live), the float64 formulas of `reference/numpy_model.py`, and itself.

The tolerances are those that tell right from wrong: a correct float32 run lies within 1e-5 to 3e-5 of the
reference on models of this size, and every fault tried moves it by 1e-4 or more. What float32 cannot see (an eps
of 1e-5 in a LayerNorm), the comparison of float64 runs at 1e-9 does.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import SHAPES, gap, make_batch, our_config, our_model, random_row, random_weights
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

FLOAT32, FLOAT64 = 3e-5, 1e-9  # largest absolute difference from the reference, from the oracle
SAME = 1e-12  # between two ways of computing the same float64 numbers
GOLDEN = Path(__file__).parent / "golden"
IMPLEMENTATIONS = ("eager", "sdpa", "flash")

# A number is so many words; a picture is (height, width) and a clip (time, height, width), in tokens.
CONVERSATIONS = {
    "only words": [11],
    "one picture": [5, ("image", 2, 3), 4],
    "several pictures in a message": [2, ("image", 2, 2), ("image", 3, 1), ("image", 1, 4), 5],
    "several messages": [4, ("image", 3, 2), 7, ("image", 1, 1), ("image", 2, 2), 6],
    "a clip": [3, ("video", 3, 2, 3), 2],
    "a picture and a clip": [1, ("video", 2, 2, 2), 3, ("image", 2, 4), 2],
}


def rows_of(config):
    return [random_row(config, parts, seed) for seed, parts in enumerate(CONVERSATIONS.values())]


@cache
def weights_of(shape):
    return random_weights(SHAPES[shape], seed=list(SHAPES).index(shape))


@cache
def ours(shape, dtype=torch.float32, attention="sdpa"):
    return our_model(SHAPES[shape], weights_of(shape), dtype, attention)


@cache
def reference(shape):
    pytest.importorskip(
        "transformers", reason="the live comparison; the golden files are checked without it"
    )
    return helpers.reference_model(SHAPES[shape], weights_of(shape))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def real_tokens(batch):
    """Where nothing is padded: bool [B, S]."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


# ------------------------------------------------------------------------- the same numbers as elsewhere


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_features_and_logits_are_the_reference_s(shape):
    config, model, theirs = SHAPES[shape], ours(shape), reference(shape)
    for row in rows_of(config):
        batch = make_batch([row])
        assert gap(model(**batch), helpers.reference_logits(theirs, config, batch)) <= FLOAT32
        for pixels, grid in (
            ("pixel_values", "image_grid_thw"),
            ("pixel_values_videos", "video_grid_thw"),
        ):
            if pixels in batch:
                expected = theirs.model.visual(batch[pixels], batch[grid]).pooler_output
                assert gap(model.visual(batch[pixels], batch[grid]), expected) <= FLOAT32


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_padded_batch_is_the_reference_s(shape):
    config = SHAPES[shape]
    batch = make_batch(rows_of(config))
    real = real_tokens(batch)
    assert not real.all()
    expected = helpers.reference_logits(reference(shape), config, batch)
    assert gap(ours(shape)(**batch)[real], expected[real]) <= FLOAT32


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_formulas(shape):
    config, model = SHAPES[shape], ours(shape, torch.float64)
    for row in rows_of(config):
        batch, expected = (
            make_batch([row], torch.float64),
            helpers.oracle_run(config, weights_of(shape), row),
        )
        assert gap(model(**batch)[0], expected["logits"]) <= FLOAT64
        for pixels, grid, kind in (
            ("pixel_values", "image_grid_thw", "vision"),
            ("pixel_values_videos", "video_grid_thw", "video"),
        ):
            if pixels in batch:
                assert gap(model.visual(batch[pixels], batch[grid]), expected[kind]) <= FLOAT64
        positions, deltas = rope_index(config, batch)
        assert positions[:, 0].tolist() == expected["positions"].tolist()
        assert deltas.tolist() == [[expected["rope_delta"]]]


def test_every_layer_in_float64_is_the_formulas():
    """So that a fault is found in the layer where it sits."""
    config, model = SHAPES["deep"], our_model(SHAPES["deep"], weights_of("deep"), torch.float64)
    row, seen = random_row(config, [3, ("image", 2, 3), ("image", 1, 2), 4]), {}
    modules = {"patch embedding": model.visual.patch_embed, "final norm": model.model.norm}
    modules |= {f"block {i}": block for i, block in enumerate(model.visual.blocks)}
    modules |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    model(**make_batch([row], torch.float64))
    states = helpers.oracle_run(config, weights_of("deep"), row)["states"]
    states |= states.pop("vision")
    assert states.keys() == seen.keys()
    for name, expected in states.items():
        assert gap(seen[name].reshape(expected.shape), expected) <= FLOAT64, name


@pytest.fixture
def unrounded_reference(monkeypatch):
    """transformers' code, in which every rounding to float32 means float64 instead."""
    code = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    monkeypatch.setattr(
        code,
        "torch",
        SimpleNamespace(**vars(torch) | dict.fromkeys(("float", "float32"), torch.double)),
    )
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return lambda config, weights: helpers.reference_model(config, weights, torch.float64)


@pytest.mark.parametrize("shape", [*SHAPES, "sliding window"])
def test_the_oracle_is_the_reference_without_its_roundings(shape, unrounded_reference):
    """The judge is judged too, and by more than `qwen2vl.py` is: it knows the sliding window."""
    sliding = helpers.small_config(
        layers=4, use_sliding_window=True, sliding_window=7, max_window_layers=1
    )
    config = SHAPES.get(shape, sliding)
    weights = random_weights(config, seed=3)
    theirs = unrounded_reference(config, weights)
    for row in rows_of(config):
        expected = helpers.reference_logits(theirs, config, make_batch([row], torch.float64))[0]
        assert expected.dtype == torch.float64
        assert gap(helpers.oracle_run(config, weights, row)["logits"], expected) <= SAME


@pytest.mark.parametrize(("attention", "their_attention"), [("sdpa", "sdpa"), ("eager", "eager")])
def test_bfloat16_is_no_further_from_float64_than_the_reference(attention, their_attention):
    """Two bf16 runs wander apart by more than either should; what counts is how far each is from the truth."""
    pytest.importorskip("transformers")
    our_distance = their_distance = 0.0
    for seed in range(12):
        config = helpers.random_shape(seed)
        # Weights and pixels that bf16 holds exactly, so that only the computing is measured.
        weights = {name: t.bfloat16().float() for name, t in random_weights(config, seed).items()}
        truth = our_model(config, weights, torch.float64)
        half = our_model(config, weights, torch.bfloat16, attention)
        theirs = helpers.reference_model(config, weights, torch.bfloat16, their_attention)
        # The last one is long, because a rope table in bf16 goes wrong with the distance.
        for parts in (
            [20],
            [5, ("image", 2, 3), 3, ("image", 1, 1), 4],
            [60, ("image", 5, 7), 140],
        ):
            batch = make_batch([random_row(config, parts, seed)], torch.bfloat16)
            exact = truth(
                **{name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
            )
            our_distance += (half(**batch) - exact).abs().mean().item()
            their_distance += (
                (helpers.reference_logits(theirs, config, batch) - exact).abs().mean().item()
            )
    assert our_distance / their_distance <= 1.05


def test_cached_steps_are_the_reference_s_generation():
    """Eight greedy tokens after a padded batch with pictures: our cache beside theirs, logits and all."""
    config, model, theirs = SHAPES["plain"], ours("plain"), reference("plain")
    batch = make_batch(
        [random_row(config, CONVERSATIONS[name], 5) for name in ("one picture", "several messages")]
    )
    made = theirs.generate(
        **batch,
        mm_token_type_ids=helpers.token_types(config, batch["input_ids"]),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=helpers.PAD,
    )
    cache = KVCache(model.config, batch_size=2, max_length=made.sequences.shape[1])
    logits, mask = model(**batch, cache=cache, logits_to_keep=1), batch["attention_mask"]
    for step, expected in enumerate(made.logits):
        assert gap(logits[:, -1], expected) <= FLOAT32
        new = made.sequences[:, batch["input_ids"].shape[1] + step, None]
        assert torch.equal(logits[:, -1:].argmax(-1), new)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        if step < 7:
            logits = model(new, attention_mask=mask, cache=cache)


# -------------------------------------------------------------------------------------------- golden files


@cache
def golden(model):
    """What transformers computed for a small model with these very weights; made by make_golden_model.py."""
    arrays, found = np.load(GOLDEN / "model.npz"), {}
    for key in arrays.files:
        name, *path = key.split("/")
        if name == model:
            found["/".join(path)] = arrays[key]
    weights = {
        n[8:]: torch.from_numpy(a.astype(np.float32))
        for n, a in found.items()
        if n.startswith("weights/")
    }
    return json.loads(str(found["config"])), weights, found


def golden_batch(found, case, dtype):
    names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
    )
    batch = {n: torch.from_numpy(found[f"{case}/{n}"]) for n in names if f"{case}/{n}" in found}
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}


@pytest.mark.parametrize("case", ["row", "batch"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_golden_model(name, case, flash):
    config, weights, found = golden(name)
    for attention in IMPLEMENTATIONS:
        batch = golden_batch(found, case, torch.float32)
        model = our_model(config, weights, attention=attention)
        positions, deltas = rope_index(config, batch)
        assert positions.tolist() == found[f"{case}/position_ids"].tolist()
        assert deltas.tolist() == found[f"{case}/rope_deltas"].tolist()
        real = real_tokens(batch)
        assert gap(model(**batch)[real], found[f"{case}/logits"][real]) <= FLOAT32
        features = model.visual(batch["pixel_values"], batch["image_grid_thw"])
        assert gap(features, found[f"{case}/features"]) <= FLOAT32
        features = model.visual(batch["pixel_values_videos"], batch["video_grid_thw"])
        assert gap(features, found[f"{case}/features_videos"]) <= FLOAT32


# ----------------------------------------------------------------------------------------------- positions


def rope_index(config, batch):
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return get_rope_index(
        our_config(config), **{name: batch[name] for name in names if name in batch}
    )


sizes = st.integers(1, 5)
pictures = st.tuples(st.just("image"), sizes, sizes)
# transformers 5 lets the words after a clip overlap its tail where it is longer than it is high and wide.
short_clips = st.tuples(st.just("video"), sizes, sizes, sizes).filter(
    lambda clip: clip[1] <= max(clip[2:])
)
conversations = st.lists(
    st.one_of(st.integers(1, 6), pictures, short_clips), min_size=1, max_size=6
)


@settings(max_examples=80)
@given(parts=st.lists(conversations, min_size=1, max_size=3))
def test_positions_and_deltas_are_the_reference_s(parts):
    config = SHAPES["plain"]
    batch = make_batch([thin_row(config, row) for row in parts])
    positions, deltas = rope_index(config, batch)
    expected, expected_deltas = reference("plain").model.get_rope_index(
        batch["input_ids"],
        helpers.token_types(config, batch["input_ids"]),
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch.get("attention_mask"),
    )
    assert torch.equal(positions, expected)
    assert torch.equal(deltas, expected_deltas)
    assert positions.dtype == deltas.dtype == torch.int64


def thin_row(config, parts):
    """A row whose pixels do not matter: one column instead of over a thousand."""
    vision = config["vision_config"] | {"in_channels": 1, "temporal_patch_size": 1, "patch_size": 1}
    return random_row(config | {"vision_config": vision}, parts)


def test_a_clip_longer_than_it_is_wide_pushes_the_text_on():
    """The paper's rule by hand: a clip of 4x1x2 tokens after two words and a vision start, at p = 3."""
    row = thin_row(SHAPES["plain"], [2, ("video", 4, 1, 2), 1])
    positions, deltas = rope_index(SHAPES["plain"], make_batch([row]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8],  # time: two tokens a slice
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 7, 8],  # row: there is one
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 7, 8],  # column: two
    ]  # the vision end follows at 3 + max(4, 1, 2)
    assert deltas.tolist() == [[9 - 13]]


def test_golden_positions_of_long_clips():
    """Held to transformers 4.57.6, which still follows the paper; see make_golden_model.py."""
    cases = json.loads((GOLDEN / "positions.json").read_text())
    assert any(
        part[0] == "video" and part[1] > max(part[2:])
        for case in cases
        for part in case["parts"]
        if part[1:]
    )
    for case in cases:
        parts = [part[0] if len(part) == 1 else tuple(part) for part in case["parts"]]
        positions, deltas = rope_index(
            SHAPES["plain"], make_batch([thin_row(SHAPES["plain"], parts)])
        )
        assert positions[:, 0].tolist() == case["position_ids"]
        assert deltas.item() == case["rope_delta"]


def test_positions_refuse_grids_that_do_not_fit():
    config = our_config(SHAPES["plain"])
    ids = torch.tensor([thin_row(SHAPES["plain"], [2, ("image", 2, 2), 1])["ids"]])
    with pytest.raises(ValueError, match="placeholder"):
        get_rope_index(config, ids, torch.tensor([[1, 4, 6]]))  # six tokens, four placeholders
    with pytest.raises(ValueError, match="placeholder"):
        get_rope_index(
            config, ids, torch.tensor([[1, 4, 4], [1, 4, 4]])
        )  # a picture that is nowhere
    with pytest.raises(ValueError, match="placeholder"):
        get_rope_index(config, ids, video_grid_thw=torch.tensor([[1, 4, 4]]))  # of the wrong kind


# ------------------------------------------------------------------- the three ways through attention


@pytest.mark.parametrize("shape", ["plain", "one kv head", "no sharing", "other patches"])
def test_all_attention_ways_agree(shape, flash):
    config = SHAPES[shape]
    batches = [make_batch([row], torch.float64) for row in rows_of(config)]
    batches.append(make_batch(rows_of(config), torch.float64))  # left padded
    for batch in batches:
        plain, sdpa, packed = (ours(shape, torch.float64, way)(**batch) for way in IMPLEMENTATIONS)
        real = real_tokens(batch)
        assert gap(sdpa[real], plain[real]) <= SAME
        assert gap(packed[real], plain[real]) <= SAME


def test_flash_attention_gets_packed_sequences(flash):
    """Pictures: an offset per temporal slice, not causal. Decoder: an offset per row, causal, without padding."""
    config = SHAPES["one kv head"]
    rows = [
        random_row(config, [2, ("image", 2, 3), 1]),
        random_row(config, [3, ("video", 2, 1, 2), 5]),
    ]
    ours("one kv head", torch.float64, "flash")(**make_batch(rows, torch.float64))
    lengths = [len(row["ids"]) for row in rows]
    assert lengths == [11, 14]
    vision, text = (2, 2), (6, 1)
    blocks, layers = config["vision_config"]["depth"], config["num_hidden_layers"]
    assert flash.calls == (
        [{"causal": False, "cu_seqlens_q": [0, 24], "heads": vision}] * blocks
        + [{"causal": False, "cu_seqlens_q": [0, 8, 16], "heads": vision}] * blocks
        + [{"causal": True, "cu_seqlens_q": [0, lengths[0], sum(lengths)], "heads": text}] * layers
    )


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["plain", "tied", "one kv head"])
def test_each_row_of_a_batch_gives_what_it_gives_alone(shape, attention, flash):
    config = SHAPES[shape]
    for dtype, tolerance in ((torch.float64, SAME), (torch.float32, FLOAT32 / 3)):
        model, rows = ours(shape, dtype, attention), rows_of(config)
        together = model(**make_batch(rows, dtype))
        for row, logits in zip(rows, together, strict=True):
            assert (
                gap(logits[-len(row["ids"]) :], model(**make_batch([row], dtype))[0]) <= tolerance
            )


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_padding_holds_nothing_that_reaches_the_rest(attention, flash):
    """Whatever ids stand in the padding, also a lot of it, and nothing comes out as NaN."""
    config, model = SHAPES["plain"], ours("plain", torch.float64, attention)
    batch = make_batch(
        [random_row(config, [40]), random_row(config, [2, ("image", 2, 2), 3])], torch.float64
    )
    logits, padding = model(**batch), ~real_tokens(batch)
    assert logits.isfinite().all()
    batch["input_ids"][padding] = config["vocab_size"] - 1
    assert gap(model(**batch)[~padding], logits[~padding]) == 0


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["plain", "tied", "one kv head"])
def test_cached_decoding_is_the_run_without_cache(shape, attention, flash):
    """A left-padded batch, all but the last five words of each row first, then word by word."""
    config, model = SHAPES[shape], ours(shape, torch.float64, attention)
    names = ("only words", "several pictures in a message", "several messages")
    batch = make_batch(
        [random_row(config, CONVERSATIONS[name], 7) for name in names], torch.float64
    )
    whole = model(**batch)
    ids, mask, prefill = (
        batch["input_ids"],
        batch["attention_mask"],
        batch["input_ids"].shape[1] - 5,
    )
    cache = KVCache(model.config, batch_size=3, max_length=ids.shape[1], dtype=torch.float64)
    first = batch | {"input_ids": ids[:, :prefill], "attention_mask": mask[:, :prefill]}
    steps = [model(**first, cache=cache)]
    for i in range(prefill, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache))
    assert cache.length == ids.shape[1]
    assert gap(torch.cat(steps, dim=1)[mask.bool()], whole[mask.bool()]) <= SAME


CHATS = [
    [[4, ("image", 2, 3), 2], [3, ("image", 1, 4), 2], [1]],
    [[9], [1, ("image", 3, 1), ("image", 2, 2), 5], [6]],
]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("chats", [CHATS, CHATS[:1]], ids=["two of different lengths", "one"])
def test_a_conversation_goes_on_in_the_cache(chats, attention, flash):
    """Three turns, with new pictures in the second: several new tokens follow cached ones, positions count on,
    and where there are two conversations, padding comes to stand in the middle of the cache."""
    config, model = SHAPES["plain"], ours("plain", torch.float64, attention)
    rows = [
        [random_row(config, turn, 10 * r + t) for t, turn in enumerate(chat)]
        for r, chat in enumerate(chats)
    ]
    cache = KVCache(model.config, batch_size=len(chats), max_length=64, dtype=torch.float64)
    mask, out = torch.zeros(len(chats), 0, dtype=torch.long), [[] for _ in chats]
    for turn in zip(*rows, strict=True):
        batch = make_batch(turn, torch.float64)
        mask = torch.cat([mask, real_tokens(batch).long()], dim=1)
        if len(chats) > 1:
            batch["attention_mask"] = mask
        for row, new, real in zip(
            out, model(**batch, cache=cache), real_tokens(batch), strict=True
        ):
            row.append(new[real[-new.shape[0] :]])
    for row, turns, parts in zip(rows, out, chats, strict=True):
        joined = {"ids": [i for turn in row for i in turn["ids"]], "video": ([], [])}
        joined["image"] = tuple([x for turn in row for x in turn["image"][k]] for k in (0, 1))
        alone = model(**make_batch([joined], torch.float64))[0]
        assert gap(torch.cat(turns), alone) <= SAME, parts


def test_a_model_keeps_nothing_between_calls():
    """Positions of one call must not show in the next: a bug that every large implementation has had."""
    config, model = SHAPES["plain"], ours("plain", torch.float64)
    first, second = (make_batch([row], torch.float64) for row in rows_of(config)[2:4])
    before = model(**first)
    model(**second, cache=KVCache(model.config, batch_size=1, max_length=64, dtype=torch.float64))
    model(torch.tensor([[7, 8, 9]]))
    assert gap(model(**first), before) == 0


def test_only_the_last_logits_on_request():
    model, batch = ours("plain", torch.float64), make_batch(rows_of(SHAPES["plain"]), torch.float64)
    assert gap(model(**batch, logits_to_keep=2), model(**batch)[:, -2:]) <= SAME


def test_a_full_cache_is_an_error():
    model = ours("plain")
    cache = KVCache(model.config, batch_size=1, max_length=4)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        model(torch.tensor([[8, 9]]), cache=cache)


# ------------------------------------------------------------ hidden states, embeddings, loss, initialization


def test_hidden_states_equal_the_reference_base_model():
    config, model, theirs = SHAPES["plain"], ours("plain"), reference("plain")
    batch = make_batch(rows_of(config))
    theirs.model.rope_deltas = None
    types = helpers.token_types(config, batch["input_ids"])
    expected = theirs.model(**batch, mm_token_type_ids=types, use_cache=False).last_hidden_state
    real = real_tokens(batch)
    found = model.hidden_states(**batch)
    assert found.shape == (*batch["input_ids"].shape, config["hidden_size"])
    assert gap(found[real], expected[real]) <= FLOAT32
    assert gap(model.lm_head(found), model(**batch)) == 0


def test_inputs_embeds_equal_the_ids_they_embed():
    model = ours("plain", torch.float64)
    text = torch.tensor([[20, 21, 22, 23]])
    embeds = model.model.embed_tokens(text)
    assert gap(model(inputs_embeds=embeds), model(text)) == 0
    assert gap(model(inputs_embeds=embeds * 0), model(text)) > 1e-3

    batch = make_batch(rows_of(SHAPES["plain"]), torch.float64)
    embeds = model.model.embed_tokens(batch["input_ids"])
    assert gap(model(**batch, inputs_embeds=embeds), model(**batch)) == 0


def test_inputs_embeds_without_ids_refuse_images():
    model, batch = ours("plain"), make_batch(rows_of(SHAPES["plain"])[1:2])
    embeds = model.model.embed_tokens(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="need input_ids"):
        model(**batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="got neither"):
        model()


def test_labels_give_the_loss_of_the_reference():
    config, model, theirs = SHAPES["plain"], ours("plain"), reference("plain")
    batch = make_batch(rows_of(config))
    # The first token of a padded sequence would be predicted from padding, which means nothing in either.
    predicted = real_tokens(batch) & real_tokens(batch).roll(1, dims=1)
    labels = batch["input_ids"].masked_fill(~predicted, -100)
    theirs.model.rope_deltas = None
    types = helpers.token_types(config, batch["input_ids"])
    expected = theirs(**batch, mm_token_type_ids=types, labels=labels, use_cache=False).loss
    loss, logits = model(**batch, labels=labels)
    assert gap(loss, expected) <= FLOAT32
    assert gap(logits, model(**batch)) == 0


def test_new_model_starts_with_the_published_initialization():
    config = our_config(SHAPES["plain"])
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
        model = Qwen2VL(our_config(SHAPES["plain"]), attn_implementation="plain")
    assert model.attn_implementation == "eager"


# ------------------------------------------------------------------------------- what a run must not do


class Watch(TorchDispatchMode):
    """Looks at every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest, self.dtypes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.dtypes.add(x.dtype)
        return out


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("grids", [[[1, 12, 12]] * 24, [[1, 12, 14], [1, 14, 12], [1, 10, 16]] * 8])
def test_many_pictures_never_make_a_matrix_of_all_by_all(attention, grids, flash):
    """Patches of 24 pictures, of one size and of several: nothing as large as patches x patches is ever made."""
    config = helpers.small_config(vision_heads=1, vision_width=16, depth=1, patch_size=2)
    visual = our_model(config, random_weights(config), attention=attention).visual
    patches = sum(t * h * w for t, h, w in grids)
    with Watch() as watch:
        visual(torch.zeros(patches, 3 * 2 * 2 * 2), torch.tensor(grids))
    assert watch.largest < patches**2 / 10


def test_one_query_asks_for_the_heads_that_share_a_key_at_once(monkeypatch):
    """Also where the kernel hands its result back in another order of memory, as those for CUDA do."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **more):
        seen.append((list(q.shape), more["enable_gqa"]))
        return original(q, k, v, **more).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()[:, None, None]
    context = AttentionContext(mask=mask)
    found = sdpa_attention(q, k, v, context)
    assert (found - eager_attention(q, k, v, context)).abs().max() < 1e-6
    assert seen == [([3, 2, 3, 8], False)]


def test_pictures_go_through_fused_attention_without_a_mask(monkeypatch):
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **more):
        seen.append((q.shape[2], attn_mask))
        return original(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    batch = make_batch(
        [random_row(SHAPES["plain"], [("image", 2, 2), ("image", 3, 4), ("image", 1, 2), 3])]
    )
    ours("plain").visual(batch["pixel_values"], batch["image_grid_thw"])
    assert {length for length, _ in seen} == {16, 48, 8}
    assert all(mask is None for _, mask in seen)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_a_float64_run_never_rounds_to_float32(attention, flash):
    """It is the truth that other dtypes are judged by."""
    model, batch = (
        ours("plain", torch.float64, attention),
        make_batch(rows_of(SHAPES["plain"]), torch.float64),
    )
    with Watch() as watch:
        model(**batch)
    assert {dtype for dtype in watch.dtypes if dtype.is_floating_point} == {torch.float64}


# -------------------------------------------------------------------------------------- loud at the edges


def test_what_does_not_fit_is_refused():
    config, model = SHAPES["plain"], ours("plain")
    batch = make_batch([random_row(config, [2, ("image", 2, 2), 3])])
    with pytest.raises(ValueError, match=r"4 placeholders.* 6"):
        model(
            **(
                batch
                | {
                    "image_grid_thw": torch.tensor([[1, 4, 6]]),
                    "pixel_values": torch.zeros(24, 1176),
                }
            )
        )
    with pytest.raises(ValueError, match=r"16 patches.*24"):
        model.visual(batch["pixel_values"], torch.tensor([[1, 4, 6]]))
    with pytest.raises(ValueError, match="attention_mask"):
        model(batch["input_ids"], attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="attn_implementation is 'fast'"):
        our_model(config, weights_of("plain"), attention="fast")


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
def test_a_config_that_makes_no_sense_is_refused(change, names):
    with pytest.raises(ValueError, match=names):
        our_config(SHAPES["plain"] | change)


def test_a_row_without_new_tokens_stays_where_it_is():
    """In a batch of chats one may have ended: its part of a later turn is all padding."""
    config, model = SHAPES["plain"], ours("plain", torch.float64)
    cache = KVCache(model.config, batch_size=2, max_length=32, dtype=torch.float64)
    model(torch.tensor([[5, 6, 7], [8, 9, 10]]), cache=cache)
    turn = make_batch(
        [
            random_row(config, [1, ("image", 2, 2)]),
            {"ids": [], "image": ([], []), "video": ([], [])},
        ]
    )
    turn["pixel_values"] = turn["pixel_values"].double()
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), turn["attention_mask"]], dim=1)
    logits = model(**(turn | {"attention_mask": mask}), cache=cache)
    assert logits.isfinite().all()
    assert cache.next_position.tolist() == [[3 + 1 + 1 + 2 + 1], [3]]
