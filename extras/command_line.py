"""The options of `generate.py`, what they mean together, and the lines that it says about its work on stderr."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from generate import Sampling
from media import load_image
from preprocess import Batch, Processor
from qwen2vl import Qwen2VL

TINY_NOTE = "(for photographs and real questions: --model Qwen/Qwen2-VL-2B-Instruct)"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Answers questions about pictures and films with Qwen2-VL. "
        "Answers go to stdout, all else to stderr."
    )
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    for kind, what in (("image", "a picture"), ("video", "a film, or a folder of its frames")):
        item = partial(lambda kind, source: {"type": kind, kind: source}, kind)
        more = {"dest": "media", "action": "append", "type": item, "default": [], "metavar": "FILE"}
        add(f"--{kind}", **more, help=f"{what}: a file or an address; repeat for several")
    add(
        "--fps",
        type=float,
        metavar="R",
        help="frames of a film to look at for each second (default: 2)",
    )
    add(
        "--nframes",
        type=int,
        metavar="N",
        help="frames of a film to look at in all, in place of --fps",
    )
    add("--prompt", help='the question (default with pictures: "Describe this image.")')
    add("--system", help="the system message, in place of the default one")
    add(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="a checkpoint folder or hub name (default: the bundled tiny one)",
    )
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        help="(default: the checkpoint's)",
    )
    add("--quantize", choices=("int8", "int4"), help="the decoder's weights in so many bits")
    add(
        "--attention",
        choices=("auto", "plain", "sdpa", "flash"),
        default="auto",
        help="(default: auto)",
    )
    flag("--cuda-graph", help="record the decode step as a CUDA graph and replay it")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    group = parser.add_argument_group(
        "sampling", "what is not given comes from the model's generation_config.json"
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0: always the most probable token"
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="draw among the K most probable tokens; 0: all"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the most probable that sum to P; 1: all",
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: avoid what was said; 1: off"
    )
    group.add_argument("--seed", type=int, help="make sampled answers repeatable")
    add(
        "--min-pixels",
        type=int,
        metavar="N",
        help="enlarge smaller pictures and frames to at least this area",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help="shrink larger pictures and frames to at most this area",
    )
    flag("--add-vision-id", help='number the pictures and films for the model ("Picture 1: ")')
    flag(
        "--chat", help="go on with further questions, pictures and films; /help lists the commands"
    )
    add(
        "--batch",
        metavar="JSONL",
        help="answer many conversations, one on each line; the answers go to --out",
    )
    add(
        "--out",
        metavar="JSONL",
        help="the answers of --batch; what is there already is not answered again",
    )
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="conversations answered at once (default: 8)",
    )
    flag("--dry-run", help="only count pixels, tokens and memory, without loading the weights")
    add("--draw", metavar="FILE", help="paint the boxes of the answer into a copy of the picture")
    flag("--logprobs", help="print each token with its probability and the runners-up")
    flag("--explain", help="print the way of the question through the model, with all numbers")
    add(
        "--report",
        metavar="HTML",
        help="write a page that shows what each word of the answer looked at",
    )
    flag("--quiet", help="print nothing but the answer and errors")
    arguments = parser.parse_args(argv)
    if not (arguments.prompt is not None or arguments.media or arguments.chat or arguments.batch):
        parser.error("give --image, --video, --prompt, --chat or --batch")
    pictures = [item for item in arguments.media if item["type"] == "image"]
    if arguments.draw and len(pictures) != 1:
        parser.error(f"--draw needs exactly one --image, found {len(pictures)}")
    single = ("draw", "logprobs", "explain", "report")
    for name in ("batch", *single) if arguments.chat else single if arguments.batch else ():
        if getattr(arguments, name):
            parser.error(
                f"--{'chat' if arguments.chat else 'batch'} and --{name} do not go together"
            )
    for name in (
        ("logprobs", "explain", "report") if arguments.cuda_graph else ()
    ):  # a replay calls no hooks
        if getattr(arguments, name):
            parser.error(f"--cuda-graph and --{name} do not go together")
    if bool(arguments.batch) != bool(arguments.out):
        parser.error("--batch and --out go together")
    for name in ("max_new_tokens", "min_pixels", "max_pixels", "nframes", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    return arguments


def first_messages(arguments: argparse.Namespace) -> list[dict]:
    """The conversation that the options ask for: a system message, if any, and a question with its media."""
    if arguments.draw:
        from extras import boxes

        boxes.check_path(arguments.draw)  # before any work, as the next ones
    if arguments.report and not Path(arguments.report).parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {arguments.report}: there is no folder {Path(arguments.report).parent}"
        )
    if arguments.batch:
        from extras import batch_file

        batch_file.check(arguments)
    messages = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    options = {
        name: value
        for name in ("fps", "nframes")
        if (value := getattr(arguments, name)) is not None
    }
    content = [item | options if item["type"] == "video" else item for item in arguments.media]
    if arguments.prompt is not None or not (arguments.chat or arguments.batch):
        kind = "image" if any(item["type"] == "image" for item in content) else "video"
        prompt = f"Describe this {kind}." if arguments.prompt is None else arguments.prompt
        content.append({"type": "text", "text": prompt})
    return [*messages, {"role": "user", "content": content}] if content else messages


def choose_sampling(
    arguments: argparse.Namespace, model: Qwen2VL, say: Callable[[str], None]
) -> Sampling:
    """The model's recommended settings with what the command line replaces of them."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given.get("temperature") == 0:
        given = given | {"temperature": 1.0, "do_sample": False}
    elif given.keys() & {"temperature", "top_k", "top_p"}:
        given["do_sample"] = True
    sampling = replace(Sampling.of_model(model), **given)
    if sampling.do_sample:
        values = {name: value for name in names if (value := getattr(sampling, name)) is not None}
        say("sampling: " + ", ".join(f"{name} {value}" for name, value in values.items()))
        if sampling.top_k == 1 and given.keys() & {"temperature", "top_p", "seed"}:
            say(
                "note: top_k is 1 in the model's generation_config.json, which leaves one choice; add --top-k 0"
            )
    return sampling


def peak_memory(device: torch.device) -> str:
    """The most memory this process has held: on the GPU where it runs there, else in RAM."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {device}"
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def loaded(arguments: argparse.Namespace, model: Qwen2VL, seconds: float) -> str:
    """What was loaded, and how long it took."""
    weight, parameters = model.model.norm.weight, list(model.parameters())
    size, form = (
        f"{sum(p.numel() for p in parameters) / 1e6:,.1f} M parameters",
        str(weight.dtype)[len("torch.") :],
    )
    if arguments.quantize:
        size, form = (
            f"{sum(p.nbytes for p in parameters) / 1e6:,.1f} MB",
            f"{form}, the decoder {arguments.quantize}",
        )
    name = arguments.model or "the bundled tiny model, which knows nothing but drawn shapes"
    line = f"loaded {name}: {size}, {form}, {model.model.attention} attention, on {weight.device}, in {seconds:.2f} s"
    return line if arguments.model else f"{line}\n{TINY_NOTE}"


def spent(model: Qwen2VL, batch: Batch, times: list[float]) -> str:
    """What an answer took; times: when the question came, and when each token was there, in seconds."""
    line = f"{batch.input_ids.shape[1]} tokens in, {len(times) - 1} out; "
    line += f"first token after {times[1] - times[0]:.2f} s"
    if len(times) > 2:
        line += f", then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"
    return f"{line}; peak memory {peak_memory(model.model.norm.weight.device)}"


@contextmanager
def watching(
    arguments: argparse.Namespace,
    model: Qwen2VL,
    processor: Processor,
    batch: Batch,
    preparing: float,
) -> Iterator[Callable[[int], None]]:
    """Around the making of an answer: gives the function to call with each token, and at the end does what
    `--logprobs`, `--explain`, `--report` and `--draw` ask for. Boxes are always said, in pixels of the picture.

    preparing: how many seconds the batch took.
    """
    ids, table, trace = [], None, None
    with ExitStack() as stack:
        if arguments.logprobs:
            from extras import logprobs

            table = stack.enter_context(logprobs.Watch(model))
        if arguments.explain:
            from extras import explain

            trace = stack.enter_context(explain.Trace(model))

        def watch(token: int) -> None:
            ids.append(token)
            if table:
                table.chosen(token)

        yield watch
    if table:
        print("\n".join(table.table(processor.tokenizer)), file=sys.stderr)
    if trace:
        print(trace.page(processor, batch, ids, preparing), file=sys.stderr)
    if arguments.report:
        from extras import report

        report.write(arguments.report, model, processor, batch, ids)
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    if arguments.draw or "<|box_start|>" in text or "<|quad_start|>" in text:
        show_boxes(arguments, text, batch)


def show_boxes(arguments: argparse.Namespace, text: str, batch: Batch) -> None:
    """Prints the boxes of an answer to stderr, in pixels of the picture if there is just one, and paints them."""
    from extras import boxes

    found, pictures = (
        boxes.find_boxes(text),
        [media for media in batch.media if media.timestamps is None],
    )
    size, unit = (
        (pictures[0].size, "pixels") if len(pictures) == 1 else ((1000, 1000), "thousandths")
    )
    for box in found if not arguments.quiet else ():
        print(f"{boxes.format_box(box, *size)} ({unit})", file=sys.stderr)
    if arguments.draw and not found:
        warnings.warn(f"the answer has no box, so {arguments.draw} is not written", stacklevel=2)
    elif arguments.draw:
        [source] = [item["image"] for item in arguments.media if item["type"] == "image"]
        boxes.save(load_image(source), found, arguments.draw)
