"""`extras/explain.py`: numbers worked out on paper, a page that fits, and a model left as it was."""

import contextlib
import re

import numpy as np
import pytest
import torch
from helpers import SHAPES, make_batch, our_model, random_row, random_weights, small_config

from extras.explain import DECODER, VISION, Trace, runs
from generate import TINY, stream
from load_weights import load_model
from preprocess import Batch, Media, Processor, normalize, patchify
from qwen2vl import get_rope_index

EXAMPLES = TINY.parent.parent / "examples"


def clip(processor, frames, rows=4, cols=6, name="walk.mp4"):
    """A film of coloured squares, ready for the model, at two frames a second; rows and cols count tokens."""
    side = processor.image_config.factor
    squares = np.random.default_rng(frames).integers(
        0, 256, (frames, rows, cols, 3), dtype=np.uint8
    )
    pixels = squares.repeat(side, axis=1).repeat(side, axis=2)
    cut = patchify(normalize(pixels, processor.image_config), processor.image_config)
    return Media(*cut, name, (cols * side, rows * side), [n / 2 for n in range(frames)])


def conversation(processor, *media, text="Describe this image."):
    """A question after pictures, by the names of the examples, and clips, by their number of frames."""
    items = [{"type": "video", "video": clip(processor, one)} if isinstance(one, int)
             else {"type": "image", "image": str(EXAMPLES / f"{one}.png")} for one in media]  # fmt: skip
    return processor([{"role": "user", "content": [*items, {"type": "text", "text": text}]}])


CASES = {
    "one picture": ("shapes",),
    "two pictures": ("shapes", "wide"),
    "a clip": (5,),
    "pictures and clips": ("tall", 3, "small", 12),
    "twenty pictures": ("shapes", "wide", "tall", "small") * 5,
    "words alone": (),
}


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tiny():
    """The bundled model; no token ends its answer, so that the tests do not hang on what it says."""
    model = load_model(TINY, "cpu", torch.float32)
    model.generation_config = {"eos_token_id": [], "pad_token_id": 0}
    return model


def traced(model, batch, tokens=4):
    with Trace(model) as trace:
        ids = [id for (id,) in stream(model, batch, tokens)]
    return trace, ids


def small_batch(config, parts):
    arrays = make_batch([random_row(config, parts)])
    arrays["attention_mask"] = torch.ones_like(arrays["input_ids"])
    return Batch(**{name: tensor.numpy() for name, tensor in arrays.items()})


def test_operations_equal_those_worked_out_on_paper():
    # C 64, 4 heads over 2 of width 16, inner 48, 2 layers, 61 words; E 32, 2 heads, inner 64, depth 2.
    config = small_config()
    model = our_model(config, random_weights(config))
    batch = small_batch(
        config, [2, ("image", 2, 3), 3]
    )  # 24 patches; 13 tokens, 6 of them of the picture
    trace, _ = traced(model, batch, tokens=3)
    [tower], (prefill, first, second) = trace.vision, trace.decoder
    assert {stage: trace.operations(tower, stage) for stage in VISION} == {
        "patch_embed": 2 * 24 * 1176 * 32,  # 1,806,336
        # qkv, attention, proj, fc1, fc2
        "blocks": 2 * (147_456 + 4 * 32 * 24 * 24 + 49_152 + 98_304 + 98_304),
        "merger": 196_608 + 98_304,  # [6, 128] to 128 to 64
    }
    assert {stage: trace.operations(prefill, stage) for stage in DECODER} == {
        "embed_tokens": 0,
        # q, k and v, attention, o, the three of the MLP
        "layers": 2 * (106_496 + 2 * 53_248 + 4 * 64 * 13 * 13 + 106_496 + 3 * 79_872),
        "norm": 0,
        "lm_head": 2 * 64 * 61,  # of the last token alone
    }
    assert trace.operations(first, "layers") == 2 * (
        8_192 + 2 * 4_096 + 4 * 64 * 14 + 8_192 + 3 * 6_144
    )
    assert (
        trace.operations(second, "layers") - trace.operations(first, "layers") == 2 * 4 * 64
    )  # one look more


def test_looks_of_a_clip_stay_within_its_frames():
    config = small_config()
    model = our_model(config, random_weights(config))
    trace, _ = traced(
        model, small_batch(config, [("video", 3, 2, 2), ("image", 1, 2), 2]), tokens=1
    )
    assert [tower.looks for tower in trace.vision] == [8 * 8, 3 * 16 * 16]  # pictures first


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_of_the_stages_sum_to_the_models(shape):
    model = our_model(SHAPES[shape], random_weights(SHAPES[shape]))
    trace = Trace(model)
    assert sum(map(trace.parameters, trace.stages())) == sum(p.numel() for p in model.parameters())


def test_steps_seen_sum_to_the_parameters_of_their_stage(tiny, processor):
    trace, _ = traced(tiny, conversation(processor, "shapes", 3))
    for one, stages in (
        (trace.vision[0], VISION),
        (trace.vision[1], VISION),
        (trace.decoder[0], DECODER),
    ):
        for stage in stages:
            modules = trace.stages()[stage]
            assert len(modules) * sum(
                step.parameters for step in one.steps[stage]
            ) == trace.parameters(stage)
            assert one.seconds[stage] > 0


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_matrices_take_the_same_operations_and_own_what_they_store(tiny, processor, bits):
    batch, model = (
        conversation(processor, "small"),
        load_model(TINY, "cpu", torch.float32, quantize=bits),
    )
    model.generation_config = tiny.generation_config
    (one, _), (other, ids) = (traced(each, batch, 2) for each in (tiny, model))
    for before, after in zip(one.decoder, other.decoder, strict=True):
        assert {s: one.operations(before, s) for s in DECODER} == {
            s: other.operations(after, s) for s in DECODER
        }
    assert sum(map(other.parameters, other.stages())) == sum(p.numel() for p in model.parameters())
    assert other.parameters("lm_head") > 0 == one.parameters("lm_head")
    kind = {"int8": "int8", "int4": "uint8"}[bits]
    assert (
        f" in float32 on cpu, sdpa attention, the decoder's matrices as {kind} with"
        in other.page(processor, batch, ids)
    )


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_answer_is_the_same_and_the_hooks_go(tiny, processor):
    batch = conversation(processor, "shapes")
    _, ids = traced(tiny, batch)
    assert ids == [id for (id,) in stream(tiny, batch, 4)]
    with contextlib.suppress(KeyError), Trace(tiny):
        assert hooks_of(tiny)
        raise KeyError
    assert not hooks_of(tiny)


@pytest.mark.parametrize("media", CASES.values(), ids=CASES)
def test_the_page_fits_and_tells_the_numbers(tiny, processor, media):
    batch = conversation(processor, *media)
    trace, ids = traced(tiny, batch, tokens=40)
    page = trace.page(processor, batch, ids, prepared=0.0123)
    lines = page.splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) <= (80 if len(media) == 1 else 90)
    titles = [re.split("  |, mean", line)[0] for line in lines if re.match("[A-Z]{3}", line)]
    middle = ["PATCHES", "VISION TOWER"] if media else []
    rest = ["PROMPT", "POSITIONS", "DECODER, PREFILL", "DECODE", "ANSWER"]
    assert titles == ["THE MODEL", "PICTURE", *middle, *rest]
    total, vision = (
        batch.input_ids.shape[1],
        {tiny.config.image_token_id, tiny.config.video_token_id},
    )
    assert f"PROMPT   {total:,} tokens" in page
    assert (
        sum(int(n.replace(",", "")) for n in re.findall(r"^  \w+ +([\d,]+) tokens: ", page, re.M))
        == total
    )
    control = [id for id in batch.input_ids[0] if id in processor.tokenizer.special_ids - vision]
    assert sum(int(n) for n in re.findall(r"(\d+) control", page)) == len(control)
    positions, delta = get_rope_index(tiny.config, *(None if x is None else torch.tensor(x) for x in (
        batch.input_ids, batch.image_grid_thw, batch.video_grid_thw)))  # fmt: skip
    assert (
        f"goes on at {positions.max() + 1} on all three: {total} tokens before it, rope delta {delta.item()}"
        in page
    )
    assert f"{sum(p.numel() for p in tiny.parameters()):,} parameters in float32 on cpu" in page
    assert (
        f"cache: {2 * 4 * (total + 40) * 64 * 4:,} bytes = {total + 40:,} tokens ({total + 39:,} filled)"
        in page
    )
    assert f"  input_ids int64 [1, {total}], attention_mask int64 [1, {total}]\n" in page
    assert f"  position_ids int64 [3, 1, {total}]\n" in page
    for name in ("image_grid_thw", "video_grid_thw"):
        if (x := getattr(batch, name)) is not None:
            assert f"{name} int64 [{len(x)}, 3]" in page
    turned = [
        [len(x), 32] for x in (batch.pixel_values, batch.pixel_values_videos) if x is not None
    ][:1]
    turned.append([1, 1, total, 32])
    assert re.findall(r"^ +cos, sin of its rope +(\[.+\]) +float32$", page, re.M) == [
        str(shape) for shape in turned
    ]
    for x in (batch.pixel_values, batch.pixel_values_videos):
        assert x is None or f"float32 {list(x.shape)}, from {x.min():.2f} to {x.max():.2f}" in page
    for run in runs(batch, tiny.config)[:3]:
        t, y, x = (sorted(set(axis.tolist())) for axis in positions[:, 0, run.start : run.end])
        spans = [f"{axis[0]}…{axis[-1]}" if len(axis) > 1 else f"{axis[0]}" for axis in (t, y, x)]
        assert re.search(
            rf"^  {run.start}…{run.end - 1} +{run.name} +{' +'.join(spans)}$", page, re.M
        )
        if run.media is not None:
            t, h, w = run.media.grid
            row = rf"{run.name} .*{w * 14}×{h * 14} +{t}×{h}×{w} +{t * h * w} +{run.end - run.start}   .*\.(png|mp4)"
            assert re.search(row, page)


def test_an_answer_of_one_token_has_no_decode_step(tiny, processor):
    batch = conversation(processor, "small")
    trace, ids = traced(tiny, batch, tokens=1)
    assert "DECODE   no step" in trace.page(processor, batch, ids)


def test_chances_are_the_models():
    config = small_config()
    model = our_model(config, random_weights(config))
    batch = small_batch(config, [2, ("image", 2, 3), 3])
    trace, ids = traced(model, batch, tokens=2)
    inputs = {
        "pixel_values": torch.tensor(batch.pixel_values),
        "image_grid_thw": torch.tensor(batch.image_grid_thw),
    }
    with torch.no_grad():
        logits = model(torch.tensor([[*batch.input_ids[0].tolist(), ids[0]]]), **inputs)[0, -2:]
    for (values, best), wanted in zip(trace.guesses, logits.softmax(-1), strict=True):
        assert values == pytest.approx(wanted[best].tolist(), abs=1e-5)
        assert best[0] == wanted.argmax()


def test_a_long_name_loses_its_beginning(tiny, processor):
    media = clip(processor, 2, name="/a/very" + "/long" * 20 + "/way.mp4")
    batch = processor([{"role": "user", "content": [{"type": "video", "video": media}]}])
    trace, ids = traced(tiny, batch, 1)
    page = trace.page(processor, batch, ids)
    assert re.search(r"   ….*/long/way\.mp4, 2 frames, 0\.00…0\.50 s$", page, re.M)
    assert max(map(len, page.splitlines())) <= 110


def test_what_cannot_be_explained_is_said(tiny, processor):
    batch = conversation(processor, "small")
    trace, ids = traced(tiny, batch)
    with pytest.raises(ValueError, match="saw 4 passes of the model, the answer has 3 tokens"):
        trace.page(processor, batch, ids[:3])
    two = processor([[{"role": "user", "content": text}] for text in ("One", "Two")])
    with pytest.raises(ValueError, match="one conversation, the batch has 2"):
        runs(two, tiny.config)
    for media, message in (
        (batch.media * 2, "1 pictures or clips more"),
        ([], "does not fit"),
        ([clip(processor, 2)], "does not fit"),
    ):
        batch.media = media
        with pytest.raises(ValueError, match=message):
            runs(batch, tiny.config)
