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

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import command_line
from apps.prompt_spans import prompt_text, split_prompt
from byte_matmul import FbgemmBytes, OneDnnBytes
from generate import GenerationConfig, choose_generation_config, generate_steps
from linear import QuantizedLinear, packed_weights, stored_bytes
from preprocess import Batch, Processor
from qwen2vl import Config, KVCache, Qwen2VL, get_rope_index
from tokenizer import Tokenizer


def linear_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs for x [..., in] and weight [out, in], also if that is packed along `in`."""
    return 2 * x.numel() * weight[0]


def byte_flops(digits: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """Return the operations of a kernel of byte_matmul.py, for all digits of the activations.

    digits [n, in], out_shape [n, out].
    """
    return 2 * digits.numel() * out_shape[-1]


# Kernels of PyTorch on the CPU that its counter does not know.
KERNEL_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._weight_int8pack_mm: linear_flops,
    torch.ops.aten._weight_int4pack_mm_for_cpu: linear_flops,
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    torch.ops.aten.addmv: lambda bias, matrix, *_, **__: 2 * matrix.numel(),
}
if torch.backends.mkldnn.is_available():
    KERNEL_FLOPS[torch.ops.mkldnn._linear_pointwise] = linear_flops
for kernel in (OneDnnBytes(), FbgemmBytes()):
    if kernel.is_usable():
        KERNEL_FLOPS[kernel.operator()] = byte_flops


@dataclass
class Call:
    """One call of a module. Its cost is in FLOPs or in seconds."""

    name: str  # in the model
    label: str  # in the module that calls it
    module: nn.Module
    depth: int  # how many modules are around it
    cost: float  # while the call runs: minus what was measured at its start
    inner_cost: float = 0  # of the modules inside
    shapes: str = ""


@contextmanager
def record_passes(model: Qwen2VL, measure: Callable[[], float]) -> Iterator[list[list[Call]]]:
    """Within it, record the calls of each forward pass, in the order in which they begin.

    measure: returns the FLOPs or seconds so far.
    """
    passes: list[list[Call]] = []
    running: list[Call] = []  # the outermost first

    def start(name: str, module: nn.Module, inputs: tuple) -> None:
        if not running:
            passes.append([])
        label = name.removeprefix(f"{running[-1].name}.") if running else "Qwen2VL"
        running.append(Call(name, label, module, len(running), -measure()))
        passes[-1].append(running[-1])

    def finish(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        call = running.pop()
        call.cost += measure()
        if running:
            running[-1].inner_cost += call.cost
            call.shapes = f"{list(inputs[0].shape)} → {list(output.shape)}"

    handles = []
    for name, module in model.named_modules():
        is_inside_later_block = re.search(r"\.[1-9]\d*\.", name)
        if is_inside_later_block or not list(module.parameters()):
            continue
        handles.append(module.register_forward_pre_hook(partial(start, name)))
        handles.append(module.register_forward_hook(finish))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


class Trace(NamedTuple):
    """What was recorded of one question. The first pass is the prefill, then come decode steps."""

    counted: list[list[Call]]  # the calls of the first two passes, in FLOPs
    timed: list[list[Call]]  # the calls of all passes, in seconds
    answer: list[int]  # token ids


def record(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    config: GenerationConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> Trace:
    """Answer a batch of one conversation twice: for the FLOPs, then for the time and the answer."""
    counter = FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS)
    with counter, record_passes(model, counter.get_total_flops) as counted:
        steps = generate_steps(model, batch, max_new_tokens, config, tokenizer=tokenizer)
        for _ in islice(steps, 2):
            pass  # the prefill and one decode step
    device = model.model.norm.weight.device

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with record_passes(model, seconds) as timed:
        steps = generate_steps(model, batch, max_new_tokens, config, tokenizer=tokenizer)
        answer = [step.tokens[0] for step in steps]
    return Trace(counted, timed, answer)


def format_count(number: float) -> str:
    """Return "1,234,567", or "45.2 M", "1.2 G", "3.4 T" from ten million on."""
    if number < 1e7:
        return f"{number:,}"
    if number < 1e9:
        return f"{number / 1e6:.1f} M"
    if number < 1e12:
        return f"{number / 1e9:.1f} G"
    return f"{number / 1e12:,.1f} T"


def format_row(depth: int, label: str, shapes: str, parameters: str, flops: str, ms: str) -> str:
    name = "  " * depth + label
    return f"{name:<33}{shapes:<37}{parameters:>14}{flops:>11}{ms:>10}"


def count_parameters(model: Qwen2VL, calls: list[Call]) -> str:
    """Return the number of parameters of the called modules, as stored."""
    head_weight = getattr(model.lm_head, "weight", None)  # AWQ and GPTQ have none of that name
    if calls[0].name == "lm_head" and head_weight is model.model.embed_tokens.weight:
        return "tied"
    parameters = sum(p.numel() for call in calls for p in call.module.parameters())
    return f"{parameters + sum(packed_weights(call.module) for call in calls):,}"


def format_pass(model: Qwen2VL, title: str, counted: list[Call], timed: list[Call]) -> list[str]:
    """Return the table of one pass: a line for each module, and one for all blocks but the first.

    counted and timed: the same calls, in FLOPs and in seconds.
    """
    lines = [format_row(0, title, "shapes", "parameters", "FLOPs", "time (ms)")]
    pairs = zip(counted, timed, strict=True)
    for _, group in groupby(pairs, key=lambda pair: re.sub(r"\.[1-9]\d*$", "", pair[0].name)):
        calls, timed_calls = zip(*group, strict=True)
        first = calls[0]
        label = first.label
        if len(calls) > 1:
            label += f" … {calls[-1].label}"
        parameters = count_parameters(model, calls)
        flops = sum(call.cost for call in calls)
        shown_flops = format_count(flops)
        if flops == 0 and isinstance(first.module, nn.Linear | QuantizedLinear):
            shown_flops = "unknown"  # of a kernel that is missing in KERNEL_FLOPS
        ms = f"{1e3 * sum(call.cost for call in timed_calls):.2f}"
        lines.append(format_row(first.depth + 1, label, first.shapes, parameters, shown_flops, ms))
        attention_flops = first.cost - first.inner_cost
        if first.inner_cost and attention_flops:  # between the projections
            shown_flops = format_count(attention_flops)
            ms = f"{1e3 * (timed_calls[0].cost - timed_calls[0].inner_cost):.2f}"
            lines.append(format_row(first.depth + 2, "softmax(q kᵀ) v", "", "", shown_flops, ms))
    return lines


def format_positions(config: Config, batch: Batch) -> list[str]:
    """Return the table of the first and last position of each span of the prompt."""
    inputs = {}
    for name, array in batch.arrays().items():
        if not name.startswith("pixel_values"):
            inputs[name] = torch.as_tensor(array)
    positions, rope_deltas = get_rope_index(config, **inputs)
    lines = [f"POSITIONS   M-RoPE: position_ids {list(positions.shape)}"]
    lines.append(f"  {'tokens':<16}{'':<16}{'time':<14}{'height':<14}width")
    for span in split_prompt(batch, config):
        line = f"  {f'{span.start}…{span.end - 1}':<16}{span.name:<16}"
        for axis in positions[:, 0, span.start : span.end]:
            line += f"{f'{axis.min()}…{axis.max()}':<14}"
        lines.append(line.rstrip())
    end = f"The answer continues at {positions.max() + 1} on all three axes"
    return [*lines, f"  {end}; rope delta {rope_deltas.item()}."]


def format_memory(model: Qwen2VL, length: int) -> list[str]:
    """Return what a decode step reads: the weights of the decoder and the cache of all tokens."""
    weights = stored_bytes(model.model.layers) + stored_bytes(model.lm_head)
    dtype = model.model.norm.weight.dtype
    cache = KVCache(model.config, 1, length, torch.device("meta"), dtype)
    return [
        f"MEMORY   a decode step reads {weights:,} bytes of weights",
        f"  KV cache of {length:,} tokens: {2 * cache.keys.nbytes:,} bytes, keys and values "
        f"{list(cache.keys.shape)} each",
    ]


def format_trace(
    model: Qwen2VL,
    processor: Processor,
    batch: Batch,
    trace: Trace,
    stop_strings: Sequence[str] = (),
) -> str:
    """Return the whole trace as text."""
    weight = model.model.norm.weight
    media = [f"  {media.summary(processor.image_config)}" for media in batch.media]
    inputs = [f"  {name} {x.dtype} {list(x.shape)}" for name, x in batch.arrays().items()]
    length = batch.input_ids.shape[1]
    prompt = prompt_text(processor, batch, split_prompt(batch, model.config)).rstrip()
    sections = [
        [f"MODEL   {weight.dtype} on {weight.device}, {model.attn_implementation} attention"],
        [f"INPUTS   {len(media)} images and videos", *media, *inputs],
        [f"PROMPT   {length:,} tokens", textwrap.indent(prompt, "  ")],
        format_positions(model.config, batch),
        format_pass(model, "PREFILL", trace.counted[0], trace.timed[0]),
    ]
    if len(trace.counted) > 1:
        decode = (trace.counted[1], trace.timed[1])
        sections.append(format_pass(model, "FIRST DECODE STEP", *decode))
    answer = processor.tokenizer.decode(trace.answer, stop_strings=stop_strings)
    sections += [
        format_memory(model, length + len(trace.answer) - 1),
        [f"ANSWER   {len(trace.answer):,} tokens", textwrap.indent(answer, "  ")],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def run(arguments: argparse.Namespace) -> None:
    """Answer the question and print the trace."""
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    tokenizer = session.processor.tokenizer
    trace = record(session.model, session.batch, arguments.max_new_tokens, config, tokenizer)
    stop_strings = config.stop_strings
    print(format_trace(session.model, session.processor, session.batch, trace, stop_strings))


def main(argv: list[str] | None = None) -> int:
    parser = command_line.build_parser(
        "Trace one question through the model, with all numbers.", "python -m apps.trace"
    )
    return command_line.run_main("apps.trace", run, command_line.parse_arguments(parser, argv))


if __name__ == "__main__":
    command_line.run_program("apps.trace", main)
