"""The diffusers folder layout: model_index.json, and a folder of configuration and weights for every part."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.checkpoints import distilled
from latentdiff.checkpoints.families import SD, family_with, is_text, parts_in
from latentdiff.checkpoints.files import TensorFile, read_tensors
from latentdiff.checkpoints.index import INDEX, unknown_classes
from latentdiff.checkpoints.layout import BESIDE, STEMS, weight_candidates
from latentdiff.checkpoints.raw import PART_LABELS, RawModel, with_usual_names
from latentdiff.checkpoints.tokenizer import with_vocabulary_files
from latentdiff.checkpoints.writing import write_safetensors
from latentdiff.errors import CheckpointError, LatentDiffError
from latentdiff.files import atomic_path
from latentdiff.networks.image_encoder import DEVIATION, MEAN
from latentdiff.prompts import words
from latentdiff.reading.json import read_object
from latentdiff.reading.plain import read_text

EXTRAS = "original_extras.safetensors"  # what an original single file holds beyond the parts of a folder
_SCHEDULERS = ("scheduler", "low_res_scheduler", "image_noising_scheduler")
CONFIGS = {part: f"{part}/config.json" for part in (*STEMS, *BESIDE)} | {
    name: f"{name}/scheduler_config.json" for name in _SCHEDULERS
}
# What prepares images for CLIP's encoder.
_CLIP_IMAGES = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_convert_rgb": True,
                "do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": DEVIATION, "resample": 3}  # fmt: skip
# Parts that published folders have and that have no place in a single file and no use here.
_IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator")
_IN_MODELS = frozenset(
    {INDEX, EXTRAS, words.FILE, distilled.FOLDER, "tokenizer", "tokenizer_2", *_SCHEDULERS, *STEMS, *BESIDE, *_IGNORED_PARTS}
)


def weight_files(folder: Path, part: str, kind: str = "") -> list[Path]:
    """The files that hold the weights of one part.

    Args:
        folder: of the model.
        part: the part's folder.
        kind: which part it is, where its folder is not called so.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    kind = kind or part
    for candidate in weight_candidates(kind):
        path = folder / part / Path(candidate).name
        if path.exists():
            return shards(path) if path.suffix == ".json" else [path]
    raise CheckpointError(
        f"{folder} has no weights of the {PART_LABELS[kind]}: expected {part}/{ {**STEMS, **BESIDE}[kind][0] }.safetensors "
        f"(or .fp16.safetensors, shards, .bin), found {listing(folder / part)}"
    )


def read_folder(folder: Path) -> RawModel:
    """Read configuration and map the weights of a diffusers folder.

    Raises:
        CheckpointError: it is no such folder, of another pipeline, or a part of it is missing or damaged.
    """
    index = _check_index(folder)
    parts = parts_in(index)
    warnings = unknown_classes(index)
    beside = [part for part in BESIDE if (folder / part).is_dir()] if "image_normalizer" in index else []
    # What prepares images for CLIP is always the same, and written again.
    ignored = [name for name in _IGNORED_PARTS if not (beside and name in (*BESIDE, "feature_extractor"))]
    left_out = [name for name in ignored if (folder / name).is_dir()]
    # A folder written from this must not promise parts that it does not have.
    index |= (
        {"requires_safety_checker": False} if "requires_safety_checker" in index or family_with(parts) is SD else {}
    )
    index |= {name: [None, None] for name in ignored if name in index}
    configs: dict[str, dict[str, Any]] = {"model_index": index}
    configs |= {
        name: _config(folder / path) for name, path in CONFIGS.items() if name in (*parts, *beside, "scheduler")
    }
    others = (name for name in _SCHEDULERS if name not in configs and (folder / CONFIGS[name]).exists())
    configs |= {name: _config(folder / CONFIGS[name]) for name in others}
    tensors, names, files = {}, {}, []
    for part in parts:
        files += (part_files := weight_files(folder, part))
        tensors[part], others = with_usual_names(part, _merge(part_files))
        if others:
            names[part] = others
    seeing = {part: weight_files(folder, part) for part in beside}
    tokenizers = [read_tokenizer(folder / name) for name in family_with(parts).tokenizers]
    extras = read_tensors(folder / EXTRAS) if (folder / EXTRAS).exists() else TensorFile(folder, {})
    return RawModel(
        source=folder,
        tensors=tensors,
        configs=configs,
        tokenizer=tokenizers[0],
        second_tokenizer=tokenizers[1] if len(tokenizers) > 1 else {},
        extras=extras.tensors,
        names=names,
        metadata=extras.metadata,
        warnings=warnings,
        left_out=left_out,
        distilled=distilled.read_distilled(folder / distilled.FOLDER),
        words=words.read_words(folder),
        weight_files=(*files, *(file for some in seeing.values() for file in some)),
        beside={part: _merge(some) for part, some in seeing.items()},
    )


def write_folder(raw: RawModel, folder: Path) -> None:
    """Write a model as a diffusers folder: built beside `folder`, then renamed to it.

    Raises:
        CheckpointError: `folder` holds something else than a model.
        LatentDiffError: it cannot be written.
    """
    with replaced_folder(folder) as temporary:
        schedulers = [name for name in _SCHEDULERS if name in raw.configs]
        for name in (*raw.parts, *schedulers, *raw.beside, "model_index"):
            config = _explicit(raw.configs[name]) if is_text(name) else raw.configs[name]
            path = temporary / {**CONFIGS, "model_index": INDEX}[name]
            _write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        own = (raw.tokenizer, raw.second_tokenizer)
        for place, files in zip(family_with(raw.parts).tokenizers, own, strict=False):
            for name, text in with_vocabulary_files(files).items():
                _write_text(temporary / place / name, text)
        for part in raw.parts:
            stem = STEMS[part][0]
            others = raw.names.get(part, {})
            save_tensors(
                {others.get(name, name): tensor for name, tensor in raw.tensors[part].items()},
                temporary / part / f"{stem}.safetensors",
                {"format": "pt"},
            )
        if raw.distilled:
            distilled.copy_distilled(raw.distilled, temporary)
        for part, tensors in raw.beside.items():
            save_tensors(tensors, temporary / part / f"{BESIDE[part][0]}.safetensors", {"format": "pt"})
        if "image_encoder" in raw.beside:
            side = raw.configs["image_encoder"]["image_size"]
            sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
            _write_text(
                temporary / "feature_extractor" / "preprocessor_config.json", json.dumps({**_CLIP_IMAGES, **sizes})
            )
        if raw.extras or raw.metadata:
            save_tensors(raw.extras, temporary / EXTRAS, raw.metadata)
        if raw.words is not None:
            _write_text(temporary / words.FILE, json.dumps(words.as_json(raw.words), indent=1) + "\n")


def _explicit(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 computes in the type of the file, diffusers beside it in float32, unless the type is stated."""
    return dict(config) if {"dtype", "torch_dtype"} & config.keys() else {**config, "dtype": "float32"}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically; values and types stay as they are."""
    with atomic_path(path) as temporary:
        write_safetensors(tensors, temporary, metadata)


def _check_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        raise CheckpointError(
            f"{folder} is no model folder: expected {INDEX}, found {listing(folder)}; give the folder that "
            "holds unet/, vae/, text_encoder/ and tokenizer/, or a single file"
        )
    index = read_object(folder / INDEX)
    parts = parts_in(index)
    if "transformer" in index or "prior" in index:
        raise CheckpointError(
            f"{folder} holds a {index.get('_class_name')}, another architecture; expected Stable Diffusion 1.x, 2.x or XL"
        )
    needed = (*parts, *family_with(parts).tokenizers, "scheduler")
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: no {', '.join(missing)}; found {listing(folder)}")
    return index


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing; found {listing(path.parent)}")
    # diffusers writes -Infinity for the lambda_min_clipped of DPM-Solver.
    return read_object(path, finite=path.name != Path(CONFIGS["scheduler"]).name)


def read_tokenizer(folder: Path) -> dict[str, str]:
    """The files of a tokenizer: name -> text.

    Raises:
        CheckpointError: there are none.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".txt"))
    names = {path.name for path in files}
    if not {"vocab.json", "merges.txt"} <= names and "tokenizer.json" not in names:
        raise CheckpointError(
            f"{folder} holds no CLIP tokenizer: expected vocab.json and merges.txt, or tokenizer.json, found {listing(folder)}"
        )
    return {path.name: read_text(path, remedy="download it again") for path in files}


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index of shards lists.

    Raises:
        CheckpointError: it lists none, or one in another folder.
    """
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index} lists no shards: expected a weight_map of file names; download it again")
    names = sorted(set(listed.values()))
    for name in names:
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise CheckpointError(f"{index} lists the shard {name[:80]!r}; expected names of files beside it")
    return names


def shards(index: Path) -> list[Path]:
    """The files that an index of shards lists.

    Raises:
        CheckpointError: one of them is missing.
    """
    paths = [index.parent / name for name in shard_names(index)]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        raise CheckpointError(
            f"{index.parent} lacks shards that {index.name} lists: {', '.join(missing) or 'all'}; download them again"
        )
    return paths


def _merge(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file).tensors
    return tensors


def listing(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "nothing"


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced_folder(folder: Path, known: Collection[str] = _IN_MODELS, mark: str = INDEX) -> Iterator[Path]:
    """Give an empty folder beside `folder` that takes its place when the block ends well.

    Args:
        known: names that a folder holds which may be replaced.
        mark: the one of them that it holds in any case.

    Raises:
        CheckpointError: `folder` holds something else, or cannot be written.
    """
    _check_replaceable(folder, known, mark)
    mark = secrets.token_hex(4)
    temporary, old = folder.with_name(f".{folder.name}-{mark}"), folder.with_name(f".{folder.name}-{mark}-old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except (OSError, LatentDiffError) as error:
        if old.exists():
            old.rename(folder)
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or str(cause).replace(str(temporary), str(folder))
        raise CheckpointError(f"cannot write {folder}: {reason}; free some space or choose another place") from error
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(folder: Path, known: Collection[str], mark: str) -> None:
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise CheckpointError(f"cannot write a model folder to {folder}: this program runs in it; name a new folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"cannot write a model folder to {folder}: a file of that name exists")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
    if foreign or (any(folder.iterdir()) and not (folder / mark).exists()):
        raise CheckpointError(
            f"refusing to replace {folder}: it holds {listing(folder)}, not only a model; choose a new folder"
        )
