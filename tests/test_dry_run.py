"""extras/dry_run.py: what it counts is what a run then has."""

import itertools
import json
import math
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from helpers import (
    SHAPES,
    make_batch,
    our_config,
    our_model,
    random_row,
    random_weights,
    small_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import load_weights
from extras import dry_run
from generate import TINY
from preprocess import Batch, Processor
from qwen2vl import KVCache

EXAMPLES = TINY.parent.parent / "examples"
PICTURES = [
    item for name in ("shapes", "tall") for item in ("--image", str(EXAMPLES / f"{name}.png"))
]
CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path):
    """A folder of five frames: three slices in time."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(5):
        shutil.copy(EXAMPLES / "wide.png", folder / f"{number}.png")
    return ["--video", str(folder)]


def printed(capsys, *arguments):
    assert generate.main(["--dry-run", "--quiet", *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def numbers(text, what):
    [line] = re.findall(f"^{what} +(.*)$", text, re.MULTILINE)
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line.replace(",", ""))]


@pytest.mark.parametrize(
    "kind",
    [
        "words",
        "one picture",
        "two pictures",
        "clip",
        "picture and clip",
        "--add-vision-id",
        "--nframes",
    ],
)
def test_counts_equal_those_of_the_run(kind, clip, capsys, monkeypatch):
    options = {"words": [], "one picture": PICTURES[:2], "two pictures": PICTURES, "clip": clip}
    options |= {
        "picture and clip": PICTURES[:2] + clip,
        "--add-vision-id": [*PICTURES, "--add-vision-id"],
    }
    options |= {"--nframes": [*clip, "--nframes", "2"]}
    options = [*options[kind], "--prompt", "How many shapes?", "--max-new-tokens", "3"]
    text = printed(capsys, *options, "--device", "cpu")

    caches, batches, steps = [], [], generate.generate_steps

    class Recording(KVCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            caches.append(self)

    def watching(model, batch, *more):
        batches.append((model, batch))
        for step in steps(model, batch, *more):
            caches[0].positions = getattr(
                caches[0], "positions", int(caches[0].next_position)
            )  # of the prefill
            yield step

    monkeypatch.setattr(generate, "KVCache", Recording)
    monkeypatch.setattr(generate, "generate_steps", watching)
    assert generate.main([*options, "--device", "cpu", "--quiet"]) == 0
    [(model, batch)], [cache] = batches, caches

    ids = batch.input_ids[0].tolist()
    image, video = (
        ids.count(id) for id in (model.config.image_token_id, model.config.video_token_id)
    )
    assert numbers(text, "prompt") == [len(ids), len(ids) - image - video, image, video]
    assert numbers(text, "positions") == [cache.positions, cache.positions + 3, 3]
    weights = sum(p.nbytes for p in model.parameters())
    assert numbers(text, "weights") == [round(weights / 1e6, 1), 2.8, 16]
    assert numbers(text, "cache")[0] == round((cache.keys.nbytes + cache.values.nbytes) / 1e6, 1)
    pixels = sum(
        array.nbytes
        for array in (batch.pixel_values, batch.pixel_values_videos)
        if array is not None
    )
    assert pixels == 0 or numbers(text, "pixels") == [round(2 * pixels / 1e6, 1)]

    rows = [line.split() for line in text.splitlines() if re.match(r" +\d", line)]
    assert len(rows) == len(batch.media)
    for (size, frames, resized, grid, patches, tokens, name), media in zip(
        rows, batch.media, strict=True
    ):
        gt, gh, gw = media.grid
        assert [size, resized, grid] == [
            "{}×{}".format(*media.size),
            f"{gw * 14}×{gh * 14}",
            f"{gt}×{gh}×{gw}",
        ]
        assert [patches, tokens] == [f"{len(media.patches):,}", f"{len(media.patches) // 4:,}"]
        assert (math.ceil(int(frames) / 2), name) == (gt, media.name)
    parts = [
        numbers(text, what)[0]
        for what in ("weights", "cache", "activations", *["pixels"] * bool(pixels))
    ]
    assert numbers(text, "sum")[0] == pytest.approx(sum(parts), abs=0.3)


def batch_of(config, conversations):
    arguments = make_batch(
        [random_row(config, parts, seed) for seed, parts in enumerate(conversations)]
    )
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    batch = Batch(**{name: tensor.numpy() for name, tensor in arguments.items()})
    batch.media = [None] if batch.arrays().keys() - {"input_ids", "attention_mask"} else []
    return batch


@pytest.mark.parametrize("shape", ["plain", "tied", "one kv head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_are_exactly_the_runs(shape, dtype, monkeypatch):
    model, caches = our_model(SHAPES[shape], random_weights(SHAPES[shape]), dtype), []
    batch = batch_of(SHAPES[shape], [[2, ("image", 2, 3), 4], [5]])
    monkeypatch.setattr(
        generate, "KVCache", lambda *more: caches.append(KVCache(*more)) or caches[0]
    )
    generate.generate(model, batch, 7)
    sizes = dry_run.memory(model.config, batch, 7, dtype, "sdpa", CPU)
    assert sizes["cache"][0] == caches[0].keys.nbytes + caches[0].values.nbytes
    assert dry_run.weights(model.config, dtype)[0] == sum(p.nbytes for p in model.parameters())


# --------------------------------------------------------------------------------------------------- activations


class Peak(TorchDispatchMode):
    """Adds up the memory of all tensors that are made inside and still alive; `most` is the most there was."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((arguments, options))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(result):
            if (
                isinstance(x, torch.Tensor)
                and (key := x.untyped_storage()._cdata) not in given | self.alive.keys()
            ):
                self.alive[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


CONVERSATIONS = {
    "words": [[120]],
    "a picture": [[5, ("image", 8, 9), 20]],
    "a large picture": [[5, ("image", 16, 12), 4]],
    "a clip": [[3, ("video", 4, 6, 6), 10]],
    "two pictures": [[3, ("image", 8, 8), 5, ("image", 4, 3), 2]],
    "padded": [[5, ("image", 8, 9), 20], [120], [("video", 2, 4, 4), 3]],
}
WIDER = small_config(
    heads=4,
    kv_heads=1,
    width=64,
    sections=(8, 12, 12),
    vision_width=80,
    mlp_ratio=4,
    intermediate=1024,
)


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_estimated_within_bounds(dtype, attention):
    shapes = [WIDER, *(SHAPES[name] for name in ("plain", "one kv head", "no sharing", "like 7B"))]
    for config, (name, conversation) in itertools.product(shapes, CONVERSATIONS.items()):
        model = our_model(config, random_weights(config), dtype, attention)
        batch = batch_of(config, conversation)
        inputs = {name: torch.as_tensor(array) for name, array in batch.arrays().items()}
        if inputs["attention_mask"].all():
            del inputs["attention_mask"]
        cache = KVCache(model.config, *batch.input_ids.shape, None, dtype)
        with (
            torch.no_grad(),
            Peak() as peak,
        ):  # inference_mode would hide what is made inside a function
            model(cache=cache, logits_to_keep=1, **inputs)
        estimate = dry_run.memory(model.config, batch, 1, dtype, attention, CPU)["activations"][0]
        assert 0.88 < estimate / peak.most < 1.16, name
        if config is WIDER:  # of the published models' proportions
            assert 0.93 < estimate / peak.most < 1.07, name


def test_plain_attention_is_known_to_hold_its_scores():
    config = our_config(SHAPES["plain"])
    sizes = [
        dry_run.prefill_peak(config, 1, length, False, torch.float32, "plain")
        for length in (1000, 2000)
    ]
    assert sizes[1] / sizes[0] > 3.5
    sizes = [
        dry_run.prefill_peak(config, 1, length, False, torch.float32, "sdpa")
        for length in (1000, 2000)
    ]
    assert sizes[1] / sizes[0] < 2.01
    grids = [
        np.array(grid)
        for grid in ([[1, 40, 40]], [[4, 20, 20]], [[1, 20, 20], [1, 20, 20], [1, 20, 40]])
    ]
    held = [dry_run.vision_peak(config, grid, torch.float32, "plain") for grid in grids]
    assert held[0] > 3 * held[1], "the slices of a clip do not see each other"
    assert held[0] > 3 * held[2], "nor do pictures"


# ----------------------------------------------------------------------------------------------- without weights


def without_weights(tmp_path, **changes):
    folder = shutil.copytree(
        TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: x for name, x in config.items() if x is not None})
    )
    return folder


def test_no_weight_file_is_opened_nor_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load_weights, "safe_open", None)
    wanted = printed(capsys, *PICTURES)
    assert printed(capsys, *PICTURES, "--model", without_weights(tmp_path)) == wanted


def test_the_dtype_is_the_one_asked_for_or_that_of_config_json_or_of_the_files(tmp_path, capsys):
    folder = without_weights(tmp_path, torch_dtype=None, text_config={"dtype": "float16"})
    assert "in float16\n" in printed(capsys, "--prompt", "x", "--model", folder)
    assert "in float64\n" in printed(
        capsys, "--prompt", "x", "--model", folder, "--dtype", "float64"
    )
    shutil.rmtree(folder)
    folder = without_weights(tmp_path, torch_dtype=None)
    assert generate.main(["--dry-run", "--prompt", "x", "--model", str(folder)]) == 2
    assert capsys.readouterr().err == f"generate.py: {folder} lacks model.safetensors\n"
    shutil.copy(TINY / "model.safetensors", folder)
    assert "in bfloat16\n" in printed(capsys, "--prompt", "x", "--model", folder)


# ------------------------------------------------------------------------------------------------- batch and chat


def test_every_line_of_a_batch_is_counted_and_the_largest_group(tmp_path, capsys):
    def ask(*names):
        content = [{"type": "image", "image": str(EXAMPLES / f"{name}.png")} for name in names]
        return [{"role": "user", "content": [*content, {"type": "text", "text": "How many?"}]}]

    lines = [ask("wide"), ask(), ask("shapes", "tall"), ask("gone"), ask("shapes")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--batch", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--batch-size", 2]
    text = printed(capsys, *options)
    assert not (tmp_path / "out.jsonl").exists()
    processor = Processor.from_pretrained(TINY)
    alone = {number: processor(lines[number - 1]).input_ids.shape[1] for number in (1, 2, 3, 5)}
    counts = re.findall(r"^line (\d+)$(?:\n .*)*\nprompt +(\d+) tokens", text, re.MULTILINE)
    assert {int(number): int(count) for number, count in counts} == alone
    assert f"line 4: there is no image at {EXAMPLES}/gone.png\n" in text
    assert "the group that takes most memory: line 3, 5\n" in text
    assert f"2 × {alone[3] + 128} tokens" in text


def test_the_first_message_of_a_chat_is_counted_if_there_is_one(capsys):
    assert printed(capsys, "--chat", *PICTURES, "--prompt", "x") == printed(
        capsys, *PICTURES, "--prompt", "x"
    )
    for options in ([], ["--system", "Be brief."]):
        assert printed(capsys, "--chat", *options).startswith(
            "there is no conversation to count\nweights"
        )


def test_positions_beyond_the_models_reach_are_said(tmp_path, capsys):
    folder = without_weights(tmp_path, max_position_embeddings=40)
    assert "(the model is made for 40)" not in printed(
        capsys, "--prompt", "x", "--model", folder, "--max-new-tokens", 5
    )
    text = printed(capsys, "--prompt", "x", "--model", folder, "--max-new-tokens", 50)
    assert "with 50 new tokens (the model is made for 40)\n" in text
