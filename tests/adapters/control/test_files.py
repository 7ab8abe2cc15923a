"""ControlNet files in all layouts, there and back to the bit, and what is no ControlNet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import ControlNet
from latentdiff.checkpoints.control import control_map, read_control, to_original, whole_weights
from latentdiff.checkpoints.inspection import inspect
from latentdiff.checkpoints.tables import unet_map
from latentdiff.errors import CheckpointError, ConfigError, LatentDiffError
from tests import peers
from tests.adapters.control.nets import hint, saved, theirs
from tests.checkpoints import compvis
from tests.tasks.images import apart

QUICK = {"steps": 2, "seed": 1, "progress": False}


def original(linear: bool = False, width: int = 320, context: int = 768) -> compvis.Shapes:
    """Names and shapes of `ControlNet` of cldm.py, as its constructor makes them."""
    unet = compvis.unet(width=width, context=context, linear=linear, prefix="")
    shapes = {name: shape for name, shape in unet.items() if not name.startswith(("output_blocks", "out."))}
    channels = [3, 16, 16, 32, 32, 96, 96, 256, width]
    for number, (into, out) in enumerate(zip(channels, channels[1:], strict=False)):
        shapes |= compvis._conv(f"input_hint_block.{2 * number}", out, into)
    skips = [width] * 4 + [2 * width] * 3 + [4 * width] * 5
    for number, skip in enumerate(skips):
        shapes |= compvis._conv(f"zero_convs.{number}.0", skip, skip, 1)
    shapes |= compvis._conv("middle_block_out.0", 4 * width, 4 * width, 1)
    return {f"control_model.{name}": shape for name, shape in shapes.items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "diffusion_pytorch_model.safetensors")


def in_original_layout(folder: Path, path: Path, *, prefix: str = "control_model.", **more) -> Path:
    control = read_control(folder)
    named = {
        prefix + name.removeprefix("control_model."): t.clone()
        for name, t in to_original(control.tensors, control.config).items()
    }
    save_file(named | more, path)
    return path


@pytest.mark.parametrize("linear", [False, True])
def test_names_are_those_of_the_original_code(linear, tmp_path):
    """Of published sizes: the whole list, in both directions, without a weight in memory."""
    shapes = original(linear, 32, 48)
    save_file(compvis.tensors(shapes), tmp_path / "control.safetensors")
    control = read_control(tmp_path / "control.safetensors")
    table = control_map(control.config)
    bare = {name.removeprefix("control_model.") for name in shapes}
    assert {table.to_theirs(name) for name in control.tensors} == bare
    assert control.guessed and control.config.hint_widths == (16, 32, 96, 256)
    assert control.config.unet.cross_attention_dim == 48 and control.config.unet.use_linear_projection == linear


@pytest.mark.parametrize("family", peers.FAMILIES)
@pytest.mark.parametrize("prefix", ["control_model.", "", "module.control_model."])
def test_there_and_back_to_the_bit(family, prefix, tmp_path):
    folder = saved(tmp_path, family)
    path = in_original_layout(folder, tmp_path / "control.safetensors", prefix=prefix)
    again, expected = read_control(path), tensors_of(folder)
    assert again.tensors.keys() == expected.keys()
    assert all(torch.equal(again.tensors[name], expected[name]) for name in expected)
    back = to_original(again.tensors, again.config)
    stored = load_file(path)
    assert {name.removeprefix("module."): None for name in stored}.keys() >= {
        "control_model.zero_convs.0.0.weight"
    } or not prefix
    assert all(torch.equal(t, stored[prefix + name.removeprefix("control_model.")]) for name, t in back.items())


@pytest.mark.parametrize("family", peers.FAMILIES)
def test_all_layouts_make_the_same_image(family, tmp_path):
    """A folder says its configuration; of files it is read off the tensors, and heads and groups are the model's."""
    folder, pipe = saved(tmp_path, family), peers.ours(family)
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(tensors_of(folder), alone / "control.safetensors")
    places = [folder, alone / "control.safetensors", in_original_layout(folder, tmp_path / "o.safetensors")]
    bare = load_file(in_original_layout(folder, tmp_path / "b.safetensors", prefix=""))
    torch.save({"state_dict": {f"control_model.{name}": tensor for name, tensor in bare.items()}}, tmp_path / "c.pth")
    images = [
        pipe("cat", controls=[ControlNet.load(place)(hint())], **QUICK)[0] for place in (*places, tmp_path / "c.pth")
    ]
    assert all(apart(image, images[0]) == 0 for image in images)
    assert apart(images[0], pipe("cat", **QUICK)[0]) > 3


def test_differences_are_added_to_the_model(tmp_path):
    """Whole weights minus those of the U-Net, as `difference` files are made; base and hint come back."""
    folder, pipe = saved(tmp_path), peers.ours("sd1")
    base = peers.theirs("sd1").unet.state_dict()
    control = read_control(folder)
    less = {name: t - base[name] if name in base else t.clone() for name, t in control.tensors.items()}
    path = tmp_path / "diff.safetensors"
    save_file(to_original(less, control.config) | {"difference": torch.tensor(1.0)}, path)
    found = read_control(path)
    assert found.is_difference and "differences" in " ".join(inspect(path).notes)
    whole = whole_weights(found, dict(pipe.unet.state_dict()))
    for name, tensor in control.tensors.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=1e-6)
    expected = pipe("cat", controls=[ControlNet.load(folder)(hint())], **QUICK)[0]
    assert apart(pipe("cat", controls=[ControlNet.load(path)(hint())], **QUICK)[0], expected) <= 1
    # An inpainting model sees more channels than the control: the latents' are those that count.
    assert whole_weights(found, dict(peers.ours("inpaint").unet.state_dict()))["conv_in.weight"].shape[1] == 4


def test_half_precision_files(tmp_path):
    theirs().half().save_pretrained(tmp_path / "half")
    theirs.cache_clear()  # `half` works in place
    control = ControlNet.load(tmp_path / "half")
    assert {t.dtype for t in control.weights.tensors.values()} == {torch.float16}
    pipe = peers.ours("sd1")
    one, other = (pipe("cat", controls=[c(hint())], **QUICK)[0] for c in (control, ControlNet.load(saved(tmp_path))))
    assert apart(one, other) <= 3


def test_inspect_names_it(tmp_path):
    folder = saved(tmp_path)
    path = in_original_layout(folder, tmp_path / "canny.safetensors")
    assert inspect(path).kind == "ControlNet (safetensors)"
    assert inspect(path).family == "ControlNet for Stable Diffusion 1.x, a size of its own"
    assert inspect(folder).kind == "folder of a ControlNet (safetensors)" and not inspect(folder).problem
    assert "2.x" in inspect(saved(tmp_path, "sd2")).family


def test_shuffle_models_are_told_by_their_name(tmp_path):
    folder = saved(tmp_path)
    path = in_original_layout(folder, tmp_path / "control_v11e_sd15_shuffle.safetensors")
    assert read_control(path).config.pools and not read_control(path, pools=False).config.pools
    assert not read_control(folder).config.pools and read_control(folder, pools=True).config.pools
    assert "averaged" in " ".join(inspect(path).notes)


def broken(path: Path, change) -> Path:
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("control_model.zero_convs.3.0.bias"), "1 missing: controlnet_down_blocks.3.bias"),
        (lambda t: t.update({"control_model.extra.weight": torch.ones(2)}), "holds more than a ControlNet: extra.weight"),
        (lambda t: t.update({"control_model.zero_convs.3.0.bias": torch.ones(3)}), "of the wrong shape"),
        (lambda t: t.update({"control_model.zero_convs.3.0.bias": torch.ones(16, dtype=torch.int8)}), "expected floats"),
        (lambda t: t.pop("control_model.input_blocks.0.0.weight"), "is missing"),
    ],
)  # fmt: skip
def test_damaged_files(change, message, tmp_path):
    path = broken(in_original_layout(saved(tmp_path), tmp_path / "control.safetensors"), change)
    with pytest.raises(CheckpointError, match=message) as error:
        ControlNet.load(path)
    assert "\n" not in str(error.value)
    assert inspect(path).problem


def test_what_is_no_control(tmp_path):
    save_file(
        {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)},
        tmp_path / "l.safetensors",
    )
    with pytest.raises(CheckpointError, match="expected a ControlNet in .*, found LoRA"):
        ControlNet.load(tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="expected a ControlNet in .*, found U-Net"):
        ControlNet.load(peers.folder("sd1") / "unet")
    with pytest.raises(LatentDiffError):
        ControlNet.load(tmp_path / "nothing")
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(CheckpointError):
        ControlNet.load(tmp_path / "c.txt")


def test_configurations_of_others_are_refused(tmp_path):
    folder = saved(tmp_path)
    config = folder / "config.json"
    for old, new in [('"conditioning_channels": 3', '"conditioning_channels": 4'), ('"rgb"', '"grb"')]:
        config.write_text(config.read_text().replace(old, new))
        with pytest.raises(ConfigError):
            ControlNet.load(folder)
        config.write_text(config.read_text().replace(new, old))


def test_the_configuration_is_read_as_diffusers_writes_it(tmp_path):
    control = read_control(saved(tmp_path, "sd2")).config
    assert type(control).from_diffusers(control.to_diffusers()) == control
    assert control.unet == replace(control.unet, num_heads=(2, 4, 4, 4)) and unet_map(control.unet)
