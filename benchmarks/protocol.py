"""What the processes of a benchmark share; only the standard library is imported, to keep starts
short.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

# What the chat template makes of a question, for a tokenizer without a template.
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def report(**values) -> None:
    """Print one result for the process that started this one."""
    print("result " + json.dumps(values), flush=True)


def make_clock(device: str) -> Callable[[], float]:
    """Return a clock in seconds; on a GPU it first waits for all work that is queued there."""
    if device == "cpu":
        return time.monotonic
    import torch

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.monotonic()

    return clock


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process: on a GPU allocated, on a CPU resident, with mapped
    files.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """Return what Linux counts of this process: VmRSS, resident memory, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
