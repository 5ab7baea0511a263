"""`--cuda-graph`: the decode step recorded once and replayed, so that a GPU need not wait for Python.

A step of a small model keeps a GPU busy for less time than Python takes to ask for its few hundred kernels. A CUDA
graph asks for all of them at once, but knows no Python: the same tensors, of the same shapes, at the same addresses.
So the step here attends to all places of the cache, with a mask for those not yet filled, and is told where it stands
by tensors. `qwen2vl.py`'s layers serve as they are.

On a CPU the same step runs without being recorded: that is how the tests compare it with the plain one.

Shapes as in `qwen2vl.py`; L places of the cache (its capacity).
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

from qwen2vl import AttentionContext, KVCache, Qwen2VL, multimodal_rotary_embedding


class Step:
    """One token more for each row of a cache: made for it once, then called with ids [B, 1] → logits [B, 1, V]."""

    def __init__(self, model: Qwen2VL, cache: KVCache):
        rows, device = cache.next_position.shape[0], cache.keys.device
        self.model, self.cache, self.graph, self.recording = (
            model,
            cache,
            None,
            device.type == "cuda",
        )
        self.keys = (
            cache.keys
        )  # a cache that has grown since has other memory, and needs another step
        for stored in (
            cache.keys,
            cache.values,
        ):  # what is masked still counts 0 times, and 0 · NaN is NaN
            stored[..., cache.length :, :] = 0
        self.end = (
            -1
        )  # how long the cache was after the last step: it is another's if that has changed
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(
            rows, dtype=torch.long, device=device
        )  # of the new tokens, on all three axes
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # where in the cache they go
        self.visible = torch.zeros(rows, 1, 1, cache.capacity, dtype=torch.bool, device=device)
        # No token is further on than there are tokens before it, so L rows of angles are enough.
        positions = torch.arange(cache.capacity, device=device).expand(3, 1, -1)
        self.angles = multimodal_rotary_embedding(
            model.config, positions, like=model.model.norm.weight
        )  # two of [1, 1, L, D]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What `KVCache.update` does, at a place that is a tensor; gives all L places, [B, G, L, D]."""
        for stored, new in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
            stored.index_copy_(2, self.place, new)
        return self.cache.keys[layer], self.cache.values[layer]

    def compute(self) -> None:
        """The step itself, from and to tensors that stay where they are."""
        decoder = self.model.model
        self.visible.index_fill_(3, self.place, True)
        x = decoder.embed_tokens(self.ids)  # [B, 1, C]
        cos, sin = (
            table[0, 0, self.position][:, None, None] for table in self.angles
        )  # [B, 1, 1, D]
        context = AttentionContext(mask=self.visible)
        for layer in decoder.layers:
            x = layer(x, cos, sin, context, self)
        self.logits = self.model.lm_head(decoder.norm(x))

    def __call__(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        cache = self.cache
        if (
            cache.length != self.end
        ):  # the first step, or a chat has cut its cache back or added to it
            self.visible.zero_()
            self.visible[..., : cache.length] = True
            if attention_mask is not None:
                self.visible[..., : cache.length] = attention_mask[
                    :, None, None, : cache.length
                ].bool()
        self.ids.copy_(ids)
        self.position.copy_(cache.next_position[:, 0])
        self.place.fill_(cache.length)
        if not self.recording:
            self.compute()
        elif self.graph is None:
            self.record()
        else:
            self.graph.replay()
        cache.length = self.end = cache.length + 1
        cache.next_position = cache.next_position + 1
        return self.logits.clone()  # the next step writes over them

    def record(self) -> None:
        """Computes the step three times, as kernels choose their ways at first, records it, and replays it once."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()
        self.graph.replay()  # recording computes nothing


def use(model: Qwen2VL) -> None:
    """From now on the model's decode steps go this way, and everything else as before.

    Raises ValueError for a model with a sliding window or with a rope that is stretched with the length: their
    steps are not all alike.
    """
    config = model.config
    if model.model.windows != {None} or config.rope_type in ("dynamic", "longrope"):
        raise ValueError(f"no CUDA graph for a sliding window or rope of type {config.rope_type}")
    if (device := model.model.norm.weight.device).type != "cuda":
        warnings.warn(
            f"CUDA graph: the model is on {device}, its steps are computed without one",
            stacklevel=2,
        )
    model.forward = partial(forward, model, [])


def forward(
    model: Qwen2VL, steps: list[Step], input_ids: Tensor, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None, cache: KVCache | None = None, **more,
) -> Tensor:  # fmt: skip
    """`Qwen2VL.forward`. steps: the one of the last cache, so that a new cache lets go of the old one."""
    new_only = input_ids.shape[1] == 1 and position_ids is None
    fits = (
        cache is not None and cache.length < cache.capacity
    )  # without the graph a full cache grows, or is an error
    if (
        not (new_only and fits)
        or more.get("pixel_values") is not None
        or more.get("pixel_values_videos") is not None
    ):
        return Qwen2VL.forward(model, input_ids, attention_mask, position_ids, cache, **more)
    if not steps or steps[0].cache is not cache or steps[0].keys is not cache.keys:
        steps[:] = [Step(model, cache)]
    return steps[0](input_ids, attention_mask)
