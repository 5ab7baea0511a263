"""What the parts are worth: the trained model without one of them, after some time to get used to that.

    python -m tiny.ablations none                 the model as it is, to compare with
    python -m tiny.ablations one-dimensional      M-RoPE → positions that count the tokens
    python -m tiny.ablations no-vision-rope       the vision transformer does not know where a patch is
    python -m tiny.ablations one-size             every picture is resized to the same square
    python -m tiny.ablations raster               patches in reading order, so a token is 1×4 patches, not 2×2
    python -m tiny.ablations no-time              the temporal position of a clip's frames stays the same
    python -m tiny.ablations table                the table of those that have run

Each starts from the bundled weights and takes the same lessons of the training's last stage for `--steps` steps, one
process each, at a rate that falls to zero; then it is scored, without the part as well. What a variant still knows at
the end it can do without that part. With `--anew` each starts from random weights instead and takes the training's
first lessons: small pictures, all of one size, of shapes whose kinds, colours and places it learns. What a variant
knows then it could learn without that part. Nothing here is part of the model: a variant replaces one function of the
core files.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import preprocess
import qwen2vl
from load_weights import load_model
from tiny import scenes, score, train
from tiny.folder import write_json

SIDE = 168  # pixels, of the one size: about the mean area of the world's pictures


def one_dimensional() -> None:
    def get_rope_index(
        config, input_ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None
    ):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return ((mask.cumsum(1) - 1) * mask).repeat(3, 1, 1), torch.zeros_like(mask[:, :1])

    qwen2vl.get_rope_index = get_rope_index


def no_vision_rope() -> None:
    original = qwen2vl.vision_rotary

    def vision_rotary(*args, **more):
        cos, sin = original(*args, **more)
        return torch.ones_like(cos), torch.zeros_like(sin)

    qwen2vl.vision_rotary = vision_rotary


def one_size() -> None:
    original = scenes.messages

    def messages(lesson, exchanges):
        talk = original(lesson, exchanges)
        for item in talk[0]["content"]:
            if item["type"] == "image":
                item |= {"resized_height": SIDE, "resized_width": SIDE}
            if item["type"] == "video":
                item["video"] = [frame.resize((SIDE, SIDE)) for frame in item["video"]]
        return talk

    train.messages = score.messages = messages


def raster() -> None:
    """The patches, and the positions that the vision transformer knows them by, both row by row."""

    def patchify(frames, config):
        tp, p = config.temporal_patch_size, config.patch_size
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % tp, axis=0)])
        gt, gh, gw = frames.shape[0] // tp, frames.shape[1] // p, frames.shape[2] // p
        patches = frames.reshape(gt, tp, gh, p, gw, p, 3).transpose(0, 2, 4, 6, 1, 3, 5)
        return patches.reshape(gt * gh * gw, -1), (gt, gh, gw)

    original = qwen2vl.vision_rotary
    preprocess.patchify = patchify
    qwen2vl.vision_rotary = lambda grid_thw, head_dim, merge, like: original(
        grid_thw, head_dim, 1, like
    )


def no_time() -> None:
    original = qwen2vl.row_positions

    def row_positions(ids, grids, merge):
        positions = original(ids, grids, merge)
        frozen = None
        for i, token in enumerate(ids):
            frozen = (
                (positions[0, i].item() if frozen is None else frozen) if token in grids else None
            )
            positions[0, i] = positions[0, i] if frozen is None else frozen
        return positions

    qwen2vl.row_positions = row_positions


VARIANTS = {"none": lambda: None}
for change in (one_dimensional, no_vision_rope, one_size, raster, no_time):
    VARIANTS[change.__name__.replace("_", "-")] = change


def go_on_from(folder: Path) -> None:
    """Training begins with these weights, and at once with the lessons of its last stage."""
    weights = load_model(folder, dtype=torch.float32).state_dict()
    train.initialise = lambda model: model.load_state_dict(weights)
    train.CURRICULUM = {0: train.CURRICULUM[max(train.CURRICULUM)]}
    train.STAGES = train.WORDS_STAGES = (0, 0)
    train.GROW = 1


def begin_anew(steps: int) -> None:
    """Training takes the first lessons of its curriculum, without the words, and so does the score."""
    train.CURRICULUM = {0: "lone", 400: "places"}
    score.SKILLS = {"shapes": train.TOPICS["places"][1]}
    most = min(6, 1 + (steps - 1) // train.GROW)  # shapes in a picture, as at the end
    score.lesson = lambda topic, seed: scenes.lesson(
        topic, seed, scenes.START_SIZE[topic], scenes.START, most
    )


def table(runs: Path) -> str:
    """The skills as rows, the variants as columns: the whole model's score, then what the others differ from it."""
    results = {name: runs / name / "score.json" for name in VARIANTS}
    results = {
        name: json.loads(file.read_text()) for name, file in results.items() if file.exists()
    }
    if "none" not in results:
        raise SystemExit(
            f"there is no {runs / 'none' / 'score.json'} to compare with: run the variant none first"
        )
    rows = ["| skill | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for skill, whole in results["none"].items():
        others = [
            f"{100 * (scores[skill] - whole):+.1f}"
            for name, scores in results.items()
            if name != "none"
        ]
        rows.append(" | ".join([f"| {skill}", f"{100 * whole:.1f} %", *others]) + " |")
    return "\n".join(rows)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Let the trained model go on without one of its parts."
    )
    parser.add_argument("variant", choices=[*VARIANTS, "table"])
    parser.add_argument(
        "--checkpoint", type=Path, default=score.CHECKPOINT, help="what they start from"
    )
    parser.add_argument(
        "--anew", action="store_true", help="start from random weights, with the first lessons"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--items", type=int, default=500, help="questions of each skill that the score takes"
    )
    args, rest = parser.parse_known_args(argv)  # the rest is for tiny.train, as --bf16
    runs = args.runs / "anew" if args.anew else args.runs
    if args.variant == "table":
        print(table(runs))
        return 0
    if not args.anew:
        go_on_from(args.checkpoint)
    elif args.variant in ("one-size", "no-time"):
        parser.error(
            f"the first lessons are pictures of one size and no clips: {args.variant} changes nothing there"
        )
    else:
        begin_anew(args.steps)
    VARIANTS[args.variant]()
    place = runs / args.variant
    options = [
        "--folder",
        place / "checkpoint",
        "--run",
        place,
        "--steps",
        args.steps,
        "--items",
        0,
    ]
    train.main(
        [*map(str, options), "--processes", "1", "--lr", "7e-4" if args.anew else "3e-4", *rest]
    )
    write_json(place / "score.json", score.score(place / "checkpoint", args.items))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
