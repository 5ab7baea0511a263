"""A tensor in a safetensors file, which is memory-mapped and not read before it is needed.

Any error of the safetensors library becomes one sentence that names the file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from errors import first_line
from json_files import LFS_POINTER


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn any error of the safetensors library in the block into a ValueError naming the file.

    Where the address space is too small to map it, a MemoryError.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in its Rust code is no Exception
        if os.strerror(errno.ENOMEM) in str(error):
            raise MemoryError(f"{path} cannot be mapped") from error
        raise ValueError(f"{path} is not a whole safetensors file: {first_line(error)}") from error


def open_shard(path: Path) -> safe_open:
    """Memory-map a safetensors file.

    Raises ValueError naming it if it is empty, cut off or of another format.
    """
    with naming(path), open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(LFS_POINTER.encode()):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}"
        )
    with naming(path):
        return safe_open(path, framework="pt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    shard: safe_open
    key: str  # its name there

    def shape(self) -> list[int]:
        with naming(self.path):
            return self.shard.get_slice(self.key).get_shape()

    def dtype(self) -> str:
        """Return the dtype in the file's own terms: F32, BF16, F8_E4M3, I32, ..."""
        with naming(self.path):
            return self.shard.get_slice(self.key).get_dtype()

    def is_floating_point(self) -> bool:
        return "F" in self.dtype()

    def load(self) -> torch.Tensor:
        """Return the tensor, in place in the mapped file."""
        with naming(self.path):
            return self.shard.get_tensor(self.key)
