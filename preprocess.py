"""Pictures, clips and conversations → one batch of arrays for the model.

A picture of any size is resized so that both sides are multiples of 28 and its area stays within bounds, then cut
into 14×14 patches; nothing is cropped or padded, so big pictures simply become more tokens ("naive dynamic
resolution", arXiv 2409.12191, section 2.1). Four neighbouring patches (2×2) will become one token of the prompt.

Letters in the shape comments:
    B conversations, S tokens of the longest one, N patches of all pictures together
    F frames, H and W pixels, C colour channels
    gt, gh, gw patches along time, height and width (the grid); tp, p one patch's frames and side; m the merge size
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from media import load_image, source_name, to_rgb
from tokenizer import IMAGE_PAD, VIDEO_PAD, Tokenizer, content_items, content_kind, read_json

Grid = tuple[int, int, int]  # (gt, gh, gw)

# What a preprocessor_config.json may hold beside the fields below, and what changes no pixel.
INERT_FIELDS = {
    "image_processor_type",
    "video_processor_type",
    "feature_extractor_type",
    "processor_class",
}
INERT_FIELDS |= {
    "auto_map",
    "data_format",
    "input_data_format",
    "default_to_square",
    "disable_grouping",
}


@dataclass
class ImageConfig:
    """How pictures become patches: the fields of `preprocessor_config.json`, with the reference's defaults."""

    do_convert_rgb: bool = True
    do_resize: bool = True
    resample: int = Image.Resampling.BICUBIC
    min_pixels: int = 56 * 56  # bounds of height × width after resizing
    max_pixels: int = 28 * 28 * 1280
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] = (
        0.48145466,
        0.4578275,
        0.40821073,
    )  # of CLIP's training pictures, R G B
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2  # a patch spans two frames; a still picture is shown twice
    merge_size: int = 2  # 2×2 patches become one token

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}"
            )

    @property
    def factor(self) -> int:
        """The side of one token in pixels, 28: both sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageConfig":
        """Read `preprocessor_config.json`, or `processor_config.json` where transformers 5 has written that.

        Warns about a field that is set but means nothing here. Raises FileNotFoundError or ValueError.
        """
        nested = Path(folder) / "processor_config.json"
        found = read_json(folder, nested.name).get("image_processor") if nested.is_file() else None
        found = found or read_json(folder, "preprocessor_config.json")
        settings = {name: value for name, value in found.items() if value is not None}
        renamed = {
            "shortest_edge": "min_pixels",
            "longest_edge": "max_pixels",
        }  # pixel counts under both names
        for name, value in settings.pop("size", {}).items():
            settings.setdefault(renamed.get(name, name), value)

        known = {f.name for f in fields(cls)}
        for name in sorted(settings.keys() - known - INERT_FIELDS):
            if settings[name] is not False:
                warnings.warn(
                    f"the image settings in {folder} hold an unknown field: {name}", stacklevel=2
                )
        return cls(**{name: value for name, value in settings.items() if name in known})


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
) -> tuple[int, int]:
    """The size in pixels to which a picture of height × width is resized.

    Both sides are multiples of `factor`, their product lies within the bounds where that is possible, and the
    proportions stay as close as the grid allows. Source: transformers 5.23.0, `smart_resize`.

    Raises ValueError when one side is more than 200 times the other, or is not positive.
    """
    if min(height, width) < 1:
        raise ValueError(
            f"a picture needs at least one pixel, got {height}×{width} (height × width)"
        )
    if max(height, width) / min(height, width) > 200:
        raise ValueError(
            f"one side is more than 200 times the other: {height}×{width} (height × width)"
        )
    # round() goes to the even multiple at a tie: 70/28 = 2.5 becomes 2 (56 pixels), and 14/28 becomes 0.
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:  # also where a thin side was rounded to 0
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


class Clip(NamedTuple):
    """The frames of a film that the model will see."""

    frames: np.ndarray  # uint8 [F, H, W, 3], resized: both sides are multiples of the token's
    timestamps: list[float]  # of each frame, in seconds from the start of the film
    size: tuple[int, int]  # width and height in pixels before resizing


VIDEO_OPTIONS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
VIDEO_OPTIONS += ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")


def load_video(source: object, config: ImageConfig | None = None, **options: float) -> Clip:
    """Sample and resize a film (anything `open_media` takes), a folder or list of pictures, or uint8 [F, H, W, 3].

    By default 2 frames a second, at least 4, at most 768, an even number, in up to 768 tokens' pixels each;
    options: those of VIDEO_OPTIONS, as in qwen-vl-utils 0.0.14. `extras/video.py` has the rules and does the work.
    Raises FileNotFoundError or ValueError with one sentence naming the source.
    """
    from extras import video  # PyAV takes a while to import, and pictures do not need it

    return video.load(source, config or ImageConfig(), **options)


def resize(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """One picture → uint8 [H, W, 3], both sides multiples of `config.factor`."""
    if config.do_convert_rgb:
        image = to_rgb(image)
    elif image.mode != "RGB":
        raise ValueError(f"do_convert_rgb is off, but the picture's mode is {image.mode}, not RGB")
    if config.do_resize:
        bounds = config.min_pixels, config.max_pixels
        height, width = smart_resize(image.height, image.width, config.factor, *bounds)
        image = image.resize((width, height), resample=config.resample)
    elif image.height % config.factor or image.width % config.factor:
        size = f"{image.height}×{image.width} (height × width)"
        raise ValueError(f"do_resize is off, but {size} is no multiple of {config.factor}")
    return np.asarray(image)


def normalise(frames: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 [F, H, W, 3] → float32 of the same shape: rescaled to 0…1, minus mean, divided by std.

    After the resize there are only 256 levels per channel, so the arithmetic is done on those and looked up.
    """
    levels = np.arange(256, dtype=np.float64)[:, None]
    if config.do_rescale:
        levels = levels * config.rescale_factor
    # Rescaled in float64, normalised in float32: in one precision throughout, the last bit would differ from
    # the reference's in some of the levels.
    levels = np.repeat(levels.astype(np.float32), 3, axis=1)  # [256, 3]
    if config.do_normalize:
        levels = (levels - np.float32(config.image_mean)) / np.float32(config.image_std)
    values = np.empty(frames.shape, dtype=np.float32)
    for channel in range(3):
        values[..., channel] = levels[frames[..., channel], channel]
    return values


def patchify(frames: np.ndarray, config: ImageConfig) -> tuple[np.ndarray, Grid]:
    """[F, H, W, 3] → patches [N, 3*tp*p*p], N = gt*gh*gw, and the grid (gt, gh, gw).

    The patches are not in reading order: the 2×2 that will become one token follow each other, token by token,
    so that the model can merge them with a mere reshape. A row's columns run over (channel, frame, y, x).
    Source: transformers 5.23.0, `patchify` of the image and of the video processor.
    """
    tp, p, m = config.temporal_patch_size, config.patch_size, config.merge_size
    missing = (
        -len(frames) % tp
    )  # a still picture becomes two equal frames, an odd clip shows its last one twice
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    gt, gh, gw = frames.shape[0] // tp, frames.shape[1] // p, frames.shape[2] // p
    patches = frames.reshape(gt, tp, gh // m, m, p, gw // m, m, p, 3)
    patches = patches.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [gt, gh/m, gw/m, m, m, 3, tp, p, p]
    return patches.reshape(gt * gh * gw, 3 * tp * p * p), (gt, gh, gw)


def preprocess_clip(frames: Sequence, config: ImageConfig) -> tuple[np.ndarray, Grid]:
    """The frames of one clip, or one picture in a list → float32 [N, 3*tp*p*p] and its grid (gt, gh, gw)."""
    resized = [resize(load_image(frame), config) for frame in frames]
    sizes = {frame.shape[:2] for frame in resized}
    if len(sizes) != 1:
        raise ValueError(
            f"a video needs frames of one size, but these have {sorted(sizes) or 'no frame at all'}"
        )
    return patchify(normalise(np.stack(resized), config), config)


def join(clips: Sequence[tuple[np.ndarray, Grid]]) -> tuple[np.ndarray, np.ndarray]:
    """Lay the patches of several pictures or clips one after the other; the grids say how many are whose."""
    if not clips:
        raise ValueError("there is nothing to preprocess: the list is empty")
    return np.concatenate([patches for patches, _ in clips]), np.array(
        [grid for _, grid in clips], dtype=np.int64
    )


def preprocess_images(images: Sequence, config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, each anything that `load_image` takes → (pixel_values, image_grid_thw).

    pixel_values is float32 [N, 3*tp*p*p] (1176 columns in the published models), the patches of all pictures one
    after the other; image_grid_thw is int64 [images, 3], each picture's (1, gh, gw) in patches.

    Bit-identical to transformers 5.23.0, `Qwen2VLImageProcessorPil`, on the same Pillow version only: Pillow 13
    changed the last bits of its resize. The torchvision processor, which transformers prefers where torchvision
    is installed, differs from both by about one level of 256 in under 1 % of the values.
    """
    return join([preprocess_clip([image], config) for image in images])


def preprocess_videos(videos: Sequence, config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Clips, each a list of pictures or uint8 [F, H, W, 3] → (pixel_values_videos, video_grid_thw).

    As for pictures, with the same bounds on the pixels of every frame; a clip's grid has gt = ceil(F / tp).
    """
    return join([preprocess_clip(frames, config) for frames in videos])


@dataclass
class Media:
    """One picture or clip, ready for the model, and what it was before."""

    patches: np.ndarray  # float32 [N, 3*tp*p*p]
    grid: Grid
    name: str  # where it came from
    size: tuple[int, int]  # width and height in pixels before resizing
    timestamps: list[float] | None = None  # of a clip's frames, in seconds

    def summary(self, config: ImageConfig) -> str:
        """One line: what came in, what the model sees of it, how many tokens that makes."""
        (gt, gh, gw), p, seconds = (
            self.grid,
            config.patch_size,
            [f"{t:.2f}" for t in self.timestamps or ()],
        )
        shown = seconds if len(seconds) <= 16 else [*seconds[:8], "…", *seconds[-2:]]
        frames = f", {len(seconds)} frames at {' '.join(shown)} s" if seconds else ""
        patches = f"{gw}×{gh} patches" if gt == 1 else f"{gt}×{gw}×{gh} patches"
        tokens = gt * gh * gw // config.merge_size**2
        width, height = self.size
        return f"{self.name}: {width}×{height} pixels{frames} → {gw * p}×{gh * p} → {patches} → {tokens} tokens"


@dataclass
class Batch:
    """What the model takes, as numpy arrays. The vision fields are None when no row has such media."""

    input_ids: np.ndarray  # int64 [B, S], padded on the left
    attention_mask: np.ndarray  # int64 [B, S], 0 where padded, else 1
    pixel_values: np.ndarray | None = None  # float32 [N, 3*tp*p*p], row after row in reading order
    image_grid_thw: np.ndarray | None = None  # int64 [images, 3]
    pixel_values_videos: np.ndarray | None = None  # the same two for videos
    video_grid_thw: np.ndarray | None = None
    media: list[Media] = field(
        default_factory=list
    )  # all pictures and clips, row after row in reading order

    def arrays(self) -> dict[str, np.ndarray]:
        """What the model is called with, by name; what there is none of is left out."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}


class Processor:
    """Conversations → Batch: read the pictures, write the prompts, make room in them for the vision tokens."""

    def __init__(
        self, tokenizer: Tokenizer, image_config: ImageConfig, video_options: dict | None = None
    ):
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.video_options = (
            video_options or {}
        )  # for `load_video`, where an item does not say otherwise

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "Processor":
        """Read tokenizer and image settings of a checkpoint folder.

        Bounds given here replace the folder's for pictures, and the usual ones for the frames of a film.
        """
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(
            Tokenizer.from_pretrained(folder),
            replace(ImageConfig.from_pretrained(folder), **given),
            given,
        )

    def __call__(
        self, conversations: list, add_generation_prompt: bool = True, add_vision_id: bool = False
    ) -> Batch:
        """One conversation (a list of messages) or a list of conversations → one Batch, a row each.

        A content item that is a picture or a clip is read by `prepare`, or was already (then it holds the Media).
        What a message says is text, also where it spells a control token (`Tokenizer.encode_chat`). Raises ValueError
        or FileNotFoundError for a malformed message and for a picture that cannot be read.
        """
        if not isinstance(conversations, list | tuple) or not conversations:
            raise ValueError(
                "expected a conversation, which is a list of messages, or a list of conversations"
            )
        if isinstance(conversations[0], dict):
            conversations = [conversations]

        rows, media, images, videos = [], [], [], []
        for messages in conversations:
            items = [
                item for n, message in enumerate(messages) for item in content_items(message, n)
            ]
            shown = [
                (content_kind(item), self.prepare(item))
                for item in items
                if content_kind(item) != "text"
            ]
            ids = self.tokenizer.encode_chat(messages, add_generation_prompt, add_vision_id)
            for kind, pad, joined in (("image", IMAGE_PAD, images), ("video", VIDEO_PAD, videos)):
                own = [(one.patches, one.grid) for its_kind, one in shown if its_kind == kind]
                ids = self._expand(ids, pad, [grid for _, grid in own])
                joined += own
            rows.append(ids)
            media += [one for _, one in shown]

        # Padded on the left: every row's last token stands in the last column, where generation goes on.
        longest = max(len(ids) for ids in rows)
        padded = np.full(
            (len(rows), longest), self.tokenizer.pad_token_id, dtype=np.int64
        )  # [B, S]
        batch = Batch(input_ids=padded, attention_mask=np.zeros_like(padded), media=media)
        for row, ids in enumerate(rows):
            batch.input_ids[row, longest - len(ids) :] = ids
            batch.attention_mask[row, longest - len(ids) :] = 1
        if images:
            batch.pixel_values, batch.image_grid_thw = join(images)
        if videos:
            batch.pixel_values_videos, batch.video_grid_thw = join(videos)
        return batch

    def prepare(self, item: dict) -> Media:
        """Read the picture or clip of one content item.

        A picture stands under `image`, `image_url` (also as {"url": ...}), `url` or `path` and is anything that
        `load_image` takes; a clip under `video` (or `url`, `path`) and is anything that `load_video` takes. The
        item's own `min_pixels` and `max_pixels`, `resized_height` and `resized_width`, and for a clip all of
        VIDEO_OPTIONS, mean what they mean to qwen-vl-utils 0.0.14.
        """
        kind, config = content_kind(item), self.image_config
        keys = (
            ("image", "image_url", "url", "path") if kind == "image" else ("video", "url", "path")
        )
        source = next((item[key] for key in keys if item.get(key) is not None), None)
        source = source.get("url") if isinstance(source, dict) else source
        if source is None:
            raise ValueError(
                f"the {kind} item names no {kind} under any of {', '.join(keys)}: {item!r:.80}"
            )
        if isinstance(source, Media):
            return source
        own = {name: item[name] for name in VIDEO_OPTIONS if item.get(name) is not None}
        if kind == "video":
            clip = load_video(source, config, **(self.video_options | own))
            patches, grid = patchify(normalise(clip.frames, config), config)
            return Media(patches, grid, source_name(source), clip.size, clip.timestamps)
        image = load_image(source)
        size = image.size
        config = replace(
            config, **{name: int(own[name]) for name in ("min_pixels", "max_pixels") if name in own}
        )
        if "resized_height" in own and "resized_width" in own:
            wanted = int(own["resized_height"]), int(own["resized_width"])
            height, width = smart_resize(
                *wanted, config.factor, config.min_pixels, config.max_pixels
            )
            image = to_rgb(image).resize((width, height), resample=config.resample)
        return Media(*preprocess_clip([image], config), source_name(source), size)

    def _expand(self, ids: list[int], pad: str, grids: list[Grid]) -> list[int]:
        """Repeat the n-th placeholder once for each token of the n-th picture: one per merged block of patches."""
        pad_id = self.tokenizer.token_id(pad)
        counts = (math.prod(grid) // self.image_config.merge_size**2 for grid in grids)
        return [id for id in ids for _ in range(next(counts) if id == pad_id else 1)]
