"""Translating an image: from its inversion, sample under another prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.denoise import Callback, progress_bar
from latentdiff.diffusion.guidance import EVERYWHERE, UNGUIDED, Guidance, blended_denoiser, guided_denoiser
from latentdiff.diffusion.parameterization import Denoiser, parameterization
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.image import to_pil
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.conditioning import Conditioning
from latentdiff.networks.device import explained_out_of_memory
from latentdiff.networks.steering import checked_model
from latentdiff.networks.text_embedding import Reading
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.domains import Choice
from latentdiff.request.options import OPTIONS, BlendName, TranslationName, WalkOptions
from latentdiff.request.plan import batches, one_per_image
from latentdiff.request.sources import ImageInput
from latentdiff.request.task_options import TRANSLATE
from latentdiff.tasks.features import PnPSpec, default_spec, replay, with_source_features
from latentdiff.tasks.inversion.artefact import Inversion, given_inversion
from latentdiff.tasks.inversion.run import invert, null_text_denoiser, walk_down, with_null_text

TASK = "translate"
INVERSION_OF = {"edict": "edict"}  # how a method inverts an image, where it is not by fixed point
INJECTING = ("features", "direct")


@dataclass(frozen=True, kw_only=True)
class NegativeBlend:
    """Negative prompting of Tumanyan et al. 2023: how much of the empty prompt remains in what guidance leads away
    from.

    schedule: over the steps i of N, "linear" 1 - i / N, "constant" 1, "exponential" exp(-6 i / N), all times `alpha`.
    """

    schedule: BlendName = "linear"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        Choice(get_args(BlendName))("the negative schedule", self.schedule)
        if not 0.0 <= self.alpha <= 1.0:
            raise UsageError(f"expected a negative alpha in 0 to 1, found {self.alpha}")

    def share_of_empty(self, index: int, steps: int) -> float:
        """a_i of step `index` of `steps`."""
        share = {"linear": 1.0 - index / steps, "constant": 1.0, "exponential": math.exp(-6.0 * index / steps)}
        return self.alpha * share[self.schedule]


@dataclass(frozen=True, kw_only=True)
class TranslateSettings:
    """What a recipe holds of a translation besides the sampling; `inversion` are arguments of `invert`."""

    method: TranslationName
    source_prompt: str
    inversion: dict[str, Any]
    negative_blend: NegativeBlend | None
    pnp: PnPSpec | None


@public(WalkOptions, **TRANSLATE)
@one_use(alone=True)
@torch.no_grad()
def translate(
    pipe: Pipeline,
    source: ImageInput | Inversion,
    prompt: str | Sequence[str],
    *,
    method: TranslationName = "features",
    negative_prompt: str = "",
    negative_blend: NegativeBlend | None = None,
    source_prompt: str = "",
    steps: int | None = None,
    guidance_scale: float | None = None,
    spec: PnPSpec | None = None,
    tau_f: float | None = None,
    tau_attn: float | None = None,
    inversion: dict[str, Any] | None = None,
    **options: Unpack[WalkOptions],
) -> list[Image.Image]:
    """Make the image again as each prompt says, keeping its layout.

    Args:
        source: an image (PIL image or path), or its inversion (path or `Inversion`).
        prompt: one or several; each gives one image.
        method: what holds the result to the source. Cost in evaluations of one image per step, inversion apart:
            "features"         plug-and-play features: its decoder features and self-attention; 3
            "direct"           its self-attention only, held on the stored trajectory (direct inversion); 3
            "null-text"        the same noise, and null embeddings that make its own reconstruction exact; 2
            "negative-prompt"  the same noise, guided away from `source_prompt`; 2
            "edict"            the same exactly inverted noise; 4
            "ddim"             the same noise and nothing else; 2
            "replay"           everything: the source comes out again, whatever the prompt; 1
        negative_prompt: what to avoid.
        negative_blend: fade from the empty to the negative prompt; None guides away from the negative prompt
            throughout.
        source_prompt: what the image shows; that of an inversion is kept in it.
        steps: None is 50, or those of the inversion; fewer thin its trajectory out.
        guidance_scale: None is 5, or what the inversion was made for ("null-text", "edict").
        spec: blocks and shares of "features" and "direct"; None is `default_spec`. "direct" takes no features.
        tau_f: 0 to 1, another share of the steps with features than that of the specification.
        tau_attn: likewise with self-attention.
        inversion: further arguments of `invert`, where `source` is an image.
        options: see `WalkOptions`: guidance_rescale, guidance_interval, prompt_syntax, clip_skip,
            batch_size, callback, progress.

    Returns:
        PIL images of the source's size, with their recipe in `image.info`.

    Raises:
        UsageError: an argument outside its domain, or one that the method has no use for.
        CheckpointError: the inversion was made with another model.
        Cancelled: the callback returned False.
    """
    if method not in INJECTING and (spec, tau_f, tau_attn) != (None, None, None):
        raise UsageError(f"expected no choice of features with the method {method}: it takes none")
    if method in ("negative-prompt", "null-text") and (negative_prompt or negative_blend):
        raise UsageError(f"expected no negative prompt with the method {method}, which has its own")
    callback, progress = options.get("callback"), options.get("progress") is not False
    pipe.check_text_to_image()
    prompts, _ = one_per_image(prompt, "", 1)
    found, described = _inverted(
        pipe, source, method, source_prompt, steps, guidance_scale, inversion or {}, callback, progress
    )
    scale = _guidance_scale(found, method, guidance_scale)
    rescale, interval = options.get("guidance_rescale") or 0.0, options.get("guidance_interval")
    guidance = Guidance(scale=scale, rescale=rescale, interval=interval or EVERYWHERE)
    chosen = _specification(pipe, method, spec, tau_f, tau_attn)
    reading = Reading(
        options.get("prompt_syntax") or OPTIONS["prompt_syntax"].default,
        options.get("clip_skip") or OPTIONS["clip_skip"].default,
    )
    parts = batches(len(prompts), options.get("batch_size"))
    settings = TranslateSettings(
        method=method, source_prompt=found.prompt, inversion=found.settings, negative_blend=negative_blend, pnp=chosen
    )
    if method == "null-text" and found.nulls is None:
        with explained_out_of_memory(), progress_bar(found.steps, progress) as bar:
            found = with_null_text(pipe, found, scale, callback=callback, bar=bar)
    images = []
    with explained_out_of_memory(), progress_bar(found.steps * len(parts), progress) as bar:
        for part in parts:
            edit = _Edit(pipe, found, method, prompts[part], negative_prompt, negative_blend, guidance, chosen, reading)
            latents = walk_down(pipe, found, edit.denoiser(), len(prompts[part]), callback=callback, bar=bar)
            images += [image.crop((0, 0, *found.size)) for image in to_pil(pipe.decode(latents))]
    for image, text in zip(images, prompts, strict=True):
        recipe = pipe.recipe(
            prompt=text,
            negative_prompt=negative_prompt,
            seed=0,
            steps=found.steps,
            sampler="ddim",
            guidance_scale=scale,
            guidance_rescale=rescale,
            prompt_syntax=reading.syntax,
            clip_skip=reading.clip_skip,
            guidance_interval=interval,
            spacing=found.settings["spacing"] or pipe.schedule.config.timestep_spacing,
            width=image.width,
            height=image.height,
            task=TASK,
            task_settings=asdict(settings),
            sources=described,
        )
        image.info = dict(recipe.to_chunks())
    return images


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more: from its inversion, or from the image, inverted again."""
    settings = recipe.settings_as(TranslateSettings)
    again: dict[str, Any] = {}
    if "image" in sources:
        again = {"source_prompt": settings.source_prompt, "inversion": settings.inversion}
    return translate(
        pipe,
        sources["image"] if again else sources["inversion"],
        recipe.prompt,
        method=settings.method,
        negative_prompt=recipe.negative_prompt,
        negative_blend=settings.negative_blend,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        guidance_rescale=recipe.guidance_rescale,
        prompt_syntax=recipe.prompt_syntax,
        clip_skip=recipe.clip_skip,
        guidance_interval=recipe.guidance_interval,
        spec=settings.pnp,
        **again,
    )[0]


@dataclass(frozen=True)
class _Edit:
    """One batch of prompts for one source."""

    pipe: Pipeline
    inversion: Inversion
    method: str
    prompts: list[str]
    negative_prompt: str
    blend: NegativeBlend | None
    guidance: Guidance
    spec: PnPSpec | None
    reading: Reading

    def denoiser(self) -> Denoiser:
        """What makes the targets."""
        pipe, inversion, count = self.pipe, self.inversion, len(self.prompts)
        source, sizes = inversion.embeddings.to(pipe.device), pipe.told_of_latents(inversion.latents.shape)
        positive, negative = self._encoded()
        match self.method:
            case "null-text":
                return null_text_denoiser(pipe, inversion, positive, self.guidance)
            case "negative-prompt":
                negative = source.expand_as(positive)
                return pipe.denoiser(positive, negative, self.guidance, inversion.levels, sizes=sizes)
            case "replay":
                followed = source.expand_as(positive)
                own = pipe.denoiser(followed, followed, UNGUIDED, inversion.levels, sizes=sizes)
                return replay(own, inversion.levels, inversion.latents.split(1))
            case _:
                return self._guided(positive, negative, pipe.encode([""] * count, negative=True))

    def _encoded(self) -> tuple[Tensor, Tensor]:
        """Embeddings (N, L, C) of the prompts and of what to avoid, as long as those of the source."""
        found = self.pipe.encode(self.prompts, self.reading)
        avoided = self.pipe.encode([self.negative_prompt], self.reading, negative=True)
        if not found.shape[1] == avoided.shape[1] == self.inversion.embeddings.shape[1]:
            raise UsageError(
                f"expected prompts of one chunk, {self.pipe.tokenizer.model_max_length - 2} tokens, for a translation; "
                "found a longer one"
            )
        return found, avoided.expand_as(found)

    def _guided(self, positive: Tensor, negative: Tensor, empty: Tensor) -> Denoiser:
        pipe, levels = self.pipe, self.inversion.levels
        model = checked_model(pipe.unet, pipe.unet, levels)
        if self.spec is not None:
            source = self._conditioning(self.inversion.embeddings.to(pipe.device))
            model = with_source_features(pipe.unet, model, self.spec, levels, self.inversion.latents.split(1), source)
        read = parameterization(pipe.schedule.config.prediction_type)
        wanted, avoided = map(self._conditioning, (positive, negative))
        if self.blend is None:
            return guided_denoiser(model, read, wanted, avoided, self.guidance)
        number = {level: index for index, level in enumerate(levels)}
        blend, steps = self.blend, self.inversion.steps

        def share(level: Level) -> float:
            return blend.share_of_empty(number[level], steps)

        return blended_denoiser(model, read, wanted, self._conditioning(empty), avoided, self.guidance, share)

    def _conditioning(self, text: Tensor) -> Conditioning:
        sizes = self.pipe.told_of_latents(self.inversion.latents.shape)
        return Conditioning.of(self.pipe.unet, text, sizes=sizes and sizes.positive)


def _inverted(
    pipe: Pipeline,
    source: ImageInput | Inversion,
    method: str,
    prompt: str,
    steps: int | None,
    guidance_scale: float | None,
    options: dict[str, Any],
    callback: Callback | None,
    progress: bool,
) -> tuple[Inversion, dict[str, dict[str, str]]]:
    """The inversion to edit from, and what the recipe says of the sources."""
    given = given_inversion(source)
    if not isinstance(given, tuple):
        if steps is not None:
            options = {"steps": steps, **options}
        if method == "edict" and guidance_scale is not None:
            options = {"guidance_scale": guidance_scale, **options}
        own = {"method": INVERSION_OF.get(method, "fixed-point"), "prompt": prompt, "measure": False}
        found = invert(pipe, given, **{**own, "callback": callback, "progress": progress, **options})
        return found.thinned(steps or found.steps), {"image": found.source}
    found, role = given
    if options or prompt:
        raise UsageError(
            "expected no settings of the inversion and no source prompt with an image that is inverted already"
        )
    found.check_model(pipe.model_hash)
    if method == "edict" and found.partner is None:
        raise UsageError(
            f"the method edict needs an inversion by edict, found one by {found.method}; "
            "`latentdiff invert --method edict` makes it"
        )
    if method != "edict" and found.partner is not None:
        found = replace(found, partner=None)
    return found.thinned(steps or found.steps), role


def _guidance_scale(inversion: Inversion, method: str, asked: float | None) -> float:
    """The scale asked for, where the inversion does not fix it."""
    fixed = method == "edict" or (method == "null-text" and inversion.nulls is not None)
    if not fixed:
        return 5.0 if asked is None else asked
    scale = inversion.settings["guidance_scale"]
    if asked not in (None, scale):
        raise UsageError(
            f"the inversion was made for a guidance of {scale}, found {asked}; leave it out or invert again"
        )
    return scale


def _specification(
    pipe: Pipeline, method: str, spec: PnPSpec | None, tau_f: float | None, tau_attn: float | None
) -> PnPSpec | None:
    if method not in INJECTING:
        return None
    spec = spec or default_spec(pipe.unet.config)
    shares = {"tau_f": tau_f, "tau_attn": tau_attn}
    spec = replace(spec, **{name: share for name, share in shares.items() if share is not None})
    if method == "direct":
        if tau_f:
            raise UsageError("the method direct takes no features, found tau_f; use the method features")
        spec = replace(spec, feature_blocks=())
    return spec
