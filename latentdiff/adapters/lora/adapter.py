"""Adapters beside a model that stays as it is: W x becomes W x + alpha / rank · up(down(x)) (Hu et al. 2021), or more.

The model does not know of them. While a LoRA is attached, a tap on every adapted layer adds its part to the output;
detaching removes the taps, and as no weight was touched, the outputs are the old ones bit for bit. What a layer's part
is, `kinds` says; some are trained, the others only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.kinds import Change
from latentdiff.adapters.lora.kinds.new import NEW
from latentdiff.adapters.lora.kinds.relative import DoRA
from latentdiff.adapters.lora.names import kohya_name
from latentdiff.adapters.lora.spec import LoRASpec, changeable
from latentdiff.adapters.lora.strength import Strength
from latentdiff.errors import UsageError
from latentdiff.networks.taps import Tap
from latentdiff.networks.text_encoders import SECOND, encoders_of
from latentdiff.networks.unet import UNet

# (full name, change, layer, input, strength) -> what is added to the output
Part = Callable[[str, Change, nn.Module, Tensor, float], Tensor]


class LoRA(nn.Module):
    """Adapters of some layers of one model. Its parameters are the adapters' alone; the model is not part of it.

    Args:
        layers: adapters by the full names of what they adapt (`unet.…`, `text_encoder.…`, `text_encoder_2.…`).
        unet, text_encoder: the model.
        metadata: text that goes into the file with the weights.
    """

    def __init__(
        self,
        layers: Mapping[str, Change],
        unet: UNet,
        text_encoder: nn.Module | None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.metadata = dict(metadata or {})
        targets = dict(changeable(unet, text_encoder))
        self._model = _Others({"unet": unet, **encoders_of(text_encoder)})
        self._targets = _Others({name: targets[name] for name in layers})
        self._is_on = True
        for name, layer in layers.items():
            self.add_module(kohya_name(name), layer)

    @classmethod
    def create(cls, unet: UNet, text_encoder: nn.Module | None, spec: LoRASpec, seed: int = 0) -> Self:
        """A new LoRA, or an adapter of another kind, in float32 that changes nothing yet.

        Args:
            unet, text_encoder: what to adapt; they stay as they are. None leaves the text encoder out.
            spec: which layers, and how.
            seed: of the random half of the weights.

        Raises:
            UsageError: a target fits no layer.
        """
        generator = torch.Generator().manual_seed(seed)
        targets = spec.select(unet, text_encoder)
        layers = {name: NEW[spec.kind](target, shape, generator) for name, (target, shape) in targets.items()}
        return cls(layers, unet, text_encoder).to(unet.conv_in.weight.device)

    @property
    def layers(self) -> dict[str, Change]:
        """The adapters by full name."""
        return {name: getattr(self, kohya_name(name)) for name in self._targets}

    @property
    def file_names(self) -> dict[str, str]:
        """What kohya's tools call the layers of this model, by full name."""
        two = SECOND in self._model
        return {name: kohya_name(name, self._model["unet"].config if two else None) for name in self._targets}

    def keep_in(self, dtype: torch.dtype) -> None:
        """Take a precision for good, as far as the changes bear it."""
        for module in self.modules():
            if not isinstance(module, DoRA):  # 16 bits of a whole length would be as coarse as what was learned
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    @property
    def targets(self) -> list[nn.Module]:
        """The layers of the model that are adapted."""
        return list(self._targets.values())

    @contextmanager
    def attached(self, scale: float | Strength = 1.0, part: Part | None = None) -> Iterator[Self]:
        """Inside, the model's outputs are those of the adapted model; outside, the old ones bit for bit.

        Gradients reach the adapters. With gradient checkpointing the backward pass must lie inside too, as it
        computes the layers again.

        Args:
            scale: strength of the adaptation; 0 is none, 1 is as trained.
            part: what a layer adds, where it is not what its change says.
        """
        layers, scales = self.layers, self._scales(scale)
        part = part or _as_changed

        def added(network: str, path: str, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            name = f"{network}.{path}"
            if not self._is_on:
                return output
            return output + part(name, layers[name], self._targets[name], inputs[0], scales[name])

        with ExitStack() as taps:
            for network, root in self._model.items():
                paths = [name.removeprefix(f"{network}.") for name in layers if name.startswith(f"{network}.")]
                if paths:
                    taps.enter_context(Tap(root, paths, output=partial(added, network)))
            yield self

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, and within `attached`, the model's outputs are the old ones bit for bit. For training: it holds for all
        threads."""
        self._is_on = False
        try:
            yield
        finally:
            self._is_on = True

    def merge(self, scale: float | Strength = 1.0) -> None:
        """Put the adaptation into the model's weights for good; see `merge`."""
        merge([(self, scale)])

    @torch.no_grad()
    def changes(self, scale: float | Strength = 1.0) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """The adapted layers, "weight" or "bias", and what is added to it, in its shape, in float32."""
        scales = self._scales(scale)
        for name, layer in self.layers.items():
            target = self._targets[name]
            asked = {"weight": layer.weight_change, "bias": layer.bias_change}
            for leaf, ask in asked.items():
                own = getattr(target, leaf)
                change = ask(None if own is None else own.float(), scales[name])
                if change is not None and own is None:
                    raise UsageError(f"{name} has no bias that the adapter could be merged into; attach it instead")
                if change is not None:
                    yield target, leaf, change.reshape(own.shape)

    def _scales(self, scale: float | Strength) -> dict[str, float]:
        strength, config = Strength.of(scale), self._model["unet"].config
        strength.check(config)
        return {name: strength.at(name, config.layers_per_block) for name in self._targets}


def _as_changed(name: str, change: Change, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
    return change.added(layer, x, strength)


@torch.no_grad()
def merge(loras: Sequence[tuple[LoRA, float | Strength]]) -> None:
    """Put several LoRAs of the same model, each with its scale, into the model's weights for good.

    Each one's changes are those of the weights as they were. They are summed in float32 and rounded once to the
    weights' precision.
    """
    if any(target.weight.is_meta for lora, _ in loras for target in lora.targets):
        raise UsageError(
            "merging needs all weights in memory, and low_memory streams those of the U-Net; load without it"
        )
    changes: dict[tuple[nn.Module, str], Tensor] = {}
    for lora, scale in loras:
        for target, leaf, change in lora.changes(scale):
            known = changes.get((target, leaf))
            changes[target, leaf] = change if known is None else known + change
    for (target, leaf), change in changes.items():
        own = getattr(target, leaf)
        own.data = (own.float() + change.to(own.device)).to(own.dtype)


class _Others(dict[str, Any]):
    """Modules that belong to somebody else: copies of their holder refer to the same ones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
