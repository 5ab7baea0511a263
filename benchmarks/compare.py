"""How fast this code is beside transformers 5.23.0, and beside what the machine can do at all.

    python benchmarks/compare.py                     the 2B model's shapes, float32 and bfloat16; takes half an hour
    python benchmarks/compare.py --shapes tiny       the bundled checkpoint, to see the ruler itself at work

Both sides answer the same questions with the same weights and the same number of threads, each in a fresh process,
one process at a time, in turns. A run that something else disturbed is repeated, and does not count if it still is.
The logits of both sides are compared, so that no wrong computation is called fast. `README.md` beside this file says
what each line means and holds the last table. Exit code 0, or 1 if logits differ or a line has no quiet measurement.
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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.checkpoint import (
    SHAPES,
    decoder_work,
    find_checkpoint,
    held_bytes,
    products,
    task_size,
    tasks,
    vision_work,
)

if TYPE_CHECKING:
    from qwen2vl import Config

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "transformers")
SECTIONS = ("picture", "cold", "batch", "video")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Record = dict  # what a worker reported of one task, and the load meanwhile


# ---------------------------------------------------------------------------------------------- running workers
def run_worker(job: dict, threads: int) -> list[Record]:
    """Runs one job in a fresh process; its results, with the load while each was measured.

    Raises RuntimeError with the end of what the process said, if it fails.
    """
    for file in Path(job.get("checkpoint", HERE)).glob("*.safetensors"):  # into memory: the disk is not measured
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(HERE / "workers.py")]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        start = time.monotonic()
        process = subprocess.Popen([*command, json.dumps(job | {"start": start, "threads": threads})],
                                   stdout=output, stderr=errors, env=os.environ | settings)  # fmt: skip
        with machine.Watch(process.pid) as watch:
            process.wait()
        for file in (errors, output):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"the worker for {job} ended with {process.returncode}:\n{errors.read()[-2000:]}")
        lines = [line.removeprefix("result ") for line in output if line.startswith("result ")]
    found = [json.loads(line) for line in lines]
    for record in found:
        record["load"] = watch.between(record["start"], record["end"])
        record["private_bytes"] = watch.between(start, record["end"])["private_bytes"]
    return found


def run_quietly(job: dict, options: argparse.Namespace, say: Callable[[str], None]) -> list[Record]:
    """Runs a job when the machine is quiet, and what was disturbed again, at most --retries times."""
    kept, name = [], " ".join(job[key] for key in ("kind", "side", "dtype") if key in job)
    for attempt in range(options.retries + 1):
        before = machine.wait_until_quiet(options.busy, options.patience, say)
        found = run_worker(job, options.threads)
        disturbed = []
        for record in found:
            record |= {key: job[key] for key in ("side", "dtype") if key in job} | {"load_before": before}
            record["quiet"] = machine.is_quiet(record["load"], options.busy)
            busy, stolen = record["load"]["foreign_cores"], record["load"]["stolen_cores"]
            took = f"{record['task']} in {record['end'] - record['start']:.1f} s"
            say(f"{name}: {took}, {busy:.2f} cores busy with other things, {stolen:.2f} stolen")
            if record["quiet"] or attempt == options.retries:
                kept.append(record)
            else:
                disturbed.append(record["task"])
        if not disturbed:
            break
        say(f"{name}: disturbed, once more: {', '.join(disturbed)}")
        if "tasks" in job:
            job = job | {"tasks": {task: job["tasks"][task] for task in disturbed}}
    return kept


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict:
    """All processes, repetition by repetition; what is known so far is written after each."""
    from load_weights import load_config

    config, questions = load_config(folder), tasks(options.shapes)
    chosen = {name: task for name, task in questions.items() if name in options.sections}
    found = {
        "shapes": options.shapes,
        "device": options.device,
        "machine": machine.describe(options.device, options.threads),
        "busy_limit": options.busy,
        "dtypes": options.dtypes,
        "tasks": chosen,
        "records": [],
        "logits": {},
    }
    common = {"checkpoint": str(folder), "device": options.device}
    size = {"megabytes": 16, "budget": 0.05} if options.shapes == "tiny" else {"megabytes": 1024, "budget": 1.5}
    ceilings = {"kind": "ceilings", "device": options.device, "dtypes": sorted({"float32", *options.dtypes}), **size}
    ceilings["shapes"] = products(config, questions["picture"])
    start, longest = time.monotonic(), {}

    if "cold" in options.sections:  # what is imported comes from memory, too
        for side in SIDES:
            tiny = str(find_checkpoint("tiny"))
            run_worker(
                common | {"kind": "cold", "side": side, "dtype": "float32", "checkpoint": tiny}, options.threads
            )
    with tempfile.TemporaryDirectory() as logits:
        for repetition in range(options.repetitions):
            sides = SIDES if repetition % 2 == 0 else SIDES[::-1]
            jobs = [ceilings]
            for kind in ("questions", "cold"):
                more = {"tasks": chosen, "logits": logits} if kind == "questions" else {}
                if not (chosen if more else "cold" in options.sections):
                    continue
                for dtype in options.dtypes:
                    jobs += [common | more | {"kind": kind, "side": side, "dtype": dtype} for side in sides]
            for job in jobs:
                name, begun = (job["kind"], job.get("side"), job.get("dtype")), time.monotonic()
                if begun - start + longest.get(name, 0) > options.minutes * 60:
                    say(f"--minutes {options.minutes:g} are nearly over: {' '.join(filter(None, name))} is left out")
                    continue
                found["records"] += [record | {"repetition": repetition} for record in run_quietly(job, options, say)]
                longest[name] = max(longest.get(name, 0), time.monotonic() - begun)
                found["logits"] |= compare_logits(Path(logits), found["records"], say, found["logits"])
                found["rows"] = summarise(found, config)
                if options.out:
                    write_json(options.out, found)
    return found


def write_json(path: Path, found: dict) -> None:
    """A line for each entry, and for each record: short enough to be read, and to be compared by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, value in tidy(found).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n".join(json.dumps(item, ensure_ascii=False) for item in value)
            lines.append(f'"{name}": [\n{items}\n]')
        else:
            lines.append(f'"{name}": {json.dumps(value, ensure_ascii=False)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def tidy(value):
    """Without what the file does not need: more than five digits, moments, and tokens that random weights make."""
    if isinstance(value, dict):
        return {name: tidy(item) for name, item in value.items() if name not in ("start", "end", "tokens")}
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ----------------------------------------------------------------------------------------------------- judging
def compare_logits(folder: Path, records: list[Record], say: Callable[[str], None], known: dict) -> dict[str, dict]:
    """How far the logits of both sides are apart, for each task and dtype that both have answered, if not yet known.

    Those of the prefill always; those of the last step where all tokens before it were the same. The measure and the
    limits are those of `tests/parity.py`.
    """
    import numpy as np
    import torch

    sys.path.append(str(HERE.parent / "tests"))
    import parity

    found, tokens = {}, {(r["task"], r["dtype"], r["side"]): r["tokens"] for r in records if "tokens" in r}
    for task, dtype in dict.fromkeys(key[:2] for key in tokens):
        name = f"{task} {dtype}"
        files = [folder / f"{side}-{dtype}-{task}.npy" for side in SIDES]
        if name in known or any((task, dtype, side) not in tokens for side in SIDES):
            continue
        ours, theirs = (torch.from_numpy(np.load(file)) for file in files)
        ours_tokens, theirs_tokens = (tokens[task, dtype, side][:-1] for side in SIDES)
        steps = 2 if ours_tokens == theirs_tokens else 1
        rung = parity.compare(name, ours[:steps], theirs[:steps], parity.LIMITS[dtype])
        cosine = torch.cosine_similarity(ours[:steps].double(), theirs[:steps].double(), dim=-1).min().item()
        found[name] = {
            "holds": rung.holds,
            "largest": rung.largest,
            "share": rung.share,
            "cosine": cosine,
            "steps": steps,
        }
        word = "hold" if rung.holds else "DIFFER"
        say(f"logits of {name}: {word}, at most {rung.largest:.1e} apart, cosine {cosine:.6f}")
    return found


def per_step(record: Record) -> float:
    """Seconds that a decode step took, on average."""
    return sum(record["steps"]) / len(record["steps"])


# What is compared: its name, the task, the unit, its value in a record, what its floor is made of. Less is better.
METRICS = [
    ("vision tower", "picture", "s", lambda r: r["vision"], "vision"),
    ("prefill", "picture", "s", lambda r: r["first_token"] - r["vision"], "prefill"),
    ("decode, batch {rows}", "picture", "s a step", per_step, "decode"),
    ("decode, batch {rows}", "batch", "s a step", per_step, "decode"),
    ("clip to first token", "video", "s", lambda r: r["first_token"], "clip"),
    ("cold start to first token", "cold", "s", lambda r: r["first_token"], None),
    ("— imports", "cold", "s", lambda r: r["import_seconds"], None),
    ("— load", "cold", "s", lambda r: r["load_seconds"], None),
    ("peak memory", "picture", "bytes", lambda r: r["peak_bytes"], "memory"),
    ("— without mapped files", "picture", "bytes", lambda r: r["private_bytes"], None),
]


def floor(kind: str | None, task: dict, config: Config, dtype: str, ceilings: dict | None) -> float | None:
    """The seconds, or for "memory" the bytes, that no computation of a task in this dtype can do without."""
    if kind is None or ceilings is None:
        return None
    size, (rows, tokens, media) = ITEMSIZE[dtype], task_size(task)

    def at_least(part: str, flop: float, read: float) -> float:
        rate, bandwidth = machine.best(ceilings, dtype, part)
        return max(flop / rate, read / bandwidth)

    if kind == "memory":
        return held_bytes(config, rows, tokens + task["new_tokens"], size)
    if kind == "decode":  # the step in the middle
        return at_least("decoder", *decoder_work(config, rows, 1, tokens + task["new_tokens"] // 2, size))
    vision = at_least("vision", *vision_work(config, media, size))
    prefill = at_least("decoder", *decoder_work(config, rows, tokens, 0, size))
    return {"vision": vision, "prefill": prefill, "clip": vision + prefill}[kind]


def summarise(found: dict, config: Config) -> list[dict]:
    """A row for each metric and dtype: medians of the quiet measurements, their ratio, their share of the ceiling."""
    records, rows = found["records"], []
    ceilings = machine.merge_ceilings([r for r in records if r["task"] == "ceilings" and r["quiet"]])
    for name, task, unit, value, kind in METRICS:
        medians, counts, spreads = {}, {}, {}
        for dtype in found["dtypes"]:
            for side in SIDES:
                mine = [r for r in records if (r.get("side"), r.get("dtype"), r["task"]) == (side, dtype, task)]
                quiet = [value(r) for r in mine if r["quiet"]]
                if mine:
                    medians[side, dtype] = statistics.median(quiet) if quiet else None
                    counts[side, dtype] = len(quiet)
                    spreads[side, dtype] = (max(quiet) - min(quiet)) / statistics.median(quiet) if quiet else None
        peers = [median for (side, _), median in medians.items() if side == "transformers" and median]
        for dtype in found["dtypes"]:
            if not all((side, dtype) in medians for side in SIDES):
                continue
            ours, theirs = (medians[side, dtype] for side in SIDES)
            question = found["tasks"].get(task)  # a cold start has none
            least = floor(kind, question, config, dtype, ceilings)
            rows.append({
                "metric": name.format(rows=len(question["rows"]) if question else 1),
                "dtype": dtype,
                "unit": unit,
                "ours": ours,
                "transformers": theirs,
                "quiet_runs": min(counts[side, dtype] for side in SIDES),
                "spread": max((spreads[side, dtype] for side in SIDES if counts[side, dtype]), default=None),
                "ratio": theirs / ours if ours and theirs else None,
                "ratio_to_best": min(peers) / ours if ours and peers and unit != "bytes" else None,
                "ours_of_ceiling": least / ours if ours and least else None,
                "transformers_of_ceiling": least / theirs if theirs and least else None,
            })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------ showing
def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.0f} %"


def giga(rate: float | None) -> str:
    return "—" if rate is None else f"{rate / 1e9:.0f}"


def times(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}×"


def table(found: dict, absolute: bool) -> str:
    """The rows as Markdown; with the absolute medians only where they are asked for."""
    extra = "ours | transformers | " if absolute else ""
    head = f"| what | dtype | {extra}beside transformers | beside its best dtype | of the ceiling | transformers |"
    head += " apart |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in found["rows"]:
        own = ""
        if absolute:
            scale, unit = (1e-9, "GB") if row["unit"] == "bytes" else (1, row["unit"])
            values = ("—" if row[side] is None else f"{row[side] * scale:.3f} {unit}" for side in SIDES)
            own = "{} | {} | ".format(*values)
        best = "—" if row["unit"] == "bytes" else times(row["ratio_to_best"])  # the smaller dtype always wins
        cells = times(row["ratio"]), best, percent(row["ours_of_ceiling"])
        cells += percent(row["transformers_of_ceiling"]), percent(row["spread"])
        lines.append(f"| {row['metric']} | {row['dtype']} | {own}{' | '.join(cells)} |")
    return "\n".join(lines)


def circumstances(found: dict) -> str:
    """The machine, its ceilings, the load and the logits, in sentences."""
    about, records = found["machine"], found["records"]
    where = about["gpu"] or f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:g} GB of memory"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"Machine: {where}; {', '.join(about['instructions'])}. {about['threads']} threads; {versions}."]
    if best := machine.merge_ceilings([r for r in records if r["task"] == "ceilings" and r["quiet"]]):
        read = max(best["read_bytes_per_s"].values())
        lines.append(
            f"Ceilings: memory is read at {read / 1e9:.1f} GB/s. Products at the model's shapes, in GFLOP/s, of"
        )
        lines[-1] += " the vision tower / of the decoder:\n"
        for dtype, parts in best["flop_per_s"].items():
            ways = dict.fromkeys(way for part in parts.values() for way in part)
            rates = (f"{way} {' / '.join(giga(part.get(way)) for part in parts.values())}" for way in ways)
            lines.append(f"* {dtype}: {', '.join(rates)}")
        lines.append("")
    loads = [r["load"]["foreign_cores"] + r["load"]["stolen_cores"] for r in records if r["quiet"]]
    if loads:
        noisy = sum(not r["quiet"] for r in records)
        lines.append(
            f"Load: other things kept {statistics.mean(loads):.2f} cores busy on average, {max(loads):.2f} at most, "
            f"stolen time included; {noisy or 'no'} of {len(records)} measurements had more than "
            f"{found['busy_limit']:g} and do not count."
        )
    counts = sorted({row["quiet_runs"] for row in found["rows"]})
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        lines.append(f"Quiet repetitions behind each figure: {span}.")
    if found["logits"]:
        full = [one["share"] for name, one in found["logits"].items() if name.endswith("float32")]
        agree = "agree" if all(one["holds"] for one in found["logits"].values()) else "DIFFER"
        lines.append(f"The logits of both sides {agree}" + (f" (float32: {max(full):.1e} apart)." if full else "."))
    return "\n".join(lines)


def section(found: dict | None, device: str) -> str:
    """What README.md says about one kind of device."""
    if found is None:
        return f"### {device}\n\nNot measured."
    return f"### {device}\n\n{table(found, absolute=False)}\n\n{circumstances(found)}"


def write_readme(path: Path, results: Path) -> None:
    """Puts the tables of results/2b-cpu.json and 2b-cuda.json between the markers of README.md."""
    text, marks = path.read_text(encoding="utf-8"), ("<!-- written by compare.py -->", "<!-- end -->")
    if any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"{path} must hold the lines {marks[0]} and {marks[1]} once each")
    parts = []
    for device in ("cpu", "cuda"):
        file = results / f"2b-{device}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        parts.append(section(found, device.upper()))
    before, after = text.split(marks[0])[0], text.split(marks[1])[1]
    path.write_text(before + "\n\n".join([marks[0], *parts, marks[1]]) + after, encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shapes", choices=SHAPES, default="2b", help="2b, thin (its widths, few layers) or tiny (default: 2b)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="one of these shapes (default: a random one in the cache)")
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="(default: all)")
    add("--dtypes", nargs="+", choices=ITEMSIZE, default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    add("--repetitions", type=int, default=3, metavar="N", help="fresh processes for each figure (default: 3)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="(default: all cores)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--minutes", type=float, default=float("inf"), help="start no process that would end later than this")
    add("--busy", type=float, default=0.15, metavar="CORES", help="quiet is no more foreign load (default: 0.15)")
    add("--patience", type=float, default=600, metavar="S", help="how long to wait for quiet (default: 600 s)")
    add("--retries", type=int, default=1, metavar="N", help="repeat a disturbed process so often (default: 1)")
    add("--out", type=Path, metavar="JSON", help="(default with 2b: results/2b-DEVICE.json, and README.md beside it)")
    add("--readme-only", action="store_true", help="measure nothing: write README.md from what results/ holds")
    options = parser.parse_args(argv)
    for name in ("repetitions", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    publish = options.shapes == "2b" and options.out is None
    if options.readme_only:
        write_readme(HERE / "README.md", HERE / "results")
        return 0
    if publish:
        options.out = HERE / "results" / f"2b-{options.device.split(':')[0]}.json"
    folder = options.checkpoint or find_checkpoint(options.shapes)
    found = measure(options, folder, lambda line: print(line, file=sys.stderr, flush=True))
    print(table(found, absolute=True), circumstances(found), sep="\n\n")
    if publish:
        write_readme(HERE / "README.md", HERE / "results")
    complete = all(row["ratio"] is not None for row in found["rows"])
    return 0 if complete and all(one["holds"] for one in found["logits"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
