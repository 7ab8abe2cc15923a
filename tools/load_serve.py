"""Load `latentdiff serve`: many clients at once against one request after another.

    python tools/load_serve.py --requests 200 --clients 20

None may be lost, each image has to be the one that its request gives alone, and memory has to stay flat. Throughput is
a ratio of two servers that are measured in turns: one worker on all cores, asked for one image at a time, and a worker
for each core under all clients.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--alone", type=int, default=200, help="of them, how many are asked for one by one too")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    bodies = [body(number, chosen.steps) for number in range(chosen.requests)]
    alone, together, seconds, used = [], [], [0.0, 0.0], []
    with (
        server("--device", "cpu") as (one, _),
        server(*["--device", "cpu"] * chosen.workers) as (many, process),
        ThreadPoolExecutor(chosen.clients) as pool,
    ):
        list(map(lambda fields: asked(one, fields), bodies[:2]))  # warm
        list(pool.map(lambda fields: asked(many, fields), bodies[: 2 * chosen.clients]))
        for part in np.array_split(np.arange(len(bodies)), chosen.rounds):  # in turns, as others may use the machine
            began = time.monotonic()
            alone += [(at, asked(one, bodies[at])) for at in part[: -(-chosen.alone // chosen.rounds)]]
            between = time.monotonic()
            together += pool.map(lambda at: asked(many, bodies[at]), part)
            seconds[0] += between - began
            seconds[1] += time.monotonic() - between
            used.append(memory(process))
    slow, fast = len(alone) / seconds[0], len(together) / seconds[1]
    apart = [np.abs(image - together[at]).max() for at, image in alone]
    counts = [sum(a == 0 for a in apart), sum(a == 1 for a in apart), sum(a > 1 for a in apart)]
    print(f"one by one: {slow:.2f} images/s")
    print(f"{chosen.clients} clients, {chosen.workers} workers: {fast:.2f} images/s, {fast / slow:.2f} times as many")
    print(f"lost: {len(bodies) - len(together)} of {len(bodies)}")
    print(f"of {len(apart)} images, {counts[0]} are equal, {counts[1]} off by 1 of 255, {counts[2]} by more")
    print(f"memory after each round: {', '.join(f'{each:.0f}' for each in used)} MB")
    return int(counts[2] > 0 or len(together) < len(bodies))


if __name__ == "__main__":
    sys.exit(main())
