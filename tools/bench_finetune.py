"""Full fine-tuning side by side with the recipe of diffusers' train_text_to_image, on the same model, batch and
threads.

    python tools/bench_finetune.py                          the embedded model, on the CPU
    python tools/bench_finetune.py --model FOLDER --resolution 512 --batch 4 --steps 20
    python tools/bench_finetune.py --sd15                   a model of Stable Diffusion 1.5's shape with random weights
    python tools/bench_finetune.py --tiny                   to see that it runs

Contenders, each a program of its own, in turns, another one first in every round:
    diffusers          the recipe restated below: VAE and text encoder run at every step, images decoded by the data
    loader latentdiff bare    the same work: no caches
    latentdiff cached  latents and text embeddings cached (the time to fill the caches is shown apart)
All train the U-Net alone with AdamW in float32 (or --precision bf16), the same loss, without averaged weights,
validation and samples, on the same images. Rates are images per second after the warm-up steps, medians over the
rounds, on the clock and, for machines where others work too, per second of processor time; peak memory is that of the
whole program, from its start until the model is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONTENDERS = ("diffusers", "latentdiff bare", "latentdiff cached")
LR = 1e-5


@dataclass
class Measured:
    rates: list[float] = field(default_factory=list)  # images per second
    cpu_rates: list[float] = field(default_factory=list)  # images per second of processor time
    peaks_mb: list[float] = field(default_factory=list)
    prepare_s: list[float] = field(default_factory=list)


# --- The contenders; each runs in a process of its own ---------------------------------------------------------------


def train_diffusers(args: argparse.Namespace) -> dict[str, float]:
    """The training loop of examples/text_to_image/train_text_to_image.py with its defaults, restated."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(mixed_precision="bf16" if args.precision == "bf16" else "no")
    model = args.model
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)

    class Images(torch.utils.data.Dataset):
        def __init__(self) -> None:
            lines = (args.data / "metadata.jsonl").read_text().splitlines()
            self.rows = [json.loads(line) for line in lines]
            captions = [row["text"] for row in self.rows]
            longest = tokenizer.model_max_length
            made = tokenizer(captions, max_length=longest, padding="max_length", truncation=True, return_tensors="pt")
            self.tokens = made.input_ids

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            image = Image.open(args.data / self.rows[index]["file_name"]).convert("RGB")
            scale = args.resolution / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
            left, top = (image.width - args.resolution) // 2, (image.height - args.resolution) // 2
            image = image.crop((left, top, left + args.resolution, top + args.resolution))
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
            return {"pixel_values": pixels, "input_ids": self.tokens[index]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([example["pixel_values"] for example in examples]).contiguous().float()
        return {"pixel_values": pixels, "input_ids": torch.stack([example["input_ids"] for example in examples])}

    loader = torch.utils.data.DataLoader(
        Images(), shuffle=True, collate_fn=collate, batch_size=args.batch, num_workers=0
    )
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=args.steps)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    weight_dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    text_encoder.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)

    step, started = 0, _now(accelerator.device)
    while step < args.steps:
        for batch in loader:
            if step == args.warmup:
                started = _now(accelerator.device)
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(
                    0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
                ).long()
                noisy = scheduler.add_noise(latents.float(), noise.float(), timesteps).to(dtype=weight_dtype)
                context = text_encoder(batch["input_ids"], return_dict=False)[0]
                velocity = scheduler.config.prediction_type == "v_prediction"
                target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
                prediction = unet(noisy, timesteps, context, return_dict=False)[0]
                loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
                accelerator.gather(loss.repeat(args.batch)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                loss.detach().item()
            step += 1
            if step == args.steps:
                break
    rates = _rates(args, started, _now(accelerator.device))
    pipeline = StableDiffusionPipeline.from_pretrained(
        model, text_encoder=text_encoder, vae=vae, unet=accelerator.unwrap_model(unet), safety_checker=None
    )
    pipeline.save_pretrained(args.out / "model")
    return {**rates, "prepare": 0.0}


def train_latentdiff(args: argparse.Namespace, *, cached: bool) -> dict[str, float]:
    """`latentdiff finetune --method full`, doing the same work."""
    from latentdiff import finetune
    from latentdiff.training.finetuning.preparation import Preparation
    from latentdiff.training.loop import Trainer

    marks: list[tuple[float, float]] = []
    take_step = Trainer._train_step

    def marked(self: Trainer, batches: Any) -> Any:
        if self.step == args.warmup:
            marks.append(_now(self.accelerator.device))
        parts = take_step(self, batches)
        if self.step == args.steps - 1:
            marks.append(_now(self.accelerator.device))
        return parts

    Trainer._train_step = marked
    prepared: list[float] = []
    build = Preparation.build_caches

    def timed(self: Preparation) -> None:
        before = time.perf_counter()
        build(self)
        prepared.append(time.perf_counter() - before)

    Preparation.build_caches = timed
    finetune(
        args.data,
        model=str(args.model),
        out=args.out,
        method="full",
        max_steps=args.steps,
        batch_size=args.batch,
        lr=LR,
        warmup_steps=0,
        decay="constant",
        resolution=args.resolution,
        buckets=False,
        upscale=True,
        ema_decay=0.0,
        min_snr_gamma=None,
        caption_dropout=0.0,
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision="bf16" if args.precision == "bf16" else "no",
        cache_latents=cached,
        cache_text=cached,
        sample_count=0,
        log_every=args.steps,
        checkpoint_every=args.steps,
        validate_every=args.steps,
        preview_every=args.steps,
    )
    return {**_rates(args, *marks), "prepare": sum(prepared)}


def _now(device: Any) -> tuple[float, float]:
    """Seconds on the clock, and of all processors for this program."""
    _wait(device)
    return time.perf_counter(), time.process_time()


def _rates(args: argparse.Namespace, start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    images = (args.steps - args.warmup) * args.batch
    return {"rate": images / (end[0] - start[0]), "cpu_rate": images / (end[1] - start[1])}


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contend(args: argparse.Namespace) -> None:
    """Train as one contender and print what it measured."""
    from latentdiff.training.journal import peak_memory

    measured = (
        train_diffusers(args)
        if args.contender == "diffusers"
        else train_latentdiff(args, cached="cached" in args.contender)
    )
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("MEASURED", json.dumps({**measured, "peak_mb": peak_memory(device) / 1e6}))


# --- The race --------------------------------------------------------------------------------------------------------


def race(args: argparse.Namespace) -> dict[str, Measured]:
    """Run the contenders in turns, another one first in every round."""
    results = {name: Measured() for name in CONTENDERS}
    for number in range(args.rounds):
        order = CONTENDERS[number % len(CONTENDERS) :] + CONTENDERS[: number % len(CONTENDERS)]
        for name in order:
            with tempfile.TemporaryDirectory() as out:
                found = run_contender(name, Path(out) / "run", args)
            results[name].rates.append(found["rate"])
            results[name].cpu_rates.append(found["cpu_rate"])
            results[name].peaks_mb.append(found["peak_mb"])
            results[name].prepare_s.append(found["prepare"])
            rates = f"{found['rate']:.2f} images/s, {found['cpu_rate']:.2f} images/CPU s"
            print(f"round {number + 1}: {name}: {rates}, {found['peak_mb']:.0f} MB", file=sys.stderr)
    return results


def run_contender(name: str, out: Path, args: argparse.Namespace) -> dict[str, float]:
    options = {
        "contender": name, "model": args.model, "data": args.data, "out": out, "resolution": args.resolution,
        "batch": args.batch, "steps": args.steps, "warmup": args.warmup, "precision": args.precision, "threads": args.threads,
    }  # fmt: skip
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    command += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("MEASURED "))


def make_images(folder: Path, count: int, resolution: int) -> None:
    """Smooth random images with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for index in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        lines.append(
            json.dumps({"file_name": f"{index}.png", "text": f"a photo of {index % 16} cats on a blue background"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def table(results: dict[str, Measured]) -> str:
    """The medians as Markdown."""
    kinds = ("rates", "cpu_rates", "peaks_mb")
    base = {kind: statistics.median(getattr(results["diffusers"], kind)) for kind in kinds}
    lines = ["| | images/s | of diffusers | images/CPU s | of diffusers | peak MB | of diffusers | caches filled in |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        own = {kind: statistics.median(getattr(result, kind)) for kind in kinds}
        figures = [
            f"{own[kind]:.{digits}f} | {own[kind] / base[kind]:.2f}x"
            for kind, digits in zip(kinds, (2, 2, 0), strict=True)
        ]
        prepare = f"{statistics.median(result.prepare_s):.1f} s" if "cached" in name else ""
        lines.append(f"| {name} | {' | '.join(figures)} | {prepare} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; by default the embedded one")
    parser.add_argument("--sd15", action="store_true", help="a random model of SD 1.5's shape instead")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and few steps, to see that it runs")
    parser.add_argument("--resolution", type=int, help="pixels; by default the model's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="in each run, a multiple of --warmup")
    parser.add_argument("--warmup", type=int, default=10, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        import torch

        torch.set_num_threads(args.threads)
        contend(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.data = Path(scratch) / "data"
        _choose_model(args, Path(scratch))
        make_images(args.data, args.images, args.resolution)
        results = race(args)
    print(
        f"{args.model.name}, {args.resolution} pixels, batch {args.batch}, {args.precision}, {args.threads} threads\n"
    )
    print(table(results))


def _choose_model(args: argparse.Namespace, scratch: Path) -> None:
    """Fill in the model and its resolution; random models are made by another process, so that this one stays small."""
    if args.sd15 or args.tiny:
        args.model = scratch / "model"
        command = [sys.executable, str(ROOT / "tools" / "bench_models.py"), str(args.model)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, "--shape", "tiny" if args.tiny else "sd15"], check=True, cwd=ROOT, env=environment)
        args.steps, args.rounds = (4, 1) if args.tiny else (args.steps, args.rounds)
        args.warmup = 2 if args.tiny else args.warmup
    args.model = args.model or ROOT / "weights"
    if args.resolution is None:
        unet, vae = (json.loads((args.model / part / "config.json").read_text()) for part in ("unet", "vae"))
        args.resolution = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


if __name__ == "__main__":
    main()
