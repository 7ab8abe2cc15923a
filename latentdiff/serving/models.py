"""The models of one worker: loaded when they are asked for, the least recently used ones given back."""

from __future__ import annotations

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from latentdiff.adapters.control.image_prompts import IPAdapter
from latentdiff.adapters.control.model import ControlNet
from latentdiff.checkpoints.tiny_vae import check_decoder_fits, load_tiny_decoder
from latentdiff.errors import CheckpointError, LatentDiffError, UsageError
from latentdiff.pipeline import Pipeline
from latentdiff.request.plan import Sampling
from latentdiff.serving.settings import WorkerSettings
from latentdiff.serving.work import Loaded

KEPT_LORAS = 8  # of each model, that prompts have named
Network = TypeVar("Network")
log = logging.getLogger(__name__)


class Models:
    """At most `settings.keep` of them are in memory, and as many ControlNets and IP-Adapters.

    Args:
        loaded: told of each model that was loaded.
    """

    def __init__(self, settings: WorkerSettings, device: str, loaded: Callable[[Loaded], object]) -> None:
        self._settings, self._device, self._loaded = settings, device, loaded
        self._kept: OrderedDict[str, Pipeline] = OrderedDict()
        self._controls: OrderedDict[tuple[str, int], ControlNet] = OrderedDict()
        self._adapters: OrderedDict[tuple[str, int], IPAdapter] = OrderedDict()
        self._decoder = load_tiny_decoder(settings.preview_decoder) if settings.preview_decoder else None

    def __getitem__(self, name: str) -> Pipeline:
        """The model of that name.

        Raises:
            LatentDiffError: it cannot be loaded.
        """
        if name not in self._kept:
            self._make_room()
            self._kept[name] = self._load(name)
        self._kept.move_to_end(name)
        return self._kept[name]

    @property
    def names(self) -> list[str]:
        """Those in memory, the least recently used one first."""
        return list(self._kept)

    def control(self, place: str) -> ControlNet:
        """The ControlNet in a file or folder, as it is there now. What a model makes of it is kept as long as it is here.

        Raises:
            LatentDiffError: it is none.
        """
        return self._opened(self._controls, place, ControlNet.load)

    def ip_adapter(self, place: str) -> IPAdapter:
        """The same of an IP-Adapter, with its image encoder."""
        load = partial(IPAdapter.load, image_encoder=self._settings.image_encoder)
        return self._opened(self._adapters, place, load)

    def preview(self, pipe: Pipeline, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, (N, C, h, w) -> (N, 3, H, W), by the tiny decoder where there is one that fits."""
        if self._decoder is not None:
            try:
                check_decoder_fits(self._decoder, pipe.vae.config)
            except CheckpointError:
                pass
            else:
                return self._decoder.to(pipe.device)(latents.to(pipe.device).float())
        return pipe.decode(latents)

    def _opened(
        self, kept: OrderedDict[tuple[str, int], Network], place: str, load: Callable[[str], Network]
    ) -> Network:
        key = place, os.stat(place).st_mtime_ns
        if key not in kept:
            while len(kept) >= max(1, self._settings.keep):
                kept.popitem(last=False)
            kept[key] = load(place)
        kept.move_to_end(key)
        return kept[key]

    def _make_room(self) -> None:
        while len(self._kept) >= max(1, self._settings.keep):
            self._kept.popitem(last=False)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(self, name: str) -> Pipeline:
        pipe = Pipeline.load(self._settings.models[name], device=self._device, **self._settings.load)
        pipe.loras.keep = KEPT_LORAS
        for file in self._settings.embeddings:
            try:
                pipe.load_embedding(file)
            except LatentDiffError as error:  # for another kind of model, say
                log.warning("%s is left out of %s: %s", file, name, error)
        height, width = pipe.default_size
        self._loaded(Loaded(name, (width, height), pipe.model_hash, *_habits(pipe)))
        return pipe


def _habits(pipe: Pipeline) -> tuple[int, float, str]:
    """Steps, guidance and sampler that the model is drawn with where nothing else is asked for."""
    try:
        own = Sampling().for_model(pipe.schedule)
    except UsageError:  # its authors' sampler is not here
        own = Sampling()
    return own.steps, own.guidance_scale, own.sampler
