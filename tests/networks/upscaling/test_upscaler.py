"""Upscalers against spandrel's own output, without tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.errors import CheckpointError, NotFiniteError, UsageError
from latentdiff.networks.upscaling.model import Upscaler
from latentdiff.networks.upscaling.tiles import BORDER, FADE, SMALLEST_TILE, in_tiles, spans
from tests import upscalers


def an_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def whole(weights: dict[str, torch.Tensor], image: Image.Image) -> np.ndarray:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    found = upscalers.theirs(weights)(x)[0]
    return (found * 255).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "scale, options", [(4, {}), (2, {}), (4, {"in_nc": 12, "shuffle_factor": 2})], ids=["4x", "2x", "2x unshuffled"]
)
@pytest.mark.parametrize("size", [(90, 70), (301, 205)])
def test_tiles_give_what_the_whole_gives(tmp_path, scale, options, size):
    weights = upscalers.esrgan(scale, **options)
    upscaler = Upscaler.load(upscalers.saved(weights, tmp_path / "x.safetensors"), device="cpu")
    image = an_image(*size)
    found, expected = np.asarray(upscaler(image, tile=128)), whole(weights, image)
    assert upscaler.factor == (2 if options else scale)
    assert found.shape == expected.shape == (size[1] * upscaler.factor, size[0] * upscaler.factor, 3)
    assert expected.std() > 10  # or a grey area would pass
    assert np.abs(found - expected).max() <= 1


def test_a_network_that_sees_further_leaves_no_seams():
    """One that adds the mean of a tile, which no border can hide: brightness changes slowly, as slowly as it can."""
    pixels = np.tile(np.linspace(0, 100, 600).astype(np.uint8)[None, :, None], (200, 1, 3))
    shifted = lambda tile: (tile.astype(np.float32) + tile.mean()).round().astype(np.uint8)  # noqa: E731
    found = in_tiles(pixels, 1, 128, shifted).astype(int)
    means = [pixels[:, left:right].mean() for left, right, _ in spans(600, 128)]
    assert np.abs(np.diff(means)).max() > 8  # without fading, there are seams of as much
    assert np.abs(np.diff(found, axis=1)).max() <= 2
    assert np.abs(np.diff(found, axis=0)).max() == 0


def test_a_pth_of_real_esrgan_is_read(tmp_path):
    weights = upscalers.esrgan()
    torch.save({"params": {}, "params_ema": upscalers.new_names(weights)}, tmp_path / "x.pth")
    image = an_image(40, 30)
    found = np.asarray(Upscaler.load(tmp_path / "x.pth", device="cpu")(image))
    assert np.abs(found - whole(weights, image)).max() <= 1


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    path = upscalers.saved(upscalers.esrgan(), tmp_path / "x.safetensors")
    before = torch.get_rng_state()
    Upscaler.load(path, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("side", [1, 127, 128, 129, 300, 1000, 1001])
def test_spans_cover_a_side(side, multiple):
    found = spans(side, SMALLEST_TILE, multiple)
    assert found[0][0] == 0 and found[-1][1] == side
    for (_, end, _), (start, stop, mixed) in zip(found, found[1:], strict=False):
        assert mixed >= FADE and end - start >= 2 * BORDER + FADE and start % multiple == 0
        assert stop - start <= SMALLEST_TILE


def broken(kind: str) -> dict[str, torch.Tensor]:
    weights = upscalers.esrgan()
    if kind == "a layer is missing":
        del weights["model.1.sub.0.RDB2.conv3.0.weight"]
    elif kind == "a list of a million":
        weights["model.1.sub.999999.RDB1.conv1.0.weight"] = torch.zeros(1)
    elif kind == "more filters than weights":
        weights["model.0.weight"] = torch.zeros(40_000, 3, 3, 3)
    elif kind == "grey":
        weights = upscalers.esrgan(in_nc=1, out_nc=1)
    elif kind == "a VAE":
        weights = {"decoder.conv_in.weight": torch.zeros(1), "decoder.up.0.block.0.conv1.weight": torch.zeros(1)}
    elif kind == "a LoRA":
        weights = {"lora_unet_x.lora_up.weight": torch.zeros(1, 1), "lora_unet_x.lora_down.weight": torch.zeros(1, 1)}
    elif kind == "anything":
        weights = {"a": torch.zeros(1)}
    return weights


@pytest.mark.parametrize(
    "kind, line",
    [
        ("a layer is missing", "incomplete or of an unknown form"),
        ("a list of a million", "numbers with holes"),
        ("more filters than weights", "incomplete or of an unknown form"),
        ("grey", "expected an upscaler of colour images .* found 1 channels in and 1 out"),
        ("a VAE", r"found a VAE \(original layout\)"),
        ("a LoRA", r"found a LoRA"),
        ("anything", "expected an upscaler, as ESRGAN, in .* found a"),
    ],
)
def test_something_else_is_one_line(tmp_path, kind, line):
    path = upscalers.saved(broken(kind), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=line) as caught:
        Upscaler.load(path, device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import os

    class Bad:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"params": Bad()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        Upscaler.load(tmp_path / "x.pth", device="cpu")


def test_a_missing_file_and_a_small_tile_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no upscaler at"):
        Upscaler.load(tmp_path / "x.safetensors")
    upscaler = Upscaler.load(upscalers.saved(upscalers.esrgan(), tmp_path / "x.safetensors"), device="cpu")
    with pytest.raises(UsageError, match="expected a tile of 128 pixels or more"):
        upscaler(an_image(8, 8), tile=100)


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    weights = upscalers.esrgan()
    weights["model.0.bias"][0] = torch.nan
    upscaler = Upscaler.load(upscalers.saved(weights, tmp_path / "x.safetensors"), device="cpu")
    with pytest.raises(NotFiniteError, match="finite colours"):
        upscaler(an_image(8, 8))
