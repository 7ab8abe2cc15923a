import pytest
import torch
from torch.nn import Parameter

from latentdiff.errors import ConfigError
from latentdiff.training.ema import ScheduleFreeAverage
from latentdiff.training.optimizer import (
    FusedAdamW,
    ParameterGroup,
    clip_gradients,
    group_state,
    learning_rate,
    make_optimizer,
    moments,
    restore_group_state,
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


def parameters_alike(count=2):
    torch.manual_seed(0)
    shapes = {"matrix": (6, 4), "kernel": (4, 3, 3, 3), "vector": (5,)}
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    return [{name: Parameter(value.clone()) for name, value in start.items()} for _ in range(count)]


def give_gradients(seed, *sets):
    for name in sets[0]:
        gradient = torch.randn(sets[0][name].shape, generator=torch.Generator().manual_seed(seed))
        for parameters in sets:
            parameters[name].grad = gradient.clone()


def peer_of(kind, groups):
    """The optimizer of its library, as its own documentation makes it."""
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=0.01, scale_parameter=False, relative_step=False, warmup_init=False)
    if kind == "relative":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=None, scale_parameter=True, relative_step=True, warmup_init=False)
    if kind == "lion":
        return pytest.importorskip("lion_pytorch").Lion(groups, lr=0.01, betas=(0.9, 0.99))
    return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=0.01, betas=(0.9, 0.99), warmup_steps=4)


OF_LIBRARIES = {
    "adafactor": {"optimizer": "adafactor"},
    "relative": {"optimizer": "adafactor", "relative_step": True},
    "lion": {"optimizer": "lion"},
    "schedulefree": {"optimizer": "schedulefree", "decay": "constant", "ema_decay": 0.0},
}


@pytest.mark.parametrize("kind", OF_LIBRARIES)
def test_steps_are_those_of_the_library(kind):
    mine, theirs = parameters_alike()
    warmup = 4 if kind == "schedulefree" else 0
    how = settings(
        lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=warmup, **{"decay": "constant", **OF_LIBRARIES[kind]}
    )
    peer = peer_of(kind, [
        {"params": [theirs["matrix"], theirs["kernel"]], "weight_decay": 0.1},
        {"params": [theirs["vector"]], "weight_decay": 0.0},
    ])  # fmt: skip
    own = make_optimizer([ParameterGroup("all", mine)], how)
    if kind == "schedulefree":
        peer.train()
    before = mine["matrix"].detach().clone()
    for step in range(6):
        give_gradients(step, mine, theirs)
        set_learning_rate(own, learning_rate(step, how))
        own.step()
        peer.step()
    assert not torch.allclose(mine["matrix"], before, atol=1e-3)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-7 if warmup else 0)


@pytest.mark.parametrize("kind", OF_LIBRARIES)
def test_the_state_of_libraries_is_restored_exactly(kind):
    mine, others = parameters_alike()
    how = settings(lr=0.01, **OF_LIBRARIES[kind])
    own, fresh = (make_optimizer([ParameterGroup("all", of)], how) for of in (mine, others))
    for step in range(3):
        give_gradients(step, mine)
        set_learning_rate(own, 0.01 * (step + 1))
        own.step()
    with torch.no_grad():
        for name in mine:
            others[name].copy_(mine[name])
    restore_moments(fresh, others, {key: value.clone() for key, value in moments(own, mine).items()})
    restore_group_state(fresh, group_state(own))
    for step in range(3, 6):
        give_gradients(step, mine, others)
        for optimizer in (own, fresh):
            set_learning_rate(optimizer, 0.005)
            optimizer.step()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_relative_steps_are_the_rates_that_are_logged():
    from transformers.optimization import Adafactor

    how = settings(optimizer="adafactor", relative_step=True)
    group = {"lr": None, "relative_step": True, "warmup_init": False, "scale_parameter": False}
    for step in (0, 50, 20_000):
        assert learning_rate(step, how) == Adafactor._get_lr(group, {"step": step + 1})


def test_the_averages_of_schedule_free_training_are_those_of_the_library_and_disturb_nothing():
    mine, theirs = parameters_alike()
    peer = pytest.importorskip("schedulefree").AdamWScheduleFree(theirs.values(), lr=0.01, betas=(0.9, 0.99))
    peer.train()
    own = make_optimizer(
        [ParameterGroup("all", mine)], settings(lr=0.01, weight_decay=0.0, **OF_LIBRARIES["schedulefree"])
    )
    average = ScheduleFreeAverage(mine, own)
    assert all(torch.equal(average.average[name], mine[name]) for name in mine)  # before the first step
    for step in range(5):
        give_gradients(step, mine, theirs)
        own.param_groups[0]["lr"] = own.param_groups[1]["lr"] = 0.01
        own.step()
        peer.step()
        average.update(step)
        live = {name: parameter.detach().clone() for name, parameter in mine.items()}
        with average.swapped_in():
            assert not torch.equal(mine["matrix"], live["matrix"]) or step == 0
        assert all(torch.equal(mine[name], live[name]) for name in mine)
    peer.eval()
    assert all(torch.equal(average.average[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("changes", [{"optimizer": "prodigy"}, {"optimizer": "adafactor", "relative_step": True}])
def test_one_step_size_is_not_parted(changes):
    first, second = parameters_alike()
    groups = [ParameterGroup("a", {"a": first["matrix"]}), ParameterGroup("b", {"b": second["matrix"]}, lr_scale=2.0)]
    with pytest.raises(ConfigError, match="finds one step size for all"):
        make_optimizer(groups, settings(**changes))
