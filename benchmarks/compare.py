"""Compare the speed of this code with transformers 5.23.0 and with the machine's highest rates.

    python -m benchmarks.compare                     the 2B model's shapes; takes half an hour
    python -m benchmarks.compare --shapes tiny       the bundled checkpoint, to try the benchmark
    python -m benchmarks.compare --sections llama    with llama.cpp, by llama-cpp-python

Both sides answer the same questions with the same weights and the same number of threads, each in a
new process, one process at a time, in turns. A run that another process disturbed is repeated, and
does not count if it still is. The logits of both sides are compared, so that no wrong computation
counts as fast. README.md in this directory explains each line and has the last table. The exit code
is 0, or 1 if logits differ or a line has no quiet measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import llama, machine
from benchmarks.checkpoint import cache_folder, find_checkpoint, make_batch, products, tasks
from benchmarks.options import add_common_options, check_common_options
from benchmarks.processes import HERE, Record, Say, job_name, run_quietly, run_worker
from benchmarks.summary import ITEMSIZE, QUANTIZED, peer_of, summarize
from benchmarks.tables import COSINES, circumstances, tables, write_readme
from load_weights import load_config
from qwen2vl import Config
from reference import parity

SIDES = ("ours", "transformers")
SECTIONS = ("image", "cold", "batch", "video", "llama")


# --------------------------------------------------------------------------------------------- jobs


def ceilings_job(options: argparse.Namespace, config: Config, image_task: dict) -> dict:
    """Return the job that measures the machine, at the model's shapes."""
    dtypes = {"float32"}
    for dtype in options.dtypes:
        dtypes.add("bfloat16" if dtype in QUANTIZED else dtype)
    job = {"kind": "ceilings", "device": options.device, "dtypes": sorted(dtypes)}
    if options.shapes == "tiny":
        job |= {"megabytes": 16, "budget": 0.05}
    else:
        job |= {"megabytes": 1024, "budget": 1.5}
    return job | {"shapes": products(config, image_task)}


def question_jobs(
    options: argparse.Namespace, chosen: dict[str, dict], common: dict, config: Config
) -> list[dict]:
    """Return a job for each side and format, with the tasks that it is asked."""
    jobs = []
    for dtype in options.dtypes:
        ours = dict(chosen)
        if dtype in QUANTIZED:
            ours.pop("video", None)
        theirs = {}
        for name, task in ours.items():
            if peer_of(name, dtype) == ("transformers", dtype):
                theirs[name] = task
        job = common | {"kind": "questions", "dtype": dtype}
        if ours:
            jobs.append(job | {"side": "ours", "tasks": ours})
        if theirs:
            jobs.append(job | {"side": "transformers", "tasks": theirs})
    if "llama" in chosen:
        jobs += llama_jobs(options, chosen["llama"], common, config)
    return jobs


def llama_jobs(options: argparse.Namespace, task: dict, common: dict, config: Config) -> list[dict]:
    """Return a job for each format of llama.cpp that is compared with ours."""
    ids = make_batch(config, task["rows"]).input_ids[0].tolist()
    jobs = []
    for form in dict.fromkeys(peer_of("llama", dtype)[1] for dtype in options.dtypes):
        gguf = llama.find_gguf(
            Path(common["checkpoint"]), form, cache_folder(), options.llama_python
        )
        job = {
            "kind": "llama",
            "side": "llama.cpp",
            "dtype": form,
            "tasks": {"llama": task | {"ids": ids}},
            "gguf": str(gguf),
            "python": options.llama_python,
        }
        jobs.append(common | job)
    return jobs


def cold_jobs(options: argparse.Namespace, common: dict) -> list[dict]:
    jobs = []
    for dtype in options.dtypes:
        jobs.append(common | {"kind": "cold", "side": "ours", "dtype": dtype})
        if dtype not in QUANTIZED:
            jobs.append(common | {"kind": "cold", "side": "transformers", "dtype": dtype})
    return jobs


def read_imports(options: argparse.Namespace, common: dict) -> None:
    """Import both sides once, so that the cold starts read modules from memory."""
    for side in SIDES:
        job = {"kind": "cold", "side": side, "dtype": "float32"}
        job["checkpoint"] = str(find_checkpoint("tiny"))
        run_worker(common | job, options.threads)


# ------------------------------------------------------------------------------------------ measure


class Deadline:
    """Decides which jobs can still end within --minutes, by how long jobs of the same name took."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.start = time.monotonic()
        self.longest: dict[str, float] = {}

    def allows(self, job: dict) -> bool:
        expected = time.monotonic() - self.start + self.longest.get(job_name(job), 0)
        return expected <= self.minutes * 60

    def add(self, job: dict, seconds: float) -> None:
        name = job_name(job)
        self.longest[name] = max(self.longest.get(name, 0), seconds)


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict:
    """Run all processes, repetition by repetition; write what is known so far after each."""
    config = load_config(folder)
    questions = tasks(options.shapes)
    chosen = {name: task for name, task in questions.items() if name in options.sections}
    results = {
        "shapes": options.shapes,
        "device": options.device,
        "machine": machine.describe(options.device, options.threads),
        "busy_limit": options.busy,
        "dtypes": options.dtypes,
        "tasks": chosen,
        "records": [],
        "logits": {},
    }
    tell_what_is_not_compared(options.dtypes, say)
    common = {"checkpoint": str(folder), "device": options.device}
    deadline = Deadline(options.minutes)
    if "cold" in options.sections:
        read_imports(options, common)
    with tempfile.TemporaryDirectory() as logits:
        jobs = question_jobs(options, chosen, common | {"logits": logits}, config)
        first = []
        if jobs:  # a cold start has no ceiling to be compared with
            first = [ceilings_job(options, config, questions["image"])]
        if "cold" in options.sections:
            jobs += cold_jobs(options, common)
        for repetition, job in schedule(first, jobs, options.repetitions):
            if not deadline.allows(job):
                say(f"--minutes {options.minutes:g} are nearly over: {job_name(job)} is skipped")
                continue
            start = time.monotonic()
            for record in run_quietly(job, options, say):
                results["records"].append(record | {"repetition": repetition})
            deadline.add(job, time.monotonic() - start)
            update(results, config, Path(logits), options.out, say)
    return results


def schedule(first: list[dict], jobs: list[dict], repetitions: int) -> Iterator[tuple[int, dict]]:
    """Yield (repetition, job): the first ones, then the jobs, every second time in reverse."""
    for repetition in range(repetitions):
        in_turn = jobs if repetition % 2 == 0 else jobs[::-1]
        for job in [*first, *in_turn]:
            yield repetition, job


def tell_what_is_not_compared(dtypes: list[str], say: Say) -> None:
    """Say which quantized formats have no float32 logits to be compared with."""
    quantized = [dtype for dtype in dtypes if dtype in QUANTIZED]
    if quantized and "float32" not in dtypes:
        names = ", ".join(quantized)
        say(f"the logits of {names} are not compared: that needs float32 among --dtypes")


def update(results: dict, config: Config, logits: Path, out: Path | None, say: Say) -> None:
    """Compare new logits, summarize all records, and write the results file."""
    results["logits"] |= compare_logits(logits, results["records"], say, results["logits"])
    results["rows"] = summarize(results, config)
    if out:
        write_json(out, results)


def write_json(path: Path, results: dict) -> None:
    """Write a line for each entry and for each record: readable, and comparable by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, value in tidy(results).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n".join(json.dumps(item, ensure_ascii=False) for item in value)
            lines.append(f'"{name}": [\n{items}\n]')
        else:
            lines.append(f'"{name}": {json.dumps(value, ensure_ascii=False)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def tidy(value):
    """Return the value with five digits, without times of day and without generated tokens."""
    if isinstance(value, dict):
        dropped = ("start", "end", "tokens")
        return {name: tidy(item) for name, item in value.items() if name not in dropped}
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value


# ------------------------------------------------------------------------------------------- logits


def compare_logits(
    folder: Path, records: list[Record], say: Say, known: dict[str, dict]
) -> dict[str, dict]:
    """Return the differences of logits, for each task and format that is not yet known.

    Ours are compared with those of transformers in the same dtype, by the measure and the limits of
    the parity ladder. Those of quantized weights and of llama.cpp are compared with ours in
    float32, by the cosine.
    """
    tokens = {}
    for record in records:
        if "tokens" in record:
            tokens[record["task"], record["side"], record["dtype"]] = record["tokens"]
    comparisons = {}
    for task, side, dtype in tokens:
        name = f"{task} {dtype}"
        reference = ("ours", "float32") if dtype in COSINES else ("transformers", dtype)
        if name in known or side == "transformers" or (task, *reference) not in tokens:
            continue
        tested_tokens = tokens[task, side, dtype]
        reference_tokens = tokens[task, *reference]
        # The last step is compared where all tokens before it are equal.
        steps = 2 if tested_tokens[:-1] == reference_tokens[:-1] else 1
        tested = load_logits(folder, task, side, dtype)[:steps]
        right = load_logits(folder, task, *reference)[:steps]
        comparison = compare_pair(name, dtype, tested, right)
        comparisons[name] = comparison | {"steps": steps}
        word = "hold" if comparison["holds"] else "DIFFER"
        largest = comparison["largest"]
        cosine = comparison["cosine"]
        say(f"logits of {name}: {word}, largest difference {largest:.1e}, cosine {cosine:.6f}")
    return comparisons


def load_logits(folder: Path, task: str, side: str, dtype: str) -> torch.Tensor:
    """Return float32 [2, B, V]: of the prefill and of the last step."""
    return torch.from_numpy(np.load(folder / f"{side}-{dtype}-{task}.npy"))


def compare_pair(name: str, dtype: str, tested: torch.Tensor, right: torch.Tensor) -> dict:
    limit = parity.LIMITS.get(dtype, float("inf"))
    rung = parity.compare(name, tested, right, limit)
    cosines = torch.cosine_similarity(tested.double(), right.double(), dim=-1)
    cosine = cosines.min().item()
    holds = cosine >= COSINES[dtype] if dtype in COSINES else rung.holds
    return {
        "holds": holds,
        "largest": rung.max_difference,
        "share": rung.relative_difference,
        "cosine": cosine,
    }


# ------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, shapes="2b")
    add = parser.add_argument
    add(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS[:-1],
        help="(default: all but llama)",
    )
    add(
        "--dtypes",
        nargs="+",
        choices=[*ITEMSIZE, *QUANTIZED],
        default=["float32", "bfloat16", "int8"],
        help="(default: float32 bfloat16 int8)",
    )
    add(
        "--llama-python",
        default=sys.executable,
        metavar="PYTHON",
        help="an interpreter that has llama-cpp-python (default: this one)",
    )
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no process that would end later than this",
    )
    add(
        "--out",
        type=Path,
        metavar="JSON",
        help="(default with 2b: results/2b-DEVICE.json; README.md is updated, too)",
    )
    add(
        "--readme-only",
        action="store_true",
        help="measure nothing: write README.md from the files in results/",
    )
    options = parser.parse_args(argv)
    check_common_options(parser, options)
    if "llama" in options.sections:
        if options.device != "cpu":
            parser.error(f"--sections llama measures the CPU, and --device is {options.device}")
        missing = llama.obstacle(options.llama_python)
        if missing:
            parser.error(missing)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.readme_only:
        write_readme(HERE / "README.md", HERE / "results")
        return 0
    publish = options.shapes == "2b" and options.out is None
    if publish:
        options.out = HERE / "results" / f"2b-{options.device.split(':')[0]}.json"
    folder = options.checkpoint or find_checkpoint(options.shapes)
    results = measure(options, folder, lambda line: print(line, file=sys.stderr, flush=True))
    print(tables(results, seconds=True), circumstances(results), sep="\n\n")
    if publish:
        write_readme(HERE / "README.md", HERE / "results")
    is_complete = all(row["quiet_runs"] for row in results["rows"])
    is_right = all(comparison["holds"] for comparison in results["logits"].values())
    return 0 if is_complete and is_right else 1


if __name__ == "__main__":
    sys.exit(main())
