"""New adapters of each kind: they begin as nothing, learn by the gradients of LyCORIS' and PEFT's modules, and their files
give the same."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from latentdiff.adapters.lora.adapter import LoRA, merge
from latentdiff.adapters.lora.kinds.new import NEW, Shape
from latentdiff.adapters.lora.loading import load_lora
from latentdiff.adapters.lora.norms import limit_norms
from latentdiff.adapters.lora.reading import read_lora
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.errors import UsageError
from tests import peers
from tests.adapters.lora.conftest import EVERYTHING, fill, our_outputs
from tests.adapters.lora.test_kinds_in_files import their_unet
from tests.adapters.lora.test_lycoris import LAYERS, modules

SHAPE = Shape(rank=4, alpha=2.0)
KINDS = ["dora", "loha", "lokr", "oft"]
NAMES = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "lora": "LoRA"}


def new(kind: str, target: nn.Module, shape: Shape = SHAPE, seed: int = 0) -> nn.Module:
    return NEW[kind](target, shape, torch.Generator().manual_seed(seed))


def learned(change: nn.Module, seed: int = 1) -> nn.Module:
    """The same with an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in change.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return change


THEIRS = {
    "lora": ("LoConModule", {}, SHAPE),
    "dora": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}, SHAPE),
    "dora of outputs": ("LoConModule", {"weight_decompose": True}, Shape(4, 2.0, axis=0)),
    "loha": ("LohaModule", {}, SHAPE),
    "lokr": ("LokrModule", {"lora_dim": 2}, Shape(2, 2.0)),
    "lokr, whole": ("LokrModule", {"lora_dim": 64}, Shape(64, 2.0)),
    "lokr, factor 2": ("LokrModule", {"factor": 2}, Shape(4, 2.0, factor=2)),
    "oft": ("DiagOFTModule", {}, SHAPE),
}


@pytest.mark.parametrize("layer", ["linear", "convolution", "1x1"])
@pytest.mark.parametrize("case", THEIRS)
def test_outputs_and_gradients_are_those_of_lycoris(case, layer):
    torch.manual_seed(0)
    target, x = LAYERS[layer]()
    target.requires_grad_(False)
    module, options, shape = THEIRS[case]
    ours = learned(new(case.split()[0].strip(","), target, shape))
    theirs = getattr(modules, module)("x", target, **{"lora_dim": shape.rank, "alpha": 2.0, **options})
    theirs.org_forward = target.forward
    tensors = ours.tensors()
    written = {"down": "lora_down.weight", "up": "lora_up.weight"}
    pairs = {role: theirs.get_parameter(written.get(role, role)) for role in tensors}
    for role, parameter in pairs.items():
        assert parameter.shape == tensors[role].shape, role
        parameter.data.copy_(tensors[role])
    probe = torch.randn(target(x).shape)
    x.requires_grad_()
    found = target(x) + ours.added(target, x)
    expected = theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - target(x)).abs().max() > 1e-3
    order = sorted(ours.parameters(), key=lambda parameter: parameter.ndim == 1)  # the lengths last
    of_ours = torch.autograd.grad((found * probe).sum(), [x, *order])
    order = sorted(pairs, key=lambda role: role == "dora_scale")
    of_theirs = torch.autograd.grad((expected * probe).sum(), [x, *(pairs[role] for role in order)])
    for mine, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(mine, other.reshape(mine.shape), rtol=1e-4, atol=1e-4 * other.abs().max().item())


@torch.no_grad()
def test_dora_of_outputs_is_that_of_peft():
    import peft

    torch.manual_seed(0)
    target, x = LAYERS["linear"]()
    ours = learned(new("dora", target, Shape(4, 2.0, axis=0)))
    expected = target(x) + ours.added(target, x)
    model = peft.get_peft_model(
        nn.Sequential(target), peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=True)
    )
    layer = model.base_model.model[0]
    layer.lora_A.default.weight.copy_(ours.inner.lora_down.weight)
    layer.lora_B.default.weight.copy_(ours.inner.lora_up.weight)
    layer.lora_magnitude_vector.default.weight.copy_(ours.lengths)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["linear", "convolution", "1x1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_one_changes_nothing_and_learns(kind, layer):
    torch.manual_seed(0)
    target, x = LAYERS[layer]()
    change = new(kind, target)
    added = change.added(target, x)
    torch.testing.assert_close(added, torch.zeros_like(added), rtol=0, atol=1e-6)
    (target(x) + added).square().sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in change.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_round_the_change(kind):
    """The difference of two weights would be lost in bfloat16."""
    torch.manual_seed(0)
    target, x = LAYERS["linear"]()
    change = new(kind, target)
    for parameter in change.parameters():
        parameter.data += 1e-4 * torch.randn_like(parameter)
    exact = change.added(target, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = change.added(target, x)
    assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_files_give_the_same_to_the_last_bit_and_merge(kind, tmp_path):
    pipe = peers.ours("sd1")
    plain = our_outputs(pipe)
    spec = LoRASpec(4, None if kind == "oft" else 2.0, EVERYTHING, kind)
    lora = fill(LoRA.create(pipe.unet, pipe.text_encoder, spec), std=0.1)
    with lora.attached():
        expected = our_outputs(pipe)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(plain, expected, strict=True))
    save_lora(lora, tmp_path / "a.safetensors")
    file = read_lora(tmp_path / "a.safetensors")
    assert set(file.kinds) == {NAMES[kind]}
    loaded, report = load_lora(file, pipe.unet, pipe.text_encoder)
    assert report.matched == report.total == len(lora.layers)
    with loaded.attached():
        assert all(map(torch.equal, expected, our_outputs(pipe)))
    merge([(loaded, 1.0)])
    for a, b in zip(expected, our_outputs(pipe), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_lengths_stay_whole_and_have_their_axis(axis, tmp_path):
    """ComfyUI, A1111 and LyCORIS tell by the shape what the lengths are of."""
    pipe = peers.ours("sd1")
    lora = LoRA.create(pipe.unet, None, LoRASpec(kind="dora", axis=axis, targets=("unet.*.to_q", "unet.*.conv1")))
    lora.keep_in(torch.float16)
    save_lora(lora, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for name, target in zip(lora.file_names.values(), lora.targets, strict=True):
        weight, lengths = target.weight, tensors[f"{name}.dora_scale"]
        others = [n for n in range(weight.ndim) if n != axis]
        torch.testing.assert_close(
            lengths, torch.linalg.vector_norm(weight.detach(), dim=others, keepdim=True), rtol=1e-6, atol=0
        )
        assert lengths.dtype == torch.float32 and tensors[f"{name}.lora_down.weight"].dtype == torch.float16


@torch.no_grad()
def test_peft_lengths_of_convolutions_are_written_as_of_outputs(tmp_path):
    """PEFT shapes them (1, out, 1, 1), which other programs would take for lengths of inputs."""
    import peft
    from diffusers import UNet2DConditionModel

    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["conv1", "to_q"], use_dora=True)
    wrapped = peft.get_peft_model(UNet2DConditionModel.from_pretrained(peers.folder("sd1") / "unet"), config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    pipe = peers.ours("sd1")
    lora, _ = load_lora(tmp_path, pipe.unet, None)
    save_lora(lora, tmp_path / "a.safetensors")
    again, _ = load_lora(tmp_path / "a.safetensors", pipe.unet, None)
    for (_, _, first), (_, _, second) in zip(lora.changes(), again.changes(), strict=True):
        assert torch.equal(first, second)
    shapes = {(t.shape[0] > 1, *t.shape[1:]) for n, t in load_file(tmp_path / "a.safetensors").items() if "dora" in n}
    assert shapes == {(True, 1), (True, 1, 1, 1)}


def test_ranks_by_block():
    pipe = peers.ours("sd1")
    spec = LoRASpec(4, targets=("attention", "text_encoder"), block_rank={"unet.*.to_v": 6, "mid": 8, "up": 0,
                                                                          "text_encoder": 2})  # fmt: skip
    layers = LoRA.create(pipe.unet, pipe.text_encoder, spec).layers
    expected = {
        name: 8 if ".mid_block." in name else 2 if name.startswith("text_encoder.") else 6 if "to_v" in name else 4
        for name in layers
    }
    assert {name: layer.rank for name, layer in layers.items()} == expected and len(set(expected.values())) == 4
    assert not any(".up_blocks." in name for name in layers) and any(".down_blocks." in name for name in layers)
    assert {layer.factor for layer in layers.values()} == {1.0}
    for wrong, message in (
        ({"middle": 2}, "'middle' fits no layer"),
        ({"unet.*": 0, "text_encoder": 0}, "every layer"),
    ):
        with pytest.raises(UsageError, match=message):
            LoRA.create(pipe.unet, pipe.text_encoder, LoRASpec(targets=("attention", "text_encoder"), block_rank=wrong))


def test_rank_stabilized_scale_goes_through_the_file(tmp_path):
    pipe = peers.ours("sd1")
    lora = fill(LoRA.create(pipe.unet, None, LoRASpec(16, 4.0, block_rank={"mid": 4}, rank_stabilized=True)))
    assert {layer.factor for layer in lora.layers.values()} == {1.0, 2.0}
    save_lora(lora, tmp_path / "a.safetensors")
    again, _ = load_lora(tmp_path / "a.safetensors", pipe.unet, None)
    for (_, _, first), (_, _, second) in zip(lora.changes(), again.changes(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_impossible_kinds():
    with pytest.raises(UsageError, match="one of lora, dora, loha, lokr, oft, found 'boft'"):
        LoRASpec(kind="boft")
    with pytest.raises(UsageError, match="5 output channels can be divided into blocks of 2 or more, found 4"):
        new("oft", nn.Linear(3, 5))


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
@torch.no_grad()
def test_norms_are_limited_along_the_direction(kind):
    torch.manual_seed(0)
    target, _ = LAYERS["convolution"]()
    change = learned(new(kind, target, Shape(4, 8.0)))
    inner = change.inner if kind == "dora" else change
    before = inner.weight_change(None).clone()
    kept = {name: parameter.clone() for name, parameter in change.named_parameters()}
    limit_norms([change], 1.01 * before.norm().item())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in change.named_parameters())
    limit_norms([change], 0.25 * before.norm().item())
    torch.testing.assert_close(inner.weight_change(None), 0.25 * before, rtol=1e-4, atol=1e-6)
    if kind == "lora":  # as kohya's scripts: both matrices by the square root
        for name, parameter in change.named_parameters():
            torch.testing.assert_close(parameter, 0.5 * kept[name])
    if kind == "dora":
        assert torch.equal(change.lengths, kept["lengths"])


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
@torch.no_grad()
def test_files_open_in_lycoris(kind, tmp_path):
    """LyCORIS opens no DoRA with lengths of inputs, not even its own."""
    from diffusers import UNet2DConditionModel
    from lycoris import create_lycoris_from_weights

    pipe = peers.ours("sd1")
    targets = ("attention", "convolutions")
    lora = fill(LoRA.create(pipe.unet, None, LoRASpec(4, None if kind == "oft" else 2.0, targets, kind, axis=0)))
    save_lora(lora, tmp_path / "a.safetensors")
    with lora.attached():
        expected = our_outputs(pipe)[0]
    theirs = UNet2DConditionModel.from_pretrained(peers.folder("sd1") / "unet")
    names = {n.replace("lora_unet_", "lycoris_"): t for n, t in load_file(tmp_path / "a.safetensors").items()}
    network, _ = create_lycoris_from_weights(1.0, None, theirs, weights_sd=names)
    assert len(network.loras) == len(lora.layers)
    network.apply_to()
    torch.testing.assert_close(their_unet(theirs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dora_of_outputs_opens_in_diffusers(tmp_path):
    pipe = peers.ours("sd1")
    spec = LoRASpec(4, 2.0, ("attention", "convolutions"), "dora", axis=0)
    lora = fill(LoRA.create(pipe.unet, None, spec))
    save_lora(lora, tmp_path / "a.safetensors", dialect="peft")
    with lora.attached():
        expected = our_outputs(pipe)[0]
    theirs = StableDiffusionPipeline.from_pretrained(peers.folder("sd1"), safety_checker=None)
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    torch.testing.assert_close(their_unet(theirs.unet), expected, rtol=1e-4, atol=1e-4)
    again, report = load_lora(tmp_path / "a.safetensors", pipe.unet, None)
    assert report.matched == report.total and report.kinds == "DoRA"
    with again.attached():
        torch.testing.assert_close(our_outputs(pipe)[0], expected, rtol=1e-5, atol=1e-5)
    other = LoRA.create(pipe.unet, None, LoRASpec(kind="dora"))
    with pytest.raises(UsageError, match="DoRA with lengths of inputs; use kohya"):
        save_lora(other, tmp_path / "b.safetensors", dialect="peft")
