"""Add layers to trained weights without changing what the model computes.

A layer adds its output to its input, so a layer whose output is zero does nothing, and where it is
a copy of its neighbor in all but the last matrices, it has something to say as soon as these are
trained. Source: Wu et al., "LLaMA Pro: Progressive LLaMA with block expansion" (2024), section 3.2.
"""

import re

import torch
from torch import Tensor

LAST = ("self_attn.o_proj", "mlp.down_proj", "attn.proj", "mlp.fc2")  # what a layer adds
LAYER = re.compile(r"(model\.layers|visual\.blocks)\.(\d+)\.(.+)\.(weight|bias)")


def deepen(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return the weights with so many layers in the decoder and blocks in the encoder.

    Raises ValueError where they have more.
    """
    layers: dict[str, list[int]] = {}
    for name in weights:
        if match := LAYER.fullmatch(name):
            layers.setdefault(match[1], []).append(int(match[2]))
    deeper = {}
    for name, weight in weights.items():
        match = LAYER.fullmatch(name)
        if not match:
            deeper[name] = weight
            continue
        stack, number, part, kind = match[1], int(match[2]), match[3], match[4]
        before = max(layers[stack]) + 1
        if before > depth:
            raise ValueError(f"{stack} has {before} layers, more than {depth}")
        copies = [new for new in range(depth) if new * before // depth == number]
        for new in copies:
            silent = new != copies[0] and part in LAST
            values = torch.zeros_like(weight) if silent else weight
            deeper[f"{stack}.{new}.{part}.{kind}"] = values
    return deeper
