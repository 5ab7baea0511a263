"""What a training needs of memory, and the check before its weights are loaded.

A pass and its gradients run on the meta device, whose tensors have shapes and no values, while the
bytes of those alive at once are counted: what the backward pass needs depends on the targets of
LoRA, on the attention and on gradient checkpointing. Not counted: workspaces of kernels, and what
glibc keeps of freed tensors below 32 MB: with 330 tokens and gradient checkpointing, at the widths
of the 2B model in six layers, a process took 408 MB where 173 MB were alive.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
from apps.training import loss_of_tokens
from apps.training_data import IGNORED, Encoder, Example
from load_weights import empty_model
from lora import add_lora
from qwen2vl import (
    AttentionContext,
    Qwen2VL,
    attend_per_sequence,
    repeat_heads,
    sdpa_attention,
)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operators return in this context, while they live."""

    def __init__(self, outside: Iterable[Tensor]):
        """outside: tensors that do not count; nor do their views."""
        super().__init__()
        self.sizes = {id(tensor.untyped_storage()): 0 for tensor in outside}  # views share one
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, operator: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.sizes:
                    self.sizes[id(storage)] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, id(storage))
        self.peak = max(self.peak, self.now)
        return output

    def forget(self, key: int) -> None:
        """Stop counting a storage, which no tensor uses anymore."""
        self.now -= self.sizes.pop(key)


def fused_attention(
    is_padded: bool, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
) -> Tensor:
    """Compute `sdpa_attention` on the meta device by the kernel of the CPU, which holds no scores.

    PyTorch would choose its formula there, which holds all of them.
    """
    if context.seqlens is not None:
        attend = partial(fused_attention, False)
        return attend_per_sequence(attend, q, k, v, context.seqlens)
    if context.dropout:
        return sdpa_attention(q, k, v, context)  # the kernel has none, so that the formula is used
    mask = None
    if context.mask is not None or is_padded:
        mask = q.new_empty(len(q), 1, q.shape[2], q.shape[2])  # made in each layer of one of bools
    k = repeat_heads(k, q.shape[1])
    v = repeat_heads(v, q.shape[1])
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, is_causal=context.causal and mask is None, attn_mask=mask)[0]


def pass_bytes(model: Qwen2VL, batch: dict[str, Tensor]) -> int:
    """Return the peak in bytes of what a pass makes, given a model on the meta device.

    batch: of `Encoder.batch`. The gradients exist already, as in all passes but the first.
    """
    weights = list(model.parameters())
    for weight in weights:
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    is_padded = not bool(batch["attention_mask"].all())
    for name, module in model.named_modules():
        if name.endswith("attn") and model.attn_implementation == "sdpa":
            module.attend = partial(fused_attention, is_padded and name.startswith("model."))
    shape = batch["input_ids"].shape
    counts = batch["labels"] != IGNORED
    with LiveBytes(weights + gradients) as live:
        parts = []  # the vision tokens, and then the text: in any order
        if "pixel_values" in batch:
            pixels = batch["pixel_values"].to("meta")
            parts.append(model.visual(pixels, batch["image_grid_thw"]))
        if "pixel_values_videos" in batch:
            pixels_videos = batch["pixel_values_videos"].to("meta")
            parts.append(model.visual(pixels_videos, batch["video_grid_thw"]))
        text = shape.numel() - sum(len(part) for part in parts)
        parts.append(model.model.embed_tokens(batch["input_ids"].to("meta").flatten()[:text]))
        x = torch.cat(parts).view(*shape, -1)  # [B, S, C]
        positions = torch.zeros(3, *shape, dtype=torch.int64, device="meta")
        hidden = model.model(x, positions)
        hidden = hidden.flatten(0, 1)[: int(counts.sum())]
        loss = loss_of_tokens(model, hidden, batch["labels"][counts].to("meta"))
        del parts, x, hidden
        loss.backward()
    return live.peak


def training_needs(
    run: memory.Run, arguments: argparse.Namespace, encoder: Encoder, examples: list[Example]
) -> memory.Needs:
    """Return what training needs at most: with the longest examples, or the longest answers.

    arguments: of `apps.finetune`. Raises ValueError for targets that the model does not have.
    """
    attention = "sdpa" if run.attn_implementation == "flash" else run.attn_implementation
    model = empty_model(run.config, attention).to(run.dtype).train()
    add_lora(model, arguments.targets, arguments.rank, arguments.alpha, arguments.dropout)
    if arguments.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    longest = sorted(examples, key=attrgetter("tokens"))[-arguments.batch_size :]
    most_said = sorted(examples, key=attrgetter("answer_tokens"))[-arguments.batch_size :]
    groups = [longest] if most_said == longest else [longest, most_said]
    batches = [encoder.batch(group, torch.device("cpu")) for group in groups]
    weights = memory.count_weights(run)
    private = {
        "weights": weights.private,
        "LoRA with its gradients and moments": 4 * trained,
        "activations": max(pass_bytes(model, batch) for batch in batches),
    }
    length = max(example.tokens for example in examples)
    options = [f"lower --max-length (the longest conversation has {length:,} tokens)"]
    if any("image_grid_thw" in batch or "video_grid_thw" in batch for batch in batches):
        options.append("lower --max-pixels")
    if arguments.batch_size > 1:
        options.append("lower --batch-size")
    if not arguments.gradient_checkpointing:
        options.append("use --gradient-checkpointing")
    return memory.Needs(private, mapped=weights.mapped, advice=", ".join(options))
