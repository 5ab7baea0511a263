"""apps/chat.py: each turn answers as a fresh run of the conversation, and runs only what is new."""

import io
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import our_model, random_weights, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import command_line
import cuda_graph
import generate
from apps import chat as chat_app
from apps.chat import Chat, typed_path
from command_line import BUNDLED_CHECKPOINT
from debug_nan import NotFiniteError
from generate import GenerationConfig
from load_weights import load_model
from preprocess import ImageConfig, Processor
from tokenizer import ChatTemplate, Tokenizer

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes.png"
HOW_MANY = "How many shapes are there?"
PROCESSOR = Processor.from_pretrained(BUNDLED_CHECKPOINT)
TOKENIZER = PROCESSOR.tokenizer
IMAGE_ID = TOKENIZER.token_id("<|image_pad|>")
VIDEO_ID = TOKENIZER.token_id("<|video_pad|>")
IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vocab": max(IMAGE_ID, VIDEO_ID) + 1,  # the special tokens come last
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "mrope_section": [2, 3, 3]}
CONFIGS = {
    "plain": small_config(**IDS),
    "window": small_config(use_sliding_window=True, sliding_window=24, max_window_layers=1, **IDS),
    "dynamic": small_config(max_position_embeddings=60, **IDS) | {"rope_scaling": DYNAMIC},
}
WEIGHTS = random_weights(CONFIGS["plain"], seed=5)


def small_model(name="plain", dtype=torch.float32, ends=()):
    """Return a random model; ends: the tokens that end its answers."""
    model = our_model(CONFIGS[name], WEIGHTS, dtype)
    model.generation_config = {"eos_token_id": list(ends), "pad_token_id": 0}
    return model


def random_pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def image_item(seed, height=56, width=84):
    return {"type": "image", "image": random_pixels(seed, height, width)}


def video_item(seed, frames=4, height=56, width=56):
    frames = [Image.fromarray(frame) for frame in random_pixels(seed, frames, height, width)]
    return {"type": "video", "video": frames, "resized_height": height, "resized_width": width}


def next_messages(chat, text):
    """Return the messages of the conversation with a question about the pending media."""
    content = [*chat.pending, {"type": "text", "text": text}]
    return [*chat.messages, {"role": "user", "content": content}]


def take_turn(chat, text, *items):
    """Return the answer's ids of one turn, and those of a fresh run over the whole conversation."""
    for item in items:
        chat.add(item)
    batch = chat.processor(next_messages(chat, text), add_vision_id=chat.add_vision_id)
    [expected] = generate.generate(chat.model, batch, chat.max_new_tokens, chat.config)
    return list(chat.ask(text)), expected


def script_tokens(monkeypatch, ids):
    """Let these be the next tokens that any model chooses."""
    sample = generate.sample
    script = iter(ids)

    def scripted(logits, *rest):
        token = next(script, None)
        if token is None:
            return sample(logits, *rest)
        return torch.tensor([token])

    monkeypatch.setattr(generate, "sample", scripted)


# --------------------------------------------------------------------------- equal to a fresh run
seeds = st.integers(0, 99)
sides = st.sampled_from([56, 84])
media = st.one_of(
    st.builds(image_item, seeds, sides, sides), st.builds(video_item, seeds, st.integers(1, 9))
)
turns = st.lists(
    st.tuples(st.text(max_size=12), st.lists(media, max_size=2)), min_size=2, max_size=4
)
generation_configs = st.sampled_from(
    [
        GenerationConfig(),
        GenerationConfig(repetition_penalty=1.5),
        GenerationConfig(True, 0.9, 20, 0.95, 1.2, seed=3),
        GenerationConfig(True, 1.5, seed=4),
    ]
)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    turns,
    generation_configs,
    st.sampled_from([*CONFIGS]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_ask_equals_a_fresh_run(turns, config, name, dtype, add_vision_id):
    """A random model's answers hold special tokens, and are not the ids that encode their text."""
    chat = Chat(small_model(name, dtype, ends=range(60)), PROCESSOR, config, 12, add_vision_id)
    for text, items in turns:
        answer, expected = take_turn(chat, text, *items)
        assert answer == expected


def test_ask_runs_only_its_own_tokens_and_patches():
    model = small_model()
    chat = Chat(model, PROCESSOR, GenerationConfig(), 6)
    decoder_lengths = []
    patch_counts = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, out: decoder_lengths.append(out.shape[1])
    )
    model.visual.register_forward_hook(lambda module, args, out: patch_counts.append(len(args[0])))
    last_prompt = 0
    for items in ([image_item(1)], [], [video_item(2), image_item(3, 84, 84)]):
        for item in items:
            chat.add(item)
        patches = sum(len(item[item["type"]].patches) for item in chat.pending)
        ids = PROCESSOR(next_messages(chat, "What?")).input_ids[0].tolist()
        pairs = zip(ids, [*chat.cached_ids, None], strict=False)
        shared = next(i for i, (new, cached) in enumerate(pairs) if new != cached)
        assert shared >= last_prompt, "all of the last prompt is reused, with its images"
        last_prompt = len(ids)
        decoder_lengths.clear()
        patch_counts.clear()
        assert len(list(chat.ask("What?"))) == 6
        assert decoder_lengths == [len(ids) - shared, 1, 1, 1, 1, 1]
        assert chat.prompt_tokens == len(ids) - shared
        assert sum(patch_counts) == patches
        assert len(patch_counts) == len(items)


def test_ask_cuts_off_an_answer_that_is_encoded_in_other_ids(monkeypatch):
    chat = Chat(small_model(), PROCESSOR, GenerationConfig(), 8)
    whole = TOKENIZER.encode("How many")
    parts = [TOKENIZER.encode(character)[0] for character in "How many"]
    assert len(whole) == 2
    script_tokens(monkeypatch, parts)
    chat.add(image_item(1))
    assert list(chat.ask("What?")) == parts
    prompt = len(chat.cached_ids) - 7
    answer, expected = take_turn(chat, "And now?")
    assert answer == expected
    assert chat.cached_ids[prompt : prompt + 2] == whole
    assert len(chat.cached_ids) == prompt + chat.prompt_tokens + 7


def test_ask_cuts_off_the_end_of_a_prompt_that_merges_with_the_answer(monkeypatch):
    """The prompt ends with a line end. Where the answer begins with one, the published vocabulary
    has one token for both; here it replaces the last one of the bundled vocabulary."""
    description = json.loads((BUNDLED_CHECKPOINT / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    merges = description["model"]["merges"]
    both = vocabulary.pop("".join(merges.pop()))
    vocabulary["ĊĊ"] = both
    merges.append(["Ċ", "Ċ"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    processor = Processor(Tokenizer(backend, "<|endoftext|>", "<|im_end|>"), ImageConfig())
    chat = Chat(small_model(), processor, GenerationConfig(), 3)
    script_tokens(monkeypatch, [*TOKENIZER.encode("\n"), *TOKENIZER.encode("Four")])
    chat.add(image_item(1))
    list(chat.ask("What?"))
    before = chat.cached_ids
    answer, expected = take_turn(chat, "And now?", image_item(2))
    assert answer == expected
    differing = next(i for i in range(len(before)) if before[i] != chat.cached_ids[i])
    assert before[differing] == TOKENIZER.encode("\n")[0]
    assert chat.cached_ids[differing] == both


# Each turn changes the prompt of the earlier ones: in front of the image, and right behind it.
CHANGING_TEMPLATES = {
    "before the image": "{{ messages | length }}{% for message in messages %}<|im_start|>"
    "{{ message.role }} {% for item in message.content %}{% if item.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}",
    "after the image": "{% for message in messages %}<|im_start|>"
    "{{ message.role }} {% for item in message.content %}{% if item.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{{ messages | length }}"
    "{% else %}{{ item.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHANGING_TEMPLATES])
def test_ask_equals_a_fresh_run_with_a_template_that_changes_earlier_turns(name):
    template = ChatTemplate(CHANGING_TEMPLATES[name], "chat_template.jinja")
    tokenizer = Tokenizer(TOKENIZER.backend, "<|endoftext|>", "<|im_end|>", chat_template=template)
    chat = Chat(small_model(), Processor(tokenizer, ImageConfig()), GenerationConfig(), 6)
    take_turn(chat, "What?", image_item(1))
    for items in ([image_item(2, 84, 84)], []):
        answer, expected = take_turn(chat, "And now?", *items)
        assert answer == expected


@pytest.mark.slow
def test_ask_keeps_a_stopped_answer_as_far_as_it_came():
    chat = Chat(small_model(), PROCESSOR, GenerationConfig(), 30)
    with closing(chat.ask("What?")) as tokens:
        answer = [next(tokens) for _ in range(4)]
    assert chat.messages[-1] == {"role": "assistant", "content": TOKENIZER.decode(answer)}
    answer, expected = take_turn(chat, "And now?", image_item(1))
    assert answer == expected
    assert len(chat.messages) == 4


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3])
def test_ask_withdraws_a_question_that_is_interrupted(step):
    model = small_model()
    chat = Chat(model, PROCESSOR, GenerationConfig(), 6)
    list(chat.ask("What?"))
    chat.add(image_item(1))
    messages = list(chat.messages)
    pending = list(chat.pending)
    runs = []

    def interrupt(*_):
        runs.append(1)
        if len(runs) == step + 1:
            raise KeyboardInterrupt

    # The keys of the first layer are in the cache by then.
    hook = model.model.layers[1].register_forward_hook(interrupt)
    with suppress(KeyboardInterrupt):
        list(chat.ask("And now?"))
    hook.remove()
    assert len(runs) == step + 1
    assert chat.messages == messages
    assert chat.pending == pending
    chat.pending = []
    # An image of the same size has the same ids, but not the same pixels.
    answer, expected = take_turn(chat, "And now?", image_item(2))
    assert answer == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the conversation has reached")
def test_ask_doubles_the_memory_of_the_cache(monkeypatch):
    monkeypatch.setattr(generate, "INITIAL_CAPACITY", 1)
    script_tokens(monkeypatch, TOKENIZER.encode("x") * 1000)
    chat = Chat(small_model(), PROCESSOR, GenerationConfig(), 8)
    capacities = []
    for _ in range(20):
        list(chat.ask("And then, what?"))
        if chat.cache.capacity not in capacities:
            capacities.append(chat.cache.capacity)
    assert len(chat.cached_ids) > 500
    assert 3 < len(capacities) < 10
    assert capacities == sorted(capacities)


def test_ask_allocates_no_memory_for_a_huge_max_new_tokens():
    chat = Chat(small_model(), PROCESSOR, GenerationConfig(), 10**12)
    with closing(chat.ask("What?")) as tokens:
        next(tokens)
    assert chat.cache.capacity < 2000


@pytest.mark.filterwarnings("ignore:CUDA graph")  # a CPU has none
def test_ask_answers_the_same_with_the_captured_step():
    model = small_model(dtype=torch.float64)
    decode = cuda_graph.CapturedDecodeStep(model, generate.decode_step)
    chat = Chat(model, PROCESSOR, GenerationConfig(), 8, decode=decode)
    for items in ([image_item(1)], [], [video_item(2)]):
        answer, expected = take_turn(chat, "What?", *items)
        assert answer == expected
    assert decode.step.cache is chat.cache


def test_reset_keeps_only_the_system_message():
    chat = Chat(small_model(), PROCESSOR, GenerationConfig(), 4)
    system = {"role": "system", "content": "Be brief."}
    chat.messages = [system]
    first = take_turn(chat, "What?", image_item(1))
    chat.add(image_item(2))
    chat.reset()
    assert chat.messages == [system]
    assert chat.pending == []
    assert take_turn(chat, "What?", image_item(1)) == first


# --------------------------------------------------------------------------------------- commands
@pytest.fixture
def converse(monkeypatch, capsys, tmp_path):
    """Give lines to the bundled model, in a directory with an image; return (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("shapes.png", "my image.png", "it's.png"):
        Path(name).write_bytes(SHAPES.read_bytes())

    def converse(*lines, options=("--quiet",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert chat_app.main([*options]) == 0
        return capsys.readouterr()

    return converse


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/nonsense", "there is no command /nonsense; /help lists them"),
        ("/image", "/image needs a file: /image FILE"),
        ("/video  ", "/video needs a file: /video FILE"),
        ("/image missing.png", "there is no image at missing.png"),
        ("/save", "/save needs a file: /save FILE"),
        ("/save chat.json", "there is nothing to save yet"),
        ("not \udcff Unicode", "this is not a valid Unicode string"),
    ],
)
def test_console_continues_after_a_mistake(converse, line, sentence):
    written = converse(line, "/image shapes.png", HOW_MANY)
    assert written.out == "Four.\n"
    assert written.err.startswith(sentence)
    assert written.err.count("\n") == 1


def test_console_continues_after_running_out_of_memory(converse, monkeypatch):
    stream = chat_app.stream
    calls = []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return stream(*arguments)

    monkeypatch.setattr(chat_app, "stream", fail_once)
    written = converse("/image shapes.png", HOW_MANY, HOW_MANY)
    assert written.out == "Four.\n"
    assert written.err.startswith("out of memory (out of memory): lower --max-pixels")
    assert written.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        NotFiniteError("the scores are not finite"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 9 TiB"),
    ],
    ids=str,
)
def test_ask_keeps_the_conversation_when_an_answer_fails(error, monkeypatch):
    """The turn that fails is withdrawn with its question; the messages before it stay."""
    chat = Chat(small_model(), PROCESSOR, GenerationConfig(), 4)
    stream = chat_app.stream
    list(chat.ask("What?"))
    before = list(chat.messages)

    def fail(*arguments):
        yield next(stream(*arguments))
        raise error

    monkeypatch.setattr(chat_app, "stream", fail)
    with pytest.raises(type(error)):
        list(chat.ask("And now?"))
    monkeypatch.setattr(chat_app, "stream", stream)
    assert chat.messages == before
    answer, expected = take_turn(chat, "And now?")
    assert answer == expected


def test_main_raises_an_error_of_the_program_itself(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(chat_app, "stream", fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        chat_app.main(["--quiet"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", "missing.png"], "there is no image at missing.png"),
        (["--top-p", "2"], "top_p: expected a number above 0 and at most 1, got 2.0"),
        (["--model", "missing/model"], "missing/model"),
    ],
)
def test_main_ends_with_one_sentence_for_a_wrong_option(options, sentence, monkeypatch, capsys):
    """Nothing but an option that names a checkpoint waits for the weights."""

    def fail(*_):
        raise AssertionError("the weights are loaded before the options are checked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(command_line, "load_model", fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert chat_app.main(["--quiet", *options]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("apps.chat: ")
    assert sentence in written.err
    assert written.err.count("\n") == 1


def test_main_refuses_a_closed_stdin(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert chat_app.main(["--quiet"]) == 2
    assert capsys.readouterr().err.startswith("apps.chat: stdin is closed")


def test_main_answers_its_prompt_where_stdin_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert chat_app.main(["--quiet", "--prompt", "How many?", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_main_ends_where_stdin_cannot_be_read(monkeypatch, tmp_path, capsys):
    """Not with the same error for ever."""
    with open(tmp_path / "a", "w") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert chat_app.main(["--quiet"]) == 2
    assert capsys.readouterr().err == "apps.chat: cannot read stdin: not readable\n"


def test_console_loses_only_a_line_that_is_too_long(converse, monkeypatch):
    monkeypatch.setattr(chat_app, "MAX_LINE", 50)
    written = converse("x" * 5000, "y" * 51, "z" * 50, "/exit")
    sentence = "a line of stdin has more than 50 characters"
    assert written.err.splitlines() == [sentence, sentence]
    assert written.out.count("\n") == 1


def test_main_refuses_debug_nan_with_cuda_graph(capsys):
    with pytest.raises(SystemExit) as exit_info:
        chat_app.main(["--cuda-graph", "--debug-nan"])
    assert exit_info.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


def test_main_names_the_first_layer_with_nan_and_continues(converse, monkeypatch):
    load = command_line.load_checkpoint

    def load_damaged(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            model.visual.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(command_line, "load_checkpoint", load_damaged)
    options = ("--quiet", "--debug-nan", "--max-new-tokens", "2")
    written = converse("/image shapes.png", HOW_MANY, "/reset", "hello", options=options)
    assert "the output of visual.blocks.0.mlp.fc1 is the first with NaN" in written.err
    assert written.err.count("\n") == 1
    assert written.out.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_main_reads_utf_8_in_any_locale(encoding, tmp_path):
    """Bytes that are not UTF-8 give one sentence."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "apps.chat", "--quiet", "--max-new-tokens", "2"]
    lines = "é?\n".encode() + b"\xff\xfe?\n" + f"/save {tmp_path}/chat.json\n".encode()
    done = subprocess.run(command, input=lines, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0
    refused = encoding != "latin-1"  # where every byte is a character
    assert done.stderr.count(b"\n") == int(refused)
    assert (b"not a valid Unicode" in done.stderr) == refused
    messages = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["messages"]
    assert len(messages) == (2 if refused else 4)
    text = messages[0]["content"][0]["text"]
    assert text == ("é?" if refused else "é?".encode().decode("latin-1"))


@pytest.mark.slow
def test_save_writes_the_conversation_as_it_was_given(converse):
    Path("frames").mkdir()
    for n in range(6):
        Image.fromarray(random_pixels(n, 56, 56)).save(f"frames/{n}.png")
    options = ["--image", "shapes.png", "--prompt", "/How many?", "--system", "Be brief."]
    options += ["--nframes", "4", "--dtype", "float32", "--device", "cpu"]
    lines = ("/image 'my image.png'", "/video frames", "//éh?", "", "/save chat.json")
    converse(*lines, options=options)
    [line] = Path("chat.json").read_text(encoding="utf-8").splitlines()
    assert "éh?" in line
    messages = json.loads(line)["messages"]
    system, first_question, first_answer, question, answer = messages
    assert system == {"role": "system", "content": "Be brief."}
    image = {"type": "image", "image": "shapes.png"}
    assert first_question["content"] == [image, {"type": "text", "text": "/How many?"}]
    assert question["content"] == [
        {"type": "image", "image": "my image.png"},
        {"type": "video", "video": "frames", "nframes": 4},
        {"type": "text", "text": "/éh?"},
    ]
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    for message, before in ((first_answer, messages[:2]), (answer, messages[:4])):
        [ids] = generate.generate(model, PROCESSOR(before), 128)
        assert message == {"role": "assistant", "content": TOKENIZER.decode(ids)}


@pytest.mark.slow
def test_ask_continues_after_an_answer_that_a_stop_string_cut(monkeypatch):
    """The message is the text before it, and what the cache holds of the rest is not reused."""
    config = GenerationConfig(stop_strings=["lef"])
    chat = Chat(small_model(), PROCESSOR, config, 30)
    script_tokens(monkeypatch, TOKENIZER.encode("A circle at the left, and a square"))
    answer = list(chat.ask("What?"))
    assert TOKENIZER.decode(answer).endswith("left")
    assert chat.messages[-1] == {"role": "assistant", "content": "A circle at the "}
    question = {"role": "user", "content": "And now?"}
    batch = PROCESSOR([*chat.messages, question])
    monkeypatch.undo()
    tokenizer = PROCESSOR.tokenizer
    [expected] = generate.generate(chat.model, batch, 30, config, tokenizer)
    assert list(chat.ask("And now?")) == expected
    assert chat.prompt_tokens < batch.input_ids.shape[1]


def test_stop_cuts_the_answers_of_the_program(converse):
    written = converse("/image shapes.png", HOW_MANY, options=["--quiet", "--stop", "ur"])
    assert written.out == "Fo\n"


def test_save_overwrites_nothing(converse):
    Path("chat.json").write_text("mine")
    written = converse("hello", "/save chat.json", "/save missing/chat.json", "/save .")
    assert written.err.splitlines() == [
        "chat.json exists: expected a new file for /save",
        "cannot write missing/chat.json: there is no directory missing",
        "/save is ., expected a file",
    ]
    assert Path("chat.json").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file name is Unicode")
def test_save_keeps_a_file_name_that_is_not_utf_8(converse):
    name = os.fsdecode(b"caf\xe9.png")
    Path(name).write_bytes(SHAPES.read_bytes())
    written = converse("hello", "/save chat.json", options=("--quiet", "--image", name))
    assert written.err == ""
    [question, _] = json.loads(Path("chat.json").read_text(encoding="utf-8"))["messages"]
    assert question["content"][0] == {"type": "image", "image": name}
    assert Path(question["content"][0]["image"]).is_file()


@pytest.mark.slow
def test_console_attaches_media_to_the_next_question(converse):
    assert converse(HOW_MANY, options=("--quiet", "--image", "shapes.png")).out == "Four.\n"
    alone = converse(HOW_MANY).out
    written = converse("/image shapes.png", "/reset", HOW_MANY, "/exit", HOW_MANY)
    assert written.out == alone != "Four.\n"


@pytest.mark.slow
def test_console_reports_what_was_computed_unless_quiet(converse):
    lines = ("/image shapes.png", HOW_MANY, HOW_MANY, "/help")
    written = converse(*lines, options=())
    assert written.out == "Four.\nFour.\n"
    assert "shapes.png: 200×136 pixels" in written.err
    assert "62 tokens in, 3 out" in written.err
    assert "16 tokens in, 3 out" in written.err
    assert "/video FILE" in written.err
    assert converse(*lines[:-1]) == ("Four.\nFour.\n", "")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a backslash separates directories")
@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("a b.png", "a b.png"),
        ("'a b.png'", "a b.png"),
        ('"a\\b.png"', "a\\b.png"),
        (r"a\ b\'c.png", "a b'c.png"),
        (r"'it'\''s a.png'", "it's a.png"),
        ('"it\'s a.png"', "it's a.png"),
        ("it's a dog's.png", "it's a dog's.png"),  # exists under this name
        ("it's new.png", "it's new.png"),
        ("~/a.png", str(Path.home() / "a.png")),
        ("'", "'"),
        ("'a' b.png", "'a' b.png"),
        ("''", ""),
        ("https://example.org/a?b=~c#d&e=1", "https://example.org/a?b=~c#d&e=1"),
    ],
)
def test_typed_path_is_what_is_typed_or_dropped(typed, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("it's a dog's.png").touch()
    assert typed_path("/image", typed) == path


# -------------------------------------------------------------------------- Ctrl-C and terminals
@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """The bundled checkpoint, but no token ends its answers."""
    directory = tmp_path_factory.mktemp("endless")
    for path in BUNDLED_CHECKPOINT.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "generation_config.json").write_text('{"eos_token_id": []}')
    return directory


def start(*options, before=(), **streams):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "TERM": "dumb",
    }
    command = [*before, sys.executable, "-m", "apps.chat", *map(str, options)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, bufsize=0, **streams)


@pytest.mark.slow
def test_main_ends_the_answer_alone_at_ctrl_c(endless, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = ("--model", endless, "--max-new-tokens", 20000, "--prompt", "hello", "--quiet")
    with start(*options, **pipes) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(f"/save {tmp_path}/chat.json\n".encode())
    assert process.returncode == 0
    assert err == b""
    answer = json.loads((tmp_path / "chat.json").read_text())["messages"][-1]["content"]
    assert (first + out).decode() == answer + "\n"
    assert len(TOKENIZER.encode(answer)) < 20000


def test_answer_is_withdrawn_at_a_second_ctrl_c():
    model = small_model()
    chat = Chat(model, PROCESSOR, GenerationConfig(), 50)
    passes = []

    def press(*_):
        passes.append(1)
        if len(passes) in (4, 5):
            signal.raise_signal(signal.SIGINT)

    model.model.layers[1].register_forward_hook(press)
    before = signal.getsignal(signal.SIGINT)
    chat_app.answer(chat, "What?")  # at the first one, the token being computed is the last
    assert len(passes) == 4
    assert chat.messages[-1]["role"] == "assistant"
    passes[:] = [1] * 3
    messages = chat.messages
    model.model.layers[0].register_forward_hook(press)  # so that both come within one pass
    with pytest.raises(KeyboardInterrupt):
        chat_app.answer(chat, "And now?")
    assert len(passes) == 5
    assert chat.messages == messages
    assert signal.getsignal(signal.SIGINT) is before


# Makes the terminal that is stdin the one whose ^C becomes SIGINT, then runs the command.
IN_TERMINAL = """import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("redirected", [False, True])
def test_console_has_a_prompt_that_ctrl_c_clears(endless, tmp_path, redirected):
    import pty

    terminal, other_end = pty.openpty()
    screen = b""

    def wait_for(text, again=b""):
        nonlocal screen
        while text not in screen:
            if again and not select.select([terminal], [], [], 10)[0]:
                os.write(terminal, again)
                again = b""
            assert select.select([terminal], [], [], 60)[0], f"no {text} after {screen}"
            screen += os.read(terminal, 1000)
        screen = screen.split(text, 1)[1]

    options = () if redirected else ("--model", endless, "--max-new-tokens", 20000)
    with open(tmp_path / "answers", "w+b") as file:
        streams = {"stdin": other_end, "stdout": other_end, "stderr": other_end}
        if redirected:
            streams["stdout"] = file
        process = start(*options, before=(sys.executable, "-c", IN_TERMINAL), **streams)
        os.close(other_end)
        prompt = b"\n" if redirected else b"> "
        try:
            wait_for(b"/help lists the commands")
            wait_for(prompt)
            # Python can miss a ^C between two reads of the keyboard; two of them count as one.
            os.write(terminal, b"half a quest\x03")
            wait_for(b"leaves)", again=b"\x03")
            wait_for(prompt)
            os.write(terminal, f"/image {SHAPES}\n".encode())
            wait_for(b"35 tokens")
            wait_for(b"[image] > " if not redirected else b"\n")
            os.write(terminal, b"Describe the image.\n")
            if not redirected:
                wait_for(b"square")
                os.write(terminal, b"\x03")
            wait_for(b" tokens in, ")
            wait_for(prompt)
            os.write(terminal, b"\x04")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(terminal)
        file.seek(0)
        written = file.read()
    if redirected:
        assert written.startswith(b"A blue triangle")
        assert written.count(b"\n") == 1
    else:
        assert written == b""
