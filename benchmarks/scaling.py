"""How cost grows with image tokens, context, batch and frames, ours beside transformers 5.23.0: four log-log panels.

    python benchmarks/scaling.py                     writes results/scaling.png and .json; takes 20 minutes
    python benchmarks/scaling.py --shapes tiny --out scaling-tiny

On log-log axes a cost that grows with the n-th power of its cause is a line of slope n: 1 for what is done for each
token, 2 for attention between all of them. A copy too many or a step done again for every token shows as a slope that
the other side has not. By default the layers have the 2B model's widths, but there are only four of each kind: that
takes nothing from the slopes but the constant part. What disturbs and how it is noticed: see `compare.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.checkpoint import SHAPES, find_checkpoint
from benchmarks.compare import HERE, ITEMSIZE, SIDES, per_step, run_quietly, tidy

# Axis → what is measured there, as (name, its seconds in a record); and its points with the task of each.
CURVES = {
    "image tokens": [("vision tower", lambda r: r["vision"])],
    "tokens of context": [
        ("prefill", lambda r: r["first_token"]),
        ("one decode step", lambda r: per_step(r)),
    ],
    "batch": [("one decode step", lambda r: per_step(r))],
    "frames": [
        ("vision tower", lambda r: r["vision"]),
        ("prefill", lambda r: r["first_token"] - r["vision"]),
    ],
}


def points(tiny: bool) -> dict[str, dict[int, dict]]:
    """The tasks along each axis."""
    sides = (4, 6, 8) if tiny else (8, 16, 24, 32, 48)
    contexts = (16, 32, 64) if tiny else (128, 512, 2048, 8192)
    batches = (1, 2, 4) if tiny else (1, 2, 4, 8, 16)
    slices = (1, 2, 4) if tiny else (1, 2, 4, 8, 16, 32)
    return {
        "image tokens": {
            n * n: {"rows": [[4, ("image", 1, n, n)]], "new_tokens": 1} for n in sides
        },
        "tokens of context": {n: {"rows": [[n]], "new_tokens": 9} for n in contexts},
        "batch": {n: {"rows": [[64]] * n, "new_tokens": 9} for n in batches},
        "frames": {2 * n: {"rows": [[4, ("video", n, 8, 12)]], "new_tokens": 1} for n in slices},
    }


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict:
    """{axis: {curve: {side: [(x, median seconds), ...]}}} of the quiet measurements, with the machine."""
    axes = points(options.shapes == "tiny")
    tasks = {f"{axis} {x}": task for axis, along in axes.items() for x, task in along.items()}
    job = {
        "kind": "questions",
        "checkpoint": str(folder),
        "device": options.device,
        "dtype": options.dtype,
    }
    records = []
    for repetition in range(options.repetitions):
        for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
            records += run_quietly(job | {"side": side, "tasks": tasks}, options, say)
    curves = {}
    for axis, along in axes.items():
        for name, value in CURVES[axis]:
            for side in SIDES:
                line = curves.setdefault(axis, {}).setdefault(name, {}).setdefault(side, [])
                for x in along:
                    mine = [
                        r
                        for r in records
                        if (r["side"], r["task"]) == (side, f"{axis} {x}") and r["quiet"]
                    ]
                    if mine:
                        line.append((x, statistics.median(map(value, mine))))
    about = machine.describe(options.device, options.threads)
    return {"shapes": options.shapes, "dtype": options.dtype, "machine": about, "curves": curves}


def slope(line: list[tuple[float, float]]) -> float | None:
    """The exponent with which cost grows over the last three points, by least squares of the logarithms."""
    if len(line) < 3:
        return None
    (xs, ys) = ([math.log(value) for value in values] for values in zip(*line[-3:], strict=True))
    return statistics.linear_regression(xs, ys).slope


def draw(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    colours, styles = dict(zip(SIDES, ("#0072b2", "#d55e00"), strict=True)), ("-", "--")
    for panel, (axis, curves) in zip(panels.flat, found["curves"].items(), strict=True):
        first = [
            line[0][1]
            for side in reversed(SIDES)
            for sides in curves.values()
            for line in [sides[side]]
            if line
        ]
        unit = first[0] if first else 1.0
        for (name, sides), style in zip(curves.items(), styles[: len(curves)], strict=True):
            for side, line in sides.items():
                if line:
                    steep = "" if slope(line) is None else f", slope {slope(line):.2f}"
                    xs, ys = zip(*((x, seconds / unit) for x, seconds in line), strict=True)
                    label = f"{name}, {side}{steep}"
                    panel.loglog(
                        xs, ys, style, marker="o", markersize=4, color=colours[side], label=label
                    )
        drawn = [point for sides in curves.values() for line in sides.values() for point in line]
        ticks = sorted({x for x, _ in drawn})
        panel.set_xticks(ticks, [str(x) for x in ticks])
        panel.minorticks_off()
        decades = [
            math.log10(seconds / unit) for _, seconds in drawn
        ]  # whole ones: those are what has a label
        panel.set_ylim(10 ** math.floor(min(decades)), 10 ** max(1, math.ceil(max(decades))))
        panel.set(xlabel=axis, ylabel="cost (first point of transformers = 1)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--shapes",
        choices=SHAPES,
        default="thin",
        help="2b, thin (its widths, few layers) or tiny (default: thin)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="one of these shapes (default: a random one in the cache)",
    )
    add("--dtype", choices=ITEMSIZE, default="float32", help="(default: float32)")
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
        help="repeat what was disturbed so often (default: 1)",
    )
    add(
        "--out",
        type=Path,
        default=HERE / "results" / "scaling",
        metavar="STEM",
        help="(default: results/scaling)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    folder = options.checkpoint or find_checkpoint(options.shapes)
    found = measure(options, folder, lambda line: print(line, file=sys.stderr, flush=True))
    for axis, curves in found["curves"].items():
        for name, sides in curves.items():
            for side, line in sides.items():
                steep = "not measured" if slope(line) is None else f"slope {slope(line):.2f}"
                spent = ", ".join(f"{x}: {seconds:.4f} s" for x, seconds in line)
                print(f"{axis}, {name}, {side}: {steep} ({spent})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(tidy(found)) + "\n", encoding="utf-8")
    draw(found, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
