"""Low-rank adapters (Hu et al. 2021): W x becomes W x + alpha / rank · up(down(x)), beside a model that stays as it is.

The model does not know of them. While a LoRA is attached, a tap on every adapted layer adds its part to the output;
detaching removes the taps, and as no weight was touched, the outputs are the old ones bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from latentdiff.adapters.lora.names import kohya_name
from latentdiff.adapters.lora.spec import LoRASpec, adaptable
from latentdiff.errors import UsageError
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet


class LoRALayer(nn.Module):
    """The change of one layer. For a convolution (Yeh et al. 2023, "LoCon"), `lora_down` has its kernel and stride.

    A new one changes nothing: `lora_up` is zero.

    Args:
        target: the layer that is adapted; only its sizes are read.
        rank: inner width.
        alpha: see `LoRASpec`.
    """

    def __init__(self, target: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        new = partial(nn.utils.skip_init, dtype=torch.float32)  # does not draw from the global random generator
        if isinstance(target, nn.Conv2d):
            window = {name: getattr(target, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            self.lora_down = new(nn.Conv2d, target.in_channels, rank, target.kernel_size, bias=False, **window)
            self.lora_up = new(nn.Conv2d, rank, target.out_channels, 1, bias=False)
        else:
            self.lora_down = new(nn.Linear, target.in_features, rank, bias=False)
            self.lora_up = new(nn.Linear, rank, target.out_features, bias=False)
        self.reset(torch.Generator())

    def reset(self, generator: torch.Generator) -> None:
        """Draw `lora_down` as linear layers are drawn (uniform, He et al. 2015, a = √5), and zero `lora_up`."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.lora_up.weight)

    @property
    def factor(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Input of the layer -> what is added to its output, in the precision of the input or that of autocast."""
        return _in_precision_of(x, self.lora_up, _in_precision_of(x, self.lora_down, x)) * (self.factor * scale)

    def change(self) -> Tensor:
        """The change of the layer's weight, in its shape, in float32."""
        up, down = self.lora_up.weight.detach().float(), self.lora_down.weight.detach().float()
        product = up.flatten(1) @ down.flatten(1)  # (out, rank) (rank, in k k)
        return self.factor * product.reshape(up.shape[0], *down.shape[1:])


class LoRA(nn.Module):
    """Adapters of some layers of one model. Its parameters are the adapters' alone; the model is not part of it.

    Args:
        layers: adapters by the full names of what they adapt (`unet.…`, `text_encoder.…`).
        unet, text_encoder: the model.
        metadata: text that goes into the file with the weights.
    """

    def __init__(
        self,
        layers: Mapping[str, LoRALayer],
        unet: UNet,
        text_encoder: nn.Module | None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.metadata = dict(metadata or {})
        targets = dict(adaptable(unet, text_encoder))
        self._model = _Others({"unet": unet, "text_encoder": text_encoder})
        self._targets = _Others({name: targets[name] for name in layers})
        for name, layer in layers.items():
            self.add_module(kohya_name(name), layer)

    @classmethod
    def create(cls, unet: UNet, text_encoder: nn.Module | None, spec: LoRASpec, seed: int = 0) -> Self:
        """A new LoRA in float32 that changes nothing yet.

        Args:
            unet, text_encoder: what to adapt; they stay as they are. None leaves the text encoder out.
            spec: which layers, and how.
            seed: of the random half of the weights.

        Raises:
            UsageError: a target fits no layer.
        """
        generator = torch.Generator().manual_seed(seed)
        targets = spec.select(unet, text_encoder)
        layers = {name: LoRALayer(target, spec.rank, spec.strength) for name, target in targets.items()}
        for layer in layers.values():
            layer.reset(generator)
        return cls(layers, unet, text_encoder).to(unet.conv_in.weight.device)

    @property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapters by full name."""
        return {name: getattr(self, kohya_name(name)) for name in self._targets}

    @contextmanager
    def attached(self, scale: float = 1.0) -> Iterator[Self]:
        """Inside, the model's outputs are those of the adapted model; outside, the old ones bit for bit.

        Gradients reach the adapters. With gradient checkpointing the backward pass must lie inside too, as it
        computes the layers again.

        Args:
            scale: strength of the adaptation; 0 is none, 1 is as trained.
        """
        layers = self.layers
        with ExitStack() as taps:
            for part, root in self._model.items():
                paths = [name.removeprefix(f"{part}.") for name in layers if name.startswith(f"{part}.")]
                if paths:
                    taps.enter_context(Tap(root, paths, output=partial(_added, layers, part, scale)))
            yield self

    def merge(self, scale: float = 1.0) -> None:
        """Put the adaptation into the model's weights for good; see `merge`."""
        merge([(self, scale)])

    def changes(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """The adapted layers and the changes of their weights, in float32."""
        for name, layer in self.layers.items():
            yield self._targets[name], layer.change()


@torch.no_grad()
def merge(loras: Sequence[tuple[LoRA, float]]) -> None:
    """Put several LoRAs of the same model, each with its scale, into the model's weights for good.

    The changes are summed in float32 and rounded once to the weights' precision.
    """
    changes: dict[nn.Module, Tensor] = {}
    for lora, scale in loras:
        for target, change in lora.changes():
            changes[target] = changes[target] + scale * change if target in changes else scale * change
    if any(target.weight.is_meta for target in changes):
        raise UsageError(
            "merging needs all weights in memory, and low_memory streams those of the U-Net; load without it"
        )
    for target, change in changes.items():
        target.weight.data = (target.weight.float() + change.to(target.weight.device)).to(target.weight.dtype)


def _in_precision_of(x: Tensor, layer: nn.Module, argument: Tensor) -> Tensor:
    if layer.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return layer(argument)
    return functional_call(layer, {"weight": layer.weight.to(x.dtype)}, (argument,))


def _added(
    layers: Mapping[str, LoRALayer], part: str, scale: float, path: str, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    return output + layers[f"{part}.{path}"](inputs[0], scale)


class _Others(dict[str, Any]):
    """Modules that belong to somebody else: copies of their holder refer to the same ones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
