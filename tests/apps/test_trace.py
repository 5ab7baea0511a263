"""`apps/trace.py`: FLOPs computed by hand, all numbers in the text, an unchanged model."""

import contextlib
import re

import numpy as np
import pytest
import torch
from example_batches import CASES, load_tiny, make_conversation, make_small_batch, make_video
from helpers import SHAPES, our_model, random_weights, small_config
from torch.utils.flop_counter import FlopCounterMode

import command_line
import linear
from apps import trace as trace_module
from apps.prompt_spans import split_prompt
from apps.trace import format_count, format_trace, main, record, record_passes
from byte_matmul import byte_kernel
from command_line import BUNDLED_CHECKPOINT
from generate import stream
from qwen2vl import get_rope_index

EXAMPLES = BUNDLED_CHECKPOINT.parent.parent / "examples"


VISION = ("visual.patch_embed", "visual.blocks", "visual.merger")
DECODER = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")


def calls_of(trace, stage, n):
    """Return the calls of a stage, all layers of "model.layers", in the n-th pass."""
    name = re.compile(rf"{re.escape(stage)}(\.\d+)?")
    return [call for call in trace.counted[n] if name.fullmatch(call.name)]


def flops_of(trace, stage, n):
    return sum(call.cost for call in calls_of(trace, stage, n))


# -------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.sweep
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_record_counts_the_flops_computed_by_hand(attn_implementation, dtype):
    # C 64, 4 heads over 2 of width 16, inner 48, 2 layers, 61 tokens; E 32, 2 heads, inner 64,
    # depth 2.
    config = small_config()
    model = our_model(config, random_weights(config), dtype, attn_implementation)
    # 24 patches; 13 tokens, 6 of them of the image
    batch = make_small_batch(config, [2, ("image", 2, 3), 3])
    trace = record(model, batch, 3)
    assert {stage: flops_of(trace, stage, 0) for stage in VISION} == {
        "visual.patch_embed": 2 * 24 * 1176 * 32,  # 1,806,336
        # qkv, attention, proj, fc1, fc2
        "visual.blocks": 2 * (147_456 + 4 * 32 * 24 * 24 + 49_152 + 98_304 + 98_304),
        "visual.merger": 196_608 + 98_304,  # [6, 128] to 128 to 64
    }
    assert {stage: flops_of(trace, stage, 0) for stage in DECODER} == {
        "model.embed_tokens": 0,
        # q, k and v, attention, o, the three of the MLP
        "model.layers": 2 * (106_496 + 2 * 53_248 + 4 * 64 * 13 * 13 + 106_496 + 3 * 79_872),
        "model.norm": 0,
        "lm_head": 2 * 64 * 61,  # of the last token alone
    }
    step = 2 * (8_192 + 2 * 4_096 + 4 * 64 * 14 + 8_192 + 3 * 6_144)
    assert flops_of(trace, "model.layers", 1) == step
    assert len(trace.answer) == 3


def test_record_counts_attention_within_the_frames_of_a_video():
    config = small_config()
    model = our_model(config, random_weights(config))
    batch = make_small_batch(config, [("video", 3, 2, 2), ("image", 1, 2), 2])
    trace = record(model, batch, 1)
    images, videos = [c for c in trace.counted[0] if c.name == "visual.blocks.0.attn"]
    assert images.cost - images.inner_cost == 4 * 32 * 8 * 8  # queries · keys
    assert videos.cost - videos.inner_cost == 4 * 32 * 3 * 16 * 16


@pytest.mark.slow
def test_record_counts_quantized_matmuls_like_plain_ones(tiny, processor):
    batch = make_conversation(processor, "small")
    plain = record(tiny, batch, 2)
    int8 = record(load_tiny(quantize="int8"), batch, 2)
    int4 = record(load_tiny(quantize="int4"), batch, 2)
    for n in (0, 1):
        assert flops_of(int8, "model.layers", n) == flops_of(plain, "model.layers", n)
        assert flops_of(int4, "model.layers", n) == flops_of(plain, "model.layers", n)
        assert flops_of(int8, "lm_head", n) == 2 * 128 * 545
        assert flops_of(int4, "lm_head", n) == 2 * 128 * 560  # its kernel pads to groups of 16


@pytest.mark.skipif(byte_kernel() is None, reason="needs other instructions")
def test_kernel_flops_count_both_digits_of_an_activation():
    plain = linear.Int8Linear(
        torch.ones(48, 64, dtype=torch.int8), torch.ones(48, dtype=torch.bfloat16)
    )
    layer = linear.ByteInt8Linear(plain, byte_kernel())
    counter = FlopCounterMode(display=False, custom_mapping=trace_module.KERNEL_FLOPS)
    with torch.no_grad(), counter:
        layer(torch.ones(3, 64, dtype=torch.bfloat16))
    assert counter.get_total_flops() == 2 * (2 * 3 * 64 * 48)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_record_counts_the_kernels_of_each_dtype_like_those_of_float64(dtype, processor):
    batch = make_conversation(processor, "shapes")
    expected = record(load_tiny(torch.float64), batch, 2).counted
    counted = record(load_tiny(dtype), batch, 2).counted
    for calls, expected_calls in zip(counted, expected, strict=True):
        for call, expected_call in zip(calls, expected_calls, strict=True):
            assert (call.name, call.cost) == (expected_call.name, expected_call.cost)


def test_format_trace_names_a_kernel_that_is_not_counted(tiny, processor, monkeypatch):
    batch = make_conversation(processor)
    assert "unknown" not in format_trace(tiny, processor, batch, record(tiny, batch, 1))
    monkeypatch.setattr(trace_module, "KERNEL_FLOPS", {})
    text = format_trace(tiny, processor, batch, record(tiny, batch, 1))
    assert re.search(r"^ +q_proj .*  unknown ", text, re.M)


# ---------------------------------------------------------------------------------------- recording


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_record_gives_the_answer_of_stream_and_removes_its_hooks(tiny, processor):
    batch = make_conversation(processor, "shapes")
    assert [[token] for token in record(tiny, batch, 4).answer] == list(stream(tiny, batch, 4))
    assert not hooks_of(tiny)
    with contextlib.suppress(KeyError), record_passes(tiny, lambda: 0):
        assert hooks_of(tiny)
        raise KeyError
    assert not hooks_of(tiny)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES)
def test_record_has_a_call_of_each_parameter(shape):
    config = SHAPES[shape]
    model = our_model(config, random_weights(config))
    batch = make_small_batch(config, [2, ("image", 1, 1), 1])
    trace = record(model, batch, 1)
    parameters = set()
    for stage in (*VISION, *DECODER):
        for call in calls_of(trace, stage, 0):
            parameters |= {id(p) for p in call.module.parameters()}
    assert parameters == {id(p) for p in model.parameters()}


def test_record_times_each_call_with_the_calls_inside(tiny, processor):
    trace = record(tiny, make_conversation(processor, "small"), 3)
    assert len(trace.timed) == 3
    for calls in trace.timed:
        assert [call.depth for call in calls[:2]] == [0, 1]
        for call in calls:
            assert 0 <= call.inner_cost < call.cost


# --------------------------------------------------------------------------------------------- text


@pytest.mark.sweep
@pytest.mark.parametrize("media", CASES.values(), ids=CASES)
def test_format_trace_shows_the_numbers_of_the_model(tiny, processor, media):
    batch = make_conversation(processor, *media)
    trace = record(tiny, batch, 20)
    text = format_trace(tiny, processor, batch, trace)
    titles = re.findall(r"^([A-Z]{3}[A-Z ]*?)(?:   |  +shapes)", text, re.M)
    passes = ["PREFILL", "FIRST DECODE STEP"]
    sections = ["MODEL", "INPUTS", "PROMPT", "POSITIONS", *passes, "MEMORY", "ANSWER"]
    assert titles == sections
    vision_runs = (batch.pixel_values is not None) + (batch.pixel_values_videos is not None)
    assert len(re.findall(r"^    visual  +\[", text, re.M)) == vision_runs

    length = batch.input_ids.shape[1]
    assert f"PROMPT   {length:,} tokens" in text
    assert "MODEL   torch.float32 on cpu, sdpa attention" in text
    for name, x in batch.arrays().items():
        assert f"  {name} {x.dtype} {list(x.shape)}\n" in text
    arrays = (batch.input_ids, batch.image_grid_thw, batch.video_grid_thw)
    arrays = [None if x is None else torch.tensor(x) for x in arrays]
    positions, delta = get_rope_index(tiny.config, *arrays)
    end = f"continues at {positions.max() + 1} on all three axes; rope delta {delta.item()}."
    assert end in text
    for span in split_prompt(batch, tiny.config)[:3]:
        axes = positions[:, 0, span.start : span.end]
        spans = " +".join(f"{axis.min()}…{axis.max()}" for axis in axes)
        row = rf"^  {span.start}…{span.end - 1} +{span.name} +{spans}$"
        assert re.search(row, text, re.M)
    cache = (
        f"{2 * 4 * (length + 19) * 64 * 4:,} bytes, keys and values [4, 1, 2, {length + 19}, 32]"
    )
    assert f"KV cache of {length + 19:,} tokens: {cache} each" in text
    flops = sum(flops_of(trace, stage, 1) for stage in DECODER)
    parameters = sum(p.numel() for p in tiny.parameters())
    total = rf"^  Qwen2VL +{parameters:,} +{re.escape(format_count(flops))} "
    assert re.search(total, text.partition("FIRST DECODE STEP")[2], re.M)


def test_format_trace_marks_a_tied_head_but_not_a_quantized_one(tiny, processor):
    batch = make_conversation(processor, "small")
    heads = []
    for model in (tiny, load_tiny(quantize="int8")):
        text = format_trace(model, processor, batch, record(model, batch, 1))
        heads += re.findall(r"^    lm_head .*\] +(\S+) ", text, re.M)
    assert heads == ["tied", f"{545 * 129:,}"]


def test_format_trace_adds_up_the_later_blocks(tiny, processor):
    batch = make_conversation(processor, "small")
    trace = record(tiny, batch, 1)
    text = format_trace(tiny, processor, batch, trace)
    later = calls_of(trace, "model.layers", 0)[1:]
    parameters = sum(p.numel() for p in tiny.model.layers[1:].parameters())
    row = rf"^      layers\.1 … layers\.3 .* {parameters:,} +"
    assert re.search(row + re.escape(format_count(sum(c.cost for c in later))), text, re.M)


def test_format_trace_shows_an_answer_of_one_token_without_a_decode_step(tiny, processor):
    batch = make_conversation(processor, "small")
    text = format_trace(tiny, processor, batch, record(tiny, batch, 1))
    assert "DECODE STEP" not in text
    assert "ANSWER   1 tokens" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_999_999, "9,999,999"),
        (45_200_000, "45.2 M"),
        (1.25e9, "1.2 G"),
        (3.4e12, "3.4 T"),
    ],
)
def test_format_count_adds_a_unit_from_ten_million_on(number, text):
    assert format_count(number) == text


# ---------------------------------------------------------------------------------- prompt in spans


def test_split_prompt_separates_adjacent_videos(tiny, processor):
    batch = make_conversation(processor, "small", 4)
    video = make_video(processor, 4)
    start = [span.start for span in split_prompt(batch, tiny.config) if span.media][1]
    batch.media.append(video)
    video_ids = batch.input_ids[:, start : start + 48]
    batch.input_ids = np.concatenate((batch.input_ids[:, :start], video_ids, video_ids), axis=1)
    spans = split_prompt(batch, tiny.config)
    assert [span.name for span in spans[3:5]] == ["video 1", "video 2"]
    assert [(span.start, span.end) for span in spans[3:5]] == [
        (start, start + 48),
        (start + 48, start + 96),
    ]
    assert spans[4].media is video


def test_split_prompt_refuses_several_conversations(tiny, processor):
    two = processor([[{"role": "user", "content": text}] for text in ("One", "Two")])
    with pytest.raises(ValueError, match="expected one conversation, got a batch of 2"):
        split_prompt(two, tiny.config)


# ------------------------------------------------------------------------------------------ program


def test_main_prints_the_trace(capsys):
    arguments = ["--image", str(EXAMPLES / "shapes.png"), "--max-new-tokens", "2", "--quiet"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("MODEL   torch.bfloat16 on cpu")
    assert err == ""


def test_main_reports_a_missing_image_in_one_sentence(capsys, tmp_path):
    assert main(["--image", str(tmp_path / "missing.png")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("apps.trace: there is no image at ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --image, --video or --prompt, got none"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected 1 or more"),
        (["--prompt", "x", "--nframes", "-1"], "--nframes is -1, expected 1 or more"),
        (["--prompt", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_main_refuses_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_main_returns_130_after_an_interrupt(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "open_session", interrupt)
    assert main(["--prompt", "x"]) == 130
