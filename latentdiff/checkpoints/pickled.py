"""Tensors of torch's pickles: what `latentdiff.reading` found in one, mapped into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.files import TYPES, TensorFile
from latentdiff.checkpoints.hashing import once
from latentdiff.checkpoints.mapping import map_file, mapped_tensor
from latentdiff.errors import CheckpointError
from latentdiff.reading.archives import Archive, Record, damaged, read_archive, read_old, verify
from latentdiff.reading.pickled_names import TensorPlace

_STATES = ("state_dict", "params_ema", "params")
_DEEPEST = 32  # levels of containers in a pickle that are looked into for tensors


def read_pickle(path: Path, *, is_old: bool) -> TensorFile:
    """Map all tensors of a torch pickle.

    Args:
        is_old: it was written before torch 1.6, and is no archive.

    Raises:
        CheckpointError: the file is damaged, or holds foreign objects or something else than tensors.
    """
    archive = read_old(path) if is_old else read_archive(path)
    if archive.pickled.foreign:
        shown = ", ".join(archive.pickled.foreign[:5])
        raise CheckpointError(
            f"{path} is a pickle that asks for {shown}, which could run code, and was not opened; expected "
            "tensors only. Ask its author for a safetensors file"
        )
    content = archive.pickled.value
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {_kind(content)}, expected a dictionary of tensors")
    once(path, "checksums", lambda: verify(path, archive))
    return _unwrap(path, _Filler(path, archive).fill(content))


class _Filler:
    """Puts tensors in the places that a pickle describes."""

    def __init__(self, path: Path, archive: Archive) -> None:
        self._path, self._archive = path, archive
        self._mapped = map_file(path)
        self._done: dict[int, Any] = {}  # containers by identity: a pickle may hold one a thousand times

    def fill(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, TensorPlace):
            return self._tensor(value)
        if not isinstance(value, (dict, list, tuple)) or depth > _DEEPEST:
            return value
        if id(value) not in self._done:
            self._done[id(value)] = None  # what contains itself
            if isinstance(value, dict):
                made: Any = {key: self.fill(part, depth + 1) for key, part in value.items()}
            else:
                made = type(value)(self.fill(part, depth + 1) for part in value)
            self._done[id(value)] = made
        return self._done[id(value)]

    def _tensor(self, place: TensorPlace) -> Tensor:
        record = self._archive.record(self._path, place.storage)
        dtype = TYPES.get(place.dtype)
        if dtype is None:
            damaged(self._path, f"it holds the type {place.dtype}, which this torch cannot read")
        count = torch.Size(place.shape).numel()
        extent = (
            1 + sum((side - 1) * step for side, step in zip(place.shape, place.stride, strict=True)) if count else 0
        )
        if max(place.offset + extent, count) * dtype.itemsize > record.size:
            damaged(self._path, f"a tensor of {place.dtype} {list(place.shape)} is larger than its storage")
        whole = self._storage(record, dtype, place.offset, extent)
        return whole.as_strided(place.shape, place.stride) if count else whole.view(place.shape)

    def _storage(self, record: Record, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """`count` numbers of a record from `offset` on."""
        if not count or record.content is None:
            return mapped_tensor(self._mapped, record.start + offset * dtype.itemsize, dtype, (count,))
        return torch.frombuffer(bytearray(record.content), dtype=dtype, count=count, offset=offset * dtype.itemsize)


def _unwrap(path: Path, content: Mapping[Any, Any]) -> TensorFile:
    """Training frameworks put the weights under `state_dict`, beside optimiser states and counters; those of upscalers under
    `params_ema` or `params`."""
    within = next((name for name in _STATES if isinstance(content.get(name), Mapping) and content[name]), "state_dict")
    state = content.get(within, content)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} has a state_dict that is a {type(state).__name__}, expected a dictionary")
    tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    others = {str(name): value for name, value in state.items() if not isinstance(value, Tensor)}
    if state is not content:
        others |= {str(name): value for name, value in content.items() if name != within}
    return TensorFile(path, tensors, others=others)


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, TensorPlace) else type(value).__name__
