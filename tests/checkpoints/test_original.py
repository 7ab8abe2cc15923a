"""Original single files: read as the peers read them, recognised from their keys, refused for the right reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.components import load_components
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.inspection import inspect
from latentdiff.checkpoints.original import read_original
from latentdiff.checkpoints.prediction import probe_prediction_type
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError, ConfigError, UsageError
from latentdiff.model.loaded import LoadedModel
from tests import tiny
from tests.checkpoints import compvis

Tensors = dict[str, torch.Tensor]
ALPHAS_CUMPROD = Schedule(ScheduleConfig()).alphas_cumprod


def save(path: Path, tensors: Tensors, **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata or None)
    return path


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as error:
        load_components(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same_weights(module: torch.nn.Module, peer: torch.nn.Module) -> None:
    def usual(name: str) -> str:
        return name.removeprefix("text_model.")

    ours = {usual(name): tensor for name, tensor in module.state_dict().items()}
    theirs = {usual(name): tensor for name, tensor in peer.state_dict().items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("shapes", "prediction_type"), [(compvis.tiny_sd1, "epsilon"), (compvis.tiny_sd2, "v_prediction")]
)
def test_diffusers_reads_the_same_weights_from_an_original_file(tmp_path: Path, shapes, prediction_type: str):
    """A file listed independently of our tables: diffusers' own single-file reader and ours agree, bit for bit."""
    path = save(tmp_path / "model.safetensors", compvis.tensors(shapes()))
    convert(path, tmp_path / "folder", prediction_type=prediction_type)
    peer = StableDiffusionPipeline.from_single_file(str(path), config=str(tmp_path / "folder"), local_files_only=True)
    ours = load_components(path, prediction_type=prediction_type)
    for part in ("unet", "vae", "text_encoder"):
        # diffusers keeps the last layer of OpenCLIP's tower unless it is number 23; SD 2.x does not read it.
        assert_same_weights(getattr(ours, part), getattr(peer, part))
    assert ours.schedule_config.prediction_type == prediction_type
    assert ours.tokenizer("a photo of a cat")["input_ids"] == peer.tokenizer("a photo of a cat")["input_ids"]


@pytest.mark.parametrize("folder", [tiny.sd1_folder, tiny.sd2_folder], ids=["sd1", "sd2"])
def test_diffusers_reads_what_convert_wrote(tmp_path: Path, folder):
    source = folder(tmp_path)
    convert(source, tmp_path / "model.safetensors")
    single = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(source), local_files_only=True
    )
    peer = StableDiffusionPipeline.from_pretrained(source)
    for part in ("unet", "vae", "text_encoder"):
        assert_same_weights(getattr(single, part), getattr(peer, part))


def test_ckpt_gives_the_same_as_safetensors(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd1())
    save(tmp_path / "model.safetensors", tensors)
    torch.save({"state_dict": tensors, "global_step": 470_000}, tmp_path / "model.ckpt")
    one, other = load_components(tmp_path / "model.safetensors"), load_components(tmp_path / "model.ckpt")
    for part in ("unet", "vae", "text_encoder"):
        assert_same_weights(getattr(one, part), getattr(other, part))
    assert one.name == other.name == "model" and one.hash != other.hash


def test_dtype_is_kept_or_cast(tmp_path: Path):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1(), dtype=torch.float16))
    assert {p.dtype for p in load_components(path).unet.parameters()} == {torch.float16}
    assert {p.dtype for p in load_components(path, dtype=torch.float32).unet.parameters()} == {torch.float32}


def test_ema_weights_are_used_only_when_asked_for(tmp_path: Path):
    tensors = compvis.tensors(compvis.with_ema(compvis.tiny_sd1()))
    path = save(tmp_path / "model.safetensors", tensors)
    last = load_components(path).unet.conv_in.weight
    averaged = load_components(path, ema=True).unet
    assert torch.equal(last, tensors["model.diffusion_model.input_blocks.0.0.weight"])
    assert torch.equal(averaged.conv_in.weight, tensors["model_ema.diffusion_modelinput_blocks00weight"])
    assert torch.equal(
        averaged.mid_block.attentions[0].proj_in.weight, tensors["model_ema.diffusion_modelmiddle_block1proj_inweight"]
    )


def test_ema_is_refused_where_there_is_none(tmp_path: Path):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1()))
    assert "no EMA weights" in refusal(path, ema=True)
    assert "load it without ema" in refusal(tiny.sd1_folder(tmp_path), ema=True)


def test_text_encoder_saved_without_its_upper_level(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd1())
    short = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    one = load_components(save(tmp_path / "long.safetensors", tensors))
    other = load_components(save(tmp_path / "short.safetensors", short))
    assert_same_weights(one.text_encoder, other.text_encoder)


def test_inpainting_model_has_nine_channels(tmp_path: Path):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1(in_channels=9)))
    assert load_components(path).unet.config.in_channels == 9


# --- Prediction type ---


def predicted(path: Path, **options: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none of these is a guess
        return load_components(path, **options).schedule_config.prediction_type


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_prediction_type_from_metadata(tmp_path: Path, metadata: dict[str, str], expected: str):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd2()), **metadata)
    assert predicted(path) == expected


def test_prediction_type_from_a_marker_tensor(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd1()) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = save(tmp_path / "model.safetensors", tensors)
    assert predicted(path) == "v_prediction"
    assert load_components(path).schedule_config.rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("line", "expected"), [('parameterization: "v"', "v_prediction"), ("timesteps: 1000", "epsilon")]
)
def test_prediction_type_from_the_yaml_file_beside(tmp_path: Path, line: str, expected: str):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd2()))
    (tmp_path / "model.yaml").write_text(
        f"model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    {line}\n"
    )
    assert predicted(path) == expected


def test_prediction_type_from_the_training_steps_of_sd2_base(tmp_path: Path):
    path = tmp_path / "512-base-ema.ckpt"
    torch.save({"state_dict": compvis.tensors(compvis.tiny_sd2()), "global_step": 875_000}, path)
    assert predicted(path) == "epsilon"


def test_prediction_type_of_the_first_family_is_no_guess(tmp_path: Path):
    assert predicted(save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1()))) == "epsilon"


def test_prediction_type_given_by_hand_wins(tmp_path: Path):
    path = save(
        tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd2()), **{"modelspec.prediction_type": "v"}
    )
    assert predicted(path, prediction_type="epsilon") == "epsilon"
    assert predicted(tiny.sd1_folder(tmp_path), prediction_type="v_prediction") == "v_prediction"


def test_unknown_prediction_type_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="unknown prediction type 'noise'; choose from epsilon, v_prediction, sample"):
        load_components(tmp_path, prediction_type="noise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_guess_is_warned_of(tmp_path: Path, dtype: torch.dtype):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd2(), dtype=dtype))
    with pytest.warns(UserWarning, match="guessed that model.safetensors predicts v_prediction.*give the other"):
        load_components(path)


def test_probe_tells_noise_from_velocity():
    """Perfect networks for a data set of one grey image, at the last timestep of Stable Diffusion."""
    alpha, sigma, grey = 0.0683, 0.99767, 0.8

    def noise(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return (x - alpha * grey) / sigma

    def velocity(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return alpha * noise(x, t, context) - sigma * grey

    for channels in (4, 9):
        assert probe_prediction_type(lambda x, t, c: noise(x, t, c)[:, :4], channels, 8).name == "epsilon"
        assert probe_prediction_type(lambda x, t, c: velocity(x, t, c)[:, :4], channels, 8).name == "v_prediction"


def test_probe_of_the_first_family_believes_only_two_readings():
    """Perfect networks for grey images at any timestep; a random network is taken for what the family predicts."""

    def alpha(t: torch.Tensor) -> float:
        return float(ALPHAS_CUMPROD[int(t)]) ** 0.5

    def velocity(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return alpha(t) * x / (1 - alpha(t) ** 2) ** 0.5

    def noise(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x / (1 - alpha(t) ** 2) ** 0.5

    found = probe_prediction_type(velocity, 4, 8, second_family=False)
    assert found.name == "v_prediction" and found.guessed
    for network in (noise, lambda x, t, c: torch.roll(x, 3, -1), lambda x, t, c: 0 * x, lambda x, t, c: x * torch.nan):
        found = probe_prediction_type(network, 4, 8, second_family=False)
        assert found.name == "epsilon" and not found.guessed


def test_velocity_of_the_first_family_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("latentdiff.checkpoints.prediction._slope", lambda unet, channels, width, t, s: 1 - t / 1000)
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1()))
    with pytest.warns(UserWarning, match="guessed that model.safetensors predicts v_prediction"):
        assert load_components(path).schedule_config.prediction_type == "v_prediction"


def test_probe_that_fails_falls_back_to_what_most_files_predict():
    found = probe_prediction_type(lambda x, t, context: x * float("nan"), 4, 8)
    assert found.name == "v_prediction" and found.guessed and "NaN" in found.source


# --- Refusals ---


@pytest.mark.parametrize(
    ("extra", "family"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux"),
    ],
)
def test_other_architectures_are_named(tmp_path: Path, extra: str, family: str):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1() | {extra: (2, 2)}))
    assert f"another architecture ({family}" in refusal(path)


def test_other_architectures_beside_an_unet(tmp_path: Path):
    extra = "control_model.zero_convs.0.0.weight"
    own = {name: shape for name, shape in compvis.tiny_sd1().items() if not name.startswith("cond_stage_model.")}
    path = save(tmp_path / "model.safetensors", compvis.tensors(own | {extra: (2, 2)}))
    assert "another architecture (ControlNet" in refusal(path)


@pytest.mark.parametrize(
    "extra",
    ["control_model.input_hint_block.0.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
     "conditioner.embedders.1.model.ln_final.weight", "lora_unet_x.alpha"],
)  # fmt: skip
def test_strays_do_not_decide_and_are_named(tmp_path: Path, extra: str):
    path = save(tmp_path / "model.safetensors", compvis.tensors(compvis.tiny_sd1() | {extra: (2, 2)}))
    with pytest.warns(UserWarning, match=rf"holds 1 tensors of something else.*: {extra}"):
        ours = load_components(path)
    assert "Stable Diffusion 1.x" in inspect(path).family
    assert ours.unet.config.cross_attention_dim == 32


WRAPPED = {
    "data parallel": lambda name: f"module.{name}",
    "nested": lambda name: name if name.startswith("model.") else f"model.{name}",
    "doubled": lambda name: f"model.{name}",
    "no wrapper around the text encoder": lambda name: name.replace(
        "cond_stage_model.transformer.text_model.", "cond_stage_model.text_model."
    ),
    "no level in the text encoder": lambda name: name.replace(
        "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_odd_prefixes(tmp_path: Path, wrapper: str):
    tensors = compvis.tensors(compvis.tiny_sd1())
    plain = load_components(save(tmp_path / "plain.safetensors", tensors), prediction_type="epsilon")
    odd = save(tmp_path / "odd.safetensors", {WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()})
    ours = load_components(odd, prediction_type="epsilon")
    for part in ("unet", "vae", "text_encoder"):
        assert_same_weights(getattr(ours, part), getattr(plain, part))
    assert inspect(odd).family == inspect(tmp_path / "plain.safetensors").family and not inspect(odd).problem


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
@pytest.mark.parametrize("parts", [("model.diffusion_model.",), ("model.", "cond_", "first_")])
def test_types_in_which_nothing_computes(tmp_path: Path, dtype: torch.dtype, parts: tuple[str, ...]):
    tensors = {
        name: tensor.to(dtype) if name.startswith(parts) else tensor
        for name, tensor in compvis.tensors(compvis.tiny_sd1()).items()
    }
    path = save(tmp_path / "model.safetensors", tensors)
    for precision in ("fp32", "bf16"):
        pipe = LoadedModel.load(path, device="cpu", precision=precision)
        expected = torch.float32 if precision == "fp32" else torch.bfloat16
        weight = pipe.unet.conv_in.weight
        assert weight.dtype == expected and next(pipe.vae.parameters()).dtype == expected
        stored = tensors["model.diffusion_model.input_blocks.0.0.weight"]
        assert torch.equal(weight, stored.float().to(expected))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"lora_unet_mid_block_attentions_0.lora_down.weight": (4, 8)}, "LoRA (kohya names)"),
        ({"unet.mid_block.to_q.lora_A.weight": (4, 8)}, "LoRA (peft names)"),
        ({"unet.mid_block.processor.to_q_lora.down.weight": (4, 8)}, "LoRA (diffusers names)"),
        ({"emb_params": (2, 768)}, "textual-inversion"),
        ({"encoder.layer.0.weight": (2, 2)}, "unknown architecture"),
        ({}, "no tensors at all"),
        (compvis.vae(width=32, mults=(1, 1), prefix=""), "only a VAE (original layout)"),
        (
            compvis.unet(width=32, context=32, mults=(1, 1, 1), attention=(True,) * 3, prefix=""),
            "only a U-Net (original",
        ),
    ],
    ids=["kohya", "peft", "diffusers", "embedding", "unknown", "empty", "vae", "unet"],
)
def test_what_is_no_model_is_named(tmp_path: Path, names: compvis.Shapes, words: str):
    message = refusal(save(tmp_path / "file.safetensors", compvis.tensors(names)))
    assert words in message and "Stable Diffusion 1.x, 2.x or XL" in message


def test_single_parts_in_the_diffusers_layout_are_named(tmp_path: Path):
    folder = tiny.sd1_folder(tmp_path)
    assert "only a VAE (diffusers layout)" in refusal(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert "only a U-Net (diffusers layout)" in refusal(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "only a text encoder" in refusal(folder / "text_encoder" / "model.safetensors")


def test_missing_part_is_named(tmp_path: Path):
    shapes = {n: s for n, s in compvis.tiny_sd1().items() if not n.startswith("first_stage_model.")}
    assert "no vae (first_stage_model.*)" in refusal(save(tmp_path / "m.safetensors", compvis.tensors(shapes)))


def test_missing_unexpected_and_misshapen_tensors_are_named_as_in_the_file(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd1())
    unet = "model.diffusion_model."
    del tensors[f"{unet}middle_block.0.in_layers.0.weight"]
    assert f"1 missing: {unet}middle_block.0.in_layers.0.weight 64" in refusal(
        save(tmp_path / "a.safetensors", tensors)
    )
    tensors = compvis.tensors(compvis.tiny_sd1() | {f"{unet}middle_block.3.weight": (7,), "surprise.weight": (3, 3)})
    assert f"1 unexpected: {unet}middle_block.3.weight 7" in refusal(save(tmp_path / "b.safetensors", tensors))
    del tensors[f"{unet}middle_block.3.weight"]
    assert "1 unexpected: surprise.weight 3x3" in refusal(save(tmp_path / "c.safetensors", tensors))
    del tensors["surprise.weight"]
    tensors[f"{unet}time_embed.2.bias"] = torch.zeros(5)
    expected = f"{unet}time_embed.2.bias (expected 128, found 5)"
    assert expected in refusal(save(tmp_path / "d.safetensors", tensors))


def test_file_without_the_tensors_that_tell_its_size(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd1())
    del tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert "sizes cannot be read" in refusal(save(tmp_path / "m.safetensors", tensors))


def test_quantised_weights_are_refused(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd1())
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name].to(torch.int8)
    assert "int8 weights (conv_out.weight)" in refusal(save(tmp_path / "m.safetensors", tensors))


def test_metadata_of_another_model_is_not_believed(tmp_path: Path):
    """Configuration from the metadata must fit the weights."""
    convert(tiny.sd1_folder(tmp_path), tmp_path / "one.safetensors")
    metadata = read_tensors(tmp_path / "one.safetensors").metadata
    path = save(tmp_path / "two.safetensors", compvis.tensors(compvis.tiny_sd1()), **metadata)
    assert "of the wrong shape: model.diffusion_model.input_blocks.0.0" in refusal(path)
    damaged = save(tmp_path / "three.safetensors", load_file(path), latentdiff="{")
    assert "the entry latentdiff of" in refusal(damaged) and "JSON" in refusal(damaged)


def test_metadata_cannot_write_outside_the_tokenizer_folder(tmp_path: Path):
    convert(tiny.sd1_folder(tmp_path), tmp_path / "one.safetensors")
    file = read_tensors(tmp_path / "one.safetensors")
    stored = json.loads(file.metadata["latentdiff"])
    stored["tokenizer"]["../../escaped.txt"] = "x"
    path = save(tmp_path / "two.safetensors", file.tensors, latentdiff=json.dumps(stored))
    assert "damaged latentdiff metadata" in refusal(path)


def test_senseless_configuration_in_the_metadata_is_refused(tmp_path: Path):
    convert(tiny.sd2_folder(tmp_path), tmp_path / "one.safetensors")
    file = read_tensors(tmp_path / "one.safetensors")
    stored = json.loads(file.metadata["latentdiff"])
    stored["configs"]["text_encoder"]["num_hidden_layers"] = "two"
    path = save(tmp_path / "two.safetensors", file.tensors, latentdiff=json.dumps(stored))
    with pytest.raises(ConfigError, match="num_hidden_layers must be a number, found 'two'"):
        load_components(path)


def test_open_clip_tower_is_cut_before_its_last_layer(tmp_path: Path):
    tensors = compvis.tensors(compvis.tiny_sd2())
    raw = read_original(save(tmp_path / "m.safetensors", tensors), prediction_type="epsilon")
    layer = "text_model.encoder.layers.1.self_attn"
    fused = tensors["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(raw.tensors["text_encoder"][f"{layer}.q_proj.weight"], fused[:32])
    assert torch.equal(raw.tensors["text_encoder"][f"{layer}.v_proj.weight"], fused[64:])
    assert not any("layers.2." in name for name in raw.tensors["text_encoder"])
    assert raw.configs["text_encoder"]["num_hidden_layers"] == 2
    assert "cond_stage_model.model.transformer.resblocks.2.mlp.c_fc.weight" in raw.extras
