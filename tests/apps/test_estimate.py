"""apps/estimate.py: the counts are those of the run, and the activations near the measured ones."""

import json
import re
import shutil
import weakref

import pytest
import torch
from helpers import (
    SHAPES,
    make_batch,
    our_config,
    our_model,
    random_sequence,
    random_weights,
    small_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import linear
import load_weights
import memory
from apps import estimate
from command_line import BUNDLED_CHECKPOINT
from preprocess import Batch, ImageConfig, Processor
from qwen2vl import KVCache

EXAMPLES = BUNDLED_CHECKPOINT.parent.parent / "examples"
ONE_IMAGE = ["--image", str(EXAMPLES / "shapes.png")]
TWO_IMAGES = [*ONE_IMAGE, "--image", str(EXAMPLES / "tall.png")]
CPU = torch.device("cpu")


@pytest.fixture
def video(tmp_path):
    """The option for a directory of five frames: three temporal slices."""
    directory = tmp_path / "video"
    directory.mkdir()
    for number in range(5):
        shutil.copy(EXAMPLES / "wide.png", directory / f"{number}.png")
    return ["--video", str(directory)]


def run_estimate(capsys, *arguments):
    """Return what the program prints."""
    assert estimate.main(["--quiet", *[str(argument) for argument in arguments]]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def numbers(text, name):
    """Return the numbers of the line of the table that begins with `name`."""
    [line] = re.findall(f"^{name} +(.*)$", text, re.MULTILINE)
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line.replace(",", ""))]


# ------------------------------------------------------------------------------------- exact counts
def record_run(monkeypatch, options):
    """Run generate.py; return its model, batch, cache and the position after the prompt."""
    records = {}
    prefill = generate.prefill

    def recording_prefill(model, batch, cache):
        logits = prefill(model, batch, cache)
        records.update(model=model, batch=batch, cache=cache)
        records["positions"] = int(cache.next_position)
        return logits

    monkeypatch.setattr(generate, "prefill", recording_prefill)
    assert generate.main([*options, "--quiet"]) == 0
    return records


@pytest.mark.sweep
@pytest.mark.parametrize(
    "kind",
    ["text", "one image", "two images", "video", "image and video", "--add-vision-id", "--nframes"],
)
def test_counts_equal_those_of_the_run(kind, video, capsys, monkeypatch):
    kinds = {
        "text": [],
        "one image": ONE_IMAGE,
        "two images": TWO_IMAGES,
        "video": video,
        "image and video": ONE_IMAGE + video,
        "--add-vision-id": [*TWO_IMAGES, "--add-vision-id"],
        "--nframes": [*video, "--nframes", "2"],
    }
    options = [*kinds[kind], "--prompt", "How many shapes?", "--max-new-tokens", "3"]
    options += ["--device", "cpu"]
    text = run_estimate(capsys, *options)
    records = record_run(monkeypatch, options)
    model = records["model"]
    batch = records["batch"]
    cache = records["cache"]

    ids = batch.input_ids[0].tolist()
    images = ids.count(model.config.image_token_id)
    videos = ids.count(model.config.video_token_id)
    assert numbers(text, "prompt") == [len(ids), len(ids) - images - videos, images, videos]
    assert numbers(text, "positions") == [records["positions"], records["positions"] + 3, 3]
    weights = sum(p.nbytes for p in model.parameters())
    assert numbers(text, "weights") == [round(weights / 1e6, 1), 2.8, 16]
    assert numbers(text, "cache")[0] == round((cache.keys.nbytes + cache.values.nbytes) / 1e6, 1)
    names = ["weights", "cache", "activations"]
    if batch.media:
        arrays = [batch.pixel_values, batch.pixel_values_videos]
        pixels = sum(array.nbytes for array in arrays if array is not None)
        assert numbers(text, "pixels") == [round(2 * pixels / 1e6, 1)]
        names.append("pixels")
    names += ["allocator", "process"]
    parts = [numbers(text, name)[0] for name in names]
    assert numbers(text, "peak")[0] == pytest.approx(sum(parts), abs=0.4)
    assert numbers(text, "peak")[1] == numbers(text, "weights")[0]  # used in place

    for media in batch.media:
        assert f"{media.summary(ImageConfig())}\n" in text


def make_estimate_batch(config, conversations):
    """Return a Batch of random sequences.

    conversations: the parts of each, see `random_sequence`.
    """
    rows = [random_sequence(config, parts, seed) for seed, parts in enumerate(conversations)]
    arguments = make_batch(rows)
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return Batch(**{name: tensor.numpy() for name, tensor in arguments.items()})


@pytest.mark.sweep
@pytest.mark.parametrize("shape", ["default", "tied", "one kv head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_are_exactly_those_of_the_run(shape, dtype, monkeypatch):
    model = our_model(SHAPES[shape], random_weights(SHAPES[shape]), dtype)
    batch = make_estimate_batch(SHAPES[shape], [[2, ("image", 2, 3), 4], [5]])
    caches = []
    new_cache = generate.new_cache

    def recording_new_cache(*arguments):
        caches.append(new_cache(*arguments))
        return caches[0]

    monkeypatch.setattr(generate, "new_cache", recording_new_cache)
    generate.generate(model, batch, 7)
    run = memory.Run(model.config, CPU, dtype, max_new_tokens=7)
    expected = caches[0].keys.nbytes + caches[0].values.nbytes
    assert memory.cache_size(run, batch).bytes == expected
    assert memory.count_weights(run).total == sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights_are_exactly_those_of_the_run(quantize, capsys):
    model = load_weights.load_model(BUNDLED_CHECKPOINT, "cpu", quantize=quantize)
    size = sum(p.nbytes for p in model.parameters())
    text = run_estimate(capsys, *ONE_IMAGE, "--device", "cpu", "--quantize", quantize)
    assert (
        f"{size / 1e6:,.1f} MB  2.8 M parameters in bfloat16, the decoder's in {quantize}" in text
    )


# -------------------------------------------------------------------------------------- activations
class MeasuredPeak(TorchDispatchMode):
    """Measure the bytes of all tensors that are made inside on the CPU and alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = set()
        for value in tree_leaves((arguments, options)):
            if isinstance(value, torch.Tensor):
                given.add(value.untyped_storage()._cdata)
        for value in tree_leaves(result):
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in given or key in self.alive:
                continue
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


CONVERSATIONS = {
    "text": [[120]],
    "an image": [[5, ("image", 8, 9), 20]],
    "a large image": [[5, ("image", 16, 12), 4]],
    "a video": [[3, ("video", 4, 6, 6), 10]],
    "two images": [[3, ("image", 8, 8), 5, ("image", 4, 3), 2]],
    "large images": [[5, ("image", 16, 12), 4, ("image", 15, 12)]],
    "a video of large frames": [[3, ("video", 3, 16, 12), 4]],
    "an image and a video": [[3, ("image", 8, 8), 5, ("video", 2, 4, 3), 2]],
    "padded": [[5, ("image", 8, 9), 20], [120], [("video", 2, 4, 4), 3]],
    "long and padded": [[300], [20]],  # the mask is large
}
# Of the published models' proportions, so that the largest tensors are the same.
SHAPE = small_config(
    heads=4,
    kv_heads=1,
    width=64,
    sections=(8, 12, 12),
    vision_width=80,
    mlp_ratio=4,
    intermediate=1024,
)


def measured_prefill(model, batch):
    """Return the peak of the prefill on the CPU, in bytes."""
    inputs = {name: torch.as_tensor(array) for name, array in batch.arrays().items()}
    if inputs["attention_mask"].all():
        inputs["attention_mask"] = None
    dtype = model.model.norm.weight.dtype
    cache = KVCache(model.config, *batch.input_ids.shape, dtype=dtype)
    # inference_mode would hide what is made inside a function
    with torch.no_grad(), MeasuredPeak() as peak:
        model(cache=cache, logits_to_keep=1, **inputs)
    return peak.most


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 0.02), ("eager", 0.08)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_are_near_the_measured_ones(dtype, attention, tolerance, monkeypatch):
    # What a processor without half-precision kernels upcasts is not counted.
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: True)
    model = our_model(SHAPE, random_weights(SHAPE), dtype, attention)
    run = memory.Run(model.config, CPU, dtype, attention)
    for name, conversation in CONVERSATIONS.items():
        batch = make_estimate_batch(SHAPE, conversation)
        ratio = memory.activations_size(run, batch).bytes / measured_prefill(model, batch)
        assert ratio == pytest.approx(1, abs=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_activations_of_quantized_layers_are_near_the_measured_ones(quantize, monkeypatch):
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: True)
    # Beside layers as narrow as these, the weights that are dequantized at once would count.
    monkeypatch.setattr(linear, "chunk_rows", lambda inputs: 64)
    config = SHAPE | {"vocab_size": 20_000}  # a copy of the head would show
    model = our_model(config, random_weights(config), torch.bfloat16)
    linear.quantize_linears(model, quantize)
    run = memory.Run(model.config, CPU, torch.bfloat16, "sdpa", quantize)
    for name in ("text", "an image", "padded"):
        batch = make_estimate_batch(config, CONVERSATIONS[name])
        ratio = memory.activations_size(run, batch).bytes / measured_prefill(model, batch)
        assert ratio == pytest.approx(1, abs=0.02), name


def test_an_int8_head_on_a_gpu_is_copied_into_the_dtype():
    config = our_config(SHAPE | {"vocab_size": 200_000})
    batch = make_estimate_batch(SHAPE, [[120]])
    head = 200_000 * config.hidden_size * 2
    peaks = []
    for device in (CPU, torch.device("cuda")):
        run = memory.Run(config, device, torch.bfloat16, "sdpa", "int8")
        peaks.append(memory.activations_size(run, batch).bytes)
    assert peaks[0] < 0.1 * head
    assert peaks[1] >= head


# ---------------------------------------------------------------------------------- without weights
def copy_without_weights(tmp_path, **changes):
    """Copy the bundled checkpoint without its weights; a change to None removes the field."""
    directory = shutil.copytree(
        BUNDLED_CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def test_weight_files_are_not_needed(tmp_path, capsys):
    expected = run_estimate(capsys, *TWO_IMAGES)
    text = run_estimate(capsys, *TWO_IMAGES, "--model", copy_without_weights(tmp_path))
    of_process = re.compile("^(process|peak|free) .*$", re.MULTILINE)
    assert of_process.sub("", text) == of_process.sub("", expected)


def test_dtype_is_the_option_or_that_of_config_json_or_of_the_files(tmp_path, capsys):
    directory = copy_without_weights(tmp_path, torch_dtype=None, text_config={"dtype": "float16"})
    question = ["--prompt", "x", "--model", str(directory)]
    assert "in float16\n" in run_estimate(capsys, *question)
    assert "in float64\n" in run_estimate(capsys, *question, "--dtype", "float64")
    shutil.rmtree(directory)
    copy_without_weights(tmp_path, torch_dtype=None)
    assert estimate.main(question) == 2
    error = capsys.readouterr().err
    assert error == f"apps.estimate: {directory} lacks model.safetensors\n"
    shutil.copy(BUNDLED_CHECKPOINT / "model.safetensors", directory)
    assert "in bfloat16\n" in run_estimate(capsys, *question)


def test_dtype_option_needs_no_dtype_in_the_checkpoint(tmp_path, capsys):
    directory = copy_without_weights(tmp_path, torch_dtype=None)
    text = run_estimate(capsys, "--prompt", "x", "--model", directory, "--dtype", "float32")
    assert "in float32\n" in text


def test_positions_beyond_the_trained_length_are_named(tmp_path, capsys):
    directory = copy_without_weights(tmp_path, max_position_embeddings=40)
    question = ["--prompt", "x", "--model", directory, "--max-new-tokens"]
    assert "trained for" not in run_estimate(capsys, *question, 5)
    text = run_estimate(capsys, *question, 50)
    assert "with 50 new tokens (the model is trained for 40)\n" in text


def test_new_tokens_are_those_of_generation_config_json(tmp_path, capsys):
    directory = copy_without_weights(tmp_path)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 33}))
    text = run_estimate(capsys, "--prompt", "x", "--model", directory)
    assert "with 33 new tokens\n" in text
    [tokens] = re.findall(r"^prompt +(\d+) tokens", text, re.MULTILINE)
    assert f"1 × {int(tokens) + 33} tokens" in text
    path.write_text(json.dumps({"max_length": 3}))
    assert estimate.main(["--prompt", "x", "--model", str(directory)]) == 2
    assert "max_length is 3" in capsys.readouterr().err


# ------------------------------------------------------------------------------ a file of questions
def write_questions(path, *names_of_lines):
    """Write a file with a question about the named images on each line; return its lines."""
    lines = []
    for names in names_of_lines:
        content = []
        for name in names:
            content.append({"type": "image", "image": str(EXAMPLES / f"{name}.png")})
        content.append({"type": "text", "text": "How many?"})
        lines.append([{"role": "user", "content": content}])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_questions_are_counted_each_and_the_largest_group(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    lines = write_questions(path, ["wide"], [], ["shapes", "tall"], ["gone"], ["shapes"])
    text = run_estimate(capsys, "--questions", path, "--batch-size", 2)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
    expected = {}
    for number in (1, 2, 3, 5):
        expected[number] = processor(lines[number - 1]).input_ids.shape[1]
    counts = re.findall(
        r"^line (\d+)$(?:\n.* pixels .*)*\nprompt +(\d+) tokens", text, re.MULTILINE
    )
    assert {int(number): int(count) for number, count in counts} == expected
    assert f"line 4: there is no image at {EXAMPLES}/gone.png\n" in text
    assert "lines answered together that take most memory: 3, 5\n" in text
    assert f"2 × {expected[3] + 128} tokens" in text


def test_questions_without_a_usable_line_give_the_weights_alone(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text("\nnot JSON\n")
    text = run_estimate(capsys, "--questions", path)
    assert "line 2: the line is not JSON" in text
    assert "take most memory: none\nweights" in text


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ([], "expected --image, --video, --prompt or --questions"),
        (["--questions", "in.jsonl", "--prompt", "x"], "--questions excludes"),
        (["--questions", "in.jsonl", "--system", "x"], "--questions excludes"),
        (["--questions", "in.jsonl", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_options_that_do_not_fit_are_named(options, phrase, capsys):
    with pytest.raises(SystemExit) as error:
        estimate.main(options)
    assert error.value.code == 2
    assert phrase in capsys.readouterr().err


def test_missing_files_are_named(tmp_path, capsys):
    assert estimate.main(["--questions", str(tmp_path / "gone.jsonl")]) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert estimate.main(["--image", str(tmp_path / "gone.png")]) == 2
    assert "gone.png" in capsys.readouterr().err
