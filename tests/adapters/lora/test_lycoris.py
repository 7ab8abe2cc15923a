"""Every kind of adapter that LyCORIS writes has the effect here that it has there, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentdiff.adapters.lora.kinds import Facts, kind_names, read_change
from latentdiff.adapters.lora.names import read_key

modules = pytest.importorskip("lycoris.modules")

LAYERS = {
    "linear": lambda: (nn.Linear(24, 32), torch.randn(2, 5, 24)),
    "convolution": lambda: (nn.Conv2d(24, 32, 3, stride=2, padding=1), torch.randn(2, 24, 8, 8)),
    "1x1": lambda: (nn.Conv2d(24, 32, 1), torch.randn(2, 24, 4, 4)),
    "layer norm": lambda: (nn.LayerNorm(32), torch.randn(2, 5, 32)),
    "group norm": lambda: (nn.GroupNorm(4, 32), torch.randn(2, 32, 4, 4)),
}
CASES = [
    ("LoRA", "LoConModule", {}, ("linear", "convolution", "1x1")),
    ("LoRA with a middle matrix", "LoConModule", {"use_tucker": True}, ("convolution",)),
    ("DoRA", "LoConModule", {"weight_decompose": True}, ("linear", "convolution")),
    ("DoRA", "LoConModule", {"weight_decompose": True, "wd_on_out": False}, ("linear", "convolution")),
    ("LoRA with a middle matrix with DoRA", "LoConModule", {"use_tucker": True, "weight_decompose": True},
     ("convolution",)),
    ("LoRA", "LoConModule", {"rs_lora": True}, ("linear",)),
    ("LoRA", "LoConModule", {"use_scalar": True}, ("linear",)),
    ("LoHa", "LohaModule", {}, ("linear", "convolution", "1x1")),
    ("LoHa", "LohaModule", {"use_tucker": True}, ("convolution",)),
    ("LoHa with DoRA", "LohaModule", {"weight_decompose": True}, ("linear",)),
    ("LoKr", "LokrModule", {"factor": 4}, ("linear", "convolution")),
    ("LoKr", "LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}, ("linear", "convolution")),
    ("LoKr", "LokrModule", {"factor": 4, "use_tucker": True, "lora_dim": 2}, ("convolution",)),
    ("LoKr", "LokrModule", {"factor": 4, "full_matrix": True}, ("linear", "convolution")),
    ("LoKr with DoRA", "LokrModule", {"factor": 4, "weight_decompose": True}, ("linear",)),
    ("OFT", "DiagOFTModule", {}, ("linear", "convolution")),
    ("OFT", "DiagOFTModule", {"constraint": 1e-3, "rescaled": True}, ("linear", "convolution")),
    ("BOFT", "ButterflyOFTModule", {}, ("linear", "convolution")),
    ("BOFT", "ButterflyOFTModule", {"constraint": 1e-3, "rescaled": True}, ("linear",)),
    ("IA3", "IA3Module", {}, ("linear", "convolution")),
    ("IA3", "IA3Module", {"train_on_input": True}, ("linear", "convolution")),
    ("GLoRA", "GLoRAModule", {}, ("linear", "1x1", "convolution")),
    ("full difference + bias difference", "FullModule", {}, ("linear", "convolution")),
    ("norm difference", "NormModule", {}, ("layer norm", "group norm")),
]  # fmt: skip
WHOLE = [(*case[:3], layer) for case in CASES for layer in case[3]]
# At a strength other than 1 LyCORIS keeps dW of DoRA and the rescaling of OFT whole.
SCALED_BY_NOTHING_ELSE = {"DoRA", "OFT"}


def taught(module: str, layer: nn.Module, **options) -> nn.Module:
    """LyCORIS' module for a layer, with weights that have an effect."""
    made = getattr(modules, module)("x", layer, **{"lora_dim": 4, "alpha": 2.0, **options})
    if module == "FullModule":
        made.apply_to()  # from here on it holds the whole weight, and its file the difference
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def written(module: nn.Module) -> dict[str, torch.Tensor]:
    """What it writes, by role, read through a file's names."""
    state = module.state_dict()
    tensors = {read_key(f"lora_unet_x.{name}")[1]: tensor.detach().clone() for name, tensor in state.items()}
    assert len(tensors) == len(state)
    return tensors


def effect(module: nn.Module, target: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of the layer as LyCORIS changes it; the layer is as before afterwards."""
    if type(module).__name__ != "FullModule":
        module.org_forward = target.forward
        return module(x)
    changed = module(x)
    module.restore()
    return changed


def facts(tensors) -> Facts:
    return Facts(float(tensors["alpha"])) if "alpha" in tensors else Facts()


@pytest.mark.parametrize(("kind", "module", "options", "layer"), WHOLE)
@pytest.mark.parametrize("strength", [1.0, 0.5])
@torch.no_grad()
def test_effect(kind, module, options, layer, strength):
    torch.manual_seed(0)
    target, x = LAYERS[layer]()
    theirs = taught(module, target, multiplier=strength, **options)
    tensors = written(theirs)
    expected = effect(theirs, target, x)
    assert kind_names(tensors) == kind
    change = read_change(tensors, target, facts(tensors))
    assert change.kind == kind
    if strength != 1 and any(word in kind for word in SCALED_BY_NOTHING_ELSE) and kind != "BOFT":
        if "DoRA" in kind or "rescaled" in options:
            whole = change.added(target, x)
            torch.testing.assert_close(change.added(target, x, strength), strength * whole, rtol=1e-5, atol=1e-5)
            return
    before = target(x)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(before + change.added(target, x, strength), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "module", "options", "layer"), WHOLE)
@torch.no_grad()
def test_added_is_the_weight_change(kind, module, options, layer):
    """What acts beside a layer is what merging puts into it."""
    torch.manual_seed(0)
    target, x = LAYERS[layer]()
    theirs = taught(module, target, **options)
    tensors = written(theirs)
    effect(theirs, target, x)
    change = read_change(tensors, target, facts(tensors))
    expected = target(x) + change.added(target, x, 0.7)
    weight, bias = change.weight_change(target.weight, 0.7), change.bias_change(target.bias, 0.7)
    target.weight += weight.reshape(target.weight.shape)
    if bias is not None:
        target.bias += bias
    torch.testing.assert_close(target(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "module", "options", "layer"), WHOLE)
@torch.no_grad()
def test_other_layers_are_refused(kind, module, options, layer):
    from latentdiff.adapters.lora.kinds import Misfit

    others = {
        "linear": nn.Linear(26, 34),
        "convolution": nn.Conv2d(26, 34, 3),
        "1x1": nn.Conv2d(26, 34, 1),
        "layer norm": nn.LayerNorm(34),
        "group norm": nn.GroupNorm(2, 34),
    }
    tensors = written(taught(module, LAYERS[layer]()[0], **options))
    with pytest.raises(Misfit):
        read_change(tensors, others[layer], facts(tensors))


@pytest.mark.parametrize("layer", ["linear", "convolution"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.7])
@torch.no_grad()
def test_dora_at_other_strengths(layer, strength):
    """As LyCORIS' functions, A1111 and ComfyUI scale it: part of the way to the adapted weight, and 0 is none."""
    from lycoris.functional import apply_dora_scale

    torch.manual_seed(0)
    target, _ = LAYERS[layer]()
    theirs = taught("LoConModule", target, weight_decompose=True, wd_on_out=False)
    tensors = written(theirs)
    change = read_change(tensors, target, facts(tensors))
    weight = target.weight.detach()
    whole = change.inner.weight_change(weight).reshape(weight.shape)
    expected = apply_dora_scale(weight, whole, tensors["dora_scale"], strength)
    torch.testing.assert_close(weight + change.weight_change(weight, strength), expected, rtol=1e-5, atol=1e-5)
