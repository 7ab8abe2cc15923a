"""Images whose edges continue at the other side: convolutions that see around the border instead of zeros.

Attention and norms know no place, so with such convolutions a network commutes with cyclic shifts by whole cells of its
coarsest level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.layers import Upsample


@contextmanager
def seamless(axes: str, networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the networks' convolutions go around the border along `axes`, "x", "y" or "xy".

    Other forms of the modules, which pad with zeros, are laid aside for that time.
    """
    modules = [module for network in networks for module in network.modules()]
    changed = [module for module in modules if isinstance(module, nn.Conv2d | Upsample)]
    forms = [module.__dict__.pop("forward", None) for module in changed]
    for module in changed:
        if isinstance(module, nn.Conv2d) and any(module.padding):
            vars(module)["forward"] = partial(_around, module, axes)
    try:
        yield
    finally:
        for module, form in zip(changed, forms, strict=True):
            module.__dict__.pop("forward", None)
            if form is not None:
                vars(module)["forward"] = form


def _around(conv: nn.Conv2d, axes: str, x: Tensor) -> Tensor:
    height, width = (int(side) for side in conv.padding)
    x = F.pad(x, (width, width, 0, 0), mode="circular" if "x" in axes else "constant")
    x = F.pad(x, (0, 0, height, height), mode="circular" if "y" in axes else "constant")
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
