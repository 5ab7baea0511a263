"""The command-line options that the benchmarks share."""

import argparse
import os
from pathlib import Path

from benchmarks.checkpoint import SHAPES


def add_common_options(parser: argparse.ArgumentParser, shapes: str) -> None:
    """Add the options of model, device and repetitions; shapes: the default of --shapes."""
    add = parser.add_argument
    add(
        "--shapes",
        choices=SHAPES,
        default=shapes,
        help=f"2b, thin (its widths, few layers) or tiny (default: {shapes})",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="DIRECTORY",
        help="a checkpoint of these shapes (default: a random one in the cache)",
    )
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add_process_options(parser)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measured processes: how many, their threads, how quiet the machine."""
    add = parser.add_argument
    add(
        "--repetitions",
        type=int,
        default=3,
        metavar="N",
        help="new processes for each figure (default: 3)",
    )
    add(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="(default: all cores)",
    )
    add(
        "--busy",
        type=float,
        default=0.15,
        metavar="CORES",
        help="the foreign load up to which the machine counts as quiet (default: 0.15)",
    )
    add(
        "--patience",
        type=float,
        default=600,
        metavar="S",
        help="how long to wait for a quiet machine (default: 600 s)",
    )
    add(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="repetitions of a process that was disturbed (default: 1)",
    )


def check_common_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message where a count is not positive."""
    if options.repetitions < 1:
        parser.error(f"--repetitions is {options.repetitions}, expected 1 or more")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected 1 or more")
