"""Files in memory by mapping: a tensor is a view of the file's pages, which the system reads when they are first
touched.

Mapped pages cost nothing until they are read, can be given back at any time, and are read again when they are touched
again.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn


class _Map(mmap.mmap):
    """A private mapping: what is written to it never reaches the file."""

    address: int


_maps: weakref.WeakSet[_Map] = weakref.WeakSet()  # alive as long as a tensor is a view of it


def map_file(path: Path) -> _Map:
    """Map a file that is not empty."""
    with open(path, "rb") as file:
        mapped = _Map(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.address = torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()
    _maps.add(mapped)
    return mapped


def mapped_tensor(mapped: _Map, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies at `offset`: a view of the file, or a copy where the file does not align it."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:
        unaligned = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return unaligned.clone().view(dtype).view(shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def release(tensor: Tensor) -> None:
    """Give the memory of a mapped tensor back; it is read from the file again when it is next touched.

    Only for a tensor that nobody wrote to: what was written is forgotten. Tensors that lie elsewhere stay as they are.
    """
    _advise(tensor, "MADV_DONTNEED")


def prefetch(tensor: Tensor) -> None:
    """Let the system begin to read a mapped tensor from the disk, without waiting for it."""
    _advise(tensor, "MADV_WILLNEED")


def _advise(tensor: Tensor, name: str) -> None:
    advice = getattr(mmap, name, None)  # not every system has it
    if advice is None or tensor.device.type != "cpu" or not tensor.numel():
        return
    start = tensor.data_ptr()
    end = start + tensor.untyped_storage().nbytes()
    mapped = next((each for each in _maps if each.address <= start < each.address + len(each)), None)
    if mapped is None:
        return
    # Whole pages only: those at the ends belong to the neighbours too.
    first = -(-(start - mapped.address) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (end - mapped.address) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        mapped.madvise(advice, first, last - first)


def placed(tensor: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
    """A tensor in the type and memory layout of `like`, on a device: itself where it is so already, else a copy.

    The memory of a mapped tensor that was copied is given back, so that a file is never in memory twice.
    """
    last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    # One after the other takes a third of the time that torch takes for both at once.
    made = tensor.contiguous(memory_format=layout).to(device, like.dtype, memory_format=layout)
    if made is not tensor:
        release(tensor)
    return made


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer, by its name in the `state_dict`; the new one may lie on another device."""
    owner, leaf = _place(module, name)
    _replace(owner, leaf, getattr(owner, leaf), tensor)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Give a module these weights, in the types and layouts that it has now, one tensor at a time.

    Args:
        module: may lie on the meta device.
        tensors: by their names in its `state_dict`; weights that are not among them stay as they are.
    """
    copied = []
    for name, tensor in tensors.items():
        owner, leaf = _place(module, name)
        old = getattr(owner, leaf)
        made = placed(tensor, old, device)
        _replace(owner, leaf, old, made)
        copied += [tensor] if made is not tensor else []
    for tensor in copied:
        release(tensor)  # again: reading its neighbours, the system has read some pages of it too


def empty(module: nn.Module, names: Iterable[str]) -> None:
    """Take these weights out of a module; types, shapes and layouts stay."""
    for name in names:
        owner, leaf = _place(module, name)
        old = getattr(owner, leaf)
        _replace(owner, leaf, old, torch.empty_like(old, device="meta"))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return attrgetter(path)(module) if path else module, leaf  # in half the time of `get_submodule`


def _replace(owner: nn.Module, leaf: str, old: Tensor, new: Tensor) -> None:
    is_weight = isinstance(old, nn.Parameter)
    setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if is_weight else new)
