"""The decode step that a CUDA graph can record gives what the plain one gives, wherever a cache stands.

Recording itself needs a GPU; here a stand-in shows what is recorded, and when it is replayed.
"""

import contextlib
import types

import pytest
import torch
from helpers import SHAPES, make_batch, our_model, random_row, random_weights, small_config

import generate
from extras import cuda_graph
from generate import TINY, Sampling
from load_weights import load_model
from preprocess import Processor
from qwen2vl import KVCache

pytestmark = pytest.mark.filterwarnings("ignore:CUDA graph")  # there is none on a CPU

Step = cuda_graph.Step
ROWS = {
    "words": [[5]],
    "a picture": [[2, ("image", 2, 3), 4]],
    "padded rows": [[2, ("image", 2, 3), 4], [3], [1, ("video", 2, 2, 2), 2]],
}


def prefill(model, config, rows, room):
    """A cache that holds the rows, and the mask of all that will ever be in it."""
    inputs = make_batch([random_row(config, parts, seed) for seed, parts in enumerate(rows)])
    count, length = inputs["input_ids"].shape
    cache = KVCache(model.config, count, length + room)
    for stored in (cache.keys, cache.values):
        stored.fill_(float("nan"))  # as new memory may be
    inputs.setdefault("attention_mask", torch.ones(count, length, dtype=torch.long))
    model(cache=cache, **inputs)
    return cache, torch.cat(
        (inputs["attention_mask"], torch.ones(count, room, dtype=torch.long)), dim=1
    )


def decode(model, cache, mask, ids):
    """The logits of each step."""
    found = []
    for step in ids:
        seen = None if mask.all() else mask[:, : cache.length + 1]
        found.append(model(input_ids=step, attention_mask=seen, cache=cache, logits_to_keep=1))
    return torch.stack(found)


def pair(shape):
    """The plain model, and one that decodes by steps."""
    plain, quick = (our_model(SHAPES[shape], random_weights(SHAPES[shape])) for _ in range(2))
    cuda_graph.use(quick)
    return plain, quick


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", ["plain", "tied", "one kv head", "like 7B", "six sections"])
@torch.no_grad()
def test_a_step_computes_what_the_plain_one_does(shape, rows):
    ids = torch.randint(5, 60, (6, len(ROWS[rows]), 1))
    found = []
    for model in pair(shape):
        cache, mask = prefill(model, SHAPES[shape], ROWS[rows], 6)
        found.append((decode(model, cache, mask, ids), cache))
    (plain, its_cache), (quick, cache) = found
    assert (quick - plain).abs().max() < 1e-5
    assert cache.length == its_cache.length
    assert torch.equal(cache.next_position, its_cache.next_position)
    assert torch.allclose(cache.keys, its_cache.keys, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_was_cut_back_or_prolonged_between_steps_is_seen_as_it_is():
    config, found = SHAPES["plain"], []
    ids = torch.randint(5, 60, (4, 1, 1))
    for model in pair("plain"):
        cache, mask = prefill(model, config, [[7]], 20)
        first = decode(model, cache, mask, ids)
        cache.next_position = cache.next_position - 3
        cache.length -= 3
        second = decode(model, cache, mask, ids)
        model(
            input_ids=torch.tensor([[7, 8, 9]]), cache=cache
        )  # more than one token: the plain way
        found.append(torch.cat((first, second, decode(model, cache, mask, ids))))
    assert (found[1] - found[0]).abs().max() < 1e-5


@torch.no_grad()
def test_only_single_words_behind_a_cache_go_by_steps(monkeypatch):
    model, made = pair("plain")[1], []
    monkeypatch.setattr(cuda_graph, "Step", lambda *given: made.append(given) or Step(*given))
    cache, mask = prefill(model, SHAPES["plain"], [[5]], 9)
    model(input_ids=torch.tensor([[7]]))  # no cache
    model(input_ids=torch.tensor([[7, 8]]), cache=cache)
    model(input_ids=torch.tensor([[7]]), cache=cache, position_ids=torch.full((3, 1, 1), 4))
    assert made == []
    decode(model, cache, mask, torch.tensor([[[7]], [[8]]]))
    assert len(made) == 1
    other, mask = prefill(model, SHAPES["plain"], [[6]], 9)
    decode(model, other, mask, torch.tensor([[[7]]]))
    assert len(made) == 2


@torch.no_grad()
def test_a_full_cache_is_named():
    model = pair("plain")[1]
    cache, mask = prefill(model, SHAPES["plain"], [[5]], 1)
    ids = torch.tensor([[[7]]])
    decode(model, cache, mask, ids)
    with pytest.raises(ValueError, match="the KV cache holds 6 tokens, 7 are needed"):
        decode(model, cache, mask, ids)


@torch.no_grad()
def test_a_cache_that_has_grown_gets_another_step():
    config, found = SHAPES["plain"], []
    ids = torch.randint(5, 60, (9, 1, 1))
    for model in pair("plain"):
        inputs = make_batch([random_row(config, [5])])
        cache = KVCache(model.config, 1, 30, capacity=6)
        model(cache=cache, **inputs)
        found.append(torch.cat([model(input_ids=step, cache=cache) for step in ids]))
        assert cache.capacity == 24
    assert (found[1] - found[0]).abs().max() < 1e-5


def test_on_a_cpu_it_says_that_nothing_is_recorded():
    with pytest.warns(
        UserWarning, match="CUDA graph: the model is on cpu, its steps are computed without one"
    ):
        pair("plain")


def test_a_sliding_window_is_refused():
    config = small_config(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="no CUDA graph for a sliding window"):
        cuda_graph.use(our_model(config, random_weights(config)))


def test_whole_answers_are_the_same_for_a_batch_with_sampling_too():
    processor = Processor.from_pretrained(TINY)
    picture = [
        {"type": "image", "image": "examples/shapes.png"},
        {"type": "text", "text": "Describe the image."},
    ]
    batch = processor(
        [[{"role": "user", "content": picture}], [{"role": "user", "content": "What is this?"}]]
    )
    plain, quick = load_model(TINY, "cpu", torch.float32), load_model(TINY, "cpu", torch.float32)
    cuda_graph.use(quick)
    for sampling in (
        Sampling(),
        Sampling(do_sample=True, temperature=1.5, seed=3, repetition_penalty=1.2),
    ):
        assert generate.generate(quick, batch, 40, sampling) == generate.generate(
            plain, batch, 40, sampling
        )


def test_the_command_line_takes_it(capsys):
    options = [
        "--image",
        "examples/shapes.png",
        "--prompt",
        "Describe the image.",
        "--device",
        "cpu",
        "--cuda-graph",
    ]
    assert generate.main(options) == 0
    assert capsys.readouterr().out.startswith("A blue triangle at the top left")
    for other in ("--logprobs", "--explain"):
        with pytest.raises(SystemExit):
            generate.main([*options, other])
        assert f"--cuda-graph and {other} do not go together" in capsys.readouterr().err


@torch.no_grad()
def test_the_step_is_recorded_once_for_a_cache_and_replayed_after(monkeypatch):
    """A stand-in for torch.cuda: a replay computes what was recorded, into the tensor where it was recorded."""
    calls, compute = [], Step.compute
    monkeypatch.setattr(Step, "compute", lambda step: calls.append("compute") or compute(step))
    plain, quick = pair("plain")
    ids = torch.tensor([[[7]], [[8]], [[9]]])
    wanted = decode(plain, *prefill(plain, SHAPES["plain"], [[5]], 9), ids)
    cache, _ = prefill(quick, SHAPES["plain"], [[5]], 9)
    step = Step(quick, cache)
    step.recording = True

    class Graph:
        def replay(self):
            calls.append("replay")
            place = step.logits
            compute(step)
            step.logits = place.copy_(step.logits)

    @contextlib.contextmanager
    def during(name, *_):
        calls.append(f"begin {name}")
        yield
        calls.append(f"end {name}")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: during("recording"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: during("trial"))
    found = torch.stack([step(one, None) for one in ids])
    assert calls == [
        "begin trial", "compute", "compute", "compute", "end trial", "begin recording", "compute", "end recording",
        "replay", "replay", "replay",
    ]  # fmt: skip
    assert (found - wanted).abs().max() < 1e-5
