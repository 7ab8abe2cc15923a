from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from latentdiff import Pipeline
from latentdiff.diffusion.denoise import Cancelled
from latentdiff.diffusion.latents import start_noise
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import CheckpointError, LatentDiffError, NotFiniteError, UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.networks.device import PrecisionWarning
from latentdiff.recipe import Recipe, read_recipe
from tests import peers
from tests.diffusion.samplers.test_parity_of_solvers import PEERS

SHAPE = (4, 8, 8)  # of one image's latents
BATCH_NOISE = 2e-5  # how far a batch may move a latent, in standard deviations (measured: 5e-6)

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
METHODS = [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("euler", 0.0), ("dpmpp-2m", 0.0), ("unipc", 0.0)]


@pytest.fixture(scope="module")
def shared_of() -> Callable[[str], Pipeline]:
    return cache(peers.ours)


@pytest.fixture(scope="module")
def shared(shared_of) -> Pipeline:
    """For tests that leave it as it is."""
    return shared_of("sd1")


@pytest.fixture
def pipe() -> Pipeline:
    """For tests that break it."""
    return peers.ours("sd1")


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)  # (N, H, W, 3)


# --- The same images as diffusers ---------------------------------------------------------------


def in_diffusers(family: str, sampler: str, eta: float, spacing: str, seeds: list[int], **options) -> np.ndarray:
    peer = copy(peers.theirs(family))
    config = {**peer.scheduler.config, "timestep_spacing": spacing, "clip_sample": False}
    peer.scheduler = SCHEDULERS[sampler].from_config(config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = peer(generator=generators, eta=eta, output_type="np", **options).images
    return (images * 255).round().astype(int)


@pytest.mark.parametrize("steps", [10, 25, 30])
@pytest.mark.parametrize(("sampler", "eta"), METHODS)
@pytest.mark.parametrize("family", peers.FAMILIES)
def test_same_image_as_diffusers(shared_of, family, sampler, eta, steps):
    spacing = "linspace" if sampler in ("euler", "dpmpp-2m", "unipc") else "leading"  # what each is used with
    expected = in_diffusers(
        family, sampler, eta, spacing, [7, 8], prompt="a photo of the cat", negative_prompt="red fox",
        num_inference_steps=steps, guidance_scale=5.0, num_images_per_prompt=2,
    )  # fmt: skip
    images = shared_of(family)(
        "a photo of the cat", negative_prompt="red fox", steps=steps, guidance_scale=5.0, num_images=2,
        sampler=sampler, eta=eta, spacing=spacing, seed=7, progress=False,
    )  # fmt: skip
    assert expected.std() > 20  # an image, not a plain area
    assert np.abs(arrays(images) - expected).max() <= 1


def test_guidance_rescale_as_in_diffusers(shared):
    options = {"guidance_scale": 9.0, "guidance_rescale": 0.7}
    expected = in_diffusers("sd1", "ddim", 0.0, "trailing", [3], prompt="two cat", num_inference_steps=5, **options)
    images = shared("two cat", steps=5, spacing="trailing", seed=3, progress=False, **options)
    assert np.abs(arrays(images) - expected).max() <= 1


# --- Seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "eta"), METHODS)
def test_image_i_of_a_batch_is_the_image_made_alone(shared, sampler, eta):
    options = {"steps": 3, "sampler": sampler, "eta": eta, "output": "latents", "progress": False}
    alone = {i: shared("blue dog", seed=40 + i, **options)[0] for i in (0, 7)}
    for batch_size in (1, 2, 8):
        together = shared("blue dog", seed=40, num_images=8, batch_size=batch_size, **options)
        for i, expected in alone.items():
            torch.testing.assert_close(together[i], expected, rtol=0, atol=BATCH_NOISE * float(expected.std()))


def test_seeds_differ_and_repeat(shared):
    first, second, again = (shared("cat", seed=seed, steps=2, output="latents", progress=False) for seed in (0, 1, 0))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 0.1


def test_seed_list_gives_each_image_its_own(shared):
    listed = shared(["cat", "dog"], seed=[9, 4], steps=2, output="latents", progress=False)
    torch.testing.assert_close(listed[1:], shared("dog", seed=4, steps=2, output="latents", progress=False))


def test_drawn_seed_is_reported_and_makes_the_image_again(shared):
    first = shared("cat", steps=2, num_images=2, progress=False)
    seeds = [read_recipe(image.info).seed for image in first]
    assert seeds[1] == seeds[0] + 1
    assert seeds[0] != read_recipe(shared("cat", steps=1, progress=False)[0].info).seed
    again = shared("cat", steps=2, seed=seeds, num_images=2, progress=False)
    assert np.array_equal(arrays(first), arrays(again))


# --- What goes in and comes out -------------------------------------------------------------------


def test_prompts_and_their_images_come_in_order(shared):
    images = shared(["cat", "red fox"], num_images=2, negative_prompt=["dog", ""], steps=2, seed=5, progress=False)
    made = [read_recipe(image.info) for image in images]
    assert [(r.prompt, r.negative_prompt, r.seed) for r in made] == [
        ("cat", "dog", 5), ("cat", "dog", 6), ("red fox", "", 7), ("red fox", "", 8),
    ]  # fmt: skip
    alone = shared("red fox", seed=8, steps=2, progress=False)
    assert np.abs(arrays(images[3:]) - arrays(alone)).max() <= 1


def test_prompt_and_negative_prompt_matter(shared):
    def latents(*args, **kwargs):
        return shared(*args, seed=1, steps=3, output="latents", progress=False, **kwargs)

    plain = latents("cat")
    assert (plain - latents("red fox")).abs().max() > 0.01
    assert (plain - latents("cat", negative_prompt="dog")).abs().max() > 0.01
    assert torch.isfinite(latents("")).all()


def test_given_start_noise_stands_in_for_that_of_the_seeds(shared):
    options = {"steps": 3, "sampler": "ddpm", "output": "latents", "progress": False}
    noise = start_noise([3, 4], SHAPE)
    assert torch.equal(
        shared("cat", num_images=2, seed=3, latents=noise, **options), shared("cat", num_images=2, seed=3, **options)
    )


def test_size_of_given_latents_counts(shared):
    out = shared("cat", latents=torch.randn(1, 4, 4, 6), steps=1, seed=0, output="latents", progress=False)
    assert out.shape == (1, 4, 4, 6)


def test_latents_decode_to_the_same_images(shared):
    options = {"steps": 2, "seed": 2, "num_images": 2, "progress": False}
    latents = shared("cat", output="latents", **options)
    assert not latents.requires_grad and not latents.is_inference()
    assert np.array_equal(arrays(to_pil(shared.decode(latents))), arrays(shared("cat", **options)))


def test_height_and_width(shared):
    (image,) = shared("cat", height=40, width=88, steps=1, seed=0, progress=False)
    assert image.size == (88, 40)
    recipe = read_recipe(image.info)
    assert (recipe.width, recipe.height) == (88, 40)


def test_recipe_of_an_image(shared):
    (image,) = shared(
        "cat", negative_prompt="dog", steps=2, guidance_scale=3.5, guidance_rescale=0.2, guidance_interval=(0.5, 5.0),
        sampler="ddim", eta=0.3, seed=11, spacing="trailing", progress=False,
    )  # fmt: skip
    recipe = json.loads(image.info["latentdiff"])
    said = {
        "prompt": "cat", "negative_prompt": "dog", "seed": 11, "steps": 2, "sampler": "ddim", "eta": 0.3,
        "guidance_scale": 3.5, "guidance_rescale": 0.2, "guidance_interval": [0.5, 5.0], "spacing": "trailing",
        "width": 64, "height": 64, "model": "sd1", "prediction_type": "epsilon", "prompt_syntax": "a1111",
        "precision": "fp32", "device": "cpu", "schema": 1,
    }  # fmt: skip
    assert {name: recipe[name] for name in said} == said
    own = said.keys() | {"versions", "model_hash"}
    silent = json.loads(Recipe(**{name: said[name] for name in said if name != "schema"}).to_json())
    assert {name: recipe[name] for name in recipe.keys() - own} == {name: silent[name] for name in silent.keys() - own}
    assert recipe["versions"].keys() == {"latentdiff", "torch", "tokenizers", "forms"}
    assert len(recipe["model_hash"]) == 64
    assert image.info["parameters"].startswith(
        "cat\nNegative prompt: dog\nSteps: 2, Sampler: DDIM, CFG scale: 3.5, Seed: 11"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps to be a whole number of 1 or more, found 0"),
        ({"steps": 1001}, "steps must be 1 to 1000"),
        ({"sampler": "plms"}, "ddim, ddpm, euler, .*, restart, found 'plms'"),
        ({"eta": 0.5, "sampler": "euler"}, "eta belongs to the samplers ddim, euler-a"),
        ({"eta": 1.5}, "eta to be a finite number of 0 to 1"),
        ({"spacing": "even"}, "leading, trailing, linspace, karras"),
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"guidance_rescale": 2.0}, "0 to 1"),
        ({"guidance_interval": (3.0, 1.0)}, "low < high"),
        ({"guidance_interval": (0.0, float("inf"))}, "two finite numbers"),
        ({"height": 100}, "height that is a positive multiple of 8, found 100"),
        ({"width": 0}, "width to be a whole number of 1 or more, found 0"),
        ({"seed": -1}, "seed to be a whole number"),
        ({"seed": [1, 2]}, "expected one seed or 1"),
        ({"num_images": 0}, "num_images to be a whole number of 1"),
        ({"batch_size": 0}, "batch_size to be a whole number of 1 or more"),
        ({"negative_prompt": ["a", "b"]}, "one negative prompt or 1"),
        ({"latents": torch.zeros(2, *SHAPE)}, r"expected latents of shape \(1, 4, 8, 8\), found \(2, 4, 8, 8\)"),
        ({"output": "numpy"}, "one of images, latents"),
    ],
)
def test_bad_arguments(shared, options, message):
    with pytest.raises(UsageError, match=message):
        shared("cat", **{"progress": False, **options})


@pytest.mark.parametrize("prompt", [[], 7, ["cat", None], "\ud800"])
def test_bad_prompts(shared, prompt):
    with pytest.raises((UsageError, TypeError)):
        shared(prompt, progress=False)


def test_inpainting_model_is_refused():
    with pytest.raises(UsageError, match="found 9: this model is for inpainting"):
        peers.ours("inpaint")("cat", progress=False)


def test_parts_that_do_not_fit_are_refused(shared):
    other = peers.ours("sd2")
    other.unet.config = type(other.unet.config)(cross_attention_dim=96)
    with pytest.raises(CheckpointError, match="U-Net expects 96 text embeddings, found 32"):
        Pipeline(shared.tokenizer, shared.text_encoder, other.unet, shared.vae, shared.schedule.config)


@pytest.mark.parametrize("channels, name", [(7, "with no labels"), (12, "with")])
def test_unets_that_take_other_inputs_are_refused(shared, channels, name):
    other = peers.ours("sd1")
    other.unet.config = replace(other.unet.config, in_channels=channels)
    with pytest.raises(CheckpointError, match=f"4 \\(text\\), 9 \\(inpainting\\).* found {channels} {name}"):
        Pipeline(shared.tokenizer, shared.text_encoder, other.unet, shared.vae, shared.schedule.config)


def test_images_are_encoded_one_by_one_in_float32(shared):
    images = torch.rand(3, 3, 64, 48) * 2 - 1
    with calls(shared.vae, "encode") as encoded:
        found = shared.encode_images(images)
    assert [len(args[0]) for args in encoded] == [1, 1, 1]
    expected = peers.theirs("sd1").vae.encode(images).latent_dist
    torch.testing.assert_close(found.mean, expected.mean * 0.18215, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((0.5 * found.logvar).exp(), expected.std * 0.18215, rtol=1e-4, atol=1e-5)


# --- Work that is not done twice ------------------------------------------------------------------


@contextmanager
def calls(module, method="forward"):
    """Record the arguments of every call of a module's method."""
    seen, original = [], getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: (seen.append(args), original(*args, **kwargs))[1])
    try:
        yield seen
    finally:
        delattr(module, method)


def test_guidance_doubles_the_batch_only_where_it_acts(shared):
    def batch_sizes(**options):
        with calls(shared.unet) as seen:
            shared("cat", steps=4, spacing="trailing", seed=0, num_images=3, progress=False, **options)
        return [len(x) for x, *_ in seen]

    assert batch_sizes(guidance_scale=5.0) == [6] * 4
    assert batch_sizes(guidance_scale=1.0) == [3] * 4
    assert batch_sizes(guidance_scale=0.0) == [6] * 4  # a value, not "unset"
    # sigma/alpha at timesteps 999, 749, 499, 249: 14.6, 4.2, 1.6, 0.7
    assert batch_sizes(guidance_scale=5.0, guidance_interval=(0.8, 5.0)) == [3, 6, 6, 3]


def test_text_is_encoded_once_and_projected_once_a_batch(shared):
    with calls(shared.text_encoder) as encoded, calls(shared.unet, "project_context") as projected:
        shared(["cat", "cat", "dog"], steps=5, num_images=2, batch_size=3, seed=0, progress=False)
    assert len(encoded) == 3  # cat, dog and the empty negative prompt
    assert len(projected) == 2 * 2  # two batches, prompt and negative prompt


# --- Watching and cancelling ----------------------------------------------------------------------


def test_callback_sees_step_timestep_and_predicted_x0(shared):
    seen = []
    latents = shared(
        "cat", steps=3, spacing="trailing", seed=0, output="latents", progress=False,
        callback=lambda step, t, x0: seen.append((step, t, x0)),
    )  # fmt: skip
    assert [(step, t) for step, t, _ in seen] == [(0, 999), (1, 666), (2, 332)]
    assert seen[0][2].shape == (1, *SHAPE)
    # At the end the prediction is the image, but for the little noise that SD's schedule ends with.
    assert (seen[-1][2] - latents).abs().max() < 0.2
    assert (seen[0][2] - latents).abs().max() > 0.2


def test_callback_cancels(shared):
    seen = []
    with pytest.raises(Cancelled, match="after step 2 of 5"):
        shared("cat", steps=5, seed=0, progress=False, callback=lambda step, t, x0: seen.append(step) or step < 1)
    assert seen == [0, 1]


def test_errors_of_the_callback_pass_through(shared):
    def fail(step, t, x0):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        shared("cat", steps=2, seed=0, progress=False, callback=fail)


def test_progress_bar_counts_all_steps(shared, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            bars.append(self)
            self.options, self.count = options, 0

        def update(self):
            self.count += 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("latentdiff.diffusion.denoise.tqdm", Bar)
    shared("cat", steps=3, num_images=3, batch_size=2, seed=0)
    shared("cat", steps=1, seed=0, progress=False)
    assert bars[0].count == bars[0].options["total"] == 6
    assert bars[0].options["disable"] is None and bars[1].options["disable"] is True


# --- Never a black image ------------------------------------------------------------------------


@torch.no_grad()
def poison(parameter):
    parameter.view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("part", "weight", "message"),
    [
        ("text_encoder", "text_model.final_layer_norm.weight", "text encoder gives NaN or infinity on 'cat'"),
        ("unet", "conv_out.bias", "U-Net gives NaN or infinity at step 1 of 2"),
        ("vae", "decoder.conv_out.bias", "VAE's decoder gives NaN or infinity"),
    ],
)
def test_not_finite_is_an_error_that_names_the_part(pipe, part, weight, message):
    poison(getattr(pipe, part).get_parameter(weight))
    with pytest.raises(NotFiniteError, match=message):
        pipe("cat", steps=2, seed=0, progress=False)


def test_not_finite_names_the_step(pipe):
    with calls(pipe.unet) as seen:
        original = pipe.unet.forward
        pipe.unet.forward = lambda x, t, c: original(x, t, c) * (float("inf") if len(seen) == 3 else 1)
        with pytest.raises(NotFiniteError, match="U-Net gives NaN or infinity at step 3 of 5"):
            pipe("cat", steps=5, seed=0, progress=False)


@pytest.mark.parametrize(
    ("part", "weight", "name"),
    [
        ("text_encoder", "text_model.final_layer_norm", "text encoder"),
        ("unet", "conv_norm_out", "U-Net"),
        ("vae", "decoder.conv_norm_out", "VAE's decoder"),
    ],
)
def test_float16_overflow_is_computed_again_in_float32(pipe, part, weight, name):
    """A norm whose output leaves float16, before a layer that brings it back."""
    module = getattr(pipe, part)
    with torch.no_grad():
        norm = module.get_submodule(weight)
        norm.weight.mul_(3e4)
        norm.bias.add_(6e4)
        if part != "text_encoder":
            module.get_submodule(weight.replace("conv_norm_out", "conv_out")).weight.div_(1e4)
    module.half()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (image,) = pipe("cat", steps=2, seed=0, progress=False)
    said = {str(w.message) for w in caught if w.category is PrecisionWarning}
    assert said == {f"the {name} overflows float16; computed again in float32"}
    assert np.asarray(image).std() > 0
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_decoding_falls_back_to_tiles(pipe):
    whole = pipe.decoder

    def decode(latents, *, tile=None):
        if not tile:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(latents, tile=tile)

    pipe.decoder = decode
    with pytest.warns(UserWarning, match="decoding it in tiles"):
        (image,) = pipe("cat", steps=1, seed=0, progress=False)
    assert image.size == (64, 64)


def test_the_failed_decoding_is_forgotten_before_the_tiles(pipe):
    held, alive = [], []

    def decode(latents, *, tile=None):
        if tile:
            alive.append(held[0]() is not None)
            return pipe.vae.decode(latents, tile=tile)
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.decoder = decode
    with pytest.warns(UserWarning, match="decoding it in tiles"):
        pipe("cat", steps=1, seed=0, progress=False)
    assert alive == [False]


def test_out_of_memory_says_what_to_change(pipe):
    def forward(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    pipe.unet.forward = forward
    with pytest.raises(LatentDiffError, match="--batch-size 1.*--attention sliced"):
        pipe("cat", steps=1, seed=0, progress=False)


def test_other_runtime_errors_stay_what_they_are(pipe):
    def forward(*_):
        raise RuntimeError("shape mismatch")

    pipe.unet.forward = forward
    with pytest.raises(RuntimeError, match="shape mismatch"):
        pipe("cat", steps=1, seed=0, progress=False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_shorter_formats_keep_the_image(pipe, precision):
    options = {"steps": 5, "seed": 0, "progress": False}
    exact = arrays(pipe("cat", **options))
    short = pipe.to("cpu", precision)("cat", **options)
    assert read_recipe(short[0].info).precision == precision
    assert 0 < np.abs(arrays(short) - exact).mean() < 4


# --- Loading and saving ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", peers.FAMILIES)
def test_saved_model_makes_the_same_image(tmp_path, family):
    pipe = peers.ours(family)
    options = {"steps": 2, "seed": 0, "progress": False}
    pipe.save(tmp_path / "copy")
    again = Pipeline.load(tmp_path / "copy", device="cpu")
    assert np.array_equal(arrays(pipe("cat", **options)), arrays(again("cat", **options)))


def test_saved_model_opens_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    peers.ours("sd2").save(tmp_path / "copy")
    reopened = StableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    reopened.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np"}
    images = [
        pipe("cat", generator=torch.Generator().manual_seed(0), **options).images
        for pipe in (reopened, peers.theirs("sd2"))
    ]
    assert np.abs(images[0] - images[1]).max() < 1 / 255


def test_every_part_is_usable_alone(shared):
    token_ids = torch.tensor(shared.tokenizer(["cat"], padding="max_length")["input_ids"])
    context = shared.text_encoder(token_ids)
    x = torch.randn(1, *SHAPE)
    assert shared.unet(x, torch.tensor([500]), context).shape == x.shape
    image = shared.vae.decode(x)
    assert shared.vae.encode(image).mode().shape == x.shape
    half_a_level = 1 / 255 + 1e-6  # and float32's own rounding, which tells for values between two levels
    torch.testing.assert_close(to_tensor(to_pil(image)), image.clamp(-1, 1), rtol=0, atol=half_a_level)


def test_modules_can_be_trained_after_an_image(shared):
    shared("cat", steps=1, seed=0, progress=False)
    x = torch.randn(1, *SHAPE)
    shared.unet(x, 5, torch.randn(1, 77, 32)).sum().backward()
    assert shared.unet.conv_in.weight.grad.abs().sum() > 0
    shared.unet.zero_grad()


def test_all_offered_samplers_are_proved():
    """Here, or step by step beside diffusers' schedulers, or where there is none by closed forms (test_solvers)."""
    by_closed_forms = {"dpmpp-2s-a", "dpmpp-sde", "dpmpp-3m-sde", "restart"}
    assert {sampler for sampler, _ in METHODS} | PEERS.keys() | by_closed_forms == set(SAMPLERS)
