"""LoRA adapters merged at load: equal to PEFT's own models on the same files, live.

Each test trains nothing: PEFT wraps a small random model of transformers, its adapter is drawn at
random, and `save_pretrained` writes the files, whose names the tests then change as other versions
of PEFT and transformers write them. The right weights are those of PEFT's `merge_and_unload`, the
right logits those of the unmerged PEFT model.
"""

import functools
import json
import logging
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    gap,
    make_batch,
    random_sequence,
    random_weights,
    reference_logits,
    reference_model,
    small_config,
)
from safetensors.torch import load_file, save_file

import generate as command
import hub
import load_weights
from adapters import AdapterConfig, find_adapters, find_base, is_adapter, merge_updates
from apps import estimate
from checkpoint_files import parameter_name
from command_line import BUNDLED_CHECKPOINT
from load_weights import load_model, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VISION = r".*visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|merger\.mlp\.[02])"


# ------------------------------------------------------------------------------- what PEFT computes
def write_base(folder, config, weights, dtype="float32"):
    """Write a checkpoint in the hub's layout."""
    folder.mkdir(exist_ok=True)
    named = {"model_type": "qwen2_vl", "torch_dtype": dtype, **config}
    (folder / "config.json").write_text(json.dumps(named))
    stored = {name: tensor.to(getattr(torch, dtype)).clone() for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def randomize(model):
    """Draw what PEFT initializes with the base model's values: magnitudes, copies, rows, biases."""
    generator = torch.Generator().manual_seed(5)
    parts = ("magnitude_vector", "modules_to_save", "trainable_tokens_delta", ".bias")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in parts):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
        if "lora_embedding" in name:  # of variance 1, and so far larger than the embeddings
            parameter.data *= 0.1


class Trained(SimpleNamespace):
    """A base model and an adapter in files, with the PEFT model that wrote the adapter."""

    def ours(self, **options):
        return load_model(self.base, "cpu", adapters=[self.adapter], **options)

    def batch(self):
        return make_batch([random_sequence(self.config, [3, ("image", 1, 2), 5], seed=1)])

    def logits(self):
        """Return the logits of the unmerged PEFT model."""
        return reference_logits(self.base_model, self.config, self.batch())

    def merged(self):
        """Return the parameters after PEFT's own merge, under our names."""
        model = self.model.merge_and_unload()
        return {
            parameter_name(name): parameter.detach()
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    def change_config(self, **values):
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def change_tensors(self, change):
        path = self.adapter / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)


def make_trained(folder, tied=False, dtype="float32", shape=None, **options):
    """Write a base model and an adapter for it; return them with the PEFT model."""
    import peft

    config = small_config(tied=tied, **(shape or {}))
    weights = random_weights(config)
    base = write_base(folder / "base", config, weights, dtype)
    base_model = reference_model(config, weights, getattr(torch, dtype))
    torch.manual_seed(3)
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model, peft.LoraConfig(**(values | options)))
        randomize(model)
        model.eval().save_pretrained(folder / "adapter")
    trained = Trained(config=config, base=base, adapter=folder / "adapter")
    trained.model = model
    trained.base_model = base_model
    trained.change_config(base_model_name_or_path=str(base))
    return trained


@pytest.fixture
def train(tmp_path):
    """Return a function that makes a base model and an adapter for it."""
    return functools.partial(make_trained, tmp_path)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def files(trained_once, tmp_path):
    """Return a copy of the files of one base model and its adapter, without the PEFT model."""
    base = shutil.copytree(trained_once.base, tmp_path / "base")
    adapter = shutil.copytree(trained_once.adapter, tmp_path / "adapter")
    trained = Trained(config=trained_once.config, base=base, adapter=adapter)
    trained.change_config(base_model_name_or_path=str(base))
    return trained


def assert_equal_to_peft(trained, quiet=True):
    """The logits are those of the PEFT model, the weights those of its merge; both in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if quiet else "ignore")
        ours = trained.ours()
    with torch.no_grad():
        logits = ours(**trained.batch())
    assert gap(logits, trained.logits()) <= 3e-5
    expected = trained.merged()
    for name, parameter in ours.named_parameters():
        assert gap(parameter, expected[name]) <= 1e-6, name
    return ours


# ---------------------------------------------------------------------------------- equal to PEFT
OPTIONS = {
    "attention": {"target_modules": ATTENTION},
    "regular expression": {"target_modules": r".*language_model\.layers\.\d+\.mlp\.(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": ATTENTION, "exclude_modules": ["v_proj"]},
    "some layers": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "named layers": {
        "target_modules": ["down_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "vision encoder": {"target_modules": VISION},
    "patch embedding": {"target_modules": ["patch_embed.proj"]},
    "rank stabilized": {"target_modules": ATTENTION, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "k_proj": 3},
        "alpha_pattern": {"k_proj": 1, r"model\.language_model\.layers\.0\.self_attn\.o_proj": 9},
    },
    "patterns, rank stabilized": {
        "target_modules": ATTENTION,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"v_proj": 1},
        "use_rslora": True,
    },
    "DoRA": {"target_modules": [*ATTENTION, "gate_proj"], "use_dora": True},
    "DoRA in the vision encoder": {"target_modules": VISION, "use_dora": True},
    "DoRA of the patch embedding": {"target_modules": ["patch_embed.proj"], "use_dora": True},
    "DoRA of the embeddings": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "fan_in_fan_out": {"target_modules": ["down_proj", "q_proj"], "fan_in_fan_out": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "bias of B": {"lora_bias": True, "use_rslora": True},
    "biases of its layers": {"bias": "lora_only", "target_modules": ["q_proj", "qkv"]},
    "all biases": {"bias": "all"},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved merger": {"modules_to_save": ["merger"]},
    "saved norms": {"modules_to_save": ["input_layernorm", "model.norm"]},
    "rows": {"trainable_token_indices": [5, 7]},
    "rows of each": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 8, 7]}},
}


@pytest.mark.sweep
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_load_model_equals_peft(options, train):
    assert_equal_to_peft(train(**options))


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 7]},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_load_model_equals_peft_where_embeddings_are_tied(options, train, tmp_path):
    trained = train(tied=True, **options)
    ours = assert_equal_to_peft(trained)
    assert ours.config.tie_word_embeddings == ("modules_to_save" not in options)
    save_model(ours, tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu")
    for (name, saved), parameter in zip(again.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(saved, parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_load_model_adds_lora_to_one_of_two_tied_matrices(targets, train):
    """As in the PEFT model's forward pass; its merge would add it to the tensor of both."""
    trained = train(tied=True, target_modules=targets)
    ours = trained.ours()
    assert not ours.config.tie_word_embeddings
    with torch.no_grad():
        assert gap(ours(**trained.batch()), trained.logits()) <= 3e-5


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_load_model_keeps_matrices_tied_that_were_trained_tied(options, train):
    trained = train(tied=True, ensure_weight_tying=True, **options)
    ours = trained.ours()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    with torch.no_grad():
        assert gap(ours(**trained.batch()), trained.logits()) <= 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True])
def test_load_model_equals_peft_in_bfloat16(use_dora, train):
    """The base model and the sum are in bfloat16, the adapter and the addition in float32."""
    trained = train(dtype="bfloat16", target_modules="all-linear", use_dora=use_dora)
    expected = trained.merged()
    for name, parameter in trained.ours().named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected[name]), name


def test_load_model_rounds_once_where_the_base_is_stored_in_more_bits(train):
    trained = train(target_modules=ATTENTION)
    exact = trained.ours(dtype=torch.float64).state_dict()
    for name, parameter in trained.ours(dtype=torch.bfloat16).named_parameters():
        assert torch.equal(parameter, exact[name].bfloat16()), name


def test_load_model_casts_adapters_of_fewer_bits(train):
    trained = train(target_modules=ATTENTION)
    trained.change_tensors(lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    ours = trained.ours()
    rounded = {name: t.bfloat16().float() for name, t in trained.model.named_parameters()}
    for name, parameter in trained.model.named_parameters():
        if "lora_" in name:
            parameter.data = rounded[name]
    expected = trained.merged()
    for name, parameter in ours.named_parameters():
        assert gap(parameter, expected[name]) <= 1e-6, name


def test_load_model_merges_before_it_quantizes(train, tmp_path):
    trained = train(shape={"heads": 8, "kv_heads": 4}, target_modules="all-linear")
    save_model(trained.ours(), tmp_path / "merged")
    expected = load_model(tmp_path / "merged", "cpu", quantize="int8").state_dict()
    ours = trained.ours(quantize="int8").state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


def test_load_model_merges_adapters_in_order(train, tmp_path):
    """A second adapter changes what the first one gives, as if trained on it; DoRA shows it."""
    import peft

    first = train(target_modules=ATTENTION, modules_to_save=["lm_head"])
    merged = first.model.merge_and_unload()
    torch.manual_seed(4)
    options = {"target_modules": ["q_proj", "lm_head"], "use_dora": True}
    second = peft.get_peft_model(merged, peft.LoraConfig(init_lora_weights=False, **options))
    randomize(second)
    second.eval().save_pretrained(tmp_path / "second")
    ours = load_model(first.base, "cpu", adapters=[first.adapter, tmp_path / "second"])
    expected = second.merge_and_unload()
    for name, parameter in expected.named_parameters():
        assert gap(ours.get_parameter(parameter_name(name)), parameter) <= 1e-6, name


def test_load_model_replaces_what_an_earlier_adapter_changed(train, tmp_path):
    import peft

    first = train(target_modules=["lm_head", "q_proj"])
    options = {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}
    second = peft.get_peft_model(first.model.merge_and_unload(), peft.LoraConfig(**options))
    randomize(second)
    second.eval().save_pretrained(tmp_path / "second")
    ours = load_model(first.base, "cpu", adapters=[first.adapter, tmp_path / "second"])
    with torch.no_grad():
        logits = ours(**first.batch())
    expected = reference_logits(second.base_model.model, first.config, first.batch())
    assert gap(logits, expected) <= 3e-5


def test_load_model_unties_after_an_adapter_that_changed_both_matrices(train, tmp_path):
    import peft

    first = train(tied=True, trainable_token_indices=[5, 7])
    options = {"target_modules": ["lm_head"], "init_lora_weights": False}
    second = peft.get_peft_model(first.model.merge_and_unload(), peft.LoraConfig(**options))
    second.eval().save_pretrained(tmp_path / "second", save_embedding_layers=False)
    ours = load_model(first.base, "cpu", adapters=[first.adapter, tmp_path / "second"])
    assert not ours.config.tie_word_embeddings
    with torch.no_grad():
        logits = ours(**first.batch())
    expected = reference_logits(second.base_model.model, first.config, first.batch())
    assert gap(logits, expected) <= 3e-5


def test_load_model_copies_only_the_tensors_that_adapters_change(train, monkeypatch):
    trained = train(target_modules=["q_proj"])
    plain = load_model(trained.base, "cpu").state_dict()
    merged = []

    def count(weight, updates, dtype):
        merged.append(weight)
        return merge_updates(weight, updates, dtype)

    monkeypatch.setattr(load_weights, "merge_updates", count)
    ours = trained.ours().state_dict()
    assert len(merged) == trained.config["num_hidden_layers"]
    for name, tensor in ours.items():
        assert torch.equal(tensor, plain[name]) == ("q_proj.weight" not in name), name


# ------------------------------------------------------------------------------- names of tensors
def nested_names(name):
    """transformers 4.52 and later, as written here."""
    return name


def flat_names(name):
    """transformers 4.45 to 4.51."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def names_with_the_adapter(name):
    """State dicts of PEFT models, and PEFT before 0.3."""
    name = re.sub(r"(lora_[AB])\.", r"\1.default.", name)
    return re.sub(r"(lora_embedding_[AB]|lora_magnitude_vector)$", r"\1.default", name)


def magnitudes_as_modules(name):
    return re.sub(r"lora_magnitude_vector$", "lora_magnitude_vector.default.weight", name)


def wrapped_modules(name):
    return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


def names_without_prefix(name):
    """save_pretrained of a transformers model with an adapter, save_peft_format=False."""
    return name.removeprefix("base_model.model.")


def compiled_names(name):
    return f"_orig_mod.{name}"


@pytest.mark.sweep
@pytest.mark.parametrize(
    "rename",
    [
        nested_names,
        flat_names,
        names_with_the_adapter,
        magnitudes_as_modules,
        wrapped_modules,
        names_without_prefix,
        compiled_names,
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_load_model_reads_the_names_of_each_version(rename, use_dora, train):
    trained = train(
        target_modules=["q_proj", "embed_tokens", "qkv"],
        modules_to_save=["lm_head"],
        use_dora=use_dora,
    )
    trained.change_tensors(lambda tensors: {rename(name): t for name, t in tensors.items()})
    assert_equal_to_peft(trained)


def test_load_model_matches_patterns_against_the_names_in_training(train):
    """The modules of transformers 4.45 had other names, and patterns were written for these."""
    trained = train(alpha_pattern={"model.language_model.layers.1.self_attn.q_proj": 1})
    expected = trained.merged()
    trained.change_tensors(lambda tensors: {flat_names(name): t for name, t in tensors.items()})
    trained.change_config(alpha_pattern={"^model.layers.1.self_attn.q_proj": 1})
    for name, parameter in trained.ours().named_parameters():
        assert gap(parameter, expected[name]) <= 1e-6, name


def test_load_model_resizes_the_vocabulary_to_a_saved_table(train, tmp_path):
    """An adapter that was trained after resize_token_embeddings stores both tables."""
    for tied in (False, True):
        trained = train(tied=tied)
        table = torch.randn(65, trained.config["hidden_size"])
        tables = {"base_model.model.model.language_model.embed_tokens.weight": table}
        tables["base_model.model.lm_head.weight"] = table.clone() if tied else table + 1
        trained.change_tensors(lambda tensors, tables=tables: tensors | tables)
        ours = trained.ours()
        assert ours.config.vocab_size == 65
        assert ours.config.tie_word_embeddings == tied
        assert torch.equal(ours.model.embed_tokens.weight, table)
        assert torch.equal(ours.lm_head.weight, table if tied else table + 1)
        save_model(ours, tmp_path / "saved")
        assert load_model(tmp_path / "saved", "cpu").config.vocab_size == 65


def test_load_model_merges_lora_into_a_resized_tied_table(train):
    trained = train(tied=True, target_modules=["lm_head"])
    size = trained.config["hidden_size"]
    table = torch.randn(65, size)
    b = torch.randn(65, 4)
    key = "base_model.model.lm_head"
    changed = {f"{key}.base_layer.weight": table, f"{key}.lora_B.weight": b}
    trained.change_tensors(lambda tensors: tensors | changed)
    a = load_file(trained.adapter / "adapter_model.safetensors")[f"{key}.lora_A.weight"]
    ours = trained.ours()
    assert torch.equal(ours.model.embed_tokens.weight, table)
    assert gap(ours.lm_head.weight, table + 6 / 4 * (b @ a)) <= 1e-5


# ------------------------------------------------------------------------------------ base models
def test_load_model_finds_the_base_model_of_an_adapter(files, caplog, monkeypatch):
    expected = files.ours().state_dict()
    monkeypatch.setattr(logging.getLogger("qwen2vl"), "propagate", True)
    for name in (str(files.base), "../base"):
        files.change_config(base_model_name_or_path=name)
        caplog.clear()
        with caplog.at_level(logging.INFO, "qwen2vl"):
            ours = load_model(files.adapter, "cpu").state_dict()
        assert f"the base model of the adapter in {files.adapter} is" in caplog.text
        assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


def test_find_adapters_follows_adapters_of_adapters(files, tmp_path):
    second = shutil.copytree(files.adapter, tmp_path / "second")
    config = {"base_model_name_or_path": str(files.adapter)}
    (second / "adapter_config.json").write_text(json.dumps(config))
    found = find_adapters(second, [files.adapter.parent / "adapter"])
    assert found == (files.base, [files.adapter, second, files.adapter])


def test_find_adapters_ends_where_adapters_name_each_other(files):
    files.change_config(base_model_name_or_path=str(files.adapter))
    with pytest.raises(ValueError, match="leads back to the adapter itself"):
        find_adapters(files.adapter)


@pytest.mark.parametrize("name", [".", "{base}"])
def test_load_model_reads_an_adapter_saved_into_the_directory_of_its_base(name, files):
    expected = files.ours().state_dict()
    files.change_config(base_model_name_or_path=name.format(base=files.base))
    for path in files.adapter.glob("adapter_*"):
        shutil.copy(path, files.base)
    ours = load_model(files.base, "cpu").state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


def test_find_base_downloads_a_hub_name(files, monkeypatch):
    files.change_config(base_model_name_or_path="Qwen/Qwen2-VL-2B-Instruct")
    monkeypatch.setattr(hub, "snapshot", lambda name, weights: files.base / name)
    assert find_base(files.adapter) == files.base / "Qwen/Qwen2-VL-2B-Instruct"
    files.change_config(revision="abc123")
    with pytest.warns(UserWarning, match="revision is 'abc123', but the main branch"):
        find_base(files.adapter)


def test_is_adapter_ignores_a_configuration_left_over_from_a_merge(files):
    assert is_adapter(files.adapter)
    assert not is_adapter(files.base)
    shutil.copy(files.adapter / "adapter_config.json", files.base)
    assert not is_adapter(files.base)
    shutil.copy(files.adapter / "adapter_model.safetensors", files.base)
    assert is_adapter(files.base)


# ------------------------------------------------------------------------------- what does not fit
def refusal(trained):
    """Return the sentence with which loading ends; it is one line that names the adapter."""
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        trained.ours()
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert str(trained.adapter) in sentence
    assert len(sentence) < 700
    return sentence


CONFIGS = [
    ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
    ({"peft_type": "PROMPT_TUNING"}, "peft_type: expected 'LORA', got 'PROMPT_TUNING'"),
    ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', got 'LOHA'"),
    ({"peft_type": "ADALORA"}, "peft_type: expected 'LORA', got 'ADALORA'"),
    ({"peft_type": None}, "peft_type: expected 'LORA', got None"),
    ({"r": 0}, "r: expected a positive integer, got 0"),
    ({"r": "8"}, "r: expected a positive integer, got '8'"),
    ({"r": float("nan")}, "r: expected a positive integer, got nan"),
    ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
    ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected positive integers, got 0"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern: expected an object, got \['q_proj'\]"),
    ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern: expected finite numbers, got '4'"),
    ({"alpha_pattern": {"(": 4}}, "alpha_pattern: expected regular expressions, got '\\('"),
    ({"target_modules": "*"}, "target_modules: expected regular expressions, got '\\*'"),
    ({"modules_to_save": [3]}, "modules_to_save: expected regular expressions, got 3"),
    ({"layer_replication": [[0, 2]]}, "layer_replication: expected null"),
    ({"use_qalora": True}, "use_qalora: expected null, got True"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: expected null"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .* got 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: .* got 'olora'"),
    (
        {"auto_mapping": {"parent_library": "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"}},
        "parent_library: expected an adapter for Qwen2-VL, got 'transformers.models.qwen2_5_vl",
    ),
    ({"r": 3}, r"lora_A.weight is \[4, 64\], expected \[3, 64\] for its r, 3"),
    ({"rank_pattern": {"q_proj": 8}}, r"expected \[8, 64\] for its r, 8"),
    ({"use_dora": True}, "q_proj lacks lora_magnitude_vector, .* use_dora .* is true"),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("values", "sentence"), CONFIGS)
def test_load_model_refuses_a_configuration_in_one_sentence(values, sentence, files):
    files.change_config(**values)
    assert re.search(sentence, refusal(files))


KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def without(*endings):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(endings)}


def adding(**parts):
    return lambda tensors: tensors | {f"{KEY}.{part}": t for part, t in parts.items()}


TENSORS = [
    (
        lambda tensors: tensors | {f"{KEY}.lora_B.weight": torch.full((64, 4), float("nan"))},
        "q_proj.lora_B.weight holds NaN or infinite values",
    ),
    (without("lora_A.weight"), "q_proj lacks lora_A"),
    (without("lora_B.weight"), "q_proj lacks lora_B"),
    (without("weight"), "expected tensors of an adapter, got none"),
    (adding(lora_magnitude_vector=torch.ones(64)), "q_proj has lora_magnitude_vector"),
    (adding(lora_embedding_A=torch.ones(4, 64)), "q_proj lacks lora_embedding_B"),
    (
        lambda tensors: tensors | {f"{KEY}.lora_A.other.weight": torch.ones(4, 64)},
        "expected one adapter, got two tensors for .*q_proj.lora_A",
    ),
    (
        lambda tensors: tensors | {f"{KEY}.lora_A.weight": torch.ones(4, 32)},
        r"lora_A.weight is \[4, 32\], expected \[4, 64\]",
    ),
    (
        lambda tensors: tensors | {f"{KEY}.lora_B.weight": torch.ones(4, 64)},
        r"lora_B.weight is \[4, 64\], expected \[64, 4\]",
    ),
    (
        lambda tensors: tensors | {f"{KEY}.lora_B.bias": torch.ones(4)},
        r"lora_B.bias is \[4\], expected \[64\]",
    ),
    (
        lambda tensors: tensors | {f"{KEY}.ranknum": torch.ones(4)},
        "q_proj.ranknum is no parameter of the base model",
    ),
    (
        lambda tensors: tensors | {"base_model.model.visual.merger.ln_q.weight": torch.ones(4)},
        r"ln_q.weight is \[4\], expected \[32\]",
    ),
    (
        lambda tensors: {name.replace("layers.1.", "layers.27."): t for name, t in tensors.items()},
        "layers.27.self_attn.q_proj.lora_A.weight has no such module in the base model",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), TENSORS)
def test_load_model_refuses_tensors_in_one_sentence(change, sentence, files):
    files.change_tensors(change)
    assert re.search(sentence, refusal(files))


def test_load_model_refuses_an_adapter_for_another_size(train, tmp_path):
    trained = train(target_modules=ATTENTION)
    other = small_config(heads=2)
    trained.base = write_base(tmp_path / "other", other, random_weights(other))
    sentence = refusal(trained)
    assert f"does not fit the base model in {trained.base}" in sentence
    assert f"it was trained on {tmp_path / 'base'}" in sentence
    assert re.search(r"lora_A.weight is \[4, 64\], expected \[4, 32\] .* and \d more", sentence)


def test_load_model_refuses_a_bias_for_a_layer_without(train):
    trained = train(target_modules=["o_proj"], lora_bias=True)
    assert "lora_B.bias belongs to a layer without a bias" in refusal(trained)


@pytest.mark.sweep
@pytest.mark.parametrize("token_ids", [[5, 61], [-1, 5], ["5", 6], None, {"lm_head": [5, 7]}])
def test_load_model_refuses_token_ids_outside_the_vocabulary(token_ids, train):
    trained = train(trainable_token_indices=[5, 7])
    trained.change_config(trainable_token_indices=token_ids)
    sentence = refusal(trained)
    assert "trainable_token_indices" in sentence
    assert "token ids from 0 to 60" in sentence or "is [2, 64], expected [0, 64]" in sentence


def test_load_model_refuses_pickled_adapters(files):
    path = files.adapter / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    sentence = refusal(files)
    assert "lacks adapter_model.safetensors and holds adapter_model.bin" in sentence


def test_load_model_refuses_a_damaged_file(files):
    path = files.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "is not a whole safetensors file" in refusal(files)


def test_load_model_refuses_a_directory_that_is_no_adapter(files):
    with pytest.raises(FileNotFoundError, match=r"got no adapter_config.json"):
        load_model(files.base, "cpu", adapters=[files.base])


def test_load_model_refuses_a_quantized_base(files):
    config = json.loads((files.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (files.base / "config.json").write_text(json.dumps(config))
    for options in ({"adapters": [files.adapter]}, {"adapters": [], "name": files.adapter}):
        name = options.pop("name", files.base)
        with pytest.raises(ValueError, match=r"full-precision .* quantized with AWQ \(4 bits\)"):
            load_model(name, "cpu", **options)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (None, "base_model_name_or_path: expected a directory or a hub name, got None"),
        ("", "base_model_name_or_path: expected a directory or a hub name, got ''"),
        ("/root/models/Qwen2-VL-7B", "base_model_name_or_path: no folder /root/models/Qwen2-VL-7B"),
        (
            "unsloth/Qwen2-VL-2B-Instruct-bnb-8bit",
            "quantized, .* the base model could be unsloth/Qwen2-VL-2B-Instruct$",
        ),
        (
            "unsloth/qwen2-vl-7b-instruct-unsloth-bnb-8bit",
            "quantized, .* the base model could be unsloth/qwen2-vl-7b-instruct$",
        ),
        ("Qwen/Qwen2-VL-7B-Instruct-AWQ", "the base model could be Qwen/Qwen2-VL-7B-Instruct$"),
        (
            "Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int8",
            "the base model could be Qwen/Qwen2-VL-7B-Instruct$",
        ),
    ],
)
def test_find_base_refuses_what_cannot_be_the_base(name, sentence, files):
    files.change_config(base_model_name_or_path=name)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as raised:
        load_model(files.adapter, "cpu")
    assert f"--adapter {files.adapter}" in str(raised.value)
    assert files.ours()  # --model names another base


def test_load_model_warns_of_layers_that_the_configuration_does_not_choose(train):
    trained = train(target_modules=["q_proj", "v_proj"])
    expected = trained.merged()
    trained.change_config(target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="target_modules does not match .*v_proj"):
        ours = trained.ours()
    for name, parameter in ours.named_parameters():
        assert gap(parameter, expected[name]) <= 1e-6, name
    trained.change_config(target_modules=["q_proj", "v_proj", "o_proj"])
    with pytest.warns(UserWarning, match="target_modules matches .*o_proj, .*without tensors"):
        trained.ours()


# ---------------------------------------------------------------------------- the rules of matching
NAMES = [
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.layers.11.self_attn.q_proj",
    "model.visual.blocks.1.attn.proj",
    "model.visual.merger.mlp.0",
    "lm_head",
]
RULES = [
    {"target_modules": ["q_proj", "proj"]},
    {"target_modules": ["mlp.0", "lm_head"]},
    {"target_modules": r".*q_proj|lm_head"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj", "proj"], "exclude_modules": ["1.attn.proj"]},
    {"target_modules": ["q_proj", "proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj", "proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "proj"], "layers_to_transform": [1], "layers_pattern": ["x"]},
    {"target_modules": ["q_proj", "mlp.0"], "modules_to_save": ["merger"]},
]


@pytest.mark.parametrize("rule", RULES)
def test_is_targeted_follows_the_rules_of_peft(rule):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(**rule)
    ours = AdapterConfig(**rule)
    for name in NAMES:
        expected = check_target_module_exists(theirs, name)
        assert ours.is_targeted(name) == bool(expected), name


@pytest.mark.parametrize(
    "pattern", ["q_proj", "1.self_attn.q_proj", ".*attn.*proj", "^lm_head", "x"]
)
def test_scale_follows_the_patterns_of_peft(pattern):
    from peft.utils.other import get_pattern_key

    config = AdapterConfig(r=4, lora_alpha=6, alpha_pattern={pattern: 12})
    for name in NAMES:
        is_matched = get_pattern_key([pattern], name) == pattern
        assert config.scale(name) == (3 if is_matched else 1.5), name


# --------------------------------------------------------------------------------- the command line
@pytest.fixture
def bundled_adapter(tmp_path):
    """An adapter of rank 1 for the bundled model, which changes its answers."""
    folder = tmp_path / "bundled_adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]}
    config["base_model_name_or_path"] = str(BUNDLED_CHECKPOINT)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    width = load_file(BUNDLED_CHECKPOINT / "model.safetensors")[EMBEDDING].shape[1]
    key = "base_model.model.model.layers.0.self_attn.o_proj"
    a, b = torch.randn(1, width), torch.randn(width, 1)
    layers = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text())["num_hidden_layers"]
    tensors = {}
    for layer in range(layers):
        tensors[key.replace("layers.0", f"layers.{layer}") + ".lora_A.weight"] = a.clone()
        tensors[key.replace("layers.0", f"layers.{layer}") + ".lora_B.weight"] = b.clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def run(capsys, *options):
    """Return what generate.py prints on stdout and stderr; the exit code is 0."""
    arguments = ["--prompt", "How many shapes are there?", "--device", "cpu", *options]
    assert command.main([*arguments, "--max-new-tokens", "8"]) == 0
    return capsys.readouterr()


@pytest.mark.slow
def test_main_merges_adapters_by_either_option(bundled_adapter, capsys):
    plain = run(capsys).out
    by_model = run(capsys, "--model", str(bundled_adapter))
    by_adapter = run(capsys, "--adapter", str(bundled_adapter))
    twice = run(capsys, "--model", str(bundled_adapter), "--adapter", str(bundled_adapter))
    assert by_model.out == by_adapter.out != plain
    assert f"the base model of the adapter in {bundled_adapter} is" in by_model.err
    assert "1 adapter merged" in by_adapter.err
    assert "2 adapters merged" in twice.err


@pytest.mark.slow
def test_main_prefers_tokenizer_and_image_settings_of_the_adapter(bundled_adapter, capsys):
    options = ["--adapter", str(bundled_adapter)]
    plain = run(capsys, *options).err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_CHECKPOINT / name, bundled_adapter)
    template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    )
    (bundled_adapter / "chat_template.jinja").write_text(template)
    with_tokenizer = run(capsys, *options).err
    assert "tokens in" in plain
    assert f"the chat template in {bundled_adapter}" in with_tokenizer
    assert run(capsys, *options, "--processor", str(BUNDLED_CHECKPOINT)).err.count("template") == 0
    settings = json.loads((BUNDLED_CHECKPOINT / "preprocessor_config.json").read_text())
    (bundled_adapter / "preprocessor_config.json").write_text(
        json.dumps(settings | {"patch_size": 28})
    )
    assert command.main(["--prompt", "x", "--device", "cpu", *options]) == 2
    assert "patch_size" in capsys.readouterr().err


def test_estimate_counts_the_base_model_of_an_adapter(bundled_adapter, capsys):
    """The sizes are the same; but a merged weight is a copy, and not mapped from the file."""

    def sizes(*options):
        assert estimate.main(["--prompt", "x", *options]) == 0
        printed = capsys.readouterr().out
        mapped = re.search(r"([\d.]+) MB of it mapped", printed)
        return re.findall("^(?:weights|cache|activations).*", printed, re.M), float(mapped[1])

    sizes_with_adapter, mapped_with_adapter = sizes("--model", str(bundled_adapter))
    base_sizes, mapped = sizes("--model", str(BUNDLED_CHECKPOINT))
    assert len(base_sizes) == 3
    assert sizes_with_adapter == base_sizes
    assert mapped_with_adapter < mapped


@pytest.mark.parametrize("program", [command, estimate], ids=["generate", "estimate"])
def test_main_names_the_base_that_it_cannot_find(program, bundled_adapter, capsys, monkeypatch):
    def offline(name, weights):
        raise FileNotFoundError(f"no folder {name}, and the hub cannot be reached")

    monkeypatch.setattr(hub, "snapshot", offline)
    config = json.loads((bundled_adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Someone/Qwen2-VL-finetuned"
    (bundled_adapter / "adapter_config.json").write_text(json.dumps(config))
    options = ["--model", str(bundled_adapter), "--prompt", "x", "--quiet"]
    assert program.main(options) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "no folder Someone/Qwen2-VL-finetuned, and the hub cannot be reached" in sentence
    assert f"--adapter {bundled_adapter}" in sentence
