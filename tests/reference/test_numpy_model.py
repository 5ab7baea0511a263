"""`reference/numpy_model.py`: what it accepts, and its small formulas.

Its logits are compared with those of transformers in `test_qwen2vl.py`.
"""

import math

import helpers
import numpy as np
import pytest

from reference import numpy_model


@pytest.fixture
def weights():
    tensors = helpers.random_weights(helpers.small_config(layers=1, depth=1), seed=1)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def test_run_accepts_a_config_dataclass(weights):
    config = helpers.small_config(layers=1, depth=1)
    from_dict = numpy_model.run(config, weights, [7, 8, 9])
    from_dataclass = numpy_model.run(helpers.our_config(config), weights, [7, 8, 9])
    assert (from_dict["logits"] == from_dataclass["logits"]).all()
    assert from_dict["logits"].dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "expected hidden_act 'silu', got 'relu'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "expected .*'quick_gelu', got 'gelu'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}},
            "expected the rope type .*, got 'yarn'",
        ),
    ],
)
def test_run_refuses_what_it_does_not_compute(change, message, weights):
    config = helpers.small_config(layers=1, depth=1)
    change = change | {"vision_config": config["vision_config"] | change.get("vision_config", {})}
    with pytest.raises(ValueError, match=message):
        numpy_model.run(config | change, weights, [7, 8, 9])


def test_run_refuses_float32_weights(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    with pytest.raises(ValueError, match=r"model.norm.weight: expected float64, got float32"):
        numpy_model.run(helpers.small_config(layers=1, depth=1), weights, [7, 8, 9])


def test_patch_positions_go_block_by_block():
    rows, columns, slices = numpy_model.patch_positions([[2, 2, 4], [1, 2, 2]], merge=2)
    assert rows.tolist() == [0, 0, 1, 1, 0, 0, 1, 1] * 2 + [0, 0, 1, 1]
    assert columns.tolist() == [0, 1, 0, 1, 2, 3, 2, 3] * 2 + [0, 1, 0, 1]
    assert slices.tolist() == [0] * 8 + [1] * 8 + [2] * 4


def test_rope_positions_continue_after_the_largest_position():
    """The paper's Figure 3 in small: text, an image of 1 × 2 × 3 tokens, text."""
    config = helpers.small_config()
    ids = [9, *[config["image_token_id"]] * 6, 9]
    positions, rope_delta = numpy_model.rope_positions(config, ids, [[1, 4, 6]])
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert rope_delta == 5 - 8


def test_sigmoid_of_large_values_does_not_overflow():
    with np.errstate(all="raise"):
        values = numpy_model.sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    assert values.tolist() == [0, 0.5, 1]


def test_gelu_is_the_exact_one():
    expected = 1.5 * 0.5 * (1 + math.erf(1.5 / math.sqrt(2)))
    assert numpy_model.gelu(np.array([1.5]))[0] == pytest.approx(expected, rel=1e-15)
