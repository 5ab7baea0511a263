"""Measure what the parts are worth: train the model further without one of them, and score it.

    python -m tiny.ablations none              the unchanged model, to compare with
    python -m tiny.ablations one-dimensional   positions that count the tokens, in place of M-RoPE
    python -m tiny.ablations no-vision-rope    a vision encoder without rotary embeddings
    python -m tiny.ablations one-size          every image resized to the same square
    python -m tiny.ablations raster            a token is 1×4 patches in reading order, not 2×2
    python -m tiny.ablations no-time           one temporal position for all frames of a video
    python -m tiny.ablations table             the table of the variants that have run

Each variant starts from the weights in `tiny/open` and trains on the same samples of the last stage
of the curriculum for `--steps` steps, in one process, at a rate that falls to zero. Then it is
scored on images without frames, still without the part. What it answers at the end needs no such
part.

With `--from-scratch` each variant starts from random weights instead and trains on the first
samples of the curriculum: small images of one size, with the kinds, colors and places of shapes.
What it answers at the end could be learned without the part.

With `--steps 0` nothing is trained, and each variant is the model of `tiny/open` without the part:
what it no longer answers was learned with it.

A variant is a subclass of `Variant` that builds another model or edits the messages.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from load_weights import load_config, load_model
from preprocess import Processor
from qwen2vl import (
    Config,
    KVCache,
    PatchMerger,
    Qwen2VL,
    VisionBlock,
    VisionConfig,
    VisionTransformer,
    get_rope_index,
)
from tiny import train
from tiny.curriculum import CURRICULUM, TOPICS, Curriculum
from tiny.folder import write_json
from tiny.scenes import QAPair, Sample, make_sample, to_conversation
from tiny.score import OPEN_CHECKPOINT, Exam, score
from tiny.sizes import START, START_SIZE

SIDE = 168  # pixels of the variant one-size: about the mean area of the training images


class Variant:
    """The unchanged model and data."""

    def build_model(self, config: Config, **options: str) -> Qwen2VL:
        return Qwen2VL(config, **options)

    def to_messages(self, sample: Sample, qa_pairs: list[QAPair]) -> list[dict]:
        return to_conversation(sample, qa_pairs)


# ---------------------------------------------------------------------------------------- positions


class OneDimensionalModel(Qwen2VL):
    """Every token has the number of its place in the sequence, on all three axes."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        sequences, length = input_ids.shape
        if attention_mask is None:
            cached = 0 if cache is None else cache.length
            numbers = torch.arange(cached, cached + length, device=input_ids.device)
        else:
            numbers = ((attention_mask.cumsum(1) - 1) * attention_mask)[:, -length:]
        position_ids = numbers.expand(3, sequences, length)
        return super().forward(input_ids, attention_mask, position_ids, cache, **inputs)


class OneDimensional(Variant):
    def build_model(self, config: Config, **options: str) -> Qwen2VL:
        return OneDimensionalModel(config, **options)


class NoTimeModel(Qwen2VL):
    """All tokens of a video have the temporal position of its first token."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        grids = (inputs.get("image_grid_thw"), inputs.get("video_grid_thw"))
        if grids[1] is not None:
            position_ids, _ = get_rope_index(self.config, input_ids, *grids, attention_mask)
            freeze_time(position_ids, input_ids == self.config.video_token_id)
            if cache is not None:  # the text after the video continues from the largest position
                cache.next_position = position_ids.amax((0, 2))[:, None] + 1
        return super().forward(input_ids, attention_mask, position_ids, cache, **inputs)


def freeze_time(position_ids: Tensor, is_video: Tensor) -> None:
    """Set the temporal positions [0] of each run of video tokens to its first; is_video bool [B,
    S].
    """
    for sequence, marks in enumerate(is_video.tolist()):
        for i in range(1, len(marks)):
            if marks[i] and marks[i - 1]:
                position_ids[0, sequence, i] = position_ids[0, sequence, i - 1]


class NoTime(Variant):
    def build_model(self, config: Config, **options: str) -> Qwen2VL:
        return NoTimeModel(config, **options)


# ----------------------------------------------------------------------------------- vision encoder


def take_weights(
    original: nn.Module, build: Callable[[VisionConfig], nn.Module], config: VisionConfig
) -> nn.Module:
    """Return a new module with the weights of the original.

    It is built without random numbers, so that all variants start from the same weights.
    """
    with torch.device("meta"):
        module = build(config)
    module.load_state_dict(original.state_dict(), assign=True)
    return module


class UnrotatedBlock(VisionBlock):
    """A block that gets all angles as zero."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *more) -> Tensor:
        return super().forward(x, torch.ones_like(cos), torch.zeros_like(sin), *more)


class NoVisionRope(Variant):
    def build_model(self, config: Config, **options: str) -> Qwen2VL:
        model = Qwen2VL(config, **options)
        build = partial(UnrotatedBlock, attn_implementation=model.attn_implementation)
        for i, block in enumerate(model.visual.blocks):
            model.visual.blocks[i] = take_weights(block, build, config.vision_config)
        return model


class RasterMerger(PatchMerger):
    """Merge four patches that are next to each other in a row, in place of a 2×2 block."""

    order: Tensor  # int64 [N]: what `raster_order` returns for the images of this forward pass

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[self.order])


def raster_order(grids: list[list[int]], merge: int) -> Tensor:
    """Return for each patch in reading order its index in the order of preprocessing: int64 [N]."""
    orders = []
    start = 0
    for t, h, w in grids:
        indices = start + torch.arange(t * h * w).view(t, h // merge, w // merge, merge, merge)
        orders.append(indices.permute(0, 1, 3, 2, 4).flatten())  # slice, row, column
        start += t * h * w
    return torch.cat(orders)


class RasterEncoder(VisionTransformer):
    """Its blocks are unchanged: a patch is known by its angles, and attention ignores the order."""

    def __init__(self, config: VisionConfig, **options: str):
        super().__init__(config, **options)
        self.merger = RasterMerger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        self.merger.order = raster_order(grid_thw.tolist(), self.config.spatial_merge_size)
        return super().forward(pixel_values, grid_thw)


class Raster(Variant):
    def build_model(self, config: Config, **options: str) -> Qwen2VL:
        model = Qwen2VL(config, **options)
        build = partial(RasterEncoder, **options)
        model.visual = take_weights(model.visual, build, config.vision_config)
        return model


# ------------------------------------------------------------------------------------------- images


class OneSize(Variant):
    """Images and frames are resized to SIDE×SIDE pixels."""

    def to_messages(self, sample: Sample, qa_pairs: list[QAPair]) -> list[dict]:
        messages = to_conversation(sample, qa_pairs)
        for item in messages[0]["content"]:
            if item["type"] == "image":
                item["resized_height"] = SIDE
                item["resized_width"] = SIDE
            if item["type"] == "video":
                item["video"] = [frame.resize((SIDE, SIDE)) for frame in item["video"]]
        return messages


VARIANTS = {
    "none": Variant(),
    "one-dimensional": OneDimensional(),
    "no-vision-rope": NoVisionRope(),
    "one-size": OneSize(),
    "raster": Raster(),
    "no-time": NoTime(),
}
UNCHANGED_FROM_SCRATCH = ("one-size", "no-time")  # the first samples have one size and no videos


# ----------------------------------------------------------------------------- training and scoring


@dataclass(frozen=True)
class Start:
    """What all variants start with: weights, order of the samples, questions, learning rate."""

    initialize: Callable[[Qwen2VL], None]
    curriculum: Curriculum
    exam: Exam
    lr: str


def from_checkpoint(folder: Path) -> Start:
    """Start with a checkpoint's weights and the samples of the last stage of the curriculum."""
    weights = load_model(folder, dtype=torch.float32).state_dict()
    last_topics = CURRICULUM.topics_from[max(CURRICULUM.topics_from)]
    curriculum = replace(
        CURRICULUM,
        topics_from={0: last_topics},
        small_from=0,
        all_sizes_from=0,
        small_words_from=0,
        all_words_from=0,
        grow_every=1,
        open_from=0,
    )
    exam = Exam(make_sample=partial(make_sample, style="frameless"))
    return Start(lambda model: model.load_state_dict(weights), curriculum, exam, "3e-4")


def from_scratch(steps: int) -> Start:
    """Start with random weights and the first samples, without the printed words."""
    curriculum = replace(CURRICULUM, topics_from={0: "lone", 400: "places"})
    most_shapes = curriculum.most_shapes(steps - 1)

    def make_first_sample(topic: str, seed: int) -> Sample:
        return make_sample(topic, seed, START_SIZE[topic], START, most_shapes)

    exam = Exam(TOPICS["places"].skills, make_first_sample)
    return Start(train.initialize, curriculum, exam, "7e-4")


def load_variant(variant: Variant, folder: Path) -> Qwen2VL:
    """Return the variant's model with a checkpoint's weights, in their dtype."""
    stored = load_model(folder)
    model = variant.build_model(stored.config).to(stored.lm_head.weight.dtype)
    model.load_state_dict(stored.state_dict())
    model.generation_config = stored.generation_config
    return model.eval()


def run_variant(variant: Variant, start: Start, run: Path, args, train_options: list[str]) -> None:
    """Train a variant, unless args.steps is 0, and write RUN/score.json."""
    checkpoint = args.checkpoint
    if args.steps:
        recipe = train.Recipe(
            start.curriculum, variant.to_messages, variant.build_model, start.initialize
        )
        checkpoint = run / "checkpoint"
        options = ["--folder", str(checkpoint), "--run", str(run), "--steps", str(args.steps)]
        options += ["--items", "0", "--processes", "1", "--lr", start.lr]
        options += ["--depth", str(load_config(args.checkpoint).num_hidden_layers)]
        train.main(options + train_options, recipe)
    run.mkdir(parents=True, exist_ok=True)
    exam = replace(start.exam, to_messages=variant.to_messages)
    model = load_variant(variant, checkpoint)
    shares = score(model, Processor.from_pretrained(checkpoint), args.items, exam=exam)
    write_json(run / "score.json", shares)


def table(runs: Path) -> str:
    """Return a Markdown table: the score of "none" by skill, and the differences of the others."""
    results = {}
    for name in VARIANTS:
        file = runs / name / "score.json"
        if file.exists():
            results[name] = json.loads(file.read_text())
    if "none" not in results:
        raise SystemExit(
            f"expected {runs / 'none' / 'score.json'} to compare with: run the variant none first"
        )
    lines = ["| skill | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    unchanged = results.pop("none")
    for skill, share in unchanged.items():
        cells = [skill, f"{100 * share:.1f} %"]
        for shares in results.values():
            cells.append(f"{100 * (shares[skill] - share):+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train the model further without one of its parts."
    )
    add = parser.add_argument
    add("variant", choices=[*VARIANTS, "table"])
    add("--checkpoint", type=Path, default=OPEN_CHECKPOINT, help="the weights to start from")
    add(
        "--from-scratch",
        action="store_true",
        help="start from random weights, with the first samples",
    )
    add("--runs", type=Path, default=Path("runs/ablations"))
    add("--steps", type=int, default=1000, help="of further training; 0: none")
    add("--items", type=int, default=500, help="questions of each skill for the score")
    args, train_options = parser.parse_known_args(argv)  # the others are for tiny.train, as --bf16
    if args.from_scratch and args.steps == 0:
        parser.error("--from-scratch with --steps 0 would score random weights")
    runs = args.runs
    if args.from_scratch:
        runs = runs / "from-scratch"
    elif args.steps == 0:
        runs = runs / "untrained"
    if args.variant == "table":
        print(table(runs))
        return 0
    if args.from_scratch and args.variant in UNCHANGED_FROM_SCRATCH:
        parser.error(
            "the first samples are images of one size and no videos: "
            f"{args.variant} changes nothing there"
        )
    start = from_scratch(args.steps) if args.from_scratch else from_checkpoint(args.checkpoint)
    variant = VARIANTS[args.variant]
    run_variant(variant, start, runs / args.variant, args, train_options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
