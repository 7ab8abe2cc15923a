"""The networks of a model, what computes them, and what their sizes say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from latentdiff.memory.residence import Residence
from latentdiff.networks.functions import Decoder, Network
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE

if TYPE_CHECKING:
    from latentdiff.networks.text_encoder import TextEncoder
    from latentdiff.networks.text_encoders import TextEncoders


class ModelParts:
    """Text encoder, U-Net and VAE; each is read from its file when it is first asked for."""

    residence: Residence
    _network: Network | None = None  # what an engine made of the U-Net
    _decoder: Decoder | None = None

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
    def decoder(self) -> Decoder:
        """What computes `vae.decode`."""
        return self._decoder or self.vae.decode

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        self._decoder = None if decoder == self.residence.module("vae").decode else decoder

    @property
    def _changes_in_use(self) -> bool:
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

    @property
    def device(self) -> torch.device:
        """Where the model lies and latents are made."""
        return self.residence.device

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the U-Net sees, after the latents, a mask and the latents of the image under it."""
        return (
            self.residence.module("unet").config.in_channels
            == 2 * self.residence.module("vae").config.latent_channels + 1
        )
