"""`tiny.deepen`: more layers that change nothing until they are trained."""

import pytest
import torch

from command_line import BUNDLED_CHECKPOINT
from load_weights import load_model
from preprocess import Processor
from qwen2vl import Qwen2VL
from tiny import scenes, train
from tiny.deepen import deepen
from tiny.folder import make_config


def load_weights():
    return load_model(BUNDLED_CHECKPOINT, "cpu", torch.float64).state_dict()


def deepened_model(tmp_path, depth):
    (tmp_path / "tokenizer.json").write_bytes((BUNDLED_CHECKPOINT / "tokenizer.json").read_bytes())
    model = Qwen2VL(make_config(tmp_path, depth)).double().eval()
    model.load_state_dict(deepen(load_weights(), depth))
    return model


def example_inputs():
    sample = scenes.make_sample("shapes", 0)
    messages = scenes.to_conversation(sample, sample.qa_pairs)
    batch = Processor.from_pretrained(BUNDLED_CHECKPOINT)(messages)
    return {name: torch.tensor(array) for name, array in batch.arrays().items()}


@pytest.mark.parametrize("depth", [4, 5, 6, 9])
def test_a_deeper_model_computes_the_same(depth, tmp_path):
    model = deepened_model(tmp_path, depth)
    assert len(model.model.layers) == len(model.visual.blocks) == depth
    shallow = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float64)
    inputs = example_inputs()
    with torch.no_grad():
        assert torch.allclose(model(**inputs), shallow(**inputs), rtol=0, atol=1e-9)


def test_each_new_layer_follows_the_one_that_it_copies():
    shallow = load_weights()
    deep = deepen(shallow, 6)
    for stack, part in [("model.layers", "mlp.up_proj"), ("visual.blocks", "attn.qkv")]:
        for new, old in enumerate([0, 0, 1, 2, 2, 3]):
            weight = deep[f"{stack}.{new}.{part}.weight"]
            assert torch.equal(weight, shallow[f"{stack}.{old}.{part}.weight"])
    for part in ("model.layers.{}.self_attn.o_proj", "visual.blocks.{}.mlp.fc2"):
        silent = [not deep[f"{part.format(new)}.weight"].any() for new in range(6)]
        assert silent == [False, True, False, False, True, False]


def test_each_new_layer_is_trained_from_the_first_step_on(tmp_path):
    model = deepened_model(tmp_path, 5)
    model(**example_inputs()).square().mean().backward()
    for layer in (model.model.layers[1].mlp.down_proj, model.visual.blocks[1].attn.proj):
        assert not layer.weight.any()
        assert layer.weight.grad.abs().max() > 0


def test_weights_are_not_made_shallower():
    with pytest.raises(ValueError, match="has 4 layers, more than 3"):
        deepen(load_weights(), 3)


def test_a_training_goes_on_with_the_depth_of_its_weights(tmp_path):
    arguments = ["--parts", "1", "--work", "60", "--processes", "1", "--items", "0"]
    short = [*arguments, "--first-step", "95000", "--steps", "95001"]

    def run(name, *more):
        folder = ["--folder", str(tmp_path / name), "--run", str(tmp_path / f"run-{name}")]
        train.main([*short, *folder, *more])
        return len(load_model(tmp_path / name).model.layers)

    assert run("deep", "--weights", str(BUNDLED_CHECKPOINT), "--depth", "5") == 5
    assert run("further", "--weights", str(tmp_path / "deep")) == 5
