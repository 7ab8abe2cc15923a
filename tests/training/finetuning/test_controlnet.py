"""Training ControlNets: diffusers' equation on one step, hints that go the way of their images, results that work."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel
from PIL import Image
from torch.nn import functional as F

from latentdiff import ControlNet, Pipeline
from latentdiff.adapters.control.preparation import prepared
from latentdiff.cli import cli
from latentdiff.errors import CheckpointError, ConfigError, DataError, UsageError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.controlnet import ControlNetwork, control_config
from latentdiff.request.options import PREPARATIONS
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.data.dataset import read_dataset
from latentdiff.training.data.hint_files import hint_files
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.loss import DenoisingLoss
from tests import peers
from tests.adapters.control.nets import saved
from tests.training.finetuning.build import captioned_folder, settings, state_of
from tests.training.finetuning.test_parity import LR

CONTROL = {"method": "controlnet", "ema_decay": 0.5}


def with_hints(folder: Path, count: int = 6, size: tuple[int, int] | None = None) -> Path:
    """Captioned images, and beside each a hint that says where it is bright."""
    captioned_folder(folder, count)
    for file in sorted(folder.glob("*.png")):
        image = Image.open(file).convert("L")
        image.resize(size or image.size).convert("RGB").save(file.with_suffix(".hint.png"))
    return folder


def one_step(tmp: Path, family: str, monkeypatch, **changes) -> tuple[dict, object]:
    """Run one step; returns the batch that it saw and the checkpoint after it."""
    with_hints(tmp / "data")
    batches, forward = [], DenoisingLoss.forward

    def spy(self, batch, step):
        batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return forward(self, batch, step)

    monkeypatch.setattr(DenoisingLoss, "forward", spy)
    run(
        settings(
            tmp, model=str(peers.folder(family)), resolution=64, upscale=True, max_steps=1, lr=LR, warmup_steps=0,
            grad_clip=0.5, cache_latents=False, cache_text=False, caption_dropout=0.3, **{**CONTROL, **changes},
        )
    )  # fmt: skip
    return batches[0], load_checkpoint(newest_checkpoint(tmp / "run" / "checkpoints")[0])


def their_loss(pipe, control, batch):
    """The equation of diffusers' examples/controlnet/train_controlnet.py, and of its twin for SDXL."""
    pixels = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    hint = batch["hints"].permute(0, 3, 1, 2).float() / 255
    tokens, added = batch["tokens"][:, 0], {}
    with torch.no_grad():
        found = pipe.vae.encode(pixels).latent_dist
        latents = (found.mean + found.std * batch["posterior"]) * pipe.vae.config.scaling_factor
        if "sizes" in batch:
            end = pipe.tokenizer.eos_token_id
            after_end = (tokens == end).cumsum(1) > 1
            first = pipe.text_encoder(tokens, output_hidden_states=True)
            second = pipe.text_encoder_2(
                tokens.masked_fill(after_end, pipe.tokenizer_2.pad_token_id), output_hidden_states=True
            )
            context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], 2)
            added = {"added_cond_kwargs": {"text_embeds": second[0], "time_ids": batch["sizes"]}}
        else:
            context = pipe.text_encoder(tokens)[0]
    noisy = pipe.scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    down, middle = control(noisy, batch["timesteps"], context, controlnet_cond=hint, return_dict=False, **added)
    prediction = pipe.unet(
        noisy,
        batch["timesteps"],
        context,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        **added,
    ).sample
    target = batch["noise"]
    if pipe.scheduler.config.prediction_type == "v_prediction":
        target = pipe.scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
    return F.mse_loss(prediction, target)


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_a_step_equals_diffusers(family, tmp_path, monkeypatch):
    """From a ControlNet none of whose weights is zero: every gradient, crops and flips of image and hint included."""
    start = saved(tmp_path, family)
    batch, ours = one_step(tmp_path, family, monkeypatch, control_model=str(start), crop="random", flip=True)
    pipe, control = peers.theirs.__wrapped__(family), ControlNetModel.from_pretrained(start)
    control.train().requires_grad_(True)
    loss = their_loss(pipe, control, batch)
    loss.backward()
    named = dict(control.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
    assert set(ours.weights) == {f"controlnet.{name}" for name in named}
    for name, parameter in named.items():
        gradient = ours.optimizer[f"controlnet.{name}/exp_avg"] / 0.1
        assert (gradient - parameter.grad).norm() <= 1e-5 * norm, name
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert logged["mse"] == pytest.approx(loss.item(), rel=1e-4)


def test_it_starts_as_diffusers_starts_from_a_unet(tmp_path, monkeypatch):
    """The way down is the U-Net's, what is added is zero, and only the zero convolutions get a gradient at first."""
    batch, ours = one_step(tmp_path, "sd1", monkeypatch)
    pipe = peers.theirs.__wrapped__("sd1")
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 16))
    with torch.no_grad():
        down, middle = control(
            torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32), controlnet_cond=torch.rand(1, 3, 64, 64), return_dict=False
        )
    assert not any(part.any() for part in (*down, middle))  # so are they at the start
    control.requires_grad_(True)
    their_loss(pipe, control, batch).backward()
    torch.nn.utils.clip_grad_norm_(control.parameters(), 0.5)
    for name, parameter in control.named_parameters():
        gradient = ours.optimizer[f"controlnet.{name}/exp_avg"] / 0.1
        is_zero_convolution = name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))
        assert bool(gradient.any()) == is_zero_convolution, name
        assert (gradient - parameter.grad).norm() <= 1e-5, name


def test_a_hint_keeps_its_size_on_its_way_to_the_zero():
    """Otherwise nothing follows it for thousands of steps."""
    torch.manual_seed(0)
    beneath = peers.ours("sd1").unet
    control = ControlNetwork(control_config(beneath.config, 8))
    hint = torch.zeros(1, 3, 64, 64)
    hint[:, :, 16:48, 24:56] = 1
    spread = []
    for _ in ("as torch draws it", "as it starts"):
        x, layers = hint, control.controlnet_cond_embedding
        for conv in (layers.conv_in, *layers.blocks):
            x = F.silu(conv(x))
        spread.append(x.std((2, 3)).mean().item())
        control.start_from(beneath)
    assert spread[1] > 0.02 and spread[1] > 10 * spread[0]
    assert not control.embed_hint(hint).any()


@pytest.mark.parametrize(("downscale", "widths"), [(2, 2), (8, 4), (16, 5)])
def test_a_new_control_has_the_pixels_of_its_vae(downscale, widths):
    config = control_config(UNetConfig(), downscale)
    assert config.downscale == downscale and len(config.hint_widths) == widths
    assert config.hint_widths[:4] == (16, 32, 96, 256)[:widths]  # as published beside 320 channels


def test_the_result_steers_and_opens_in_diffusers(tmp_path):
    with_hints(tmp_path / "data", 10)
    chosen = settings(
        tmp_path, max_steps=4, validation_share=0.5, validate_every=4, preview_every=4, checkpoint_every=4,
        sample_count=2, sample_steps=2, **CONTROL,
    )  # fmt: skip
    result = run(chosen)
    assert result == tmp_path / "run" / "controlnet"
    state = state_of(tmp_path / "run")
    assert torch.equal(ControlNetModel.from_pretrained(result).conv_in.weight, state["ema controlnet.conv_in.weight"])
    samples = tmp_path / "run" / "samples" / "step-00000004" / "ema"
    assert {file.name for file in samples.iterdir()} == {"00.png", "01.png", "00-hint.png", "01-hint.png", "sheet.png"}
    pipe, control = Pipeline.load(chosen.model, device="cpu"), ControlNet.load(result)
    hint = Image.open(next((tmp_path / "data").glob("*.hint.png")))
    draw = {"seed": 0, "steps": 2, "output": "latents", "progress": False}
    assert (pipe("cat", controls=[control(hint)], **draw) - pipe("cat", **draw)).abs().max() > 1e-4
    shown = CliRunner().invoke(cli, ["inspect", str(result)]).output
    assert "ControlNet" in shown and "on hints: given" in shown
    report = (tmp_path / "run" / "report.html").read_text()
    assert "controlnet of" in report and report.count('alt="the hint"') == 4  # of two prompts, averaged and raw


def test_a_run_goes_on_to_the_bit(tmp_path):
    with_hints(tmp_path / "data")
    whole = {**CONTROL, "crop": "random", "flip": True, "control_kind": "tile", "checkpoint_every": 1}
    run(settings(tmp_path, max_steps=4, **whole))
    expected = state_of(tmp_path / "run")
    run(settings(tmp_path, out=tmp_path / "parts", max_steps=2, **whole))
    run(settings(tmp_path, out=tmp_path / "parts", max_steps=4, **whole), verify_steps=1)
    found = state_of(tmp_path / "parts")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("cached", [False, True])
def test_hints_are_cropped_and_mirrored_as_their_images(tmp_path, monkeypatch, cached):
    """Hints that are the images themselves stay the same as them."""
    captioned_folder(tmp_path / "data", 6)
    seen, forward = [], DenoisingLoss.forward
    monkeypatch.setattr(DenoisingLoss, "forward", lambda self, b, step: seen.append(b) or forward(self, b, step))
    how = {"crop": "center" if cached else "random", "flip": True, "cache_latents": cached, "resolution": 16}
    for file in list((tmp_path / "data").glob("*.png")):
        image = Image.open(file).resize((24, 20))
        image.save(file)
        image.save(file.with_suffix(".hint.png"))
    run(settings(tmp_path, buckets=False, **CONTROL, **how))
    assert len(seen) == 6 and all(batch["hints"].shape == (4, 16, 16, 3) for batch in seen)
    if cached:
        assert not any("images" in batch for batch in seen)
    else:
        assert all(torch.equal(batch["hints"], batch["images"]) for batch in seen)
    assert len({hint.numpy().tobytes() for batch in seen for hint in batch["hints"]}) > 6  # mirrored, or other crops


def test_hints_are_made_of_the_images(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    captioned_folder(tmp_path / "data", 4)
    seen, forward = [], DenoisingLoss.forward
    monkeypatch.setattr(DenoisingLoss, "forward", lambda self, b, step: seen.append(b) or forward(self, b, step))
    run(settings(tmp_path, max_steps=1, cache_latents=False, control_kind="sobel", **CONTROL))
    for image, hint in zip(seen[0]["images"], seen[0]["hints"], strict=True):
        assert np.array_equal(np.asarray(prepared(Image.fromarray(image.numpy()), "sobel")), hint.numpy())


def test_hints_of_another_size_take_the_same_part(tmp_path):
    """Half as large, a hint shows what its image shows."""
    from latentdiff.training.data.transforms import prepare

    image = Image.fromarray(np.arange(64 * 96, dtype=np.uint32).reshape(64, 96).astype(np.uint8)).resize((96, 64))
    smooth = image.resize((12, 8)).resize((96, 64), Image.Resampling.BICUBIC).convert("RGB")
    half = smooth.resize((48, 32), Image.Resampling.BOX)
    crops = [
        prepare(one, (24, 24), (3,), like=smooth.size).astype(int)
        for one in (smooth, half)
    ]
    assert np.abs(crops[0] - crops[1]).mean() < 3


# --- Where hints lie ------------------------------------------------------------------------------


def test_hints_lie_in_a_folder_or_a_column(tmp_path):
    captioned_folder(tmp_path / "data", 3)
    names = sorted(file.name for file in (tmp_path / "data").glob("*.png"))
    (tmp_path / "hints").mkdir()
    for name in names:
        image = Image.open(tmp_path / "data" / name)
        image.save(tmp_path / "hints" / Path(name).with_suffix(".webp"))
    data = read_dataset([tmp_path / "data"])
    assert [file.name for file in hint_files(data, str(tmp_path / "hints"))] == [
        str(Path(name).with_suffix(".webp")) for name in names
    ]
    rows = [{"file_name": name, "text": "a", "conditioning_image": f"../hints/{Path(name).stem}.webp"} for name in names]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read_dataset([tmp_path / "data"])
    found = hint_files(data, "conditioning_image")
    assert [file.resolve() for file in found] == [
        (tmp_path / "hints" / Path(name).with_suffix(".webp")).resolve() for name in names
    ]
    with pytest.raises(DataError, match="its columns are file_name, text, conditioning_image"):
        hint_files(data, "edges")


def test_hints_beside_images_are_not_trained_on(tmp_path):
    data = read_dataset([with_hints(tmp_path / "data", 3)])
    assert len(data) == 3 and not any(".hint" in name for name in data.names)
    assert any("3 images are hints" in note for note in data.notes)


def test_hints_that_are_missing_or_of_another_aspect(tmp_path):
    folder = with_hints(tmp_path / "data", 3)
    first, second, _ = sorted(folder.glob("*.hint.png"))
    Image.new("RGB", (40, 16)).save(first)
    with pytest.raises(DataError, match="in its proportions, 16 x 16 pixels, found 40 x 16"):
        hint_files(read_dataset([folder]), None)
    second.unlink()
    with pytest.raises(DataError, match="1 of 3 images have no hint, the first is .*--hints FOLDER|COLUMN") as error:
        hint_files(read_dataset([folder]), None)
    assert "\n" not in str(error.value)
    first.write_bytes(b"no image")
    second.write_bytes(b"nor this")
    with pytest.raises(DataError, match=first.name):
        hint_files(read_dataset([folder]), None)


# --- What does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora", "hints": "x"}, "hints goes with method controlnet"),
        ({"method": "lora", "control_kind": "canny"}, "control_kind goes with method controlnet"),
        ({"hints": "x", "control_kind": "canny"}, "either hints that exist or a control_kind"),
        ({"stream": True}, "a stream of shards brings no hints"),
        ({"control_kind": "pose"}, "control_kind: Input should be 'canny'"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **{**CONTROL, **changes})


def test_all_preparations_can_be_trained_on():
    kinds = get_args(FinetuneConfig.model_fields["control_kind"].annotation)[0]
    assert get_args(kinds) == PREPARATIONS


def test_a_control_model_of_another_family(tmp_path):
    with_hints(tmp_path / "data", 3)
    with pytest.raises(CheckpointError, match="a ControlNet for another model"):
        run(settings(tmp_path, control_model=str(saved(tmp_path, "sd1")), **CONTROL))
    with pytest.raises(CheckpointError, match="expected a ControlNet"):
        run(settings(tmp_path, control_model=str(peers.folder("sd1") / "unet"), **CONTROL))


def test_a_control_for_several_kinds_is_not_trained(tmp_path, monkeypatch):
    with_hints(tmp_path / "data", 3)
    from latentdiff.training.finetuning import methods

    class Several:
        path = Path("union.safetensors")

        class config:  # noqa: N801
            modes = 6

    monkeypatch.setattr(methods, "read_control", lambda place: Several)
    with pytest.raises(UsageError, match="several kinds of hints, which cannot be trained"):
        run(settings(tmp_path, control_model="union.safetensors", **CONTROL))


def test_the_command_says_how_to_use_it(tmp_path):
    with_hints(tmp_path / "data", 4)
    chosen = settings(tmp_path, **CONTROL)
    arguments = ["finetune", "--method", "controlnet", "--data", str(tmp_path / "data"), "--model", chosen.model]
    done = CliRunner().invoke(
        cli, [*arguments, "--out", str(tmp_path / "run"), "--max-steps", "1", "--sample-count", "0", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert f"--control HINT --control-model {tmp_path / 'run' / 'controlnet'}" in done.output
