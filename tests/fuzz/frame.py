"""The frame of the fuzzers: what a target is, how a mutant is judged, and workers with bounds.

A target is one file in `targets/` that defines TARGET. Its mutants have numbers: a seed and a
number give the same mutant on every machine, so that a failure can be repeated.

    seeds ── mutate ──> mutant ── run ──> right, refused (one sentence) or a failure

A failure is an exception that a user could do nothing with, a crash of the process, more time or
more memory than the target may take.
"""

import hashlib
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations import Mutate, mutate_bytes

RIGHT = "right"
REFUSED = "refused"
FOREIGN = "foreign"  # an exception that is no sentence, or the end of the process
HANG = "hang"
MEMORY = "memory"
FAILURES = (FOREIGN, HANG, MEMORY)

CASES = Path(__file__).parent / "cases"
ADDRESS_SPACE = 2**33  # bytes of a worker, far above any target's bound: protects the machine
START_SECONDS = 120.0  # that a worker may take to import its target
WAITING = 30.0  # seconds of the clock for each of processor time, before a mutant counts as hanging
LONGEST_SENTENCE = 1000


@dataclass(frozen=True)
class Target:
    """One kind of input.

    run: called with a mutant. It returns where the answer is right, and raises ValueError or
    OSError, with one sentence that contains `mentions`, where the input is refused. It raises
    AssertionError for an answer that is wrong.
    """

    seeds: Callable[[], list[bytes]]  # small inputs that are right
    run: Callable[[bytes], None]
    mentions: str  # what every refusal names: the source, or the file
    mutate: Mutate = mutate_bytes
    seconds: float = 10.0  # of processor time of one mutant
    megabytes: float = 512.0  # by which one mutant may raise the peak memory of the process
    quick_count: int = 300  # mutants that pytest runs


@dataclass(frozen=True)
class Outcome:
    """How one mutant ended."""

    kind: str  # RIGHT, REFUSED or one of FAILURES
    detail: str = ""  # the sentence, or what went wrong


@dataclass
class Tally:
    """How the mutants of one target ended."""

    name: str
    kinds: Counter = field(default_factory=Counter)
    failures: list[tuple[int, Outcome]] = field(default_factory=list)  # by the number of the mutant
    seconds: float = 0.0
    is_interrupted: bool = False

    @property
    def mutants(self) -> int:
        """How many were run."""
        return self.kinds.total()

    def add(self, number: int, outcome: Outcome) -> None:
        """Count one outcome."""
        self.kinds[outcome.kind] += 1
        if outcome.kind in FAILURES:
            self.failures.append((number, outcome))


# ---------------------------------------------------------------------------------------- targets


def target_names() -> list[str]:
    """Return the names of all targets: the modules in `targets/`, in alphabetical order."""
    folder = Path(__file__).parent / "targets"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def module_name(name: str) -> str:
    """Return the module of a target that is called by its short or by its full name."""
    return name if "." in name else f"{__package__}.targets.{name}"


@lru_cache
def load_target(name: str) -> tuple[Target, list[bytes]]:
    """Return a target and its seeds, which are made once."""
    target = importlib.import_module(module_name(name)).TARGET
    return target, target.seeds()


def make_mutant(name: str, seed: int, number: int) -> bytes:
    """Return a mutant by its number: the same one in every process."""
    target, seeds = load_target(name)
    return target.mutate(Random(f"{name} {seed} {number}"), seeds)


# ---------------------------------------------------------------------------------------- judgment


def judge(target: Target, data: bytes) -> Outcome:
    """Run one input in this process and return how it ended."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(data)
    except (ValueError, OSError) as error:
        return judge_sentence(error, target.mentions)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a panic of an extension
        return Outcome(FOREIGN, describe(error))
    return Outcome(RIGHT)


def judge_sentence(error: Exception, mentions: str) -> Outcome:
    """Return REFUSED for an error whose message is a sentence to show to a user, else FOREIGN."""
    text = str(error)
    if mentions not in text:
        return Outcome(FOREIGN, f"its message does not name {mentions!r}: {describe(error)}")
    if "\n" in text or len(text) > LONGEST_SENTENCE:
        return Outcome(FOREIGN, f"its message is not one sentence: {describe(error)}")
    return Outcome(REFUSED, text)


def describe(error: BaseException) -> str:
    """Return an exception and where it was raised, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({places})"


# ---------------------------------------------------------------------------------------- workers


def peak_megabytes() -> float:
    """Return the most memory that this process has held; 0 where the system does not count it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return other_peak_megabytes()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def other_peak_megabytes() -> float:
    """Return the same by the count of the system. On Linux that would include the parent's."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def limit_memory() -> None:
    """Bound the address space of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, hard))


def limit_time(seconds: float) -> None:
    """Let the system end this process after so many seconds of processor time; 0: never.

    Unlike those of a clock, they do not pass faster on a busy machine.
    """
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def silence_stderr() -> None:
    """Drop what libraries in C write about damaged data."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def use_one_thread() -> None:
    """Let PyTorch compute in one thread, where the target uses it.

    Tensors of a mutant are so small that threads wait for one another: with two, a mutant of
    `batch` took 172 ms of processor time instead of 12, one of `json_files` 61 instead of 15.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def work(connection: Any, name: str, seed: int) -> None:
    """Answer each number with the outcome of its mutant, in a process of its own."""
    target, seeds = load_target(name)
    use_one_thread()
    judge(target, seeds[0])  # what is imported and cached at first use is not a mutant's
    limit_memory()
    silence_stderr()
    connection.send(None)
    while True:
        number = connection.recv()
        before = peak_megabytes()
        mutant = make_mutant(name, seed, number)
        limit_time(target.seconds)
        outcome = judge(target, mutant)
        limit_time(0)
        grown = peak_megabytes() - before
        if grown > target.megabytes and outcome.kind not in FAILURES:
            outcome = Outcome(MEMORY, f"took {grown:,.0f} MB more; {outcome.detail}")
        connection.send(outcome)


class Worker:
    """A process that runs mutants of one target, one at a time."""

    def __init__(self, name: str, seed: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, name, seed), daemon=True)
        self.process.start()
        theirs.close()
        try:
            if not self.connection.poll(START_SECONDS):
                raise RuntimeError(f"the target {name} did not start in {START_SECONDS:g} seconds")
            self.connection.recv()
        except EOFError as error:
            self.stop()
            raise RuntimeError(f"the target {name} cannot be started, see above") from error

    def run(self, number: int, seconds: float) -> Outcome:
        """Return the outcome of a mutant. The worker cannot be used after HANG or a crash."""
        self.connection.send(number)
        if not self.connection.poll(seconds * WAITING):
            return Outcome(HANG, f"waits for {seconds * WAITING:g} seconds")
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode == -getattr(signal, "SIGPROF", 0):
                return Outcome(HANG, f"not done after {seconds:g} seconds")
            return Outcome(FOREIGN, f"the process ended with code {self.process.exitcode}")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_mutants(name: str, seed: int, numbers: Iterable[int]) -> Iterator[tuple[int, Outcome]]:
    """Yield the numbers and outcomes of mutants. After a failure, a new worker continues."""
    target, _ = load_target(name)
    worker = None
    try:
        for number in numbers:
            if worker is None:
                worker = Worker(name, seed)
            outcome = worker.run(number, target.seconds)
            if outcome.kind in FAILURES:
                worker.stop()
                worker = None
            yield number, outcome
    finally:
        if worker is not None:
            worker.stop()


def fuzz(name: str, seed: int, numbers: Iterable[int], seconds: float | None = None) -> Tally:
    """Return how mutants ended. Numbers, seconds or Ctrl-C end them, whichever comes first."""
    tally = Tally(name)
    start = time.monotonic()
    try:
        for number, outcome in run_mutants(name, seed, numbers):
            tally.add(number, outcome)
            tally.seconds = time.monotonic() - start
            if seconds is not None and tally.seconds > seconds:
                break
    except KeyboardInterrupt:  # what was counted is worth printing
        tally.is_interrupted = True
    return tally


# ---------------------------------------------------------------------------------------- results


HEADER = "| target | mutants | right | refused | foreign | hangs | memory | per second |\n"
HEADER += "|---" * 8 + "|"


def table_row(tally: Tally) -> str:
    """Return the counts of one target as a line of a Markdown table."""
    kinds = [tally.kinds[kind] for kind in (RIGHT, REFUSED, FOREIGN, HANG, MEMORY)]
    rate = tally.mutants / max(tally.seconds, 1e-9)
    counts = " | ".join(f"{count:,}" for count in (tally.mutants, *kinds))
    return f"| {tally.name} | {counts} | {rate:,.0f} |"


def save_failures(tally: Tally, seed: int, folder: Path) -> list[Path]:
    """Write each mutant that failed to a file, named by target and content; return their paths."""
    paths = []
    for number, _ in tally.failures:
        data = make_mutant(tally.name, seed, number)
        path = folder / tally.name / hashlib.sha256(data).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    return paths


def case_files(name: str) -> list[Path]:
    """Return the committed inputs that once failed a target."""
    return sorted(path for path in (CASES / name).glob("*") if path.is_file())
