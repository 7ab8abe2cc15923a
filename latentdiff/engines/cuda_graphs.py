"""CUDA graphs: a whole function of kernels launched at once, replayed on inputs in the same places of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MAX_GRAPHS = 8  # each keeps the memory of its intermediate results
WARM_UP = 3  # calls before recording, in which libraries choose their kernels


class GraphedFunction:
    """A function of tensors that does the same work for inputs of the same shapes; on a GPU it is recorded and
    replayed.

    Elsewhere it is just called. Graphs beyond `MAX_GRAPHS` push out those that were not used for longest.

    Args:
        function: launches work and nothing else; reads no values.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    @torch.no_grad()
    def __call__(self, state: Hashable, *inputs: Tensor) -> Tensor:
        """The function's output.

        Args:
            state: of what else the function reads; another state means another recording.
        """
        device = inputs[0].device
        inputs = tuple(each.to(device, non_blocking=True) for each in inputs)
        if not is_recordable(device):
            return self._function(*inputs)
        key = (state, device, *((each.shape, each.dtype) for each in inputs))
        if key not in self._graphs:
            self._graphs[key] = _Graph(self._function, inputs)
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key](inputs)


def is_recordable(device: torch.device) -> bool:
    """Whether torch records work on `device`."""
    return device.type == "cuda"


class _Graph:
    """One recording."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [each.clone() for each in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._graph.replay()
        return self._output.clone()
