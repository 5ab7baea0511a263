"""Trace one question through the model: prompt, positions, shapes, parameters, FLOPs, time, cache.

    python -m apps.trace --image examples/shapes.png

Two runs: the first (two tokens, and warm-up) counts FLOPs with `torch.utils.flop_counter`, the
second measures time. All vision blocks are alike, and so are all decoder layers, so the modules
inside are shown for the first one.

FLOPs are 2·m·n·k for a matmul [m, k] @ [k, n], and those of attention, masked scores included.
Norms, RoPE, softmax and activations are not counted, nor is attention by flash-attn, whose
kernel the counter does not know. Times include the forward hooks, and on CUDA a
synchronization around each module.
"""

import argparse
import re
import textwrap
import time
import warnings
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import command_line
from apps.logprobs import format_table, score_token
from apps.prompt_spans import Span, get_positions, prompt_text, split_prompt
from generate import GenerationConfig, Step, choose_generation_config, generate_steps
from preprocess import Batch, Processor
from qwen2vl import Config, KVCache, Qwen2VL

WIDTH = 110  # columns of a line of text
MAX_ROWS = 10  # of a list; the middle of a longer one is left out
VISION = ("visual.patch_embed", "visual.blocks", "visual.merger")
DECODER = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
TRACED = re.compile(
    r"visual\.(patch_embed|blocks\.\d+|blocks\.0\..+|merger|merger\..+)"
    r"|model\.(embed_tokens|layers\.\d+|layers\.0\..+|norm)|lm_head"
)


# -------------------------------------------------------------------------------------------- FLOPs
def linear_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs for x [..., in] and weight [out, in], also if that is packed along `in`."""
    return 2 * x.numel() * weight[0]


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


# Kernels of PyTorch on the CPU that its counter does not know.
KERNEL_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._weight_int8pack_mm: linear_flops,
    torch.ops.aten._weight_int4pack_mm_for_cpu: linear_flops,
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    torch.ops.aten.addmv: lambda bias, matrix, *_, **__: 2 * matrix.numel(),
}
if torch.backends.mkldnn.is_available():
    KERNEL_FLOPS[torch.ops.mkldnn._linear_pointwise] = linear_flops


# ---------------------------------------------------------------------------------------- recording
class Call(NamedTuple):
    """One call of a module."""

    input_shape: list[int]
    output_shape: list[int]
    flops: int
    seconds: float


class Recorder:
    """Record the calls of a model's modules inside `with`, through forward hooks.

    calls: by module name, in the order of the checkpoint. cache: the KV cache
    of the last call of the model.
    """

    def __init__(self, model: Qwen2VL, counter: FlopCounterMode | None = None):
        self.model = model
        self.counter = counter
        self.calls: dict[str, list[Call]] = {}
        self.cache: KVCache | None = None
        self.starts: list[tuple[int, float]] = []  # of the running modules, outermost first
        self.handles = []

    def __enter__(self) -> "Recorder":
        self.handles.append(self.model.register_forward_pre_hook(self.keep_cache, with_kwargs=True))
        for name, module in self.model.named_modules():
            if TRACED.fullmatch(name) and list(module.parameters()):
                self.calls[name] = []
                finish = partial(self.finish, self.calls[name])
                self.handles.append(module.register_forward_pre_hook(self.start))
                self.handles.append(module.register_forward_hook(finish))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def keep_cache(self, module: nn.Module, inputs: tuple, kwargs: dict) -> None:
        self.cache = kwargs.get("cache")

    def now(self) -> tuple[int, float]:
        """Return the FLOPs counted so far and the time in seconds."""
        device = self.model.model.norm.weight.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        flops = self.counter.get_total_flops() if self.counter else 0
        return flops, time.perf_counter()

    def start(self, module: nn.Module, inputs: tuple) -> None:
        self.starts.append(self.now())

    def finish(self, calls: list[Call], module: nn.Module, inputs: tuple, output: Tensor) -> None:
        flops, seconds = self.now()
        start_flops, start_seconds = self.starts.pop()
        shapes = (list(inputs[0].shape), list(output.shape))
        calls.append(Call(*shapes, flops - start_flops, seconds - start_seconds))


class Trace(NamedTuple):
    """What was recorded of one question."""

    calls: dict[
        str, list[Call]
    ]  # of the vision encoder: images, videos; else: prefill, first decode step
    steps: list[Step]
    cache: KVCache


def record(
    model: Qwen2VL, batch: Batch, max_new_tokens: int | None, config: GenerationConfig | None = None
) -> Trace:
    """Answer a batch of one conversation twice: for the FLOPs, then for the time and the answer."""
    counter = FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS)
    with counter, Recorder(model, counter) as counted:
        for _ in islice(generate_steps(model, batch, max_new_tokens, config), 2):
            pass  # the prefill and one decode step
    with Recorder(model) as timed:
        steps = list(generate_steps(model, batch, max_new_tokens, config))
    calls = {}
    for name in counted.calls:
        pairs = zip(counted.calls[name], timed.calls[name], strict=False)
        calls[name] = [call._replace(seconds=again.seconds) for call, again in pairs]
        if calls[name] and calls[name][0].flops == 0 and is_linear(model.get_submodule(name)):
            warnings.warn(f"FLOPs are too low: the kernel of {name} is not counted", stacklevel=2)
    return Trace(calls, steps, timed.cache)


def is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding)


# --------------------------------------------------------------------------------------------- text
def format_count(number: int) -> str:
    """Return "1,234,567", or "45.2 M", "1.2 G", "3.4 T" from ten million on."""
    if number < 1e7:
        return f"{number:,}"
    if number < 1e9:
        return f"{number / 1e6:.1f} M"
    if number < 1e12:
        return f"{number / 1e9:.1f} G"
    return f"{number / 1e12:,.1f} T"


def abridge(lines: list[str]) -> list[str]:
    if len(lines) <= MAX_ROWS:
        return lines
    half = MAX_ROWS // 2
    return [*lines[:half], f"  … {len(lines) - 2 * half:,} more …", *lines[-half:]]


def wrap(text: str) -> list[str]:
    return abridge(textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  "))


def heading(title: str) -> str:
    return f"{title:<33}{'shapes':<37}{'parameters':>14}{'FLOPs':>11}{'time (ms)':>10}"


def format_row(name: str, call: Call, parameters: str = "") -> str:
    shapes = f"{call.input_shape} → {call.output_shape}" if call.input_shape else ""
    milliseconds = f"{1e3 * call.seconds:.2f}"
    flops = format_count(call.flops)
    return f"  {name:<31}{shapes:<37}{parameters:>14}{flops:>11}{milliseconds:>10}"


def count_parameters(model: Qwen2VL, names: list[str]) -> str:
    """Return the number of parameters of some modules, as stored.

    A tied lm_head shares those of the embedding.
    """
    if names == ["lm_head"] and model.lm_head.weight is model.model.embed_tokens.weight:
        return "tied"
    total = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    return f"{total:,}"


def total_call(calls: list[Call]) -> Call:
    """Return one call with the shapes of the first and the FLOPs and time of all."""
    flops = sum(call.flops for call in calls)
    return calls[0]._replace(flops=flops, seconds=sum(call.seconds for call in calls))


def stage_modules(trace: Trace, stage: str) -> list[str]:
    """Return the names of a stage's modules: "model.layers" → ["model.layers.0", …]."""
    return [name for name in trace.calls if re.fullmatch(rf"{re.escape(stage)}(\.\d+)?", name)]


def format_stage(model: Qwen2VL, trace: Trace, stage: str, n: int) -> list[str]:
    """Return the lines of the n-th call of a stage and of the modules in its first block."""
    names = stage_modules(trace, stage)
    title = stage if names == [stage] else f"{stage}, {len(names)} of them"
    total = total_call([trace.calls[name][n] for name in names])
    lines = [format_row(title, total, count_parameters(model, names))]
    for name in trace.calls:
        if not name.startswith(f"{names[0]}."):
            continue
        call = trace.calls[name][n]
        indent = "  " * (name.count(".") - names[0].count("."))
        lines.append(
            format_row(indent + name.rpartition(".")[2], call, count_parameters(model, [name]))
        )
        inside = [
            trace.calls[child][n] for child in trace.calls if child.rpartition(".")[0] == name
        ]
        flops = call.flops - sum(child.flops for child in inside)
        if inside and flops:  # of the attention itself, between the projections
            seconds = call.seconds - sum(child.seconds for child in inside)
            lines.append(format_row(f"{indent}  softmax(q kᵀ) v", Call([], [], flops, seconds)))
    return lines


def format_stages(
    model: Qwen2VL, trace: Trace, title: str, stages: tuple[str, ...], n: int
) -> list[str]:
    """Return the table of the n-th call of some stages, [] if there was none.

    The last line is their sum.
    """
    names = [name for stage in stages for name in stage_modules(trace, stage)]
    if len(trace.calls[names[0]]) <= n:
        return []
    lines = [heading(title)]
    for stage in stages:
        lines += format_stage(model, trace, stage, n)
    total = total_call([trace.calls[name][n] for name in names])
    return [*lines, format_row("in total", total._replace(input_shape=[]))]


def format_positions(config: Config, batch: Batch, spans: list[Span]) -> list[str]:
    ids = batch.input_ids[0].tolist()
    positions, delta = get_positions(config, batch, ids)
    rows = []
    for span in spans:
        row = f"  {f'{span.start}…{span.end - 1}':<16}{span.name:<16}"
        for axis in positions[:, span.start : span.end]:
            row += f"{f'{axis.min()}…{axis.max()}':<14}"
        rows.append(row.rstrip())
    return [
        f"POSITIONS   M-RoPE: position_ids [3, 1, {len(ids)}]",
        f"  {'tokens':<16}{'':<16}{'time':<14}{'height':<14}width",
        *abridge(rows),
        f"  The answer continues at {len(ids) + delta} on all three axes; rope delta {delta}.",
    ]


def format_memory(model: Qwen2VL, cache: KVCache) -> list[str]:
    weights = [*model.model.layers.parameters(), *model.lm_head.parameters()]
    size = cache.keys.nbytes + cache.values.nbytes
    return [
        f"MEMORY   a decode step reads {sum(p.nbytes for p in weights):,} bytes of weights",
        f"  KV cache: {size:,} bytes, keys and values {list(cache.keys.shape)} each, "
        f"{cache.length:,} tokens filled",
    ]


def format_trace(model: Qwen2VL, processor: Processor, batch: Batch, trace: Trace) -> str:
    """Return the whole trace as text."""
    spans = split_prompt(batch, model.config)
    prompt = prompt_text(processor, batch, spans).replace("\n", "⏎")
    weight = model.model.norm.weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = [f"  {name} {x.dtype} {list(x.shape)}" for name, x in batch.arrays().items()]
    media = [f"  {media.summary(processor.image_config)}" for media in batch.media]
    tokens = [step.tokens[0] for step in trace.steps]
    scores = [score_token(step.tokens[0], step.logits[0], 1) for step in trace.steps]
    header, *rows, summary = format_table(processor.tokenizer, scores)
    sections = [
        [f"MODEL   {parameters:,} parameters, {weight.dtype} on {weight.device}"],
        [f"INPUTS   {len(media)} images and videos", *abridge(media), *inputs],
        [f"PROMPT   {batch.input_ids.shape[1]:,} tokens", *wrap(prompt)],
        format_positions(model.config, batch, spans),
        format_stages(model, trace, "VISION ENCODER", VISION, 0),
        format_stages(model, trace, "VISION ENCODER, VIDEOS", VISION, 1),
        format_stages(model, trace, "DECODER, PREFILL", DECODER, 0),
        format_stages(model, trace, "DECODER, FIRST DECODE STEP", DECODER, 1),
        format_memory(model, trace.cache),
        [f"ANSWER   {len(tokens):,} tokens", *wrap(processor.tokenizer.decode(tokens))],
        [header, *abridge(rows), summary],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def run(arguments: argparse.Namespace) -> None:
    """Answer the question and print the trace."""
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    trace = record(session.model, session.batch, arguments.max_new_tokens, config)
    print(format_trace(session.model, session.processor, session.batch, trace))


def main(argv: list[str] | None = None) -> int:
    parser = command_line.build_parser(
        "Trace one question through the model, with all numbers.", "python -m apps.trace"
    )
    return command_line.run_main("apps.trace", run, command_line.parse_arguments(parser, argv))


if __name__ == "__main__":
    command_line.run_program("apps.trace", main)
