"""command_line.py: what the options ask for, and the error boundary."""

import argparse

import pytest

import command_line
from command_line import build_messages, build_parser, parse_arguments, run_main

QUIET = argparse.Namespace(quiet=True)


def messages_of(*options):
    return build_messages(parse_arguments(build_parser(""), list(options)))


def test_build_messages_keeps_the_order_of_images_and_videos():
    [message] = messages_of("--video", "a.mp4", "--image", "b.png", "--prompt", "x", "--fps", "1.5")
    assert message["role"] == "user"
    assert message["content"] == [
        {"type": "video", "video": "a.mp4", "fps": 1.5},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "x"},
    ]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (["--image", "a"], "Describe this image."),
        (["--video", "a"], "Describe this video."),
        (["--video", "a", "--image", "b"], "Describe this image."),
        (["--image", "a", "--prompt", ""], ""),
    ],
)
def test_build_messages_has_a_default_prompt(options, prompt):
    assert messages_of(*options)[-1]["content"][-1] == {"type": "text", "text": prompt}


def test_build_messages_puts_the_system_message_first():
    messages = messages_of("--prompt", "x", "--system", "Be short.", "--nframes", "4")
    assert messages[0] == {"role": "system", "content": "Be short."}
    assert messages[1]["content"] == [{"type": "text", "text": "x"}]


@pytest.mark.parametrize("error", [ValueError("a b"), OSError("a b"), FileNotFoundError("a b")])
def test_run_main_prints_one_sentence_and_returns_2(error, capsys):
    def fail(arguments):
        raise error

    assert run_main("apps.test", fail, QUIET) == 2
    assert capsys.readouterr().err == "apps.test: a b\n"


def test_run_main_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_main("apps.test", lambda arguments: 1 / 0, QUIET)


def out_arguments(*options):
    """Return the options of a program with --out and --force."""
    parser = build_parser("")
    command_line.add_output_options(parser, "FILE", "what is written")
    return parse_arguments(parser, list(options))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_check_output_options_refuses_an_input(prefix, tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"x")
    options = ["--image", f"{prefix}{image}", "--out", str(image), "--force"]
    with pytest.raises(ValueError, match=r"--out is .*a\.png, which is an input"):
        command_line.check_output_options(out_arguments(*options))


@pytest.mark.parametrize("option", ["--model", "--processor"])
def test_check_output_options_refuses_a_file_of_a_checkpoint(option, tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    options = ["--prompt", "x", option, str(tmp_path), "--out", str(config), "--force"]
    with pytest.raises(ValueError, match="which is an input"):
        command_line.check_output_options(out_arguments(*options))
    options[-2] = str(tmp_path / "new.png")
    command_line.check_output_options(out_arguments(*options))


def test_check_output_options_needs_force_for_a_file_that_exists(tmp_path):
    path = tmp_path / "boxes.png"
    path.write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"boxes\.png exists: .* --force"):
        command_line.check_output_options(out_arguments("--prompt", "x", "--out", str(path)))
    command_line.check_output_options(out_arguments("--prompt", "x", "--out", str(path), "--force"))
    command_line.check_output_options(out_arguments("--prompt", "x"))
