"""Trains the bundled model from nothing: `python -m tiny.train`.

In order: a byte-level BPE tokenizer is made from the sentences of the world (scenes.py), the folder gets the files
that a published Qwen2-VL has, the model is trained on pictures and clips drawn on the fly, saved in bf16, and asked
what it has learned (score.py). The model, the preprocessing and the generation are the repository's own; this file
adds only what training needs: data, initial values, a loss and an optimiser. The run folder keeps what is needed to
go on after a stop: the same command resumes. The model's folder always holds the newest weights, so that they can be
asked meanwhile: `python -m tiny.score FOLDER`.

Shapes: B conversations of a part of a batch, S tokens of the longest conversation, V vocabulary.
"""

import argparse
import copy
import math
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from load_weights import save_model
from qwen2vl import Config, Qwen2VL
from tiny.folder import make_config, make_tokenizer, write_json
from tiny.scenes import SKILLS, SMALL, TRAIN_SEEDS, Lesson, lesson, messages, sizes
from tiny.score import processor_for, table

CHECKPOINT = Path(__file__).parent / "checkpoint"

# The curriculum: from which step on which topics the parts have, by turns; there are six parts a step. A number is
# the most shapes in a picture, which is then small. Lone shapes are described first: asked only where they are, the
# model learned to let go of their colours. To find a shape by its name is learned late, but then quickly: from many
# such questions with short answers, when it is known what stands where. In the same way, "Which picture shows a red
# circle?" comes after "What is in picture 2?", and both with lone shapes, as do boxes. From step 20,000 on, what lags
# behind gets most of the parts for a while, and then everything comes again.
CURRICULUM = {
    0: "lone lone words",
    400: "places places places places places words",
    2000: "names places names places names words",
    5000: "shapes words boxes1 inside1 clip1 shapes names words boxes1 inside1 clip1 shapes",
    6000: "shapes words boxes2 which1 clip counts names words boxes2 which1 inside1 counts",
    7000: "shapes words inside1 inside1 clip1 counts names words inside1 inside1 boxes1 clip1",
    8000: "shapes inside1 inside1 words inside1 inside1",
    8500: "names which1 which1 words which1 which1",
    9000: "counts boxes1 boxes1 words boxes1 which2",
    9500: "names more1 more1 words which2 boxes2",
    10000: "shapes words boxes3 which3 clip shapes names words boxes3 more2 clip counts",
    12000: "shapes words boxes album clip shapes names words boxes more clip shapes",
    20000: "boxes1 boxes1 shapes words boxes1 counts",
    20500: "counts counts shapes words boxes1 counts",
    21000: "names names shapes words boxes2 inside2",
    21500: "inside3 inside3 shapes words boxes2 clip",
    22000: "shapes words boxes album clip counts names words boxes more inside shapes",
    23500: "pairs pairs boxes words pairs pairs",
    24500: "events events boxes words pairs events",
    25000: "shapes words boxes album clip counts pairs words boxes more inside events",
    32000: "colours colours words boxes colours colours",
    32500: "which which words boxes which more",
    33000: "more more words boxes more which",
    33500: "colours2 colours2 words boxes colours2 colours2",
    34500: "colours3 colours3 words boxes colours3 which2",
    35000: "which2 which2 more2 words boxes more2",
    36000: "boxes boxes2 words boxes boxes words",
    38500: "more more words boxes more counts",
    39500: "boxes boxes words boxes2 colours2 boxes",
    42000: "shapes words boxes more counts words boxes album clip shapes words boxes colours words more pairs",
    44500: "shapes words boxes more counts pairs album words boxes clip shapes events inside "
    "words boxes more counts colours",
    46500: "pairs pairs counts words pairs pairs",
    47000: "shapes words boxes more counts pairs album words boxes clip shapes events inside "
    "words pairs more counts pairs",
    50000: "chat chat words boxes chat chat",
    51000: "inside inside which words boxes which",
    52000: "more counts more words boxes counts",
    52500: "more counts pairs words boxes pairs",
    53500: "events events pairs words chat clip",
    54500: "shapes words boxes more counts chat words album boxes clip shapes words events inside boxes more counts "
    "chat words pairs",
    58000: "shapes words boxes counts chat more words album boxes clip counts words events boxes shapes inside words "
    "counts boxes more pairs chat",
    65000: "shapes words boxes more counts chat words album more boxes chat counts words clip which boxes more chat "
    "inside events words pairs",
    67500: "chat2 chat2 counts pairs chat2 chat2",
    68300: "chat3 chat3 counts pairs chat words",
    68800: "shapes words boxes counts chat more words told boxes counts which words clip counts more pairs album "
    "words shapes boxes counts chat inside events more told",
    74500: "more shapes boxes more chat words more counts boxes more album words chat more which clip pairs more "
    "words boxes shapes inside events counts chat told",
    78000: "kinds kinds boxes words more kinds",
    78500: "more shapes boxes kinds words counts boxes more words kinds album clip which counts kinds words more "
    "boxes chat pairs kinds shapes inside words events told",
    79500: "kinds2 kinds2 words more kinds2 kinds2",
    80200: "more shapes boxes kinds2 words counts boxes more words kinds album clip which counts kinds words more "
    "boxes chat pairs kinds2 shapes inside words events told",
    83000: "more shapes boxes kinds2 words more counts boxes more words kinds album more clip counts kinds words "
    "more boxes chat pairs more kinds2 shapes words inside events told",
    85500: "more shapes boxes kinds2 words counts boxes more words kinds album counts clip more kinds words "
    "more boxes chat counts pairs kinds2 shapes words inside events counts told",
}
# What a topic shows, the questions that it asks, the most of them in one conversation, and the work, in patches, that
# a question is and a picture, or a pair of frames.
TOPICS = {
    "shapes": ("shapes", SKILLS["shapes"], 8, 30, 1),
    "lone": ("shapes", ["describe"], 1, 30, 1),
    "places": ("shapes", ["describe", "count", "what", "shape"], 8, 30, 1),
    "names": ("shapes", ["where", "colour", "relation"], 8, 25, 1),
    "counts": ("shapes", ["count", "relation"], 5, 25, 1),
    "chat": ("shapes", ["chat"], 1, 25, 1),
    "kinds": ("shapes", ["chat"], 1, 25, 1),
    "told": ("shapes", SKILLS["shapes"], 4, 30, 1),
    "pairs": ("shapes", ["colour", "relation"], 2, 25, 1),
    "colours": ("shapes", ["colour"], 1, 25, 1),
    "boxes": ("shapes", ["ground"], 2, 40, 1),
    "words": ("words", ["read"], 1, 45, 1),
    "album": ("album", SKILLS["album"], 8, 25, 2.5),
    "inside": ("album", ["inside"], 1, 35, 2.5),
    "which": ("album", ["shows"], 1, 25, 2.5),
    "more": ("album", ["compare"], 1, 25, 2.5),
    "clip": ("clip", SKILLS["clip"], 8, 20, 3),
    "events": ("clip", ["video"], 1, 20, 3),
}
STAGES = (
    5000,
    9000,
)  # the steps from which on there are small pictures of any size, and those of all sizes
WORDS_STAGES = (875, 1875)  # the same for words: letters are learned much sooner than places
# Where the learning rate starts anew, from which share of its peak, and at which step its fall would end.
LEGS = {
    0: (1.0, 20_000), 20_000: (0.6, 32_000), 32_000: (0.6, 50_000), 46_500: (0.3, 50_000), 50_000: (0.4, 65_000),
    65_000: (0.15, 67_500), 67_500: (0.3, 74_500), 74_500: (0.25, 78_000), 78_000: (0.25, 80_500),
    79_500: (0.3, 83_000), 83_000: (0.2, 85_500), 85_500: (0.2, math.inf),
}  # fmt: skip
GROW = 400  # steps: a topic begins with one shape; after each so many there is one more, up to six

# ------------------------------------------------------------------------------------------------------- the data


def by_kind(one: Lesson) -> bool:
    """Whether a question that another follows calls a shape by its kind, where there are others: one in six does."""
    [chat] = (exchange for exchange in one.exchanges if exchange.skill == "chat")
    kinds = {shape.kind for shape in one.scenes[0].shapes}
    return len(kinds) > 1 and any(f"the {kind}" in chat.turns[0][0] for kind in kinds)


class Batches:
    """Part `part` of batch `step` of the training data, a function of these two alone: resuming needs no other state.

    A part has one topic, and its pictures one size, so that attention is one product; it has as many lessons as make
    the same work. A step's gradient is the mean over some parts, of different topics.
    """

    def __init__(self, folder: Path, parts: int, work: int):
        self.parts, self.work = parts, work
        self.processor = processor_for(folder)
        tokenizer = self.processor.tokenizer
        self.header, self.end = (
            tokenizer.encode("<|im_start|>assistant\n"),
            tokenizer.token_id("<|im_end|>"),
        )

    def __getitem__(self, place: tuple[int, int]) -> tuple[str, dict[str, torch.Tensor]]:
        step, part = place
        number = step * self.parts + part
        rng = random.Random(TRAIN_SEEDS + number)
        topics = [topics for begin, topics in CURRICULUM.items() if step >= begin][-1].split()
        name = topics[number % len(topics)]
        topic = name.rstrip("123")
        world, skills, longest, words, picture = TOPICS[topic]
        stage = sum(step >= begin for begin in (WORDS_STAGES if topic == "words" else STAGES))
        most = min(6, 1 + step // GROW)
        if name != topic:
            stage, most = min(stage, SMALL), int(name.removeprefix(topic))
        cells = rng.choice(sizes(world, stage))
        longest = rng.randint(1, longest)
        count = max(
            1, min(64, round(self.work / (words * longest + picture * 4 * cells[0] * cells[1])))
        )
        seeds = range(
            TRAIN_SEEDS + 64 * number,
            TRAIN_SEEDS + 64 * number + (64 if topic == "kinds" else count),
        )
        lessons, talks = [lesson(world, seed, cells, stage, most) for seed in seeds], []
        if topic == "kinds":
            lessons.sort(key=by_kind, reverse=True)
        for one in lessons[:count]:
            # What there is in all comes always and last: what follows it can be read off it, without a look (only
            # "told" asks on after it). In a picture in which no shape has a name of its own, something else is asked.
            asked = [exchange for exchange in one.exchanges if exchange.skill in skills] or list(
                one.exchanges
            )
            asked.sort(key=lambda exchange: exchange.skill != "describe")
            talks.append(
                messages(one, asked[:longest] if topic == "told" else asked[:longest][::-1])
            )
        batch = self.processor(talks, add_generation_prompt=False, add_vision_id=world == "album")
        # Prompts are padded on the left; a training row turns round to be padded on the right, where no token can
        # see the padding, so that attention needs no mask.
        left = (batch.attention_mask == 0).sum(1)
        input_ids = torch.tensor(
            np.stack([np.roll(ids, -n) for ids, n in zip(batch.input_ids, left, strict=True)])
        )
        arrays = {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw}
        arrays |= {
            "pixel_values_videos": batch.pixel_values_videos,
            "video_grid_thw": batch.video_grid_thw,
        }
        tensors = {name: torch.tensor(array) for name, array in arrays.items() if array is not None}
        answers = torch.tensor([self.answers(ids) for ids in input_ids.tolist()])
        return topic, {"input_ids": input_ids, "answers": answers, **tensors}  # both [B, S]

    def answers(self, ids: list[int]) -> list[bool]:
        """For each token, whether the model has to say it: the assistant's words and the end of its turn."""
        said, speaking = [], False
        for i, token in enumerate(ids):
            said.append(speaking)
            opened = ids[max(0, i + 1 - len(self.header)) : i + 1] == self.header
            speaking = opened or (speaking and token != self.end)
        return said


# --------------------------------------------------------------------------------------------------- the training


@torch.no_grad()
def initialise(model: Qwen2VL) -> None:
    """Each linear layer keeps the size of what passes through it; those that add to the stream start small."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")):
                module.weight *= 0.3
    nn.init.normal_(model.model.embed_tokens.weight, std=model.config.hidden_size**-0.5)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """For each of LEGS a short warm-up, then half a cosine down to zero."""
    begin = max(leg for leg in LEGS if leg <= step)
    share, end = LEGS[begin]
    length = min(steps, end) - begin
    warm = min(1.0, (step - begin + 1) / min(200, 0.1 * length))
    return peak * share * warm * (1 + math.cos(math.pi * (step - begin) / length)) / 2


def train(rank: int, args, config: Config) -> None:
    """One of args.processes that share the parts of every batch and add up their gradients.

    Small matrices gain little from threads, which wait for each other at every one; processes meet once a step. All
    hold the same weights; the first (rank 0) also saves them and shows the progress.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    # In bf16 the gradient of PyTorch's fused attention is slower on a CPU than the textbook lines.
    plain = args.bf16 and args.device == "cpu"
    model = Qwen2VL(config, attention="plain" if plain else "sdpa").train()
    initialise(model)
    model.to(args.device)
    weights = list(model.parameters())
    groups = [{"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.05}]
    groups += [{"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    state_file, start, minutes, history = args.run / "state.pt", 0, 0.0, {}
    settings = {
        "steps": args.steps,
        "parts": args.parts,
        "work": args.work,
        "lr": args.lr,
        "seed": args.seed,
    }
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device)
        if state["settings"] != settings:
            raise SystemExit(
                f"{state_file} is of a run with {state['settings']}; delete it to start anew"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start, minutes, history = state["step"], state["minutes"], state["history"]
    if args.processes > 1:
        meeting = (
            (args.run / "meeting").absolute().as_uri()
        )  # a file through which they find each other
        patience = timedelta(
            hours=12
        )  # for the others: they may be halted a while to make room for other work
        torch.distributed.init_process_group(
            "gloo", meeting, timeout=patience, rank=rank, world_size=args.processes
        )
    batches, recent = Batches(args.folder, args.parts, args.work), []
    lessons, began = 0, time.time()
    for step in range(start, args.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimiser.zero_grad()
        # For each topic the sum of the parts' losses, their number, their lessons.
        told = torch.zeros(3, len(TOPICS), device=args.device)
        for part in range(rank, args.parts, args.processes):
            topic, batch = batches[step, part]
            batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
            answers = batch.pop("answers")[:, 1:]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                logits = model(**batch)[:, :-1]  # [B, S - 1, V]: what comes next after each token
            loss = F.cross_entropy(logits[answers].float(), batch["input_ids"][:, 1:][answers])
            (loss / args.parts).backward()  # adds to the gradients
            told[:, list(TOPICS).index(topic)] += torch.tensor(
                [loss.item(), 1, len(answers)], device=args.device
            )
        if args.processes > 1:
            total = torch.cat([told.flatten(), *(weight.grad.flatten() for weight in weights)])
            torch.distributed.all_reduce(total)
            told, *gradients = total.split([told.numel(), *(weight.numel() for weight in weights)])
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.view_as(weight)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if rank > 0:
            continue
        done, seconds = step + 1, time.time() - began
        recent = [*recent[-99:], told.view(3, -1)]
        lessons += int(recent[-1][2].sum())
        means = {
            topic: round(total / parts, 4)
            for topic, total, parts, _ in zip(TOPICS, *sum(recent).tolist(), strict=True)
            if parts
        }
        if done % 10 == 0:
            progress = f"step {done}/{args.steps}  loss {means}  {lessons / seconds:.0f} lessons/s"
            progress += f"  {(args.steps - done) * seconds / (done - start) / 60:.0f} min left "
            end = (
                "\n" if done % 200 == 0 else ""
            )  # a line stays now and then, the others are written over
            print(f"\r{progress}", end=end, file=sys.stderr, flush=True)
        if done % args.save_every == 0 or done == args.steps:
            history[done] = means
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "settings": settings,
            }
            state |= {"step": done, "minutes": minutes + seconds / 60, "history": history}
            torch.save(state, args.run / "new.pt")
            (args.run / "new.pt").replace(
                state_file
            )  # a stop while writing leaves the old one whole
            save_model(
                copy.deepcopy(model).to(torch.bfloat16), args.folder
            )  # to be asked while it learns
    if rank == 0:
        size = sum(weight.numel() for weight in weights) / 1e6
        print(
            f"\n{size:.2f} M parameters, {minutes + (time.time() - began) / 60:.0f} minutes",
            file=sys.stderr,
        )
        write_json(args.run / "history.json", history)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Train the bundled model and score it.")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="where the model goes")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tiny"), help="for what training needs to go on"
    )
    parser.add_argument("--steps", type=int, default=88_500)
    parser.add_argument("--parts", type=int, default=6, help="of a step, each of one topic")
    parser.add_argument("--work", type=int, default=800, help="size of a part, in patches")
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument(
        "--processes", type=int, default=min(6, os.cpu_count() or 1), help="one a core"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="matrix products in bf16: quick where hardware has them"
    )
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument(
        "--items", type=int, default=1000, help="questions of each skill that the score takes"
    )
    args = parser.parse_args(argv)
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "meeting").unlink(missing_ok=True)
    make_tokenizer(args.folder)
    config = make_config(args.folder)
    if args.processes > 1:
        torch.multiprocessing.spawn(train, (args, config), args.processes)
    else:
        train(0, args, config)
    if args.items:
        print(table(args.folder, args.items))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
