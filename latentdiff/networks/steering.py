"""From a network and encoded prompts to a denoiser that follows them: composed where they have parts, another one at each
stage; and never NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import is_asynchronous
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
from latentdiff.errors import UsageError
from latentdiff.networks.conditioning import AnyConditioning, Applied, Conditioning, by_groups
from latentdiff.networks.device import finite_or_float32
from latentdiff.networks.sizes import Told
from latentdiff.networks.text_embedding import EncodedPrompt
from latentdiff.networks.unet import UNet

if TYPE_CHECKING:
    from latentdiff.networks.regional import Regions, View

# (x (N, C, h, w), t, text embeddings and sizes, or what `UNet.project_context` made of them) -> raw (N, C_out, h, w).
# Where something is added to the skips, a fourth argument, the residuals, which only the U-Net's own modules take.
Network = Callable[..., Tensor]

_AS_WIDE_AS_FLOAT32 = (torch.bfloat16, torch.float32)  # in their exponents


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
        model: what computes `unet`, see `checked_model`.
        positive, negative: what each of the images follows and avoids; negatives have one part.
        levels: what will be walked; stages count its steps.
        extra_channels: (N, E, h, w), what an inpainting U-Net sees after the latents.
        sizes: what U-Nets of SDXL are told beside the texts.
        controls: what steers besides.
        regions: prompts for parts of the images.

    Raises:
        UsageError: regions or guidance by an image, and a prompt of several parts.
    """
    is_plain = all(prompt.is_plain for prompt in positive)
    if guidance.image_scale != 1.0 and not is_plain:
        raise UsageError("guidance by an image goes with prompts without AND; leave AND out, or set its scale to 1")
    if regions is not None:
        from latentdiff.networks.regional import check_is_plain, regional_model

        check_is_plain(is_plain)
        model = regional_model(model)
    weakened = None
    if guidance.weakening:
        from latentdiff.networks.weakened import weakened_model

        weakened = weakened_model(model, unet, guidance.weakening)
    images = [image for image, prompt in enumerate(positive) for _ in prompt.parts]
    weights = [part.weight for prompt in positive for part in prompt.parts]
    made: dict[tuple[int, ...], Denoiser] = {}

    def conditioning(
        texts: Sequence[Tensor],
        of: Sequence[int],
        told: Tensor | None,
        *,
        view: View | None = None,
        sees: bool = True,
        **more: Any,
    ) -> AnyConditioning:
        extra = None if extra_channels is None else extra_channels[list(of)]
        extra = extra if sees or extra is None else torch.zeros_like(extra)
        own = controls
        if view is not None:
            extra = None if extra is None else view.of(extra)
            own = [control.within(view.rows, view.columns) for control in controls]
        told = told if told is None or len(told) == 1 else told[list(of)]
        same: dict[str, Any] = {"controls": own, **more}
        if len({text.shape[1] for text in texts}) == 1:
            return Conditioning.of(unet, torch.cat(list(texts)), extra_channels=extra, sizes=told, **same)
        extras, each = (_of_each(rows, len(texts)) for rows in (extra, told))
        return Conditioning.cat(
            [
                Conditioning.of(unet, text, extra_channels=seen, sizes=own, **same)
                for text, seen, own in zip(texts, extras, each, strict=True)
            ]
        )

    def regional(
        whole: AnyConditioning, told: Tensor | None, avoided: Sequence[Tensor] | None = None, **more: Any
    ) -> Any:
        if regions is None:
            return whole
        from latentdiff.networks.regional import RegionalConditioning

        parts = [
            (one.view, conditioning(
                [one.text] * len(positive) if avoided is None else avoided, range(len(positive)), told,
                view=one.view, avoided=avoided is not None, **more,
            ))
            for one in regions.regions
        ]  # fmt: skip
        return RegionalConditioning(whole, regions.common, tuple(parts))

    def avoiding(texts: Sequence[Tensor], told: Tensor | None, **more: Any) -> Any:
        whole = conditioning(texts, range(len(negative)), told, avoided=True, **more)
        return regional(whole, told, texts, **more)

    def of_step(step: int) -> Denoiser:
        texts = [part.at(step) for prompt in positive for part in prompt.parts]
        avoided = [prompt.parts[0].at(step) for prompt in negative]
        key = tuple(map(id, (*texts, *avoided)))
        if key not in made:
            told = (None, None) if sizes is None else (sizes.positive, sizes.negative)
            followed = regional(conditioning(texts, images, told[0]), told[0])
            away = avoiding(avoided, told[1])
            if is_plain:
                unseen = avoiding(avoided, told[1], sees=False) if guidance.image_scale != 1.0 else None
                made[key] = guided_denoiser(model, parameterization, followed, away, guidance, weakened, unseen)
            else:
                made[key] = composed_denoiser(
                    model, parameterization, Composition(followed, images, weights), away, guidance, weakened
                )
        return made[key]

    is_staged = any(len(part.stages) > 1 for prompt in (*positive, *negative) for part in prompt.parts)
    return staged_denoiser(of_step, levels) if is_staged else of_step(1)


def _of_each(rows: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """Rows (N, ...), or one for all, one by one."""
    return [None] * count if rows is None else rows.expand(count, *rows.shape[1:]).split(1)


def checked_model(network: Network, unet: UNet, levels: Sequence[Level]) -> Model:
    """The network as a function (x, t, Conditioning) -> raw output that is finite, or an error that names the step.

    Args:
        network: what computes `unet`; `unet` itself, or what an engine made of it.
        unet: computes again, in float32, what overflows.
    """

    def place(t: float) -> str:
        number = next((number for number, level in enumerate(levels[:-1], 1) if level.t == t), None)
        return f"at timestep {t:g}" if number is None else f"at step {number} of {len(levels) - 1}"

    def run(latents: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        x = latents
        if conditioning.extra_channels is not None:
            x = torch.cat([x, conditioning.extra_channels.to(x)], dim=1)

        def compute(dtype: torch.dtype) -> Tensor:
            computes = network if dtype == conditioning.dtype else unet
            residuals = conditioning.residuals(latents, t, dtype)
            added = () if residuals is None else (residuals,)
            with conditioning.with_features(unet, t, dtype):
                return computes(x.to(dtype), t, conditioning.context_in(dtype, t, unet), *added)

        if is_asynchronous(x.device) and conditioning.dtype in _AS_WIDE_AS_FLOAT32:
            # Float32 would overflow as well; the loop checks, and need not wait.
            return compute(next(unet.parameters()).dtype)
        return finite_or_float32("the U-Net", unet, compute, where=lambda: place(t))

    def model(x: Tensor, t: float, conditioning: AnyConditioning) -> Tensor:
        return by_groups(conditioning, x, lambda rows, part: run(rows, t, part))

    return model
