"""`extras/chat.py`: every turn answers as a fresh run over the whole conversation does, and runs only what is new."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
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

import generate as command
from extras import chat as chat_module
from extras.chat import Chat, plain_path
from generate import Sampling, generate
from preprocess import ImageConfig, Processor
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
PROCESSOR = Processor.from_pretrained(command.TINY)
TOKENIZER = PROCESSOR.tokenizer
IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
IDS = {name: TOKENIZER.token_id(token) for name, token in IDS.items()}
IDS["vocab"] = max(IDS.values()) + 1  # the control tokens come last
CONFIGS = {
    "plain": small_config(**IDS),
    "window": small_config(use_sliding_window=True, sliding_window=24, max_window_layers=1, **IDS),
    "dynamic": small_config(max_position_embeddings=60, **IDS)
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "mrope_section": [2, 3, 3]}},
}
WEIGHTS = random_weights(CONFIGS["plain"], seed=5)


def model_of(name="plain", dtype=torch.float32, ends=()):
    model = our_model(CONFIGS[name], WEIGHTS, dtype)
    model.generation_config = {"eos_token_id": list(ends), "pad_token_id": 0}
    return model


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def picture(seed, height=56, width=84):
    return {"type": "image", "image": pixels(seed, height, width)}


def clip(seed, frames=4, height=56, width=56):
    frames = [Image.fromarray(frame) for frame in pixels(seed, frames, height, width)]
    return {"type": "video", "video": frames, "resized_height": height, "resized_width": width}


def turn(chat, text, *items):
    """One turn, and the same as a fresh run over the whole conversation → the ids of both answers."""
    for item in items:
        chat.add(item)
    question = {"role": "user", "content": [*chat.waiting, {"type": "text", "text": text}]}
    batch = chat.processor([*chat.messages, question], add_vision_id=chat.add_vision_id)
    [expected] = generate(chat.model, batch, chat.max_new_tokens, chat.sampling)
    return list(chat.ask(text)), expected


def say_these(monkeypatch, ids):
    """The next tokens that any model makes."""
    choose, script = command.choose, iter(ids)

    def scripted(logits, *rest):
        id = next(script, None)
        return choose(logits, *rest) if id is None else torch.tensor([id])

    monkeypatch.setattr(command, "choose", scripted)


# ---------------------------------------------------------------------------------------------- equal to a fresh run

seeds = st.integers(0, 99)
media = st.one_of(
    st.builds(picture, seeds, st.sampled_from([56, 84]), st.sampled_from([56, 84])),
    st.builds(clip, seeds, st.integers(1, 9)),
)
turns = st.lists(
    st.tuples(st.text(max_size=12), st.lists(media, max_size=2)), min_size=2, max_size=4
)
ways = st.sampled_from(
    [
        Sampling(),
        Sampling(repetition_penalty=1.5),
        Sampling(True, 0.9, 20, 0.95, 1.2, seed=3),
        Sampling(True, 1.5, seed=4),
    ]
)


@settings(max_examples=40)
@given(
    turns,
    ways,
    st.sampled_from([*CONFIGS]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_every_turn_equals_a_fresh_run(turns, sampling, name, dtype, add_vision_id):
    """The answers of a random model are not the canonical ids of their text, and hold control tokens."""
    chat = Chat(model_of(name, dtype, ends=range(60)), PROCESSOR, sampling, 12, add_vision_id)
    for text, items in turns:
        answer, expected = turn(chat, text, *items)
        assert answer == expected


def test_a_turn_runs_only_its_own_tokens_and_patches():
    model = model_of()
    chat, decoder, tower = Chat(model, PROCESSOR, Sampling(), 6), [], []
    model.model.layers[0].register_forward_hook(
        lambda module, args, out: decoder.append(out.shape[1])
    )
    model.visual.register_forward_hook(lambda module, args, out: tower.append(len(args[0])))
    prompt = 0
    for items in ([picture(1)], [], [clip(2), picture(3, 84, 84)]):
        patches = sum(len(chat.add(item).patches) for item in items)
        messages = [*chat.messages, {"role": "user", "content": [*chat.waiting, {"text": "What?"}]}]
        ids = PROCESSOR(messages).input_ids[0].tolist()
        pairs = zip(ids, [*chat.cached_ids, None], strict=False)
        shared = next(i for i, (asked, cached) in enumerate(pairs) if asked != cached)
        assert shared >= prompt  # all of the last prompt stays, with its pictures
        prompt = len(ids)
        decoder.clear()
        tower.clear()
        assert len(list(chat.ask("What?"))) == 6
        assert decoder == [len(ids) - shared, 1, 1, 1, 1, 1]
        assert chat.ran.input_ids.tolist() == [ids[shared:]]
        assert sum(tower) == patches
        assert len(tower) == len(items)


def test_an_answer_in_other_ids_than_its_text_is_encoded_in_is_cut_off(monkeypatch):
    chat = Chat(model_of(), PROCESSOR, Sampling(), 8)
    whole, parts = TOKENIZER.encode("How many"), [TOKENIZER.encode(text)[0] for text in "How many"]
    assert len(whole) == 2
    say_these(monkeypatch, parts)
    chat.add(picture(1))
    assert list(chat.ask("What?")) == parts
    prompt = len(chat.cached_ids) - 7
    answer, expected = turn(chat, "And now?")
    assert answer == expected
    assert chat.cached_ids[prompt : prompt + 2] == whole
    assert (
        len(chat.cached_ids) == prompt - len(parts) + chat.ran.input_ids.shape[1] + len(parts) + 7
    )


def test_an_answer_that_melts_into_the_prompt_is_cut_off_with_it(monkeypatch):
    """The prompt ends with a line end. Where the answer begins with one, the published vocabulary has one token for
    both; here it takes the place of the bundled vocabulary's last one."""
    description = json.loads((command.TINY / "tokenizer.json").read_text())
    vocabulary, merges = description["model"]["vocab"], description["model"]["merges"]
    both = vocabulary["ĊĊ"] = vocabulary.pop("".join(merges.pop()))
    merges.append(["Ċ", "Ċ"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    processor = Processor(Tokenizer(backend, "<|endoftext|>", "<|im_end|>"), ImageConfig())
    chat = Chat(model_of(), processor, Sampling(), 3)
    say_these(monkeypatch, [*TOKENIZER.encode("\n"), *TOKENIZER.encode("Four")])
    chat.add(picture(1))
    list(chat.ask("What?"))
    before = chat.cached_ids
    answer, expected = turn(chat, "And now?", picture(2))
    assert answer == expected
    at = next(i for i in range(len(before)) if before[i] != chat.cached_ids[i])
    assert (before[at], chat.cached_ids[at]) == (TOKENIZER.encode("\n")[0], both)


def test_a_stopped_answer_stands_as_far_as_it_came():
    chat = Chat(model_of(), PROCESSOR, Sampling(), 30)
    with closing(chat.ask("What?")) as ids:
        said = [next(ids) for _ in range(4)]
    assert chat.messages[-1] == {"role": "assistant", "content": TOKENIZER.decode(said)}
    answer, expected = turn(chat, "And now?", picture(1))
    assert answer == expected
    assert len(chat.messages) == 4


@pytest.mark.parametrize("step", [0, 3])
def test_a_turn_that_breaks_is_withdrawn(step):
    model = model_of()
    chat, runs = Chat(model, PROCESSOR, Sampling(), 6), []
    list(chat.ask("What?"))
    chat.add(picture(1))
    messages, waiting = list(chat.messages), list(chat.waiting)

    def break_off(*_):
        runs.append(1)
        if len(runs) == step + 1:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(
        break_off
    )  # the first layer's keys are in the cache by then
    with suppress(KeyboardInterrupt):
        list(chat.ask("And now?"))
    hook.remove()
    assert len(runs) == step + 1
    assert (chat.messages, chat.waiting) == (messages, waiting)
    chat.waiting = []
    answer, expected = turn(
        chat, "And now?", picture(2)
    )  # of the same size: the same ids, but not the same picture
    assert answer == expected


@pytest.mark.filterwarnings("ignore:the conversation has reached")
def test_the_cache_grows_by_doubling(monkeypatch):
    monkeypatch.setattr(command, "ROOM", 1)
    chat, capacities = Chat(model_of(), PROCESSOR, Sampling(), 8), []
    for _ in range(20):
        answer, expected = turn(chat, "And then, what?")
        assert answer == expected
        if chat.cache.capacity not in capacities:
            capacities.append(chat.cache.capacity)
    assert len(chat.cached_ids) > 500
    assert 3 < len(capacities) < 10
    assert capacities == sorted(capacities)


def test_a_huge_max_new_tokens_costs_a_chat_no_memory():
    chat = Chat(model_of(), PROCESSOR, Sampling(), 10**12)
    with closing(chat.ask("What?")) as ids:
        next(ids)
    assert chat.cache.capacity < 2000


def test_reset_leaves_the_system_message_alone():
    chat = Chat(model_of(), PROCESSOR, Sampling(), 4)
    chat.messages = [{"role": "system", "content": "Be brief."}]
    first = turn(chat, "What?", picture(1))
    chat.add(picture(2))
    chat.reset()
    assert (chat.messages, chat.waiting) == ([{"role": "system", "content": "Be brief."}], [])
    assert turn(chat, "What?", picture(1)) == first


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """Lines for the bundled model, in a folder with a picture → (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("shapes.png", "my picture.png"):
        Path(name).write_bytes((ROOT / "examples" / "shapes.png").read_bytes())

    def talk(*lines, options=("--quiet",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert command.main(["--chat", *options]) == 0
        return capsys.readouterr()

    return talk


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "/nonsense",
            "there is no command /nonsense; /help lists them (a question may begin with //)",
        ),
        ("/image", "/image needs a file: /image FILE"),
        ("/video  ", "/video needs a file: /video FILE"),
        ("/image missing.png", "there is no image at missing.png"),
        ("/save", "/save needs a file: /save FILE"),
        ("/save talk.json", "there is nothing to save yet"),
        ("not \udcff Unicode", "this is not a valid Unicode string: 'user"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_chat_goes_on(talk, line, sentence):
    said = talk(line, "/image shapes.png", "How many shapes are there?")
    assert said.out == "Four.\n"
    assert said.err.startswith(sentence)
    assert said.err.count("\n") == 1


def test_a_wrong_path_on_the_command_line_ends_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert command.main(["--chat", "--quiet", "--image", "missing.png"]) == 2
    assert capsys.readouterr() == ("", "generate.py: there is no image at missing.png\n")


def test_running_out_of_memory_ends_the_answer_alone(talk, monkeypatch):
    stream, calls = chat_module.stream, []

    def fail_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return stream(*args)

    monkeypatch.setattr(chat_module, "stream", fail_once)
    said = talk("/image shapes.png", "How many shapes are there?", "How many shapes are there?")
    assert said.out == "Four.\n"
    assert said.err.startswith("out of memory (out of memory): lower --max-pixels")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        command.NotFiniteError("the scores are not finite"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 9 TiB"),
    ],
    ids=str,
)
def test_the_conversation_is_kept_when_an_answer_fails(error, monkeypatch, capsys):
    """The turn that fails is withdrawn with its question; what was said before stays."""
    chat, stream = Chat(model_of(), PROCESSOR, Sampling(), 4), chat_module.stream
    list(chat.ask("What?"))
    before = list(chat.messages)

    def fails(*arguments):
        yield next(stream(*arguments))
        raise error

    monkeypatch.setattr(chat_module, "stream", fails)
    with pytest.raises(type(error)):
        list(chat.ask("And now?"))
    monkeypatch.setattr(chat_module, "stream", stream)
    assert chat.messages == before
    answer, expected = turn(chat, "And now?")
    assert answer == expected


def test_an_error_of_the_program_itself_ends_the_chat(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(chat_module, "stream", fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command.main(["--chat", "--quiet"])


def test_a_closed_stdin_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert command.main(["--chat", "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "generate.py: stdin is closed, expected the questions of --chat\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_bytes_that_stdin_cannot_decode_end_no_chat(encoding, tmp_path):
    """UTF-8 is read in any locale; bytes that are none are one sentence."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    line = [sys.executable, str(ROOT / "generate.py"), "--chat", "--quiet", "--max-new-tokens", "2"]
    asked = "é?\n".encode() + b"\xff\xfe?\n" + f"/save {tmp_path}/talk.json\n".encode()
    done = subprocess.run(line, input=asked, capture_output=True, env=environment)
    assert done.returncode == 0
    refused = encoding != "latin-1"  # where every byte is a character
    assert (done.stderr.count(b"\n"), b"not a valid Unicode" in done.stderr) == (refused, refused)
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert len(messages) == (2 if refused else 4)
    text = messages[0]["content"][0]["text"]
    assert text == ("é?" if refused else "é?".encode().decode("latin-1"))


def test_a_chat_may_run_in_a_thread_of_its_own():
    """Signals are the main thread's: there is no handler to set, and no need for one."""
    errors = []

    def work():
        try:
            with chat_module.counted_interrupts() as presses:
                assert presses == []
        except BaseException as error:
            errors.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert signal.getsignal(signal.SIGINT) is before


def test_what_was_saved_is_the_conversation(talk):
    Path("clip").mkdir()
    for n in range(6):
        Image.fromarray(pixels(n, 56, 56)).save(f"clip/{n}.png")
    options = [
        "--image",
        "shapes.png",
        "--prompt",
        "/How many?",
        "--system",
        "Be brief.",
        "--nframes",
        "4",
    ]
    options += ["--dtype", "float32"]
    talk("/image 'my picture.png'", "/video clip", "//éh?", "", "/save talk.json", options=options)
    [line] = Path("talk.json").read_text(encoding="utf-8").splitlines()
    assert "éh?" in line
    messages = json.loads(line)["messages"]
    system, first, answer, second, last = messages
    assert system == {"role": "system", "content": "Be brief."}
    image = {"type": "image", "image": "shapes.png"}
    assert first == {"role": "user", "content": [image, {"type": "text", "text": "/How many?"}]}
    items = [
        {"type": "image", "image": "my picture.png"},
        {"type": "video", "video": "clip", "nframes": 4},
    ]
    assert second == {"role": "user", "content": [*items, {"type": "text", "text": "/éh?"}]}
    model = command.load_model(command.TINY, dtype=torch.float32)
    for said, before in ((answer, messages[:2]), (last, messages[:4])):
        [ids] = generate(model, PROCESSOR(before), 128)
        assert said == {"role": "assistant", "content": TOKENIZER.decode(ids)}


def test_saving_overwrites_nothing(talk):
    Path("talk.json").write_text("mine")
    said = talk("hello", "/save talk.json", "/save missing/talk.json", "/save .")
    assert said.err.splitlines() == [
        "cannot write talk.json: File exists",
        "cannot write missing/talk.json: No such file or directory",
        "cannot write .: File exists",
    ]
    assert Path("talk.json").read_text() == "mine"


def test_pictures_wait_for_a_question_and_reset_forgets_them(talk):
    how_many = "How many shapes are there?"
    assert talk(how_many, options=("--quiet", "--image", "shapes.png")).out == "Four.\n"
    alone = talk(how_many).out
    said = talk("/image shapes.png", "/reset", how_many, "/exit", how_many)
    assert said.out == alone != "Four.\n"


def test_quiet_leaves_the_answers_and_else_what_came_in_is_told(talk):
    lines = (
        "/image shapes.png",
        "How many shapes are there?",
        "How many shapes are there?",
        "/help",
    )
    said = talk(*lines, options=())
    assert said.out == "Four.\nFour.\n"
    for part in (
        "shapes.png: 200×136 pixels",
        "62 tokens in, 3 out",
        "16 tokens in, 3 out",
        "/video FILE",
    ):
        assert part in said.err
    assert talk(*lines[:-1]) == ("Four.\nFour.\n", "")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a backslash separates folders")
@pytest.mark.parametrize(
    ("typed", "path"),
    [
        (" a b.png ", "a b.png"),
        ("'a b.png'", "a b.png"),
        ('"a\\b.png"', "a\\b.png"),
        (r"a\ b\'c.png", "a b'c.png"),
        ("~/a.png", str(Path.home() / "a.png")),
        ("'", "'"),
        ("https://example.org/a?b=~c#'d'", "https://example.org/a?b=~c#'d'"),
    ],
)
def test_a_path_may_be_typed_or_dropped(typed, path):
    assert plain_path(typed) == path


# ------------------------------------------------------------------------------------------- Ctrl-C and terminals


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """The bundled model, but no token ends its answers."""
    folder = tmp_path_factory.mktemp("endless")
    for path in command.TINY.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')
    return folder


def start(*options, before=(), **ends):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "TERM": "dumb",
    }
    line = [*before, sys.executable, str(ROOT / "generate.py"), "--chat", *map(str, options)]
    return subprocess.Popen(line, env=environment, bufsize=0, **ends)


def test_ctrl_c_stops_the_answer_and_not_the_program(endless, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(
        "--model", endless, "--max-new-tokens", 20000, "--prompt", "hello", "--quiet", **pipes
    ) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(f"/save {tmp_path}/talk.json\n".encode())
    assert (process.returncode, err) == (0, b"")
    answer = json.loads((tmp_path / "talk.json").read_text())["messages"][-1]["content"]
    assert (first + out).decode() == answer + "\n"
    assert len(TOKENIZER.encode(answer)) < 20000


def test_a_second_ctrl_c_breaks_off_at_once():
    model, presses = model_of(), []
    chat = Chat(model, PROCESSOR, Sampling(), 50)

    def press(*_):
        presses.append(1)
        if len(presses) in (4, 5):
            signal.raise_signal(signal.SIGINT)

    model.model.layers[1].register_forward_hook(press)
    before = signal.getsignal(signal.SIGINT)
    chat_module.answer(
        chat, "What?", lambda line: None
    )  # the first one: the token that was on its way is the last
    assert (len(presses), chat.messages[-1]["role"]) == (4, "assistant")
    presses[:] = [1] * 3
    messages = chat.messages
    model.model.layers[0].register_forward_hook(press)  # so that both come within one pass
    with pytest.raises(KeyboardInterrupt):
        chat_module.answer(chat, "And now?", lambda line: None)
    assert (len(presses), chat.messages) == (5, messages)
    assert signal.getsignal(signal.SIGINT) is before


# Makes the terminal that stdin is the one whose ^C comes as a SIGINT, and becomes the program that is named.
IN_TERMINAL = """import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("redirected", [False, True])
def test_a_terminal_has_a_prompt_that_ctrl_c_clears(endless, tmp_path, redirected):
    import pty

    terminal, its_end = pty.openpty()
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
        ends = {"stdin": its_end, "stdout": file if redirected else its_end, "stderr": its_end}
        process = start(*options, before=(sys.executable, "-c", IN_TERMINAL), **ends)
        os.close(its_end)
        try:
            wait_for(b"/help lists the commands")
            wait_for(b"> ")
            # Python overlooks a ^C that comes between two looks at the keyboard; with another, they count as one.
            os.write(terminal, b"half a quest\x03")
            wait_for(b"leaves)", again=b"\x03")
            wait_for(b"> ")
            os.write(terminal, f"/image {ROOT}/examples/shapes.png\n".encode())
            wait_for(b"35 tokens")
            wait_for(b"[image] > ")
            os.write(terminal, b"Describe the image.\n")
            if not redirected:
                wait_for(b"square")
                os.write(terminal, b"\x03")
            wait_for(b" tokens in, ")
            wait_for(b"> ")
            os.write(terminal, b"\x03")
            wait_for(b"leaves)", again=b"\x03")
            wait_for(b"> ")
            os.write(terminal, b"\x03")
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                os.write(terminal, b"\x03")
            assert process.wait(60) == 130
        finally:
            process.kill()
            os.close(terminal)
        file.seek(0)
        written = file.read()
    assert (
        (written.startswith(b"A blue triangle") and written.count(b"\n") == 1)
        if redirected
        else written == b""
    )
