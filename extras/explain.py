"""`generate.py --explain`: the journey of one prompt through the model, with the real numbers, on one page of text.

`Trace` watches the model through forward hooks while it answers, so that the core files know nothing of it; `page`
writes down what it saw. All blocks of the vision tower are alike, and so are all layers of the decoder, so the inside
of the first one is watched and stands for all.

Operations are the multiplications and additions of the matrix products, 2·m·n·k for [m, k] @ [k, n], and those of
attention, 4·D for each pair of a query and a key in each head, masked pairs included (as the plain way computes
them). Norms, rope, softmax and activations are left out: they are below one percent in the published models.

Times are taken with the hooks in place and, on CUDA, with the device made to finish each stage first.

Shapes: B conversations (here one), S tokens, N patches, H heads, D width of a head.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from preprocess import Batch, Media, Processor
from qwen2vl import Config, Qwen2VL, get_rope_index
from tokenizer import IM_START

WIDTH = 110  # columns of the page
MOST = 6  # rows of a list before it is abridged


# ------------------------------------------------------------------------------------------- the prompt in runs
@dataclass
class Run:
    """Tokens start … end - 1 of a prompt: words, or all tokens of one picture or clip."""

    name: str  # "text", "picture 1", "clip 1", ...
    start: int
    end: int
    media: Media | None = None


def runs(batch: Batch, config: Config) -> list[Run]:
    """The prompt of a batch with one conversation, cut where pictures and clips begin and end.

    Raises ValueError for several conversations, and where batch.media does not fit the placeholders.
    """
    if len(batch.input_ids) != 1:
        raise ValueError(
            f"a trace or a page shows one conversation, the batch has {len(batch.input_ids)}"
        )
    names = {config.image_token_id: "picture", config.video_token_id: "clip"}
    ids, found, media = batch.input_ids[0].tolist(), [], iter(batch.media)
    count = dict.fromkeys(names, 0)
    start = 0
    while start < len(ids):
        if ids[start] in names:
            count[ids[start]] += 1
            one = next(media, None)
            t, h, w = one.grid if one else (0, 0, 0)
            end = start + t * h * w // config.vision_config.spatial_merge_size**2
            if end == start or set(ids[start:end]) != {ids[start]} or len(ids) < end:
                raise ValueError(f"batch.media does not fit the placeholders from token {start} on")
            found.append(Run(f"{names[ids[start]]} {count[ids[start]]}", start, end, one))
        else:
            end = next((i for i in range(start, len(ids)) if ids[i] in names), len(ids))
            found.append(Run("text", start, end))
        start = end
    if left := len(list(media)):
        raise ValueError(
            f"batch.media has {left} pictures or clips more than the prompt has places for"
        )
    return found


def prompt_text(processor: Processor, batch: Batch, parts: Iterable[Run]) -> str:
    """The prompt as the model gets it, each picture's placeholders as one ⟨picture 1: 30 tokens⟩."""
    ids, decode = batch.input_ids[0].tolist(), processor.tokenizer.decode
    return "".join(
        f"⟨{run.name}: {run.end - run.start} tokens⟩"
        if run.media
        else decode(ids[run.start : run.end], False)
        for run in parts
    )


# ---------------------------------------------------------------------------------------------------- watching
@dataclass
class Step:
    """One module, or one attention, as it ran."""

    name: str
    before: list[int]  # shapes
    after: list[int]
    dtype: torch.dtype
    parameters: int
    operations: int


@dataclass
class Pass:
    """One call of the vision tower or of the whole model. `steps`, `turns` and `seconds` go by stage."""

    queries: int  # N patches or S tokens
    looks: int  # pairs of a query and a key, in each head of each layer
    steps: dict[str, list[Step]] = field(default_factory=dict)
    turns: dict[str, tuple[list[int], torch.dtype]] = field(
        default_factory=dict
    )  # cosines, and sines, of the rope
    seconds: dict[str, float] = field(default_factory=dict)


VISION, DECODER = ("patch_embed", "blocks", "merger"), ("embed_tokens", "layers", "norm", "lm_head")


class Trace:
    """Watches a model inside a `with` block; `page` then tells what happened there.

    `vision` and `decoder` hold one `Pass` for each call: the vision tower runs once for all pictures and once for all
    clips, the decoder once over the prompt and once for each further token.
    """

    def __init__(self, model: Qwen2VL):
        self.model = model
        self.vision: list[Pass] = []
        self.decoder: list[Pass] = []
        self.guesses: list[
            tuple[list[float], list[int]]
        ] = []  # the most probable tokens after each pass
        self.cache = None

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules of each stage, one after the other; together they own all parameters."""
        visual, decoder = self.model.visual, self.model.model
        return {
            "patch_embed": [visual.patch_embed], "blocks": list(visual.blocks), "merger": [visual.merger],
            "embed_tokens": [decoder.embed_tokens], "layers": list(decoder.layers), "norm": [decoder.norm],
            "lm_head": [self.model.lm_head],
        }  # fmt: skip

    def parameters(self, stage: str) -> int:
        """How many parameters a stage has, as they are stored; those of a tied lm_head count as embed_tokens."""
        if stage == "lm_head" and self.model.lm_head.weight is self.model.model.embed_tokens.weight:
            return 0
        return sum(p.numel() for module in self.stages()[stage] for p in module.parameters())

    def operations(self, one: Pass, stage: str) -> int:
        """Of all modules of a stage in one pass."""
        return len(self.stages()[stage]) * sum(step.operations for step in one.steps[stage])

    def now(self) -> float:
        device = self.model.model.norm.weight.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def __enter__(self) -> Trace:
        visual, model = self.model.visual, self.model
        self.hooks = [
            visual.register_forward_pre_hook(self._vision_begins),
            model.register_forward_pre_hook(self._pass_begins, with_kwargs=True),
            model.register_forward_hook(self._pass_ends),
        ]
        for stage, modules in self.stages().items():
            passes, first, last = (
                self.vision if stage in VISION else self.decoder,
                modules[0],
                modules[-1],
            )
            self.hooks.append(first.register_forward_pre_hook(self._clock(passes, stage, -1)))
            if stage in ("blocks", "layers"):
                self.hooks.append(first.register_forward_pre_hook(self._turn(passes, stage)))
            leaves = [("patch_embed", first)] if stage == "patch_embed" else first.named_modules()
            for name, module in leaves:
                own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                if own or stage == "patch_embed":
                    self.hooks.append(
                        module.register_forward_hook(self._watch(passes, stage, name or stage))
                    )
            self.hooks.append(last.register_forward_hook(self._clock(passes, stage, 1)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _vision_begins(self, module: nn.Module, inputs: tuple) -> None:
        pixels, grids = inputs
        self.vision.append(Pass(len(pixels), sum(t * (h * w) ** 2 for t, h, w in grids.tolist())))

    def _pass_begins(self, module: nn.Module, inputs: tuple, named: dict) -> None:
        rows, new = (inputs[0] if inputs else named["input_ids"]).shape
        self.cache = named.get("cache")
        self.decoder.append(
            Pass(new, rows * new * (new + (self.cache.length if self.cache else 0)))
        )

    def _pass_ends(self, module: nn.Module, inputs: tuple, logits: Tensor) -> None:
        best = logits[0, -1].float().softmax(-1).topk(2)
        self.guesses.append((best.values.tolist(), best.indices.tolist()))

    def _clock(self, passes: list[Pass], stage: str, sign: int) -> Callable:
        def hook(module: nn.Module, *_: object) -> None:
            seconds = passes[-1].seconds
            seconds[stage] = seconds.get(stage, 0.0) + sign * self.now()

        return hook

    def _turn(self, passes: list[Pass], stage: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            passes[-1].turns[stage] = list(inputs[1].shape), inputs[1].dtype

        return hook

    def _watch(self, passes: list[Pass], stage: str, name: str) -> Callable:
        tied = stage == "lm_head" and self.parameters(stage) == 0

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            one, x = passes[-1], inputs[0]
            steps = one.steps.setdefault(stage, [])
            if name in (
                "attn.proj",
                "self_attn.o_proj",
            ):  # what they project is what attention gave
                config = self.model.config
                heads = (
                    config.vision_config.num_heads
                    if stage == "blocks"
                    else config.num_attention_heads
                )
                shape = [
                    x.shape[0] if x.dim() == 3 else 1,
                    heads,
                    x.shape[-2],
                    x.shape[-1] // heads,
                ]  # [B, H, S, D]
                steps.append(
                    Step("attention", shape, shape, x.dtype, 0, 4 * x.shape[-1] * one.looks)
                )
            matrix = stage == "patch_embed" or (
                module.weight.dim() > 1 and not isinstance(module, nn.Embedding)
            )
            operations = 2 * output.numel() * x.shape[-1] if matrix else 0
            parameters = 0 if tied else sum(p.numel() for p in module.parameters())
            short = name if stage == "merger" else name.split(".")[-1]
            steps.append(
                Step(short, list(x.shape), list(output.shape), output.dtype, parameters, operations)
            )

        return hook

    # ------------------------------------------------------------------------------------------------ the page
    def page(
        self, processor: Processor, batch: Batch, ids: list[int], prepared: float | None = None
    ) -> str:
        """What was seen, as text of at most 110 columns. ids: the answer, as many tokens as passes were watched.

        prepared: the seconds it took to read and cut the pictures and write the prompt, where the caller knows.
        """
        if len(ids) != len(self.decoder):
            raise ValueError(
                f"the trace saw {len(self.decoder)} passes of the model, the answer has {len(ids)} tokens"
            )
        parts = runs(batch, self.model.config)
        sections = [
            self._head(),
            self._pictures(processor, parts, prepared),
            self._patches(processor, batch),
        ]
        sections += [
            self._vision(),
            self._prompt(processor, batch, parts),
            self._positions(batch, parts),
        ]
        sections += [self._prefill(), self._decode(), self._answer(processor, ids)]
        return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"

    def _head(self) -> list[str]:
        weight, matrix = self.model.model.norm.weight, self.model.lm_head.weight
        quantised = f", the decoder's matrices as {plain(matrix.dtype)} with scales" * (
            matrix.dtype != weight.dtype
        )
        return [
            f"THE MODEL   {sum(p.numel() for p in self.model.parameters()):,} parameters in {plain(weight.dtype)} on "
            f"{weight.device}, {self.model.attn_implementation} attention{quantised}",
            "  Operations: the multiplications and additions of matrix products and attention; masked looks count.",
        ]

    def _pictures(
        self, processor: Processor, parts: list[Run], prepared: float | None
    ) -> list[str]:
        config, shown = processor.image_config, [run for run in parts if run.media]
        if not shown:
            return ["PICTURE   none: words alone"]
        ending = "" if prepared is None else f"; read in {duration(prepared)}"
        titles = f"{'patches':>9}{'tokens':>8}   from"
        rows = [f"  {'width×height':12}{'before':>10}{'resized to':>12}{'grid t×h×w':>13}{titles}"]
        for run in shown:
            (t, h, w), (width, height), p = run.media.grid, run.media.size, config.patch_size
            name, seconds = run.media.name, run.media.timestamps
            times = (
                ""
                if seconds is None
                else f", {len(seconds)} frames, {seconds[0]:.2f}…{seconds[-1]:.2f} s"
            )
            name = name if len(name + times) <= 40 else "…" + name[len(times) - 39 :]
            rows.append(
                f"  {run.name:11}{f'{width}×{height}':>11}{f'{w * p}×{h * p}':>12}{f'{t}×{h}×{w}':>13}{t * h * w:>9,}"
                f"{run.end - run.start:>8,}   {name}{times}"
            )
        bounds = f"by default a still one has {config.min_pixels:,}…{config.max_pixels:,} pixels"
        title = f"PICTURE   resized to multiples of {config.factor}; {bounds}{ending}"
        return [title, *abridged(rows, MOST)]

    def _patches(self, processor: Processor, batch: Batch) -> list[str]:
        config, lines = processor.image_config, ["PATCHES   the pixels of each, in one row"]
        for name in ("pixel_values", "pixel_values_videos"):
            if (x := getattr(batch, name)) is not None:
                span = f"from {x.min():.2f} to {x.max():.2f}"
                lines.append(
                    f"  {name:20} {x.dtype} {list(x.shape)}, {span}: (value / 255 - mean) / std"
                )
                columns = x.shape[1]
        if len(lines) == 1:
            return []
        grids = {name: getattr(batch, name) for name in ("image_grid_thw", "video_grid_thw")}
        shown = (f"{name} {x.dtype} {list(x.shape)}" for name, x in grids.items() if x is not None)
        lines.append(f"  {'their grids':20} {', '.join(shown)}")
        tp, p, m = config.temporal_patch_size, config.patch_size, config.merge_size
        numbers = f"{columns:,} = 3 colours · {tp} frames · {p} · {p} pixels"
        return [
            *lines,
            f"  {'a patch':20} {numbers}; a still picture is shown {tp} times",
            f"  {'a token':20} {m}×{m} patches, {m * p}×{m * p} pixels; they follow each other: merging is a reshape",
        ]

    def _stage(self, one: Pass, stage: str) -> list[str]:
        """The table's lines for one stage: a sum where it has several steps, and the steps of its first module."""
        steps = [
            list(same)
            for _, same in groupby(
                one.steps[stage], key=lambda s: (s.before, s.after, s.parameters)
            )
        ]
        config, number, lines = self.model.config, len(self.stages()[stage]), []
        whole = {"operations": self.operations(one, stage), "seconds": one.seconds[stage]}
        if len(steps) == 1:
            [[step]] = steps
            parameters = count(step.parameters) if self.parameters(stage) else "= embed_tokens"
            return [row(step.name, step.before, step.after, step.dtype, parameters, **whole)]
        for same in steps:
            step, names = same[0], ", ".join(s.name for s in same)
            parameters = count(sum(s.parameters for s in same)) if step.parameters else "·"
            operations = sum(s.operations for s in same)
            lines.append(
                row(f"  {names}", step.before, step.after, step.dtype, parameters, operations)
            )
        title = stage
        if stage == "blocks":
            heads = f"{config.vision_config.num_heads} heads"
            title = f"{number} blocks like this: {heads} of {one.looks:,} looks, none across frames"
        elif stage == "layers":
            heads = f"{config.num_attention_heads} heads over {config.num_key_value_heads} of keys and values"
            title = f"{number} layers like this: {heads}, {one.looks:,} looks each"
        if stage in one.turns:
            shape, dtype = one.turns[stage]
            lines.insert(0, f"    {'cos, sin of its rope':<25}{shape!s:<37}{plain(dtype)}")
        return [row(title, parameters=count(self.parameters(stage)), **whole), *lines]

    def _vision(self) -> list[str]:
        if not self.vision:
            return []
        one, *more = self.vision
        lines = [heading("VISION TOWER")]
        for stage in VISION:
            lines += self._stage(one, stage)
        for other in more:  # pictures first, then clips
            total = sum(self.operations(other, stage) for stage in VISION)
            lines.append(row(f"once more for the clips: {other.queries:,} patches", operations=total,
                             seconds=sum(other.seconds.values())))  # fmt: skip
        return lines

    def _prompt(self, processor: Processor, batch: Batch, parts: list[Run]) -> list[str]:
        ids, tokenizer = batch.input_ids[0].tolist(), processor.tokenizer
        text = prompt_text(processor, batch, parts).replace("\n", "⏎")
        arrays = (f"{name} {x.dtype} {list(x.shape)}" for name, x in
                  (("input_ids", batch.input_ids), ("attention_mask", batch.attention_mask)))  # fmt: skip
        lines = [
            f"PROMPT   {len(ids):,} tokens   {', '.join(arrays)}",
            *abridged(textwrap.wrap(text, WIDTH - 4), 5, indent="  "),
        ]
        owner = {i: run.name for run in parts if run.media for i in range(run.start, run.end)}
        starts = [i for i, id in enumerate(ids) if id == tokenizer.token_id(IM_START)] or [0]
        table = []
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            found: dict[str, int] = {}
            for i in range(start, end):
                kind = owner.get(i) or ("control" if ids[i] in tokenizer.special_ids else "text")
                found[kind] = found.get(kind, 0) + 1
            role = tokenizer.decode(ids[start:end]).split("\n")[0]
            sources = ", ".join(abridged([f"{n:,} {kind}" for kind, n in found.items()], MOST))
            table.append(f"  {role:<10}{end - start:>7,} tokens: {sources}")
        return lines + abridged(table, MOST)

    def _positions(self, batch: Batch, parts: list[Run]) -> list[str]:
        arrays = (batch.input_ids, batch.image_grid_thw, batch.video_grid_thw)
        arrays = [None if x is None else torch.tensor(x) for x in arrays]
        positions, delta = get_rope_index(self.model.config, *arrays)
        shape, positions, table = (
            f"{plain(positions.dtype)} {list(positions.shape)}",
            positions[:, 0],
            [],
        )  # [3, S]
        for run in parts:
            low, high = (
                positions[:, run.start : run.end].amin(1),
                positions[:, run.start : run.end].amax(1),
            )
            spans = [
                f"{a}…{b}" if a != b else f"{a}"
                for a, b in zip(low.tolist(), high.tolist(), strict=True)
            ]
            spans = "".join(f"{span:<14}" for span in spans).rstrip()
            table.append(f"  {f'{run.start}…{run.end - 1}':<16}{run.name:<16}{spans}")
        lines = [f"POSITIONS   M-RoPE: each token has three   position_ids {shape}",
                 f"  {'tokens':<16}{'':<16}{'time':<14}{'height':<14}width", *abridged(table, 8)]  # fmt: skip
        if picture := next((run for run in parts if run.media), None):
            _, h, w = (
                n // self.model.config.vision_config.spatial_merge_size for n in picture.media.grid
            )
            picked = sorted({0, 1, w - 1, w, h * w - 1, h * w, picture.end - picture.start - 1})
            places = [picture.start + i for i in picked if picture.start + i < picture.end]
            some = [f"{i} ({','.join(str(n) for n in positions[:, i].tolist())})" for i in places]
            lines += textwrap.wrap(f"{picture.name}, token by token: " + "  ".join(some), WIDTH - 4,
                                   initial_indent="  ", subsequent_indent="    ")  # fmt: skip
        size, delta = len(positions[0]), int(delta)
        end = f"{size} tokens before it, rope delta {delta}"
        return [*lines, f"  The answer goes on at {size + delta} on all three: {end}."]

    def _prefill(self) -> list[str]:
        one, lines = self.decoder[0], [heading("DECODER, PREFILL")]
        for stage in DECODER:
            lines += self._stage(one, stage)
            if stage == "embed_tokens" and self.vision:
                tokens = [tower.steps["merger"][-1].after for tower in self.vision]
                lines.append(
                    f"  the tower's {' and '.join(map(str, tokens))} take the places of the placeholders"
                )
        total = sum(self.operations(one, stage) for stage in DECODER)
        return [
            *lines,
            row("in all", operations=total, seconds=sum(one.seconds[stage] for stage in DECODER)),
        ]

    def _decode(self) -> list[str]:
        steps, cache = self.decoder[1:], self.cache
        if not steps:
            return ["DECODE   no step: one token was the whole answer"]
        lines = [heading(f"DECODE, mean of {len(steps)} step{'s' * (len(steps) > 1)}")]
        total = time = 0.0
        for stage in DECODER:
            own = sum(self.operations(one, stage) for one in steps) / len(steps)
            spent = sum(one.seconds[stage] for one in steps) / len(steps)
            total, time = total + own, time + spent
            if own:
                first, last = steps[0].steps[stage][0], steps[0].steps[stage][-1]
                name = f"{len(self.stages()[stage])} layers" if stage == "layers" else stage
                lines.append(row(name, first.before, last.after, last.dtype, "", own, spent))
        lines.append(row("one token in all", operations=total, seconds=time))
        if cache is not None:
            (layers, _, heads, places, width), keys = cache.keys.shape, cache.keys
            size = keys.nbytes + cache.values.nbytes
            one = f"2 · {layers} layers · {heads} heads · {width} · {keys.element_size()} bytes ({plain(keys.dtype)})"
            lines.append(
                f"  cache: {size:,} bytes = {places:,} tokens ({cache.length:,} filled) of {size // places:,} = {one}"
            )
        read = [
            module for stage in ("layers", "norm", "lm_head") for module in self.stages()[stage]
        ]
        weights = sum(p.nbytes for module in read for p in module.parameters())
        return [
            *lines,
            f"  each step reads the decoder's weights once: {weights:,} bytes for one token",
        ]

    def _answer(self, processor: Processor, ids: list[int]) -> list[str]:
        def word(id: int) -> str:
            text = processor.tokenizer.decode([id], False)
            return repr(text if len(text) <= 24 else text[:23] + "…")

        lines = []
        for n, (id, (values, best)) in enumerate(zip(ids, self.guesses, strict=True), start=1):
            at = best.index(id) if id in best else None
            chance = f"{values[at]:7.2%}" if at is not None else f"< {values[-1]:.2%}"
            other = 1 if at == 0 else 0
            lines.append(
                f"  {n:>4}  {word(id):<28}{id:>7}   {chance:>8}      {word(best[other]):<28}{values[other]:7.2%}"
            )
        text = processor.tokenizer.decode(ids)
        return [
            f"ANSWER   {len(ids):,} tokens",
            *abridged(textwrap.wrap(text, WIDTH - 4), 3, indent="  "),
            f"        {'token':<28}{'id':>7}   {'chance':>8}      best other",
            *abridged(lines, 4),
        ]


# ------------------------------------------------------------------------------------------------------ layout
def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count(number: float) -> str:
    """Exact below ten million, else with a unit: 1,234,567, 45.2 M, 1.2 G."""
    for unit, size, least in (("T", 1e12, 1e12), ("G", 1e9, 1e9), ("M", 1e6, 1e7)):
        if number >= least:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def row(name: str, before: object = "", after: object = "", dtype: torch.dtype | None = None, parameters: str = "",
        operations: float | None = None, seconds: float | None = None) -> str:  # fmt: skip
    """One line of a table: what, shapes, dtype, parameters, operations, time."""
    work = "" if operations is None else count(operations) if operations else "·"
    what = f"  {name:<27}" + (f"{f'{before} → {after}':<37}{plain(dtype):<9}" if dtype else "")
    return f"{what:<75}{parameters:>14}{work:>10}{'' if seconds is None else duration(seconds):>10}".rstrip()


def heading(title: str) -> str:
    return f"{title:<29}{'shapes':<37}{'dtype':<9}{'parameters':>14}{'operations':>11}{'time':>9}"


def abridged(lines: list[str], most: int, indent: str = "") -> list[str]:
    """At most `most` lines: where there are more, the middle is left out and counted."""
    if len(lines) > most:
        head = most // 2
        lines = [
            *lines[:head],
            f"  … {len(lines) - most + 1:,} more …",
            *lines[len(lines) - most + 1 + head :],
        ]
    return [indent + line for line in lines]
