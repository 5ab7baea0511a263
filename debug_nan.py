"""`--debug-nan`: the first layer, in the order of computing, whose output is not finite.

Forward hooks on every module serve this option alone. They make each layer wait for its check.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwen2vl import Qwen2VL


class NotFiniteError(ValueError):
    """The model computed NaN or infinite values."""


def watch_modules(model: Qwen2VL) -> list[RemovableHandle]:
    """Raise NotFiniteError, from now on, for the first module whose output is not finite.

    Modules inside others come first, as they are computed first; the vision encoder is included.
    Returns the handles of the hooks: removing them ends it.
    """
    return [
        module.register_forward_hook(named_check(name))
        for name, module in model.named_modules()
        if name
    ]


def named_check(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    """Return a forward hook that checks the output of the module of that name."""

    def check(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if not isinstance(output, Tensor) or output.isfinite().all():
            return
        dtype = str(output.dtype).removeprefix("torch.")
        kind = "NaN" if output.isnan().any() else "infinity"
        damaged = [
            parameter_name
            for parameter_name, parameter in module.named_parameters(recurse=False)
            if torch.is_floating_point(parameter) and not parameter.isfinite().all()
        ]
        cause = f"; its {damaged[0]} is not finite itself" if damaged else ""
        raise NotFiniteError(f"the output of {name} is the first with {kind}, in {dtype}{cause}")

    return check
