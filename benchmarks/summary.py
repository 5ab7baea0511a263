"""From the records of a run to the lines of its table: medians, ratios, shares of the ceiling."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import machine
from benchmarks.checkpoint import decoder_work, held_bytes, task_size, vision_work
from benchmarks.processes import Record
from qwen2vl import Config

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Formats that transformers is not measured in: our quantized weights, and those of llama.cpp. Bytes
# of a weight: int4 has a scale and an offset for 32 weights, Q8_0 a scale. Q4_K_M has 144 for 256,
# but 210 for the head and for value and down projections of half of the layers: the mean of 2B.
QUANTIZED = {"int8": 1, "int4": 0.5 + 4 / 32}
BYTES = ITEMSIZE | QUANTIZED | {"F16": 2, "Q8_0": 1 + 2 / 32, "Q4_K_M": 0.634}
LLAMA_FORMATS = {"int8": "Q8_0", "int4": "Q4_K_M"}  # the others are compared with F16

Side = tuple[str, str]  # ("ours", "transformers" or "llama.cpp"; format)


def peer_of(task: str, dtype: str) -> Side | None:
    """Return who is compared with ours, and in which format; None where transformers has none."""
    if task == "llama":
        return "llama.cpp", LLAMA_FORMATS.get(dtype, "F16")
    if dtype in QUANTIZED:
        return None
    return "transformers", dtype


def per_step(record: Record) -> float:
    """Return the mean seconds of a decode step."""
    return sum(record["steps"]) / len(record["steps"])


def prefill_seconds(record: Record) -> float:
    return record["first_token"] - record["vision"]


@dataclass(frozen=True)
class Metric:
    """What is compared; less is better.

    name: in the results files; it may hold {rows}. floor: what no computation can do without, see
    `floor`.
    """

    name: str
    task: str
    unit: str
    value: Callable[[Record], float]
    floor: str | None = None


METRICS = [
    Metric("vision encoder", "image", "s", lambda r: r["vision"], "vision"),
    Metric("prefill", "image", "s", prefill_seconds, "prefill"),
    Metric("decode, batch {rows}", "image", "s a step", per_step, "decode"),
    Metric("decode, batch {rows}", "batch", "s a step", per_step, "decode"),
    Metric("text only: prefill", "llama", "s", lambda r: r["first_token"], "prefill"),
    Metric("text only: decode", "llama", "s a step", per_step, "decode"),
    Metric("video to first token", "video", "s", lambda r: r["first_token"], "video"),
    Metric("cold start to first token", "cold", "s", lambda r: r["first_token"]),
    Metric("— imports", "cold", "s", lambda r: r["import_seconds"]),
    Metric("— load", "cold", "s", lambda r: r["load_seconds"]),
    Metric("peak memory", "image", "bytes", lambda r: r["peak_bytes"], "memory"),
    Metric("— without mapped files", "image", "bytes", lambda r: r["private_bytes"]),
]


def floor(
    kind: str | None, task: dict, config: Config, dtype: str, ceilings: dict | None
) -> float | None:
    """Return the seconds, or for "memory" the bytes, that no computation of a task can go below."""
    if kind is None or ceilings is None:
        return None
    itemsize = BYTES[dtype]
    rows, tokens, media = task_size(task)
    if kind == "memory":
        return held_bytes(config, rows, tokens + task["new_tokens"], itemsize)

    def seconds(part: str, work: tuple[float, float]) -> float:
        flop_rate, bandwidth = machine.best(ceilings, dtype, part)
        flop, size = work
        return max(flop / flop_rate, size / bandwidth)

    if kind == "decode":  # the step in the middle
        cached = tokens + task["new_tokens"] // 2
        return seconds("decoder", decoder_work(config, rows, 1, cached, itemsize))
    vision = seconds("vision", vision_work(config, media, max(itemsize, 2)))  # never quantized
    prefill = seconds("decoder", decoder_work(config, rows, tokens, 0, itemsize))
    return {"vision": vision, "prefill": prefill, "video": vision + prefill}[kind]


@dataclass(frozen=True)
class Measured:
    """The quiet measurements of one side and format; median and spread are None without any."""

    median: float | None = None
    spread: float | None = None
    count: int = 0


def measured(metric: Metric, records: list[Record]) -> dict[Side, Measured]:
    """Return what was measured of a metric, for each side and format that ran its task."""
    values: dict[Side, list[float]] = {}
    for record in records:
        if record["task"] != metric.task:
            continue
        quiet = values.setdefault((record["side"], record["dtype"]), [])
        if record["quiet"]:
            quiet.append(metric.value(record))
    result = {}
    for side, quiet in values.items():
        result[side] = Measured()
        if quiet:
            median = statistics.median(quiet)
            result[side] = Measured(median, (max(quiet) - min(quiet)) / median, len(quiet))
    return result


def divide(a: float | None, b: float | None) -> float | None:
    """Return a / b, or None if one of them is missing or zero."""
    if not a or not b:
        return None
    return a / b


def quiet_ceilings(records: list[Record]) -> dict | None:
    """Return the best rates of the quiet measurements of the machine."""
    quiet = [r for r in records if r["task"] == "ceilings" and r["quiet"]]
    return machine.merge_ceilings(quiet)


def summarize(results: dict, config: Config) -> list[dict]:
    """Return a row for each metric and dtype: medians, their ratios and their shares of the
    ceiling.

    `theirs` is that of `peer_of`; the other ratios are to the fastest dtype and to the float32 of
    transformers, and to our own bfloat16.
    """
    ceilings = quiet_ceilings(results["records"])
    rows = []
    for metric in METRICS:
        sides = measured(metric, results["records"])
        task = results["tasks"].get(metric.task)  # a cold start has none
        for dtype in results["dtypes"]:
            peer = peer_of(metric.task, dtype)
            if ("ours", dtype) in sides and (peer is None or peer in sides):
                rows.append(summarize_dtype(metric, dtype, sides, task, config, ceilings))
    return rows


def summarize_dtype(
    metric: Metric,
    dtype: str,
    sides: dict[Side, Measured],
    task: dict | None,
    config: Config,
    ceilings: dict | None,
) -> dict:
    """Return the row of a metric for one of our dtypes."""
    nothing = Measured()
    peer = peer_of(metric.task, dtype)
    ours = sides["ours", dtype]
    theirs = sides.get(peer, nothing)
    float32 = sides.get(("transformers", "float32"), nothing)
    our_bfloat16 = sides.get(("ours", "bfloat16"), nothing)
    our_floor = floor(metric.floor, task, config, dtype, ceilings)
    row = {
        "metric": metric.name.format(rows=len(task["rows"]) if task else 1),
        "task": metric.task,
        "dtype": dtype,
        "unit": metric.unit,
        "peer": None,
        "ours": ours.median,
        "theirs": theirs.median,
        "quiet_runs": ours.count,
        "spread": ours.spread,
        "ratio": divide(theirs.median, ours.median),
        "ratio_to_best": divide(fastest_of_transformers(metric, sides), ours.median),
        "ratio_to_float32": divide(float32.median, ours.median),
        "ratio_to_our_bfloat16": divide(our_bfloat16.median, ours.median),
        "ours_of_ceiling": divide(our_floor, ours.median),
        "theirs_of_ceiling": None,
    }
    if peer is not None:
        spreads = [side.spread for side in (ours, theirs) if side.count]
        their_floor = floor(metric.floor, task, config, peer[1], ceilings)
        row["peer"] = " ".join(peer)
        row["quiet_runs"] = min(ours.count, theirs.count)
        row["spread"] = max(spreads, default=None)
        row["theirs_of_ceiling"] = divide(their_floor, theirs.median)
    return row


def fastest_of_transformers(metric: Metric, sides: dict[Side, Measured]) -> float | None:
    """Return the shortest median of its dtypes; None for memory, where fewer bytes always win."""
    if metric.unit == "bytes":
        return None
    medians = [m.median for (name, _), m in sides.items() if name == "transformers" and m.count]
    return min(medians, default=None)
