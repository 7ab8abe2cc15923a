"""Workers die, stop, share the work, and change models; clients leave."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from latentdiff.serving.settings import WorkerSettings
from tests import peers
from tests.serving.conftest import PATIENCE, Running, running, tiny_worker, wait_for

ROOT = Path(__file__).parents[2]
LONG = {"model": "sd1", "prompt": "a cat", "steps": 50, "size": "96x96"}


def array(answer: requests.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    file = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def ask(server: Running, **body: object) -> requests.Response:
    return server.post("/v1/images/generations", {"prompt": "a cat", "steps": 3, **body})


def test_requests_that_come_together_are_images_made_alone(served):
    """In one batch of four, by the metrics; with the pixels that each has alone."""
    prompts = ["a cat", "a dog", "a fox", "a rocket"]
    blocked = threading.Thread(target=lambda: served.post("/v1/images/generations", LONG))
    blocked.start()
    wait_for(lambda: served.engine.queue.in_making)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: array(ask(served, prompt=prompt, seed=4, steps=4)), prompts))
    blocked.join()
    pipe = peers.ours("sd1")
    for prompt, image in zip(prompts, found, strict=True):
        alone = np.asarray(pipe(prompt, seed=4, steps=4)[0]).astype(int)
        assert np.abs(image - alone).max() <= 1


def test_two_workers_and_one_that_is_killed(tmp_path):
    with running(worker=tiny_worker(), devices=("cpu", "cpu")) as server:
        wait_for(lambda: len(server.engine.workers.ready) == 2)
        first, second = server.engine.workers.processes
        assert first != second
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask, server, **LONG, seed=seed) for seed in range(2)]
            wait_for(lambda: sum(len(job.steps) for job in server.engine.queue.jobs) >= 2)
            os.kill(first, signal.SIGKILL)
            assert [answer.result().status_code for answer in answers] == [200, 200], "made again"
        wait_for(lambda: len(server.engine.workers.ready) == 2)
        assert server.engine.workers.restarts == 1 and first not in server.engine.workers.processes
        assert "latentdiff_worker_deaths 1.0" in server.get("/metrics").text
        assert ask(server).status_code == 200


@pytest.mark.slow
def test_an_image_that_kills_every_worker_is_given_up():
    with running(worker=tiny_worker(), devices=("cpu",)) as server:
        wait_for(lambda: server.engine.workers.ready)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, server, **LONG)
            for deaths in (1, 2):
                wait_for(lambda: any(job.steps for job in server.engine.queue.jobs))
                for job in server.engine.queue.jobs:
                    job.steps.clear()
                for process in server.engine.workers.processes:
                    os.kill(process, signal.SIGKILL)
                wait_for(lambda deaths=deaths: server.engine.workers.restarts == deaths)
            assert answer.result().status_code == 503
            assert "the worker died" in answer.result().json()["error"]["message"]


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    command = [sys.executable, "-m", "latentdiff", "serve", "--model", str(tmp_path / "nothing"), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error:") and "nothing" in line


def test_a_second_model_that_cannot_be_loaded_fails_its_requests_alone(tmp_path):
    models = {"good": str(peers.folder("sd1")), "bad": str(tmp_path / "nothing")}
    with running(worker=WorkerSettings(models=models), devices=("cpu",)) as server:
        answer = ask(server, model="bad")
        assert answer.status_code == 500 and "nothing" in answer.json()["error"]["message"]
        assert ask(server, model="good").status_code == 200


def test_whoever_leaves_is_not_drawn_for(served):
    with pytest.raises(requests.Timeout):
        requests.post(f"{served.url}/v1/images/generations", json={**LONG, "n": 8}, timeout=1.0)
    wait_for(lambda: served.engine.queue.in_making == len(served.engine.queue) == 0, 20)
    with requests.post(f"{served.url}/v1/images/generations", json={**LONG, "n": 8, "stream": True}, stream=True, timeout=9):
        wait_for(lambda: served.engine.queue.in_making)
    wait_for(lambda: served.engine.queue.in_making == len(served.engine.queue) == 0, 20)


def test_metrics_tell_of_requests_and_images(served):
    ask(served)
    found = served.get("/metrics").text
    assert 'latentdiff_requests_total{route="/v1/images/generations",status="200"}' in found
    assert 'latentdiff_images_total{outcome="made"}' in found and "latentdiff_workers_ready 1.0" in found
    assert served.get("/ready").json() == {"ready": True}
    served.get("/" + "x" * 50)
    assert "xxxxx" not in served.get("/metrics").text, "what is asked for does not become a label"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stop_finishes_what_is_made_and_hands_back_what_waits(tmp_path, number):
    """The command itself: from its line on the terminal to its last answers."""
    words = ["serve", "--model", f"m={peers.folder('sd1')}", "--port", "0", "--limit", "batch=1"]
    command = [sys.executable, "-m", "latentdiff", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[3]
        wait_for(lambda: requests.get(f"{url}ready", timeout=9).status_code == 200)
        body = {"prompt": "a cat", "steps": 60}
        with ThreadPoolExecutor(3) as pool:
            answers = [
                pool.submit(requests.post, f"{url}v1/images/generations", json=body, timeout=PATIENCE) for _ in range(3)
            ]
            wait_for(lambda: "latentdiff_queue_images 2.0" in requests.get(f"{url}metrics", timeout=9).text)
            process.send_signal(number)
            found = sorted(answer.result().status_code for answer in answers)
        assert found == [200, 503, 503]
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_the_server_itself_loads_no_torch():
    code = "import sys, latentdiff.serving.app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False False\n"


def test_without_the_extra_one_line_says_how_to_install_it(tmp_path):
    code = "import sys; sys.modules['fastapi'] = None\nfrom latentdiff.cli import run; sys.exit(run(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: the server needs fastapi, which is not installed; install it: pip install 'latentdiff[serve]'"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "expected a token"),
        (["--limit", "size=3"], "expected --limit with one of"),
        (["--limit", "steps"], "expected --limit NAME=NUMBER"),
        (["--lora", "nowhere"], "there is no folder nowhere"),
        (["--model", "a=x", "--model", "a=y"], "each name once"),
        (["--port", "PORT"], "choose another --port"),
    ],
)
def test_wrong_usage_is_one_line(served, capsys, arguments, message):
    from latentdiff.cli import run

    assert run(["serve", *(str(served.port) if word == "PORT" else word for word in arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and message in line


def test_it_answers_soon():
    """Before any model is loaded."""
    began = time.monotonic()
    with running(worker=tiny_worker(), devices=("cpu",)) as server:
        assert server.get("/").status_code == 200 and not server.engine.workers.ready
        assert time.monotonic() - began < 20


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A server with a folder of LoRAs, and a word that its models learn."""
    from safetensors.torch import save_file

    from latentdiff.adapters.lora.saving import save_lora
    from tests.adapters.lora.conftest import make

    folder = tmp_path_factory.mktemp("adapted")
    pipe = peers.ours("sd1")
    (folder / "loras" / "inks").mkdir(parents=True)
    save_lora(make(pipe, ("attention",), seed=2), folder / "loras" / "inks" / "ink.safetensors")
    vector = pipe.text_encoder.state_dict()["text_model.embeddings.token_embedding.weight"][7:8].clone() * 3
    save_file({"emb_params": vector}, folder / "sparkle.safetensors")
    worker = tiny_worker(embeddings=(str(folder / "sparkle.safetensors"),))
    with running(worker=worker, devices=("cpu",), loras=folder / "loras") as server:
        wait_for(lambda: server.engine.workers.ready)
        yield server, folder


def test_prompts_name_loras_and_words(adapted):
    server, folder = adapted
    assert server.get("/sdapi/v1/loras").json()[0]["name"] == "ink"
    pipe = peers.ours("sd1")
    pipe.offer_loras(folder / "loras")
    pipe.load_embedding(folder / "sparkle.safetensors")
    plain = array(ask(server, seed=1))
    for prompt in ("a cat <lora:ink:0.8>", "a sparkle"):
        found = array(ask(server, prompt=prompt, seed=1))
        own = np.asarray(pipe(prompt, seed=1, steps=3)[0]).astype(int)
        assert np.abs(found - own).max() <= 1 and np.abs(found - plain).max() > 1
    assert np.abs(array(ask(server, seed=1)) - plain).max() == 0, "the LoRA is gone again"


def test_a_lora_that_comes_later_is_found_and_previews_work_with_it(adapted):
    import shutil

    server, folder = adapted
    shutil.copy(folder / "loras" / "inks" / "ink.safetensors", folder / "loras" / "later.safetensors")
    body = {"prompt": "a cat <lora:later>", "steps": 4, "stream": True, "partial_images": 1}
    events = server.post("/v1/images/generations", body).text
    assert "event: image_generation.partial_image" in events and "event: image_generation.completed" in events
    answer = ask(server, prompt="a cat <lora:inc>")
    assert answer.status_code == 400 and "did you mean 'ink'" in answer.json()["error"]["message"]
