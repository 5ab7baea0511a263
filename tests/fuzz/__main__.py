"""python -m tests.fuzz: run the fuzzers, and print how many mutants were answered or refused."""

import argparse
import itertools
import sys
from pathlib import Path

from tests.fuzz import frame


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, metavar="M", help="in all, shared by the targets")
    parser.add_argument("--mutants", type=int, metavar="N", help="of each target")
    parser.add_argument("--only", metavar="NAMES", help="targets, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/fuzz"),
        metavar="DIR",
        help="where mutants that fail are written (default: runs/fuzz)",
    )
    arguments = parser.parse_args(argv)
    if arguments.minutes is None and arguments.mutants is None:
        parser.error("expected --minutes or --mutants, got neither")
    names = frame.target_names()
    arguments.names = arguments.only.split(",") if arguments.only else names
    unknown = sorted(set(arguments.names) - set(names))
    if unknown:
        parser.error(f"there is no target {unknown[0]}; there are {', '.join(names)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 1 where a mutant raised something foreign, hung or took too much memory."""
    arguments = parse(argv)
    seconds = None
    if arguments.minutes is not None:
        seconds = arguments.minutes * 60 / len(arguments.names)
    failures = 0
    print(frame.HEADER, flush=True)
    for name in arguments.names:
        numbers = itertools.count(arguments.first)
        if arguments.mutants is not None:
            numbers = range(arguments.first, arguments.first + arguments.mutants)
        tally = frame.fuzz(name, arguments.seed, numbers, seconds)
        print(frame.table_row(tally), flush=True)
        paths = frame.save_failures(tally, arguments.seed, arguments.out)
        for (number, outcome), path in zip(tally.failures, paths, strict=True):
            print(f"{name} {number} in {path}: {outcome.kind}: {outcome.detail}", file=sys.stderr)
        failures += len(tally.failures)
        if tally.is_interrupted:
            break
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
