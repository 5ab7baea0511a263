"""Add layers to trained weights without changing what the model computes.

A layer adds its output to its input, so a layer whose output is zero does nothing, and where it is
a copy of its neighbor in all but the last matrices, it has something to say as soon as these are
trained. Source: Wu et al., "LLaMA Pro: Progressive LLaMA with block expansion" (2024), section 3.2.
"""

import torch
from torch import Tensor

STACKS = ("model.layers", "visual.blocks")
LAST = ("self_attn.o_proj", "mlp.down_proj", "attn.proj", "mlp.fc2")  # what a layer adds


def deepen(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return the weights with so many layers in the decoder and blocks in the encoder.

    Raises ValueError where they have more.
    """
    deeper = {name: weight for name, weight in weights.items() if not name.startswith(STACKS)}
    for stack in STACKS:
        deeper |= deepen_stack(weights, stack, depth)
    return deeper


def deepen_stack(weights: dict[str, Tensor], stack: str, depth: int) -> dict[str, Tensor]:
    """Return the weights of a stack of layers, each new one behind the one that it copies."""
    names = [name for name in weights if name.startswith(f"{stack}.")]
    before = len({name.removeprefix(f"{stack}.").split(".")[0] for name in names})
    if before > depth:
        raise ValueError(f"{stack} has {before} layers, more than {depth}")
    sources = [new * before // depth for new in range(depth)]
    deeper = {}
    for new, old in enumerate(sources):
        is_copy = old in sources[:new]
        prefix = f"{stack}.{old}."
        for name in names:
            if not name.startswith(prefix):
                continue
            part = name.removeprefix(prefix)
            silent = is_copy and part.startswith(LAST)
            values = torch.zeros_like(weights[name]) if silent else weights[name]
            deeper[f"{stack}.{new}.{part}"] = values
    return deeper
