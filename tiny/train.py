"""Trains the bundled model from nothing: `python -m tiny.train`.

In order: a byte-level BPE tokenizer is made from the sentences of the world (scenes.py), the folder gets the files
that a published Qwen2-VL has, the model is trained on pictures drawn on the fly, saved in bf16, and asked questions
about 500 pictures it has never seen. The model, the preprocessing and the generation are the repository's own; this
file adds only what training needs: data, initial values, a loss and an optimiser. The run folder keeps what is
needed to go on after a stop: the same command resumes.

Shapes: B pictures of a batch, S tokens of the longest conversation, V vocabulary.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BPE
from torch import nn
from torch.nn import functional as F

from generate import generate
from load_weights import load_model, save_model
from preprocess import Processor
from qwen2vl import Config, Qwen2VL, VisionConfig
from tiny.scenes import TRAIN_SEEDS, draw, questions, scene

CHECKPOINT = Path(__file__).parent / "checkpoint"

# ---------------------------------------------------------------------------------------------- the folder's files

CONTROL = (  # the names of the 14 control tokens of the published tokenizer, in its order
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end "
    "quad_start quad_end vision_start vision_end vision_pad image_pad video_pad"
)
CONTROL = [f"<|{name}|>" for name in CONTROL.split()]

# Qwen2 cuts text into words with this before it merges bytes; every digit is a word of its own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published chat template, for other libraries (tokenizer.py writes the same prompts without Jinja). It holds no
# literal line break, because renderers differ in how they treat one after a block.
CHAT_TEMPLATE = (
    "{% set seen = namespace(images=0, videos=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "{% set seen.images = seen.images + 1 %}{% if add_vision_id %}{{ 'Picture ' ~ seen.images ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% elif item['type'] == 'video' or 'video' in item %}"
    "{% set seen.videos = seen.videos + 1 %}{% if add_vision_id %}{{ 'Video ' ~ seen.videos ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tokenizer(folder: Path, pictures: int = 2000, merges: int = 400) -> None:
    """Learns the merges from the world's sentences; any other text just takes more tokens. Writes two files."""
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    into_words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([into_words, into_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    sentences = []
    for seed in range(TRAIN_SEEDS, TRAIN_SEEDS + pictures):
        sentences += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
        for _, question, answer in questions(scene(seed), random.Random(seed)):
            sentences += [question, answer]
    letters = pre_tokenizers.ByteLevel.alphabet()  # one for each byte
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(sentences, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "added_tokens_decoder": {bpe.token_to_id(token): {"content": token, **entry} for token in CONTROL},
        "additional_special_tokens": CONTROL[1:],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def make_config(folder: Path) -> Config:
    """The shape of the model, a published one made small; writes the two files that need no weights.

    Every text token costs a pass through the decoder and a conversation has some 200 of them, so the decoder is
    narrow and the eyes get their full share: telling shapes apart is what takes longest to learn.
    """
    bpe = BPE.from_file(str(folder / "tokenizer.json"))
    end, pad = bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")
    generation = {"bos_token_id": pad, "do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    write_json(folder / "generation_config.json", generation)
    # The bounds are the smallest and the largest picture of the world: a photograph is shrunk to about the latter.
    images = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 84**2, "max_pixels": 196**2}
    images["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
    images["image_std"] = [0.26862954, 0.26130258, 0.27577711]
    images |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    write_json(folder / "preprocessor_config.json", images)
    return Config(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_theta=100.0,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        bos_token_id=pad,
        eos_token_id=end,
        vision_start_token_id=bpe.token_to_id("<|vision_start|>"),
        vision_end_token_id=bpe.token_to_id("<|vision_end|>"),
        image_token_id=bpe.token_to_id("<|image_pad|>"),
        video_token_id=bpe.token_to_id("<|video_pad|>"),
        vision_config=VisionConfig(depth=4, embed_dim=160, num_heads=5, mlp_ratio=4, hidden_size=128),
    )


# ------------------------------------------------------------------------------------------------------- the data


def conversation(image, asked: list[tuple[str, str, str]]) -> list[dict]:
    """Messages about one picture, which stands before the first question."""
    messages = []
    for _, question, answer in asked:
        picture = [] if messages else [{"type": "image", "image": image}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages


class Batches:
    """Batch number `step` of the training data, a function of the step alone: resuming needs no other state.

    All pictures of a batch have one patch grid and as many questions, so that little is padding. The description is
    always asked, because it says all that there is to see. Conversations are short until the shapes can be told
    apart, which takes longest and needs many pictures; then they are longer, so that there is more to count and find.
    """

    def __init__(self, folder: Path, steps: int, size: int, part: slice = slice(None)):
        self.steps, self.size, self.part = steps, size, part
        self.processor = Processor.from_pretrained(folder)
        tokenizer = self.processor.tokenizer
        self.header, self.end = tokenizer.encode("<|im_start|>assistant\n"), tokenizer.token_id("<|im_end|>")

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(TRAIN_SEEDS + step)
        easy = step < self.steps / 10  # first words with small, simple pictures: they are cheap
        cells = (rng.randint(3, 4), rng.randint(3, 4)) if easy else (rng.randint(3, 7), rng.randint(3, 7))
        early, talks = step < 0.35 * self.steps, []
        most = rng.randint(1, 5) if early else rng.randint(1, 8)
        for seed in range(TRAIN_SEEDS + step * self.size, TRAIN_SEEDS + (step + 1) * self.size)[self.part]:
            one = scene(seed, cells, most=2 if easy else 4)
            asked = questions(one, random.Random(f"questions {seed}"), most)
            # Later the description comes last: what follows one can be read off it, and is no reason to look.
            talks.append(conversation(draw(one), sorted(asked, key=lambda item: item[0] == "describe" and not early)))
        batch = self.processor(talks, add_generation_prompt=False)
        # Prompts are padded on the left; a training row turns round to be padded on the right, where no token can
        # see the padding, so that attention needs no mask.
        left = (batch.attention_mask == 0).sum(1)
        input_ids = torch.tensor(np.stack([np.roll(ids, -n) for ids, n in zip(batch.input_ids, left, strict=True)]))
        return {
            "input_ids": input_ids,  # [B, S]
            "answers": torch.tensor([self.answers(ids) for ids in input_ids.tolist()]),  # [B, S]
            "pixel_values": torch.tensor(batch.pixel_values),
            "image_grid_thw": torch.tensor(batch.image_grid_thw),
        }

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
    """A short warm-up, a long plateau, and a straight fall to zero over the last 30 %."""
    return peak * min(1.0, (step + 1) / min(200, 0.1 * steps), (steps - step) / (0.3 * steps))


def train(rank: int, args, config: Config) -> None:
    """One of args.processes that each take their part of every batch and average their gradients.

    Small matrices gain little from threads, which wait for each other at every one; processes meet once a step. All
    hold the same weights; the first (rank 0) also saves them and shows the progress.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    # In bf16 the gradient of PyTorch's fused attention is slower on a CPU than the textbook lines.
    model = Qwen2VL(config, attention="plain" if args.bf16 else "sdpa").train()
    initialise(model)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    state_file, start, minutes = args.run / "state.pt", 0, 0.0
    settings = {"batch": args.batch, "lr": args.lr, "seed": args.seed}
    if state_file.exists():
        state = torch.load(state_file)
        if state["settings"] != settings:
            raise SystemExit(f"{state_file} is of a run with {state['settings']}; delete it to start anew")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start, minutes = state["step"], state["minutes"]
    if args.processes > 1:
        meeting = (args.run / "meeting").absolute().as_uri()  # a file through which they find each other
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=args.processes)
    parallel = nn.parallel.DistributedDataParallel(model) if args.processes > 1 else model
    batches = Batches(args.folder, args.steps, args.batch, slice(rank, None, args.processes))
    losses, began = [], time.time()
    for step in range(start, args.steps):
        batch = batches[step]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        answers = batch.pop("answers")[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = parallel(**batch)[:, :-1]  # [B, S - 1, V]: what comes next after each token
        loss = F.cross_entropy(logits[answers].float(), batch["input_ids"][:, 1:][answers])
        optimiser.zero_grad()
        loss.backward()  # the gradients are the mean over all processes
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if rank > 0:
            continue
        losses = [*losses[-99:], loss.item()]
        done, seconds = step + 1, time.time() - began
        if done % 10 == 0:
            speed = (done - start) / seconds
            progress = f"step {done}/{args.steps}  loss {sum(losses) / len(losses):.4f}  "
            progress += f"{speed * args.batch:.0f} pictures/s  {(args.steps - done) / speed / 60:.0f} min left "
            end = "\n" if done % 500 == 0 else ""  # a line stays now and then, the others are written over
            print(f"\r{progress}", end=end, file=sys.stderr, flush=True)
        if done % args.save_every == 0 or done == args.steps:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "settings": settings}
            torch.save(state | {"step": done, "minutes": minutes + seconds / 60}, args.run / "new.pt")
            (args.run / "new.pt").replace(state_file)  # a stop while writing leaves the old one whole
    if rank == 0:
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        print(f"\n{size:.2f} M parameters, {minutes + (time.time() - began) / 60:.0f} minutes", file=sys.stderr)
        save_model(model.to(torch.bfloat16), args.folder)


# ------------------------------------------------------------------------------------------------------- the score


def score(folder: Path, pictures: int = 500, size: int = 50, show_wrong: int = 0) -> dict[str, tuple[int, int]]:
    """Asks the saved model one question of each skill about each evaluation picture, each in a new conversation.

    Returns {skill: (answers that are right to the letter, answers)}. Greedy, so the same every time.
    """
    model, processor = load_model(folder), Processor.from_pretrained(folder)
    asked = {"describe": [], "count": [], "where": [], "what": []}
    for seed in range(pictures):
        chosen = {skill: item for skill, *item in questions(scene(seed), random.Random(f"questions {seed}"))}
        for skill, item in chosen.items():
            asked[skill].append((seed, *item))
    right = dict.fromkeys(asked, 0)
    for skill, items in asked.items():
        for i in range(0, len(items), size):
            part = items[i : i + size]
            batch = processor([conversation(draw(scene(seed)), [(skill, text, "")])[:1] for seed, text, _ in part])
            for (seed, question, answer), reply in zip(part, generate(model, batch, 60), strict=True):
                said = processor.tokenizer.decode(reply)
                right[skill] += said == answer
                if said != answer and show_wrong > 0:
                    show_wrong -= 1
                    print(f"seed {seed}: {question} {answer!r} but said {said!r}", file=sys.stderr)
    return {skill: (right[skill], len(items)) for skill, items in asked.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Train the bundled model and score it.")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="where the finished model goes")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="where an unfinished one waits")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="one a core")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16: quick where the CPU has them")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=500, help="how many the score is taken on")
    parser.add_argument("--score-only", action="store_true")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N wrong answers")
    args = parser.parse_args(argv)
    if not args.score_only:
        args.run.mkdir(parents=True, exist_ok=True)
        (args.run / "meeting").unlink(missing_ok=True)
        make_tokenizer(args.folder)
        config = make_config(args.folder)
        if args.processes > 1:
            torch.multiprocessing.spawn(train, (args, config), args.processes)
        else:
            train(0, args, config)
    print("| skill | exact answers | of | |\n|---|---|---|---|")
    for skill, (right, total) in score(args.folder, args.pictures, show_wrong=args.show_wrong).items():
        print(f"| {skill} | {right} | {total} | {100 * right / total:.1f} % |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
