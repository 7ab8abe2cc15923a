"""One part of a model from wherever it lies: a model of any layout, the part's own folder, or a file with it alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.checkpoints.families import family_in
from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import INDEX, read_tokenizer, weight_files
from latentdiff.checkpoints.hashing import place_hash
from latentdiff.checkpoints.hub import locate
from latentdiff.checkpoints.modules import parse_config, shapes_of
from latentdiff.checkpoints.raw import PART_LABELS, RawModel, usual_name, with_usual_names
from latentdiff.errors import CheckpointError
from latentdiff.reading.json import read_object

# By what a file with one part in the diffusers layout is known.
_MARKS = {
    "unet": "down_blocks.0.resnets.0.conv1.weight",
    "vae": "decoder.up_blocks.0.resnets.0.conv1.weight",
    "text_encoder": "text_model.embeddings.token_embedding.weight",
}
_ORIGINAL_MARKS = {"unet": "input_blocks.0.0.weight", "vae": "decoder.up.0.block.0.conv1.weight"}


@dataclass(frozen=True)
class PartWeights:
    """The weights of one part under the names of the diffusers layout, and its configuration.

    Attributes:
        tokenizer: the files of the text encoder's tokenizer, where they came with it.
        files: where the weights lie.
        guessed: the configuration is read off the tensors, in which not all of it shows.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[Path, ...]
    tokenizer: dict[str, str] = field(default_factory=dict)
    guessed: bool = False


def read_part(source: str | os.PathLike[str], part: str, whole: Any) -> PartWeights:
    """Read one part.

    Args:
        source: a model (folder, hub id or single file), the folder of a part, or a file that holds it alone.
        part: "unet", "vae" or "text_encoder".
        whole: reads a model of any layout, given its path.

    Raises:
        CheckpointError: there is no such part.
    """
    from latentdiff.checkpoints.prefixes import unwrapped
    from latentdiff.checkpoints.tiny_vae import is_tiny_vae, read_tiny_vae

    path = locate(source)
    if path.is_dir():
        if (path / INDEX).exists():
            return part_of(whole(path), part)
        return _from_folder(path, part)
    tensors = unwrapped(read_tensors(path).tensors)
    prefix = family_in(tensors).prefixes.get(part, "")
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if part == "vae" and is_tiny_vae(tensors):
        return PartWeights(*read_tiny_vae(path, tensors))
    return _from_names(path, part, below or tensors)


def check_fit(what: str, found: int, expected: int) -> None:
    """Raise a CheckpointError if two parts of a model differ in what they share."""
    if found != expected:
        raise CheckpointError(f"the model's parts do not fit: the U-Net expects {expected} {what}, found {found}")


def described(**places: str | os.PathLike[str] | None) -> dict[str, dict[str, str]]:
    """What recipes say of the places that parts were taken from: role -> {"file": name, "sha256": see `place_hash`}."""
    return {
        role: {"file": Path(place).name, "sha256": place_hash(locate(place))}
        for role, place in places.items()
        if place is not None
    }


def part_of(raw: RawModel, part: str) -> PartWeights:
    """One part of a model that was read whole."""
    tokenizer = raw.tokenizer if part == "text_encoder" else {}
    files = tuple(path for path in raw.weight_files if path.parent.name == part) or raw.weight_files
    return PartWeights(raw.tensors[part], raw.configs[part], files, tokenizer)


def held_parts(tensors: Iterable[str]) -> list[str]:
    """The parts that a single file holds whole or alone, by the names of its tensors."""
    names = set(tensors)
    prefixes = family_in(names).prefixes
    found = [part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in names)]
    if found:
        return found
    usual = {part: {usual_name(part, name) for name in names} for part in _MARKS}
    marks = ((part, {mark, _ORIGINAL_MARKS.get(part, mark)}) for part, mark in _MARKS.items())
    return [part for part, own in marks if usual[part] & own][:1]


def with_parts(raw: RawModel, parts: Mapping[str, PartWeights]) -> RawModel:
    """Put parts in the place of a model's own; it says no longer which words it knows where others than the VAE are."""
    if set(parts) - {"vae"}:
        raw.words = None
    for part, given in parts.items():
        given = _like(given, raw.configs.get(part, {}))
        own = {path for path in raw.weight_files if path.parent.name == part}
        raw.tensors[part], raw.configs[part] = given.tensors, given.config
        raw.names.pop(part, None)
        raw.tokenizer = given.tokenizer or raw.tokenizer
        raw.weight_files = tuple(dict.fromkeys((*(path for path in raw.weight_files if path not in own), *given.files)))
    return raw


def _like(given: PartWeights, own: Mapping[str, Any]) -> PartWeights:
    """What leaves no trace in tensors, as the number of groups, is that of the part that is replaced, if it was guessed."""
    if not given.guessed or own.get("_class_name") != given.config.get("_class_name"):
        return given
    kept = {
        name: own[name]
        for name in ("norm_num_groups", "scaling_factor", "sample_size", "addition_time_embed_dim")
        if name in own
    }
    return replace(given, config={**given.config, **kept})


def _from_folder(folder: Path, part: str) -> PartWeights:
    """`vae/` of a model, say, or what `save_pretrained` of the part alone wrote."""
    from latentdiff.checkpoints.tiny_vae import is_tiny_vae, read_tiny_vae

    config = read_object(folder / "config.json")
    files = weight_files(folder.parent, folder.name, part)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file).tensors
    if part == "vae" and is_tiny_vae(tensors):
        return PartWeights(*read_tiny_vae(files[0], tensors))
    tokenizer = folder.parent / "tokenizer"
    words = read_tokenizer(tokenizer) if part == "text_encoder" and tokenizer.is_dir() else {}
    return PartWeights(with_usual_names(part, tensors)[0], config, tuple(files), words)


def _from_names(path: Path, part: str, tensors: dict[str, Tensor]) -> PartWeights:
    from latentdiff.checkpoints import tables
    from latentdiff.checkpoints.infer import infer_unet, infer_vae

    usual, _ = with_usual_names(part, tensors)
    shapes = shapes_of(tensors)
    if part == "text_encoder":
        return _text_encoder(path, tensors, usual)
    if _ORIGINAL_MARKS[part] in tensors:
        config = (infer_unet(shapes, large=False) if part == "unet" else infer_vae(shapes)).to_diffusers()
        table = (tables.unet_map if part == "unet" else tables.vae_map)(parse_config(part, config))
        renamed = {ours: tensor for name, tensor in tensors.items() if (ours := table.to_ours(name)) is not None}
        lost = [name for name in tensors if table.to_ours(name) is None and not _is_training_leftover(name)]
        if lost:
            raise CheckpointError(f"{path} holds more than a {PART_LABELS[part]}: {', '.join(lost[:5])}")
        return PartWeights(
            tables.attention_to_linear(renamed) if part == "vae" else renamed, config, (path,), guessed=True
        )
    if _MARKS[part] in usual:
        beside = path.with_name("config.json")
        if beside.exists():
            return PartWeights(usual, read_object(beside), (path,))
        if part == "vae":
            return PartWeights(usual, _vae_by_our_names(usual), (path,), guessed=True)
    raise CheckpointError(
        f"expected a {PART_LABELS[part]} in {path}, found {', '.join(list(tensors)[:3])}; a part in the diffusers layout "
        "needs its config.json beside it"
    )


def _text_encoder(path: Path, tensors: dict[str, Tensor], usual: dict[str, Tensor]) -> PartWeights:
    from latentdiff.checkpoints import tables
    from latentdiff.checkpoints.infer import infer_text_encoder, is_open_clip

    shapes = shapes_of(tensors)
    try:
        config = infer_text_encoder(shapes)
    except (KeyError, IndexError, StopIteration) as error:
        raise CheckpointError(
            f"expected a text encoder in {path}, found {', '.join(list(tensors)[:3])}: the tensor {error} is missing"
        ) from error
    if is_open_clip(shapes):
        table = tables.open_clip_map(config["num_hidden_layers"])
        renamed = {ours: tensor for name, tensor in tensors.items() if (ours := table.to_ours(name)) is not None}
        return PartWeights(tables.to_transformers(renamed), config, (path,))
    names = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    kept = with_usual_names("text_encoder", {n: t for n, t in names.items() if "projection" not in n})[0]
    return PartWeights(kept, config, (path,))


def _vae_by_our_names(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration that the shapes of a VAE in the diffusers layout show; the rest is that of the published."""
    widths = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in tensors:
        widths.append(tensors[name].shape[0])
    layers = sum(f"encoder.down_blocks.0.resnets.{index}.conv1.weight" in tensors for index in range(16))
    parsed = parse_config("vae", {"block_out_channels": widths, "layers_per_block": layers, "sample_size": 512})
    latent = tensors["post_quant_conv.weight"].shape[1] if "post_quant_conv.weight" in tensors else 4
    return parsed.to_diffusers() | {"latent_channels": latent}


def _is_training_leftover(name: str) -> bool:
    return name.startswith(("loss.", "model_ema.")) or name in ("scale_factor",)
