"""Muon, an optimizer for matrices: momentum, orthogonalized.

A gradient of a matrix has a few large singular values and many small ones, and what the small ones
ask for hardly happens. Muon makes all of them about one before it takes the step. Source: Jordan et
al., "Muon: An optimizer for hidden layers in neural networks" (2024); the factor that makes a step
as large as one of AdamW is that of Liu et al., "Muon is scalable for LLM training" (2025),
section 2.2.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return U Vᵀ, roughly, for a matrix U S Vᵀ, float32 [rows, columns].

    Five times s → 3.4445 s - 4.775 s³ + 2.0315 s⁵ for all singular values s, which needs nothing
    but matmuls. It ends between 0.68 and 1.14 for whatever was above 0.01 of the Frobenius norm.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # the smaller of both X Xᵀ
    x = wide / (wide.norm() + 1e-7)  # all singular values are 1 at most
    for _ in range(5):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Muon for matrices whose gradients are the same in all processes.

    Each of the processes orthogonalizes a share of the matrices: all of them would take a fourth of
    the time that one of two processes needs for its gradients.
    """

    def __init__(self, matrices: list[Tensor], weight_decay: float, rank: int, processes: int):
        super().__init__(matrices, {"lr": 0.0, "momentum": 0.95, "weight_decay": weight_decay})
        self.rank = rank
        self.processes = processes

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = group["params"]
            updates = self.updates(matrices, group["momentum"])
            for matrix, update in zip(matrices, updates, strict=True):
                size = 0.2 * math.sqrt(max(matrix.shape))  # the root mean square becomes 0.2
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * size)

    def updates(self, matrices: list[Tensor], decay: float) -> list[Tensor]:
        """Return the orthogonalized Nesterov momentum of each matrix."""
        updates = [torch.zeros_like(matrix) for matrix in matrices]
        for number, matrix in enumerate(matrices):
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
            momentum = state["momentum"].lerp_(matrix.grad, 1 - decay)
            if number % self.processes == self.rank:
                updates[number] = orthogonalize(matrix.grad.lerp(momentum, decay))
        if self.processes > 1:
            sum_over_processes(updates)
        return updates


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace each of the tensors by its sum over all processes."""
    total = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(total)
    sums = total.split([tensor.numel() for tensor in tensors])
    for tensor, values in zip(tensors, sums, strict=True):
        tensor.copy_(values.view_as(tensor))
