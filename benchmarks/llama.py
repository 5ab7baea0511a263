"""llama.cpp beside our decoder: the same weights as GGUF, read by llama-cpp-python. For words only, on the CPU.

The two sides of it: `find_gguf` writes the file and needs the package gguf; `measure` runs in a process of its own
and needs llama-cpp-python and NumPy, but neither PyTorch nor this repository's model.

Source: llama.cpp, `src/models/qwen2vl.cpp` and `conversion`, as in llama-cpp-python 0.3.36: halves as the pairs of
rope, as here, so that no weight is permuted, and a head that is missing in the file is the embedding table.
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
from pathlib import Path

FORMATS = ("F16", "Q8_0")
VERSIONS = {"gguf": "0.19.0", "llama-cpp-python": "0.3.36"}


def obstacle(python: str) -> str | None:
    """What is missing to measure llama.cpp with this interpreter, in one sentence; None: nothing."""
    if importlib.util.find_spec("gguf") is None:
        return (
            f"the section llama needs the package gguf here: pip install gguf=={VERSIONS['gguf']}"
        )
    if shutil.which(python) is None:
        return f"--llama-python is {python}, expected a Python interpreter"
    tried = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if tried.returncode:
        install = (
            f"CMAKE_ARGS=-DGGML_NATIVE=ON {python} -m pip install --no-binary llama-cpp-python"
        )
        install += f" llama-cpp-python=={VERSIONS['llama-cpp-python']}"
        reason = (tried.stderr.strip().splitlines() or ["no reason was given"])[-1]
        return f"the section llama needs llama-cpp-python in {python} ({reason}): {install}"
    return None


def find_gguf(checkpoint: Path, form: str, cache: Path) -> Path:
    """The decoder of a checkpoint folder as GGUF, form "F16" or "Q8_0", written on first use into `cache`."""
    from load_weights import weight_files

    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in weight_files(checkpoint)
    ]
    known_by = zlib.crc32(
        json.dumps(files).encode()
    )  # other weights in the folder make another file
    path = cache / f"{checkpoint.name}-{known_by:08x}-{form}.gguf"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"writing the decoder for llama.cpp once: {path}", file=sys.stderr, flush=True)
        unfinished = path.with_suffix(".unfinished")
        write_gguf(checkpoint, form, unfinished)
        unfinished.rename(path)
    return path


def write_gguf(checkpoint: Path, form: str, path: Path) -> None:
    """Writes the decoder of a checkpoint folder. Matrices in the format `form`, norms and biases in float32.

    The vocabulary is a dummy: ids go in, logits come out. Raises ValueError for what llama.cpp's qwen2vl lacks.
    """
    import gguf
    import torch

    from load_weights import load_config, open_shard, parameter_name, weight_files

    config = load_config(checkpoint)
    if config.rope_type != "default" or config.use_sliding_window:
        raise ValueError(
            f"{checkpoint}: llama.cpp's qwen2vl has neither stretched rope nor a sliding window"
        )
    if len(sections := config.rope_scaling["mrope_section"]) != 3:
        raise ValueError(
            f"{checkpoint}: mrope_section has {len(sections)} entries; llama.cpp's qwen2vl takes three"
        )
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2VL])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_sections([*sections, 0])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, config.num_hidden_layers)
    kinds = {"F16": gguf.GGMLQuantizationType.F16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
    for shard in map(open_shard, weight_files(checkpoint)):
        for key in shard.keys():
            name = parameter_name(key)
            if name.startswith("visual.") or (
                name == "lm_head.weight" and config.tie_word_embeddings
            ):
                continue
            tensor = shard.get_tensor(key).to(torch.float32).numpy()
            kind = kinds[form] if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                names.get_name(name, (".weight", ".bias")),
                gguf.quants.quantize(tensor, kind),
                raw_dtype=kind,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(job: dict) -> None:
    """Reads job["gguf"], warms up, then answers the one row of ids of each of job["tasks"], greedily.

    The whole prompt goes in as one batch. Reports what `workers.questions` does, and what the library was built for.
    """
    import llama_cpp as llama
    import numpy as np

    from benchmarks.workers import peak_bytes, report

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        job["gguf"].encode(), llama.llama_model_default_params()
    )
    if not model:
        raise ValueError(f"llama.cpp does not read {job['gguf']}")
    words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    settings, tasks = llama.llama_context_default_params(), job["tasks"].values()
    settings.n_threads = settings.n_threads_batch = job["threads"]
    settings.n_ctx = max(len(task["ids"]) + task["new_tokens"] for task in tasks)
    settings.n_batch = settings.n_ubatch = max(len(task["ids"]) for task in tasks)
    context = llama.llama_init_from_model(model, settings)

    def logits_after(ids: list[int]) -> np.ndarray:
        """The scores [vocabulary] after these ids, which go behind those of the calls before."""
        given = (llama.llama_token * len(ids))(*ids)  # the batch only points to it
        if failed := llama.llama_decode(context, llama.llama_batch_get_one(given, len(ids))):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens ended with {failed}")
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (words,))

    for ids in ([1, 2, 3], [4]):  # a prompt and a step, to warm up
        logits_after(ids)
    for name, task in job["tasks"].items():
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        times, tokens, scores, ids = [], [], [], task["ids"]
        start = time.monotonic()
        for _ in range(task["new_tokens"]):
            found = logits_after(ids)
            ids = [int(found.argmax())]
            times.append(time.monotonic())
            tokens.append(ids)
            scores[1:] = [found.copy()]  # of the prefill and of the last step
        if "logits" in job:
            ends = np.stack((scores[0], scores[-1]))[:, None]
            np.save(Path(job["logits"]) / f"{job['side']}-{job['dtype']}-{name}.npy", ends)
        built = ", ".join(re.findall(r"(\w+) = 1", llama.llama_print_system_info().decode()))
        report(task=name, start=start, end=times[-1], vision=0, first_token=times[0] - start,
               steps=[b - a for a, b in itertools.pairwise(times)], tokens=tokens, peak_bytes=peak_bytes("cpu"),
               version=llama.__version__, built=built)  # fmt: skip
