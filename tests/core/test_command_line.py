"""command_line.py: what the options ask for, and the error boundary."""

import argparse

import pytest

from command_line import build_messages, build_parser, check_directory, parse_arguments, run_main

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


def test_check_directory_names_the_missing_directory(tmp_path):
    check_directory(tmp_path / "page.html")
    check_directory("page.html")
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*missing"):
        check_directory(tmp_path / "missing" / "page.html")
