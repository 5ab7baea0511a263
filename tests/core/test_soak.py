"""The long run of `tests/soak.py`: what it calls flat, and a small run of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from soak import MEMORY_LIMIT, SAMPLES, Samples

ROOT = Path(__file__).parents[2]


def make_samples(**changes):
    """Return samples of 1,200 items in which nothing grows but noise; `changes` replace lists."""
    noise = np.random.default_rng(0).integers(-(2**21), 2**21, SAMPLES)
    series = {
        "items": [20 * (number + 1) for number in range(SAMPLES)],
        "memory": [500_000_000 + value for value in noise.tolist()],
        "objects": [300_000] * SAMPLES,
        "files": [6] * SAMPLES,
        "threads": [1] * SAMPLES,
        "seconds": [0.01] * SAMPLES,
    }
    return Samples(**(series | changes))


def test_problems_is_empty_for_noise_a_warm_up_and_a_peak():
    memory = make_samples().memory
    for number in range(SAMPLES // 3):
        memory[number] -= 10**7 * (SAMPLES // 3 - number)  # grows in the warm-up
    memory[-2] += 10**9
    assert make_samples(memory=memory).problems() == []


def test_problems_names_a_slow_growth_of_memory():
    per_sample = 2 * MEMORY_LIMIT / SAMPLES
    memory = [int(500_000_000 + per_sample * number) for number in range(SAMPLES)]
    [problem] = make_samples(memory=memory).problems()
    assert problem.startswith("memory grew by 10")


def test_problems_names_one_object_kept_for_each_item():
    objects = [300_000 + 20 * number for number in range(SAMPLES)]
    [problem] = make_samples(objects=objects).problems()
    assert problem == "780 more Python objects"


@pytest.mark.parametrize("name", ["files", "threads"])
def test_problems_names_one_that_stays_open(name):
    counts = [3] * (SAMPLES - 5) + [4] * 5
    assert make_samples(**{name: counts}).problems() == [f"1 more {name}"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc holds what is measured")
def test_small_soak_is_flat():
    """In its own process, whose memory is that of the soak alone."""
    command = [sys.executable, "-m", "tests.soak", "--small"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    for phase in ("generations", "images", "videos", "turns"):
        assert f"| {phase} | " in process.stdout
