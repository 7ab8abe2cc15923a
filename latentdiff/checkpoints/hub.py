"""Where a model's files are: a path, or a Hugging Face hub id, looked up in the local cache before any socket is
opened."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from latentdiff.checkpoints.distilled import FOLDER, LORA_FILE, OPTIONS_FILE
from latentdiff.checkpoints.families import family_with, is_text, parts_in
from latentdiff.checkpoints.folder import CONFIGS, INDEX, shard_names, weight_files
from latentdiff.checkpoints.layout import BESIDE, STEMS, weight_candidates
from latentdiff.checkpoints.raw import PART_LABELS
from latentdiff.errors import CheckpointError
from latentdiff.files import check_named, nothing_at
from latentdiff.reading.json import read_object
from latentdiff.reading.plain import exists

_DISTILLED = {f"{FOLDER}/{LORA_FILE}", f"{FOLDER}/{OPTIONS_FILE}"}
_DEPTH = (
    "depth_estimator/config.json",
    "depth_estimator/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)
_TOKENIZER = ("tokenizer/*.json", "tokenizer/*.txt", "tokenizer_2/*.json", "tokenizer_2/*.txt")


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder or file that `source` names; a hub id is downloaded unless the cache has all of it.

    Raises:
        CheckpointError: nothing is there, or the hub cannot be reached or does not have it.
    """
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if name and exists(path):
        return path
    check_named(name)
    return _cached(name) or _download(name)


def _cached(hub_id: str) -> Path | None:
    """The cached snapshot, if every file that is needed is in it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(hub_id, INDEX)
    except ValueError as error:  # two dots, a hyphen at the end: the hub has rules of its own
        raise nothing_at(hub_id) from error
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    try:
        parts = parts_in(read_object(folder / INDEX))
        needed = [CONFIGS[name] for name in (*parts, "scheduler")]
        vocabularies = [folder / name for name in family_with(parts).tokenizers]
        if not all((folder / path).exists() for path in needed) or not all(map(_has_vocabulary, vocabularies)):
            return None
        for part in parts:
            weight_files(folder, part)
    except CheckpointError:
        return None
    return folder


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def _download(hub_id: str) -> Path:
    """Fetch the files that are needed, one format of the weights only."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{hub_id} is not in the local cache and HF_HUB_OFFLINE forbids to download it; unset it, or give a folder"
        )
    try:
        # Not `list_repo_files`, which tries again and again for half a minute where there is no network.
        listed = {file.rfilename for file in HfApi().model_info(hub_id).siblings or ()}
        for name in _needed(hub_id, listed):
            path = Path(hf_hub_download(hub_id, name))
            if name.endswith(".json") and "/" in name and ".index." in name:
                for shard in shard_names(path):
                    hf_hub_download(hub_id, f"{name.split('/')[0]}/{shard}")
        return Path(hf_hub_download(hub_id, INDEX)).parent
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises errors of whichever network library it was built on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{hub_id} is not in the local cache and cannot be downloaded ({type(error).__name__}: {reason}); check "
            "the name and the connection, or give a folder"
        ) from error


def _needed(hub_id: str, listed: set[str]) -> list[str]:
    """Configuration, tokenizer, and for every part its best weights (or their index, if they are sharded)."""
    if INDEX not in listed:
        raise CheckpointError(f"{hub_id} is no model in the diffusers layout: it has no {INDEX}")
    names = [INDEX, *(path for path in CONFIGS.values() if path in listed)]
    names += sorted(name for name in listed if any(fnmatch(name, pattern) for pattern in _TOKENIZER))
    names += [name for name in _DEPTH if name in listed]
    if CONFIGS["image_normalizer"] in listed:  # of unCLIP
        best = (next((name for name in weight_candidates(part) if name in listed), None) for part in BESIDE)
        names += [name for name in best if name]
    for part in STEMS:
        best = next((name for name in weight_candidates(part) if name in listed), None)
        if best is None and not is_text(part):  # a model has one of the two text encoders, or both
            raise CheckpointError(f"{hub_id} has no weights of the {PART_LABELS[part]} that can be read here")
        names += [best] if best else []
    return [*names, *sorted(_DISTILLED)] if listed >= _DISTILLED else names
