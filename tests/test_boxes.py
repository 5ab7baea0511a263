"""extras/boxes.py: boxes out of an answer, into pixels, onto the picture."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

import generate
from extras import boxes
from extras.boxes import Box, check_path, draw, find_boxes, format_box, save
from generate import TINY
from tokenizer import StreamDecoder, Tokenizer

PICTURE = TINY.parent.parent / "examples" / "shapes.png"  # 200×136 pixels
REF, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX, BOX_END, QUAD, QUAD_END = "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"
ANSWER = f"{REF}the red circle{REF_END}{BOX}(120,340),(560,780){BOX_END}"
FIRST_COLOUR = ImageColor.getrgb("hsl(0, 100%, 70%)")
CIRCLE = Box("the red circle", 120, 340, 560, 780)

# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER, [CIRCLE]),
        (f"I see {ANSWER}.<|im_end|>", [CIRCLE]),
        (f"{BOX}(1,2),(3,4){BOX_END}", [Box("", 1, 2, 3, 4)]),
        (f"{REF} a\ncat {REF_END} is at {BOX} ( 1 , 2 ) , (3,4)\n{BOX_END}", [Box("a cat", 1, 2, 3, 4)]),
        (ANSWER + f"{BOX}(1,2),(3,4){BOX_END}", [CIRCLE, Box("the red circle", 1, 2, 3, 4)]),
        (f"{BOX}(1,2),(3,4), (5,6),(7,8) (9,10),(11,12){BOX_END}",
         [Box("", 1, 2, 3, 4), Box("", 5, 6, 7, 8), Box("", 9, 10, 11, 12)]),
        (f"{REF}A{REF_END}{BOX}(1,2),(3,4){BOX_END}, {REF}Ж{REF_END}{BOX}(5,6),(7,8){BOX_END}",
         [Box("A", 1, 2, 3, 4), Box("Ж", 5, 6, 7, 8)]),
        (f"{BOX}(30,4),(1,20){BOX_END}", [Box("", 1, 4, 30, 20)]),
        (f"{BOX}(0,0),(1000,1000){BOX_END}", [Box("", 0, 0, 1000, 1000)]),
        (f"{REF}sign{REF_END}{QUAD}(50,10),(90,40),(60,80),(20,30){QUAD_END}", [Box("sign", 20, 10, 90, 80)]),
        ("A red circle at (1,2),(3,4).", []),
        (f"{REF}a name alone{REF_END}", []),
        ("", []),
    ],
)  # fmt: skip
def test_boxes_are_found(text, expected):
    with warnings.catch_warnings(action="error"):
        assert find_boxes(text) == expected


@pytest.mark.parametrize(
    "inside",
    ["", "(1,2)", "(1,2),(3,4),(5,6)", "(1,2),(3,1001)", "(1,2),(3,x)", "(1,2),(3,4.5)", "(-1,2),(3,4)", "1,2,3,4",
     "(1,2,3,4)", "(1,2),(3,4) or so", "(1,2),(3," + "4" * 5000 + ")", "(1,2),(3,4),(٣,٤)"],
)  # fmt: skip
def test_a_box_that_cannot_be_read_is_left_out_with_a_warning_and_the_others_stay(inside):
    with pytest.warns(UserWarning, match="left out a box of the answer that cannot be read"):
        assert find_boxes(f"{REF}x{REF_END}{BOX}{inside}{BOX_END}{ANSWER}") == [CIRCLE]


def test_an_answer_cut_off_within_a_box_loses_that_box_only():
    answer = ANSWER + ANSWER.replace("circle", "star")
    for end in range(len(ANSWER), len(answer)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert find_boxes(answer[:end]) == [CIRCLE]
        assert len(caught) == (BOX in answer[len(ANSWER) : end]), answer[:end]


def test_a_quad_needs_four_points_and_its_own_end():
    with pytest.warns(UserWarning, match="left out a quad"):
        assert find_boxes(f"{QUAD}(1,2),(3,4){QUAD_END}") == []
    with pytest.warns(UserWarning, match="left out a quad"):
        assert find_boxes(f"{QUAD}(1,2),(3,4),(5,6),(7,8){BOX_END}") == []


coordinate = st.integers(0, 1000)
label = st.text().map(lambda text: " ".join(text.split())).filter(lambda text: "<" not in text)
box = st.builds(Box, label, coordinate, coordinate, coordinate, coordinate)
box = box.map(
    lambda b: Box(b.label, min(b.x1, b.x2), min(b.y1, b.y2), max(b.x1, b.x2), max(b.y1, b.y2))
)
tokens = st.sampled_from(
    [REF, REF_END, BOX, BOX_END, QUAD, QUAD_END, "(1,2)", "(1001,5)", "(", ")", ",", " ", "77"]
)


@given(st.lists(box))
def test_boxes_that_are_written_out_are_found_again(expected):
    text, name = "", ""
    for b in expected:
        text += f"{REF}{b.label}{REF_END}" if b.label != name else ""
        text += f"{BOX}({b.x1},{b.y1}),({b.x2},{b.y2}){BOX_END}"
        name = b.label
    assert find_boxes(text) == expected


@given(st.lists(tokens | st.text(max_size=5)).map("".join))
@pytest.mark.filterwarnings("ignore:left out")
def test_any_text_gives_only_boxes_on_the_grid(text):
    for b in find_boxes(text):
        assert 0 <= b.x1 <= b.x2 <= 1000
        assert 0 <= b.y1 <= b.y2 <= 1000


@pytest.mark.parametrize("name", ["the red circle", "a 'quoted' thing", "红色的圆", "кот 🐈"])
def test_boxes_survive_the_tokenizer_also_token_by_token(name):
    tokenizer = Tokenizer.from_pretrained(TINY)
    ids = tokenizer.encode(ANSWER.replace("the red circle", name) + "<|im_end|>")
    words = StreamDecoder(tokenizer, skip_special_tokens=False)
    streamed = "".join(words.push(id) for id in ids) + words.finish()
    for text in (tokenizer.decode(ids, skip_special_tokens=False), streamed):
        assert find_boxes(text) == [CIRCLE._replace(label=name)]
    assert (
        find_boxes(tokenizer.decode(ids)) == []
    )  # without control tokens nothing says what a number is


# ---------------------------------------------------------------------------------------------------------- pixels


def test_the_grid_spans_the_whole_picture_in_both_directions():
    assert Box("", 0, 0, 1000, 1000).in_pixels(640, 480) == (0, 0, 640, 480)
    assert CIRCLE.in_pixels(200, 50) == pytest.approx((24, 17, 112, 39))


def test_corners_outside_or_in_the_wrong_order_are_mended():
    assert Box("", 1200, 900, -5, 300).in_pixels(100, 200) == (0, 60, 100, 180)


def test_a_line_for_the_terminal():
    assert format_box(CIRCLE, 100, 100) == "the red circle: (12, 34) to (56, 78)"
    assert format_box(Box("", 0, 0, 1000, 500), 640, 480) == "(0, 0) to (640, 240)"


# --------------------------------------------------------------------------------------------------------- drawing


def count(picture, colour):
    return {pixel: n for n, pixel in picture.getcolors(picture.width * picture.height)}[colour]


def test_a_box_is_drawn_within_its_pixels_and_the_picture_stays_as_it_was():
    picture = Image.new("RGB", (400, 200), "white")
    drawn = draw(picture, [Box("", 250, 250, 750, 750)])
    assert picture.getcolors() == [(400 * 200, (255, 255, 255))]
    [colour] = {pixel for _, pixel in drawn.getcolors()} - {(0, 0, 0), (255, 255, 255)}
    inked = (
        drawn.point(lambda value: 255 * (value != 255))
        .convert("L")
        .point(lambda value: 255 * (value > 0))
    )
    assert inked.getbbox() == (99, 49, 301, 151)  # one black pixel around 100…300, 50…150
    for x, y in ((100, 50), (299, 149), (100, 149), (299, 50), (200, 50)):
        assert drawn.getpixel((x, y)) == colour
    assert {drawn.getpixel(place) for place in ((99, 100), (101, 100), (300, 100), (298, 100))} == {
        (0, 0, 0)
    }
    assert drawn.getpixel((200, 100)) == (255, 255, 255)


@pytest.mark.parametrize(
    "edge", [Box("", 0, 0, 1000, 1000), Box("", 1000, 1000, 1000, 1000), Box("", 0, 0, 0, 0)]
)
@pytest.mark.parametrize("size", [(1, 1), (100, 60), (3000, 20)])
def test_a_box_at_the_border_can_be_seen(edge, size):
    drawn = draw(Image.new("RGB", size, "black"), [edge])
    assert max(high for _, high in drawn.getextrema()) > 200
    assert draw(drawn, [edge._replace(label="a label")]).size == size


def test_each_label_has_its_own_light_colour():
    column = [Box(f"label {i}", 0, 33 * i + 15, 1000, 33 * i + 30) for i in range(30)]
    drawn = draw(Image.new("RGB", (300, 3000)), column)
    colours = [drawn.getpixel((299, 99 * i + 89)) for i in range(30)]  # the last pixel of each box
    assert len(set(colours)) == 30
    for colour in colours:
        linear = [
            (c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour
        ]
        luminance = sum(
            weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )
        assert (
            luminance + 0.05
        ) / 0.05 >= 4.5  # WCAG 2.1: contrast of normal text, here with black


@pytest.mark.parametrize("place", [(0, 0), (1000, 0), (0, 1000), (1000, 1000), (990, 500)])
def test_a_label_stays_whole_inside_the_picture(place):
    def area_of_plate(x, y):
        drawn = draw(Image.new("RGB", (200, 200), "white"), [Box("a label", x, y, x, y)])
        return count(drawn, FIRST_COLOUR)

    assert area_of_plate(*place) == pytest.approx(
        area_of_plate(500, 500), abs=3
    )  # it may cover the point itself


def test_labels_of_equal_boxes_do_not_cover_each_other():
    picture, box = Image.new("RGB", (300, 300), "white"), Box("same", 300, 300, 700, 700)
    answers = [box._replace(label="")], [box], [box, box]
    none, one, two = (count(draw(picture, found), FIRST_COLOUR) for found in answers)
    assert two - none == pytest.approx(2 * (one - none), rel=0.1)


@given(st.text("abc dWi", max_size=80), st.integers(15, 300))
def test_a_long_label_is_shortened_to_the_width(text, width):
    font = boxes.load_font(None, 12)
    short = boxes.shorten(text, font, width)
    assert font.getlength(short) <= width
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]))


def test_a_label_without_a_font_for_it_is_drawn_as_its_number(monkeypatch):
    monkeypatch.setattr(boxes, "FONTS", ("no-such-font.ttf",))
    picture = Image.new("RGB", (100, 100), "white")
    first = Box("", 0, 0, 100, 100)
    with pytest.warns(UserWarning, match="no font has all letters of '圆', so it is drawn as 2"):
        drawn = draw(picture, [first, Box("圆", 500, 500, 900, 900)])
    assert drawn.tobytes() == draw(picture, [first, Box("2", 500, 500, 900, 900)]).tobytes()


def test_another_font_is_taken_for_letters_that_the_first_lacks(monkeypatch):
    own = boxes.load_font(None, 12)
    other = object()
    monkeypatch.setattr(
        boxes, "load_font", lambda name, size: other if name == boxes.FONTS[1] else own
    )
    monkeypatch.setattr(boxes, "has_letters", lambda font, text: font is other or text.isascii())
    assert boxes.font_for("plain", 12) is own
    assert boxes.font_for("é", 12) is other


def test_it_is_known_which_letters_a_font_has():
    font = boxes.load_font(None, 12)
    assert boxes.has_letters(font, "Any ASCII, {}~ 019")
    for text in ("圆", "a圆", "a\nb"):
        assert not boxes.has_letters(font, text)


def test_what_is_transparent_is_drawn_white():
    drawn = draw(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), [])
    assert (drawn.mode, drawn.getcolors()) == ("RGB", [(2500, (255, 255, 255))])


# ---------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    ("name", "format"), [("out.png", "PNG"), ("out.JPG", "JPEG"), ("out.webp", "WEBP")]
)
def test_the_ending_decides_the_format(tmp_path, name, format):
    save(Image.new("RGB", (60, 40)), [CIRCLE], tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert (written.format, written.size) == (format, (60, 40))


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.txt", ".png"])
def test_an_unknown_ending_is_said_before_anything_is_written(tmp_path, name):
    for function in (check_path, lambda path: save(Image.new("RGB", (60, 40)), [], path)):
        with pytest.raises(ValueError, match=f"{name}: its ending names no known picture format"):
            function(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    picture = Image.new("RGB", (60, 40))
    with pytest.raises(
        FileNotFoundError, match=r"cannot write .*out\.png: there is no folder .*missing"
    ):
        save(picture, [], tmp_path / "missing" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match=r"^cannot write .*folder\.png: Is a directory$"):
        save(picture, [], tmp_path / "folder.png")
    with pytest.raises(OSError, match=r"^cannot write .*out\.xbm: cannot write mode RGB as XBM$"):
        save(picture, [], tmp_path / "out.xbm")


# ---------------------------------------------------------------------------------------------------- command line


def test_an_answer_is_said_in_pixels_and_drawn(monkeypatch, tmp_path, capsys):
    tokens = Tokenizer.from_pretrained(TINY).encode(
        ANSWER + "<|im_end|>"
    )  # the bundled model has not learned boxes
    steps = [generate.Step([token], None) for token in tokens]
    monkeypatch.setattr(generate, "generate_steps", lambda *_: iter(steps))
    assert generate.main(["--image", str(PICTURE), "--draw", str(tmp_path / "out.png")]) == 0
    out, err = capsys.readouterr()
    assert out == "the red circle(120,340),(560,780)\n"
    assert "\nthe red circle: (24, 46) to (112, 106) (pixels)\n" in err
    with Image.open(PICTURE) as picture, Image.open(tmp_path / "out.png") as drawn:
        assert drawn.tobytes() == draw(picture, [CIRCLE]).tobytes()
