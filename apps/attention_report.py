"""Write one HTML page that shows what each token of an answer attends to in the images.

    python -m apps.attention_report --image examples/shapes.png --out report.html

After the answer the model runs once more over prompt and answer together, and a hook computes
each layer's attention weights for the queries that chose a token of the answer; each is located
one token before it. The result equals that of the cached decode steps, since a token attends only
to itself and earlier tokens. Only the weights of image tokens are kept.

Size of the page: about one byte per layer, head, answer token and image token (0.6 to 1.3 measured:
8 bits, deflated, in base64), plus the images as PNG. Beyond MAX_WEIGHTS the heads of a layer are
stored as their mean, and if that is not enough, the layers too, with a warning.
`attention_report.html` is the page without its data.

Shapes: L layers, H heads, G key/value heads, D head width, S tokens of the prompt, A tokens of the
answer, T image tokens (of images and video frames), V vocabulary size.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import base64
import io
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import command_line
from apps.prompt_spans import Span, prompt_text, split_prompt
from generate import check_finite, choose_generation_config, generate
from output_files import write_file
from preprocess import Batch, Grid, ImageConfig, Processor
from qwen2vl import Qwen2VL, apply_rotary_pos_emb, at_least_float32
from tokenizer import StreamDecoder, Tokenizer

TEMPLATE = Path(__file__).with_suffix(".html")
ALTERNATIVES = 5  # most probable tokens shown for each token of the answer
MAX_WEIGHTS = 16_000_000  # attention weights in one page


@torch.inference_mode()
def compute_attention(
    model: Qwen2VL, batch: Batch, answer: list[int], columns: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the attention weights of the answer's tokens, and the logits they were chosen from.

    answer: A token ids; columns: the indices of the T prompt tokens whose weights are wanted.
    → weights float32 [L, H, A, T] and logits float32 [A, V], both on the CPU.
    """
    device = model.model.norm.weight.device
    inputs = {name: torch.as_tensor(x, device=device) for name, x in batch.arrays().items()}
    del inputs["attention_mask"]  # one conversation has no padding
    prompt_length = batch.input_ids.shape[1]
    answer_ids = torch.tensor([answer[:-1]], dtype=torch.long, device=device)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], answer_ids), dim=1)  # [1, S + A - 1]
    query = torch.arange(prompt_length - 1, prompt_length - 1 + len(answer), device=device)
    key = torch.arange(inputs["input_ids"].shape[1], device=device)
    layer_weights = []

    def hook(attention: nn.Module, arguments: tuple) -> None:
        x, cos, sin = arguments[:3]
        q = attention.q_proj(x[:, query]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        q = apply_rotary_pos_emb(q, cos[:, :, query], sin[:, :, query])  # [1, H, A, D]
        k = apply_rotary_pos_emb(k, cos, sin)  # [1, G, S + A - 1, D]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.mT * attention.head_dim**-0.5  # [1, H, A, S + A - 1]
        distance = query[:, None] - key
        window = model.config.window(attention.layer) or len(key)
        masked = (distance < 0) | (distance >= window)
        scores = at_least_float32(scores.masked_fill(masked, float("-inf")))
        layer_weights.append(scores.softmax(-1)[0, :, :, columns].float().cpu())

    hooks = [layer.self_attn.register_forward_pre_hook(hook) for layer in model.model.layers]
    try:
        logits = model(**inputs, logits_to_keep=len(answer))[0]
    finally:
        for handle in hooks:
            handle.remove()
    check_finite(logits, set(range(len(answer))))
    return torch.stack(layer_weights), logits.float().cpu()


def reduce_weights(weights: Tensor) -> Tensor:
    """Return weights [L, H, A, T], or their means where these are more than MAX_WEIGHTS.

    The means are [L, 1, A, T], or [1, 1, A, T].
    """
    if weights.numel() > MAX_WEIGHTS:
        warnings.warn("the page is too large for each head: it holds their mean", stacklevel=3)
        weights = weights.mean(1, keepdim=True)
    if weights.numel() > MAX_WEIGHTS:
        warnings.warn("the page is too large for each layer: it holds their mean", stacklevel=3)
        weights = weights.mean(0, keepdim=True)
    return weights


def pack_weights(weights: Tensor) -> str:
    """Return weights [L, H, A, T] as base64 of deflated bytes.

    They are the maximum of each row as float32 [L, H, A], then each weight as uint8 [L, H, A, T],
    in 255ths of that maximum: a weight is off by at most 1/510 of it.
    """
    if not weights.shape[-1]:
        return ""
    largest = weights.amax(-1)  # [L, H, A]
    fractions = weights / largest[..., None].clamp(min=1e-30)
    levels = (fractions * 255).round().to(torch.uint8)
    packed = zlib.compress(largest.numpy().tobytes() + levels.numpy().tobytes(), 9)
    return base64.b64encode(packed).decode()


def unpatchify(patches: np.ndarray, grid: Grid, config: ImageConfig) -> np.ndarray:
    """Invert normalization and `patchify`: [N, 3*tp*p*p] → frames uint8 [gt*tp, H, W, 3]."""
    gt, gh, gw = grid
    tp = config.temporal_patch_size
    p = config.patch_size
    m = config.merge_size
    x = patches.reshape(gt, gh // m, gw // m, m, m, 3, tp, p, p)
    x = x.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)  # [gt, tp, gh / m, m, p, gw / m, m, p, 3]
    x = x.reshape(gt * tp, gh * p, gw * p, 3)
    if config.do_normalize:
        x = x * np.float32(config.image_std) + np.float32(config.image_mean)
    if config.do_rescale:
        x = x / np.float32(config.rescale_factor)
    return x.round().clip(0, 255).astype(np.uint8)


def data_url(pixels: np.ndarray) -> str:
    """Return uint8 [H, W, 3] as a data: URL of a PNG image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def describe_frames(span: Span, first: int, config: ImageConfig) -> list[dict[str, Any]]:
    """Return what the page shows of one image, or of the first frame of each temporal slice.

    first: the index of the span's first token among the T image tokens.
    """
    media = span.media
    t, h, w = media.grid
    rows = h // config.merge_size
    cols = w // config.merge_size
    tp = config.temporal_patch_size
    frames = unpatchify(media.patches, media.grid, config)[::tp]  # [t, H, W, 3]
    images = []
    for n in range(t):
        name = span.name
        if media.timestamps is not None:
            name += f", {media.timestamps[n * tp]:.2f} s"
        image = {"name": name, "file": media.name, "size": media.size, "rows": rows, "cols": cols}
        image["merge"] = config.merge_size
        image["token"] = span.start + n * rows * cols
        image["first"] = first + n * rows * cols
        image["src"] = data_url(frames[n])
        images.append(image)
    return images


def describe_answer(
    tokenizer: Tokenizer, answer: list[int], logits: Tensor
) -> list[dict[str, Any]]:
    """Return text, probability and alternatives of each token of the answer; logits [A, V]."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    tokens = []
    for id, probabilities in zip(answer, logits.softmax(-1), strict=True):
        top = probabilities.topk(min(ALTERNATIVES, len(probabilities)))
        texts = [tokenizer.decode(other, skip_special_tokens=False) for other in top.indices]
        token = {"text": decoder.push(id), "probability": probabilities[id].item()}
        token["alternatives"] = list(zip(texts, top.values.tolist(), strict=True))
        tokens.append(token)
    tokens[-1]["text"] += decoder.finish()
    return tokens


def build_page_data(
    model: Qwen2VL, processor: Processor, batch: Batch, answer: list[int]
) -> dict[str, Any]:
    """Return all that the page shows, ready for JSON."""
    spans = split_prompt(batch, model.config)
    columns = []
    images = []
    for span in spans:
        if span.media is not None:
            images += describe_frames(span, len(columns), processor.image_config)
            columns += range(span.start, span.end)
    weights, logits = compute_attention(model, batch, answer, columns)
    weights = reduce_weights(weights)
    return {
        "prompt": prompt_text(processor, batch, spans),
        "tokens": describe_answer(processor.tokenizer, answer, logits),
        "images": images,
        "layers": weights.shape[0],  # of the stored weights: 1 for a mean
        "heads": weights.shape[1],
        "image_tokens": len(columns),
        "attention": pack_weights(weights),
    }


def write_report(
    path: str | Path,
    model: Qwen2VL,
    processor: Processor,
    batch: Batch,
    answer: list[int],
    replace: bool = True,
) -> None:
    """Write the page for one conversation and its answer's token ids.

    Raises ValueError for several conversations and an empty answer, OSError
    if the file cannot be written. replace: a file that has come to exist meanwhile, too.
    """
    if not answer:
        raise ValueError("expected an answer of at least one token, got none")
    data = json.dumps(build_page_data(model, processor, batch, answer), ensure_ascii=False)
    # Inside a script element "</script>" would end it anywhere, also within an answer.
    data = data.replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data)
    write_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"), replace)


def run(arguments: argparse.Namespace) -> None:
    """Answer the question, print the answer and write the page."""
    command_line.check_output_options(arguments)
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    tokenizer = session.processor.tokenizer
    [answer] = generate(session.model, session.batch, arguments.max_new_tokens, config, tokenizer)
    print(tokenizer.decode(answer, stop_strings=config.stop_strings))
    replace = arguments.force
    write_report(arguments.out, session.model, session.processor, session.batch, answer, replace)


def main(argv: list[str] | None = None) -> int:
    description = "Write a page that shows what each token of an answer attends to in the images."
    parser = command_line.build_parser(description, "python -m apps.attention_report")
    command_line.add_output_options(parser, "HTML", "(default: report.html)", "report.html")
    arguments = command_line.parse_arguments(parser, argv)
    return command_line.run_main("apps.attention_report", run, arguments)


if __name__ == "__main__":
    command_line.run_program("apps.attention_report", main)
