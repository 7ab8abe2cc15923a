"""A folder is drawn as its own scheduler draws it in diffusers' pipeline, or is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import ConfigError, UsageError
from latentdiff.recipe import read_recipe
from tests import peers, tiny

SETTINGS = {"steps_offset": 1}
FOLDERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, **SETTINGS}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", **SETTINGS}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading", **SETTINGS}),
    "euler-exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler-beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "euler-a": ("EulerAncestralDiscreteScheduler", SETTINGS),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp-2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp-2m-beta": ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    "dpmpp-2m-exponential": ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    "dpmpp-2m-thresholded": ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-2s": ("DPMSolverSinglestepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "ddim-thresholded": ("DDIMScheduler", {"thresholding": True, **SETTINGS}),
    "ddpm": ("DDPMScheduler", {"clip_sample": True, **SETTINGS}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


def folder_with(tmp: Path, config: dict, of: Path | None = None) -> Path:
    """The tiny SD 1.x folder with another scheduler."""
    folder = tmp / "model"
    shutil.copytree(of or peers.folder("sd1"), folder, copy_function=os.link)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def scheduler_of(name: str, settings: dict):
    return getattr(diffusers, name)(**tiny.BETAS, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FOLDERS)
def test_the_image_is_that_of_the_folders_own_scheduler(case: str, tmp_path: Path) -> None:
    scheduler = scheduler_of(*FOLDERS[case])
    config = json.loads(scheduler.to_json_string())
    pipe = Pipeline.load(folder_with(tmp_path, config), device="cpu", precision="fp32")
    parts = {**peers.theirs("sd1").components, "scheduler": scheduler}
    peer = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    steps = 4 if case in ("lcm", "tcd") else 10
    guidance = {} if case in ("lcm", "tcd") else {"guidance_scale": 3.0}
    eta = {"eta": 0.3} if case == "tcd" else {}
    expected = peer(
        "a photo of the cat", num_inference_steps=steps, generator=torch.Generator().manual_seed(7), output_type="np",
        **{"guidance_scale": 1.0, **guidance}, **eta,
    ).images  # fmt: skip
    (image,) = pipe("a photo of the cat", seed=7, progress=False, steps=None if steps == 4 else steps, **guidance)
    apart = np.abs(np.asarray(image).astype(int) - (expected[0] * 255).round().astype(int)).max()
    assert apart <= 2
    recipe = read_recipe(image.info)
    (again,) = pipe(recipe.prompt, progress=False, **recipe.sampling())
    assert np.array_equal(np.asarray(again), np.asarray(image)), "the recipe says all that the folder decided"


def test_saving_keeps_the_scheduler_and_inspect_names_it(tmp_path: Path) -> None:
    scheduler = scheduler_of(*FOLDERS["euler-karras"])
    config = json.loads(scheduler.to_json_string())
    pipe = Pipeline.load(folder_with(tmp_path, config), device="cpu", precision="fp32")
    pipe.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text()) == config
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert inspect(tmp_path / "saved").sampler == "euler, karras (EulerDiscreteScheduler)"


def test_flow_matching_and_schedulers_that_are_not_here_are_refused_by_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "flow", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler: it is for flow matching"):
        Pipeline.load(folder)
    pipe = Pipeline.load(folder_with(tmp_path / "deis", {"_class_name": "DEISMultistepScheduler", **tiny.BETAS}))
    with pytest.raises(UsageError, match="DEISMultistepScheduler, which is not here; ask for a sampler"):
        pipe("cat", steps=1)
    assert pipe("cat", steps=1, sampler="ddim", progress=False)


def test_a_full_lcm_is_told_the_guidance(tmp_path: Path) -> None:
    scheduler = diffusers.LCMScheduler()
    peer = tiny.sd1_pipeline(tmp_path, scheduler, time_cond_proj_dim=32)
    folder = tiny.save_real_layout(peer, tmp_path / "lcm", tmp_path / "tokenizer-files")
    peer.set_progress_bar_config(disable=True)
    pipe = Pipeline.load(folder, device="cpu", precision="fp32")
    found = []
    for scale in (None, 2.0):
        generator = torch.Generator().manual_seed(3)
        expected = peer(
            "two cat", num_inference_steps=4, guidance_scale=scale or 8.5, generator=generator, output_type="np"
        ).images
        (image,) = pipe("two cat", seed=3, progress=False, guidance_scale=scale)
        found.append(np.asarray(image).astype(int))
        assert np.abs(found[-1] - (expected[0] * 255).round().astype(int)).max() <= 1
    assert np.abs(found[0] - found[1]).max() > 2, "the scale is heard"
    with pytest.raises(UsageError, match="is told the guidance scale"):
        pipe("two cat", negative_prompt="fox")
    pipe.save(tmp_path / "saved")
    assert Pipeline.load(tmp_path / "saved").unet.config.time_cond_proj_dim == 32
