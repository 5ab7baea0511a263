"""What `generate.py` and the apps share: options, loading, status lines and the error boundary.

    parser = build_parser("Answer a question about images and videos with Qwen2-VL.")
    arguments = parse_arguments(parser, argv)
    session = open_session(arguments)  # processor, batch, model

Answers go to stdout, all else to stderr. What a user can fix is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

import linear
import memory
import prompt_lookup
import startup
from adapters import find_adapters
from checkpoint_checks import check_eos_token_ids
from checkpoint_files import check_supported, find_checkpoint, find_format
from conversations import content_kind
from debug_nan import watch_modules
from load_weights import (
    checkpoint_dtype,
    choose_attention,
    find_device,
    load_config,
    load_model,
    read_config,
    read_generation_config,
)
from media import DEFAULT_LIMITS, MediaLimits, file_url_path
from output_files import check_output
from preprocess import Batch, Processor, holds_image_settings
from qwen2vl import Qwen2VL
from tokenizer_files import holds_tokenizer

logger = logging.getLogger("qwen2vl")

BUNDLED_CHECKPOINT = Path(__file__).parent / "tiny" / "checkpoint"
BUNDLED_NOTE = "(for photographs and real questions: --model Qwen/Qwen2-VL-2B-Instruct)"


# ------------------------------------------------------------------------------------------ options
def build_parser(
    description: str, program: str | None = None, has_question: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the options of every program that answers questions.

    program: how it is called, where that is not the name of its file.
    has_question: whether options give the question; else the program reads questions from a file.
    """
    # Abbreviated, `--prompt` would mean `--prompt-lookup` in a program without the former.
    parser = argparse.ArgumentParser(program, description=description, allow_abbrev=False)
    if has_question:
        add_question_options(parser)
    add_media_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing but the answer, warnings and errors"
    )
    return parser


def image_item(source: str) -> dict:
    """Return the content item of an `--image` option."""
    return {"type": "image", "image": source}


def video_item(source: str) -> dict:
    """Return the content item of a `--video` option."""
    return {"type": "video", "video": source}


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is asked."""
    media: dict[str, Any] = {"dest": "media", "action": "append", "default": [], "metavar": "FILE"}
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
        "--prompt", help='the question (default with images: "Describe this image.")'
    )
    parser.add_argument("--system", help="the system message, in place of the default one")


def add_media_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how images and videos become input of the model."""
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
        "--max-image-pixels",
        type=int,
        metavar="N",
        default=DEFAULT_LIMITS.max_image_pixels,
        help="refuse image files of more pixels, which cost memory before they are shrunk "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-download-mb",
        type=int,
        metavar="N",
        default=DEFAULT_LIMITS.max_download_bytes // 10**6,
        help="refuse images and videos of more megabytes from a URL (default: %(default)s)",
    )
    parser.add_argument(
        "--add-vision-id",
        action="store_true",
        help='number the images and videos for the model ("Picture 1: ")',
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what computes the answer."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="a checkpoint directory or hub name, or that of a LoRA adapter, which is merged into "
        "its base model (default: the bundled tiny one)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR_OR_NAME",
        help="a LoRA adapter that is merged into --model; repeat for several",
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
        "--quantize",
        choices=("int8", "int4"),
        help="bits of the decoder's weights, where the checkpoint's are not quantized yet",
    )
    parser.add_argument(
        "--check-weights",
        action="store_true",
        help="read all weights first, and name those that are NaN, infinite or zeros alone",
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "eager", "sdpa", "flash", "plain"),
        default="auto",
        help="attention implementation (default: auto; plain is the former name of eager)",
    )
    parser.add_argument(
        "--debug-nan",
        action="store_true",
        help="name the first layer whose output is NaN or infinite",
    )
    add_memory_check_option(parser)


def add_memory_check_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of each program that loads a model."""
    parser.add_argument(
        "--no-memory-check",
        dest="memory_check",
        action="store_false",
        help="start even where the estimated memory exceeds what is free",
    )


def add_cuda_graph_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the programs that only generate: generate.py, chat and batch."""
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="capture the decode step as a CUDA graph and replay it",
    )


def add_prompt_lookup_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the programs that only generate, as `add_cuda_graph_option`."""
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="guess tokens that repeat earlier ones and verify several at once: faster where "
        "answers repeat the prompt; in 16 bits rounding may change an answer",
    )


def add_batch_size_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the programs that read a file of questions: batch and estimate."""
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="how many questions of a file are answered together (default: 8)",
    )


def add_reorder_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the programs that decode several questions together, batch and estimate."""
    parser.add_argument(
        "--no-reorder",
        dest="reorder",
        action="store_false",
        help="on a CPU, do not keep the decoder's weights a second time, in the order in which a "
        "batch is multiplied faster: less memory",
    )


def add_output_options(
    parser: argparse.ArgumentParser, metavar: str, help: str, default: str | None = None
) -> None:
    """Add --out and --force, the options of the programs that write one file."""
    parser.add_argument("--out", metavar=metavar, default=default, help=help)
    parser.add_argument(
        "--force", action="store_true", help="replace the file of --out if it exists"
    )


def input_paths(arguments: argparse.Namespace) -> list[str | Path]:
    """Return the files and directories that the options name as inputs."""
    paths: list[str | Path] = [arguments.model or BUNDLED_CHECKPOINT]
    if arguments.processor is not None:
        paths.append(arguments.processor)
    paths += arguments.adapter
    for item in getattr(arguments, "media", []):  # not each program has --image
        if item.get("type") not in ("image", "video"):
            continue
        source = item[item["type"]]
        if source.lower().startswith("file://"):
            source = file_url_path(source)
        paths.append(source)
    return paths


def check_output_options(arguments: argparse.Namespace) -> None:
    """Raise OSError or ValueError if --out cannot be written, is an input, or exists.

    Called before anything is loaded.
    """
    if arguments.out is not None:
        check_output(arguments.out, input_paths(arguments), arguments.force)


def check_cuda_graph_option(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with one sentence and exit code 2 where --cuda-graph conflicts with another option."""
    if arguments.cuda_graph and arguments.debug_nan:
        parser.error("--cuda-graph and --debug-nan exclude each other: a replay calls no modules")


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
        "--min-p",
        type=float,
        metavar="P",
        help="leave out tokens of less than P times the probability of the most probable; 0: off",
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: repeat less; 1: off"
    )
    group.add_argument("--seed", type=int, help="make sampled answers repeatable")
    group.add_argument(
        "--stop",
        type=stop_string,
        action="append",
        metavar="TEXT",
        help="end an answer before this text; repeat for several",
    )


def stop_string(text: str) -> str:
    """Return the text of a `--stop` option. Raises an error of argparse for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("expected text, got an empty string")
    return recover_utf8(text, sys.getfilesystemencoding())


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None, needs_question: bool = True
) -> argparse.Namespace:
    """Return the options, checked by themselves and together.

    Exits with code 2 as argparse does.
    """
    arguments = parser.parse_args(argv)
    problem = number_problem(arguments)
    if needs_question and arguments.prompt is None and not arguments.media:
        problem = "expected --image, --video or --prompt, got none of them"
    if problem is not None:
        parser.error(problem)
    for name in ("prompt", "system"):
        text = getattr(arguments, name, None)
        if text is not None:
            setattr(arguments, name, recover_utf8(text, sys.getfilesystemencoding()))
    return arguments


def number_problem(arguments: argparse.Namespace) -> str | None:
    """Return which number is out of its range, or None.

    `GenerationConfig` checks those of sampling.
    """
    counts = ["max_new_tokens", "min_pixels", "max_pixels", "nframes", "batch_size"]
    counts += ["max_image_pixels", "max_download_mb"]
    for name in counts:
        value = getattr(arguments, name, None)  # not every program has all of them
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')} is {value}, expected 1 or more"
    if arguments.fps is not None and not (arguments.fps > 0 and math.isfinite(arguments.fps)):
        return f"--fps is {arguments.fps}, expected a number above 0"
    least = arguments.min_pixels
    most = arguments.max_pixels
    if least is not None and most is not None and least > most:
        return f"--min-pixels is {least}, expected at most --max-pixels, {most}"
    return None


def video_options(arguments: argparse.Namespace) -> dict:
    """Return --fps and --nframes as options of a video item, those that are given."""
    options = {}
    if arguments.fps is not None:
        options["fps"] = arguments.fps
    if arguments.nframes is not None:
        options["nframes"] = arguments.nframes
    return options


def read_media(processor: Processor, messages: list[dict], options: dict) -> list[dict]:
    """Return messages with their images and videos read.

    options: those of videos that have no rate of their own. Raises what `Processor.prepare` raises.
    """
    result = []
    for message in messages:
        items = []
        for item in message["content"]:
            kind = content_kind(item)
            if kind == "video" and item.get("fps") is None and item.get("nframes") is None:
                item = item | options
            if kind != "text":
                item = {"type": kind, kind: processor.prepare(item)}
            items.append(item)
        result.append(message | {"content": items})
    return result


def media_limits(arguments: argparse.Namespace) -> MediaLimits:
    """Return what one image or video of the options may cost."""
    return MediaLimits(
        max_image_pixels=arguments.max_image_pixels,
        max_download_bytes=arguments.max_download_mb * 10**6,
    )


def media_items(arguments: argparse.Namespace) -> list[dict]:
    """Return the content items of --image and --video, in their order."""
    items = []
    for item in arguments.media:
        if item["type"] == "video":
            item = item | video_options(arguments)
        items.append(item)
    return items


def system_messages(arguments: argparse.Namespace) -> list[dict]:
    """Return the message of --system in a list, which is empty without the option."""
    if arguments.system is None:
        return []
    return [{"role": "system", "content": arguments.system}]


def build_messages(arguments: argparse.Namespace) -> list[dict]:
    """Return the conversation of the options: a system message, if any, and one question."""
    content = media_items(arguments)
    prompt = arguments.prompt
    if prompt is None:
        has_image = any(item["type"] == "image" for item in content)
        prompt = "Describe this image." if has_image else "Describe this video."
    content.append({"type": "text", "text": prompt})
    return [*system_messages(arguments), {"role": "user", "content": content}]


def sampling_options(arguments: argparse.Namespace) -> dict:
    """Return the fields of `generate.GenerationConfig` that the command line gives."""
    options = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        value = getattr(arguments, name)
        if value is not None:
            options[name] = value
    if arguments.stop is not None:
        options["stop_strings"] = arguments.stop
    if getattr(arguments, "prompt_lookup", False):  # not every program has it
        options["prompt_lookup_num_tokens"] = prompt_lookup.DEFAULT_NUM_TOKENS
    if options.get("temperature") == 0:
        options |= {"temperature": 1.0, "do_sample": False}
    elif options.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        options["do_sample"] = True
    return options


# ------------------------------------------------------------------------------------------ loading
class Session(NamedTuple):
    """Everything that is needed to answer one question."""

    processor: Processor
    batch: Batch
    model: Qwen2VL
    seconds: float  # that the batch took


def open_session(arguments: argparse.Namespace) -> Session:
    """Preprocess the question, then load the model.

    Raises OSError or ValueError with one sentence for whatever the user can fix.
    """
    directory, processor = load_processor(arguments)
    # Before the model: a wrong path should not wait until the weights are loaded.
    start = time.perf_counter()
    batch = processor(build_messages(arguments), add_vision_id=arguments.add_vision_id)
    seconds = time.perf_counter() - start
    for media in batch.media:
        logger.info(media.summary(processor.image_config))
    run = checked_run(arguments, directory)
    model = load_checkpoint(arguments, directory, processor, run, batch, few_tokens=True)
    return Session(processor, batch, model, seconds)


def load_processor(arguments: argparse.Namespace, weights: bool = True) -> tuple[Path, Processor]:
    """Return the directory of --model, and the processor of --processor or of that checkpoint.

    Where --model is an adapter, the directory is that of its base model, and `arguments.adapter`
    becomes the list of the directories of all adapters, so that a hub name is looked up only once.
    Tokenizer and image settings come from the last adapter that holds them, else from the model.
    weights: whether those are downloaded, too. Raises OSError or ValueError.
    """
    name = arguments.model or BUNDLED_CHECKPOINT
    directory, arguments.adapter = find_adapters(name, arguments.adapter, weights)
    check_supported(directory)  # first: what is wrong is the checkpoint, not a file that it lacks
    limits = (arguments.min_pixels, arguments.max_pixels, media_limits(arguments))
    source = directory
    tokenizer_source = None
    if arguments.processor is not None:
        source = find_checkpoint(arguments.processor, weights=False)
    else:
        for adapter in arguments.adapter:
            if holds_tokenizer(adapter):
                tokenizer_source = adapter
            if holds_image_settings(adapter):
                source = adapter
        tokenizer_source = tokenizer_source or directory
    try:
        processor = Processor.from_pretrained(source, *limits, tokenizer_source)
    except FileNotFoundError as error:
        if arguments.processor is not None:
            raise
        hint = "if it was published without, name a checkpoint that has it with --processor"
        raise FileNotFoundError(f"{error} ({hint})") from error
    check_processor(processor, source, directory)
    return directory, processor


def check_processor(processor: Processor, source: Path, directory: Path) -> None:
    """Raise ValueError if the processor in `source` contradicts config.json in `directory`.

    Before any image is read, as sizes that are wrong can take any amount of memory.
    """
    config, _ = read_config(directory)  # warnings about it come when the model is loaded
    try:
        processor.check_model(config)
    except ValueError as error:
        raise ValueError(
            f"the processor in {source} does not fit {directory / 'config.json'}: {error}"
        ) from error


def open_run(arguments: argparse.Namespace, directory: Path) -> memory.Run:
    """Return the run that the options describe. Raises OSError or ValueError as loading does."""
    config = load_config(directory)
    if arguments.dtype is None:
        dtype = checkpoint_dtype(directory)
    else:
        dtype = getattr(torch, arguments.dtype)
    device = find_device(arguments.device)
    attention = choose_attention(arguments.attention, device, dtype)
    run = memory.Run(config, device, dtype, attention, arguments.quantize, arguments.max_new_tokens)
    run.generation_config = read_generation_config(directory, config.vocab_size)
    run.stored_dtypes = memory.read_stored_dtypes(directory, config, arguments.adapter)
    run.pack = memory.layer_packer(directory, config, set(run.stored_dtypes))
    format = find_format(directory)
    if format is not None:
        run.dequantized_from = format.name
    return run


def checked_run(arguments: argparse.Namespace, directory: Path) -> memory.Run | None:
    """Return the run that the memory check is for, None with --no-memory-check.

    For a program at its start: what loading warns of is not said here, and the filter of warnings
    belongs to the whole process.
    """
    if not arguments.memory_check:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_run(arguments, directory)


def load_checkpoint(
    arguments: argparse.Namespace,
    directory: Path,
    processor: Processor,
    run: memory.Run | None,
    batch: Batch | None = None,
    few_tokens: bool = False,
) -> Qwen2VL:
    """Return the model that the options describe; a status line says how long it took.

    run: of `checked_run`, so that memory which cannot suffice is named before the weights are
    loaded. batch: the first one that the model answers, if it is known. few_tokens: as for
    `load_model`. Raises OSError or ValueError.
    """
    if run is not None:
        memory.check_weights_and_batch(run, batch)
    start = time.perf_counter()
    dtype = None
    if arguments.dtype is not None:
        dtype = getattr(torch, arguments.dtype)
    model = load_model(
        directory,
        arguments.device,
        dtype,
        arguments.attention,
        arguments.quantize,
        arguments.adapter,
        arguments.check_weights,
        few_tokens,
    )
    check_vocabulary(processor, model, directory)
    if arguments.debug_nan:
        watch_modules(model)
    line = describe_model(arguments, model, time.perf_counter() - start)
    format = find_format(directory)
    if format is not None:
        line += f"\ndequantized from {format.name}: the weights take the memory of plain ones"
    logger.info(line)
    return model


def check_vocabulary(processor: Processor, model: Qwen2VL, directory: Path) -> None:
    """Raise ValueError if the tokenizer or eos_token_id has ids that the model has no row for."""
    config = model.config
    if model.generation_config.get("eos_token_id") is None:  # else it was checked when it was read
        path = directory / "config.json"
        check_eos_token_ids({"eos_token_id": config.eos_token_id}, config.vocab_size, path)
    largest_id = processor.tokenizer.largest_id
    if largest_id >= config.vocab_size:
        raise ValueError(
            f"{directory / 'config.json'}: vocab_size: expected more than {largest_id}, the "
            f"largest id in the tokenizer files, got {config.vocab_size}"
        )


# ------------------------------------------------------------------------------------- status lines
class StderrHandler(logging.Handler):
    """Write each record as a line to what is stderr at that moment.

    A closed or full one loses the line alone.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(record.getMessage(), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # an answer is worth more than a status line
            return


def set_up_logging(quiet: bool) -> None:
    """Send the status lines of this project to stderr; quiet: warnings only."""
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
        logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def describe_model(arguments: argparse.Namespace, model: Qwen2VL, seconds: float) -> str:
    """Return what was loaded, and how long it took."""
    weight = model.model.norm.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    methods = linear.quantization_methods(model)
    if methods:
        size = f"{linear.stored_bytes(model) / 1e6:,.1f} MB"
        dtype += f", the decoder {' and '.join(methods)}"
    else:
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
    name = arguments.model or "the bundled tiny model, which knows nothing but drawn shapes"
    if arguments.adapter:
        noun = "adapter" if len(arguments.adapter) == 1 else "adapters"
        size += f", {len(arguments.adapter)} {noun} merged"
    line = f"loaded {name}: {size}, {dtype}, {model.attn_implementation} attention, "
    line += f"on {weight.device}, in {seconds:.2f} s"
    if not arguments.model:
        line += f"\n{BUNDLED_NOTE}"
    return line


def describe_answer(model: Qwen2VL, prompt_tokens: int, times: list[float]) -> str:
    """Return what an answer took.

    times: when the question came, and when each token was there, in seconds.
    """
    line = f"{prompt_tokens} tokens in, {len(times) - 1} out; "
    line += f"first token after {times[1] - times[0]:.2f} s"
    if len(times) > 2:
        line += f", then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"
    return f"{line}; peak memory {peak_memory(model.model.norm.weight.device)}"


def peak_memory(device: torch.device) -> str:
    """Return the most memory this process has held: on the GPU where it runs there, else in RAM."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {device}"
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


# ------------------------------------------------------------------- streams and the error boundary
def recover_utf8(text: str, encoding: str) -> str:
    """Return text with surrogate escapes decoded as UTF-8, where that is what its bytes are.

    Surrogate escapes hold the bytes that did not fit `encoding`.
    """
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return text.encode(encoding, errors="surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def prepare_streams() -> None:
    """Make stdin and the outputs lose nothing in any encoding.

    What does not fit is written as an escape.
    For a program at its start. A closed output is replaced by one that drops everything, and so is
    what stderr cannot take.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    sys.stderr = lossy_stream(sys.stderr)
    set_error_handler(sys.stdout, "backslashreplace")
    set_error_handler(sys.stdin, "surrogateescape")


class LossyFile(io.RawIOBase):
    """Drops what cannot be written: an answer is worth more than a note on a full disk."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        try:
            return os.write(self.descriptor, data)
        except OSError:
            return len(data)


def lossy_stream(stream: TextIO) -> TextIO:
    """Return a text stream to the same file that never fails."""
    file = io.BufferedWriter(LossyFile(stream.fileno()))
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)


def set_error_handler(stream: TextIO | None, errors: str) -> None:
    """Set how a standard stream treats what does not fit its encoding, if it has one."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def put(text: str, end: str = "") -> None:
    """Write a piece of the answer to stdout at once. Raises OSError naming stdout."""
    with naming("the answer to stdout"):
        print(text, end=end, flush=True)


def close_output(program: str, code: int) -> int:
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
            print(f"{program}: cannot write to stdout: {error.strerror}", file=sys.stderr)
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
            f"out of memory{found}: lower --max-pixels, --nframes, --max-new-tokens "
            "or --batch-size, or use --quantize"
        )
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    return None


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


def run_main(program: str, run: Callable, arguments: argparse.Namespace) -> int:
    """Run a program and return its exit code.

    0, or 2 after one sentence on stderr about what was wrong; 130 after Ctrl-C,
    141 where nobody reads stdout.
    """
    set_up_logging(arguments.quiet)
    try:
        run(arguments)
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return startup.INTERRUPTED
    except Exception as error:
        sentence = error_sentence(error)
        if sentence is None:
            raise
        print(f"{program}: {sentence}", file=sys.stderr)
        return 2
    return 0


def run_program(
    program: str, main: Callable[[], int], decodes: bool = True, needs_stdout: bool = True
) -> None:
    """Run `main` as the whole process, and exit with its code, or with 130 or 143 after a signal.

    decodes: false for a program that trains, for which the kernel that decodes fastest in bfloat16
    is the slowest: it takes 70 times as long for 512 rows, forward and backward.
    needs_stdout: whether the answer goes there; then a closed one is an error.
    """
    try:
        startup.handle_signals()
        startup.end_imports()
        warnings.formatwarning = lambda message, *_: f"{program}: {message}\n"  # without the code
        if decodes:
            linear.prefer_pytorch_gemv()
        is_closed = sys.stdout is None
        prepare_streams()
        if needs_stdout and is_closed:
            print(f"{program}: stdout is closed, expected it open for the answer", file=sys.stderr)
            code = 2
        else:
            code = main()
        startup.ignore_interrupts()
    except KeyboardInterrupt:
        startup.ignore_interrupts()
        code = startup.INTERRUPTED
    except SystemExit as error:  # of argparse, or of SIGTERM
        startup.ignore_interrupts()
        code = error.code if isinstance(error.code, int) else 0
    sys.exit(close_output(program, code))
