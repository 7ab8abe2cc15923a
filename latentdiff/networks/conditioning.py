"""What steers a U-Net besides the latents and the level, in one value that guidance can join and split.

Something new that steers it becomes a field of `Conditioning`, with the rows of the batch first: joining and splitting
then need no change, and `steering.checked_model` is where a field is handed to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from latentdiff.networks.layers import Context, Further, ProjectedContext, SizedText
from latentdiff.networks.rows import Area, Rows
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet


class Applied(Protocol):
    """Something that steers one walk: a control, an image prompt."""

    def on(self, text: Context, count: int, *, avoided: bool) -> Rows:
        """The same on `count` rows of a batch with this text; `avoided` are those of the negative prompt."""
        ...

    def within(self, rows: slice, columns: slice) -> Applied:
        """The same for a part of the latents."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What steers the rows of one batch through one U-Net; all have text of the same length.

    Attributes:
        text: embeddings (N, L, C), float32; L is 77 for each chunk of CLIP's, and one more with pooled text (`pooled`).
        projected: the keys and values of the text for all cross-attentions, made once, in `dtype`.
        dtype: of the U-Net when this was made.
        extra_channels: (N, E, h, w), what an inpainting U-Net sees after the latents.
        sizes: (N, K), what U-Nets of SDXL are told beside the text; see `sizes`.
        controls: what steers besides; see `rows`.
    """

    text: Tensor
    projected: ProjectedContext
    dtype: torch.dtype
    extra_channels: Tensor | None = None
    sizes: Tensor | None = None
    controls: tuple[Rows, ...] = ()
    _contexts: dict[Any, ProjectedContext] = field(default_factory=dict[Any, ProjectedContext], init=False, repr=False)

    @classmethod
    def of(
        cls,
        unet: UNet,
        text: Tensor,
        *,
        extra_channels: Tensor | None = None,
        sizes: Tensor | None = None,
        controls: Sequence[Applied] = (),
        avoided: bool = False,
    ) -> Self:
        """The conditioning of `unet` by text embeddings (N, L, C) and sizes, (N, K) or (1, K) for all.

        Args:
            avoided: the text is a negative prompt, on which some controls do not act.
        """
        dtype = next(unet.parameters()).dtype
        sizes = None if sizes is None else sizes.to(text.device).expand(len(text), -1)
        told = _told(text.to(dtype), sizes)
        rows = tuple(control.on(told, len(text), avoided=avoided) for control in controls)
        return cls(text, unet.project_context(told), dtype, extra_channels, sizes, rows)

    def __len__(self) -> int:
        return len(self.text)

    @staticmethod
    def cat(parts: Sequence[AnyConditioning]) -> AnyConditioning:
        """Join conditionings of the same U-Net along the batch; of unequal lengths they run apart, as `Ragged`."""
        same = len({part.text.shape[1] for one in parts for _, part in one.groups()}) == 1
        return _joined([part for one in parts for _, part in one.groups()]) if same else Ragged.cat(parts)

    def groups(self) -> list[tuple[Tensor | slice, Conditioning]]:
        """What goes through the network at once, with its rows in the batch."""
        return [(slice(None), self)]

    def cut(self, area: Area) -> Conditioning:
        """The same for a part of the latents."""
        extra = None if self.extra_channels is None else self.extra_channels[..., *area]
        return replace(self, extra_channels=extra, controls=tuple(rows.cut(area) for rows in self.controls))

    def context_in(self, dtype: torch.dtype, t: float, unet: UNet) -> Context:
        """What the cross-attentions are told at a timestep: the projections; or the bare embeddings where the U-Net is in
        another dtype now than it was then. What is attended to besides needs projections, and a context that stays the
        same object as long as it is the same."""
        own = self.projected if dtype == self.dtype else _told(self.text.to(dtype), self.sizes)
        acting = [number for number, rows in enumerate(self.controls) if rows.attends(t)]
        if not acting:
            return own
        key = (dtype, *acting)
        if key not in self._contexts:
            further: dict[nn.Module, list[Further]] = {}
            for number in acting:
                for layer, more in self.controls[number].attended(dtype).items():
                    further.setdefault(layer, []).append(more)
            projected = own if isinstance(own, ProjectedContext) else unet.project_context(own)
            self._contexts[key] = projected.with_further(further)
        return self._contexts[key]

    def with_features(self, unet: UNet, t: float, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Inside, modules of the network give more by what is added to them on the way down."""
        total: dict[str, Tensor] = {}
        for rows in self.controls:
            for name, one in rows.features(t, dtype).items():
                total[name] = total[name] + one if name in total else one
        return Tap(unet, total, output=lambda name, arguments, output: output + total[name]) if total else nullcontext()

    def residuals(self, x: Tensor, t: float, dtype: torch.dtype) -> list[Tensor] | None:
        """What is added to the skips and the middle for latents (N, C, h, w); None if nothing is."""
        if not self.controls:
            return None
        total, told = None, _told(self.text.to(dtype), self.sizes)
        for rows in self.controls:
            own = rows.residuals(x, t, told, dtype)
            if own is not None:
                total = own if total is None else [a + b for a, b in zip(total, own, strict=True)]
        return total


@dataclass(frozen=True)
class Ragged:
    """Rows of one batch whose texts differ in length: each length goes through the network on its own.

    Padding would be cheaper, but then a prompt's image depended on its neighbours.
    """

    parts: tuple[tuple[Tensor, Conditioning], ...]  # the rows (n,) of each length

    def __len__(self) -> int:
        return sum(len(part) for _, part in self.parts)

    @classmethod
    def cat(cls, parts: Sequence[AnyConditioning]) -> Ragged:
        """Join along the batch; rows of the same length become one group."""
        found: dict[int, list[tuple[Tensor, Conditioning]]] = {}
        start = 0
        for one in parts:
            for rows, part in one.groups():
                rows = torch.arange(len(part)) if isinstance(rows, slice) else rows
                found.setdefault(part.text.shape[1], []).append((rows + start, part))
            start += len(one)
        return cls(
            tuple(
                (torch.cat([rows for rows, _ in some]), _joined([part for _, part in some])) for some in found.values()
            )
        )

    def cut(self, area: Area) -> Ragged:
        """See `Conditioning.cut`."""
        return Ragged(tuple((rows, part.cut(area)) for rows, part in self.parts))

    def groups(self) -> list[tuple[Tensor | slice, Conditioning]]:
        """See `Conditioning.groups`."""
        return list(self.parts)


AnyConditioning = Conditioning | Ragged


def by_groups(conditioning: AnyConditioning, x: Tensor, call: Callable[[Tensor, Conditioning], Tensor]) -> Tensor:
    """`call` on the rows of `x` (N, ...) that go together, and its answers in the order of the rows."""
    groups = conditioning.groups()
    if len(groups) == 1 and isinstance(groups[0][0], slice):
        return call(x, groups[0][1])
    answers = [(rows.to(x.device), call(x[rows.to(x.device)], part)) for rows, part in groups]
    order = torch.cat([rows for rows, _ in answers]).argsort()
    return torch.cat([answer for _, answer in answers])[order]


def _told(text: Tensor, sizes: Tensor | None) -> Tensor | SizedText:
    return text if sizes is None else SizedText(text, sizes)


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    if len(parts) == 1:
        return parts[0]
    return Conditioning(
        **{each.name: _cat([getattr(part, each.name) for part in parts]) for each in fields(Conditioning) if each.init}
    )


def _cat(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], tuple):
        return tuple(type(same[0]).cat(same) for same in zip(*values, strict=True))
    return ProjectedContext.cat(values) if isinstance(values[0], ProjectedContext) else values[0]
