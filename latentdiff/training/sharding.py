"""Weights, gradients, moments and averages split over the processes: torch's fully_shard (FSDP, second version).

A split parameter is a DTensor. Optimizer and averages work on this process's part of it; checkpoints, samples and
results need the whole, which is put together for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from latentdiff.errors import CheckpointError
from latentdiff.networks.layers import ResnetBlock, SpatialTransformer

# What is gathered for its forward pass and let go after it; the rest of a network is gathered as one.
_BLOCKS = (ResnetBlock, SpatialTransformer)

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_state_dict_pre_hooks",
)  # fmt: skip


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether accelerate is configured to split the model over the processes."""
    # accelerate itself heeds its setting on GPUs only.
    on_cpu = (
        accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    )
    return accelerator.distributed_type == DistributedType.FSDP or on_cpu


def shard(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the parameters of `networks` over all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks:
        network.to(memory_format=torch.contiguous_format)  # no other can be split
        for module in network.modules():
            if isinstance(module, _BLOCKS):
                fully_shard(module, mesh=mesh)
        fully_shard(network, mesh=mesh)


def synchronise(networks: Sequence[nn.Module], now: bool) -> None:
    """Whether the next backward pass adds up the gradients of all processes."""
    for network in networks:
        network.set_requires_gradient_sync(now)


def is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor, in the same memory; others as they are."""
    return tensor.detach().to_local() if is_split(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this process keeps where `like` is split; everything where it is not."""
    if not is_split(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what each process has a `part` of as it has of `like`. All processes must call it."""
    if not is_split(like) or part.shape != like.to_local().shape:
        return part
    from torch.distributed.tensor import DTensor

    split = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return split.full_tensor()


def wholes(parts: Mapping[str, Tensor], like: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """`whole_of` of many, one after the other, on the CPU; the processes that do not `keep` them get none."""
    found = {}
    for name, part in parts.items():
        whole = whole_of(part, like[name])
        if keep:
            found[name] = whole.detach().cpu()
    return found


@contextmanager
def whole(networks: Sequence[nn.Module], *, here: bool) -> Iterator[None]:
    """Inside, `networks` are plain modules with all of their weights in the process that is `here`; the others wait
    outside.

    All processes must enter.
    """
    with torch.no_grad():
        before = [_parts(network, here) for network in networks]
    try:
        yield
    finally:
        for state in before:
            for module, attributes, cls in state:
                module.__dict__.update(attributes)
                module.__class__ = cls


def _parts(network: nn.Module, here: bool) -> list[tuple[nn.Module, dict[str, object], type]]:
    """Make a network plain where it is wanted; returns what its modules were."""
    from torch.distributed.fsdp import FSDPModule

    state = []
    for module in network.modules():
        gathered = {
            name: p.full_tensor() if p is not None and is_split(p) else p for name, p in module._parameters.items()
        }
        if not here:
            continue
        state.append((module, {name: module.__dict__[name] for name in ("_parameters", *_HOOKS)}, type(module)))
        module.__dict__["_parameters"] = {
            name: value if value is None else nn.Parameter(value, requires_grad=False)
            for name, value in gathered.items()
        }
        if isinstance(module, FSDPModule):
            module.__dict__.update({name: type(module.__dict__[name])() for name in _HOOKS})
            plain = (cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
            module.__class__ = next(plain)  # that of FSDP derives from its own and from the plain one
    return state


def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], of: Mapping[str, Tensor], path: Path) -> None:
    """Copy `saved`, which was read from `path`, to `live`: what belongs to the parameters `of` the same names.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if differing := sorted(set(live) ^ set(saved)):
        raise CheckpointError(
            f"{path} holds other weights than this configuration trains, first {differing[0]}; choose another `run`"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            source = part_of(saved[name], of[name])
            if own_part(tensor).shape != source.shape:
                raise CheckpointError(
                    f"{path}: {name} has the shape {tuple(saved[name].shape)}, this configuration needs {tuple(tensor.shape)};"
                    " choose another `run`"
                )
            own_part(tensor).copy_(source)
