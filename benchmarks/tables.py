"""Show the results of a run as Markdown, and put them into README.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.processes import Record
from benchmarks.summary import quiet_ceilings

# The limits of the cosine to our float32 logits. Random weights lose most, as nothing in them
# repeats.
COSINES = {"int8": 0.998, "int4": 0.9, "F16": 0.999, "Q8_0": 0.999, "Q4_K_M": 0.9}
START_MARK = "<!-- written by compare.py -->"
END_MARK = "<!-- end -->"


# -------------------------------------------------------------------------------------------- table


def percent(share: float | None) -> str:
    if share is None:
        return "—"
    return f"{100 * share:.0f} %"


def times(ratio: float | None) -> str:
    if ratio is None:
        return "not measured"
    return f"{ratio:.2f}×"


def absolute(row: dict, side: str) -> str:
    """Return the median of "ours" or "theirs" with its unit."""
    value = row[side]
    if value is None:
        return "—"
    if row["unit"] == "bytes":
        return f"{value / 1e9:.3f} GB"
    return f"{value:.3f} {row['unit']}"


def ratio_to_best(row: dict) -> str:
    """Return a dash for memory, where the dtype with fewer bytes is always the best."""
    if row["unit"] == "bytes":
        return "—"
    return times(row["ratio_to_best"])


def ratio_to_our_bfloat16(row: dict) -> str:
    if row["dtype"] == "bfloat16":
        return "—"
    return times(row["ratio_to_our_bfloat16"])


def ratio_to_llama(row: dict) -> str:
    if row["peer"] is None:
        return "—"
    form = row["peer"].split()[1]
    return f"{times(row['ratio'])} ({form})"


Columns = dict[str, Callable[[dict], str]]
NAMES: Columns = {"what": lambda row: row["metric"], "dtype": lambda row: row["dtype"]}
SECONDS: Columns = {
    "ours": lambda row: absolute(row, "ours"),
    "theirs": lambda row: absolute(row, "theirs"),
}
WITH_TRANSFORMERS: Columns = {
    "vs transformers": lambda row: times(row["ratio"]),
    "vs its best dtype": ratio_to_best,
    "vs its float32": lambda row: times(row["ratio_to_float32"]),
    "share of ceiling": lambda row: percent(row["ours_of_ceiling"]),
    "transformers": lambda row: percent(row["theirs_of_ceiling"]),
    "spread": lambda row: percent(row["spread"]),
}
WITHOUT_TRANSFORMERS: Columns = {
    "vs our bfloat16": ratio_to_our_bfloat16,
    "vs llama.cpp": ratio_to_llama,
    "share of ceiling": lambda row: percent(row["ours_of_ceiling"]),
    "llama.cpp": lambda row: percent(row["theirs_of_ceiling"]),
    "spread": lambda row: percent(row["spread"]),
}


def markdown(rows: list[dict], columns: Columns) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
    return "\n".join(lines)


def tables(results: dict, seconds: bool) -> str:
    """Return the rows as Markdown; seconds: with the absolute medians.

    The first table has what transformers computes too; the second has the quantized weights and the
    comparison with llama.cpp.
    """
    first_columns = NAMES | SECONDS if seconds else NAMES
    with_transformers = []
    without_transformers = []
    for row in results["rows"]:
        if row["peer"] == f"transformers {row['dtype']}":
            with_transformers.append(row)
        else:
            without_transformers.append(row)
    parts = []
    if with_transformers:
        parts.append(markdown(with_transformers, first_columns | WITH_TRANSFORMERS))
    if without_transformers:
        parts.append(markdown(without_transformers, first_columns | WITHOUT_TRANSFORMERS))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------ circumstances


def circumstances(results: dict) -> str:
    """Return the machine, its ceilings, the load and the logits, in sentences."""
    lines = [
        machine_line(results["machine"]),
        *ceiling_lines(results["records"]),
        *load_lines(results["records"], results["busy_limit"]),
        *repetition_lines(results["rows"]),
        *llama_lines(results["records"]),
        *logits_lines(results["logits"]),
    ]
    return "\n".join(lines)


def machine_line(about: dict) -> str:
    hardware = about["gpu"]
    if hardware is None:
        hardware = (
            f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:g} GB of memory"
        )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    instructions = ", ".join(about["instructions"])
    return f"Machine: {hardware}; {instructions}. {about['threads']} threads; {versions}."


def giga(rate: float | None) -> str:
    if rate is None:
        return "—"
    return f"{rate / 1e9:.0f}"


def ceiling_lines(records: list[Record]) -> list[str]:
    """Return the bandwidth, and for each dtype the matmul rates by library."""
    best = quiet_ceilings(records)
    if best is None:
        return []
    bandwidth, work = machine.fastest_read(best)
    lines = [
        f"Ceilings: memory is read at {bandwidth / 1e9:.1f} GB/s ({work}). Matmul rates at the "
        "model's shapes, in GFLOP/s, of the vision encoder / of the decoder:\n"
    ]
    for dtype, parts in best["flop_per_s"].items():
        libraries = dict.fromkeys(library for part in parts.values() for library in part)
        rates = []
        for library in libraries:
            of_parts = " / ".join(giga(part.get(library)) for part in parts.values())
            rates.append(f"{library} {of_parts}")
        lines.append(f"* {dtype}: {', '.join(rates)}")
    return [*lines, ""]


def load_lines(records: list[Record], limit: float) -> list[str]:
    loads = [r["load"]["foreign_cores"] + r["load"]["stolen_cores"] for r in records if r["quiet"]]
    if not loads:
        return []
    noisy = len(records) - len(loads)
    return [
        f"Load: other processes kept {statistics.mean(loads):.2f} cores busy on average, "
        f"{max(loads):.2f} at most, stolen time included; {noisy or 'none'} of {len(records)} "
        f"measurements had more than {limit:g} and do not count."
    ]


def repetition_lines(rows: list[dict]) -> list[str]:
    counts = sorted({row["quiet_runs"] for row in rows})
    if not counts:
        return []
    span = str(counts[0])
    if len(counts) > 1:
        span += f" to {counts[-1]}"
    return [f"Quiet repetitions behind each figure: {span}."]


def llama_lines(records: list[Record]) -> list[str]:
    builds = {(r["version"], r["built"]) for r in records if "built" in r}
    return [
        f"llama.cpp: llama-cpp-python {version}, built with {features}."
        for version, features in builds
    ]


def logits_lines(logits: dict[str, dict]) -> list[str]:
    """Return whether the logits agree, and by how much they differ."""
    if not logits:
        return []
    agree = "agree" if all(comparison["holds"] for comparison in logits.values()) else "DIFFER"
    line = f"The logits of both sides {agree}"
    shares = [logits[name]["share"] for name in logits if name.endswith("float32")]
    if shares:
        line += f" (float32: relative difference {max(shares):.1e})"
    return [line + ".", *cosine_lines(logits)]


def cosine_lines(logits: dict[str, dict]) -> list[str]:
    cosines = []
    for form in COSINES:
        values = [logits[name]["cosine"] for name in logits if name.endswith(f" {form}")]
        if values:
            cosines.append(f"{form} {min(values):.5f}")
    if not cosines:
        return []
    return [f"Smallest cosine to our float32 logits: {', '.join(cosines)}."]


# ------------------------------------------------------------------------------------------- README


def section(results: dict | None, device: str) -> str:
    """Return what README.md says about one kind of device."""
    if results is None:
        return f"### {device}\n\nNot measured."
    return f"### {device}\n\n{tables(results, seconds=False)}\n\n{circumstances(results)}"


def write_readme(path: Path, results: Path) -> None:
    """Put the tables of results/2b-cpu.json and 2b-cuda.json between the marks of README.md.

    Raises ValueError if the file has not exactly one of each mark.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(START_MARK) != 1 or text.count(END_MARK) != 1:
        raise ValueError(f"{path}: expected the lines {START_MARK} and {END_MARK} once each")
    parts = [START_MARK]
    for device in ("cpu", "cuda"):
        file = results / f"2b-{device}.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        parts.append(section(stored, device.upper()))
    parts.append(END_MARK)
    before = text.split(START_MARK)[0]
    after = text.split(END_MARK)[1]
    path.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")
