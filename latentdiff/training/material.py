"""What a run is made of once its data is read: the images that are trained on and measured on, their caches, a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from latentdiff.files import atomic_path
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.vae import VAE
from latentdiff.training.caches import cache_latents, cache_text
from latentdiff.training.samples import Samples
from latentdiff.training.sections import DenoisingSection
from latentdiff.training.validation import fixed_part, sample_prompts


@dataclass
class Material:
    """What is learned from, and what it is measured on."""

    samples: Samples
    training: np.ndarray  # indices of `samples`
    held_out: tuple[Samples, np.ndarray]
    training_part: tuple[Samples, np.ndarray]
    reminders: frozenset[int] = frozenset()  # those in `training` that only remind the model of what it knows

    @property
    def learned(self) -> np.ndarray:
        """Those in `training` from which something new is learned."""
        return np.array([index for index in self.training if index not in self.reminders], dtype=np.int64)

    def of(self) -> list[tuple[Samples, np.ndarray]]:
        """Every image that is read, by the samples it belongs to."""
        samples, held_out = self.held_out
        if samples is not self.samples:
            return [(self.samples, self.training), self.held_out]
        return [(self.samples, np.concatenate([self.training, held_out]))]

    @property
    def cached(self) -> bool:
        """Whether all latents are, so that training needs no VAE."""
        return all(samples.latents is not None for samples, _ in self.of())

    def prompts(self, settings: DenoisingSection, seed: int) -> list[str]:
        """What is drawn during training: the prompts of `settings`, or captions, of held-out images if there are any."""
        samples, images = self._shown()
        captions = [samples.data.captions[index][0] for index in images]
        return list(settings.prompts) or sample_prompts(captions, settings.sample_count, seed)

    def hints(self, settings: DenoisingSection, seed: int) -> list[Image.Image]:
        """The hint for each of `prompts`: that of the image whose caption it is, or of any one for prompts of `settings`."""
        samples, chosen = self.drawn(settings, seed)
        return [Image.fromarray(samples.hint(index)) for index in chosen]

    def drawn(self, settings: DenoisingSection, seed: int) -> tuple[Samples, list[int]]:
        """For each of `prompts` the image whose caption it is, or any one for prompts of `settings`."""
        samples, images = self._shown()
        if settings.prompts:
            return samples, [int(images[place % len(images)]) for place in range(len(settings.prompts))]
        first = {samples.data.captions[index][0]: int(index) for index in reversed(images)}
        return samples, [first[caption] for caption in self.prompts(settings, seed)]

    def _shown(self) -> tuple[Samples, np.ndarray]:
        """The images whose captions are drawn."""
        return self.held_out if len(self.held_out[1]) else (self.samples, self.learned)

    def summary(self, batch_size: int) -> dict[str, Any]:
        """What the report says about the data."""
        samples, data = self.samples, self.samples.data
        captions = [caption for index in self.training for caption in data.captions[index]]
        buckets = Counter(samples.buckets[index] for index in self.training)
        return {
            "sources": data.layouts,
            "images": len(self.training),
            **({"pairs": len(self.training)} if data.paired else {}),
            **({"regularization": len(self.reminders)} if self.reminders else {}),
            "held_out": len(self.held_out[1]),
            "captions": len(captions),
            "captions_cut": sum(map(samples.tokens.is_cut, captions)),
            "too_small": sum(bucket is None for bucket in samples.buckets),
            "unreadable": [f"{problem.name}: {problem.reason}" for problem in data.problems],
            "notes": data.notes,
            "buckets": {f"{width}x{height}": count for (width, height), count in sorted(buckets.items())},
            "batch_size": batch_size,
        }


def material(
    samples: Samples, training: np.ndarray, held_out: tuple[Samples, np.ndarray], seed: int, reminders: Sequence[int] = ()
) -> Material:
    """Material whose training loss is measured on as many images as are held out.

    Args:
        reminders: images that are trained on beside `training`, to remind the model of what it knows.
    """
    names = [samples.data.names[index] for index in training]
    part = fixed_part(names, range(len(names)), len(held_out[1]), seed)
    both = np.concatenate([training, np.asarray(reminders, dtype=np.int64)])
    return Material(samples, both, held_out, (samples, training[part]), frozenset(map(int, reminders)))


def build_latents(of: Material, vae: VAE, settings: DenoisingSection, folder: Path, accelerator: Accelerator) -> None:
    """Encode the images where that is asked for and right; the samples read from the cache from then on."""
    if not settings.cache_latents or settings.crop != "center":
        return
    work = {}
    for samples, indices in of.of():
        work |= samples.latent_work(indices.tolist())
    latents = cache_latents(vae, work, folder, settings.cache_precision, accelerator, settings.loader_threads)
    for samples, _ in of.of():
        samples.latents = latents


def build_texts(
    of: Material, text_encoder: TextEncoder, settings: DenoisingSection, folder: Path, accelerator: Accelerator
) -> None:
    """Encode the captions where they have fixed embeddings; the samples read from the cache from then on."""
    if settings.caption_rules.rearranges or settings.long_captions != "cut":
        return  # put together again at every step, or in batches of different lengths
    captions = {
        caption for samples, indices in of.of() for index in indices for caption in samples.data.captions[index]
    }
    rows = [of.samples.tokens.rows([caption], 1)[0] for caption in sorted({"", *captions})]
    texts = cache_text(text_encoder, rows, folder, settings.cache_precision, accelerator)
    for samples, _ in of.of():
        samples.texts = texts


def announce(summary: Mapping[str, Any], path: Path, accelerator: Accelerator) -> None:
    """Write the summary of the data for the report, and say in one line what is trained on."""
    if accelerator.is_main_process:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sizes, unreadable = len(summary["buckets"]), summary["unreadable"]
    kind = "pairs of images" if "pairs" in summary else "images"
    parts = [f"training on {summary['images']} {kind}" + (f" in {sizes} sizes" if sizes > 1 else "")]
    if summary["held_out"]:
        parts.append(f"{summary['held_out']} held out")
    if summary.get("regularization"):
        parts.append(f"{summary['regularization']} of them for regularization")
    if summary["captions_cut"]:
        parts.append(f"{summary['captions_cut']} of {summary['captions']} captions are too long and are cut")
    if summary["too_small"]:
        parts.append(f"{summary['too_small']} images are too small and are left out")
    if unreadable:
        parts.append(f"{len(unreadable)} cannot be read and are left out, the first is {unreadable[0]}")
    accelerator.print("; ".join(parts))
