"""Masked training: only what lies in the mask is learned."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.errors import ConfigError, DataError
from latentdiff.training.data import read_dataset
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.masks import Masks
from latentdiff.training.objective import masked_mean
from latentdiff.training.samples import Samples
from tests.training.build import captioned_folder
from tests.training.finetuning.build import settings, state_of


@pytest.fixture
def data(tmp_path):
    """Images whose right half is transparent noise, and masks of their left halves in a folder."""
    folder, rng = captioned_folder(tmp_path / "data", 4), np.random.default_rng(0)
    (tmp_path / "masks").mkdir()
    for file in sorted(folder.glob("*.png")):
        pixels = np.dstack([np.asarray(Image.open(file)), np.full((16, 16), 255, np.uint8)])
        pixels[:, 8:] = rng.integers(0, 255, (16, 8, 4))
        pixels[:, 8:, 3] = 0
        Image.fromarray(pixels).save(file)
        Image.fromarray(pixels[..., 3]).save(tmp_path / "masks" / file.name)
    return folder


def test_weights_of_latents_are_means_of_their_pixels(data):
    mask = data.parent / "masks" / "0.png"
    Image.open(mask).resize((32, 32), Image.Resampling.NEAREST).save(mask)
    of_files = Masks.find(read_dataset([data]), str(data.parent / "masks"), 0.0)
    of_alpha = Masks.find(read_dataset([data]), "alpha", 0.25)
    expected = np.array([[[1, 1, 0, 0]] * 4], np.float32)
    assert np.abs(of_files.weights(0, (16, 16), None, 4) - expected).max() < 0.05  # resampled from 32 pixels
    assert np.array_equal(of_alpha.weights(0, (16, 16), None, 4), 0.25 + 0.75 * expected)
    odd = of_alpha.weights(0, (16, 16), None, 16)
    assert odd.shape == (1, 1, 1) and odd.item() == pytest.approx(0.625)


def test_masks_are_cropped_and_mirrored_with_their_images(data):
    """A mask that is the image's own pattern stays so."""
    for file in data.glob("*.png"):
        grey = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 24), np.uint8))
        grey.save(data.parent / "masks" / file.name)
        grey.convert("RGB").save(file)
    made = read_dataset([data])
    masks = Masks.find(made, str(data.parent / "masks"), 0.0)
    samples = Samples(made, [(16, 16)] * 4, None, settings(data.parent), (4, 1), masks=masks)
    keys = [(0, "crop", step, 0) for step in range(4)]
    batch = samples.images([0] * 4, np.zeros(4), flipped=[False, True] * 2, crop_keys=keys)
    assert np.allclose(batch["masks"][:, 0] * 255, batch["images"][..., 0], atol=1e-3)
    assert len({row.tobytes() for row in batch["masks"]}) == 4


def test_the_masked_mean():
    generator = torch.Generator().manual_seed(0)
    costs, masks = torch.rand(3, 4, 5, 6, generator=generator), torch.rand(3, 1, 5, 6, generator=generator)
    expected = [np.average(c.mean(0), weights=m[0]) for c, m in zip(costs.numpy(), masks.numpy(), strict=True)]
    assert np.allclose(masked_mean(costs, masks), expected)
    assert torch.allclose(masked_mean(costs, torch.ones(3, 1, 5, 6)), masked_mean(costs, None))
    assert masked_mean(costs, torch.zeros(3, 1, 5, 6)).tolist() == [0, 0, 0]


def test_a_run_with_masks(data):
    tmp, states = data.parent, {}
    for name, more in {"alpha": {"masks": "alpha"}, "files": {"masks": str(tmp / "masks")}, "all": {}}.items():
        run(settings(tmp, out=tmp / name, max_steps=2, validation_share=0.3, validate_every=1, **more))
        states[name] = state_of(tmp / name)
    assert all(torch.equal(states["alpha"][name], states["files"][name]) for name in states["alpha"])
    assert any(not torch.equal(states["alpha"][name], states["all"][name]) for name in states["all"])
    measured = [json.loads((tmp / name / "log.jsonl").read_text().splitlines()[0]) for name in ("alpha", "all")]
    assert measured[0]["val_mse"] != measured[1]["val_mse"]


def test_what_masks_cannot_be(data):
    with pytest.raises(ConfigError, match="unmasked_weight goes with masks"):
        settings(data.parent, unmasked_weight=0.1)
    next((data.parent / "masks").glob("*.png")).unlink()
    with pytest.raises(DataError, match="1 of 4 images have no mask, .* --masks FOLDER"):
        run(settings(data.parent, masks=str(data.parent / "masks")))
    with pytest.raises(DataError, match="as --masks, found 'nothing'; its columns are file_name, text"):
        run(settings(data.parent, masks="nothing", out=data.parent / "other"))
