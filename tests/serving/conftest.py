"""A server in a thread of this process, at a port that the system chooses, with its workers beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
requests = pytest.importorskip("requests")

from latentdiff.serving.app import Server, make_server  # noqa: E402
from latentdiff.serving.engine import Engine  # noqa: E402
from latentdiff.serving.settings import Limits, ServerSettings, WorkerSettings  # noqa: E402
from tests import peers  # noqa: E402
from tests.adapters.control import adapters  # noqa: E402
from tests.adapters.control.nets import saved  # noqa: E402

PATIENCE = 120.0  # seconds, for machines under load


@dataclass(frozen=True)
class Running:
    """A server that answers, and its insides."""

    server: Server
    engine: Engine
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=PATIENCE, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=PATIENCE, **options)


@contextmanager
def running(**settings: Any) -> Iterator[Running]:
    """A server that has begun to listen; its workers may still be loading."""
    server = make_server(ServerSettings(port=0, grace=20.0, **settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(server, server.config.app.state.engine, port)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = PATIENCE) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def tiny_worker(**settings: Any) -> WorkerSettings:
    models = {"sd1": str(peers.folder("sd1")), "sd2": str(peers.folder("sd2"))}
    return WorkerSettings(models=models, keep=1, load={"precision": "fp32"}, **settings)


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Running]:
    """Two tiny models of which one is kept, a ControlNet and IP-Adapters, on the CPU; shared, so tests leave it as it is."""
    place = tmp_path_factory.mktemp("served")
    limits = Limits(side=128, pixels=128 * 128, steps=60, images=8, queue=24)
    (place / "adapters").mkdir()
    for kind, suffix in (("plain", ".bin"), ("plus", ".bin"), ("plus", ".safetensors")):
        adapters.saved(place / "adapters", "sd1", kind, suffix=suffix)
    folders = {"out": place / "images", "controls": saved(place / "controls").parent, "ip_adapters": place / "adapters"}
    with running(worker=tiny_worker(), devices=("cpu",), **folders, limits=limits) as found:
        wait_for(lambda: found.engine.workers.ready)
        yield found


@pytest.fixture(scope="session")
def scene() -> Path:
    """A square image of the embedded model."""
    return Path(__file__).parents[2] / "examples" / "scene.png"
