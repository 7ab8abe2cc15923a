"""Distilled models are drawn as their authors say, one line says so, and what is asked for wins."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.habits import habit_of
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.recipe import read_recipe
from latentdiff.request.options import GenerateOptions
from tests import peers, tiny
from tests.checkpoints import compvis
from tests.tasks.images import apart


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A single file that says nothing of schedule and size, as published ones."""
    place = tmp_path_factory.mktemp("habits") / "bare.safetensors"
    save_file(compvis.tensors(compvis.tiny_xl()), place)
    return place


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A file that draws."""
    place = tmp_path_factory.mktemp("habits") / "sdxl_lightning_4step.safetensors"
    convert(peers.folder("xl"), place)
    return place


@pytest.mark.parametrize(
    ("name", "kind", "steps", "guidance"),
    [
        ("sd_xl_turbo_1.0_fp16", "Turbo", 1, 1.0),
        ("stabilityai/sdxl-turbo", "Turbo", 1, 1.0),
        ("sdxl_lightning_4step", "Lightning", 4, 1.0),
        ("sdxl_lightning_1step_x0", "Lightning", 1, 1.0),
        ("realvisxlV40_lightning8Steps", "Lightning", 8, 1.0),
        ("Hyper-SDXL-8steps", "Hyper", 8, 1.0),
        ("juggernautXL_v9Rdphoto2Lightning", "Lightning", 6, 2.0),
        ("DreamShaperXL_Turbo_v2_1", "Turbo", 6, 2.0),
        ("juggernautXL_hyper", "Hyper", 6, 2.0),
        ("sd_xl_base_1.0", None, None, None),
        ("hyperrealisticXL", None, None, None),
    ],
)
def test_names(name, kind, steps, guidance):
    found = habit_of([name], is_xl=True)
    assert (found and found.kind, found and found.steps, found and found.guidance_scale) == (kind, steps, guidance)


def test_of_other_families_the_published_turbo_alone_is_known():
    assert habit_of(["sd_turbo"], is_xl=False).steps == 1
    assert habit_of(["lightning_strikes_8step"], is_xl=False) is None


def loaded(file: Path, name: str, **options) -> Pipeline:
    path = file.with_name(f"{name}.safetensors")
    if not path.exists():
        shutil.copy(file, path)
    return Pipeline.load(path, device="cpu", precision="fp32", **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdxl_lightning_4step", (4, 1.0, "euler", "trailing", 1024)),
        ("sd_xl_turbo_1.0", (1, 1.0, "euler-a", "trailing", 512)),
        ("hyper-sdxl-2steps", (2, 1.0, "ddim", "trailing", 1024)),
        ("someXL_turbo", (6, 2.0, "dpmpp-sde", "karras", 1024)),
        ("plain", (25, 5.0, "euler", "leading", 1024)),
    ],
)
def test_files_are_drawn_so(file, name, expected):
    from latentdiff.request.plan import Sampling

    pipe = loaded(file, name)
    own = Sampling().for_model(pipe.schedule)
    assert (own.steps, own.guidance_scale, own.sampler, own.spacing, pipe.default_size[0]) == expected


def test_one_line_says_so_and_what_is_asked_for_wins(whole):
    pipe = Pipeline.load(whole, device="cpu", precision="fp32")
    asked: GenerateOptions = {"seed": 1, "width": 64, "height": 64, "progress": False}
    with pytest.warns(UserWarning, match="called as Lightning models are: 4 steps and guidance 1, euler, trailing") as seen:
        (image,) = pipe("a cat", **asked)
    assert "\n" not in str(seen[0].message)
    recipe = read_recipe(image.info)
    assert (recipe.steps, recipe.guidance_scale, recipe.sampler, recipe.spacing) == (4, 1.0, "euler", "trailing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (other,) = pipe("a cat", steps=2, guidance_scale=3.0, sampler="ddim", **asked)
    recipe = read_recipe(other.info)
    assert (recipe.steps, recipe.guidance_scale, recipe.sampler) == (2, 3.0, "ddim")
    assert "Lightning" in " ".join(inspect(whole).notes)


def test_the_image_is_that_of_the_card(whole):
    """SDXL-Lightning's: EulerDiscreteScheduler, trailing, no guidance."""
    peer = peers.theirs("xl")
    before = peer.scheduler
    peer.scheduler = EulerDiscreteScheduler(**tiny.BETAS, steps_offset=1, timestep_spacing="trailing")
    try:
        made = peer("a cat", num_inference_steps=4, guidance_scale=0.0, height=64, width=64,
                    generator=torch.Generator().manual_seed(7), output_type="np")  # fmt: skip
    finally:
        peer.scheduler = before
    with pytest.warns(UserWarning, match="Lightning"):
        (image,) = Pipeline.load(whole, device="cpu", precision="fp32")("a cat", seed=7, progress=False)
    assert apart(image, (made.images[0] * 255).round().astype(int)) <= 1


def test_lightning_in_one_step_predicts_the_image_unless_the_caller_knows_better(file):
    assert loaded(file, "sdxl_lightning_1step_x0").schedule.config.prediction_type == "sample"
    known = loaded(file, "sdxl_lightning_1step_x0", prediction_type="epsilon")
    assert known.schedule.config.prediction_type == "epsilon"


def test_a_folder_says_itself_how_it_is_drawn(tmp_path):
    """Its name adds the steps and the guidance, which no folder says."""
    place = tiny.xl_folder(tmp_path).rename(tmp_path / "sdxl-turbo")
    with pytest.warns(UserWarning, match="Turbo models are: 1 step and guidance 1, euler, leading"):
        (image,) = Pipeline.load(place, device="cpu", precision="fp32")("a cat", seed=1, progress=False)
    assert image.size == (64, 64)


def test_a_file_without_transformers_in_the_middle_is_refused(tmp_path):
    shapes = {name: shape for name, shape in compvis.tiny_xl().items() if ".middle_block.1." not in name}
    save_file(compvis.tensors(shapes), tmp_path / "ssd-1b.safetensors")
    with pytest.raises(CheckpointError, match="no transformers in its middle.*as SSD-1B and Vega") as error:
        Pipeline.load(tmp_path / "ssd-1b.safetensors")
    assert "\n" not in str(error.value)


def test_unets_with_blocks_of_unequal_depth_are_refused(tmp_path):
    """SSD-1B and Vega: their levels have transformers of several depths, and none in the middle."""
    folder = tiny.xl_folder(tmp_path)
    path = folder / "unet" / "config.json"
    text = path.read_text()
    for old, new in (
        ('"reverse_transformer_layers_per_block": null', '"reverse_transformer_layers_per_block": [[3, 1, 1], [2, 1, 1], 1]'),
        ('"mid_block_type": "UNetMidBlock2DCrossAttn"', '"mid_block_type": null'),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=r"another architecture than Stable Diffusion 1.x, 2.x or XL") as error:
            Pipeline.load(folder)
        assert "\n" not in str(error.value)
