"""Learning from preferences: of two images of one prompt, the preferred one is to become the likelier.

Diffusion-DPO (Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization"): what the trained
model gains on the preferred image over the start model, compared with what it gains on the rejected one. The start model
is the same network as it was; no second one is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.training.loss import DenoisingLoss

AsBefore = Callable[[], AbstractContextManager[Any]]


class PreferenceLoss(DenoisingLoss):
    """Denoising networks with the loss of Diffusion-DPO.

    Batches are those of `DenoisingLoss`, and hold `rejected_latents` (n, C, h, w), or `rejected_images` (n, H, W, 3) uint8,
    beside the preferred ones. Both images of a pair get the same noise, timestep, text and sizes.

    Args:
        networks, others: see `DenoisingLoss`.
        as_before: a context inside which the networks compute as those of the start model.
        beta: how much the trained model is held to the start model.
    """

    measure = "dpo"

    def __init__(self, *networks: Any, as_before: AsBefore, beta: float, **others: Any) -> None:
        super().__init__(*networks, **others)
        self._as_before, self._beta = as_before, beta

    def learned(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss; "mse" over all images; "accuracy" and "margin" of `measured`; and "preferred_change" and
        "rejected_change", by how much the mean squared errors have changed since the start."""
        now, before = self._errors(batch)
        scores = preference_scores(now, before, self._beta)
        changes = (now.detach() - before).mean(1)
        return {
            "loss": (batch["weights"] * -F.logsigmoid(scores)).mean(),
            "mse": now.detach().mean(),
            "accuracy": told_apart(scores).mean(),
            "margin": scores.detach().mean(),
            "preferred_change": changes[0],
            "rejected_change": changes[1],
        }

    def measured(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """By pair: "dpo", the loss; "accuracy", whether the preferred image is the likelier by the model; "margin", by how
        much; see `preference_scores`."""
        scores = preference_scores(*self._errors(batch), self._beta)
        return {"dpo": -F.logsigmoid(scores), "accuracy": told_apart(scores), "margin": scores}

    def _errors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean squared errors (2, n) of the preferred and the rejected images, of the trained and of the start model."""
        both = self._both(batch)
        with torch.no_grad(), uncached_autocast(), self._as_before():
            before = self._errors_of(both, batch)
        return self._errors_of(both, batch), before

    def _errors_of(self, both: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        told = {"context": self.text(batch).repeat(2, 1, 1)}  # read once for both images
        return self.errors(both | told).unflatten(0, (2, -1))

    def _both(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with 2 n rows: preferred images, then rejected ones."""
        names = ("latents", "images", "posterior", "noise", "timesteps", "sizes")
        both = {
            name: torch.cat([batch[name], batch.get(f"rejected_{name}", batch[name])])
            for name in names
            if name in batch
        }
        return both | {"latents": self.latents(both)}


def preference_scores(now: Tensor, before: Tensor, beta: float) -> Tensor:
    """-beta/2 [(e_w - e_w,ref) - (e_l - e_l,ref)] of each pair, (n,): equation 14 of Wallace et al. 2023, with T and the
    weight of the noise level in beta, as in the authors' code.

    Args:
        now: mean squared errors of the trained model, (2, n): of the preferred images e_w and the rejected ones e_l.
        before: those of the start model, e_w,ref and e_l,ref.
    """
    gained = before - now
    return 0.5 * beta * (gained[0] - gained[1])


def told_apart(scores: Tensor) -> Tensor:
    """Of each pair, (n,): 1 where the preferred image has become the likelier, 0 where the rejected one has, and 1/2 where
    neither has."""
    return 0.5 + 0.5 * scores.detach().sign()


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Inside, autocast remembers no weights in its own precision: those that it met without gradients, or with other
    values, would serve outside too."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
