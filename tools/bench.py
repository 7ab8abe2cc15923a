"""latentdiff against diffusers, side by side in one run, with the same weights and threads.

    python tools/bench.py                      all of it, at the shape of Stable Diffusion 1.5 (half an hour, 10 GB)
    python tools/bench.py --only step,decode   a part of it
    python tools/bench.py --tiny               the same on a tiny shape, to see that it runs

What is measured:
    step     one guided denoising step (conditional and unconditional half, DDIM) of a 512x512 picture
    decode   the VAE decoder, latents to a 512x512 picture
    picture  a program that loads a model of that shape and makes a 512x512 picture in two steps: peak memory
    cold     a program from its start to its first PNG with the embedded model

The runs of the contenders alternate and the table shows medians. Weights are random: speed does not depend on them.
"Difference" compares the outputs of the two libraries, relative to the largest value, so that equal work is compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = ("step", "decode", "picture", "cold")
PROMPT = "two cats and a rocket on a blue background"
GUIDANCE = 7.5
STEPS = 25  # the step that is timed is one of so many
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

# torch is imported inside functions: the process that measures peak memory has to be small itself, because Linux hands
# the size of a parent down to the peak of its children.


@dataclass(frozen=True)
class Shape:
    """Sizes of the model that is raced."""

    unet_widths: tuple[int, ...]
    vae_widths: tuple[int, ...]
    text_width: int
    text_layers: int
    vocabulary: int
    groups: int
    latent_size: int  # latent height and width; a picture is 8 times that


SD15 = Shape((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12, 49408, 32, 64)
TINY = Shape((32, 64, 64, 64), (32, 32, 32, 32), 32, 2, 1000, 8, 8)


@dataclass
class Result:
    """One contender in one case."""

    case: str
    variant: str  # precision and memory layout
    library: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)  # high-water mark of the resident memory
    difference: float | None = None


@dataclass
class Contender:
    library: str
    variant: str
    run: Callable[[], Any]  # gives the tensor that is compared


# --- One step, one decoding: both libraries in one process, on the very same weight tensors -------------------------


def race(case: str, contenders: list[Contender], repeat: int) -> list[Result]:
    """Warm everyone up once, then run in turns; another one starts each round."""
    results = [Result(case, contender.variant, contender.library) for contender in contenders]
    outputs = [contender.run().float() for contender in contenders]
    peers = {c.variant: out for c, out in zip(contenders, outputs, strict=True) if c.library == "diffusers"}
    for result, output in zip(results, outputs, strict=True):
        peer = peers[result.variant]
        if result.library == "latentdiff":
            result.difference = float((output - peer).abs().max() / peer.abs().max())
    order = list(zip(contenders, results, strict=True))
    for _ in range(repeat):
        for contender, result in order:
            start = time.perf_counter()
            contender.run()
            result.seconds.append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    return results


def compare_modules(case: str, peer: Any, contenders: Callable[[Any, Any, str], list[Contender]], repeat: int) -> list[Result]:
    """Race both libraries on the weights of `peer`, in both memory layouts at once, for every precision."""
    import torch
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()
    results = []
    with torch.inference_mode():
        for name, dtype in PRECISIONS.items():
            peer = peer.to(getattr(torch, dtype))
            last = copy.deepcopy(peer).to(memory_format=torch.channels_last)
            racers = contenders(peer, our_twin(peer), name)
            racers += contenders(last, our_twin(last), f"{name} channels_last")
            results += race(case, racers, repeat)
    return results


def our_twin(peer: Any) -> Any:
    """latentdiff's module of the same architecture, on the same weight tensors."""
    import torch

    from latentdiff.config import UNetConfig, VAEConfig
    from latentdiff.unet import UNet
    from latentdiff.vae import VAE

    module, config = (UNet, UNetConfig) if "UNet" in type(peer).__name__ else (VAE, VAEConfig)
    with torch.device("meta"):
        twin = module(config.from_diffusers(dict(peer.config)))
    twin.load_state_dict(peer.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def step_contenders(peer: Any, ours: Any, variant: str) -> list[Contender]:
    """One DDIM step with guidance, as each library's pipeline takes it."""
    import torch
    from diffusers import DDIMScheduler

    from latentdiff.config import ScheduleConfig
    from latentdiff.guidance import Guidance, guided_denoiser
    from latentdiff.parameterization import parameterization
    from latentdiff.samplers import get_sampler
    from latentdiff.schedule import Schedule

    size, dtype = peer.config.sample_size, peer.dtype
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, size, size, generator=generator).to(dtype)
    text, empty = torch.randn(2, 1, 77, peer.config.cross_attention_dim, generator=generator).to(dtype)

    config = ScheduleConfig()
    scheduler = DDIMScheduler.from_config(config.to_diffusers())
    scheduler.set_timesteps(STEPS)
    embeddings = torch.cat([empty, text])

    def theirs() -> Any:
        t = scheduler.timesteps[0]
        raw = peer(torch.cat([x, x]), t, encoder_hidden_states=embeddings, return_dict=False)[0]
        negative, positive = raw.chunk(2)
        raw = negative + GUIDANCE * (positive - negative)
        return scheduler.step(raw, t, x, return_dict=False)[0]

    # latentdiff keeps the latents in float32 and projects the text once per prompt, before the first step.
    def model(x: Any, t: float, context: Any) -> Any:
        return ours(x.to(dtype), t, context)

    context, negative = ours.project_context(text), ours.project_context(empty)
    guidance = Guidance(scale=GUIDANCE)
    denoiser = guided_denoiser(model, parameterization(config.prediction_type), context, negative, guidance)
    sampler = get_sampler("ddim")
    level, next_level = sampler.levels(Schedule(config), STEPS)[:2]

    def mine() -> Any:
        return sampler.step(denoiser, x.float(), level, next_level, None, None)[0]

    return [Contender("latentdiff", variant, mine), Contender("diffusers", variant, theirs)]


def decode_contenders(peer: Any, ours: Any, variant: str) -> list[Contender]:
    """Latents to a picture; diffusers leaves the scale factor to its caller."""
    import torch

    size = peer.config.sample_size // 8
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(3)).to(peer.dtype)
    return [
        Contender("latentdiff", variant, lambda: ours.decode(latents)),
        Contender("diffusers", variant, lambda: peer.decode(latents / peer.config.scaling_factor).sample),
    ]


# --- Whole programs: each library in a process of its own -----------------------------------------------------------

_DIFFUSERS_PROGRAM = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
folder, prompt, out, dtype, steps, size = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
generator = torch.Generator().manual_seed(0)
pipe(prompt, num_inference_steps=int(steps), guidance_scale=7.5, height=int(size), width=int(size),
     generator=generator).images[0].save(out)
"""


def programs(folder: Path, out: Path, precision: str, steps: int, size: int) -> dict[str, list[str]]:
    """The command lines of both libraries that make the same picture."""
    numbers = [str(steps), str(size)]
    mine = [sys.executable, "-m", "latentdiff", "generate", PROMPT, "--model", str(folder), "--seed", "0"]
    mine += ["--sampler", "ddim", "--guidance", str(GUIDANCE), "--steps", numbers[0], "--precision", precision]
    mine += ["--height", numbers[1], "--width", numbers[1], "--device", "cpu", "--out", str(out / "ours")]
    theirs = [sys.executable, "-c", _DIFFUSERS_PROGRAM, str(folder), PROMPT, str(out / "theirs.png")]
    return {"latentdiff": mine, "diffusers": [*theirs, PRECISIONS[precision], *numbers]}


def compare_programs(case: str, folder: Path, precision: str, steps: int, size: int, repeat: int) -> list[Result]:
    """Run both programs in turns, after one round that fills the disk cache."""
    results = {library: Result(case, precision, library) for library in ("latentdiff", "diffusers")}
    with tempfile.TemporaryDirectory() as out:
        commands = programs(folder, Path(out), precision, steps, size)
        for round_ in range(repeat + 1):
            for library, command in commands.items():
                seconds, peak_mb = run_program(command)
                if round_:
                    results[library].seconds.append(seconds)
                    results[library].peak_mb.append(peak_mb)
    return list(results.values())


def run_program(command: list[str]) -> tuple[float, float]:
    """Run `command`; return seconds from start to end and its peak resident memory in MB.

    Raises:
        SystemExit: it failed; its last lines of output are the message.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} ... failed:\n{output.read()[-2000:]}")
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# --- Models with random weights -------------------------------------------------------------------------------------


def peer_unet(shape: Shape) -> Any:
    """A diffusers U-Net of Stable Diffusion 1.5's architecture with random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=shape.latent_size,
        block_out_channels=shape.unet_widths,
        cross_attention_dim=shape.text_width,
        attention_head_dim=8,
        norm_num_groups=shape.groups,
    ).eval()


def peer_vae(shape: Shape) -> Any:
    """A diffusers AutoencoderKL of Stable Diffusion 1.5's architecture with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        sample_size=8 * shape.latent_size,
        block_out_channels=shape.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=shape.groups,
    ).eval()


def save_model(shape: Shape, folder: Path) -> None:
    """Write a whole model of this shape as diffusers saves it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from latentdiff.config import ScheduleConfig
    from tests.tiny import tokenizer

    words = tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_width // min(64, shape.text_width),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    StableDiffusionPipeline(
        vae=peer_vae(shape), unet=peer_unet(shape), text_encoder=CLIPTextModel(text), tokenizer=words,
        scheduler=DDIMScheduler.from_config(ScheduleConfig().to_diffusers()),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


# --- The run --------------------------------------------------------------------------------------------------------


def measure(cases: list[str], shape: Shape, repeat: int, embedded: Path) -> list[Result]:
    """All results; programs first, while this process is still small."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        if "picture" in cases or not embedded.exists():
            arguments = ["--save-model", folder, *(["--tiny"] if shape is TINY else [])]
            run_program([sys.executable, __file__, *arguments])
        if "cold" in cases:
            say("cold start")
            embedded, size = (embedded, native_size(embedded)) if embedded.exists() else (model, 64)
            results += compare_programs("cold", embedded, "fp32", STEPS, size, repeat)
        for precision in PRECISIONS if "picture" in cases else ():
            say(f"picture {precision}")
            size = 8 * shape.latent_size
            results += compare_programs("picture", model, precision, 2, size, max(1, repeat // 2))
    if "step" in cases:
        say("step")
        results += compare_modules("step", peer_unet(shape), step_contenders, repeat)
    if "decode" in cases:
        say("decode")
        results += compare_modules("decode", peer_vae(shape), decode_contenders, repeat)
    return results


def native_size(folder: Path) -> int:
    """Pixels of one side of the pictures that the model in `folder` was trained on."""
    return json.loads((folder / "vae" / "config.json").read_text())["sample_size"]


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    names = ("torch", "diffusers", "transformers")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "threads": threads, "python": platform.python_version()} | {n: version(n) for n in names}


def table(results: list[Result]) -> str:
    """The results as Markdown: a row per case and variant, latentdiff beside diffusers."""
    lines = [
        "| case | variant | latentdiff | diffusers | diffusers / latentdiff | peak memory (MB) | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for ours in (result for result in results if result.library == "latentdiff"):
        key = (ours.case, ours.variant)
        theirs = next(r for r in results if r.library == "diffusers" and (r.case, r.variant) == key)
        a, b = statistics.median(ours.seconds), statistics.median(theirs.seconds)
        memory = difference = ""
        if ours.peak_mb:
            memory = f"{statistics.median(ours.peak_mb):.0f} / {statistics.median(theirs.peak_mb):.0f}"
        if ours.difference is not None:
            difference = f"{ours.difference:.1e}"
        cells = (*key, f"{a:.3f} s", f"{b:.3f} s", f"{b / a:.2f}", memory, difference)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas (default: all)")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that everything runs")
    parser.add_argument("--model", type=Path, default=ROOT / "weights", help="the model of the case cold")
    parser.add_argument("--json", type=Path, help="write every single time to this file")
    parser.add_argument("--save-model", type=Path, help="only write the random model to this folder")
    args = parser.parse_args()
    args.cases = args.only.split(",")
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return args


def main() -> None:
    args = arguments()
    shape = TINY if args.tiny else SD15
    if args.save_model:
        return save_model(shape, args.save_model)
    # torch and the programs read it when they start.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    results = measure(args.cases, shape, args.repeat, args.model)
    facts = machine(args.threads)
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    print(table(results))
    if args.json:
        report = {"machine": facts, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
