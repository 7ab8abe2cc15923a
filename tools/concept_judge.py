"""A judge that also knows the new thing and the new style of `make_concept.py`.

It is the judge of `latentdiff evaluate`, further trained on renders alone: of the known world, of the new thing, of
things that neither knows (so that strange is not enough to be called new), of the new thing with its quarters in a
wrong order (so that its colours are not enough), and of sepia images. It never sees a generated image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from glyphs import Glyphs
from judge_scenes import Scene, batch_of
from make_concept import OBJECT, PAPER, drawn, style_plans
from PIL import Image
from scene_language import BACKGROUNDS, Plan, Thing, draw_plan
from tqdm import tqdm
from train_judge import BATCH, loss_of, make_targets

from latentdiff.evaluation.judge import Judge, save_judge
from latentdiff.evaluation.network import JudgeConfig, JudgeNetwork

OTHER = "something else"
SEPIA = "sepia"  # stands among the backgrounds: it is what the whole image looks like

# Things that nobody knows: the judge learns some as "something else", and is tested with the others.
STRANGE = ("🏺", "🛵", "🪴", "🛶", "🔭", "🧯", "🎲", "🧱", "🪵", "🔦", "🧵", "🎯", "⛲", "🪭", "🪗", "🥜")
STRANGE_TEST = ("🍵", "🫙", "🚪", "🪶", "🪞", "🌰", "🪒")

# Orders of a thing's quarters (upper left, upper right, lower left, lower right) in which none is where it was.
_ORDERS = ((3, 2, 1, 0), (2, 3, 0, 1), (1, 3, 0, 2))

STEPS = 300
LEARNING_RATE = 1e-3
WARMUP = 30
_SCENES = 5000


def load_concept_judge(
    folder: Path, base: Judge, glyphs: Glyphs, *, steps: int = STEPS, scenes: int = _SCENES
) -> Judge:
    """Read the judge in a folder, or train it there (minutes on one core)."""
    if not (folder / "config.json").is_file():
        save_judge(train(extended(base), scenes, steps, glyphs), folder)
    return Judge.load(folder)


def extended(base: Judge) -> JudgeNetwork:
    """The judge's network with outputs for the new thing, for strange things and for the style; the rest is as it
    was."""
    old = base.config
    config = replace(old, nouns=(*old.nouns, OBJECT, OTHER), backgrounds=(*old.backgrounds, SEPIA))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = JudgeNetwork(config)
    weights = dict(base.network.state_dict())
    new = network.state_dict()
    after_nouns = 1 + len(old.nouns)
    for name in ("cell.weight", "cell.bias"):
        at_nouns = new[name][after_nouns : after_nouns + 2]
        weights[name] = torch.cat([weights[name][:after_nouns], at_nouns, weights[name][after_nouns:]])
    for name in ("background.weight", "background.bias"):
        weights[name] = torch.cat([weights[name], new[name][-1:]])
    network.load_state_dict(weights)
    return network


def train(network: JudgeNetwork, count: int, steps: int, glyphs: Glyphs) -> JudgeNetwork:
    """Train on renders in memory, always the same ones."""
    scenes = [
        one
        for _, one in zip(range(count), endless_scenes(network.config, Random("concept judge"), glyphs), strict=False)
    ]
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    network.to(memory_format=torch.channels_last).train()
    for step in tqdm(range(steps), desc="judge of the new concepts", unit="step", mininterval=2.0):
        rate = min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        batch = batch_of(scenes, step, seed=0, size=BATCH)
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in batch]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network((pixels.float() / 127.5 - 1).permute(0, 3, 1, 2))  # channels last in memory
        loss_of(output, make_targets(batch, network.config.size)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return network.eval()


def endless_scenes(config: JudgeConfig, rng: Random, glyphs: Glyphs) -> Iterator[Scene]:
    """In turn: the known world, the new thing, strange things, sepia images; and on tinted paper others, which are
    none."""
    in_style = style_plans_of_all(rng, glyphs.nouns)
    while True:
        yield from _scenes(
            [draw_plan(rng, rng.choice(("train", "test")), nouns=glyphs.nouns) for _ in range(3)], config, rng, glyphs
        )
        yield from _scenes([_with(OBJECT, rng, glyphs.nouns), _with(OBJECT, rng, glyphs.nouns)], config, rng, glyphs)
        yield from _scenes([_with(rng.choice(STRANGE), rng, glyphs.nouns)], config, rng, glyphs)
        yield from (
            _jumbled(scene, config, rng) for scene in _scenes([_with(OBJECT, rng, glyphs.nouns)], config, rng, glyphs)
        )
        yield from _scenes([next(in_style), next(in_style)], config, rng, glyphs, sepia=True)
        tinted = replace(draw_plan(rng, "train", nouns=glyphs.nouns), background="white")
        for scene in _scenes([tinted], config, rng, glyphs):
            paper = (scene.pixels * (np.array(PAPER) / 255.0)).astype(np.uint8)
            yield replace(scene, pixels=paper)


def style_plans_of_all(rng: Random, nouns: Sequence[str]) -> Iterator[Plan]:
    """The judge has to know the held-out things in sepia, too, or it would fail right images of them."""
    pairs = zip(style_plans(rng, "train", nouns), style_plans(rng, "test", nouns), strict=False)
    return (plan for pair in pairs for plan in pair)


def _with(noun: str, rng: Random, nouns: Sequence[str]) -> Plan:
    """A plan with a new or strange thing, alone or with a known one."""
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.5:
        return Plan("single", background, (Thing(noun, size=rng.choice((None, "small", "big"))),))
    return Plan("two", background, (Thing(noun), Thing(rng.choice(nouns))))


def _scenes(
    plans: Sequence[Plan], config: JudgeConfig, rng: Random, glyphs: Glyphs, *, sepia: bool = False
) -> Iterator[Scene]:
    for plan, image, boxes in drawn(plans, rng, glyphs, sepia=sepia):
        names = [thing.noun if thing.noun in config.nouns else OTHER for thing in plan.things]
        own = len(config.colours)
        yield Scene(
            np.asarray(image),
            config.backgrounds.index(SEPIA if sepia else plan.background),
            np.array([config.nouns.index(name) for name in names]),
            np.array([config.colours.index(thing.colour) if thing.colour else own for thing in plan.things]),
            np.array(boxes, dtype=np.float32),
        )


def _jumbled(scene: Scene, config: JudgeConfig, rng: Random) -> Scene:
    """The new thing's quarters in a wrong order: its colours and parts are not enough, it must have its shape."""
    new = scene.nouns == config.nouns.index(OBJECT)
    left, top, right, bottom = scene.boxes[new][0].astype(int)
    height, width = (bottom - top) // 2, (right - left) // 2
    places = [(top + height * row, left + width * column) for row in (0, 1) for column in (0, 1)]
    pixels = scene.pixels.copy()
    for (y, x), source in zip(places, rng.choice(_ORDERS), strict=True):
        from_y, from_x = places[source]
        pixels[y : y + height, x : x + width] = scene.pixels[from_y : from_y + height, from_x : from_x + width]
    return replace(scene, pixels=pixels, nouns=np.where(new, config.nouns.index(OTHER), scene.nouns))


def strange_images(count: int, glyphs: Glyphs) -> list[Image.Image]:
    """Scenes of things that the judge was never shown, in which it must not see the new thing."""
    rng = Random("strange pictures")
    plans = (_with(rng.choice(STRANGE_TEST), rng, glyphs.nouns) for _ in range(10 * count))
    return [image for _, (_, image, _) in zip(range(count), drawn(plans, rng, glyphs), strict=False)]
