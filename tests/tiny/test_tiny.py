"""The training data, the training, the score, the ablations and the checkpoint of tiny/."""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open

from generate import generate
from load_weights import load_model
from preprocess import ImageConfig, Processor, preprocess_images
from qwen2vl import KVCache, PatchMerger, Qwen2VL, get_rope_index
from tiny import ablations, batches, looks, run, scenes, score, train
from tiny.batches import Batches
from tiny.curriculum import CURRICULUM, LEGS, TOPICS, learning_rate
from tiny.folder import SPECIAL_TOKENS, make_config, make_tokenizer
from tiny.score import CHECKPOINT, Exam
from tiny.sizes import START, WHOLE, open_sizes, sizes
from tiny.wording import SYNONYMS, reword
from tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # it trains, or starts many processes

ROOT = Path(__file__).parents[2]
SEEDS = [*range(150), *range(scenes.TRAIN_SEEDS, scenes.TRAIN_SEEDS + 50)]
SKILLS = [skill for skills in scenes.SKILLS.values() for skill in skills]
BOXED = (
    r"<\|object_ref_start\|>the (.*)<\|object_ref_end\|>"
    r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>"
)


@pytest.fixture
def plain_words(monkeypatch):
    """Keep the questions of the open style in the words of scenes.py."""
    monkeypatch.setattr(scenes, "reword", lambda rng, question: question)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint directory before training: all files but the weights."""
    folder = tmp_path_factory.mktemp("folder")
    make_tokenizer(folder, samples=300)
    make_config(folder)
    return folder


# ------------------------------------------------------------------------------------------- images


def test_make_sample_returns_the_same_for_a_seed():
    for topic in scenes.SKILLS:
        for seed in range(10):
            first = scenes.make_sample(topic, seed)
            second = scenes.make_sample(topic, seed)
            assert first == second
            for a, b in zip(first.scenes, second.scenes, strict=True):
                assert scenes.draw(a).tobytes() == scenes.draw(b).tobytes()
        assert len({scenes.make_sample(topic, seed) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("shapes", "6d39011e2d84c819"),
        ("words", "fe2254d08b73bca0"),
        ("album", "7441d7e199220759"),
        ("clip", "1e7f84c47d2f2ce7"),
    ],
)
def test_make_sample_keeps_the_framed_evaluation(topic, expected):
    """A change in the order of the random draws would make another evaluation."""
    digest = hashlib.sha256()
    for seed in range(60):
        sample = scenes.make_sample(topic, seed)
        for scene in sample.scenes:
            digest.update(scenes.draw(scene).tobytes())
        digest.update(repr([pair.turns for pair in sample.qa_pairs]).encode())
    assert digest.hexdigest()[:16] == expected


def test_draw_paints_each_shape_at_its_place_in_its_color():
    for seed in SEEDS:
        [scene] = scenes.make_sample("shapes", seed).scenes
        image = scenes.draw(scene)
        assert image.size == (scene.width, scene.height)
        assert all(56 <= side <= 336 for side in image.size)
        numbers = [scenes.PLACES.index(shape.place) for shape in scene.shapes]
        assert numbers == sorted(set(numbers)), "expected reading order and one shape at a place"
        for shape in scene.shapes:
            left, top, right, bottom = shape.box
            assert 0 < left < right < scene.width
            assert 0 < top < bottom < scene.height
            x, y = center(shape)
            row = int(y / scene.height * 3)
            column = int(x / scene.width * 3)
            assert scenes.PLACES[row * 3 + column] == shape.place
            assert image.getpixel((int(x), int(y))) == scenes.COLORS[shape.color]


def painted_share(image, shape):
    """Return the share of a shape's box that has its color."""
    pixels = list(image.crop(shape.box).get_flattened_data())
    return sum(pixel == scenes.COLORS[shape.color] for pixel in pixels) / len(pixels)


def test_draw_fills_the_area_that_identifies_a_kind():
    expected = {
        "square": (0.99, 1),
        "circle": (0.65, 0.8),
        "triangle": (0.4, 0.5),
        "star": (0.15, 0.35),
    }
    assert set(expected) == set(scenes.KINDS)
    for seed in SEEDS:
        [scene] = scenes.make_sample("shapes", seed).scenes
        image = scenes.draw(scene)
        for shape in scene.shapes:
            low, high = expected[shape.kind]
            assert low <= painted_share(image, shape) <= high, (seed, shape)


def test_draw_prints_lines_inside_the_frame_in_their_color():
    for seed in SEEDS:
        [scene] = scenes.make_sample("words", seed).scenes
        image = scenes.draw(scene)
        blank = scenes.draw(replace(scene, lines=()))
        left, top, right, bottom = ImageChops.difference(image, blank).getbbox()
        assert left >= scenes.FRAME
        assert top >= scenes.FRAME
        assert right <= scene.width - scenes.FRAME
        assert bottom <= scene.height - scenes.FRAME
        for line in scene.lines:
            assert 1 <= len(line.text) <= 6
            assert set(line.text) <= set(scenes.LETTERS) or set(line.text) <= set(scenes.DIGITS)
            assert scenes.COLORS[line.color] in set(image.get_flattened_data())


def test_make_sample_starts_with_one_letter_in_each_token():
    for seed in range(scenes.TRAIN_SEEDS, scenes.TRAIN_SEEDS + 20):
        sample = scenes.make_sample("words", seed, (2, 6), START)
        [scene] = sample.scenes
        [pair] = sample.qa_pairs
        [line] = scene.lines
        assert pair.turns[0][1] == line.text
        ink = ImageChops.difference(scenes.draw(scene), scenes.draw(replace(scene, lines=())))
        for column, letter in enumerate(line.text):
            token = (28 * column, 0, 28 * column + 28, 56)
            left, top, right, bottom = ink.crop(token).getbbox()
            mask = scenes.printed(scenes.Line(letter, "black", line.size, 0, 0))
            assert (right - left, bottom - top) == mask.size


def test_make_sample_starts_with_one_place_in_each_token():
    for seed in range(scenes.TRAIN_SEEDS, scenes.TRAIN_SEEDS + 20):
        [scene] = scenes.make_sample("shapes", seed, (3, 3), START).scenes
        for shape in scene.shapes:
            x, y = center(shape)
            assert int(y / 28) * 3 + int(x / 28) == scenes.PLACES.index(shape.place)


@pytest.mark.parametrize("topic", scenes.SKILLS)
def test_make_sample_draws_images_that_are_resized_to_the_cells(topic, folder):
    config = ImageConfig.from_pretrained(folder)
    for rows, columns in sorted(set(sizes(topic))):
        samples = [scenes.make_sample(topic, seed, (rows, columns)) for seed in range(3)]
        images = [scenes.draw(sample.scenes[0]) for sample in samples]
        _, grids = preprocess_images(images, config)
        assert {tuple(grid) for grid in grids.tolist()} == {(1, 2 * rows, 2 * columns)}


# ------------------------------------------------------------------------------- images by anybody


def open_samples(topic, count=150, style="open"):
    return [scenes.make_sample(topic, seed, style=style) for seed in range(count)]


def still(scene):
    """Return the scene without noise and JPEG, which change pixels everywhere."""
    return replace(scene, look=replace(scene.look, noise=0, jpeg=0))


def test_open_shapes_fill_their_boxes_at_their_places():
    for sample in open_samples("shapes"):
        [scene] = sample.scenes
        blank = scenes.draw(still(replace(scene, shapes=())))
        for shape in scene.shapes:
            image = scenes.draw(still(replace(scene, shapes=(shape,))))
            assert ImageChops.difference(image, blank).getbbox() == pytest.approx(shape.box, abs=1)
            x, y = center(shape)
            row = int(y / scene.height * 3)
            column = int(x / scene.width * 3)
            assert scenes.PLACES[row * 3 + column] == shape.place


def test_open_shapes_contrast_with_what_is_around_them():
    """The colors are read from the pixels: the shape's where it covers them, the canvas's below."""
    for sample in open_samples("shapes"):
        [scene] = sample.scenes
        image = np.asarray(scenes.draw(still(scene)))
        blank = np.asarray(scenes.draw(still(replace(scene, shapes=(), look=unframed(scene)))))
        for shape in scene.shapes:
            left, top, right, bottom = shape.box
            covered = (image[top:bottom, left:right] == shape.paint.color).all(-1)
            assert covered.any(), (sample, shape)
            below = blank[top:bottom, left:right].reshape(-1, 3)
            for color in (below.min(0), below.max(0)):
                color = tuple(map(int, color))
                assert looks.color_distance(shape.paint.color, color) > 0.8 * looks.VISIBLE


def unframed(scene):
    return replace(scene.look, frame=0)


def test_color_distance_calls_similar_colors_similar():
    black = looks.color_distance((0, 0, 0), (34, 34, 34))
    navy = looks.color_distance((0, 0, 0), (0, 0, 128))
    opposite = looks.color_distance((0, 0, 0), (255, 255, 255))
    assert black < looks.VISIBLE < navy < opposite
    assert opposite == pytest.approx(765, abs=1)


def test_open_text_is_readable_and_inside_the_image():
    for sample in open_samples("words"):
        [scene] = sample.scenes
        blank = scenes.draw(still(replace(scene, lines=())))
        left, top, right, bottom = ImageChops.difference(scenes.draw(still(scene)), blank).getbbox()
        assert 0 < left < right < scene.width
        assert 0 < top < bottom < scene.height
        for line in scene.lines:
            assert line.shade in looks.SHADES[line.color]
            for color in looks.canvas_colors(scene.look):
                assert looks.color_distance(line.shade, color) >= 250


@pytest.mark.parametrize("topic", scenes.SKILLS)
def test_open_images_have_sizes_that_people_use(topic, folder):
    config = ImageConfig.from_pretrained(folder)
    sides = set()
    for cells in sorted(set(open_sizes(topic))):
        sample = scenes.make_sample(topic, sum(cells), cells, style="open")
        scene = sample.scenes[0]
        sides |= {scene.width, scene.height}
        assert scene.height <= 5 * scene.width
        assert scene.width <= 5 * scene.height
        if topic == "clip":
            [grid] = video_grids(folder, sample)
        else:
            _, [grid] = preprocess_images([scenes.draw(scene)], config)
        assert tuple(grid[1:]) == (2 * cells[0], 2 * cells[1])
    assert min(sides) >= 56
    assert max(sides) <= 448


def video_grids(folder, sample):
    messages = scenes.to_conversation(sample, sample.qa_pairs[:1])[:1]
    return Processor.from_pretrained(folder)([messages]).video_grid_thw


def test_open_videos_have_official_sizes_without_bounds_of_their_own():
    samples = open_samples("clip", 40)
    enlarged = [sample for sample in samples if sample.enlarged]
    assert 0 < len(enlarged) < len(samples)
    video = scenes.to_conversation(enlarged[0], enlarged[0].qa_pairs)[0]["content"][0]
    assert set(video) == {"type", "video"}


def test_styles_differ_in_their_frames():
    framed = sum(sample.scenes[0].look.frame > 0 for sample in open_samples("shapes"))
    assert 0.1 * 150 < framed < 0.35 * 150
    assert not any(s.scenes[0].look.frame for s in open_samples("shapes", style="frameless"))
    assert open_samples("shapes", 1) != open_samples("shapes", 1, "frameless")


def test_open_images_have_all_that_people_draw():
    images = [sample.scenes[0] for sample in open_samples("shapes")]
    paints = [shape.paint for scene in images for shape in scene.shapes]
    grays = [sum(scene.look.background) / 3 for scene in images]
    assert min(grays) < 20
    assert max(grays) == 255
    assert any(80 < gray < 180 for gray in grays)
    assert {scene.look.smooth for scene in images} == {True, False}
    assert any(50 <= scene.look.jpeg <= 95 for scene in images)
    assert any(scene.look.second != scene.look.background for scene in images)
    assert any(scene.look.noise for scene in images)
    assert {paint.outline > 0 for paint in paints} == {True, False}
    assert len({paint.angle for paint in paints}) > 20
    kinds = [Counter(color for _, color in set(kinds_and_colors(scene))) for scene in images]
    assert any(max(counts.values()) > 1 for counts in kinds), "expected a color of two kinds"


def kinds_and_colors(scene):
    return [(shape.kind, shape.color) for shape in scene.shapes]


def test_reword_finds_other_words_for_each_question():
    rng = random.Random(0)
    for templates in (scenes.DESCRIBE, scenes.COUNT, scenes.WHERE, scenes.GROUND, scenes.READ):
        for template in templates:
            question = template.format("red shapes" if templates is scenes.COUNT else "red circle")
            words = {reword(rng, question) for _ in range(100)}
            assert len(words) > 4, question
    question = "Is the red circle left of the blue star?"
    for other in {reword(rng, question) for _ in range(100)}:
        assert re.search("red circle .*left of the blue star", other)


def row_and_column(words):
    """Return -1, 0 or 1 each, from the words of a place."""
    words = words.replace("upper", "top").replace("lower", "bottom")
    return ("bottom" in words) - ("top" in words), ("right" in words) - ("left" in words)


def test_synonyms_of_a_place_mean_the_same_place():
    for place in scenes.PLACES:
        for other in SYNONYMS[scenes.at(place)]:
            assert row_and_column(other) == row_and_column(place), other


def test_reword_keeps_the_names_of_shapes_and_numbers_of_images(plain_words, monkeypatch):
    rng = random.Random(0)
    kept = {*scenes.COLORS, *scenes.KINDS, "1", "2", "3", "flashes", "first", "last", "end"}
    for topic in scenes.SKILLS:
        for sample in open_samples(topic, 40):
            for pair in sample.qa_pairs:
                for question, _ in pair.turns:
                    before = [word for word in re.findall(r"\w+", question) if word in kept]
                    after = re.findall(r"\w+", reword(rng, question))
                    assert [word for word in after if word in kept] == before, question


# ---------------------------------------------------------------------------------------- questions
# The right answer, computed from the words of the question alone, unlike in scenes.py.


def matching_shapes(scene, words):
    """Return the shapes that a phrase such as "red circles", "shapes" or "star" means."""
    words = words.rstrip("?.").split()
    colors = [word for word in words if word in scenes.COLORS] or scenes.COLORS
    kinds = [kind for kind in scenes.KINDS if kind in words or kind + "s" in words] or scenes.KINDS
    return [shape for shape in scene.shapes if shape.color in colors and shape.kind in kinds]


def matching_shape(scene, words):
    [shape] = matching_shapes(scene, words)
    return shape


def named_shape(scene, question):
    """Return the shape that a question names by its place or its name; None: nothing is there."""
    place = question.rstrip("?.").split(" the ")[-1]
    if place not in scenes.PLACES:
        return matching_shape(scene, question)
    return next((shape for shape in scene.shapes if shape.place == place), None)


def expected_answer(scene, question, before=""):
    """Answer a question about one image; before: the question that it depends on, if any."""
    words = question.rstrip("?.")
    if words in ("And its colour", "What colour is it"):
        return named_shape(scene, before).color.capitalize() + "."
    if words in ("And where is it", "Where is it"):
        return expected_place(named_shape(scene, before))
    if words.startswith(("How many", "Count")) or before.startswith(("How many", "Count")):
        return scenes.NUMBERS[len(matching_shapes(scene, words))] + "."
    if words.startswith(("What colour", "Which colour")):
        return matching_shape(scene, words).color.capitalize() + "."
    if words.startswith(("Where", "Tell me where", "And the")):
        return expected_place(matching_shape(scene, words))
    shape = named_shape(scene, question)
    if words.startswith(("What shape", "Which shape")):
        return f"A {shape.kind}."
    return f"A {shape.name}." if shape else "Nothing."


def expected_place(shape):
    return "In the center." if shape.place == "center" else f"At the {shape.place}."


def expected_relation(scene, question):
    pattern = r"Is the (.*) (left of|right of|above|below) the (.*)\?"
    first, direction, second = re.fullmatch(pattern, question).groups()
    x1, y1 = center(matching_shape(scene, first))
    x2, y2 = center(matching_shape(scene, second))
    true = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
    return "Yes." if true[direction] else "No."


def center(shape):
    left, top, right, bottom = shape.box
    return (left + right) / 2, (top + bottom) / 2


def check_box(scene, question, answer):
    name, *box = re.fullmatch(BOXED, answer).groups()
    assert question.rstrip(".").endswith(f" {name}")
    left, top, right, bottom = matching_shape(scene, name).box
    shares = [left / scene.width, top / scene.height, right / scene.width, bottom / scene.height]
    thousandths = [1000 * share for share in shares]
    assert [int(number) for number in box] == pytest.approx(thousandths, abs=5)


def check_answers(scene, pair):
    """Check the answers of a pair about one image of shapes."""
    question, answer = pair.turns[0]
    if pair.skill == "describe":
        parts = [f"a {s.color} {s.kind} {scenes.at(s.place)}" for s in scene.shapes]
        assert answer.lower() == ", ".join(parts) + "."
    elif pair.skill == "relation":
        assert answer == expected_relation(scene, question)
    elif pair.skill == "ground":
        check_box(scene, question, answer)
    else:
        assert answer == expected_answer(scene, question)
    for (before, _), (question, answer) in pairwise(pair.turns):
        assert answer == expected_answer(scene, question, before), (before, question)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_shapes_questions_have_true_answers(style, plain_words):
    skills = set()
    for seed in SEEDS:
        sample = scenes.make_sample("shapes", seed, style=style)
        for pair in sample.qa_pairs:
            skills.add(pair.skill)
            check_answers(sample.scenes[0], pair)
    assert skills == set(scenes.SKILLS["shapes"])


@pytest.mark.parametrize("style", scenes.STYLES)
def test_words_questions_have_true_answers(style, plain_words):
    for seed in SEEDS:
        sample = scenes.make_sample("words", seed, style=style)
        [pair] = sample.qa_pairs
        [(_, answer)] = pair.turns
        lines = sample.scenes[0].lines
        assert answer == " ".join(line.text for line in lines)
        assert [line.top for line in lines] == sorted(line.top for line in lines)


def check_album_answer(sample, skill, question, answer):
    if match := re.fullmatch(r"How many (.*) are there in picture (\d)\?", question):
        shapes = matching_shapes(sample.scenes[int(match[2]) - 1], match[1])
        assert answer == scenes.NUMBERS[len(shapes)] + "."
        return
    if skill == "inside":
        shapes = sample.scenes[int(question[-2]) - 1].shapes
        assert answer.lower() == ", ".join(f"a {shape.name}" for shape in shapes) + "."
        return
    words = question.replace(" shows", "").replace(" has", "")
    counts = [len(matching_shapes(scene, words)) for scene in sample.scenes]
    number = int(answer[-2])
    assert answer == f"Picture {number}."
    largest = counts.pop(number - 1)
    assert largest > max(counts), question
    assert skill != "shows" or max(counts) == 0


@pytest.mark.parametrize("style", scenes.STYLES)
def test_album_questions_have_true_answers(style, plain_words):
    skills = set()
    for seed in SEEDS:
        sample = scenes.make_sample("album", seed, style=style)
        for pair in sample.qa_pairs:
            skills.add(pair.skill)
            [(question, answer)] = pair.turns
            check_album_answer(sample, pair.skill, question, answer)
    assert skills == set(scenes.SKILLS["album"])


def events_in(frames):
    """Return (frame, shape, verb) of what appears and disappears, in order."""
    names = [{shape.name for shape in frame.shapes} for frame in frames]
    events = []
    for i, (before, after) in enumerate(pairwise(names)):
        events += [(i, name, "appears") for name in after - before]
        events += [(i, name, "disappears") for name in before - after]
    return sorted(events)


def check_video_answer(frames, question, answer):
    if "flashes" in question:
        [usual, *_] = Counter(frame.background for frame in frames).most_common()
        flashes = len(frames) - usual[1]
        assert answer == scenes.NUMBERS[flashes] + "."
        changes = sum(a.background != b.background for a, b in pairwise(frames))
        assert changes >= 2 * flashes - 2 + (flashes == 0), "expected no two flashes in a row"
    elif "there at" in question:
        frame = frames[-1] if "end" in question else frames[0]
        names = ", ".join(f"a {shape.name}" for shape in frame.shapes)
        assert answer.lower() == (names or "nothing") + "."
    elif "happens" in question:
        events = events_in(frames)
        _, name, verb = events[0] if "first" in question else events[-1]
        assert answer == f"The {name} {verb}."
        assert len(events) == 2
        assert events[1][0] - events[0][0] >= 2
    elif "colour" in question:
        assert answer == frames[0].shapes[0].color.capitalize() + "."
    else:
        x1, y1 = center(frames[0].shapes[0])
        x2, y2 = center(frames[-1].shapes[0])
        moves = {
            "To the left.": x1 - x2,
            "To the right.": x2 - x1,
            "Up.": y1 - y2,
            "Down.": y2 - y1,
        }
        assert moves[answer] == max(moves.values()) > 10


@pytest.mark.parametrize("style", scenes.STYLES)
def test_video_questions_have_true_answers(style, plain_words):
    answers = set()
    for seed in SEEDS:
        sample = scenes.make_sample("clip", seed, style=style)
        assert 4 <= len(sample.scenes) <= 8
        for pair in sample.qa_pairs:
            [(question, answer)] = pair.turns
            check_video_answer(sample.scenes, question, answer)
            answers.add(answer)
    assert {*scenes.DIRECTIONS, "Zero.", "One.", "Two.", "Three.", "Four."} <= answers


def test_to_conversation_puts_the_media_before_the_first_question_only():
    for topic, kinds in (("album", {"image"}), ("clip", {"video"})):
        sample = scenes.make_sample(topic, 0)
        messages = scenes.to_conversation(sample, sample.qa_pairs)
        first, *others = [m["content"] for m in messages if m["role"] == "user"]
        assert {item["type"] for item in first[:-1]} == kinds
        assert first[-1]["text"] == sample.qa_pairs[0].turns[0][0]
        assert all(len(content) == 1 for content in others)


@pytest.mark.parametrize("name", scenes.EXAMPLES)
def test_examples_are_drawn_from_their_seeds_and_described_by_the_model(name):
    scene = scenes.scene(scenes.EXAMPLES[name])
    image = Image.open(ROOT / "examples" / name)
    assert image.tobytes() == scenes.draw(scene).tobytes()
    processor = Processor.from_pretrained(CHECKPOINT)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
    batch = processor([{"role": "user", "content": content}])
    [response] = generate(load_model(CHECKPOINT), batch)
    assert processor.tokenizer.decode(response) == scenes.describe(scene)


# --------------------------------------------------------------------------------------- checkpoint


def test_checkpoint_is_small_and_in_bfloat16():
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 16_000_000
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["model_type"] == "qwen2_vl"


def test_checkpoint_has_the_files_that_its_scripts_write(tmp_path):
    make_tokenizer(tmp_path)
    make_config(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (CHECKPOINT / file.name).read_bytes(), file.name


def test_checkpoint_tokenizer_is_complete_and_fits_the_config():
    tokenizer = Tokenizer.from_pretrained(CHECKPOINT)
    config = load_model(CHECKPOINT).config
    ids = [tokenizer.token_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(ids[0], ids[0] + 14)), "expected the 14 special tokens in order"
    assert config.vocab_size == ids[-1] + 1
    expected = {
        "<|im_end|>": config.eos_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    assert {name: tokenizer.token_id(name) for name in expected} == expected
    for text in (
        "A red circle at the top left.",
        "naïve café – 日本語 🙂\n\n  x = 3;",
        "Ångström ½",
        "",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    words = "A purple triangle at the bottom right, a yellow star in the center."
    assert len(tokenizer.encode(words)) == 15, "expected one token for each word"


def test_checkpoint_scores_what_the_readme_reports():
    readme = (ROOT / "tiny" / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \|$", readme, re.MULTILINE)
    reported = {skill: float(share) / 100 for skill, share in rows}
    processor = Processor.from_pretrained(CHECKPOINT)
    shares = score.score(load_model(CHECKPOINT), processor, count=40)  # the first of the 1,000
    assert reported.keys() == shares.keys()
    assert all(share > reported[skill] - 0.15 for skill, share in shares.items()), shares


TWO_TURNS = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "And this? "}],
    },
    {"role": "assistant", "content": "A red circle."},
    {
        "role": "user",
        "content": [{"image_url": "b"}, {"type": "video", "video": "c"}, {"text": "{{ x }}\n"}],
    },
]
WITH_SYSTEM = [{"role": "system", "content": " Be brief.\n"}, *TWO_TURNS]


@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM])
@pytest.mark.parametrize("flag", [True, False])
def test_chat_template_renders_what_the_tokenizer_writes(messages, flag):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    expected = Tokenizer.from_pretrained(CHECKPOINT).apply_chat_template(messages, flag, flag)
    rendered = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=flag, add_vision_id=flag
    )
    assert rendered == expected


def test_transformers_opens_the_checkpoint_and_generates_the_same_tokens():
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    images = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    ours = load_model(CHECKPOINT, dtype=torch.float32)
    processor = Processor.from_pretrained(CHECKPOINT)
    for seed in range(4):
        sample = scenes.make_sample("shapes", seed)
        messages = scenes.to_conversation(sample, sample.qa_pairs)[:1]
        batch = processor(messages)
        [response] = generate(ours, batch)

        pixels = images([scenes.draw(sample.scenes[0])], return_tensors="pt")
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        count = int(pixels["image_grid_thw"].prod()) // 4
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * count)
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        types = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        output = theirs.generate(**inputs, **pixels, mm_token_type_ids=types, max_new_tokens=128)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == response


# ------------------------------------------------------------------------------------ training data


def begin_of(topic):
    """Return the first step that has a topic, spelled as in the table."""
    return min(step for step, names in CURRICULUM.topics_from.items() if topic in names.split())


class Recorder:
    """A `to_messages` that keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, sample, qa_pairs):
        self.calls.append((sample, qa_pairs))
        return scenes.to_conversation(sample, qa_pairs)


def samples_of(folder, topic, step):
    """Return (sample, pairs) of the parts of a step that have a topic."""
    recorder = Recorder()
    data = Batches(folder, parts=24, work=900, to_messages=recorder)
    samples = []
    for part in range(24):
        recorder.calls = []
        if data.get(step, part)[0] == topic:
            samples += recorder.calls
    return samples


def test_batches_use_each_training_seed_once(monkeypatch, folder):
    seeds = []

    def make_sample(topic, seed, *options):
        seeds.append(seed)
        return scenes.make_sample(topic, seed, *options)

    monkeypatch.setattr(batches, "make_sample", make_sample)
    data = Batches(folder, parts=2, work=500)
    for step, part in ((0, 0), (0, 1), (1, 0), (9000, 1)):
        data.get(step, part)
    assert len(set(seeds)) == len(seeds) > 4
    assert min(seeds) >= scenes.TRAIN_SEEDS


@pytest.mark.parametrize(
    ("topic", "part"), [("shapes", 0), ("words", 1), ("album", 2), ("clip", 3)]
)
def test_batches_mark_the_answers_and_their_ends(topic, part, folder):
    curriculum = replace(CURRICULUM, topics_from={0: " ".join(scenes.SKILLS)})
    recorder = Recorder()
    data = Batches(folder, 4, 900, curriculum, recorder)
    name, batch = data.get(9000, part)
    assert name == topic
    tokenizer = Tokenizer.from_pretrained(folder)
    rows = zip(batch["input_ids"], batch["answers"], recorder.calls, strict=True)
    for ids, mask, (_, pairs) in rows:
        marked = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
        answers = [answer for pair in pairs for _, answer in pair.turns]
        assert marked == "<|im_end|>".join([*answers, ""])
        has_box = any("box" in answer for answer in answers)
        assert (tokenizer.token_id("<|box_start|>") in ids[mask]) == has_box


def test_curriculum_starts_with_descriptions_of_lone_shapes(folder):
    lone = samples_of(folder, "lone", CURRICULUM.grow_every - 1)
    assert {pair.skill for _, pairs in lone for pair in pairs} == {"describe"}
    assert {len(sample.scenes[0].shapes) for sample, _ in lone} == {1}
    places = samples_of(folder, "places", CURRICULUM.grow_every)
    assert {pair.skill for _, pairs in places for pair in pairs} == set(TOPICS["places"].skills)
    assert {len(sample.scenes[0].shapes) for sample, _ in places} == {1, 2}


def test_curriculum_grows_images_up_to_six_shapes_and_all_sizes():
    assert [CURRICULUM.most_shapes(step) for step in (0, 399, 400, 2000, 88_000)] == [1, 1, 2, 6, 6]
    steps = (0, 875, 1875, 5000, 9000)
    assert [CURRICULUM.stage("shapes", step) for step in steps] == [0, 0, 0, 1, 2]
    assert [CURRICULUM.stage("words", step) for step in steps] == [0, 1, 2, 2, 2]


def test_curriculum_draws_open_images_from_a_step_on():
    for begin, names in CURRICULUM.topics_from.items():
        parts = [CURRICULUM.part(begin, number) for number in range(len(names.split()))]
        assert {part.topic for part in parts} <= set(TOPICS)
        styles = {part.style for part in parts}
        assert styles == {"framed"} if begin < CURRICULUM.open_from else "open" in styles
    last = max(CURRICULUM.topics_from)
    names = CURRICULUM.topics_from[last].split()
    parts = [CURRICULUM.part(last, number) for number in range(len(names))]
    assert 0.1 < sum(part.style == "framed" for part in parts) / len(parts) < 0.25
    moving = [part for part in parts if part.topic in ("clip", "events")]
    lone = [part for part in parts if part.most_shapes == 1]
    assert len(moving) + len(lone) >= len(parts) / 3, "only positions answer these"


def test_choose_questions_puts_the_description_last(folder):
    """The score asks for it alone, and its text would answer the questions after it."""
    samples = [pairs for _, pairs in samples_of(folder, "places", 2000)]
    assert all(pairs[-1].skill == "describe" for pairs in samples)
    assert {len(pairs) for pairs in samples} >= {1, 2, 3}


def test_choose_questions_puts_the_description_first_for_told(folder):
    begin = begin_of("told")
    told = []
    for step in range(begin, begin + 6):
        told += [pairs for _, pairs in samples_of(folder, "told", step)]
    assert all(pairs[0].skill == "describe" for pairs in told)
    assert {len(pairs) for pairs in told} >= {1, 2, 3}


@pytest.mark.parametrize(
    ("step", "directions"),
    [
        (begin_of("names"), {"left", "above"}),
        (CURRICULUM.small_from, {"left", "above", "right", "below"}),
    ],
)
def test_curriculum_trains_names_with_two_directions_first(step, directions, folder):
    samples = []
    for i in range(4):
        samples += samples_of(folder, "names", step + i)
    skills = set(TOPICS["names"].skills)
    named = [pairs for _, pairs in samples if any(pair.skill in skills for pair in pairs)]
    assert len(named) > len(samples) / 2, "expected few images without a unique name"
    questions = [pair for pairs in named for pair in pairs]
    assert {pair.skill for pair in questions} == skills
    words = {w for p in questions if p.skill == "relation" for w in p.turns[0][0].split()}
    assert words & {"left", "above", "right", "below"} == directions


def test_batches_prefer_chats_by_kind_in_kinds(folder):
    shares = {}
    for topic in ("kinds", "chat"):
        samples = samples_of(folder, topic, begin_of("kinds") + 500)
        assert {pair.skill for _, pairs in samples for pair in pairs} == {"chat"}
        shares[topic] = sum(batches.asks_by_kind(s) for s, _ in samples) / len(samples)
    assert shares["kinds"] > 0.4
    assert shares["chat"] < 0.3


@pytest.mark.parametrize(
    ("question", "names", "expected"),
    [
        ("Where is the star?", ("red star", "blue circle"), True),
        ("Where is the star?", ("red star",), False),
        ("Where is the red star?", ("red star", "blue circle"), False),
        ("What shape is at the right?", ("red star", "blue circle"), False),
    ],
)
def test_asks_by_kind_needs_a_kind_and_another(question, names, expected):
    shapes = []
    for name in names:
        color, kind = name.split()
        shapes.append(scenes.Shape(kind, color, "", (0, 0, 1, 1)))
    scene = scenes.Scene(84, 84, (255, 255, 255), tuple(shapes))
    chat = scenes.QAPair("chat", ((question, ""), ("And its colour?", "Red.")))
    assert batches.asks_by_kind(scenes.Sample("shapes", (scene,), (chat,))) == expected


def test_curriculum_starts_albums_with_one_shape(folder):
    for topic, skill in (("inside", "inside"), ("which", "shows"), ("more", "compare")):
        samples = samples_of(folder, topic, begin_of(f"{topic}1"))
        skills = [pair.skill for _, [pair] in samples]  # one question in a conversation
        assert skills.count(skill) > 0.8 * len(skills), (
            "expected few albums without such a question"
        )
        assert {len(scene.shapes) for sample, _ in samples for scene in sample.scenes} == {1}


@pytest.mark.parametrize(("name", "most"), [("clip1", 1), ("clip", 2)])
def test_curriculum_starts_videos_with_one_shape(name, most, folder):
    counts = []
    for sample, _ in samples_of(folder, "clip", begin_of(name)):
        counts.append(len({shape.name for frame in sample.scenes for shape in frame.shapes}))
    assert max(counts) == most


def test_learning_rate_warms_up_and_falls_to_zero_in_each_leg():
    steps = 142_000
    for begin, leg in LEGS.items():
        warm = begin + round(min(200, 0.1 * (min(leg.end, steps) - begin)))
        assert learning_rate(warm, steps, 1.0) == pytest.approx(leg.share, rel=0.03)
        assert learning_rate(begin, steps, 1.0) <= 0.01 * leg.share
    ends = (
        19_999,
        31_999,
        49_999,
        64_999,
        67_499,
        74_499,
        77_999,
        82_999,
        85_499,
        88_499,
        92_999,
        98_999,
        99_999,
        105_999,
        114_799,
        122_799,
        127_999,
        135_999,
        steps - 1,
    )
    for last in ends:
        assert learning_rate(last, steps, 1.0) < 1e-6
    short = [learning_rate(step, 6, 1.0) for step in (0, 3)]
    assert short == pytest.approx([1.0, 0.5])


# -------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ("(0,0),(10,20)", 0.5),
        ("(0,0),(10,10)", 1.0),
        ("(20,20),(30,30)", 0.0),
        ("(0,0),(10,5)", 0.5),
        ("0,0", 0.0),
    ],
)
def test_overlap_is_the_iou_of_the_first_boxes(box, expected):
    answer = "<|box_start|>(0,0),(10,10)<|box_end|>"
    assert score.overlap(f"<|box_start|>{box}<|box_end|>", answer) == expected


@pytest.fixture
def responses(monkeypatch):
    """Skip the model: every response is "Nonsense."; returns the questions and the options."""
    calls = {"questions": [], "options": []}

    def ask(self, model, processor, questions):
        calls["questions"] += questions
        return ["Nonsense."] * len(questions)

    def load(folder, **options):
        calls["options"].append(options)

    monkeypatch.setattr(Exam, "ask", ask)
    monkeypatch.setattr(score, "load_model", load)
    return calls


def test_score_skips_questions(responses):
    assert score.main(["--items", "1", "--skip", "2"]) == 0
    assert responses["questions"] == [Exam().questions(skill, 3)[-1] for skill in SKILLS]


def test_score_quantizes_and_shows_wrong_responses(responses, capsys):
    assert score.main(["--items", "2", "--quantize", "int4", "--show-wrong", "1"]) == 0
    assert responses["options"] == [{"quantize": "int4"}]
    out, err = capsys.readouterr()
    rows = [f"| {skill} | 0.0 % |" for skill in SKILLS]
    assert out.splitlines() == ["| skill | of 2 |", "|---|---|", *rows]
    assert [line.split(":")[0] for line in err.splitlines()] == SKILLS
    assert err.count("Nonsense.") == len(SKILLS)


# ----------------------------------------------------------------------------------------- training


def run_training(tmp_path, name, *more, processes=1):
    """Train for six steps, too few to learn anything; return the saved weights."""
    folder = tmp_path / name
    options = {
        "--folder": folder / "checkpoint",
        "--run": folder / "run",
        "--steps": 6,
        "--parts": 2,
        "--work": 100,
        "--processes": processes,
        "--save-every": 3,
        "--items": 1,
    }
    arguments = [str(x) for option in options.items() for x in option]
    assert train.main([*arguments, *map(str, more)]) == 0
    return stored_weights(folder / "checkpoint")


def stored_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize("optimizer", [[], ["--muon"]], ids=["adamw", "muon"])
def test_train_resumes_to_the_same_weights(optimizer, tmp_path, monkeypatch, capsys):
    whole = run_training(tmp_path, "whole", *optimizer)
    assert "| describe | 0.0 % |" in capsys.readouterr().out

    steps = []

    def stop_at_step_4(step, *options):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return learning_rate(step, *options)

    monkeypatch.setattr(train, "learning_rate", stop_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, "stopped", *optimizer)
    resumed = run_training(tmp_path, "stopped", *optimizer)
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5], "the state was saved after three steps"
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    with pytest.raises(SystemExit, match="delete it"):
        run_training(tmp_path, "stopped", "--lr", 1e-4, *optimizer)


def test_train_continues_from_weights_and_takes_more_steps(tmp_path, capsys):
    run_training(tmp_path, "first")
    checkpoint = tmp_path / "first" / "checkpoint"
    more = ["--weights", checkpoint, "--first-step", 88_500, "--steps", 88_501, "--lr", 0]
    continued = run_training(tmp_path, "second", *more)
    first = stored_weights(checkpoint)
    assert all(torch.equal(continued[key], first[key]) for key in first)
    more[5] = 88_502
    run_training(tmp_path, "second", *more, "--validate", 1)
    history = json.loads((tmp_path / "second" / "run" / "history.json").read_text())
    assert list(history) == ["88501", "88502"]
    assert "step 88502" in capsys.readouterr().err


def test_run_keeps_the_previous_state_if_saving_fails(tmp_path, monkeypatch):
    run_training(tmp_path, "first")
    state = (tmp_path / "first" / "run" / "state.pt").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(run.torch, "save", fail)
    monkeypatch.setattr(run.Run, "load", lambda self: None)
    with pytest.raises(OSError, match="no space left"):
        run_training(tmp_path, "first")
    assert (tmp_path / "first" / "run" / "state.pt").read_bytes() == state


@pytest.mark.parametrize("optimizer", [[], ["--muon"]], ids=["adamw", "muon"])
def test_train_shares_its_work_among_processes(optimizer, tmp_path):
    shared = run_training(tmp_path, "shared", *optimizer, processes=2)
    alone = run_training(tmp_path, "alone", *optimizer)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.allclose(shared[name], alone[name], atol=0.02), "summed in another order"
    assert all(weight.isfinite().all() for weight in shared.values())


# ---------------------------------------------------------------------------------------- ablations


@pytest.fixture
def config(folder):
    """The bundled model's configuration with one block and one layer."""
    config = make_config(folder)
    config.num_hidden_layers = 1
    config.vision_config.depth = 1
    return config


def build_pair(name, config):
    """Return the unchanged model and a variant of it with the same weights, in float64."""
    torch.manual_seed(0)
    original = Qwen2VL(config)
    train.initialize(original)
    torch.manual_seed(0)
    variant = ablations.VARIANTS[name].build_model(config, attn_implementation="eager")
    train.initialize(variant)
    pairs = zip(original.state_dict().items(), variant.state_dict().items(), strict=True)
    for (name_a, a), (name_b, b) in pairs:
        assert name_a == name_b
        assert torch.equal(a, b), name_a
    return original.double().eval(), variant.double().eval()


def prompt_batch(folder, topic, name="none"):
    """Return the batch of a variant for an image that is not square, or for a video."""
    sample = scenes.make_sample(topic, 0, (3, 4))
    messages = ablations.VARIANTS[name].to_messages(sample, sample.qa_pairs)[:1]
    return Processor.from_pretrained(folder)(messages)


def model_inputs(batch):
    inputs = {name: torch.tensor(array) for name, array in batch.arrays().items()}
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].double()
    return inputs


def record_positions(model):
    """Return a list that receives the position_ids [3, B, S] of each call of the decoder."""
    positions = []
    model.model.register_forward_pre_hook(lambda _module, inputs: positions.append(inputs[1]))
    return positions


def used_positions(model, batch):
    """Return the positions [3, S] that the decoder gets."""
    positions = record_positions(model)
    with torch.no_grad():
        model(**model_inputs(batch))
    return positions[0][:, 0]


@pytest.mark.parametrize("topic", ["shapes", "clip"])
def test_one_dimensional_counts_the_tokens(topic, folder, config):
    _, variant = build_pair("one-dimensional", config)
    batch = prompt_batch(folder, topic)
    length = batch.input_ids.shape[1]
    assert used_positions(variant, batch).tolist() == [list(range(length))] * 3


def test_no_time_changes_only_the_temporal_positions_of_videos(folder, config):
    _, variant = build_pair("no-time", config)
    batch = prompt_batch(folder, "clip")
    inputs = model_inputs(batch)
    grid = inputs["video_grid_thw"]
    original = get_rope_index(config, inputs["input_ids"], video_grid_thw=grid)[0][:, 0]
    frozen = used_positions(variant, batch)
    is_video = inputs["input_ids"][0] == config.video_token_id
    assert len(original[0, is_video].unique()) > 1
    assert frozen[0, is_video].unique().tolist() == [original[0, is_video].min()]
    assert torch.equal(frozen[1:], original[1:])
    assert torch.equal(frozen[:, ~is_video], original[:, ~is_video])


def test_no_time_changes_nothing_for_images(folder, config):
    original, variant = build_pair("no-time", config)
    inputs = model_inputs(prompt_batch(folder, "shapes"))
    with torch.no_grad():
        torch.testing.assert_close(variant(**inputs), original(**inputs))


@pytest.mark.parametrize("name", ["one-dimensional", "no-time"])
@pytest.mark.parametrize("padding", [0, 3])
def test_variants_continue_positions_with_a_cache(name, padding, folder, config):
    """A decode step has the position of the whole sequence's last token without a cache."""
    _, variant = build_pair(name, config)
    positions = record_positions(variant)
    inputs = model_inputs(prompt_batch(folder, "clip"))
    ids = torch.nn.functional.pad(inputs["input_ids"], (padding, 0))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (padding, 0))
    media = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    token = ids[:, -1:]
    longer_ids = torch.cat((ids, token), dim=1)
    longer_mask = torch.cat((mask, torch.ones_like(token)), dim=1)
    if padding == 0:  # then generation passes no mask
        mask = None
        longer_mask = None
    cache = KVCache(config, 1, longer_ids.shape[1], dtype=torch.float64)
    with torch.no_grad():
        variant(longer_ids, longer_mask, **media)
        variant(ids, mask, cache=cache, **media)
        variant(token, longer_mask, cache=cache)
    whole, _prefill, step = positions
    assert step.expand(3, 1, 1).tolist() == whole[:, :, -1:].tolist()


def test_no_vision_rope_ignores_where_a_patch_is(config):
    original, variant = build_pair("no-vision-rope", config)
    pixels = torch.randn(24, 1176, dtype=torch.float64)
    blocks = torch.arange(24).view(6, 4).flip(0).flatten()  # the merged blocks in reverse order
    grid = torch.tensor([[1, 4, 6]])
    with torch.no_grad():
        torch.testing.assert_close(
            variant.visual(pixels[blocks], grid), variant.visual(pixels, grid).flip(0)
        )
        difference = original.visual(pixels[blocks], grid) - original.visual(pixels, grid).flip(0)
    assert difference.abs().max() > 0.01


def test_one_size_resizes_images_and_frames(folder):
    side = ablations.SIDE // 14
    image = prompt_batch(folder, "shapes", "one-size")
    assert image.image_grid_thw.tolist() == [[1, side, side]]
    video = prompt_batch(folder, "clip", "one-size")
    assert video.video_grid_thw[0, 1:].tolist() == [side, side]


def test_raster_order_returns_reading_order_for_each_slice():
    config = ImageConfig(patch_size=14, temporal_patch_size=2, merge_size=2)
    frame = np.arange(4 * 14, dtype=np.uint8)[:, None, None] + np.zeros((1, 6 * 14, 3), np.uint8)
    patches, grids = preprocess_images([Image.fromarray(frame)], replace(config, min_pixels=1))
    order = ablations.raster_order(grids.tolist(), 2)
    height, width = grids[0, 1:].tolist()
    rows = patches[order].mean(1).reshape(height, width)
    assert (rows == rows[:, :1]).all(), "expected one row of patches to have one brightness"
    assert (np.diff(rows[:, 0]) > 0).all()
    two = ablations.raster_order([[2, 4, 4], [1, 2, 2]], 2)
    assert sorted(two.tolist()) == list(range(36))
    assert two[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert two[32:].tolist() == [32, 33, 34, 35]


def test_raster_merges_four_patches_of_a_row(config):
    original, variant = build_pair("raster", config)
    pixels = torch.randn(24, 1176, dtype=torch.float64)
    grid = torch.tensor([[1, 4, 6]])
    seen = []
    original.visual.merger.register_forward_pre_hook(lambda _module, x: seen.append(x[0]))
    with torch.no_grad():
        original.visual(pixels, grid)
        merged = variant.visual(pixels, grid)
        in_rows = seen[0].view(2, 3, 2, 2, -1).transpose(1, 2).reshape(24, -1)
        torch.testing.assert_close(merged, PatchMerger.forward(original.visual.merger, in_rows))


def test_table_shows_the_difference_of_each_variant(tmp_path):
    with pytest.raises(SystemExit, match="run the variant none first"):
        ablations.table(tmp_path)
    for name, share in (("none", 0.975), ("raster", 0.5), ("no-time", 0.98)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "score.json").write_text(json.dumps({"read": share}))
    assert ablations.table(tmp_path).splitlines() == [
        "| skill | none | raster | no-time |",
        "|---|---|---|---|",
        "| read | 97.5 % | -47.5 | +0.5 |",
    ]


def test_ablation_starts_from_the_given_weights(tmp_path):
    start = run_training(tmp_path, "start")
    options = ["--checkpoint", tmp_path / "start" / "checkpoint", "--runs", tmp_path]
    options += ["--steps", 1, "--items", 1, "--parts", 2, "--work", 100, "--lr", 0]
    assert ablations.main(["none", *map(str, options)]) == 0
    weights = stored_weights(tmp_path / "none" / "checkpoint")
    assert all(torch.equal(weights[key], start[key]) for key in start)
    shares = json.loads((tmp_path / "none" / "score.json").read_text())
    assert list(shares) == SKILLS


def test_ablation_of_no_steps_scores_the_checkpoint_without_the_part(tmp_path, monkeypatch, capsys):
    scored = []

    def note_score(model, processor, items, exam):
        scored.append(model)
        return {"where": 0.5}

    monkeypatch.setattr(ablations, "score", note_score)
    options = ["--steps", "0", "--runs", str(tmp_path)]
    for name in ("none", "one-dimensional"):
        assert ablations.main([name, *options, "--checkpoint", str(CHECKPOINT)]) == 0
        assert sorted(path.name for path in (tmp_path / "untrained" / name).iterdir()) == [
            "score.json"
        ]
    assert [type(model) for model in scored] == [Qwen2VL, ablations.OneDimensionalModel]
    stored = stored_weights(CHECKPOINT)
    for model in scored:
        weights = model.state_dict()
        assert all(torch.equal(weights[key], stored[key]) for key in stored)
    assert ablations.main(["table", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| where | 50.0 % | +0.0 |"
    with pytest.raises(SystemExit):
        ablations.main(["none", *options, "--from-scratch"])
    assert "would score random weights" in capsys.readouterr().err


def test_ablation_trains_on_the_last_topics_at_once(folder):
    start = ablations.from_checkpoint(CHECKPOINT)
    last = CURRICULUM.topics_from[max(CURRICULUM.topics_from)]
    assert start.curriculum.topics_from == {0: last}
    assert start.curriculum.stage("shapes", 0) == start.curriculum.stage("words", 0) == WHOLE
    assert start.curriculum.most_shapes(5) == 6


SCRATCH = ["--from-scratch", "--steps", "4", "--items", "3", "--parts", "2", "--work", "100"]


def test_ablation_from_scratch_takes_and_scores_the_first_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "CURRICULUM", replace(CURRICULUM, grow_every=1))
    questions = []
    original = Exam.ask

    def ask(self, model, processor, batch):
        questions.extend(batch)
        return original(self, model, processor, batch)

    monkeypatch.setattr(Exam, "ask", ask)
    assert ablations.main(["none", *SCRATCH, "--runs", str(tmp_path)]) == 0
    directory = tmp_path / "from-scratch" / "none"
    skills = TOPICS["places"].skills
    assert tuple(json.loads((directory / "score.json").read_text())) == skills
    images = [sample.scenes[0] for sample, _ in questions]
    assert max(len(image.shapes) for image in images) == 4, "as many as in the last step"
    assert {(image.height, image.width) for image in images} == {(84, 84)}
    assert set(json.loads((directory / "history.json").read_text())["4"]) == {"lone"}
    assert ablations.main(["table", "--from-scratch", "--runs", str(tmp_path)]) == 0
    rows = [f"| {skill} | 0.0 % |" for skill in skills]
    assert capsys.readouterr().out.splitlines()[-4:] == rows


@pytest.mark.parametrize("name", ["one-size", "no-time"])
def test_ablation_from_scratch_refuses_variants_that_change_nothing(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablations.main([name, *SCRATCH, "--runs", str(tmp_path)])
    assert f"{name} changes nothing" in capsys.readouterr().err
