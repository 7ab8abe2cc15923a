"""Saying what a file or folder is. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.checkpoints.architecture import (
    adapter_kinds,
    adapter_layer,
    family_name,
    identify,
    lora_dialect,
)
from latentdiff.checkpoints.families import family_in, family_with
from latentdiff.checkpoints.files import IMAGE, SAFETENSORS, FileWarning, TensorFile, read_tensors, sniff
from latentdiff.checkpoints.folder import EXTRAS, INDEX, listing, read_folder
from latentdiff.checkpoints.habits import take_habit, with_habit
from latentdiff.checkpoints.hashing import SHORT, file_hash, model_hash
from latentdiff.checkpoints.hub import locate
from latentdiff.checkpoints.ip_adapter import joined_names
from latentdiff.checkpoints.modules import check_fits, parse_config, shapes_of
from latentdiff.checkpoints.original import has_ema, read_original
from latentdiff.checkpoints.prefixes import unwrapped
from latentdiff.checkpoints.raw import RawModel
from latentdiff.checkpoints.steering_facts import facts_of
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import DataError, LatentDiffError, printable
from latentdiff.recipe import COMMENT, JSON_CHUNK, TEXT_CHUNK, has_comment

_LABELS = {
    "kind": "kind",
    "family": "family",
    "prediction_type": "predicts",
    "sampler": "sampler",
    "ema": "EMA weights",
    "lora": "LoRA",
    "bytes": "bytes",
    "sha256": "SHA-256",
    "short_hash": "short hash",
}


@dataclass
class Inspection:
    """What `inspect` found. Empty fields say nothing about the thing."""

    path: str
    kind: str  # "diffusers folder", "original single file (safetensors)", "PNG image", ...
    family: str = ""
    parameters: dict[str, int] = field(default_factory=dict)  # part -> number of weights
    dtypes: dict[str, int] = field(default_factory=dict)  # type -> number of weights
    prediction_type: str = ""
    sampler: str = ""
    ema: bool | None = None  # averaged weights beside the last ones
    lora: dict[str, Any] = field(default_factory=dict)  # names, rank, layers, parts
    bytes: int = 0
    sha256: str = ""
    problem: str = ""  # why it cannot be loaded
    notes: list[str] = field(default_factory=list)

    @property
    def short_hash(self) -> str:
        """The ten digits that web UIs show."""
        return self.sha256[:SHORT]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {**asdict(self), "short_hash": self.short_hash}

    def to_json(self) -> str:
        """The report for programs."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """The report for people, one fact a line."""
        lines = [self.path]
        for name, label in _LABELS.items():
            value = getattr(self, name)
            if value not in ("", None, {}, 0):
                lines.append(f"  {label + ':':<14}{_show(value)}")
        for part, count in self.parameters.items():
            label = {"text_encoder_2": "second text"}.get(part, part.replace("_", " "))
            lines.append(f"  {label + ':':<14}{count:,} parameters")
        if self.dtypes:
            total = sum(self.dtypes.values())
            lines.append(f"  {'types:':<14}" + ", ".join(f"{n} {c / total:.0%}" for n, c in self.dtypes.items()))
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(map(printable, lines + [f"  problem: {self.problem}"] * bool(self.problem)))


def inspect(source: str | os.PathLike[str]) -> Inspection:
    """Say what a model, an adapter, an image or any other file is: family, size, types, prediction type, hash.

    Damaged and foreign files are reported (`problem`), not raised.

    Args:
        source: a file, a folder, or a hub id (which is downloaded unless it is cached).

    Raises:
        CheckpointError: there is nothing of that name.
    """
    path = locate(source)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", FileWarning)
        report = _inspect_folder(path) if path.is_dir() else _inspect_file(path)
    notes = [str(warning.message) for warning in seen if isinstance(warning.message, FileWarning)]
    report.notes += dict.fromkeys(notes)
    return report


def _inspect_file(path: Path) -> Inspection:
    kind = sniff(path)
    report = Inspection(os.fspath(path), kind, bytes=path.stat().st_size, sha256=file_hash(path))
    if kind.endswith(IMAGE):
        _describe_image(report, path)
        return report
    try:
        file = read_tensors(path)
    except LatentDiffError as error:
        report.problem = str(error)
        return report
    _describe_tensors(report, file, "safetensors" if kind == SAFETENSORS else "pickle")
    return report


def _describe_tensors(report: Inspection, file: TensorFile, wrapping: str) -> None:
    vectors = file.others.get("string_to_param")  # A1111's embeddings
    tensors = (
        {f"string_to_param.{name}": tensor for name, tensor in vectors.items()} if isinstance(vectors, dict) else None
    )
    file = replace(file, tensors=tensors or unwrapped(joined_names(file)))
    identity = identify(shapes_of(file.tensors))
    report.family = identity.family
    report.dtypes = _count_types(file.tensors.values())
    if identity.kind == "model":
        report.kind = f"original single file ({wrapping})"
        report.ema = has_ema(file.tensors)
        for part in identity.parts:
            report.parameters[part] = _count(file.tensors, family_in(file.tensors).prefixes[part])
        try:
            _describe_model(report, read_original(file.path))
        except LatentDiffError as error:
            report.problem = str(error)
    elif identity.kind == "lora":
        report.kind = f"LoRA ({wrapping})"
        report.lora = _lora(file)
    elif identity.kind == "control":
        _describe_steering(report, file, identity.family, wrapping)
    else:
        names = {"part": "part of a model", "embedding": "textual inversion", "upscaler": "upscaler"}
        report.kind = f"{names.get(identity.kind, 'weights')} ({wrapping})"
        report.parameters = {"+".join(identity.parts) or "all": _count(file.tensors, "")}


def _describe_steering(report: Inspection, file: TensorFile, what: str, wrapping: str) -> None:
    report.kind, report.parameters = f"{what} ({wrapping})", {"all": _count(file.tensors, "")}
    try:
        report.family, notes = facts_of(what, file.path)
        report.notes += notes
    except LatentDiffError as error:
        report.problem = str(error)


def _inspect_folder(folder: Path) -> Inspection:
    report = Inspection(os.fspath(folder), "diffusers folder")
    report.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not (folder / INDEX).exists():
        return _describe_other_folder(report, folder)
    try:
        raw = read_folder(folder)
        _describe_model(report, raw)
        report.sha256 = model_hash(raw.weight_files)
        if any(name.startswith("model_ema.") for name in raw.extras):
            report.notes.append(f"averaged weights are kept in {EXTRAS}; convert back to a single file to use them")
        for part in raw.parts:
            check_fits(raw, part)
    except LatentDiffError as error:
        report.problem = str(error)
    return report


def _describe_model(report: Inspection, raw: RawModel) -> None:
    unet = parse_config("unet", raw.configs["unet"])
    report.family = family_name(
        family_with(raw.parts),
        linear=unet.use_linear_projection,
        extra_channels=unet.in_channels - unet.out_channels,
        width=unet.block_out_channels[0],
        context=unet.cross_attention_dim,
        varies=unet.class_dim is not None,
    )
    report.parameters = {part: _count(raw.tensors[part], "") for part in raw.parts}
    report.dtypes = _count_types(tensor for part in raw.parts for tensor in raw.tensors[part].values())
    name = Path(report.path).stem
    habit = take_habit(raw, name)
    schedule = parse_config("scheduler", raw.configs["scheduler"])
    report.notes += [with_habit(schedule, habit, name).drawing.habit] if habit else []
    report.prediction_type = schedule.prediction_type
    report.sampler = _sampler(schedule)
    report.notes += [*raw.warnings, *filter(None, (schedule.drawing.refusal, *schedule.drawing.notes))]


def _sampler(schedule: ScheduleConfig) -> str:
    """What is drawn with where nothing is asked for, and the scheduler that the file names."""
    drawing = schedule.drawing
    name = drawing.file.get("_class_name")
    if drawing.refusal or not drawing.sampler:
        return f"none here, for {name}" if name else ""
    spacing = drawing.spacing or schedule.timestep_spacing
    return f"{drawing.sampler}{f', {spacing}' if spacing else ''} ({name})"


def _describe_other_folder(report: Inspection, folder: Path) -> Inspection:
    names = {entry.name for entry in folder.iterdir()}
    if {"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names:
        report.kind = "tokenizer folder"
        return report
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if "config.json" in names and weights:
        inner = _inspect_file(weights[0])
        inner.path, inner.kind = report.path, f"folder of a {inner.kind}"
        return inner
    report.kind = "folder without a model"
    report.problem = f"expected {INDEX}, found {listing(folder)}"
    return report


def _describe_image(report: Inspection, path: Path) -> None:
    from latentdiff.reading.images import opened
    from latentdiff.reading.texts import texts_of

    try:
        with opened(path, str(path)) as image:
            image.load()
            report.family = f"{image.width}x{image.height} pixels"
            texts = texts_of(image)
            chunks = [name for name in (JSON_CHUNK, TEXT_CHUNK) if name in texts]
            chunks += [COMMENT] if has_comment(image.info) else []
    except DataError as error:
        report.problem = str(error)
        return
    report.notes.append(f"recipe present ({', '.join(chunks)})" if chunks else "no recipe in it")


def _lora(file: TensorFile) -> dict[str, Any]:
    inner = ("lora_down", "lora_A", "lora.down", "_lora.down", "hada_w1_b", "lokr_w2_b", "a2.weight")
    widths = {
        tensor.shape[0] for name, tensor in file.tensors.items() if tensor.ndim > 1 and any(m in name for m in inner)
    }
    layers = {adapter_layer(name) for name in file.tensors if not name.startswith("bundle_emb.")}
    parts = {
        "text_encoder": ("lora_te", "text_encoder", "text_model"),
        "unet": ("lora_unet", "unet", "_blocks", "lycoris_", "diffusion_model"),
    }
    facts: dict[str, Any] = {
        "kinds": adapter_kinds(file.tensors),
        "names": lora_dialect(file.tensors),
        "rank": sorted(widths),
        "layers": len(layers),
        "parts": [part for part, marks in parts.items() if any(mark in name for name in layers for mark in marks)],
    }
    words = sorted({name.split(".")[1] for name in file.tensors if name.startswith("bundle_emb.")})
    facts |= {"words": words} if words else {}
    base = file.metadata.get("ss_sd_model_name") or file.metadata.get("modelspec.architecture")
    return {name: value for name, value in facts.items() if value} | ({"base": base} if base else {})


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    floating = (tensor for name, tensor in tensors.items() if name.startswith(prefix) and tensor.is_floating_point())
    return sum(tensor.numel() for tensor in floating)


def _count_types(tensors: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counts.most_common())


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
