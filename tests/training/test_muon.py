import pytest
import torch
from torch.nn import Parameter

from latentdiff.training.muon import is_hidden, orthogonal
from latentdiff.training.optimizer import ParameterGroup, make_optimizer, moments, restore_moments
from latentdiff.training.sections import StageSection


def settings(**changes):
    return StageSection(**{"max_steps": 100, "batch_size": 1, "lr": 0.1, "optimizer": "muon", **changes})


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 32), (2, 32, 4)])
def test_singular_values_are_brought_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonal(matrices).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3 and values.max() < 1.4  # the quintic is steep, not exact (Jordan et al. 2024)
    alike = torch.cosine_similarity(made.flatten(1), (left @ right).flatten(1))
    assert alike.min() > 0.95


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_steps_are_those_of_torch(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    optimizer = make_optimizer([ParameterGroup("all", {"layer.weight": ours})], settings(weight_decay=0.1))
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2 + step))
        for parameter, one in ((ours, optimizer), (theirs, peer)):
            parameter.grad = gradient.clone()
            one.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)  # both compute in bfloat16
    assert (ours - start).abs().mean() > 0.03


def test_kernels_are_matrices_and_the_rest_is_left_to_adamw():
    parameters = {
        "down.conv.weight": Parameter(torch.ones(4, 3, 3, 3)),
        "down.conv.bias": Parameter(torch.ones(4)),
        "conv_in.weight": Parameter(torch.ones(4, 3, 3, 3)),
        "time_embedding.linear_1.weight": Parameter(torch.ones(4, 4)),
    }
    assert [name for name, parameter in parameters.items() if is_hidden(name, parameter)] == ["down.conv.weight"]
    optimizer = make_optimizer([ParameterGroup("all", parameters)], settings())
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    kept = {key.rsplit("/", 1)[1] for key in moments(optimizer, parameters) if key.startswith("down.conv.weight")}
    assert kept == {"momentum"}
    kept = {key.rsplit("/", 1)[1] for key in moments(optimizer, parameters) if key.startswith("conv_in")}
    assert kept == {"step", "exp_avg", "exp_avg_sq"}


def test_a_group_may_stay_with_adamw():
    weight = Parameter(torch.ones(4, 4))
    optimizer = make_optimizer([ParameterGroup("text", {"layer.weight": weight}, muon=False)], settings())
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert "exp_avg" in optimizer.state[weight]


def test_momentum_is_restored():
    def make():
        weight = Parameter(torch.eye(4))
        return weight, make_optimizer([ParameterGroup("all", {"layer.weight": weight})], settings())

    def step(weight, optimizer, seed):
        weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    weight, optimizer = make()
    step(weight, optimizer, 0)
    other, fresh = make()
    other.data.copy_(weight.data)
    restore_moments(fresh, {"layer.weight": other}, moments(optimizer, {"layer.weight": weight}))
    step(weight, optimizer, 1)
    step(other, fresh, 1)
    assert torch.equal(weight, other)
