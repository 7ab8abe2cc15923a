"""Adapters and embeddings on the command line: FILE:STRENGTH, loading them, and finding those that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentdiff.cli.places import check_there, folder_there
from latentdiff.errors import DataError, UsageError
from latentdiff.prompts.syntax import read_prompt
from latentdiff.recipe import Recipe

if TYPE_CHECKING:
    from latentdiff.adapters.lora.strength import Strength
    from latentdiff.pipeline import Pipeline

ScaledFile = tuple[str, "float | str | Strength"]
_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")


def parse_scaled(text: str) -> ScaledFile:
    """ "file.safetensors:0.8" -> ("file.safetensors", 0.8); without a strength it is 1. `adapters.lora.strength` has the
    grammar.

    Raises:
        UsageError: the part behind the colon is no strength.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or not path or Path(text).exists() or (len(path) == 1 and strength[:1] in ("\\", "/")):
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        from latentdiff.adapters.lora.strength import Strength

        try:
            return path, Strength.parse(strength)
        except UsageError:
            if Path(path).exists():
                raise
    return text, 1.0


def _parse_all(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[ScaledFile]:
    found = [parse_scaled(text) for text in texts]
    for path, _ in found:
        check_there("LoRA file", path)
    return found


def _embeddings(context: click.Context, parameter: click.Parameter, paths: tuple[str, ...]) -> list[str]:
    """The files, and all embeddings of the folders."""
    files = []
    for path in map(Path, paths):
        check_there("embedding", str(path))
        found = [path]
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if each.suffix in (".safetensors", ".pt", ".bin"))
            if not found:
                raise UsageError(f"expected embeddings in {path} (.safetensors, .pt, .bin), found none")
        files += [str(each) for each in found]
    return files


LORAS = click.option(
    "--lora",
    "loras",
    multiple=True,
    callback=_parse_all,
    metavar="FILE[:STRENGTH]",
    help="Adapt the model by a LoRA or LyCORIS file, at a strength: 0.8, or unet=0.8,te=0.4, or 0.8,blocks=1,0,... with "
    "17, 25 or 26 numbers (base, IN, M and OUT blocks).  [default: 1]  An embedding is taken too. Repeat it for several.",
)
ALLOW_PARTIAL = click.option(
    "--allow-partial", is_flag=True, help="Use what fits of a --lora that was made for another model."
)
EMBEDDINGS = click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    callback=_embeddings,
    metavar="FILE|FOLDER",
    help="Teach the model a word by a textual-inversion file; the prompt uses it by its name. Repeat it for several.",
)


LORA_DIR = click.option(
    "--lora-dir",
    type=click.Path(path_type=Path),
    callback=folder_there("LoRAs"),
    metavar="FOLDER",
    help="The folder of the LoRAs that prompts name by <lora:name:weight>, by their files' names without the ending.",
)


@contextmanager
def with_loras(
    pipe: Pipeline,
    loras: Iterable[ScaledFile],
    *,
    embeddings: Iterable[str] = (),
    allow_partial: bool = False,
) -> Iterator[None]:
    """Inside, the model is adapted by these; how much of each file fits it goes to stderr."""
    names = []
    try:
        for number, (path, scale) in enumerate([*((path, None) for path in embeddings), *loras], 1):
            name = f"{number}: {path}"  # the same file may come twice
            if scale is None:
                report = pipe.load_embedding(path, name)
            else:
                report = pipe.load_lora(path, scale, name, allow_partial=allow_partial)
            names.append(name)
            click.echo(f"{path}: {report}", err=True)
        yield
    finally:
        for name in names:
            pipe.unload_lora(name)


def loras_of(recipe: Recipe, folders: Iterable[Path]) -> list[ScaledFile]:
    """The files of a recipe's LoRAs, found by their names or contents in these folders.

    Raises:
        DataError: one is not there, or the recipe does not say which it is.
    """
    from latentdiff.adapters.lora.strength import Strength

    folders = list(folders)
    try:
        entries = [
            (entry["file"], entry["sha256"], entry.get("tensors", ""), Strength.of(entry["scale"]))
            for entry in recipe.loras
        ]
        return [(str(_find(file, sha256, tensors, folders)), strength) for file, sha256, tensors, strength in entries]
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise DataError(f"the image's recipe does not say which LoRAs it was made with: {error}") from error


def _find(file: str, sha256: str, tensors: str, folders: list[Path]) -> Path:
    from latentdiff.checkpoints.hashing import file_hash, tensors_hash

    name = Path(file).name  # never a path: the recipe may come from anywhere
    named = [folder / name for folder in folders]
    others = [
        path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES
    ]
    if not sha256:  # which other programs do not say
        others = [path for path in others if name in (path.name, path.stem)]
    for path in filter(Path.is_file, [*named, *others]):
        is_it = not sha256 or file_hash(path) == sha256
        if is_it and (not tensors or tensors_hash(path).startswith(tensors)):
            return path
    places, digits = ", ".join(map(str, folders)), sha256[:10] or tensors or "unknown"
    raise DataError(
        f"the image was made with the LoRA {name} (SHA-256 {digits}...), which is not in {places}; say which folder it is in "
        "with --lora-dir"
    )


def offer_loras_of(pipe: Pipeline, recipe: Recipe, folders: Iterable[Path]) -> Recipe:
    """Let the recipe's prompt find the LoRAs that it names; returns the recipe without them and the model's own.

    Raises:
        DataError: one is not there, or the recipe does not say which it is.
    """
    _check_own(pipe, recipe)
    named = [entry for entry in recipe.loras if "tag" in entry]
    known = {entry["tag"] for entry in named}
    said = [tag.name for tag in read_prompt(recipe.prompt, recipe.prompt_syntax).loras]
    tags = [name for name in said if name not in known]
    named = [entry for entry in named if "tensors" not in entry or entry["tag"] in said]
    named += [{"file": name, "sha256": "", "scale": 1.0, "tag": name} for name in dict.fromkeys(tags)]
    files = loras_of(replace(recipe, loras=named), folders)
    for entry, (path, _) in zip(named, files, strict=True):
        pipe.offered.add(str(entry["tag"]), path)
    return replace(recipe, loras=[entry for entry in recipe.loras if not {"tag", "part"} & entry.keys()])


def _check_own(pipe: Pipeline, recipe: Recipe) -> None:
    """Make sure that a LoRA for few steps that acted, which `fast` says, is the one that the model has."""
    own = pipe.distilled.sha256 if pipe.distilled else ""
    expected = [str(entry.get("sha256", "")) for entry in recipe.loras if "part" in entry]
    if any(sha256 != own for sha256 in expected) or (recipe.fast and not own):
        found = f"another one, {own[:10]}..." if own else "none"
        raise DataError(
            f"the image was made with the model's LoRA for few steps (SHA-256 {''.join(expected)[:10] or 'unknown'}...), and"
            f" this model has {found}; give the model that it was made with by --model"
        )
