"""Load `latentdiff serve`: many clients at once against one request after another.

    python tools/load_serve.py --requests 200 --clients 20

None may be lost, each image has to be the one that its request gives alone, and memory has to stay flat. Throughput is
a ratio of two servers that are measured one after the other in one run: one worker on all cores, asked for one image at
a time, and a worker for each core under all clients.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psutil
from PIL import Image

THINGS = ("cat", "dog", "fox", "rocket", "car", "guitar", "balloon")
COLOURS = ("red", "blue", "green", "yellow")


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """`latentdiff serve` at a free port, once it is ready: its address and its process."""
    command = [sys.executable, "-m", "latentdiff", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start")
        url = line.split()[3]
        while True:
            try:
                urllib.request.urlopen(f"{url}ready")
                break
            except OSError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def body(number: int, steps: int) -> dict[str, object]:
    prompt = f"a {COLOURS[number % len(COLOURS)]} {THINGS[number % len(THINGS)]}"
    return {"prompt": prompt, "seed": number, "steps": steps}


def asked(url: str, fields: dict[str, object]) -> np.ndarray:
    """The image of a request, (H, W, 3)."""
    request = urllib.request.Request(
        f"{url}v1/images/generations", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        file = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def memory(process: psutil.Process) -> float:
    """Of the server and its workers, in MB."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 1e6


def run(
    arguments: list[str], bodies: list[dict[str, object]], clients: int
) -> tuple[list[np.ndarray], float, list[float]]:
    """Images, images per second, and the memory after each quarter of the requests."""
    with server(*arguments) as (url, process), ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda fields: asked(url, fields), bodies[: 2 * clients]))  # warm
        images, seconds, used = [], 0.0, []
        for part in np.array_split(np.arange(len(bodies)), 4):
            began = time.monotonic()
            images += pool.map(lambda at: asked(url, bodies[at]), part)
            seconds += time.monotonic() - began
            used.append(memory(process))
    return images, len(bodies) / seconds, used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    bodies = [body(number, chosen.steps) for number in range(chosen.requests)]
    alone, slow, _ = run(["--device", "cpu"], bodies, 1)
    print(f"one by one: {slow:.2f} images/s", flush=True)
    together, fast, used = run(["--device", "cpu"] * chosen.workers, bodies, chosen.clients)
    apart = [np.abs(one - other).max() for one, other in zip(alone, together, strict=True)]
    print(f"{chosen.clients} clients, {chosen.workers} workers: {fast:.2f} images/s, {fast / slow:.2f} times as many")
    print(f"lost: {len(bodies) - len(together)}; pixels that differ by more than 1 of 255: {sum(a > 1 for a in apart)} images,")
    print(f"  by 1: {sum(a == 1 for a in apart)} images, equal: {sum(a == 0 for a in apart)} images")
    print(f"memory after each quarter: {', '.join(f'{each:.0f}' for each in used)} MB")
    return int(any(a > 1 for a in apart))


if __name__ == "__main__":
    sys.exit(main())
