"""The small world (tiny/scenes.py), the training script (tiny/train.py) and the checkpoint that it made."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from generate import generate
from load_weights import load_model
from preprocess import ImageConfig, Processor, preprocess_images
from tiny import scenes, train
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CHECKPOINT = train.CHECKPOINT
SEEDS = [*range(150), *range(scenes.TRAIN_SEEDS, scenes.TRAIN_SEEDS + 50)]


# ------------------------------------------------------------------------------------------------------ the world


def test_a_seed_makes_the_same_scene_picture_and_questions():
    for seed in range(20):
        one, again = scenes.scene(seed), scenes.scene(seed)
        assert one == again
        assert scenes.draw(one).tobytes() == scenes.draw(again).tobytes()
        assert scenes.questions(one, random.Random(3)) == scenes.questions(again, random.Random(3))
    assert len({scenes.scene(seed) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shape_stands_at_its_place_in_its_colour(seed):
    one = scenes.scene(seed)
    picture = scenes.draw(one)
    assert picture.size == (one.width, one.height)
    assert all(scenes.SIDES[0] <= side <= scenes.SIDES[1] for side in picture.size)
    numbers = [scenes.PLACES.index(shape.place) for shape in one.shapes]
    assert numbers == sorted(set(numbers)), "reading order, one shape at a place"
    for shape in one.shapes:
        left, top, right, bottom = shape.box
        assert 0 < left < right < one.width
        assert 0 < top < bottom < one.height
        x, y = (left + right) / 2, (top + bottom) / 2
        assert scenes.PLACES[int(y / one.height * 3) * 3 + int(x / one.width * 3)] == shape.place
        assert picture.getpixel((int(x), int(y))) == scenes.COLOURS[shape.colour]


def painted(picture, shape):
    """The share of a shape's box that has its colour."""
    pixels = list(picture.crop(shape.box).get_flattened_data())
    return sum(pixel == scenes.COLOURS[shape.colour] for pixel in pixels) / len(pixels)


def test_the_kinds_differ_by_the_area_they_fill():
    expected = {"square": (0.99, 1), "circle": (0.65, 0.8), "triangle": (0.4, 0.5), "star": (0.15, 0.35)}
    assert set(expected) == set(scenes.KINDS)
    for seed in SEEDS:
        one = scenes.scene(seed)
        picture = scenes.draw(one)
        for shape in one.shapes:
            low, high = expected[shape.kind]
            assert low <= painted(picture, shape) <= high, (seed, shape)


def spoken(one, question):
    """The answer worked out from the question's words alone, unlike in scenes.py."""
    words = question.rstrip("?.").split()
    named = [word for word in words if word in scenes.COLOURS]
    kinds = [kind for kind in scenes.KINDS for word in words if word in (kind, kind + "s")]
    hits = [s for s in one.shapes if (not named or s.colour == named[0]) and (not kinds or s.kind == kinds[0])]
    if question.startswith(("How many", "Count")):
        return ["Zero.", "One.", "Two.", "Three.", "Four."][len(hits)]
    if "here" in question:  # where
        [hit] = hits
        return "In the center." if hit.place == "center" else f"At the {hit.place}."
    place = question.rstrip("?").split(" the ")[1]
    hits = [s for s in one.shapes if s.place == place]
    return f"A {hits[0].colour} {hits[0].kind}." if hits else "Nothing."


def test_answers_are_true():
    skills = set()
    for seed in SEEDS:
        one = scenes.scene(seed)
        asked = scenes.questions(one, random.Random(seed))
        assert [skill for skill, _, _ in asked].count("describe") == 1
        assert [skill for skill, _, _ in scenes.questions(one, random.Random(seed), most=1)] == ["describe"]
        for skill, question, answer in asked:
            skills.add(skill)
            if skill == "describe":
                parts = [f"a {s.colour} {s.kind} {scenes.at(s.place)}" for s in one.shapes]
                assert answer.lower() == ", ".join(parts) + "."
                assert answer[0] == "A"
            else:
                assert answer == spoken(one, question), question
    assert skills == {"describe", "count", "where", "what"}


def test_every_number_kind_colour_and_place_turns_up():
    asked = [item for seed in range(300) for item in scenes.questions(scenes.scene(seed), random.Random(seed))]
    answers = {skill: {a for s, _, a in asked if s == skill} for skill, _, _ in asked}
    assert answers["count"] == {f"{number}." for number in scenes.NUMBERS}
    assert answers["where"] == {scenes.sentence(scenes.at(place)) for place in scenes.PLACES}
    names = {f"A {colour} {kind}." for colour in scenes.COLOURS for kind in scenes.KINDS}
    assert answers["what"] == names | {"Nothing."}
    assert {q for s, q, _ in asked if s == "describe"} == set(scenes.DESCRIBE)


@pytest.mark.parametrize("cells", [(3, 3), (3, 7), (7, 4), (5, 6)])
def test_pictures_asked_for_by_cells_get_that_grid(cells):
    config = ImageConfig.from_pretrained(CHECKPOINT)
    pictures = [scenes.draw(scenes.scene(seed, cells)) for seed in range(20)]
    assert len({picture.size for picture in pictures}) > 5
    _, grids = preprocess_images(pictures, config)
    assert {tuple(grid) for grid in grids.tolist()} == {(1, 2 * cells[0], 2 * cells[1])}


def test_training_uses_no_evaluation_seed(monkeypatch):
    seeds = []
    original = scenes.scene
    monkeypatch.setattr(
        train, "scene", lambda seed, *rest, **more: seeds.append(seed) or original(seed, *rest, **more)
    )
    batches = train.Batches(CHECKPOINT, steps=1000, size=2)
    for step in (0, 1, 500, 999):
        batches[step]
    assert len(set(seeds)) == 8
    assert min(seeds) >= scenes.TRAIN_SEEDS


@pytest.mark.parametrize("name", scenes.EXAMPLES)
def test_examples_are_what_the_seeds_draw_and_the_model_describes_them(name):
    one = scenes.scene(scenes.EXAMPLES[name])
    picture = Image.open(ROOT / "examples" / name)
    assert picture.tobytes() == scenes.draw(one).tobytes()
    processor = Processor.from_pretrained(CHECKPOINT)
    batch = processor(train.conversation(picture, [("describe", "Describe this image.", "")])[:1])
    [reply] = generate(load_model(CHECKPOINT), batch)
    assert processor.tokenizer.decode(reply) == scenes.describe(one)


# ------------------------------------------------------------------------------------------------- the checkpoint


def test_the_checkpoint_is_small_and_in_bfloat16():
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 10_000_000
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["model_type"] == "qwen2_vl"


def test_the_tokenizer_is_complete_and_fits_the_config():
    tokenizer = Tokenizer.from_pretrained(CHECKPOINT)
    config = load_model(CHECKPOINT).config
    ids = [tokenizer.token_id(token) for token in train.CONTROL]
    assert ids == list(range(ids[0], ids[0] + 14)), "the 14 control tokens, in their order, after all others"
    assert config.vocab_size == ids[-1] + 1
    named = {"<|im_end|>": config.eos_token_id, "<|vision_start|>": config.vision_start_token_id}
    named |= {"<|image_pad|>": config.image_token_id, "<|video_pad|>": config.video_token_id}
    assert {name: tokenizer.token_id(name) for name in named} == named
    for text in ("A red circle at the top left.", "naïve café – 日本語 🙂\n\n  x = 3;", "Ångström ½", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    words = "A purple triangle at the bottom right, a yellow star in the center."
    assert len(tokenizer.encode(words)) == 15, "the words of the world are one token each"


def test_the_committed_model_answers():
    for skill, (right, total) in train.score(CHECKPOINT, pictures=60).items():
        assert right >= 0.9 * total, f"{skill}: {right} of {total}"


TWO_TURNS = [
    {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "And this? "}]},
    {"role": "assistant", "content": "A red circle."},
    {"role": "user", "content": [{"image_url": "b"}, {"type": "video", "video": "c"}, {"text": "{{ x }}\n"}]},
]


@pytest.mark.parametrize("messages", [TWO_TURNS, [{"role": "system", "content": " Be brief.\n"}, *TWO_TURNS]])
@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_the_jinja_template_renders_what_our_tokenizer_writes(messages, flags):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt, vision_id = flags
    expected = Tokenizer.from_pretrained(CHECKPOINT).apply_chat_template(messages, prompt, vision_id)
    rendered = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, add_vision_id=vision_id
    )
    assert rendered == expected


def test_transformers_opens_the_folder_and_gives_the_same_answers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    images = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    ours, processor = load_model(CHECKPOINT, dtype=torch.float32), Processor.from_pretrained(CHECKPOINT)
    for seed in range(4):
        picture = scenes.draw(scenes.scene(seed))
        messages = train.conversation(picture, [("describe", "Describe this image.", "")])[:1]
        batch = processor(messages)
        [reply] = generate(ours, batch)

        pixels = images([picture], return_tensors="pt")
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        count = int(pixels["image_grid_thw"].prod()) // 4
        inputs = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
        assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
        kinds = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        answer = theirs.generate(**inputs, **pixels, mm_token_type_ids=kinds, max_new_tokens=128)
        assert answer[0, inputs["input_ids"].shape[1] :].tolist() == reply


# --------------------------------------------------------------------------------------------------- the training


def test_the_loss_is_on_the_answers_and_their_end():
    batches = train.Batches(CHECKPOINT, steps=1000, size=3)
    batch, tokenizer = batches[200], Tokenizer.from_pretrained(CHECKPOINT)
    said = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["answers"], strict=True)]
    rng = random.Random(scenes.TRAIN_SEEDS + 200)
    cells, most = (rng.randint(3, 7), rng.randint(3, 7)), rng.randint(1, 5)
    for row in range(3):
        seed = scenes.TRAIN_SEEDS + 3 * 200 + row
        asked = scenes.questions(scenes.scene(seed, cells), random.Random(f"questions {seed}"), most)
        answers = [answer for _, _, answer in asked]
        assert tokenizer.decode(said[row], skip_special_tokens=False) == "<|im_end|>".join([*answers, ""])


def run(tmp_path, name, *more, processes=1):
    """A training of six steps, too short to learn anything; returns its weights and what it scored."""
    folder = tmp_path / name
    options = ["--folder", folder / "checkpoint", "--run", folder / "run", "--steps", 6, "--batch", 2]
    options += ["--processes", processes, "--save-every", 3, "--pictures", 2, *more]
    assert train.main([str(option) for option in options]) == 0
    with safe_open(folder / "checkpoint" / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path, "whole")
    assert "| describe | 0 | 2 | 0.0 % |" in capsys.readouterr().out

    original, steps, stop_at = train.learning_rate, [], 4

    def stop(step, *rest):
        steps.extend([step] if steps[-1:] != [step] else [])  # it is asked for each group of parameters
        if step == stop_at:
            raise KeyboardInterrupt
        return original(step, *rest)

    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "stopped")
    stop_at = None
    resumed = run(tmp_path, "stopped")
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5], "the state was saved after three steps"
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    with pytest.raises(SystemExit, match="delete it to start anew"):
        run(tmp_path, "stopped", "--lr", 1e-4)


def test_processes_share_the_work(tmp_path):
    weights = run(tmp_path, "shared", processes=2)
    assert all(weight.isfinite().all() for weight in weights.values())
    alone = run(tmp_path, "alone")
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights[name], alone[name]), "each half has its own mean, so it is not quite the same"
    assert torch.allclose(weights[name], alone[name], atol=0.02)
