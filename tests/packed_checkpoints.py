"""Checkpoints packed as AWQ and GPTQ, written and read by loops over single integers in NumPy.

They follow the description of the formats, and share nothing with `packed_weights.py`.
"""

import json
import re
import shutil
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from command_line import BUNDLED_CHECKPOINT

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Variant:
    """How a test packs the bundled checkpoint."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    act_order: bool = False
    version: str = "gptq"  # or "gptq_v2"
    head: bool = False
    zero_biases: bool = False
    with_g_idx: bool = True
    scale_dtype: torch.dtype = torch.float16

    def config(self):
        """Return the quantization_config that the packers of the method write."""
        if self.method == "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group_size,
                "version": "gemm",
                "zero_point": True,
                "modules_to_not_convert": ["visual"],
            }
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": self.version,
            "lm_head": self.head,
        }


def pack_words(columns, bits, order=None):
    """Return integers [n, m] with each 32 // bits of a row in one int32, [n, m · bits / 32]."""
    places = 32 // bits
    order = order or range(places)
    n, m = columns.shape
    words = np.zeros((n, m // places), dtype=np.uint32)
    for place, column in enumerate(order):
        words |= columns[:, column::places].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def unpack_words(words, bits):
    """Return the integers of GPTQ's int32 [n, m] as [n, m · 32 / bits]."""
    places = 32 // bits
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    numbers = np.zeros((len(words), words.shape[1] * places), dtype=np.int64)
    for place in range(places):
        numbers[:, place::places] = unsigned >> np.uint32(bits * place) & np.uint32(2**bits - 1)
    return numbers


def quantize(weight, variant, groups):
    """Return integers [out, in], zero points and float16 scales [out, groups] of a weight."""
    top = 2**variant.bits - 1
    count = groups.max() + 1
    zeros = np.zeros((len(weight), count), dtype=np.int64)
    scales = np.zeros((len(weight), count), dtype=np.float32)
    for group in range(count):
        part = weight[:, groups == group]
        if variant.symmetric:
            scale = 2 * np.abs(part).max(1) / top
            zeros[:, group] = 2 ** (variant.bits - 1)
        else:
            low = np.minimum(part.min(1), -1e-3)
            scale = (np.maximum(part.max(1), 1e-3) - low) / top
            zeros[:, group] = np.clip(np.round(-low / scale), 1, top)
        scales[:, group] = torch.tensor(scale).to(variant.scale_dtype).float().numpy()
    numbers = np.round(weight / scales[:, groups]) + zeros[:, groups]
    return np.clip(numbers, 0, top).astype(np.int64), zeros, scales


def group_of_inputs(inputs, variant, seed):
    """Return the group of each input; with act-order they are shuffled."""
    size = inputs if variant.group_size == -1 else variant.group_size
    groups = np.arange(inputs) // size
    if variant.act_order:
        np.random.default_rng(seed).shuffle(groups)
    return groups


def pack_layer(weight, variant, seed=0):
    """Return the tensors of a layer [out, in] by their endings, and the weights that they mean."""
    weight = weight.float().numpy()
    groups = group_of_inputs(weight.shape[1], variant, seed)
    numbers, zeros, scales = quantize(weight, variant, groups)
    meant = (numbers - zeros[:, groups]).astype(np.float32) * scales[:, groups]
    if variant.method == "awq":
        packed = {
            "qweight": pack_words(numbers.T, 4, AWQ_COLUMNS),
            "qzeros": pack_words(zeros.T, 4, AWQ_COLUMNS),
        }
    else:
        stored_zeros = zeros - 1 if variant.version == "gptq" else zeros
        packed = {
            "qweight": pack_words(numbers, variant.bits).T,
            "qzeros": pack_words(stored_zeros.T, variant.bits),
        }
        if variant.with_g_idx:
            packed["g_idx"] = groups.astype(np.int32)
    tensors = {ending: torch.tensor(np.ascontiguousarray(x)) for ending, x in packed.items()}
    tensors["scales"] = torch.tensor(scales.T).to(variant.scale_dtype).contiguous()
    return tensors, torch.tensor(meant)


def bundled():
    """Return config.json and the tensors of the bundled checkpoint, in float32.

    The vocabulary is padded to whole int32, and the head is not tied.
    """
    config = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text())
    weights = load_file(BUNDLED_CHECKPOINT / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    padding = -len(embedding) % 32
    embedding = torch.nn.functional.pad(embedding, (0, 0, 0, padding))
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = embedding.clone()
    changes = {"vocab_size": len(embedding), "tie_word_embeddings": False, "torch_dtype": "float32"}
    return config | changes, weights


def is_packed(name, variant):
    """Return whether a weight of that name is packed."""
    if name == "lm_head.weight":
        return variant.head
    return bool(re.fullmatch(r"model\.layers\.\d+\..*proj\.weight", name))


def pack_weights(weights, variant):
    """Return the tensors of a packed checkpoint, and those of one that means the same."""
    packed = {}
    meant = {}
    for number, (name, weight) in enumerate(weights.items()):
        if not is_packed(name, variant):
            packed[name] = meant[name] = weight
            continue
        module = name.removesuffix(".weight")
        tensors, meant[name] = pack_layer(weight, variant, seed=number)
        packed |= {f"{module}.{ending}": tensor for ending, tensor in tensors.items()}
        if variant.zero_biases and f"{module}.bias" not in weights:
            packed[f"{module}.bias"] = torch.zeros(len(weight), dtype=torch.float16)
    return packed, meant


@cache
def pack_bundled(variant):
    """Return what `pack_weights` returns for the bundled checkpoint, made once."""
    return pack_weights(bundled()[1], variant)


def write_checkpoint(folder, config, weights):
    """Write a directory with the bundled tokenizer and image settings."""
    skipped = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(BUNDLED_CHECKPOINT, folder, ignore=skipped, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_packed(folder, variant, dtype="float32"):
    """Write a packed checkpoint and one that means the same; return both directories."""
    return write_pair(folder, *pack_bundled(variant), variant.config(), dtype)


def write_pair(folder, packed, meant, quantization_config, dtype):
    """Write quantized tensors and plain ones as two checkpoints; return both directories."""
    config, _ = bundled()
    config["torch_dtype"] = dtype
    packed_config = config | {"quantization_config": quantization_config}
    return (
        write_checkpoint(folder / "packed", packed_config, packed),
        write_checkpoint(folder / "meant", config, meant),
    )


def read_gptq(tensors, module, bits):
    """Return the weights [out, in] that a layer in GPTQ's first format means, in float32."""
    numbers = unpack_words(tensors[f"{module}.qweight"].numpy().T, bits)  # [out, in]
    zeros = unpack_words(tensors[f"{module}.qzeros"].numpy(), bits) + 1  # [groups, out]
    scales = tensors[f"{module}.scales"].float().numpy()
    groups = tensors[f"{module}.g_idx"].numpy()
    steps = numbers - zeros[groups].T
    return torch.tensor(steps.astype(np.float32) * scales[groups].T)
