"""A judge that also knows the new things and styles of `make_concept.py`.

It is the judge of `latentdiff evaluate`, further trained as that one was, on scenes whose things are whole or damaged:
of the known world, of the new things, of things that neither knows (so that strange is not enough to be called new), of
known things in the new styles, and in their own colours on the paper of these (so that paper is not enough). It never
sees a generated image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from glyphs import Glyphs, Sprite
from judge_scenes import Composer, Scene
from make_concept import STYLES, drawn
from make_scenes import MIN_CONTRAST, clear_sprites, sprites_of
from PIL import Image
from scene_language import BACKGROUNDS, NEW_NOUNS, Plan, Thing
from train_judge import Trainer
from train_judge import train as train_judge

from latentdiff.evaluation.judge import Judge, save_judge
from latentdiff.evaluation.network import JudgeNetwork

# Things that nobody knows: the judge learns that some are none of its own, and is tested with the others.
STRANGE = ("🏺", "🛵", "🪴", "🛶", "🔭", "🧯", "🎲", "🧱", "🪵", "🔦", "🧵", "🎯", "⛲", "🪭", "🪗", "🥜")
STRANGE_TEST = ("🍵", "🫙", "🚪", "🪶", "🪞", "🌰", "🪒", "🦫")

# How often a scene is of which kind.
KINDS = {"known": 0.33, "new": 0.27, "strange": 0.1, "style": 0.25, "paper": 0.05}

STEPS = 300


def load_concept_judge(folder: Path, base: Judge, glyphs: Glyphs, *, steps: int = STEPS) -> Judge:
    """Read the judge in a folder, or train it there (minutes on one core)."""
    if not (folder / "config.json").is_file():
        save_judge(train(extended(base), steps, folder, glyphs), folder)
    return Judge.load(folder)


def extended(base: Judge) -> JudgeNetwork:
    """The judge's network with outputs for the new things and styles; the rest is as it was."""
    old = base.config
    config = replace(old, nouns=(*old.nouns, *NEW_NOUNS), backgrounds=(*old.backgrounds, *STYLES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = JudgeNetwork(config)
    weights = dict(base.network.state_dict())
    new = network.state_dict()
    after_nouns = 1 + len(old.nouns)
    for name in ("cell.weight", "cell.bias"):
        at_nouns = new[name][after_nouns : after_nouns + len(NEW_NOUNS)]
        weights[name] = torch.cat([weights[name][:after_nouns], at_nouns, weights[name][after_nouns:]])
    for name in ("background.weight", "background.bias"):
        weights[name] = torch.cat([weights[name], new[name][-len(STYLES) :]])
    network.load_state_dict(weights)
    return network


def train(network: JudgeNetwork, steps: int, folder: Path, glyphs: Glyphs) -> JudgeNetwork:
    """Train on scenes that depend on the step alone; goes on from what an interrupted run left in the folder."""
    trainer = Trainer(network.config, folder, seed=0)
    if trainer.step == 0:
        trainer.network.load_state_dict(network.state_dict())
    nothing = np.empty((0, network.config.size, network.config.size, 3), dtype=np.uint8)
    train_judge(trainer, ConceptComposer(glyphs, network.config), nothing, steps, seed=0)
    trainer.checkpoint.unlink(missing_ok=True)
    return trainer.network.eval()


class ConceptComposer(Composer):
    """Draws scenes of the known world, and such with something new."""

    def _composed(self, seed: str) -> Scene:
        rng, noise = Random(seed), np.random.default_rng(list(seed.encode()))
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "known":
            return super()._composed(seed)
        if kind in ("style", "paper"):
            return self._on_paper(rng.choice(list(STYLES)), kind == "style", rng, noise)
        while True:
            plan = plan_with(rng.choice(tuple(NEW_NOUNS) if kind == "new" else STRANGE), rng, self.glyphs.nouns)
            if (sprites := clear_sprites(plan, self.config.size, self.glyphs)) is not None:
                return self.drawn(plan, sprites, rng, noise)

    def _on_paper(self, name: str, toned: bool, rng: Random, noise: np.random.Generator) -> Scene:
        """Known things in a style; or in their own colours on its paper, which is called by the nearest background."""
        style = STYLES[name]
        while True:
            plan = plan_with(rng.choice(self.glyphs.nouns), rng, self.glyphs.nouns)
            sprites = sprites_of(plan, self.config.size, self.glyphs)
            # A brown bear on sepia's paper could be either.
            if toned or any(_differs(sprite, style.toned(sprite)) for sprite in sprites):
                break
        scene = self.drawn(plan, sprites, rng, noise, style.sheet(), *([style.toned] if toned else []))
        called = name if toned else min(BACKGROUNDS, key=lambda other: math.dist(BACKGROUNDS[other], style.paper))
        return replace(scene, background=self.config.backgrounds.index(called))


def _differs(sprite: Sprite, other: Sprite) -> bool:
    """Whether two looks of a thing are clearly of other colours."""
    distance = np.linalg.norm(sprite.colour - other.colour, axis=-1)
    return float(distance.sum() / (1 - sprite.keep).sum()) >= MIN_CONTRAST


def plan_with(noun: str, rng: Random, nouns: Sequence[str]) -> Plan:
    """A plan with a thing alone, or among three others."""
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.6:
        return Plan("single", background, (Thing(noun, size=rng.choice((None, "small", "big"))),))
    return Plan("crowd", background, (Thing(noun), *(Thing(other) for other in rng.sample(list(nouns), 3))))


def strange_images(count: int, glyphs: Glyphs) -> list[Image.Image]:
    """Scenes of things that the judge was never shown, in which it must not see the new things."""
    rng = Random("strange images")
    plans = (plan_with(rng.choice(STRANGE_TEST), rng, glyphs.nouns) for _ in range(10 * count))
    return [image for _, (_, image, _) in zip(range(count), drawn(plans, rng, glyphs), strict=False)]
