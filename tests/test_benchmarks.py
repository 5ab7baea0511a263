"""benchmarks/: the ruler measures what it says, computes ratios rightly, and measures the same thing on both sides.

No test looks at how long something took.
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

from benchmarks import checkpoint, compare, llama, machine, scaling, workers
from load_weights import load_config
from preprocess import Processor
from qwen2vl import Qwen2VL

TINY = checkpoint.find_checkpoint("tiny")


@pytest.fixture(scope="module")
def tiny_config():
    return load_config(TINY)


# ------------------------------------------------------------------------------------------- checkpoint and work
def test_the_2b_shapes_are_those_of_the_published_model():
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


def test_thin_shapes_differ_from_2b_in_depth_only():
    thin, whole = checkpoint.model_config("thin"), checkpoint.model_config("2b")
    thin.num_hidden_layers, thin.vision_config.depth = (
        whole.num_hidden_layers,
        whole.vision_config.depth,
    )
    assert thin == whole


def test_a_random_checkpoint_is_made_once_and_loads(tmp_path, monkeypatch):
    text = {"vocab_size": 151700, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 8}
    made = []
    import real_vocabulary

    monkeypatch.setitem(checkpoint.SHAPES, "small", (text, vision))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        real_vocabulary, "build_tokenizer", made.append
    )  # takes seconds, and has tests of its own
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


def test_the_picture_makes_736_tokens_among_32_of_text():
    config, task = checkpoint.model_config("2b"), checkpoint.tasks("2b")["picture"]
    batch = checkpoint.make_batch(config, task["rows"])
    assert (batch.input_ids == config.image_token_id).sum() == 736
    assert batch.input_ids.shape == (1, 768)
    assert batch.pixel_values.shape == (4 * 736, 1176)
    assert task["new_tokens"] == 33  # one of the prefill, 32 of decoding
    assert checkpoint.task_size(task) == (1, 768, [(1, 23, 32)])


def test_the_clip_has_16_frames_and_positions_that_all_versions_agree_on():
    _, _, [(slices, height, width)] = checkpoint.task_size(checkpoint.tasks("2b")["video"])
    assert slices * checkpoint.model_config("2b").vision_config.temporal_patch_size == 16
    assert slices <= max(
        height, width
    )  # a longer clip is counted differently by transformers 4 and 5


def test_llama_is_asked_as_many_words_as_the_pictures_prompt_has_tokens():
    assert checkpoint.task_size(checkpoint.tasks("2b")["llama"]) == (1, 768, [])
    assert (
        checkpoint.tasks("2b")["llama"]["new_tokens"]
        == checkpoint.tasks("2b")["picture"]["new_tokens"]
    )


def test_the_bundled_model_is_asked_what_it_was_trained_to_answer(tiny_config):
    task, picture = checkpoint.tasks("tiny")["picture"], Image.new("RGB", (6 * 28, 4 * 28))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the image."}]
    expected = Processor.from_pretrained(TINY)([{"role": "user", "content": content}])
    assert (
        checkpoint.make_batch(tiny_config, task["rows"]).input_ids.tolist()
        == expected.input_ids.tolist()
    )
    assert checkpoint.task_size(task) == (1, expected.input_ids.shape[1], [(1, 4, 6)])


def test_inputs_are_the_same_every_time(tiny_config):
    rows = checkpoint.tasks("tiny")["picture"]["rows"]
    first, second = (checkpoint.make_batch(tiny_config, rows).arrays() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_rows_of_different_lengths_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"equally long, these have \[3, 4\]"):
        checkpoint.make_batch(tiny_config, [[3], [4]])


def counted_flop(work):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_the_work_of_the_vision_tower_is_what_pytorch_counts(tiny_config):
    media = [(1, 4, 6), (3, 4, 4)]
    model, merged = (
        Qwen2VL(tiny_config, attn_implementation="eager"),
        tiny_config.vision_config.spatial_merge_size**2,
    )
    grids = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in media])
    pixels = torch.zeros(int(grids.prod(1).sum()), 1176)
    flop, size = checkpoint.vision_work(tiny_config, media, itemsize=4)
    assert merged == 4
    assert flop == counted_flop(lambda: model.visual(pixels, grids))
    matrices = sum(p.nbytes for p in model.visual.parameters() if p.dim() > 1)
    assert size == matrices


def test_the_work_of_the_decoder_is_what_pytorch_counts_less_the_masked_half(tiny_config):
    rows, new = 2, 12
    model = Qwen2VL(tiny_config, attn_implementation="eager")
    flop, size = checkpoint.decoder_work(tiny_config, rows, new, 0, itemsize=4)
    counted = counted_flop(lambda: model(torch.ones(rows, new, dtype=torch.long), logits_to_keep=1))
    layers, width = tiny_config.num_hidden_layers, tiny_config.hidden_size
    masked = layers * 4 * width * rows * new * (new - 1) // 2
    assert flop == counted - masked
    assert size == sum(
        p.nbytes for p in model.model.parameters() if p.dim() > 1
    )  # the tied table once


def test_the_products_that_set_the_ceiling_are_nearly_all_of_the_work():
    config, task = checkpoint.model_config("2b"), checkpoint.tasks("2b")["picture"]
    flop = {part: sum(2 * n * N * wide * out for n, N, wide, out in shapes)
            for part, shapes in checkpoint.products(config, task).items()}  # fmt: skip
    in_attention = 4 * 1280 * 32 * (4 * 736) ** 2
    assert flop["vision"] + in_attention == pytest.approx(
        checkpoint.vision_work(config, [(1, 23, 32)], 4)[0], rel=5e-3
    )
    assert flop["decoder"] == pytest.approx(
        checkpoint.decoder_work(config, 1, 768, 0, 4)[0], rel=0.03
    )


def test_quantising_makes_the_decoders_weights_smaller_but_not_the_cache_nor_the_vision_tower(
    tiny_config,
):
    config, model = tiny_config, Qwen2VL(tiny_config)
    cache = (
        config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    )  # numbers for each token
    _, whole = checkpoint.decoder_work(config, 3, 1, 100, itemsize=2)
    _, quantised = checkpoint.decoder_work(config, 3, 1, 100, itemsize=1)
    assert quantised - 3 * 100 * 2 * cache == (whole - 3 * 100 * 2 * cache) / 2
    vision, decoder = (
        sum(p.numel() for p in part.parameters()) for part in (model.visual, model.model)
    )
    assert checkpoint.held_bytes(config, 3, 100, 4) == 4 * (vision + decoder + 300 * cache)
    assert checkpoint.held_bytes(config, 3, 100, 1) == decoder + 2 * (vision + 300 * cache)


def test_every_way_to_read_memory_is_tried_and_the_quickest_is_named():
    found = machine.ceilings(
        {"decoder": [(1, 2, 64, 64)]}, ["float32"], "cpu", time.monotonic, 1, budget=0.0
    )
    assert found["read_bytes_per_s"].keys() == {
        "sum", "largest", "product", "sum in bfloat16", "largest of int64"
    }  # fmt: skip
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

    assert machine.quickest_read(CEILING) == (50e9, "largest")
    slow = {"read_bytes_per_s": {"sum": 2e10}}
    assert machine.quickest_read(CEILING | slow) == (3e10, "product with one row in bfloat16")
    assert machine.best(CEILING | slow, "bfloat16", "decoder") == (5e11, 3e10)
    assert (
        machine.best(CEILING, "int8", "decoder")[0] == 5e11
    )  # may be widened to whatever is quickest
    assert machine.best(CEILING, "float32", "decoder")[0] == 4e11


def test_the_best_of_several_ceilings_counts():
    slower = CEILING | {"read_bytes_per_s": {"sum": 45e9, "largest": 45e9}}
    assert machine.merge_ceilings([CEILING, slower])["read_bytes_per_s"] == {
        "sum": 45e9,
        "largest": 50e9,
    }
    assert machine.merge_ceilings([]) is None


def test_a_decode_step_reads_the_cache_too(tiny_config):
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


# ------------------------------------------------------------------------------------------------------ the load
def test_what_others_do_is_told_from_what_the_worker_does():
    watch = machine.Watch(os.getpid())
    # (time, processor seconds of the machine, of ours, stolen, private bytes)
    watch.samples = [
        (0, 10.0, 1.0, 0.0, 5),
        (1, 14.0, 4.5, 0.1, 9),
        (2, 18.0, 8.5, 0.5, 7),
        (3, 22.0, 8.5, 0.5, 1),
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


def test_a_disturbed_task_is_measured_again_and_only_it(monkeypatch):
    asked, noise = [], iter([0.0, 3.0, 0.0])

    def worker(job, threads):
        asked.append(list(job["tasks"]))
        load = lambda: {"foreign_cores": next(noise), "stolen_cores": 0.0}  # noqa: E731
        return [{"task": task, "start": 0, "end": 1, "load": load()} for task in job["tasks"]]

    monkeypatch.setattr(compare, "run_worker", worker)
    monkeypatch.setattr(
        machine, "wait_until_quiet", lambda *_: {"foreign_cores": 0.0, "stolen_cores": 0.0}
    )
    options = compare.parse_arguments(["--retries", "1"])
    job = {
        "kind": "questions",
        "side": "ours",
        "dtype": "float32",
        "tasks": {"picture": 1, "batch": 2},
    }
    records = compare.run_quietly(job, options, lambda line: None)
    assert asked == [["picture", "batch"], ["batch"]]
    assert [(r["task"], r["quiet"]) for r in records] == [("picture", True), ("batch", True)]


# --------------------------------------------------------------------------------------------------- the summary
def given(side, dtype, quiet=True, **values):
    record = {"task": "picture", "side": side, "dtype": dtype, "quiet": quiet, "vision": 3.0, "first_token": 5.0,
              "steps": [0.5, 1.5], "peak_bytes": 8e9, "private_bytes": 4e9}  # fmt: skip
    load = {"foreign_cores": 0.01, "stolen_cores": 0.0}
    return record | {"load": load} | values


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


def summary(records, dtypes=("float32", "bfloat16")):
    found = {
        "dtypes": list(dtypes),
        "tasks": checkpoint.tasks("2b"),
        "records": records,
        "logits": {},
    }
    rows = compare.summarise(found, checkpoint.model_config("2b"))
    return {(row["metric"], row["dtype"]): row for row in rows}


def test_ratios_are_those_of_the_medians_of_the_quiet_runs():
    ours = [given("ours", "float32", vision=seconds) for seconds in (2.0, 1.0, 4.0)]
    ours.append(given("ours", "float32", quiet=False, vision=99.0))
    rows = summary([*ours, given("transformers", "float32", vision=6.0), CEILING], ["float32"])
    row = rows["vision tower", "float32"]
    assert (row["ours"], row["theirs"], row["ratio"], row["quiet_runs"]) == (2.0, 6.0, 3.0, 1)
    assert row["spread"] == 1.5  # of 1, 2 and 4
    decode = rows["decode, batch 1", "float32"]
    assert decode["ours"] == 1.0  # seconds a step, on average


def test_the_peer_is_also_measured_by_its_best_dtype():
    first = {
        "ours": {"float32": 5.0, "bfloat16": 4.0},
        "transformers": {"float32": 6.0, "bfloat16": 11.0},
    }
    records = [
        given(side, dtype, first_token=first[side][dtype])
        for side in first
        for dtype in first[side]
    ]
    rows = summary([*records, CEILING])
    prefill = {dtype: rows["prefill", dtype] for dtype in ("float32", "bfloat16")}
    assert (prefill["float32"]["ratio"], prefill["float32"]["ratio_to_best"]) == (1.5, 1.5)
    assert (prefill["bfloat16"]["ratio"], prefill["bfloat16"]["ratio_to_best"]) == (8.0, 3.0)
    assert [prefill[dtype]["ratio_to_float32"] for dtype in ("float32", "bfloat16")] == [1.5, 3.0]


def test_quantised_weights_stand_beside_our_bfloat16_and_llama_cpp_beside_the_like_format():
    seconds = {("ours", "bfloat16"): 6.0, ("ours", "int8"): 4.0, ("ours", "int4"): 3.0}
    seconds |= {("llama.cpp", "F16"): 9.0, ("llama.cpp", "Q8_0"): 2.0}
    records = [given(*one, task="llama", steps=[s], first_token=s) for one, s in seconds.items()]
    records += [given(*one, first_token=s + 3.0) for one, s in seconds.items() if one[0] == "ours"]
    records += [given("transformers", "bfloat16", first_token=15.0), CEILING]
    dtypes, config = ["bfloat16", "int8", "int4"], checkpoint.model_config("2b")
    rows = summary(records, dtypes)

    decode = {dtype: rows["words only: decode", dtype] for dtype in dtypes}
    assert [row["peer"] for row in decode.values()] == [
        "llama.cpp F16",
        "llama.cpp Q8_0",
        "llama.cpp Q8_0",
    ]
    assert [row["ratio"] for row in decode.values()] == [1.5, 0.5, 2 / 3]
    assert [row["ratio_to_our_bfloat16"] for row in decode.values()] == [1.0, 1.5, 2.0]
    for dtype, size, theirs in (
        ("bfloat16", 2, 2),
        ("int8", 1, 34 / 32),
        ("int4", 10 / 16, 34 / 32),
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
    first, second = compare.tables({"rows": list(rows.values())}, seconds=False).split("\n\n")
    assert "| prefill | bfloat16 | 2.00× | 2.00× |" in first
    assert "llama.cpp" not in first
    assert "int8" not in first
    assert "| prefill | int8 | 1.50× | — |" in second
    assert "| words only: decode | int8 | 1.50× | 0.50× (Q8_0) |" in second
    assert "| words only: decode | bfloat16 | — | 1.50× (F16) |" in second
    assert len({line.count("|") for line in second.splitlines()}) == 1


def test_shares_are_of_the_best_rate_and_the_best_bandwidth():
    config = checkpoint.model_config("2b")
    rows = summary(
        [
            *(given(side, dtype) for side in compare.SIDES for dtype in ("float32", "bfloat16")),
            CEILING,
        ]
    )
    flop, _ = checkpoint.vision_work(config, [(1, 23, 32)], 4)
    for dtype in (
        "float32",
        "bfloat16",
    ):  # half precision may be widened, so float32's 3e11 is its ceiling as well
        assert rows["vision tower", dtype]["ours_of_ceiling"] == pytest.approx(flop / 3e11 / 3.0)
    flop, _ = checkpoint.decoder_work(config, 1, 768, 0, 2)
    assert rows["prefill", "float32"]["ours_of_ceiling"] == pytest.approx(flop / 4e11 / 2.0)
    assert rows["prefill", "bfloat16"]["ours_of_ceiling"] == pytest.approx(flop / 5e11 / 2.0)
    _, size = checkpoint.decoder_work(config, 1, 1, 768 + 16, 2)
    assert rows["decode, batch 1", "bfloat16"]["ours_of_ceiling"] == pytest.approx(
        size / 50e9 / 1.0
    )
    memory = rows["peak memory", "bfloat16"]
    weights, cache = 2 * 2_208_985_600, 2 * (2 * 28 * 2 * 128) * (768 + 33)
    assert memory["ours_of_ceiling"] == pytest.approx((weights + cache) / 8e9)


def test_what_was_never_quiet_is_not_measured():
    rows = summary(
        [given("ours", "float32", False), given("transformers", "float32"), CEILING], ["float32"]
    )
    row = rows["vision tower", "float32"]
    assert row["ours"] is row["ratio"] is row["ours_of_ceiling"] is None
    assert row["theirs_of_ceiling"] is not None
    shown = compare.tables({"rows": [row]}, seconds=False)
    assert "| not measured | not measured | not measured | — | 576 %" in shown


def test_the_readme_keeps_its_words_and_holds_no_absolute_times(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(
        "before\n<!-- written by compare.py -->\nold\n<!-- end -->\nafter\n", encoding="utf-8"
    )
    records = [
        given("ours", "float32", vision=1.2345),
        given("transformers", "float32", vision=2.469),
        CEILING,
    ]
    found = {
        "dtypes": ["float32"],
        "tasks": checkpoint.tasks("2b"),
        "records": records,
        "logits": {},
    }
    found |= {"busy_limit": 0.15, "machine": machine.describe("cpu", 1)}
    found["rows"] = compare.summarise(found, checkpoint.model_config("2b"))
    compare.write_json(results / "2b-cpu.json", found)
    compare.write_readme(readme, results)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- written")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "| vision tower | float32 | 2.00× | 2.00× | 2.00× |" in text
    assert "1.23" not in text
    assert "### CUDA\n\nNot measured." in text
    assert "1.234 s" in compare.tables(found, seconds=True)


def test_other_logits_are_told(tmp_path):
    records = [
        {"task": "picture", "dtype": "float32", "side": side, "tokens": [[1], [2]]}
        for side in compare.SIDES
    ]
    logits = np.random.default_rng(0).normal(size=(2, 1, 50)).astype(np.float32)
    np.save(tmp_path / "ours-float32-picture.npy", logits)
    np.save(tmp_path / "transformers-float32-picture.npy", logits)
    said = []
    assert compare.compare_logits(tmp_path, records, said.append, {})["picture float32"]["holds"]
    np.save(tmp_path / "ours-float32-picture.npy", logits + np.float32(1e-3))
    assert not compare.compare_logits(tmp_path, records, said.append, {})["picture float32"][
        "holds"
    ]
    assert "DIFFER" in said[-1]


def test_logits_of_other_formats_are_held_to_ours_in_float32_by_their_cosine(tmp_path):
    draw, said = np.random.default_rng(0), []
    records = [{"task": "llama", "dtype": dtype, "side": side, "tokens": [[1], [2]]}
               for side, dtype in (("ours", "float32"), ("ours", "int8"), ("llama.cpp", "F16"))]  # fmt: skip
    logits, noise = draw.normal(size=(2, 2, 1, 50_000)).astype(np.float32)
    np.save(tmp_path / "ours-float32-llama.npy", logits)
    np.save(tmp_path / "ours-int8-llama.npy", logits + 0.03 * noise)
    np.save(tmp_path / "llama.cpp-F16-llama.npy", logits + 0.06 * noise)
    found = compare.compare_logits(tmp_path, records, said.append, {})
    assert {name: one["holds"] for name, one in found.items()} == {
        "llama int8": True,
        "llama F16": False,
    }
    assert found["llama int8"]["cosine"] == pytest.approx(1 / (1 + 0.03**2) ** 0.5, abs=2e-5)


# ----------------------------------------------------------------------------------------------------- llama.cpp
def test_a_quantised_model_is_one_of_bfloat16_besides():
    assert workers.load_options("float32") == {"dtype": torch.float32}
    assert workers.load_options("int8") == {"dtype": torch.bfloat16, "quantize": "int8"}


def test_each_side_is_asked_what_it_computes(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(llama, "obstacle", lambda python: None)
    monkeypatch.setattr(llama, "find_gguf", lambda checkpoint, form, cache: tmp_path / form)
    sections = ["picture", "video", "llama"]
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
    jobs = compare.question_jobs(options, tasks, {"checkpoint": str(TINY)}, tiny_config)
    assert {(job["side"], job["dtype"]): list(job["tasks"]) for job in jobs} == {
        ("ours", "float32"): ["picture", "video", "llama"],
        ("transformers", "float32"): ["picture", "video"],
        ("ours", "bfloat16"): ["picture", "video", "llama"],
        ("transformers", "bfloat16"): ["picture", "video"],
        ("ours", "int8"): ["picture", "llama"],
        ("llama.cpp", "F16"): ["llama"],
        ("llama.cpp", "Q8_0"): ["llama"],
    }
    assert (
        jobs[-1]["tasks"]["llama"]["ids"]
        == checkpoint.make_batch(tiny_config, [[56]]).input_ids[0].tolist()
    )
    assert (jobs[-1]["gguf"], jobs[-1]["python"]) == (str(tmp_path / "Q8_0"), "other")


def test_what_llama_needs_is_said_in_a_sentence_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho Traceback >&2\necho \"No module named 'llama_cpp'\" >&2\nexit 1\n"
    )
    python.chmod(0o755)

    def refused(*more):
        with pytest.raises(SystemExit):
            compare.parse_arguments(["--sections", "picture", "llama", *more])
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    assert refused().endswith("needs the package gguf here: pip install gguf==0.19.0")
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: object())
    said = refused("--llama-python", str(python))
    assert f"needs llama-cpp-python in {python} (No module named 'llama_cpp'): CMAKE_ARGS=" in said
    assert "expected a Python interpreter" in refused("--llama-python", str(tmp_path / "nothing"))
    assert "--device is cuda" in refused("--device", "cuda")


@pytest.mark.parametrize("form", llama.FORMATS)
def test_the_gguf_file_holds_the_decoder_and_nothing_else(form, tmp_path, tiny_config):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    from load_weights import load_model

    with pytest.raises(ValueError, match="mrope_section has 15 entries"):
        llama.write_gguf(TINY, form, tmp_path / "decoder.gguf")
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    described = json.loads((TINY / "config.json").read_text()) | {
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
    decoder = load_model(TINY, "cpu", torch.float32).model
    assert len(tensors) == len(
        list(decoder.parameters())
    )  # the table once, as it is tied; no vision tower
    for name, ours in (("token_embd.weight", decoder.embed_tokens.weight),
                       ("output_norm.weight", decoder.norm.weight),
                       ("blk.3.attn_k.weight", decoder.layers[3].self_attn.k_proj.weight),
                       ("blk.2.attn_q.bias", decoder.layers[2].self_attn.q_proj.bias),
                       ("blk.1.ffn_gate.weight", decoder.layers[1].mlp.gate_proj.weight)):  # fmt: skip
        tensor, ours = tensors[name], ours.detach().numpy()
        assert tensor.tensor_type.name == (form if ours.ndim > 1 else "F32")
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        apart = np.abs(ours).max() / 127 if form == "Q8_0" else 1e-3 * np.abs(ours).max()
        np.testing.assert_allclose(stored, ours, atol=apart if ours.ndim > 1 else 0, rtol=0)


def test_a_gguf_file_is_written_once_for_each_set_of_weights_and_never_half(tmp_path, monkeypatch):
    folder, cache, written = tmp_path / "checkpoint", tmp_path / "cache", []
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


def test_llama_cpp_gives_our_logits(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = [
        "--shapes",
        "tiny",
        "--repetitions",
        "1",
        "--threads",
        "1",
        "--patience",
        "0",
        "--busy",
        "99",
    ]
    options += [
        "--dtypes",
        "float32",
        "int8",
        "--sections",
        "llama",
        "--out",
        str(tmp_path / "tiny.json"),
    ]
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        compare.main(options)
    logits = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))["logits"]
    assert logits["llama F16"]["cosine"] > 0.99999  # a wrong rope, norm or permutation is far below
    assert logits["llama Q8_0"]["cosine"] > 0.999
    assert "| words only: decode | int8 |" in shown.getvalue()
    assert "llama.cpp: llama-cpp-python" in shown.getvalue()


# -------------------------------------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The ruler on the bundled checkpoint, on however busy a machine."""
    out = tmp_path_factory.mktemp("run") / "tiny.json"
    options = [
        "--shapes",
        "tiny",
        "--repetitions",
        "1",
        "--threads",
        "1",
        "--patience",
        "0",
        "--busy",
        "99",
    ]
    options += [
        "--dtypes",
        "float32",
        "int8",
        "--sections",
        "picture",
        "batch",
        "video",
        "--out",
        str(out),
    ]
    shown, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        assert compare.main(options) == 0, said.getvalue()
    return json.loads(out.read_text(encoding="utf-8")), shown.getvalue(), said.getvalue()


def test_a_run_has_all_fields(run):
    found, shown, said = run
    metrics = ["vision tower", "prefill", "decode, batch 1", "decode, batch 2", "clip to first token", "peak memory",
               "— without mapped files"]  # fmt: skip
    assert [row["metric"] for row in found["rows"] if row["dtype"] == "float32"] == metrics
    assert [row["metric"] for row in found["rows"] if row["dtype"] == "int8"] == [
        m for m in metrics if "clip" not in m
    ]
    for row in found["rows"]:
        assert row["ours"] > 0
        if row["dtype"] == "float32":
            assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=1e-3)
        assert f"| {row['metric']} | {row['dtype']} |" in shown
    assert {"processor", "cores", "threads", "instructions", "memory_gb", "gpu", "versions"} == set(
        found["machine"]
    )
    assert all(
        {"foreign_cores", "stolen_cores"} <= set(record["load"]) for record in found["records"]
    )
    assert "cores busy with other things" in said


def test_both_sides_give_the_same_logits(run):
    found, *_ = run
    quantised, whole = (
        {"picture int8", "batch int8"},
        {"picture float32", "batch float32", "video float32"},
    )
    assert set(found["logits"]) == quantised | whole
    assert all(
        found["logits"][name]["holds"] and found["logits"][name]["share"] < 1e-4 for name in whole
    )
    assert all(found["logits"][name]["cosine"] > 0.999 for name in quantised)
    assert (
        found["logits"]["picture float32"]["steps"] == 2
    )  # of the prefill and of the last decode step


# ------------------------------------------------------------------------------------------------------- scaling
def test_a_square_law_has_slope_two_whatever_the_first_points_do():
    assert scaling.slope([(1, 50.0), (2, 4.0), (4, 16.0), (8, 64.0)]) == pytest.approx(2)
    assert scaling.slope([(1, 1.0), (2, 2.0)]) is None


def test_every_axis_has_curves_and_a_picture_is_drawn(tmp_path):
    for tiny in (True, False):
        assert scaling.points(tiny).keys() == scaling.CURVES.keys()
    assert list(scaling.points(False)["image tokens"]) == [64, 256, 576, 1024, 2304]
    line = [(1, 0.1), (2, 0.2), (4, 0.4)]
    sides = {"ours": line, "transformers": []}
    curves = {axis: {name: sides for name, _ in parts} for axis, parts in scaling.CURVES.items()}
    scaling.draw({"curves": curves}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size < 200_000
