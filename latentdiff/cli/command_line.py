"""The command that makes an image here, from the account of its text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from latentdiff.checkpoints.embedded import EMBEDDED_NAME
from latentdiff.errors import UsageError
from latentdiff.request.domains import Interval
from latentdiff.request.foreign.account import Account
from latentdiff.request.option import flag_of
from latentdiff.request.options import OF_MODEL, OPTIONS

TASKS = ("generate", "edit", "inpaint")
_MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".bin")
_ESCAPES = {"\n": "\\n", "\\": "\\\\", "'": "\\'"}


def command_line(account: Account, *, model: str | None = None, loras: str | None = None) -> str | None:
    """One line for a shell, with capitals for the files that an image needs besides; None if there is no such command.

    Args:
        model: the file of the model, if it is known.
        loras: the folder of LoRAs.
    """
    if account.lacking or account.task not in TASKS:
        return None
    words = ["latentdiff", account.task]
    if account.task != "generate":
        words.append("IMAGE.png")
    prompt = str(account.options.get("prompt", ""))
    options = [*_model(account, model), *_options(account), *_adapters(account, prompt, loras)]
    said = [*words[2:], quoted(prompt)]
    if prompt.startswith("-"):  # which would be an option
        return " ".join([*words[:2], *options, "--", *said])
    return " ".join([*words[:2], *said, *options])


def quoted(text: str) -> str:
    """A text as one word of a shell (bash, zsh), on one line that a terminal shows as it is."""
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_escaped, text))}'"


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x80 else f"\\U{code:08x}"


def _options(account: Account) -> Iterator[str]:
    for name, option in OPTIONS.items():
        value = account.options.get(name)
        is_said = value is not None and (name in OF_MODEL or value != option.default)
        if account.task == "inpaint" and name in ("width", "height"):
            continue
        if is_said:
            flag = option.flag(name)
            yield flag if value is True else f"{flag} {_written(option.domain, value)}"
    if account.strength is not None:
        yield f"--strength {account.strength!r}"
    if account.task == "inpaint":
        yield "--mask MASK.png"


def _written(domain: Any, value: Any) -> str:
    if isinstance(domain, Interval):
        return " ".join(map(repr, value))
    if isinstance(value, tuple | list):
        return ",".join(map(repr, value))
    return quoted(f"{value!r}" if isinstance(value, float) else str(value))


def _model(account: Account, model: str | None) -> Iterator[str]:
    is_ours = account.program.startswith("latentdiff")
    if is_ours and not model and account.model == EMBEDDED_NAME:
        return
    if model or account.model:
        yield f"--model {quoted(model or (account.model if is_ours else _file(account.model)))}"
    for name, value in account.model_options.items():
        flag = flag_of(name)
        yield flag if value is True else f"{flag} {quoted(str(value))}"


def _adapters(account: Account, prompt: str, folder: str | None) -> Iterator[str]:
    for lora in account.loras:
        yield f"--lora {quoted(f'{_file(lora.file)}:{lora.strength}')}"
    if _names_loras(prompt, str(account.options.get("prompt_syntax"))):
        yield f"--lora-dir {quoted(folder or 'LORAS')}"


def _names_loras(prompt: str, syntax: str) -> bool:
    from latentdiff.prompts.syntax import read_prompt

    try:
        return bool(read_prompt(prompt, syntax).loras)
    except UsageError:
        return False


def _file(name: str) -> str:
    """A model's file, where programs leave out the ending."""
    return name if name.endswith(_MODEL_FILES) else f"{name}.safetensors"
