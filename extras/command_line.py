"""The options of `generate.py`, what they mean together, and the lines that it says about its work on stderr."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from generate import Sampling, Step
from load_weights import find_folder
from media import load_image
from preprocess import Batch, Processor
from qwen2vl import Qwen2VL

TINY_NOTE = "(for photographs and real questions: --model Qwen/Qwen2-VL-2B-Instruct)"


def image_item(source: str) -> dict:
    """Return the content item of an `--image` option."""
    return {"type": "image", "image": source}


def video_item(source: str) -> dict:
    """Return the content item of a `--video` option."""
    return {"type": "video", "video": source}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = argparse.ArgumentParser(
        description="Answers questions about images and videos with Qwen2-VL. "
        "Answers go to stdout, all else to stderr."
    )
    add_input_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    add_mode_options(parser)
    return parser


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is asked."""
    media = {"dest": "media", "action": "append", "default": [], "metavar": "FILE"}
    parser.add_argument(
        "--image", type=image_item, **media, help="an image: a file or a URL; repeat for several"
    )
    parser.add_argument(
        "--video",
        type=video_item,
        **media,
        help="a video, or a directory of its frames: a file or a URL; repeat for several",
    )
    parser.add_argument(
        "--fps", type=float, metavar="R", help="frames of a video for each second (default: 2)"
    )
    parser.add_argument(
        "--nframes", type=int, metavar="N", help="frames of a video in all, in place of --fps"
    )
    parser.add_argument(
        "--min-pixels",
        type=int,
        metavar="N",
        help="enlarge smaller images and frames to at least this area",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="shrink larger images and frames to at most this area",
    )
    parser.add_argument(
        "--prompt", help='the question (default with images: "Describe this image.")'
    )
    parser.add_argument("--system", help="the system message, in place of the default one")
    parser.add_argument(
        "--add-vision-id",
        action="store_true",
        help='number the images and videos for the model ("Picture 1: ")',
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what computes the answer."""
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="a checkpoint directory or hub name (default: the bundled tiny one)",
    )
    parser.add_argument(
        "--processor",
        metavar="DIR_OR_NAME",
        help="a checkpoint whose tokenizer and image settings are used, where --model has none",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        help="(default: the checkpoint's)",
    )
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="the decoder's weights in so many bits"
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "eager", "sdpa", "flash", "plain"),
        default="auto",
        help="(default: auto)",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="capture the decode step as a CUDA graph and replay it",
    )
    parser.add_argument(
        "--debug-nan",
        action="store_true",
        help="name the first layer whose output is NaN or infinite",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how tokens are chosen."""
    group = parser.add_argument_group(
        "sampling", "what is not given comes from the model's generation_config.json"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="end an answer after so many tokens (default: the model's, else 128)",
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
        "--repetition-penalty", type=float, metavar="R", help="above 1: repeat less; 1: off"
    )
    group.add_argument("--seed", type=int, help="make sampled answers repeatable")


def add_mode_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is done with the answer."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="continue with further questions, images and videos; /help lists the commands",
    )
    parser.add_argument(
        "--batch",
        metavar="JSONL",
        help="answer many conversations, one on each line; the answers go to --out",
    )
    parser.add_argument(
        "--out",
        metavar="JSONL",
        help="the answers of --batch; what is there already is not answered again",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="conversations answered at once (default: 8)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only count pixels, tokens and memory, without loading the weights",
    )
    parser.add_argument(
        "--draw", metavar="FILE", help="draw the boxes of the answer into a copy of the image"
    )
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="print each token with its probability and the alternatives",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print the computation from question to answer, with all numbers",
    )
    parser.add_argument(
        "--report",
        metavar="HTML",
        help="write a page that shows what each token of the answer attends to",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing but the answer and errors"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked by themselves and together; ends the program with code 2 if they do not fit."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    problem = (
        missing_option(arguments) or conflicting_options(arguments) or number_problem(arguments)
    )
    if problem:
        parser.error(problem)
    if arguments.prompt is not None:
        arguments.prompt = recover_utf8(arguments.prompt, sys.getfilesystemencoding())
    if arguments.system is not None:
        arguments.system = recover_utf8(arguments.system, sys.getfilesystemencoding())
    return arguments


def missing_option(arguments: argparse.Namespace) -> str | None:
    """Return what must be given besides, or None."""
    if not (arguments.prompt is not None or arguments.media or arguments.chat or arguments.batch):
        return "give --image, --video, --prompt, --chat or --batch"
    images = [item for item in arguments.media if item["type"] == "image"]
    if arguments.draw and len(images) != 1:
        return f"--draw needs exactly one --image, found {len(images)}"
    return None


def conflicting_options(arguments: argparse.Namespace) -> str | None:
    """Return which options do not go together, or None."""
    single = ["draw", "logprobs", "explain", "report"]
    conflicts = []
    if arguments.chat:
        conflicts += [("chat", name) for name in ["batch", *single]]
    elif arguments.batch:
        conflicts += [("batch", name) for name in single]
    if arguments.cuda_graph:  # a replay calls no hooks, and gives no attention
        conflicts += [
            ("cuda-graph", name) for name in ["logprobs", "explain", "report", "debug_nan"]
        ]
    for first, second in conflicts:
        if getattr(arguments, second):
            return f"--{first} and --{second.replace('_', '-')} do not go together"
    if bool(arguments.batch) != bool(arguments.out):
        return "--batch and --out go together"
    return None


def number_problem(arguments: argparse.Namespace) -> str | None:
    """Return which number is out of its range, or None. Those of the sampling are checked by `Sampling`."""
    for name in ("max_new_tokens", "min_pixels", "max_pixels", "nframes", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')} is {value}, expected 1 or more"
    if arguments.fps is not None and not (arguments.fps > 0 and math.isfinite(arguments.fps)):
        return f"--fps is {arguments.fps}, expected a number above 0"
    least, most = arguments.min_pixels, arguments.max_pixels
    if least is not None and most is not None and least > most:
        return f"--min-pixels is {least}, expected at most --max-pixels, {most}"
    return None


# ----------------------------------------------------------------------------------- streams and errors
def recover_utf8(text: str, encoding: str) -> str:
    """Return text whose bytes did not fit `encoding` (surrogate escapes) as the UTF-8 that they are, if they are."""
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return text.encode(encoding, errors="surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def prepare_streams() -> None:
    """Make stdin and the outputs lose nothing in any encoding: what does not fit is written as an escape.

    For a program at its start. A closed output is replaced by one that drops everything.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")


def put(text: str, end: str = "") -> None:
    """Write a piece of the answer to stdout at once. Raises OSError that names stdout."""
    with naming("the answer to stdout"):
        print(text, end=end, flush=True)


def close_output(code: int) -> int:
    """Write what is still buffered for stdout, and return the exit code, which a failure changes.

    Python would do it at exit, where an error is a traceback.
    """
    try:
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = 141
    except OSError as error:
        if code == 0:  # else it has been said
            print(f"generate.py: cannot write to stdout: {error.strerror}", file=sys.stderr)
        code = 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy or PyTorch means that memory does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = (
        "DefaultCPUAllocator",
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "Storage size calculation overflowed",
        "integer multiplication overflow",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def error_sentence(error: BaseException) -> str | None:
    """Return one sentence about an error that the user can do something about, else None."""
    if is_out_of_memory(error):
        detail = " ".join(str(error).split())[:160]
        found = f" ({detail})" if detail else ""
        return (
            f"out of memory{found}: lower --max-pixels, --nframes, --max-new-tokens or --batch-size, "
            "or use --quantize"
        )
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    return None


def first_messages(arguments: argparse.Namespace) -> list[dict]:
    """Return the conversation that the options ask for: a system message, if any, and a question with its media.

    Raises OSError or ValueError for options that cannot be used, before any work.
    """
    sampling_options(arguments)
    if arguments.draw:
        from extras import boxes

        boxes.check_path(arguments.draw)
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


def sampling_options(arguments: argparse.Namespace) -> dict:
    """Return the fields of `Sampling` that the command line gives. Raises ValueError for one out of its range."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    options = {}
    for name in names:
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if options.get("temperature") == 0:
        options |= {"temperature": 1.0, "do_sample": False}
    elif options.keys() & {"temperature", "top_k", "top_p"}:
        options["do_sample"] = True
    Sampling(**options)
    return options


def load_processor(arguments: argparse.Namespace, folder: Path) -> Processor:
    """Return the processor of `--processor`, or that of the checkpoint in `folder`.

    Raises FileNotFoundError, which mentions the option, or ValueError.
    """
    bounds = arguments.min_pixels, arguments.max_pixels
    if arguments.processor is not None:
        return Processor.from_pretrained(find_folder(arguments.processor, weights=False), *bounds)
    try:
        return Processor.from_pretrained(folder, *bounds)
    except FileNotFoundError as error:
        hint = "if it was published without, name a checkpoint that has it with --processor"
        raise FileNotFoundError(f"{error} ({hint})") from error


def choose_sampling(
    arguments: argparse.Namespace, model: Qwen2VL, say: Callable[[str], None]
) -> Sampling:
    """Return the model's recommended settings with what the command line replaces of them."""
    options = sampling_options(arguments)
    sampling = Sampling.of_model(model, **options)
    if not sampling.do_sample:
        return sampling
    values = [f"temperature {sampling.temperature}", f"top_k {sampling.top_k}"]
    values += [f"top_p {sampling.top_p}", f"repetition_penalty {sampling.repetition_penalty}"]
    if sampling.seed is not None:
        values.append(f"seed {sampling.seed}")
    say("sampling: " + ", ".join(values))
    if sampling.top_k == 1 and options.keys() & {"temperature", "top_p", "seed"}:
        say(
            "note: top_k is 1 in the model's generation_config.json, which leaves one choice; "
            "add --top-k 0"
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
    line = f"loaded {name}: {size}, {form}, {model.attn_implementation} attention, "
    line += f"on {weight.device}, in {seconds:.2f} s"
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
) -> Iterator[Callable[[Step], None]]:
    """Around the making of an answer: gives the function to call with each step, and at the end does what
    `--logprobs`, `--explain`, `--report` and `--draw` ask for. Boxes are always printed, in pixels of the image.

    preparing: how many seconds the batch took.
    """
    ids, table, trace = [], None, None
    with ExitStack() as stack:
        if arguments.logprobs:
            from extras import logprobs

            table = logprobs.Watch()
        if arguments.explain:
            from extras import explain

            trace = stack.enter_context(explain.Trace(model))

        def watch(step: Step) -> None:
            [token] = step.tokens
            ids.append(token)
            if table:
                table.chosen(token, step.logits[0])

        yield watch
    if table:
        print("\n".join(table.table(processor.tokenizer)), file=sys.stderr)
    if trace:
        print(trace.page(processor, batch, ids, preparing), file=sys.stderr)
    if arguments.report:
        from extras import report

        with naming(arguments.report):
            report.write(arguments.report, model, processor, batch, ids)
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    if arguments.draw or "<|box_start|>" in text or "<|quad_start|>" in text:
        with naming(arguments.draw):
            show_boxes(arguments, text, batch)


@contextmanager
def naming(path: str | None) -> Iterator[None]:
    """Within it, an OSError of a write that does not name its file names `path`."""
    try:
        yield
    except BrokenPipeError:  # not a failure: nobody reads any more
        raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error


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
