"""Compute one vector for each image, video or text, for search by meaning.

    python -m apps.embed --image examples/shapes.png --text "a red circle" --text "a dog"
    python -m apps.embed --input documents.jsonl --out vectors.npz

Without --out it prints the cosine similarities. With it, an npz file holds `vectors`, float32
[N, C] of length 1, and `names`. A prompt is a question in the chat format, the opening of the
answer, and --suffix; its vector is made of the hidden states after the last norm.

What the authors of checkpoints compute (their vectors have not been compared here):

* Alibaba-NLP/gme-Qwen2-VL-2B-Instruct, 7B: `--positions sequential --min-pixels 200704
  --max-pixels 1003520`, and for queries `--instruction "Find an image that matches …"`. Their code
  numbers all tokens one after the other, where Qwen2-VL has M-RoPE.
* MrLight/dse-qwen2-2b-mrl-v1: `--image-text "What is shown in this image?"`. A query is a
  conversation of --input, with a black image of 28×28 pixels and the text "Query: …".
* ColQwen2 is not supported: it has a vector of 128 values for each token, by a projection in its
  adapter. Checkpoints that were trained only to answer give vectors that search poorly.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import command_line
import memory
from conversations import read_conversation
from errors import first_line
from output_files import check_output, write_file
from preprocess import Batch, Processor
from qwen2vl import Qwen2VL

logger = logging.getLogger("qwen2vl")

NAME_LENGTH = 200  # characters of a text that are kept as the name of its vector
Input = tuple[str, list[dict]]  # the name of a vector, and the messages


@torch.inference_mode()
def embed(model: Qwen2VL, batch: Batch, pooling: str = "last", positions: str = "mrope") -> Tensor:
    """Return a vector of length 1 of each sequence, float32 [B, C].

    pooling: "last", the hidden state of the last token, or "mean", of all without padding.
    positions: "mrope", or "sequential": 0, 1, 2, … on all three axes, also for images.
    """
    inputs = {}
    for name, array in batch.arrays().items():
        inputs[name] = torch.as_tensor(array, device=model.model.norm.weight.device)
    mask = inputs["attention_mask"]  # [B, S]
    if positions == "sequential":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    states = model.hidden_states(**inputs).float()  # [B, S, C]
    if pooling == "last":
        vectors = states[:, -1]  # padding is on the left
    else:
        vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    if not vectors.isfinite().all():
        raise ValueError("the vectors are not finite: try --dtype float32")
    return F.normalize(vectors, dim=-1)


def append_ids(batch: Batch, ids: list[int]) -> Batch:
    """Return a batch with the same ids at the end of each sequence."""
    suffix = np.tile(np.array(ids, dtype=np.int64), (len(batch.input_ids), 1))
    input_ids = np.concatenate([batch.input_ids, suffix], axis=1)
    mask = np.concatenate([batch.attention_mask, np.ones_like(suffix)], axis=1)
    return replace(batch, input_ids=input_ids, attention_mask=mask)


# ------------------------------------------------------------------------------------------- inputs
def make_messages(content: dict, arguments: argparse.Namespace) -> Input:
    """Return the input of an object with image, video, text or messages; its media are not read.

    The name is its id, else its first source or text. Raises ValueError.
    """
    name = content.get("id")
    if "messages" in content or "conversations" in content:
        messages = read_conversation(content)
        if not messages:
            raise ValueError("expected a list of messages, got an empty one")
        return "a conversation" if name is None else str(name), messages
    unknown = sorted(content.keys() - {"image", "video", "text", "id", "type"})
    if unknown:
        raise ValueError(f"expected image, video, text, id or messages, got {', '.join(unknown)}")
    items = []
    for kind in ("image", "video", "text"):
        if content.get(kind) is not None:
            items.append({"type": kind, kind: content[kind]})
    if not items:
        raise ValueError("expected image, video, text or messages, got none of them")
    if name is None:
        name = items[0][items[0]["type"]]
    if arguments.image_text is not None and items[-1]["type"] == "image":
        items.append({"type": "text", "text": arguments.image_text})
    messages = [{"role": "user", "content": items}]
    if arguments.instruction is not None:
        system = [{"type": "text", "text": arguments.instruction}]
        messages.insert(0, {"role": "system", "content": system})
    return str(name), messages


def read_input(content: object, arguments: argparse.Namespace, processor: Processor) -> Input:
    """Return an input with its media read. Raises OSError or ValueError."""
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    name, messages = make_messages(content, arguments)
    options = command_line.video_options(arguments)
    messages = command_line.read_media(processor, messages, options)
    processor([messages])  # raises what is wrong with this input alone
    return name, messages


def read_inputs(arguments: argparse.Namespace, processor: Processor) -> Iterator[Input]:
    """Yield the input of each option, then of each line of --input, read when asked for.

    A line that cannot be used costs a warning and has no vector. Raises OSError or ValueError.
    """
    for item in arguments.media:
        yield read_input(item, arguments, processor)
    if arguments.input is None:
        return
    is_json = arguments.input.lower().endswith(".jsonl")
    with open(arguments.input, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig").strip()
                content = json.loads(text) if is_json else {"text": text}
                yield read_input(content, arguments, processor)
            except (OSError, ValueError, RecursionError) as error:
                reason = first_line(error)
                logger.warning("line %d of %s is left out: %s", number, arguments.input, reason)


def make_batches(
    arguments: argparse.Namespace, processor: Processor
) -> Iterator[tuple[list[str], Batch]]:
    """Yield the names and the prompts of --batch-size inputs after the other."""
    suffix = processor.tokenizer.encode(arguments.suffix)
    inputs = read_inputs(arguments, processor)
    while group := list(itertools.islice(inputs, arguments.batch_size)):
        names = [name for name, _ in group]
        conversations = [messages for _, messages in group]
        batch = processor(conversations, add_vision_id=arguments.add_vision_id)
        yield names, append_ids(batch, suffix)


# ------------------------------------------------------------------------------------------ program
def format_table(names: list[str], vectors: Tensor) -> str:
    """Return the cosine similarities of vectors [N, C] of length 1 as lines of text."""
    lines = [" " * 4 + "".join(f"{number:>8}" for number in range(1, len(names) + 1))]
    for number, similarities in enumerate((vectors @ vectors.T).tolist(), start=1):
        values = "".join(f"{similarity:>8.4f}" for similarity in similarities)
        lines.append(f"{number:>4}{values}  {names[number - 1]}")
    return "\n".join(lines)


def check_paths(arguments: argparse.Namespace) -> None:
    """Raise OSError or ValueError for an --input or --out that is unusable."""
    path = arguments.input
    inputs = command_line.input_paths(arguments)
    if path is not None:
        inputs.append(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"there is no file {path}, expected one with an input on each line"
            )
    if arguments.out is not None:
        check_output(arguments.out, inputs, arguments.force)


def write_vectors(path: Path, names: list[str], vectors: torch.Tensor) -> None:
    """Write the npz file."""
    # An array of texts has room for the longest one at each place.
    short_names = np.array([name[:NAME_LENGTH] for name in names])
    with open(path, "wb") as file:  # np.savez would add .npz to a name without
        np.savez(file, vectors=vectors.numpy(), names=short_names)


def run(arguments: argparse.Namespace) -> None:
    """Compute the vectors; write or compare them. Raises OSError or ValueError in one sentence."""
    check_paths(arguments)
    directory, processor = command_line.load_processor(arguments)
    batches = make_batches(arguments, processor)
    # Before the model: a wrong path should not wait until the weights are loaded.
    first_batch = next(batches, None)
    if first_batch is None:
        raise ValueError(f"{arguments.input} holds no line that can be used")
    memory_run = command_line.checked_run(arguments, directory)
    model = command_line.load_checkpoint(
        arguments, directory, processor, memory_run, first_batch[1], few_tokens=True
    )
    names: list[str] = []
    computed = []
    for batch_names, batch in itertools.chain([first_batch], batches):
        names += batch_names
        if memory_run is not None:
            memory.check_batch(memory_run, batch)
        computed.append(embed(model, batch, arguments.pooling, arguments.positions).cpu())
    vectors = torch.cat(computed)
    if arguments.out is None:
        print(format_table(names, vectors))
        return
    write_file(arguments.out, lambda path: write_vectors(path, names, vectors), arguments.force)
    logger.info("%s: %d vectors of %d values", arguments.out, *vectors.shape)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = argparse.ArgumentParser("python -m apps.embed", description=__doc__.split("\n")[0])
    media = {"dest": "media", "action": "append", "default": [], "metavar": "SOURCE"}
    parser.add_argument("--image", type=command_line.image_item, **media, help="a file or URL")
    parser.add_argument("--video", type=command_line.video_item, **media, help="a file or URL")
    parser.add_argument("--text", type=lambda text: {"text": text}, **media, help="repeat each")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="a text on each line, or (.jsonl) objects with image, video, text, id or messages",
    )
    command_line.add_output_options(parser, "NPZ", "where vectors and names are written")
    parser.add_argument("--instruction", metavar="TEXT", help="the system message")
    parser.add_argument("--image-text", metavar="TEXT", help="put after an image without a text")
    parser.add_argument("--suffix", default="<|endoftext|>", help="(default: <|endoftext|>)")
    parser.add_argument("--pooling", choices=("last", "mean"), default="last", help="over tokens")
    parser.add_argument("--positions", choices=("mrope", "sequential"), default="mrope")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    command_line.add_media_options(parser)
    command_line.add_model_options(parser)
    arguments = parser.parse_args(argv, argparse.Namespace(max_new_tokens=None))
    problem = command_line.number_problem(arguments)
    if arguments.batch_size < 1:
        problem = f"--batch-size is {arguments.batch_size}, expected 1 or more"
    if not arguments.media and arguments.input is None:
        problem = "expected --image, --video, --text or --input, got none of them"
    if arguments.input is not None and arguments.out is None:
        problem = "expected --out with --input"
    if problem is not None:
        parser.error(problem)
    arguments.max_new_tokens = 0  # as `memory.Run` has it
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.embed", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.embed", main)
