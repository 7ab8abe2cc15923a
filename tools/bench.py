"""latentdiff against the libraries that people would use instead: same weights, threads and seed, in turns, in one run.

    python tools/bench.py                                    all but xl, at the shape of Stable Diffusion 1.5 (hours, 20
    GB) python tools/bench.py --only step,decode --repeat 5      a part of it
    python tools/bench.py --peers diffusers                  without OpenVINO
    python tools/bench.py --device cuda                      on a GPU: other contenders, same table
    python tools/bench.py --tiny                             everything on a tiny shape, to see that it runs

What is measured:
    step       one guided denoising step (both halves, DDIM) of a 512x512 image, in every precision
    control    the same with a ControlNet
    decode     the VAE decoder, latents to a 512x512 image
    int8       the step in 8 bits against bfloat16
    openvino   step and decoder against the same modules in OpenVINO, apart because of their memory
    image      whole images in 50 steps; on a GPU also a batch of 16, and the time to compile
    fast       a whole image with `--fast`, against diffusers' default: 50 steps of PNDM in float32
    agreement  how far bf16 and int8 images of 20 steps are from float32 ones, in dB
    memory     peak memory of a program that loads a model and makes a 512x512 image in two steps
    cold       a program from its start to its first PNG, with the embedded model
    forms      each fast form of the CPU against torch's, under three instruction sets; a table of its own
    growth     time and memory against image size, batch and steps; with --plots as images
    xl         one guided step at the shape of Stable Diffusion XL, 1024x1024 in bf16, one contender after the other
    xl-small   the same in fp32 at 512x512; either with its peak memory

Contenders are processes of their own that wait for their turn; the table shows medians. Weights are random, which
changes neither time nor memory. "Difference" is the largest one to the output of the first contender, relative to its
largest value.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.bench_cases import CASES, Settings, cases  # noqa: E402
from tools.bench_forms import table as table_of_forms  # noqa: E402
from tools.bench_plots import plot_growth  # noqa: E402
from tools.bench_race import Result, run_program  # noqa: E402

PEERS = ("diffusers", "openvino")

# torch is imported inside the contenders: the process that measures peak memory has to be small itself, because Linux
# hands the size of a parent down to the peak of its children.


def machine(threads: int, device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"cpu": cpu, "threads": threads, "device": device, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "openvino"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def table(results: list[Result]) -> str:
    """The results as Markdown; ratios are to the first contender of each race."""
    lines = [
        "| case | what | contender | median | spread | ratio | peak memory (MB) | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: Result | None = None
    for result in results:
        if first is None or (result.case, result.what) != (first.case, first.what):
            first = result
        lines.append(f"| {' | '.join(_cells(result, first))} |")
    return "\n".join(lines)


def _cells(result: Result, first: Result) -> list[str]:
    seconds = spread = ratio = ""
    if result.seconds:
        middle = statistics.median(result.seconds)
        seconds, spread = f"{middle:.3f} s", f"{min(result.seconds):.3f} to {max(result.seconds):.3f}"
        ratio = f"{middle / statistics.median(first.seconds):.2f}"
    memory = f"{statistics.median(result.peak_mb):.0f}" if result.peak_mb else ""
    return [result.case, result.what, result.contender, seconds, spread, ratio, memory, result.difference]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ",".join([name for name in CASES if not name.startswith("xl")] + ["forms"])
    parser.add_argument("--only", default=usual, help="cases, separated by commas (default: all but those of xl)")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: where others work beside, one thread"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that everything runs")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "weights", help="the model of the cases cold and agreement"
    )
    parser.add_argument(
        "--random-model", type=Path, metavar="FOLDER", help="keep the random model here, and take it from here"
    )
    parser.add_argument("--json", type=Path, help="write every single time to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the case growth")
    args = parser.parse_args()
    for name, found, known in (("case", args.only, [*CASES, "forms"]), ("peer", args.peers, PEERS)):
        if unknown := set(filter(None, found.split(","))) - set(known):
            parser.error(f"unknown {name} {', '.join(unknown)}; there are {', '.join(known)}")
    return args


def main() -> None:
    args = arguments()
    # torch and the programs read it when they start.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    chosen = args.only.split(",")
    if "forms" in chosen:
        print(table_of_forms(args.repeat, args.tiny) + "\n")
        chosen.remove("forms")
    if not chosen:
        return
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.random_model or Path(scratch)
        shape = "tiny" if args.tiny else "sd15"
        if not all(case.startswith("xl") for case in chosen) and not (folder / "model_index.json").exists():
            run_program([sys.executable, str(ROOT / "tools" / "bench_models.py"), str(folder), "--shape", shape])
        xl = folder / "sdxl"
        if any(case.startswith("xl") for case in chosen) and not (xl / "model_index.json").exists():
            program = [sys.executable, str(ROOT / "tools" / "bench_models.py"), str(xl)]
            run_program([*program, "--shape", "tiny-sdxl" if args.tiny else "sdxl"])
        settings = Settings(
            model=folder, model_xl=xl, clock=args.clock,
            embedded=args.model, device=args.device, threads=args.threads, repeat=args.repeat,
            peers=tuple(args.peers.split(",")), size=64 if args.tiny else 512,
        )  # fmt: skip
        for case in chosen:
            print(f"... {case}", file=sys.stderr, flush=True)
            results += cases(case, settings)
            if args.json:  # after each case: a long run that is stopped leaves what it has
                report = {
                    "machine": machine(args.threads, args.device),
                    "results": [asdict(result) for result in results],
                }
                args.json.write_text(json.dumps(report, indent=2))
    print(", ".join(f"{name} {value}" for name, value in machine(args.threads, args.device).items()) + "\n")
    print(table(results))
    if args.plots:
        plot_growth(results, args.plots)


if __name__ == "__main__":
    main()
