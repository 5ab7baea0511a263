"""apps.estimate: its peak is near the one that a process really has."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import command_line
import linear
from apps import finetune
from apps.training_data import Encoder, read_examples
from apps.training_memory import training_needs
from command_line import BUNDLED_CHECKPOINT
from load_weights import empty_model, load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc of Linux"),
]

ROOT = Path(__file__).parents[2]
# The private peak is sampled after each operator; the kernel itself keeps that of all pages.
MEASURE = """
import importlib, json, os, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linear

class PrivatePeak(TorchDispatchMode):
    pages = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = file.read().split()
        PrivatePeak.pages = max(PrivatePeak.pages, int(resident) - int(shared))
        return output

program = importlib.import_module(sys.argv[1])
if sys.argv[1] == "apps.finetune":
    import torch._dynamo  # 85 MB, which its optimizer imports
else:
    linear.prefer_pytorch_gemv()
with PrivatePeak():
    torch.zeros(1)  # what the process holds before
    before = PrivatePeak.pages * os.sysconf("SC_PAGE_SIZE")
    code = program.main(sys.argv[2:])
with open("/proc/self/status") as file:
    [peak] = [line.split()[1] for line in file if line.startswith("VmHWM")]
private = PrivatePeak.pages * os.sysconf("SC_PAGE_SIZE")
peak = int(peak) * 1024
print(json.dumps({"code": code, "peak": peak, "private": private, "before": before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Make a checkpoint of 0.8 GB: layers of a published model's proportions, but few."""
    directory = tmp_path_factory.mktemp("large") / "model"
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUNDLED_CHECKPOINT, directory, ignore=ignore)
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 6}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 2}
    config["rope_scaling"]["mrope_section"] = [16, 24, 24]
    config["vision_config"] |= {"depth": 2, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
    config["vision_config"]["hidden_size"] = 1536
    (directory / "config.json").write_text(json.dumps(config))
    values = (0.02 * torch.randn(2**20)).bfloat16()
    weights = {}
    for name, parameter in empty_model(load_config(directory)).named_parameters():
        count = parameter.numel()
        repeated = values.repeat(-(-count // len(values)))[:count]
        weights[name] = repeated.view(parameter.shape).clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def four_bits(weight):
    """Return the tensors of a layer in the format of bitsandbytes, with values of no meaning."""
    state = {"blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        "weight": torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.full((weight.numel() // 64,), 0.05),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode())
        ).byte(),
    }


def fp8(weight):
    """Return the tensors of a layer in FP8, with a scale for each output."""
    numbers = (weight.float() * 8).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": torch.full((len(weight), 1), 1 / 8)}


DEQUANTIZED = {
    "bitsandbytes": (four_bits, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "FP8": (fp8, {"quant_method": "fp8", "weight_block_size": None}),
}


def quantize_decoder(source, target, pack, settings):
    """Write a checkpoint with the layers of the decoder in the format of `pack`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight") or not name.startswith("model.layers"):
            tensors[name] = tensor
            continue
        for ending, part in pack(tensor).items():
            tensors[name.removesuffix("weight") + ending] = part
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def run_program(*arguments, settings=None):
    """Run Python in the repository as a user does, with one thread; return its stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (settings or {})
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def estimated_peak(*options):
    """Return the bytes of the peak, and how many of them are private."""
    text = run_program("-m", "apps.estimate", "--quiet", *options)
    [peak, mapped] = re.findall(r"^peak .*?([\d,.]+) MB .*?([\d,.]+) MB", text, re.MULTILINE)[0]
    peak = 1e6 * float(peak.replace(",", ""))
    return peak, peak - 1e6 * float(mapped.replace(",", ""))


def measure(program, *options, settings=None):
    """Return the bytes of a run: of its peak, of its private peak, and of those before it."""
    arguments = ["-c", MEASURE, program, "--quiet", *options]
    lines = run_program(*arguments, settings=settings).splitlines()
    measured = json.loads(lines[-1])
    assert measured["code"] == 0
    return measured


def measured_peak(program, *options):
    """Return the bytes of the peak, and those of the private peak, of a run."""
    measured = measure(program, *options)
    return measured["peak"], measured["private"]


OPTIONS = ["--device", "cpu", "--max-new-tokens", "2", "--max-pixels", "1000000"]
ONE_IMAGE = ["--image", "examples/wide.png", "--min-pixels", "400000"]
SMALL_IMAGE = ["--image", "examples/wide.png", "--min-pixels", "200000"]
VIDEO = ["--video", "examples/crossing.mp4", "--nframes", "8", "--min-pixels", "100000"]
CASES = {
    "text": ["--prompt", "How many shapes are there?"],
    "image": ONE_IMAGE,
    "image, eager": [*SMALL_IMAGE, "--attention", "eager"],
    "image, int8": [*ONE_IMAGE, "--quantize", "int8"],
    "image, int4": [*SMALL_IMAGE, "--quantize", "int4"],
    "image, float32": [*SMALL_IMAGE, "--dtype", "float32"],
    "image, float32, int8": [*SMALL_IMAGE, "--dtype", "float32", "--quantize", "int8"],
    "video": VIDEO,
}


def compare(case, estimated, measured):
    """Print both and compare them."""
    for name, estimate, measurement in zip(("peak", "private"), estimated, measured, strict=True):
        print(
            f"{case}, {name}: {measurement / 1e6:.0f} MB, estimated {estimate / 1e6:.0f} MB, "
            f"{estimate / measurement - 1:+.1%}"
        )
    # Where it was written the largest error is 13 % (benchmarks/README.md); the rest is for other
    # kernels and allocators. What of the private memory is left over from freed tensors differs
    # between runs: without bfloat16 instructions by 60 of 500 MB for the same video.
    assert estimated[0] == pytest.approx(measured[0], rel=0.2)
    assert estimated[1] == pytest.approx(measured[1], rel=0.3)


@pytest.mark.parametrize("case", CASES)
def test_estimated_peak_is_near_the_measured_one(case, checkpoint):
    options = [*CASES[case], *OPTIONS, "--model", checkpoint]
    estimated = estimated_peak(*options)
    compare(case, estimated, measured_peak("generate", *options))


@pytest.mark.parametrize("name", DEQUANTIZED)
@pytest.mark.parametrize("quantize", [[], ["--quantize", "int8"]], ids=["plain", "int8"])
def test_estimated_peak_of_dequantized_weights_is_near_the_measured_one(
    name, quantize, checkpoint, tmp_path
):
    quantize_decoder(checkpoint, tmp_path / "model", *DEQUANTIZED[name])
    options = [*SMALL_IMAGE, *OPTIONS, *quantize, "--model", tmp_path / "model"]
    estimated = estimated_peak(*options)
    compare(f"{name} {quantize}", estimated, measured_peak("generate", *options))


def test_estimated_peak_of_a_batch_is_near_the_measured_one(checkpoint, tmp_path):
    questions = tmp_path / "questions.jsonl"
    content = [{"type": "image", "image": str(ROOT / "examples" / "wide.png")}]
    content.append({"type": "text", "text": "How many?"})
    lines = [json.dumps([{"role": "user", "content": content}]) for _ in range(4)]
    questions.write_text("\n".join(lines))
    options = [*OPTIONS, "--model", checkpoint]
    options += ["--min-pixels", "150000", "--batch-size", "4"]
    estimated = estimated_peak("--questions", questions, *options)
    out = tmp_path / "answers.jsonl"
    compare("batch", estimated, measured_peak("apps.batch", questions, "--out", out, *options))
    assert "error" not in out.read_text()


def estimated_training(*options):
    """Return the private bytes that the check of apps.finetune compares with those free."""
    arguments = finetune.parse_arguments([str(option) for option in options])
    directory, processor = command_line.load_processor(arguments)
    encoder = Encoder(processor)
    examples = read_examples(arguments.data, encoder, arguments.max_length)
    run = command_line.checked_run(arguments, directory)
    return training_needs(run, arguments, encoder, examples).total()


TRAININGS = {
    "one": [],
    "checkpointing": ["--gradient-checkpointing"],
    "vision": ["--vision"],
}
# glibc otherwise keeps freed tensors below 32 MB where others in between are alive. With so few
# tokens that can be more than what is alive: with checkpointing 408 MB instead of 174 (measured).
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}


@pytest.mark.skipif(
    not linear.has_fast_half_matmul(torch.bfloat16),
    reason="a step in bfloat16 takes minutes on a processor without instructions for it",
)
@pytest.mark.parametrize("case", TRAININGS)
def test_estimated_memory_of_a_training_is_near_the_measured_one(case, checkpoint, tmp_path):
    image = {"type": "image", "image": str(ROOT / "examples" / "wide.png")}
    lines = []
    for count in (20, 60):
        question = {"role": "user", "content": [image, {"type": "text", "text": "How many?"}]}
        lines.append(json.dumps([question, {"role": "assistant", "content": "One. " * count}]))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    options = ["--data", data, "--out", tmp_path / "out", "--model", checkpoint, "--device", "cpu"]
    options += ["--min-pixels", "150000", "--max-pixels", "300000", "--accumulate", "1"]
    options += TRAININGS[case]
    estimated = estimated_training(*options)
    measured = measure("apps.finetune", "--no-memory-check", *options, settings=RETURN_FREED)
    training = measured["private"] - measured["before"]
    print(
        f"{case}: {training / 1e6:.0f} MB, estimated {estimated / 1e6:.0f} MB, "
        f"{estimated / training - 1:+.1%}"
    )
    assert estimated == pytest.approx(training, rel=0.2)
