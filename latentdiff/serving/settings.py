"""What `latentdiff serve` is told: where it listens, what it offers, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOCAL = ("127.0.0.1", "localhost", "::1")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for, and all of them together.

    side, pixels: of an image to be made; steps: of its walk; images: of one request.
    queue: images that wait; the next request is refused until some are done.
    prompt: characters. upload: bytes of a request with images; text: bytes of one without.
    source_pixels: of an image that is sent, told by its header before it is decoded.
    body_seconds: for a request to arrive whole.
    batch: images that are made at once.
    finished: requests of the page whose results are kept for it.
    controls: images that ControlNets follow and IP-Adapters see, of one request.
    """

    side: int = 2048
    pixels: int = 2**22
    steps: int = 200
    images: int = 16
    queue: int = 256
    prompt: int = 10_000
    upload: int = 32 * MIB
    text: int = 256 * 1024
    source_pixels: int = 2**25
    body_seconds: float = 30.0
    batch: int = 4
    finished: int = 32
    controls: int = 4


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker has to know.

    models: name -> what `Pipeline.load` takes; None is the embedded model.
    keep: models that stay in memory, and as many ControlNets and IP-Adapters.
    load: options of `Pipeline.load`.
    image_encoder: a folder, the encoder of all IP-Adapters; None looks beside each.
    embeddings: files whose words every model learns if they fit it.
    threads: of PyTorch on a CPU; None leaves it to PyTorch.
    """

    models: Mapping[str, str | None]
    keep: int = 2
    load: Mapping[str, Any] = field(default_factory=dict[str, Any])
    image_encoder: str | None = None
    embeddings: tuple[str, ...] = ()
    preview_decoder: str | None = None
    batch: int = 4
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All of it.

    devices: one worker for each; the same may come twice.
    loras: a folder of what prompts name by `<lora:name:weight>`.
    controls: a folder of ControlNets; ip_adapters: one of IP-Adapters.
    data: a folder of data sets to fine-tune on; None does not offer that.
    out: where the page keeps its images and runs; None keeps none.
    grace: seconds that images in the making have when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    devices: tuple[str, ...] = ("auto",)
    loras: Path | None = None
    controls: Path | None = None
    ip_adapters: Path | None = None
    data: Path | None = None
    out: Path | None = None
    grace: float = 30.0
    limits: Limits = Limits()
    worker: WorkerSettings

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.worker.models))
