import pytest
import torch
from torch.nn import Parameter

from latentdiff.training.optimizer import (
    FusedAdamW,
    ParameterGroup,
    clip_gradients,
    learning_rate,
    make_optimizer,
    moments,
    restore_moments,
    set_learning_rate,
)
from latentdiff.training.sections import StageSection


def settings(**changes):
    return StageSection(**{"max_steps": 100, "batch_size": 1, "lr": 1.0, "warmup_steps": 10, **changes})


def test_warm_up_then_cosine():
    rates = [learning_rate(step, settings()) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == rates[10]
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))


def test_linear_and_constant_and_late_decay():
    assert learning_rate(55, settings(decay="linear")) == pytest.approx(0.5)
    assert learning_rate(99, settings(decay="constant")) == 1.0
    late = settings(decay="linear", decay_steps=20)
    assert learning_rate(80, late) == 1.0
    assert learning_rate(90, late) == pytest.approx(0.5)


def test_only_matrices_decay():
    weight, bias = Parameter(torch.ones(3, 3)), Parameter(torch.ones(3))
    optimizer = make_optimizer(
        [ParameterGroup("all", {"weight": weight, "bias": bias})], settings(weight_decay=0.5, lr=0.1)
    )
    weight.grad, bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3, 3), 0.95))
    assert torch.equal(bias, torch.ones(3))


def test_groups_have_their_own_learning_rate():
    first, second = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    groups = [ParameterGroup("a", {"a": first}), ParameterGroup("b", {"b": second}, lr_scale=0.5)]
    optimizer = make_optimizer(groups, settings())
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_are_restored_exactly(memory_format):
    """Saved files are always contiguous; the fused kernel would mix up moments that lie in another order than the
    weights."""

    def make():
        torch.manual_seed(0)
        parameters = {
            "kernel": Parameter(torch.randn(4, 3, 2, 2).to(memory_format=memory_format)),
            "unused": Parameter(torch.ones(2)),
        }
        return parameters, make_optimizer([ParameterGroup("all", parameters)], settings(lr=0.1))

    def step(parameters, optimizer, seed):
        torch.manual_seed(seed)
        parameters["kernel"].grad = torch.randn(4, 3, 2, 2).to(memory_format=memory_format)
        optimizer.step()

    parameters, optimizer = make()
    step(parameters, optimizer, 1)
    others, fresh = make()
    with torch.no_grad():
        others["kernel"].copy_(parameters["kernel"])
    saved = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in moments(optimizer, parameters).items()
    }
    assert set(saved) == {"kernel/step", "kernel/exp_avg", "kernel/exp_avg_sq"}
    restore_moments(fresh, others, saved)
    step(parameters, optimizer, 2)
    step(others, fresh, 2)
    assert torch.equal(parameters["kernel"], others["kernel"])


def test_adamw_is_torchs_fused_one_to_the_bit():
    torch.manual_seed(0)
    kernel = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    mine, theirs = ([Parameter(kernel.clone()), Parameter(torch.ones(5))] for _ in range(2))
    groups = [{"weight_decay": 0.1, "lr_scale": 1.0}, {"weight_decay": 0.0, "lr_scale": 1.0}]
    own = FusedAdamW([{**group, "params": [p]} for group, p in zip(groups, mine, strict=True)], 1e-2, (0.9, 0.99))
    reference = torch.optim.AdamW(
        [{**group, "params": [p]} for group, p in zip(groups, theirs, strict=True)],
        lr=1e-2,
        betas=(0.9, 0.99),
        fused=True,
    )
    for step in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (own, reference):
            set_learning_rate(optimizer, 1e-2 / (step + 1))
            optimizer.step()
            optimizer.zero_grad()
    assert mine[0].grad is None
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_gradients_are_clipped_as_by_torch(largest):
    torch.manual_seed(0)
    mine, theirs = ([Parameter(torch.zeros(4, 3)), Parameter(torch.zeros(5))] for _ in range(2))
    for a, b in zip(mine, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    assert torch.equal(clip_gradients(mine, largest), torch.nn.utils.clip_grad_norm_(theirs, largest))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))
