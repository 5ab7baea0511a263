"""What the README shows is run: its commands, its Python, its links and the answer.

Its figures are held to their sources.
"""

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
from load_weights import pack_linears
from memory import Run, count_weights
from packed_weights import Packing
from qwen2vl import Config, KVCache, VisionConfig

pytestmark = pytest.mark.slow  # it trains, or starts many processes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
# The first two set up and test; `.ci/run` runs them, as this file is part of the second.
OTHERS = COMMANDS[2:]


@pytest.fixture
def workplace(tmp_path):
    """A directory with the files of the repository, for commands that write into it."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(line, folder):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True
    )


def test_readme_begins_with_setup_and_tests():
    assert COMMANDS[0].startswith(
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    )
    assert "generate.py --image examples/" in COMMANDS[0]
    assert COMMANDS[1].startswith(".venv/bin/pip install -r requirements-dev.txt && ")
    assert COMMANDS[1].endswith("-m pytest")


@pytest.mark.parametrize("line", [line for line in OTHERS if "Qwen/" not in line])
def test_readme_command_runs(line, workplace):
    done = run(line, workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "apps.batch" in line
    assert "apps.trace" not in line or "\nPOSITIONS " in done.stdout
    for name in re.findall(r"--out (\S+)", line):
        out = workplace / name
        written = (out / "model.safetensors" if out.is_dir() else out).read_bytes()
        assert written
        assert not name.endswith(".jsonl") or b"error" not in written


@pytest.mark.parametrize("line", [line for line in OTHERS if "Qwen/" in line])
def test_readme_command_that_downloads_has_valid_options(line):
    words = shlex.split(line)
    assert words[:2] == [".venv/bin/python", "generate.py"]
    assert generate.parse_arguments(words[2:]).model.startswith("Qwen/")


def test_readme_shows_the_answer_that_is_given(workplace):
    line, answer = re.search(r"^    \$ (.+)\n    (.+)$", README, flags=re.MULTILINE).groups()
    assert run(line, workplace).stdout.strip() == answer


def test_readme_python_runs():
    [text] = [text for kind, text in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "tiny/README.md",
        "tiny/LOG.md",
        "notebooks/README.md",
        "benchmarks/README.md",
        "tests/README.md",
    ],
)
def test_markdown_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-notebooks.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            wanted = line.split("#")[0].strip()
            if not wanted or wanted.startswith("-r ") or wanted == "-e .":
                continue
            assert re.fullmatch(r"[\w-]+==[\d.]+", wanted), line


def test_readme_table_of_ideas_names_what_the_files_define():
    links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)\)", README)
    assert len(links) > 15
    for name, file in links:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b", text, flags=re.MULTILINE), (
            f"{file} defines no {name}"
        )


def test_readme_table_of_ideas_names_what_the_reference_has():
    pytest.importorskip("transformers", minversion="5")
    names = (
        "models.qwen2_vl.modeling_qwen2_vl",
        "models.qwen2_vl.image_processing_pil_qwen2_vl",
        "generation.utils",
    )
    source = "".join(
        inspect.getsource(importlib.import_module(f"transformers.{name}")) for name in names
    )
    rows = re.findall(r"^\| .*`\]\(.*\.py\).* \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(rows) > 10
    named = [
        part
        for row in rows
        if not row.startswith("none")
        for part in re.findall(r"`([\w.]+)`", row)
    ]
    parts = {part for name in named if not name.endswith(".json") for part in name.split(".")}
    assert [part for part in parts if not re.search(rf"\b{part}\b", source)] == []


# -------------------------------------------------------------------------------------- the figures
PUBLISHED = {
    "2B": Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True, vision_config=VisionConfig(hidden_size=1536),
    ),
    "7B": Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vision_config=VisionConfig(hidden_size=3584),
    ),
    "72B": Config(
        vocab_size=152064, hidden_size=8192, intermediate_size=29568,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vision_config=VisionConfig(hidden_size=8192),
    ),
}  # fmt: skip


def pack_awq(model):
    """Pack the decoder's layers as the published AWQ checkpoints do."""
    packing = Packing("AWQ", bits=4, group_size=128)
    names = {f"model.{name}.qweight" for name, _ in model.model.named_modules()}
    pack_linears(model, packing, names)


@pytest.mark.parametrize("size", PUBLISHED)
def test_readme_gives_the_memory_of_published_checkpoints(size):
    held = []
    for quantize in (None, "int8", "int4"):
        run = Run(PUBLISHED[size], torch.device("cpu"), torch.bfloat16, quantize=quantize)
        held.append(count_weights(run).total / 1e9)
    run = Run(PUBLISHED[size], torch.device("cpu"), torch.bfloat16, pack=pack_awq)
    held.append(count_weights(run).total / 1e9)
    with torch.device("meta"):
        cache = KVCache(PUBLISHED[size], batch_size=1, max_length=1000, dtype=torch.bfloat16)
    room = cache.keys.nbytes + cache.values.nbytes
    sizes = " | ".join(f"{size:.1f} GB" for size in held)
    row = f"-{size}-Instruct` | {held[0] / 2:.1f} billion | {sizes} | {room / 1e6:.0f} MB |"
    assert row in README


def speed_table(found):
    """The README's table from what `benchmarks/compare.py` measured."""
    names = (
        "vision encoder",
        "prefill",
        "decode, batch 1",
        "decode, batch 8",
        "cold start to first token",
        "peak memory",
    )
    lines = [
        "| what | bfloat16 | of the ceiling | float32 | of the ceiling | spread |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        rows = [row for row in found["rows"] if row["metric"] == name]
        half, full = (
            next(row for row in rows if row["dtype"] == dtype) for dtype in ("bfloat16", "float32")
        )
        cells = [name]
        for row in (half, full):
            share = row["ours_of_ceiling"]
            cells += [f"{row['ratio']:.2f}×", "—" if share is None else f"{100 * share:.0f} %"]
        lines.append(f"| {' | '.join(cells)} | {100 * max(half['spread'], full['spread']):.0f} % |")
    return "\n".join(lines)


def test_readme_speed_table_has_the_figures_of_the_last_run():
    found = json.loads((ROOT / "benchmarks/results/2b-cpu.json").read_text(encoding="utf-8"))
    section = README.split("## How fast it is")[1].split("\n## ")[0]
    [told] = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert told.strip() == speed_table(found), f"it should be\n\n{speed_table(found)}"
    assert f"a {found['machine']['cores']}-core CPU" in section
    assert f"transformers {found['machine']['versions']['transformers']}" in section
