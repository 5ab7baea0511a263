"""Images, videos and conversations → one batch of arrays for the model.

An image of any size is resized so that both sides are multiples of 28 and its area stays within
bounds, then cut into 14×14 patches; nothing is cropped or padded, so large images simply become
more tokens ("naive dynamic resolution", arXiv 2409.12191, section 2.1). Four neighboring patches
(2×2) will become one token of the prompt.

Letters in the shape comments:
    B conversations, S tokens of the longest one, N patches of all images together
    F frames, H and W pixels, C color channels
    gt, gh, gw patches along time, height and width (the grid)
    tp, p frames and side of one patch; m the merge size
"""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import video
from config_fields import (
    Channels,
    Pixels,
    Positive,
    PositiveChannels,
    Size,
    check_fields,
    field_problem,
)
from conversations import SOURCE_KEYS, content_kind, item_source, read_conversation
from errors import naming
from json_files import has_file, read_json, read_optional_json
from media import DEFAULT_LIMITS, MediaLimits, load_image, open_media, source_name, to_rgb
from tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_START, Tokenizer
from video_decode import UnreliableIndex

Grid = tuple[int, int, int]  # (gt, gh, gw)

# What a preprocessor_config.json may hold in addition to the fields below, and what changes no
# pixel.
INERT_FIELDS = {"image_processor_type", "video_processor_type", "feature_extractor_type"}
INERT_FIELDS |= {"processor_class", "auto_map", "data_format", "input_data_format"}
INERT_FIELDS |= {"default_to_square", "disable_grouping"}
# The bounds, counts of pixels in spite of these names, as `size` spells them:
SIZE_FIELDS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
SIZE_FIELDS |= {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}

LOOKED_UP = 256  # so many patches are normalized at once, so that they stay in the cache
MAX_RESIZED_PIXELS = 2**28  # of one image or frame: ten times the tokens that the models take


@dataclass
class ImageConfig:
    """How images become patches: the fields of `preprocessor_config.json`, with the reference's
    defaults.

    Raises ValueError for a value that no image could be preprocessed with.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    resample: int = Image.Resampling.BICUBIC
    min_pixels: Pixels = 56 * 56  # bounds of height × width after resizing
    max_pixels: Pixels = 28 * 28 * 1280
    do_rescale: bool = True
    rescale_factor: Positive = 1 / 255
    do_normalize: bool = True
    image_mean: Channels = (0.48145466, 0.4578275, 0.40821073)  # CLIP's training images, RGB
    image_std: PositiveChannels = (0.26862954, 0.26130258, 0.27577711)
    patch_size: Size = 14
    temporal_patch_size: Size = 2  # a patch spans two frames; a still image is repeated
    merge_size: Size = 2  # 2×2 patches become one token

    def __post_init__(self) -> None:
        check_fields(self)
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"resample: expected a filter of Pillow, 0 to 5, got {self.resample}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels: expected at most max_pixels {self.max_pixels}, got {self.min_pixels}"
            )
        if self.factor**2 > MAX_RESIZED_PIXELS:
            raise ValueError(
                f"patch_size: expected at most {MAX_RESIZED_PIXELS} pixels in a token, got "
                f"({self.patch_size} · merge_size {self.merge_size})²"
            )

    @property
    def factor(self) -> int:
        """The side of one token in pixels, 28: the sides of a resized image are multiples."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageConfig:
        """Read `preprocessor_config.json`, or `processor_config.json` where transformers 5 has
        written that.

        A `video_preprocessor_config.json` is not read: the size of frames follows qwen-vl-utils
        (`load_video`). Warns about a field that is set but means nothing here. Raises
        FileNotFoundError, or ValueError that names the file and the field.
        """
        path = Path(folder) / "processor_config.json"
        settings = None
        if has_file(path):
            settings = read_json(folder, path.name).get("image_processor")
        if not settings:
            path = Path(folder) / "preprocessor_config.json"
            settings = read_json(folder, path.name)
        try:
            return cls.from_settings(settings, folder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_settings(cls, settings: dict, folder: str | Path) -> ImageConfig:
        """Read the settings of one file, already parsed. `folder` is what a warning names."""
        if not isinstance(settings, dict):
            raise ValueError(f"image_processor: expected an object, got {reprlib.repr(settings)}")
        given = {name: value for name, value in settings.items() if value is not None}
        if "size" in given:
            given = pixel_bounds(given.pop("size")) | given  # a bound of its own comes first
            if "min_pixels" not in given or "max_pixels" not in given:
                raise ValueError("size: expected shortest_edge and longest_edge, got one of them")
        known = {setting.name for setting in fields(cls)}
        for name in sorted(given.keys() - known - INERT_FIELDS):
            if given[name] is not False:
                warnings.warn(
                    f"the image settings in {folder} hold an unknown field: {name}", stacklevel=3
                )
        return cls(**{name: whole(value) for name, value in given.items() if name in known})


def holds_image_settings(folder: Path) -> bool:
    """Return whether a directory holds what `ImageConfig` reads; that of an adapter may."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    return bool(read_optional_json(folder / "processor_config.json").get("image_processor"))


def pixel_bounds(size: Any) -> dict:
    """Return min_pixels and max_pixels of the `size` of a preprocessor_config.json."""
    expected = "expected shortest_edge and longest_edge, two counts of pixels"
    if not isinstance(size, dict):
        raise ValueError(f"size: {expected}, got {reprlib.repr(size)}")
    unknown = sorted(size.keys() - SIZE_FIELDS.keys())
    if unknown:
        raise ValueError(f"size: {expected}, got {reprlib.repr(unknown)}")
    return {SIZE_FIELDS[name]: value for name, value in size.items() if value is not None}


def whole(value: Any) -> Any:
    """Return a float without a fraction as an int: some files hold 3136.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def smart_resize(
    height: float,
    width: float,
    factor: int = 28,
    min_pixels: float = 56 * 56,
    max_pixels: float = 28 * 28 * 1280,
) -> tuple[int, int]:
    """Return the size in pixels, (height, width), to which an image of height × width is resized.

    Both sides are multiples of `factor`, their product lies within the bounds where that is
    possible, and the proportions stay as close as the grid allows. Source: transformers 5.23.0,
    `smart_resize`.

    Raises ValueError when one side is more than 200 times the other, or is not positive.
    """
    if min(height, width) < 1:
        raise ValueError(
            f"an image needs at least one pixel, got {height}×{width} (height × width)"
        )
    if max(height, width) / min(height, width) > 200:
        raise ValueError(
            f"one side is more than 200 times the other: {height}×{width} (height × width)"
        )
    # round() goes to the even multiple at a tie: 70/28 = 2.5 becomes 2 (56 pixels), and 14/28
    # becomes 0.
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
    """The frames of a video that the model attends to."""

    frames: np.ndarray  # uint8 [F, H, W, 3], resized: both sides are multiples of the token's
    timestamps: list[float]  # of each frame, in seconds from the start of the video
    size: tuple[int, int]  # width and height in pixels before resizing, as the video is shown


SIZE_OPTIONS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
FRAME_OPTIONS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
VIDEO_OPTIONS = FRAME_OPTIONS + SIZE_OPTIONS


def load_video(
    source: Any,
    config: ImageConfig | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    **options: float,
) -> Clip:
    """Sample and resize a video.

    source: a video file (anything `open_media` takes), a directory or list of images (anything
    `load_image` takes), or an array or tensor [F, H, W, 3] or [F, 3, H, W] (uint8, or floats of 0…1
    or 0…255). Of a file, by default 2 frames per second, at least 4, at most 768, an even number;
    of the others all, where fps is how many made a second. Each has up to 768 tokens; options:
    those of VIDEO_OPTIONS, as in qwen-vl-utils 0.0.14 (`video.py` has the rules); limits: what it
    may cost. A damaged video gives the frames that can be decoded, with a warning.

    Raises FileNotFoundError, ValueError or TimeoutError with one sentence naming the source.
    """
    config = config or ImageConfig()
    video.check_options(options)
    choice: dict[str, Any] = {
        name: value for name, value in options.items() if name not in SIZE_OPTIONS
    }
    sizes = {name: value for name, value in options.items() if name in SIZE_OPTIONS}
    choice["factor"] = config.temporal_patch_size
    choice["limits"] = limits
    name = source_name(source)
    frames = video.given_frames(source)
    if frames is not None:
        return resize_video(video.sample_list(frames, name, **choice), name, config, sizes)
    media = open_media(source, limits)
    try:
        return resize_video(video.sample_file(media, name, **choice), name, config, sizes)
    except UnreliableIndex as reason:
        warnings.warn(
            f"{name}: {reason}, so all of it is decoded, twice, to count its frames", stacklevel=2
        )
    sampled = video.sample_file(media, name, decode_all=True, **choice)
    return resize_video(sampled, name, config, sizes)


def resize_video(
    sampled: video.SampledVideo, name: str, config: ImageConfig, sizes: dict[str, float]
) -> Clip:
    """Resize each frame as it comes. sizes: those of SIZE_OPTIONS that are given."""
    does_resize = config.do_resize or sizes.get("resized_height") is not None
    size = None
    for index, (image, display_size) in enumerate(sampled.frames):
        if size is None:
            size = display_size
            width, height = size
            if does_resize:
                with naming(name):
                    count = len(sampled.timestamps)
                    height, width = frame_size(height, width, count, config, **sizes)
                    check_resized(height, width)
            frames = np.empty((len(sampled.timestamps), height, width, 3), dtype=np.uint8)
        if does_resize:
            resized = to_rgb(image).resize((width, height), resample=config.resample)
            frames[index] = np.asarray(resized)
        else:
            if display_size != size:
                raise ValueError(f"do_resize is off, but the frames of {name} change their size")
            if image.size != size:  # pixels that are not square
                image = image.resize(size, resample=config.resample)
            with naming(name):
                frames[index] = resize(image, config)  # the sides must be multiples of the factor
        del image  # before the next one is taken, while the one after it is decoded
    assert size is not None  # `frames_between` finds at least one frame
    return Clip(frames, sampled.timestamps, size)


def frame_size(
    height: int,
    width: int,
    count: int,
    config: ImageConfig,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    total_pixels: float | None = None,
    resized_height: float | None = None,
    resized_width: float | None = None,
) -> tuple[int, int]:
    """Return the size (height, width) to which each of `count` frames of a video is resized.

    Its pixels are within `video.pixel_bounds`, unless `resized_height` and `resized_width` are
    given: these are rounded to multiples of config.factor.
    Source: qwen-vl-utils 0.0.14, `fetch_video`.
    """
    token_pixels = config.factor**2
    if (resized_height is None) != (resized_width is None):
        raise ValueError("resized_height and resized_width belong together: give both or neither")
    if resized_height is not None and resized_width is not None:
        least = video.MIN_SIZE_TOKENS * token_pixels
        most = video.MAX_SIZE_TOKENS * token_pixels
        return fit(resized_height, resized_width, config.factor, least, most)
    low, high = video.pixel_bounds(
        count, token_pixels, config.temporal_patch_size, min_pixels, max_pixels, total_pixels
    )
    return fit(height, width, config.factor, low, high)


def fit(height: float, width: float, factor: int, low: float, high: float) -> tuple[int, int]:
    """Return the size by `smart_resize` of qwen-vl-utils: a thin side becomes one factor."""
    fitted = smart_resize(height, width, factor, low, high)
    rounded_height = max(factor, round(height / factor) * factor)
    rounded_width = max(factor, round(width / factor) * factor)
    if low <= rounded_height * rounded_width <= high:
        return rounded_height, rounded_width
    return fitted


def check_resized(height: int, width: int) -> None:
    """Raise ValueError for a size in pixels that no model takes and that would fill the memory."""
    if height * width > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"resizing to {height}×{width} (height × width) gives more than {MAX_RESIZED_PIXELS:,} "
            "pixels: lower min_pixels"
        )


def resize(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Return one image as RGB, uint8 [H, W, 3], resized so that both sides are multiples of
    `config.factor`.
    """
    if config.do_convert_rgb:
        image = to_rgb(image)
    elif image.mode != "RGB":
        raise ValueError(f"do_convert_rgb is off, but the image's mode is {image.mode}, not RGB")
    if config.do_resize:
        height, width = smart_resize(
            image.height, image.width, config.factor, config.min_pixels, config.max_pixels
        )
        check_resized(height, width)
        image = image.resize((width, height), resample=config.resample)
    elif image.height % config.factor or image.width % config.factor:
        size = f"{image.height}×{image.width} (height × width)"
        raise ValueError(f"do_resize is off, but {size} is no multiple of {config.factor}")
    return np.asarray(image)


def normalize(frames: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Return frames, uint8 [F, H, W, 3], as float32 of the same shape: rescaled to 0…1, minus mean,
    divided by std.

    Rescaled in float64 and normalized in float32: in one precision throughout, the last bit would
    differ from the reference's in some of the levels. Source: transformers 5.23.0, `rescale` and
    `normalize`.
    """
    scale = np.float64(config.rescale_factor)
    mean = np.asarray(config.image_mean, dtype=np.float32)
    std = np.asarray(config.image_std, dtype=np.float32)
    values = np.empty(frames.shape, dtype=np.float32)
    for index, frame in enumerate(frames):  # one by one: float64 of a whole video would be large
        if config.do_rescale:
            frame = frame * scale
        frame = frame.astype(np.float32)
        if config.do_normalize:
            frame = (frame - mean) / std
        values[index] = frame
    return values


def patchify(frames: np.ndarray, config: ImageConfig) -> tuple[np.ndarray, Grid]:
    """Return frames [F, H, W, 3] as patches [N, 3*tp*p*p], N = gt*gh*gw, and their grid (gt, gh,
    gw).

    The patches are not in reading order: the 2×2 that will become one token follow each other,
    token by token, so that the model can merge them with a mere reshape. A patch's values run over
    (channel, frame, y, x). Source: transformers 5.23.0, `patchify` of the image and of the video
    processor.
    """
    tp = config.temporal_patch_size
    p = config.patch_size
    m = config.merge_size
    missing = -len(frames) % tp  # an image becomes two equal frames, the last of an odd number too
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    gt = frames.shape[0] // tp
    gh = frames.shape[1] // p
    gw = frames.shape[2] // p
    patches = frames.reshape(gt, tp, gh // m, m, p, gw // m, m, p, 3)
    patches = patches.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [gt, gh/m, gw/m, m, m, 3, tp, p, p]
    return patches.reshape(gt * gh * gw, 3 * tp * p * p), (gt, gh, gw)


def frames_to_patches(frames: np.ndarray, config: ImageConfig) -> tuple[np.ndarray, Grid]:
    """Return `patchify(normalize(frames))`, bit for bit, of frames uint8 [F, H, W, 3].

    Each of the 256 levels of a channel is normalized once and then looked up, and what is moved
    into patches are bytes: about four times as fast, in little more memory than the patches.
    """
    levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1).repeat(3, axis=-1)
    normalized = normalize(levels, config)[0, :, 0]  # float32 [256, 3]
    tp = config.temporal_patch_size
    starts = range(0, len(frames), tp)
    for index, start in enumerate(starts):
        patches, (_, gh, gw) = patchify(frames[start : start + tp], config)
        if index == 0:
            values = np.empty((len(starts), *patches.shape), dtype=np.float32)
        look_up(patches, normalized, values[index])
    return values.reshape(-1, values.shape[-1]), (len(starts), gh, gw)


def look_up(patches: np.ndarray, levels: np.ndarray, values: np.ndarray) -> None:
    """Write levels, float32 [256, 3], of the patches, uint8 [n, 3*tp*p*p], into the values."""
    by_channel = patches.reshape(len(patches), 3, -1)
    found = values.reshape(by_channel.shape)
    for start in range(0, len(patches), LOOKED_UP):
        some = slice(start, start + LOOKED_UP)
        for channel in range(3):
            found[some, channel] = levels[:, channel].take(by_channel[some, channel])


def preprocess_frames(frames: Sequence, config: ImageConfig) -> tuple[np.ndarray, Grid]:
    """Return the frames of one video, or one image in a list, as patches float32 [N, 3*tp*p*p] and
    their grid.
    """
    resized = [resize(load_image(frame), config) for frame in frames]
    sizes = {frame.shape[:2] for frame in resized}
    if len(sizes) != 1:
        raise ValueError(
            f"a video needs frames of one size, but these have {sorted(sizes) or 'no frame at all'}"
        )
    return frames_to_patches(np.stack(resized), config)


def join(clips: Sequence[tuple[np.ndarray, Grid]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the patches of several images or videos; the grids, int64 [n, 3], tell them
    apart.
    """
    if not clips:
        raise ValueError("there is nothing to preprocess: the list is empty")
    patches = np.concatenate([patches for patches, _ in clips])
    grids = np.array([grid for _, grid in clips], dtype=np.int64)
    return patches, grids


def preprocess_images(images: Sequence, config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (pixel_values, image_grid_thw) of images, each anything that `load_image` takes.

    pixel_values is float32 [N, 3*tp*p*p] (1176 columns in the published models), the patches of all
    images one after the other; image_grid_thw is int64 [images, 3], each image's (1, gh, gw) in
    patches.

    Bit-identical to transformers 5.23.0, `Qwen2VLImageProcessorPil`, on the same Pillow version
    only: Pillow 13 changed the last bits of its resize. The torchvision processor, which
    transformers prefers where torchvision is installed, differs from both by about one level of 256
    in under 1 % of the values.
    """
    return join([preprocess_frames([image], config) for image in images])


def preprocess_videos(videos: Sequence, config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (pixel_values_videos, video_grid_thw) of videos, each a list of images or uint8 [F, H,
    W, 3].

    As for images, with the same bounds on the pixels of every frame; a video's grid has gt = ceil(F
    / tp).
    """
    return join([preprocess_frames(frames, config) for frames in videos])


@dataclass
class Media:
    """One image or video, ready for the model, and what it was before."""

    patches: np.ndarray  # float32 [N, 3*tp*p*p]
    grid: Grid
    name: str  # where it came from
    size: tuple[int, int]  # width and height in pixels before resizing
    timestamps: list[float] | None = None  # of a video's frames, in seconds

    def summary(self, config: ImageConfig) -> str:
        """Return one line: the source's size, the resized one, and how many tokens that makes."""
        gt, gh, gw = self.grid
        width, height = self.size
        before = f"{width}×{height} pixels"
        if self.timestamps:
            before += f", {len(self.timestamps)} frames at {shown_times(self.timestamps)} s"
        resized = f"{gw * config.patch_size}×{gh * config.patch_size}"
        patches = f"{gw}×{gh} patches"
        if gt > 1:
            patches = f"{gt}×{patches}"
        tokens = gt * gh * gw // config.merge_size**2
        return f"{self.name}: {before} → {resized} → {patches} → {tokens} tokens"


def shown_times(timestamps: list[float]) -> str:
    """Return the timestamps as a text, the middle ones left out where there are many."""
    times = [f"{seconds:.2f}" for seconds in timestamps]
    if len(times) > 16:
        times = [*times[:8], "…", *times[-2:]]
    return " ".join(times)


@dataclass
class Batch:
    """What the model takes, as numpy arrays. The vision fields are None when no sequence has such
    media.
    """

    input_ids: np.ndarray  # int64 [B, S], padded on the left
    attention_mask: np.ndarray  # int64 [B, S], 0 where padded, else 1
    pixel_values: np.ndarray | None = None  # float32 [N, 3*tp*p*p], sequence after sequence
    image_grid_thw: np.ndarray | None = None  # int64 [images, 3]
    pixel_values_videos: np.ndarray | None = None  # the same two for videos
    video_grid_thw: np.ndarray | None = None
    media: list[Media] = field(default_factory=list)  # all, in reading order

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arguments of the model by name, without those that are None."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}


class Processor:
    """Conversations → Batch: read the media, encode the prompts, expand their placeholders to
    vision tokens.

    A call changes nothing in the processor, so that threads can share one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_config: ImageConfig,
        video_options: dict | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ):
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.video_options = video_options or {}  # for `load_video`, unless an item has its own
        self.limits = limits  # what one image or video may cost

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
        tokenizer_folder: str | Path | None = None,
    ) -> Processor:
        """Read tokenizer and image settings of a checkpoint directory.

        Bounds given here replace the directory's for images, and the usual ones for the frames of a
        video. limits: what one image or video may cost. tokenizer_folder: where the tokenizer's
        files are, if not in `folder`. Raises FileNotFoundError or ValueError.
        """
        bounds: dict[str, Any] = {}
        if min_pixels is not None:
            bounds["min_pixels"] = min_pixels
        if max_pixels is not None:
            bounds["max_pixels"] = max_pixels
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder or folder)
        image_config = replace(ImageConfig.from_pretrained(folder), **bounds)
        return cls(tokenizer, image_config, bounds, limits)

    def check_model(self, config: Any) -> None:
        """Raise ValueError where the processor's token ids or patch sizes contradict a model's
        `Config`.

        They can where a model is used with the processor of another checkpoint.
        """
        vision = config.vision_config
        images = self.image_config
        token_id = self.tokenizer.token_id
        check_equal(f"the id of {IMAGE_PAD}", token_id(IMAGE_PAD), config.image_token_id)
        check_equal(f"the id of {VIDEO_PAD}", token_id(VIDEO_PAD), config.video_token_id)
        start_id = config.vision_start_token_id
        check_equal(f"the id of {VISION_START}", token_id(VISION_START), start_id)
        check_equal("patch_size", images.patch_size, vision.patch_size)
        check_equal("merge_size", images.merge_size, vision.spatial_merge_size)
        check_equal("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size)
        check_equal("the number of channels", 3, vision.in_channels)
        tokens = images.min_pixels // images.factor**2
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"min_pixels {images.min_pixels} makes {tokens} tokens of each image, expected at "
                f"most max_position_embeddings {config.max_position_embeddings}"
            )

    def __call__(
        self,
        conversations: list,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        guard_special_tokens: bool = True,
    ) -> Batch:
        """Return the Batch of one conversation or of a list of conversations, a sequence each.

        A conversation is a list of messages, or an object that `read_conversation` takes. Each
        image and video in it is read by `prepare`, or was already (its source is then the Media).
        guard_special_tokens: the special tokens of the chat format are ordinary text in user and
        tool messages (`Tokenizer.encode_chat`).

        Raises ValueError or FileNotFoundError for a malformed message, for media that cannot be
        read, and where the prompt does not hold one placeholder for each image and video.
        """
        if not isinstance(conversations, list | tuple) or not conversations:
            raise ValueError(
                "expected a conversation, which is a list of messages, or a list of conversations"
            )
        if is_message(conversations[0]):
            conversations = [conversations]
        sequences = []
        images = []
        videos = []
        media = []
        for conversation in conversations:
            messages = read_conversation(conversation)
            own_images = []
            own_videos = []
            for item in media_items(messages):
                prepared = self.prepare(item)
                media.append(prepared)
                if content_kind(item) == "image":
                    own_images.append(prepared)
                else:
                    own_videos.append(prepared)
            ids = self.tokenizer.encode_chat(
                messages, add_generation_prompt, add_vision_id, guard_special_tokens
            )
            self.tokenizer.check_placeholders(ids, len(own_images), len(own_videos))
            ids = self._expand(ids, IMAGE_PAD, own_images)
            ids = self._expand(ids, VIDEO_PAD, own_videos)
            sequences.append(ids)
            images += own_images
            videos += own_videos

        batch = Batch(*self._pad(sequences), media=media)
        if images:
            batch.pixel_values, batch.image_grid_thw = join([(m.patches, m.grid) for m in images])
        if videos:
            batch.pixel_values_videos, batch.video_grid_thw = join(
                [(m.patches, m.grid) for m in videos]
            )
        return batch

    def prepare(self, item: dict) -> Media:
        """Read the image or video of one content item.

        An image is located under `image`, `image_url` (also as {"url": ...}), `url` or `path` and
        is anything that `load_image` takes; a video under `video` (or `url`, `path`) and is
        anything that `load_video` takes. The item's own `min_pixels` and `max_pixels`,
        `resized_height` and `resized_width`, and for a video all of VIDEO_OPTIONS, mean what they
        mean to qwen-vl-utils 0.0.14.

        Raises ValueError or FileNotFoundError with one sentence naming the source.
        """
        kind, config = content_kind(item), self.image_config
        source = item_source(item, kind)
        if source is None:
            keys = ", ".join(SOURCE_KEYS[kind])
            raise ValueError(f"the {kind} item names no {kind} under any of {keys}: {item!r:.80}")
        if isinstance(source, Media):
            return source
        own = {name: item[name] for name in VIDEO_OPTIONS if item.get(name) is not None}
        if kind == "video":
            clip = load_video(source, config, self.limits, **(self.video_options | own))
            patches, grid = frames_to_patches(clip.frames, config)
            return Media(patches, grid, source_name(source), clip.size, clip.timestamps)
        return self._prepare_image(source, own)

    def _prepare_image(self, source: Any, options: dict) -> Media:
        """Read one image; `options` are those of its item."""
        options = {name: whole(value) for name, value in options.items()}
        for name in ("min_pixels", "max_pixels", "resized_height", "resized_width"):
            problem = field_problem("Pixels | None", options.get(name))
            if problem is not None:
                raise ValueError(f"{name}: {problem}")
        bounds = {name: options[name] for name in ("min_pixels", "max_pixels") if name in options}
        config = replace(self.image_config, **bounds)
        image = load_image(source, self.limits)
        size = image.size
        name = source_name(source)
        with naming(name):
            if "resized_height" in options and "resized_width" in options:
                height, width = smart_resize(
                    options["resized_height"],
                    options["resized_width"],
                    config.factor,
                    config.min_pixels,
                    config.max_pixels,
                )
                check_resized(height, width)
                image = to_rgb(image).resize((width, height), resample=config.resample)
            frames = resize(image, config)[None]  # [1, H, W, 3]
        patches, grid = frames_to_patches(frames, config)
        return Media(patches, grid, name, size)

    def _expand(self, ids: list[int], pad: str, media: list[Media]) -> list[int]:
        """Return ids with the n-th placeholder repeated once for each token of the n-th image or
        video.
        """
        pad_id = self.tokenizer.token_id(pad)
        remaining = iter(media)
        expanded = []
        for token in ids:
            count = 1
            if token == pad_id:
                count = math.prod(next(remaining).grid) // self.image_config.merge_size**2
            expanded += [token] * count
        return expanded

    def _pad(self, sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return input_ids and attention_mask, int64 [B, S].

        Padded on the left, so that each sequence's last token is in the last column, where
        generation continues.
        """
        longest = max(len(ids) for ids in sequences)
        shape = len(sequences), longest
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for index, ids in enumerate(sequences):
            start = longest - len(ids)
            input_ids[index, start:] = ids
            attention_mask[index, start:] = 1
        return input_ids, attention_mask


def is_message(value: Any) -> bool:
    """Return whether a value is one message, rather than a conversation."""
    if isinstance(value, dict):
        return "messages" not in value and "conversations" not in value
    return not isinstance(value, list | tuple)


def media_items(messages: list[dict]) -> list[dict]:
    """Return the images and videos among the content items of messages, in reading order."""
    items = [item for message in messages for item in message["content"]]
    return [item for item in items if content_kind(item) != "text"]


def check_equal(name: str, ours: int, theirs: int) -> None:
    """Raise ValueError if the processor and the model's config.json disagree about a number."""
    if ours != theirs:
        found = f"{ours} in the processor, but {theirs} in the model's config.json"
        raise ValueError(f"{name} is {found}")
