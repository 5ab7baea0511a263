"""The memory of a training: counted on the meta device as it is on the CPU, and refused in time.

What a process really takes is compared in test_estimate_peak.py.
"""

import json
from pathlib import Path

import pytest
import torch

import command_line
import memory
from apps import finetune
from apps.training import answer_loss
from apps.training_data import Encoder
from apps.training_memory import LiveBytes, pass_bytes
from command_line import BUNDLED_CHECKPOINT
from load_weights import empty_model, load_config, load_model
from lora import DECODER_TARGETS, VISION_TARGETS, add_lora
from memory import Free

IMAGE = str(Path(__file__).parents[2] / "examples" / "shapes.png")
VIDEO = str(Path(__file__).parents[2] / "examples" / "crossing.mp4")


def conversation(count, kind="image", source=IMAGE):
    """Return one with an image or a video, and an answer of so many words."""
    content = [{"type": kind, kind: source}, {"type": "text", "text": "How many?"}]
    question = {"role": "user", "content": content}
    return [question, {"role": "assistant", "content": "One. " * count}]


CONVERSATIONS = {
    "one": [conversation(60)],
    "equal": [conversation(8), conversation(8)],
    "padded": [conversation(2), conversation(90)],
    "video": [conversation(5, "video", VIDEO)],
}


@pytest.mark.sweep
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
@pytest.mark.parametrize(
    ("name", "dtype", "attention", "targets", "dropout"),
    [
        ("one", torch.bfloat16, "sdpa", DECODER_TARGETS, 0.0),
        ("equal", torch.float32, "sdpa", DECODER_TARGETS, 0.1),
        ("padded", torch.bfloat16, "sdpa", ["q_proj"], 0.0),
        ("padded", torch.float32, "eager", DECODER_TARGETS, 0.0),
        ("video", torch.bfloat16, "eager", [*DECODER_TARGETS, *VISION_TARGETS], 0.0),
        ("one", torch.float32, "sdpa", VISION_TARGETS, 0.0),
    ],
)
def test_pass_bytes_are_those_of_a_pass_on_the_cpu(
    name, dtype, attention, targets, dropout, checkpointing, processor
):
    encoder = Encoder(processor, video_options={"nframes": 4})
    examples = [encoder.check(messages) for messages in CONVERSATIONS[name]]
    batch = encoder.batch(examples, torch.device("cpu"))
    model = load_model(BUNDLED_CHECKPOINT, "cpu", dtype, attention).train()
    shapes = empty_model(load_config(BUNDLED_CHECKPOINT), attention).to(dtype).train()
    for each in (model, shapes):
        add_lora(each, targets, 4, 8, dropout)
        if checkpointing:
            each.enable_gradient_checkpointing()
    outside = list(model.parameters())
    for weight in outside[:]:
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
            outside.append(weight.grad)
    with LiveBytes(outside) as live:
        answer_loss(model, batch).backward()
    pixels = sum(tensor.nbytes for key, tensor in batch.items() if key.startswith("pixel_values"))
    assert pass_bytes(shapes, batch) == pytest.approx(live.peak + pixels, rel=0.05)


@pytest.fixture
def data(tmp_path):
    """Return a file of conversations with an image."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(conversation(count)) for count in (3, 40, 5)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def program(data, tmp_path, monkeypatch):
    """Return a function that starts the program where so many bytes are free."""

    def load(*arguments):
        raise AssertionError("the model is loaded")

    def run(free, *options):
        monkeypatch.setattr(memory, "cpu_free", lambda: Free(free, 0, "on this machine"))
        argv = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
        return finetune.main([*argv, *options])

    monkeypatch.setattr(command_line, "load_model", load)
    return run


def test_training_that_cannot_fit_is_refused_before_the_weights_are_loaded(program, capsys):
    assert program(10**6, "--batch-size", "2") == 2
    [message] = capsys.readouterr().err.splitlines()
    for part in ("memory does not suffice", "activations", "LoRA", "--max-length (the longest"):
        assert part in message
    for option in ("--max-pixels", "--batch-size", "--gradient-checkpointing"):
        assert option in message
    with pytest.raises(AssertionError, match="the model is loaded"):
        program(10**6, "--batch-size", "2", "--no-memory-check")


def test_training_with_checkpointing_and_one_conversation_fits_into_less(program, capsys):
    assert program(10**6, "--gradient-checkpointing") == 2
    [message] = capsys.readouterr().err.splitlines()
    assert "--gradient-checkpointing" not in message
    assert "--batch-size" not in message


def test_training_that_fits_is_not_refused(program):
    with pytest.raises(AssertionError, match="the model is loaded"):
        program(10**8)
