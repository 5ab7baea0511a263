"""`load_weights.py`: each checkpoint layout loads, each fault is named, saved models load again."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import (
    SHAPES,
    make_batch,
    our_model,
    random_sequence,
    random_weights,
    reference_model,
    reference_name,
    small_config,
)
from safetensors.torch import load_file, save_file

import linear
import load_weights
from load_weights import (
    choose_attention,
    find_checkpoint,
    find_device,
    load_config,
    load_model,
    parameter_name,
    resize_token_embeddings,
    save_model,
)
from qwen2vl import Config, Qwen2VL, VisionConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def write(directory, config, weights, shards=1):
    """Write a checkpoint with this number of weight files and return its directory."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"} | config))
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        shard = dict(list(weights.items())[i::shards])
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory


def logits(model, config):
    """Return the logits of a sequence with an image."""
    batch = make_batch([random_sequence(config, [3, ("image", 2, 3), 4], seed=1)])
    with torch.no_grad():
        return model(**batch)


@pytest.fixture(scope="module", params=["default", "tied"])
def case(request):
    """Return a config, weights for it and their logits."""
    config = SHAPES[request.param]
    weights = random_weights(config, seed=3)
    return config, weights, logits(our_model(config, weights), config)


# ----------------------------------------------------------------------------------- configurations


def nested(config):
    """Return the layout of transformers 5: nested decoder fields, one dict for RoPE."""
    top = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_config",
    )
    text = {
        name: value for name, value in config.items() if name not in (*top, "tie_word_embeddings")
    }
    section = text.pop("rope_scaling")["mrope_section"]
    text["rope_parameters"] = {
        "rope_theta": text.pop("rope_theta"),
        "rope_type": "default",
        "mrope_section": section,
    }
    top_level = {name: config[name] for name in (*top, "tie_word_embeddings")}
    return {"model_type": "qwen2_vl", "text_config": text} | top_level


def flat_and_nested(config):
    """Return the layout of transformers 4.57: most fields twice, the tie flag nested only."""
    text = {name: value for name, value in config.items() if name != "vision_config"}
    top_level = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
    return {"model_type": "qwen2_vl", "text_config": text} | top_level


@pytest.mark.sweep
@pytest.mark.parametrize("layout", [dict, nested, flat_and_nested])
def test_load_model_reads_each_config_layout(case, layout, tmp_path):
    config, weights, expected = case
    model = load_model(write(tmp_path, layout(config), weights), device="cpu")
    rope = {"rope_scaling": None}  # "type": "mrope" or "rope_type": "default", which are equivalent
    assert asdict(model.config) | rope == asdict(our_model(config, weights).config) | rope
    assert model.config.rope_scaling["mrope_section"] == config["rope_scaling"]["mrope_section"]
    assert torch.equal(logits(model, config), expected)
    assert not model.training


@pytest.mark.parametrize("version", ["4.45.2", "4.57.6", "5.23.0"])
@pytest.mark.parametrize("tied", [False, True])
def test_load_config_reads_what_each_version_of_the_reference_saved(version, tied, tmp_path):
    """Read the files of `tests/make_golden_configs.py`, saved for the same arguments."""
    written = json.loads((GOLDEN / "configs.json").read_text())[version][
        "tied" if tied else "untied"
    ]
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = load_config(tmp_path)
    assert config.tie_word_embeddings is tied
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (64, 2, 2)
    assert (config.intermediate_size, config.vocab_size, config.rms_norm_eps) == (96, 300, 1e-6)
    assert (config.rope_theta, config.rope_scaling["mrope_section"]) == (5e5, [2, 3, 3])
    assert (config.image_token_id, config.video_token_id) == (290, 291)
    vision = config.vision_config
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size) == (2, 32, 2, 64)
    assert (vision.hidden_act, vision.in_channels, vision.mlp_ratio) == ("quick_gelu", 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "heads", "kv_heads", "vocab", "tied", "billions"),
    [
        (1536, 8960, 28, 12, 2, 151936, True, 2.2),
        (3584, 18944, 28, 28, 4, 152064, False, 8.3),
        (8192, 29568, 80, 64, 8, 152064, False, 73.4),
    ],
)
def test_load_config_reads_published_configs(
    hidden, inner, layers, heads, kv_heads, vocab, tied, billions, tmp_path
):
    """Check the three published sizes, where absent fields have their published defaults."""
    rope = {
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    written = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": layers,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(written | rope))
    config = load_config(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (
        hidden,
        layers,
        128,
    )
    assert config.tie_word_embeddings is tied
    assert config.vision_config.hidden_act == "quick_gelu"
    with torch.device("meta"):
        model = Qwen2VL(config)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e9, 1) == billions


def test_load_config_reads_in_chans_as_in_channels(tmp_path):
    config = SHAPES["default"] | {
        "vision_config": SHAPES["default"]["vision_config"] | {"in_chans": 5}
    }
    del config["vision_config"]["in_channels"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"} | config))
    assert load_config(tmp_path).vision_config.in_channels == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type: expected 'qwen2_vl', got 'qwen2_5_vl'"),
        ({"hidden_act": "prelu"}, "hidden_act: expected one of .*got 'prelu'"),
        (
            {"rope_scaling": {"type": "elastic", "mrope_section": [2, 3, 3]}},
            "got 'elastic'",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"num_attention_heads": 5}, "hidden_size: expected a multiple of 2 · 5 heads, got 64"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 0},
            "sliding_window: expected at least 1, got 0",
        ),
    ],
)
def test_load_config_refuses_impossible_values(change, message, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_vl"} | SHAPES["default"] | change)
    )
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


# ------------------------------------------------------------------------------------- tensor names


def bare_name(name):
    """Return the name in transformers' save of the model without its head."""
    return reference_name(name).removeprefix("model.")


@pytest.mark.sweep
@pytest.mark.parametrize("rename", [lambda name: name, reference_name, bare_name])
@pytest.mark.parametrize("shards", [1, 3])
def test_load_model_reads_each_naming_and_sharding(case, rename, shards, tmp_path):
    config, weights, expected = case
    renamed = {
        name if name == "lm_head.weight" else rename(name): tensor
        for name, tensor in weights.items()
    }
    assert {parameter_name(name) for name in renamed} == set(weights)
    model = load_model(write(tmp_path, config, renamed, shards), device="cpu")
    assert torch.equal(logits(model, config), expected)


def test_load_model_reads_a_tied_checkpoint_with_lm_head_only(tmp_path):
    config, weights = SHAPES["tied"], random_weights(SHAPES["tied"], seed=3)
    expected = logits(our_model(config, weights), config)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    model = load_model(write(tmp_path, config, weights), device="cpu")
    assert torch.equal(logits(model, config), expected)


def test_load_model_reads_a_tied_checkpoint_with_both_matrices(tmp_path):
    config, weights = SHAPES["tied"], random_weights(SHAPES["tied"], seed=3)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = load_model(write(tmp_path, config, weights), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_load_model_refuses_an_untied_checkpoint_without_lm_head(tmp_path):
    config, weights = SHAPES["default"], random_weights(SHAPES["default"], seed=3)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[61, 64\]"):
        load_model(write(tmp_path, config, weights))


def test_load_model_names_each_wrong_tensor_with_both_shapes(tmp_path):
    config, weights = SHAPES["default"], random_weights(SHAPES["default"], seed=3)
    del weights["visual.blocks.1.norm2.bias"]
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3, 5)
    weights["model.norm.weight"] = torch.zeros(65)
    with pytest.raises(ValueError, match=r"do not fit its config.json") as caught:
        load_model(write(tmp_path, config, weights))
    assert str(caught.value).split(": ", 1)[1] == (
        "1 missing: visual.blocks.1.norm2.bias [32]; "
        "1 not part of Qwen2-VL: model.layers.7.mlp.up_proj.weight [3, 5]; "
        "1 of another shape: model.norm.weight (expected [64], got [65])"
    )


def test_load_model_lists_only_the_first_wrong_tensors(tmp_path):
    config, weights = SHAPES["default"], random_weights(SHAPES["default"], seed=3)
    weights = {name: tensor for name, tensor in weights.items() if "layers" not in name}
    with pytest.raises(ValueError, match=r"24 missing: .* and 21 more$"):
        load_model(write(tmp_path, config, weights))


def test_load_model_names_a_missing_shard(case, tmp_path):
    config, weights, _ = case
    write(tmp_path, config, weights, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003.safetensors"):
        load_model(tmp_path)


def test_load_model_names_a_truncated_file(case, tmp_path):
    config, weights, _ = case
    path = write(tmp_path, config, weights) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        load_model(tmp_path)


# ------------------------------------------------------------------------- memory of a loaded model


@pytest.mark.slow
def test_load_model_maps_the_file_into_memory(tmp_path):
    """In the dtype of the file and on the CPU, each tensor is inside the mapping of the file.

    Checked with /proc/self/maps in a separate process.
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
    config, weights = SHAPES["tied"], random_weights(SHAPES["tied"], seed=3)
    write(tmp_path, config, {name: tensor.bfloat16() for name, tensor in weights.items()})
    script = """
import sys
from dataclasses import asdict
from pathlib import Path
from load_weights import load_model
model = load_model(sys.argv[1], device="cpu")
ranges = []
for line in Path("/proc/self/maps").read_text().splitlines():
    if line.endswith("model.safetensors"):
        ranges.append([int(end, 16) for end in line.split()[0].split("-")])
outside = []
for name, parameter in model.named_parameters():
    if not any(start <= parameter.data_ptr() < end for start, end in ranges):
        outside.append(name)
assert ranges and not outside, (ranges, outside)
"""
    subprocess.run(
        [sys.executable, "-c", script, tmp_path], check=True, cwd=Path(__file__).parents[2]
    )


def test_load_model_draws_no_random_numbers(case, tmp_path):
    config, weights, _ = case
    write(tmp_path, config, weights)
    before = torch.random.get_rng_state()
    load_model(tmp_path, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_load_model_casts_to_the_requested_dtype(case, dtype, tmp_path):
    config, weights, _ = case
    model = load_model(write(tmp_path, config, weights), device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = our_model(config, weights, dtype)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# ------------------------------------------------------------------------------- saving and loading


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_reads_what_save_model_wrote(case, dtype, tmp_path):
    config, weights, _ = case
    model = our_model(config, weights, dtype)
    model.generation_config = {"do_sample": False, "eos_token_id": [1, 2]}
    save_model(model, tmp_path / "new" / "directory")
    again = load_model(tmp_path / "new" / "directory", device="cpu")
    assert again.config == model.config
    assert again.generation_config == model.generation_config
    assert again.lm_head.weight.dtype == dtype
    assert torch.equal(logits(again, config), logits(model, config))
    stored = load_file(tmp_path / "new" / "directory" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not config["tie_word_embeddings"]


def test_transformers_loads_what_save_model_wrote(case, tmp_path):
    from transformers import Qwen2VLForConditionalGeneration

    config, weights, expected = case
    save_model(our_model(config, weights), tmp_path)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    batch = make_batch([random_sequence(config, [3, ("image", 2, 3), 4], seed=1)])
    with torch.no_grad():
        types = (batch["input_ids"] == config["image_token_id"]).int()
        their_logits = theirs(**batch, mm_token_type_ids=types).logits
    assert (their_logits - expected).abs().max() <= 3e-5


def test_load_model_reads_what_transformers_saves(case, tmp_path):
    config, weights, expected = case
    reference_model(config, weights).save_pretrained(tmp_path)
    assert (logits(load_model(tmp_path, device="cpu"), config) - expected).abs().max() <= 3e-5


def test_load_model_reads_what_transformers_saves_without_a_head(tmp_path):
    config, weights = SHAPES["tied"], random_weights(SHAPES["tied"], seed=3)
    expected = logits(our_model(config, weights), config)
    reference_model(config, weights).model.save_pretrained(tmp_path)
    assert (logits(load_model(tmp_path, device="cpu"), config) - expected).abs().max() <= 3e-5


# ----------------------------------------------- checkpoints, devices and attention implementations


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "no folder no/such/folder, nor a hub name"),
        ("./missing", "no folder ./missing, nor a hub name"),
        ("missing", "no folder missing, nor a hub name"),
        ("Qwen/No-Such-Model", "HF_HOME has no download of it"),
        ("bad name/x", "is not a valid hub name"),
        ("Qwen/Qwen2-VL@main", "is not a valid hub name"),
        ("https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct", "nor a hub name"),
        ("", "nor a hub name"),
    ],
)
def test_find_checkpoint_refuses_unknown_names_in_one_sentence(
    name, message, monkeypatch, tmp_path
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        find_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_find_checkpoint_downloads_only_settings_and_weights(monkeypatch, tmp_path):
    import huggingface_hub

    files = (
        *("config.json", "chat_template.jinja", "merges.txt", "model-00001-of-00002.safetensors"),
        *("pytorch_model.bin", "original/model.safetensors", "onnx/config.json", "training.pth"),
    )
    requests = []

    def download(name, allow_patterns, ignore_patterns):
        filtered = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        requests.append((name, list(filtered)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_checkpoint("Qwen/Qwen2-VL-2B-Instruct") == tmp_path
    assert requests.pop() == ("Qwen/Qwen2-VL-2B-Instruct", list(files[:4]))
    assert find_checkpoint("Qwen/Qwen2-VL-2B-Instruct", weights=False) == tmp_path
    assert requests.pop() == (
        "Qwen/Qwen2-VL-2B-Instruct",
        list(files[:3]),
    )  # enough for apps.estimate


def test_find_checkpoint_offline_finds_an_earlier_download(monkeypatch, tmp_path):
    """Use the layout of the hub's cache, where refs/main names a snapshot directory."""
    import huggingface_hub.constants

    repository = tmp_path / "models--someone--small"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    directory = repository / "snapshots" / commit
    assert find_checkpoint("someone/small", weights=False) == directory
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors: run again with network"):
        find_checkpoint("someone/small")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"incomplete: it lacks model-2.safetensors \(1 of 2"
    ):
        find_checkpoint("someone/small")
    (directory / "model-2.safetensors").write_bytes(b"")
    assert find_checkpoint("someone/small") == directory


def test_load_model_refuses_directories_that_are_not_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config.json is not a JSON file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"config.json should hold a JSON object, but holds a list"
    ):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a file; expected a checkpoint directory"):
        find_checkpoint(tmp_path / "config.json")


def test_choose_attention_takes_what_the_device_supports(monkeypatch):
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_attention("auto", cuda, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="flash-attn is not installed"):
        choose_attention("flash", cuda, torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_attention("auto", cuda, torch.bfloat16) == "flash"
    assert choose_attention("auto", cpu, torch.bfloat16) == "sdpa"
    assert choose_attention("plain", cuda, torch.bfloat16) == "plain"
    with pytest.raises(ValueError, match="needs a CUDA device, this is cpu"):
        choose_attention("flash", cpu, torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs float16 or bfloat16, this is torch.float32"):
        choose_attention("flash", cuda, torch.float32)


def test_find_device_refuses_unusable_devices():
    for name in ("cuda:99", "no-such-device"):
        with pytest.raises(ValueError, match=f"the device {name} cannot be used"):
            find_device(name)
    assert find_device("cpu") == torch.device("cpu")


def test_config_defaults_equal_the_reference():
    """transformers 4 saves only what differs from its defaults, so ours must be the same."""
    from transformers import Qwen2VLConfig

    theirs = Qwen2VLConfig().to_dict()
    text = theirs["text_config"]
    vision = theirs["vision_config"]
    assert asdict(VisionConfig()) == {name: vision[name] for name in asdict(VisionConfig())}
    # The two defaults of the reference do not match: its decoder is the 72B's, its vision encoder
    # the 7B's.
    ours = asdict(Config(vision_config=VisionConfig(hidden_size=8192)))
    assert ours.pop("rope_theta") == text["rope_parameters"]["rope_theta"]
    assert ours.pop("sliding_window") == 4096  # the reference clears it where it is not used
    for name in ours.keys() - {"rope_scaling", "vision_config"}:
        assert ours[name] == theirs.get(name, text.get(name)), name


@pytest.mark.slow
def test_load_model_does_not_import_the_compiler():
    """Importing torch._dynamo takes longer than loading and running the bundled model."""
    root = Path(__file__).parents[2]
    code = "import sys; from load_weights import load_model; "
    code += "load_model('tiny/checkpoint', device='cpu'); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_empty_model_names_an_error_without_a_message(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(load_weights, "Qwen2VL", fail)
    with pytest.raises(ValueError, match=r"cannot be built: MemoryError$"):
        load_weights.empty_model(None)


# --------------------------------------------------------------------------------------- new tokens
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("size", "tied"), [(200, False), (203, True), (150, True), (150, False), (4200, False)]
)
def test_resize_token_embeddings_equals_the_reference(size, tied):
    """Old rows to the bit; new ones by their mean and spread, as they are drawn at random."""
    config = small_config(heads=2, kv_heads=1, vocab=200, tied=tied)
    weights = random_weights(config)
    ours = our_model(config, weights)
    theirs = reference_model(config, weights)
    resize_token_embeddings(ours, size)
    theirs.resize_token_embeddings(size)
    assert ours.config.vocab_size == size
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    kept = min(size, 200)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = ours.get_parameter(name)
        expected = theirs.get_parameter(reference_name(name))
        old = weights.get(name, weights["model.embed_tokens.weight"])
        assert table.shape == expected.shape
        assert table.requires_grad
        assert torch.equal(table[:kept], old[:kept])
        assert torch.equal(expected[:kept], old[:kept])
        for new_rows in (table[kept:], expected[kept:]):
            assert (new_rows - old.mean(0)).abs().le(6e-9**0.5 * 6 * old.std()).all()
            if len(new_rows) == 4000:
                ratio = torch.cov(new_rows.double().T) / torch.cov(old.double().T)
                assert (ratio.diagonal() - 1e-9).abs().max() < 0.15e-9


def test_resize_token_embeddings_repeats_the_mean_of_few_rows():
    """With fewer tokens than their width, the covariance is singular, as in the reference."""
    config = small_config(heads=4, vocab=61)
    ours = our_model(config, random_weights(config))
    old = ours.lm_head.weight
    resize_token_embeddings(ours, 64)
    expected = reference_model(config, random_weights(config))
    expected.resize_token_embeddings(64)
    for table in (ours.lm_head.weight, expected.lm_head.weight):
        assert torch.equal(table[61:], old.mean(0).expand(3, -1))


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings_gives_a_checkpoint_that_loads(tied, tmp_path):
    from transformers import Qwen2VLForConditionalGeneration

    config = small_config(tied=tied)
    model = our_model(config, random_weights(config))
    resize_token_embeddings(model, 67)
    assert logits(model, config | {"vocab_size": 67}).shape[-1] == 67
    save_model(model, tmp_path)
    again = load_model(tmp_path, "cpu")
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.vocab_size == theirs.config.get_text_config().vocab_size == 67
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, theirs.get_parameter(reference_name(name))), name


def test_resize_token_embeddings_refuses_sizes_below_the_special_tokens():
    model = our_model(small_config(), random_weights(small_config()))
    with pytest.raises(ValueError, match=r"new_size: expected more than .* 4, got 4"):
        resize_token_embeddings(model, 4)
    assert model.config.vocab_size == 61


def test_resize_token_embeddings_refuses_a_quantized_model():
    config = small_config(heads=8, kv_heads=4)
    model = our_model(config, random_weights(config))
    linear.quantize_linears(model, "int8")
    with pytest.raises(ValueError, match="a quantized model cannot be resized"):
        resize_token_embeddings(model, 67)
