"""Time from the start of a process to a loaded model: plain weights, kept quantized, `--quantize`.

    python -m benchmarks.quantized_load

Each figure is the median of new processes, which take turns. Plain weights stay in the mapped file
when a model is loaded, so a second time is measured, when each page of the weights was read once.
The files are in the page cache. A kept directory has a plain head, as `apps.quantize` writes it;
`--quantize` rounds the head, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoint import find_checkpoint
from benchmarks.options import check_common_options
from benchmarks.processes import ROOT, read_weights, worker_settings

# Runs in a new process. All processes share the clock; a page has 4096 bytes or a multiple.
WORKER = """
import json, sys, time

import torch

from load_weights import load_model
folder, quantize, start = sys.argv[1], sys.argv[2] or None, float(sys.argv[3])
before = time.monotonic()
model = load_model(folder, "cpu", quantize=quantize)
loaded = time.monotonic()
for parameter in model.parameters():
    if parameter.is_mkldnn:
        continue  # in a layout of oneDNN's, so it has been written and is in memory
    parameter.detach().flatten().view(torch.uint8)[::4096].sum()
read = time.monotonic()
times = {"start to loaded": loaded - start, "load": loaded - before, "load and read": read - before}
print(json.dumps(times))
"""
CASES = {
    "plain bfloat16": ("plain", ""),
    "kept int8": ("kept8", ""),
    "kept int4": ("kept4", ""),
    "--quantize int8": ("plain", "int8"),
    "--quantize int4": ("plain", "int4"),
}


def keep_quantized(checkpoint: Path, bits: int, folder: Path) -> Path:
    """Write a quantized directory with `apps.quantize`, and return it."""
    command = [sys.executable, "-m", "apps.quantize", "--model", str(checkpoint), "--quiet"]
    command += ["--bits", str(bits), "--out", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def measure_once(folder: Path, quantize: str, environment: dict[str, str]) -> dict[str, float]:
    """Return the seconds of one new process, by what was measured."""
    read_weights({"checkpoint": str(folder)})  # into the page cache
    command = [sys.executable, "-c", WORKER, str(folder), quantize, str(time.monotonic())]
    process = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def measure(folders: dict[str, Path], repetitions: int, threads: int) -> dict[str, dict]:
    """Return the median seconds of each case; the cases take turns."""
    environment = os.environ | worker_settings(threads)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(repetitions):
        for name, (folder, quantize) in CASES.items():
            seconds[name].append(measure_once(folders[folder], quantize, environment))
    return {name: medians(runs) for name, runs in seconds.items()}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each measured time over the processes."""
    return {what: statistics.median(run[what] for run in runs) for what in runs[0]}


def table(seconds: dict[str, dict[str, float]]) -> str:
    """Return the lines of a Markdown table: the times as multiples of those of plain weights."""
    plain = next(iter(seconds.values()))
    lines = [f"| weights | {' | '.join(plain)} |", "|---|" + "---|" * len(plain)]
    for name, times in seconds.items():
        ratios = [f"{times[what] / plain[what]:.2f}×" for what in plain]
        lines.append(f"| {name} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=("thin", "tiny"), default="thin")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    options = parser.parse_args(argv)
    check_common_options(parser, options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    checkpoint = find_checkpoint(options.shapes)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"plain": checkpoint}
        for bits in (8, 4):
            kept = Path(temporary) / f"int{bits}"
            folders[f"kept{bits}"] = keep_quantized(checkpoint, bits, kept)
        seconds = measure(folders, options.repetitions, options.threads)
    for name, times in seconds.items():
        print(f"{name}: {', '.join(f'{what} {value:.2f} s' for what, value in times.items())}")
    print(table(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
