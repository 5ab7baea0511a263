"""What 4 bits cost: perplexity of the bundled model with weights rounded by int4 and by Q4_K_M.

    python -m benchmarks.quantized_perplexity --ggml DIRECTORY/libggml-base.so

The text is the right answers to questions about images and videos that training never used. All
weights are converted back to float32 and the model computes in float32, so that nothing but the
rounding differs. ggml itself rounds: its library comes with llama-cpp-python or, compiled, with
pywhispercpp. Its 4 bits need rows of 256 weights, and those of the bundled model have 128 or 384:
they are filled up with zeros, which share no scale of 32 weights with others.

Source of which matrices Q4_K_M keeps in 6 bits: llama.cpp, `llama-quant.cpp`, as in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import argparse
import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import linear
from load_weights import load_config, load_model
from qwen2vl import Qwen2VL
from tiny.batches import Batches
from tiny.score import CHECKPOINT, Exam

SUPER_BLOCK = 256  # weights of ggml's formats of 4 and 6 bits
TYPES = {"Q4_K": 12, "Q6_K": 14}  # of ggml's enum
BATCH_SIZE = 25

RoundWeight = Callable[[str, Tensor], Tensor]


class Ggml:
    """The functions of ggml's library that round weights and convert them back."""

    def __init__(self, path: Path):
        """Raises OSError if this is no library, AttributeError if it is not ggml's."""
        library = ctypes.CDLL(str(path))
        self.quantize_chunk = library.ggml_quantize_chunk
        self.quantize_chunk.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self.quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[count] * 3, pointer]
        self.dequantize = {
            "Q4_K": library.dequantize_row_q4_K,
            "Q6_K": library.dequantize_row_q6_K,
        }
        for function in self.dequantize.values():
            function.restype = None
            function.argtypes = [pointer, pointer, count]

    def round_weight(self, form: str, weight: Tensor) -> Tensor:
        """Return float32 weights [out, in] rounded to a format of TYPES."""
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, -inputs % SUPER_BLOCK)).contiguous()
        packed = torch.empty(padded.nbytes, dtype=torch.uint8)  # more than it needs
        rounded = torch.empty_like(padded)
        self.quantize_chunk(
            TYPES[form], padded.data_ptr(), packed.data_ptr(), 0, outputs, padded.shape[1], None
        )
        self.dequantize[form](packed.data_ptr(), rounded.data_ptr(), padded.numel())
        return rounded[:, :inputs].contiguous()


def q4_k_m_form(name: str, layers: int) -> str:
    """Return the format in which llama.cpp's Q4_K_M keeps a matrix of the decoder.

    name: of the module here, such as "model.layers.0.mlp.up_proj".
    """
    if name == "lm_head":
        return "Q6_K"
    layer = int(name.split(".")[2])
    has_more_bits = (
        layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    )
    is_sensitive = name.endswith(("v_proj", "down_proj"))
    return "Q6_K" if has_more_bits and is_sensitive else "Q4_K"


def round_as_here(kind: type[linear.Int4Linear | linear.Int8Linear], weight: Tensor) -> Tensor:
    """Return float32 weights [out, in] rounded as a quantized layer of this repository does."""
    outputs, inputs = weight.shape
    plain = torch.nn.Linear(inputs, outputs, bias=False)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    return kind.from_linear(plain).dequantize(torch.float32)


@torch.inference_mode()
def answer_losses(model: Qwen2VL, batch: dict[str, Tensor]) -> Tensor:
    """Return the negative log-likelihoods, float32, of all answer tokens of a batch, in nats."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "answers"}
    is_answer = batch["answers"][:, 1:]  # of the token after each
    logits = model(**inputs)[:, :-1]
    return F.cross_entropy(
        logits[is_answer], batch["input_ids"][:, 1:][is_answer], reduction="none"
    )


def make_batches(folder: Path, items: int) -> list[dict[str, Tensor]]:
    """Return the inputs of the model for so many questions of each skill, with their answers."""
    maker = Batches(folder, parts=1, work=1)
    exam = Exam()
    batches = []
    for skill in exam.skills:
        questions = exam.questions(skill, items)
        is_album = questions[0][0].topic == "album"
        for i in range(0, items, BATCH_SIZE):
            conversations = [
                exam.to_messages(sample, [pair]) for sample, pair in questions[i : i + BATCH_SIZE]
            ]
            batch = maker.processor(
                conversations, add_generation_prompt=False, add_vision_id=is_album
            )
            batches.append(maker.tensors(batch))
    return batches


def rounded_losses(
    folder: Path, batches: list[dict[str, Tensor]], round_weight: RoundWeight
) -> tuple[Tensor, float]:
    """Return the losses of all answer tokens, and the weights' root mean square error.

    round_weight: name and float32 weights [out, in] of a matrix of the decoder or its head → those
    rounded. The error is relative to the weights. The embedding table stays as it is.
    """
    model = load_model(folder, "cpu", torch.float32)
    error = 0.0
    total = 0.0
    for name, module in model.named_modules():
        if name.startswith("visual.") or not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.detach()
        rounded = round_weight(name, weight)
        error += float((rounded - weight).square().sum())
        total += float(weight.square().sum())
        module.weight = torch.nn.Parameter(rounded, requires_grad=False)
    losses = torch.cat([answer_losses(model, batch) for batch in batches])
    return losses, math.sqrt(error / total)


def table(losses: dict[str, Tensor], errors: dict[str, float]) -> str:
    """Return a Markdown table: perplexities, and what they cost beside the first, the plain ones.

    The cost is the mean difference of a token's loss, with its standard error.
    """
    plain = next(iter(losses.values()))
    lines = [
        "| weights | perplexity | cost of a token (nats / 1000) | error of the weights |",
        "|---|---|---|---|",
    ]
    for name, values in losses.items():
        difference = (values - plain).double()
        deviation = difference.std() / math.sqrt(len(difference))
        perplexity = values.double().mean().exp()
        lines.append(
            f"| {name} | {perplexity:.5f} | {1e3 * difference.mean():.2f} ± {1e3 * deviation:.2f} "
            f"| {errors[name]:.2%} |"
        )
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Ggml]:
    """Return the options, and the functions of the library that they name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ggml", type=Path, required=True, metavar="FILE", help="the library libggml-base.so")
    add("--model", type=Path, default=CHECKPOINT, metavar="DIRECTORY", help="a bundled checkpoint")
    add("--items", type=int, default=200, metavar="N", help="questions of each skill")
    options = parser.parse_args(argv)
    if options.items < 1:
        parser.error(f"--items is {options.items}, expected 1 or more")
    try:
        return options, Ggml(options.ggml)
    except (OSError, AttributeError) as error:
        parser.error(f"--ggml is {options.ggml}, expected ggml's base library: {error}")


def main(argv: list[str] | None = None) -> int:
    options, ggml = parse_arguments(argv)
    layers = load_config(options.model).num_hidden_layers
    kinds: dict[str, RoundWeight] = {
        "float32": lambda name, weight: weight,
        "int8": lambda name, weight: round_as_here(linear.Int8Linear, weight),
        "int4": lambda name, weight: round_as_here(linear.Int4Linear, weight),
        "Q4_K_M": lambda name, weight: ggml.round_weight(q4_k_m_form(name, layers), weight),
        "Q4_K": lambda name, weight: ggml.round_weight("Q4_K", weight),
    }
    batches = make_batches(options.model, options.items)
    losses = {}
    errors = {}
    for name, round_weight in kinds.items():
        losses[name], errors[name] = rounded_losses(options.model, batches, round_weight)
    print(f"{len(losses['float32']):,} tokens of answers")
    print(table(losses, errors))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
