"""The measured processes: `python -m benchmarks.workers JOB`, with a job in JSON, prints a line of
JSON for each result.

Times are those of the monotonic clock, which all processes of a machine share. A job imports what
it needs when it needs it, because the time of imports is measured, too.
"""

import itertools
import json
import sys
import time
from pathlib import Path

from benchmarks.protocol import PROMPT, make_clock, peak_bytes, report

# ------------------------------------------------------------------------------------ the two sides


def load_options(form: str) -> dict:
    """Return the arguments of `load_model` for a dtype, "int8" or "int4".

    In a quantized model everything that is not quantized is in bfloat16.
    """
    import torch

    if form.startswith("int"):
        return {"dtype": torch.bfloat16, "quantize": form}
    return {"dtype": getattr(torch, form)}


def load_ours(job: dict):
    import linear
    from load_weights import load_model

    linear.prefer_pytorch_gemv()  # as the programs do at their start
    model = load_model(job["checkpoint"], job["device"], **load_options(job["dtype"]))
    model.generation_config = {"eos_token_id": []}  # random weights would end at random
    return model


def answer_ours(model, batch, new_tokens: int, on_token) -> None:
    """Generate greedily as a user does; call on_token(ids of all sequences) for each token."""
    from cuda_graph import CapturedDecodeStep
    from generate import GenerationConfig, decode_step, stream

    decode = decode_step
    if model.model.norm.weight.device.type == "cuda":
        decode = CapturedDecodeStep(model, decode_step)
    for tokens in stream(model, batch, new_tokens, GenerationConfig(), decode=decode):
        on_token(tokens)


def load_peer(job: dict):
    import torch
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job["checkpoint"], dtype=getattr(torch, job["dtype"])
    )
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.to(job["device"]).eval()


def answer_peer(model, batch, new_tokens: int, on_token) -> None:
    """Do the same as `answer_ours` with transformers."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class TokenStreamer(BaseStreamer):
        has_prompt = False

        def put(self, value):
            if self.has_prompt:
                on_token(value.flatten().tolist())
            self.has_prompt = True

        def end(self):
            pass

    inputs = {}
    for name, array in batch.arrays().items():
        inputs[name] = torch.as_tensor(array, device=model.device)
    is_image = inputs["input_ids"] == model.config.image_token_id
    is_video = inputs["input_ids"] == model.config.video_token_id
    model.generate(
        **inputs,
        mm_token_type_ids=is_image.int() + 2 * is_video.int(),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=TokenStreamer(),
    )


# --------------------------------------------------------------------------------------------- jobs


def cold(job: dict) -> None:
    """Measure from the start of the process to the first token of an answer to a short text.

    job["start"] is the time at which the caller started this process.
    """
    question = "What is the capital of France?"
    cold_side = cold_ours if job["side"] == "ours" else cold_peer
    imported, loaded = cold_side(job, question)
    end = make_clock(job["device"])()
    report(
        task="cold",
        start=job["start"],
        end=end,
        first_token=end - job["start"],
        import_seconds=imported - job["start"],
        load_seconds=loaded - imported,
    )


def cold_ours(job: dict, question: str) -> tuple[float, float]:
    """Generate one token, as a program; return when the imports and the loading were done."""
    import startup

    startup.begin()
    from generate import GenerationConfig, stream
    from load_weights import load_model
    from preprocess import Processor

    startup.end_imports()
    imported = time.monotonic()
    processor = Processor.from_pretrained(job["checkpoint"])
    batch = processor([{"role": "user", "content": question}])
    model = load_model(job["checkpoint"], job["device"], **load_options(job["dtype"]))
    loaded = time.monotonic()
    next(stream(model, batch, 16, GenerationConfig()))
    return imported, loaded


def cold_peer(job: dict, question: str) -> tuple[float, float]:
    """Do the same as `cold_ours` with transformers."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    imported = time.monotonic()
    # AutoProcessor would need torchvision.
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"])
    inputs = tokenizer(PROMPT.format(question), return_tensors="pt").to(job["device"])
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job["checkpoint"], dtype=getattr(torch, job["dtype"])
    )
    model = model.to(job["device"])
    loaded = time.monotonic()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return imported, loaded


class Recorder:
    """Record the seconds of the vision encoder, and the logits of the last position, by hooks.

    Hooks, because transformers offers no other access to both.
    """

    def __init__(self, encoder, lm_head, clock):
        self.clock = clock
        self.encoder_start = 0.0
        self.vision_seconds = 0.0
        self.logits = []
        encoder.register_forward_pre_hook(self.start_encoder)
        encoder.register_forward_hook(self.end_encoder)
        lm_head.register_forward_hook(self.keep_logits)

    def start_encoder(self, *_) -> None:
        self.encoder_start = self.clock()

    def end_encoder(self, *_) -> None:
        self.vision_seconds += self.clock() - self.encoder_start

    def keep_logits(self, _module, _inputs, output) -> None:
        self.logits.append(output[:, -1].detach().clone())

    def reset(self) -> None:
        self.vision_seconds = 0.0
        self.logits.clear()


def questions(job: dict) -> None:
    """Load once, warm up, then answer each of job["tasks"] and report the times of its parts."""
    import numpy as np
    import torch

    import linear
    from benchmarks.checkpoint import make_batch
    from load_weights import load_config

    torch.set_num_threads(job["threads"])
    clock = make_clock(job["device"])
    config = load_config(job["checkpoint"])
    if job["side"] == "ours":
        model = load_ours(job)
        answer = answer_ours
        encoder = model.visual
    else:
        model = load_peer(job)
        answer = answer_peer
        encoder = model.model.visual
    recorder = Recorder(encoder, model.lm_head, clock)

    # Mapped weights are read for the first time, and libraries choose their kernels.
    answer(model, make_batch(config, [[4, ("image", 1, 2, 2), 4]]), 3, lambda ids: None)
    # A batch last: as in apps.batch its weights are reordered.
    for name, task in sorted(job["tasks"].items(), key=lambda item: len(item[1]["rows"])):
        if job["side"] == "ours" and len(task["rows"]) > 1:
            linear.reorder_weights(model)
        batch = make_batch(config, task["rows"])
        times = []
        tokens = []

        def on_token(ids, times=times, tokens=tokens):
            times.append(clock())
            tokens.append(ids)

        recorder.reset()
        start = clock()
        answer(model, batch, task["new_tokens"], on_token)
        if "logits" in job:  # of the prefill and of the last step
            ends = torch.stack((recorder.logits[0], recorder.logits[-1])).float().cpu().numpy()
            np.save(Path(job["logits"]) / f"{job['side']}-{job['dtype']}-{name}.npy", ends)
        report(
            task=name,
            start=start,
            end=times[-1],
            vision=recorder.vision_seconds,
            first_token=times[0] - start,
            steps=[after - before for before, after in itertools.pairwise(times)],
            tokens=tokens,
            peak_bytes=peak_bytes(job["device"]),
        )


def measure_ceilings(job: dict) -> None:
    import torch

    from benchmarks import machine

    torch.set_num_threads(job["threads"])
    clock = make_clock(job["device"])
    start = clock()
    with torch.inference_mode():
        rates = machine.ceilings(
            job["shapes"], job["dtypes"], job["device"], clock, job["megabytes"], job["budget"]
        )
    report(task="ceilings", start=start, end=clock(), **rates)


def measure_llama(job: dict) -> None:
    from benchmarks import llama

    llama.measure(job)


def measure_finetune(job: dict) -> None:
    from benchmarks import finetune

    finetune.train(job)


def measure_preprocessing(job: dict) -> None:
    from benchmarks import long_videos

    long_videos.measure_preprocessing(job)


JOBS = {
    "cold": cold,
    "questions": questions,
    "ceilings": measure_ceilings,
    "llama": measure_llama,
    "finetune": measure_finetune,
    "preprocessing": measure_preprocessing,
}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    JOBS[job["kind"]](job)
