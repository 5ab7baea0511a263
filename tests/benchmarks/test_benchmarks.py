"""benchmarks/: both sides get the same work, and ratios and ceilings are computed correctly.

No test depends on how long something took.
"""

import contextlib
import io
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    checkpoint,
    compare,
    llama,
    machine,
    processes,
    prompt_lookup,
    scaling,
    summary,
    tables,
    workers,
)
from load_weights import load_config
from preprocess import Processor
from qwen2vl import Qwen2VL

pytestmark = pytest.mark.slow  # it trains, or starts many processes

BUNDLED_CHECKPOINT = checkpoint.find_checkpoint("tiny")


@pytest.fixture(scope="module")
def tiny_config():
    return load_config(BUNDLED_CHECKPOINT)


# ------------------------------------------------------------------------------ checkpoint and work
def test_model_config_2b_has_the_published_shapes():
    with torch.device("meta"):
        model = Qwen2VL(checkpoint.model_config("2b"))
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert (
        sum(p.numel() for p in model.parameters()) == 2_208_985_600
    )  # as the model's page counts them
    assert shapes["visual.blocks.31.mlp.fc1.weight"] == [5120, 1280]
    assert shapes["visual.merger.mlp.2.weight"] == [1536, 5120]
    assert shapes["model.layers.27.self_attn.k_proj.weight"] == [256, 1536]
    assert shapes["model.layers.27.mlp.gate_proj.weight"] == [8960, 1536]
    assert shapes["model.embed_tokens.weight"] == [151936, 1536]
    assert "lm_head.weight" not in shapes  # tied


def test_model_config_thin_differs_from_2b_in_depth_only():
    thin = checkpoint.model_config("thin")
    whole = checkpoint.model_config("2b")
    thin.num_hidden_layers = whole.num_hidden_layers
    thin.vision_config.depth = whole.vision_config.depth
    assert thin == whole


def test_find_checkpoint_makes_a_loadable_checkpoint_once(tmp_path, monkeypatch):
    text = {
        "vocab_size": 151700,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
    }
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 8}
    made = []
    monkeypatch.setitem(checkpoint.SHAPES, "small", (text, vision))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checkpoint, "write_tokenizer", made.append)  # takes seconds
    folder = checkpoint.find_checkpoint("small")
    assert checkpoint.find_checkpoint("small") == folder
    assert folder.is_relative_to(tmp_path)
    assert len(made) == 1
    assert len(list(folder.parent.iterdir())) == 1  # nothing unfinished is left beside it

    from load_weights import load_model

    model = load_model(folder, "cpu")
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert 0.5 < model.model.norm.weight.float().mean() < 1.5
    assert model.visual.blocks[0].mlp.fc1.weight.float().std().item() == pytest.approx(
        8**-0.5, rel=0.3
    )


def test_write_tokenizer_writes_the_published_files(tmp_path, qwen_tokenizer_folder):
    checkpoint.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (qwen_tokenizer_folder / name).read_bytes()


def test_tasks_image_has_736_image_tokens_and_32_of_text():
    config = checkpoint.model_config("2b")
    task = checkpoint.tasks("2b")["image"]
    batch = checkpoint.make_batch(config, task["rows"])
    assert (batch.input_ids == config.image_token_id).sum() == 736
    assert batch.input_ids.shape == (1, 768)
    assert batch.pixel_values.shape == (4 * 736, 1176)
    assert task["new_tokens"] == 33  # one of the prefill, 32 of decoding
    assert checkpoint.task_size(task) == (1, 768, [(1, 23, 32)])


def test_tasks_video_has_16_frames_and_positions_equal_in_all_versions():
    _, _, [(slices, height, width)] = checkpoint.task_size(checkpoint.tasks("2b")["video"])
    assert slices * checkpoint.model_config("2b").vision_config.temporal_patch_size == 16
    assert slices <= max(
        height, width
    )  # a longer video is counted differently by transformers 4 and 5


def test_tasks_llama_has_as_many_tokens_as_the_image():
    assert checkpoint.task_size(checkpoint.tasks("2b")["llama"]) == (1, 768, [])
    assert (
        checkpoint.tasks("2b")["llama"]["new_tokens"]
        == checkpoint.tasks("2b")["image"]["new_tokens"]
    )


def test_tasks_tiny_asks_what_the_model_was_trained_to_answer(tiny_config):
    task = checkpoint.tasks("tiny")["image"]
    image = Image.new("RGB", (6 * 28, 4 * 28))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
    expected = Processor.from_pretrained(BUNDLED_CHECKPOINT)([{"role": "user", "content": content}])
    assert (
        checkpoint.make_batch(tiny_config, task["rows"]).input_ids.tolist()
        == expected.input_ids.tolist()
    )
    assert checkpoint.task_size(task) == (1, expected.input_ids.shape[1], [(1, 4, 6)])


def test_make_batch_returns_the_same_every_time(tiny_config):
    rows = checkpoint.tasks("tiny")["image"]["rows"]
    first, second = (checkpoint.make_batch(tiny_config, rows).arrays() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_make_batch_refuses_sequences_of_different_lengths(tiny_config):
    with pytest.raises(ValueError, match=r"equal length, got \[3, 4\]"):
        checkpoint.make_batch(tiny_config, [[3], [4]])


def counted_flop(work):
    from torch.utils.flop_counter import FlopCounterMode

    # With gradients the linear layer is PyTorch's own, which the counter knows.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        work()
    return counter.get_total_flops()


def test_vision_work_equals_the_count_of_pytorch(tiny_config):
    media = [(1, 4, 6), (3, 4, 4)]
    model = Qwen2VL(tiny_config, attn_implementation="eager")
    merged = tiny_config.vision_config.spatial_merge_size**2
    grids = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in media])
    pixels = torch.zeros(int(grids.prod(1).sum()), 1176)
    flop, size = checkpoint.vision_work(tiny_config, media, itemsize=4)
    assert merged == 4
    assert flop == counted_flop(lambda: model.visual(pixels, grids))
    matrices = sum(p.nbytes for p in model.visual.parameters() if p.dim() > 1)
    assert size == matrices


def test_decoder_work_equals_the_count_of_pytorch_without_the_masked_half(tiny_config):
    rows = 2
    new = 12
    model = Qwen2VL(tiny_config, attn_implementation="eager")
    flop, size = checkpoint.decoder_work(tiny_config, rows, new, 0, itemsize=4)
    counted = counted_flop(lambda: model(torch.ones(rows, new, dtype=torch.long), logits_to_keep=1))
    layer_width = tiny_config.num_hidden_layers * tiny_config.hidden_size
    masked = 4 * layer_width * rows * new * (new - 1) // 2
    assert flop == counted - masked
    assert size == sum(
        p.nbytes for p in model.model.parameters() if p.dim() > 1
    )  # the tied table once


def test_products_are_nearly_all_of_the_work():
    config = checkpoint.model_config("2b")
    task = checkpoint.tasks("2b")["image"]
    flop = {}
    for part, shapes in checkpoint.products(config, task).items():
        flop[part] = sum(2 * count * rows * width * out for count, rows, width, out in shapes)
    in_attention = 4 * 1280 * 32 * (4 * 736) ** 2
    assert flop["vision"] + in_attention == pytest.approx(
        checkpoint.vision_work(config, [(1, 23, 32)], 4)[0], rel=5e-3
    )
    assert flop["decoder"] == pytest.approx(
        checkpoint.decoder_work(config, 1, 768, 0, 4)[0], rel=0.03
    )


def test_work_quantizes_the_decoder_but_not_the_cache_nor_the_encoder(
    tiny_config,
):
    config = tiny_config
    model = Qwen2VL(config)
    cache = (
        config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    )  # numbers for each token
    _, whole = checkpoint.decoder_work(config, 3, 1, 100, itemsize=2)
    _, quantised = checkpoint.decoder_work(config, 3, 1, 100, itemsize=1)
    assert quantised - 3 * 100 * 2 * cache == (whole - 3 * 100 * 2 * cache) / 2
    vision = sum(p.numel() for p in model.visual.parameters())
    decoder = sum(p.numel() for p in model.model.parameters())
    assert checkpoint.held_bytes(config, 3, 100, 4) == 4 * (vision + decoder + 300 * cache)
    assert checkpoint.held_bytes(config, 3, 100, 1) == decoder + 2 * (vision + 300 * cache)


def test_ceilings_tries_every_reduction_and_library():
    found = machine.ceilings(
        {"decoder": [(1, 2, 64, 64)]}, ["float32"], "cpu", time.monotonic, 1, budget=0.0
    )
    assert found["read_bytes_per_s"].keys() == {
        "sum",
        "largest",
        "product",
        "sum in bfloat16",
        "largest of int64",
    }
    rows = {
        f"{dtype}{way}"
        for dtype in ("float32", "bfloat16", "float16")
        for way in ("", " by oneDNN")
    }
    assert found["single_row_bytes_per_s"].keys() == rows
    assert found["flop_per_s"].keys() == {
        "float32"
    }  # the rates of products are those of what was asked for
    assert torch.backends.mkldnn.enabled  # switched on again

    assert machine.fastest_read(CEILING) == (50e9, "largest")
    slow = {"read_bytes_per_s": {"sum": 2e10}}
    assert machine.fastest_read(CEILING | slow) == (3e10, "matmul with one row in bfloat16")
    assert machine.best(CEILING | slow, "bfloat16", "decoder") == (5e11, 3e10)
    assert (
        machine.best(CEILING, "int8", "decoder")[0] == 5e11
    )  # may be widened to whatever is quickest
    assert machine.best(CEILING, "float32", "decoder")[0] == 4e11


def test_merge_ceilings_returns_the_best():
    slower = CEILING | {"read_bytes_per_s": {"sum": 45e9, "largest": 45e9}}
    assert machine.merge_ceilings([CEILING, slower])["read_bytes_per_s"] == {
        "sum": 45e9,
        "largest": 50e9,
    }
    assert machine.merge_ceilings([]) is None


def test_decoder_work_includes_reading_the_cache(tiny_config):
    _, fresh = checkpoint.decoder_work(tiny_config, 3, 1, 0, itemsize=2)
    _, later = checkpoint.decoder_work(tiny_config, 3, 1, 100, itemsize=2)
    keys = (
        tiny_config.num_hidden_layers
        * 3
        * tiny_config.num_key_value_heads
        * 100
        * tiny_config.head_dim
    )
    assert later - fresh == 2 * 2 * keys


# ----------------------------------------------------------------------------------------- the load
def test_watch_separates_foreign_from_own_load():
    watch = machine.Watch(os.getpid())
    watch.samples = [
        machine.Sample(time=0, machine=10.0, own=1.0, stolen=0.0, private_bytes=5),
        machine.Sample(time=1, machine=14.0, own=4.5, stolen=0.1, private_bytes=9),
        machine.Sample(time=2, machine=18.0, own=8.5, stolen=0.5, private_bytes=7),
        machine.Sample(time=3, machine=22.0, own=8.5, stolen=0.5, private_bytes=1),
    ]
    assert watch.between(0.0, 1.0) == {
        "foreign_cores": 0.5,
        "stolen_cores": 0.1,
        "private_bytes": 9,
    }
    assert watch.between(0.2, 1.7) == {
        "foreign_cores": 0.25,
        "stolen_cores": 0.25,
        "private_bytes": 9,
    }
    assert watch.between(2.1, 9.9) == {
        "foreign_cores": 4.0,
        "stolen_cores": 0.0,
        "private_bytes": 7,
    }
    assert not machine.is_quiet(watch.between(0.2, 1.7), 0.4)
    assert machine.is_quiet(watch.between(0.2, 1.7), 0.5)


def test_run_quietly_repeats_only_the_disturbed_task(monkeypatch):
    asked = []
    noise = iter([0.0, 3.0, 0.0])

    def worker(job, threads):
        asked.append(list(job["tasks"]))
        records = []
        for task in job["tasks"]:
            load = {"foreign_cores": next(noise), "stolen_cores": 0.0}
            records.append({"task": task, "start": 0, "end": 1, "load": load})
        return records

    monkeypatch.setattr(processes, "run_worker", worker)
    monkeypatch.setattr(
        machine, "wait_until_quiet", lambda *_: {"foreign_cores": 0.0, "stolen_cores": 0.0}
    )
    options = compare.parse_arguments(["--retries", "1"])
    job = {
        "kind": "questions",
        "side": "ours",
        "dtype": "float32",
        "tasks": {"image": 1, "batch": 2},
    }
    records = processes.run_quietly(job, options, lambda line: None)
    assert asked == [["image", "batch"], ["batch"]]
    assert [(r["task"], r["quiet"]) for r in records] == [("image", True), ("batch", True)]


# -------------------------------------------------------------------------------------- the summary
def make_record(side, dtype, quiet=True, **values):
    record = {
        "task": "image",
        "side": side,
        "dtype": dtype,
        "quiet": quiet,
        "vision": 3.0,
        "first_token": 5.0,
        "steps": [0.5, 1.5],
        "peak_bytes": 8e9,
        "private_bytes": 4e9,
        "load": {"foreign_cores": 0.01, "stolen_cores": 0.0},
    }
    return record | values


CEILING = {
    "task": "ceilings",
    "quiet": True,
    "load": {"foreign_cores": 0.0, "stolen_cores": 0.0},
    "read_bytes_per_s": {"sum": 40e9, "largest": 50e9},
    "flop_per_s": {
        "float32": {"vision": {"F.linear": 2e11, "oneDNN": 3e11}, "decoder": {"F.linear": 4e11}},
        "bfloat16": {"vision": {"F.linear": 1e11}, "decoder": {"F.linear": 5e11}},
    },
    "single_row_bytes_per_s": {"float32": 2e10, "bfloat16": 3e10},
}


def rows_of(records, dtypes=("float32", "bfloat16")):
    """Return the rows of a summary by metric and dtype."""
    results = {
        "dtypes": list(dtypes),
        "tasks": checkpoint.tasks("2b"),
        "records": records,
        "logits": {},
    }
    rows = summary.summarize(results, checkpoint.model_config("2b"))
    return {(row["metric"], row["dtype"]): row for row in rows}


def test_summarize_divides_the_medians_of_the_quiet_runs():
    ours = [make_record("ours", "float32", vision=seconds) for seconds in (2.0, 1.0, 4.0)]
    ours.append(make_record("ours", "float32", quiet=False, vision=99.0))
    rows = rows_of(
        [*ours, make_record("transformers", "float32", vision=6.0), CEILING], ["float32"]
    )
    row = rows["vision encoder", "float32"]
    assert (row["ours"], row["theirs"], row["ratio"], row["quiet_runs"]) == (2.0, 6.0, 3.0, 1)
    assert row["spread"] == 1.5  # of 1, 2 and 4
    decode = rows["decode, batch 1", "float32"]
    assert decode["ours"] == 1.0  # seconds a step, on average


def test_summarize_compares_with_the_best_dtype_of_the_peer():
    first = {
        "ours": {"float32": 5.0, "bfloat16": 4.0},
        "transformers": {"float32": 6.0, "bfloat16": 11.0},
    }
    records = [
        make_record(side, dtype, first_token=first[side][dtype])
        for side in first
        for dtype in first[side]
    ]
    rows = rows_of([*records, CEILING])
    prefill = {dtype: rows["prefill", dtype] for dtype in ("float32", "bfloat16")}
    assert (prefill["float32"]["ratio"], prefill["float32"]["ratio_to_best"]) == (1.5, 1.5)
    assert (prefill["bfloat16"]["ratio"], prefill["bfloat16"]["ratio_to_best"]) == (8.0, 3.0)
    assert [prefill[dtype]["ratio_to_float32"] for dtype in ("float32", "bfloat16")] == [1.5, 3.0]


def test_summarize_compares_quantized_weights_and_llama_cpp():
    seconds = {("ours", "bfloat16"): 6.0, ("ours", "int8"): 4.0, ("ours", "int4"): 3.0}
    seconds |= {("llama.cpp", "F16"): 9.0, ("llama.cpp", "Q8_0"): 2.0}
    seconds |= {("llama.cpp", "Q4_K_M"): 1.5}
    records = [
        make_record(*one, task="llama", steps=[s], first_token=s) for one, s in seconds.items()
    ]
    records += [
        make_record(*one, first_token=s + 3.0) for one, s in seconds.items() if one[0] == "ours"
    ]
    records += [make_record("transformers", "bfloat16", first_token=15.0), CEILING]
    dtypes = ["bfloat16", "int8", "int4"]
    config = checkpoint.model_config("2b")
    rows = rows_of(records, dtypes)

    decode = {dtype: rows["text only: decode", dtype] for dtype in dtypes}
    assert [row["peer"] for row in decode.values()] == [
        "llama.cpp F16",
        "llama.cpp Q8_0",
        "llama.cpp Q4_K_M",
    ]
    assert [row["ratio"] for row in decode.values()] == [1.5, 0.5, 0.5]
    assert [row["ratio_to_our_bfloat16"] for row in decode.values()] == [1.0, 1.5, 2.0]
    for dtype, size, theirs in (
        ("bfloat16", 2, 2),
        ("int8", 1, 34 / 32),
        ("int4", 10 / 16, 0.634),
    ):
        least = [
            checkpoint.decoder_work(config, 1, 1, 768 + 16, each)[1] / 50e9
            for each in (size, theirs)
        ]
        assert decode[dtype]["ours_of_ceiling"] == pytest.approx(least[0] / decode[dtype]["ours"])
        assert decode[dtype]["theirs_of_ceiling"] == pytest.approx(
            least[1] / decode[dtype]["theirs"]
        )

    prefill = rows["prefill", "int8"]
    assert (prefill["peer"], prefill["theirs"], prefill["ratio"]) == (
        None,
        None,
        None,
    )  # nobody to be beside
    assert (prefill["ratio_to_our_bfloat16"], prefill["ratio_to_best"]) == (1.5, 3.0)
    first, second = tables.tables({"rows": list(rows.values())}, seconds=False).split("\n\n")
    assert "| prefill | bfloat16 | 2.00× | 2.00× |" in first
    assert "llama.cpp" not in first
    assert "int8" not in first
    assert "| prefill | int8 | 1.50× | — |" in second
    assert "| text only: decode | int8 | 1.50× | 0.50× (Q8_0) |" in second
    assert "| text only: decode | bfloat16 | — | 1.50× (F16) |" in second
    assert len({line.count("|") for line in second.splitlines()}) == 1


def test_summarize_takes_shares_of_the_best_rate_and_bandwidth():
    config = checkpoint.model_config("2b")
    rows = rows_of(
        [
            *(
                make_record(side, dtype)
                for side in compare.SIDES
                for dtype in ("float32", "bfloat16")
            ),
            CEILING,
        ]
    )
    flop, _ = checkpoint.vision_work(config, [(1, 23, 32)], 4)
    for dtype in (
        "float32",
        "bfloat16",
    ):  # half precision may be widened, so float32's 3e11 is its ceiling as well
        assert rows["vision encoder", dtype]["ours_of_ceiling"] == pytest.approx(flop / 3e11 / 3.0)
    flop, _ = checkpoint.decoder_work(config, 1, 768, 0, 2)
    assert rows["prefill", "float32"]["ours_of_ceiling"] == pytest.approx(flop / 4e11 / 2.0)
    assert rows["prefill", "bfloat16"]["ours_of_ceiling"] == pytest.approx(flop / 5e11 / 2.0)
    _, size = checkpoint.decoder_work(config, 1, 1, 768 + 16, 2)
    assert rows["decode, batch 1", "bfloat16"]["ours_of_ceiling"] == pytest.approx(
        size / 50e9 / 1.0
    )
    memory = rows["peak memory", "bfloat16"]
    weights = 2 * 2_208_985_600
    cache = 2 * (2 * 28 * 2 * 128) * (768 + 33)
    assert memory["ours_of_ceiling"] == pytest.approx((weights + cache) / 8e9)


def test_summarize_leaves_out_what_was_never_quiet():
    rows = rows_of(
        [make_record("ours", "float32", False), make_record("transformers", "float32"), CEILING],
        ["float32"],
    )
    row = rows["vision encoder", "float32"]
    assert row["ours"] is row["ratio"] is row["ours_of_ceiling"] is None
    assert row["theirs_of_ceiling"] is not None
    shown = tables.tables({"rows": [row]}, seconds=False)
    assert "| not measured | not measured | not measured | — | 576 %" in shown


def test_write_readme_keeps_the_text_and_writes_no_absolute_times(tmp_path):
    readme = tmp_path / "README.md"
    results = tmp_path / "results"
    readme.write_text(
        "before\n<!-- written by compare.py -->\nold\n<!-- end -->\nafter\n", encoding="utf-8"
    )
    records = [
        make_record("ours", "float32", vision=1.2345),
        make_record("transformers", "float32", vision=2.469),
        CEILING,
    ]
    found = {
        "dtypes": ["float32"],
        "tasks": checkpoint.tasks("2b"),
        "records": records,
        "logits": {},
    }
    found |= {"busy_limit": 0.15, "machine": machine.describe("cpu", 1)}
    found["rows"] = summary.summarize(found, checkpoint.model_config("2b"))
    compare.write_json(results / "2b-cpu.json", found)
    tables.write_readme(readme, results)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- written")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "| vision encoder | float32 | 2.00× | 2.00× | 2.00× |" in text
    assert "1.23" not in text
    assert "### CUDA\n\nNot measured." in text
    assert "1.234 s" in tables.tables(found, seconds=True)


def test_compare_logits_detects_different_logits(tmp_path):
    records = [
        {"task": "image", "dtype": "float32", "side": side, "tokens": [[1], [2]]}
        for side in compare.SIDES
    ]
    logits = np.random.default_rng(0).normal(size=(2, 1, 50)).astype(np.float32)
    np.save(tmp_path / "ours-float32-image.npy", logits)
    np.save(tmp_path / "transformers-float32-image.npy", logits)
    said = []
    assert compare.compare_logits(tmp_path, records, said.append, {})["image float32"]["holds"]
    np.save(tmp_path / "ours-float32-image.npy", logits + np.float32(1e-3))
    assert not compare.compare_logits(tmp_path, records, said.append, {})["image float32"]["holds"]
    assert "DIFFER" in said[-1]


def test_compare_logits_judges_other_formats_by_the_cosine(tmp_path):
    rng = np.random.default_rng(0)
    said = []
    sides = (("ours", "float32"), ("ours", "int8"), ("llama.cpp", "F16"))
    records = [
        {"task": "llama", "dtype": dtype, "side": side, "tokens": [[1], [2]]}
        for side, dtype in sides
    ]
    logits, noise = rng.normal(size=(2, 2, 1, 50_000)).astype(np.float32)
    np.save(tmp_path / "ours-float32-llama.npy", logits)
    np.save(tmp_path / "ours-int8-llama.npy", logits + 0.03 * noise)
    np.save(tmp_path / "llama.cpp-F16-llama.npy", logits + 0.06 * noise)
    found = compare.compare_logits(tmp_path, records, said.append, {})
    assert {name: one["holds"] for name, one in found.items()} == {
        "llama int8": True,
        "llama F16": False,
    }
    assert found["llama int8"]["cosine"] == pytest.approx(1 / (1 + 0.03**2) ** 0.5, abs=2e-5)


# ---------------------------------------------------------------------------------------- llama.cpp
def test_load_options_keeps_the_rest_of_a_quantized_model_in_bfloat16():
    assert workers.load_options("float32") == {"dtype": torch.float32}
    assert workers.load_options("int8") == {"dtype": torch.bfloat16, "quantize": "int8"}


def test_question_jobs_ask_each_side_what_it_computes(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(llama, "obstacle", lambda python: None)
    monkeypatch.setattr(llama, "find_gguf", lambda checkpoint, form, cache, python: tmp_path / form)
    sections = ["image", "video", "llama"]
    options = compare.parse_arguments(
        [
            "--sections",
            *sections,
            "--dtypes",
            "float32",
            "bfloat16",
            "int8",
            "--llama-python",
            "other",
        ]
    )
    tasks = {name: checkpoint.tasks("tiny")[name] for name in sections}
    jobs = compare.question_jobs(
        options, tasks, {"checkpoint": str(BUNDLED_CHECKPOINT)}, tiny_config
    )
    assert {(job["side"], job["dtype"]): list(job["tasks"]) for job in jobs} == {
        ("ours", "float32"): ["image", "video", "llama"],
        ("transformers", "float32"): ["image", "video"],
        ("ours", "bfloat16"): ["image", "video", "llama"],
        ("transformers", "bfloat16"): ["image", "video"],
        ("ours", "int8"): ["image", "llama"],
        ("llama.cpp", "F16"): ["llama"],
        ("llama.cpp", "Q8_0"): ["llama"],
    }
    assert (
        jobs[-1]["tasks"]["llama"]["ids"]
        == checkpoint.make_batch(tiny_config, [[56]]).input_ids[0].tolist()
    )
    assert (jobs[-1]["gguf"], jobs[-1]["python"]) == (str(tmp_path / "Q8_0"), "other")


def test_parse_arguments_names_what_llama_lacks(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho Traceback >&2\necho \"No module named 'llama_cpp'\" >&2\nexit 1\n"
    )
    python.chmod(0o755)

    def refused(*more):
        with pytest.raises(SystemExit):
            compare.parse_arguments(["--sections", "image", "llama", *more])
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    assert refused().endswith("needs the package gguf here: pip install gguf==0.19.0")
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: object())
    said = refused("--llama-python", str(python))
    assert f"needs llama-cpp-python in {python} (No module named 'llama_cpp'): CMAKE_ARGS=" in said
    assert "expected a Python interpreter" in refused("--llama-python", str(tmp_path / "nothing"))
    assert "--device is cuda" in refused("--device", "cuda")


@pytest.mark.parametrize("form", llama.FORMATS)
def test_write_gguf_writes_the_decoder_only(form, tmp_path, tiny_config):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    from load_weights import load_model

    with pytest.raises(ValueError, match="mrope_section has 15 entries"):
        llama.write_gguf(BUNDLED_CHECKPOINT, form, tmp_path / "decoder.gguf")
    (tmp_path / "model.safetensors").symlink_to(BUNDLED_CHECKPOINT / "model.safetensors")
    described = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text()) | {
        "rope_scaling": {"mrope_section": [4, 6, 6]}
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    llama.write_gguf(tmp_path, form, tmp_path / "decoder.gguf")
    reader = gguf.GGUFReader(tmp_path / "decoder.gguf")
    fields = {
        name.removeprefix("qwen2vl."): field.contents() for name, field in reader.fields.items()
    }
    assert fields["general.architecture"] == "qwen2vl"
    assert fields["rope.dimension_sections"] == [4, 6, 6, 0]
    assert fields["rope.freq_base"] == tiny_config.rope_theta
    assert fields["attention.layer_norm_rms_epsilon"] == pytest.approx(tiny_config.rms_norm_eps)
    assert (fields["attention.head_count"], fields["attention.head_count_kv"]) == (4, 2)
    assert (fields["block_count"], fields["vocab_size"]) == (4, tiny_config.vocab_size)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    decoder = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32).model
    assert len(tensors) == len(
        list(decoder.parameters())
    )  # the table once, as it is tied; no vision encoder
    expected = {
        "token_embd.weight": decoder.embed_tokens.weight,
        "output_norm.weight": decoder.norm.weight,
        "blk.3.attn_k.weight": decoder.layers[3].self_attn.k_proj.weight,
        "blk.2.attn_q.bias": decoder.layers[2].self_attn.q_proj.bias,
        "blk.1.ffn_gate.weight": decoder.layers[1].mlp.gate_proj.weight,
    }
    for name, parameter in expected.items():
        tensor = tensors[name]
        ours = parameter.detach().numpy()
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ours.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(stored, ours)
            continue
        assert tensor.tensor_type.name == form
        step = 1 / 127 if form == "Q8_0" else 1e-3
        np.testing.assert_allclose(stored, ours, atol=step * np.abs(ours).max(), rtol=0)


def test_find_gguf_writes_once_per_set_of_weights_and_never_half(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    cache = tmp_path / "cache"
    written = []
    folder.mkdir()
    (folder / "model.safetensors").write_text("one")

    def write(checkpoint, form, path):
        path.write_text(form)
        written.append(path.name)

    monkeypatch.setattr(llama, "write_gguf", write)
    first = llama.find_gguf(folder, "F16", cache)
    assert llama.find_gguf(folder, "F16", cache) == first
    assert first.read_text() == "F16"
    assert llama.find_gguf(folder, "Q8_0", cache) != first
    (folder / "model.safetensors").write_text("other weights")
    assert llama.find_gguf(folder, "F16", cache) != first
    assert len(written) == len(list(cache.iterdir())) == 3
    assert not any(name.endswith(".gguf") for name in written)  # the name comes when it is whole


@pytest.mark.parametrize("fails", [False, True])
def test_find_gguf_lets_llama_cpp_make_formats_of_f16(fails, tmp_path, monkeypatch):
    """Its interpreter is replaced by a program that writes down its arguments."""
    monkeypatch.setattr(llama, "write_gguf", lambda checkpoint, form, path: path.write_text(form))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_text("one")
    python = tmp_path / "python"
    end = "echo no such format >&2; exit 1" if fails else 'echo "$3 $5" > "$4"'
    python.write_text(f"#!/bin/sh\n{end}\n")
    python.chmod(0o755)
    if fails:
        with pytest.raises(RuntimeError, match=r"llama\.cpp cannot write Q4_K_M:\nno such format"):
            llama.find_gguf(folder, "Q4_K_M", tmp_path, str(python))
        assert not list(tmp_path.glob("*Q4_K_M.gguf"))
        return
    path = llama.find_gguf(folder, "Q4_K_M", tmp_path, str(python))
    source = llama.find_gguf(folder, "F16", tmp_path)
    assert path.read_text() == f"{source} Q4_K_M\n"


def test_compare_llama_cpp_has_our_logits(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "tiny.json"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        compare.main(run_options(out, ["float32", "int8", "int4"], ["llama"]))
    logits = json.loads(out.read_text(encoding="utf-8"))["logits"]
    assert logits["llama F16"]["cosine"] > 0.99999  # a wrong RoPE, norm or permutation is far below
    assert logits["llama Q8_0"]["cosine"] > 0.999
    assert logits["llama Q4_K_M"]["cosine"] > 0.97
    assert "| text only: decode | int8 |" in shown.getvalue()
    assert "llama.cpp: llama-cpp-python" in shown.getvalue()


# -------------------------------------------------------------------------------------- a whole run
def run_options(out, dtypes, sections):
    """Return the options of a short run on the bundled checkpoint, on a machine of any load."""
    options = ["--shapes", "tiny", "--repetitions", "1", "--threads", "1"]
    options += ["--patience", "0", "--busy", "99", "--out", str(out)]
    return [*options, "--dtypes", *dtypes, "--sections", *sections]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the results file of a short run, its stdout and its stderr."""
    out = tmp_path_factory.mktemp("run") / "tiny.json"
    options = run_options(out, ["float32", "int8"], ["image", "batch", "video"])
    stdout = io.StringIO()
    stderr = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        assert compare.main(options) == 0, stderr.getvalue()
    return json.loads(out.read_text(encoding="utf-8")), stdout.getvalue(), stderr.getvalue()


@pytest.mark.parametrize(
    ("sections", "expected"),
    [(["cold"], {"cold"}), (["image", "cold"], {"ceilings", "questions", "cold"})],
)
def test_compare_measures_the_machine_only_for_what_has_a_ceiling(
    sections, expected, tmp_path, monkeypatch
):
    kinds = []

    def note(job, options, say):
        kinds.append(job["kind"])
        return []

    monkeypatch.setattr(compare, "run_quietly", note)
    monkeypatch.setattr(compare, "read_imports", lambda options, common: None)
    compare.main(run_options(tmp_path / "tiny.json", ["float32"], sections))
    assert set(kinds) == expected
    assert "ceilings" not in kinds[1:]


METRICS = [
    "vision encoder",
    "prefill",
    "decode, batch 1",
    "decode, batch 2",
    "video to first token",
    "peak memory",
    "— without mapped files",
]


def test_compare_reports_all_fields(run):
    results, stdout, stderr = run
    rows = {"float32": [], "int8": []}
    for row in results["rows"]:
        rows[row["dtype"]].append(row)
        assert row["ours"] > 0
        assert f"| {row['metric']} | {row['dtype']} |" in stdout
    assert [row["metric"] for row in rows["float32"]] == METRICS
    without_video = [metric for metric in METRICS if metric != "video to first token"]
    assert [row["metric"] for row in rows["int8"]] == without_video
    for row in rows["float32"]:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=1e-3)
    expected = {"processor", "cores", "threads", "instructions", "memory_gb", "gpu", "versions"}
    assert results["machine"].keys() == expected
    for record in results["records"]:
        assert {"foreign_cores", "stolen_cores"} <= record["load"].keys()
    assert "cores busy" in stderr


def test_compare_finds_equal_logits(run):
    logits = run[0]["logits"]
    quantized = {"image int8", "batch int8"}
    unquantized = {"image float32", "batch float32", "video float32"}
    assert logits.keys() == quantized | unquantized
    for name in unquantized:
        assert logits[name]["holds"]
        assert logits[name]["share"] < 1e-4
    for name in quantized:
        assert logits[name]["cosine"] > 0.999
    assert logits["image float32"]["steps"] == 2  # of the prefill and of the last decode step


# ------------------------------------------------------------------------------------------ scaling
def test_slope_of_a_square_law_is_two():
    assert scaling.slope([(1, 50.0), (2, 4.0), (4, 16.0), (8, 64.0)]) == pytest.approx(2)
    assert scaling.slope([(1, 1.0), (2, 2.0)]) is None


def test_draw_writes_a_panel_for_each_axis(tmp_path):
    for tiny in (True, False):
        assert scaling.points(tiny).keys() == scaling.CURVES.keys()
    assert list(scaling.points(False)["image tokens"]) == [64, 256, 576, 1024, 2304]
    line = [(1, 0.1), (2, 0.2), (4, 0.4)]
    sides = {"ours": line, "transformers": []}
    curves = {axis: {name: sides for name, _ in parts} for axis, parts in scaling.CURVES.items()}
    scaling.draw({"curves": curves}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size < 200_000


# ------------------------------------------------------------------------------------ prompt lookup
def test_scripts_of_prompt_lookup_repeat_what_their_task_repeats():
    tokens = list(range(2000))  # none occurs twice
    for number in (0, 2):
        tasks = prompt_lookup.scripts(tokens, number)
        assert {len(answer) for _, answer in tasks.values()} == {prompt_lookup.ANSWER}
        shares = {}
        for task, (prompt, answer) in tasks.items():
            assert len(prompt) == prompt_lookup.PROMPT
            shares[task] = len(set(answer) & set(prompt)) / len(answer)
        assert shares == {"transcribe": 1.0, "extract": 0.75, "new text": 0.0}


def test_scripted_model_answers_its_script_and_other_answers_are_refused(monkeypatch):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 14000}
    small["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    monkeypatch.setattr(prompt_lookup, "CONFIG_2B", checkpoint.CONFIG_2B | small)
    vision = {"embed_dim": 16, "num_heads": 2, "hidden_size": 16}
    monkeypatch.setattr(prompt_lookup, "VISION_2B", checkpoint.VISION_2B | vision)
    model = prompt_lookup.build_model("float32")
    prompt = list(range(20, 60))
    answer = prompt[5:30]
    for num_tokens in (None, 8):
        assert prompt_lookup.decode_seconds(model, prompt, answer, num_tokens) > 0
    monkeypatch.setattr(model, "forward", super(type(model), model).forward)
    with pytest.raises(ValueError, match="expected the scripted answer"):
        prompt_lookup.decode_seconds(model, prompt, answer, 8)
