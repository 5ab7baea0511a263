"""The machine: its description, its load by other processes, and its highest rates.

A foreign process on one core can make matmuls on all cores many times slower, because the threads
of a matmul wait for each other. So no measurement counts unless the machine was quiet meanwhile.
"""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

# The instruction sets that decide how fast matmuls are.
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
)
TICK = os.sysconf("SC_CLK_TCK")  # ticks of /proc per second, mostly 100


def describe(device: str, threads: int) -> dict:
    """Return the hardware and the versions, without the host name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))  # of the last core
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    family = platform.machine()
    if "cpu family" in fields:
        family = f"family {fields['cpu family']}, model {fields['model']}"
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.get_device_name(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{fields.get('model name', platform.processor())} ({family})",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gb": round(memory / 1e9, 1),
        "gpu": gpu,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


# --------------------------------------------------------------------------------------------- load


class Sample(NamedTuple):
    """Counters at a time: processor seconds of the machine, of our processes, and stolen ones."""

    time: float
    machine: float
    own: float
    stolen: float
    private_bytes: int


def take_sample(processes: list[int]) -> Sample:
    """Read the counters; private_bytes are those of the first process."""
    moment = time.monotonic()
    machine, own, stolen = used_seconds(processes)
    return Sample(moment, machine, own, stolen, private_bytes(processes[0]))


def used_seconds(processes: list[int]) -> tuple[float, float, float]:
    """Return processor seconds: of the machine, of these processes, stolen by the hypervisor."""
    first_line = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
    ticks = [int(field) for field in first_line.split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks
    own = 0
    for process in processes:
        try:
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        # User and kernel time of the process and of its ended children.
        own += sum(int(field) for field in stat.rpartition(")")[2].split()[11:15])
    machine = user + nice + system + irq + softirq
    return machine / TICK, own / TICK, stolen / TICK


def private_bytes(process: int) -> int:
    """Return the resident memory of a process without mapped files."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def load_between(first: Sample, last: Sample) -> dict[str, float]:
    """Return the mean numbers of cores that other processes and the hypervisor kept busy."""
    seconds = max(last.time - first.time, 1e-9)
    foreign = (last.machine - first.machine) - (last.own - first.own)
    return {
        "foreign_cores": round(max(0.0, foreign / seconds), 3),
        "stolen_cores": round((last.stolen - first.stolen) / seconds, 3),
    }


class Watch:
    """Sample the load of the machine four times a second while one of our processes runs."""

    def __init__(self, process: int):
        self.processes = [process, os.getpid()]
        self.samples: list[Sample] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        while not self.done.wait(0.25):
            self.samples.append(take_sample(self.processes))

    def __enter__(self) -> Watch:
        self.samples.append(take_sample(self.processes))
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.samples.append(take_sample(self.processes))

    def between(self, start: float, end: float) -> dict[str, float]:
        """Return the load between two times, and the peak of private memory.

        The interval is extended to the last sample before `start` and the first one after `end`.
        """
        moments = [sample.time for sample in self.samples]
        first = max(0, bisect_right(moments, start) - 1)
        last = max(first, min(len(moments) - 1, bisect_left(moments, end)))
        samples = self.samples[first : last + 1]
        peak = max(sample.private_bytes for sample in samples)
        return load_between(samples[0], samples[-1]) | {"private_bytes": peak}


def is_quiet(load: dict, limit: float) -> bool:
    return load["foreign_cores"] + load["stolen_cores"] <= limit


def wait_until_quiet(limit: float, patience: float, say: Callable[[str], None]) -> dict:
    """Wait for two quiet seconds, at most `patience` seconds; return the last load."""
    start = time.monotonic()
    span = min(2.0, patience + 0.1)
    has_told = False
    while True:
        before = take_sample([os.getpid()])
        time.sleep(span)
        load = load_between(before, take_sample([os.getpid()]))
        if is_quiet(load, limit) or time.monotonic() - start > patience:
            return load
        if not has_told:
            foreign = load["foreign_cores"]
            stolen = load["stolen_cores"]
            say(f"not quiet: {foreign} cores busy, {stolen} stolen; waiting")
            has_told = True


# ----------------------------------------------------------------------------------------- ceilings


@dataclass
class Stopwatch:
    """Time a piece of work repeatedly: at least three times, for about `budget` seconds."""

    clock: Callable[[], float]
    budget: float

    def median_seconds(self, work: Callable[[], object], share: float = 1.0) -> float:
        """Return the median time; share: of the budget."""
        work()
        times = []
        end = self.clock() + self.budget * share
        while len(times) < 3 or (self.clock() < end and len(times) < 50):
            start = self.clock()
            work()
            times.append(self.clock() - start)
        return sorted(times)[len(times) // 2]


def has_onednn(device: str) -> bool:
    import torch

    return device == "cpu" and torch.backends.mkldnn.is_available()


def matmul_libraries(device: str) -> dict[str, Callable]:
    """Return the ways to compute x [N, in] @ weight.T: (weight [out, in], N) → a function of x."""
    import torch
    import torch.nn.functional as F

    def linear(weight, rows):
        return lambda x: F.linear(x, weight)

    def onednn_reordered(weight, rows):
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")

    def onednn(weight, rows):
        return lambda x: torch._C._nn.mkldnn_linear(x.to_mkldnn(), weight).to_dense()

    libraries = {"F.linear": linear}
    if has_onednn(device):
        libraries["oneDNN, weight reordered"] = onednn_reordered
        libraries["oneDNN"] = onednn
    return libraries


Shapes = list[tuple[int, int, int, int]]  # (count, N, in, out) of matmuls


def ceilings(
    shapes: dict[str, Shapes],
    dtypes: list[str],
    device: str,
    clock: Callable[[], float],
    megabytes: int = 1024,
    budget: float = 1.0,
) -> dict:
    """Return the machine's highest rates, whichever library reaches them.

    shapes: the matmuls in which each part of the model spends its time. The result holds the bytes
    per second that each of several reductions reads from memory; the FLOP per second of a part's
    matmuls, by dtype, part and library; and the bytes per second of weights that matmuls with one
    row read, as decoding does.
    """
    stopwatch = Stopwatch(clock, budget)
    reads = read_rates(stopwatch, device, megabytes)
    rates = {}
    not_possible = {}
    for dtype in dtypes:
        rates[dtype] = {}
        for part, matmuls in shapes.items():
            rates[dtype][part] = matmul_rates(stopwatch, matmuls, dtype, device, not_possible)
    _, _, width, out = shapes["decoder"][-1]
    single = {}
    # Memory is no slower for the dtypes that were not asked for.
    for dtype in dict.fromkeys((*dtypes, "bfloat16", "float16")):
        single |= single_row_rates(stopwatch, width, out, dtype, device, megabytes)
    return {
        "read_bytes_per_s": reads,
        "flop_per_s": rates,
        "single_row_bytes_per_s": single,
        "not_possible": not_possible,
    }


def read_rates(stopwatch: Stopwatch, device: str, megabytes: int) -> dict[str, float]:
    """Return the bytes per second that reductions read from memory."""
    import torch

    # Not zeros: the pages of memory that nobody has written to are all the same one.
    data = torch.ones(megabytes << 18, device=device)
    reductions = {
        "sum": lambda: data.sum(),
        "largest": lambda: data.max(),
        "product": lambda: data.view(-1, 1024) @ data[:1024],
        "sum in bfloat16": lambda: data.view(torch.bfloat16).sum(),
        "largest of int64": lambda: data.view(torch.int64).amax(),
    }
    return {name: data.nbytes / stopwatch.median_seconds(work) for name, work in reductions.items()}


def matmul_rates(
    stopwatch: Stopwatch, matmuls: Shapes, dtype: str, device: str, not_possible: dict[str, str]
) -> dict[str, float]:
    """Return the FLOP per second of a part's matmuls, by library, and of the fastest at each shape.

    not_possible receives the reasons of the libraries that lack such a matmul on this machine.
    """
    seconds = {}
    fastest = [float("inf")] * len(matmuls)
    for library, prepare in matmul_libraries(device).items():
        try:
            seconds[library] = matmul_seconds(stopwatch, prepare, matmuls, dtype, device)
        except (RuntimeError, AttributeError) as error:
            not_possible[f"{dtype}, {library}"] = str(error).splitlines()[0][:200]
            continue
        fastest = [min(pair) for pair in zip(fastest, seconds[library], strict=True)]
    seconds["the best of them at each shape"] = fastest
    flop = sum(2 * count * rows * width * out for count, rows, width, out in matmuls)
    rates = {}
    for library, times in seconds.items():
        total = sum(matmul[0] * time for matmul, time in zip(matmuls, times, strict=True))
        rates[library] = flop / total
    return rates


def matmul_seconds(
    stopwatch: Stopwatch, prepare: Callable, matmuls: Shapes, dtype: str, device: str
) -> list[float]:
    """Return the median time of each matmul."""
    import torch

    seconds = []
    for _count, rows, width, out in matmuls:
        x = torch.randn(rows, width, device=device).to(getattr(torch, dtype))
        weight = torch.randn(out, width, device=device).to(getattr(torch, dtype))
        multiply = prepare(weight, rows)
        work = lambda multiply=multiply, x=x: multiply(x)  # noqa: E731
        seconds.append(stopwatch.median_seconds(work, 1 / len(matmuls)))
    return seconds


def single_row_rates(
    stopwatch: Stopwatch, width: int, out: int, dtype: str, device: str, megabytes: int
) -> dict[str, float]:
    """Return the bytes per second of weights that matmuls with one row read, with and without
    oneDNN.

    This switches oneDNN for the whole process, so it belongs into a process of its own.
    """
    import torch
    import torch.nn.functional as F

    torch_dtype = getattr(torch, dtype)
    count = max(
        2, (megabytes << 19) // (width * out * torch_dtype.itemsize)
    )  # more than caches hold
    weights = torch.randn(1, out, width, device=device).to(torch_dtype).repeat(count, 1, 1)
    x = torch.randn(1, width, device=device).to(torch_dtype)

    def multiply_all():
        return [F.linear(x, weight) for weight in weights]

    rates = {}
    if has_onednn(device) and torch.backends.mkldnn.enabled:
        rates[f"{dtype} by oneDNN"] = weights.nbytes / stopwatch.median_seconds(multiply_all)
        torch.backends.mkldnn.enabled = False
        try:
            rates[dtype] = weights.nbytes / stopwatch.median_seconds(multiply_all)
        finally:
            torch.backends.mkldnn.enabled = True
    else:
        rates[dtype] = weights.nbytes / stopwatch.median_seconds(multiply_all)
    return rates


def merge_ceilings(records: list[dict]) -> dict | None:
    """Return the best rates of several measurements; None if there is none."""
    if not records:
        return None
    names = ("read_bytes_per_s", "flop_per_s", "single_row_bytes_per_s")
    return {name: highest([record[name] for record in records]) for name in names}


def highest(values: list) -> dict | float:
    """Return the largest of numbers, or of the numbers at the same place in nested dicts."""
    if not isinstance(values[0], dict):
        return max(values)
    result = {}
    for name in values[0]:
        result[name] = highest([value[name] for value in values if name in value])
    return result


def fastest_read(rates: dict) -> tuple[float, str]:
    """Return the bytes per second at which memory can be read, and what reached that."""
    best = (0.0, "")
    for name, rate in rates["read_bytes_per_s"].items():
        best = max(best, (rate, name))
    for name, rate in rates["single_row_bytes_per_s"].items():
        best = max(best, (rate, f"matmul with one row in {name}"))
    return best


def best(rates: dict, dtype: str, part: str) -> tuple[float, float]:
    """Return FLOP and bytes per second that a part of a model with weights in `dtype` can reach.

    Weights may be upcast to float32 for a matmul, so the rate of float32 counts for every dtype;
    quantized weights may be upcast to any dtype.
    """
    by_dtype = rates["flop_per_s"]
    dtypes = by_dtype.keys()
    if dtype in by_dtype:
        dtypes = {dtype, "float32"} & dtypes
    flop_rate = max(rate for name in dtypes for rate in by_dtype[name][part].values())
    return flop_rate, fastest_read(rates)[0]
