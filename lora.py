"""LoRA: a frozen linear layer plus a trained update of low rank.

    y = x Wᵀ + b + (alpha / rank) · dropout(x) Aᵀ Bᵀ

A [rank, in] and B [out, rank] are few numbers beside W [out, in]. B begins with zeros, so that the
model is at first the one that it was. Source: arXiv 2106.09685 §4.1; initial values, names and
dtypes as in PEFT 0.21.2, `tuners/lora/layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linear import Linear, fast_linear
from qwen2vl import at_least_float32

DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# In full, as "proj" alone would also name the patch embedding, which is no linear layer.
VISION_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class LoraLinear(Linear):
    """A linear layer with its weights in their own dtype, and A and B in at least float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)  # not that of nn.Linear, which would draw new weights
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        kind = {
            "device": base.weight.device,
            "dtype": torch.promote_types(base.weight.dtype, torch.float32),
        }
        self.lora_A = Linear(base.in_features, rank, bias=False, **kind)
        self.lora_B = Linear(rank, base.out_features, bias=False, **kind)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype; the sum is rounded to it once."""
        y = fast_linear(x, self.weight, self.bias)
        update = self.lora_B(self.lora_A(self.dropout(at_least_float32(x))))
        return (y + self.scale * update).to(y.dtype)


def add_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0
) -> None:
    """Freeze a `Qwen2VL`, and replace its linear layers named `targets` by `LoraLinear`.

    targets: the last part of the layers' names ("q_proj") or more of them ("attn.proj"), as in
    PEFT. Raises ValueError for a target that names no layer, or one that is not linear.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for target in targets:
        named = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not named:
            raise ValueError(f"the model has no layer {target}, expected for example q_proj")
        for name in named:
            base = modules[name]
            if not isinstance(base, nn.Linear):
                kind = type(base).__name__
                raise ValueError(
                    f"target {target}: expected linear layers, {name} is a {kind}; "
                    "give more of the name, such as attn.proj"
                )
            model.set_submodule(name, LoraLinear(base, rank, alpha, dropout))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all A and B under the names that PEFT gives them in transformers 5."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        if name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        elif name.startswith("visual."):
            name = f"model.{name}"
        tensors[f"base_model.model.{name}"] = parameter.detach()
    return tensors
