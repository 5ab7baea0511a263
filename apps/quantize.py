"""Quantize a checkpoint once, and keep the result as a directory that loads quickly.

    python -m apps.quantize --model Qwen/Qwen2-VL-7B-Instruct --bits 4 --out qwen2-vl-7b-int4
    python generate.py --model qwen2-vl-7b-int4 --image photo.jpg

The integers are those of `--quantize int8` and `int4`, in the layout of GPTQ, which transformers
and other programs read, too. (They are rounded one by one; the method GPTQ, which corrects the
rounding by the activations of examples, is not applied.) The vision encoder, the embeddings and the
head keep their weights, since those programs expect it; `--quantize` on the new directory rounds
the head as well while it is loaded.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
from pathlib import Path

import command_line
import linear
import memory
from checkpoint_files import find_checkpoint, find_packing
from hub import SETTINGS
from load_weights import load_model, save_model
from output_files import check_directory, write_file

# Written by `save_model`, or about the weights of the original.
NOT_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")


def check_output(path: Path) -> None:
    """Raise FileExistsError for anything but an empty directory, OSError where none can be made."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: expected a new or empty directory for --out")
    check_directory(path)


def copy_settings(source: Path, target: Path) -> list[str]:
    """Copy the files of tokenizer, chat template and image settings; return their names."""
    names = []
    for pattern in SETTINGS:
        names += [path.name for path in source.glob(pattern) if path.name not in NOT_COPIED]
    for name in sorted(names):
        data = (source / name).read_bytes()
        write_file(target / name, lambda temporary, data=data: temporary.write_bytes(data))
    return sorted(names)


def quantize(arguments: argparse.Namespace) -> None:
    """Write the quantized checkpoint. Raises OSError or ValueError with one sentence."""
    out = Path(arguments.out)
    check_output(out)
    source = find_checkpoint(arguments.model)
    if find_packing(source) is not None:
        raise ValueError(f"{source} is quantized already: expected a checkpoint of plain weights")
    run = command_line.checked_run(arguments, source)
    if run is not None:
        run.quantize_head = False
        memory.check_quantizing(run)
    model = load_model(source, "cpu")
    before = sum(parameter.nbytes for parameter in model.parameters())
    linear.quantize_linears(model.model, arguments.quantize)  # the decoder without the head
    after = sum(parameter.nbytes for parameter in model.parameters())
    save_model(model, out)
    copy_settings(source, out)
    print(f"{out}: {before / 1e6:,.1f} MB of weights became {after / 1e6:,.1f} MB")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m apps.quantize",
        description="Quantize the decoder of a checkpoint, and write it in the layout of GPTQ.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        default=command_line.BUNDLED_CHECKPOINT,
        help="a checkpoint directory or hub name (default: the bundled tiny one)",
    )
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), required=True, help="of the decoder's weights"
    )
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="a directory that is new or empty"
    )
    command_line.add_memory_check_option(parser)
    parser.add_argument("--quiet", action="store_true", help="print warnings only")
    arguments = parser.parse_args(argv)
    arguments.quantize = f"int{arguments.bits}"
    # What else a run has, for the memory check.
    unset = {"dtype": None, "max_new_tokens": None, "adapter": []}
    vars(arguments).update(unset, device="cpu", attention="sdpa")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.quantize", quantize, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.quantize", main)
