"""Run the measured processes, one at a time, on a quiet machine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Say = Callable[[str], None]
Record = dict  # what a worker reported of one task, and the load meanwhile


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_weights(job: dict) -> None:
    """Read the files of a job's weights once, so that the disk is not measured."""
    files = []
    if "gguf" in job:
        files = [Path(job["gguf"])]
    elif "checkpoint" in job:
        files = Path(job["checkpoint"]).glob("*.safetensors")
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def worker_settings(threads: int) -> dict[str, str]:
    """Return the environment variables of a worker, which imports from the repository root."""
    import_path = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        import_path.append(os.environ["PYTHONPATH"])
    return {
        "PYTHONPATH": os.pathsep.join(import_path),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def run_worker(job: dict, threads: int) -> list[Record]:
    """Run one job in a new process; return its results, with the load while each was measured.

    Raises RuntimeError with the end of the process's errors, if it fails.
    """
    read_weights(job)
    worker = [job.get("python", sys.executable), "-m", "benchmarks.workers"]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        start = time.monotonic()
        command = [*worker, json.dumps(job | {"start": start, "threads": threads})]
        environment = os.environ | worker_settings(threads)
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        with machine.Watch(process.pid) as watch:
            process.wait()
        errors.seek(0)
        output.seek(0)
        if process.returncode:
            raise RuntimeError(
                f"the worker for {job} ended with {process.returncode}:\n{errors.read()[-2000:]}"
            )
        lines = [line.removeprefix("result ") for line in output if line.startswith("result ")]
    records = [json.loads(line) for line in lines]
    for record in records:
        record["load"] = watch.between(record["start"], record["end"])
        record["private_bytes"] = watch.between(start, record["end"])["private_bytes"]
    return records


def job_name(job: dict) -> str:
    return " ".join(job[key] for key in ("kind", "side", "dtype") if key in job)


def describe_load(record: Record) -> str:
    seconds = record["end"] - record["start"]
    busy = record["load"]["foreign_cores"]
    stolen = record["load"]["stolen_cores"]
    return (
        f"{record['task']} in {seconds:.1f} s, "
        f"{busy:.2f} cores busy with other things, {stolen:.2f} stolen"
    )


def run_quietly(job: dict, options: argparse.Namespace, say: Say) -> list[Record]:
    """Run a job on a quiet machine; repeat tasks that were disturbed, at most --retries times."""
    kept = []
    name = job_name(job)
    for attempts_left in range(options.retries, -1, -1):
        load_before = machine.wait_until_quiet(options.busy, options.patience, say)
        disturbed = []
        for record in run_worker(job, options.threads):
            record |= {key: job[key] for key in ("side", "dtype") if key in job}
            record["load_before"] = load_before
            record["quiet"] = machine.is_quiet(record["load"], options.busy)
            say(f"{name}: {describe_load(record)}")
            if record["quiet"] or attempts_left == 0:
                kept.append(record)
            else:
                disturbed.append(record["task"])
        if not disturbed:
            break
        say(f"{name}: disturbed, once more: {', '.join(disturbed)}")
        if "tasks" in job:
            job = job | {"tasks": {task: job["tasks"][task] for task in disturbed}}
    return kept
