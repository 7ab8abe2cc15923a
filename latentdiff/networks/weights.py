"""A name for the weights of a network: what is made of them is kept under it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(module: nn.Module, *about: object, only: tuple[str, ...] = ("",)) -> str:
    """Changes with every weight and buffer of `module`, but not with their number format. 16 hexadecimal digits.

    Args:
        about: what else it should change with.
        only: beginnings of the names of the weights that count.
    """
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(only):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
