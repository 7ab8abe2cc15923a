"""Run for long and watch the memory: images of one Pipeline, and samples of streamed shards, each in this process.

    python tools/soak.py --images 2000 --samples 200000

Prints the resident memory at ten moments of each. The exit code is 1 if it grew by more than 5% from the second tenth,
when caches are filled, to the last.
"""

from __future__ import annotations

import argparse
import gc
import io
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

GROWTH = 1.05


def resident() -> float:
    """MiB of this process that are in memory and its own."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096 / 2**20  # without pages of files, which the system may take back


def soak(name: str, work: Iterator[object], count: int) -> bool:
    """Do `count` pieces of work; whether the memory stayed flat."""
    seen = []
    for number, _ in zip(range(1, count + 1), work, strict=False):
        if number % (count // 10) == 0:
            gc.collect()
            seen.append(resident())
            print(f"{name} {number:>8}: {seen[-1]:.1f} MiB", flush=True)
    return seen[-1] <= seen[1] * GROWTH


def images(folder: Path) -> Iterator[object]:
    """Images of one Pipeline: plain, with a LoRA on and off, from an image, cached, in several sizes."""
    from latentdiff.adapters.lora.adapter import LoRA
    from latentdiff.adapters.lora.saving import save_lora
    from latentdiff.adapters.lora.spec import LoRASpec
    from latentdiff.pipeline import Pipeline
    from tools.fuzzing.readers import tiny_model

    pipe = Pipeline.load(tiny_model(folder), device="cpu", precision="fp32")
    save_lora(LoRA.create(pipe.unet, pipe.text_encoder, LoRASpec(rank=2)), folder / "a.safetensors")
    number = 0
    while True:
        number += 1
        if number % 10 == 0:
            pipe.load_lora(folder / "a.safetensors", 0.5, "a")
        size = 16 + 8 * (number % 3)
        yield pipe(f"a cat {number % 50}", seed=number, steps=2, progress=False, height=size, width=size)[0]
        if number % 10 == 0:
            pipe.unload_lora()


def samples(folder: Path) -> Iterator[object]:
    """Samples of shards, streamed and decoded."""
    from latentdiff.training.data.stream import ShardStream

    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "PNG")
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(500):
                for suffix, data in (("png", content.getvalue()), ("txt", b"a cat")):
                    entry = tarfile.TarInfo(f"{number}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    stream = ShardStream(tuple(sorted(folder.glob("*.tar"))), 4, 0, buffer=256)
    for batch in stream.batches(lambda sample, step, row: (sample.image().size, sample.captions())):
        yield from batch.items


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=200_000)
    given = parser.parse_args()
    flat = True
    for name, make, count in (("images", images, given.images), ("samples", samples, given.samples)):
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            flat &= count < 10 or soak(name, make(Path(folder)), count)
    print("flat" if flat else f"grew by more than {GROWTH - 1:.0%}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
