"""What the machine is, how busy it is with other things, and how fast it can be at all.

A foreign process on one core can make products on all cores many times slower, because the threads of a product wait
for each other. So nothing that is measured here counts unless the machine was quiet meanwhile.
"""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# What decides how fast products are, where the processor has it.
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
TICK = os.sysconf("SC_CLK_TCK")  # /proc counts time in these, a hundredth of a second mostly


def describe(device: str, threads: int) -> dict:
    """The machine and the versions, without its name."""
    text = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    )
    found = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))  # of the last core
    flags = (found.get("flags") or found.get("Features") or "").split()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    family = (
        f"family {found['cpu family']}, model {found['model']}"
        if "cpu family" in found
        else platform.machine()
    )
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.get_device_name(device)
    return {
        "processor": f"{found.get('model name', platform.processor())} ({family})",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gb": round(total / 1e9, 1),
        "gpu": gpu,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


# --------------------------------------------------------------------------------------------------- the load
def used_seconds(processes: list[int]) -> tuple[float, float, float]:
    """Processor seconds so far: of the whole machine, of these processes, and those stolen by the hypervisor."""
    fields = [
        int(x)
        for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    ]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    own = 0
    for process in processes:
        try:
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        # In user and kernel mode, its own and its ended children's: that is where a worker's time goes in the end.
        own += sum(int(x) for x in stat.rpartition(")")[2].split()[11:15])
    return (user + nice + system + irq + softirq) / TICK, own / TICK, steal / TICK


def private_bytes(process: int) -> int:
    """Memory of a process that is no mapped file."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class Watch:
    """Looks at the machine four times a second while a process of ours runs."""

    def __init__(self, process: int):
        self.processes, self.samples = (
            [process, os.getpid()],
            [],
        )  # (time, machine, own, stolen, private bytes)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def sample(self) -> None:
        now = time.monotonic()
        self.samples.append((now, *used_seconds(self.processes), private_bytes(self.processes[0])))

    def look(self) -> None:
        while not self.done.wait(0.25):
            self.sample()

    def __enter__(self) -> Watch:
        self.sample()
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.sample()

    def between(self, start: float, end: float) -> dict[str, float]:
        """What went on between two times: foreign and stolen cores, on average, and the most private memory."""
        moments = [sample[0] for sample in self.samples]
        first = max(
            0, bisect_right(moments, start) - 1
        )  # the last look before, the first one after
        last = max(first, min(len(moments) - 1, bisect_left(moments, end)))
        (t0, all0, own0, steal0, _), (t1, all1, own1, steal1, _) = (
            self.samples[first],
            self.samples[last],
        )
        seconds = max(t1 - t0, 1e-9)
        return {
            "foreign_cores": round(max(0.0, (all1 - all0 - own1 + own0) / seconds), 3),
            "stolen_cores": round((steal1 - steal0) / seconds, 3),
            "private_bytes": max(sample[4] for sample in self.samples[first : last + 1]),
        }


def is_quiet(load: dict, limit: float) -> bool:
    return load["foreign_cores"] + load["stolen_cores"] <= limit


def wait_until_quiet(limit: float, patience: float, say: Callable[[str], None]) -> dict:
    """Waits until the machine does nothing else for two seconds, at most `patience` seconds; gives the last load."""
    start, told, span = time.monotonic(), False, min(2.0, patience + 0.1)
    while True:
        t0, (all0, own0, steal0) = time.monotonic(), used_seconds([os.getpid()])
        time.sleep(span)
        seconds, (all1, own1, steal1) = time.monotonic() - t0, used_seconds([os.getpid()])
        foreign, stolen = (all1 - all0 - own1 + own0) / seconds, (steal1 - steal0) / seconds
        load = {"foreign_cores": round(max(0.0, foreign), 3), "stolen_cores": round(stolen, 3)}
        if is_quiet(load, limit) or time.monotonic() - start > patience:
            return load
        if not told:
            say(
                f"not quiet: {load['foreign_cores']} cores busy, {load['stolen_cores']} stolen; waiting"
            )
            told = True


# ----------------------------------------------------------------------------------------------- the ceilings
def median_seconds(
    work: Callable[[], object], clock: Callable[[], float], budget: float = 1.5
) -> float:
    """The median time of a piece of work that is done at least three times, and for about `budget` seconds."""
    work()
    times, end = [], clock() + budget
    while len(times) < 3 or (clock() < end and len(times) < 50):
        start = clock()
        work()
        times.append(clock() - start)
    return sorted(times)[len(times) // 2]


def product_ways(device: str) -> dict[str, Callable]:
    """How a library multiplies x [N, in] by a weight [out, in]: weight and N → a function of x."""
    import torch
    import torch.nn.functional as F

    ways = {"F.linear": lambda weight, rows: lambda x: F.linear(x, weight)}
    if device == "cpu" and torch.backends.mkldnn.is_available():

        def packed(weight, rows):
            ordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")

        ways["oneDNN, weight reordered"] = packed
        ways["oneDNN"] = lambda weight, rows: (
            lambda x: torch._C._nn.mkldnn_linear(x.to_mkldnn(), weight).to_dense()
        )
    return ways


def ceilings(shapes: dict[str, list[tuple[int, int, int, int]]], dtypes: list[str], device: str,
             clock: Callable[[], float], megabytes: int = 1024, budget: float = 1.0) -> dict:  # fmt: skip
    """The machine's best, whoever reaches it.

    shapes: (how often, N, in, out) of the products that each part of the model spends its time in. Gives bytes a
    second that are read from memory, by each of several reductions; FLOP a second of a part's products, by dtype,
    part and library; and bytes of weights a second that products with a single row read, as decoding reads them.
    """
    import torch
    import torch.nn.functional as F

    big = torch.ones(
        megabytes << 18, device=device
    )  # written to: zeros that nobody wrote are all one page
    reductions = {
        "sum": torch.sum,
        "largest": torch.max,
        "product": lambda x: x.view(-1, 1024) @ x[:1024],
        "sum in bfloat16": lambda x: x.view(torch.bfloat16).sum(),
        "largest of int64": lambda x: x.view(torch.int64).amax(),
    }
    reads = {
        name: big.nbytes / median_seconds(lambda f=reduce: f(big), clock, budget)
        for name, reduce in reductions.items()
    }
    big = None  # a gigabyte
    rates, single, reasons = {}, {}, {}
    for name in dtypes:
        dtype = getattr(torch, name)
        rates[name] = {}
        for part, products in shapes.items():
            spent, quickest = {}, [float("inf")] * len(products)  # seconds, by library and by shape
            for way, prepare in product_ways(device).items():
                try:
                    seconds = []
                    for _, rows, wide, out in products:
                        x, weight = (
                            torch.randn(n, wide, device=device).to(dtype) for n in (rows, out)
                        )
                        multiply = prepare(weight, rows)
                        seconds.append(
                            median_seconds(
                                lambda f=multiply, x=x: f(x), clock, budget / len(products)
                            )
                        )
                except (
                    RuntimeError,
                    AttributeError,
                ) as error:  # this library has no such product on this machine
                    reasons[f"{name}, {way}"] = str(error).splitlines()[0][:200]
                    continue
                spent[way] = seconds
                quickest = [min(pair) for pair in zip(quickest, seconds, strict=True)]
            flop = sum(count * 2 * rows * wide * out for count, rows, wide, out in products)
            spent["the best of them at each shape"] = quickest
            rates[name][part] = {
                way: flop
                / sum(product[0] * s for product, s in zip(products, seconds, strict=True))
                for way, seconds in spent.items()
            }
    _, _, wide, out = shapes["decoder"][-1]
    for name in dict.fromkeys(
        (*dtypes, "bfloat16", "float16")
    ):  # memory is no slower for those not asked for
        dtype = getattr(torch, name)
        count = max(
            2, (megabytes << 19) // (wide * out * dtype.itemsize)
        )  # many, or a cache would hold them
        weights = torch.randn(1, out, wide, device=device).to(dtype).repeat(count, 1, 1)
        x = torch.randn(1, wide, device=device).to(dtype)
        usual = torch.backends.mkldnn.enabled
        for library in (
            (True, False) if device == "cpu" and torch.backends.mkldnn.is_available() else (False,)
        ):
            torch.backends.mkldnn.enabled = library
            seconds = median_seconds(
                lambda w=weights, x=x: [F.linear(x, one) for one in w], clock, budget
            )
            single[name + (" by oneDNN" if library else "")] = weights.nbytes / seconds
        torch.backends.mkldnn.enabled = usual
        weights = None  # before the next ones are made
    return {
        "read_bytes_per_s": reads,
        "flop_per_s": rates,
        "single_row_bytes_per_s": single,
        "not_possible": reasons,
    }


def merge_ceilings(records: list[dict]) -> dict | None:
    """The best of several measurements; None if there is none."""

    def best_of(values: list):
        if isinstance(values[0], dict):
            return {
                name: best_of([value[name] for value in values if name in value])
                for name in values[0]
            }
        return max(values)

    names = ("read_bytes_per_s", "flop_per_s", "single_row_bytes_per_s")
    return (
        {name: best_of([record[name] for record in records]) for name in names} if records else None
    )


def quickest_read(found: dict) -> tuple[float, str]:
    """Bytes a second at which memory can be read, and what reached that."""
    ways = dict(found["read_bytes_per_s"])
    ways |= {
        f"product with one row in {name}": rate
        for name, rate in found["single_row_bytes_per_s"].items()
    }
    return max((rate, way) for way, rate in ways.items())


def best(found: dict, dtype: str, part: str) -> tuple[float, float]:
    """FLOP a second and bytes a second that a part of a model with weights in `dtype` can hope for.

    It may widen its weights to float32 for a product, so float32's rate counts for the others as well; and quantised
    weights may be widened to anything.
    """
    by_dtype = found["flop_per_s"]
    names = {dtype, "float32"} & by_dtype.keys() if dtype in by_dtype else by_dtype
    return max(rate for name in names for rate in by_dtype[name][part].values()), quickest_read(
        found
    )[0]
