"""llama.cpp compared with our decoder: the same weights as GGUF, text only, on the CPU.

It has two sides. `find_gguf` writes the file and needs the package gguf. `measure` runs in a
process of its own and needs llama-cpp-python and NumPy, but neither PyTorch nor this repository's
model.

Source: llama.cpp, `src/models/qwen2vl.cpp` and `conversion`, as in llama-cpp-python 0.3.36. RoPE
rotates pairs of halves, as here, so no weight is permuted; a missing head means tied embeddings.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.protocol import peak_bytes, report

if TYPE_CHECKING:
    import numpy as np

    from qwen2vl import Config

FORMATS = ("F16", "Q8_0")  # that `write_gguf` writes
QUANTIZE = """
import sys

import llama_cpp

source, target, form = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
error = llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings)
sys.exit(f"llama_model_quantize ended with {error}" if error else 0)
"""
VERSIONS = {"gguf": "0.19.0", "llama-cpp-python": "0.3.36"}


def obstacle(python: str) -> str | None:
    """Return in a sentence what is missing to measure llama.cpp with this interpreter."""
    if importlib.util.find_spec("gguf") is None:
        return (
            f"the section llama needs the package gguf here: pip install gguf=={VERSIONS['gguf']}"
        )
    if shutil.which(python) is None:
        return f"--llama-python is {python}, expected a Python interpreter"
    process = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if process.returncode == 0:
        return None
    errors = process.stderr.strip().splitlines() or ["no reason was given"]
    install = (
        f"CMAKE_ARGS=-DGGML_NATIVE=ON {python} -m pip install --no-binary llama-cpp-python "
        f"llama-cpp-python=={VERSIONS['llama-cpp-python']}"
    )
    return f"the section llama needs llama-cpp-python in {python} ({errors[-1]}): {install}"


def find_gguf(checkpoint: Path, form: str, cache: Path, python: str = sys.executable) -> Path:
    """Return the decoder of a checkpoint as GGUF, written on first use into the directory `cache`.

    form: one of FORMATS, or one such as "Q4_K_M" that llama.cpp itself makes of F16, with the
    interpreter `python`. Other weights in the checkpoint's directory make another file.
    """
    from load_weights import weight_files

    files = []
    for file in weight_files(checkpoint):
        files.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    checksum = zlib.crc32(json.dumps(files).encode())
    path = cache / f"{checkpoint.name}-{checksum:08x}-{form}.gguf"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"writing the decoder for llama.cpp once: {path}", file=sys.stderr, flush=True)
        unfinished = path.with_suffix(".unfinished")
        if form in FORMATS:
            write_gguf(checkpoint, form, unfinished)
        else:
            quantize_gguf(find_gguf(checkpoint, "F16", cache), form, unfinished, python)
        unfinished.rename(path)
    return path


def quantize_gguf(source: Path, form: str, path: Path, python: str) -> None:
    """Write an F16 file in another format, as llama.cpp rounds it.

    Raises RuntimeError with the end of llama.cpp's errors, if it fails.
    """
    command = [python, "-c", QUANTIZE, str(source), str(path), form]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"llama.cpp cannot write {form}:\n{process.stderr[-2000:]}")


def check_config(checkpoint: Path, config: Config) -> None:
    """Raise ValueError for what llama.cpp's qwen2vl lacks."""
    if config.rope_type != "default":
        raise ValueError(
            f"{checkpoint}: rope type is {config.rope_type!r}, "
            "llama.cpp's qwen2vl expects 'default'"
        )
    if config.use_sliding_window:
        raise ValueError(f"{checkpoint}: llama.cpp's qwen2vl has no sliding window")
    sections = config.rope_scaling["mrope_section"]
    if len(sections) != 3:
        raise ValueError(
            f"{checkpoint}: mrope_section has {len(sections)} entries, "
            "llama.cpp's qwen2vl expects three"
        )


def decoder_tensors(checkpoint: Path, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and the float32 weights of the decoder; tied embeddings once."""
    import torch

    from load_weights import parameter_name, weight_files
    from stored_tensors import open_shard

    for file in weight_files(checkpoint):
        shard = open_shard(file)
        for key in shard.keys():
            name = parameter_name(key)
            is_tied_head = name == "lm_head.weight" and config.tie_word_embeddings
            if name.startswith("visual.") or is_tied_head:
                continue
            yield name, shard.get_tensor(key).to(torch.float32).numpy()


def write_gguf(checkpoint: Path, form: str, path: Path) -> None:
    """Write the decoder of a checkpoint: matrices in the format `form`, norms and biases in
    float32.

    The vocabulary is a dummy: ids are the input and logits the output. Raises ValueError for what
    llama.cpp's qwen2vl lacks.
    """
    import gguf

    from load_weights import load_config

    config = load_config(checkpoint)
    check_config(checkpoint, config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2VL])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_sections([*config.rope_scaling["mrope_section"], 0])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, config.num_hidden_layers)
    for name, tensor in decoder_tensors(checkpoint, config):
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim > 1:
            kind = gguf.GGMLQuantizationType[form]
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Session:
    """A model in llama.cpp, and a context that is large enough for the tasks of a job."""

    def __init__(self, job: dict):
        import llama_cpp

        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            job["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {job['gguf']}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        tasks = job["tasks"].values()
        longest = max(len(task["ids"]) for task in tasks)
        settings = llama_cpp.llama_context_default_params()
        settings.n_threads = job["threads"]
        settings.n_threads_batch = job["threads"]
        settings.n_ctx = max(len(task["ids"]) + task["new_tokens"] for task in tasks)
        settings.n_batch = longest
        settings.n_ubatch = longest
        self.context = llama_cpp.llama_init_from_model(self.model, settings)

    def clear(self) -> None:
        """Empty the KV cache."""
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_clear(memory, True)

    def logits_after(self, ids: list[int]) -> np.ndarray:
        """Return the logits [vocabulary] after these ids, which follow those of earlier calls."""
        import numpy as np

        tokens = (self.library.llama_token * len(ids))(*ids)  # the batch only points to it
        batch = self.library.llama_batch_get_one(tokens, len(ids))
        error = self.library.llama_decode(self.context, batch)
        if error:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens ended with {error}")
        pointer = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def features(self) -> str:
        """Return what the library was built for."""
        info = self.library.llama_print_system_info().decode()
        return ", ".join(re.findall(r"(\w+) = 1", info))


def measure(job: dict) -> None:
    """Read job["gguf"], warm up, then answer each of job["tasks"], one sequence of ids, greedily.

    The prompt is one batch. Reports what `workers.questions` does, and the features of the library.
    """
    import numpy as np

    session = Session(job)
    session.logits_after([1, 2, 3])  # warm up: a prompt and a step
    session.logits_after([4])
    for name, task in job["tasks"].items():
        session.clear()
        times = []
        tokens = []
        kept = {}  # the logits of the prefill and of the last step
        ids = task["ids"]
        start = time.monotonic()
        for step in range(task["new_tokens"]):
            logits = session.logits_after(ids)
            ids = [int(logits.argmax())]
            times.append(time.monotonic())
            tokens.append(ids)
            kept["first" if step == 0 else "last"] = logits.copy()
        if "logits" in job:
            ends = np.stack((kept["first"], kept.get("last", kept["first"])))[:, None]
            np.save(Path(job["logits"]) / f"{job['side']}-{job['dtype']}-{name}.npy", ends)
        report(
            task=name,
            start=start,
            end=times[-1],
            vision=0,
            first_token=times[0] - start,
            steps=[after - before for before, after in itertools.pairwise(times)],
            tokens=tokens,
            peak_bytes=peak_bytes("cpu"),
            version=session.library.__version__,
            built=session.features(),
        )
