"""`apps/embed.py`: vectors equal those of transformers' hidden states, and survive bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from example_batches import EXAMPLES
from helpers import gap

from apps import embed as embed_app
from apps.embed import embed
from command_line import BUNDLED_CHECKPOINT

SHAPES = str(EXAMPLES / "shapes.png")
WIDE = str(EXAMPLES / "wide.png")
VIDEO = str(EXAMPLES / "crossing.mp4")
FLOAT32 = ["--dtype", "float32", "--device", "cpu", "--quiet"]
PROMPT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
PROMPT += "<|im_start|>assistant\n<|endoftext|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
DEFAULT = "You are a helpful assistant."


@pytest.fixture
def compute(tmp_path, capsys):
    """Run the program with an --out; return {name: vector} and what it wrote to stderr."""

    def compute(*options):
        out = tmp_path / "vectors.npz"
        assert embed_app.main([*map(str, options), "--force", "--out", str(out), *FLOAT32]) == 0
        written = np.load(out)  # without pickles
        assert written["vectors"].dtype == np.float32
        vectors = dict(zip(written["names"].tolist(), written["vectors"], strict=True))
        assert len(vectors) == len(written["vectors"])
        return vectors, capsys.readouterr().err

    return compute


@pytest.fixture(scope="module")
def reference():
    """Return a function from prompt and images to the base model's hidden states [S, C]."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    processor = Qwen2VLImageProcessorPil.from_pretrained(BUNDLED_CHECKPOINT)

    def hidden_states(prompt, *images, sequential=False):
        pixels = {}
        if images:
            pixels = processor(list(images), return_tensors="pt")
            count = int(pixels["image_grid_thw"].prod()) // 4
            prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * count)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"]
        types = (ids == model.config.image_token_id).int()
        model.model.rope_deltas = None
        options = {}
        if sequential:
            options["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            output = model.model(**inputs, **pixels, mm_token_type_ids=types, **options)
        return output.last_hidden_state[0]

    return hidden_states


def normalized(vector):
    return vector / vector.norm()


# ----------------------------------------------------------------------------------- the numbers


@pytest.mark.sweep
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("positions", ["mrope", "sequential"])
def test_vectors_equal_pooled_hidden_states_of_the_reference(
    pooling, positions, compute, reference
):
    """An image and texts of other lengths, in one padded batch."""
    inputs = ["--image", SHAPES, "--text", "a red circle", "--text", "Where is the blue triangle?"]
    vectors, _ = compute(*inputs, "--pooling", pooling, "--positions", positions)
    from PIL import Image

    sequential = positions == "sequential"
    expected = {
        SHAPES: reference(PROMPT.format(DEFAULT, IMAGE), Image.open(SHAPES), sequential=sequential)
    }
    for text in ("a red circle", "Where is the blue triangle?"):
        expected[text] = reference(PROMPT.format(DEFAULT, text), sequential=sequential)
    assert list(vectors) == list(expected)
    for name, states in expected.items():
        pooled = states[-1] if pooling == "last" else states.mean(0)
        assert gap(vectors[name], normalized(pooled)) < 1e-5


def test_sequential_positions_differ_for_an_image_alone(compute):
    inputs = ["--image", SHAPES, "--text", "a red circle"]
    mrope, _ = compute(*inputs)
    sequential, _ = compute(*inputs, "--positions", "sequential")
    assert gap(mrope["a red circle"], sequential["a red circle"]) < 1e-6
    assert gap(mrope[SHAPES], sequential[SHAPES]) > 1e-3


def test_instruction_image_text_and_suffix_are_in_the_prompt(compute, reference):
    from PIL import Image

    options = ["--instruction", "Find it.", "--image-text", "What is it?", "--suffix", "<|im_end|>"]
    vectors, _ = compute("--image", SHAPES, "--text", "a circle", *options)
    prompt = PROMPT.removesuffix("<|endoftext|>") + "<|im_end|>"
    image = reference(prompt.format("Find it.", IMAGE + "What is it?"), Image.open(SHAPES))
    text = reference(prompt.format("Find it.", "a circle"))
    assert gap(vectors[SHAPES], normalized(image[-1])) < 1e-5
    assert gap(vectors["a circle"], normalized(text[-1])) < 1e-5


@pytest.mark.slow
def test_lines_of_a_file_have_the_vectors_of_the_options(compute, tmp_path):
    inputs = ["--image", SHAPES, "--image", WIDE, "--video", VIDEO, "--text", "a circle"]
    all_frames, _ = compute("--video", VIDEO)
    expected, _ = compute(*inputs, "--nframes", 4)
    assert gap(expected[VIDEO], all_frames[VIDEO]) > 1e-3
    question = {"role": "user", "content": [{"type": "text", "text": "a circle"}]}
    lines = [
        {"image": SHAPES, "id": "first"},
        {"image": WIDE},
        {"video": VIDEO, "id": 7},
        {"messages": [question], "id": "conversation"},
    ]
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    vectors, error = compute("--input", path, "--nframes", 4, "--batch-size", 3)
    assert error == ""
    assert list(vectors) == ["first", WIDE, "7", "conversation"]
    for vector, other in zip(vectors.values(), expected.values(), strict=True):
        assert gap(vector, other) < 1e-5
    path = tmp_path / "texts.txt"
    path.write_text("a circle\r\n\né\n", encoding="utf-8")
    vectors, _ = compute("--input", path)
    assert list(vectors) == ["a circle", "é"]
    assert gap(vectors["a circle"], expected["a circle"]) < 1e-5


@pytest.mark.slow
def test_names_of_long_texts_are_cut(compute, tmp_path):
    vectors, _ = compute("--text", "a" * 3000, "--text", "a dog")
    assert list(vectors) == ["a" * 200, "a dog"]


def test_table_holds_the_cosine_similarities(compute, capsys):
    inputs = ["--image", SHAPES, "--text", "a circle", "--text", "a dog"]
    vectors = np.stack([*compute(*inputs)[0].values()])
    assert embed_app.main([*inputs, *FLOAT32]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["1", "2", "3"]
    for number, row in enumerate(rows):
        first, *values = row.split(maxsplit=4)
        assert first == str(number + 1)
        assert values[3] == [SHAPES, "a circle", "a dog"][number]
        assert gap(np.array(values[:3], float), (vectors @ vectors.T)[number]) < 1e-4


# -------------------------------------------------------------------------------------- bad input


def test_bad_lines_cost_a_warning_each(compute, tmp_path):
    lines = [
        '{"text": "a circle"}',
        "{",
        "[1]",
        '{"image": "missing.png"}',
        '{"caption": "a circle"}',
        '{"id": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"text": 5}',
        '{"text": "\\udcff"}',
        "[" * 100_000,
        '{"text": "a dog"}',
    ]
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n".join(lines))
    vectors, error = compute("--input", path)
    assert list(vectors) == ["a circle", "a dog"]
    warnings = error.splitlines()
    assert len(warnings) == len(lines) - 2
    for number, warning in enumerate(warnings, start=2):
        assert warning.startswith(f"line {number} of {path} is left out: ")
    assert "there is no image at missing.png" in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", "missing.png"], "there is no image at missing.png"),
        (["--input", "missing.txt", "--out", "x.npz"], "there is no file missing.txt, expected"),
        (["--input", "empty.txt", "--out", "x.npz"], "empty.txt holds no line that can be used"),
        (["--text", "x", "--out", "missing/x.npz"], "there is no directory missing"),
        (["--text", "x", "--out", "."], "--out is ., expected a file"),
        (["--input", "empty.txt", "--out", "empty.txt"], "--out is empty.txt, which is an input"),
    ],
)
def test_what_a_user_can_fix_is_one_sentence(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    assert embed_app.main([*options, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("apps.embed: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "expected --image, --video, --text or --input, got none of them"),
        (["--input", "x.txt"], "expected --out with --input"),
        (["--text", "x", "--batch-size", "0"], "--batch-size is 0, expected 1 or more"),
        (["--text", "x", "--pooling", "max"], "invalid choice: 'max'"),
    ],
)
def test_invalid_options_are_argparse_errors(options, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        embed_app.main(options)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_embed_refuses_vectors_that_are_not_finite(tiny, processor, monkeypatch):
    batch = processor([{"role": "user", "content": "hello"}])
    broken = torch.full_like(tiny.model.norm.weight, float("nan"))
    monkeypatch.setattr(tiny.model.norm, "weight", torch.nn.Parameter(broken))
    with pytest.raises(ValueError, match="the vectors are not finite: try --dtype float32"):
        embed(tiny, batch)
