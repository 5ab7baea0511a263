"""The program `generate.py`: options, output, and errors of input, memory, disks and pipes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import command_line
import generate as command
from command_line import BUNDLED_CHECKPOINT
from generate import GenerationConfig
from load_weights import load_model
from preprocess import Processor

ROOT = Path(__file__).parents[2]

IMAGE = ROOT / "examples" / "shapes.png"
VIDEO = ROOT / "examples" / "crossing.mp4"  # 24 frames, 6 per second


def run(*arguments, **options):
    """Run the command in its own process and another directory, as a user does."""
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"}
    line = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, **options)


@pytest.mark.slow
def test_answer_goes_to_stdout_and_status_to_stderr(tmp_path):
    process = run("--image", IMAGE, cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout.strip().startswith("A ")
    assert process.stdout.count("\n") == 1
    for part in (
        "--model Qwen/Qwen2-VL-2B-Instruct",
        "M parameters",
        f"{IMAGE}: ",
        "tokens/s",
        "peak memory",
    ):
        assert part in process.stderr
    quiet = run("--image", IMAGE, "--quiet", cwd=tmp_path)
    assert (quiet.stdout, quiet.stderr) == (process.stdout, "")


@pytest.mark.slow
def test_answer_is_the_same_for_each_attention_implementation_and_wide_dtype(capsys):
    answers = set()
    for options in (
        ["--attention", "eager"],
        ["--dtype", "float32"],
        ["--dtype", "float64", "--device", "cpu"],
    ):
        assert command.main(["--image", str(IMAGE), "--quiet", *options]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


def record_stream(monkeypatch, *arguments):
    """Return the arguments of `stream`: text of the prompt, batch, number of tokens, sampling."""
    calls = []

    def fake_stream(model, batch, max_new_tokens, config, decode, tokenizer):
        calls.append((batch, max_new_tokens, config))
        yield [0]

    monkeypatch.setattr(command, "stream", fake_stream)
    assert command.main([*map(str, arguments)]) == 0
    [(batch, max_new_tokens, sampling)] = calls
    tokenizer = Processor.from_pretrained(BUNDLED_CHECKPOINT).tokenizer
    text = tokenizer.decode(batch.input_ids[0], skip_special_tokens=False)
    return text, batch, max_new_tokens, sampling


def test_options_reach_the_model(monkeypatch):
    text, batch, count, sampling = record_stream(
        monkeypatch,
        "--image",
        IMAGE,
        "--image",
        IMAGE,
        "--prompt",
        "What is left?",
        "--system",
        "Be brief.",
        "--add-vision-id",
        "--max-new-tokens",
        5,
        "--temperature",
        0.7,
        "--top-k",
        9,
        "--top-p",
        0.8,
        "--min-p",
        0.1,
        "--repetition-penalty",
        1.2,
        "--seed",
        3,
        "--stop",
        "\n\n",
        "--stop",
        "END",
    )
    expected = GenerationConfig(True, 0.7, 9, 0.8, 1.2, 3, min_p=0.1, stop_strings=["\n\n", "END"])
    assert sampling == expected
    assert count == 5
    pads = text.count("<|image_pad|>") // 2
    image = "<|vision_start|>" + "<|image_pad|>" * pads + "<|vision_end|>"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        f"Picture 1: {image}Picture 2: {image}What is left?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(batch.image_grid_thw) == 2


def test_images_and_videos_are_in_the_order_of_the_options(monkeypatch):
    media = ["--video", VIDEO, "--image", IMAGE, "--video", VIDEO]
    text, batch, *_ = record_stream(monkeypatch, *media, "--nframes", 6, "--add-vision-id")
    assert re.findall(r"(Picture|Video) (\d): ", text) == [
        ("Video", "1"),
        ("Picture", "1"),
        ("Video", "2"),
    ]
    assert text.endswith("Describe this image.<|im_end|>\n<|im_start|>assistant\n")
    assert [len(media.timestamps or "") for media in batch.media] == [6, 0, 6]
    assert batch.video_grid_thw[:, 0].tolist() == [3, 3]


@pytest.mark.slow
def test_fps_and_default_prompt_of_a_video(monkeypatch):
    text, batch, *_ = record_stream(monkeypatch, "--video", VIDEO, "--fps", 4)
    assert len(batch.media[0].timestamps) == 16
    assert text.endswith("<|vision_end|>Describe this video.<|im_end|>\n<|im_start|>assistant\n")
    _, default, *_ = record_stream(monkeypatch, "--video", VIDEO)
    assert len(default.media[0].timestamps) == 8


def test_pixel_bounds_apply_to_images(monkeypatch):
    _, small, *_ = record_stream(
        monkeypatch, "--image", IMAGE, "--min-pixels", 56 * 56, "--max-pixels", 84 * 84
    )
    _, large, *_ = record_stream(
        monkeypatch, "--image", IMAGE, "--min-pixels", 280 * 280, "--max-pixels", 300 * 300
    )
    assert small.image_grid_thw.prod() * 14 * 14 <= 84 * 84
    assert large.image_grid_thw.prod() * 14 * 14 >= 280 * 280


def test_prompt_without_media_and_default_prompt_of_an_image(monkeypatch):
    text, batch, *_ = record_stream(monkeypatch, "--prompt", "hello")
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert batch.pixel_values is None
    text, *_ = record_stream(monkeypatch, "--image", IMAGE)
    assert "<|vision_end|>Describe this image.<|im_end|>" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_strings", "answer"),
    [
        (["top right"], "A blue triangle at the top left, a red circle at the \n"),
        (["e circle", "tri"], "A blue \n"),
        (["A"], "\n"),
    ],
)
def test_stop_cuts_the_answer_on_stdout(stop_strings, answer, capsys):
    options = [option for text in stop_strings for option in ("--stop", text)]
    assert command.main(["--image", str(IMAGE), "--quiet", *options]) == 0
    assert capsys.readouterr().out == answer


def test_stop_of_surrogate_escapes_is_utf_8(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    *_, sampling = record_stream(monkeypatch, "--prompt", "x", "--stop", "\udcc3\udca9")
    assert sampling.stop_strings == ["é"]


def test_temperature_0_is_greedy(monkeypatch):
    *_, sampling = record_stream(monkeypatch, "--prompt", "x", "--temperature", 0)
    assert not sampling.do_sample


def test_temperature_with_a_top_k_of_1_prints_a_hint(capsys):
    model = load_model(BUNDLED_CHECKPOINT, "cpu")
    model.generation_config = {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01}
    arguments = command.parse_arguments(["--prompt", "x", "--temperature", "0.9"])
    command_line.set_up_logging(quiet=False)
    config = command.choose_generation_config(arguments, model)
    assert config == GenerationConfig(True, 0.9, 1, 0.001)
    assert "add --top-k 0" in capsys.readouterr().err


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "missing.png"], "there is no image at missing.png"),
        (["--image", "text.png"], "cannot read text.png as an image"),
        (["--image", "cut.png"], "cannot read cut.png as an image"),
        (
            ["--prompt", "x", "--model", "empty"],
            "there is no tokenizer.json in empty",
        ),
        (["--prompt", "x", "--model", "missing/folder/x"], "no folder missing/folder/x"),
        (
            ["--prompt", "x", "--model", "Nobody/Nothing"],
            "no folder Nobody/Nothing, and the hub cannot be reached",
        ),
        (["--prompt", "x", "--device", "cuda:7"], "the device cuda:7 cannot be used"),
        (["--prompt", "x", "--attention", "flash"], "attention 'flash' cannot be used"),
        (
            ["--prompt", "x", "--top-p", "2"],
            "top_p: expected a number above 0 and at most 1, got 2.0",
        ),
        (
            ["--prompt", "x", "--temperature", "nan"],
            "temperature: expected a positive number, got nan",
        ),
        (
            ["--prompt", "x", "--temperature", "inf"],
            "temperature: expected a positive number, got inf",
        ),
        (["--prompt", "x", "--top-k", "-1"], "top_k: expected an integer of at least 0, got -1"),
        (["--prompt", "x", "--repetition-penalty", "nan"], "repetition_penalty: expected a pos"),
        (["--prompt", "x", "--min-p", "2"], "min_p: expected a number from 0 to 1, got 2.0"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1, expected 0 to 2**63 - 1"),
        (["--prompt", "x", "--seed", str(2**70)], f"seed is {2**70}, expected 0 to"),
    ],
)
def test_wrong_input_prints_one_sentence_and_returns_2(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.png").write_text("text")
    Image.new("RGB", (90, 90), "red").save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:60])
    assert command.main([*arguments, "--quiet"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"generate.py: {sentence}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --image, --video or --prompt, got none of them"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected 1 or more"),
        (["--prompt", "x", "--fps", "nan"], "--fps is nan, expected a number above 0"),
        (["--prompt", "x", "--fps", "0"], "--fps is 0.0, expected a number above 0"),
        (["--prompt", "x", "--fps", "-1"], "--fps is -1.0, expected a number above 0"),
        (
            ["--prompt", "x", "--min-pixels", "9", "--max-pixels", "8"],
            "--min-pixels is 9, expected at most --max-pixels, 8",
        ),
        (["--prompt", "x", "--cuda-graph", "--debug-nan"], "--cuda-graph and --debug-nan exclude"),
        (["--prompt", "x", "--nframes", "0"], "--nframes is 0, expected 1 or more"),
        (["--prompt", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--prompt", "x", "--stop", ""], "argument --stop: expected text, got an empty string"),
        (["--image", "x", "--draw", "x.png"], "--draw is now a program: python -m apps.grounding"),
        (["--chat"], "--chat is now a program: python -m apps.chat"),
        (["--batch", "x.jsonl"], "--batch is now a program: python -m apps.batch"),
        (["--prompt", "x", "--dry-run"], "--dry-run is now a program: python -m apps.estimate"),
        (["--prompt", "x", "--logprobs"], "--logprobs is now a program: python -m apps.logprobs"),
        (["--image", "x", "--explain"], "--explain is now a program: python -m apps.trace"),
        (["--image", "x", "--report=x"], "--report is now a program: python -m apps.attention_rep"),
    ],
)
def test_invalid_options_are_argparse_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.replace("argument --dtype: ", "")


@pytest.mark.slow
def test_process_prints_no_traceback_for_a_missing_image(tmp_path):
    process = run("--image", "missing.png", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines() == ["generate.py: there is no image at missing.png"]


# ------------------------------------------------------------------ memory, disks, pipes, encodings


@pytest.mark.sweep
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9.9 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
    ],
    ids=str,
)
def test_out_of_memory_lists_the_options_to_lower(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(command, "stream", fail)
    assert command.main(["--image", str(IMAGE), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("generate.py: out of memory")
    assert message.count("\n") == 1
    for option in ("--max-pixels", "--nframes", "--max-new-tokens", "--batch-size", "--quantize"):
        assert option in message


def test_is_out_of_memory_recognizes_errors_of_torch_on_the_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert command_line.is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, 2**62)
    assert command_line.is_out_of_memory(caught.value)
    assert not command_line.is_out_of_memory(RuntimeError("shapes do not match"))


def test_error_of_the_program_itself_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(command, "stream", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command.main(["--image", str(IMAGE), "--quiet"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        line = [sys.executable, str(ROOT / "generate.py"), "--prompt", "x", "--quiet"]
        process = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "generate.py: cannot write the answer to stdout: No space left on device"
    ]


@pytest.mark.slow
def test_closed_pipe_ends_without_a_message():
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "generate.py"), "--prompt", "x", "--quiet"]
    process = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_stdout_of_any_encoding_contains_the_answer(encoding):
    script = (
        "import generate, torch; import command_line\n"
        "from preprocess import Processor\n"
        "processor = Processor.from_pretrained(command_line.BUNDLED_CHECKPOINT)\n"
        "ids = processor.tokenizer.encode('\\xe9 \\u4f60\\u597d \\U0001f642')\n"
        "generate.stream = lambda *_, **__: iter([[i] for i in ids])\n"
        "command_line.prepare_streams()\n"
        "raise SystemExit(generate.main(['--prompt', 'x', '--quiet']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    line = [sys.executable, "-c", script]
    process = subprocess.run(line, capture_output=True, cwd=ROOT, env=environment)
    assert (process.returncode, process.stderr) == (0, b"")
    assert process.stdout == "é 你好 🙂\n".encode(encoding, errors="backslashreplace")


def test_recover_utf8_restores_a_prompt_in_any_locale():
    assert command_line.recover_utf8("\udcc3\udca9?", "ascii") == "é?"
    assert command_line.recover_utf8("é", "latin-1") == "é"
    assert command_line.recover_utf8("\udcff", "ascii") == "\udcff"  # not UTF-8: refused later


def test_debug_nan_names_the_layer_on_the_command_line(monkeypatch, capsys):
    def load_with_fault(*arguments):
        model = load_model(*arguments)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(command_line, "load_model", load_with_fault)
    assert command.main(["--image", str(IMAGE), "--quiet"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "not finite" in output.err
    assert command.main(["--image", str(IMAGE), "--quiet", "--debug-nan"]) == 2
    assert "the output of model.layers.1.mlp.up_proj is the first" in capsys.readouterr().err
