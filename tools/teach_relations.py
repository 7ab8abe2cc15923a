"""Teach a text encoder in training what "to the left of" changes, where the U-Net alone does not find out.

    python tools/teach_relations.py runs/embedded

The words of a relation change an image's loss only where noise hides the layout, and only once both the text encoder
and the U-Net know them: neither learns them before the other. This gives the text encoder the first step. From its
embeddings of captions with two nouns, linear layers that are thrown away afterwards must tell which relation the second
noun stands in (at that noun's token), and which noun and relation the words between have joined (at the last of them).
All other embeddings are held near to what they were.

The newest whole checkpoint of the run's diffusion stage gets the new text encoder; `latentdiff train` then goes on from
there.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from scene_language import KINDS, NOUNS, RELATIONS, caption, draw_plan, prompt
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from latentdiff.errors import CheckpointError, LatentDiffError
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.stages.config import load_config
from latentdiff.training.stages.networks import load_tokenizer, new_text_encoder

_PREFIX = "text_encoder."
_CAPTIONS = 20_000
_BATCH = 192
_OTHERS = 64  # captions of other kinds in each batch, whose embeddings must stay
_LR = 4e-4
_WARMUP = 30
_HEAD_LR = 5.0  # factor
_WEIGHTS = {"second": 1.0, "between": 0.3, "first": 0.3, "kept": 0.3, "others kept": 2.0}


@dataclass(frozen=True)
class Captions:
    """Captions with a relation and where their words stand; every tensor has one entry per caption."""

    tokens: Tensor  # (n, L)
    second: Tensor  # place of the second noun's last token
    between: Tensor  # place of the last token that names the relation
    relation: Tensor  # index in RELATIONS
    first_noun: Tensor  # index in NOUNS


def relation_captions(tokenizer: Any, count: int, seed: int) -> Captions:
    """Draw captions of training scenes in which one thing stands in a relation to another."""
    rng = Random(f"{seed}/relations")
    rows, texts = [], []
    while len(texts) < count:
        plan = draw_plan(rng, "train", "position")
        text = prompt(plan) if rng.random() < 0.6 else caption(plan, rng)
        if " with " in text:  # names the relation last, when the nouns' tokens have been made
            continue
        first, second = (thing.noun for thing in plan.things)
        ends = [re.search(rf"\b({words})\b", text).end() for words in ("left|right|above|over|below|under", second)]
        places = [len(tokenizer(text[:end])["input_ids"]) - 2 for end in ends]  # without the token that ends the text
        rows.append((*places, list(RELATIONS).index(plan.relation), list(NOUNS).index(first)))
        texts.append(text)
    between, second, relation, noun = torch.tensor(rows).unbind(1)
    return Captions(_tokens(tokenizer, texts), second, between, relation, noun)


def other_captions(tokenizer: Any, count: int, seed: int) -> Tensor:
    """Token ids (count, L) of captions of all other kinds of training scenes."""
    rng = Random(f"{seed}/others")
    kinds = [kind for kind in KINDS if kind != "position"]
    return _tokens(tokenizer, [caption(draw_plan(rng, "train", rng.choice(kinds)), rng) for _ in range(count)])


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    return torch.from_numpy(CaptionTokens(tokenizer, "cut").rows(texts, 1)[:, 0])


class Readers(nn.Module):
    """The linear layers that say what the embeddings know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.second, self.between = nn.Linear(width, len(RELATIONS)), nn.Linear(width, len(RELATIONS))
        self.first = nn.Linear(width, len(NOUNS))

    def losses(self, embeddings: Tensor, captions: Captions, chosen: Tensor) -> dict[str, Tensor]:
        """Cross-entropies for embeddings (n, L, C) of the chosen captions (n,)."""
        rows = torch.arange(len(chosen))
        second, between = (embeddings[rows, places[chosen]] for places in (captions.second, captions.between))
        return {
            "second": F.cross_entropy(self.second(second), captions.relation[chosen]),
            "between": F.cross_entropy(self.between(between), captions.relation[chosen]),
            "first": F.cross_entropy(self.first(between), captions.first_noun[chosen]),
        }


def teach(text_encoder: TextEncoder, captions: Captions, others: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Train the text encoder in place; returns the last step's losses."""
    random = torch.Generator().manual_seed(seed)
    before = copy.deepcopy(text_encoder)
    readers = Readers(text_encoder.embedding_width)
    groups = [
        {"params": [*readers.parameters()], "scale": _HEAD_LR},
        {"params": [*text_encoder.parameters()], "scale": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LR, betas=(0.9, 0.98), fused=True)
    for step in trange(steps, desc="relations", unit="step"):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / _WARMUP)
            group["lr"] = _LR * group["scale"] * warm * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.randint(len(captions.tokens), (_BATCH,), generator=random)
        other = torch.randint(len(others), (_OTHERS,), generator=random)
        tokens = torch.cat([captions.tokens[chosen], others[other]])
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = text_encoder(tokens)
            with torch.no_grad():
                kept = before(tokens)
        embeddings = embeddings.float()
        losses = readers.losses(embeddings[:_BATCH], captions, chosen)
        losses["kept"] = F.mse_loss(embeddings[:_BATCH], kept[:_BATCH].float())
        losses["others kept"] = F.mse_loss(embeddings[_BATCH:], kept[_BATCH:].float())
        sum(_WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: loss.item() for name, loss in losses.items()}


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(run: Path, steps: int, seed: int) -> None:
    """Give the newest checkpoint of RUN a text encoder that tells relations apart."""
    config = load_config(run / "config.yaml")
    folder = run / "diffusion" / "checkpoints"
    path, _ = newest_checkpoint(folder)
    if path is None:
        raise CheckpointError(f"{folder} has no checkpoint yet; run the stage diffusion first")
    checkpoint = load_checkpoint(path)
    tokenizer = load_tokenizer(config.model.tokenizer, config.model.text_encoder.max_position_embeddings)
    text_encoder = new_text_encoder(config.model.text_encoder, tokenizer, config.seed).eval()
    text_encoder.load_state_dict(
        {name.removeprefix(_PREFIX): value for name, value in checkpoint.ema.items() if name.startswith(_PREFIX)}
    )
    captions = relation_captions(tokenizer, _CAPTIONS, seed)
    losses = teach(text_encoder, captions, other_captions(tokenizer, _CAPTIONS, seed), steps, seed)
    taught = {_PREFIX + name: value for name, value in text_encoder.state_dict().items()}
    changed = replace(checkpoint, weights={**checkpoint.weights, **taught}, ema={**checkpoint.ema, **taught})
    save_checkpoint(folder, changed, keep=config.diffusion.keep_checkpoints)
    click.echo(f"{path}: {', '.join(f'{name} {value:.4f}' for name, value in losses.items())}")


if __name__ == "__main__":
    try:
        main()
    except LatentDiffError as error:
        sys.exit(f"error: {error}")
