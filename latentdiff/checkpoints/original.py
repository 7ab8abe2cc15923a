"""The original single-file layout of Stable Diffusion 1.x and 2.x (CompVis, Stability): reading and writing it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import tables
from latentdiff.checkpoints.architecture import ORIGINAL_PREFIXES, identify, require_original
from latentdiff.checkpoints.files import TensorFile, read_tensors
from latentdiff.checkpoints.folder import model_index, save_tensors
from latentdiff.checkpoints.hashing import remembered
from latentdiff.checkpoints.infer import infer_configs, is_open_clip
from latentdiff.checkpoints.keymap import KeyMap, compare
from latentdiff.checkpoints.layout import PARTS
from latentdiff.checkpoints.modelspec import modelspec
from latentdiff.checkpoints.modules import (
    POSITION_IDS,
    build_module,
    check_fits,
    expected_shapes,
    parse_config,
    shapes_of,
)
from latentdiff.checkpoints.parts import PartWeights
from latentdiff.checkpoints.prediction import PredictionType, probe_prediction_type, read_prediction_type
from latentdiff.checkpoints.prefixes import unwrapped
from latentdiff.checkpoints.raw import PART_LABELS, RawModel
from latentdiff.checkpoints.schedules import stored_schedule
from latentdiff.checkpoints.tokenizer import clip_tokenizer_files, with_clip_vocabulary, without_clip_vocabulary
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.networks.tiny_vae import NAME as TINY_VAE
from latentdiff.reading.json import parse_object

METADATA = "latentdiff"  # the metadata entry in which `convert` keeps what the layout has no place for

_SHOWN = 5  # names in a message

Tensors = dict[str, Tensor]

# Tensors that are no weights of the three parts: the training schedule, averaged weights, losses, what OpenCLIP
# needs for its pooled output, textual inversion's own embeddings, and markers.
_EXTRAS = re.compile(
    r"""(
      (betas | (sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?
       | posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2) | logvar | lvlb_weights | scale_factor
       | v_pred | ztsnr)$
    | (first_stage_model\.)?(model_ema|loss)\.
    | (first_stage_model|cond_stage_model)\.(model_)?ema
    | cond_stage_model\.(model\.|transformer\.)?(text_projection|logit_scale|attn_mask)
    | cond_stage_model\.(model\.visual|transformer\.(vision_model|visual_projection))\.
    | embedding_manager\.
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class PartLayout:
    """How one part lies in the file: its prefix, its table, and what is done to tensors besides renaming."""

    prefix: str
    names: KeyMap
    to_ours: Callable[[Tensors], Tensors] = dict
    to_theirs: Callable[[Tensors], Tensors] = dict

    def theirs(self, name: str) -> str:
        """The name in the file, or our own where several of ours share one there."""
        renamed = self.names.to_theirs(name)
        return name if renamed is None else self.prefix + renamed


def layouts(configs: dict[str, dict[str, Any]], *, open_clip: bool) -> dict[str, PartLayout]:
    """The layout of every part of a model with these configurations."""
    layers = configs["text_encoder"].get("num_hidden_layers", 12)
    if not isinstance(layers, int):
        raise ConfigError(f"the text encoder's num_hidden_layers must be a number, found {layers!r}")
    text = (
        PartLayout("cond_stage_model.", tables.open_clip_map(layers), tables.split_fused, tables.join_fused)
        if open_clip
        else PartLayout("cond_stage_model.", tables.clip_map())
    )
    return {
        "unet": PartLayout(ORIGINAL_PREFIXES["unet"], tables.unet_map(parse_config("unet", configs["unet"]))),
        "vae": PartLayout(
            ORIGINAL_PREFIXES["vae"],
            tables.vae_map(parse_config("vae", configs["vae"])),
            tables.attention_to_linear,
            tables.attention_to_convolution,
        ),
        "text_encoder": text,
    }


def read_original(path: Path, *, ema: bool = False, prediction_type: str | None = None) -> RawModel:
    """Map an original single file, `.safetensors` or `.ckpt`.

    Args:
        path: the file.
        ema: take the U-Net's averaged weights in place of the last ones.
        prediction_type: "epsilon" or "v_prediction"; None reads or guesses it.

    Raises:
        CheckpointError: the file is damaged, something else, incomplete, or has no averaged weights.
    """
    file = read_tensors(path)
    file = replace(file, tensors=unwrapped(file.tensors))
    shapes = shapes_of(file.tensors)
    identity = identify(shapes)
    require_original(path, identity, shapes)
    stored = _stored(file)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in set(identity.strays)}
    found = PredictionType(prediction_type, "the argument") if prediction_type else None
    if not found and not stored:
        found = read_prediction_type(file)
    raw = _assemble(file, tensors, stored, found.name if found else "v_prediction", ema=ema)
    if not found and not stored:
        found = probed(raw, second_family="2.x" in identity.family)
        raw = _assemble(file, tensors, stored, found.name, ema=ema)
    if found:
        raw.configs["scheduler"]["prediction_type"] = found.name
        if found.guessed:
            raw.warnings.append(
                f"guessed that {path.name} predicts {found.name}, from {found.source}; if pictures look wrong, give "
                "the other prediction_type"
            )
    if not stored:
        raw.configs["scheduler"] |= stored_schedule(tensors)
    if identity.strays:
        raw.warnings.append(
            f"{path.name} holds {len(identity.strays)} tensors of something else, which are left out: "
            f"{', '.join(identity.strays[:_SHOWN])}"
        )
    return raw


def assembled(path: Path, parts: Mapping[str, PartWeights], prediction_type: str | None) -> RawModel:
    """A model of parts that lie in different files; `path` is that of the U-Net, after which it is called."""
    configs = {part: given.config for part, given in parts.items()}
    unet = parse_config("unet", configs["unet"])
    open_clip = unet.use_linear_projection
    raw = RawModel(
        source=path,
        tensors={part: dict(parts[part].tensors) for part in PARTS},
        configs={**configs, "scheduler": ScheduleConfig().to_diffusers(), "model_index": model_index(unet.in_channels)},
        tokenizer=parts["text_encoder"].tokenizer or clip_tokenizer_files("!" if open_clip else "<|endoftext|>"),
        weight_files=tuple(dict.fromkeys(file for part in PARTS for file in parts[part].files)),
    )
    found = PredictionType(prediction_type, "the argument") if prediction_type else probed(raw, second_family=open_clip)
    raw.configs["scheduler"]["prediction_type"] = found.name
    if found.guessed:
        raw.warnings.append(f"guessed that {path.name} predicts {found.name}, from {found.source}")
    return raw


def write_original(raw: RawModel, path: Path) -> None:
    """Write a model as one safetensors file in the original layout, atomically.

    What the layout has no place for (configuration, tokenizer) goes into the file's metadata.

    Raises:
        CheckpointError: the weights do not fit the configuration.
        LatentDiffError: the file cannot be written.
    """
    if raw.configs["vae"].get("_class_name") == TINY_VAE:
        raise CheckpointError("a single file cannot hold a tiny VAE; convert the model with its own VAE, without --vae")
    # The original programs tell the two text encoders apart by these names, and expect OpenCLIP with SD 2.x.
    open_clip = bool(raw.configs["unet"].get("use_linear_projection")) and (
        raw.configs["text_encoder"].get("hidden_act") == "gelu"
    )
    tensors: Tensors = {}
    for part, layout in layouts(raw.configs, open_clip=open_clip).items():
        check_fits(raw, part)
        tensors |= {layout.theirs(name): tensor for name, tensor in layout.to_theirs(raw.tensors[part]).items()}
    kept = {
        "configs": raw.configs,
        "tokenizer": without_clip_vocabulary(raw.tokenizer),
        "names": raw.names,
    }
    about = {name: text for name, text in modelspec(raw, path.stem).items() if name not in raw.metadata}
    kept["added"] = list(about)
    metadata = {"format": "pt", **about, **raw.metadata, METADATA: json.dumps(kept)}
    save_tensors({**tensors, **raw.extras}, path, metadata)


def has_ema(names: Iterable[str]) -> bool:
    """Whether the file holds an averaged copy of every weight of the U-Net."""
    names = set(names)
    unet = [name for name in names if name.startswith(ORIGINAL_PREFIXES["unet"])]
    return bool(unet) and all(tables.ema_name(name) in names for name in unet)


def _assemble(
    file: TensorFile, tensors: Tensors, stored: dict[str, Any], prediction_type: str, *, ema: bool
) -> RawModel:
    shapes = shapes_of(tensors)
    text_prefix = ORIGINAL_PREFIXES["text_encoder"]
    open_clip = is_open_clip({n.removeprefix(text_prefix): s for n, s in shapes.items() if n.startswith(text_prefix)})
    configs = stored.get("configs") or infer_configs(shapes, prediction_type)
    if ema:
        tensors = _with_ema(file.path, tensors)
    parts: dict[str, Tensors] = {}
    used: set[str] = set()
    for part, layout in layouts(configs, open_clip=open_clip).items():
        parts[part], names = _read_part(file.path, part, layout, tensors, configs[part])
        used |= names
    extras = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_unknown(file.path, extras)
    pad_token = "!" if open_clip else "<|endoftext|>"
    return RawModel(
        source=file.path,
        tensors=parts,
        configs=configs,
        tokenizer=with_clip_vocabulary(stored["tokenizer"]) if stored else clip_tokenizer_files(pad_token),
        extras=extras,
        names=stored.get("names", {}),
        metadata={
            name: text
            for name, text in file.metadata.items()
            if name not in (METADATA, "format", *stored.get("added", ()))
        },
        weight_files=(file.path,),
    )


def _read_part(
    path: Path, part: str, layout: PartLayout, tensors: Tensors, config: dict[str, Any]
) -> tuple[Tensors, set[str]]:
    """The tensors of one part under our names, and the names in the file that they came from."""
    renamed: Tensors = {}
    used: set[str] = set()
    unknown: Tensors = {}
    for name, tensor in tensors.items():
        if not name.startswith(layout.prefix):
            continue
        ours = layout.names.to_ours(name.removeprefix(layout.prefix))
        if ours is not None:
            renamed[ours] = tensor
            used.add(name)
        elif not _EXTRAS.match(name) and not _is_unused_layer(name, config):
            unknown[name] = tensor
    found = layout.to_ours(renamed)
    weights = {layout.theirs(name): tensor for name, tensor in found.items() if name != POSITION_IDS}
    expected = {layout.theirs(name): shape for name, shape in expected_shapes(part, config, len(found)).items()}
    compare(PART_LABELS[part], expected, shapes_of(weights | unknown)).raise_unless_fits(path)
    return found, used


def _is_unused_layer(name: str, config: dict[str, Any]) -> bool:
    """The last layer of OpenCLIP's tower, whose output SD 2.x does not read."""
    layer = re.match(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.", name)
    return layer is not None and int(layer[1]) == config.get("num_hidden_layers")


def _refuse_unknown(path: Path, extras: Tensors) -> None:
    prefixes = tuple(ORIGINAL_PREFIXES.values())
    unknown = {n: tuple(t.shape) for n, t in extras.items() if not _EXTRAS.match(n) and not n.startswith(prefixes)}
    compare("content", {}, unknown).raise_unless_fits(path)


def _with_ema(path: Path, tensors: Tensors) -> Tensors:
    if not has_ema(tensors):
        raise CheckpointError(f"{path} has no EMA weights (model_ema.*); load it without ema")
    return {
        name: tensors[tables.ema_name(name)] if name.startswith(ORIGINAL_PREFIXES["unet"]) else tensor
        for name, tensor in tensors.items()
        if not name.startswith("model_ema.")
    }


def _stored(file: TensorFile) -> dict[str, Any]:
    """What `convert` wrote into the metadata; empty for files of others.

    Raises:
        CheckpointError: it is damaged, or names tokenizer files outside their folder.
    """
    if METADATA not in file.metadata:
        return {}
    stored = parse_object(
        file.metadata[METADATA],
        f"the entry {METADATA} of {file.path}",
        remedy="convert it from its source again",
        finite=False,  # a scheduler's configuration may hold -Infinity
    )
    try:
        sound = all(isinstance(stored["configs"][name], dict) for name in (*PARTS, "scheduler", "model_index"))
        sound = sound and all(
            isinstance(text, str) and Path(name).name == name for name, text in stored["tokenizer"].items()
        )
        sound = sound and all(_are_texts(names) for names in stored["names"].values())
        sound = sound and _are_texts(dict(enumerate(stored.get("added", []))))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file.path} has damaged {METADATA} metadata; convert it from its source again")
    return stored


def _are_texts(names: Any) -> bool:
    return isinstance(names, dict) and all(isinstance(name, str) for name in names.values())


def probed(raw: RawModel, *, second_family: bool) -> PredictionType:
    """Run the U-Net once; half precision is widened to bfloat16, which CPUs compute at a bearable speed.

    What a large file showed is remembered.
    """
    kept = remembered(raw.weight_files[0], "predicts", lambda: _probe(raw, second_family).to_text())
    return PredictionType.from_text(kept)


def _probe(raw: RawModel, second_family: bool) -> PredictionType:
    types = {tensor.dtype for tensor in raw.tensors["unet"].values()}
    unet = build_module(raw, "unet", torch.float32 if types & {torch.float32, torch.float64} else torch.bfloat16)
    dtype = next(unet.parameters()).dtype
    config = parse_config("unet", raw.configs["unet"])

    def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x.to(dtype), t, context.to(dtype))

    return probe_prediction_type(run, config.in_channels, config.cross_attention_dim, second_family=second_family)
