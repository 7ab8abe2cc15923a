"""Images of other programs made again: their samplers' equations, written out here over diffusers' networks."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.diffusion.philox import normal
from latentdiff.recipe import read_recipe
from tests import peers
from tests.request.foreign.test_comfy import changed, node

SEED, STEPS, GUIDANCE, SIZE = 11, 6, 4.0, (64, 48)  # width, height
SHAPE = (1, 4, SIZE[1] // 8, SIZE[0] // 8)


class Program:
    """k-diffusion's view of the tiny model: `denoised(x, sigma)` under guidance, x in units of sigma."""

    @torch.no_grad()
    def __init__(self, *, whole_timesteps: bool, skip: int = 0) -> None:
        self.pipe = peers.theirs("sd1")
        alphas = self.pipe.scheduler.alphas_cumprod.double().numpy()
        self.sigmas = np.sqrt((1 - alphas) / alphas)
        self.whole = whole_timesteps
        encoder = self.pipe.text_encoder
        if not hasattr(encoder, "text_model"):  # where diffusers looks for the norm; transformers 5 has moved it
            object.__setattr__(encoder, "text_model", SimpleNamespace(final_layer_norm=encoder.final_layer_norm))
        # One by one: diffusers leaves out the layers of the prompt only, the web UIs those of what to avoid as well.
        texts = [
            self.pipe.encode_prompt(x, "cpu", 1, False, clip_skip=skip or None)[0] for x in ("blurry", "a red fox")
        ]
        self.text = torch.cat(texts)

    def denoised(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        log = np.log(self.sigmas)
        t = float(np.interp(math.log(sigma), log, np.arange(len(log))))
        if self.whole:
            t = float(np.abs(math.log(sigma) - log).argmin())
        scaled = torch.cat([x, x]) / math.sqrt(sigma**2 + 1)
        negative, positive = self.pipe.unet(scaled, t, self.text).sample.chunk(2)
        return x - sigma * (negative + GUIDANCE * (positive - negative))

    @torch.no_grad()
    def image(self, x: torch.Tensor) -> np.ndarray:
        decoded = self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor).sample
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()


def karras(low: float, high: float, steps: int) -> list[float]:
    ramp = np.linspace(0, 1, steps)
    return [*((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist(), 0.0]


def split(sigma: float, end: float) -> tuple[float, float]:
    """(down, up) of an ancestral step."""
    up = min(end, math.sqrt(end**2 * (sigma**2 - end**2) / sigma**2))
    return math.sqrt(end**2 - up**2), up


def gpu(seed: int, call: int) -> torch.Tensor:
    return torch.from_numpy(normal(seed, call, math.prod(SHAPE))).view(SHAPE)


@torch.no_grad()
def a1111_euler_a(program: Program, ensd: int) -> torch.Tensor:
    """AUTOMATIC1111: noise of a GPU times sigma, later noise from seed + ENSD."""
    sigmas = karras(program.sigmas[0], program.sigmas[-1], STEPS)
    x = gpu(SEED, 0) * sigmas[0]
    for call, (sigma, end) in enumerate(pairwise(sigmas)):
        x0 = program.denoised(x, sigma)
        down, up = split(sigma, end)
        x = x + (x - x0) / sigma * (down - sigma) + up * gpu(SEED + ensd, call if ensd else call + 1)
    return x


@torch.no_grad()
def dpmpp_2m(program: Program, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """DPM++ 2M (Lu et al. 2022, algorithm 2 of "DPM-Solver++"), in sigma."""
    before = None
    for index, (sigma, end) in enumerate(pairwise(sigmas)):
        x0 = program.denoised(x, sigma)
        if end == 0.0:
            return x0
        h = math.log(sigma / end)
        mixed = x0
        if before is not None:
            ratio = math.log(sigmas[index - 1] / sigma) / h
            mixed = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before
        x, before = end / sigma * x - math.expm1(-h) * mixed, x0
    return x


@torch.no_grad()
def twice(name: str, program: Program, sigmas: list[float]) -> torch.Tensor:
    """k-diffusion's steps of two evaluations, with the noise of a GPU."""
    x, call = gpu(SEED, 0) * sigmas[0], 0
    for sigma, end in pairwise(sigmas):
        x0 = program.denoised(x, sigma)
        slope = (x - x0) / sigma
        down, up = (end, 0.0) if name == "Heun" or end == 0.0 else split(sigma, end)
        if down == 0.0:
            x = x + slope * (down - sigma)
            continue
        if name == "Heun":
            other = (x + slope * (end - sigma) - program.denoised(x + slope * (end - sigma), end)) / end
            x = x + (slope + other) / 2 * (end - sigma)
            continue
        middle = math.sqrt(sigma * down)
        if name == "DPM2 a":
            inner = x + slope * (middle - sigma)
            x = x + (inner - program.denoised(inner, middle)) / middle * (down - sigma)
        else:  # DPM++ 2S a, in h = ln(sigma / down)
            inner = middle / sigma * x - math.expm1(-math.log(sigma / middle)) * x0
            x = down / sigma * x - math.expm1(-math.log(sigma / down)) * program.denoised(inner, middle)
        call += 1
        x = x + up * gpu(SEED, call)
    return x


def ours(texts: dict[str, str]) -> np.ndarray:
    recipe = read_recipe(texts)
    pipe = peers.ours("sd1")
    options: dict[str, Any] = {"width": recipe.width, "height": recipe.height, **recipe.sampling()}
    return np.asarray(pipe(recipe.prompt, progress=False, **options)[0]).astype(float)


def a1111(**settings: str) -> dict[str, str]:
    said = {"Steps": STEPS, "Sampler": "Euler a", "Schedule type": "Karras", "CFG scale": GUIDANCE, "Seed": SEED}
    said |= {"Size": "x".join(map(str, SIZE)), **{name.replace("_", " "): value for name, value in settings.items()}}
    line = ", ".join(f"{name}: {value}" for name, value in said.items())
    return {"parameters": f"a red fox\nNegative prompt: blurry\n{line}, Version: v1.10.1"}


@pytest.mark.parametrize(("ensd", "skip"), [(0, 1), (31337, 1), (0, 2)])
def test_an_ancestral_image_of_a1111(ensd: int, skip: int) -> None:
    settings = ({"ENSD": str(ensd)} if ensd else {}) | ({"Clip_skip": str(skip)} if skip > 1 else {})
    program = Program(whole_timesteps=False, skip=skip - 1)
    theirs = program.image(a1111_euler_a(program, ensd))
    assert np.abs(ours(a1111(**settings)) - theirs).max() <= 1


@pytest.mark.parametrize("name", ["Heun", "DPM2 a", "DPM++ 2S a"])
def test_an_image_of_a1111_of_two_evaluations_a_step(name: str) -> None:
    program = Program(whole_timesteps=False)
    sigmas = karras(program.sigmas[0], program.sigmas[-1], STEPS + (name == "DPM2 a"))
    if name == "DPM2 a":  # which takes one step more, and leaves out the last level before the end
        sigmas = [*sigmas[:-2], 0.0]
    theirs = program.image(twice(name, program, sigmas))
    assert np.abs(ours(a1111(Sampler=name)) - theirs).max() <= 1


@pytest.mark.parametrize("multiplied", [False, True])
def test_an_image_of_a1111_from_the_cpu(multiplied: bool) -> None:
    program = Program(whole_timesteps=False)
    sigmas = karras(program.sigmas[0], program.sigmas[-1], STEPS)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    x = noise * (math.sqrt(1 + sigmas[0] ** 2) if multiplied else sigmas[0])
    theirs = program.image(dpmpp_2m(program, x, sigmas))
    settings = {"Sampler": "DPM++ 2M", "RNG": "CPU"} | ({"SGM noise multiplier": "True"} if multiplied else {})
    assert np.abs(ours(a1111(**settings)) - theirs).max() <= 1


@pytest.mark.parametrize("index", [0, 2])
def test_an_image_of_a_batch_of_comfy(index: int) -> None:
    """The whole batch is drawn at once on the CPU; latents begin at sqrt(1 + sigma^2); timesteps are whole."""
    program = Program(whole_timesteps=True)
    sigmas = karras(program.sigmas[0], program.sigmas[-1], STEPS)
    noise = torch.randn((3, *SHAPE[1:]), generator=torch.Generator().manual_seed(SEED))[index : index + 1]
    theirs = program.image(dpmpp_2m(program, noise * math.sqrt(1 + sigmas[0] ** 2), sigmas))
    nodes = {
        "5": node("EmptyLatentImage", width=SIZE[0], height=SIZE[1], batch_size=3),
        "6": node("CLIPTextEncode", text="a red fox", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "40": node("LatentFromBatch", samples=["5", 0], batch_index=index, length=1),
    }
    graph = changed(
        nodes, sampler_name="dpmpp_2m", scheduler="karras", seed=SEED, steps=STEPS, cfg=GUIDANCE, latent_image=["40", 0]
    )
    assert np.abs(ours({"prompt": json.dumps(graph)}) - theirs).max() <= 1


def test_these_things_decide_the_image() -> None:
    """What the tests above tell apart is more than what they allow."""
    images = [
        ours(a1111(**settings))
        for settings in ({}, {"RNG": "CPU"}, {"ENSD": "5"}, {"Clip_skip": "2"}, {"Sampler": "DPM++ 2M"})
    ]
    for number, image in enumerate(images):
        assert all(np.abs(image - other).max() > 2 for other in images[:number])
