"""Taps: read or replace what named modules of a network take and give, and leave the network exactly as it was.

Feature injection, attention maps and adapters work through them; the network itself knows of none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, Self

from torch import nn

from latentdiff.errors import UsageError

# (module's name, its positional arguments, its output) -> another output, or None to keep it.
TapOutput = Callable[[str, tuple[Any, ...], Any], Any]
# (module's name, its positional arguments) -> other arguments, or None to keep them.
TapArguments = Callable[[str, tuple[Any, ...]], tuple[Any, ...] | None]


class Tap:
    """Functions on named modules of a network, in force inside a `with`.

        with Tap(unet, ["up_blocks.1.resnets.1.conv2"], output=lambda name, arguments, output: 0 * output):
            unet(x, t, context)

    On leaving, also by an exception, only what this tap added is gone: taps nest, also on the same module, where the
    one entered last sees what the earlier ones made.

    Args:
        root: the network.
        names: modules by their dotted names in `root.named_modules()`.
        output: reads or replaces what each module gives.
        arguments: reads or replaces the positional arguments that each module takes.

    Raises:
        UsageError: `root` has no module of that name.
    """

    def __init__(
        self,
        root: nn.Module,
        names: Iterable[str],
        *,
        output: TapOutput | None = None,
        arguments: TapArguments | None = None,
    ) -> None:
        known = dict(root.named_modules())  # once: an adapter names a hundred of them
        self._modules = {name: known[name] if name in known else find_module(root, name) for name in names}
        self._output, self._arguments = output, arguments
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this tap is in force already; make another one")
        for name, module in self._modules.items():
            if self._arguments is not None:
                self._handles.append(module.register_forward_pre_hook(_on_arguments(self._arguments, name)))
            if self._output is not None:
                self._handles.append(module.register_forward_hook(_on_output(self._output, name)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()


def find_module(root: nn.Module, name: str) -> nn.Module:
    """The module called `name` in `root`.

    Raises:
        UsageError: there is none.
    """
    modules = dict(root.named_modules())
    if name in modules:
        return modules[name]
    similar = ", ".join(get_close_matches(name, modules, n=3)) or ", ".join(list(modules)[1:4])
    raise UsageError(
        f"expected the name of a module of {type(root).__name__}, found {name!r}; names like it: {similar}"
    )


def _on_arguments(function: TapArguments, name: str) -> Callable[..., Any]:
    return lambda module, arguments: function(name, arguments)


def _on_output(function: TapOutput, name: str) -> Callable[..., Any]:
    return lambda module, arguments, output: function(name, arguments, output)
