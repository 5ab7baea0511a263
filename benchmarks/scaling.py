"""Draw how cost grows with image tokens, context, batch and frames, for ours and transformers
5.23.0.

    python -m benchmarks.scaling                     results/scaling.png and .json; takes 20 minutes
    python -m benchmarks.scaling --shapes tiny --out scaling-tiny

On log-log axes a cost that grows with the n-th power of its cause is a line of slope n: 1 for work
on each token, 2 for attention between all of them. A needless copy, or a step that is repeated for
every token, shows as a slope that the other side does not have. By default the layers have the 2B
model's widths, but there are only four of each kind, which changes the constant part only. For
quiet machines and disturbed runs see `compare.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.checkpoint import find_checkpoint
from benchmarks.compare import SIDES, tidy
from benchmarks.options import add_common_options, check_common_options
from benchmarks.processes import HERE, Record, Say, run_quietly
from benchmarks.summary import ITEMSIZE, per_step, prefill_seconds

# Axis → what is measured there: (name of the curve, its seconds in a record).
CURVES = {
    "image tokens": [("vision encoder", lambda r: r["vision"])],
    "tokens of context": [
        ("prefill", lambda r: r["first_token"]),
        ("one decode step", per_step),
    ],
    "batch": [("one decode step", per_step)],
    "frames": [("vision encoder", lambda r: r["vision"]), ("prefill", prefill_seconds)],
}
COLORS = {"ours": "#0072b2", "transformers": "#d55e00"}

Line = list[tuple[float, float]]  # (x, seconds)


def points(tiny: bool) -> dict[str, dict[int, dict]]:
    """Return the tasks along each axis."""
    if tiny:
        sides = (4, 6, 8)
        contexts = (16, 32, 64)
        batches = (1, 2, 4)
        slices = (1, 2, 4)
    else:
        sides = (8, 16, 24, 32, 48)
        contexts = (128, 512, 2048, 8192)
        batches = (1, 2, 4, 8, 16)
        slices = (1, 2, 4, 8, 16, 32)
    return {
        "image tokens": {
            n * n: {"rows": [[4, ("image", 1, n, n)]], "new_tokens": 1} for n in sides
        },
        "tokens of context": {n: {"rows": [[n]], "new_tokens": 9} for n in contexts},
        "batch": {n: {"rows": [[64]] * n, "new_tokens": 9} for n in batches},
        "frames": {2 * n: {"rows": [[4, ("video", n, 8, 12)]], "new_tokens": 1} for n in slices},
    }


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict:
    """Return {axis: {curve: {side: [(x, median seconds), ...]}}} of the quiet measurements."""
    axes = points(options.shapes == "tiny")
    tasks = {}
    for axis, along in axes.items():
        for x, task in along.items():
            tasks[f"{axis} {x}"] = task
    job = {
        "kind": "questions",
        "checkpoint": str(folder),
        "device": options.device,
        "dtype": options.dtype,
        "tasks": tasks,
    }
    records = []
    for repetition in range(options.repetitions):
        in_turn = SIDES if repetition % 2 == 0 else SIDES[::-1]
        for side in in_turn:
            records += run_quietly(job | {"side": side}, options, say)
    curves = {}
    for axis, along in axes.items():
        curves[axis] = {}
        for name, value in CURVES[axis]:
            lines = {side: curve(records, side, axis, along, value) for side in SIDES}
            curves[axis][name] = lines
    return {
        "shapes": options.shapes,
        "dtype": options.dtype,
        "machine": machine.describe(options.device, options.threads),
        "curves": curves,
    }


def curve(records: list[Record], side: str, axis: str, along: dict, value) -> Line:
    """Return the median of the quiet measurements of a side at each point that has any."""
    line = []
    for x in along:
        seconds = []
        for record in records:
            is_point = record["side"] == side and record["task"] == f"{axis} {x}"
            if is_point and record["quiet"]:
                seconds.append(value(record))
        if seconds:
            line.append((x, statistics.median(seconds)))
    return line


def slope(line: Line) -> float | None:
    """Return the exponent of the growth over the last three points, by least squares."""
    if len(line) < 3:
        return None
    xs = [math.log(x) for x, _ in line[-3:]]
    ys = [math.log(y) for _, y in line[-3:]]
    return statistics.linear_regression(xs, ys).slope


def draw(results: dict, path: Path) -> None:
    """Draw a panel for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, (axis, curves) in zip(panels.flat, results["curves"].items(), strict=True):
        draw_panel(panel, axis, curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def unit_of(curves: dict[str, dict[str, Line]]) -> float:
    """Return the seconds of the first point of transformers, or of ours where it has none."""
    for side in reversed(SIDES):
        for lines in curves.values():
            if lines[side]:
                return lines[side][0][1]
    return 1.0


def draw_panel(panel, axis: str, curves: dict[str, dict[str, Line]]) -> None:
    """Draw the curves of an axis, relative to the first point of transformers."""
    unit = unit_of(curves)
    ticks = set()
    decades = []
    for style, (name, lines) in zip(("-", "--"), curves.items(), strict=False):
        for side, line in lines.items():
            if not line:
                continue
            xs = [x for x, _ in line]
            ys = [seconds / unit for _, seconds in line]
            text = f"{name}, {side}"
            if slope(line) is not None:
                text += f", slope {slope(line):.2f}"
            panel.loglog(xs, ys, style, marker="o", markersize=4, color=COLORS[side], label=text)
            ticks.update(xs)
            decades += [math.log10(y) for y in ys]
    panel.set_xticks(sorted(ticks), [str(x) for x in sorted(ticks)])
    panel.minorticks_off()
    # Only whole decades have labels.
    panel.set_ylim(10 ** math.floor(min(decades)), 10 ** max(1, math.ceil(max(decades))))
    panel.set(xlabel=axis, ylabel="cost (first point of transformers = 1)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def describe(axis: str, name: str, side: str, line: Line) -> str:
    steepness = "not measured"
    if slope(line) is not None:
        steepness = f"slope {slope(line):.2f}"
    values = ", ".join(f"{x}: {seconds:.4f} s" for x, seconds in line)
    return f"{axis}, {name}, {side}: {steepness} ({values})"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, shapes="thin")
    parser.add_argument("--dtype", choices=ITEMSIZE, default="float32", help="(default: float32)")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results" / "scaling",
        metavar="STEM",
        help="(default: results/scaling)",
    )
    options = parser.parse_args(argv)
    check_common_options(parser, options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    folder = options.checkpoint or find_checkpoint(options.shapes)
    results = measure(options, folder, lambda line: print(line, file=sys.stderr, flush=True))
    for axis, curves in results["curves"].items():
        for name, lines in curves.items():
            for side, line in lines.items():
                print(describe(axis, name, side, line))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tidy(results)) + "\n"
    options.out.with_suffix(".json").write_text(text, encoding="utf-8")
    draw(results, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
