"""Which contenders meet in which case of `bench.py`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tools.bench_models import DTYPES
from tools.bench_race import Result, decibels, race, race_programs, relative, run_program
from tools.bench_worker import GUIDANCE, PROMPT, STEPS, Spec


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for all cases."""

    model: Path  # of random weights
    embedded: Path
    device: str
    threads: int
    repeat: int
    peers: tuple[str, ...]
    size: int  # of images, in pixels
    model_xl: Path | None = None  # of SDXL's shape
    clock: str = "wall"

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "bf16") if self.device == "cpu" else ("bf16",)

    def contenders(self, case: str, precision: str, **more: object) -> dict[str, Spec]:
        """Who races in one precision: latentdiff first, in the way that it takes by itself."""
        ours = Spec(
            case=case,
            library="latentdiff",
            model=str(self.model),
            precision=precision,
            device=self.device,
            size=self.size,
            clock=self.clock,
            **more,
        )
        specs = {"latentdiff": ours}
        if self.device != "cpu":
            specs["latentdiff --compile"] = replace(ours, variant="compile")
        if "diffusers" in self.peers:
            theirs = replace(ours, library="diffusers")
            specs["diffusers"] = theirs
            last = "compile" if self.device != "cpu" else "channels_last"
            specs[f"diffusers {last}"] = replace(theirs, variant=last)
        return specs

    def in_openvino(self, case: str, precision: str) -> dict[str, Spec]:
        """Who races OpenVINO: apart from the others, since not all of them fit into 24 GB at once."""
        if "openvino" not in self.peers or self.device != "cpu":
            return {}
        ours = self.contenders(case, precision)["latentdiff"]
        return {
            "latentdiff": ours,
            "diffusers' modules in OpenVINO": replace(ours, library="openvino"),
        }


def cases(name: str, settings: Settings) -> list[Result]:
    """The results of the case called `name`."""
    return CASES[name](settings)


def step(settings: Settings) -> list[Result]:
    return _in_turns("step", settings)


def control(settings: Settings) -> list[Result]:
    if not (settings.model / "controlnet").exists():
        program = Path(__file__).with_name("bench_models.py")
        run_program([sys.executable, str(program), str(settings.model), "--control"])
    return _in_turns("control", settings)


def decode(settings: Settings) -> list[Result]:
    return _in_turns("decode", settings)


def _in_turns(case: str, settings: Settings) -> list[Result]:
    results = []
    for precision in settings.precisions:
        results += race(case, precision, settings.contenders(case, precision), settings.repeat, relative)
    return results


def int8(settings: Settings) -> list[Result]:
    if settings.device != "cpu":
        return []
    ours = settings.contenders("step", "bf16")["latentdiff"]
    pair = {"latentdiff bf16": ours, "latentdiff int8": replace(ours, precision="int8")}
    results = race("step", "int8", pair, settings.repeat, relative)
    if "openvino" in settings.peers:  # apart, since the first time takes 16 GB
        pair = {
            "latentdiff bf16": ours,
            "latentdiff int8, OpenVINO": replace(ours, precision="int8", variant="openvino"),
        }
        results += race("step", "int8, OpenVINO", pair, settings.repeat, relative)
    return results


def openvino(settings: Settings) -> list[Result]:
    results = []
    for case in ("step", "decode"):
        for precision in settings.precisions:
            results += race(case, f"{precision}, OpenVINO", settings.in_openvino(case, precision), settings.repeat)
    return results


def image(settings: Settings) -> list[Result]:
    precision = settings.precisions[-1]
    results = []
    for batch in (1,) if settings.device == "cpu" else (1, 16):
        found = race(
            "image",
            f"{precision}, batch {batch}",
            settings.contenders("image", precision, batch=batch),
            settings.repeat,
        )
        for result in found:
            result.difference = f"first one after {result.ready:.1f} s"
        results += found
    return results


def fast(settings: Settings) -> list[Result]:
    theirs = Spec(
        case="fast", library="diffusers", model=str(settings.model), device=settings.device, size=settings.size
    )
    ours = replace(theirs, library="latentdiff", precision="bf16")
    return race("fast", "--fast", {"diffusers default": theirs, "latentdiff --fast": ours}, settings.repeat)


def agreement(settings: Settings) -> list[Result]:
    exact = Spec(case="image", library="latentdiff", model=str(settings.embedded), device=settings.device, steps=20)
    exact = replace(exact, size=native_size(settings.embedded), batch=8)
    short = {precision: replace(exact, precision=precision) for precision in ("fp32", "bf16", "int8")}
    return race("agreement", "20 steps, embedded model", short, 1, decibels)


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
    """The command lines of both libraries that make the same image."""
    numbers = [str(steps), str(size)]
    mine = [sys.executable, "-m", "latentdiff", "generate", PROMPT, "--model", str(folder), "--seed", "0"]
    mine += ["--sampler", "ddim", "--guidance", str(GUIDANCE), "--steps", numbers[0], "--precision", precision]
    mine += ["--height", numbers[1], "--width", numbers[1], "--device", "cpu", "--out", str(out / "ours")]
    theirs = [sys.executable, "-c", _DIFFUSERS_PROGRAM, str(folder), PROMPT, str(out / "theirs.png")]
    return {"diffusers": [*theirs, DTYPES[precision], *numbers], "latentdiff": mine}


def memory(settings: Settings) -> list[Result]:
    with tempfile.TemporaryDirectory() as out:
        commands = programs(settings.model, Path(out), "bf16", 2, settings.size)
        commands["latentdiff --low-memory"] = [*commands["latentdiff"], "--low-memory"]
        return race_programs("memory", "two steps, bf16", commands, max(1, settings.repeat // 2))


def cold(settings: Settings) -> list[Result]:
    with tempfile.TemporaryDirectory() as out:
        commands = programs(settings.embedded, Path(out), "fp32", 25, native_size(settings.embedded))
        return race_programs("cold", "25 steps, embedded model", commands, settings.repeat)


def growth(settings: Settings) -> list[Result]:
    """One contender after the other: the peak memory of a process never falls, so each point needs its own."""
    unit = settings.size
    points = [{"size": side, "batch": 1} for side in (unit // 2, 3 * unit // 4, unit, 3 * unit // 2, 2 * unit)]
    points += [{"size": unit // 2, "batch": batch} for batch in (2, 4, 8)]
    results = []
    for point in points:
        results += _grown("step", settings, point | {"steps": STEPS})
    for steps in (1, 2, 4, 8):
        results += _grown("image", settings, {"size": unit // 2, "batch": 1, "steps": steps})
    return results


def _grown(case: str, settings: Settings, point: dict[str, int]) -> list[Result]:
    everyone = replace(settings, size=point["size"]).contenders(
        case, "bf16", batch=point["batch"], steps=point["steps"]
    )
    what = f"{case}: " + ", ".join(f"{name} {value}" for name, value in point.items())
    results = []
    for name in ("latentdiff", "diffusers"):
        if name in everyone:
            results += race("growth", what, {name: everyone[name]}, max(1, settings.repeat // 2))
            results[-1].at = {"is_step": case == "step", **point}
    return results


def xl(settings: Settings) -> list[Result]:
    """The size and precision that people draw in."""
    return _alone("xl", settings, "bf16", 2 * settings.size)


def xl_small(settings: Settings) -> list[Result]:
    """What machines without bfloat16 and with little memory can do."""
    return _alone("xl-small", settings, "fp32", settings.size)


def _alone(case: str, settings: Settings, precision: str, size: int) -> list[Result]:
    """Contenders of SDXL's shape one after the other: two of them do not fit into 24 GB."""
    specs = replace(settings, model=settings.model_xl or settings.model, size=size).contenders("step", precision)
    what = f"{precision}, {size}x{size}"
    return [result for name in specs for result in race(case, what, {name: specs[name]}, settings.repeat)]


def native_size(folder: Path) -> int:
    """Pixels of one side of the images that the model in `folder` was trained on."""
    return json.loads((folder / "vae" / "config.json").read_text())["sample_size"]


CASES: dict[str, Callable[[Settings], list[Result]]] = {
    "step": step,
    "control": control,
    "decode": decode,
    "int8": int8,
    "openvino": openvino,
    "image": image,
    "fast": fast,
    "agreement": agreement,
    "memory": memory,
    "cold": cold,
    "growth": growth,
    "xl": xl,
    "xl-small": xl_small,
}
