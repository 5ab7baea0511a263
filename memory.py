"""What a run needs of memory, what is free, and the check before it starts.

Weights, KV cache and pixels are exact. The activations are formulas: what is alive at once where
the prefill holds most (`decoder_activations`, `vision_activations`). At the shapes of the 2B, 7B
and 72B models they were within 3 % of the peak of live tensors, with sdpa and with eager attention.
flash is counted as sdpa. Not counted: workspaces of kernels; the float32 copy of one weight at a
time on a CPU without fast half-precision kernels; what CUDA takes itself.

On the CPU, weights whose dtype is that of the file are used in place: the file is memory-mapped,
and the kernel can drop its pages and read them again. So mapped bytes are counted apart. A run
whose own memory does not fit cannot succeed; one whose mapped weights do not fit is slow.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import linear
from adapters import apply_adapters
from checkpoint_files import find_format, find_packing, quantization_settings, weight_files
from config_fields import new_token_limit
from json_files import read_json
from load_weights import HEAD, PACKED_HEAD, empty_model, list_tensors, pack_linears
from preprocess import Batch
from qwen2vl import Config, KVCache, Qwen2VL

# The most that glibc's allocator keeps of freed memory: twice its largest threshold for mmap
# (mallopt(3), M_TRIM_THRESHOLD).
KEPT_BY_ALLOCATOR = 64 * 2**20
TOLERANCE = 1.15  # measured peaks were at most this factor from the estimate

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,  # packed integers
    "U4": torch.quint4x2,  # two to a byte, dequantized while they are loaded
}
MERGED = torch.uint8  # in place of the stored dtype of a weight that an adapter changes: a copy


class MemoryShortageError(ValueError):
    """A run needs more memory than is free."""


# ---------------------------------------------------------------------------------------- the needs
@dataclass
class Run:
    """What a run is made of besides its questions."""

    config: Config
    device: torch.device  # where the run would be
    dtype: torch.dtype
    attn_implementation: str = "sdpa"
    quantize: str | None = None
    max_new_tokens: int | None = None  # 0: one forward pass, without a KV cache
    generation_config: dict = field(default_factory=dict)
    # Of each tensor in the files, by the name of its parameter; those absent have `dtype`.
    stored_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    pack: Callable[[Qwen2VL], None] | None = None  # packs the layers that the checkpoint has packed
    quantize_head: bool = True  # with the decoder's layers
    dequantized_from: str | None = None  # the format of weights that are plain once they are loaded
    reorder: bool = False  # the weights a second time, for batches


class Size(NamedTuple):
    """The size of one part of a run."""

    bytes: int
    remark: str


def read_stored_dtypes(
    directory: Path, config: Config, adapters: Sequence[Path] = ()
) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor in a checkpoint's files, which are mapped and not read.

    Without files, or where the address space is too small for them, it holds those that
    config.json plans in another dtype than that of the model (`planned_dtypes`).
    adapters: directories of those that change weights. Raises ValueError for damaged files.
    """
    names = set(list_parameters(Run(config, torch.device("meta"), torch.float32)))
    try:
        stored = list_tensors(weight_files(directory), names | {HEAD})
    except (FileNotFoundError, MemoryError):
        return planned_dtypes(directory, names)
    dtypes = {}
    for name, tensor in stored.items():
        # Another dtype, such as F8_E4M3, is not that of any model: only its size counts.
        dtypes[name] = STORED_DTYPES.get(tensor.dtype(), torch.int8)
    for name in apply_adapters(list(adapters), directory, config, stored):
        dtypes[name] = MERGED
    return dtypes


def planned_dtypes(directory: Path, names: Collection[str]) -> dict[str, torch.dtype]:
    """Return the dtypes of the weights that config.json lets be dequantized while they are loaded.

    names: of all parameters. Its list of layers that stay plain may have regular expressions, of
    which the ordinary letters alone are compared.
    """
    format = find_format(directory)
    if format is None:
        return {}
    settings = quantization_settings(read_json(directory, "config.json"))
    kept = ["norm", "embed_tokens", "patch_embed", "lm_head"]
    for key in ("llm_int8_skip_modules", "modules_to_not_convert", "ignore"):
        entries = settings.get(key) if isinstance(settings, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            kept.append(re.sub(r"^re:|\.\*|[\^$\\]", "", str(entry)))
    dtype = STORED_DTYPES.get(format.stored_dtype, torch.int8)
    layers = {name for name in names if name.endswith(".weight")}
    return {name: dtype for name in layers if not any(part in name for part in kept)}


def layer_packer(
    directory: Path, config: Config, stored_names: set[str]
) -> Callable[[Qwen2VL], None] | None:
    """Return what packs those layers of a model that the checkpoint has packed, None without any.

    stored_names: of the tensors in its files; without any, config.json tells which are packed.
    A head among them is not tied, as in `load_weights.resolve_head`.
    """
    packing = find_packing(directory)
    if packing is None:
        return None
    names = stored_names or planned_names(directory, config)
    if PACKED_HEAD in names:
        config.tie_word_embeddings = False
    return lambda model: pack_linears(model, packing, names)


def planned_names(directory: Path, config: Config) -> set[str]:
    """Return the names that config.json gives to the tensors of packed layers."""
    settings = quantization_settings(read_json(directory, "config.json"))
    kept: list[str] = []
    head_is_packed = False
    if isinstance(settings, dict):
        kept = settings.get("modules_to_not_convert") or []
        head_is_packed = bool(settings.get("lm_head"))
    names = set()
    for name in list_parameters(Run(config, torch.device("meta"), torch.float32)):
        layer = name.removesuffix(".weight")
        is_matrix = layer != name and "norm" not in layer
        is_packed = head_is_packed if layer == "lm_head" else layer.startswith("model.layers.")
        if is_matrix and is_packed and not any(part in layer for part in kept):
            names |= {f"{layer}.qweight", f"{layer}.g_idx"}
    return names


class Weights(NamedTuple):
    """The sizes of the parameters in bytes."""

    parameters: int  # how many there are, before they are quantized
    total: int  # of all of them, in the dtype of the run, and of a second copy for batches
    private: int  # of those that are not used in place in a mapped file
    loading: int  # the private peak while they are loaded: before they are quantized, or after
    file_bytes: int  # that are mapped while they are loaded; 0 on a GPU, which only copies them
    mapped: int  # that stay mapped: all files, where a weight is used in place, else 0
    reordered: int  # of the second copy for batches


def model_of_one_layer(run: Run) -> Qwen2VL:
    """Return the model with one layer of the decoder and one block of the vision encoder."""
    vision_config = replace(run.config.vision_config, depth=1)
    config = replace(run.config, num_hidden_layers=1, vision_config=vision_config)
    return empty_model(config).to(run.dtype)


def list_parameters(run: Run, change: Callable[[Qwen2VL], None] | None = None) -> dict[str, Tensor]:
    """Return the parameters of the model by name, on the meta device, after a change to it.

    All layers are alike, so those of the first one serve for each: to quantize the whole 7B model
    takes seconds, also without values.
    """
    model = model_of_one_layer(run)
    if change is not None:
        change(model)
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        copies = 1
        if name.startswith("model.layers.0."):
            copies = run.config.num_hidden_layers
        if name.startswith("visual.blocks.0."):
            copies = run.config.vision_config.depth
        for layer in range(copies):
            parameters[name.replace(".0.", f".{layer}.", 1)] = parameter
    return parameters


def quantize(run: Run, model: Qwen2VL) -> None:
    """Quantize a model as loading it does. Raises ValueError where that is not possible."""
    if run.pack is not None:
        run.pack(model)
    if run.device.type == "cpu":
        linear.use_kernels(model, run.dtype)
    if run.quantize is not None:
        linear.quantize_linears(model if run.quantize_head else model.model, run.quantize)


def packing_bytes(run: Run) -> int:
    """Return what loading needs beside the weights while it packs them for a matmul of bytes."""
    is_quantized = run.quantize is not None or run.pack is not None
    if run.device.type != "cpu" or not is_quantized:
        return 0
    model = model_of_one_layer(run)
    quantize(run, model)
    return linear.packing_bytes(model, run.dtype)


def reordered_bytes(run: Run) -> int:
    """Return the size of the second copy of the weights that batches are multiplied by."""
    if not run.reorder or run.device.type != "cpu":
        return 0
    model = model_of_one_layer(run)
    quantize(run, model)
    size = 0
    for name in linear.layers_to_reorder(model, run.dtype):
        copies = run.config.num_hidden_layers if name.startswith("model.layers.") else 1
        size += copies * model.get_parameter(f"{name}.weight").nbytes
    return size


def file_size(parameter: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes of a parameter in a file that stores it in this dtype."""
    if dtype == torch.quint4x2:
        return parameter.numel() // 2
    return parameter.numel() * dtype.itemsize


def count_weights(run: Run) -> Weights:
    """Return the sizes of the weights. Raises ValueError where they cannot be quantized."""
    count = sum(parameter.numel() for parameter in list_parameters(run).values())
    file_bytes = 0
    converted: dict[str, int] = {}  # bytes of each parameter that is copied from its file
    in_place: dict[str, int] = {}
    for name, parameter in list_parameters(run, run.pack).items():
        stored_dtype = run.stored_dtypes.get(name, parameter.dtype)
        file_bytes += file_size(parameter, stored_dtype)
        if run.device.type == "cpu" and stored_dtype == parameter.dtype:
            in_place[name] = parameter.nbytes
        else:
            converted[name] = parameter.nbytes
    total = 0
    mapped = 0
    for name, parameter in list_parameters(run, partial(quantize, run)).items():
        total += parameter.nbytes
        if in_place.get(name) == parameter.nbytes:
            mapped += parameter.nbytes
    reordered = reordered_bytes(run)
    private = total - mapped + reordered
    loading = max(sum(converted.values()), total - mapped + packing_bytes(run), private)
    if run.device.type != "cpu":
        file_bytes = 0
    # A file stays mapped as a whole, also where quantizing has read it once and for all.
    stays_mapped = file_bytes if mapped else 0
    total += reordered
    return Weights(count, total, private, loading, file_bytes, stays_mapped, reordered)


def weights_size(run: Run, weights: Weights) -> Size:
    """Return the size of the parameters, whether mapped or not."""
    dtype = str(run.dtype).removeprefix("torch.")
    remark = f"{weights.parameters / 1e6:,.1f} M parameters in {dtype}"
    if run.dequantized_from is not None:
        remark += f", dequantized from {run.dequantized_from}"
    model = model_of_one_layer(run)
    quantize(run, model)
    methods = linear.quantization_methods(model)
    if weights.reordered:
        remark += f", and {weights.reordered / 1e6:,.1f} MB reordered for batches"
    if methods:
        remark += f", the decoder's in {' and '.join(methods)}"
    return Size(weights.total, remark)


def cache_size(run: Run, batch: Batch) -> Size:
    """Return the size of the KV cache when the answers have all their tokens."""
    if run.max_new_tokens == 0:
        return Size(0, "none is needed")
    batch_size, length = batch.input_ids.shape
    lengths = batch.attention_mask.sum(1).tolist()
    length += max(new_token_limit(run.generation_config, n, run.max_new_tokens) for n in lengths)
    return Size(cache_bytes(run, batch_size, length), f"{batch_size} × {length:,} tokens")


def cache_bytes(run: Run, batch_size: int, length: int) -> int:
    """Return the size of a KV cache of so many tokens."""
    cache = KVCache(run.config, batch_size, length, torch.device("meta"), run.dtype)
    return cache.keys.nbytes + cache.values.nbytes


def pixels_size(run: Run, batch: Batch) -> Size:
    """Return the size of the patches of all images and videos, which are float32."""
    size = 0
    for patches in (batch.pixel_values, batch.pixel_values_videos):
        if patches is not None:
            size += patches.nbytes
    if run.device.type == "cpu":
        return Size(2 * size, "as read and as joined")
    return Size(size, "on the GPU")


def score_bytes(run: Run) -> int:
    """Return how many bytes each attention score takes, which eager attention alone holds."""
    if run.attn_implementation != "eager":
        return 0
    if run.dtype.itemsize >= 4:
        return 2 * run.dtype.itemsize  # before and after the softmax
    return run.dtype.itemsize + 2 * 4  # as computed, and both in float32


def decoder_activations(run: Run, batch: Batch) -> int:
    """Return how many bytes are alive at once in a layer of the decoder during the prefill."""
    config = run.config
    batch_size, length = batch.input_ids.shape
    tokens = batch_size * length
    # In the MLP: the embedded prompt, the input of the layer, the sum after attention and its norm;
    # cos and sin; three tensors of the inner width.
    inner = tokens * config.intermediate_size * run.dtype.itemsize
    mlp = tokens * (4 * config.hidden_size + 2 * config.head_dim) * run.dtype.itemsize + 3 * inner
    if run.quantize == "int8" and run.device.type != "cpu":
        # A matmul converts its weight to the dtype; the third inner tensor is made after that. (On
        # the CPU it converts a few outputs at a time.)
        copied_weight = config.intermediate_size * config.hidden_size * run.dtype.itemsize
        mlp += max(0, copied_weight - inner)
    # In attention: embedded prompt, input, norm, and queries, keys and values, repeated.
    attention = tokens * 7 * config.hidden_size * run.dtype.itemsize
    attention += batch_size * config.num_attention_heads * length**2 * score_bytes(run)
    mask = 0 if batch.attention_mask.all() else batch_size * length**2  # bool
    return max(mlp, attention) + mask


def vision_activations(run: Run, batch: Batch) -> int:
    """Return how many bytes are alive at once in a block of the vision encoder, 0 without media."""
    vision = run.config.vision_config
    size = run.dtype.itemsize
    most = 0
    for grids in (batch.image_grid_thw, batch.video_grid_thw):  # one after the other
        if grids is None:
            continue
        lengths = []  # of the sequences, in which patches attend to each other
        for t, h, w in grids.tolist():
            lengths += [h * w] * t
        patches = sum(lengths)
        # In the MLP: input, sum after attention, norm, and three tensors of the inner width.
        width = 3 * vision.embed_dim * (1 + vision.mlp_ratio)
        if size < 4:
            width += vision.embed_dim  # attention takes as much more: it rotates in float32
        cos_and_sin = patches * 2 * vision.embed_dim // vision.num_heads * max(size, 4)
        mlp = patches * width * size + cos_and_sin
        scores = vision.num_heads * max(lengths) ** 2 * score_bytes(run)
        if len(set(lengths)) == 1:  # then all sequences are one batch
            scores *= len(lengths)
        attention = patches * 10 * vision.embed_dim * size + scores
        most = max(most, mlp, attention)
    return most


def activations_size(run: Run, batch: Batch) -> Size:
    """Return the size of the activations of the prefill, which are larger than a decode step's."""
    embedded_prompt = batch.input_ids.size * run.config.hidden_size * run.dtype.itemsize
    vision = vision_activations(run, batch) + embedded_prompt
    decoder = decoder_activations(run, batch)
    head = 0
    if run.quantize == "int8" and run.device.type != "cpu":
        head = run.config.vocab_size * run.config.hidden_size * run.dtype.itemsize  # its copy
    largest = "vision encoder" if vision > max(decoder, head) else "decoder"
    remark = f"of the {largest} in the prefill, {run.attn_implementation} attention; an estimate"
    return Size(max(vision, decoder, head), remark)


def allocator_size(run: Run, batch: Batch) -> Size:
    """Return what the allocator keeps of freed memory on the CPU: at most all that was freed."""
    freed = pixels_size(run, batch).bytes + activations_size(run, batch).bytes
    return Size(min(KEPT_BY_ALLOCATOR, freed), "freed memory that the allocator keeps")


def process_size() -> Size:
    """Return what this process holds, which has loaded the same libraries as a run; 0 if unknown.

    With torch 2.13 on Linux it is about 240 MB, of which 80 MB are files of libraries.
    """
    status = read_numbers(Path("/proc/self/status"))
    return Size(1024 * status.get("VmRSS", 0), "Python, PyTorch and the tokenizer")


def batch_sizes(run: Run, batch: Batch) -> dict[str, Size]:
    """Return what a run holds besides the weights when it holds most."""
    sizes = {"cache": cache_size(run, batch)}
    if batch.media:
        sizes["pixels"] = pixels_size(run, batch)
    sizes["activations"] = activations_size(run, batch)
    if run.device.type == "cpu":
        sizes["allocator"] = allocator_size(run, batch)
    return sizes


# ----------------------------------------------------------------------------------- what is free
class Free(NamedTuple):
    """Memory that a run can have."""

    bytes: int
    swap: int  # bytes that it can have besides, on a disk
    place: str  # for a sentence: "on this machine"


def read_number(path: Path) -> int | None:
    """Return the number in a file of the kernel, None where there is none ("max") or no file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def read_numbers(path: Path) -> dict[str, int]:
    """Return the lines "name number" or "name: number kB" of a file of the kernel, in its unit."""
    numbers = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, *values = line.split()
            if values and values[0].isdigit():
                numbers[name.removesuffix(":")] = int(values[0])
    return numbers


def machine_free(proc: Path) -> Free | None:
    """Return what Linux can give without swapping, with the free swap; None on other systems.

    Pages of mapped files count as free, as the kernel can drop them.
    Source: proc_meminfo(5), MemAvailable.
    """
    kib = read_numbers(proc / "meminfo")
    if "MemAvailable" not in kib:
        return None
    return Free(1024 * kib["MemAvailable"], 1024 * kib.get("SwapFree", 0), "on this machine")


def cgroup_directories(proc: Path, root: Path) -> Iterator[Path]:
    """Yield the directories of this process's memory cgroups, version 1 or 2, up to the root.

    In a container the path in /proc may be that of the host: then only the root exists, and holds
    the limit of the container. Source: cgroups(7), "/proc/[pid]/cgroup".
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root  # version 2
        elif "memory" in controllers.split(","):
            base = root / "memory"
        else:
            continue
        parts = Path(path).parts[1:]
        if ".." in parts:  # outside of this process's namespace
            parts = ()
        for count in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:count])


def cgroup_free(directory: Path, machine_swap: int) -> Free | None:
    """Return what a cgroup's limit leaves, None where it has no limit.

    Pages of files count in the usage, and the kernel drops them before the limit ends a process.
    Source: Linux's admin-guide/cgroup-v2 and cgroup-v1/memory.
    """
    limit = read_number(directory / "memory.max")
    used = read_number(directory / "memory.current")
    prefix = ""
    if limit is None:
        limit = read_number(directory / "memory.limit_in_bytes")
        used = read_number(directory / "memory.usage_in_bytes")
        prefix = "total_"  # with the cgroups inside
    if limit is None or used is None:
        return None
    statistics = read_numbers(directory / "memory.stat")
    used -= statistics.get(f"{prefix}inactive_file", 0) + statistics.get(f"{prefix}active_file", 0)
    swap = machine_swap
    swap_limit = read_number(directory / "memory.swap.max")
    if swap_limit is not None:
        swap_used = read_number(directory / "memory.swap.current") or 0
        swap = min(swap, max(0, swap_limit - swap_used))
    return Free(max(0, limit - used), swap, "under the memory limit of this process (cgroup)")


def cpu_free(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> Free | None:
    """Return the least of what the machine and the cgroups leave; None where it is not known."""
    machine = machine_free(proc)
    if machine is None:
        return None
    limits = [machine]
    for directory in cgroup_directories(proc, root):
        free = cgroup_free(directory, machine.swap)
        if free is not None:
            limits.append(free)
    return min(limits, key=lambda free: free.bytes + free.swap)


def address_space_free() -> Free | None:
    """Return what `ulimit -v` leaves of the address space, in which mapped files count, too."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    used = 0
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_text().split()[0]
        used = int(pages) * os.sysconf("SC_PAGE_SIZE")
    return Free(max(0, limit - used), 0, "in the address space of this process (ulimit -v)")


def gpu_free(device: torch.device) -> Free:
    """Return what is free on a GPU, with what PyTorch holds of it and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Free(free + cached, 0, f"on {device}")


# -------------------------------------------------------------------------------------- the check
class Needs(NamedTuple):
    """What a run needs besides what this process holds already, in bytes."""

    private: dict[str, int]  # by name
    growth: int = 0  # of the cache, where the answers have all their tokens
    mapped: int = 0
    advice: str = ""  # the options that lower them, where they are others than `advice` returns

    def total(self) -> int:
        """Return the private bytes."""
        return sum(self.private.values())


def weights_needs(weights: Weights) -> Needs:
    """Return what loading the weights needs."""
    return Needs({"weights": weights.loading}, mapped=weights.file_bytes)


def batch_needs(run: Run, batch: Batch) -> Needs:
    """Return what answering a batch needs once the weights are loaded, at the least.

    An answer may end early, so the cache is that of the prompts.
    """
    batch_size, length = batch.input_ids.shape
    cache = 0
    growth = 0
    if run.max_new_tokens != 0:
        cache = cache_bytes(run, batch_size, length)
        growth = cache_size(run, batch).bytes - cache
    private = {"cache": cache, "activations": activations_size(run, batch).bytes}
    if run.device.type != "cpu" and batch.media:
        private["pixels"] = pixels_size(run, batch).bytes  # in RAM they are there already
    return Needs(private, growth)


def check_weights_and_batch(run: Run, batch: Batch | None = None) -> None:
    """Check that a run fits before its weights are loaded; batch: None where it is not known yet.

    Raises MemoryShortageError where it cannot fit. Warns where it may not, or will be slow.
    """
    weights = count_weights(run)
    needs = weights_needs(weights)
    if batch is not None:
        answer = batch_needs(run, batch)
        private = {"weights": weights.private} | answer.private
        if sum(private.values()) > weights.loading:
            needs = Needs(private, answer.growth, weights.mapped)
    check_needs(run, batch, needs)


def check_quantizing(run: Run) -> None:
    """Check that a model can be quantized and written, before its weights are loaded.

    Quantized weights exist twice then: as the kernels read them and as they are written.
    Raises MemoryShortageError where it cannot fit. A mapped file is read only twice: no warning.
    """
    weights = count_weights(run)
    plain = list_parameters(run)
    written = 0
    for name, parameter in list_parameters(run, partial(quantize, run)).items():
        if name not in plain or plain[name].nbytes != parameter.nbytes:
            written += parameter.nbytes
    private = {"weights": weights.private, "their copy for the file": written}
    needs = Needs(private, mapped=weights.mapped)
    if weights.loading > needs.total():
        needs = weights_needs(weights)
    refuse_needs(run, None, needs)


def check_batch(run: Run, batch: Batch) -> None:
    """Check that a batch fits beside the weights, which are loaded. Raises and warns as above."""
    check_needs(run, batch, batch_needs(run, batch))


def free_memory(device: torch.device) -> Free | None:
    """Return what is free on a device, None where that is not known."""
    if device.type == "cuda":
        return gpu_free(device)
    if device.type == "cpu":
        return cpu_free()
    return None


def refuse_needs(run: Run, batch: Batch | None, needs: Needs) -> Free | None:
    """Raise MemoryShortageError if needs cannot fit; return what is free, None if unknown."""
    address_space = address_space_free()
    if run.device.type == "cpu" and address_space is not None:
        refuse_shortage(run, batch, needs, needs.mapped, address_space)
    free = free_memory(run.device)
    if free is not None:
        refuse_shortage(run, batch, needs, 0, free)
    return free


def check_needs(run: Run, batch: Batch | None, needs: Needs) -> None:
    """Compare needs with what is free. Raises MemoryShortageError, or warns."""
    free = refuse_needs(run, batch, needs)
    if free is None:
        return
    if needs.total() + needs.growth > free.bytes:
        warnings.warn(
            f"the run may need {format_bytes(needs.total() + needs.growth)} with answers of full "
            f"length, but {format_bytes(free.bytes)} are free {free.place}: lower --max-new-tokens "
            f"if memory does not suffice",
            stacklevel=4,
        )
    elif needs.total() + needs.mapped > free.bytes:
        warnings.warn(
            f"the weights, {format_bytes(needs.mapped)}, are read from their files again and "
            f"again, which is slow, as {format_bytes(free.bytes)} are free {free.place}",
            stacklevel=4,
        )


def refuse_shortage(run: Run, batch: Batch | None, needs: Needs, mapped: int, free: Free) -> None:
    """Raise MemoryShortageError if the private and the mapped bytes cannot fit."""
    needed = needs.total() + mapped
    if needed <= TOLERANCE * (free.bytes + free.swap):
        return
    sizes = needs.private | {"mapped weights": mapped}
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)
    options = needs.advice or advice(run, batch)
    raise MemoryShortageError(
        f"memory does not suffice: about {format_bytes(needed)} are needed ({parts}), but "
        f"{format_bytes(free.bytes + free.swap)} are free {free.place}: {options}; "
        "--no-memory-check starts anyway"
    )


def format_bytes(size: float) -> str:
    """Return a size in bytes as "12.3 MB" or "1.23 GB"."""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:,.2f} GB"


def advice(run: Run, batch: Batch | None) -> str:
    """Return which options lower the memory of a run."""
    options = []
    if batch is not None and batch.image_grid_thw is not None:
        options.append("lower --max-pixels")
    if batch is not None and batch.video_grid_thw is not None:
        options.append("lower --nframes or --max-pixels")
    if batch is not None and len(batch.input_ids) > 1:
        options.append("lower --batch-size")
    if reordered_bytes(run):
        options.append("use --no-reorder")
    if run.quantize is None:
        options.append("use --quantize int8 or int4")
    return ", ".join(options) or "use a smaller checkpoint"
