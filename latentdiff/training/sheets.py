"""Sample images during training, made by the public pipeline with the model as it is at that moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from latentdiff.adapters.control.model import ControlNet
from latentdiff.checkpoints.components import Components
from latentdiff.checkpoints.control import ControlWeights
from latentdiff.image import contact_sheet, save_image, save_png
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.controlnet import ControlNetwork
from latentdiff.pipeline import Pipeline
from latentdiff.training.folder import hint_file
from latentdiff.training.sample_options import sample_options
from latentdiff.training.sections import DenoisingSection


@dataclass(frozen=True)
class Followed:
    """A ControlNet that is trained, and the hint for each prompt, of the size that is drawn."""

    network: ControlNetwork
    hints: Sequence[Image.Image]
    title = "hint"

    def maker(self, pipe: Pipeline, name: str, options: Mapping[str, Any]) -> MakeImages:
        weights = ControlWeights(
            Path(name), self.network.state_dict(), self.network.control, guessed=False, is_difference=False
        )
        control = ControlNet(weights)
        control.entry = {"file": name, "sha256": ""}  # as of the model: what it is at this step lies in no file

        def follow(prompts: Sequence[str], *, seed: Sequence[int], **more: Any) -> list[Image.Image]:
            made: list[Image.Image] = []
            for prompt, own, hint in zip(prompts, seed, self.hints, strict=True):
                size = {"width": hint.width, "height": hint.height}
                made += pipe(
                    [prompt], seed=[own], controls=[control(hint)], progress=False, **{**options, **size, **more}
                )
            return made

        return follow


class Steering(Protocol):
    """What images are made from beside their prompts.

    Attributes:
        hints: an image for each prompt, which is shown beside what is made.
        title: what stands above those.
    """

    @property
    def hints(self) -> Sequence[Image.Image]: ...

    @property
    def title(self) -> str: ...

    def maker(self, pipe: Pipeline, name: str, options: Mapping[str, Any]) -> MakeImages:
        """What makes the images of all prompts, with the options of generation; `name` is that of the model."""
        ...


class SampleSheets:
    """Images of fixed prompts with fixed seeds.

    Args:
        parts: the model that is trained; the networks are used in place.
        prompts: what to draw; none makes no images.
        settings: steps and guidance.
        folder: of the stage; the images lie in `samples/` there.
        seed: of the run; image i has seed `seed + i`, unless the options of the samples have another.
        followed: what the images follow beside their prompts.
        drawing: options of generation in place of those steps and that guidance.
    """

    def __init__(
        self,
        parts: Components,
        prompts: Sequence[str],
        settings: DenoisingSection,
        folder: Path,
        seed: int,
        followed: Steering | None = None,
        drawing: Mapping[str, Any] | None = None,
    ) -> None:
        self._followed = followed
        usual = drawing or {"steps": settings.sample_steps, "guidance_scale": settings.sample_guidance}
        self._drawing = {**usual, **sample_options(settings.sample_options)}
        self._parts, self._prompts = parts, list(prompts)
        self._folder, self._seed = folder, seed
        self.written: list[Path] = []

    def write(self, step: int, weights: str) -> None:
        """Write the images of a step; `weights` is "ema" or "raw"."""
        if not self._prompts:
            return
        networks = (self._parts.unet, self._parts.text_encoder, self._parts.vae)
        modes = [network.training for network in networks]
        self._parts.vae.to(self._parts.unet.conv_in.weight.device)
        # Not the hash: what the model is at this step lies in no file.
        name = f"{self._parts.name}, trained in {self._folder.name}, step {step}, {weights} weights"
        pipe = Pipeline.from_components(replace(self._parts, name=name, hash=""))
        options = dict(self._drawing)
        seed = options.pop("seed", self._seed)
        folder, followed = sample_folder(self._folder, step, weights), self._followed
        make = followed.maker(pipe, name, options) if followed else partial(pipe, progress=False, **options)
        hints, title = (followed.hints, followed.title) if followed else ([], "")
        with use_attention_backend("sdpa"):
            write_samples(make, self._prompts, folder, seed=seed, hints=hints, title=title)
        if weights == "ema":
            self.written = [folder / f"{number:02d}.png" for number in range(len(self._prompts))]
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)


class MakeImages(Protocol):
    """The public Pipeline with the settings of the samples already given, or anything that is called like it."""

    def __call__(self, prompt: Sequence[str], *, seed: Sequence[int], **options: Any) -> list[Image.Image]: ...


def sample_folder(run: Path, step: int, weights: str) -> Path:
    """Where the images of a step lie; `weights` is "ema" or "raw"."""
    return run / "samples" / f"step-{step:08d}" / weights


def write_samples(
    make: MakeImages,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int,
    hints: Sequence[Image.Image] = (),
    title: str = "hint",
) -> list[Image.Image]:
    """Make one image of each prompt, write each with its recipe as `00.png`, `01.png` ..., and all of them as
    `sheet.png`, each beside the hint that it followed.

    Image i has seed `seed + i`; the same prompts and seed at every step show what the steps changed.
    """
    images = make(prompts, seed=[seed + index for index in range(len(prompts))])
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:02d}.png")
    for index, hint in enumerate(hints):
        save_image(hint, hint_file(folder / f"{index:02d}.png"), metadata=False)
    if hints:
        shown = [image for pair in zip(hints, images, strict=True) for image in pair]
        texts = [text for prompt in prompts for text in (title, prompt)]
        shown = [ImageOps.pad(image, shown[0].size, color="white") for image in shown]
    else:
        shown, texts = images, list(prompts)
    save_png(contact_sheet(shown, texts), folder / "sheet.png")
    return images
