"""The networks of a model: what computes them, what their sizes say, and which threads may use them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.device import apart_from_torch
from latentdiff.errors import UsageError
from latentdiff.memory.residence import Residence
from latentdiff.memory.sharing import Sharing
from latentdiff.networks.inputs import INPAINTING
from latentdiff.networks.sizes import SizeOptions, Told
from latentdiff.networks.steering import Network
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE, LatentDecoder

if TYPE_CHECKING:
    from latentdiff.networks.text_encoder import TextEncoder
    from latentdiff.networks.text_encoders import TextEncoders


class ModelParts:
    """Text encoder, U-Net and VAE; each is read from its file when it is first asked for.

    Threads draw at the same time on a resident model in float32; in all other modes one call waits for the other. What
    changes the model (`load_lora`, `to`, ...) waits for drawings and is waited for by them. So each image is the one
    that is made without other threads.
    """

    residence: Residence
    sharing: Sharing
    backend: Any
    inputs: str  # what the U-Net sees besides latents and text; see `networks.inputs`
    told_count: int  # how many sizes it is told beside the text
    _network: Network | None = None  # what an engine made of the U-Net
    _decoder: LatentDecoder | None = None

    @property
    def text_encoder(self) -> TextEncoder | TextEncoders:
        """Token ids (N, L) -> embeddings (N, L, C); of SDXL with pooled text in a row more."""
        return self.residence.ready("text_encoder")

    @property
    def unet(self) -> UNet:
        """Noisy latents, timestep and text -> raw prediction."""
        return self.residence.ready("unet")

    @property
    def vae(self) -> VAE:
        """Images to latents and back."""
        return self.residence.ready("vae")

    @property
    def network(self) -> Network:
        """What computes the U-Net: itself, or what an engine made of it; see `latentdiff.engines`."""
        return self._network or self.unet

    @network.setter
    def network(self, network: Network) -> None:
        self._network = None if network is self.residence.module("unet") else network

    @property
    def decoder(self) -> LatentDecoder:
        """What computes `vae.decode`."""
        return self._decoder or self.vae.decode

    @decoder.setter
    def decoder(self, decoder: LatentDecoder) -> None:
        self._decoder = None if decoder == self.residence.module("vae").decode else decoder

    def changes_in_use(self) -> bool:
        """Whether drawing puts something on the modules: an engine's forms, the guidance scale that a U-Net is told, or
        what the residence does."""
        has_engine = self._network is not None or self._decoder is not None
        is_told = self.residence.module("unet").config.time_cond_proj_dim is not None
        return has_engine or is_told or self.residence.changes_in_use

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was trained on."""
        side = self.residence.module("unet").config.sample_size * self.residence.module("vae").config.downscale
        return side, side

    def told(self, height: int, width: int, options: SizeOptions = SizeOptions()) -> Told | None:  # noqa: B008
        """What the U-Net is told beside the text of an image of this size in pixels; None if it is told nothing.

        Raises:
            UsageError: something else than the defaults is to be told to one that is told nothing.
        """
        if self.told_count:
            return options.told(self.told_count, height, width)
        if options != SizeOptions():
            raise UsageError("this model is not told sizes, crops or scores, which those of SDXL are; leave them out")
        return None

    @property
    def device(self) -> torch.device:
        """Where the model lies and latents are made."""
        return self.residence.device

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the U-Net sees, after the latents, a mask and the latents of the image under it."""
        return self.inputs == INPAINTING

    @contextmanager
    def in_use(self, *, alone: bool = False) -> Generator[None, None, None]:
        """Inside, no other thread changes the model; with `alone`, no other one uses it either. It may be nested.

        Raises:
            UsageError: this process was forked from the one that loaded the model, and has not what it needs.
        """
        if self.sharing.is_forked:
            self._check_fork()
        with self.sharing.entered(alone=alone), apart_from_torch(self.residence.device.type):
            yield

    @contextmanager
    def alone(self) -> Generator[None, None, None]:
        """Keep the model to this thread for several calls: `load_lora`, draw, `unload_lora`, say, which other threads
        then never see. Prompts that name LoRAs (`offer_loras`) need it not.
        """
        with self.in_use(alone=True):
            yield

    def _check_fork(self) -> None:
        threads = torch.get_num_threads()
        reasons = {
            "another thread was changing the model then": self.sharing.is_spoilt,
            "a model on a GPU does not come along": self.residence.device.type != "cpu",
            "the thread that streams its weights did not come along": self.residence.low_memory,
            f"the threads of the back end {self.backend} did not come along": self.backend != "torch",
            f"torch's {threads} threads did not come along; call torch.set_num_threads(1)": threads > 1,
        }
        if found := next((reason for reason, holds in reasons.items() if holds), None):
            raise UsageError(
                f"this process was forked from the one that loaded the model, and {found}; or load the model here, or "
                "start the process by spawn"
            )
