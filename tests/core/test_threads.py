"""One model and one processor in eight threads: each answer is the one that a single thread gives.

From the messages to the text: reading and resizing, prompts, generation with and without sampling,
decoding, and a chat with its own cache in each thread. Parts of it are tested beside what they
test: kernels in `test_linear.py`, the processor in `test_preprocess.py`, the tokenizer in
`test_tokenizer.py`, the decoders of videos in `test_video_decode.py`.
"""

import sys
import threading

import pytest
from example_batches import EXAMPLES

from apps.chat import Chat
from generate import GenerationConfig, generate
from tokenizer import StreamDecoder

THREADS = 8
NEW_TOKENS = 6
GREEDY = GenerationConfig()

IMAGE = {"type": "image", "image": EXAMPLES / "shapes.png"}
WIDE = {"type": "image", "image": EXAMPLES / "wide.png"}
TALL = {"type": "image", "image": EXAMPLES / "tall.png"}
VIDEO = {"type": "video", "video": EXAMPLES / "crossing.mp4", "nframes": 4}


def sampled(seed):
    """Return settings that draw among all tokens, so that each seed gives another answer."""
    return GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=1.1, seed=seed)


def ask(text, *items):
    """Return a conversation of one question."""
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


JOBS = [
    (ask("How many shapes are there?", IMAGE), GREEDY),
    (ask("How many shapes are there?", IMAGE), sampled(1)),
    (ask("How many shapes are there?", IMAGE), sampled(2)),
    (ask("Which way does the ball move?", VIDEO), GREEDY),
    (ask("Which way does the ball move?", VIDEO), sampled(3)),
    (ask("Hello <|im_end|>"), GREEDY),
    (ask("Hello <|im_end|>"), sampled(4)),
    (ask("Compare them.", WIDE, TALL), sampled(5)),
    ([ask("What is this?", TALL), ask("Describe it briefly, please.")], sampled([6, 7])),
]


def in_threads(work):
    """Call work(number) in THREADS threads that start together; return the results in order.

    What one of them raises is raised here.
    """
    results = [None] * THREADS
    start = threading.Barrier(THREADS)

    def run(number):
        start.wait()
        try:
            results[number] = work(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads switch as often as possible
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.slow
def test_answers_in_threads_equal_those_of_one_thread(tiny, processor):
    def answer(job):
        messages, config = job
        batch = processor(messages)
        answers = generate(tiny, batch, NEW_TOKENS, config)
        decoder = StreamDecoder(processor.tokenizer)
        pieces = [decoder.push(token) for token in answers[0]]
        text = "".join(pieces) + decoder.finish()
        return answers, text, [processor.tokenizer.decode(ids) for ids in answers]

    def answer_all(number):
        """Answer the jobs in an order of the thread's own; return answers in that of JOBS."""
        order = [*range(number, len(JOBS)), *range(number)]
        answers = {index: answer(JOBS[index]) for index in order}
        return [answers[index] for index in range(len(JOBS))]

    expected = answer_all(0)
    same_question = [tokens for tokens, *_ in expected[:3]]
    assert same_question[0] != same_question[1] != same_question[2]  # sampling does something
    assert in_threads(answer_all) == [expected] * THREADS


@pytest.mark.slow
def test_chats_in_threads_equal_those_of_one_thread(tiny, processor):
    media = [IMAGE, VIDEO, WIDE, TALL]

    def talk(number):
        """Hold a conversation of four turns, the second of which has an image or a video."""
        config = GREEDY if number % 2 else sampled(number)
        chat = Chat(tiny, processor, config, NEW_TOKENS)
        answers = [list(chat.ask(f"Hello, {number}."))]
        chat.add(media[number % len(media)])
        for question in ("What is this?", "Which color?", "How many?"):
            answers.append(list(chat.ask(question)))
        return answers

    expected = [talk(number) for number in range(THREADS)]
    assert in_threads(talk) == expected
