"""preprocess.py: equal to transformers' Pillow image processor, golden hashes and plain loops."""

import json
import math
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_golden_preprocess import BOUNDS, GOLDEN, ROTATED, draw_pixels, sample_images, summary
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as reference_smart_resize,
)

import generate as command
from command_line import BUNDLED_CHECKPOINT
from media import load_image, to_rgb
from preprocess import (
    ImageConfig,
    Processor,
    frames_to_patches,
    normalize,
    patchify,
    preprocess_images,
    preprocess_videos,
    smart_resize,
)

PICTURES = sample_images()
GOLDEN_RECORDS = json.loads(GOLDEN.read_text(encoding="utf-8"))
PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def assert_same_bits(ours, theirs):
    """Equal shapes, dtypes and bits: unlike ==, this tells -0.0 from 0.0."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


def assert_equals_reference(images, **fields):
    reference = Qwen2VLImageProcessorPil(**fields)(images, return_tensors="np")
    pixel_values, image_grid_thw = preprocess_images(images, ImageConfig(**fields))
    assert_same_bits(pixel_values, reference["pixel_values"])
    assert_same_bits(image_grid_thw, reference["image_grid_thw"])


# --- smart_resize ---


def both_sizes(height, width, *rest):
    """Our answer and the reference's; an error counts as the answer "ValueError"."""
    answers = []
    for function in (smart_resize, reference_smart_resize):
        try:
            answers.append(function(height, width, *rest))
        except ValueError:
            answers.append("ValueError")
    return answers


@pytest.mark.slow
@settings(max_examples=3000)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
@example(height=70, width=42)  # ties: rounded to the even multiple
@example(height=10, width=2000)  # 200 times, which is allowed, and a side that rounds to 0
@example(height=10, width=2001)
def test_smart_resize_equals_reference(height, width):
    ours, theirs = both_sizes(height, width)
    assert ours == theirs


@pytest.mark.slow
@settings(max_examples=3000)
@given(
    height=st.integers(1, 3000),
    aspect=st.floats(1 / 210, 210),
    factor=st.sampled_from([1, 14, 16, 28, 32, 36]),
    bounds=st.tuples(st.integers(1, 10**6), st.integers(1, 10**7)).map(sorted),
)
def test_smart_resize_equals_reference_for_any_bounds(height, aspect, factor, bounds):
    width = max(1, round(height * aspect))
    ours, theirs = both_sizes(height, width, factor, *bounds)
    assert ours == theirs


def test_smart_resize_known_sizes():
    assert smart_resize(70, 140) == (56, 140)  # 2.5 rounds to 2
    assert smart_resize(98, 140) == (112, 140)  # 3.5 rounds to 4
    assert smart_resize(10, 2000) == (28, 812)
    assert smart_resize(1, 1) == (56, 56)
    assert smart_resize(2000, 3000) == (812, 1204)
    assert smart_resize(2000, 3000, max_pixels=12845056) == (1988, 2996)


@pytest.mark.parametrize("size", [(10, 2001), (2001, 10), (1, 201)])
def test_smart_resize_too_thin(size):
    with pytest.raises(
        ValueError, match=f"one side is more than 200 times the other: {size[0]}×{size[1]}"
    ):
        smart_resize(*size)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_smart_resize_nothing(size):
    with pytest.raises(ValueError, match="at least one pixel"):
        smart_resize(*size)


# --- pixel values ---


@pytest.mark.parametrize("name", PICTURES)
def test_preprocess_images_equals_reference(name):
    assert_equals_reference([PICTURES[name]], **BOUNDS)


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_preprocess_images_equals_golden(name):
    found = summary(*preprocess_images([PICTURES.get(name, ROTATED)], ImageConfig(**BOUNDS)))
    assert found == GOLDEN_RECORDS[name]


def test_make_golden_preprocess_records_every_image():
    assert set(GOLDEN_RECORDS) == {*PICTURES, ROTATED.name}


@pytest.mark.slow
def test_preprocess_images_equals_reference_for_large_images():
    assert_equals_reference([Image.fromarray(draw_pixels(1500, 2100))])
    assert_equals_reference([Image.fromarray(draw_pixels(700, 900))], max_pixels=12845056)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    height=st.integers(1, 260),
    width=st.integers(1, 260),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]),
    bounds=st.tuples(st.integers(1, 40_000), st.integers(1, 80_000)).map(sorted),
)
def test_preprocess_images_equals_reference_for_any_image(height, width, mode, bounds):
    if max(height, width) <= 200 * min(height, width):
        image = Image.fromarray(draw_pixels(height, width, 4), "RGBA").convert(mode)
        assert_equals_reference([image], min_pixels=bounds[0], max_pixels=bounds[1])


def test_preprocess_images_equals_reference_for_every_level():
    ramp = (
        np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(14, 0).repeat(14, 1)
    )  # 224×224, no resize
    assert_equals_reference([Image.fromarray(ramp)])
    assert_equals_reference(
        [Image.fromarray(ramp)], image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.25, 1.0]
    )


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_preprocess_images_equals_reference_with_steps_switched_off(
    do_resize, do_rescale, do_normalize
):
    flags = {"do_resize": do_resize, "do_rescale": do_rescale, "do_normalize": do_normalize}
    assert_equals_reference([Image.fromarray(draw_pixels(84, 56))], do_convert_rgb=False, **flags)


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_size": 8, "merge_size": 3},
        {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 1},
        {"temporal_patch_size": 3},
        {"resample": Image.Resampling.BILINEAR},
        {"resample": Image.Resampling.LANCZOS},
        {"rescale_factor": 1 / 127.5, "image_mean": 0.5, "image_std": 0.25},
        {"min_pixels": 90_000, "max_pixels": 120_000},
    ],
)
def test_preprocess_images_equals_reference_with_other_settings(fields):
    assert_equals_reference(
        [Image.fromarray(draw_pixels(83, 120)), Image.fromarray(draw_pixels(300, 200))], **fields
    )


def test_preprocess_images_concatenates_several_images():
    images = [PICTURES["RGB"], PICTURES["P"], PICTURES["517×333"]]
    assert_equals_reference(images, **BOUNDS)
    pixel_values, grids = preprocess_images(images, ImageConfig(**BOUNDS))
    assert grids.tolist() == [[1, 4, 6], [1, 4, 6], [1, 26, 16]]
    alone = [preprocess_images([image], ImageConfig(**BOUNDS))[0] for image in images]
    assert_same_bits(pixel_values, np.concatenate(alone))


def test_preprocess_images_returns_a_writable_contiguous_array():
    pixel_values, _ = preprocess_images([PICTURES["RGB"]], ImageConfig())
    assert pixel_values.flags.c_contiguous
    assert pixel_values.flags.writeable  # torch.from_numpy warns about anything else


def test_preprocess_images_without_steps_refuses_an_unsuitable_image():
    with pytest.raises(
        ValueError, match=r"do_resize is off, but 61×83 \(height × width\) is no multiple of 28"
    ):
        preprocess_images([PICTURES["RGB"]], ImageConfig(do_resize=False))
    with pytest.raises(ValueError, match="do_convert_rgb is off, but the image's mode is CMYK"):
        preprocess_images([PICTURES["CMYK"]], ImageConfig(do_convert_rgb=False))


def test_preprocess_images_refuses_an_empty_list():
    with pytest.raises(ValueError, match="the list is empty"):
        preprocess_images([], ImageConfig())


# --- the order of patches, and videos ---


def patches_by_loops(frames, tp, p, m):
    """The definition, value by value: which pixel is located where in [patches, 3*tp*p*p]."""
    gt, gh, gw = len(frames) // tp, frames.shape[1] // p, frames.shape[2] // p
    rows = []
    for t in range(gt):
        for block_y in range(gh // m):
            for block_x in range(gw // m):
                for inner_y in range(m):
                    for inner_x in range(m):
                        top, left = (block_y * m + inner_y) * p, (block_x * m + inner_x) * p
                        cube = frames[t * tp : (t + 1) * tp, top : top + p, left : left + p]
                        rows.append(
                            [
                                cube[f, y, x, c]
                                for c in range(3)
                                for f in range(tp)
                                for y in range(p)
                                for x in range(p)
                            ]
                        )
    return np.array(rows), (gt, gh, gw)


@pytest.mark.parametrize(
    ("frames", "gh", "gw", "tp", "p", "m"), [(4, 4, 6, 2, 3, 2), (3, 3, 6, 1, 2, 3)]
)
def test_patchify_orders_patches_by_blocks(frames, gh, gw, tp, p, m):
    numbered = np.arange(frames * gh * p * gw * p * 3).reshape(frames, gh * p, gw * p, 3)
    config = ImageConfig(patch_size=p, temporal_patch_size=tp, merge_size=m)
    patches, grid = patchify(numbered, config)
    expected, expected_grid = patches_by_loops(numbered, tp, p, m)
    assert grid == expected_grid == (frames // tp, gh, gw)
    assert np.array_equal(patches, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 1.0, -2.0], "image_std": [3.0, 0.1, 1.0]},
        {"patch_size": 4, "temporal_patch_size": 3, "merge_size": 7},
    ],
    ids=str,
)
def test_frames_to_patches_equals_normalizing_before(fields):
    config = ImageConfig(**fields)
    frames = draw_pixels(5 * 56, 224).reshape(5, 56, 224, 3)
    frames[0, :8, :32] = np.arange(256).reshape(8, 32, 1)  # every level
    patches, grid = frames_to_patches(frames, config)
    expected, expected_grid = patchify(normalize(frames, config), config)
    assert grid == expected_grid
    assert_same_bits(patches, expected)


def raw_config(**fields):
    """Patches that still hold the levels 0…255, from images that already fit."""
    return ImageConfig(do_resize=False, do_rescale=False, do_normalize=False, **fields)


def test_preprocess_videos_puts_two_frames_in_each_patch():
    clip = draw_pixels(6 * 28, 56).reshape(6, 28, 56, 3)
    values, grids = preprocess_videos([clip], raw_config())
    assert values.dtype == np.float32
    assert grids.tolist() == [[3, 2, 4]]
    assert np.array_equal(values, patches_by_loops(clip, 2, 14, 2)[0])


def test_preprocess_videos_repeats_the_last_of_an_odd_number_of_frames():
    clip = draw_pixels(5 * 28, 28).reshape(5, 28, 28, 3)
    values, grids = preprocess_videos([clip], raw_config())
    full, _ = preprocess_videos([np.concatenate([clip, clip[-1:]])], raw_config())
    assert grids.tolist() == [[3, 2, 2]]
    assert_same_bits(values, full)


def test_preprocess_images_equals_a_video_of_two_equal_frames():
    picture = PICTURES["517×333"]
    as_picture, grid = preprocess_images([picture], ImageConfig())
    as_clip, clip_grid = preprocess_videos([[picture, picture]], ImageConfig())
    assert_same_bits(as_picture, as_clip)
    assert grid.tolist() == clip_grid.tolist()


def test_preprocess_videos_treats_frames_as_images():
    """The frames of a video have the pixels of the images alone, which equal the reference's."""
    frames = [Image.fromarray(draw_pixels(90 + 0 * n, 120)).rotate(n) for n in range(4)]
    values, grids = preprocess_videos([frames], ImageConfig())
    cubes = values.reshape(*grids[0][:1], -1, 3, 2, 14, 14)  # [gt, gh*gw, C, tp, p, p]
    for n, frame in enumerate(frames):
        alone = preprocess_images([frame], ImageConfig())[0].reshape(-1, 3, 2, 14, 14)
        assert np.array_equal(cubes[n // 2, :, :, n % 2], alone[:, :, 0])


@pytest.mark.sweep
@pytest.mark.parametrize("size", [(280, 392), (200, 300), (1300, 900)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_video_tensor_in_a_message_has_the_pixel_values_of_the_reference(size, kind, processor):
    """The reference's video processor needs torchvision; its image processor takes each frame."""
    height, width = size
    frames = [draw_pixels(height, width) // (n + 1) for n in range(4)]
    tensor = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # [F, 3, H, W]
    if kind == "float":
        tensor = tensor.float()
    item = {"type": "video", "video": tensor, "fps": 1.0}
    batch = processor([{"role": "user", "content": [item]}])
    [[gt, gh, gw]] = batch.video_grid_thw.tolist()
    columns = batch.pixel_values_videos.reshape(gt, gh * gw, 3, 2, 14, 14)
    bounds = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    reference = Qwen2VLImageProcessorPil(size=bounds)
    for n, frame in enumerate(frames):
        expected = reference([Image.fromarray(frame)], return_tensors="np")
        assert expected["image_grid_thw"].tolist() == [[1, gh, gw]]
        pixels = expected["pixel_values"].reshape(gh * gw, 3, 2, 14, 14)[:, :, 0]
        assert_same_bits(
            np.ascontiguousarray(columns[n // 2, :, :, n % 2]), np.ascontiguousarray(pixels)
        )


def test_preprocess_videos_refuses_unequal_or_missing_frames():
    with pytest.raises(
        ValueError, match=r"frames of one size, but these have \[\(56, 56\), \(84, 56\)\]"
    ):
        preprocess_videos([[draw_pixels(56, 56), draw_pixels(84, 56)]], ImageConfig())
    with pytest.raises(ValueError, match="no frame at all"):
        preprocess_videos([[]], ImageConfig())
    with pytest.raises(ValueError, match="the list is empty"):
        preprocess_videos([], ImageConfig())


# --- load_image ---


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image_rotates_jpeg_as_the_reference_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(draw_pixels(90, 140)).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").size == ((140, 90) if orientation < 5 else (90, 140))
    assert_equals_reference([str(tmp_path / "x.jpg")])


def test_load_image_returns_a_pillow_image_unchanged():
    stored = Image.open(ROTATED)
    assert load_image(stored) is stored
    assert stored.size == (60, 40)
    assert load_image(ROTATED).size == (40, 60)
    assert_equals_reference([stored])


@pytest.mark.parametrize(
    "name", ["RGBA", "LA", "P, alpha per colour", "RGB, one colour transparent"]
)
def test_preprocess_images_makes_a_transparent_file_white(tmp_path, name):
    """A file and its opened image give the same pixels.

    The reference's own loader drops the alpha of a file.
    """
    PICTURES[name].save(tmp_path / "x.png", transparency=PICTURES[name].info.get("transparency"))
    from_path, _ = preprocess_images([tmp_path / "x.png"], ImageConfig())
    with Image.open(tmp_path / "x.png") as opened:
        assert_same_bits(
            from_path, Qwen2VLImageProcessorPil()([opened], return_tensors="np")["pixel_values"]
        )


def test_preprocess_images_makes_an_invisible_image_white():
    values, _ = preprocess_images([Image.new("RGBA", (56, 56), (0, 0, 0, 0))], raw_config())
    assert np.array_equal(values, np.full((16, 1176), 255, dtype=np.float32))


def test_load_image_gives_the_same_image_from_every_source(tmp_path):
    array = draw_pixels(30, 40)
    path = tmp_path / "a picture 100%25 (ü).png"
    Image.fromarray(array).save(path)
    for source in (array, Image.fromarray(array), path, str(path), path.as_uri()):
        assert np.array_equal(np.asarray(load_image(source)), array)
    plain = tmp_path / "plain.png"
    Image.fromarray(array).save(plain)
    assert np.array_equal(np.asarray(load_image(f"file://{plain}")), array)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_load_image_closes_the_file(tmp_path, suffix):
    Image.fromarray(draw_pixels(30, 40)).save(tmp_path / f"x.{suffix}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(
            "always", ResourceWarning
        )  # the warning about a file that nobody closed
        image = load_image(tmp_path / f"x.{suffix}")
    (tmp_path / f"x.{suffix}").unlink()
    assert np.asarray(image.convert("RGB")).shape == (30, 40, 3)
    assert not caught


def test_load_image_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no image at .*nothing\.png"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(FileNotFoundError, match=r"there is no image at .*nothing\.png"):
        load_image(f"file://{tmp_path}/nothing.png")


@pytest.mark.parametrize("kind", ["text", "empty", "cut off png", "cut off jpg", "folder", "bomb"])
def test_load_image_refuses_an_unreadable_file_in_one_sentence(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "bomb":  # a small file that claims 60,000 × 60,000 pixels
        path.write_bytes(b"P6 60000 60000 255\n" + bytes(30))
    elif kind.startswith("cut off"):
        Image.fromarray(draw_pixels(100, 100)).save(
            path, format="png" if kind.endswith("png") else "jpeg"
        )
        path.write_bytes(path.read_bytes()[:1500])
    else:
        path.write_bytes(b"no picture" if kind == "text" else b"")
    with pytest.raises(ValueError, match=r"cannot read .*x\.png as an image") as error:
        load_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64," + "A" * 9000, "cannot read data:image/png;base64,AAA"),
        ("A" * 9000, "cannot read A"),  # bare base64: too long for a file name
        (b"\x89PNG", "cannot read the given bytes as an image: it has no format that Pillow knows"),
        (None, "expected a path, a URL, bytes or an open file, got NoneType"),
        (7, "expected a path, a URL, bytes or an open file, got int"),
    ],
)
def test_load_image_refuses_a_source_of_the_wrong_kind(source, said):
    with pytest.raises(ValueError, match=said) as error:
        load_image(source)
    assert len(str(error.value)) < 400


# --- settings ---


def write_settings(folder, fields, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_image_config_reads_published_settings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ImageConfig.from_pretrained(write_settings(tmp_path, PUBLISHED))
    assert (config.min_pixels, config.max_pixels, config.factor) == (3136, 12845056, 28)
    assert list(config.image_mean) == PUBLISHED["image_mean"]


def test_image_config_defaults_equal_reference():
    reference, ours = Qwen2VLImageProcessorPil(), ImageConfig()
    assert reference.size == {"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels}
    for field in set(vars(ours)) - {"min_pixels", "max_pixels", "image_mean", "image_std"}:
        assert getattr(ours, field) == getattr(reference, field), field
    assert list(ours.image_mean) == list(reference.image_mean)
    assert list(ours.image_std) == list(reference.image_std)


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, (3136, 12845056)),
        ({"size": {"min_pixels": 3136, "max_pixels": 12845056}}, (3136, 12845056)),
        (
            {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3, "max_pixels": 4},
            (3, 4),
        ),
        (
            {
                "size": {"shortest_edge": 1, "longest_edge": 2},
                "min_pixels": None,
                "max_pixels": None,
            },
            (1, 2),
        ),
        ({"size": None}, (3136, 1003520)),
        ({}, (3136, 1003520)),
    ],
)
def test_image_config_accepts_each_spelling_of_the_bounds(tmp_path, fields, bounds):
    config = ImageConfig.from_pretrained(write_settings(tmp_path, fields))
    assert (config.min_pixels, config.max_pixels) == bounds


def test_image_config_reads_settings_saved_by_the_reference(tmp_path):
    fields = {
        "min_pixels": 4000,
        "max_pixels": 90000,
        "merge_size": 1,
        "image_mean": [0.1, 0.2, 0.3],
        "resample": 2,
    }
    Qwen2VLImageProcessorPil(**fields).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ImageConfig.from_pretrained(tmp_path)
    assert vars(config) == vars(ImageConfig(**fields)) | {
        "image_std": list(ImageConfig().image_std)
    }


def test_image_config_reads_settings_nested_in_processor_config(tmp_path):
    write_settings(tmp_path, {"image_processor": {"merge_size": 1}}, "processor_config.json")
    assert ImageConfig.from_pretrained(tmp_path).merge_size == 1
    write_settings(tmp_path, PUBLISHED)  # where both are there, transformers reads the nested one
    assert ImageConfig.from_pretrained(tmp_path).merge_size == 1
    write_settings(tmp_path, {"processor_class": "Qwen2VLProcessor"}, "processor_config.json")
    assert ImageConfig.from_pretrained(tmp_path).merge_size == 2


def test_image_config_names_an_unknown_field(tmp_path):
    write_settings(tmp_path, PUBLISHED | {"do_sharpen": True, "crop_size": None, "do_pad": False})
    with pytest.warns(UserWarning, match="unknown field: do_sharpen") as caught:
        ImageConfig.from_pretrained(tmp_path)
    assert len(caught) == 1


def test_image_config_names_missing_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no preprocessor_config.json in {tmp_path}"):
        ImageConfig.from_pretrained(tmp_path)


def test_image_config_refuses_min_pixels_above_max_pixels():
    with pytest.raises(ValueError, match="min_pixels: expected at most max_pixels 784, got 3136"):
        ImageConfig(max_pixels=784)


# --- batches ---


@pytest.fixture(scope="module")
def folder(qwen_tokenizer_folder, tmp_path_factory):
    folder = shutil.copytree(
        qwen_tokenizer_folder, tmp_path_factory.mktemp("checkpoint") / "folder"
    )
    return write_settings(folder, PUBLISHED)


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


def ask(*items, text="Describe this image."):
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def image(name, **more):
    return {"type": "image", "image": PICTURES[name], **more}


def conversations():
    clip = [draw_pixels(56, 84), draw_pixels(56, 84)[::-1], draw_pixels(56, 84)[:, ::-1]]
    return [
        ask(image("RGB")),
        [{"role": "user", "content": "who are you?"}],
        [
            *ask(image("280×280"), image("42×70"), text="What is the same?"),
            {"role": "assistant", "content": "Nothing."},
            *ask(image("P"), {"type": "video", "video": clip}, text="And now? 好"),
        ],
    ]


def test_processor_returns_a_batch_of_one_image(processor):
    batch = processor(ask(image("517×333")))
    pixel_values, grid = preprocess_images([PICTURES["517×333"]], ImageConfig(max_pixels=12845056))
    assert_same_bits(batch.pixel_values, pixel_values)
    assert_same_bits(batch.image_grid_thw, grid)
    assert grid.tolist() == [[1, 36, 24]]  # 504×336 pixels
    ids = batch.input_ids[0].tolist()
    start, end, pad = (
        processor.tokenizer.token_id(f"<|{name}|>")
        for name in ("vision_start", "vision_end", "image_pad")
    )
    assert ids[ids.index(start) : ids.index(end) + 1] == [start] + [pad] * (36 * 24 // 4) + [end]
    assert ids.count(pad) == 216
    assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64
    assert batch.attention_mask.tolist() == [[1] * len(ids)]
    assert batch.pixel_values_videos is None
    assert batch.video_grid_thw is None


def test_processor_returns_a_batch_of_text_only(processor):
    batch = processor([{"role": "user", "content": "who are you?"}])
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nwho are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert batch.input_ids.tolist() == [processor.tokenizer.encode(prompt)]
    vision = (
        batch.pixel_values,
        batch.image_grid_thw,
        batch.pixel_values_videos,
        batch.video_grid_thw,
    )
    assert vision == (None,) * 4


@pytest.mark.slow
def test_processor_ids_equal_reference_tokenizer(processor, folder):
    """The reference repeats the placeholders in the text, tokenizes all texts, pads on the left."""
    reference = Qwen2Tokenizer.from_pretrained(folder)
    batch = processor(conversations())
    media = [("<|image_pad|>", batch.image_grid_thw), ("<|video_pad|>", batch.video_grid_thw)]
    texts = [processor.tokenizer.apply_chat_template(messages) for messages in conversations()]
    for pad, grids in media:
        counts = iter(math.prod(grid) // 4 for grid in grids.tolist())
        for row, text in enumerate(texts):
            pieces = text.split(pad)
            texts[row] = pieces[0] + "".join(pad * next(counts) + piece for piece in pieces[1:])
    expected = reference(texts, padding=True, return_tensors="np")
    assert np.array_equal(batch.input_ids, expected["input_ids"])
    assert np.array_equal(batch.attention_mask, expected["attention_mask"])


def test_processor_gives_each_sequence_as_alone(processor):
    together = processor(conversations())
    rows = [processor(messages) for messages in conversations()]
    longest = together.input_ids.shape[1]
    for n, row in enumerate(rows):
        missing = longest - row.input_ids.shape[1]
        assert together.attention_mask[n].tolist() == [0] * missing + [1] * (longest - missing)
        assert together.input_ids[n].tolist() == [151643] * missing + row.input_ids[0].tolist()
    assert {longest - row.input_ids.shape[1] for row in rows} > {
        0
    }  # some sequence was padded, and one was not
    assert_same_bits(
        together.pixel_values, np.concatenate([rows[0].pixel_values, rows[2].pixel_values])
    )
    assert_same_bits(
        together.image_grid_thw, np.concatenate([rows[0].image_grid_thw, rows[2].image_grid_thw])
    )
    assert_same_bits(together.pixel_values_videos, rows[2].pixel_values_videos)
    assert together.video_grid_thw.tolist() == [
        [2, 20, 28]
    ]  # frames are enlarged to at least 128 tokens each


def test_processor_accepts_a_list_with_one_conversation(processor):
    one, listed = processor(ask(image("RGB"))), processor([ask(image("RGB"))])
    assert_same_bits(one.input_ids, listed.input_ids)
    assert_same_bits(one.pixel_values, listed.pixel_values)


def test_processor_accepts_options_of_the_prompt(processor):
    decoded = processor.tokenizer.decode
    batch = processor(ask(image("28×28")), add_generation_prompt=False, add_vision_id=True)
    text = decoded(batch.input_ids[0], skip_special_tokens=False)
    assert text.endswith(
        "Picture 1: <|vision_start|>"
        + "<|image_pad|>" * 4
        + "<|vision_end|>Describe this image.<|im_end|>\n"
    )


def test_processor_accepts_each_key_of_an_image(processor, tmp_path):
    path = tmp_path / "x.png"
    PICTURES["RGB"].save(path)
    expected = processor(ask(image("RGB")))
    for item in (
        {"type": "image", "image": str(path)},
        {"image": path},
        {"type": "image", "image": path.as_uri()},
        {"type": "image_url", "image_url": {"url": str(path)}},
        {"type": "image_url", "image_url": str(path)},
        {"type": "image", "image": None, "image_url": path},
        {"type": "image", "url": str(path)},
        {"type": "image", "path": str(path)},
    ):
        batch = processor(ask(item))
        assert_same_bits(batch.pixel_values, expected.pixel_values)
        assert_same_bits(batch.input_ids, expected.input_ids)


@pytest.mark.slow
def test_processor_accepts_bounds_for_all_images(folder):
    assert Processor.from_pretrained(folder).image_config.max_pixels == 12845056
    small = Processor.from_pretrained(folder, min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    assert small(ask(image("517×333"))).image_grid_thw.tolist() == [[1, 6, 4]]
    assert small(ask(image("28×28"))).image_grid_thw.tolist() == [[1, 2, 2]]
    only_max = Processor.from_pretrained(folder, max_pixels=3136)
    assert (only_max.image_config.min_pixels, only_max.image_config.max_pixels) == (3136, 3136)


@pytest.mark.parametrize("name", ["P, alpha per colour", "CMYK", "RGBA"])
def test_processor_resizes_an_image_that_is_not_rgb_to_its_own_size(processor, name):
    batch = processor(ask(image(name, resized_height=112, resized_width=56)))
    by_hand = to_rgb(PICTURES[name]).resize((56, 112), Image.Resampling.BICUBIC)
    assert_same_bits(batch.pixel_values, preprocess_images([by_hand], ImageConfig())[0])


def test_processor_accepts_bounds_of_one_item(processor):
    batch = processor(
        ask(
            image("517×333", max_pixels=28 * 28 * 9),
            image("28×28", min_pixels=28 * 28 * 20),
            image("517×333", resized_height=100, resized_width=60),
            image("517×333"),
        )
    )
    assert batch.image_grid_thw.tolist() == [[1, 6, 4], [1, 10, 10], [1, 8, 4], [1, 36, 24]]
    counts = batch.input_ids[0].tolist().count(processor.tokenizer.token_id("<|image_pad|>"))
    assert counts == 6 + 25 + 8 + 216
    by_hand = PICTURES["517×333"].resize((56, 112), Image.Resampling.BICUBIC)
    assert_same_bits(batch.pixel_values[124:156], preprocess_images([by_hand], ImageConfig())[0])


@pytest.mark.parametrize(
    ("given_conversations", "error", "said"),
    [
        ([], ValueError, "expected a conversation"),
        ({"role": "user", "content": "Hi"}, ValueError, "expected a conversation"),
        ("Hi", ValueError, "expected a conversation"),
        (["Hi"], ValueError, "message 0 must be a dict"),
        ([{"role": "user"}], ValueError, "the content of message 0"),
        (ask({"type": "image"}), ValueError, "the image item names no image under any of image"),
        (
            ask({"type": "image", "image": "nowhere.png"}),
            FileNotFoundError,
            "no image at nowhere.png",
        ),
        (
            ask({"type": "image", "image_url": {"uri": "x.png"}}),
            ValueError,
            "the image item names no image under",
        ),
        (
            ask({"type": "image", "image": Image.new("RGB", (1, 201))}),
            ValueError,
            "the given Image: one side is more than 200 times",
        ),
        (
            ask({"type": "video", "fps": 1}),
            ValueError,
            "the video item names no video under any of video, url, path",
        ),
        (ask({"type": "video", "video": "nowhere.mp4"}), FileNotFoundError, "nowhere.mp4"),
    ],
)
def test_processor_refuses_malformed_conversations(processor, given_conversations, error, said):
    with pytest.raises(error, match=said):
        processor(given_conversations)


@pytest.mark.slow
def test_processor_expands_no_placeholder_in_a_text(processor):
    """What a user types is text: it adds neither image tokens nor images to the sequence."""
    picture = image("RGB")
    plain = processor([ask(picture), ask(picture)])
    typed = processor([ask(picture, text="<|image_pad|><|video_pad|><|im_end|>"), ask(picture)])
    image_pad = processor.tokenizer.token_id("<|image_pad|>")
    assert ((typed.input_ids == image_pad).sum(1) == (plain.input_ids == image_pad).sum(1)).all()
    assert np.array_equal(typed.image_grid_thw, plain.image_grid_thw)
    for name in ("<|video_pad|>", "<|im_end|>"):
        number = (typed.input_ids == processor.tokenizer.token_id(name)).sum(1)
        assert number.tolist() == ([0, 0] if "video" in name else [2, 2])
    assert "<|image_pad|><|video_pad|><|im_end|>" in processor.tokenizer.decode(typed.input_ids[0])


def test_processor_refuses_more_placeholders_than_media(processor):
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "An image: <|vision_start|><|image_pad|><|vision_end|>"},
    ]
    with pytest.raises(ValueError, match=r"image_pad"):
        processor(messages)


@pytest.mark.slow
def test_processor_can_be_shared_by_threads(processor, tmp_path):
    """Eight threads get the batches that one thread gets, each with its own images and text."""
    conversations = []
    for number in range(8):
        path = tmp_path / f"{number}.jpg"
        exif = Image.Exif()
        exif[0x0112] = number + 1
        Image.fromarray(draw_pixels(60 + number, 90)).save(path, exif=exif)
        conversations.append(ask({"type": "image", "image": path}, text=f"{number}<|im_end|>"))
    expected = [processor(messages) for messages in conversations]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(processor, conversations * 4))
    for number, batch in enumerate(found):
        assert_same_bits(batch.input_ids, expected[number % 8].input_ids)
        assert_same_bits(batch.pixel_values, expected[number % 8].pixel_values)


# --- malformed settings, and the processor of another checkpoint ---


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"size": 448}, "size: expected shortest_edge .*, got 448"),
        (
            {"size": {"height": 448, "width": 448}},
            r"size: expected shortest_edge .*, got \['height', 'width'\]",
        ),
        (
            {"size": {"shortest_edge": 3136}},
            "size: expected shortest_edge and longest_edge, got one of them",
        ),
        ({"size": [1, 2]}, "size: expected shortest_edge"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: expected a number or three, .*, got"),
        ({"image_mean": [0.5, 0.5, "x"]}, "image_mean: expected a number or three, .*, got"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std: expected a positive number or three"),
        ({"image_std": {"r": 1}}, "image_std: expected a positive number or three"),
        ({"do_resize": "yes"}, "do_resize: expected true or false, got 'yes'"),
        ({"patch_size": "14"}, "patch_size: expected a positive integer, got '14'"),
        ({"patch_size": 0}, "patch_size: expected a positive integer, got 0"),
        ({"merge_size": 2.5}, "merge_size: expected a positive integer, got 2.5"),
        ({"min_pixels": [1]}, "min_pixels: expected a positive integer, got"),
        ({"max_pixels": 100}, "min_pixels: expected at most max_pixels 100, got 3136"),
        (
            {"rescale_factor": None, "resample": 77},
            "resample: expected a filter of Pillow, 0 to 5, got 77",
        ),
        ({"rescale_factor": float("nan")}, "rescale_factor: expected a positive number, got nan"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_image_config_names_file_and_field_of_a_malformed_setting(
    tmp_path, fields, sentence, nested
):
    name = "processor_config.json" if nested else "preprocessor_config.json"
    write_settings(tmp_path, {"image_processor": fields} if nested else fields, name)
    with pytest.raises(ValueError, match=f"{name}: {sentence}") as caught:
        ImageConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_image_config_converts_floats_that_are_integers(tmp_path):
    config = ImageConfig.from_pretrained(write_settings(tmp_path, {"min_pixels": 3200.0}))
    assert config.min_pixels == 3200
    assert isinstance(config.min_pixels, int)


def test_image_config_ignores_video_settings(tmp_path):
    write_settings(tmp_path, PUBLISHED)
    expected = ImageConfig.from_pretrained(tmp_path)
    write_settings(tmp_path, {"merge_size": 1}, "video_preprocessor_config.json")
    assert ImageConfig.from_pretrained(tmp_path) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": "many"},
        {"min_pixels": 0},
        {"max_pixels": True},
        {"resized_height": "x", "resized_width": 56},
        {"resized_height": -28, "resized_width": 56},
    ],
)
def test_processor_refuses_a_malformed_option_of_an_item(processor, options):
    with pytest.raises(ValueError, match=r"(pixels|resized_height): expected a positive integer"):
        processor(ask(image("RGB", **options)))


SHAPES = Path(command.__file__).parent / "examples" / "shapes.png"
QUESTION = ["--quiet", "--image", str(SHAPES), "--prompt", "How many shapes are there?"]


@pytest.fixture
def weights_alone(tmp_path):
    """The bundled checkpoint as some are published: without tokenizer and image settings."""
    names = ("config.json", "generation_config.json", "model.safetensors")
    for name in names:
        shutil.copy(BUNDLED_CHECKPOINT / name, tmp_path / name)
    return tmp_path


def test_main_takes_a_missing_processor_from_its_option(weights_alone, capsys):
    options = ["--model", str(weights_alone), "--processor", str(BUNDLED_CHECKPOINT)]
    assert command.main([*QUESTION, *options]) == 0
    assert capsys.readouterr().out == "Four.\n"


def test_main_names_the_option_for_a_missing_processor(weights_alone, capsys):
    assert command.main([*QUESTION, "--model", str(weights_alone)]) == 2
    error = capsys.readouterr().err
    assert "there is no tokenizer.json in" in error
    assert "--processor" in error
    shutil.copy(BUNDLED_CHECKPOINT / "tokenizer.json", weights_alone)
    shutil.copy(BUNDLED_CHECKPOINT / "tokenizer_config.json", weights_alone)
    assert command.main([*QUESTION, "--model", str(weights_alone)]) == 2
    error = capsys.readouterr().err
    assert "no preprocessor_config.json in" in error
    assert "--processor" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_main_refuses_a_processor_of_another_vocabulary(folder, capsys):
    assert command.main([*QUESTION, "--processor", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "the id of <|image_pad|> is 151655 in the processor, but" in error
    assert error.count("\n") == 1


def test_main_refuses_a_processor_of_other_patches(tmp_path, capsys):
    folder = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "folder")
    (folder / "processor_config.json").unlink(missing_ok=True)
    write_settings(folder, {"merge_size": 1})
    assert command.main([*QUESTION, "--processor", str(folder)]) == 2
    assert "merge_size is 1 in the processor, but 2 in the model's" in capsys.readouterr().err


@pytest.mark.parametrize("bound", [2**29, 10**13, 2**31 - 1])
def test_processor_refuses_sizes_beyond_any_memory(processor, bound):
    """Found before anything of that size is made."""
    image = Image.new("RGB", (200, 136))
    bounds = {"min_pixels": bound, "max_pixels": bound}
    sentence = r"gives more than 268,435,456 pixels: lower min_pixels"
    items = [
        {"type": "image", "image": image} | bounds,
        {"type": "image", "image": image, "resized_height": 136, "resized_width": 200} | bounds,
        {"type": "video", "video": [image, image], "min_pixels": bound},
    ]
    for item in items:
        with pytest.raises(ValueError, match=sentence):
            processor.prepare(item)
