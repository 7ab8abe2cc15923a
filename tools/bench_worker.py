"""One contender of `bench.py`, in a process of its own: it sets itself up, then runs once for each line that it is
sent.

A process each keeps the thread pools of the contenders apart and tells whose memory is whose. Every contender is used
through its public interface, as its users would. The protocol is lines of JSON: {"ready": seconds to set up}, then for
every "run" {"seconds": ..., "peak_mb": ...}. The last output is written, for comparison, where a line "save FILE" says.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.bench_models import DTYPES

PROMPT = "two cats and a rocket on a blue background"
GUIDANCE = 7.5
STEPS = 50  # a step that is timed is one of so many

Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a contender is and what it does."""

    case: str  # "step", "control", "decode", "image" or "fast"
    library: str  # "latentdiff", "diffusers" or "openvino"
    model: str  # folder in the diffusers layout
    precision: str = "fp32"
    variant: str = ""  # diffusers: "channels_last" or "compile"; latentdiff: a back end
    device: str = "cpu"
    size: int = 512  # of the image, in pixels
    batch: int = 1
    steps: int = STEPS
    clock: str = "wall"  # or "processor": the process' own time, where others work beside


def ours(spec: Spec) -> Run:
    """latentdiff through `Pipeline`."""
    from latentdiff import Pipeline

    options = {"backend": spec.variant} if spec.variant else {}
    pipe = Pipeline.load(spec.model, device=spec.device, precision=spec.precision, **options)
    sides = {"height": spec.size, "width": spec.size}
    if spec.case == "image":
        seeds = list(range(spec.batch))
        return lambda: pipe(
            PROMPT, num_images=spec.batch, batch_size=spec.batch, seed=seeds, steps=spec.steps,
            guidance_scale=GUIDANCE, progress=False, **sides,
        )  # fmt: skip
    if spec.case == "fast":
        return lambda: pipe(PROMPT, fast=True, seed=0, progress=False, **sides)
    latents = start_latents(spec, pipe.device)
    if spec.case == "decode":
        return lambda: pipe.decode(latents)

    from latentdiff.diffusion.guidance import Guidance
    from latentdiff.diffusion.samplers import get_sampler

    sampler = get_sampler("ddim")
    levels = sampler.levels(pipe.schedule, STEPS)
    positive, negative = (pipe.encode([text] * spec.batch) for text in (PROMPT, ""))
    told, controls = pipe.told(spec.size, spec.size), controls_of(spec, pipe, levels) if spec.case == "control" else []
    denoiser = pipe.denoiser(positive, negative, Guidance(scale=GUIDANCE), levels, sizes=told, controls=controls)
    level, next_level = levels[STEPS // 2 : STEPS // 2 + 2]  # in the middle, where int8 is in force
    return lambda: sampler.step(denoiser, latents, level, next_level, None, None)[0]


def controls_of(spec: Spec, pipe: Any, levels: Any) -> Any:
    """The ControlNet beside the model with its hint, on a walk over `levels`."""
    from latentdiff import ControlNet
    from latentdiff.adapters.control.applied import applied_controls

    control = ControlNet.load(Path(spec.model) / "controlnet")(hint(spec))
    sides = (4, spec.size // 8, spec.size // 8)
    return applied_controls([control], pipe.residence, pipe.precision.unet, sides, levels)


def hint(spec: Spec) -> Any:
    """An image to follow, of the size that is made."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (spec.size, spec.size, 3), dtype=np.uint8))


def diffusers(spec: Spec) -> Run:
    """diffusers' pipeline of the model, with its default PNDM sampler where whole images race the fast preset."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler

    dtype = getattr(torch, DTYPES[spec.precision])
    pipe = DiffusionPipeline.from_pretrained(spec.model, torch_dtype=dtype).to(spec.device)
    pipe.set_progress_bar_config(disable=True)
    scheduler = PNDMScheduler if spec.case == "fast" else DDIMScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if spec.variant:  # what its documentation recommends
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if spec.variant == "compile":
        pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="reduce-overhead", fullgraph=True)
    if spec.case in ("image", "fast"):
        return lambda: pipe(
            PROMPT, num_images_per_prompt=spec.batch, num_inference_steps=spec.steps, guidance_scale=GUIDANCE,
            height=spec.size, width=spec.size, generator=[torch.Generator().manual_seed(i) for i in range(spec.batch)],
        ).images  # fmt: skip
    latents = start_latents(spec, pipe.device).to(dtype)
    if spec.case == "decode":
        return lambda: pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    given = {"device": pipe.device, "num_images_per_prompt": spec.batch, "do_classifier_free_guidance": True}
    found = pipe.encode_prompt(PROMPT, negative_prompt="", **given)
    more: dict[str, Any] = {}
    if pipe.unet.config.addition_embed_type:
        sizes = torch.tensor([[spec.size, spec.size, 0, 0, spec.size, spec.size]] * (2 * spec.batch), dtype=dtype)
        more = {"added_cond_kwargs": {"text_embeds": torch.cat([found[3], found[2]]), "time_ids": sizes.to(pipe.device)}}
    unet = controlled(spec, pipe) if spec.case == "control" else pipe.unet
    embeddings = torch.cat([found[1], found[0]])
    return step_of(pipe.scheduler, embeddings, latents, lambda *x: unet(*x, return_dict=False, **more)[0])


def controlled(spec: Spec, pipe: Any) -> Callable[..., Any]:
    """The U-Net with what a ControlNet adds, as diffusers' pipeline calls both."""
    import torch
    from diffusers import ControlNetModel
    from diffusers.image_processor import VaeImageProcessor

    network = ControlNetModel.from_pretrained(Path(spec.model) / "controlnet", torch_dtype=pipe.unet.dtype).to(spec.device)
    if spec.variant:
        network.to(memory_format=torch.channels_last)
    shown = VaeImageProcessor(do_convert_rgb=True, do_normalize=False).preprocess(hint(spec))
    cond = torch.cat([shown] * 2 * spec.batch).to(pipe.device, pipe.unet.dtype)

    def unet(x: Any, t: Any, text: Any, **more: Any) -> Any:
        down, middle = network(x, t, encoder_hidden_states=text, controlnet_cond=cond, **more)
        how = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return pipe.unet(x, t, encoder_hidden_states=text, **how, **more)

    return unet


def openvino(spec: Spec) -> Run:
    """The modules of diffusers converted by OpenVINO with static shapes, its fastest way on a CPU."""
    import openvino as ov
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(spec.model)
    hint = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[spec.precision], "PERFORMANCE_HINT": "LATENCY"}
    latents = start_latents(spec, torch.device("cpu"))

    def compiled(module: Any, *example: Any) -> Callable[..., Any]:
        with tempfile.TemporaryDirectory() as folder:  # by way of a file, so that the weights of torch can go
            model = ov.convert_model(module.eval(), example_input=example, input=[tuple(x.shape) for x in example])
            ov.save_model(model, f"{folder}/model.xml", compress_to_fp16=False)
            module.to("meta")
            del model
            gc.collect()
            ready = ov.Core().compile_model(f"{folder}/model.xml", "CPU", hint)
        return lambda *inputs: torch.from_numpy(ready([x.numpy() for x in inputs])[0])

    if spec.case == "decode":
        decode = compiled(torch.nn.Sequential(pipe.vae.post_quant_conv, pipe.vae.decoder), latents)
        return lambda: decode(latents / pipe.vae.config.scaling_factor)
    embeddings = torch.randn(2 * spec.batch, 77, pipe.unet.config.cross_attention_dim)
    example = (torch.cat([latents, latents]), torch.ones(2 * spec.batch), embeddings)
    unet = compiled(pipe.unet, *example)
    return step_of(pipe.scheduler, embeddings, latents, lambda x, t, text: unet(x, t.expand(len(x)).float(), text))


def step_of(scheduler: Any, embeddings: Any, latents: Any, unet: Callable[..., Any]) -> Run:
    """One guided DDIM step as diffusers' pipeline takes it."""
    import torch

    scheduler.set_timesteps(STEPS)

    def step() -> Any:
        t = scheduler.timesteps[STEPS // 2]
        negative, positive = unet(torch.cat([latents, latents]), t, embeddings).chunk(2)
        raw = negative + GUIDANCE * (positive - negative)
        return scheduler.step(raw, t, latents, return_dict=False)[0]

    return step


def start_latents(spec: Spec, device: Any) -> Any:
    """Unit normal latents (batch, 4, h, w), float32, the same for every contender."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return torch.randn(spec.batch, 4, spec.size // 8, spec.size // 8, generator=generator).to(device)


LIBRARIES = {"latentdiff": ours, "diffusers": diffusers, "openvino": openvino}


def timed(run: Run, device: str, clock: str = "wall") -> tuple[Any, float]:
    """What `run` gives, and its seconds until the device is done."""
    import torch

    now = time.process_time if clock == "processor" else time.perf_counter

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    start = now()
    with torch.no_grad():
        output = run()
    wait()
    return output, now() - start


def peak_mb(device: str) -> float:
    """The most memory that was in use so far: of the GPU, or resident in the process."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    begun = time.perf_counter()
    run = LIBRARIES[spec.library](spec)
    output, _ = timed(run, spec.device)  # warm-up: compilation, kernel choice
    answer({"ready": time.perf_counter() - begun})
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "save":
            save(output, argument)
            answer({})
        else:
            output, seconds = timed(run, spec.device, spec.clock)
            answer({"seconds": seconds, "peak_mb": peak_mb(spec.device)})


def save(output: Any, path: str) -> None:
    """Write a tensor, or images as one with values 0 to 255, in float32."""
    import numpy as np
    import torch

    if isinstance(output, list):
        output = torch.from_numpy(np.stack([np.asarray(image) for image in output]))
    torch.save(output.float().cpu(), path)


def answer(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
