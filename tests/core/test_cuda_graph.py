"""cuda_graph.py: the step that can be captured gives what `generate.decode_step` gives.

Capturing itself needs a GPU; here a stand-in shows what is captured, and when it is replayed.
"""

import contextlib
import types

import pytest
import torch
from helpers import SHAPES, make_batch, our_model, random_sequence, random_weights, small_config

import cuda_graph
import generate
from command_line import BUNDLED_CHECKPOINT
from cuda_graph import CapturedDecodeStep, StaticStep
from generate import GenerationConfig, decode_step
from load_weights import load_model
from preprocess import Processor
from qwen2vl import KVCache

EXAMPLES = BUNDLED_CHECKPOINT.parent.parent / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:CUDA graph")  # there is none on a CPU

ROWS = {
    "text": [[5]],
    "an image": [[2, ("image", 2, 3), 4]],
    "padded": [[2, ("image", 2, 3), 4], [3], [1, ("video", 2, 2, 2), 2]],
}


def prefill(model, config, rows, new_tokens):
    """Return a cache of the sequences, with memory for new tokens, and the mask of the prompts.

    The mask is None where nothing is padded, as in `generate.generate_steps`.
    """
    inputs = make_batch([random_sequence(config, parts, seed) for seed, parts in enumerate(rows)])
    batch_size, length = inputs["input_ids"].shape
    cache = KVCache(model.config, batch_size, length + new_tokens)
    for stored in (cache.keys, cache.values):
        stored.fill_(float("nan"))  # as new memory may be
    model(cache=cache, **inputs)
    return cache, inputs.get("attention_mask")


def decode(step, model, cache, mask, ids):
    """Return the logits [steps, B, V] of the decode step `step` for ids [steps][B]."""
    return torch.stack([step(model, tokens, cache, mask) for tokens in ids])


def random_ids(steps, batch_size=1):
    """Return ids of text tokens, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 60, (steps, batch_size), generator=generator).tolist()


def make_model(shape):
    """Return the model of that shape."""
    return our_model(SHAPES[shape], random_weights(SHAPES[shape]))


def both_steps(model):
    """Return the eager decode step, and the captured one."""
    return [decode_step, CapturedDecodeStep(model, decode_step)]


@pytest.mark.sweep
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", ["default", "tied", "one kv head", "like 7B", "six sections"])
@torch.no_grad()
def test_captured_step_equals_the_eager_one(shape, rows):
    model = make_model(shape)
    ids = random_ids(6, len(ROWS[rows]))
    logits = []
    caches = []
    for step in both_steps(model):
        cache, mask = prefill(model, SHAPES[shape], ROWS[rows], 6)
        logits.append(decode(step, model, cache, mask, ids))
        caches.append(cache)
    assert (logits[1] - logits[0]).abs().max() < 1e-5
    assert caches[1].length == caches[0].length
    assert torch.equal(caches[1].next_position, caches[0].next_position)
    assert torch.allclose(caches[1].keys, caches[0].keys, atol=1e-5)


@torch.no_grad()
def test_captured_step_follows_a_cache_that_was_cut_back_or_prolonged():
    model = make_model("default")
    ids = random_ids(4)
    results = []
    for step in both_steps(model):
        cache, mask = prefill(model, SHAPES["default"], [[7]], 20)
        first = decode(step, model, cache, mask, ids)
        cache.next_position = cache.next_position - 3
        cache.length -= 3
        second = decode(step, model, cache, mask, ids)
        model(input_ids=torch.tensor([[7, 8, 9]]), cache=cache)  # the next turn of a chat
        third = decode(step, model, cache, mask, ids)
        results.append(torch.cat((first, second, third)))
    assert (results[1] - results[0]).abs().max() < 1e-5


@torch.no_grad()
def test_captured_step_makes_one_static_step_for_each_cache(monkeypatch):
    made = []

    class RecordedStep(StaticStep):
        def __init__(self, model, cache):
            made.append(cache)
            super().__init__(model, cache)

    monkeypatch.setattr(cuda_graph, "StaticStep", RecordedStep)
    model = make_model("default")
    step = CapturedDecodeStep(model, decode_step)
    cache, mask = prefill(model, SHAPES["default"], [[5]], 9)
    model(input_ids=torch.tensor([[7, 8]]), cache=cache)
    assert made == []
    decode(step, model, cache, mask, [[7], [8]])
    assert made == [cache]
    other, mask = prefill(model, SHAPES["default"], [[6]], 9)
    decode(step, model, other, mask, [[7]])
    assert made == [cache, other]


@torch.no_grad()
def test_captured_step_names_a_full_cache():
    model = make_model("default")
    step = CapturedDecodeStep(model, decode_step)
    cache, mask = prefill(model, SHAPES["default"], [[5]], 1)
    decode(step, model, cache, mask, [[7]])
    with pytest.raises(ValueError, match="the KV cache holds 6 tokens, 7 are needed"):
        decode(step, model, cache, mask, [[7]])


@pytest.mark.parametrize("rows", [[[5]], [[5], [3]]], ids=["text", "padded"])
@torch.no_grad()
def test_captured_step_follows_a_cache_that_has_grown(rows):
    model = make_model("default")
    ids = random_ids(9, len(rows))
    results = []
    for step in both_steps(model):
        inputs = make_batch([random_sequence(SHAPES["default"], parts) for parts in rows])
        cache = KVCache(model.config, len(rows), 30, capacity=6)
        model(cache=cache, **inputs)
        results.append(decode(step, model, cache, inputs.get("attention_mask"), ids))
        assert cache.capacity == 24
    assert (results[1] - results[0]).abs().max() < 1e-5


def test_captured_step_warns_on_a_cpu_that_nothing_is_captured():
    phrase = "CUDA graph: the model is on cpu, its steps are computed without one"
    with pytest.warns(UserWarning, match=phrase):
        CapturedDecodeStep(make_model("default"), decode_step)


def test_captured_step_refuses_a_sliding_window():
    config = small_config(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    model = our_model(config, random_weights(config))
    with pytest.raises(ValueError, match="no CUDA graph for a sliding window"):
        CapturedDecodeStep(model, decode_step)


def test_captured_step_refuses_rope_scaled_with_the_length():
    scaling = SHAPES["default"]["rope_scaling"] | {"type": "dynamic", "factor": 2.0}
    config = small_config(rope_scaling=scaling)
    model = our_model(config, random_weights(config))
    with pytest.raises(ValueError, match="rope of type dynamic"):
        CapturedDecodeStep(model, decode_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(do_sample=True, temperature=1.5, seed=3, repetition_penalty=1.2),
    ],
    ids=["greedy", "sampled"],
)
def test_stream_gives_the_same_answers_by_captured_steps(config):
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
    content = [
        {"type": "image", "image": str(EXAMPLES / "shapes.png")},
        {"type": "text", "text": "Describe the image."},
    ]
    questions = [
        [{"role": "user", "content": content}],
        [{"role": "user", "content": "What is this?"}],
    ]
    batch = processor(questions)
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    eager, captured = both_steps(model)
    expected = list(generate.stream(model, batch, 40, config, decode=eager))
    assert list(generate.stream(model, batch, 40, config, decode=captured)) == expected
    assert captured.step is not None


def test_cuda_graph_option_gives_the_answer(capsys):
    options = ["--image", str(EXAMPLES / "shapes.png"), "--prompt", "Describe the image."]
    assert generate.main([*options, "--device", "cpu", "--cuda-graph"]) == 0
    assert capsys.readouterr().out.startswith("A blue triangle at the top left")


def test_cuda_graph_option_excludes_debug_nan(capsys):
    with pytest.raises(SystemExit) as error:
        generate.main(["--prompt", "x", "--cuda-graph", "--debug-nan"])
    assert error.value.code == 2
    assert "--cuda-graph and --debug-nan exclude each other" in capsys.readouterr().err


class OnCUDA(torch.Tensor):
    """A tensor in RAM that names a GPU as its device."""

    device = torch.device("cuda")
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors


class ReplayedOnCPU:
    """Stand-ins for torch.cuda: a replay computes what was captured, into the same tensors."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.compute = StaticStep.compute
        self.step = None
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(StaticStep, "compute", lambda step: self.record_compute())
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: self.during("capture"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.during("warm-up"))

    def record_compute(self):
        self.calls.append("compute")
        self.compute(self.step)

    def replay(self):
        self.calls.append("replay")
        captured_logits = self.step.logits
        self.compute(self.step)
        self.step.logits = captured_logits.copy_(self.step.logits)

    @contextlib.contextmanager
    def during(self, name):
        self.calls.append(f"begin {name}")
        yield
        self.calls.append(f"end {name}")


@torch.no_grad()
def test_static_step_is_captured_once_and_then_replayed(monkeypatch):
    model = make_model("default")
    ids = random_ids(3)
    expected = decode(decode_step, model, *prefill(model, SHAPES["default"], [[5]], 9), ids)
    cuda = ReplayedOnCPU(monkeypatch)
    cache, mask = prefill(model, SHAPES["default"], [[5]], 9)
    cuda.step = StaticStep(model, cache)
    cuda.step.ids = cuda.step.ids.as_subclass(OnCUDA)
    logits = torch.stack([cuda.step(tokens, mask) for tokens in ids])
    warm_up = ["begin warm-up", "compute", "compute", "compute", "end warm-up"]
    capture = ["begin capture", "compute", "end capture"]
    assert cuda.calls == [*warm_up, *capture, "replay", "replay", "replay"]
    assert (logits - expected).abs().max() < 1e-5
