"""What runs in a fresh process: `workers.py JOB`, a job in JSON, prints what it found, a line of JSON for each part.

Times are those of the monotonic clock, which all processes of a machine share. Nothing is imported before a job needs
it, because the time that imports take is measured, too.
"""

import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def report(**values) -> None:
    print("result " + json.dumps(values), flush=True)


def make_clock(device: str):
    """Seconds; on a GPU only once all that was asked of it is done."""
    if device == "cpu":
        return time.monotonic
    import torch

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.monotonic()

    return clock


def peak_bytes(device: str) -> int:
    """The most memory that this process has had: on the GPU, or resident, which counts mapped files as well."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no VmHWM, the peak of resident memory")


# ------------------------------------------------------------------------------------------------ the two sides
def load_options(form: str) -> dict:
    """What `load_model` is told: a dtype, or "int8" or "int4", for which what is not quantised is in bfloat16."""
    import torch

    if form.startswith("int"):
        return {"dtype": torch.bfloat16, "quantize": form}
    return {"dtype": getattr(torch, form)}


def load_ours(job: dict):
    from load_weights import load_model

    model = load_model(job["checkpoint"], job["device"], **load_options(job["dtype"]))
    model.generation_config = {"eos_token_id": []}  # random weights end by chance
    if job["device"] != "cpu":
        from extras import cuda_graph

        cuda_graph.use(model)
    return model


def answer_ours(model, batch, new_tokens: int, on_token) -> None:
    """Greedy tokens as a user gets them; on_token(ids of all rows) for each."""
    from generate import Sampling, stream

    for tokens in stream(model, batch, new_tokens, Sampling()):
        on_token(tokens)


def load_peer(job: dict):
    import torch
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

    dtype = getattr(torch, job["dtype"])
    model = (
        Qwen2VLForConditionalGeneration.from_pretrained(job["checkpoint"], dtype=dtype)
        .to(job["device"])
        .eval()
    )
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def answer_peer(model, batch, new_tokens: int, on_token) -> None:
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Watcher(BaseStreamer):
        prompt_seen = False

        def put(self, value):
            if self.prompt_seen:
                on_token(value.flatten().tolist())
            self.prompt_seen = True

        def end(self):
            pass

    config, inputs = (
        model.config,
        {n: torch.as_tensor(a, device=model.device) for n, a in batch.arrays().items()},
    )
    ids = inputs["input_ids"]
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    model.generate(
        **inputs,
        mm_token_type_ids=kinds,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=Watcher(),
    )


SIDES = {"ours": (load_ours, answer_ours), "transformers": (load_peer, answer_peer)}


# ----------------------------------------------------------------------------------------------------- the jobs
# What the chat template makes of a question; without one in the folder, the peer's tokenizer has to be given it.
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)
PROMPT += "<|im_start|>assistant\n"


def cold(job: dict) -> None:
    """From nothing to the first token of the answer to a short text. The clock of the caller started before."""
    text = "What is the capital of France?"
    if job["side"] == "ours":
        from generate import Sampling, stream
        from load_weights import load_model
        from preprocess import Processor

        imported = time.monotonic()
        processor = Processor.from_pretrained(job["checkpoint"])
        batch = processor([{"role": "user", "content": text}])
        model = load_model(job["checkpoint"], job["device"], **load_options(job["dtype"]))
        loaded = time.monotonic()
        next(stream(model, batch, 16, Sampling()))
    else:
        import torch
        from transformers import (
            AutoTokenizer,
            Qwen2VLForConditionalGeneration,
        )  # AutoProcessor wants torchvision

        imported = time.monotonic()
        tokenizer, dtype = (
            AutoTokenizer.from_pretrained(job["checkpoint"]),
            getattr(torch, job["dtype"]),
        )
        inputs = tokenizer(PROMPT.format(text), return_tensors="pt").to(job["device"])
        model = Qwen2VLForConditionalGeneration.from_pretrained(job["checkpoint"], dtype=dtype).to(
            job["device"]
        )
        loaded = time.monotonic()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    end = make_clock(job["device"])()
    report(task="cold", start=job["start"], end=end, first_token=end - job["start"],
           import_seconds=imported - job["start"], load_seconds=loaded - imported)  # fmt: skip


def questions(job: dict) -> None:
    """Loads once, warms up, then answers each of job["tasks"] and says how long its parts took."""
    import numpy as np
    import torch

    from benchmarks.checkpoint import make_batch
    from load_weights import load_config

    torch.set_num_threads(job["threads"])
    clock, config, (load, answer) = (
        make_clock(job["device"]),
        load_config(job["checkpoint"]),
        SIDES[job["side"]],
    )
    model = load(job)
    vision, scores = [], []
    tower = model.visual if job["side"] == "ours" else model.model.visual
    tower.register_forward_pre_hook(lambda *_: vision.append(-clock()))
    tower.register_forward_hook(lambda *_: vision.append(clock()))
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, out: scores.append(out[:, -1].detach().clone())
    )

    # Mapped weights are read for the first time, and libraries choose their kernels.
    answer(model, make_batch(config, [[4, ("image", 1, 2, 2), 4]]), 3, lambda _: None)
    for name, task in job["tasks"].items():
        batch, times, tokens = make_batch(config, task["rows"]), [], []
        vision.clear()
        scores.clear()
        start = clock()
        answer(
            model,
            batch,
            task["new_tokens"],
            lambda ids, t=times, n=tokens: (t.append(clock()), n.append(ids)),
        )
        if "logits" in job:  # of the prefill and of the last step
            ends = torch.stack((scores[0], scores[-1])).float().cpu().numpy()
            np.save(Path(job["logits"]) / f"{job['side']}-{job['dtype']}-{name}.npy", ends)
        report(task=name, start=start, end=times[-1], vision=sum(vision), first_token=times[0] - start,
               steps=[b - a for a, b in itertools.pairwise(times)], tokens=tokens,
               peak_bytes=peak_bytes(job["device"]))  # fmt: skip


def measure_ceilings(job: dict) -> None:
    import torch

    from benchmarks import machine

    torch.set_num_threads(job["threads"])
    clock = make_clock(job["device"])
    start = clock()
    with torch.inference_mode():
        found = machine.ceilings(
            job["shapes"], job["dtypes"], job["device"], clock, job["megabytes"], job["budget"]
        )
    report(task="ceilings", start=start, end=clock(), **found)


def measure_llama(job: dict) -> None:
    from benchmarks import llama

    llama.measure(job)


JOBS = {"cold": cold, "questions": questions, "ceilings": measure_ceilings, "llama": measure_llama}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    JOBS[job["kind"]](job)
