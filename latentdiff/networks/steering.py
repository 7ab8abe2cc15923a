"""From encoded prompts to a denoiser that follows them: composed where they have parts, another one at each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import (
    Composition,
    Guidance,
    Model,
    composed_denoiser,
    guided_denoiser,
    staged_denoiser,
)
from latentdiff.diffusion.parameterization import Denoiser, Parameterization
from latentdiff.diffusion.schedule import Level
from latentdiff.networks.conditioning import AnyConditioning, Applied, Conditioning
from latentdiff.networks.regional import RegionalConditioning, Regions, View, check_is_plain, regional_model
from latentdiff.networks.sizes import Told
from latentdiff.networks.text_embedding import EncodedPrompt
from latentdiff.networks.unet import UNet
from latentdiff.networks.weakened import weakened_model


def prompted_denoiser(
    unet: UNet,
    model: Model,
    parameterization: Parameterization,
    positive: Sequence[EncodedPrompt],
    negative: Sequence[EncodedPrompt],
    guidance: Guidance,
    levels: Sequence[Level],
    *,
    extra_channels: Tensor | None = None,
    sizes: Told | None = None,
    controls: Sequence[Applied] = (),
    regions: Regions | None = None,
) -> Denoiser:
    """A denoiser for a batch of N images.

    Args:
        model: what computes `unet`, see `functions.checked_model`.
        positive, negative: what each of the images follows and avoids; negatives have one part.
        levels: what will be walked; stages count its steps.
        extra_channels: (N, E, h, w), what an inpainting U-Net sees after the latents.
        sizes: what U-Nets of SDXL are told beside the texts.
        controls: what steers besides.
        regions: prompts for parts of the images.

    Raises:
        UsageError: regions, and a prompt of several parts.
    """
    if regions is not None:
        check_is_plain(all(prompt.is_plain for prompt in positive))
        model = regional_model(model)
    weakened = weakened_model(model, unet, guidance.weakening) if guidance.weakening else None
    images = [image for image, prompt in enumerate(positive) for _ in prompt.parts]
    weights = [part.weight for prompt in positive for part in prompt.parts]
    made: dict[tuple[int, ...], Denoiser] = {}

    def conditioning(
        texts: Sequence[Tensor], of: Sequence[int], told: Tensor | None, *, view: View | None = None, **more: Any
    ) -> AnyConditioning:
        extra = None if extra_channels is None else extra_channels[list(of)]
        own = controls
        if view is not None:
            extra = None if extra is None else view.of(extra)
            own = [control.within(view.rows, view.columns) for control in controls]
        same: dict[str, Any] = {"sizes": told, "controls": own, **more}
        if len({text.shape[1] for text in texts}) == 1:
            return Conditioning.of(unet, torch.cat(list(texts)), extra_channels=extra, **same)
        extras = [None] * len(texts) if extra is None else extra.split(1)
        return Conditioning.cat(
            [Conditioning.of(unet, text, extra_channels=own, **same) for text, own in zip(texts, extras, strict=True)]
        )

    def regional(whole: AnyConditioning, told: Tensor | None, avoided: Sequence[Tensor] | None = None) -> Any:
        if regions is None:
            return whole
        parts = [
            (one.view, conditioning(
                [one.text] * len(positive) if avoided is None else avoided, range(len(positive)), told,
                view=one.view, avoided=avoided is not None,
            ))
            for one in regions.regions
        ]  # fmt: skip
        return RegionalConditioning(whole, regions.common, tuple(parts))

    def of_step(step: int) -> Denoiser:
        texts = [part.at(step) for prompt in positive for part in prompt.parts]
        avoided = [prompt.parts[0].at(step) for prompt in negative]
        key = tuple(map(id, (*texts, *avoided)))
        if key not in made:
            told = (None, None) if sizes is None else (sizes.positive, sizes.negative)
            followed = regional(conditioning(texts, images, told[0]), told[0])
            away = regional(conditioning(avoided, range(len(negative)), told[1], avoided=True), told[1], avoided)
            if all(prompt.is_plain for prompt in positive):
                made[key] = guided_denoiser(model, parameterization, followed, away, guidance, weakened)
            else:
                made[key] = composed_denoiser(
                    model, parameterization, Composition(followed, images, weights), away, guidance, weakened
                )
        return made[key]

    is_staged = any(len(part.stages) > 1 for prompt in (*positive, *negative) for part in prompt.parts)
    return staged_denoiser(of_step, levels) if is_staged else of_step(1)
