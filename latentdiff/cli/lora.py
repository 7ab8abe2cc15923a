"""`latentdiff lora`: merge, convert and inspect LoRA files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from latentdiff.cli.loras import ALLOW_PARTIAL, parse_scaled
from latentdiff.cli.options import ANY_PATH, MODEL
from latentdiff.cli.output import check_writable
from latentdiff.cli.places import FOLDER, check_there, written
from latentdiff.errors import CheckpointError, printable
from latentdiff.reading.json import parse_json
from latentdiff.request.options import LoRADialect

if TYPE_CHECKING:
    from latentdiff.checkpoints.components import Components

_LONGEST = 100  # characters of a metadata entry that are shown
_KINDS = {
    "text encoder": r"^(lora_te|text_)",
    "attention": r"attn[12][._]to_",
    "feed forward": r"[._]ff[._]net[._]",
    "projections": r"proj_(in|out)$",
    "convolutions": r"(conv|conv[12]|conv_shortcut|conv_in|conv_out|_op|in_layers_2|out_layers_3|skip_connection)$",
}


@click.group()
def lora() -> None:
    """Merge, convert and inspect LoRA files."""


@lora.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE[:STRENGTH]...")
@MODEL
@ALLOW_PARTIAL
@click.option(
    "--out", type=ANY_PATH, required=True, callback=FOLDER, metavar="FOLDER", help="Where to write the adapted model."
)
def merge(files: tuple[str, ...], model: str | None, allow_partial: bool, out: Path) -> None:
    """Put one or more LoRAs into a model's weights and write it as a folder in the diffusers layout."""
    scaled = list(map(parse_scaled, files))
    for path, _ in scaled:
        check_there("LoRA file", path)
    check_writable(out)
    from latentdiff.adapters.lora.adapter import merge as merge_loras
    from latentdiff.adapters.lora.loading import load_lora
    from latentdiff.adapters.lora.metadata import learned_words
    from latentdiff.checkpoints.components import save_folder

    parts = _load(model)
    loaded = []
    for path, scale in scaled:
        found, report = load_lora(path, parts.unet, parts.text_encoder, allow_partial=allow_partial)
        click.echo(f"{path}: {report}", err=True)
        if report.words:
            click.echo(f"note: the words of {path} cannot be merged into weights and are left out", err=True)
        loaded.append((found, scale))
        parts.words = parts.words and parts.words.with_texts(learned_words(found.metadata))
    merge_loras(loaded)
    save_folder(parts, out)
    click.echo(out)


@lora.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT.safetensors", type=ANY_PATH, callback=written(".safetensors", folder=False))
@click.option(
    "--to",
    "dialect",
    type=click.Choice(get_args(LoRADialect)),
    default="kohya",
    show_default=True,
    help="kohya: for web UIs, kohya's tools and diffusers; peft: for diffusers and PEFT.",
)
@MODEL
def convert(source: str, target: Path, dialect: str, model: str | None) -> None:
    """Write the LoRA file IN with other names. The model that it was made for tells what the names mean."""
    check_there("LoRA file", source)
    check_writable(target.parent)
    from latentdiff.adapters.lora.loading import load_lora
    from latentdiff.adapters.lora.saving import save_lora

    parts = _load(model)
    found, report = load_lora(source, parts.unet, parts.text_encoder)
    save_lora(found, target, dialect=dialect)
    click.echo(f"{source}: {report}", err=True)
    click.echo(target)


@lora.command()
@click.argument("file", metavar="FILE")
def inspect(file: str) -> None:
    """Say what a LoRA file adapts, how strongly, and what it was made from. Executes nothing in it."""
    check_there("LoRA file", file)
    from latentdiff.adapters.lora.reading import made_for, read_lora
    from latentdiff.checkpoints.hashing import file_hash

    found = read_lora(file)
    click.echo(found.path)
    facts = {
        "kinds": ", ".join(f"{count} {kind}" for kind, count in found.kinds.most_common()),
        "names": found.dialect,
        "made for": made_for(found),
        "layers": f"{len(found.layers)} ({_summary(found.layers)})",
        "rank": ", ".join(map(str, found.ranks)),
        "alpha": ", ".join(f"{alpha:g}" for alpha in found.alphas),
        "words": ", ".join(found.words),
        "bytes": f"{found.path.stat().st_size:,}",
        "SHA-256": file_hash(found.path),
    }
    for name, value in (facts | _told(found.metadata)).items():
        if value:
            click.echo(printable(f"  {name + ': ':<14}{value}"))


def _load(model: str | None) -> Components:
    from latentdiff.checkpoints.components import load_components
    from latentdiff.checkpoints.embedded import embedded_model

    return load_components(model or embedded_model())


def _summary(names: Iterable[str]) -> str:
    """How many layers of each kind."""
    kinds = (next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "others") for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


def _told(metadata: Mapping[str, str]) -> dict[str, str]:
    """The file's metadata, ours unpacked."""
    try:
        own = parse_json(metadata.get("latentdiff", "{}"), "latentdiff")
    except CheckpointError:
        own = {}
    training = own.pop("training", {}) if isinstance(own, dict) else {}
    entries = {**(own if isinstance(own, dict) else {}), **(training if isinstance(training, dict) else {})}
    entries |= {name: text for name, text in sorted(metadata.items()) if name not in ("latentdiff", "format")}
    return {name: _short(value) for name, value in entries.items() if value not in ("", None)}


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
