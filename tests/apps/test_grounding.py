"""apps/grounding.py: boxes from an answer, in pixels, drawn on the image."""

import errno
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageColor

import command_line
from apps import grounding
from apps.grounding import Box, check_image_path, draw, find_boxes, format_box, main
from command_line import BUNDLED_CHECKPOINT
from tokenizer import StreamDecoder, Tokenizer

IMAGE = BUNDLED_CHECKPOINT.parent.parent / "examples" / "shapes.png"  # 200×136 pixels
REF, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX, BOX_END = "<|box_start|>", "<|box_end|>"
ANSWER = f"{REF}the red circle{REF_END}{BOX}(120,340),(560,780){BOX_END}"
FIRST_COLOR = ImageColor.getrgb("hsl(0, 100%, 70%)")
CIRCLE = Box("the red circle", 120, 340, 560, 780)

# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER, [CIRCLE]),
        (f"I see {ANSWER}.<|im_end|>", [CIRCLE]),
        (f"{BOX}(1,2),(3,4){BOX_END}", [Box("", 1, 2, 3, 4)]),
        (
            f"{REF} a\ncat {REF_END} is at {BOX} ( 1 , 2 ) , (3,4)\n{BOX_END}",
            [Box("a cat", 1, 2, 3, 4)],
        ),
        (ANSWER + f"{BOX}(1,2),(3,4){BOX_END}", [CIRCLE, Box("the red circle", 1, 2, 3, 4)]),
        (
            f"{BOX}(1,2),(3,4), (5,6),(7,8) (9,10),(11,12){BOX_END}",
            [Box("", 1, 2, 3, 4), Box("", 5, 6, 7, 8), Box("", 9, 10, 11, 12)],
        ),
        (
            f"{REF}A{REF_END}{BOX}(1,2),(3,4){BOX_END}, {REF}Ж{REF_END}{BOX}(5,6),(7,8){BOX_END}",
            [Box("A", 1, 2, 3, 4), Box("Ж", 5, 6, 7, 8)],
        ),
        (f"{BOX}(30,4),(1,20){BOX_END}", [Box("", 1, 4, 30, 20)]),
        (f"{BOX}(0,0),(1000,1000){BOX_END}", [Box("", 0, 0, 1000, 1000)]),
        ("A red circle at (1,2),(3,4).", []),
        (f"{REF}a name alone{REF_END}", []),
        ("", []),
    ],
)
def test_find_boxes_returns_labels_and_corners(text, expected):
    with warnings.catch_warnings(action="error"):
        assert find_boxes(text) == expected


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "(1,2)",
        "(1,2),(3,4),(5,6)",
        "(1,2),(3,1001)",
        "(1,2),(3,x)",
        "(1,2),(3,4.5)",
        "(-1,2),(3,4)",
        "1,2,3,4",
        "(1,2,3,4)",
        "(1,2),(3,4) or so",
        "(1,2),(3," + "4" * 5000 + ")",
        "(1,2),(3,4),(٣,٤)",
    ],
)
def test_find_boxes_warns_about_a_malformed_box_and_returns_the_others(inside):
    with pytest.warns(UserWarning, match="left out a malformed box"):
        assert find_boxes(f"{REF}x{REF_END}{BOX}{inside}{BOX_END}{ANSWER}") == [CIRCLE]


def test_find_boxes_leaves_out_only_the_box_that_is_cut_off():
    answer = ANSWER + ANSWER.replace("circle", "star")
    for end in range(len(ANSWER), len(answer)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert find_boxes(answer[:end]) == [CIRCLE]
        assert len(caught) == (BOX in answer[len(ANSWER) : end]), answer[:end]


coordinate = st.integers(0, 1000)
label = st.text().map(lambda text: " ".join(text.split())).filter(lambda text: "<" not in text)
box = st.builds(Box, label, coordinate, coordinate, coordinate, coordinate)
box = box.map(
    lambda b: Box(b.label, min(b.x1, b.x2), min(b.y1, b.y2), max(b.x1, b.x2), max(b.y1, b.y2))
)
tokens = st.sampled_from(
    [REF, REF_END, BOX, BOX_END, "(1,2)", "(1001,5)", "(", ")", ",", " ", "77"]
)


@pytest.mark.slow
@given(st.lists(box))
def test_find_boxes_inverts_the_format_of_boxes(expected):
    text, name = "", ""
    for b in expected:
        text += f"{REF}{b.label}{REF_END}" if b.label != name else ""
        text += f"{BOX}({b.x1},{b.y1}),({b.x2},{b.y2}){BOX_END}"
        name = b.label
    assert find_boxes(text) == expected


@pytest.mark.slow
@given(st.lists(tokens | st.text(max_size=5)).map("".join))
@pytest.mark.filterwarnings("ignore:left out")
def test_find_boxes_of_any_text_are_on_the_grid(text):
    for b in find_boxes(text):
        assert 0 <= b.x1 <= b.x2 <= 1000
        assert 0 <= b.y1 <= b.y2 <= 1000


@pytest.mark.parametrize("name", ["the red circle", "a 'quoted' thing", "红色的圆", "кот 🐈"])
def test_find_boxes_reads_decoded_and_streamed_answers(name):
    tokenizer = Tokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    ids = tokenizer.encode(ANSWER.replace("the red circle", name) + "<|im_end|>")
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    streamed = "".join(decoder.push(id) for id in ids) + decoder.finish()
    for text in (tokenizer.decode(ids, skip_special_tokens=False), streamed):
        assert find_boxes(text) == [CIRCLE._replace(label=name)]
    assert find_boxes(tokenizer.decode(ids)) == []  # without special tokens


# ------------------------------------------------------------------------------------------- pixels


def test_in_pixels_scales_to_the_whole_image():
    assert Box("", 0, 0, 1000, 1000).in_pixels(640, 480) == (0, 0, 640, 480)
    assert CIRCLE.in_pixels(210, 50) == pytest.approx((25.2, 17, 117.6, 39))


def test_format_box_rounds_to_pixels():
    assert format_box(CIRCLE, 100, 100) == "the red circle: (12, 34) to (56, 78)"
    assert format_box(Box("", 0, 0, 1000, 500), 640, 480) == "(0, 0) to (640, 240)"


# ------------------------------------------------------------------------------------------ drawing


def count(image, color):
    return {pixel: n for n, pixel in image.getcolors(image.width * image.height)}[color]


def test_draw_keeps_to_the_pixels_of_the_box_and_leaves_its_input_unchanged():
    image = Image.new("RGB", (400, 200), "white")
    drawn = draw(image, [Box("", 250, 250, 750, 750)])
    assert image.getcolors() == [(400 * 200, (255, 255, 255))]
    [color] = {pixel for _, pixel in drawn.getcolors()} - {(0, 0, 0), (255, 255, 255)}
    inked = drawn.point(lambda value: 255 * (value != 255)).convert("L")
    inked = inked.point(lambda value: 255 * (value > 0))
    assert inked.getbbox() == (100, 50, 300, 150)
    for corner in ((100, 50), (299, 149), (100, 149), (299, 50), (200, 50)):
        assert drawn.getpixel(corner) == color
    for edge in ((101, 100), (298, 100), (200, 51), (200, 148)):  # black, inside the colored line
        assert drawn.getpixel(edge) == (0, 0, 0)
    assert drawn.getpixel((200, 100)) == (255, 255, 255)


@pytest.mark.parametrize(
    "box", [Box("", 0, 0, 1000, 1000), Box("", 1000, 1000, 1000, 1000), Box("", 0, 0, 0, 0)]
)
@pytest.mark.parametrize("size", [(1, 1), (100, 60), (3000, 20)])
def test_draw_makes_a_box_at_the_border_visible(box, size):
    drawn = draw(Image.new("RGB", size, "black"), [box])
    assert max(high for _, high in drawn.getextrema()) > 200
    assert draw(drawn, [box._replace(label="a label")]).size == size


def test_draw_gives_each_label_its_own_light_color():
    column = [Box(f"label {i}", 0, 33 * i + 15, 1000, 33 * i + 30) for i in range(30)]
    drawn = draw(Image.new("RGB", (300, 3000)), column)
    colors = [drawn.getpixel((299, 99 * i + 70)) for i in range(30)]  # on each right edge
    assert len(set(colors)) == 30
    for color in colors:
        linear = []
        for c in color:
            linear.append(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4)
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (luminance + 0.05) / 0.05 >= 4.5  # WCAG 2.1: contrast of normal text to black


@pytest.mark.parametrize("corner", [(0, 0), (1000, 0), (0, 1000), (1000, 1000), (990, 500)])
def test_draw_keeps_a_label_inside_the_image(corner):
    def plate_area(x, y):
        drawn = draw(Image.new("RGB", (200, 200), "white"), [Box("a label", x, y, x, y)])
        return count(drawn, FIRST_COLOR)

    assert plate_area(*corner) == pytest.approx(plate_area(500, 500), abs=3)


def test_draw_shows_the_label_of_a_box_as_high_as_the_image():
    image = Image.new("RGB", (200, 200), "white")
    whole = Box("a label", 0, 0, 1000, 1000)
    plate = ImageChops.difference(draw(image, [whole]), draw(image, [whole._replace(label="")]))
    assert plate.getbbox()[3] > 190


@pytest.mark.parametrize("label", ["圆", "a圆", "кот", "é", "a\nb"])
def test_draw_replaces_a_label_that_the_font_lacks_by_its_number(label):
    image = Image.new("RGB", (100, 100), "white")
    first = Box("", 0, 0, 100, 100)
    with pytest.warns(UserWarning, match="the font lacks letters of .*, drawn as 2 instead"):
        drawn = draw(image, [first, Box(label, 500, 500, 900, 900)])
    assert drawn.tobytes() == draw(image, [first, Box("2", 500, 500, 900, 900)]).tobytes()


def test_draw_writes_printable_ascii_without_a_warning():
    label = "".join(map(chr, range(32, 127)))
    with warnings.catch_warnings(action="error"):
        draw(Image.new("RGB", (100, 100)), [Box(label, 0, 0, 500, 500)])


def test_draw_composites_transparency_on_white():
    drawn = draw(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), [])
    assert (drawn.mode, drawn.getcolors()) == ("RGB", [(2500, (255, 255, 255))])


# ------------------------------------------------------------------------------------- output path


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.txt", ".png"])
def test_check_image_path_refuses_an_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected the suffix of an image format"):
        check_image_path(str(tmp_path / name))


# ------------------------------------------------------------------------------------------ program


@pytest.fixture
def answer(monkeypatch):
    """Make the model give a certain answer."""

    def set_answer(text):
        tokens = Tokenizer.from_pretrained(BUNDLED_CHECKPOINT).encode(text + "<|im_end|>")
        monkeypatch.setattr(grounding, "generate", lambda *_: [tokens])

    return set_answer


@pytest.mark.parametrize(
    ("name", "image_format"), [("out.png", "PNG"), ("out.JPG", "JPEG"), ("out.webp", "WEBP")]
)
def test_main_prints_boxes_in_pixels_and_draws_them(answer, tmp_path, capsys, name, image_format):
    answer(ANSWER)
    assert main(["--image", str(IMAGE), "--out", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert out == "the red circle(120,340),(560,780)\nthe red circle: (24, 46) to (112, 106)\n"
    with Image.open(IMAGE) as image, Image.open(tmp_path / name) as drawn:
        assert (drawn.format, drawn.size) == (image_format, image.size)
        if image_format == "PNG":
            assert drawn.tobytes() == draw(image, [CIRCLE]).tobytes()


def fill_disk(monkeypatch):
    """Make each image that is saved meet a full disk."""

    def save(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)


def test_main_names_the_file_that_cannot_be_written(answer, tmp_path, capsys, monkeypatch):
    answer(ANSWER)
    fill_disk(monkeypatch)
    path = tmp_path / "full.png"
    assert main(["--image", str(IMAGE), "--out", str(path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error == f"apps.grounding: cannot write {path}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_main_replaces_a_drawing_with_force_alone(answer, tmp_path, capsys):
    answer(ANSWER)
    path = tmp_path / "boxes.png"
    path.write_bytes(b"mine")
    assert main(["--image", str(IMAGE), "--out", str(path)]) == 2
    assert "boxes.png exists: expected a new file" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    assert main(["--image", str(IMAGE), "--out", str(path), "--force"]) == 0
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"


def test_main_never_draws_over_its_image(answer, tmp_path, capsys):
    answer(ANSWER)
    image = tmp_path / "photo.png"
    image.write_bytes(IMAGE.read_bytes())
    link = tmp_path / "link.png"
    os.link(image, link)
    assert main(["--image", str(image), "--out", str(link), "--force"]) == 2
    assert "link.png, which is an input" in capsys.readouterr().err
    assert image.read_bytes() == IMAGE.read_bytes()


def test_main_finds_the_shape_in_an_image_of_the_examples(capsys):
    arguments = ["--image", str(IMAGE), "--prompt", "Find the red circle.", "--quiet"]
    assert main(arguments) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith("the red circle: (1")
    assert capsys.readouterr().err == ""


def test_main_writes_no_drawing_without_a_box(answer, tmp_path):
    answer("Four.")
    with pytest.warns(UserWarning, match=r"the answer has no box, so .*x\.png is not written"):
        assert main(["--image", str(IMAGE), "--out", str(tmp_path / "x.png"), "--quiet"]) == 0
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["x.nothing", "missing/x.png"])
def test_main_checks_the_output_path_before_loading_the_model(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(command_line, "load_model", None)
    assert main(["--image", str(IMAGE), "--out", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("apps.grounding: cannot write ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--prompt", "x"], ["--image", "x", "--image", "y"], ["--image", "x", "--video", "y"]],
)
def test_main_expects_exactly_one_image(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "expected exactly one --image" in capsys.readouterr().err
