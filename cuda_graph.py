"""The decode step captured as a CUDA graph and replayed, so that a GPU need not wait for Python.

A step of a small model keeps a GPU busy for less time than Python takes to launch its few
hundred kernels. A CUDA graph launches all of them at once, but contains no Python: the same
tensors, of the same shapes, in the same memory. So the step here attends to all of the cache's
memory, with a mask for what is not filled yet, and reads its position from tensors. The layers
of `qwen2vl.py` serve as they are.

On a CPU the same step runs without being captured: that is how the tests
compare it with the plain one.

Shapes as in `qwen2vl.py`; L tokens that the cache has memory for (its capacity).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from qwen2vl import AttentionContext, KVCache, Qwen2VL, multimodal_rotary_embedding


class StaticStep:
    """A decode step for one cache, whose inputs and outputs stay in the same memory."""

    def __init__(self, model: Qwen2VL, cache: KVCache):
        batch_size = cache.next_position.shape[0]
        device = cache.keys.device
        self.model = model
        self.cache = cache
        self.keys = cache.keys  # a cache that has grown has other memory, and needs another step
        self.graph: torch.cuda.CUDAGraph | None = None
        # What is masked still counts 0 times, and 0 · NaN is NaN.
        cache.keys[..., cache.length :, :] = 0
        cache.values[..., cache.length :, :] = 0
        # The cache's length after the last step: other code has used it if that differs.
        self.end = -1
        self.ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        # On all three axes, and of the new token in the cache.
        self.position = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        shape = (batch_size, 1, 1, cache.capacity)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        # No position is larger than the number of tokens before it, so L rows of angles are enough.
        positions = torch.arange(cache.capacity, device=device).expand(3, 1, -1)
        like = model.model.norm.weight
        angles = multimodal_rotary_embedding(model.config, positions, like)
        self.cos, self.sin = angles  # [1, 1, L, D]
        self.logits: Tensor  # [B, 1, V]: what `compute` returns, in the same memory if captured

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v as `KVCache.update` does, at a tensor index; return all L, [B, G, L, D]."""
        keys = self.cache.keys[layer]
        values = self.cache.values[layer]
        keys.index_copy_(2, self.index, k)
        values.index_copy_(2, self.index, v)
        return keys, values

    def compute(self) -> None:
        """Compute the step itself."""
        decoder = self.model.model
        self.mask.index_fill_(3, self.index, True)
        x = decoder.embed_tokens(self.ids)  # [B, 1, C]
        cos = self.cos[0, 0, self.position][:, None, None]  # [B, 1, 1, D]
        sin = self.sin[0, 0, self.position][:, None, None]
        context = AttentionContext(mask=self.mask)
        for layer in decoder.layers:
            x = layer(x, cos, sin, context, self)
        self.logits = self.model.lm_head(decoder.norm(x))

    def capture(self) -> torch.cuda.CUDAGraph:
        """Compute the step three times, as kernels are chosen at first; return it captured."""
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        return graph

    def __call__(self, tokens: list[int], mask: Tensor | None) -> Tensor:
        """Return the logits [B, V] after one more token of each sequence.

        mask [B, S] as in `decode_step`.
        """
        cache = self.cache
        if (
            cache.length != self.end
        ):  # the first step, or a chat has cut its cache back or added to it
            self.mask.zero_()
            self.mask[..., : cache.length] = True
            if mask is not None:
                length = min(cache.length, mask.shape[1])
                self.mask[..., :length] = mask[:, None, None, :length].bool()
        self.ids.copy_(torch.tensor(tokens)[:, None])
        self.position.copy_(cache.next_position[:, 0])
        self.index.fill_(cache.length)
        if self.ids.device.type != "cuda":
            self.compute()
        else:
            if self.graph is None:
                self.graph = self.capture()
            self.graph.replay()
        cache.length += 1
        cache.next_position = cache.next_position + 1
        self.end = cache.length
        return self.logits[:, -1].clone()  # the next step overwrites them


class CapturedDecodeStep:
    """`generate.decode_step` by a CUDA graph: give an object of it to the generation loop.

    fallback: `decode_step` itself, where the cache is full and has to grow.
    Raises ValueError for a model with a sliding window or with RoPE that is scaled with the length:
    their steps are not all alike.
    """

    def __init__(self, model: Qwen2VL, fallback: Callable[..., Tensor]):
        rope_type = model.config.rope_type
        if model.model.windows != {None} or rope_type in ("dynamic", "longrope"):
            raise ValueError(f"no CUDA graph for a sliding window or rope of type {rope_type}")
        device = model.model.norm.weight.device
        if device.type != "cuda":
            warnings.warn(
                f"CUDA graph: the model is on {device}, its steps are computed without one",
                stacklevel=2,
            )
        self.fallback = fallback
        self.step: StaticStep | None = None  # of the last cache; a new cache lets go of the old one

    def __call__(
        self, model: Qwen2VL, tokens: list[int], cache: KVCache, mask: Tensor | None
    ) -> Tensor:
        if cache.length >= cache.capacity:
            return self.fallback(model, tokens, cache, mask)
        if self.step is None or self.step.cache is not cache or self.step.keys is not cache.keys:
            self.step = StaticStep(model, cache)
        return self.step(tokens, mask)
