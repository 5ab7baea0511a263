"""Muon: what it does to a matrix, and which weights the training of tiny/ gives to it."""

import pytest
import torch
import torch.distributed as dist

from load_weights import load_config
from qwen2vl import Qwen2VL
from tiny import train
from tiny.muon import Muon, orthogonalize
from tiny.score import CHECKPOINT


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonalize_keeps_directions_and_evens_their_sizes(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(1, -0.5, len(right))  # from 10 to 0.3
    result = orthogonalize(left @ sizes.diag() @ right)
    inner = left.T @ result @ right.T  # what became of the singular values
    assert inner.diag().min() > 0.6
    assert inner.diag().max() < 1.2
    assert (inner - inner.diag().diag()).abs().max() < 1e-4


def test_muon_steps_as_far_in_each_direction_and_decays_the_weight():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.full((16, 64), 3.0))
    optimizer = Muon([matrix], weight_decay=0.1, rank=0, processes=1)
    optimizer.param_groups[0]["lr"] = 0.5
    matrix.grad = torch.randn(16, 64)
    optimizer.step()
    step = 3.0 * (1 - 0.5 * 0.1) - matrix.detach()
    assert (step * matrix.grad).sum() > 0, "downhill"
    sizes = torch.linalg.svdvals(step) / (0.5 * 0.2 * 64**0.5)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.2


def test_muon_remembers_gradients():
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([matrix], weight_decay=0.0, rank=0, processes=1)
    optimizer.param_groups[0]["lr"] = 1.0
    matrix.grad = torch.eye(2)
    optimizer.step()
    before = matrix.detach().clone()
    matrix.grad = torch.zeros(2, 2)
    optimizer.step()
    assert (matrix.diag() < before.diag()).all(), "momentum goes on"


def take_steps(rank, processes, folder):
    """Save three matrices after two steps as one of some processes that share them."""
    if processes > 1:
        meeting = (folder / "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.zeros(8, columns)) for columns in (4, 8, 16)]
    optimizer = Muon(matrices, 0.1, rank, processes)
    optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(2):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape)
        optimizer.step()
    torch.save([matrix.detach() for matrix in matrices], folder / f"{rank}.pt")


def test_processes_share_the_work_and_all_have_the_result(tmp_path):
    (tmp_path / "alone").mkdir()
    take_steps(0, 1, tmp_path / "alone")
    torch.multiprocessing.spawn(take_steps, (2, tmp_path), 2)
    alone = torch.load(tmp_path / "alone" / "0.pt")
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt")
        for matrix, expected in zip(shared, alone, strict=True):
            assert torch.equal(matrix, expected)


def test_muon_takes_matrices_but_embeddings_and_the_merger():
    model = Qwen2VL(load_config(CHECKPOINT))
    names = {weight: name for name, weight in model.named_parameters()}
    adamw, muon = train.make_optimizers(model, 0, train.parse_arguments(["--muon"]))
    taken = {names[weight] for group in muon.param_groups for weight in group["params"]}
    rest = {names[weight] for group in adamw.param_groups for weight in group["params"]}
    assert taken | rest == set(names.values())
    assert not taken & rest
    assert {name for name in rest if model.get_parameter(name).ndim > 1} == {
        "model.embed_tokens.weight",
        "visual.patch_embed.proj.weight",
        "visual.merger.mlp.0.weight",
    }
    [alone] = train.make_optimizers(model, 0, train.parse_arguments([]))
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)
