"""memory.py: what is free, and runs that are refused, warned of, or started."""

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import SHAPES, our_config
from safetensors.torch import load_file, save_file

import linear
import load_weights
import memory
from byte_matmul import FbgemmBytes
from command_line import BUNDLED_CHECKPOINT
from memory import Free, MemoryShortageError, Needs, Run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GB = 10**9


# ----------------------------------------------------------------------------------- what is free
def write_files(directory, contents):
    """Write files of the kernel; contents: {path: text}."""
    for name, text in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.fixture
def proc(tmp_path):
    """Return a directory as /proc, with 8 GB free of memory and 2 GB of swap."""
    lines = (
        "MemTotal: 16000000 kB\nMemFree: 1000 kB\nMemAvailable: 7812500 kB\nSwapFree: 1953125 kB\n"
    )
    return write_files(tmp_path / "proc", {"meminfo": lines, "self/cgroup": "0::/\n"})


def test_free_memory_is_what_linux_can_give_without_swapping(proc, tmp_path):
    assert memory.cpu_free(proc, tmp_path) == Free(8 * GB, 2 * GB, "on this machine")


def test_free_memory_is_unknown_where_the_system_does_not_tell(tmp_path):
    assert memory.cpu_free(tmp_path, tmp_path) is None


def test_limit_of_a_cgroup_counts_without_the_pages_of_files(proc, tmp_path):
    write_files(proc, {"self/cgroup": "0::/user/job\n"})
    files = {
        "user/job/memory.max": f"{4 * GB}\n",
        "user/job/memory.current": f"{3 * GB}\n",
        "user/job/memory.stat": f"anon 5\nfile 9\ninactive_file {GB}\nactive_file {GB}\n",
        "user/job/memory.swap.max": "0\n",
    }
    root = write_files(tmp_path / "cgroup", files)
    free = memory.cpu_free(proc, root)
    assert (free.bytes, free.swap) == (3 * GB, 0)
    assert "cgroup" in free.place
    (root / "user/job/memory.swap.max").write_text("max\n")
    assert memory.cpu_free(proc, root).swap == 2 * GB
    (root / "user/job/memory.max").write_text("max\n")
    assert memory.cpu_free(proc, root).bytes == 8 * GB


def test_limit_of_each_cgroup_above_counts(proc, tmp_path):
    write_files(proc, {"self/cgroup": "0::/user/job\n"})
    files = {
        "user/job/memory.max": "max\n",
        "user/job/memory.current": "0\n",
        "user/memory.max": f"{2 * GB}\n",
        "user/memory.current": f"{GB}\n",
    }
    assert memory.cpu_free(proc, write_files(tmp_path / "cgroup", files)).bytes == GB


@pytest.mark.parametrize("directory", ["docker/123/", ""], ids=["host", "container"])
def test_limit_of_a_cgroup_of_version_1_counts(directory, proc, tmp_path):
    """In a container only the root is mounted, while /proc names the path of the host."""
    write_files(proc, {"self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/docker/123\n0::/\n"})
    files = {
        f"memory/{directory}memory.limit_in_bytes": f"{5 * GB}\n",
        f"memory/{directory}memory.usage_in_bytes": f"{2 * GB}\n",
        f"memory/{directory}memory.stat": f"inactive_file 1\ntotal_inactive_file {GB}\n",
    }
    root = write_files(tmp_path / "cgroup", files)
    assert memory.cpu_free(proc, root).bytes == 4 * GB
    unlimited = root / "memory" / directory / "memory.limit_in_bytes"
    unlimited.write_text("9223372036854771712\n")
    assert memory.cpu_free(proc, root).bytes == 8 * GB


def test_address_space_is_limited_by_ulimit(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert memory.address_space_free() is None
    limit = 2**50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    used = limit - memory.address_space_free().bytes
    assert 10**8 < used < 10**14  # torch alone maps so much


def test_free_memory_of_a_gpu_has_what_pytorch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GB, 9 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: GB)
    assert memory.gpu_free(torch.device("cuda:1")) == Free(7 * GB, 0, "on cuda:1")


# ------------------------------------------------------------------------------------- the weights
def small_run(**options):
    return Run(our_config(SHAPES["default"]), CPU, torch.float32, **options)


def test_weights_of_the_dtype_of_the_files_are_used_in_place():
    weights = memory.count_weights(small_run())
    assert weights.mapped == weights.total == weights.file_bytes
    assert weights.private == weights.loading == 0


def test_weights_of_another_dtype_are_private():
    run = small_run()
    names = [name for name, _ in load_weights.empty_model(run.config).named_parameters()]
    run.stored_dtypes = dict.fromkeys(names, torch.bfloat16)
    weights = memory.count_weights(run)
    assert weights.private == weights.loading == weights.total
    assert (weights.file_bytes, weights.mapped) == (weights.total // 2, 0)


def test_weights_on_a_gpu_are_copied():
    run = small_run()
    run.device = torch.device("cuda")
    weights = memory.count_weights(run)
    assert weights.private == weights.total
    assert weights.mapped == weights.file_bytes == 0


def test_stored_dtypes_are_those_of_the_files(tmp_path):
    directory = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "model")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].double()}, path)
    dtypes = memory.read_stored_dtypes(directory, load_weights.load_config(directory))
    assert dtypes.pop(name) == torch.float64
    assert set(dtypes.values()) == {torch.bfloat16}
    path.unlink()
    assert memory.read_stored_dtypes(directory, load_weights.load_config(directory)) == {}


@pytest.mark.sweep
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_private_weights_are_those_that_are_not_mapped(dtype, quantize):
    config = load_weights.load_config(BUNDLED_CHECKPOINT)
    run = Run(config, CPU, dtype, quantize=quantize)
    run.stored_dtypes = memory.read_stored_dtypes(BUNDLED_CHECKPOINT, config)
    plain = load_weights.load_model(BUNDLED_CHECKPOINT, "cpu", dtype)
    model = load_weights.load_model(BUNDLED_CHECKPOINT, "cpu", dtype, quantize=quantize)
    plain_sizes = {name: p.nbytes for name, p in plain.named_parameters()}
    private = 0
    for name, parameter in model.named_parameters():
        is_plain = plain_sizes.get(name) == parameter.nbytes
        if dtype == torch.float32 or not is_plain:
            private += parameter.nbytes
    weights = memory.count_weights(run)
    assert weights.private == private
    converted = sum(plain_sizes.values()) if dtype == torch.float32 else 0
    assert weights.loading == max(private, converted)


def test_weights_that_are_packed_are_copied_while_they_are_loaded(monkeypatch):
    monkeypatch.setattr(linear, "byte_kernel", FbgemmBytes)
    monkeypatch.setattr(FbgemmBytes, "least_weights", 0)
    config = load_weights.load_config(BUNDLED_CHECKPOINT)
    run = Run(config, CPU, torch.bfloat16, quantize="int8")
    run.stored_dtypes = memory.read_stored_dtypes(BUNDLED_CHECKPOINT, config)
    weights = memory.count_weights(run)
    head = config.vocab_size * config.hidden_size  # the largest layer
    assert weights.loading == weights.private + head


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_reordered_for_batches_are_a_copy(quantize):
    config = load_weights.load_config(BUNDLED_CHECKPOINT)
    run = Run(config, CPU, torch.float32, quantize=quantize)
    run.stored_dtypes = memory.read_stored_dtypes(BUNDLED_CHECKPOINT, config)
    once = memory.count_weights(run)
    run.reorder = True
    twice = memory.count_weights(run)
    model = load_weights.load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32, quantize=quantize)
    linear.reorder_weights(model)
    copies = [m.reordered for m in model.modules() if getattr(m, "reordered", None) is not None]
    size = sum(4 * copy.numel() for copy in copies)
    assert (size == 0) == (quantize == "int8")
    assert twice.private == once.private + size
    assert twice.total == once.total + size
    assert twice.loading == max(once.loading, twice.private)
    assert ("--no-reorder" in memory.advice(run, None)) == (size > 0)
    run.device = torch.device("cuda")
    assert memory.reordered_bytes(run) == 0


# --------------------------------------------------------------------------------------- the check
def check(needs, free, monkeypatch, address_space=None, run=None):
    """Run the check and return its warnings."""
    monkeypatch.setattr(memory, "cpu_free", lambda: free)
    monkeypatch.setattr(memory, "address_space_free", lambda: address_space)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory.check_needs(run or small_run(), None, needs)
    return [str(warning.message) for warning in caught]


def test_a_run_that_fits_starts_without_a_word(monkeypatch):
    needs = Needs({"weights": 3 * GB, "activations": GB}, growth=GB, mapped=5 * GB)
    assert check(needs, Free(10 * GB, 0, "here"), monkeypatch) == []
    assert check(needs, None, monkeypatch) == []  # unknown


def test_a_run_that_cannot_fit_is_refused_with_numbers_and_options(monkeypatch):
    needs = Needs({"weights": 3 * GB, "activations": GB})
    with pytest.raises(MemoryShortageError) as caught:
        check(needs, Free(2 * GB, GB, "on this machine"), monkeypatch)
    message = str(caught.value)
    assert "about 4.00 GB are needed (weights 3.00 GB, activations 1.00 GB)" in message
    assert "3.00 GB are free on this machine" in message
    assert "--quantize int8 or int4" in message
    assert "--no-memory-check" in message


def test_an_estimate_slightly_too_large_only_warns(monkeypatch):
    needs = Needs({"weights": 4 * GB})
    [message] = check(needs, Free(int(3.9 * GB), 0, "here"), monkeypatch)
    assert "may need 4.00 GB" in message
    assert check(needs, Free(GB, 5 * GB, "here"), monkeypatch) == [  # with swap
        message.replace("3.90", "1.00")
    ]


def test_an_answer_of_full_length_that_does_not_fit_only_warns(monkeypatch):
    needs = Needs({"cache": GB}, growth=100 * GB)
    [message] = check(needs, Free(2 * GB, 0, "here"), monkeypatch)
    assert "lower --max-new-tokens" in message


def test_mapped_weights_that_do_not_fit_only_warn(monkeypatch):
    needs = Needs({"cache": GB}, mapped=100 * GB)
    [message] = check(needs, Free(2 * GB, 0, "here"), monkeypatch)
    assert "the weights, 100.00 GB, are read from their files again and again" in message


def test_mapped_weights_count_in_a_limited_address_space(monkeypatch):
    needs = Needs({"cache": GB}, mapped=10 * GB)
    free = Free(20 * GB, 0, "here")
    assert check(needs, free, monkeypatch, address_space=Free(12 * GB, 0, "there")) == []
    with pytest.raises(MemoryShortageError, match=r"mapped weights 10\.00 GB.* free there"):
        check(needs, free, monkeypatch, address_space=Free(5 * GB, 0, "there"))


# ------------------------------------------------------------------------------- with real limits
def run_limited(limit, *options):
    """Run generate.py under a limit of its address space, in bytes."""
    line = [sys.executable, str(ROOT / "generate.py"), "--prompt", "x", "--quiet", *options]
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory):
    """Make a checkpoint whose tensors, zeros, take 4 GB and no place on the disk."""
    directory = tmp_path_factory.mktemp("sparse") / "model"
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUNDLED_CHECKPOINT, directory, ignore=ignore)
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] = 2**24
    (directory / "config.json").write_text(json.dumps(config))
    header = {}
    end = 0
    model = load_weights.empty_model(load_weights.load_config(directory))
    for name, parameter in model.named_parameters():
        start = end
        end += 2 * parameter.numel()
        shape = list(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return directory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS as Linux has it")
def test_a_limited_address_space_is_one_sentence(sparse_checkpoint):
    process = run_limited(2 * GB, "--model", sparse_checkpoint)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("generate.py: memory does not suffice: about ")
    assert "ulimit -v" in process.stderr
    assert process.stderr.count("\n") == 1
    process = run_limited(2 * GB, "--model", sparse_checkpoint, "--no-memory-check")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("generate.py: out of memory (")
    assert process.stderr.count("\n") == 1
