"""Variants `{a|b}` and wildcards `__name__` in prompts, by the library dynamicprompts (extra `wildcards`)."""

from __future__ import annotations

import os
from pathlib import Path

from latentdiff.errors import MissingDependencyError, UsageError
from latentdiff.prompts.notice import shortened


class Wildcards:
    """Draws prompts from templates.

    Args:
        folder: text and YAML files; `__name__` is a random line of `name.txt`.

    Raises:
        MissingDependencyError: dynamicprompts is not installed.
        UsageError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from dynamicprompts.wildcards import WildcardManager
        except ImportError as error:
            raise MissingDependencyError(
                "wildcards need dynamicprompts; install it with: pip install 'latentdiff[wildcards]'"
            ) from error
        if not Path(folder).is_dir():
            raise UsageError(f"there is no folder {folder} of wildcards")
        self._manager = WildcardManager(Path(folder))

    def draw(self, template: str, seed: int) -> str:
        """The prompt that a template makes with a seed, always the same.

        Raises:
            UsageError: it cannot be read, or names a wildcard that has no file.
        """
        from dynamicprompts.generators import RandomPromptGenerator
        from pyparsing import ParseException

        try:
            (prompt,) = RandomPromptGenerator(self._manager, seed=seed).generate(template, 1)
        except ParseException as error:
            raise UsageError(
                f"expected a template such as 'a {{red|blue}} cat', found {shortened(template)}"
            ) from error
        if missing := [name for name in _names(prompt) if not self._manager.get_values(name)]:
            raise UsageError(f"there is no wildcard __{missing[0]}__ in the folder, which the prompt names")
        return prompt


def _names(prompt: str) -> list[str]:
    return prompt.split("__")[1::2]
