"""How fast this code is beside transformers 5.23.0, and beside what the machine can do at all.

    python benchmarks/compare.py                     the 2B model's shapes, in three dtypes; takes half an hour
    python benchmarks/compare.py --shapes tiny       the bundled checkpoint, to see the ruler itself at work
    python benchmarks/compare.py --sections llama    the decoder beside llama.cpp, with llama-cpp-python installed

Both sides answer the same questions with the same weights and the same number of threads, each in a fresh process,
one process at a time, in turns. A run that something else disturbed is repeated, and does not count if it still is.
The logits of both sides are compared, so that no wrong computation is called fast. `README.md` beside this file says
what each line means and holds the last table. Exit code 0, or 1 if logits differ or a line has no quiet measurement.
"""

from __future__ import annotations

import argparse
import itertools
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

from benchmarks import llama, machine
from benchmarks.checkpoint import (
    SHAPES,
    cache_folder,
    decoder_work,
    find_checkpoint,
    held_bytes,
    make_batch,
    products,
    task_size,
    tasks,
    vision_work,
)

if TYPE_CHECKING:
    from qwen2vl import Config

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "transformers")
SECTIONS = ("picture", "cold", "batch", "video", "llama")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Formats that transformers is not measured in: our quantised weights, and llama.cpp's. Bytes of a weight, and how
# like our float32 logits theirs have to be: random weights lose most, as nothing in them repeats itself. int4 has a
# scale and an offset for 32 weights, Q8_0 a scale.
QUANTISED = {"int8": 1, "int4": 0.5 + 4 / 32}
BYTES = ITEMSIZE | QUANTISED | {"F16": 2, "Q8_0": 1 + 2 / 32}
COSINES = {"int8": 0.998, "int4": 0.9, "F16": 0.999, "Q8_0": 0.999}
Record = dict  # what a worker reported of one task, and the load meanwhile


# ---------------------------------------------------------------------------------------------- running workers
def run_worker(job: dict, threads: int) -> list[Record]:
    """Runs one job in a fresh process; its results, with the load while each was measured.

    Raises RuntimeError with the end of what the process said, if it fails.
    """
    weights = (
        [Path(job["gguf"])]
        if "gguf" in job
        else Path(job.get("checkpoint", HERE)).glob("*.safetensors")
    )
    for file in weights:  # into memory: the disk is not measured
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [job.get("python", sys.executable), str(HERE / "workers.py")]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        start = time.monotonic()
        process = subprocess.Popen([*command, json.dumps(job | {"start": start, "threads": threads})],
                                   stdout=output, stderr=errors, env=os.environ | settings)  # fmt: skip
        with machine.Watch(process.pid) as watch:
            process.wait()
        for file in (errors, output):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(
                f"the worker for {job} ended with {process.returncode}:\n{errors.read()[-2000:]}"
            )
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
            record |= {key: job[key] for key in ("side", "dtype") if key in job} | {
                "load_before": before
            }
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


def peer_of(task: str, dtype: str) -> tuple[str, str] | None:
    """Who is measured beside ours, and in which format; None where transformers has none."""
    if task == "llama":
        return "llama.cpp", "Q8_0" if dtype in QUANTISED else "F16"
    return None if dtype in QUANTISED else ("transformers", dtype)


def question_jobs(
    options: argparse.Namespace, chosen: dict[str, dict], common: dict, config: Config
) -> list[dict]:
    """A job for each side and format: the tasks that it is asked."""
    jobs = []
    for dtype in options.dtypes:
        mine = {
            name: task
            for name, task in chosen.items()
            if not (name == "video" and dtype in QUANTISED)
        }
        theirs = {
            name: task
            for name, task in mine.items()
            if peer_of(name, dtype) == ("transformers", dtype)
        }
        for side, asked in zip(SIDES, (mine, theirs), strict=True):
            if asked:
                jobs.append(
                    common | {"kind": "questions", "side": side, "dtype": dtype, "tasks": asked}
                )
    if task := chosen.get("llama"):
        asked = {"llama": task | {"ids": make_batch(config, task["rows"]).input_ids[0].tolist()}}
        for form in dict.fromkeys(peer_of("llama", dtype)[1] for dtype in options.dtypes):
            gguf = llama.find_gguf(Path(common["checkpoint"]), form, cache_folder())
            more = {"kind": "llama", "side": "llama.cpp", "dtype": form, "tasks": asked}
            jobs.append(common | more | {"gguf": str(gguf), "python": options.llama_python})
    return jobs


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
    size = (
        {"megabytes": 16, "budget": 0.05}
        if options.shapes == "tiny"
        else {"megabytes": 1024, "budget": 1.5}
    )
    widened = {"bfloat16" if dtype in QUANTISED else dtype for dtype in options.dtypes}
    ceilings = {
        "kind": "ceilings",
        "device": options.device,
        "dtypes": sorted({"float32", *widened}),
        **size,
    }
    ceilings["shapes"] = products(config, questions["picture"])
    if unlike := [
        name for name in options.dtypes if name in QUANTISED and "float32" not in options.dtypes
    ]:
        say(
            f"the logits of {', '.join(unlike)} are not compared: that needs float32 among --dtypes"
        )
    start, longest = time.monotonic(), {}

    if "cold" in options.sections:  # what is imported comes from memory, too
        for side in SIDES:
            tiny = str(find_checkpoint("tiny"))
            run_worker(
                common | {"kind": "cold", "side": side, "dtype": "float32", "checkpoint": tiny},
                options.threads,
            )
    with tempfile.TemporaryDirectory() as logits:
        jobs = question_jobs(options, chosen, common | {"logits": logits}, config)
        for dtype, side in itertools.product(options.dtypes, SIDES):
            if "cold" in options.sections and (side == "ours" or dtype not in QUANTISED):
                jobs.append(common | {"kind": "cold", "side": side, "dtype": dtype})
        for repetition in range(options.repetitions):
            for job in [ceilings, *(jobs if repetition % 2 == 0 else jobs[::-1])]:
                name, begun = (job["kind"], job.get("side"), job.get("dtype")), time.monotonic()
                if begun - start + longest.get(name, 0) > options.minutes * 60:
                    say(
                        f"--minutes {options.minutes:g} are nearly over: {' '.join(filter(None, name))} is left out"
                    )
                    continue
                found["records"] += [
                    record | {"repetition": repetition} for record in run_quietly(job, options, say)
                ]
                longest[name] = max(longest.get(name, 0), time.monotonic() - begun)
                found["logits"] |= compare_logits(
                    Path(logits), found["records"], say, found["logits"]
                )
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
        return {
            name: tidy(item)
            for name, item in value.items()
            if name not in ("start", "end", "tokens")
        }
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ----------------------------------------------------------------------------------------------------- judging
def compare_logits(
    folder: Path, records: list[Record], say: Callable[[str], None], known: dict
) -> dict[str, dict]:
    """How far logits are apart, for each task and format that both sides have answered, if not yet known.

    Ours from those of transformers in the same dtype: the measure and the limits are those of `reference/parity.py`.
    Quantised ones and those of llama.cpp from ours in float32, judged by the cosine. Those of the prefill always;
    those of the last step where all tokens before it were the same.
    """
    import numpy as np
    import torch

    from reference import parity

    found, tokens = (
        {},
        {(r["task"], r["dtype"], r["side"]): r["tokens"] for r in records if "tokens" in r},
    )
    for task, dtype, side in tokens:
        name, limit = f"{task} {dtype}", parity.LIMITS.get(dtype)
        pair = (dtype, side), ("float32", "ours") if dtype in COSINES else (dtype, "transformers")
        if (
            name in known
            or side == "transformers"
            or any((task, *one) not in tokens for one in pair)
        ):
            continue
        tested, right = (
            torch.from_numpy(np.load(folder / f"{one[1]}-{one[0]}-{task}.npy")) for one in pair
        )
        tested_tokens, right_tokens = (tokens[task, *one][:-1] for one in pair)
        steps = 2 if tested_tokens == right_tokens else 1
        rung = parity.compare(name, tested[:steps], right[:steps], limit or float("inf"))
        cosine = (
            torch.cosine_similarity(tested[:steps].double(), right[:steps].double(), dim=-1)
            .min()
            .item()
        )
        holds = rung.holds if limit else cosine >= COSINES[dtype]
        found[name] = {
            "holds": holds,
            "largest": rung.max_difference,
            "share": rung.relative_difference,
            "cosine": cosine,
            "steps": steps,
        }
        word = "hold" if holds else "DIFFER"
        say(
            f"logits of {name}: {word}, at most {rung.max_difference:.1e} apart, cosine {cosine:.6f}"
        )
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
    ("words only: prefill", "llama", "s", lambda r: r["first_token"], "prefill"),
    ("words only: decode", "llama", "s a step", per_step, "decode"),
    ("clip to first token", "video", "s", lambda r: r["first_token"], "clip"),
    ("cold start to first token", "cold", "s", lambda r: r["first_token"], None),
    ("— imports", "cold", "s", lambda r: r["import_seconds"], None),
    ("— load", "cold", "s", lambda r: r["load_seconds"], None),
    ("peak memory", "picture", "bytes", lambda r: r["peak_bytes"], "memory"),
    ("— without mapped files", "picture", "bytes", lambda r: r["private_bytes"], None),
]


def floor(
    kind: str | None, task: dict, config: Config, dtype: str, ceilings: dict | None
) -> float | None:
    """The seconds, or for "memory" the bytes, that no computation of a task in this format can do without."""
    if kind is None or ceilings is None:
        return None
    size, (rows, tokens, media) = BYTES[dtype], task_size(task)

    def at_least(part: str, flop: float, read: float) -> float:
        rate, bandwidth = machine.best(ceilings, dtype, part)
        return max(flop / rate, read / bandwidth)

    if kind == "memory":
        return held_bytes(config, rows, tokens + task["new_tokens"], size)
    if kind == "decode":  # the step in the middle
        return at_least(
            "decoder", *decoder_work(config, rows, 1, tokens + task["new_tokens"] // 2, size)
        )
    vision = at_least("vision", *vision_work(config, media, max(size, 2)))  # never quantised
    prefill = at_least("decoder", *decoder_work(config, rows, tokens, 0, size))
    return {"vision": vision, "prefill": prefill, "clip": vision + prefill}[kind]


def summarise(found: dict, config: Config) -> list[dict]:
    """A row for each metric and dtype: medians of the quiet measurements, ratios of them, their share of the ceiling.

    Theirs is what `peer_of` says; the other ratios are to the quickest dtype and to the float32 of transformers, and
    to our own bfloat16.
    """

    def ratio(other: float | None, mine: float | None) -> float | None:
        return other / mine if other and mine else None

    records, rows = found["records"], []
    ceilings = machine.merge_ceilings(
        [r for r in records if r["task"] == "ceilings" and r["quiet"]]
    )
    for name, task, unit, value, kind in METRICS:
        medians, counts, spreads = {}, {}, {}
        for one in dict.fromkeys((r["side"], r["dtype"]) for r in records if r["task"] == task):
            mine = [r for r in records if r["task"] == task and (r["side"], r["dtype"]) == one]
            quiet = [value(r) for r in mine if r["quiet"]]
            medians[one], counts[one] = statistics.median(quiet) if quiet else None, len(quiet)
            spreads[one] = (max(quiet) - min(quiet)) / medians[one] if quiet else None
        best_peer = min(
            (m for (side, _), m in medians.items() if side == "transformers" and m), default=None
        )
        question = found["tasks"].get(task)  # a cold start has none
        for dtype in found["dtypes"]:
            peer = peer_of(task, dtype)
            pair = [("ours", dtype), peer] if peer else [("ours", dtype)]
            if not all(one in medians for one in pair):
                continue
            ours, theirs = medians["ours", dtype], medians.get(peer)
            floors = [floor(kind, question, config, form, ceilings) for _, form in pair]
            rows.append({
                "metric": name.format(rows=len(question["rows"]) if question else 1),
                "task": task,
                "dtype": dtype,
                "unit": unit,
                "peer": " ".join(peer) if peer else None,
                "ours": ours,
                "theirs": theirs,
                "quiet_runs": min(counts[one] for one in pair),
                "spread": max((spreads[one] for one in pair if counts[one]), default=None),
                "ratio": ratio(theirs, ours),
                "ratio_to_best": ratio(best_peer, ours) if unit != "bytes" else None,
                "ratio_to_float32": ratio(medians.get(("transformers", "float32")), ours),
                "ratio_to_our_bfloat16": ratio(medians.get(("ours", "bfloat16")), ours),
                "ours_of_ceiling": ratio(floors[0], ours),
                "theirs_of_ceiling": ratio(floors[-1], theirs),
            })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------ showing
def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.0f} %"


def giga(rate: float | None) -> str:
    return "—" if rate is None else f"{rate / 1e9:.0f}"


def times(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}×"


def absolute(row: dict, side: str) -> str:
    """The median of "ours" or "theirs"."""
    scale, unit = (1e-9, "GB") if row["unit"] == "bytes" else (1, row["unit"])
    return "—" if row[side] is None else f"{row[side] * scale:.3f} {unit}"


def markdown(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    lines = [
        " | ".join(columns),
        *(" | ".join(cell(row) for cell in columns.values()) for row in rows),
    ]
    head, *body = (f"| {line} |" for line in lines)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def tables(found: dict, seconds: bool) -> str:
    """The rows as Markdown; with the absolute medians only where they are asked for.

    The first table has what transformers computes too, the second what it does not: quantised, or beside llama.cpp.
    """
    first = {"what": lambda row: row["metric"], "dtype": lambda row: row["dtype"]}
    if seconds:
        first |= {side: lambda row, side=side: absolute(row, side) for side in ("ours", "theirs")}
    with_transformers = first | {
        "beside transformers": lambda row: times(row["ratio"]),
        # The smaller dtype always has less memory.
        "beside its best dtype": lambda row: (
            "—" if row["unit"] == "bytes" else times(row["ratio_to_best"])
        ),
        "beside its float32": lambda row: times(row["ratio_to_float32"]),
        "of the ceiling": lambda row: percent(row["ours_of_ceiling"]),
        "transformers": lambda row: percent(row["theirs_of_ceiling"]),
        "apart": lambda row: percent(row["spread"]),
    }
    without = first | {
        "beside our bfloat16": lambda row: (
            "—" if row["dtype"] == "bfloat16" else times(row["ratio_to_our_bfloat16"])
        ),
        "beside llama.cpp": lambda row: (
            f"{times(row['ratio'])} ({row['peer'].split()[1]})" if row["peer"] else "—"
        ),
        "of the ceiling": lambda row: percent(row["ours_of_ceiling"]),
        "llama.cpp": lambda row: percent(row["theirs_of_ceiling"]),
        "apart": lambda row: percent(row["spread"]),
    }
    parts = []
    for columns, wanted in ((with_transformers, True), (without, False)):
        if rows := [
            row
            for row in found["rows"]
            if (row["peer"] == f"transformers {row['dtype']}") == wanted
        ]:
            parts.append(markdown(rows, columns))
    return "\n\n".join(parts)


def circumstances(found: dict) -> str:
    """The machine, its ceilings, the load and the logits, in sentences."""
    about, records = found["machine"], found["records"]
    where = (
        about["gpu"]
        or f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:g} GB of memory"
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"Machine: {where}; {', '.join(about['instructions'])}. {about['threads']} threads; {versions}."
    ]
    if best := machine.merge_ceilings(
        [r for r in records if r["task"] == "ceilings" and r["quiet"]]
    ):
        read, way = machine.quickest_read(best)
        lines.append(
            f"Ceilings: memory is read at {read / 1e9:.1f} GB/s ({way}). Products at the model's shapes, in GFLOP/s, "
            "of the vision tower / of the decoder:\n"
        )
        for dtype, parts in best["flop_per_s"].items():
            ways = dict.fromkeys(way for part in parts.values() for way in part)
            rates = (
                f"{way} {' / '.join(giga(part.get(way)) for part in parts.values())}"
                for way in ways
            )
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
    for about in {(r["version"], r["built"]) for r in records if "built" in r}:
        lines.append("llama.cpp: llama-cpp-python {}, built with {}.".format(*about))
    if found["logits"]:
        full = [one["share"] for name, one in found["logits"].items() if name.endswith("float32")]
        agree = "agree" if all(one["holds"] for one in found["logits"].values()) else "DIFFER"
        lines.append(
            f"The logits of both sides {agree}"
            + (f" (float32: {max(full):.1e} apart)." if full else ".")
        )
        least = {form: [one["cosine"] for name, one in found["logits"].items() if name.endswith(f" {form}")]
                 for form in COSINES}  # fmt: skip
        if cosines := [f"{form} {min(values):.5f}" for form, values in least.items() if values]:
            lines.append(f"Least cosine to our logits in float32: {', '.join(cosines)}.")
    return "\n".join(lines)


def section(found: dict | None, device: str) -> str:
    """What README.md says about one kind of device."""
    if found is None:
        return f"### {device}\n\nNot measured."
    return f"### {device}\n\n{tables(found, seconds=False)}\n\n{circumstances(found)}"


def write_readme(path: Path, results: Path) -> None:
    """Puts the tables of results/2b-cpu.json and 2b-cuda.json between the markers of README.md."""
    text, marks = (
        path.read_text(encoding="utf-8"),
        ("<!-- written by compare.py -->", "<!-- end -->"),
    )
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
    add(
        "--shapes",
        choices=SHAPES,
        default="2b",
        help="2b, thin (its widths, few layers) or tiny (default: 2b)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="one of these shapes (default: a random one in the cache)",
    )
    add(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS[:-1],
        help="(default: all but llama)",
    )
    formats, usual = [*ITEMSIZE, *QUANTISED], ["float32", "bfloat16", "int8"]
    add("--dtypes", nargs="+", choices=formats, default=usual, help=f"(default: {' '.join(usual)})")
    add(
        "--llama-python",
        default=sys.executable,
        metavar="PYTHON",
        help="has llama-cpp-python (default: this one)",
    )
    add(
        "--repetitions",
        type=int,
        default=3,
        metavar="N",
        help="fresh processes for each figure (default: 3)",
    )
    add(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="(default: all cores)",
    )
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no process that would end later than this",
    )
    add(
        "--busy",
        type=float,
        default=0.15,
        metavar="CORES",
        help="quiet is no more foreign load (default: 0.15)",
    )
    add(
        "--patience",
        type=float,
        default=600,
        metavar="S",
        help="how long to wait for quiet (default: 600 s)",
    )
    add(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="repeat a disturbed process so often (default: 1)",
    )
    add(
        "--out",
        type=Path,
        metavar="JSON",
        help="(default with 2b: results/2b-DEVICE.json, and README.md beside it)",
    )
    add(
        "--readme-only",
        action="store_true",
        help="measure nothing: write README.md from what results/ holds",
    )
    options = parser.parse_args(argv)
    for name in ("repetitions", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    if "llama" in options.sections:
        if options.device != "cpu":
            parser.error(f"--sections llama measures the CPU, and --device is {options.device}")
        if missing := llama.obstacle(options.llama_python):
            parser.error(missing)
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
    print(tables(found, seconds=True), circumstances(found), sep="\n\n")
    if publish:
        write_readme(HERE / "README.md", HERE / "results")
    complete = all(row["quiet_runs"] for row in found["rows"])
    return 0 if complete and all(one["holds"] for one in found["logits"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
