"""Several servers behind one address, on one machine or many, by Ray Serve.

    pip install 'latentdiff[serve]' 'ray[serve]'
    LATENTDIFF_TOKEN=secret serve run configs.serve.deployment:app

Each replica is a whole server with a worker of its own, on the GPU that Ray gives it. OpenAI's interface needs no more than one
request, so any replica may answer; the page and AUTOMATIC1111's progress know the images of their own replica only.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from latentdiff.serving.app import make_app
from latentdiff.serving.settings import ServerSettings, WorkerSettings

MODELS = {"latentdiff-embedded": None}  # name -> what --model takes
REPLICAS = int(os.environ.get("LATENTDIFF_REPLICAS", "2"))
TOKEN = os.environ["LATENTDIFF_TOKEN"]
GPUS = float(os.environ.get("LATENTDIFF_GPUS", "0"))  # of each replica


def build() -> FastAPI:
    """The application of one replica."""
    worker = WorkerSettings(models=MODELS)
    return make_app(ServerSettings(host="0.0.0.0", token=TOKEN, worker=worker))


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=64,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1, "num_gpus": GPUS, "runtime_env": {"env_vars": {"LATENTDIFF_TOKEN": TOKEN}}},
)
@serve.ingress(build)
class Replica:
    """A server."""


app = Replica.bind()
