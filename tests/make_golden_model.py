"""Write the golden files of test_qwen2vl.py with transformers, to check the numbers without it.

    python tests/make_golden_model.py        with transformers 5.23.0: golden/model.npz
                                             with transformers 4.57.6: golden/positions.json

Positions come from 4.57.6: later versions let the text after a long video overlap the positions of
its last frames, which the paper and the published weights do not.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"

# Small patches keep the file small, and reveal a hard-coded patch size of 14.
MODELS = {
    "tied": helpers.small_config(
        heads=4,
        kv_heads=2,
        width=8,
        sections=(2, 1, 1),
        tied=True,
        vision_width=8,
        patch_size=4,
        vocab=40,
    ),
    "untied": helpers.small_config(
        heads=3,
        kv_heads=1,
        width=12,
        sections=(1, 2, 3),
        layers=3,
        vision_width=12,
        patch_size=4,
        vocab=40,
    ),
}
CASES = {
    "row": [[4, ("image", 2, 3), 3, ("image", 1, 1), ("video", 2, 2, 2), 5]],
    "batch": [[9], [2, ("image", 3, 2), 2], [1, ("video", 2, 1, 3), 2, ("image", 2, 2), 4]],
}
LONG_VIDEOS = [
    [[2], ["video", 4, 1, 2], [1]],
    [[1], ["video", 9, 2, 3], [3], ["image", 2, 2], [2]],
    [[3], ["image", 3, 1], ["video", 7, 1, 1], ["video", 5, 3, 2], [1]],
    [[2], ["video", 3, 4, 2], [4], ["video", 6, 2, 2], [2]],
]


def half(array):
    """Return the array in float16; the model computes from these exact values."""
    return np.asarray(array, dtype=np.float16)


def make_model():
    """Write model.npz: weights, inputs, features, positions and logits of each model and case."""
    arrays = {}
    for name, config in MODELS.items():
        weights = {n: half(w.numpy()) for n, w in helpers.random_weights(config, seed=11).items()}
        arrays[f"{name}/config"] = np.array(json.dumps(config))
        arrays |= {f"{name}/weights/{n}": w for n, w in weights.items()}
        exact = {n: torch.from_numpy(w.astype(np.float32)) for n, w in weights.items()}
        model = helpers.reference_model(config, exact)
        for case, case_parts in CASES.items():
            sequences = [
                helpers.random_sequence(config, parts, seed)
                for seed, parts in enumerate(case_parts)
            ]
            batch = helpers.make_batch(sequences, torch.float16)
            arrays |= {f"{name}/{case}/{n}": x.numpy() for n, x in batch.items()}
            batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
            out = {"logits": helpers.reference_logits(model, config, batch)}
            with torch.no_grad():
                image_grids = batch["image_grid_thw"]
                video_grids = batch["video_grid_thw"]
                visual = model.model.visual
                out["features"] = visual(batch["pixel_values"], image_grids).pooler_output
                features = visual(batch["pixel_values_videos"], video_grids).pooler_output
                out["features_videos"] = features
            types = helpers.token_types(config, batch["input_ids"])
            out["position_ids"], out["rope_deltas"] = model.model.get_rope_index(
                batch["input_ids"], types, image_grids, video_grids, batch.get("attention_mask")
            )
            arrays |= {f"{name}/{case}/{n}": x.numpy() for n, x in out.items()}
    np.savez_compressed(GOLDEN / "model.npz", **arrays)


def make_positions():
    """Write positions.json: the positions of sequences with long videos."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    config = helpers.SHAPES["default"]
    vision_config = SimpleNamespace(**config["vision_config"])
    model = SimpleNamespace(config=SimpleNamespace(**(config | {"vision_config": vision_config})))
    cases = []
    for parts in LONG_VIDEOS:
        tuples = [part[0] if len(part) == 1 else tuple(part) for part in parts]
        batch = helpers.make_batch([helpers.random_sequence(config, tuples)])
        positions, delta = Qwen2VLModel.get_rope_index(
            model, batch["input_ids"], batch.get("image_grid_thw"), batch.get("video_grid_thw")
        )
        cases.append(
            {"parts": parts, "position_ids": positions[:, 0].tolist(), "rope_delta": delta.item()}
        )
    lines = ",\n".join(json.dumps(case) for case in cases)
    (GOLDEN / "positions.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    make = {"5.23.0": make_model, "4.57.6": make_positions}.get(transformers.__version__)
    if make is None:
        raise SystemExit(f"expected transformers 5.23.0 or 4.57.6, got {transformers.__version__}")
    GOLDEN.mkdir(exist_ok=True)
    make()
