"""`latentdiff import`: what the text in an image of any program asks for, what of it is done here, and the command."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from latentdiff.cli.command_line import command_line, quoted
from latentdiff.cli.options import ANY_PATH
from latentdiff.cli.places import check_image
from latentdiff.errors import LatentDiffError, printable
from latentdiff.recipe import read_account
from latentdiff.request.foreign.account import Account, Field

_COLUMNS = ("field", "value", "verdict", "why")
_WIDEST = 44  # letters of a field and of a value


@click.command("import")
@click.argument("images", nargs=-1, required=True, type=ANY_PATH, metavar="IMAGE...")
@click.option("--model", metavar="FILE|FOLDER", help="The model for the command; its hash is compared with the text's.")
@click.option("--lora-dir", metavar="FOLDER", help="The folder of LoRAs for the command.")
@click.option("--json", "as_json", is_flag=True, help="Print it as a JSON list, one object for each image.")
def import_(images: tuple[Path, ...], model: str | None, lora_dir: str | None, as_json: bool) -> int:
    """Read the text in each IMAGE, of AUTOMATIC1111, Forge, ComfyUI, InvokeAI, Fooocus or latentdiff.

    A table says of every field whether it is honoured, approximated or refused here, and why. Under it stands the command
    that makes the image.

    The exit code is 0 if all images have a text that can be read, else 1.
    """
    found: list[dict[str, Any]] = []
    code = 0
    for path in images:
        try:
            check_image(path)
            from latentdiff.image import open_image  # which loads torch

            account = read_account(open_image(path).info)
            account = _with_model(account, model) if model else account
        except LatentDiffError as error:
            code = 1
            found.append({"image": str(path), "error": str(error)})
            click.echo(f"error: {printable(path)}: {error}", err=True)
            continue
        command = _command(account, path, model, lora_dir)
        found.append({"image": str(path), **asdict(account), "command": command})
        if not as_json:
            click.echo(_shown(path, account, command))
    if as_json:
        click.echo(json.dumps(found))
    return code


def _command(account: Account, path: Path, model: str | None, loras: str | None) -> str | None:
    line = command_line(account, model=model, loras=loras)
    if line is None and not account.lacking:  # a task of ours, which its recipe knows all of
        return f"latentdiff reproduce {quoted(str(path))}" + (f" --model {quoted(model)}" if model else "")
    return line


def _with_model(account: Account, model: str) -> Account:
    """The account with what the model's file says of it.

    Raises:
        UsageError, CheckpointError: there is no such file.
    """
    from latentdiff.checkpoints.hashing import file_hash

    if not account.model_hash or not Path(model).is_file():
        return account
    found = file_hash(Path(model))
    if found.startswith(account.model_hash):
        return account
    why = f"{model} is another model: its SHA-256 begins with {found[: len(account.model_hash)]}"
    fields = tuple(one for one in account.fields if one.name != "Model hash")
    return replace(account, fields=(*fields, Field("Model hash", account.model_hash, "refused", why)))


def _shown(path: Path, account: Account, command: str | None) -> str:
    """The table, and the command on a line of its own."""
    cells = [(x.name, x.value, x.verdict, x.why) for x in account.fields]
    rows = [_COLUMNS, *((_cell(name), _cell(value), verdict, printable(why)) for name, value, verdict, why in cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{printable(path)}: {printable(account.program)}"]
    for *first, why in rows:
        shown = [cell.ljust(width) for cell, width in zip(first, widths, strict=True)]
        lines.append("  ".join([*shown, why]).rstrip())
    end = command if command else f"no command makes it here: {printable('; '.join(account.lacking))}"
    return "\n".join([*lines, "", end, ""])


def _cell(text: str) -> str:
    line = printable(text)
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"
